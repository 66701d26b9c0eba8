"""Stores of transformers: the same bytes after a stop, frozen screens, fingerprints. float64, tiny."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import powermc
from powermc import CausalLM, Prompt, StoreError, power_sample
from powermc.errors import ArgumentError
from powermc.lm.heads import ExitHead
from powermc.store import digest, load, resume
from tests.kill_and_resume import prompts, transformer
from tests.lm.families import tiny_model
from tests.lm.lenses import lens_of

OPTIONS: dict[str, Any] = {"alpha": 3.0, "max_new_tokens": 12, "block_size": 6, "steps": 2, "chains": 2, "draws": 5}


def stopping(after: int):
    """A callback that presses Ctrl-C after so many steps."""
    seen = []

    def stop(*_: object) -> None:
        seen.append(1)
        if len(seen) == after:
            raise KeyboardInterrupt

    return [stop]


@pytest.mark.parametrize("after", [1, 9, 20])
def test_float64_goes_on_with_the_same_bytes(tmp_path, after):
    """A prefix decoded token by token, and the same prefilled at once, differ by 1e-15: no byte may show it."""
    model, _ = transformer("metropolis")
    power_sample(model, prompts(), **OPTIONS, store=tmp_path / "whole")
    stopped = power_sample(model, prompts(), **OPTIONS, store=tmp_path / "stopped", callbacks=stopping(after))
    assert stopped.interrupted
    before = model.ledger.copy()
    run = resume(tmp_path / "stopped", model)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    spent = model.ledger.since(before)
    begun = sum(chain.path is not None and chain.steps < 7 for row in stopped.chains for chain in row)
    assert spent.prefills <= len(stopped.chains) * 2 + begun
    assert run.cost.decoded == stopped.cost.decoded + spent.decoded
    assert run.seconds > stopped.seconds


@pytest.mark.parametrize(
    "how",
    [{"proposal": "exit"}, {"proposal": "substitution", "plain": 0.4}, {"proposal": "exit", "gated": 0.3}],
    ids=str,
)
def test_a_frozen_screen_is_restored_and_not_fitted_again(tmp_path, how):
    model, more = transformer("early-exit")
    options = {**OPTIONS, **more, **how}
    whole = power_sample(model, prompts(), **options, store=tmp_path / "whole")
    model.forget()  # as a process of its own would have nothing to be reused: the fit is good to 1e-15 only
    power_sample(model, prompts(), **options, store=tmp_path / "stopped", callbacks=stopping(7))
    before = model.ledger.copy()
    run = power_sample(model, prompts(), **options, store=tmp_path / "stopped", resume=True)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    frozen = ("proposal", "exponent", "temperature", "plain", "eta", "delta", "fitted", "surrogate", "layer")
    assert {n: run.early_exit[n] for n in frozen} == {n: whole.early_exit[n] for n in frozen}
    assert run.early_exit["warmup_cost"]["decoded"] == whole.early_exit["warmup_cost"]["decoded"]
    assert model.ledger.since(before).decoded < whole.cost.decoded, "no warm-up was run"
    assert run.stages == whole.stages
    assert load(tmp_path / "stopped").early_exit == run.early_exit


def test_auto_goes_on_with_what_the_pilot_chose(tmp_path):
    model, more = transformer("auto")
    options = {**OPTIONS, **more}
    whole = power_sample(model, prompts(), **options, store=tmp_path / "whole")
    power_sample(model, prompts(), **options, store=tmp_path / "stopped", callbacks=stopping(7))
    run = power_sample(model, prompts(), **options, store=tmp_path / "stopped", resume=True)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    assert run.early_exit["kernel"] == whole.early_exit["kernel"]
    assert run.early_exit["verdict"]


def test_a_run_names_the_lens_file_it_needs(tmp_path):
    model, more = transformer("early-exit")
    power_sample(model, prompts(), **OPTIONS, **more, store=tmp_path / "run", callbacks=stopping(7))
    with pytest.raises(StoreError, match=r"drawn with exit = Lens\(.*, given in Python; give it: exit="):
        resume(tmp_path / "run", model)
    resume(tmp_path / "run", model, exit=more["exit"])
    more["exit"].save(tmp_path / "lens.safetensors")
    power_sample(
        model, prompts(), **OPTIONS, exit=tmp_path / "lens.safetensors", store=tmp_path / "named", callbacks=stopping(7)
    )
    resume(tmp_path / "named", model)
    assert digest(tmp_path / "named") == digest(tmp_path / "run")


def test_another_lens_is_refused(tmp_path):
    model, more = transformer("early-exit")
    power_sample(model, prompts(), **OPTIONS, **more, store=tmp_path / "run", callbacks=stopping(7))
    for heads in ([ExitHead(model.depth // 2, temperature=1.5)], [ExitHead(1)]):
        other = lens_of(model, heads)
        with pytest.raises(
            ArgumentError, match=r"the run was screened by .*, and the exit given now is .*; give the one"
        ):
            power_sample(model, prompts(), **OPTIONS, exit=other, store=tmp_path / "run", resume=True)


def test_another_model_as_the_surrogate(tmp_path):
    """A model of its own screens: its weights are compared too."""
    small: Any = CausalLM(tiny_model("llama", seed=3).double(), max_rows=4)
    other: Any = CausalLM(tiny_model("llama", seed=4).double(), max_rows=4)
    model, _ = transformer("metropolis")
    power_sample(model, prompts(), **OPTIONS, exit=small, store=tmp_path / "whole")
    power_sample(model, prompts(), **OPTIONS, exit=small, store=tmp_path / "run", callbacks=stopping(7))
    with pytest.raises(ArgumentError, match="the run was screened by"):
        power_sample(model, prompts(), **OPTIONS, exit=other, store=tmp_path / "run", resume=True)
    before = load(tmp_path / "run").early_exit["surrogate_cost"]["decoded"]
    seen = small.ledger.copy()
    run = power_sample(model, prompts(), **OPTIONS, exit=small, store=tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert run.early_exit["surrogate_cost"]["decoded"] == before + small.ledger.since(seen).decoded
    assert load(tmp_path / "run").early_exit == run.early_exit


def test_other_weights_are_refused(tmp_path):
    model, _ = transformer("metropolis")
    power_sample(model, prompts(), **OPTIONS, store=tmp_path / "run")
    same = CausalLM(tiny_model("llama").double(), max_rows=2)
    resume(tmp_path / "run", same)  # the same weights in another object
    changed: Any = tiny_model("llama").double()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-9
    for other in (CausalLM(changed), CausalLM(tiny_model("llama"))):
        with pytest.raises(
            StoreError, match=r"\(fingerprint [0-9a-f]{8}\), and .* is another model, or has other weight"
        ):
            resume(tmp_path / "run", other)


def test_more_chains_do_not_change_the_others(tmp_path):
    model, _ = transformer("metropolis")
    power_sample(model, prompts(), **OPTIONS, store=tmp_path / "run")
    resume(tmp_path / "run", model, chains=4, draws=7)
    power_sample(model, prompts(), **{**OPTIONS, "chains": 4, "draws": 7}, store=tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_float32_goes_on_with_the_same_tokens_up_to_near_ties(tmp_path):
    lm = CausalLM(tiny_model("llama"), max_rows=4)
    power_sample(lm, prompts(), **OPTIONS, store=tmp_path / "whole")
    power_sample(lm, prompts(), **OPTIONS, store=tmp_path / "stopped", callbacks=stopping(9))
    run, whole = resume(tmp_path / "stopped", lm), load(tmp_path / "whole")
    if not any(whole.near_ties.values()) and not any(run.near_ties.values()):
        assert run.draws == whole.draws
        for one, other in zip(run.infos, whole.infos, strict=True):
            assert one["accepted"].tolist() == other["accepted"].tolist()
            assert np.allclose(one["log_p"], other["log_p"], atol=1e-3)


def test_without_a_tokenizer_a_run_has_no_texts_and_loads(tmp_path):
    lm = CausalLM(tiny_model("llama").double())
    power_sample(lm, Prompt((5, 6)), **OPTIONS, store=tmp_path / "run")
    run = powermc.load(tmp_path / "run")
    assert run.texts == [[None, None]]
    assert run.summary()
