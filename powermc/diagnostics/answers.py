"""The distribution over distinct answers, with Monte Carlo errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc.diagnostics import mixing
from powermc.diagnostics.convergence import finite
from powermc.diagnostics.guards import Guard, blocks, kept_draws
from powermc.errors import ArgumentError

if TYPE_CHECKING:
    from powermc.results import Run

COVERAGE = 0.95
_Z = 1.959963984540054


@dataclass(frozen=True)
class AnswerShare:
    """One answer. `answer` is None for texts without one.

    Attributes
    ----------
    count
        Draws (or chains, over "final") that gave it.
    share
        The estimate of its probability.
    error
        Standard error of `share`, sqrt(share (1 - share) / ess).
    low, high
        Wilson's 95% interval for `ess` independent draws.
    ess
        Effective sample size of the indicator of this answer; over "final" the number of chains.
    reason
        Why error, interval and ess are NaN; None if they are not.
    """

    answer: Any
    count: int
    share: float
    error: float
    low: float
    high: float
    ess: float
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; an answer that is no string, number or None as its repr."""
        plain = self.answer is None or isinstance(self.answer, str | int | float | bool)
        numbers = {name: finite(getattr(self, name)) for name in ("share", "error", "low", "high", "ess")}
        answer = self.answer if plain else repr(self.answer)
        return {"answer": answer, "count": self.count, **numbers, "reason": self.reason}


@dataclass(frozen=True)
class Answers:
    """The distribution over answers of one prompt, the likeliest first; shares sum to 1.

    over: "draws" or "final". n: draws or chains counted. guards: those of the draws.
    """

    prompt: int
    over: str
    n: int
    shares: tuple[AnswerShare, ...]
    guards: tuple[Guard, ...] = ()

    @property
    def best(self) -> AnswerShare | None:
        """The likeliest answer that is one; None if there is none."""
        return next((share for share in self.shares if share.answer is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        shares, guards = [share.to_dict() for share in self.shares], [guard.to_dict() for guard in self.guards]
        return {"prompt": self.prompt, "over": self.over, "n": self.n, "shares": shares, "guards": guards}


def answer_shares(
    run: Run, answer: Callable[[str], Hashable | None], *, prompts: Sequence[int] | None = None, over: str = "draws"
) -> tuple[Answers, ...]:
    """The distribution over answers of each prompt.

    Parameters
    ----------
    answer
        The answer of a text, None for none.
    prompts
        Which; None for all.
    over
        "draws": every draw from the target, errors by the effective sample size of each answer's indicator. "final":
        the last text of each chain, if it is whole; chains are independent, so that errors are those of independent
        draws, but from where the chain is then, not from the target.

    Raises `ArgumentError` for another `over` and for a model without a tokenizer.
    """
    if over not in ("draws", "final"):
        raise ArgumentError(f"over must be 'draws' or 'final', got {over!r}")
    of = _over_draws if over == "draws" else _over_final
    return tuple(of(run, p, answer) for p in (range(len(run.prompts)) if prompts is None else prompts))


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95% interval (1927) of a probability seen as `share` of n independent draws; n need not be whole."""
    shrink = 1 + _Z**2 / n
    middle = (share + _Z**2 / (2 * n)) / shrink
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def _over_draws(run: Run, prompt: int, answer: Callable[[str], Hashable | None]) -> Answers:
    kept = kept_draws(run, prompt)
    known = _answers({text for texts in kept.texts for text in texts}, answer)
    given = [[known[text] for text in texts] for texts in kept.texts]
    counts = Counter(a for row in given for a in row)
    n = sum(counts.values())
    own_law = run.settings["scope"] == "block" and blocks(run) > 1
    why = "scope 'block': each chain draws from a law of its own" if own_law else None

    def share(a: Hashable | None, count: int) -> AnswerShare:
        indicator = np.array([[float(b == a) for b in row] for row in given])
        if why is not None:
            return _unknown(a, count, n, why)
        try:
            ess = mixing.ess_mean(indicator)
        except ArgumentError as error:
            return _unknown(a, count, n, str(error))
        if not math.isfinite(ess):
            return _unknown(a, count, n, "the answers vary too little to tell")
        return _known(a, count, n, ess)

    return Answers(prompt, "draws", n, tuple(share(a, count) for a, count in _ordered(counts)), kept.guards)


def _over_final(run: Run, prompt: int, answer: Callable[[str], Hashable | None]) -> Answers:
    chains = run.chains[prompt]
    texts = [x.text for c, x in enumerate(chains) if x.error is None and run.whole(prompt, c)]
    known = _answers(set(texts), answer)
    counts = Counter(known[text] for text in texts)
    n = len(texts)
    shares = tuple(_known(a, count, n, float(n)) for a, count in _ordered(counts))
    return Answers(prompt, "final", n, shares, kept_draws(run, prompt).guards)


def _answers(texts: set[str | None], answer: Callable[[str], Hashable | None]) -> Mapping[str | None, Hashable | None]:
    found: dict[str | None, Hashable | None] = {}
    for text in texts:
        if text is None:
            raise ArgumentError("answers are taken from texts, and the model has no tokenizer")
        found[text] = answer(text)
    return found


def _ordered(counts: Counter[Hashable | None]) -> list[tuple[Hashable | None, int]]:
    """Most frequent first; ties by how they are written, so that the order does not depend on the run's."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], repr(entry[0])))


def _known(a: Hashable | None, count: int, n: int, ess: float) -> AnswerShare:
    share = count / n
    return AnswerShare(a, count, share, math.sqrt(share * (1 - share) / ess), *wilson(share, ess), ess)


def _unknown(a: Hashable | None, count: int, n: int, why: str) -> AnswerShare:
    return AnswerShare(a, count, count / n, *([math.nan] * 4), reason=why)
