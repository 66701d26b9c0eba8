"""Blockwise growth (Karan & Du 2025, Algorithm 1): extend by a block, run some kernel steps, and again.

Growth is an initialisation like any other: the draws that count are those of the last block, whose target is the
power distribution over whole paths. With `scope="sequence"` kernels cut anywhere so far. With `scope="block"` earlier
blocks are frozen once sampled: each block is then exact for p^alpha *given its prefix*, which is not the joint
p^alpha of the whole path (total variation up to .31 between the two was seen on small tables).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from powermc.errors import ArgumentError
from powermc.kernels.metropolis import Metropolis
from powermc.sequences.cuts import CUT_LAWS, cut_law
from powermc.sequences.model import Autoregressive, SequenceProbability, scored
from powermc.sequences.path import Path, Prompt, Space
from powermc.sequences.screening import Screening
from powermc.sequences.suffix import Suffix, check_temperature, default_temperature, draft
from powermc.targets import Power
from powermc.types import Choices, Info, Kernel, State, Steps, Target

SCOPES = ("sequence", "block")


class Committed(NamedTuple):
    """Event: kernel step `step` of a chain (counted over all blocks) is done. `block` counts from 0."""

    step: int
    block: int
    state: State[Path]
    info: Info


class Grown(NamedTuple):
    """Event: the path was extended by one block, at the cost of `tokens` tokens."""

    block: int
    path: Path
    tokens: int
    near_ties: int


class Point(NamedTuple):
    """Where a chain stands: on `path`, which has grown by `block` (counted from 0), `done` kernel steps later."""

    block: int
    done: int
    path: Path


class Stage(NamedTuple):
    """One block of the schedule: the space up to its end, and the kernel that runs there."""

    space: Space
    kernel: Kernel[Path]


@dataclass(frozen=True)
class BlockwisePower:
    """The schedule of blockwise Metropolis-Hastings on p^alpha.

    Parameters
    ----------
    model, space
        The model, and the space of whole paths; block k runs on paths up to min(k block_size, horizon).
    alpha
        Power of the target, >= 0.
    temperature
        Of the proposal; None for min(1, 1/alpha). Independent of alpha.
    block_size, steps
        B tokens per block and N kernel steps after each.
    draws
        Kernel steps on the last block, if other than `steps`: the draws from the target over whole paths.
    scope
        "sequence" or "block" (see the module's docstring).
    cut
        "length", "horizon", "block" or "entropy". "block" freezes earlier blocks and so needs `scope="block"`.
    tilt
        What makes the target of `Power(p, alpha)`; None: nothing. Use it to add a reward or to constrain.
    screening
        How a surrogate takes part (early-exit power sampling); None: plain Metropolis-Hastings. Blocks are grown by
        the model itself either way: a start, drawn once, is not the place to save.
    early_rejection
        Whether kernels may abandon a draft as soon as it is sure to be rejected: the same chain for fewer tokens.

    Raises `ArgumentError` for values out of range.
    """

    model: Autoregressive
    space: Space
    alpha: float = 4.0
    temperature: float | None = None
    block_size: int = 32
    steps: int = 10
    scope: str = "sequence"
    cut: str = "length"
    tilt: Callable[[Target[Path]], Target[Path]] | None = None
    screening: Screening | None = None
    early_rejection: bool = True
    draws: int | None = None

    def __post_init__(self) -> None:
        self.base_target()
        check_temperature(self.q_temperature)
        if self.block_size < 1:
            raise ArgumentError(f"block size must be at least 1 token, got {self.block_size}")
        if self.steps < 0:
            raise ArgumentError(f"steps per block must be at least 0, got {self.steps}")
        if self.draws is not None and self.draws < 0:
            raise ArgumentError(f"draws must be at least 0, got {self.draws}")
        if self.scope not in SCOPES:
            raise ArgumentError(f"unknown scope {self.scope!r}; choose one of {', '.join(SCOPES)}")
        if self.cut not in CUT_LAWS:
            raise ArgumentError(f"unknown cut law {self.cut!r}; choose one of {', '.join(CUT_LAWS)}")
        if self.cut == "block" and self.scope == "sequence":
            raise ArgumentError(
                "cut 'block' never revisits earlier blocks, so it cannot sample the whole sequence: "
                "use scope='block' with it, or another cut law"
            )

    @property
    def q_temperature(self) -> float:
        """The proposal's temperature, the default filled in."""
        return default_temperature(self.alpha) if self.temperature is None else self.temperature

    def base_target(self) -> Target[Path]:
        """The target over whole paths."""
        power = Power(SequenceProbability(self.model), self.alpha)
        return power if self.tilt is None else self.tilt(power)

    @property
    def blocks(self) -> int:
        """How many blocks cover the horizon."""
        return -(-self.space.horizon // self.block_size)

    def steps_on(self, block: int) -> int:
        """Kernel steps on one block, counted from 0."""
        return self.draws if self.draws is not None and block == self.blocks - 1 else self.steps

    @property
    def total(self) -> int:
        """Kernel steps of a chain, all blocks together."""
        return (self.blocks - 1) * self.steps + self.steps_on(self.blocks - 1)

    def stage(self, block: int) -> Stage:
        """The space and kernel of one block, counted from 0."""
        start = block * self.block_size
        horizon = min(start + self.block_size, self.space.horizon)
        space = replace(self.space, horizon=horizon)
        first = start if self.scope == "block" else 0
        cuts = cut_law(self.cut, start=first, horizon=horizon, block_size=self.block_size)
        target, temperature, early = self.base_target(), self.q_temperature, self.early_rejection
        if self.screening is None:
            return Stage(space, Metropolis(target, Suffix(self.model, space, cuts, temperature), early))
        tilt = self.tilt or (lambda base: base)
        return Stage(space, self.screening.kernel(self.model, space, cuts, temperature, target, tilt, early))

    def _own(self, path: Path) -> Path:
        """The path with the model's scores in front: a screened step may leave the surrogate's there."""
        return path.view(self.model) or path

    def program(
        self, choices: Callable[[int], Choices], prompt: Prompt, start: Point | None = None
    ) -> Steps[State[Path]]:
        """One chain: yields requests, `Grown` and `Committed` events, and returns its last state.

        `choices(i)` are the choices of growth or step i; growth of block k is i = k (steps + 1), so that more draws
        only go on. From `start` on it does what the whole program does after it: the path there is scored once, which
        gives it its activations back, and nothing before it is asked for again.
        """
        exponent = 1.0 / self.q_temperature
        first = 0 if start is None else start.block
        empty = Path(prompt, (), finished=False)
        path = yield self.model.score(empty if start is None else start.path, (exponent,))
        state: Any = None
        for block in range(first, self.blocks):
            stage = self.stage(block)
            at, done = block * (self.steps + 1), 0
            if start is not None and block == first:
                done = start.done
            elif not path.finished:
                path = yield from scored(self.model, path, (exponent,))  # steps may have scored it by other laws only
                path, ran, ties = yield from draft(
                    self.model, stage.space, path, len(path), self.q_temperature, choices(at).at("grow")
                )
                yield Grown(block, path, ran, ties)
            state = yield from stage.kernel.init(path)
            for i in range(done, self.steps_on(block)):
                state, info = yield from stage.kernel.step(choices(at + 1 + i), state)
                state = State(self._own(state.value), state.log_density)
                yield Committed(block * self.steps + i, block, state, info)
            path = state.value
        return state
