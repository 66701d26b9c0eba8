"""Keys and values of many paths in one buffer, addressed by row and slot.

A row is a path being written. Slot s of a row holds the keys and values of its position s in every layer, and the
final hidden state. A slot is valid for a query at position t exactly when s <= t, so what an earlier path left
behind it is masked, never trusted to be zero. The last slot is a bin for the padding of ragged passes.

What outlives a row is a `Prefix`: immutable segments copied out of rows, shared by every path that begins with them.
Rejecting a proposal drops a reference; accepting it keeps one. Nothing is ever written into a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_MOST_SEGMENTS = 16
_LENGTH_STEP = 64


@dataclass(frozen=True, eq=False)
class Segment:
    """Positions start..start+n-1: keys and values (layers, heads, n, dim), final hidden states (n, width)."""

    start: int
    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Prefix:
    """The activations of positions 0..length-1: segments in order, each read up to where the next begins."""

    segments: tuple[Segment, ...] = ()
    length: int = 0

    def upto(self, length: int) -> Prefix:
        """The first `length` positions (all, if there are fewer)."""
        if length >= self.length:
            return self
        return Prefix(tuple(s for s in self.segments if s.start < length), length)

    def followed_by(self, segment: Segment) -> Prefix:
        """This prefix and the segment that starts where it ends."""
        segments = (*self.segments, segment)
        if len(segments) > _MOST_SEGMENTS:  # keep the first, which is the prompt's and shared
            segments = (segments[0], self._merged(segments[1:]))
        return Prefix(segments, segment.start + segment.hidden.shape[0])

    def _merged(self, segments: Sequence[Segment]) -> Segment:
        stops = [s.start for s in segments[1:]] + [segments[-1].start + segments[-1].hidden.shape[0]]
        parts = [(s, stop - s.start) for s, stop in zip(segments, stops, strict=True)]
        return Segment(
            segments[0].start,
            torch.cat([s.keys[:, :, :n] for s, n in parts], dim=2),
            torch.cat([s.values[:, :, :n] for s, n in parts], dim=2),
            torch.cat([s.hidden[:n] for s, n in parts]),
        )

    def hidden(self, start: int, stop: int) -> torch.Tensor:
        """Final hidden states of positions start..stop-1, shape (stop - start, width)."""
        parts = []
        for i, s in enumerate(self.segments):
            end = self.segments[i + 1].start if i + 1 < len(self.segments) else self.length
            a, b = max(start, s.start), min(stop, end)
            if a < b:
                parts.append(s.hidden[a - s.start : b - s.start])
        return torch.cat(parts) if len(parts) != 1 else parts[0]


class Slot:
    """A place in the buffer. `index` is its current row; `filled` how many slots, from 0 on, hold its path."""

    __slots__ = ("filled", "index", "poisoned")

    def __init__(self, index: int) -> None:
        self.index, self.filled, self.poisoned = index, 0, False


class Rows:
    """The buffer. Rows in use are always rows 0..n-1, so that a batch is a view and attention copies nothing.

    Parameters
    ----------
    layers
        Depth of the model.
    key, value
        (heads, dim) of the keys and of the values of one layer.
    width
        Of the hidden states.
    most
        The most rows for drafts. One more can be had for a pass that begins and ends within one call.
    """

    def __init__(
        self,
        layers: int,
        key: tuple[int, int],
        value: tuple[int, int],
        width: int,
        *,
        most: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = (layers, key, value, width)
        self.most = most
        self._options = {"dtype": dtype, "device": device}
        self.used: list[Slot] = []
        self._allocate(0, 0)

    @property
    def free(self) -> int:
        """How many more drafts can have a row."""
        return max(self.most - len(self.used), 0)

    @property
    def bytes_per_token(self) -> int:
        """Memory of one slot: keys, values and hidden state."""
        layers, key, value, width = self._shape
        return (layers * (key[0] * key[1] + value[0] * value[1]) + width) * self.keys.element_size()

    def _allocate(self, rows: int, length: int) -> None:
        layers, key, value, width = self._shape
        self.capacity, self.length = rows, length
        self.keys = torch.zeros(layers, rows, key[0], length + 1, key[1], **self._options)
        self.values = torch.zeros(layers, rows, value[0], length + 1, value[1], **self._options)
        self.hidden = torch.zeros(rows, length + 1, width, **self._options)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` positions; what is in use stays."""
        rows = max(min(rows, self.most + 1), self.capacity)
        length = max(-(-length // _LENGTH_STEP) * _LENGTH_STEP, self.length)
        if (rows, length) == (self.capacity, self.length):
            return
        keys, values, hidden, n, old = self.keys, self.values, self.hidden, len(self.used), self.length
        self._allocate(rows, length)
        self.keys[:, :n, :, :old] = keys[:, :n, :, :old]
        self.values[:, :n, :, :old] = values[:, :n, :, :old]
        self.hidden[:n, :old] = hidden[:n, :old]

    def acquire(self, prefix: Prefix, length: int) -> Slot:
        """A row that holds `prefix`, with room for `length` positions."""
        if len(self.used) == self.capacity or length > self.length:
            self.reserve(max(2 * len(self.used), 1) if len(self.used) == self.capacity else 0, length)
        slot = Slot(len(self.used))
        self.used.append(slot)
        for i, s in enumerate(prefix.segments):
            end = prefix.segments[i + 1].start if i + 1 < len(prefix.segments) else prefix.length
            n = end - s.start
            self.keys[:, slot.index, :, s.start : end] = s.keys[:, :, :n]
            self.values[:, slot.index, :, s.start : end] = s.values[:, :, :n]
            self.hidden[slot.index, s.start : end] = s.hidden[:n]
        slot.filled = prefix.length
        return slot

    def release(self, slot: Slot) -> None:
        """Give the row back; the last row in use takes its place."""
        last = self.used[-1]
        if slot.poisoned:  # a masked NaN is still 0 * NaN for whoever comes next
            for buffer in (self.keys[:, slot.index], self.values[:, slot.index], self.hidden[slot.index]):
                buffer.zero_()
        self._swap(slot, last)
        self.used.pop()

    def arrange(self, slots: Sequence[Slot]) -> None:
        """Bring these rows, in this order where it costs nothing, to places 0..len(slots)-1."""
        wanted = set(map(id, slots))
        outside = [s for s in slots if s.index >= len(slots)]
        intruders = [s for s in self.used[: len(slots)] if id(s) not in wanted]
        for slot, intruder in zip(outside, intruders, strict=True):
            self._swap(slot, intruder, keep_second=True)

    def _swap(self, a: Slot, b: Slot, keep_second: bool = False) -> None:
        """Exchange the places of two rows. Unless `keep_second`, what `a` held is not kept."""
        if a is b:
            return
        n = max(a.filled if keep_second else 0, b.filled)
        for buffer, axis in ((self.keys, 3), (self.values, 3), (self.hidden[None], 2)):
            at = (slice(None),) * (axis - 1)
            first = buffer[:, a.index][(*at, slice(n))]
            second = buffer[:, b.index][(*at, slice(n))]
            kept = first.clone() if keep_second else None
            first.copy_(second)
            if kept is not None:
                second.copy_(kept)
        a.index, b.index = b.index, a.index
        self.used[a.index], self.used[b.index] = a, b

    def segment(self, slot: Slot, start: int) -> Segment:
        """A copy of positions start..filled-1 of a row."""
        at, span = slot.index, slice(start, slot.filled)
        return Segment(
            start,
            self.keys[:, at, :, span].clone(),
            self.values[:, at, :, span].clone(),
            self.hidden[at, span].clone(),
        )


class SlotCache(Cache):
    """The buffer as the cache a Hugging Face decoder writes to: this pass's tokens go to their rows' slots."""

    def __init__(self, rows: Rows, layers: int) -> None:
        self.rows = rows
        self.slots = torch.zeros(0, 0, dtype=torch.long)
        self.visible = 0
        super().__init__(layers=[_SlotLayer(self, i) for i in range(layers)])

    def aim(self, slots: torch.Tensor, visible: int) -> None:
        """Point the next pass at slots (A, Q) of rows 0..A-1; attention sees slots 0..visible-1."""
        self.slots, self.visible = slots, visible
        self.batch = torch.arange(slots.shape[0], device=slots.device)[:, None]


class _SlotLayer(CacheLayerMixin):
    """One layer of a `SlotCache`."""

    is_sliding = False

    def __init__(self, cache: SlotCache, layer: int) -> None:
        super().__init__()
        self._cache, self._layer = cache, layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass  # the buffer exists

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache, n = self._cache, key_states.shape[0]
        keys, values = cache.rows.keys[self._layer], cache.rows.values[self._layer]
        keys[cache.batch, :, cache.slots] = key_states.transpose(1, 2)
        values[cache.batch, :, cache.slots] = value_states.transpose(1, 2)
        return keys[:n, :, : cache.visible], values[:n, :, : cache.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.visible, 0

    def get_seq_length(self) -> int:
        return self._cache.visible - self._cache.slots.shape[1]

    def get_max_length(self) -> int:
        return self._cache.rows.length
