"""The long run: on a table with 9,841 paths, the empirical law of many production transitions against pi.

Chains start from exact draws of pi and are independent of each other, so every x_t has law pi and two statements hold
for any seed, with nothing assumed about mixing that is not proved from the table:

1. Total variation over all paths. The kernel has P(x, y) >= e pi(y) with e = 1 / (T max_x w(x)), w = pi/q: a cut at 0
   has probability 1/L(x) >= 1/T, and then P(x, y) >= min(q(y), pi(y)/w(x)) / T. So P = e Pi + (1 - e) R with R
   invariant, hence of norm <= 1 on L2(pi), and an average of f over S steps has variance
   <= var f min(1, (2 - e)/(e S)): n chains are worth at least ESS = n / min(1, (2 - e)/(e S)) independent draws. Then
   E TV <= sum_x sqrt(pi_x (1 - pi_x) / ESS) / 2, and by McDiarmid (one chain moves the empirical law by at most 1/n)
   TV stays below E TV + sqrt(log(1/rate) / 2n) except with probability `rate`.
2. Each of a fixed list of functions with values in [0, 1] (lengths, tokens, likelihood, random sets of paths): the n
   averages along chains are independent with mean pi f, so `bounded_mean_p` applies; Bonferroni over the list. It
   adapts to the true effective sample size, and is the sharper of the two.

Both are asserted at a false-positive rate of 1e-6, and both are shown to fail for a kernel with a term dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from powermc.choices import Stream
from powermc.kernels import Metropolis
from powermc.scheduling import Finished, drive
from powermc.sequences import Length, Path, Prompt, SequenceProbability, Space, Suffix
from powermc.targets import Power
from powermc.testing import bounded_mean_p
from powermc.toy import TabularModel, exact_law
from tests.exactness.mutants import NoCutRatio, NoLogZ

RATE = 1e-6
ALPHA, TEMPERATURE = 2.0, 0.85
SPACE = Space(frozenset({3}), 8)


def make_model():
    """Four tokens, order 2, the end token unlikely (.2% to 5%), so that pi spreads over lengths 1 to 8."""
    rng = np.random.default_rng(0)
    rows = rng.dirichlet([1.0] * 3, size=25)
    end = rng.uniform(0.002, 0.05, size=(25, 1))
    return TabularModel(np.hstack([(1 - end) * rows, end]), 2)


@dataclass(frozen=True)
class Setting:
    """The exact law, and the test functions as an array of shape (functions, paths)."""

    model: TabularModel
    tokens: list
    pi: np.ndarray
    doeblin: float
    functions: np.ndarray

    @property
    def kernel(self):
        p = SequenceProbability(self.model)
        return Metropolis(Power(p, ALPHA), Suffix(self.model, SPACE, Length(), TEMPERATURE))


@pytest.fixture(scope="module")
def setting():
    model = make_model()
    law = exact_law(model, SPACE)
    assert len(law.log_p) == 9841
    pi = law.power(ALPHA)
    tokens = [tuple(int(v) for v in row[:n]) for row, n in zip(law.tokens, law.length, strict=True)]
    log_z = [sum(model.tempered_row(model.context(x[:t]), 1 / TEMPERATURE)[1] for t in range(len(x))) for x in tokens]
    q = np.exp(law.log_p / TEMPERATURE - log_z)
    assert q.sum() == pytest.approx(1.0)
    functions = [law.length == n for n in range(1, 9)]
    functions += [law.tokens[:, 0] == v for v in range(4)]
    functions += [(law.tokens == v).any(1) for v in range(3)]
    functions += [law.log_p >= level for level in np.quantile(law.log_p, [0.5, 0.9, 0.99, 0.999])]
    functions += list(np.random.default_rng(1).random((16, len(pi))) < 0.5)
    functions += [np.arange(len(pi)) == i for i in np.argsort(-pi)[:5]]
    scaled = (law.log_p - law.log_p.min()) / np.ptp(law.log_p)
    functions += [scaled, law.length / 8]
    return Setting(model, tokens, pi, 1 / (SPACE.horizon * (pi / q).max()), np.array(functions, dtype=np.float64))


def walk(kernel, start, stream, steps):
    state = yield from kernel.init(start)
    values = []
    for i in range(steps):
        state, _ = yield from kernel.step(stream.step(i), state)
        values.append(state.value.tokens)
    return values


def visits(setting, kernel, *, chains, steps, seed=0):
    """Indices of the paths visited, shape (chains, steps); x_0 is drawn from pi exactly and not counted."""
    index = {tokens: i for i, tokens in enumerate(setting.tokens)}
    starts = np.random.default_rng(seed).choice(len(setting.pi), size=chains, p=setting.pi)
    programs = (
        (c, walk(kernel, Path(Prompt(), x, SPACE.ends(x)), Stream(seed, chain=c), steps))
        for c, x in enumerate(setting.tokens[i] for i in starts)
    )
    out = np.empty((chains, steps), dtype=np.int64)
    for outcome in drive(programs, active=1000):
        assert isinstance(outcome, Finished)
        out[outcome.key] = [index[x] for x in outcome.value]
    return out


def variation(setting, seen):
    return np.abs(np.bincount(seen.ravel(), minlength=len(setting.pi)) / seen.size - setting.pi).sum() / 2


def variation_bound(setting, chains, steps, rate=RATE):
    """Statement 1."""
    e = setting.doeblin
    ess = chains / min(1.0, (2 - e) / (e * steps))
    mean = np.sqrt(setting.pi * (1 - setting.pi) / ess).sum() / 2
    return mean + np.sqrt(np.log(1 / rate) / (2 * chains))


def function_p(setting, seen):
    """Statement 2: the p-value over the whole list."""
    p = [bounded_mean_p(f[seen].mean(1), float(f @ setting.pi)) for f in setting.functions]
    return min(1.0, len(p) * min(p))


def measured_ess(setting, seen):
    """Per test function that varied: variance under pi over the variance of the grand mean, as the chains show it."""
    variance = np.array([f[seen].mean(1).var(ddof=1) for f in setting.functions]) / seen.shape[0]
    spread = (setting.functions**2) @ setting.pi - (setting.functions @ setting.pi) ** 2
    return spread[variance > 0] / variance[variance > 0]


def wrong_kernel(setting, kind):
    right = setting.kernel
    return replace(right, proposal=kind(setting.model, SPACE, Length(), TEMPERATURE))


def test_the_functions_match_the_law_in_twenty_thousand_transitions(setting):
    """1,000 chains of 20 steps: statement 2, the short form."""
    seen = visits(setting, setting.kernel, chains=1000, steps=20)
    assert function_p(setting, seen) > RATE


@pytest.mark.parametrize(("kind", "chains"), [(NoCutRatio, 500), (NoLogZ, 1000)])
def test_a_dropped_term_is_seen_in_twenty_thousand_transitions(kind, chains, setting):
    seen = visits(setting, wrong_kernel(setting, kind), chains=chains, steps=20)
    assert function_p(setting, seen) <= RATE


def test_the_bound_is_worth_something(setting):
    """The variation bound of the long form lies below what dropping the cut ratio does to the law (it makes pi into
    pi L), and the minorisation is not vacuous."""
    length = np.array([len(x) for x in setting.tokens])
    wrong = setting.pi * length / (setting.pi @ length)
    assert variation_bound(setting, 5000, 200) < 0.14
    assert np.abs(wrong - setting.pi).sum() / 2 > 0.2
    assert setting.doeblin > 0.01


@pytest.mark.slow
def test_a_million_transitions(setting):
    """5,000 chains of 200 steps: both statements."""
    seen = visits(setting, setting.kernel, chains=5000, steps=200)
    ess = measured_ess(setting, seen)
    print(
        f"total variation {variation(setting, seen):.4f}, bound {variation_bound(setting, 5000, 200):.4f}, "
        f"p of the functions {function_p(setting, seen):.3g}, measured ESS {ess.min():.0f} to {np.median(ess):.0f}"
    )
    assert variation(setting, seen) <= variation_bound(setting, 5000, 200)
    assert function_p(setting, seen) > RATE


@pytest.mark.slow
def test_a_dropped_term_breaks_the_variation_bound(setting):
    """5,000 chains of 25 steps without the cut ratio."""
    seen = visits(setting, wrong_kernel(setting, NoCutRatio), chains=5000, steps=25)
    print(f"total variation {variation(setting, seen):.4f}, bound {variation_bound(setting, 5000, 25):.4f}")
    assert variation(setting, seen) > variation_bound(setting, 5000, 25)
    assert function_p(setting, seen) <= RATE
