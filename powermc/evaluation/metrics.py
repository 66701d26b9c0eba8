"""What a table of grades says: shares, pass@k, intervals, paired comparisons, how much answers differ.

Grades come as an array of shape (items, samples): `correct[i, j]` says whether sample j of item i is right. Items are
what an interval is over: they are resampled whole, since samples of one item share its difficulty. Questions are taken
as drawn independently from all questions of their kind. Nothing here knows tasks or models. NumPy and `scipy.special`.

Wilson's interval, for one sample per item, is `powermc.diagnostics.wilson`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import bdtr, ndtr, ndtri

from powermc.errors import ArgumentError

METHODS = ("percentile", "bca")
_CHUNK = 1 << 22
"""Numbers of one resampling pass."""


class Interval(NamedTuple):
    """An estimate between two ends."""

    estimate: float
    low: float
    high: float


def exact_match(correct: Any) -> np.ndarray:
    """Share of right samples per item, shape (items,). Raises `ArgumentError`: see `grades`."""
    return grades(correct).mean(axis=1)


def grades(correct: Any) -> np.ndarray:
    """Right or wrong as booleans of shape (items, samples); one sample per item may come as shape (items,).

    Raises `ArgumentError` for another shape, for no items or samples, and for values other than 0 and 1.
    """
    found = np.asarray(correct)
    if found.ndim == 1:
        found = found[:, None]
    if found.ndim != 2 or not found.size:
        raise ArgumentError(f"grades must have the shape (items, samples), neither 0, got {np.shape(correct)}")
    if found.dtype != bool and not np.isin(found, (0, 1)).all():
        raise ArgumentError("grades must be right or wrong: True or False, 1 or 0")
    return found.astype(bool)


def pass_at_k(correct: Any, k: int) -> np.ndarray:
    """Probability that one of k samples is right, per item: unbiased, shape (items,).

    1 - C(n - c, k) / C(n, k) for c right ones among n samples (Chen et al. 2021, arXiv:2107.03374, equation 1): the
    share of the k-subsets of the samples that hold a right one. Unbiased if samples are exchangeable.

    Raises `ArgumentError` for k < 1 and for k larger than the number of samples: no unbiased estimate exists.
    """
    found = grades(correct)
    n = found.shape[1]
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= n:
        raise ArgumentError(f"pass@k needs 1 <= k <= samples per item ({n}), got k = {k}: draw more, or lower k")
    # c can be n, where no subset misses: the product over the k draws of (wrong left) / (left) is 0 there.
    wrong = (n - found.sum(axis=1))[:, None]
    draws = np.arange(k)
    return 1 - np.prod(np.maximum(wrong - draws, 0) / (n - draws), axis=1)


def bootstrap(
    values: Any,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    level: float = 0.95,
    method: str = "bca",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """An interval for a statistic of items by resampling them (Efron 1979; BCa: Efron 1987).

    Parameters
    ----------
    values
        One row per item, shape (items,) or (items, m): what belongs to an item is resampled together.
    statistic
        From rows of shape (..., items) or (..., items, m), along the items, to shape (...). None: the mean.
    level
        Share of the intervals that should hold the truth; both tails alike.
    method
        "percentile", or "bca", which corrects for bias and for a spread that changes with the truth.
    resamples, seed
        How many, and of which stream: the same numbers for the same seed.

    Returns
    -------
    Interval
        Of width 0 where all items are alike: the bootstrap sees no spread then, and a Wilson interval says more. BCa
        falls back on plain percentiles where its correction is not defined.

    Raises `ArgumentError` for fewer than two items, values that are not finite, and settings out of range.
    """
    found = np.asarray(values, dtype=np.float64)
    _check(found, level, method, resamples)
    of = _mean if statistic is None else statistic
    n = len(found)
    draws = np.random.Generator(np.random.Philox(seed))
    chunk = max(1, _CHUNK // found.size)
    stars = np.concatenate(
        [of(found[draws.integers(n, size=(min(chunk, resamples - i), n))]) for i in range(0, resamples, chunk)]
    )
    estimate = float(of(found[None])[0])
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        tails = _bca(tails, stars, estimate, of, found)
    low, high = np.quantile(stars, tails)
    return Interval(estimate, float(low), float(high))


def _mean(rows: np.ndarray) -> np.ndarray:
    return rows.mean(axis=-1)


def _check(values: np.ndarray, level: float, method: str, resamples: int) -> None:
    if values.ndim not in (1, 2) or len(values) < 2:
        raise ArgumentError(f"the bootstrap needs two items or more, got values of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ArgumentError("the bootstrap needs finite values")
    if not 0 < level < 1:
        raise ArgumentError(f"level must be > 0 and < 1, got {level!r}")
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if resamples < 1:
        raise ArgumentError(f"resamples must be >= 1, got {resamples}")


def _bca(
    tails: np.ndarray, stars: np.ndarray, estimate: float, of: Callable[[np.ndarray], np.ndarray], values: np.ndarray
) -> np.ndarray:
    """The corrected quantiles: Efron 1987, equations 2.3 and 6.6; ties count half in the bias."""
    below = (np.mean(stars < estimate) + np.mean(stars <= estimate)) / 2
    left_out = np.array([of(np.delete(values, i, axis=0)[None])[0] for i in range(len(values))])
    spread = left_out.mean() - left_out
    scale = 6 * np.sum(spread**2) ** 1.5
    if not 0 < below < 1 or scale == 0:
        return tails
    bias, acceleration = ndtri(below), np.sum(spread**3) / scale
    shifted = bias + ndtri(tails)
    stretch = 1 - acceleration * shifted
    return ndtr(bias + shifted / stretch) if np.all(stretch > 0) else tails


@dataclass(frozen=True)
class Paired:
    """Two methods on the same items.

    Attributes
    ----------
    difference
        Mean of a minus mean of b, with its bootstrap interval over items.
    only_a, only_b, both, neither
        Items that were answered right by one, both, neither; None where an item has several samples.
    p
        Two-sided exact p-value of McNemar's test that a and b are right equally often; None as above.
    """

    difference: Interval
    only_a: int | None = None
    only_b: int | None = None
    both: int | None = None
    neither: int | None = None
    p: float | None = None


def compare(a: Any, b: Any, **settings: Any) -> Paired:
    """Compare the grades of two methods on the same items, in the same order.

    a, b
        Shape (items, samples); the numbers of samples may differ.
    settings
        Of `bootstrap`.

    Raises `ArgumentError` for different numbers of items.
    """
    a, b = grades(a), grades(b)
    if len(a) != len(b):
        raise ArgumentError(f"a paired comparison needs the same items, got {len(a)} and {len(b)}")
    difference = bootstrap(a.mean(axis=1) - b.mean(axis=1), **settings)
    if a.shape[1] != 1 or b.shape[1] != 1:
        return Paired(difference)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return Paired(difference, only_a, only_b, int((a & b).sum()), int((~a & ~b).sum()), mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value: of as many fair coins, twice the probability of so few heads, at most 1.

    McNemar 1947 in its exact form. 1 if there is no item that only one answered right.
    """
    if min(only_a, only_b) < 0:
        raise ArgumentError(f"counts must be >= 0, got {only_a} and {only_b}")
    n = only_a + only_b
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), n, 0.5))) if n else 1.0


@dataclass(frozen=True)
class Spread:
    """How much the answers to one item differ.

    Attributes
    ----------
    entropy
        Of the answers' shares, in nats: the plug-in estimate, too low on average for few answers.
    distinct
        How many different answers there are.
    disagreement
        Probability that two of the answers, drawn without putting back, differ: unbiased (Simpson 1949). NaN for one.
    """

    entropy: float
    distinct: int
    disagreement: float


def answer_spread(answers: Sequence[Hashable | None]) -> Spread:
    """Entropy and diversity of the answers to one item; no answer (None) is one of them.

    Raises `ArgumentError` if there are none.
    """
    n = len(answers)
    if not n:
        raise ArgumentError("there are no answers")
    counts = Counter(answers).values()
    same = sum(c * (c - 1) for c in counts)
    return Spread(
        entropy=-sum(c / n * math.log(c / n) for c in counts) + 0.0,  # not -0.0
        distinct=len(counts),
        disagreement=1 - same / (n * (n - 1)) if n > 1 else math.nan,
    )


def distinct_ngrams(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Share of different ones among all n-grams of some sequences (tokens or words): "distinct-n" of Li et al. 2016.

    NaN if no sequence has n elements. Falls with the amount of text: compare equal amounts. Raises `ArgumentError`
    for n < 1.
    """
    if n < 1:
        raise ArgumentError(f"n must be >= 1, got {n}")
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
