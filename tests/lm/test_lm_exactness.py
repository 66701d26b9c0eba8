"""Kernels on a real (tiny) transformer, enumerated through cache, rows and scheduler.

V = 3 or 4 with an absorbing end token, horizon 2 or 3, float64: pi P = pi to 1e-12, irreducible, reversible, and
P_2 = P P with the state, cached activations included, carried over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from powermc.choices import Stream
from powermc.kernels import Cycle, Metropolis, Mixture
from powermc.lm import CausalLM
from powermc.lm.drafts import DecoderRow
from powermc.lm.rows import Prefix
from powermc.scheduling import run
from powermc.sequences import BlockwisePower, Entropy, Horizon, Length, Path, SequenceProbability, Space, Suffix
from powermc.targets import Power, Tilted
from powermc.testing import assert_carries_state, assert_invariant, enumerate_kernel, prove
from tests.lm.toys import PROMPT, all_paths, toy_lm

SPACE = Space(frozenset({2}), 3)
CUTS = {"length": Length(), "horizon": Horizon(3), "block": Horizon(3, 2), "entropy": Entropy()}


def suffix_kernel(
    lm: CausalLM, space: Space, cut: Any, *, alpha: float = 2.0, temperature: float = 0.8
) -> Metropolis[Path]:
    return Metropolis(Power(SequenceProbability(lm), alpha), Suffix(lm, space, cut, temperature))


@pytest.mark.parametrize("cut", ["length", "horizon", "entropy"])
def test_suffix_kernel_is_exact(cut: str) -> None:
    """Every cut law at horizon 3, proposal temperature apart from 1/alpha, one row fewer than the tasks under way; but
    for the state carried over, which the slow twin checks."""
    found = prove(suffix_kernel(toy_lm(max_rows=100), SPACE, CUTS[cut]), all_paths(SPACE, 3), carried=False)
    assert len(found.values) == 15
    assert found.pi.max() > 0.25, "the model should be peaked"
    assert any(not state.value.finished for state in found.states)


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["length", "horizon", "entropy"])
def test_suffix_kernel_carries_its_state(cut: str) -> None:
    assert_carries_state(suffix_kernel(toy_lm(max_rows=100), SPACE, CUTS[cut]), all_paths(SPACE, 3))


def test_block_cut_is_exact_but_not_irreducible() -> None:
    """The law `block` on the last block: invariant and reversible; earlier positions never change."""
    found = prove(suffix_kernel(toy_lm(), SPACE, CUTS["block"]), all_paths(SPACE, 3), irreducible=False)
    moved = [(found.values[i], found.values[j]) for i, j in np.argwhere(found.matrix > 0)]
    assert any(a != b for a, b in moved)
    assert all(a.tokens[:2] == b.tokens[:2] for a, b in moved)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2-sliding"])
@pytest.mark.parametrize("cut", ["length", "horizon", "entropy"])
def test_suffix_kernel_is_exact_on_other_families(family: str, cut: str) -> None:
    prove(suffix_kernel(toy_lm(family=family), SPACE, CUTS[cut], alpha=4.0, temperature=0.25), all_paths(SPACE, 3))


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_four_symbols_two_ends(alpha: float) -> None:
    space = Space(frozenset({1, 3}), 2)
    prove(suffix_kernel(toy_lm(4), space, Length(), alpha=alpha, temperature=1 / alpha), all_paths(space, 4))


def test_mixture_of_temperatures_completes_normalisers() -> None:
    """A path drawn at one temperature is scored at the other from its stored hidden states, and stays exact."""
    lm, space = toy_lm(), Space(frozenset({2}), 2)
    kernels = [suffix_kernel(lm, space, Length(), temperature=t) for t in (0.5, 1.0)]
    before = lm.ledger.copy()
    prove(Mixture(kernels, [0.3, 0.7]), all_paths(space, 3))
    assert lm.ledger.since(before).prefilled <= len(PROMPT.ids) + 3 * 7, "normalisers cost the head, not the layers"


@pytest.mark.slow
def test_cycle() -> None:
    lm, space = toy_lm(), Space(frozenset({2}), 2)
    kernels = [suffix_kernel(lm, space, cut) for cut in (Length(), Entropy())]
    prove(Cycle(kernels), all_paths(space, 3), reversible=False)


def test_reward_and_stop_rule() -> None:
    """A tilted target on paths that also end where a rule of the whole prefix says so."""
    space = Space(frozenset({2}), 3, stop=lambda tokens: tokens[-2:] == (0, 1))
    lm = toy_lm()
    target = Tilted(Power(SequenceProbability(lm), 2.0), lambda path: 0.7 * path.tokens.count(0))
    prove(Metropolis(target, Suffix(lm, space, Length(), 0.5)), all_paths(space, 3))


def test_block_scope_is_exact_given_its_prefix_and_not_jointly() -> None:
    """scope="block" freezes the first block: each class of paths with one prefix is sampled exactly, and only that."""
    lm = toy_lm()
    schedule = BlockwisePower(lm, SPACE, alpha=2.0, block_size=2, scope="block")
    found = enumerate_kernel(schedule.stage(1).kernel, all_paths(SPACE, 3))
    assert_invariant(found)  # each class keeps its own conditional law, so the joint is one of many invariant laws
    for i, start in enumerate(found.values):
        reached = [found.values[j] for j in np.flatnonzero(found.matrix[i])]
        assert all(v.tokens[:2] == start.tokens[:2] for v in reached)


@dataclass
class _Box:
    """A cache that is written to: whoever holds it sees the latest draft."""

    now: Prefix

    def upto(self, length: int) -> _Box:
        return self


class _OneCachePerChain(CausalLM):
    """Mutant: a chain has one cache, drafts write into it, and a rejection does not restore it.

    Without reuse, which would find most states by their tokens.
    """

    def branch(self, path: Path, cut: int) -> DecoderRow:
        box = path.cache
        row = super().branch(replace(path, cache=box.now), cut)
        keep = row.cache

        def cache() -> Any:
            box.now = keep()
            return _Box(box.now)

        row.cache = cache  # type: ignore[method-assign]
        return row

    def score(self, path: Path, exponents: Any) -> Any:
        return super().score(replace(path, cache=path.cache.now) if isinstance(path.cache, _Box) else path, exponents)

    def _score_one(self, request: Any, cache: Prefix, row: int) -> Any:
        return replace(super()._score_one(request, cache, row), cache=_Box(cache))


def test_mutant_cache_not_restored_after_rejection() -> None:
    """A stale prefix makes the next draft come from another path's activations."""
    lm = toy_lm()
    mutant = _OneCachePerChain(lm.decoder.model, max_rows=512, reuse=False)  # type: ignore[arg-type]
    space = Space(frozenset({2}), 2)
    kernel = suffix_kernel(mutant, space, Length())
    with pytest.raises(AssertionError, match=r"differ|unbalanced|sums to|came to other"):
        prove(kernel, all_paths(space, 3))


def test_mutant_is_only_the_cache() -> None:
    """The same subclassing with the box renewed at every draft is exact: what fails above is the sharing."""

    class Renewed(_OneCachePerChain):
        def branch(self, path: Path, cut: int) -> DecoderRow:
            return super().branch(replace(path, cache=replace(path.cache)), cut)

    lm = toy_lm()
    prove(
        suffix_kernel(Renewed(lm.decoder.model, max_rows=512, reuse=False), Space(frozenset({2}), 2), Length()),
        all_paths(Space(frozenset({2}), 2), 3),
    )  # type: ignore[arg-type]


def test_growth_then_steps_end_in_the_space_fully_scored() -> None:
    """The blockwise schedule ends in states of the final space whose scores are those of a fresh evaluation."""
    lm = toy_lm()
    schedule = BlockwisePower(lm, SPACE, alpha=0.5, block_size=1, steps=2)
    ends = [run(schedule.program(Stream(seed).step, PROMPT)).value for seed in range(20)]
    assert len({path.tokens for path in ends}) > 3
    for path in ends:
        fresh = run(schedule.stage(2).kernel.init(SPACE.path(PROMPT, path.tokens))).value
        assert path.log_p == pytest.approx(fresh.log_p, abs=1e-12)
        assert path.entropy == pytest.approx(fresh.entropy, abs=1e-12)
