"""Running chains of any kernel on any space: `iterate` step by step, `sample` for a batch of draws. NumPy only.

What this module does not know: what a value is, prompts, and language models (`powermc.power` does).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

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
        Whether Ctrl-C ended the run before all draws were made.
    """

    values: list[list[X]]
    log_density: np.ndarray
    infos: dict[str, np.ndarray]
    warmup_infos: dict[str, np.ndarray]
    errors: dict[int, ChainError]
    interrupted: bool


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
    return _iterate(_run(kernel, starts, steps, seed, first, active))


def _iterate(outcomes: Iterator[Draw[X] | Failed]) -> Iterator[Draw[X]]:
    errors: list[Failed] = []
    with closing(outcomes):  # type: ignore[type-var]
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                errors.append(outcome)
            else:
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
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
) -> Samples[X]:
    """Run `chains` chains for `warmup + draws * thin` steps each and keep every `thin`-th state after the warm-up.

    `initial`, `chains`, `seed` and `first` are those of `iterate`. Values that are paths are kept without their
    handle on the model's activations. `progress` shows a display on standard error.

    A chain that fails keeps the draws it made; the error is in `Samples.errors` and a `RuntimeWarning` is issued. If
    every chain fails before its first draw, the first error is raised. Ctrl-C ends the run, and what has been drawn is
    returned. Raises `ArgumentError` for arguments out of range.
    """
    check_count("draws", draws, least=1)
    check_count("warmup", warmup, least=0)
    check_count("thin", thin, least=1)
    check_count("first", first, least=0)
    check_callbacks(callbacks)
    starts = _starts(initial, chains)
    Stream(seed)
    steps = warmup + draws * thin
    values: list[list[X]] = [[] for _ in range(chains)]
    log_density = np.full((chains, draws), np.nan)
    kept, warm = Records(kernel.fields, (chains, draws)), Records(kernel.fields, (chains, warmup))
    errors: dict[int, ChainError] = {}
    interrupted = False
    with ExitStack() as stack:
        display = None
        if progress:
            from powermc.progress import Progress

            display = stack.enter_context(Progress(steps=steps * chains))
        outcomes = stack.enter_context(closing(_run(kernel, starts, steps, seed, first, None)))  # type: ignore[type-var]
        try:
            for outcome in outcomes:
                if isinstance(outcome, Failed):
                    errors[int(outcome.key)] = outcome.error  # type: ignore[call-overload]
                    continue
                chain, step, state, info = outcome
                i = step - first
                if i < warmup:
                    warm.write((chain, i), info)
                elif (i - warmup + 1) % thin == 0:
                    at = (chain, (i - warmup) // thin)
                    kept.write(at, info)
                    log_density[at] = state.log_density
                    values[chain].append(without_cache(state.value))
                if display is not None:
                    display.step(info)
                for callback in callbacks:
                    callback(chain, step, state, info)
        except KeyboardInterrupt:
            interrupted = True
    if errors and not interrupted and not any(values):
        raise next(iter(errors.values()))
    for chain, error in errors.items():
        warnings.warn(f"chain {chain} stopped after {len(values[chain])} draws: {error}", RuntimeWarning, stacklevel=2)
    return Samples(values, log_density, kept.arrays, warm.arrays, errors, interrupted)


class Records:
    """Infos of many steps as arrays: one per declared field, of its dtype, `fill` where nothing was written."""

    def __init__(self, fields: Fields, shape: tuple[int, ...]) -> None:
        self.arrays = {name: np.full(shape, field.fill, dtype=field.dtype) for name, field in fields.items()}

    def write(self, at: tuple[int, ...], info: Info) -> None:
        """Store the info of one step. Raises `ArgumentError` for an entry that the kernel does not declare."""
        for name, value in info.items():
            if name not in self.arrays:
                raise ArgumentError(f"the kernel returned info {name!r} but does not declare it in `fields`")
            self.arrays[name][at] = value


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
    kernel: Kernel[X], starts: Sequence[X], steps: int, seed: int, first: int, active: int | None
) -> Iterator[Draw[X] | Failed]:
    programs = ((chain, _program(kernel, value, chain, steps, seed, first)) for chain, value in enumerate(starts))
    with closing(drive(programs, active=active)) as outcomes:  # type: ignore[type-var]
        for outcome in outcomes:
            if isinstance(outcome, Event):
                yield outcome.value
            elif isinstance(outcome, Failed):
                yield outcome


def _program(kernel: Kernel[X], value: X, chain: int, steps: int, seed: int, first: int) -> Steps[None]:
    # Under a purpose of its own: a path grown by `power_sample` under the same seed depends on that run's numbers.
    stream = Stream(seed, prompt=value.prompt.key if isinstance(value, Path) else 0, chain=chain)
    state = yield from kernel.init(value)
    for step in range(first, first + steps):
        state, info = yield from kernel.step(stream.step(step).at("iterate"), state)
        yield Draw(chain, step, state, info)
