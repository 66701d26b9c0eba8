"""Same seed, same tokens: twice, beside other prompts, with fewer chains, with fewer rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from powermc.lm import CausalLM
from powermc.sequences import Committed
from tests.lm.families import tiny_model
from tests.lm.test_oracle_laws import PROMPTS, sample

LOG_RATIO_TOLERANCE = 1e-3


def tokens(steps: list[Committed]) -> list[tuple[int, ...]]:
    return [s.state.value.tokens for s in steps]


def near_ties(steps: list[Committed]) -> int:
    """Draws and decisions of a chain that rounding could have changed (float32)."""
    close = [abs(s.info.get("log_ratio", np.inf) - s.info.get("log_level", 0.0)) < LOG_RATIO_TOLERANCE for s in steps]
    return sum(s.info.get("near_ties", 0) for s in steps) + sum(close)


def assert_equal_up_to_near_ties(one: list[Committed], other: list[Committed]) -> None:
    """Equal up to the first step at or before which either chain met a near-tie."""
    for n, (a, b) in enumerate(zip(tokens(one), tokens(other), strict=True)):
        if a != b:
            assert near_ties(one[: n + 1]) or near_ties(other[: n + 1]), f"tokens differ at step {n} without a near-tie"
            return


def settings(dtype: str) -> tuple[Any, Any]:
    model = tiny_model("llama")
    return (model.double() if dtype == "float64" else model), {"alpha": 3.0, "temperature": 0.5}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_twice_in_a_row_bit_for_bit(dtype: str) -> None:
    model, options = settings(dtype)
    lm = CausalLM(model, max_rows=3)
    first = sample(lm, chains=2, **options)
    lm.forget()  # as `power_sample` does: what the first run left changes the shapes of the second's batches
    second = sample(lm, chains=2, **options)
    for key, steps in first.items():
        assert tokens(steps) == tokens(second[key])
        for a, b in zip(steps, second[key], strict=True):
            assert a.state.log_density == b.state.log_density


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_company_does_not_matter(dtype: str) -> None:
    """Other prompts, more chains, more rows in the batch: the same tokens (exactly in float64)."""
    model, options = settings(dtype)
    crowd = sample(CausalLM(model, max_rows=8), chains=4, **options)
    for max_rows, prompt in ((1, PROMPTS[0]), (4, PROMPTS[2])):
        alone = sample(CausalLM(model, max_rows=max_rows), chains=1, prompts=[prompt], **options)
        one, other = alone[prompt.key, 0], crowd[prompt.key, 0]
        if dtype == "float64":
            assert tokens(one) == tokens(other)
        else:
            assert_equal_up_to_near_ties(one, other)


def test_prompts_and_chains_have_streams_of_their_own() -> None:
    """Two prompts with equal tokens but different keys, and two chains, draw different paths."""
    from dataclasses import replace

    model, _ = settings("float64")
    lm = CausalLM(model)
    twin = replace(PROMPTS[1], key=99)
    steps = sample(lm, chains=2, prompts=[PROMPTS[1], twin], alpha=1.0, temperature=1.0)
    runs = {key: tuple(tokens(s)) for key, s in steps.items()}
    assert len(set(runs.values())) == 4
