"""How far a decode step is from what this machine allows: its measured bandwidth and arithmetic.

A pass over R rows reads every weight of layers and head once and does 2 FLOPs per weight and row, so that it takes at
least

    floor = max(bytes of weights / bandwidth, FLOPs of the pass / throughput)

Both rates are the best seen in the same run, between the steps: throughput over products of square matrices in the
model's dtype, bandwidth over a buffer as large as the weights. There are two bandwidths: that of copying, bytes read
and written, which is what a machine's memory is commonly rated by (STREAM's Copy); and that of the fastest of several
ways to read only, which nothing that does anything with the bytes can pass. What the floor leaves out: keys and values
(see `context`), activations, and Python. Of a mixture of experts it counts all weights, used or not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from powermc.choices import Stream
from powermc.errors import ArgumentError
from powermc.scheduling import run
from powermc.sequences.model import scored
from powermc.sequences.path import Path, Prompt
from powermc.types import PENDING

if TYPE_CHECKING:
    from powermc.lm import CausalLM

ROWS = (1, 2, 4, 8, 16, 32)
_WARM = 3


@dataclass(frozen=True)
class Step:
    """One line: a decode step of `rows` rows, layers, head and draw. All in seconds; `step` is the median.

    copy_floor, read_floor: the weights at the bandwidth of copying and of reading.
    """

    rows: int
    step: float
    copy_floor: float
    read_floor: float
    arithmetic_floor: float

    @property
    def ratio(self) -> float:
        """Step over floor, by the bandwidth of copying."""
        return self.step / max(self.copy_floor, self.arithmetic_floor)

    @property
    def read_ratio(self) -> float:
        """Step over floor, by the bandwidth of reading; at least 1 in theory."""
        return self.step / max(self.read_floor, self.arithmetic_floor)


@dataclass(frozen=True)
class Floor:
    """weight_bytes: read by a pass; copying (read and written), reading: bytes per second; throughput in FLOPs per
    second; context: positions of each row before the first step; ticks: steps measured per number of rows."""

    weight_bytes: int
    copying: float
    reading: float
    throughput: float
    context: int
    ticks: int
    steps: tuple[Step, ...]


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters that a decode pass reads: all, shared ones once, but an embedding that is only looked
    up."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    looked_up = id(table) if table is not head else None
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) != looked_up)


def floor(model: CausalLM, prompt: Prompt, *, rows: Sequence[int] = ROWS, ticks: int = 8, rounds: int = 2) -> Floor:
    """Measure. Numbers of rows above the model's `max_rows` are left out.

    The model should be one without `reuse`: rows of one prompt may draw the same tokens. Each round times the machine,
    then `ticks` steps for each number of rows. Raises `ArgumentError` for less than one
    tick or round, or if no number of rows is left.
    """
    usable = [n for n in rows if 1 <= n <= model.max_rows]
    if ticks < 1 or rounds < 1 or not usable:
        raise ArgumentError(
            f"needs ticks and rounds of at least 1 and rows from 1 to {model.max_rows}, got {ticks}, {rounds}, {rows}"
        )
    weights = weight_bytes(model.decoder.model)
    device = model.decoder.device
    buffer = torch.ones(max(weights // 4 // 1024, 1), 1024, device=device)
    copying = reading = throughput = 0.0
    seconds: dict[int, list[float]] = {n: [] for n in usable}
    for _ in range(rounds):
        copying = max(copying, 2 * buffer.nbytes / _copying(buffer))
        reading = max(reading, *(buffer.nbytes / t for t in _reading(buffer)))
        throughput = max(throughput, _throughput(model.decoder.dtype, device))
        for n in usable:
            seconds[n] += decode_steps(model, prompt, n, ticks)
    cost, visible = model.engine.cost, len(prompt.ids) + _WARM + ticks / 2
    flops = cost.span(0, model.depth, visible) + cost.head
    floors = (weights / copying, weights / reading)
    steps = [Step(n, statistics.median(seconds[n]), *floors, n * flops / throughput) for n in usable]
    return Floor(weights, copying, reading, throughput, len(prompt.ids), rounds * ticks, tuple(steps))


def decode_steps(model: CausalLM, prompt: Prompt, rows: int, ticks: int) -> list[float]:
    """Seconds of each of `ticks` steps that extend `rows` rows of a prompt by one token, through the model's oracle."""
    path = run(scored(model, Path(prompt, (), finished=False), (1.0,)))
    drafts = [model.branch(path, 0) for _ in range(rows)]
    try:
        seconds = []
        for tick in range(_WARM + ticks):
            choices = [Stream(0, chain=row).step(tick) for row in range(rows)]
            requests: Any = [d.extend((1.0,), c.at("token")) for d, c in zip(drafts, choices, strict=True)]
            begun = time.perf_counter()
            answers = model.answer(requests)
            seconds.append(time.perf_counter() - begun)
            assert not any(answer is PENDING for answer in answers), "every row has a place: rows <= max_rows"
        return seconds[_WARM:]
    finally:
        for draft in drafts:
            draft.release()


def _reading(buffer: torch.Tensor) -> list[float]:
    """Seconds to read a (n, 1024) float32 buffer once, by several ways."""
    n, width = buffer.shape
    row, column = buffer.new_ones(width), buffer.new_ones(n)
    ways: list[Callable[[], Any]] = [buffer.sum, lambda: buffer.mv(row), lambda: buffer.t().mv(column)]
    return [*map(_seconds, ways)]


def _copying(buffer: torch.Tensor) -> float:
    """Seconds to copy a buffer to memory that has been written before; the second time of two."""
    target = buffer.clone()
    return min(_seconds(lambda: target.copy_(buffer)) for _ in range(2))


def _throughput(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of the best square product."""
    best = 0.0
    for n in (512, 1024, 2048):
        a = torch.ones(n, n, dtype=dtype, device=device)
        best = max(best, *(2 * n**3 / _seconds(lambda a=a: a @ a) for _ in range(2)))
    return best


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
