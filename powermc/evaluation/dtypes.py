"""Which dtype a model decodes fastest in on this machine: measured, step by step.

Narrower is not faster everywhere: a CPU without bfloat16 arithmetic converts every weight on every pass, and a pass of
many rows then takes many times as long as in float32. And narrower is another model: its logits, and so p, are rounded.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powermc.errors import ArgumentError, ModelError
from powermc.evaluation.floor import decode_steps
from powermc.sequences.path import Prompt

if TYPE_CHECKING:
    from powermc.lm import CausalLM

DTYPES = ("float32", "bfloat16", "float16")
ROWS = (1, 8, 16)
CLEAR = 1.2
"""A dtype with less resolution than float32 is recommended only if its steps are this many times as fast."""
_TICKS, _ROUNDS = 3, 1


@dataclass(frozen=True)
class Steps:
    """Median seconds of a decode step of one, 8 and 16 rows (`ROWS`) in a dtype; resolution in nats.

    refused: why the model cannot be used in it; None if it can.
    """

    dtype: str
    seconds: tuple[float, ...] = ()
    resolution: float = 0.0
    refused: str | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds)


def compare(load: Callable[[str], CausalLM], ids: Sequence[int], dtypes: Sequence[str] = DTYPES) -> list[Steps]:
    """Load the model in each dtype in turn and time decode steps behind the prompt `ids`; one is held at a time.

    Raises `ArgumentError` if none can be used.
    """
    found = []
    for dtype in dtypes:
        try:
            found.append(_measure(load(dtype), dtype, Prompt(tuple(ids))))
        except (ModelError, RuntimeError, TypeError) as error:
            found.append(Steps(dtype, refused=str(error).splitlines()[0]))
    if all(steps.refused for steps in found):
        raise ArgumentError(f"no dtype can be used: {found[0].refused}")
    return found


def _measure(model: CausalLM, dtype: str, prompt: Prompt) -> Steps:
    model.engine.reuse = False  # rows of one prompt may draw the same tokens
    rows = [n for n in ROWS if n <= model.max_rows]
    seconds: dict[int, list[float]] = {n: [] for n in rows}
    for _ in range(_ROUNDS):
        for n in rows:
            seconds[n] += decode_steps(model, prompt, n, _TICKS)
    return Steps(dtype, tuple(statistics.median(seconds[n]) for n in rows), model.resolution)


def verdict(found: Sequence[Steps]) -> str:
    """Which to use, and why."""
    usable = [s for s in found if s.refused is None]
    wide, fastest = usable[0], min(usable, key=lambda s: s.total)
    if fastest is wide or wide.total < CLEAR * fastest.total:
        others = ", ".join(f"{s.dtype} takes {s.total / wide.total:.1f} times as long" for s in usable[1:])
        return f"use {wide.dtype}" + (f": {others}, and rounds p" if others else "")
    return (
        f"use {fastest.dtype} for speed: {wide.dtype} takes {wide.total / fastest.total:.1f} times as long. Its log "
        f"probabilities are good to {fastest.resolution:g} nats, so the chain is that of a rounded model"
    )
