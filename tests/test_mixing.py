"""R-hat, effective sample size and nested R-hat: against ArviZ, against their definitions, and on known processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from powermc import ArgumentError
from powermc.diagnostics import (
    autocorrelation_time,
    ess_bulk,
    ess_mean,
    ess_tail,
    mcse_mean,
    measure,
    mixing,
    nested_rhat,
    rhat,
)
from powermc.testing import sequential_test

KINDS = ("independent", "walk", "ties", "apart", "alternating")


@st.composite
def values(draw, chains=(1, 6), draws=(10, 60)):
    """Shape (chain, draw), of several kinds; none that `refusal` objects to."""
    shape = draw(st.integers(*chains)), draw(st.integers(*draws))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise = rng.normal(size=shape)
    return {
        "independent": noise,
        "walk": noise.cumsum(1),
        "ties": rng.integers(0, 4, size=shape) + 0.0,
        "apart": noise + 3 * rng.normal(size=(shape[0], 1)),
        "alternating": noise + 2.0 * (np.arange(shape[1]) % 2),
    }[draw(st.sampled_from(KINDS))]


# Against ArviZ.


@pytest.fixture(scope="module")
def az():
    return pytest.importorskip("arviz")


@given(x=values())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numba's own, on some versions
def test_they_are_those_of_arviz(az, x):
    if mixing.refusal(x):
        return
    pairs = [(ess_bulk, az.ess(x)), (ess_mean, az.ess(x, method="mean")), (mcse_mean, np.squeeze(az.mcse(x)))]
    if len(x) > 1:
        pairs.append((rhat, az.rhat(x)))
    if len(np.unique(x)) == x.size:  # ArviZ's quantile of ties may miss them by rounding
        pairs.append((ess_tail, az.ess(x, method="tail", prob=(0.05, 0.95))))
    for ours, theirs in pairs:
        assert ours(x) == pytest.approx(float(theirs), rel=1e-8), ours.__name__
    assert autocorrelation_time(x) == pytest.approx(x.size / float(az.ess(x, method="mean")), rel=1e-8)


def test_a_mutant_without_halves_is_not(az):
    """The check above has power: R-hat of whole chains misses a trend that all chains share."""
    x = np.random.default_rng(0).normal(size=(4, 50)) + np.linspace(0, 3, 50)
    whole = mixing._plain_rhat(mixing._normal_scores(x))
    assert abs(whole - az.rhat(x)) > 0.2
    assert rhat(x) == pytest.approx(az.rhat(x), rel=1e-8)


SILENT = {
    "constant": np.ones((4, 100)),
    "stuck": np.repeat(np.arange(4.0)[:, None], 100, axis=1),
    "-inf": np.where(np.arange(400).reshape(4, 100) == 123, -np.inf, np.random.default_rng(1).normal(size=(4, 100))),
    "three draws": np.random.default_rng(2).normal(size=(4, 3)),
    "nine draws": np.random.default_rng(3).normal(size=(4, 9)).cumsum(1) * 100,
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_arviz_answers_in_silence_is_refused_by_name(az):
    """The four silent failures of the design, and one more, with what ArviZ says of them beside what we say."""
    found = {name: measure(x, functional="f", prompt=2, chains=(0, 1, 3, 4)) for name, x in SILENT.items()}

    assert az.ess(SILENT["constant"]) == 400  # as if every draw were independent
    assert math.isnan(found["constant"].ess_bulk)
    assert found["constant"].reasons["ess_bulk"] == "constant: every draw of every chain is 1"
    assert [g.kind for g in found["constant"].guards] == ["constant"]

    assert not 1 <= az.rhat(SILENT["stuck"]) < 1e6  # NaN, infinite or 6e7: rounding errors divided by each other
    assert math.isnan(found["stuck"].rhat)
    assert found["stuck"].reasons["rhat"].startswith("stuck: within every chain all draws are equal")
    assert [(g.kind, g.chain) for g in found["stuck"].guards] == [("constant-chain", c) for c in (0, 1, 3, 4)]

    assert az.rhat(SILENT["-inf"]) < 1.05  # and ESS as if nothing had happened
    assert az.ess(SILENT["-inf"]) > 200
    assert math.isnan(found["-inf"].rhat)
    assert found["-inf"].reasons["rhat"] == "not finite: -inf at draw 23 of chain 1"
    assert str(found["-inf"].guards[0]).startswith("prompt 2, chain 1, f: not finite: -inf at draw 23")

    assert math.isnan(az.rhat(SILENT["three draws"]))  # no word why, but for a line in a log
    assert found["three draws"].reasons["rhat"] == "3 draws per chain, at least 4 are needed"
    assert [g.kind for g in found["three draws"].guards] == ["short"]

    assert az.ess(SILENT["nine draws"], method="mean") == pytest.approx(32 * math.log10(32))  # more than there are
    assert az.ess(np.sort(SILENT["nine draws"], 1), method="mean") == pytest.approx(32 * math.log10(32))  # whatever
    assert found["nine draws"].reasons["ess_bulk"] == "9 draws per chain, at least 10 are needed"
    assert math.isfinite(found["nine draws"].rhat)


def test_a_tail_without_draws_does_not_count():
    x = np.minimum(ar1(np.random.default_rng(0), 0.5, (4, 200)), 0.5)  # a third of the draws at the greatest value
    low = (x <= np.quantile(x, 0.05)).astype(float)
    assert ess_tail(x) == pytest.approx(ess_mean(low))


# Laws.


@given(x=values(chains=(2, 5)), seed=st.integers(0, 99))
def test_what_it_depends_on(x, seed):
    """Bulk ESS on ranks alone; R-hat, folded too, on location and scale; neither on the order of chains."""
    if mixing.refusal(x):
        return
    rng = np.random.default_rng(seed)
    _, ranks = np.unique(x, return_inverse=True)
    monotone = np.sort(rng.normal(size=ranks.max() + 1) ** 3).cumsum()[0] + np.cumsum(
        rng.exponential(size=ranks.max() + 1)
    )
    assert ess_bulk(monotone[ranks].reshape(x.shape)) == ess_bulk(x)
    assert rhat(8 * x) == rhat(x)
    assert rhat(-x) == pytest.approx(rhat(x))
    order = rng.permutation(len(x))
    for figure in (rhat, ess_bulk, ess_mean, mcse_mean):
        assert figure(x[order]) == pytest.approx(figure(x))
    assert rhat(x) >= math.sqrt(1 - 2 / x.shape[1]) - 0.2  # (n - 1) / n for halves that agree to the digit


def mostly(inside, share=0.01):
    """A sequential test that `inside(rng)` fails for at most this share of samples; rate of false alarms 1e-6."""
    seeds = iter(range(10**9))

    def p_values(n):
        failed = sum(not inside(np.random.default_rng(next(seeds))) for _ in range(n))
        return float(stats.binom.sf(failed - 1, n, share))

    return sequential_test(p_values, n=100).passed


def ar1(rng, phi, shape):
    noise = rng.normal(size=shape)
    x = np.empty(shape)
    x[:, 0] = noise[:, 0] / math.sqrt(1 - phi**2)
    for t in range(1, shape[1]):
        x[:, t] = phi * x[:, t - 1] + noise[:, t]
    return x


def test_independent_draws_count_one_each():
    """4 chains of 200: bulk and mean ESS within 35% of 800 for all but 1% of samples. Twice or half is found."""

    def right(factor):
        def inside(rng):
            x = rng.normal(size=(4, 200))
            return all(0.65 < factor * ess(x) / x.size < 1.35 for ess in (ess_bulk, ess_mean)) and rhat(x) < 1.05

        return inside

    assert mostly(right(1))
    assert not mostly(right(2))
    assert not mostly(right(0.5))


@pytest.mark.parametrize("phi", [0.6, -0.4])
def test_the_autocorrelation_time_of_an_autoregression(phi):
    """tau = (1 + phi) / (1 - phi); within a factor 1.6 for all but 1% of samples of 4 chains of 1000."""
    tau = (1 + phi) / (1 - phi)
    assert mostly(lambda rng: 1 / 1.6 < autocorrelation_time(ar1(rng, phi, (4, 1000))) / tau < 1.6)


def test_chains_in_different_places_have_a_long_time():
    x = np.random.default_rng(0).normal(size=(4, 500)) + np.array([0, 0, 0, 9])[:, None]
    assert rhat(x) > 1.5
    assert ess_mean(x) < 10
    assert min(ess_mean(row[None]) for row in x) > 300


# Nested R-hat.


def by_definition(x, groups, between_chains=True):
    """Equations 6 to 8 of Margossian et al. 2024, one term at a time."""
    names = sorted(set(groups))
    chains = {k: [row for row, g in zip(x, groups, strict=True) if g == k] for k in names}
    centre = {k: sum(row.mean() for row in rows) / len(rows) for k, rows in chains.items()}
    overall = sum(centre.values()) / len(names)
    between = sum((m - overall) ** 2 for m in centre.values()) / (len(names) - 1)
    within = 0.0
    for k, rows in chains.items():
        m, n = len(rows), len(rows[0])
        if m > 1 and between_chains:
            within += sum((row.mean() - centre[k]) ** 2 for row in rows) / (m - 1) / len(names)
        if n > 1:
            within += sum(((row - row.mean()) ** 2).sum() / (n - 1) for row in rows) / m / len(names)
    return math.sqrt(1 + between / within)


@given(superchains=st.integers(2, 5), chains=st.integers(1, 4), draws=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_nested_rhat_is_its_definition(superchains, chains, draws, seed):
    if chains * draws == 1:
        return
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(superchains), chains)).tolist()
    x = rng.normal(size=(len(groups), draws)) + rng.normal(size=superchains)[groups, None]
    assert nested_rhat(x, groups) == pytest.approx(by_definition(x, groups), rel=1e-12)
    assert nested_rhat(x, [f"start {g}" for g in groups]) == nested_rhat(x, groups)
    assert nested_rhat(5 - 3 * x, groups) == pytest.approx(nested_rhat(x, groups))
    assert nested_rhat(x, groups) >= 1


def test_nested_rhat_is_that_of_arviz_where_it_has_one(az):
    if not hasattr(az, "rhat_nested"):
        pytest.skip(f"ArviZ {az.__version__} has no rhat_nested; 1.x has")
    x = np.random.default_rng(0).normal(size=(12, 7)).cumsum(1)
    groups = np.repeat([0, 1, 2], 4)
    theirs = az.rhat_nested(x, superchain_ids=groups, method="identity")
    assert nested_rhat(x, groups.tolist()) == pytest.approx(float(theirs))


def test_a_mutant_of_nested_rhat_is_found():
    x, groups = np.random.default_rng(0).normal(size=(8, 3)), [0, 0, 0, 0, 1, 1, 1, 1]
    assert abs(by_definition(x, groups, between_chains=False) - nested_rhat(x, groups)) > 0.01


def test_nested_rhat_sees_whether_the_start_is_forgotten():
    """One draw per chain: near sqrt(1 + 1/M) in equilibrium, where R-hat has nothing to work on."""
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(8), 32)
    forgotten = nested_rhat(rng.normal(size=(256, 1)), groups.tolist())
    assert forgotten == pytest.approx(math.sqrt(1 + 1 / 32), abs=0.03)
    assert nested_rhat(rng.normal(size=(256, 1)) + groups[:, None], groups.tolist()) > 2
    with pytest.raises(ArgumentError, match="1 draw per chain, at least 4"):
        rhat(rng.normal(size=(256, 1)))


@pytest.mark.parametrize(
    ("x", "groups", "message"),
    [
        (np.zeros((4, 3)), [0, 0, 1], "one superchain per chain is needed: 3 for values of"),
        (np.zeros((4, 3)), [0, 0, 0, 0], "compares superchains, and there are 1"),
        (np.zeros((4, 3)), [0, 0, 0, 1], r"must have as many chains each, got \[1, 3\]"),
        (np.full((4, 3), np.nan), [0, 0, 1, 1], "not finite: nan at draw 0 of chain 0"),
        (np.zeros((2, 1)), [0, 1], "of one chain need at least 2 draws"),
        (np.array([[1.0], [1.0], [2.0], [2.0]]), [0, 0, 1, 1], "no variance within superchains"),
    ],
)
def test_nested_rhat_refuses(x, groups, message):
    with pytest.raises(ArgumentError, match=message):
        nested_rhat(x, groups)
    assert math.isnan(measure(x, superchains=groups).nested_rhat)


# Guards.


@pytest.mark.parametrize("name", ["constant", "stuck", "-inf", "three draws"])
def test_the_bare_functions_refuse_too(name):
    for figure in (rhat, ess_bulk, ess_tail, ess_mean, mcse_mean, autocorrelation_time):
        with pytest.raises(ArgumentError):
            figure(SILENT[name])


def test_one_stuck_chain_is_named_and_counted():
    x = np.random.default_rng(0).normal(size=(4, 100))
    x[2] = 0.5
    found = measure(x, functional="length", chains=(0, 1, 5, 6))
    assert [(g.kind, g.chain) for g in found.guards if g.kind == "constant-chain"] == [("constant-chain", 5)]
    assert found.rhat > 1.1
    assert "disagree" in [g.kind for g in found.guards]


def test_one_chain_has_an_ess_and_no_rhat():
    found = measure(np.random.default_rng(0).normal(size=(1, 100)))
    assert found.reasons == {
        "rhat": "R-hat compares chains, and there is 1",
        "nested_rhat": "no superchains were given",
    }
    assert found.ess_bulk > 20


@given(
    chains=st.integers(0, 4),
    draws=st.integers(0, 12),
    seed=st.integers(0, 999),
    bad=st.sampled_from([0.0, np.nan, np.inf, -np.inf]),
)
def test_every_missing_figure_has_a_reason_and_every_reason_a_missing_figure(chains, draws, seed, bad):
    x = np.random.default_rng(seed).integers(0, 3, size=(chains, draws)) + 0.0
    x[x == 2] = bad
    found = measure(x)
    for figure in ("rhat", "ess_bulk", "ess_tail", "mcse", "tau", "nested_rhat"):
        assert math.isnan(getattr(found, figure)) == (figure in found.reasons)
    assert not any(isinstance(v, float) and math.isnan(v) for v in found.to_dict().values())


def test_tau_is_in_kernel_steps():
    x = ar1(np.random.default_rng(0), 0.5, (4, 400))
    assert measure(x, thin=5).tau == 5 * measure(x).tau
    assert measure(x).tau == pytest.approx(3, rel=0.5)
