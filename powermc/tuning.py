"""What a warm-up may tune before a run, and never during it: the screening exponent and the gate's thresholds.

Everything here looks at proposals made from given starts and returns plain numbers; a kernel built from them is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from powermc.choices import Stream
from powermc.errors import ArgumentError
from powermc.scheduling import Failed, Finished, drive
from powermc.sequences.model import Autoregressive, SequenceProbability
from powermc.sequences.path import Path, Prompt, Space
from powermc.sequences.suffix import draft
from powermc.types import Choices, Proposal, Steps, evaluate

if TYPE_CHECKING:
    from powermc.lm.ledger import Ledger

_FLOOR = 0.01


class Pair(NamedTuple):
    """One proposal: log p~(y) - log p~(x), log p(y) - log p(x), nats; highest entropy of its tail."""

    log_surrogate: float
    log_target: float
    entropy: float


def surrogate_name(surrogate: Any) -> str:
    """What to call it in a table: its name, or what kind of thing it is."""
    return str(getattr(surrogate, "name", None) or type(surrogate).__name__)


def surrogate_ledger(model: Any, surrogate: Any) -> Ledger | None:
    """The ledger that counts what the surrogate runs, if that is not the model's own (as it is for exits of it)."""
    engine = getattr(surrogate, "engine", None)
    if surrogate is model or (engine is not None and engine is getattr(model, "engine", None)):
        return None
    return getattr(surrogate, "ledger", getattr(engine, "ledger", None))


def grown(
    model: Autoregressive, space: Space, prompts: Sequence[Prompt], *, temperature: float, chains: int, seed: int
) -> list[Path]:
    """`chains` whole paths per prompt drawn from the model at `temperature`, activations and all, prompt by prompt."""

    def program(prompt: Prompt, choices: Choices) -> Steps[Path]:
        path = yield model.score(Path(prompt, (), finished=False), (1 / temperature,))
        path, _, _ = yield from draft(model, space, path, 0, temperature, choices)
        return path

    programs = (
        program(prompt, Stream(seed, prompt=prompt.key, chain=c).step(0).at("grown"))
        for prompt in prompts
        for c in range(chains)
    )
    return _all(model, programs)


def pairs(
    model: Autoregressive,
    surrogate: Autoregressive,
    proposal: Proposal[Path],
    starts: Sequence[Path],
    *,
    each: int,
    seed: int,
) -> list[Pair]:
    """`each` proposals from every start, none of them accepted, evaluated by both models. Null moves are left out."""

    def program(start: Path, choices: Callable[[int], Choices]) -> Steps[list[Pair]]:
        found: list[Pair] = []
        for i in range(each):
            move = yield from proposal.propose(choices(i), start)
            if move.null:
                continue
            x, low = yield from evaluate(SequenceProbability(surrogate), move.origin)
            start, here = yield from evaluate(SequenceProbability(model), x)
            y, high = yield from evaluate(SequenceProbability(surrogate), move.value)
            y, there = yield from evaluate(SequenceProbability(model), y)
            seen = y.view(surrogate)
            assert seen is not None
            tail = slice(move.auxiliary.position, None)
            found.append(Pair(high - low, there - here, float(seen.entropy[tail].max())))
        return found

    streams = [Stream(seed, prompt=start.prompt.key, chain=i) for i, start in enumerate(starts)]
    programs = (
        program(start, lambda i, stream=stream: stream.step(i).at("pairs"))
        for start, stream in zip(starts, streams, strict=True)
    )
    return [pair for chain in _all(model, programs) for pair in chain]


def fit_exponent(found: Sequence[Pair], alpha: float) -> float:
    """The exponent beta of p~ in the first stage: alpha times the slope of log p on log p~ over proposals.

    Least squares through the origin on differences (a proposal and its reverse are each other's mirror image), kept
    within [0.01 alpha, alpha]: a surrogate that says nothing gets nearly no say. Raises `ArgumentError` without pairs.
    """
    pairs = [p for p in found if math.isfinite(p.log_surrogate) and math.isfinite(p.log_target)]
    if not pairs:
        raise ArgumentError("no proposal could be made to fit the screening exponent on; give one, or other prompts")
    x, y = np.array([(p.log_surrogate, p.log_target) for p in pairs]).T
    slope = float(x @ y / (x @ x)) if (x @ x) > 0 else 0.0
    return alpha * min(max(slope, _FLOOR), 1.0)


def fit_eta(found: Sequence[Pair], gated: float) -> float:
    """The entropy threshold, nats, that comes closest to a share `gated` of proposed tails over it.

    Between two entropies that were seen, so that no tail of the fit lies on it; if all were the same, that one, and
    nothing is gated. A pair is gated if either tail is uncertain, so more pairs are. Raises `ArgumentError` unless
    0 < gated < 1 and there are proposals.
    """
    if not 0 < gated < 1 or not found:
        raise ArgumentError(f"the gated share must lie between 0 and 1 and there must be proposals, got {gated}")
    entropies = np.array([p.entropy for p in found])
    levels = np.unique(entropies)
    if len(levels) == 1:
        return float(levels[0])
    over = np.array([(entropies > level).mean() for level in levels[:-1]])
    nearest = int(np.abs(over - gated).argmin())
    return float(levels[nearest : nearest + 2].mean())


def correlation(found: Sequence[Pair]) -> float:
    """Of log p~ and log p over proposals; NaN where it is undefined."""
    x, y = np.array([(p.log_surrogate, p.log_target) for p in found]).reshape(-1, 2).T
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _all(model: Any, programs: Any) -> list[Any]:
    """What all programs return, in their order, as many under way as the model has rows.

    The first `ChainError` is raised.
    """
    results: dict[Any, Any] = {}
    for outcome in drive(enumerate(programs), active=getattr(model, "max_rows", None)):
        if isinstance(outcome, Failed):
            raise outcome.error
        if isinstance(outcome, Finished):
            results[outcome.key] = outcome.value
    return [results[i] for i in range(len(results))]
