"""Running chains of any kernel on any space: `iterate` step by step, `sample` for a batch of draws. NumPy only.

What this module does not know: what a value is, prompts, and language models (`powermc.power` does).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias

import numpy as np

from powermc.choices import Stream
from powermc.errors import ArgumentError, ChainError
from powermc.scheduling import Event, Failed, drive
from powermc.sequences.path import Path
from powermc.types import Fields, Info, Kernel, State, Steps, X


class Draw(NamedTuple, Generic[X]):
    """One committed step of one chain. `step` counts from 0 (or from `first`), warm-up included."""

    chain: int
    step: int
    state: State[X]
    info: Info


class Begun(NamedTuple, Generic[X]):
    """A chain has its first state."""

    chain: int
    state: State[X]


class Point(NamedTuple, Generic[X]):
    """Where a chain goes on: its state, and the steps it has taken."""

    state: State[X]
    steps: int


Points: TypeAlias = Mapping[int, Point[X] | None]
"""Where each chain goes on, None for its beginning; chains that are not named have nothing left to do."""


Callback = Callable[[int, int, State[Any], Info], None]
"""Called as (chain, step, state, info) after every committed step, in the order the steps commit."""


@dataclass(frozen=True)
class Samples(Generic[X]):
    """What `sample` drew.

    Attributes
    ----------
    values
        values[chain][draw]. Shorter than the arrays for a chain that failed or was interrupted.
    log_density
        Shape (chain, draw), float64, nats: log pi up to a constant; NaN where there is no draw.
    infos
        Name to array of shape (chain, draw): the info of the step that made the draw, in the dtype that the kernel
        declares, with the declared fill value where there is none.
    warmup_infos
        The same for every step of the warm-up, shape (chain, warmup).
    errors
        Chain to the error that ended it.
    interrupted
        Whether the run ended before all draws were made: by Ctrl-C, or, of a store, however it did.
    """

    values: list[list[X]]
    log_density: np.ndarray
    infos: dict[str, np.ndarray]
    warmup_infos: dict[str, np.ndarray]
    errors: dict[int, ChainError]
    interrupted: bool

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, decode: Callable[[Any], Any] | None = None) -> Samples[Any]:
        """The samples in a store, all of them drawn or not; see `powermc.load`."""
        from powermc.store import load_samples

        return load_samples(path, decode=decode)


@dataclass(frozen=True)
class Schedule:
    """Which steps chains take, and which of them make a draw: the arguments of these names of `sample`.

    Raises `ArgumentError` for one out of range.
    """

    draws: int
    chains: int
    warmup: int = 0
    thin: int = 1
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("chains", 1), ("warmup", 0), ("thin", 1), ("first", 0)):
            check_count(name, getattr(self, name), least=least)
        Stream(self.seed)

    @property
    def steps(self) -> range:
        """Their numbers."""
        return range(self.first, self.first + self.warmup + self.draws * self.thin)

    def draw(self, step: int) -> int | None:
        """The number of the draw that the step of this number makes; None where it makes none."""
        i = step - self.first - self.warmup
        return i // self.thin if i >= 0 and (i + 1) % self.thin == 0 else None


class Journal(Protocol[X]):
    """Where `sample` writes down what chains do, as they do it."""

    def points(self) -> Points[X]: ...

    def begin(self, chain: int, state: State[X]) -> None:
        """A chain has its first state: that of its initial value, wherever it goes on from."""
        ...

    def commit(self, draw: Draw[X]) -> None:
        """A chain has taken a step."""
        ...

    def fail(self, chain: int, error: ChainError) -> None:
        """A chain has ended early."""
        ...

    def finish(self, interrupted: bool) -> Samples[X]:
        """The result, whether the run got to its end or not."""
        ...


class Memory(Generic[X]):
    """A `Journal` that lives as long as the process."""

    def __init__(self, fields: Fields, schedule: Schedule) -> None:
        self.schedule, chains = schedule, schedule.chains
        self.values: list[list[X]] = [[] for _ in range(chains)]
        self.log_density = np.full((chains, schedule.draws), np.nan)
        self.kept, self.warm = (Records(fields, (chains, n)) for n in (schedule.draws, schedule.warmup))
        self.errors: dict[int, ChainError] = {}

    def points(self) -> Points[X]:
        return dict.fromkeys(range(self.schedule.chains))

    def begin(self, chain: int, state: State[X]) -> None:
        pass

    def commit(self, draw: Draw[X]) -> None:
        chain, step, state, info = draw
        if step - self.schedule.first < self.schedule.warmup:
            self.warm.write((chain, step - self.schedule.first), info)
        elif (n := self.schedule.draw(step)) is not None:
            self.kept.write((chain, n), info)
            self.log_density[chain, n] = state.log_density
            self.values[chain].append(without_cache(state.value))

    def fail(self, chain: int, error: ChainError) -> None:
        self.errors[chain] = error

    def finish(self, interrupted: bool) -> Samples[X]:
        return Samples(self.values, self.log_density, self.kept.arrays, self.warm.arrays, self.errors, interrupted)


def iterate(
    kernel: Kernel[X],
    initial: X | list[X],
    *,
    steps: int,
    chains: int = 1,
    seed: int = 0,
    first: int = 0,
    active: int | None = None,
) -> Iterator[Draw[X]]:
    """Run chains and yield a `Draw` (chain, step, state, info) whenever one of them commits a step.

    Parameters
    ----------
    kernel
        Any kernel. Chains whose steps ask an oracle advance together and share its batches.
    initial
        Where chains start: a `list` holds one value per chain, anything else starts them all.
    steps, chains
        Steps of each chain, and how many chains.
    seed
        Every number drawn is a function of (seed, the prompt of a path, chain, step); it does not depend on how many
        chains run.
    first
        The number of the first step. To continue a chain under the same seed pass the number of steps it has taken.
    active
        How many chains may be under way at once; None for all.

    Raises `ArgumentError` at once for arguments out of range. A `ChainError` ends its own chain only; it is raised
    after the others have taken all their steps.
    """
    starts = _starts(initial, chains)
    check_count("steps", steps, least=0)
    check_count("first", first, least=0)
    Stream(seed)
    return _iterate(_run(kernel, starts, dict.fromkeys(range(chains)), range(first, first + steps), seed, active))


def _iterate(outcomes: Iterator[Draw[X] | Begun[X] | Failed]) -> Iterator[Draw[X]]:
    errors: list[Failed] = []
    with closing(outcomes):  # type: ignore[type-var]
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                errors.append(outcome)
            elif isinstance(outcome, Draw):
                yield outcome
    if errors:
        for other in errors[1:]:
            errors[0].error.add_note(f"chain {other.key} also stopped: {other.error}")
        raise errors[0].error


def sample(
    kernel: Kernel[X],
    initial: X | list[X],
    *,
    draws: int,
    chains: int = 4,
    warmup: int = 0,
    thin: int = 1,
    seed: int = 0,
    first: int = 0,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    encode: Callable[[X], Any] | None = None,
    decode: Callable[[Any], X] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
) -> Samples[X]:
    """Run `chains` chains for `warmup + draws * thin` steps each and keep every `thin`-th state after the warm-up.

    `initial`, `chains`, `seed` and `first` are those of `iterate`. Values that are paths are kept without their
    handle on the model's activations. `progress` shows a display on standard error.

    Parameters
    ----------
    store
        Write the run to this file as it is drawn: what has been committed survives whatever ends the process, and
        `powermc.load` reads it at any time. What is returned is what the file holds.
    resume
        Go on with the run in `store`, if there is one; without it an existing one is refused. Kernel, initial values
        and settings must be those of the run, but `draws` and `chains` may be more. No step is taken again, and where
        the log density is a function of the value alone, what is drawn is what would have been drawn without the stop.
    encode, decode
        For a `store` of values that are no numbers, strings, booleans, None, NumPy arrays, paths, tuples or lists of
        these: a function to such a value, and its inverse.

    A chain that fails keeps the draws it made; the error is in `Samples.errors` and a `RuntimeWarning` is issued. If
    every chain fails before its first draw, the first error is raised. Ctrl-C ends the run, and what has been drawn is
    returned. Raises `ArgumentError` for arguments out of range and for values that cannot be stored, and `StoreError`
    for a store that cannot be written or gone on with: what it held before, it still holds.
    """
    schedule = Schedule(draws, chains, warmup, thin, seed, first)
    check_callbacks(callbacks)
    if not isinstance(resume, bool):
        raise ArgumentError(f"resume must be True or False, got {resume!r}")
    starts = _starts(initial, chains)
    if store is None and (given := [n for n, x in (("resume", resume), ("encode", encode), ("decode", decode)) if x]):
        raise ArgumentError(f"{given[0]} has no effect without a store; name a file with store=..., or leave it out")
    with ExitStack() as stack:
        journal: Journal[X] = Memory(kernel.fields, schedule)
        if store is not None:
            from powermc.store.samples_writing import SamplesWriter

            journal = stack.enter_context(SamplesWriter(store, kernel, starts, schedule, encode, decode, resume=resume))
        samples, errors = _drawn(kernel, starts, schedule, journal, callbacks, progress)
    if errors and not samples.interrupted and not any(samples.values):
        raise next(iter(errors.values()))
    for chain, error in errors.items():
        made = len(samples.values[chain])
        warnings.warn(f"chain {chain} stopped after {made} draws: {error}", RuntimeWarning, stacklevel=2)
    return samples


def _drawn(
    kernel: Kernel[X],
    starts: Sequence[X],
    schedule: Schedule,
    journal: Journal[X],
    callbacks: Sequence[Callback],
    progress: bool,
) -> tuple[Samples[X], dict[int, ChainError]]:
    """Take all steps that are left, Ctrl-C apart; what came of it, and the chains that failed."""
    errors: dict[int, ChainError] = {}
    interrupted = False
    points = journal.points()
    with ExitStack() as stack:
        display = None
        if progress:
            from powermc.progress import Progress

            left = sum(len(schedule.steps) - (0 if point is None else point.steps) for point in points.values())
            display = stack.enter_context(Progress(steps=left))
        chains = _run(kernel, starts, points, schedule.steps, schedule.seed, None)
        outcomes = stack.enter_context(closing(chains))  # type: ignore[type-var]
        try:
            for outcome in outcomes:
                if isinstance(outcome, Failed):
                    chain = int(outcome.key)  # type: ignore[call-overload]
                    errors[chain] = outcome.error
                    journal.fail(chain, outcome.error)
                elif isinstance(outcome, Begun):
                    journal.begin(outcome.chain, outcome.state)  # type: ignore[arg-type]  # narrowed without its X
                else:
                    journal.commit(outcome)
                    if display is not None:
                        display.step(outcome.info)
                    for callback in callbacks:
                        callback(*outcome)
        except KeyboardInterrupt:
            interrupted = True
    return journal.finish(interrupted), errors


class Records:
    """Infos of many steps as arrays: one per declared field, of its dtype, `fill` where nothing was written."""

    def __init__(self, fields: Fields, shape: tuple[int, ...]) -> None:
        self.arrays = {name: np.full(shape, field.fill, dtype=field.dtype) for name, field in fields.items()}

    def write(self, at: tuple[int, ...], info: Info) -> None:
        """Store the info of one step. Raises `ArgumentError` for an entry that the kernel does not declare."""
        check_declared(info, self.arrays)
        for name, value in info.items():
            self.arrays[name][at] = value


def check_declared(info: Info, fields: Container[str]) -> None:
    """Raise `ArgumentError` for an entry that the kernel does not declare."""
    for name in info:
        if name not in fields:
            raise ArgumentError(f"the kernel returned info {name!r} but does not declare it in `fields`")


def check_count(name: str, value: Any, *, least: int) -> None:
    """Raise `ArgumentError` unless `value` is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ArgumentError(f"{name} must be an integer >= {least}, got {value!r}")


def check_callbacks(callbacks: Any) -> None:
    """Raise `ArgumentError` unless these are functions."""
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ArgumentError(f"callbacks must be a list of functions, got {callbacks!r}")


def without_cache(value: Any) -> Any:
    """A path without its handle on the model's activations, so that keeping it costs little; else the value itself."""
    return value.detached() if isinstance(value, Path) and (value.cache is not None or value.others) else value


def _starts(initial: Any, chains: int) -> list[Any]:
    check_count("chains", chains, least=1)
    if not isinstance(initial, list):
        return [initial] * chains
    if len(initial) != chains:
        raise ArgumentError(
            f"a list of {len(initial)} initial values was given for {chains} chains; pass one per chain"
        )
    return initial


def _run(
    kernel: Kernel[X], starts: Sequence[X], points: Points[X], steps: range, seed: int, active: int | None
) -> Iterator[Draw[X] | Begun[X] | Failed]:
    programs = ((c, _program(kernel, starts[c], c, point, steps, seed)) for c, point in points.items())
    with closing(drive(programs, active=active)) as outcomes:  # type: ignore[type-var]
        for outcome in outcomes:
            if isinstance(outcome, Event):
                yield outcome.value
            elif isinstance(outcome, Failed):
                yield outcome


def _program(kernel: Kernel[X], value: X, chain: int, point: Point[X] | None, steps: range, seed: int) -> Steps[None]:
    # Under a purpose of its own: a path grown by `power_sample` under the same seed depends on that run's numbers.
    stream = Stream(seed, prompt=value.prompt.key if isinstance(value, Path) else 0, chain=chain)
    state, taken = (yield from kernel.init(value)), 0
    yield Begun(chain, state)
    if point is not None:
        state, taken = point
    for step in steps[taken:]:
        state, info = yield from kernel.step(stream.step(step).at("iterate"), state)
        yield Draw(chain, step, state, info)
