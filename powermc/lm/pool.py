"""What has been run lately, found by its tokens: whoever comes to the same prefix again need not run it.

A chain returns to the same prefixes over and over: its proposals leave a path where its tokens are likely and often
draw what an earlier, rejected proposal drew, and chains of one prompt meet on the same words. A state is a function of
the tokens up to it, so whose draft it comes from makes no difference.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from powermc.lm.memory import trim
from powermc.lm.rows import Prefix, Segment
from powermc.sequences.path import Tokens

DEFAULT_BUDGET = 512 * 2**20
_STEP = 16 * 2**20
"""What is forgotten beyond what is needed, where that is measured: to give memory back takes a while."""


@dataclass(frozen=True, eq=False)
class Entry:
    """Token ids from position 0 on, and activations of at most as many."""

    ids: Tokens
    prefix: Prefix
    keys: tuple[int, ...]


def key_of(ids: Sequence[int]) -> int:
    """A hash of token ids that `extended_key` continues token by token."""
    key = 0
    for token in ids:
        key = extended_key(key, token)
    return key


def extended_key(key: int, token: int) -> int:
    """The hash of the ids of `key` and one more token."""
    return hash((key, token))


class Pool:
    """Sequences of tokens and their activations; the least recently used go when they exceed `budget` bytes.

    With `spare`, which says how many bytes the process may still take (below 0: holds too much), they may exceed the
    budget by as much. Segments that several sequences share are counted once. Those that a path holds as well stay in
    memory after they have gone from here.
    """

    def __init__(self, budget: int = DEFAULT_BUDGET) -> None:
        self.budget, self.bytes = budget, 0
        self.spare: Callable[[], int] | None = None
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._at: dict[int, Entry] = {}
        self._holders: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        self.bytes = 0
        for store in (self._entries, self._at, self._holders):
            store.clear()

    def add(self, ids: Sequence[int], start: int, prefix: Prefix) -> None:
        """Remember the activations of `ids`, as far as `prefix` goes; to be found from position `start` on."""
        ids = tuple(ids[: prefix.length])
        key, keys = key_of(ids[:start]), []
        for token in ids[start:]:
            key = extended_key(key, token)
            keys.append(key)
        if not keys:
            return
        entry = Entry(ids, prefix, tuple(keys))
        self._entries[id(entry)] = entry
        self._at.update(dict.fromkeys(keys, entry))
        for segment in prefix.segments:
            self._holders[id(segment)] += 1
            self.bytes += _bytes(segment) if self._holders[id(segment)] == 1 else 0
        self.settle()

    def settle(self) -> None:
        """Forget what there is no room for."""
        room = self.budget
        if self.spare is not None and self.bytes > room:
            spare = self.spare()
            room = self.bytes if spare >= 0 else max(room, self.bytes + spare - _STEP)
        if self.bytes > room:
            while self.bytes > room:
                self._forget(next(iter(self._entries.values())))
            if self.spare is not None:
                trim()

    def _forget(self, entry: Entry) -> None:
        del self._entries[id(entry)]
        for key in entry.keys:
            if self._at.get(key) is entry:
                del self._at[key]
        for segment in entry.prefix.segments:
            self._holders[id(segment)] -= 1
            if not self._holders[id(segment)]:
                del self._holders[id(segment)]
                self.bytes -= _bytes(segment)

    def find(self, key: int, ids: Sequence[int], depth: int) -> Entry | None:
        """A sequence that begins with `ids`, whose hash is `key`, and has come to `depth` at all of them."""
        entry, n = self._at.get(key), len(ids)
        if entry is None or entry.prefix.reaches(depth) < n or entry.ids[:n] != tuple(ids):
            return None
        self._entries.move_to_end(id(entry))
        return entry

    def latest(self, prompt: Tokens, most: int) -> list[Tokens]:
        """The ids of up to `most` sequences that begin with `prompt`, the latest first."""
        n, found = len(prompt), []
        for entry in reversed(self._entries.values()):
            if entry.ids[:n] == prompt:
                found.append(entry.ids)
            if len(found) == most:
                break
        return found

    def longest(self, ids: Sequence[int], start: int, depth: int) -> Prefix | None:
        """Activations at `depth` of the longest beginning of `ids`, of more than `start` positions, that is here."""
        key, found = key_of(ids[:start]), None
        for n in range(start + 1, len(ids) + 1):
            key = extended_key(key, ids[n - 1])
            entry = self.find(key, ids[:n], depth)
            if entry is None:
                break
            found = entry.prefix.upto(n)
        return found


def _bytes(segment: Segment) -> int:
    tensors = (segment.keys, segment.values, *segment.hidden.values())
    return sum(t.untyped_storage().nbytes() if t.numel() else 0 for t in tensors)
