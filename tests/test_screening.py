"""`Screening` inside the blockwise schedule: laws by enumeration, what each stage compares, and that nothing adapts."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

import powermc.power
from powermc import ArgumentError, BlockwisePower, Prompt, power_sample
from powermc.early_exit import prepare
from powermc.kernels import Metropolis, Mixture
from powermc.sequences import Screening, Without
from powermc.settings import Settings
from powermc.targets import Power, Tilted
from powermc.testing import enumerate_outcomes, paths_of, prove
from powermc.testing.strategies import Toy
from tests.fake_lm import FakeLM, score
from tests.test_growth import program_law

PROPOSALS = ("exit", "substitution", "full")
PIECES = ("a", "b", "")
ALPHA = 2.0


def pair() -> tuple[FakeLM, FakeLM]:
    """A model and a surrogate that is wrong about it; three tokens, the last one ends."""
    return FakeLM(pieces=PIECES), FakeLM(pieces=PIECES, seed=3)


def screening(surrogate: FakeLM, **changes: Any) -> Screening:
    return Screening(surrogate, **{"exponent": 1.5, "temperature": 0.8, "plain": 0.25, "tokens": 2, **changes})


def law(model: FakeLM, paths: list[Any], reward: Any = None) -> np.ndarray:
    return np.exp([ALPHA * score(model, x) + (reward(x) if reward else 0.0) for x in paths])


def a_count(path: Any) -> float:
    return 0.7 * path.tokens.count(0)


def with_reward(base: Any) -> Any:
    return Tilted(base, a_count)


# Laws.


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_law_of_a_run_is_that_of_the_schedule(proposal):
    """The kernel that `prepare` freezes, in the schedule that `Settings` builds: its law, run as one program, is growth
    from the model's q and one screened step per block, multiplied out. Substitution comes before a block is grown."""
    model, surrogate = pair()
    options = {"max_new_tokens": 2, "block_size": 1, "steps": 1, "alpha": 3.0, "temperature": 0.7, "cut": "horizon"}
    settings = Settings(**options, exit=surrogate, proposal=proposal, screen=1.3, plain=0.3, eta=0.9)
    space = model.space(2)
    if proposal == "full":
        with pytest.warns(UserWarning, match="log p is paid for already"):
            prepared = prepare(model, settings, [Prompt()], space)
    else:
        prepared = prepare(model, settings, [Prompt()], space)
    assert prepared.screening == Screening(surrogate, 1.3, proposal=proposal, plain=0.3, eta=0.9)
    plan = settings.schedule(model, space, model.decode, prepared.screening)
    leaves = enumerate_outcomes([lambda c: plan.program(lambda i: c.at("step", i), Prompt())])[0]
    found = dict.fromkeys((x.tokens for x in paths_of(space, 3)), 0.0)
    for state, probability in leaves:
        found[state.value.tokens] += probability
    toy: Any = Toy(model, space)
    plain = BlockwisePower(model, space, 3.0, 0.7, 1, 1, "sequence", "horizon")
    expected = program_law(toy, replace(plain, screening=prepared.screening))
    assert found == pytest.approx(expected, abs=1e-13)
    other = program_law(toy, plain)
    assert max(abs(found[x] - other[x]) for x in found) > 1e-3, "plain Metropolis-Hastings has another law"


@pytest.mark.parametrize("scope", ["sequence", "block"])
@pytest.mark.parametrize("gate", [{}, {"eta": 0.6}, {"delta": 0.6, "aggregate": "mean"}], ids=["open", "eta", "delta"])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_last_block_leaves_the_power_law_invariant(proposal, gate, scope):
    """With a reward. With scope "block" the first block is frozen: invariant and reversible, not irreducible."""
    model, surrogate = pair()
    space = model.space(3)
    plan = BlockwisePower(
        model,
        space,
        ALPHA,
        block_size=2,
        scope=scope,
        tilt=with_reward,
        screening=screening(surrogate, proposal=proposal, **gate),
    )
    paths = paths_of(space, 3)
    kernel = plan.stage(1).kernel
    # A substitution cuts anywhere, so only suffixes are kept within the block.
    whole = scope == "sequence"
    found = prove(kernel, paths, law=law(model, paths, a_count), irreducible=whole, carried=False)
    gated = {i["gated"] for leaves in found.leaves for (_, i), _ in leaves if "gated" in i}
    assert gated == ({False} if not gate else {False, True})
    stages = {i["stage"] for leaves in found.leaves for (_, i), _ in leaves if "stage" in i}
    assert stages == {0, 1, 2}


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_state_is_carried_over(proposal):
    model, surrogate = pair()
    own = screening(surrogate, proposal=proposal, eta=0.6)
    plan = BlockwisePower(model, model.space(2), ALPHA, block_size=2, tilt=with_reward, screening=own)
    prove(plan.stage(0).kernel, paths_of(plan.space, 3), carried=True)


def moves(found: Any) -> Any:
    for x, leaves in zip(found.values, found.leaves, strict=True):
        for (state, info), probability in leaves:
            yield x, state.value, info, probability


def test_stage_1_compares_sums_of_log_z_if_the_exit_draws_at_the_screening_exponent():
    """log a_1 = sum log Z~(y) - sum log Z~(x) over the tails, for a cut law without a ratio; log g has the reward."""
    model, surrogate = pair()
    space = model.space(3)
    plan = BlockwisePower(
        model,
        space,
        ALPHA,
        block_size=3,
        cut="horizon",
        tilt=with_reward,
        screening=screening(surrogate, exponent=1.5, temperature=1 / 1.5, plain=0.0),
    )
    found = prove(plan.stage(0).kernel, paths_of(space, 3))

    def log_z(path: Any, cut: int) -> float:
        return sum(
            float(np.log((surrogate.table[surrogate.context(path.tokens[:t])] ** 1.5).sum()))
            for t in range(cut, len(path))
        )

    seen = 0
    for x, y, info, _ in moves(found):
        if info["accepted"] and not info.get("same"):
            m = info["cut"]
            rewards = a_count(y) - a_count(x)
            assert info["log_ratio"] == pytest.approx(log_z(y, m) - log_z(x, m) + rewards, abs=1e-12)
            assert info["log_surrogate"] == pytest.approx(
                1.5 * (score(surrogate, y) - score(surrogate, x)) + rewards, abs=1e-12
            )
            assert info["log_target"] == pytest.approx(ALPHA * (score(model, y) - score(model, x)) + rewards, abs=1e-12)
            seen += 1
    assert seen > 50


@pytest.mark.parametrize("plain", [0.0, 0.25, 1.0])
def test_the_share_of_plain_steps(plain):
    """They draw from the full model at its own temperature, and are Metropolis-Hastings on the same target."""
    model, surrogate = pair()
    plan = BlockwisePower(model, model.space(2), ALPHA, 0.7, 2, screening=screening(surrogate, plain=plain))
    kernel: Any = plan.stage(0).kernel
    found = prove(kernel, paths_of(plan.space, 3), carried=False)
    for leaves in found.leaves:
        assert sum(p for (_, i), p in leaves if i["component"] == 1) == pytest.approx(plain, abs=1e-12)
    assert kernel.kernels[1] == replace(plan, screening=None).stage(0).kernel
    assert isinstance(kernel.kernels[1], Metropolis)
    assert kernel.kernels[0].target == kernel.kernels[1].target
    assert kernel.kernels[0].proposal.temperature == 0.8


def test_the_default_temperature_is_that_of_the_model():
    model, surrogate = pair()
    found = screening(surrogate, temperature=None).proposals(model, model.space(2), None, 0.3)
    assert {name: found[name].temperature for name in PROPOSALS} == dict.fromkeys(PROPOSALS, 0.3)
    found = screening(surrogate).proposals(model, model.space(2), None, 0.3)
    assert [found[name].temperature for name in PROPOSALS] == [0.8, 0.8, 0.3]
    assert [found[name].model for name in PROPOSALS] == [surrogate, surrogate, model]
    assert found["substitution"].tokens == 2
    assert found["substitution"].law == Without(1 / 0.8, frozenset({2}))


def test_states_that_the_schedule_commits_show_the_models_scores():
    """A rejected move leaves the surrogate's in front inside the kernel; who reads a state must not see log p~."""
    model, surrogate = pair()
    plan = BlockwisePower(model, model.space(3), ALPHA, block_size=2, steps=2, screening=screening(surrogate))
    raw = prove(plan.stage(1).kernel, paths_of(plan.space, 3), carried=False)
    assert {state.value.by is model for leaves in raw.leaves for (state, _), _ in leaves} == {True, False}
    seen = 0

    def check(prompt: int, chain: int, step: int, state: Any, info: Any) -> None:
        nonlocal seen
        seen += 1
        assert state.value.by is model
        assert state.value.log_prob == pytest.approx(score(model, state.value), abs=1e-12)

    options = {"max_new_tokens": 3, "block_size": 2, "steps": 10, "alpha": ALPHA}
    run = power_sample(model, "q", **options, exit=surrogate, callbacks=[check])
    assert seen == 80
    assert len({x.log_prob for x in run.draws[0][0]}) <= len({x.tokens for x in run.draws[0][0]})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"proposal": "half"}, "unknown proposal 'half'; choose one of exit, substitution, full"),
        ({"exponent": -1.0}, "the screening exponent must be a finite number >= 0, got -1.0"),
        ({"exponent": np.inf}, "the screening exponent must be a finite number >= 0, got inf"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"plain": 1.2}, "the share of plain steps must be between 0 and 1, got 1.2"),
        ({"plain": np.nan}, "the share of plain steps must be between 0 and 1, got nan"),
        ({"plain": 0, "proposal": "substitution"}, r"never changes the length of a path: mix in plain steps"),
        ({"tokens": 0}, "a substitution redraws at least 1 token, got 0"),
        ({"eta": 1.2}, r"eta 1.2 can never be exceeded.*log\(vocabulary size\) = 1.099"),
        ({"eta": -0.1}, "eta must be a number >= 0, got -0.1"),
        ({"delta": 0.0}, "no margin is under delta 0"),
        ({"delta": 1.5}, "every margin is under delta 1.5"),
        ({"eta": 0.5, "aggregate": "median"}, "unknown aggregate 'median'; choose one of max, mean"),
    ],
)
def test_values_out_of_range(changes, text):
    with pytest.raises(ArgumentError, match=text):
        screening(pair()[1], **changes)


def test_no_thresholds_no_gate():
    assert screening(pair()[1]).gate() is None


# Nothing adapts once the kernel is frozen.


def values(own: Screening) -> dict[str, Any]:
    return {f.name: getattr(own, f.name) for f in fields(own)}


def steps_of_a_run(monkeypatch: pytest.MonkeyPatch, callback: Any = None) -> None:
    """Run, and assert that the frozen kernel stayed as it was: before, after, and in every step of every block."""
    used: list[Any] = []
    frozen: list[Any] = []
    step, settle = Mixture.step, prepare

    def watched(self: Any, choices: Any, state: Any) -> Any:
        low = self.kernels[0]
        used.append((low.proposal.space.horizon, low.stages[0].alpha, low.proposal.temperature, low.gate, self))
        return step(self, choices, state)

    def kept(*args: Any, **options: Any) -> Any:
        prepared = settle(*args, **options)
        own = prepared.screening
        frozen.append((prepared, own, values(own)))
        return prepared

    with monkeypatch.context() as patch:
        patch.setattr(Mixture, "step", watched)
        patch.setattr(powermc.power, "prepare", kept)
        model, surrogate = pair()
        calls = [lambda *a: callback(frozen[0][1])] if callback else []
        power_sample(
            model,
            ["a", "b"],
            alpha=ALPHA,
            max_new_tokens=4,
            block_size=2,
            steps=8,
            exit=surrogate,
            proposal="substitution",
            eta=0.9,
            callbacks=calls,
        )
    ((prepared, own, before),) = frozen
    assert prepared.screening is own
    assert values(own) == before
    assert own.surrogate is surrogate
    assert len(used) == 2 * 4 * 16
    for horizon in (2, 4):
        steps = [entry for entry in used if entry[0] == horizon]
        assert len(steps) == 64
        assert all(entry == steps[0] for entry in steps)
        assert steps[0][1] == own.exponent
        assert steps[0][4].weights == [0.9, 0.1]
        assert isinstance(steps[0][4].kernels[0].target, Power)


def test_the_kernel_of_a_run_is_frozen(monkeypatch):
    steps_of_a_run(monkeypatch)


def test_mutant_the_exponent_adapts_during_the_run(monkeypatch):
    def adapt(own: Screening) -> None:
        object.__setattr__(own, "exponent", own.exponent * 0.99)

    with pytest.raises(AssertionError):
        steps_of_a_run(monkeypatch, adapt)


def test_mutant_the_gate_adapts_during_the_run(monkeypatch):
    def adapt(own: Screening) -> None:
        object.__setattr__(own, "eta", own.eta * 0.9)

    with pytest.raises(AssertionError):
        steps_of_a_run(monkeypatch, adapt)
