"""Keys, values and hidden states of many paths in one buffer, addressed by row and slot.

A row is a path being written. Slot s of a row holds, for its position s, the keys and values of every layer that the
position has passed, and the hidden states at the depths asked for. A depth d is a number of layers: position s has
come to depth d once it has passed layers 0..d-1. A slot is valid for a query at position t exactly when s <= t, so
what an earlier path left behind it is masked, never trusted to be zero. The last slot is a bin for the padding of
ragged passes.

What outlives a row is a `Prefix`: immutable segments copied out of rows, shared by every path that begins with them.
Rejecting a proposal drops a reference; accepting it keeps one. Nothing is ever written into a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_MOST_SEGMENTS = 16
_LENGTH_STEP = 64


@dataclass(frozen=True, eq=False)
class Segment:
    """Positions start..start+n-1 at one depth.

    keys, values: (depth, heads, n, dim), those of layers 0..depth-1. hidden: for depths up to this one, the states
    that come out of that many layers, (n, width); at the full depth, after the final norm.
    """

    start: int
    keys: torch.Tensor
    values: torch.Tensor
    hidden: Mapping[int, torch.Tensor]

    @property
    def stop(self) -> int:
        return self.start + self.keys.shape[2]

    @property
    def depth(self) -> int:
        return self.keys.shape[0]

    def after(self, start: int) -> Segment:
        """Its positions from `start` on; a view."""
        n = start - self.start
        hidden = {d: states[n:] for d, states in self.hidden.items()}
        return Segment(start, self.keys[:, :, n:], self.values[:, :, n:], hidden)

    @property
    def kept(self) -> frozenset[int]:
        """The depths at which hidden states are there."""
        return frozenset(self.hidden)


@dataclass(frozen=True, eq=False, repr=False)
class Prefix:
    """The activations of positions 0..length-1: segments in order, each read up to where the next begins.

    Depths never rise from one segment to the next: a position cannot have passed a layer that an earlier one has not.
    """

    segments: tuple[Segment, ...] = ()
    length: int = 0

    def upto(self, length: int) -> Prefix:
        """The first `length` positions (all, if there are fewer)."""
        if length >= self.length:
            return self
        return Prefix(tuple(s for s in self.segments if s.start < length), length)

    def parts(self) -> Iterator[tuple[Segment, int]]:
        """Each segment and the position where it stops being read."""
        for i, s in enumerate(self.segments):
            yield s, self.segments[i + 1].start if i + 1 < len(self.segments) else self.length

    def reaches(self, depth: int) -> int:
        """How many positions, from the first on, have come to `depth` and kept the state there."""
        reached = 0
        for s, stop in self.parts():
            if depth not in s.hidden:
                break
            reached = stop
        return reached

    def continued_by(self, other: Prefix) -> Prefix:
        """This prefix, and what `other`, one of the same tokens, holds of the positions beyond it."""
        rest = []
        for s, stop in other.parts():
            if stop > self.length:
                rest.append(s if s.start >= self.length else s.after(self.length))
        return Prefix((*self.segments, *rest), other.length) if rest else self

    def has(self, depth: int, position: int) -> bool:
        """Whether the state of a position at `depth` is there."""
        return any(s.start <= position < stop and depth in s.hidden for s, stop in self.parts())

    def followed_by(self, segment: Segment) -> Prefix:
        """This prefix and the segment that starts where it ends."""
        segments = (*self.segments, segment)
        if len(segments) > _MOST_SEGMENTS:  # keep the first, which is the prompt's and shared
            n = next(i for i in range(len(segments), 0, -1) if i == 1 or segments[i - 1].kept != segment.kept)
            if len(segments) - n > 1:
                segments = (*segments[:n], _merged(segments[n:]))
        return Prefix(segments, segment.stop)

    def hidden(self, depth: int, start: int, stop: int) -> torch.Tensor:
        """Hidden states at `depth` of positions start..stop-1, shape (stop - start, width)."""
        read = [(s, max(start, s.start), min(stop, end)) for s, end in self.parts()]
        parts = [s.hidden[depth][a - s.start : b - s.start] for s, a, b in read if a < b]
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def _merged(segments: Sequence[Segment]) -> Segment:
    stops = [s.start for s in segments[1:]] + [segments[-1].stop]
    parts = [(s, stop - s.start) for s, stop in zip(segments, stops, strict=True)]
    return Segment(
        segments[0].start,
        torch.cat([s.keys[:, :, :n] for s, n in parts], dim=2),
        torch.cat([s.values[:, :, :n] for s, n in parts], dim=2),
        {d: torch.cat([s.hidden[d][:n] for s, n in parts]) for d in segments[0].hidden},
    )


class Slot:
    """A place in the buffer: its current row, and for each depth d how many slots, from 0 on, have come to it."""

    __slots__ = ("filled", "index", "poisoned")

    def __init__(self, index: int, filled: dict[int, int]) -> None:
        self.index, self.filled, self.poisoned = index, filled, False

    def next_depth(self, goal: int) -> int:
        """The deepest depth below `goal` that more positions have come to than to `goal`; 0 if there is none."""
        return max((d for d, n in self.filled.items() if d < goal and n > self.filled[goal]), default=0)


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
        self.depths: tuple[int, ...] = (layers,)
        self.most = most
        self._options = {"dtype": dtype, "device": device}
        self.used: list[Slot] = []
        self._allocate(0, 0)

    def keep(self, depth: int) -> None:
        """From now on keep the hidden states at this depth. No row may be in use."""
        assert not self.used, "depths are added between runs"
        if depth not in self.depths:
            self.depths = tuple(sorted({*self.depths, depth}))
            self._allocate(self.capacity, self.length)

    def drop(self, depth: int) -> None:
        """No longer keep the hidden states at this depth. No row may be in use."""
        assert not self.used, "depths are dropped between runs"
        self.depths = tuple(d for d in self.depths if d != depth)
        self._allocate(self.capacity, self.length)

    @property
    def dims(self) -> tuple[int, int]:
        """Sizes of one head's keys and values."""
        return self._shape[1][1], self._shape[2][1]

    @property
    def free(self) -> int:
        """How many more drafts can have a row."""
        return max(self.most - len(self.used), 0)

    @property
    def bytes_per_token(self) -> int:
        """Memory of one slot: keys, values and hidden states."""
        layers, key, value, width = self._shape
        numbers = layers * (key[0] * key[1] + value[0] * value[1]) + width * len(self.depths)
        return numbers * self.keys.element_size()

    def _allocate(self, rows: int, length: int) -> None:
        layers, key, value, width = self._shape
        self.capacity, self.length = rows, length
        self.keys = torch.zeros(layers, rows, key[0], length + 1, key[1], **self._options)
        self.values = torch.zeros(layers, rows, value[0], length + 1, value[1], **self._options)
        self.hidden = {d: torch.zeros(rows, length + 1, width, **self._options) for d in self.depths}

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
        for d, kept in hidden.items():
            self.hidden[d][:n, :old] = kept[:n, :old]

    def clear(self) -> None:
        """Give the buffer back; the next `reserve` allocates anew. No row may be in use."""
        assert not self.used, "the buffer is given back between runs"
        self._allocate(0, 0)

    def acquire(self, prefix: Prefix, length: int) -> Slot:
        """A row that holds `prefix`, with room for `length` positions."""
        if len(self.used) == self.capacity or length > self.length:
            self.reserve(max(2 * len(self.used), 1) if len(self.used) == self.capacity else 0, length)
        slot = Slot(len(self.used), {d: prefix.reaches(d) for d in self.depths})
        self.used.append(slot)
        for s, stop in prefix.parts():
            n = stop - s.start
            self.keys[: s.depth, slot.index, :, s.start : stop] = s.keys[:, :, :n]
            self.values[: s.depth, slot.index, :, s.start : stop] = s.values[:, :, :n]
            for d in s.hidden.keys() & self.hidden.keys():
                self.hidden[d][slot.index, s.start : stop] = s.hidden[d][:n]
        return slot

    def release(self, slot: Slot) -> None:
        """Give the row back; the last row in use takes its place."""
        last = self.used[-1]
        if slot.poisoned:  # a masked NaN is still 0 * NaN for whoever comes next
            for buffer, _ in self._buffers():
                buffer[:, slot.index].zero_()
        self._swap(slot, last)
        self.used.pop()

    def arrange(self, slots: Sequence[Slot]) -> None:
        """Bring these rows, in this order where it costs nothing, to places 0..len(slots)-1."""
        wanted = set(map(id, slots))
        outside = [s for s in slots if s.index >= len(slots)]
        intruders = [s for s in self.used[: len(slots)] if id(s) not in wanted]
        for slot, intruder in zip(outside, intruders, strict=True):
            self._swap(slot, intruder, keep_second=True)

    def _buffers(self) -> list[tuple[torch.Tensor, int]]:
        """Every buffer as (..., rows, ...) with the rows on axis 1, and the axis of its positions."""
        return [(self.keys, 3), (self.values, 3), *((h[None], 2) for h in self.hidden.values())]

    def _swap(self, a: Slot, b: Slot, keep_second: bool = False) -> None:
        """Exchange the places of two rows. Unless `keep_second`, what `a` held is not kept."""
        if a is b:
            return
        n = max(max(a.filled.values()) if keep_second else 0, max(b.filled.values()))
        for buffer, axis in self._buffers():
            at = (slice(None),) * (axis - 1)
            first = buffer[:, a.index][(*at, slice(n))]
            second = buffer[:, b.index][(*at, slice(n))]
            kept = first.clone() if keep_second else None
            first.copy_(second)
            if kept is not None:
                second.copy_(kept)
        a.index, b.index = b.index, a.index
        self.used[a.index], self.used[b.index] = a, b

    def segment(self, slot: Slot, start: int, depth: int) -> Segment:
        """A copy of the positions of a row from `start` on that have come to `depth`, with every state kept below."""
        at, stop = slot.index, slot.filled[depth]
        kept = [d for d in self.depths if d <= depth and slot.filled[d] >= stop]
        return Segment(
            start,
            self.keys[:depth, at, :, start:stop].clone(),
            self.values[:depth, at, :, start:stop].clone(),
            {d: self.hidden[d][at, start:stop].clone() for d in kept},
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
