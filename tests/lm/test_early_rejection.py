"""Early rejection on a real (tiny) transformer in float64, through rows, cache, resume and scheduler.

P_fast = P_plain at horizon 2 and 3, and the same states with production streams on longer paths for fewer tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from powermc.choices import Stream
from powermc.kernels import DelayedAcceptance, Metropolis
from powermc.lm import CausalLM
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.scheduling import Event, drive
from powermc.sequences import BlockwisePower, Entropy, Length, Screening, SequenceProbability, Space, Suffix
from powermc.targets import Power, Tilted
from powermc.testing import assert_same_kernel, enumerate_kernel, prove
from tests.lm.toys import PROMPT, all_paths, toy_lm


def exit_of(lm: CausalLM) -> EarlyExit:
    generator = torch.Generator().manual_seed(1)
    weight = torch.eye(16) + 0.3 * torch.randn(16, 16, generator=generator)
    return EarlyExit(lm, ExitHead(2, "ridge", 1.3, weight.double(), torch.zeros(16, dtype=torch.float64)))


def drafts(lm: CausalLM, space: Space, cuts: Any, temperature: float = 0.8) -> dict[str, Any]:
    """A plain kernel with a reward, and a screened one of which an exit generates."""
    exit = exit_of(lm)
    p, screen = (Power(SequenceProbability(model), 2.0) for model in (lm, exit))
    reward = lambda path: 0.7 * path.tokens.count(0)  # noqa: E731
    return {
        "plain": Metropolis(Tilted(p, reward, 0.7 * space.horizon), Suffix(lm, space, cuts, temperature)),
        "screened": DelayedAcceptance([screen, p], Suffix(exit, space, cuts, temperature)),
    }


@pytest.mark.parametrize("cuts", [Length(), Entropy()])
@pytest.mark.parametrize("kind", ["plain", "screened"])
@pytest.mark.parametrize("horizon", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_no_entry_changes(horizon: int, kind: str, cuts: Any) -> None:
    """Rows of abandoned drafts are taken by others at once: fewer rows than leaves under way."""
    lm, space = toy_lm(layers=4, max_rows=40), Space(frozenset({2}), horizon)
    kernel, paths = drafts(lm, space, cuts)[kind], all_paths(space, 3)
    fast = prove(kernel, paths)
    assert_same_kernel(fast, enumerate_kernel(replace(kernel, early_rejection=False), paths))
    mass = sum(p for leaves in fast.leaves for (_, info), p in leaves if info.get("abandoned"))
    assert mass > 0.001


@pytest.mark.parametrize("screened", [False, True])
def test_the_same_states_for_fewer_tokens(screened: bool) -> None:
    """Three chains of 25 steps on 8 tokens, side by side on two rows: tokens and decisions are equal; log densities to
    1e-9, as which rows share a batch differs."""
    found = []
    for early in (True, False):
        lm = toy_lm(4, layers=4, max_rows=2, logit_scale=1.2)
        screening = Screening(exit_of(lm), 2.0, 0.8, plain=0.3) if screened else None
        plan = BlockwisePower(
            lm,
            Space(frozenset({3}), 8),
            alpha=2.0,
            temperature=0.8,
            block_size=8,
            steps=25,
            screening=screening,
            early_rejection=early,
        )
        programs = [(c, plan.program(Stream(3, chain=c).step, PROMPT)) for c in range(3)]
        steps = [(e.key, e.value) for e in drive(programs) if isinstance(e, Event) and hasattr(e.value, "info")]
        steps.sort(key=lambda entry: (entry[0], entry[1].step))
        found.append([step for _, step in steps])
    fast, plain = found
    assert len(fast) == len(plain) == 75
    for one, other in zip(fast, plain, strict=True):
        assert one.state.value == other.state.value
        assert one.state.log_density == pytest.approx(other.state.log_density, abs=1e-9)
        assert one.info["accepted"] == other.info["accepted"]
        assert one.info["proposal_length"] <= other.info["proposal_length"]
    assert len({step.state.value for step in fast}) > 9
    few, many = (sum(step.info["proposal_length"] for step in steps) for steps in (fast, plain))
    assert few < 0.97 * many
    assert sum(step.info.get("abandoned", False) for step in fast) > 3
