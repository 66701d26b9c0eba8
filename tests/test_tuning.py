"""What a warm-up fits: proposals from given starts, the screening exponent, the gate's threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from powermc import ArgumentError, NonFiniteLogits, power_sample
from powermc.sequences import Length, Prompt, Space, Substitution, Suffix
from powermc.testing import paths_of
from powermc.toy import TabularModel
from powermc.tuning import Pair, correlation, fit_eta, fit_exponent, grown, pairs, surrogate_ledger, surrogate_name
from tests.fake_lm import FakeLM, score


def given(x: np.ndarray, y: np.ndarray) -> list[Pair]:
    return [Pair(float(a), float(b), 0.0) for a, b in zip(x, y, strict=True)]


# The screening exponent.


@pytest.mark.parametrize("slope", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_the_exponent_is_alpha_times_the_slope(slope, alpha):
    x = np.random.default_rng(0).normal(0, 5, 400)
    assert fit_exponent(given(x, slope * x), alpha) == pytest.approx(alpha * slope)
    noisy = slope * x + np.random.default_rng(1).normal(0, 1, 400)  # standard error of the slope .01
    assert fit_exponent(given(x, noisy), alpha) == pytest.approx(alpha * slope, abs=0.05 * alpha)


def test_a_common_offset_is_no_part_of_the_slope():
    """A proposal and its reverse are mirror images: the fit goes through the origin, not through the mean."""
    x = np.array([-3.0, -2.0, -1.0])
    assert fit_exponent(given(x, 0.5 * x - 1), 1.0) == pytest.approx((x @ (0.5 * x - 1)) / (x @ x))
    both = given(np.concatenate([x, -x]), np.concatenate([0.5 * x - 1, 1 - 0.5 * x]))
    assert fit_exponent(both, 1.0) == pytest.approx(fit_exponent(given(x, 0.5 * x - 1), 1.0))


@pytest.mark.parametrize("slope", [-2.0, 0.0, 0.009])
def test_a_surrogate_that_says_nothing_gets_nearly_no_say(slope):
    x = np.linspace(-3, 3, 20)
    assert fit_exponent(given(x, slope * x), 4.0) == pytest.approx(0.04)
    assert fit_exponent(given(np.zeros(3), np.ones(3)), 4.0) == pytest.approx(0.04)


def test_the_exponent_is_never_over_alpha():
    x = np.linspace(-3, 3, 20)
    assert fit_exponent(given(x, 1.5 * x), 4.0) == 4.0


def test_infinite_pairs_are_left_out_and_none_is_an_error():
    x = np.array([1.0, -np.inf, 2.0, np.nan, -1.0])
    y = np.array([0.5, 3.0, 1.0, 2.0, -np.inf])
    assert fit_exponent(given(x, y), 2.0) == pytest.approx(1.0)
    for found in ([], given(x[1:2], y[1:2])):
        with pytest.raises(ArgumentError, match="no proposal could be made to fit the screening exponent on; give one"):
            fit_exponent(found, 2.0)


# Thresholds and correlations.


def test_the_entropy_threshold_is_a_quantile():
    found = [Pair(0.0, 0.0, entropy) for entropy in np.random.default_rng(0).permutation(101) / 100]
    for gated in (0.1, 0.25, 0.9):
        eta = fit_eta(found, gated)
        assert eta == pytest.approx(1 - gated, abs=0.01)
        assert sum(p.entropy > eta for p in found) == pytest.approx(100 * gated, abs=1)


def test_the_threshold_lies_between_levels_that_were_seen():
    """Ties: few models have more than a handful of entropies at their worst token."""
    found = [Pair(0.0, 0.0, entropy) for entropy in (0.5, 0.5, 0.5, 1.5, 2.5, 2.5)]
    assert [fit_eta(found, gated) for gated in (0.1, 0.3, 0.45, 0.9)] == [2.0, 2.0, 1.0, 1.0]
    assert fit_eta(found[:3], 0.5) == 0.5


@pytest.mark.parametrize("gated", [0.0, 1.0, -0.5, math.nan])
def test_a_share_out_of_range(gated):
    with pytest.raises(ArgumentError, match=f"between 0 and 1 and there must be proposals, got {gated}"):
        fit_eta(given(np.ones(2), np.ones(2)), gated)


def test_a_threshold_needs_proposals():
    with pytest.raises(ArgumentError, match="there must be proposals"):
        fit_eta([], 0.5)


def test_correlation():
    x = np.array([1.0, 2.0, 4.0])
    assert correlation(given(x, 3 * x + 1)) == pytest.approx(1)
    assert correlation(given(x, -x)) == pytest.approx(-1)
    assert correlation(given(x, np.array([1.0, 5.0, 2.0]))) == pytest.approx(np.corrcoef(x, [1, 5, 2])[0, 1])


@pytest.mark.parametrize("n", [0, 1])
def test_correlation_of_too_few(n):
    assert math.isnan(correlation(given(np.ones(n), np.ones(n))))


def test_correlation_of_what_does_not_vary():
    x = np.array([1.0, 2.0, 4.0])
    assert math.isnan(correlation(given(x, np.ones(3))))
    assert math.isnan(correlation(given(np.ones(3), x)))


# Starts and proposals.

PROMPTS = [Prompt((1,), "a", 11), Prompt((2,), "b", 12)]


def test_grown_paths_are_whole_scored_and_reproducible():
    model = FakeLM()
    space = model.space(6)
    found = grown(model, space, PROMPTS, temperature=0.5, chains=3, seed=4)
    assert [x.prompt for x in found] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    for x in found:
        assert space.contains(x.tokens)
        assert x.finished == space.ends(x.tokens)
        assert x.log_prob == pytest.approx(score(model, x), abs=1e-12)
    again = grown(FakeLM(), space, PROMPTS, temperature=0.5, chains=3, seed=4)
    assert [x.tokens for x in again] == [x.tokens for x in found]
    assert [x.tokens for x in grown(model, space, PROMPTS, temperature=0.5, chains=3, seed=5)] != [
        x.tokens for x in found
    ]
    # A path depends on its own prompt's key and chain only.
    alone = grown(model, space, PROMPTS[1:], temperature=0.5, chains=2, seed=4)
    assert [x.tokens for x in alone] == [x.tokens for x in found[3:5]]


def test_grown_paths_are_other_draws_than_those_of_a_run():
    """The same q, the same seed, other numbers: else the proposals that fit an exponent would be the run's own."""
    run = power_sample(FakeLM(), PROMPTS, alpha=1.0, max_new_tokens=12, block_size=12, steps=0, chains=3, seed=4)
    found = grown(FakeLM(), FakeLM().space(12), PROMPTS, temperature=1.0, chains=3, seed=4)
    drawn = [path.tokens for paths in run.paths for path in paths]
    assert sum(x.tokens == y for x, y in zip(found, drawn, strict=True)) < 3


def test_grown_paths_are_drawn_at_the_temperature():
    """2,000 draws at T = 1/2 of two tokens out of three: each frequency is within 5 standard errors (at most .0112) of
    q, which a right sampler misses with probability below 1e-5. Draws at T = 1 differ by .1."""
    model = FakeLM(pieces=("a", "b", ""), seed=3)
    space = model.space(1)
    found = grown(model, space, [Prompt()], temperature=0.5, chains=2000, seed=0)
    q = model.table[model.start_context] ** 2
    q /= q.sum()
    drawn = np.bincount([x.tokens[0] for x in found], minlength=3) / 2000
    assert np.abs(drawn - q).max() < 5 * 0.0112
    assert np.abs(q - model.table[model.start_context]).max() > 0.1


def test_an_error_while_growing_is_raised():
    with pytest.raises(NonFiniteLogits):
        grown(FakeLM(fail_at={2}), FakeLM().space(6), PROMPTS, temperature=1.0, chains=1, seed=0)


def expected(model, surrogate, start, proposal, each, seed, index):
    """The pairs of one start, by hand: the same moves made one by one, and everything else from the tables."""
    from powermc.choices import Stream
    from powermc.scheduling import run

    stream, found = Stream(seed, prompt=start.prompt.key, chain=index), []
    for i in range(each):
        move = run(proposal.propose(stream.step(i).at("pairs"), start))
        if move.null:
            continue
        m, y = move.auxiliary.position, move.value
        rows = [surrogate.log_row(surrogate.context(y.tokens[:t])) for t in range(m, len(y))]
        found.append(
            (
                score(surrogate, y) - score(surrogate, start),
                score(model, y) - score(model, start),
                max(entropy for _, entropy, _ in rows),
            )
        )
    return found


@pytest.mark.parametrize("kind", ["exit", "substitution", "full"])
def test_pairs_are_proposals_from_the_starts_themselves(kind):
    model, surrogate = FakeLM(), FakeLM(seed=3)
    space = model.space(6)
    starts = grown(model, space, PROMPTS, temperature=1.0, chains=3, seed=0)
    before = [(x.tokens, x.by, x.log_p.tobytes(), dict(x.log_z), x.others) for x in starts]
    proposal = {
        "exit": Suffix(surrogate, space, Length(), 0.5),
        "substitution": Substitution(surrogate, space, 2, 0.5),
        "full": Suffix(model, space, Length(), 0.5),
    }[kind]
    found = pairs(model, surrogate, proposal, starts, each=5, seed=2)
    wanted = [
        pair for i, x in enumerate(starts) for pair in expected(model, surrogate, x, proposal, each=5, seed=2, index=i)
    ]
    assert len(found) == len(wanted) > 10
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert [(x.tokens, x.by, x.log_p.tobytes(), dict(x.log_z), x.others) for x in starts] == before
    assert found == pairs(model, surrogate, proposal, starts, each=5, seed=2)
    assert found != pairs(model, surrogate, proposal, starts, each=5, seed=3)


def test_null_moves_are_no_pairs():
    """Paths of an end token alone hold nothing to redraw; the others do."""
    model = FakeLM(pieces=("a", "b", ""))
    space = model.space(2)
    starts = paths_of(space, 3)
    proposal = Substitution(model, space, 1, 1.0)
    found = pairs(model, model, proposal, starts, each=1, seed=0)
    nothing = sum(x.tokens == (2,) for x in starts)
    assert nothing == 1
    assert 0 < len(found) <= len(starts) - nothing
    assert pairs(model, model, proposal, [x for x in starts if x.tokens == (2,)], each=4, seed=0) == []
    assert all(p.log_surrogate == pytest.approx(p.log_target) for p in found)


def test_a_fit_on_real_pairs_finds_the_power():
    """p~ = p^(1/2) renormalised at each token, of a two-token law that needs no renormaliser: the slope is 2, capped;
    the other way round it is 1/2."""
    p = np.array([[0.2, 0.8]])
    soft = np.sqrt(p) / np.sqrt(p).sum()
    sharp, wide = TabularModel(p, 0), TabularModel(soft, 0)
    space = Space(frozenset(), 4)
    starts = grown(sharp, space, [Prompt()], temperature=1.0, chains=10, seed=0)
    for model, surrogate, slope in ((sharp, wide, 1.0), (wide, sharp, 0.5)):
        found = pairs(model, surrogate, Suffix(surrogate, space, Length()), starts, each=4, seed=0)
        assert fit_exponent(found, 3.0) == pytest.approx(3 * slope)
        assert correlation(found) == pytest.approx(1)


# Names and ledgers.


def test_names():
    assert surrogate_name(FakeLM()) == "fake"
    assert surrogate_name(TabularModel(np.ones((1, 1)), 0)) == "TabularModel"


def test_whose_ledger_counts_the_surrogate():
    model, surrogate = FakeLM(), FakeLM()
    assert surrogate_ledger(model, surrogate) is surrogate.ledger
    assert surrogate_ledger(model, model) is None
    assert surrogate_ledger(model, TabularModel(np.ones((1, 1)), 0)) is None
