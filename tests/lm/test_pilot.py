"""The pilot: its rows, what they are measured from, its verdict, and what it refuses."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

import powermc.evaluation.pilot as module
from powermc import ArgumentError, CausalLM, NonFiniteLogits, Prompt
from powermc.evaluation.pilot import CLEAR, Choice, Pilot, check, effective_samples, pilot
from powermc.lm import EarlyExit, Ledger
from powermc.lm.heads import ExitHead
from powermc.sequences import Length, Screening
from powermc.stages import Stages
from powermc.toy import TabularModel
from powermc.tuning import correlation, fit_exponent, grown, pairs
from tests.fake_lm import FakeLM, score
from tests.lm.families import tiny_model

PROMPTS = [Prompt((1, 2, 7, 9, 11), "p", 5), Prompt((4, 4, 30), "q", 6)]
SMALL: dict[str, Any] = {"max_new_tokens": 12, "steps": 5, "chains": 2, "alpha": 1.5}


class Priced(Ledger):
    """Counts FLOPs too, so many per token."""

    price = 1.0

    def ran(self, span: tuple[int, int], tokens: int, *, parallel: bool, flops: float = 0.0) -> None:
        super().ran(span, tokens, parallel=parallel, flops=tokens * self.price)


def priced(price: float = 1.0, **options: Any) -> Any:
    model = FakeLM(**options)
    ledger = Priced(layers=2)
    ledger.price = price
    object.__setattr__(model, "ledger", ledger)
    return model


def run(model: Any, exits: Sequence[Any], **changes: Any) -> Pilot:
    return pilot(model, exits, PROMPTS, **{**SMALL, **changes})


def outcome(found: Pilot) -> list[dict[str, Any]]:
    """All but wall-clock."""
    rows = json.loads(json.dumps(found.to_dict(), allow_nan=False))["choices"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# Rows.


def test_what_a_choice_costs_does_not_depend_on_those_before_it() -> None:
    """A pool that lasted from one choice to the next would make whoever comes later look cheaper."""

    def costs(layers: Sequence[int], proposals: Sequence[str]) -> dict[str, Any]:
        lm = CausalLM(tiny_model("llama").double())
        found = run(lm, [EarlyExit(lm, ExitHead(layer)) for layer in layers], proposals=proposals)
        return {c.name: (c.flops, c.tokens, c.heads, c.accepted) for c in found.choices}

    both = costs((2, 3), ("exit", "substitution"))
    assert costs((3, 2), ("substitution", "exit")) == both
    assert costs((3,), ("exit",)).items() <= both.items()


def test_every_exit_with_every_proposal_after_plain() -> None:
    lm = CausalLM(tiny_model("llama").double())
    exits = [EarlyExit(lm, ExitHead(2)), EarlyExit(lm, ExitHead(3))]
    named: list[str] = []
    kl = {2: 0.9, 3: math.nan}
    found = run(lm, exits, kl=kl.__getitem__, notify=named.append, eta=2.0)
    names = ["plain MH", *[f"exit {n}, {p}" for n in (2, 3) for p in ("exit", "substitution", "full")]]
    assert [c.name for c in found.choices] == named == names
    assert found.plain is found.choices[0]
    plain = found.plain
    assert (plain.surrogate, plain.layer, plain.proposal, plain.stages) == (None, None, None, None)
    assert all(math.isnan(x) for x in (plain.exponent, plain.correlation, plain.kl))
    for c in found.choices:
        assert c.steps == 2 * 2 * 5
        assert 0 <= c.changed <= c.accepted <= c.steps
        assert 4 <= c.ess <= c.steps
        assert c.seconds > 0
        assert c.merit == c.changed / c.flops * 1e12
        assert set(c.tokens) <= {"0-2", "0-3", "0-4", "2-3", "2-4", "3-4"}
    for c in found.choices[1:]:
        assert c.stages is not None
        assert c.stages.steps == 20
        assert c.stages.changed == c.changed
        assert c.surrogate == f"LlamaForCausalLM, layer {c.layer}, lens"
        assert (c.kl == 0.9) if c.layer == 2 else math.isnan(c.kl)
        assert c.exponent == 1.5 if c.proposal == "exit" else 0.015 <= c.exponent <= 1.5
        assert -1 <= c.correlation <= 1
    assert any(c.stages.gated for c in found.choices[1:] if c.stages)
    # An exit's drafts run below it; plain Metropolis-Hastings runs the whole depth.
    assert set(plain.tokens) == {"0-4"}
    assert found.choices[1].tokens["0-2"] > 0
    assert set(plain.heads) == {"4"}
    assert found.choices[4].heads["3"] > 0
    assert found.settings == {
        "model": "LlamaForCausalLM",
        "prompts": 2,
        **SMALL,
        "temperature": 1 / 1.5,
        "plain": 0.1,
        "exit_temperatures": [None],
        "eta": 2.0,
        "delta": None,
        "seed": 0,
    }


def test_the_table_and_json() -> None:
    model, small = priced(), priced(seed=3)
    found = run(model, [small])
    lines = found.table().splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| plain MH | - | - | - | - | - | - | - | ")
    row = [cell.strip() for cell in lines[3].strip("|").split("|")]
    c = found.choices[1]
    s = c.stages
    assert s is not None
    assert row[:3] == ["fake, exit", f"{c.exponent:.3g}", f"{c.correlation:.3g}"]
    assert row[4:9] == [
        *[f"{s.pass_rate:.0%}", str(s.saved)],
        "-" if math.isnan(s.stage2_rate) else f"{s.stage2_rate:.0%}",
        *[f"{s.gated_share:.0%}", f"{c.changed} / {c.steps}"],
    ]
    assert row[9] == f"{c.flops / c.steps / 1e9:.3g}"
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["recommended"] == found.best.name
    assert [r["name"] for r in read["choices"]] == [c.name for c in found.choices]
    assert read["choices"][0]["exponent"] is None
    assert read["choices"][1]["stages"] == asdict(s)


def test_a_row_without_moves_is_infinitely_dear() -> None:
    line = Pilot((choice(None, 0, stages=None), choice("exit", 3)), {}).table().splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")][11:13] == ["inf", "inf"]


# Measured from the same starts, under the same seed.


@pytest.mark.parametrize("seed", [0, 1])
def test_all_choices_start_from_the_same_paths(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    model, small = priced(), priced(seed=3)
    space = model.space(12)
    starts = grown(model, space, PROMPTS, temperature=1 / 1.5, chains=2, seed=seed)
    measured = module._measure
    seen: list[list[Any]] = []

    def watched(model: Any, other: Any, kernel: Any, starts: Any, *args: Any) -> Choice:
        init = type(kernel).init
        first: list[Any] = []

        def recorded(self: Any, value: Any) -> Any:
            if self is kernel:
                first.append((value.prompt, value.tokens))
            return init(self, value)

        with monkeypatch.context() as patch:
            patch.setattr(type(kernel), "init", recorded)
            found = measured(model, other, kernel, starts, *args)
        seen.append(first)
        return found

    monkeypatch.setattr(module, "_measure", watched)
    run(model, [small], seed=seed)
    assert seen == [[(x.prompt, x.tokens) for x in starts]] * 4
    assert len({x.tokens for x in starts}) > 1


def test_the_seed_is_all_that_a_pilot_depends_on() -> None:
    one, other = (run(priced(), [priced(seed=3)], seed=2) for _ in range(2))
    assert outcome(one) == outcome(other)
    assert outcome(run(priced(), [priced(seed=3)], seed=3)) != outcome(one)
    # Choices do not depend on each other.
    alone = run(priced(), [priced(seed=3)], seed=2, proposals=["substitution"])
    assert outcome(alone) == [outcome(one)[0], outcome(one)[2]]


def test_exponents_and_correlations_are_those_of_proposals_from_the_starts() -> None:
    model, small = priced(), priced(seed=3)
    found = run(model, [small])
    space = model.space(12)
    starts = grown(model, space, PROMPTS, temperature=1 / 1.5, chains=2, seed=0)
    for c in found.choices[1:]:
        assert c.proposal is not None
        moves = Screening(small, 1.5, proposal=c.proposal).proposals(model, space, Length(), 1 / 1.5)[c.proposal]
        made = pairs(model, small, moves, starts, each=2, seed=0)
        assert c.correlation == correlation(made)
        assert c.exponent == (1.5 if c.proposal == "exit" else fit_exponent(made, 1.5))


def test_costs_are_those_of_the_steps_alone() -> None:
    """Growing the starts and fitting exponents cost tokens too, which no row has."""
    model, small = priced(), priced(seed=3)
    found = run(model, [small])
    total = model.ledger.flops + small.ledger.flops
    rows = sum(c.flops for c in found.choices)
    assert 0 < rows < total
    # Plain steps from scored starts run what they draw, no more; log Z at the proposals' temperature is scored once.
    scored = 4 * 12 + sum(2 * len(p.ids) for p in PROMPTS)
    assert found.plain.flops == sum(found.plain.tokens.values()) <= 20 * 12 + scored


def test_a_surrogate_of_its_own_is_not_free() -> None:
    """The same surrogate at a hundred times the price: the row costs what both models run."""
    cheap, dear = (run(priced(), [priced(price, seed=3)], proposals=["exit"]) for price in (1.0, 100.0))
    assert cheap.plain.flops == dear.plain.flops
    one, other = cheap.choices[1], dear.choices[1]
    own = sum(one.tokens.values())
    assert one.changed == other.changed
    assert one.tokens == other.tokens, "of the full model"
    assert other.flops - own == pytest.approx(100 * (one.flops - own))
    assert one.flops > own
    free = run(priced(), [TabularModel(FakeLM(seed=3).table, 1)], proposals=["exit"]).choices[1]
    assert free.flops == own
    assert free.surrogate == "TabularModel"


def test_log_p_is_what_effective_samples_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the full model, also where the target is flat (alpha = 0) and where the surrogate scored a state last."""
    groups: list[np.ndarray] = []

    def kept(values: np.ndarray) -> float:
        groups.append(values)
        return 1.0

    monkeypatch.setattr(module, "effective_samples", kept)
    model = priced()
    found = run(model, [priced(seed=3)], alpha=0.0, temperature=1.0, proposals=["exit"])
    assert [c.ess for c in found.choices] == [2.0, 2.0]
    assert [g.shape for g in groups] == [(2, 5)] * 4
    assert np.concatenate(groups).std() > 0.1
    groups.clear()
    run(model, [priced(seed=3)], proposals=["exit"], plain=0.0, steps=4)
    starts = grown(model, model.space(12), PROMPTS, temperature=1 / 1.5, chains=2, seed=0)
    logs = [score(model, x) for x in starts]
    # A chain that has not moved by its first step has the start's log p.
    assert sum(g[c, 0] == pytest.approx(logs[2 * (i % 2) + c]) for i, g in enumerate(groups) for c in range(2)) >= 2


def test_an_error_in_a_chain_is_raised() -> None:
    with pytest.raises(NonFiniteLogits):
        run(priced(fail_at={60}), [priced(seed=3)])


def test_a_model_whose_ledger_counts_no_flops() -> None:
    with pytest.raises(ArgumentError, match="the ledger of fake or its surrogate counts no FLOPs"):
        run(FakeLM(), [priced(seed=3)])
    with pytest.raises(ArgumentError, match="counts no FLOPs"):
        run(priced(), [FakeLM(seed=3)])


# Effective samples.


def test_chains_that_never_move_count_as_one_draw_each() -> None:
    rng = np.random.default_rng(0)
    assert effective_samples(np.ones((3, 10))) == 3
    assert effective_samples(np.arange(3.0)[:, None] * np.ones(10)) == 3
    moving = rng.normal(size=(1, 400))
    alone = effective_samples(moving)
    assert 200 < alone <= 400
    assert effective_samples(np.concatenate([moving, np.ones((2, 400))])) == pytest.approx(alone + 2)


@pytest.mark.parametrize("draws", [4, 5, 8, 33])
@pytest.mark.parametrize("chains", [1, 2, 4])
def test_effective_samples_are_a_number_within_bounds(chains: int, draws: int) -> None:
    """Also of chains that move once, which ArviZ finds nearly constant, and of alternating ones."""
    rng = np.random.default_rng(chains)
    once = np.zeros((chains, draws))
    once[:, draws // 2 :] = 1.0
    last = np.zeros((chains, draws))
    last[:, -1] = 1.0
    zigzag = np.tile(np.arange(draws) % 2, (chains, 1)).astype(float)
    for values in (once, last, zigzag, rng.normal(size=(chains, draws)), rng.normal(size=(chains, draws)).cumsum(1)):
        assert 0 < effective_samples(values) <= values.size


@pytest.mark.parametrize("draws", [4, 5, 9, 10, 11, 64])
@pytest.mark.parametrize("chains", [1, 2, 5])
def test_effective_samples_are_those_of_arviz(chains: int, draws: int) -> None:
    """Of chains that move; without ArviZ, which takes seconds to import."""
    with warnings.catch_warnings():  # once a day it says at import that it is being rewritten
        warnings.simplefilter("ignore", FutureWarning)
        az = pytest.importorskip("arviz")
    rng = np.random.default_rng(draws)
    step = np.zeros((chains, draws))
    step[:, draws // 2 :] = 1.0
    walk = rng.normal(size=(chains, draws)).cumsum(1)
    for values in (step, walk, rng.normal(size=(chains, draws)), walk.round()):
        moving = values[np.ptp(values, axis=1) > 0]
        if not len(moving):
            continue
        expected = min(float(az.ess(moving, method="bulk")), float(moving.size)) + len(values) - len(moving)
        assert effective_samples(values) == pytest.approx(expected, rel=1e-8)
    assert np.isnan(effective_samples(rng.normal(size=(chains, 3))))


# The verdict.


def choice(proposal: str | None, changed: int, *, flops: float = 1e12, **facts: Any) -> Choice:
    numbers: dict[str, Any] = {"exponent": 1.0, "correlation": 0.5, "kl": 1.0, "steps": 1000, "accepted": changed}
    numbers |= {"ess": 10.0, "seconds": 2.0, "tokens": {}, "heads": {}, "stages": Stages(*[1] * 11)}
    layer = None if proposal is None else 20
    return Choice(
        surrogate=None if proposal is None else "m, layer 20",
        layer=layer,
        proposal=proposal,
        changed=changed,
        flops=flops,
        **{**numbers, **facts},
    )


@pytest.mark.parametrize(
    ("plain", "rivals", "best"),
    [
        (choice(None, 100), [choice("exit", 100)], None),
        (choice(None, 100), [choice("exit", 130)], None),  # two standard errors of the ratio are a factor 1.30
        (choice(None, 100), [choice("exit", 140)], "exit"),
        (choice(None, 10000), [choice("exit", 10900)], None),  # clear, but not worth it
        (choice(None, 10000), [choice("exit", 11300)], "exit"),
        (choice(None, 100), [choice("exit", 100, flops=5e11)], "exit"),
        (choice(None, 100), [choice("exit", 150, flops=2e12)], None),
        (choice(None, 100), [choice("exit", 140), choice("substitution", 200)], "substitution"),
        (choice(None, 100), [choice("full", 900)], None),
        (choice(None, 100), [choice("full", 900), choice("exit", 150)], "exit"),
        (choice(None, 0), [choice("exit", 1)], None),  # one move against none tells nothing
        (choice(None, 0), [choice("exit", 20)], "exit"),
        (choice(None, 5), [choice("exit", 0)], None),
        (choice(None, 0), [choice("exit", 0)], None),
        (choice(None, 5), [], None),
    ],
)
def test_an_exit_is_recommended_only_if_it_is_clearly_better(
    plain: Choice, rivals: list[Choice], best: str | None
) -> None:
    assert CLEAR == 1.1
    found = Pilot((plain, *rivals), {})
    assert found.best.proposal == best
    assert found.plain is plain
    text = found.verdict()
    assert text.startswith(f"recommended: {found.best.name}")
    assert ("plain MH." in text) == (best is None)
    assert found.to_dict()["recommended"] == found.best.name
    assert "full" not in text


def test_the_verdict_says_by_how_much() -> None:
    plain, exit = choice(None, 100), choice("exit", 150, flops=5e11, seconds=4.0)
    assert Pilot((plain, exit), {}).verdict() == (
        "recommended: exit 20, exit. It makes 3.00 times of plain MH's moves per FLOP and 0.75 times per second."
    )
    assert Pilot((plain, replace(exit, changed=40)), {}).verdict() == (
        "recommended: plain MH. No exit clearly pays here: the best of them, exit 20, exit, makes 0.80 times its moves "
        "per FLOP."
    )
    assert "infinitely many times" in Pilot((replace(plain, changed=0), exit), {}).verdict()
    assert Pilot((plain,), {}).verdict() == "recommended: plain MH. No early exit was tried."
    assert replace(exit, layer=None, surrogate="small").name == "small, exit"


# What is refused.

FINE: dict[str, Any] = {"alpha": 4.0, "temperature": None, "steps": 8, "chains": 2, "plain": 0.1, "seed": 0}
FINE |= {"proposals": ["exit"], "max_new_tokens": 8, "eta": None, "delta": None}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
        ({"alpha": math.nan, "proposals": []}, "alpha must be a finite number >= 0, got nan"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"steps": 3}, "steps must be an integer >= 4, got 3"),
        ({"chains": 0}, "chains must be an integer >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"plain": 1.5}, "the share of plain steps must be between 0 and 1, got 1.5"),
        ({"plain": 0.0, "proposals": ["exit", "substitution"]}, r"mix in plain steps \(plain > 0\)"),
        ({"proposals": ["exit", "tail"]}, "unknown proposal 'tail'; choose one of exit, substitution, full"),
        ({"eta": -1.0}, "eta must be a number >= 0, got -1.0"),
        ({"delta": 2.0}, "every margin is under delta 2.0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_settings_that_no_pilot_can_run_under(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        check(**{**FINE, **change})
    model = priced()
    with pytest.raises(ArgumentError, match=text):
        pilot(model, [priced(seed=3)], PROMPTS, **{**FINE, **change})
    assert model.ledger.flops == 0


def test_what_fits() -> None:
    check(**FINE)
    model = priced()
    with pytest.raises(ArgumentError, match="a pilot needs at least one prompt"):
        pilot(model, [], [], **SMALL)
    with pytest.raises(ArgumentError, match=r"eta 3.0 can never be exceeded.*= 2.197 nats"):
        run(model, [priced(seed=3)], eta=3.0)
    assert model.ledger.flops == 0


def test_every_temperature_of_an_exit_is_a_choice_of_its_own() -> None:
    found = run(priced(), [priced(seed=3)], proposals=("exit", "full"), exit_temperatures=(0.5, 2.0))
    assert [c.name for c in found.choices] == ["plain MH", "fake, exit at T 0.5", "fake, exit at T 2", "fake, full"]
    assert [c.temperature for c in found.choices] == [None, 0.5, 2.0, None]
    assert found.settings["exit_temperatures"] == [0.5, 2.0]
    cold, hot = found.choices[1:3]
    alone = run(priced(), [priced(seed=3)], proposals=("exit",), exit_temperatures=(2.0,))
    assert (hot.changed, hot.stages) == (alone.choices[1].changed, alone.choices[1].stages)
    assert (cold.stages, cold.tokens) != (hot.stages, hot.tokens)
