"""Diagnostics of whole runs: which draws count, guards, moves, false rejections, answers, costs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from powermc import ArgumentError, DelayedAcceptance, power_sample, sample
from powermc.diagnostics import (
    answer_shares,
    diagnose,
    draw_steps,
    estimate_false_rejections,
    false_rejections,
    full_depth_tokens,
    funnel,
    kept_draws,
    measure,
    moves_by_cut,
    sentences,
    wilson,
)
from powermc.lm.ledger import Ledger
from powermc.proposals import Independent
from powermc.results import Chain, Run
from powermc.sequences import Path, Prompt
from powermc.targets import Table
from powermc.testing import bounded_mean_p, sequential_test
from tests.fake_lm import FakeLM

SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 3, "draws": 24, "chains": 4, "alpha": 1.2}


@pytest.fixture(scope="module")
def plain() -> Run:
    return power_sample(FakeLM(), ["a", "b"], **SMALL)


@pytest.fixture(scope="module")
def screened() -> Run:
    return power_sample(FakeLM(), ["a", "b"], **SMALL, exit=FakeLM(seed=3), plain=0.3)


def sevens(text: str) -> int | None:
    return text.count("7") or None


def kinds(guards) -> set[str]:
    return {guard.kind for guard in guards}


def with_draws(run: Run, draws: list[list[tuple[Path, ...]]], **changes) -> Run:
    """The run with other draws per prompt and chain."""

    def chain(old: Chain, paths: tuple[Path, ...]) -> Chain:
        texts = tuple("".join(map(str, path.tokens)) for path in paths)
        return replace(old, draws=paths, draw_texts=texts, history=())

    chains = tuple(tuple(map(chain, old, new)) for old, new in zip(run.chains, draws, strict=True))
    return replace(run, chains=chains, **changes)


def path(*tokens: int, log_p: float = -1.0) -> Path:
    return Path(Prompt((1,)), tokens, True, np.array([log_p]) if len(tokens) == 1 else np.full(len(tokens), log_p))


# Which draws count.


def test_every_functional_of_every_prompt(plain):
    found = diagnose(plain, of_path={"first": lambda x: x.tokens[0]}, of_text={"characters": len})
    names = ["log_p", "length", "finished", "first", "characters"]
    assert [(row.prompt, row.functional) for row in found.convergence] == [(p, n) for p in range(2) for n in names]
    for p in range(2):
        for name, value in (("log_p", lambda x: x.log_prob), ("first", lambda x: x.tokens[0]), ("length", len)):
            values = np.array([[value(x) for x in chain.draws] for chain in plain.chains[p]])
            row, again = found.of(name, p), measure(values, functional=name, prompt=p)
            assert (row.chains, row.draws) == ((0, 1, 2, 3), 24)
            assert row.to_dict() == again.to_dict()
            assert row.mean == pytest.approx(values.mean())
    with pytest.raises(KeyError):
        found.of("first", 2)


def test_failed_chains_are_left_out_and_named():
    with pytest.warns(RuntimeWarning):
        run = power_sample(FakeLM(fail_at={250}), ["a", "b"], **SMALL)
    ((p, c),) = run.errors
    found = run.diagnostics()
    assert c not in found.of("log_p", p).chains
    assert found.of("log_p", 1 - p).chains == (0, 1, 2, 3)
    failed = [g for g in found.guards if g.kind == "failed"]
    assert [(g.prompt, g.chain) for g in failed] == [(p, c)]
    assert str(run.errors[p, c]) in failed[0].message
    assert kinds(found.guards) >= {"failed", "few-chains"}


def test_chains_of_different_lengths(plain):
    draws = [[c.draws for c in chains] for chains in plain.chains]
    draws[1] = [draws[1][0], draws[1][1][:20], draws[1][2][:5], ()]
    run = with_draws(plain, draws)
    kept = kept_draws(run, 1)
    assert (kept.chains, kept.draws) == ((0, 1), 20)
    said = [(g.kind, g.chain, g.message) for g in kept.guards if g.kind != "stuck"]
    assert said[0][:2] == ("no-draws", 3)
    assert said[1:] == [
        ("unequal", 2, "it has 5 of another chain's 24 draws"),
        ("unequal", None, "chains have 20 to 24 draws"),
    ]
    assert "few-chains" in kinds(run.diagnostics().guards)
    nothing = with_draws(plain, [[()] * 4] * 2).diagnostics()
    assert all(math.isnan(row.rhat) and row.reasons["rhat"].startswith("0 draws") for row in nothing.convergence)
    assert kinds(nothing.guards) == {"no-draws"}


def test_an_interrupted_run_says_so():
    run = power_sample(FakeLM(interrupt_at=130), ["a", "b"], **SMALL)
    assert kinds(run.diagnostics().guards) >= {"no-draws"}


def test_stuck_chains_are_named_once_and_constant_functionals_by_name(plain):
    moving = [path(*([1] * (1 + i % 5)), log_p=-0.1 * (i % 7)) for i in range(24)]
    still = (path(3, 3, log_p=-2),) * 24
    run = with_draws(plain, [[tuple(moving), tuple(moving[3:] + moving[:3]), still, still]] * 2)
    found = run.diagnostics()
    assert [(g.prompt, g.chain) for g in found.guards if g.kind == "stuck"] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert not [g for g in found.guards if g.kind == "constant-chain"]
    constant = [(g.prompt, g.functional) for g in found.guards if g.kind == "constant"]
    assert constant == [(0, "finished"), (1, "finished")]
    assert found.of("finished").reasons["rhat"] == "constant: every draw of every chain is 1"
    assert found.of("finished").mean == 1


def test_scope_block_compares_nothing():
    run = power_sample(FakeLM(), "a", **SMALL, scope="block")
    found = run.diagnostics(answer=sevens)
    assert all(math.isnan(row.rhat) and "scope 'block'" in row.reasons["rhat"] for row in found.convergence)
    assert "block-scope" in kinds(found.guards)
    assert all("scope 'block'" in share.reason for share in found.answers[0].shares)
    one_block = power_sample(FakeLM(), "a", **{**SMALL, "block_size": 12}, scope="block")
    assert "block-scope" not in kinds(one_block.diagnostics().guards)


def test_thinned_draws_are_where_they_were_made(plain):
    chains = plain.chains[0]
    thin = tuple(x if i < 6 or i % 3 == 2 else None for i, x in enumerate(chains[0].history))
    drawn = tuple(x for x in thin[6:] if x is not None)
    short = [replace(c, history=thin, draws=drawn, draw_texts=("",) * 8) for c in chains]
    run = replace(plain, chains=(tuple(short), plain.chains[1]))
    assert draw_steps(run, 0, 0) == list(range(8, 30, 3))
    assert kept_draws(run, 0).thin == 3
    tree = run.to_datatree(0)
    np.testing.assert_array_equal(tree["posterior"]["step"], range(8, 30, 3))
    np.testing.assert_array_equal(tree["sample_stats"]["lp"][0], plain.infos[0]["log_density"][0, 8::3])


def test_superchains_by_chain(plain):
    own = diagnose(plain, superchains=["x", "x", "y", "y"]).of("log_p")
    assert own.reasons["nested_rhat"] == "chains 0 and 1 of superchain 'x' started at different paths"
    starts = [plain.chains[0][c].starts for c in (0, 0, 3, 3)]
    shared = tuple(replace(chain, starts=s) for chain, s in zip(plain.chains[0], starts, strict=True))
    run = replace(plain, chains=(shared, plain.chains[1]))
    with_groups = diagnose(run, superchains=["x", "x", "y", "y"], prompts=[0]).of("log_p")
    values = np.array([[x.log_prob for x in chain.draws] for chain in plain.chains[0]])
    assert with_groups.nested_rhat == measure(values, superchains=[0, 0, 1, 1]).nested_rhat
    assert diagnose(plain).of("log_p").reasons["nested_rhat"] == "no superchains were given"
    alone = tuple(replace(chain, starts={}) for chain in plain.chains[0])
    uneven = diagnose(replace(run, chains=(alone, alone)), superchains=[0, 0, 0, 1]).of("log_p")
    assert uneven.reasons["nested_rhat"] == "superchains must have as many chains each, got [1, 3]"
    with pytest.raises(ArgumentError, match="superchains has 3 entries for 4 chains"):
        diagnose(plain, superchains=[0, 0, 1])


def test_bad_functionals(plain):
    with pytest.raises(ArgumentError, match="there is a functional 'length' already"):
        diagnose(plain, of_text={"length": len})
    with pytest.raises(ArgumentError, match="f must give a number of every draw, got None"):
        diagnose(plain, of_path={"f": lambda x: None})
    mute = replace(plain, chains=tuple(tuple(replace(c, draw_texts=(None,) * 24) for c in row) for row in plain.chains))
    with pytest.raises(ArgumentError, match="n is a functional of the text, and the model has no tokenizer"):
        diagnose(mute, of_text={"n": len})
    with pytest.raises(ArgumentError, match="answers are taken from texts"):
        diagnose(mute, answer=sevens)
    assert diagnose(plain, of_path={"f": lambda x: -math.inf}).of("f").reasons["rhat"].startswith("not finite: -inf")


def test_everything_is_json(screened):
    found = screened.diagnostics(answer=sevens)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["warnings"] == found.warnings
    assert len(content["convergence"]) == 6
    assert content["false_rejections"]["screened"] == found.false_rejections.screened
    assert [a["prompt"] for a in content["answers"]] == [0, 1]


def test_sentences_name_the_worst_of_a_kind():
    rng = np.random.default_rng(0)
    rows = [
        measure(rng.normal(size=(4, 50)) + shift * np.arange(4)[:, None], functional="f", prompt=p)
        for p, shift in enumerate((1, 5, 2))
    ]
    said = sentences(g for row in rows for g in row.guards if g.kind == "disagree")
    assert len(said) == 1
    assert said[0].startswith("R-hat is ")
    assert said[0].endswith("have not mixed (prompt 1, f, and 2 more); take more draws, or lower alpha.")


# Moves.


def test_the_funnel_counts_every_step_once(plain, screened):
    for run in (plain, screened):
        rows = funnel(run)
        assert [row.block for row in rows] == [0, 1, 2, None]
        for row in rows:
            assert row.steps == row.null + row.plain + row.same + row.gated + row.screened
            assert row.steps >= row.proposed >= row.accepted >= row.changed
            assert row.passed <= row.screened
        assert [row.steps for row in rows] == [24, 24, 192, 240]
        for name in ("steps", "plain", "screened", "passed", "accepted", "changed", "abandoned"):
            assert getattr(rows[-1], name) == sum(getattr(row, name) for row in rows[:-1])
        assert rows[-1].accepted == sum(int(info["accepted"].sum()) for info in run.infos)
    counts, whole = screened.stages, funnel(screened)[-1]
    assert (whole.screened, whole.passed, whole.plain) == (counts.screened, counts.passed, counts.plain)
    assert (whole.same, whole.changed) == (counts.same, counts.changed)
    assert funnel(plain)[-1].plain == funnel(plain)[-1].proposed
    assert sum(funnel(screened, p)[-1].steps for p in range(2)) == whole.steps


@pytest.mark.parametrize("bins", [1, 3, 5, 12, 40])
def test_cut_bins_cover_every_cut_once(screened, bins):
    for last_block in (True, False):
        found = moves_by_cut(screened, bins=bins, last_block=last_block)
        assert (found[0].first, found[-1].last) == (0, 12)
        assert [b.last for b in found[:-1]] == [b.first for b in found[1:]]
        assert len(found) == min(bins, 12)
        rows = funnel(screened)
        row = rows[2] if last_block else rows[-1]
        for name in ("null", "proposed", "screened", "passed", "accepted", "changed", "abandoned"):
            assert sum(getattr(b, name) for b in found) == getattr(row, name), name
    info = screened.infos[0]
    here = (info["block"] == 2) & (info["cut"] == 0) & ~info["null"]
    first = moves_by_cut(screened, 0, bins=12)[0]
    assert (first.proposed, first.changed) == (here.sum(), (here & info["changed"]).sum())
    assert first.acceptance == pytest.approx((here & info["accepted"]).sum() / here.sum())
    assert first.tokens == info["proposal_length"][here].sum()


# False rejections.


def laws(seed: int, n: int, sharp: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log weights of a target, of a surrogate, and of an independent proposal."""
    rng = np.random.default_rng(seed)
    target = sharp * rng.normal(size=n)
    return target, target + rng.normal(size=n), 0.5 * rng.normal(size=n)


def by_definition(target, surrogate, proposal, *, reverse: bool, certain: bool = True) -> float:
    """F by its definition, or by the reverse moves; a mutant that forgets that those must be sure to pass."""
    pi, q = np.exp(target) / np.exp(target).sum(), np.exp(proposal) / np.exp(proposal).sum()
    h = proposal[:, None] - proposal[None, :]
    log_a1 = surrogate[None, :] - surrogate[:, None] + h
    log_r = target[None, :] - target[:, None] + h
    log_a2 = log_r - log_a1
    if reverse:
        counts = (log_a2 < 0) & ((log_a1 > 0) | (not certain))
        term = np.where(counts, np.exp(np.minimum(log_r, 0)) - np.exp(np.minimum(log_a2, 0)), 0)
    else:
        term = np.maximum(np.exp(np.minimum(log_r, 0)) - np.exp(np.minimum(log_a1, 0)), 0)
    np.fill_diagonal(term, 0)
    return float((pi[:, None] * q[None, :] * term).sum())


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 8), sharp=st.floats(0.1, 3))
def test_false_rejections_are_matched_by_reverse_moves(seed, n, sharp):
    """The identity behind the estimator, and that delayed acceptance loses twice that."""
    all_laws = laws(seed, n, sharp)
    f = by_definition(*all_laws, reverse=False)
    assert by_definition(*all_laws, reverse=True) == pytest.approx(f, abs=1e-12)
    target, surrogate, proposal = all_laws
    pi, q = np.exp(target) / np.exp(target).sum(), np.exp(proposal) / np.exp(proposal).sum()
    h = proposal[:, None] - proposal[None, :]
    log_a1, log_r = surrogate[None] - surrogate[:, None] + h, target[None] - target[:, None] + h
    both = np.exp(np.minimum(log_a1, 0) + np.minimum(log_r - log_a1, 0))
    loss = (pi[:, None] * q[None] * (np.exp(np.minimum(log_r, 0)) - both)).sum()
    assert loss == pytest.approx(2 * f, abs=1e-12)


def test_a_mutant_of_the_identity_is_found():
    all_laws = laws(0, 6, 1.0)
    f = by_definition(*all_laws, reverse=False)
    assert f > 0.05
    assert abs(by_definition(*all_laws, reverse=True, certain=False) - f) > 0.02


def test_the_estimate_is_unbiased_where_both_ratios_are_known():
    """Pairs drawn in equilibrium, every ratio on record: the mean of the terms is F. Finds a bias of .03 with 99%."""
    target, surrogate, proposal = all_laws = laws(0, 6, 1.0)
    pi, q = np.exp(target) / np.exp(target).sum(), np.exp(proposal) / np.exp(proposal).sum()
    f = by_definition(*all_laws, reverse=False)
    seeds = iter(range(10**9))

    def terms(n):
        rng = np.random.default_rng(next(seeds))
        x, y = rng.choice(6, n, p=pi), rng.choice(6, n, p=q)
        h = proposal[x] - proposal[y]
        log_a1 = surrogate[y] - surrogate[x] + h
        passed = np.log(rng.random(n)) < log_a1
        table = {
            "screened": x != y,
            "stage1_accepted": passed & (x != y),
            "accepted": np.zeros(n, dtype=bool),
            "log_stage1": log_a1,
            "log_surrogate": surrogate[y] - surrogate[x],
            "log_target": np.where(passed, target[y] - target[x], np.nan),
        }
        return [estimate_false_rejections([{k: v[i : i + 1, None] for k, v in table.items()}]) for i in range(n)]

    def p_values(n):
        return bounded_mean_p(np.array([e.share if e.screened else 0.0 for e in terms(n)]), f)

    assert sequential_test(p_values, n=2000).passed


@pytest.fixture(scope="module")
def chains():
    """Infos of the production kernel, 16 chains, which steps count among them; and F per screened proposal, exactly."""
    target, surrogate, proposal = all_laws = laws(0, 6, 1.0)
    table = [Table(dict(enumerate(law.tolist()))) for law in (surrogate, target)]
    kernel = DelayedAcceptance(table, Independent(dict(enumerate(proposal.tolist()))))
    drawn = sample(kernel, 0, draws=200, warmup=20, chains=16)
    screened = ~drawn.infos["same"]
    return {**drawn.infos, "screened": screened}, by_definition(*all_laws, reverse=False) / screened.mean()


def test_the_estimate_holds_on_a_real_chain(chains):
    """F is within five standard errors of it; a mutant that takes the ratio nearer to a tie for stage 1's is not."""
    infos, f = chains
    found = estimate_false_rejections([infos])
    assert 0 < found.passed < found.screened == infos["screened"].sum()
    assert abs(found.share - f) < 5 * found.error + 0.01
    assert 0 < found.error < 0.02
    rejected = found.passed / found.screened - found.accepted
    assert found.share <= rejected + 5 * math.sqrt(0.25 / found.screened)  # not more than stage 2 turns down
    assert found.single_stage == found.accepted + 2 * found.share
    mutant = estimate_false_rejections([{**infos, "log_stage1": infos["log_ratio"]}])
    assert abs(mutant.share - f) > 5 * mutant.error + 0.01


def test_rounded_ratios_give_the_same_share(screened):
    """As a store keeps them."""
    numbers = {"log_stage1", "log_surrogate", "log_target"}
    stored = [{k: v.round(4) if k in numbers else v for k, v in info.items()} for info in screened.infos]
    again, found = false_rejections(replace(screened, infos=tuple(stored))), false_rejections(screened)
    assert found.passed > 0
    assert again.share == pytest.approx(found.share, abs=1e-4)


def test_false_rejections_of_a_run(plain, screened):
    assert false_rejections(plain) is None
    found = false_rejections(screened)
    assert found.screened == funnel(screened)[2].screened
    assert found.passed == funnel(screened)[2].passed
    assert 0 <= found.share <= 1
    exact = power_sample(FakeLM(), "a", **SMALL, exit=FakeLM())  # the surrogate is the model: stage 2 never objects
    perfect = false_rejections(exact)
    assert perfect.share == pytest.approx(0, abs=1e-12)
    nothing = power_sample(FakeLM(), "a", **SMALL, exit=FakeLM(seed=3), plain=1.0)
    assert false_rejections(nothing).reason == "nothing was screened on the last block"
    assert math.isnan(false_rejections(nothing).share)


# Answers.


def test_answers_sum_to_one_and_carry_their_error(plain):
    for p, found in enumerate(answer_shares(plain, sevens)):
        assert (found.over, found.n) == ("draws", 96)
        assert sum(s.share for s in found.shares) == pytest.approx(1)
        assert sum(s.count for s in found.shares) == 96
        assert [s.count for s in found.shares] == sorted((s.count for s in found.shares), reverse=True)
        texts = [chain.draw_texts for chain in plain.chains[p]]
        for share in found.shares:
            indicator = np.array([[float(sevens(text) == share.answer) for text in row] for row in texts])
            assert share.share == pytest.approx(indicator.mean())
            mcse = measure(indicator).mcse
            if share.reason is None:
                assert share.error == pytest.approx(mcse * math.sqrt(95 / 96))
                assert share.low < share.share < share.high
        assert found.best is None or found.best.answer is not None


def test_one_answer_everywhere_has_no_error_of_zero(plain):
    (share,) = answer_shares(plain, lambda text: "same", prompts=[1])[0].shares
    assert share.share == 1
    assert share.reason == "constant: every draw of every chain is 1"
    assert math.isnan(share.error)
    assert math.isnan(share.low)


def test_final_answers_are_independent_draws(plain):
    found = answer_shares(plain, sevens, over="final")[0]
    assert found.n == 4
    for share in found.shares:
        assert share.ess == 4
        assert (share.low, share.high) == wilson(share.share, 4)
    with pytest.raises(ArgumentError, match="over must be 'draws' or 'final', got 'all'"):
        answer_shares(plain, sevens, over="all")


def test_the_interval_of_an_answer_covers():
    """95% Wilson intervals by ESS of an indicator with memory: they miss in 12% of samples at most. Without the ESS
    they miss in more than a third."""
    seeds = iter(range(10**9))

    def misses(n, *, naive):
        missed = 0
        for _ in range(n):
            rng = np.random.default_rng(next(seeds))
            stay = rng.random((4, 150)) < 0.9
            fresh = rng.random((4, 150)) < 0.3
            x = fresh.copy()
            for t in range(1, 150):
                x[:, t] = np.where(stay[:, t], x[:, t - 1], fresh[:, t])
            found = measure(x.astype(float))
            ess = x.size if naive else x.size / found.tau
            low, high = wilson(found.mean, ess)
            missed += not low <= 0.3 <= high
        return float(stats.binom.sf(missed - 1, n, 0.12))

    assert sequential_test(lambda n: misses(n, naive=False), n=150).passed
    assert not sequential_test(lambda n: misses(n, naive=True), n=150).passed


@pytest.mark.parametrize(
    ("share", "n", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0)]
)
def test_wilson(share, n, low, high):
    assert wilson(share, n) == pytest.approx((low, high), abs=1e-4)


# Costs.


def test_effective_draws_over_what_they_cost(plain):
    found = {row.functional: row for row in plain.diagnostics().efficiency}
    rows = [row for row in plain.diagnostics().convergence if row.functional == "log_p"]
    log_p = found["log_p"]
    assert log_p.ess == pytest.approx(sum(row.ess_bulk for row in rows))
    assert full_depth_tokens(plain) == plain.tokens
    assert log_p.per_second == log_p.ess / plain.seconds
    assert log_p.per_full_token == log_p.ess / plain.tokens
    assert math.isnan(log_p.per_flop)
    assert log_p.reasons == {"per_flop": "the model does not count its operations"}
    ledger = Ledger(layers=4)
    ledger.ran((0, 2), 100, parallel=False, flops=1e6)
    ledger.ran((2, 4), 30, parallel=True, flops=5e6)
    shallow = replace(plain, cost=ledger, early_exit={**plain.early_exit, "surrogate_cost": {"flops": 2e6}})
    assert full_depth_tokens(shallow) == 30
    cost = {row.functional: row for row in shallow.diagnostics().efficiency}["log_p"]
    assert cost.per_full_token == log_p.ess / 30
    assert cost.per_flop == pytest.approx(log_p.ess / 8e6)


def test_prompts_without_an_ess_count_as_nothing_and_are_counted(plain):
    still = [(path(3, 3, log_p=-2),) * 24] * 4
    run = with_draws(plain, [[c.draws for c in plain.chains[0]], still])
    row = next(row for row in run.diagnostics().efficiency if row.functional == "log_p")
    assert row.ess == run.diagnostics().of("log_p", 0).ess_bulk
    assert row.prompts == 1
    assert row.reasons["ess"].startswith("a lower bound: 1 of 2 prompts count as 0 (constant")
