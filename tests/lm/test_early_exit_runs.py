"""`power_sample` with exits of a real (tiny) model: which exit, what is drawn and recorded, and what it costs."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch

import powermc.lm
from powermc import ArgumentError, CausalLM, Lens, ModelError, NonFiniteLogits, Prompt, calibrate, power_sample
from powermc.early_exit import screened_cost
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.results import Run
from powermc.sequences import Screening
from powermc.stages import count_stages
from tests.lm.families import tiny_model
from tests.lm.lenses import lens_of
from tests.lm.test_calibration import texts

PROMPTS = [Prompt((1, 2, 7, 9, 11), "p", 5), Prompt((4, 4, 30), "q", 6)]
SMALL: dict[str, Any] = {"max_new_tokens": 12, "block_size": 6, "steps": 4, "chains": 2, "alpha": 1.5}


def fresh(seed: int = 0, **options: Any) -> CausalLM:
    return CausalLM(tiny_model("llama", seed=seed).double(), **options)


@cache
def lens() -> Lens:
    return calibrate(fresh(), texts(150), layers=[2, 3])


@cache
def sampled(proposal: str) -> tuple[CausalLM, Run]:
    """Without what makes a move cheaper than the paper's cost model has it."""
    lm, more = fresh(reuse=False), {"steps": 20, "chains": 3, "early_rejection": False}
    return lm, power_sample(lm, PROMPTS, **{**SMALL, **more}, exit=lens(), proposal=proposal)


def tokens(run: Run) -> Any:
    return [[chain.path.tokens for chain in chains] for chains in run.chains if None not in chains]  # type: ignore[union-attr]


def log_p(lm: CausalLM, path: Any) -> float:
    """By a plain forward of the stock model."""
    ids = torch.tensor([[*path.prompt.ids, *path.tokens]])
    with torch.no_grad():
        logs = lm.decoder.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    at = range(len(path.prompt.ids) - 1, ids.shape[1] - 1)
    return sum(float(logs[t, ids[0, t + 1]]) for t in at)


# Which exit.


def test_a_lens_its_file_and_its_exit_are_the_same(tmp_path: File) -> None:
    lens().save(tmp_path / "a.lens")
    found = [
        power_sample(fresh(), PROMPTS, **SMALL, exit=lens(), layer=3),
        power_sample(fresh(), PROMPTS, **SMALL, exit=tmp_path / "a.lens", layer=3),
        power_sample(fresh(), PROMPTS, **SMALL, exit=str(tmp_path / "a.lens")),
    ]
    lm = fresh()
    found.append(power_sample(lm, PROMPTS, **SMALL, exit=EarlyExit(lm, lens().head(3))))
    assert [tokens(run) for run in found[1:]] == [tokens(found[0])] * 3
    assert {run.early_exit["layer"] for run in found} == {3}
    assert [run.settings["exit"] for run in found[:3]] == [repr(lens()), *[str(tmp_path / "a.lens")] * 2]
    assert found[3].early_exit["surrogate"] == "LlamaForCausalLM, layer 3, ridge" == found[3].settings["exit"]
    assert all("surrogate_cost" not in run.early_exit for run in found), "the model's own ledger counts it"
    assert found[3].early_exit["kl_positions"] == found[0].early_exit["kl_positions"] > 0
    assert math.isnan(found[3].early_exit["kl_held_out"]), "of a head alone nothing is known"


def test_the_deepest_exit_unless_another_is_asked_for() -> None:
    """Only the exit in use is kept states for."""
    lm = fresh()
    assert power_sample(lm, PROMPTS, **SMALL, exit=lens()).early_exit["layer"] == 3
    assert set(lm.decoder.rows.depths) == {3, 4}
    lm = fresh()
    run = power_sample(lm, PROMPTS, **SMALL, exit=lens(), layer=2)
    assert run.early_exit["layer"] == 2
    assert run.early_exit["kl_held_out"] == lens().report[0].kl
    assert set(lm.decoder.rows.depths) == {2, 4}


def test_without_an_exit_the_cached_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cached(model: CausalLM, layers: Any, **shown: Any) -> Lens:
        asked.append(layers)
        return lens()

    monkeypatch.setitem(__import__("powermc.lm").lm.__dict__, "cached_lens", cached)
    run = power_sample(fresh(), PROMPTS, **SMALL, kernel="early-exit", layer=2)
    assert run.early_exit["layer"] == 2
    power_sample(fresh(), PROMPTS, **SMALL, kernel="early-exit")
    assert asked == [[2], None]


def test_lenses_that_do_not_fit() -> None:
    lm = fresh()
    with pytest.raises(ArgumentError, match="the lens has no head at layer 1; it has 2, 3"):
        power_sample(lm, PROMPTS, **SMALL, exit=lens(), layer=1)
    with pytest.raises(ArgumentError, match="exit must be a lens, its file or a surrogate model, got int"):
        power_sample(lm, PROMPTS, **SMALL, exit=3)
    with pytest.raises(ModelError, match="other weights than those of"):
        power_sample(fresh(seed=1), PROMPTS, **SMALL, exit=lens())
    with pytest.raises(ModelError, match="fitted to float64 weights"):
        power_sample(CausalLM(tiny_model("llama")), PROMPTS, **SMALL, exit=lens())
    assert lm.ledger.flops == 0


# What is drawn.


@pytest.mark.parametrize("proposal", ["exit", "substitution"])
def test_log_p_is_that_of_the_model(proposal: str) -> None:
    lm, run = sampled(proposal)
    space = lm.space(12)
    for p in range(2):
        for c, chain in enumerate(run.chains[p]):
            assert chain.path is not None
            assert space.contains(chain.path.tokens)
            assert chain.path.log_prob == pytest.approx(log_p(lm, chain.path), abs=1e-9)
            assert run.infos[p]["log_p"][c, -1] == chain.path.log_prob
            assert run.infos[p]["log_density"][c, -1] == pytest.approx(1.5 * chain.path.log_prob, abs=1e-9)
    found = run.stages
    assert found is not None
    assert min(found.screened, found.passed, found.accepted, found.plain, found.saved) > 0
    assert found == count_stages(run.infos)


def test_the_same_call_draws_the_same_and_company_does_not_matter() -> None:
    one, other = (power_sample(fresh(), PROMPTS, **SMALL, exit=lens(), seed=4) for _ in range(2))
    assert tokens(one) == tokens(other)
    lm = fresh()
    alone = power_sample(lm, PROMPTS[1], **SMALL, exit=lens(), seed=4)
    again = power_sample(lm, PROMPTS[1], **SMALL, exit=lens(), seed=4)  # the prompt's activations are there by now
    crowded = power_sample(fresh(max_rows=2), PROMPTS[::-1], **{**SMALL, "chains": 3}, exit=lens(), seed=4)
    assert tokens(alone)[0] == tokens(again)[0] == tokens(one)[1] == list(tokens(crowded)[0][:2])


@pytest.mark.parametrize("proposal", ["substitution", "full"])
@pytest.mark.filterwarnings("ignore:proposal 'full'")
def test_the_fitted_exponent_is_recorded_and_reproducible(proposal: str) -> None:
    one, other = (power_sample(fresh(), PROMPTS, **SMALL, exit=lens(), proposal=proposal) for _ in range(2))
    assert one.early_exit["fitted"] == ["exponent"]
    assert 0.015 <= one.early_exit["exponent"] <= 1.5
    assert one.early_exit["exponent"] == pytest.approx(other.early_exit["exponent"], abs=1e-12)
    assert tokens(one) == tokens(other)
    given = power_sample(fresh(), PROMPTS, **SMALL, exit=lens(), proposal=proposal, screen=one.early_exit["exponent"])
    assert given.early_exit["fitted"] == []
    assert tokens(given) == tokens(one)


def test_nan_at_the_exit_ends_that_chain_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one draft reads NaN at layer 3; the model's own layers and all other rows are fine."""
    lm, original, calls = fresh(), EarlyExit._next_logits, 0

    def faulty(self: EarlyExit, rows: Any) -> torch.Tensor:
        nonlocal calls
        logits, calls = original(self, rows), calls + 1
        if calls == 4:
            logits = logits.clone()
            logits[0] = math.nan
        return logits

    whole = power_sample(fresh(), PROMPTS, **SMALL, exit=lens())
    monkeypatch.setattr(EarlyExit, "_next_logits", faulty)
    with pytest.warns(RuntimeWarning, match=r"stopped after \d+ steps: the model's logits are NaN or infinite in row"):
        run = power_sample(lm, PROMPTS, **SMALL, exit=lens())
    ((key, error),) = run.errors.items()
    assert isinstance(error, NonFiniteLogits)
    assert lm.engine.watchers == []
    assert not lm.decoder.rows.used
    for p in range(2):
        for c in range(2):
            if (p, c) != key:
                assert run.chains[p][c].path == whole.chains[p][c].path
    assert run.stages is not None
    assert run.stages.steps == sum(chain.steps for chains in run.chains for chain in chains)
    json.dumps(run.to_dict(), allow_nan=False)


# What it costs.


def test_only_survivors_are_completed() -> None:
    """Layers 3.. run on the tails that passed, from where they leave the current path on, and on nothing else. A tail
    of n tokens has n - 1 new states below the exit (its first token is read off a known state, its last is never run),
    and no more above it."""
    tails = []

    class Watching:
        def __init__(self, exit: EarlyExit) -> None:
            self.exit = exit

        def completed(self, cache: Any, start: int, stop: int) -> None:
            tails.append(stop - start)

    lm = fresh(reuse=False)
    exit = EarlyExit(lm, lens().head(3))
    lm.engine.watchers.append(Watching(exit))  # type: ignore[arg-type]
    run = power_sample(lm, PROMPTS, **{**SMALL, "steps": 12}, exit=exit, early_rejection=False)
    cost, found = run.cost, run.stages
    assert found is not None
    proposals = found.screened + found.gated + found.same
    assert len(tails) == found.passed > 10
    assert cost.tokens(3, 4) == sum(tails) - len(tails)
    assert 0.5 * found.completed_tokens < sum(tails) <= found.completed_tokens
    assert cost.tokens(0, 3) == found.proposed_tokens - proposals
    assert set(cost.spans) == {(0, 3), (3, 4), (0, 4)}
    infos = run.infos
    plain = sum(int(i["tokens"][i["component"] == 1].sum()) for i in infos)
    grown = sum(chain.grown for chains in run.chains for chain in chains)
    prompts = sum(len(p.ids) for p in PROMPTS)
    starts = sum(len(chains) for chains in run.chains)
    assert plain + prompts < cost.tokens(0, 4) <= plain + prompts + grown + starts
    assert run.tokens == cost.tokens(0, 3) + cost.tokens(0, 4)


def by_hand(lm: CausalLM, run: Run, tails: np.ndarray, cuts: np.ndarray, passed: int) -> dict[str, float]:
    """The cost model from the weights of a llama of width 32: 2 operations per weight, attention 4 x 32 per slot."""
    n = tails.mean()
    context = np.mean([len(p.ids) for p in PROMPTS]) + cuts.mean() + n / 2
    layer = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64) + 4 * 32 * context
    head, affine = 2 * 37 * 32, 2 * 32 * 32
    mid, tail, rho = n * (3 * layer + affine + head), n * (layer + head), passed / len(tails)
    return {
        "rho": rho,
        "c_mid": mid,
        "c_tail": tail,
        "model": (1 - rho) * mid + rho * (mid + tail),
        "full_depth": n * (4 * layer + head),
    }


@pytest.mark.parametrize("proposal", ["exit", "substitution"])
def test_the_cost_model_is_the_papers(proposal: str) -> None:
    lm, run = sampled(proposal)
    found, cost = run.stages, run.early_exit["cost"]
    assert found is not None
    drawn = [(i["component"] == 0) & ~i["null"] for i in run.infos]
    cuts = np.concatenate([i["cut"][at] for i, at in zip(run.infos, drawn, strict=True)])
    lengths = np.concatenate([i["length"][at] for i, at in zip(run.infos, drawn, strict=True)])
    passes = np.concatenate([i["stage"][at] >= 1 for i, at in zip(run.infos, drawn, strict=True)])
    if proposal == "exit":
        tails = np.concatenate([i["proposal_length"][at] for i, at in zip(run.infos, drawn, strict=True)])
    else:
        tails = lengths - cuts  # what follows the new tokens is evaluated too
        assert tails.mean() > 1.3 * found.proposed_tokens / len(tails)
    expected = by_hand(lm, run, tails, cuts, int(passes.sum()))
    assert {name: cost[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    # What was counted is no model. It differs by reasons that can be told: the first token of a tail is free (a share
    # of 1/n of the layers), survivors are shorter than the mean and begin as the current path does, and current paths
    # are scored by the exit.
    assert cost["counted"] == pytest.approx(cost["model"], rel=0.25)
    assert cost["counted"] < cost["full_depth"] * 1.05
    counted = cost["counted"] * len(tails)
    spans, heads = run.cost.span_flops, run.cost.head_flops
    completed = (run.cost.tokens(3, 4) + found.passed) * lm.engine.cost.head
    assert run.cost.tokens(3, 4) + found.passed <= tails[passes].sum()
    assert counted == pytest.approx(spans[0, 3] + spans[3, 4] + heads[3] + completed)


def test_tails_of_one_length_cost_what_the_model_says() -> None:
    """Without end tokens a tail's length says nothing of its fate, and is 20 on average: what the first token of each
    saves and what scoring the current paths costs leave 5% at most between the model and what was counted."""
    lm = fresh()
    lm.text.eos = frozenset()  # type: ignore[misc]
    options = {"max_new_tokens": 40, "block_size": 40, "steps": 12, "chains": 6, "alpha": 1.5}
    run = power_sample(lm, PROMPTS, **options, exit=lens(), plain=0.0)
    cost = run.early_exit["cost"]
    assert cost["counted"] == pytest.approx(cost["model"], rel=0.05)


def test_nothing_screened_costs_nothing() -> None:
    lm = fresh()
    exit = EarlyExit(lm, ExitHead(2))
    run = power_sample(lm, PROMPTS, **{**SMALL, "steps": 0}, exit=exit)
    assert all(math.isnan(x) for x in run.early_exit["cost"].values())
    assert "GFLOP" not in run.summary()
    assert run.to_dict()["early_exit"]["cost"]["rho"] is None
    nothing = screened_cost(lm, Screening(exit, 1.0), count_stages([]), [], PROMPTS, run.cost)
    assert set(nothing) == set(run.early_exit["cost"]) == set(sampled("exit")[1].early_exit["cost"])


def test_the_summary_and_json_of_a_real_run() -> None:
    for proposal in ("exit", "substitution"):
        run = sampled(proposal)[1]
        lines = run.summary().splitlines()
        assert max(map(len, lines)) <= 80
        assert "early exit: LlamaForCausalLM, layer 3, ridge;" in lines
        held = lens().report[1].kl
        assert f"      held out {held:.2f}" in lines
        facts = json.loads(json.dumps(run.to_dict(), allow_nan=False))["early_exit"]
        assert facts["kl"] == run.early_exit["kl"] > 0
        assert facts["cost"]["counted"] > 0


# An exit of another model than the one sampled is a model of its own.


def test_an_exit_of_another_model() -> None:
    lm, other = fresh(), fresh(seed=2)
    run = power_sample(lm, PROMPTS, **SMALL, exit=EarlyExit(other, ExitHead(2)))
    facts = run.early_exit
    assert not {"kl", "cost"} & set(facts)
    assert facts["surrogate_cost"]["tokens_by_depth"].keys() == {"0-2"}
    assert facts["surrogate_cost"]["flops"] > 0
    for chains in run.chains:
        for chain in chains:
            assert chain.path is not None
            assert chain.path.log_prob == pytest.approx(log_p(lm, chain.path), abs=1e-9)


# kernel="auto".


def test_auto_runs_a_pilot_and_follows_it() -> None:
    run = power_sample(fresh(), PROMPTS, **SMALL, kernel="auto", exit=lens_of(fresh(), [ExitHead(2)], kl=0.7))
    facts = run.early_exit
    names = [row["name"] for row in facts["pilot"]["choices"]]
    assert names == ["plain MH", "exit 2, exit", "exit 2, substitution"]
    assert [row["kl"] for row in facts["pilot"]["choices"]] == [None, 0.7, 0.7]
    assert facts["pilot"]["recommended"] in names
    assert facts["verdict"].startswith("recommended: ")
    assert facts["verdict"] in " ".join(run.summary().split())
    assert max(map(len, run.summary().splitlines())) <= 80
    if facts["pilot"]["recommended"] == "plain MH":
        assert facts["kernel"] == "metropolis"
        assert tokens(run) == tokens(power_sample(fresh(), PROMPTS, **SMALL))
    else:
        row = facts["pilot"]["choices"][names.index(facts["pilot"]["recommended"])]
        assert (facts["layer"], facts["proposal"], facts["exponent"]) == (2, row["proposal"], row["exponent"])
    json.dumps(run.to_dict(), allow_nan=False)


# What a warm-up shows.


def test_a_warm_up_shows_what_it_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line per part where there is no terminal, steps of the pilot included; nothing on standard output."""
    monkeypatch.setattr("powermc.progress.PLAIN_INTERVAL", 0.0)
    exits = lens_of(fresh(), [ExitHead(2)], kl=0.7)
    power_sample(fresh(), PROMPTS, **SMALL, kernel="auto", exit=exits, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    parts = ["pilot: paths to start from", "pilot: plain MH", "pilot: exit 2, exit", "pilot: exit 2, substitution"]
    lines = err.splitlines()
    assert [line.removeprefix("powermc: ") for line in lines if line.removeprefix("powermc: ") in parts] == parts
    assert any(line.startswith("powermc: pilot: plain MH  50%  accepted ") for line in lines), "16 of 32 steps"
    assert lines[-1].startswith("powermc: 32/32 steps"), "then the run's own"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"proposal": "substitution"}, "fitting exponent of the screen"),
        ({"gated": 0.5}, "fitting eta of the screen"),
        ({"proposal": "substitution", "gated": 0.5}, "fitting exponent and eta of the screen"),
    ],
)
def test_fitting_is_shown(options: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    exits = lens_of(fresh(), [ExitHead(2)])
    power_sample(fresh(), PROMPTS, **SMALL, exit=exits, **options, progress=True)
    assert f"powermc: {said}\n" in capsys.readouterr().err
    power_sample(fresh(), PROMPTS, **SMALL, exit=exits, **options)
    assert capsys.readouterr() == ("", "")


def test_a_lens_that_is_fitted_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: File
) -> None:
    """Also where a run is gone on with and its lens has gone from the cache."""

    def fitted(model: CausalLM, layers: Any, *, progress: Any) -> Lens:
        progress("writing text", 0.5)
        return lens_of(model, [ExitHead(2)])

    monkeypatch.setitem(powermc.lm.__dict__, "cached_lens", fitted)
    options = {**SMALL, "kernel": "early-exit", "store": tmp_path / "run.db", "resume": True}
    for more, shown in (({"progress": True}, 1), ({"progress": True, "draws": 5}, 1), ({"draws": 6}, 0)):
        power_sample(fresh(), PROMPTS, **{**options, **more})
        assert capsys.readouterr().err.count("powermc: writing text\n") == shown
