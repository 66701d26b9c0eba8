"""`power_sample` with a surrogate model: settings, what is recorded, streams, faults. With tables, so without torch."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest

import powermc.evaluation.pilot
from powermc import ArgumentError, NonFiniteLogits, Prompt, power_sample
from powermc.early_exit import DRIFTED, Prepared
from powermc.evaluation.pilot import Choice, Pilot
from powermc.sequences import Length, Screening
from powermc.stages import count_stages
from powermc.toy import TabularModel
from powermc.tuning import fit_eta, fit_exponent, grown, pairs
from tests.fake_lm import EOS, PIECES, FakeLM, score

SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 6, "chains": 3, "alpha": 2.0}


def surrogate(**options) -> FakeLM:
    return FakeLM(**{"seed": 3, **options})


def tokens(run):
    return [[chain.path.tokens for chain in chains] for chains in run.chains]


def histories(run, prompt):
    return {name: values.tobytes() for name, values in run.infos[prompt].items()}


@pytest.fixture(scope="module")
def run():
    return power_sample(FakeLM(), ["a", "b"], **{**SMALL, "alpha": 1.2}, exit=surrogate(), eta=1.7, aggregate="mean")


# What a run holds.


def test_log_p_is_that_of_the_model_not_of_the_surrogate(run):
    model = FakeLM()
    for p in range(2):
        for c, chain in enumerate(run.chains[p]):
            for path in (chain.path, *chain.draws):
                assert model.space(12).contains(path.tokens)
                assert path.log_prob == pytest.approx(score(model, path), abs=1e-12)
            assert run.infos[p]["log_p"][c, -6:].tolist() == [x.log_prob for x in chain.draws]
            assert run.log_p[p][c] == chain.path.log_prob
        assert run.infos[p]["log_density"] == pytest.approx(1.2 * run.infos[p]["log_p"], abs=1e-11)


def test_kept_paths_hold_scores_but_no_activations(run):
    kept = [path for chain in run.chains[0] for path in (chain.path, *chain.draws)]
    assert {view.cache for path in kept for view in (path, *path.others)} == {None}
    assert max(len(path.others) for path in kept) == 1


def test_the_stages_are_a_recount_of_the_infos(run):
    names = ("screened", "passed", "accepted", "same", "gated", "null", "plain", "changed", "drawn", "done")
    counted = dict.fromkeys(names, 0)
    for p in range(2):
        info = run.infos[p]
        for c in range(3):
            for i in range(18):
                step = {name: values[c, i] for name, values in info.items()}
                counted["changed"] += step["changed"]
                if step["component"] == 1:
                    counted["plain"] += 1
                elif step["null"]:
                    counted["null"] += 1
                else:
                    counted["same" if step["same"] else "gated" if step["gated"] else "screened"] += 1
                    counted["drawn"] += step["proposal_length"]
                    passed = not step["gated"] and step["stage"] >= 1
                    counted["passed"] += passed
                    counted["accepted"] += passed and step["accepted"]
                    counted["done"] += step["proposal_length"] * (passed or step["gated"])
    found = run.stages
    assert found is not None
    assert counted == {
        "screened": found.screened,
        "passed": found.passed,
        "accepted": found.accepted,
        "same": found.same,
        "gated": found.gated,
        "null": found.null,
        "plain": found.plain,
        "changed": found.changed,
        "drawn": found.proposed_tokens,
        "done": found.completed_tokens,
    }
    assert found.steps == 2 * 3 * 18
    assert min(found.screened, found.passed, found.accepted, found.gated, found.plain, found.saved, found.same) > 0


def test_the_facts(run):
    facts = {k: v for k, v in run.early_exit.items() if k not in ("surrogate_cost", "warmup_cost")}
    assert facts == {
        "kernel": "early-exit",
        "fitted": [],
        "surrogate": "fake",
        "layer": None,
        "proposal": "exit",
        "exponent": 1.2,
        "temperature": None,
        "plain": 0.1,
        "eta": 1.7,
        "delta": None,
        "aggregate": "mean",
        "tokens": 4,
        "advice": None,
    }
    assert run.settings["kernel"] == "early-exit"
    assert run.settings["exit"] == "fake"


def test_plain_metropolis_has_no_stages():
    plain = power_sample(FakeLM(), "a", **SMALL)
    assert plain.early_exit == {"kernel": "metropolis"}
    assert plain.stages is None
    assert "stage 1" not in plain.summary()


def test_a_surrogate_without_name_or_ledger():
    table = TabularModel(FakeLM(seed=3).table, 1)
    bare = power_sample(FakeLM(), "a", **SMALL, exit=table)
    assert bare.early_exit["surrogate"] == bare.settings["exit"] == "TabularModel"
    assert "surrogate_cost" not in bare.early_exit
    assert tokens(bare) == tokens(power_sample(FakeLM(), "a", **SMALL, exit=surrogate()))


@pytest.mark.parametrize("proposal", ["exit", "substitution", "full"])
def test_the_surrogates_cost_is_that_of_this_run(proposal):
    """Each token that a surrogate draws is counted once in its ledger, and none of its warm-up or of an earlier run."""
    model, small = FakeLM(), surrogate()
    options = {**SMALL, "exit": small, "proposal": proposal}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        power_sample(model, "earlier", **options)
        seen = small.ledger.decoded
        found = power_sample(model, "a", **options)
    info, cost = found.infos[0], found.early_exit["surrogate_cost"]
    drawn = int(info["tokens"][info["component"] == 0].sum())
    plain = int(info["tokens"][info["component"] == 1].sum())
    grown_tokens = sum(chain.grown for chain in found.chains[0])
    own = 0 if proposal == "full" else drawn
    assert cost["decoded"] == own
    assert found.cost.decoded == plain + grown_tokens + drawn - own
    if proposal == "exit":
        assert small.ledger.decoded - seen == own > 0
    if proposal == "substitution":
        assert small.ledger.decoded - seen > own > 0, "the warm-up's proposals are not the run's"


def test_everything_is_json(run):
    text = json.dumps(run.to_dict(), allow_nan=False)
    found = json.loads(text)
    assert found["early_exit"]["surrogate"] == "fake"
    info = found["prompts"][1]["chains"][2]["infos"]
    assert info["stage"] == run.infos[1]["stage"][2].tolist()
    assert None in info["log_target"]


# The summary.


def test_the_summary(run):
    text, s = run.summary(), run.stages
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    at = lines.index("early exit: fake;")
    assert lines[at + 1 : at + 4] == [
        "      proposal exit, screening exponent 1.2, plain steps 10%",
        f"stage 1: {s.passed}/{s.screened} {s.pass_rate:.0%} passed, {s.saved} completions saved;",
        f"      stage 2: {s.accepted}/{s.passed} {s.stage2_rate:.0%} accepted; "
        f"gated {s.gated}/{s.screened + s.gated} {s.gated_share:.0%}, plain {s.plain}",
    ]
    assert "note:" not in text


def test_the_summary_of_a_long_run_fits_the_screen(run):
    """A thousand times the steps, a cost model, a drift, several spans of layers, and an advice."""
    infos = tuple({name: np.tile(v, (1, 1000)) for name, v in info.items()} for info in run.infos)
    for info in infos:
        info["stage1_accepted"][:] = True
    cost = dict.fromkeys(("rho", "c_mid", "c_tail", "model", "counted", "full_depth"), 12345678912345.6)
    drift = {"cost": cost, "kl": 12.345, "kl_positions": 123456, "kl_held_out": 1.35}
    facts = {**run.early_exit, **drift, "advice": count_stages(infos).advice(), "verdict": "word " * 40}
    ledger = run.cost.copy()
    ledger.spans.update({(0, 20): 1234567, (20, 30): 234567, (20, 24): 123456, (24, 30): 1234567})
    long = replace(run, infos=infos, early_exit=facts, cost=ledger, resolution=1e-5, seconds=12345.6)
    lines = long.summary().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "note: the first stage screens nothing: it turned down 0 of " in text
    assert "KL(p||p~) on completed tails: 12.35 nats (123,456 positions, survivors only); held out 1.35" in text
    assert "1,234,567 at layers 0-20, " in text
    assert "1,234,567 at layers 24-30; " in text
    facts["kl_held_out"] = math.nan
    assert "held out unknown" in " ".join(replace(long, early_exit=facts).summary().split())
    json.dumps(replace(long, early_exit=facts).to_dict(), allow_nan=False)


def test_tokens_are_counted_once_however_many_spans_they_passed(run):
    before = run.tokens
    ledger = run.cost.copy()
    ledger.ran((0, 1), 10, parallel=False)
    ledger.ran((1, 2), 7, parallel=True)
    assert replace(run, cost=ledger).tokens == before + 10


# Useless first stages.


def test_a_first_stage_that_screens_nothing_is_reported():
    """The same power of nearly nothing everywhere, and proposals of the same probability both ways."""
    options = {**SMALL, "proposal": "substitution", "temperature": 1e6, "screen": 0.0}
    found = power_sample(FakeLM(), ["a", "b"], **options, exit=surrogate())
    assert found.stages.pass_rate > 0.95
    assert found.stages.screened > 20
    advice = found.early_exit["advice"]
    assert advice == found.stages.advice()
    assert "screens nothing: it turned down 0 of" in advice
    summary = found.summary()
    assert f"note: {advice}" in " ".join(summary.split())
    assert max(map(len, summary.splitlines())) <= 80


def one_track() -> TabularModel:
    """Nearly always the first token: what the model draws is next to impossible."""
    table = np.full((len(PIECES) + 1, len(PIECES)), 1e-4)
    table[:, 0] = 1 - 1e-4 * (len(PIECES) - 1)
    return TabularModel(table, 1)


def test_a_first_stage_that_lets_nothing_through_is_reported():
    found = power_sample(FakeLM(), ["a", "b"], **SMALL, exit=one_track(), screen=0.0)
    assert found.stages.pass_rate < 0.05
    assert found.stages.saved > 0.95 * found.stages.screened > 40
    assert "lets nearly nothing through" in found.early_exit["advice"]
    assert f"{found.stages.saved} completions were saved" in found.early_exit["advice"]
    assert found.stages.changed > 0, "the plain steps go on"


# Arguments.

BAD = [
    ({"kernel": "mh"}, "unknown kernel 'mh'; choose one of metropolis, early-exit, auto"),
    ({"eta": 1.0}, "eta has no effect with kernel 'metropolis'; use kernel='early-exit', or omit it"),
    ({"layer": 20}, "layer has no effect with kernel 'metropolis'"),
    ({"kernel": "metropolis", "exit": FakeLM()}, "exit has no effect with kernel 'metropolis'"),
    ({"proposal": "full"}, "proposal has no effect with kernel 'metropolis'"),
    ({"plain": 0.2}, "plain has no effect with kernel 'metropolis'"),
    *[
        ({"kernel": "auto", name: value}, f"kernel 'auto' chooses {name} itself; use kernel='early-exit' to set it")
        for name, value in [
            ("layer", 2),
            ("proposal", "full"),
            ("screen", 1.0),
            ("eta", 1.0),
            ("delta", 0.1),
            ("aggregate", "mean"),
        ]
    ],
    ({"kernel": "early-exit", "plain": 1.5}, "the share of plain steps must be between 0 and 1, got 1.5"),
    ({"kernel": "early-exit", "plain": -0.1}, "the share of plain steps must be between 0 and 1, got -0.1"),
    ({"kernel": "early-exit", "plain": math.nan}, "the share of plain steps must be between 0 and 1, got nan"),
    ({"kernel": "early-exit", "plain": "half"}, "plain must be a number, got 'half'"),
    ({"kernel": "early-exit", "proposal": "tail"}, "unknown proposal 'tail'; choose one of exit, substitution, full"),
    ({"kernel": "early-exit", "proposal": "substitution", "plain": 0}, "mix in plain steps (plain > 0)"),
    ({"kernel": "early-exit", "screen": -1}, "the screening exponent must be a finite number >= 0, got -1"),
    ({"kernel": "early-exit", "screen": math.inf}, "the screening exponent must be a finite number >= 0, got inf"),
    ({"kernel": "early-exit", "screen": True}, "screen must be a number, got True"),
    ({"kernel": "early-exit", "eta": -1.0}, "eta must be a number >= 0, got -1.0"),
    ({"kernel": "early-exit", "eta": math.nan}, "eta must be a number >= 0, got nan"),
    ({"kernel": "early-exit", "eta": math.inf}, "eta inf can never be exceeded"),
    ({"kernel": "early-exit", "eta": lambda cut: 1.0}, "eta must be a number, got <function"),
    ({"kernel": "early-exit", "delta": 0.0}, "no margin is under delta 0, so the gate can never open; use 0 < delta"),
    ({"kernel": "early-exit", "delta": 2.0}, "every margin is under delta 2.0, so the gate is always open; use <= 1"),
    ({"kernel": "early-exit", "delta": 0.1, "aggregate": "min"}, "unknown aggregate 'min'; choose one of max, mean"),
    ({"kernel": "early-exit", "layer": 0}, "layer must be an integer >= 1, got 0"),
    ({"kernel": "early-exit", "layer": 2.5}, "layer must be an integer >= 1, got 2.5"),
    ({"exit": "no/such.lens"}, "there is no file no/such.lens; make a lens with: powermc calibrate --out no/such.lens"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{n}-{m[:30]}" for n, (_, m) in enumerate(BAD)])
def test_bad_arguments_are_refused_before_the_model_is_asked_for_anything(change, message, monkeypatch):
    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("powermc.lm.__getattr__", load)
    with pytest.raises(ArgumentError) as caught:
        power_sample("smollm2", "a", **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("proposal", ["exit", "substitution"])
def test_a_gate_that_can_never_open_is_refused_before_any_work(proposal):
    """log 9 = 2.197 is known with the surrogate only; 2.19 is below it."""
    model, small = FakeLM(), surrogate()
    with pytest.raises(ArgumentError, match=r"eta 2.2 can never be exceeded.*log\(vocabulary size\) = 2.197"):
        power_sample(model, "a", **SMALL, exit=small, proposal=proposal, eta=2.2)
    assert model.ledger.ticks == small.ledger.ticks == model.ledger.prefills == 0
    assert power_sample(model, "a", **SMALL, exit=small, proposal=proposal, eta=2.19).stages.gated == 0


def test_no_threshold_is_no_gate():
    assert power_sample(FakeLM(), "a", **SMALL, exit=surrogate()).stages.gated == 0


def test_surrogates_that_do_not_fit():
    model = FakeLM()
    with pytest.raises(ArgumentError, match="a vocabulary of 3 tokens, the model one of 9: use one with the same tok"):
        power_sample(model, "a", **SMALL, exit=FakeLM(pieces=("a", "b", "")))
    with pytest.raises(ArgumentError, match="layer has no effect with a model as the exit; leave it out"):
        power_sample(model, "a", **SMALL, exit=surrogate(), layer=2)
    with pytest.raises(ArgumentError, match="early exits need a CausalLM, got FakeLM; give a surrogate model as exit"):
        power_sample(model, "a", **SMALL, kernel="early-exit")
    with pytest.raises(ArgumentError, match="early exits need a CausalLM"):
        power_sample(model, "a", **SMALL, exit=3)
    assert model.ledger.ticks == 0


def test_full_depth_proposals_come_with_a_warning():
    with pytest.warns(UserWarning, match="log p is paid for already, so nothing is saved") as caught:
        found = power_sample(FakeLM(), "a", **SMALL, exit=surrogate(), proposal="full", screen=1.0)
    assert [w.filename for w in caught] == [__file__]
    assert found.early_exit["exponent"] == 1.0
    assert "cost" not in found.early_exit


@pytest.mark.parametrize("proposal", ["substitution", "full"])
@pytest.mark.filterwarnings("ignore:proposal 'full'")
def test_the_exponent_is_fitted_on_proposals_and_recorded(proposal):
    prompts = [f"question {i}" for i in range(10)]
    found = power_sample(FakeLM(), prompts, **SMALL, exit=surrogate(), proposal=proposal, seed=7)
    model, small = FakeLM(), surrogate()
    space = model.space(12)
    starts = grown(model, space, found.prompts[:8], temperature=0.5, chains=1, seed=7)
    own = found.early_exit
    moves = Screening(small, 1.0, proposal=proposal).proposals(model, space, Length(), 0.5)[proposal]
    fitted = fit_exponent(pairs(model, small, moves, starts, each=4, seed=7), 2.0)
    assert own["fitted"] == ["exponent"]
    assert own["exponent"] == fitted
    assert 0 < fitted <= 2
    assert "(fitted: exponent)" in " ".join(found.summary().split())
    given = power_sample(FakeLM(), prompts, **SMALL, exit=surrogate(), proposal=proposal, seed=7, screen=fitted)
    assert given.early_exit["fitted"] == []
    assert tokens(given) == tokens(found)
    assert "fitted" not in given.summary()
    assert found.early_exit["warmup_cost"]["tokens_by_depth"]["0-2"] > 0
    assert given.early_exit["warmup_cost"]["tokens_by_depth"] == {}


def test_a_gated_share_fits_eta_before_the_first_step():
    prompts = [f"question {i}" for i in range(10)]
    found = power_sample(FakeLM(), prompts, **SMALL, exit=surrogate(), gated=0.4, exit_temperature=0.8, seed=7)
    model, small = FakeLM(), surrogate()
    space = model.space(12)
    starts = grown(model, space, found.prompts[:8], temperature=0.5, chains=1, seed=7)
    moves = Screening(small, 1.0, temperature=0.8).proposals(model, space, Length(), 0.5)["exit"]
    own = found.early_exit
    assert own["fitted"] == ["eta"]
    assert own["temperature"] == 0.8
    assert own["eta"] == fit_eta(pairs(model, small, moves, starts, each=4, seed=7), 0.4)
    assert "(fitted: eta)" in " ".join(found.summary().split())
    assert found.stages is not None
    assert 0.3 < found.stages.gated_share < 0.9  # either tail of a pair may be the uncertain one
    given = {**SMALL, "exit": surrogate(), "eta": own["eta"], "exit_temperature": 0.8, "seed": 7}
    assert tokens(power_sample(FakeLM(), prompts, **given)) == tokens(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gated": 0.0}, "gated is a share of proposed tails, above 0 and below 1, got 0.0"),
        ({"gated": 1.0}, "gated is a share of proposed tails, above 0 and below 1, got 1.0"),
        ({"gated": 0.1, "eta": 1.0}, "gated fits eta, so that only one of the two can be given"),
        ({"exit_temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"kernel": "metropolis", "exit": None, "gated": 0.1}, "gated has no effect with kernel 'metropolis'"),
        ({"kernel": "auto", "exit_temperature": 0.5}, "kernel 'auto' chooses exit_temperature itself"),
    ],
)
def test_warm_up_settings_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        power_sample(FakeLM(), "a", **{**SMALL, "exit": surrogate(), **options})


# Streams and faults.


@pytest.mark.parametrize("proposal", ["exit", "substitution"])
def test_the_same_call_draws_the_same(proposal):
    options = {**SMALL, "proposal": proposal, "eta": 1.7}
    one, other = (power_sample(FakeLM(), ["a", "b"], **options, exit=surrogate(), seed=3) for _ in range(2))
    assert [histories(one, p) for p in range(2)] == [histories(other, p) for p in range(2)]
    assert tokens(one) == tokens(other)
    assert one.early_exit == other.early_exit
    changed = power_sample(FakeLM(), ["a", "b"], **options, exit=surrogate(), seed=4)
    assert tokens(changed) != tokens(one)


def test_a_prompt_does_not_depend_on_its_company_nor_a_chain_on_the_others():
    alone = power_sample(FakeLM(), "b", **SMALL, exit=surrogate())
    for prompts in (["a", "b", "c"], ["b", "b"]):
        beside = power_sample(FakeLM(), prompts, **SMALL, exit=surrogate())
        assert histories(beside, prompts.index("b")) == histories(alone, 0)
        assert tokens(beside)[prompts.index("b")] == tokens(alone)[0]
    many = power_sample(FakeLM(max_rows=1), "b", **{**SMALL, "chains": 5}, exit=surrogate())
    assert tokens(many)[0][:3] == tokens(alone)[0]


def test_no_number_is_drawn_twice(run):
    levels = [x for info in run.infos for x in info["log_level"].ravel().tolist() if not math.isnan(x)]
    assert len(set(levels)) == len(levels) > 90


def test_nan_at_the_surrogate_ends_that_chain_only():
    whole = power_sample(FakeLM(), ["a", "b"], **SMALL, exit=surrogate())
    with pytest.warns(RuntimeWarning, match=r"prompt \d, chain \d stopped after \d+ steps: logits are NaN") as caught:
        failed = power_sample(FakeLM(), ["a", "b"], **SMALL, exit=surrogate(fail_at={40}))
    assert [w.filename for w in caught] == [__file__]
    ((key, error),) = failed.errors.items()
    assert isinstance(error, NonFiniteLogits)
    for p in range(2):
        for c in range(3):
            n = failed.chains[p][c].steps
            assert (n == 18) == ((p, c) != key)
            assert failed.infos[p]["cut"][c, :n].tolist() == whole.infos[p]["cut"][c, :n].tolist()
            if n == 18:
                assert failed.chains[p][c].path == whole.chains[p][c].path
    assert failed.stages.steps == sum(chain.steps for chains in failed.chains for chain in chains) < 108
    json.dumps(failed.to_dict(), allow_nan=False)


def test_ctrl_c_keeps_what_was_drawn():
    stopped = power_sample(FakeLM(), ["a", "b"], **SMALL, exit=surrogate(interrupt_at=60))
    assert stopped.interrupted
    assert 0 < stopped.stages.steps < 108
    stopped.summary()
    nothing = power_sample(FakeLM(interrupt_at=0), "a", **SMALL, exit=surrogate())
    assert nothing.stages.steps == 0
    assert nothing.early_exit["advice"] is None
    assert "stage 1: - passed, 0 completions saved;" in nothing.summary()


def test_a_reward_and_stop_strings():
    def sevens(text: str) -> float:
        return 1.5 * text.count("7")

    model = FakeLM()
    found = power_sample(model, "a", **SMALL, exit=surrogate(), reward=sevens, stop="red", cut="entropy")
    info = found.infos[0]
    for c, chain in enumerate(found.chains[0]):
        rewards = [sevens(text) for text in chain.draw_texts]
        assert info["log_density"][c, -6:] == pytest.approx(2 * info["log_p"][c, -6:] + rewards, abs=1e-11)
        for x in chain.draws:
            assert not any("red" in model.decode(x.tokens[:t]) for t in range(len(x)))
            assert x.finished == (x.tokens[-1] == EOS or "red" in model.decode(x.tokens))


def test_a_long_run_draws_from_the_power_distribution():
    """As for plain steps in test_power.py, with a surrogate that is far off (p~^2 differs from the law by .25), a gate
    and 30% plain steps. By the transition matrix of this very kernel (tau <= 15.7) the standard error of a frequency is
    at most .0216: at .11, five of them, a right sampler fails with probability below 1e-5. This finds gross errors;
    the proof is in test_screening.py."""
    model, small = FakeLM(pieces=("a", "b", "")), FakeLM(pieces=("a", "b", ""), seed=3)
    space = model.space(2)
    paths = [space.path(Prompt(), t) for t in [(2,), *[(a, b) for a in (0, 1) for b in (0, 1, 2)]]]
    laws = [np.exp(2 * np.array([score(m, x) for x in paths])) for m in (model, small)]
    law, wrong = (w / w.sum() for w in laws)
    options = {"alpha": 2.0, "max_new_tokens": 2, "block_size": 2, "steps": 120, "chains": 30}
    drawn = power_sample(model, ["a", "b"], **options, exit=small, eta=0.6, plain=0.3).draws
    index = {x.tokens: i for i, x in enumerate(paths)}
    counts = np.bincount([index[x.tokens] for chains in drawn for xs in chains for x in xs], minlength=len(paths))
    assert np.abs(counts / counts.sum() - law).max() < 0.11
    assert np.abs(wrong - law).max() > 0.25


# Drift: the warning.


class Drifted:
    """What `check_drift` asks of a drift."""

    def __init__(self, kl: float, seen: int) -> None:
        self.kl, self.seen, self.exit = kl, seen, self
        self.layer, self.model, self.name = 20, self, "some/model"


@pytest.mark.parametrize(
    ("kl", "seen", "reference", "warns"),
    [
        (1.01, 64, 0.5, True),
        (0.99, 64, 0.5, False),
        (1.01, 63, 0.5, False),
        (9.0, 999, math.nan, False),
        (math.nan, 999, 0.5, False),
        (math.inf, 999, 0.5, True),
    ],
)
def test_the_warning_of_a_drift(kl, seen, reference, warns):
    assert DRIFTED == 2.0
    prepared = Prepared(None, drift=Drifted(kl, seen), reference=reference)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            prepared.check_drift()
    assert len(caught) == warns, "once at most"
    if warns:
        text = str(caught[0].message)
        assert caught[0].category is RuntimeWarning
        assert f"KL(p || p~) at layer 20 is {kl:.2f} nats on completed tails, 0.50 on the text" in text
        assert text.endswith("powermc calibrate --model some/model --data TEXTS --layers 20 --out LENS")


def test_a_surrogate_of_its_own_has_no_drift(run):
    assert not {"kl", "kl_positions", "cost"} & set(run.early_exit)


# kernel="auto": what is done with the pilot's word. The pilot itself is tested in tests/lm/test_pilot.py.


def choice(proposal, changed, **facts):
    numbers = {"exponent": 1.3, "correlation": 0.9, "kl": math.nan, "stages": None, "steps": 64, "accepted": changed}
    numbers |= {"ess": 8.0, "flops": 1e9, "seconds": 1.0, "tokens": {}, "heads": {}}
    return Choice(surrogate="fake", layer=None, proposal=proposal, changed=changed, **{**numbers, **facts})


def piloted(monkeypatch, *rows):
    asked = {}

    def stand_in(model, exits, prompts, **settings):
        asked.update(settings, model=model, exits=exits, prompts=prompts)
        return Pilot(rows, {"steps": 8})

    monkeypatch.setattr(powermc.evaluation.pilot, "pilot", stand_in)
    return asked


def test_auto_takes_what_the_pilot_recommends(monkeypatch):
    rows = choice(None, 10), choice("exit", 20), choice("substitution", 60)
    asked = piloted(monkeypatch, *rows)
    model, small = FakeLM(), surrogate()
    prompts = [f"q{i}" for i in range(6)]
    found = power_sample(model, prompts, **SMALL, kernel="auto", exit=small, plain=0.3, seed=5)
    assert asked["model"] is model
    assert asked["exits"] == [small]
    assert asked["prompts"] == list(found.prompts[:4])
    assert (asked["alpha"], asked["max_new_tokens"], asked["plain"], asked["seed"]) == (2.0, 12, 0.3, 5)
    own = found.early_exit
    assert (own["kernel"], own["proposal"], own["exponent"], own["fitted"]) == (
        *("early-exit", "substitution", 1.3, ["exponent"]),
    )
    assert own["plain"] == 0.3
    assert own["verdict"] == Pilot(rows, {}).verdict()
    assert own["pilot"]["recommended"] == "fake, substitution"
    assert own["verdict"] in " ".join(found.summary().split())
    assert max(map(len, found.summary().splitlines())) <= 80
    json.dumps(found.to_dict(), allow_nan=False)
    given = power_sample(
        FakeLM(), prompts, **SMALL, exit=surrogate(), proposal="substitution", screen=1.3, plain=0.3, seed=5
    )
    assert tokens(found) == tokens(given)


def test_auto_may_take_plain_metropolis(monkeypatch):
    piloted(monkeypatch, choice(None, 10), choice("exit", 11))
    found = power_sample(FakeLM(), "a", **SMALL, kernel="auto", exit=surrogate())
    assert found.early_exit["kernel"] == "metropolis"
    assert found.early_exit["pilot"]["recommended"] == "plain MH"
    assert found.stages is None
    assert "recommended: plain MH" in found.summary()
    assert tokens(found) == tokens(power_sample(FakeLM(), "a", **SMALL))


def test_auto_without_plain_steps_does_not_try_substitution(monkeypatch):
    asked = piloted(monkeypatch, choice(None, 10), choice("exit", 60))
    found = power_sample(FakeLM(), "a", **SMALL, kernel="auto", exit=surrogate(), plain=0.0)
    assert asked["proposals"] == ("exit",)
    assert found.stages.plain == 0
