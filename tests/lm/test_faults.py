"""Damaged logits stop the chain they belong to, and only that."""

from __future__ import annotations

import math

import pytest
import torch

from powermc.choices import Stream
from powermc.errors import NonFiniteLogits
from powermc.lm import CausalLM
from powermc.scheduling import Failed, Finished, drive
from powermc.sequences import BlockwisePower, Prompt, Space
from tests.lm.families import VOCAB, tiny_model
from tests.lm.test_oracle_laws import PROMPTS, deviation, end_token

BAD = VOCAB - 1


def outcomes(lm: CausalLM, prompts: list[Prompt], seed: int = 0) -> dict[object, Failed | Finished]:
    schedule = BlockwisePower(lm, Space(frozenset({end_token(lm)}), 12), alpha=1.0, block_size=6, steps=8)
    programs = ((p.key, schedule.program(Stream(seed, prompt=p.key).step, p)) for p in prompts)
    return {o.key: o for o in drive(programs) if isinstance(o, Failed | Finished)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_token_fails_its_chain_only(value: float) -> None:
    """One embedding is damaged: chains that draw the token stop, named; the rest are right, also in reused rows."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[BAD] = value
    lm = CausalLM(model, max_rows=3)
    prompts = [Prompt((i % BAD, 3, (5 * i) % BAD), f"prompt {i}", i) for i in range(24)]
    found = outcomes(lm, prompts)
    failed = [o for o in found.values() if isinstance(o, Failed)]
    done = [o for o in found.values() if isinstance(o, Finished)]
    assert failed
    assert done
    assert all(isinstance(o.error, NonFiniteLogits) for o in failed)
    assert all("row" in str(o.error) and "position" in str(o.error) for o in failed)
    for o in done:
        assert deviation(model, o.value.value, 1.0) <= 1e-5
    assert not lm.decoder.rows.used


def test_a_bad_prompt_fails_its_chains_only() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[BAD] = math.nan
    lm = CausalLM(model)
    bad = Prompt((1, BAD, 2), "bad", 50)
    found = outcomes(lm, [*PROMPTS, bad])
    assert isinstance(found[50], Failed)
    assert sum(isinstance(o, Finished) for o in found.values()) >= 1


def test_minus_infinity_is_a_zero_probability() -> None:
    """A banned token (logit -inf) is never drawn and leaves everything finite."""

    class Banned(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            logits[..., 4] = -math.inf
            return logits

    model = tiny_model("llama", tie_word_embeddings=False)
    head = Banned(32, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    lm = CausalLM(model)
    found = outcomes(lm, PROMPTS)
    assert all(isinstance(o, Finished) for o in found.values())
    assert all(4 not in o.value.value.tokens for o in found.values() if isinstance(o, Finished))
    assert all(deviation(model, o.value.value, 1.0) <= 1e-5 for o in found.values() if isinstance(o, Finished))
