"""`power_sample`: settings, streams, events, faults. With a table that has the interface of a language model."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from dataclasses import fields as dataclass_fields

import numpy as np
import pytest

import powermc
from powermc import (
    ArgumentError,
    Autoregressive,
    BlockwisePower,
    ModelError,
    NonFiniteLogits,
    Path,
    Power,
    Prompt,
    SequenceProbability,
    ZeroProbability,
    power_sample,
)
from powermc.power import distinct
from powermc.recording import work
from powermc.settings import Settings
from powermc.testing import enumerate_outcomes, paths_of
from powermc.toy.tabular import TabularRow
from tests.fake_lm import EOS, FakeLM, score

SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 3, "chains": 2, "alpha": 2.0}


def tokens(run):
    return [[chain.path.tokens for chain in chains] for chains in run.chains]


def histories(run, prompt):
    """Everything random that happened to a prompt."""
    return {
        name: values.tolist() for name, values in run.infos[prompt].items() if name not in ("log_ratio", "log_level")
    }


# What a run holds.


def test_final_paths_draws_and_infos_fit_together():
    model = FakeLM()
    run = power_sample(model, ["a", "b"], **SMALL)
    space = model.space(12)
    assert run.settings["temperature"] == 0.5
    for p in range(2):
        info = run.infos[p]
        assert {a.shape for a in info.values()} == {(2, 9)}
        assert info["block"].tolist() == [[0] * 3 + [1] * 3 + [2] * 3] * 2
        for c in range(2):
            chain = run.chains[p][c]
            assert chain.steps == 9
            assert chain.error is None
            assert space.contains(chain.path.tokens)
            assert chain.text == model.decode(chain.path.tokens)
            assert len(chain.draws) == len(chain.draw_texts) == 3
            assert chain.draws[-1] == chain.path
            assert all(space.contains(draw.tokens) for draw in chain.draws)
            assert info["length"][c, 6:].tolist() == [len(draw) for draw in chain.draws]
            assert info["log_p"][c, 6:] == pytest.approx([score(model, draw) for draw in chain.draws], abs=1e-12)
            assert info["log_density"][c] == pytest.approx(2 * info["log_p"][c], abs=1e-12)
            assert (info["length"][c, :3] <= 4).all()
    assert run.texts == [[c.text for c in chains] for chains in run.chains]
    assert run.log_p[1] == pytest.approx([score(model, c.path) for c in run.chains[1]], abs=1e-12)


def test_infos_have_the_declared_dtypes():
    run = power_sample(FakeLM(), "a", **SMALL)
    model = FakeLM()
    declared = dict(BlockwisePower(model, model.space(12), 2.0).stage(0).kernel.fields)
    assert declared.pop("proposed").dtype == "object"  # these are in `Run.proposals`
    dtypes = {name: values.dtype for name, values in run.infos[0].items()}
    assert {name: np.dtype(f.dtype) for name, f in declared.items()}.items() <= dtypes.items()
    own = set(dtypes) - set(declared)
    assert own == {"block", "log_p", "log_density", "length"}
    assert dtypes["block"] == dtypes["length"] == np.int32
    assert dtypes["log_p"] == dtypes["log_density"] == np.float64


def test_the_ledger_holds_this_run_only_and_every_token():
    model = FakeLM()
    power_sample(model, "warm-up", **SMALL)
    before = model.ledger.decoded
    run = power_sample(model, "a", **SMALL)
    assert run.cost.decoded == model.ledger.decoded - before > 0
    proposed = sum(int(info["proposal_length"].sum()) for info in run.infos)
    grown = sum(chain.grown for chain in run.chains[0])
    assert run.cost.decoded == proposed + grown
    assert run.tokens == run.cost.decoded + run.cost.prefilled


def test_kept_paths_hold_no_activations():
    class Activations:
        def upto(self, length):
            return self

    activations = Activations()

    class Row(TabularRow):
        def cache(self):
            return activations

    class Caching(FakeLM):
        def branch(self, path, cut):
            return Row(self, self.context(path.tokens[:cut]))

    seen = []
    run = power_sample(Caching(), "a", **SMALL, callbacks=[lambda p, c, s, state, i: seen.append(state.value.cache)])
    assert set(seen) == {activations}
    assert {path.cache for chain in run.chains[0] for path in (chain.path, *chain.draws)} == {None}


def test_no_steps_is_growth_alone():
    run = power_sample(FakeLM(), "a", **{**SMALL, "steps": 0})
    assert run.draws == [[(), ()]]
    assert all(chain.path.finished or len(chain.path) == 12 for chain in run.chains[0])
    assert all(chain.grown == len(chain.path) for chain in run.chains[0])
    assert run.infos[0]["block"].shape == (2, 0)


def test_the_law_of_a_run_is_that_of_the_schedule():
    """Enumerated: the schedule that `Settings` builds, with all its arguments, is the documented one."""
    model = FakeLM(pieces=("a", "b", ""))
    options = {"alpha": 3.0, "temperature": 0.7, "max_new_tokens": 2, "block_size": 1, "steps": 1, "cut": "horizon"}
    space = model.space(2)
    built = Settings(**options).schedule(model, space, model.decode)
    plain = BlockwisePower(model, space, 3.0, 0.7, 1, 1, "sequence", "horizon")
    laws = []
    for plan in (built, plain):
        leaves = enumerate_outcomes([lambda c, plan=plan: plan.program(lambda i: c.at("step", i), Prompt())])[0]
        law = dict.fromkeys((path.tokens for path in paths_of(space, 3)), 0.0)
        for state, probability in leaves:
            law[state.value.tokens] += probability
        laws.append(law)
    assert laws[0] == pytest.approx(laws[1], abs=1e-14)


def test_a_long_run_draws_from_the_power_distribution():
    """Two prompts, 40 chains, 200 draws each: by the transition matrix (tau <= 6.6) the standard error is at most .0084
    for any path, and the start adds a bias below .002. At .045, five of them, a right sampler fails with probability
    below 1e-5; sampling from p itself is off by .2."""
    model = FakeLM(pieces=("a", "b", ""))
    space = model.space(3)
    paths = list(paths_of(space, 3))
    law = np.exp(2 * np.array([score(model, path) for path in paths]))
    law /= law.sum()
    run = power_sample(model, ["a", "b"], alpha=2.0, max_new_tokens=3, block_size=3, steps=200, chains=40)
    index = {path.tokens: i for i, path in enumerate(paths)}
    drawn = [index[draw.tokens] for chains in run.draws for draws in chains for draw in draws]
    found = np.bincount(drawn, minlength=len(paths)) / len(drawn)
    assert np.abs(found - law).max() < 0.045
    base = np.exp([score(model, path) for path in paths])
    assert np.abs(base - law).max() > 0.2


def test_every_path_and_every_proposal_is_there():
    """From the history, the cuts and the proposals alone: an accepted step's path is its proposal after the cut."""
    run = power_sample(FakeLM(), ["a", "b"], **SMALL)
    abandoned = changed = 0
    for p, info in enumerate(run.infos):
        for c, chain in enumerate(run.chains[p]):
            assert len(chain.history) == chain.steps == len(run.proposals[p][c]) == 9
            assert chain.history[-3:] == chain.draws
            assert [len(path) for path in chain.history] == info["length"][c].tolist()
            for step, (path, proposed) in enumerate(zip(chain.history, run.proposals[p][c], strict=True)):
                cut, block = int(info["cut"][c, step]), int(info["block"][c, step])
                before = chain.history[step - 1] if step % 3 else chain.starts.get(block, chain.history[step - 1])
                assert (proposed is None) == bool(info["null"][c, step])
                if proposed is None:
                    assert path == before
                    continue
                assert proposed.dtype == np.int32
                assert len(proposed) == info["proposal_length"][c, step]
                new = (*before.tokens[:cut], *proposed.tolist())
                assert path.tokens == (new if info["accepted"][c, step] else before.tokens)
                abandoned += bool(info["abandoned"][c, step])
                changed += bool(info["changed"][c, step])
    assert abandoned
    assert changed
    used = {t for chains in run.chains for chain in chains for path in chain.history for t in path.tokens}
    assert used <= run.pieces.keys()
    assert all(run.pieces[t] == FakeLM().decode((t,)) for t in run.pieces)


def test_draws_are_the_steps_on_the_last_block():
    few = power_sample(FakeLM(), "a", **SMALL)
    more = power_sample(FakeLM(), "a", **SMALL, draws=7)
    assert few.settings["draws"] == 3
    assert more.settings["draws"] == 7
    assert more.infos[0]["block"].tolist() == [[0] * 3 + [1] * 3 + [2] * 7] * 2
    for name in few.infos[0]:
        assert few.infos[0][name].tobytes() == more.infos[0][name][:, :9].tobytes()
    for one, other in zip(few.chains[0], more.chains[0], strict=True):
        assert one.draws == other.draws[:3]
        assert len(other.draws) == 7
        assert other.draws[-1] == other.path
    none = power_sample(FakeLM(), "a", **SMALL, draws=0)
    assert none.infos[0]["block"].shape == (2, 6)
    assert none.draws == [[(), ()]]


def test_thinned_runs_keep_some_paths_and_all_infos():
    every = power_sample(FakeLM(), "a", **SMALL, draws=8)
    third = power_sample(FakeLM(), "a", **SMALL, draws=8, thin=3)
    assert all(every.infos[0][n].tobytes() == third.infos[0][n].tobytes() for n in every.infos[0])
    for one, other in zip(every.chains[0], third.chains[0], strict=True):
        assert other.draws == (one.draws[2], one.draws[5])
        assert other.path == one.path
        assert other.steps == one.steps == 14
        assert [path is None for path in other.history] == [False] * 6 + [True, True, False] * 2 + [True, True]


# Arguments.


def test_settings_have_the_defaults_of_power_sample():
    signature = inspect.signature(power_sample).parameters
    assert {f.name: f.default for f in dataclass_fields(Settings)} == {
        name: signature[name].default for name in (f.name for f in dataclass_fields(Settings))
    }
    assert set(signature) - {f.name for f in dataclass_fields(Settings)} == {
        "model",
        "prompts",
        "store",
        "resume",
        "thin",
        "keep_proposals",
        "first_chain",
        "progress",
        "callbacks",
    }


BAD = [
    ({"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
    ({"alpha": math.nan}, "alpha must be a finite number >= 0, got nan"),
    ({"alpha": math.inf}, "alpha must be a finite number >= 0, got inf"),
    ({"alpha": "4"}, "alpha must be a number, got '4'"),
    ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
    ({"temperature": -0.5}, "temperature must be a finite number > 0, got -0.5"),
    ({"temperature": math.nan}, "temperature must be a finite number > 0, got nan"),
    ({"temperature": math.inf}, "temperature must be a finite number > 0, got inf"),
    ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
    ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
    ({"block_size": 2.5}, "block_size must be an integer >= 1, got 2.5"),
    ({"steps": -1}, "steps must be an integer >= 0, got -1"),
    ({"draws": -1}, "draws must be an integer >= 0, got -1"),
    ({"draws": 1.5}, "draws must be an integer >= 0, got 1.5"),
    ({"first_chain": -1}, "first_chain must be an integer >= 0, got -1"),
    ({"thin": 0}, "thin must be an integer >= 1, got 0"),
    ({"chains": 0}, "chains must be an integer >= 1, got 0"),
    ({"scope": "word"}, "unknown scope 'word'; choose one of sequence, block"),
    ({"cut": "middle"}, "unknown cut law 'middle'; choose one of length, horizon, block, entropy"),
    ({"cut": "block", "scope": "sequence"}, "cut 'block' never revisits earlier blocks"),
    ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ({"seed": "x"}, "seed must be an integer >= 0, got 'x'"),
    ({"stop": [""]}, "stop strings must be strings of at least one character, got ''"),
    ({"stop": [3]}, "stop strings must be strings of at least one character, got 3"),
    ({"reward": 3.0}, "reward must be a function of the generated text, got 3.0"),
    ({"callbacks": print}, "callbacks must be a list of functions, got <built-in function print>"),
    ({"callbacks": [1]}, "callbacks must be a list of functions, got [1]"),
    ({"prompts": []}, "no prompt was given"),
    ({"prompts": ""}, "prompt 0 is empty"),
    ({"prompts": ["a", " \n"]}, "prompt 1 is empty"),
    ({"prompts": ["a", 3]}, "prompt 1 must be a string or a Prompt, got int"),
    ({"prompts": [Prompt((1,))], "chat": True}, "chat has no effect on a Prompt"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[f"{n}-{m[:30]}" for n, (_, m) in enumerate(BAD)])
def test_bad_arguments_are_refused_before_the_model_is_asked_for_anything(change, message, monkeypatch):
    def load(*args, **options):
        raise AssertionError("the model was loaded")

    # The name of a model is not even looked up, so no torch is imported for a typo.
    monkeypatch.setattr("powermc.lm.__getattr__", load)
    arguments = {"prompts": "a", **change}
    with pytest.raises(ArgumentError) as caught:
        power_sample("smollm2", **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    model = FakeLM()
    with pytest.raises(ArgumentError):
        power_sample(model, **arguments)
    assert model.ledger.ticks == 0


def test_a_prompt_that_does_not_fit_is_refused_before_any_work():
    model = FakeLM(context=40)
    power_sample(model, "x" * 20, **SMALL, chat=False)
    before = model.ledger.ticks
    with pytest.raises(ArgumentError, match="the prompt has 29 tokens; with 12 that exceeds the context"):
        power_sample(model, ["a", "x" * 29], **SMALL, chat=False)
    assert model.ledger.ticks == before


def test_a_model_that_is_none_is_refused():
    with pytest.raises(ArgumentError, match="model must be a CausalLM or the name of one, got dict"):
        power_sample({}, "a")  # type: ignore[arg-type]


def test_an_unknown_model_is_an_error_of_one_line():
    with pytest.raises(ModelError, match="no model folder") as caught:
        power_sample("./no/such/model", "a")
    assert "\n" not in str(caught.value)


def test_temperature_is_independent_of_alpha():
    assert power_sample(FakeLM(), "a", **{**SMALL, "alpha": 0.5}).settings["temperature"] == 1.0
    assert power_sample(FakeLM(), "a", **{**SMALL, "temperature": 0.8}).settings["temperature"] == 0.8


def test_scope_follows_the_cut_law():
    assert power_sample(FakeLM(), "a", **SMALL, cut="block").settings["scope"] == "block"
    assert power_sample(FakeLM(), "a", **SMALL, cut="entropy").settings["scope"] == "sequence"
    blocked = power_sample(FakeLM(), "a", **SMALL, scope="block")
    cuts, block = blocked.infos[0]["cut"], blocked.infos[0]["block"]
    assert (cuts[cuts >= 0] >= 4 * block[cuts >= 0]).all()
    free = power_sample(FakeLM(), "a", **{**SMALL, "steps": 30})
    assert (free.infos[0]["cut"] < 4 * free.infos[0]["block"]).any()


def test_chat_reaches_the_prompt():
    model = FakeLM()
    assert (
        power_sample(model, "a", **SMALL).prompts[0].ids != power_sample(model, "a", **SMALL, chat=False).prompts[0].ids
    )


@pytest.mark.parametrize("stop", ["7", ["7"], ("one", "7")])
def test_stop_strings_end_paths(stop):
    model = FakeLM()
    run = power_sample(model, "a", **{**SMALL, "chains": 8}, stop=stop)
    strings = [stop] if isinstance(stop, str) else list(stop)
    assert run.settings["stop"] == strings
    ended = 0
    for text, path in zip(run.texts[0], run.paths[0], strict=True):
        assert not any(s in model.decode(path.tokens[:-1]) for s in strings)
        ended += path.finished and path.tokens[-1] != EOS
        assert path.finished == (path.tokens[-1] == EOS or any(s in text for s in strings))
    assert ended > 0


# Rewards.


def test_a_reward_tilts_the_target():
    model = FakeLM()

    def sevens(text: str) -> float:
        return 1.5 * text.count("7")

    run = power_sample(model, "a", **SMALL, reward=sevens)
    info = run.infos[0]
    for c, chain in enumerate(run.chains[0]):
        rewards = [sevens(text) for text in chain.draw_texts]
        assert info["log_density"][c, 6:] == pytest.approx(2 * info["log_p"][c, 6:] + rewards, abs=1e-12)
    assert run.settings["reward"] == "sevens"
    many = {**SMALL, "chains": 16}
    plain, tilted = (power_sample(model, "a", **many, reward=r) for r in (None, sevens))
    assert sum(t.count("7") for t in tilted.texts[0]) > sum(t.count("7") for t in plain.texts[0])


def test_a_reward_of_minus_infinity_ends_the_chain_that_starts_there():
    with pytest.raises(ZeroProbability, match="probability zero under the target"):
        power_sample(FakeLM(), "a", **SMALL, reward=lambda text: -math.inf)


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(ArgumentError, match="reward must be a number or -inf, got nan"):
        power_sample(FakeLM(), "a", **SMALL, reward=lambda text: math.nan)


# Streams.


def test_the_same_seed_draws_the_same():
    one, other = (power_sample(FakeLM(), ["a", "b"], **SMALL, seed=3) for _ in range(2))
    assert tokens(one) == tokens(other)
    assert all((one.infos[0][n].tobytes() == other.infos[0][n].tobytes()) for n in one.infos[0])
    assert histories(power_sample(FakeLM(), ["a", "b"], **SMALL, seed=4), 0) != histories(one, 0)


def test_a_prompt_does_not_depend_on_its_company_or_the_order():
    alone = power_sample(FakeLM(), "b", **SMALL)
    for prompts in (["a", "b", "c"], ["b", "c"], ["c", "a", "b"], ["b", "b"]):
        beside = power_sample(FakeLM(), prompts, **SMALL)
        assert histories(beside, prompts.index("b")) == histories(alone, 0)
        assert tokens(beside)[prompts.index("b")] == tokens(alone)[0]


def test_a_chain_does_not_depend_on_the_number_of_chains_or_rows():
    few = power_sample(FakeLM(), ["a", "b"], **SMALL)
    many = power_sample(FakeLM(max_rows=1), ["a", "b"], **{**SMALL, "chains": 5})
    assert [chains[:2] for chains in tokens(many)] == tokens(few)


def test_no_two_prompts_or_chains_share_a_stream():
    prompts = ["a", "b", "a", "a", Prompt((1, 2)), Prompt((1, 2)), Prompt((1, 3))]
    run = power_sample(FakeLM(), prompts, **{**SMALL, "chains": 3})
    assert len({prompt.key for prompt in run.prompts}) == len(prompts)
    levels = [tuple(row) for info in run.infos for row in info["log_level"].tolist()]
    drawn = [level for row in levels for level in row if not math.isnan(level)]
    assert len(set(drawn)) == len(drawn) > 100


def test_distinct_leaves_first_occurrences_alone():
    a, b = Prompt((1,), "a", 10), Prompt((2,), "b", 20)
    alone = distinct([a, b])
    assert [p.key for p in alone] == [10, 20]
    twice = distinct([b, a, a, b, a])
    assert [p.key for p in twice[:2]] == [20, 10]
    assert len({p.key for p in twice}) == 5
    assert [(p.ids, p.text) for p in twice] == [(p.ids, p.text) for p in (b, a, a, b, a)]
    assert distinct([a, a])[1].key == twice[2].key
    assert distinct([Prompt((1,))])[0].key == distinct([Prompt((2,)), Prompt((1,))])[1].key != 0


# Many chains.


def test_rows_bound_the_chains_under_way():
    model = FakeLM(max_rows=3)
    power_sample(model, ["a", "bb"], **{**SMALL, "chains": 4}, chat=False)
    assert model.widest == 3
    assert model.reserved == (3, 2 + 12)
    wide = FakeLM()
    power_sample(wide, ["a", "bb"], **{**SMALL, "chains": 4})
    assert wide.widest == 8
    assert wide.reserved == (8, 8 + 12)


def test_a_model_may_lack_the_optional_parts():
    class Bare(FakeLM):
        def __getattribute__(self, name):
            if name in ("max_rows", "reserve", "ignored_warpers"):
                raise AttributeError(name)
            return super().__getattribute__(name)

    run = power_sample(Bare(), "a", **SMALL)
    assert run.ignored_warpers == {}
    assert tokens(run) == tokens(power_sample(FakeLM(), "a", **SMALL))
    assert power_sample(FakeLM(), "a", **SMALL).ignored_warpers == {"top_k": 50}


def test_a_model_without_a_tokenizer_gives_paths_and_no_texts():
    class Mute(FakeLM):
        def decode(self, tokens):
            raise ArgumentError("this model was given no tokenizer")

    run = power_sample(Mute(), Prompt((1, 2)), **SMALL)
    assert run.texts == [[None, None]]
    assert run.answers(str) == [{}]
    assert tokens(run) == tokens(power_sample(FakeLM(), Prompt((1, 2)), **SMALL))
    assert "no text" not in run.summary()


# Events.


def test_callbacks_see_every_step_in_order():
    calls = []
    run = power_sample(
        FakeLM(),
        ["a", "b"],
        **SMALL,
        callbacks=[lambda *a: calls.append(("first", *a)), lambda *a: calls.append(("second", *a))],
    )
    assert [c[0] for c in calls] == ["first", "second"] * 36
    assert all(one[1:] == two[1:] for one, two in zip(calls[::2], calls[1::2], strict=True))
    for p in range(2):
        for c in range(2):
            mine = [call for call in calls[::2] if call[1:3] == (p, c)]
            assert [call[3] for call in mine] == list(range(9))
            assert [len(call[4].value) for call in mine] == run.infos[p]["length"][c].tolist()
            assert [call[5]["cut"] for call in mine if "cut" in call[5]] == [
                cut for cut in run.infos[p]["cut"][c].tolist() if cut >= 0
            ]


def test_a_failing_chain_keeps_the_others():
    model = FakeLM(fail_at={55})
    with pytest.warns(RuntimeWarning, match=r"prompt \d, chain \d stopped after \d+ steps: logits are NaN"):
        run = power_sample(model, ["a", "b"], **SMALL)
    assert len(run.errors) == 1
    (p, c), error = next(iter(run.errors.items()))
    assert isinstance(error, NonFiniteLogits)
    failed = run.chains[p][c]
    assert failed.error is error
    assert failed.steps < 9
    assert (run.infos[p]["block"][c, failed.steps :] == -1).all()
    assert np.isnan(run.infos[p]["log_p"][c, failed.steps :]).all()
    whole = power_sample(FakeLM(), ["a", "b"], **SMALL)
    for key in [(p2, c2) for p2 in range(2) for c2 in range(2) if (p2, c2) != (p, c)]:
        assert run.chains[key[0]][key[1]].path == whole.chains[key[0]][key[1]].path
        assert run.chains[key[0]][key[1]].steps == 9
    # Up to its end the failed chain did what it would have done.
    assert run.infos[p]["cut"][c, : failed.steps].tolist() == whole.infos[p]["cut"][c, : failed.steps].tolist()


def test_all_chains_failing_at_once_raises():
    with pytest.raises(NonFiniteLogits, match="logits are NaN"):
        power_sample(FakeLM(fail_at=range(100)), "a", **SMALL)


def test_ctrl_c_in_the_model_keeps_what_was_drawn():
    whole = power_sample(FakeLM(), ["a", "b"], **SMALL)
    run = power_sample(FakeLM(interrupt_at=90), ["a", "b"], **SMALL)
    assert run.interrupted
    assert not run.errors
    taken = [chain.steps for chains in run.chains for chain in chains]
    assert 0 < sum(taken) < 36
    for p in range(2):
        for c in range(2):
            n = run.chains[p][c].steps
            assert run.infos[p]["length"][c, :n].tolist() == whole.infos[p]["length"][c, :n].tolist()
            assert (run.infos[p]["block"][c, n:] == -1).all()
    assert run.cost.decoded <= 90
    assert run.tokens < whole.tokens


def test_ctrl_c_before_anything_is_drawn():
    run = power_sample(FakeLM(interrupt_at=0), "a", **SMALL)
    assert run.interrupted
    assert run.texts == [[None, None]]
    assert run.paths == [[None, None]]
    assert np.isnan(run.log_p[0]).all()
    assert "nothing drawn" in run.summary()
    run.to_dict()


def test_ctrl_c_in_a_callback_ends_the_run():
    def stop(prompt, chain, step, state, info):
        if step == 4:
            raise KeyboardInterrupt

    run = power_sample(FakeLM(), "a", **SMALL, callbacks=[stop])
    assert run.interrupted
    assert max(chain.steps for chain in run.chains[0]) == 5


def test_progress_counts_up_to_the_end(capsys, monkeypatch):
    monkeypatch.setattr("powermc.progress.PLAIN_INTERVAL", 0.0)
    power_sample(FakeLM(), ["a", "b"], **SMALL, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "powermc: 1/36 steps" in err
    last = err.splitlines()[-1]
    assert last.startswith("powermc: 36/36 steps  accepted ")
    assert "tokens/s" in last
    assert "left" not in last


def test_work_grows_with_the_length():
    model = FakeLM()
    plan = BlockwisePower(model, model.space(10), block_size=4, steps=2)
    # Growth by 4, 4 and 2; a step cuts uniformly, so it draws (length + 1) / 2 tokens on average.
    assert work(plan) == [[4.0, 6.5, 9.0], [13.0, 17.5, 22.0], [24.0, 29.5, 35.0]]
    frozen = BlockwisePower(model, model.space(10), block_size=4, steps=1, scope="block")
    assert work(frozen) == [[4.0, 6.5], [10.5, 13.0], [15.0, 16.5]]


# The package.


def test_import_is_light_and_every_name_is_there():
    code = (
        "import sys, powermc; heavy = {'torch', 'transformers', 'numba', 'scipy', 'arviz', 'rich', 'typer', 'numpy'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "lm = {'CausalLM', 'EarlyExit', 'Lens', 'cached_lens', 'calibrate'};"
        "names = [n for n in powermc.__all__ if n not in lm];"
        "assert all(getattr(powermc, n) is not None for n in names);"
        "assert not (heavy - {'numpy'}) & set(sys.modules), heavy & set(sys.modules);"
        "assert set(powermc.__all__) <= set(dir(powermc))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'CasualLM'"):
        _ = powermc.CasualLM


def test_the_fake_is_autoregressive():
    model: Autoregressive = FakeLM()
    p = SequenceProbability(model)
    path = FakeLM().space(3).path(Prompt(), (0, 1, EOS))
    assert isinstance(path, Path)
    assert Power(p, 2.0).missing(path) is not None
