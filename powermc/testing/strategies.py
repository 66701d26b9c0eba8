"""Hypothesis strategies for everything a kernel is proved on: tables, models, spaces, cut laws, proposals, kernels.

What they draw is chosen to expose faults, and small enough to enumerate: at least 3 symbols (two hide a missing
Hastings factor), one or several end ids, rows like those of a Dirichlet with concentration 1 or .1 (peaked rows show
faults that flat ones never do), transitions of probability zero. They shrink towards few paths, uniform rows, alpha 1
and temperature 1.

Needs hypothesis, so import it by name: `from powermc.testing import strategies`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from powermc.kernels import Cycle, Metropolis, Mixture
from powermc.proposals import Independent, RandomWalk
from powermc.sequences import CutLaw, Entropy, Horizon, Length, Path, SequenceProbability, Space, Suffix, cut_law
from powermc.targets import Power, Product, Table, Tempered, Tilted
from powermc.testing.spaces import EndsWith, paths_of, prefixes_of
from powermc.toy import TabularModel
from powermc.types import Kernel, Proposal, Target

ALPHAS = (1.0, 2.0, 4.0, 0.5, 0.0)
TEMPERATURES = (1.0, 0.5, 0.25, 2.0)

_QUANTILES = 9
_SMALLEST = 1e-6  # smaller weights only bring underflow, at alpha 4 and horizon 4


def _gamma_levels(concentration: float) -> tuple[float, ...]:
    """Quantiles of the Gamma law whose normalised draws are Dirichlet, the median first; then two zeros."""
    at = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    levels = np.maximum(stats.gamma(concentration).ppf(at), _SMALLEST)
    middle = _QUANTILES // 2
    order = sorted(range(_QUANTILES), key=lambda i: abs(i - middle))
    return (*(float(levels[i]) for i in order), 0.0, 0.0)


_LEVELS = {concentration: _gamma_levels(concentration) for concentration in (1.0, 0.1)}


def alphas() -> st.SearchStrategy[float]:
    """Powers of the target: 1, 2, 4, .5 and 0."""
    return st.sampled_from(ALPHAS)


def temperatures() -> st.SearchStrategy[float]:
    """Temperatures of a proposal: 1, .5, .25 and 2."""
    return st.sampled_from(TEMPERATURES)


def weights(size: int, *, zeros: bool = True) -> st.SearchStrategy[np.ndarray]:
    """Shape (size,), summing to 1: a Dirichlet row of concentration 1 or .1 by quantiles, some entries zero."""

    def normalised(row: tuple[float, ...]) -> np.ndarray:
        total = sum(row)
        return np.array(row) / total if total > 0 else np.eye(size)[0]

    def of(concentration: float) -> st.SearchStrategy[np.ndarray]:
        levels = _LEVELS[concentration] if zeros else _LEVELS[concentration][:_QUANTILES]
        return st.tuples(*[st.sampled_from(levels)] * size).map(normalised)

    return st.one_of(of(1.0), of(0.1))


# Sequences


def stop_rules(vocab_size: int) -> st.SearchStrategy[EndsWith]:
    """Stop rules of one or two tokens."""
    token = st.integers(0, vocab_size - 1)
    return st.one_of(st.tuples(token), st.tuples(token, token)).map(EndsWith)


@st.composite
def spaces(draw: st.DrawFn, vocab_size: int, *, horizon: int = 3, stop: bool | None = None) -> Space:
    """Spaces with one or two end ids among `vocab_size` tokens; `stop` True, False or None (either) for a stop rule."""
    last = vocab_size - 1
    ends = [{last}, {0}] + ([{0, last}] if vocab_size > 3 else [])
    eos = frozenset(draw(st.sampled_from(ends)))
    with_stop = draw(st.sampled_from([False, False, True])) if stop is None else stop
    return Space(eos, horizon, draw(stop_rules(vocab_size)) if with_stop else None)


@st.composite
def models(draw: st.DrawFn, space: Space, vocab_size: int, *, zeros: bool = True) -> TabularModel:
    """Tabular models of any order that matters on `space`; contexts that no path reaches get uniform rows."""
    order = draw(st.sampled_from(range(space.horizon)))
    table = np.full(((vocab_size + 1) ** order, vocab_size), 1.0 / vocab_size)
    flat = TabularModel(table, order)
    for context in sorted({flat.context(prefix) for prefix in prefixes_of(space, vocab_size)}):
        table[context] = draw(weights(vocab_size, zeros=zeros))
    return TabularModel(table, order)


@dataclass(frozen=True)
class Toy:
    """A model and a space small enough to list."""

    model: TabularModel
    space: Space

    @cached_property
    def paths(self) -> list[Path]:
        """Every path of the space, those of probability zero included."""
        return paths_of(self.space, self.model.vocab_size)

    @cached_property
    def p(self) -> np.ndarray:
        """The probability of every path, multiplied out of the table; shape (number of paths,)."""
        table, context = self.model.table, self.model.context
        return np.array(
            [math.prod(table[context(x.tokens[:t]), v] for t, v in enumerate(x.tokens)) for x in self.paths]
        )

    def power(self, alpha: float) -> np.ndarray:
        """p^alpha normalised over the paths; 0 where p is, at alpha = 0 too."""
        weights = np.where(self.p > 0, self.p ** np.float64(alpha), 0.0)
        return weights / weights.sum()

    def suffix(self, cuts: CutLaw | None = None, temperature: float = 1.0) -> Suffix:
        """The suffix proposal of this model; `length` cuts unless told otherwise."""
        return Suffix(self.model, self.space, Length() if cuts is None else cuts, temperature)

    def metropolis(self, alpha: float, cuts: CutLaw | None = None, temperature: float = 1.0) -> Metropolis[Path]:
        """Plain Metropolis-Hastings on p^alpha with that proposal."""
        return Metropolis(Power(SequenceProbability(self.model), alpha), self.suffix(cuts, temperature))

    def __repr__(self) -> str:
        table = np.array2string(self.model.table, precision=4, threshold=4000)
        return f"Toy({self.space}, order {self.model.order}, table\n{table})"


_SIZES = ((3, 2), (4, 2), (3, 3), (4, 3), (3, 4))


def _size(vocab_size: int, horizon: int) -> int:
    """The number of paths with one end id and no stop rule, the most there can be."""
    others = vocab_size - 1
    return sum(others**t for t in range(horizon - 1)) + others ** (horizon - 1) * vocab_size


@st.composite
def toys(draw: st.DrawFn, *, max_paths: int = 31, stop: bool | None = None, zeros: bool = True) -> Toy:
    """Models with 3 or 4 tokens on horizons 2 to 4 with at most `max_paths` paths (at least 7)."""
    sizes = [size for size in _SIZES if _size(*size) <= max_paths]
    vocab_size, horizon = draw(st.sampled_from(sizes))
    space = draw(spaces(vocab_size, horizon=horizon, stop=stop))
    return Toy(draw(models(space, vocab_size, zeros=zeros)), space)


def cut_laws(horizon: int, *, start: bool = False) -> st.SearchStrategy[CutLaw]:
    """All four cut laws over the whole path; with `start` those that freeze a prefix too (so no longer irreducible)."""
    whole: list[CutLaw] = [Length(), Horizon(horizon), Entropy()]
    if not start:
        return st.sampled_from(whole)
    frozen = [law for s in range(1, horizon) for law in (Length(s), Horizon(horizon, s), Entropy(s))]
    blocks = [cut_law("block", start=0, horizon=horizon, block_size=b) for b in range(1, horizon)]
    return st.sampled_from([*whole, *frozen, *blocks])


def suffixes(toy: Toy, *, start: bool = False) -> st.SearchStrategy[Suffix]:
    """Suffix proposals of a toy: any cut law, any temperature."""
    return st.builds(toy.suffix, cut_laws(toy.space.horizon, start=start), temperatures())


@st.composite
def rewards(draw: st.DrawFn, toy: Toy) -> Table[Path]:
    """A reward for every path of a toy, in nats between -2 and 2; -inf (forbidden) for some, never for all."""
    levels = st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, -math.inf])
    drawn = [draw(levels) for _ in toy.paths]
    if not any(r > -math.inf and p > 0 for r, p in zip(drawn, toy.p, strict=True)):
        drawn = [0.0] * len(drawn)
    return Table(dict(zip(toy.paths, drawn, strict=True)))


def path_targets(toy: Toy) -> st.SearchStrategy[Target[Path]]:
    """Targets on the paths of a toy: powers of p, tilted by a reward, products with a table, geometric bridges."""
    p = SequenceProbability(toy.model)
    powers = alphas().map(lambda alpha: Power(p, alpha))

    def composed(reward: Table[Path]) -> st.SearchStrategy[Target[Path]]:
        tilted = powers.map(lambda base: Tilted(base, reward.log_density))
        product = powers.map(lambda base: Product((base, reward)))
        bridge = st.builds(
            lambda base, beta: Tempered(p, Product((base, reward)), beta), powers, st.sampled_from(_BETAS)
        )
        return st.one_of(tilted, product, bridge)

    return st.one_of(powers, rewards(toy).flatmap(composed))


_BETAS = (0.5, 0.0, 1.0, 0.9)


@st.composite
def kernels(
    draw: st.DrawFn, toy: Toy, target: Target[Path], *, parts: int = 2, cycle: bool = True
) -> tuple[Kernel[Path], bool]:
    """Kernels on the paths of a toy, and whether the kernel is reversible.

    Metropolis-Hastings with any suffix proposal; with `parts` > 1 also mixtures and, with `cycle`, cycles of up to
    that many (nested once). Every kernel is irreducible: its proposals cut anywhere, except that further components
    of a mixture may freeze a prefix.
    """
    whole = suffixes(toy).map(lambda q: Metropolis(target, q))
    kind = draw(st.sampled_from(["metropolis", "mixture", "cycle"] if cycle else ["metropolis", "mixture"]))
    first = draw(whole)
    if parts < 2 or kind == "metropolis":
        return first, True
    others = draw(st.lists(suffixes(toy, start=kind == "mixture"), min_size=1, max_size=parts - 1))
    rest = [Metropolis(target, q) for q in others]
    if kind == "cycle":
        return Cycle([first, *rest]), False
    inner: list[Kernel[Path]] = [Mixture(rest, [1.0] * len(rest))] if draw(st.booleans()) else [*rest]
    return Mixture([first, *inner], [1.0, *[draw(st.sampled_from([1.0, 0.1, 3.0])) for _ in inner]]), True


# Plain discrete spaces


@st.composite
def tables(draw: st.DrawFn, values: Sequence[Any], *, zeros: bool = True) -> Table[Any]:
    """Targets on a finite set of values, given by their log weights, up to an arbitrary constant."""
    row = draw(weights(len(values), zeros=zeros))
    shift = draw(st.sampled_from([0.0, 3.0, -700.0]))
    with np.errstate(divide="ignore"):
        return Table({v: float(w) + shift for v, w in zip(values, np.log(row), strict=True)})


@dataclass(frozen=True)
class Graph:
    """A symmetric neighbourhood: `graph(x)` lists what is next to x, possibly x itself."""

    edges: frozenset[tuple[Hashable, Hashable]]
    values: tuple[Any, ...]

    def __call__(self, value: Any) -> list[Any]:
        return [v for v in self.values if (value, v) in self.edges or (v, value) in self.edges]

    def connects(self, support: Sequence[Any]) -> bool:
        """Whether one can walk between any two values of `support` without leaving it."""
        near = np.array([[a in self(b) for a in support] for b in support])
        return connected_components(csr_matrix(near), directed=False)[0] == 1


@st.composite
def graphs(draw: st.DrawFn, values: Sequence[Any]) -> Graph:
    """Symmetric graphs of uneven degree on the values: a path, and any other edges, loops included; it is connected."""
    values = tuple(values)
    path = {(a, b) for a, b in pairwise(values)}
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i:]]
    more = draw(st.lists(st.sampled_from(pairs), max_size=4))
    return Graph(frozenset(path | set(more)), values)


@st.composite
def plain_targets(draw: st.DrawFn, values: Sequence[Any], *, zeros: bool = True) -> Target[Any]:
    """Targets on a finite set of values: a table, or one of every other kind made of two tables."""
    base = draw(tables(values, zeros=zeros))
    kind = draw(st.sampled_from(["table", "power", "tilted", "product", "tempered"]))
    if kind == "table":
        return base
    if kind == "power":
        return Power(base, draw(alphas()))
    other = draw(tables(values, zeros=False))
    if kind == "tilted":
        return Tilted(base, other.log_density)
    if kind == "product":
        return Product((base, Power(other, draw(alphas()))))
    return Tempered(other, base, draw(st.sampled_from(_BETAS)))


def proposals(values: Sequence[Any]) -> st.SearchStrategy[Proposal[Any]]:
    """Random walks on uneven graphs, and independent proposals of full support."""
    walks = graphs(values).map(RandomWalk)
    independent = tables(values, zeros=False).map(lambda table: Independent(table.log_weights))
    return st.one_of(walks, independent)


@st.composite
def plain_kernels(draw: st.DrawFn, values: Sequence[Any], target: Target[Any]) -> tuple[Kernel[Any], bool]:
    """Irreducible kernels on a finite set of values, and whether the kernel is reversible.

    An independent proposal of full support, alone or in a mixture or cycle with up to two other kernels.
    """
    anywhere = Metropolis(target, Independent(draw(tables(values, zeros=False)).log_weights))
    others = [Metropolis(target, q) for q in draw(st.lists(proposals(values), max_size=2))]
    if not others:
        return anywhere, True
    if draw(st.booleans()):
        return Cycle([anywhere, *others]), False
    return Mixture([anywhere, *others], draw(st.tuples(*[st.sampled_from([1.0, 0.2])] * (len(others) + 1)))), True
