"""`iterate` and `sample` on plain spaces and on paths."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from powermc import (
    ArgumentError,
    ChainError,
    Metropolis,
    Mixture,
    NonFiniteLogits,
    Path,
    Power,
    Prompt,
    RandomWalk,
    SequenceProbability,
    State,
    Suffix,
    Table,
    ZeroProbability,
    iterate,
    sample,
)
from powermc.sampling import without_cache
from powermc.sequences import cut_law
from powermc.toy.tabular import TabularRow
from powermc.types import Field
from tests.fake_lm import FakeLM

WALK = Metropolis(
    Table({i: -0.5 * (i - 2) ** 2 for i in range(6)}), RandomWalk(lambda i: [j for j in (i - 1, i + 1) if 0 <= j < 6])
)


def suffix_kernel(model: FakeLM, horizon: int = 6, alpha: float = 2.0) -> Metropolis[Path]:
    space = model.space(horizon)
    cuts = cut_law("length", start=0, horizon=horizon, block_size=horizon)
    return Metropolis(Power(SequenceProbability(model), alpha), Suffix(model, space, cuts, 0.5))


@dataclass(frozen=True)
class Failing:
    """A walk whose chains end with an error at given (chain start, step)s."""

    at: dict[int, int]
    fields = {"accepted": Field("bool", False), "age": Field("int16", -7)}  # noqa: RUF012

    def init(self, value):
        return State((value, 0), 0.0)
        yield

    def step(self, choices, state):
        value, age = state.value
        if self.at.get(value) == age:
            raise NonFiniteLogits(f"NaN logits in row {value}")
        return State((value, age + 1), float(age)), {"accepted": True, "age": age}
        yield


def test_iterate_yields_chain_step_state_info_as_steps_commit():
    draws = list(iterate(WALK, 0, steps=5, chains=3, seed=1))
    assert sorted((d.chain, d.step) for d in draws) == list(itertools.product(range(3), range(5)))
    for chain in range(3):
        assert [d.step for d in draws if d.chain == chain] == [0, 1, 2, 3, 4]
    value = {0: 0, 1: 0, 2: 0}
    for chain, _, state, info in draws:
        assert info["changed"] == (state.value != value[chain])
        assert state.log_density == WALK.target.log_density(state.value)
        value[chain] = state.value


def test_iterate_is_lazy_and_can_be_left():
    endless = iterate(WALK, 0, steps=10**9)
    assert next(endless).step == 0
    endless.close()


def test_a_chain_does_not_depend_on_the_number_of_chains_or_their_company():
    alone = [d.state.value for d in iterate(WALK, 3, steps=30, chains=1, seed=5)]
    beside = [d.state.value for d in iterate(WALK, [3, 0, 1], steps=30, chains=3, seed=5) if d.chain == 0]
    waiting = [d.state.value for d in iterate(WALK, 3, steps=30, chains=3, seed=5, active=1) if d.chain == 0]
    assert alone == beside == waiting
    assert alone != [d.state.value for d in iterate(WALK, 3, steps=30, chains=1, seed=6)]


def test_first_continues_a_chain():
    whole = sample(WALK, 0, draws=20, chains=2, seed=3)
    start = sample(WALK, 0, draws=8, chains=2, seed=3)
    rest = sample(WALK, [v[-1] for v in start.values], draws=12, chains=2, seed=3, first=8)
    assert [a + b for a, b in zip(start.values, rest.values, strict=True)] == whole.values
    again = sample(WALK, [v[-1] for v in start.values], draws=12, chains=2, seed=3)
    assert again.values != rest.values


def test_sample_converges_to_the_table():
    # The transition matrix gives a standard error of at most .0032 per value for 40,000 draws; at five of them a right
    # kernel fails with probability below 4e-6, and an error of .03 in any probability is caught.
    samples = sample(WALK, 2, draws=10_000, chains=4, warmup=100)
    weights = np.exp([WALK.target.log_density(i) for i in range(6)])
    found = np.bincount(np.array(samples.values).ravel(), minlength=6) / 40_000
    assert np.abs(found - weights / weights.sum()).max() < 0.016


@pytest.mark.parametrize(("draws", "warmup", "thin"), [(7, 0, 1), (5, 3, 1), (4, 2, 3), (1, 0, 5)])
def test_warmup_and_thinning(draws, warmup, thin):
    steps = list(iterate(WALK, 0, steps=warmup + draws * thin, seed=2))
    samples = sample(WALK, 0, draws=draws, warmup=warmup, thin=thin, chains=1, seed=2)
    kept = steps[warmup + thin - 1 :: thin]
    assert samples.values == [[d.state.value for d in kept]]
    assert samples.log_density.tolist() == [[d.state.log_density for d in kept]]
    assert samples.infos["accepted"].tolist() == [[d.info["accepted"] for d in kept]]
    assert samples.warmup_infos["log_level"].tolist() == [[d.info["log_level"] for d in steps[:warmup]]]
    assert samples.infos["accepted"].shape == (1, draws)
    assert samples.warmup_infos["accepted"].shape == (1, warmup)


def test_infos_have_the_declared_dtypes_and_fill_values():
    kernel = Mixture([suffix_kernel(FakeLM()), suffix_kernel(FakeLM())], [0.5, 0.5])
    path = FakeLM().space(6).path(Prompt(), (len(FakeLM().pieces) - 1,))
    samples = sample(kernel, path, draws=40, chains=2, warmup=3)
    for infos, n in ((samples.infos, 40), (samples.warmup_infos, 3)):
        assert set(infos) == set(kernel.fields)
        for name, field in kernel.fields.items():
            assert infos[name].dtype == np.dtype(field.dtype)
            assert infos[name].shape == (2, n)
    null = samples.infos["null"]
    assert np.isnan(samples.infos["log_ratio"][null]).all()
    assert not np.isnan(samples.infos["log_ratio"][~null]).any()


def test_undeclared_info_is_an_error():
    class Chatty(Failing):
        def step(self, choices, state):
            return state, {"secret": 1}
            yield

    with pytest.raises(ArgumentError, match="'secret' but does not declare"):
        sample(Chatty({}), 0, draws=1)


def test_a_failing_chain_keeps_its_draws_and_the_others_go_on():
    with pytest.warns(RuntimeWarning, match="chain 1 stopped after 3 draws: NaN logits in row 7"):
        samples = sample(Failing({7: 3}), [5, 7, 9], draws=6, chains=3)
    assert [len(v) for v in samples.values] == [6, 3, 6]
    assert list(samples.errors) == [1]
    assert isinstance(samples.errors[1], NonFiniteLogits)
    assert samples.infos["age"].dtype == np.int16
    assert samples.infos["age"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, -7, -7, -7], [0, 1, 2, 3, 4, 5]]
    assert np.isnan(samples.log_density[1, 3:]).all()
    assert not samples.interrupted


def test_iterate_raises_a_chains_error_after_the_others_are_done():
    seen = []
    with pytest.raises(ChainError, match="row 7") as caught:
        seen.extend((d.chain, d.step) for d in iterate(Failing({7: 1, 8: 2}), [5, 7, 8], steps=4, chains=3))
    assert sorted(seen) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 1)]
    assert caught.value.__notes__ == ["chain 2 also stopped: NaN logits in row 8"]


def test_all_chains_failing_before_a_draw_raises():
    with pytest.raises(ZeroProbability, match="initial value 17 has probability zero"):
        sample(WALK, 17, draws=3)


def test_ctrl_c_keeps_what_was_drawn():
    def press(chain, step, state, info):
        if (chain, step) == (1, 3):
            raise KeyboardInterrupt

    samples = sample(WALK, 0, draws=100, chains=2, callbacks=[press])
    assert samples.interrupted
    assert len(samples.values[1]) == 4
    assert 3 <= len(samples.values[0]) <= 5
    assert np.isnan(samples.log_density[1, 4:]).all()
    assert not np.isnan(samples.log_density[1, :4]).any()


def test_callbacks_are_called_in_order_after_every_step():
    calls = []
    kernel = Failing({})
    sample(
        kernel,
        0,
        draws=2,
        warmup=1,
        thin=2,
        chains=2,
        callbacks=[lambda *a: calls.append(("a", *a)), lambda *a: calls.append(("b", *a))],
    )
    assert [c[0] for c in calls] == ["a", "b"] * 10
    assert all(first[1:] == second[1:] for first, second in zip(calls[::2], calls[1::2], strict=True))
    for chain in range(2):
        mine = [c for c in calls[::2] if c[1] == chain]
        assert [c[2] for c in mine] == [0, 1, 2, 3, 4]
        assert [c[3].value for c in mine] == [(0, age) for age in range(1, 6)]
        assert [c[4]["age"] for c in mine] == [0, 1, 2, 3, 4]


def test_paths_of_different_prompts_have_different_streams():
    model = FakeLM()
    kernel, space = suffix_kernel(model), model.space(6)
    one, other = (space.path(model.prompt(text), (0, 1, 2, 3, 4, 5)) for text in ("a", "b"))
    kept = [[p.tokens for p in sample(kernel, path, draws=20, chains=1).values[0]] for path in (one, other)]
    assert kept[0] != kept[1]


def test_kept_paths_hold_no_cache():
    path = replace(FakeLM().space(2).path(Prompt(), (0, 1)), cache=object())
    assert without_cache(path).cache is None
    assert without_cache(path) == path
    assert without_cache(3) == 3
    seen = []

    class Activations:
        def upto(self, length):
            return self

    class Row(TabularRow):
        def cache(self):
            return Activations()

    class Caching(FakeLM):
        def branch(self, path, cut):
            return Row(self, self.context(path.tokens[:cut]))

    model = Caching()
    start = model.space(6).path(Prompt(), (0, 1, 2, 3, 4, 5))
    samples = sample(
        suffix_kernel(model),
        start,
        draws=20,
        chains=1,
        callbacks=[lambda c, s, state, i: seen.append(state.value.cache)],
    )
    assert all(path.cache is None for path in samples.values[0])
    assert any(isinstance(cache, Activations) for cache in seen)  # the chain itself keeps them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 0}, "draws must be an integer >= 1, got 0"),
        ({"draws": 2.0}, r"draws must be an integer >= 1, got 2\.0"),
        ({"draws": True}, "draws must be an integer >= 1, got True"),
        ({"draws": 1, "chains": 0}, "chains must be an integer >= 1, got 0"),
        ({"draws": 1, "warmup": -1}, "warmup must be an integer >= 0, got -1"),
        ({"draws": 1, "thin": 0}, "thin must be an integer >= 1, got 0"),
        ({"draws": 1, "first": -1}, "first must be an integer >= 0, got -1"),
        ({"draws": 1, "callbacks": print}, "callbacks must be a list of functions"),
        ({"draws": 1, "seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"draws": 1, "seed": 0.5}, r"seed must be an integer >= 0, got 0\.5"),
    ],
)
def test_bad_arguments_of_sample(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        sample(WALK, 0, **arguments)


def test_bad_arguments_of_iterate_are_raised_at_once():
    with pytest.raises(ArgumentError, match="steps must be an integer >= 0, got -1"):
        iterate(WALK, 0, steps=-1)
    with pytest.raises(ArgumentError, match="a list of 2 initial values was given for 3 chains"):
        iterate(WALK, [0, 1], steps=1, chains=3)


def test_progress_writes_to_standard_error_only(capsys, monkeypatch):
    monkeypatch.setattr("powermc.progress.PLAIN_INTERVAL", 0.0)
    sample(WALK, 0, draws=3, chains=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("powermc: 6/6 steps  accepted ")
    assert "steps/s" in lines[-1]
    assert "left" not in lines[-1]
