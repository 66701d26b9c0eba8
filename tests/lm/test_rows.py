"""The slot buffer and its prefixes, against a plain dictionary, under random operations."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.lm.rows import _MOST_SEGMENTS, Prefix, Rows, Segment, Slot

LAYERS, HEADS, DIM, WIDTH = 3, 2, 3, 4
EXIT = 1


def buffer(most: int = 4) -> Rows:
    rows = Rows(
        LAYERS, (HEADS, DIM), (HEADS, DIM + 1), WIDTH, most=most, dtype=torch.float32, device=torch.device("cpu")
    )
    rows.keep(EXIT)
    return rows


def write(rows: Rows, slot: Slot, values: list[float], first: int, last: int) -> None:
    """Bring the next positions to depth `last`; layer l of a position holds its value + l / 8."""
    for value in values:
        at = slot.filled[last]
        rows.reserve(0, at + 1)
        for layer in range(first, last):
            rows.keys[layer, slot.index, :, at] = value + layer / 8
            rows.values[layer, slot.index, :, at] = value + layer / 8
        for depth in (EXIT, LAYERS):
            if first < depth <= last:
                rows.hidden[depth][slot.index, at] = value + depth / 8
                slot.filled[depth] += 1


def read(rows: Rows, slot: Slot) -> tuple[list[float], int]:
    """The value at each position, every buffer agreeing on it, and how many have come to the full depth."""
    assert rows.used[slot.index] is slot
    found = []
    for t in range(slot.filled[EXIT]):
        deep = t < slot.filled[LAYERS]
        numbers = [rows.hidden[d][slot.index, t] - d / 8 for d in ((EXIT, LAYERS) if deep else (EXIT,))]
        for layer in range(LAYERS if deep else EXIT):
            numbers += [buffer[layer, slot.index, :, t].flatten() - layer / 8 for buffer in (rows.keys, rows.values)]
        assert (torch.cat(numbers) == numbers[0][0]).all()
        found.append(float(numbers[0][0]))
    return found, slot.filled[LAYERS]


def contents(prefix: Prefix) -> tuple[list[float], int]:
    rows = buffer()
    slot = rows.acquire(prefix, prefix.length)
    for depth in (EXIT, LAYERS):
        n = prefix.reaches(depth)
        assert not n or torch.equal(prefix.hidden(depth, 0, n), rows.hidden[depth][0, :n])
    return read(rows, slot)


@settings(max_examples=60)
@given(data=st.data())
def test_rows_and_prefixes_under_random_use(data: st.DataObject) -> None:
    """Acquire from any prefix, write to either depth, deepen, snapshot, release, arrange: contents are those of an
    independent model, (values, how many of them at the full depth)."""
    rows = buffer()
    known: list[tuple[Prefix, list[float], int]] = [(Prefix(), [], 0)]
    live: list[tuple[Slot, Prefix, list[float]]] = []
    value = 0.0
    actions = ["acquire", "write", "write", "deepen", "snapshot", "release", "arrange"]
    for _ in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(actions))
        if action == "acquire" and rows.free:
            prefix, expected, _ = data.draw(st.sampled_from(known))
            cut = data.draw(st.integers(0, prefix.length))
            prefix, expected = prefix.upto(cut), expected[:cut]
            live.append((rows.acquire(prefix, cut + 1), prefix, list(expected)))
        elif live and action == "write":
            slot, _, expected = data.draw(st.sampled_from(live))
            new = [value := value + 1 for _ in range(data.draw(st.integers(1, 70)))]
            whole = slot.filled[EXIT] == slot.filled[LAYERS] and data.draw(st.booleans())
            write(rows, slot, new, 0, LAYERS if whole else EXIT)
            expected.extend(new)
        elif live and action == "deepen":
            slot, _, expected = data.draw(st.sampled_from(live))
            a, b = slot.filled[LAYERS], slot.filled[EXIT]
            assert slot.next_depth(LAYERS) == (EXIT if a < b else 0)
            write(rows, slot, expected[a : data.draw(st.integers(a, b))], EXIT, LAYERS)
        elif live and action == "snapshot":
            slot, prefix, expected = data.draw(st.sampled_from(live))
            for depth in (EXIT, LAYERS):
                start, stop = prefix.reaches(depth), slot.filled[depth]
                if stop > start:
                    taken = prefix.upto(start).followed_by(rows.segment(slot, start, depth))
                    deep = min(stop, slot.filled[LAYERS]) if depth == LAYERS else min(start, prefix.reaches(LAYERS))
                    known.append((taken, expected[:stop], deep))
        elif live and action == "release":
            slot, _, _ = live.pop(data.draw(st.integers(0, len(live) - 1)))
            rows.release(slot)
        elif live and action == "arrange":
            chosen = data.draw(st.lists(st.sampled_from(live), unique_by=id, min_size=1))
            rows.arrange([slot for slot, _, _ in chosen])
            assert {slot.index for slot, _, _ in chosen} == set(range(len(chosen)))
        for slot, _, expected in live:
            assert read(rows, slot)[0] == expected
    for prefix, expected, deep in known:
        assert contents(prefix) == (expected, deep), "a prefix changed after it was made"


def test_segments_stay_few() -> None:
    """A chain that accepts ever later cuts does not pile up segments; the first, shared one is kept as it is."""
    prefix, expected = Prefix(), []
    for t in range(3 * _MOST_SEGMENTS):
        one = torch.full((LAYERS, HEADS, 2, DIM), float(t))
        prefix = prefix.upto(t).followed_by(Segment(t, one, one, {LAYERS: torch.full((2, WIDTH), float(t))}))
        expected = [*expected[:t], float(t), float(t)]
        assert len(prefix.segments) <= _MOST_SEGMENTS
    assert prefix.hidden(LAYERS, 0, prefix.length)[:, 0].tolist() == expected
    assert prefix.segments[0].hidden[LAYERS].shape[0] == 2


def test_segments_of_two_depths_are_not_merged() -> None:
    """What has come to an exit only stays apart from what has passed all layers."""
    prefix = Prefix()
    for t in range(2 * _MOST_SEGMENTS):
        depth = LAYERS if t < _MOST_SEGMENTS else EXIT
        one = torch.full((depth, HEADS, 1, DIM), float(t))
        states = {d: torch.full((1, WIDTH), float(t)) for d in (EXIT, LAYERS) if d <= depth}
        prefix = prefix.followed_by(Segment(t, one, one, states))
    assert prefix.reaches(LAYERS) == _MOST_SEGMENTS
    assert prefix.reaches(EXIT) == prefix.length == 2 * _MOST_SEGMENTS
    assert prefix.hidden(EXIT, 0, prefix.length)[:, 0].tolist() == list(map(float, range(2 * _MOST_SEGMENTS)))


def test_poisoned_rows_are_cleaned() -> None:
    rows = buffer(1)
    slot = rows.acquire(Prefix(), 5)
    write(rows, slot, [float("nan")] * 5, 0, LAYERS)
    slot.poisoned = True
    rows.release(slot)
    assert torch.isfinite(rows.keys).all()
    assert all(torch.isfinite(states).all() for states in rows.hidden.values())
