"""Statistical tests of the production random streams, each with a false-positive rate that holds for every seed.

Enumeration proves the law of a kernel; these tests check that `Stream` realises it. Three p-values (`multinomial_p`
and `bounded_mean_p` are bounds that hold for every sample size, `chi_square_p` is asymptotic), a sequential test that
makes the rate as small as one likes (Gandy & Scott 2020, arXiv:2001.06465), and `assert_streams`, which puts them
together for a kernel.

What this module does not do: it never looks at a seed twice. A failure at a stated rate of 1e-6 is a bug, not bad luck.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import special, stats

from powermc.choices import Stream
from powermc.scheduling import Failed, Finished, drive
from powermc.testing.enumeration import Transitions, enumerate_kernel
from powermc.types import Choices, Kernel, State, Steps, X


def pool(probabilities: np.ndarray, least: float) -> np.ndarray:
    """The pooled cell of every cell: small ones are merged, smallest first, until each pool has probability `least`.

    Looks at the probabilities only, never at counts. Cells of probability 0 share pool 0, and nothing else is in it.
    """
    cell = np.zeros(len(probabilities), dtype=np.int64)
    current, mass = 1, 0.0
    order = [int(i) for i in np.argsort(probabilities, kind="stable") if probabilities[i] > 0]
    left = float(sum(probabilities[i] for i in order))
    for i in order:
        cell[i] = current
        mass, left = mass + probabilities[i], left - probabilities[i]
        if mass >= least and left >= least:
            current, mass = current + 1, 0.0
    return cell


def _pooled(counts: np.ndarray, probabilities: np.ndarray, least_expected: float) -> tuple[np.ndarray, np.ndarray]:
    counts, probabilities = np.asarray(counts, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    cell = pool(probabilities, least_expected / max(counts.sum(), 1.0))
    return np.bincount(cell, counts), np.bincount(cell, probabilities / probabilities.sum())


def chi_square_p(counts: np.ndarray, probabilities: np.ndarray, *, least_expected: float = 10.0) -> float:
    """Pearson's chi-square p-value, cells pooled until each expects `least_expected` counts.

    Asymptotic: use it where cells expect hundreds, or for rates that are not tiny. A count in a cell of probability 0
    gives p = 0.
    """
    seen, law = _pooled(counts, probabilities, least_expected)
    if seen[0] > 0:
        return 0.0
    expected = seen.sum() * law[1:]
    if len(expected) < 2:
        return 1.0
    return float(stats.chi2.sf(((seen[1:] - expected) ** 2 / expected).sum(), len(expected) - 1))


def multinomial_p(counts: np.ndarray, probabilities: np.ndarray, *, least_expected: float = 5.0) -> float:
    """A p-value from the relative entropy KL(counts / n || probabilities) that is valid for every n.

    With d + 1 cells, E exp(s n KL) <= (1 - s)^-d for 0 <= s < 1, hence P(n KL >= t) <= exp(-t + d) (t / d)^d for
    t > d (Agrawal 2019, arXiv:1904.02291). It needs about twice the counts of `chi_square_p` for the same verdict.
    A count in a cell of probability 0 gives p = 0.
    """
    seen, law = _pooled(counts, probabilities, least_expected)
    if seen[0] > 0:
        return 0.0
    t = float(special.rel_entr(seen[1:], seen.sum() * law[1:]).sum())
    return math.exp(_log_entropy_tail(t, len(law) - 2))


def _log_entropy_tail(t: float, d: int) -> float:
    return 0.0 if d < 1 or t <= d else -t + d + d * math.log(t / d)


def detectable_variation(n: int, cells: int, level: float, *, miss: float = 0.01) -> float:
    """The total variation that `multinomial_p` <= `level` finds in n draws with probability >= 1 - miss.

    Let the draws come from P' on `cells` cells at distance delta from P. The empirical law is within
    sqrt((cells - 1) / n) / 2 of P' in the mean and, by McDiarmid, within sqrt(log(1 / miss) / 2n) more except with
    probability `miss`; by Pinsker n KL >= 2 n TV^2. A guarantee for every P', so most are found well before.
    """
    d = max(cells - 1, 1)
    low, high = float(d), d + 1.0
    while _log_entropy_tail(high, d) > math.log(level):
        high *= 2
    for _ in range(80):
        t = (low + high) / 2
        low, high = (t, high) if _log_entropy_tail(t, d) > math.log(level) else (low, t)
    return math.sqrt(high / (2 * n)) + math.sqrt(d / n) / 2 + math.sqrt(math.log(1 / miss) / (2 * n))


def bounded_mean_p(values: np.ndarray, mean: float) -> float:
    """A p-value, valid for every n, for independent values in [0, 1] that should all have this mean.

    Bets at fair odds: each prod_i (1 + b (y_i - mean)) has expectation 1, so 1 / their average is a p-value by
    Markov's inequality (Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting").
    Nothing is assumed about the variance: a chain's averages over stretches that start at stationarity qualify,
    however it mixes, and the effective sample size sets what is found, about
    sqrt(2 log(20 / level) variance(y) / n), if that is below the variance of one y.
    """
    values = np.asarray(values, dtype=np.float64)
    assert ((values >= -1e-12) & (values <= 1 + 1e-12)).all(), "values must lie in [0, 1]"
    if not 0 < mean < 1:
        return 1.0 if np.allclose(values, mean, rtol=0, atol=1e-12) else 0.0
    stakes = 0.99 * 2.0 ** -np.arange(10)
    bets = np.concatenate((stakes / mean, -stakes / (1 - mean)))
    log_wealth = np.log1p(bets[:, None] * (values.clip(0, 1) - mean)).sum(1)
    return math.exp(min(0.0, math.log(len(bets)) - float(np.logaddexp.reduce(log_wealth))))


class Round(NamedTuple):
    """One round of a sequential test: n samples gave q. At or below `fail` it fails, at or below `go_on` it goes on."""

    n: int
    q: float
    fail: float
    go_on: float


@dataclass(frozen=True)
class Verdict:
    """What a sequential test came to, and its rounds."""

    passed: bool
    rounds: tuple[Round, ...]


def sequential_test(
    p_values: Callable[[int], float | Sequence[float]],
    *,
    n: int,
    false_positives: float = 1e-6,
    rounds: int = 4,
    growth: int = 4,
) -> Verdict:
    """The sequential test of Gandy & Scott 2020 (Algorithm 1): fail, pass, or look again with more samples.

    `p_values(n)` draws n *fresh* samples and returns one or several p-values, combined by Bonferroni into
    q = min(1, count * min). With beta = false_positives / rounds and gamma = beta^(1/rounds): fail if q <= beta, pass
    if q > gamma + beta, else divide beta by gamma and go on; the second round and later ones take growth * n samples.

    The rate of false positives is at most `false_positives` whatever the seed. In round i the threshold is
    beta_i = beta gamma^(1-i). Let V_i bound the chance to fail in round i or later, given that it is reached. As
    P(q <= a) <= a, the chances f to fail and c to go on satisfy f <= beta_i and f + c <= gamma + beta_i; as
    V_{i+1} <= 1, f + c V_{i+1} is largest at f = beta_i, c = gamma. So V_i = beta_i + gamma V_{i+1}, and V_1 is the sum
    of beta_i gamma^(i-1) = beta over all rounds: false_positives. In the last round beta_i = gamma.

    A discrepancy that makes q <= beta with 99% of n samples is found with 99%; gamma is far larger than beta, so one
    that is merely suspicious gets growth times the samples instead of a verdict.
    """
    beta = false_positives / rounds
    gamma = beta ** (1 / rounds)
    done: list[Round] = []
    for i in range(rounds):
        size = n if i == 0 else growth * n
        p = np.atleast_1d(p_values(size))
        done.append(Round(size, float(min(1.0, len(p) * p.min())), beta, gamma + beta))
        if done[-1].q <= beta:
            return Verdict(False, tuple(done))
        if done[-1].q > gamma + beta:
            break
        beta /= gamma
    return Verdict(True, tuple(done))


class Streams(Protocol):
    """Makes the choices of one chain, as `Stream` does."""

    def __call__(self, seed: int, *, chain: int) -> Any:
        """An object with `step(i)`, the `Choices` of step i."""
        ...


@dataclass(frozen=True)
class StreamsReport:
    """What `assert_streams` found. `detectable`: the total variation of the pair law that it finds with 99%."""

    verdict: Verdict
    detectable: float
    cells: int


def assert_streams(
    kernel: Kernel[X],
    space: Sequence[X],
    *,
    law: Transitions[X] | None = None,
    streams: Streams = Stream,
    seed: int = 0,
    n: int = 5000,
    steps: int = 4,
    false_positives: float = 1e-6,
    rounds: int = 4,
    growth: int = 4,
) -> StreamsReport:
    """The kernel run with production streams has the law that enumeration gave it.

    n chains (more if in doubt, see `sequential_test`) start from an exact draw x_0 of pi and take `steps` steps, each
    with a stream of its own. Three comparisons by `multinomial_p`: the pairs (x_0, x_1), and the pairs
    (x_{s-1}, x_s) of the last step, with pi_i P_ij; and x_s alone with pi, as stationarity demands. It finds streams
    that are biased, that repeat themselves between steps or purposes, and a kernel that behaves otherwise under an
    enumerator than in production. With n = 5,000 and 40 pooled cells a total variation of .2 between the true pair
    law and pi_i P_ij is found with 99% (`detectable_variation`; the report holds the value for the case at hand).

    Parameters
    ----------
    law
        The enumeration to compare with; None for that of `kernel`. Pass that of another kernel to ask whether the two
        are the same.
    streams
        Makes the choices of one chain: `Stream`, or one with the same calls.

    Raises `AssertionError`, for a right kernel and right streams with probability at most `false_positives`.
    """
    assert steps >= 1, f"steps must be at least 1, got {steps}"
    law = enumerate_kernel(kernel, space) if law is None else law
    index = {value: i for i, value in enumerate(law.values)}
    flow = (law.pi[:, None] * law.matrix).ravel()
    chains = iter(range(1 << 62))
    starts = law.states if kernel is law.kernel else _start(kernel, law.values)
    worst: list[str] = []

    def p_values(size: int) -> list[float]:
        mine = [next(chains) for _ in range(size)]
        origin = np.random.default_rng((seed, mine[0])).choice(len(law.pi), size=size, p=law.pi)
        programs = (
            (c, _walk(kernel, starts[i], streams(seed, chain=c), steps)) for c, i in zip(mine, origin, strict=True)
        )
        found = _results(programs)
        strange = next((v for values in found.values() for v in values if v not in index), None)
        assert strange is None, f"a step reached {strange!r}, which is not in the supported space"
        walks = np.array([[i, *(index[v] for v in found[c])] for c, i in zip(mine, origin, strict=True)])
        m = len(index)
        comparisons = (
            ("pairs of the first step", np.bincount(walks[:, 0] * m + walks[:, 1], minlength=m * m), flow),
            ("pairs of the last step", np.bincount(walks[:, -2] * m + walks[:, -1], minlength=m * m), flow),
            ("the last values", np.bincount(walks[:, -1], minlength=m), law.pi),
        )
        found_p = [multinomial_p(counts, p) for _, counts, p in comparisons]
        i = int(np.argmin(found_p))
        variation = np.abs(comparisons[i][1] / size - comparisons[i][2]).sum() / 2
        worst.append(
            f"{comparisons[i][0]} are {variation:.3f} from their law in total variation (p = {found_p[i]:.2g})"
        )
        return found_p

    verdict = sequential_test(p_values, n=n, false_positives=false_positives, rounds=rounds, growth=growth)
    cells = int(pool(flow, 5.0 / n).max())
    report = StreamsReport(verdict, detectable_variation(n, cells, false_positives / rounds / 3), cells)
    assert verdict.passed, (
        f"the streams do not realise the enumerated law: of {verdict.rounds[-1].n} chains {worst[-1]}; "
        f"false-positive rate {false_positives:g}"
    )
    return report


def _walk(kernel: Kernel[X], state: State[X], stream: Any, steps: int) -> Steps[list[X]]:
    values: list[X] = []
    for i in range(steps):
        choices: Choices = stream.step(i)
        state, _ = yield from kernel.step(choices, state)
        values.append(state.value)
    return values


def _results(programs: Any) -> dict[Any, Any]:
    results: dict[Hashable, Any] = {}
    for outcome in drive(programs, active=512):
        if isinstance(outcome, Failed):
            raise outcome.error
        if isinstance(outcome, Finished):
            results[outcome.key] = outcome.value
    return results


def _start(kernel: Kernel[X], values: Sequence[X]) -> list[State[X]]:
    started = _results((i, kernel.init(value)) for i, value in enumerate(values))
    return [started[i] for i in range(len(values))]


def frequencies(draws: Sequence[X], values: Sequence[X]) -> np.ndarray:
    """How often each of `values` occurs among `draws`; shape (len(values),). Raises `KeyError` for any other."""
    counts = Counter(draws)
    index = {value: i for i, value in enumerate(values)}
    out = np.zeros(len(values), dtype=np.int64)
    for value, count in counts.items():
        out[index[value]] = count
    return out
