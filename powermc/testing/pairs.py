"""Hypothesis strategies for delayed acceptance: a target model, a surrogate on the same space, stages, gates.

A surrogate is drawn with no regard to the target, so it is as wrong as can be. Thresholds of gates are taken from the
values that uncertainty has on the moves of the very proposal, so that some are gated and some are not.

Needs hypothesis, so import it by name: `from powermc.testing import pairs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st

from powermc.kernels.delayed import Conditional
from powermc.scheduling import run
from powermc.sequences import (
    Autoregressive,
    ByCut,
    Cut,
    Models,
    Path,
    SequenceProbability,
    Space,
    Substitution,
    Suffix,
    UncertainTail,
    scored,
)
from powermc.sequences.routing import model_at
from powermc.targets import Power, Table
from powermc.testing.enumeration import enumerate_outcomes
from powermc.testing.strategies import Toy, alphas, cut_laws, models, temperatures, toys, weights
from powermc.types import Proposal, Target

_LEVELS = 5


@dataclass(frozen=True)
class Pair:
    """A target and a surrogate on one space."""

    target: Toy
    surrogate: Toy

    @property
    def space(self) -> Space:
        return self.target.space

    @property
    def paths(self) -> list[Path]:
        return self.target.paths

    @property
    def supported(self) -> list[Path]:
        """The paths that the target supports."""
        return [x for x, p in zip(self.paths, self.target.p, strict=True) if p > 0]


@st.composite
def pairs(draw: st.DrawFn, *, max_paths: int = 15, zeros: bool = False) -> Pair:
    """Pairs of which the target may have zeros anywhere; `zeros` lets the surrogate have some too, elsewhere."""
    target = draw(toys(max_paths=max_paths))
    surrogate = draw(models(target.space, target.model.vocab_size, zeros=zeros))
    return Pair(target, Toy(surrogate, target.space))


@dataclass(frozen=True)
class ByParity:
    """A rule of a cut: one of `values` by its position and the tokens before it."""

    values: tuple[Any, ...]

    def __call__(self, cut: Cut) -> Any:
        return self.values[(cut.position + sum(cut.prefix)) % len(self.values)]


def power(toy: Toy, exponent: float) -> Power[Path]:
    """p^exponent of a toy's model."""
    return Power(SequenceProbability(toy.model), exponent)


def surrogates(pair: Pair, *, zeros: bool = False) -> st.SearchStrategy[Target[Path] | Conditional[Path]]:
    """Stages: a power of the surrogate or of a third model, a table of one's own, one of two by the cut."""
    own = st.builds(power, st.just(pair.surrogate), alphas())
    third = st.builds(
        lambda model, exponent: power(Toy(model, pair.space), exponent),
        models(pair.space, pair.target.model.vocab_size, zeros=zeros),
        alphas(),
    )
    table = weights(len(pair.paths), zeros=zeros).map(
        lambda row: Table({x: math.log(w) if w > 0 else -math.inf for x, w in zip(pair.paths, row, strict=True)})
    )
    plain = st.one_of(own, table, third)
    return st.one_of(plain, st.tuples(plain, plain).map(lambda options: ByCut(options, ByParity((0, 1)))))


def routed(pair: Pair) -> st.SearchStrategy[Models]:
    """The surrogate, the target's model (so the screen comes after the cost), or one of them by the cut."""
    one: Autoregressive = pair.surrogate.model
    other: Autoregressive = pair.target.model
    both: list[Models] = [ByCut((one, other), ByParity(rule)) for rule in ((0, 1), (1, 0, 0))]
    return st.sampled_from([one, *both, other])


def suffixes(pair: Pair, generators: st.SearchStrategy[Models]) -> st.SearchStrategy[Suffix]:
    """Suffix proposals by any of `generators`: any cut law, any temperature."""
    return st.builds(Suffix, generators, st.just(pair.space), cut_laws(pair.space.horizon), temperatures())


def substitutions(pair: Pair, generators: st.SearchStrategy[Models]) -> st.SearchStrategy[Substitution]:
    """Substitutions of 1 to 3 tokens by any of `generators`."""
    return st.builds(Substitution, generators, st.just(pair.space), st.integers(1, 3), temperatures())


@st.composite
def gates(
    draw: st.DrawFn,
    pair: Pair,
    proposal: Proposal[Path],
    model: Models,
    *,
    kind: str = "eta",
    aggregate: str = "max",
    by_cut: bool = False,
) -> UncertainTail:
    """Gates by which some move of `proposal` to another path, from the support of the target, is gated, and some not.

    `kind` is "eta", "delta" or "both"; with `by_cut` the thresholds are functions of the cut. A pair on which
    uncertainty takes one value only is rejected.
    """
    seen = _uncertainties(pair, proposal, model, aggregate)
    most = math.log(pair.target.model.vocab_size)
    etas = _thresholds([h for _, h, _ in seen if h < most], by_cut) if kind != "delta" else [None]
    deltas = _thresholds([g for _, _, g in seen if 0 < g <= 1], by_cut) if kind != "eta" else [None]
    useful = [
        (eta, delta)
        for eta, delta in product(etas, deltas)
        if 0 < sum(_gated(move, eta, delta) for move in seen) < len(seen)
    ]
    if not useful:
        reject()
    eta, delta = draw(st.sampled_from(useful))
    return UncertainTail(model, eta, delta, aggregate)


def _uncertainties(
    pair: Pair, proposal: Proposal[Path], model: Models, aggregate: str
) -> list[tuple[Cut, float, float]]:
    """(cut, entropy, margin) of every move from a supported path to another one, the less certain tail counted."""

    def tails(value: Path, cut: Cut) -> tuple[float, float]:
        path = run(scored(model_at(model, cut), value))
        entropy, margin = path.entropy[cut.position :], path.margin[cut.position :]
        return (entropy.max(), margin.min()) if aggregate == "max" else (entropy.mean(), margin.mean())

    leaves = enumerate_outcomes([lambda choices, x=x: proposal.propose(choices, x) for x in pair.supported])
    found = []
    for move in (move for outcomes in leaves for move, _ in outcomes if not move.null and move.value != move.origin):
        (h, g), (other_h, other_g) = (tails(value, move.auxiliary) for value in (move.origin, move.value))
        found.append((move.auxiliary, float(max(h, other_h)), float(min(g, other_g))))
    return found


def _thresholds(values: Sequence[float], by_cut: bool) -> list[Any]:
    """Quantiles of these values, or functions of the cut made of two of them."""
    distinct = np.unique(np.array(values))
    at = np.unique(np.linspace(0, max(len(distinct) - 1, 0), _LEVELS).astype(int))
    levels = [float(v) for v in distinct[at]] if len(distinct) else []
    return [ByParity(two) for two in _different(levels)] if by_cut else levels


def _different(levels: list[float]) -> Iterator[tuple[float, float]]:
    return ((a, b) for a, b in product(levels, levels) if a != b)


def _gated(move: tuple[Cut, float, float], eta: Any, delta: Any) -> bool:
    cut, entropy, margin = move
    most, least = (threshold(cut) if isinstance(threshold, ByParity) else threshold for threshold in (eta, delta))
    return (most is not None and entropy > most) or (least is not None and margin < least)
