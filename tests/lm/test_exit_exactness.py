"""Early-exit kernels on a real (tiny) transformer, enumerated through the real cache, resume and scheduler.

4 layers, an exit after 2, V = 3 or 4 with an absorbing end token, horizon 2 or 3, float64, peaked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from powermc.kernels import DelayedAcceptance
from powermc.lm import CausalLM
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.lm.rows import Rows, Slot
from powermc.sequences import Entropy, Length, Path, Screening, SequenceProbability, Space, UncertainTail
from powermc.targets import Power
from powermc.testing import Transitions, prove
from tests.lm.toys import all_paths, toy_lm

ALPHA, TEMPERATURE = 2.0, 0.6
EXIT = 2


def head(kind: str, seed: int = 1) -> ExitHead:
    """A head of each kind; the affine map is arbitrary: exactness asks nothing of it."""
    if kind in ("lens", "temperature"):
        return ExitHead(EXIT, kind, 1.0 if kind == "lens" else 1.7)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.eye(16) + 0.3 * torch.randn(16, 16, generator=generator)
    return ExitHead(EXIT, kind, 1.3, weight.double(), 0.1 * torch.randn(16, generator=generator).double())


def pair(vocab: int = 3, kind: str = "ridge", **options: Any) -> tuple[CausalLM, EarlyExit]:
    lm = toy_lm(vocab, layers=4, **options)
    return lm, EarlyExit(lm, head(kind))


def power(lm: CausalLM, paths: list[Path], alpha: float = ALPHA) -> np.ndarray:
    """p^alpha of every path by plain forwards of the stock model."""
    logs = []
    for path in paths:
        ids = torch.tensor([[*path.prompt.ids, *path.tokens]])
        with torch.no_grad():
            log_p = lm.decoder.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        at = range(len(path.prompt.ids) - 1, ids.shape[1] - 1)
        logs.append(sum(float(log_p[t, ids[0, t + 1]]) for t in at))
    return np.exp(alpha * np.array(logs))


def screened(lm: CausalLM, exit: EarlyExit, space: Space, cuts: Any = Length(), **options: Any) -> Any:
    options = {"exponent": 1.5, "temperature": 0.8, "plain": 0.2, **options}
    target = Power(SequenceProbability(lm), ALPHA)
    return Screening(exit, **options).kernel(lm, space, cuts, TEMPERATURE, target)


def gated_mass(found: Transitions[Path], gated: bool) -> float:
    """The stationary probability of a step that was (not) gated and that a stage decided on."""
    mass = 0.0
    for pi, leaves in zip(found.pi, found.leaves, strict=True):
        mass += pi * sum(p for (_, i), p in leaves if i.get("gated") is gated and not i["null"])
    return mass


@pytest.mark.parametrize("kind", ["lens", "temperature", "ridge", "kl"])
def test_every_head(kind: str) -> None:
    """Horizon 2, proposals by the exit; all rows of the buffer but one taken by other leaves' drafts."""
    lm, exit = pair(kind=kind, max_rows=40)
    space = Space(frozenset({2}), 2)
    paths = all_paths(space, 3)
    found = prove(screened(lm, exit, space), paths, law=power(lm, paths), carried=kind == "ridge")
    assert found.pi.max() > 0.25, "the model should be peaked"
    stages = {i["stage"] for leaves in found.leaves for (_, i), _ in leaves if "stage" in i}
    assert stages == {0, 1, 2}, "some proposals fail each stage"


@pytest.mark.parametrize("proposal", ["exit", "substitution", "full"])
def test_every_proposal(proposal: str) -> None:
    """Horizon 3 but for the state carried over, which the slow twin checks."""
    lm, exit = pair()
    space = Space(frozenset({2}), 3)
    paths = all_paths(space, 3)
    prove(screened(lm, exit, space, proposal=proposal, tokens=1), paths, law=power(lm, paths), carried=False)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["exit", "substitution", "full"])
def test_every_proposal_with_the_state_carried_over(proposal: str) -> None:
    lm, exit = pair()
    space = Space(frozenset({2}), 3)
    prove(screened(lm, exit, space, proposal=proposal, tokens=1), all_paths(space, 3))


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("threshold", ["eta", "delta"])
def test_gates(threshold: str, aggregate: str) -> None:
    """The threshold is the median of u over all tails: both kinds of pair have mass."""
    lm, exit = pair()
    space = Space(frozenset({2}), 2)
    paths = all_paths(space, 3)
    u = np.concatenate([(e.entropy if threshold == "eta" else e.margin) for e in scored_by(exit, paths)])
    kernel = screened(lm, exit, space, aggregate=aggregate, plain=0.0, **{threshold: float(np.median(u))})
    found = prove(kernel, paths, law=power(lm, paths))
    assert gated_mass(found, True) > 0.01
    assert gated_mass(found, False) > 0.01


def scored_by(exit: EarlyExit, paths: list[Path]) -> list[Path]:
    return exit.answer([exit.score(path, ()) for path in paths])


def test_entropy_cuts_by_the_exit() -> None:
    """The cut law reads the generator's entropies, so that stage 1 needs nothing of the full model."""
    lm, exit = pair()
    space = Space(frozenset({2}), 2)
    paths = all_paths(space, 3)
    prove(screened(lm, exit, space, Entropy()), paths, law=power(lm, paths))


def test_four_symbols_two_ends() -> None:
    lm, exit = pair(4)
    space = Space(frozenset({1, 3}), 2)
    paths = all_paths(space, 4)
    prove(screened(lm, exit, space, proposal="substitution", tokens=2), paths, law=power(lm, paths))


def test_three_stages() -> None:
    """Two exits below the full depth, each resumed by the next."""
    lm, low = pair()
    high = EarlyExit(lm, ExitHead(3))
    space = Space(frozenset({2}), 2)
    paths = all_paths(space, 3)
    targets = [Power(SequenceProbability(m), e) for m, e in ((low, 1.0), (high, 1.5), (lm, ALPHA))]
    moves = Screening(low, 1.0, temperature=0.8).proposals(lm, space, Length(), TEMPERATURE)
    kernel = DelayedAcceptance(targets, moves["exit"], UncertainTail(low, eta=1.0))
    prove(kernel, paths, law=power(lm, paths))
    assert lm.ledger.tokens(2, 3) > 0
    assert lm.ledger.tokens(3, 4) > 0


def test_a_smaller_model_as_the_surrogate() -> None:
    """Two-model delayed acceptance: nothing is shared but the paths."""
    lm, small = toy_lm(layers=4), toy_lm(seed=5)
    space = Space(frozenset({2}), 2)
    paths = all_paths(space, 3)
    for proposal in ("exit", "full"):
        kernel = screened(lm, small, space, proposal=proposal)  # type: ignore[arg-type]
        prove(kernel, paths, law=power(lm, paths), carried=proposal == "exit")


def test_pruned_heads() -> None:
    """A generator that cannot draw every token: moves from paths that hold others are null; and a screening head."""
    lm, exit = pair()
    space = Space(frozenset({2}), 2)
    paths = all_paths(space, 3)
    law = power(lm, paths)
    found = prove(screened(lm, exit.pruned([0, 2]), space), paths, law=law, carried=False)
    for x, leaves in zip(found.values, found.leaves, strict=True):
        nulls = {i["null"] for (_, i), _ in leaves if i["component"] == 0 and 1 in x.tokens[i["cut"] :]}
        assert nulls <= {True}
        assert nulls or 1 not in x.tokens
    prove(screened(lm, exit.pruned([0, 2], scoring=True), space, proposal="full"), paths, law=law, carried=False)


# What must fail.


class _LeftInPlace(Rows):
    """Mutant: a row that is taken anew counts the upper layers of whatever was there before as its own."""

    def acquire(self, prefix: Any, length: int) -> Slot:
        slot = super().acquire(prefix, length)
        deep, low = max(self.depths), min(self.depths)
        slot.filled[deep] = slot.filled[low]
        return slot


def test_mutant_upper_layers_of_a_rejected_survivor_left_in_place() -> None:
    """Completions then read another tail's upper keys, values and states."""
    lm, exit = pair()
    lm.engine.rows.__class__ = _LeftInPlace
    space = Space(frozenset({2}), 3)
    paths = all_paths(space, 3)
    kernel, law = screened(lm, exit, space), power(lm, paths)
    with pytest.raises(AssertionError, match=r"differ|unbalanced|sums to|came to other|too much"):
        prove(kernel, paths, law=law, carried=False)


def test_mutant_surrogate_scored_under_another_prefix() -> None:
    """The exit's scores of the current tail are taken from a path with another first token."""

    class Elsewhere(EarlyExit):
        def _score_one(self, request: Any, cache: Any, row: int) -> Any:
            scored: Any = super()._score_one(request, cache, row)
            return (
                scored
                if scored.tokens[0] == 0
                else scored.with_scores(
                    self, np.roll(scored.log_p, 1), scored.entropy, scored.margin, scored.log_z, scored.cache
                )
            )

    lm, _ = pair()
    exit = Elsewhere(lm, head("ridge"))
    space = Space(frozenset({2}), 3)
    paths = all_paths(space, 3)
    kernel, law = screened(lm, exit, space), power(lm, paths)
    with pytest.raises(AssertionError, match=r"differ|unbalanced|sums to|came to other"):
        prove(kernel, paths, law=law)
