"""The slot buffer and its prefixes, against a plain dictionary, under random operations."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.lm.rows import _MOST_SEGMENTS, Prefix, Rows, Segment, Slot

LAYERS, HEADS, DIM, WIDTH = 2, 2, 3, 4


def buffer(most: int = 4) -> Rows:
    return Rows(
        LAYERS, (HEADS, DIM), (HEADS, DIM + 1), WIDTH, most=most, dtype=torch.float32, device=torch.device("cpu")
    )


def write(rows: Rows, slot: Slot, values: list[float]) -> None:
    """Append positions whose every number is the given value."""
    for value in values:
        rows.reserve(0, slot.filled + 1)
        rows.keys[:, slot.index, :, slot.filled] = value
        rows.values[:, slot.index, :, slot.filled] = value
        rows.hidden[slot.index, slot.filled] = value
        slot.filled += 1


def read(rows: Rows, slot: Slot) -> list[float]:
    """The value at each filled position; every layer, head and buffer must agree on it."""
    assert rows.used[slot.index] is slot
    found = []
    for t in range(slot.filled):
        numbers = torch.cat(
            [
                rows.keys[:, slot.index, :, t].flatten(),
                rows.values[:, slot.index, :, t].flatten(),
                rows.hidden[slot.index, t],
            ]
        )
        assert (numbers == numbers[0]).all()
        found.append(float(numbers[0]))
    return found


def contents(prefix: Prefix) -> list[float]:
    rows = buffer()
    slot = rows.acquire(prefix, prefix.length)
    assert prefix.length == 0 or torch.equal(prefix.hidden(0, prefix.length)[:, 0], rows.hidden[0, : prefix.length, 0])
    return read(rows, slot)


@settings(max_examples=60)
@given(data=st.data())
def test_rows_and_prefixes_under_random_use(data: st.DataObject) -> None:
    """Acquire from any prefix, write, snapshot, release, arrange: contents are those of an independent model."""
    rows = buffer()
    known: list[tuple[Prefix, list[float]]] = [(Prefix(), [])]
    live: list[tuple[Slot, Prefix, list[float]]] = []
    value = 0.0
    for _ in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(["acquire", "write", "snapshot", "release", "arrange"]))
        if action == "acquire" and rows.free:
            prefix, expected = data.draw(st.sampled_from(known))
            cut = data.draw(st.integers(0, prefix.length))
            prefix, expected = prefix.upto(cut), expected[:cut]
            live.append((rows.acquire(prefix, cut + 1), prefix, list(expected)))
        elif live and action == "write":
            slot, _, expected = data.draw(st.sampled_from(live))
            new = [value := value + 1 for _ in range(data.draw(st.integers(1, 70)))]
            write(rows, slot, new)
            expected.extend(new)
        elif live and action == "snapshot":
            slot, prefix, expected = data.draw(st.sampled_from(live))
            if slot.filled > prefix.length:
                known.append((prefix.followed_by(rows.segment(slot, prefix.length)), list(expected)))
        elif live and action == "release":
            slot, _, _ = live.pop(data.draw(st.integers(0, len(live) - 1)))
            rows.release(slot)
        elif live and action == "arrange":
            chosen = data.draw(st.lists(st.sampled_from(live), unique_by=id, min_size=1))
            rows.arrange([slot for slot, _, _ in chosen])
            assert {slot.index for slot, _, _ in chosen} == set(range(len(chosen)))
        for slot, _, expected in live:
            assert read(rows, slot) == expected
    for prefix, expected in known:
        assert contents(prefix) == expected, "a prefix changed after it was made"


def test_segments_stay_few() -> None:
    """A chain that accepts ever later cuts does not pile up segments; the first, shared one is kept as it is."""
    prefix, expected = Prefix(), []
    for t in range(3 * _MOST_SEGMENTS):
        one = torch.full((LAYERS, HEADS, 2, DIM), float(t))
        prefix = prefix.upto(t).followed_by(Segment(t, one, one, torch.full((2, WIDTH), float(t))))
        expected = [*expected[:t], float(t), float(t)]
        assert len(prefix.segments) <= _MOST_SEGMENTS
    assert prefix.hidden(0, prefix.length)[:, 0].tolist() == expected
    assert prefix.segments[0].hidden.shape[0] == 2


def test_poisoned_rows_are_cleaned() -> None:
    rows = buffer(1)
    slot = rows.acquire(Prefix(), 5)
    write(rows, slot, [float("nan")] * 5)
    slot.poisoned = True
    rows.release(slot)
    assert torch.isfinite(rows.keys).all()
    assert torch.isfinite(rows.hidden).all()
