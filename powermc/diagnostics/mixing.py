"""How well chains mix, seen through one scalar functional: R-hat, effective sample size, Monte Carlo error.

The definitions are those of Vehtari et al. 2021 (arXiv:1903.08008), which ArviZ and Stan's `posterior` use too; the
tests hold these functions against ArviZ's to rounding. They are written out here as ArviZ takes seconds to import, and
as it answers where there is no answer: every function here raises `ArgumentError` for values that `refusal` objects to.

What this module does not know: runs, prompts, paths. Values have the shape (chain, draw).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from powermc.errors import ArgumentError

LEAST_DRAWS = 4
"""Draws per chain that the halves of a chain need to have a variance each."""

LEAST_DRAWS_ESS = 10
"""Draws per chain below which the estimator of the autocorrelation time looks at no pair of lags: its answer would be
n log10(n) for n draws, whatever they are."""

_TAILS = (0.05, 0.95)


def refusal(values: np.ndarray, least: int = LEAST_DRAWS) -> str | None:
    """Why nothing can be said of the mixing of these values, shape (chain, draw); None if something can.

    What ArviZ lets pass: fewer than `least` draws, values that are not finite, all values equal, and every chain stuck
    at a value of its own.
    """
    chains, draws = values.shape
    if not chains or draws < least:
        n = draws if chains else 0
        return f"{n} draw{'' if n == 1 else 's'} per chain, at least {least} are needed"
    if (why := _not_finite(values)) is not None:
        return why
    if (values == values[0, 0]).all():
        return f"constant: every draw of every chain is {values[0, 0]:.6g}"
    if (values == values[:, :1]).all():
        return "stuck: within every chain all draws are equal, and they differ between chains"
    return None


def rhat(values: np.ndarray) -> float:
    """Rank-normalised split R-hat, the larger of the bulk's and the tails' (folded); 1 for chains that agree.

    Chains are halved, values replaced by normal scores of their ranks, and the variance of the halves' means compared
    with the variance within them. Raises `ArgumentError` for fewer than 2 chains too.
    """
    values = _checked(values)
    if len(values) < 2:
        raise ArgumentError("R-hat compares chains, and there is 1")
    halves = _split(values)
    return max(_plain_rhat(_normal_scores(halves)), _plain_rhat(_normal_scores(np.abs(halves - np.median(halves)))))


def ess_bulk(values: np.ndarray) -> float:
    """Effective sample size of rank-normalised values: how many independent draws tell as much of the bulk."""
    return _ess(_normal_scores(_split(_checked(values, LEAST_DRAWS_ESS))))


def ess_tail(values: np.ndarray) -> float:
    """The smaller effective sample size of the 5% and 95% quantiles, that is of being at or below them.

    Where more than 5% of the draws tie at the greatest value (for log p, the mode) none is above the 95% quantile:
    there is no upper tail then, and the other quantile counts alone. ArviZ counts the missing tail as N draws.
    """
    values = _checked(values, LEAST_DRAWS_ESS)
    sides = [_split((values <= q).astype(float)) for q in np.quantile(values, _TAILS)]
    return min((_ess(side) for side in sides if not (side == side[0, 0]).all()), default=math.nan)


def ess_mean(values: np.ndarray) -> float:
    """Effective sample size for the mean."""
    return _ess(_split(_checked(values, LEAST_DRAWS_ESS)))


def mcse_mean(values: np.ndarray) -> float:
    """Monte Carlo standard error of the mean: standard deviation / sqrt(ess_mean), in the unit of the values."""
    ess = ess_mean(values)
    return float(np.std(values, ddof=1)) / math.sqrt(ess)


def autocorrelation_time(values: np.ndarray) -> float:
    """Integrated autocorrelation time in draws: tau = 1 + 2 sum_t rho_t = draws / ess_mean; 1 for independent draws.

    The sum ends by Geyer's initial monotone sequence (1992), and rho_t counts what chains disagree in as correlation:
    chains in different places have a long tau, however quick each of them is.
    """
    values = np.asarray(values, dtype=np.float64)
    return values.size / ess_mean(values)


def nested_rhat(values: np.ndarray, superchains: Sequence[Any]) -> float:
    """Nested R-hat (Margossian et al. 2024, doi:10.1214/24-BA1453, equations 6 to 8): for many short chains.

    superchains[chain] names the superchain of each chain: chains that *started at the same point*. With K superchains
    of M chains of N draws, B the variance (ddof 1) of the K superchains' means and

        W = mean over superchains of [variance of the chains' means (0 if M = 1)
                                      + mean over chains of the variance of their draws (0 if N = 1)],

    it is sqrt(1 + B / W): near sqrt(1 + 1/M) for N = 1 once the start is forgotten, whatever N is at most that but for
    noise, and larger while superchains remember where they started. No ranks and no halves: as in Stan's `posterior`.
    One draw per chain is enough. Raises `ArgumentError` for fewer than 2 superchains, for superchains of different
    sizes, for one chain of one draw each, for values that are not finite, and where W is 0.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(superchains) != len(values):
        raise ArgumentError(f"one superchain per chain is needed: {len(superchains)} for values of {values.shape}")
    names = list(dict.fromkeys(superchains))
    groups = [values[[i for i, s in enumerate(superchains) if s == name]] for name in names]
    sizes = {len(group) for group in groups}
    if len(groups) < 2:
        raise ArgumentError(f"nested R-hat compares superchains, and there are {len(groups)}")
    if len(sizes) > 1:
        raise ArgumentError(f"superchains must have as many chains each, got {sorted(sizes)}")
    if (why := _not_finite(values)) is not None:
        raise ArgumentError(why)
    chains, draws = len(groups[0]), values.shape[1]
    if draws == 0 or chains * draws == 1:
        raise ArgumentError("superchains of one chain need at least 2 draws, larger ones at least 1")
    stack = np.stack(groups)  # (superchain, chain, draw)
    within = 0.0
    if chains > 1:
        within += float(stack.mean(2).var(1, ddof=1).mean())
    if draws > 1:
        within += float(stack.var(2, ddof=1).mean())
    if within == 0:
        raise ArgumentError("no chain moved and chains of a superchain agree: there is no variance within superchains")
    return math.sqrt(1 + float(stack.mean((1, 2)).var(ddof=1)) / within)


def _not_finite(values: np.ndarray) -> str | None:
    bad = np.argwhere(~np.isfinite(values))
    if not len(bad):
        return None
    c, i = (int(k) for k in bad[0])
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return f"not finite: {values[c, i]} at draw {i} of chain {c}{more}"


def _checked(values: np.ndarray, least: int = LEAST_DRAWS) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ArgumentError(f"values must have the shape (chain, draw), got {values.shape}")
    why = refusal(values, least)
    if why is not None:
        raise ArgumentError(why)
    return values


def _split(values: np.ndarray) -> np.ndarray:
    """Each chain as two of half its length; the middle draw of an odd number is left out."""
    half = values.shape[1] // 2
    return np.concatenate([values[:, :half], values[:, -half:]])


def _normal_scores(values: np.ndarray) -> np.ndarray:
    """Normal quantiles of (rank - 3/8) / (n + 1/4), ranks of ties averaged; shape of `values`."""
    from scipy.special import ndtri

    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return ndtri((ranks - 3 / 8) / (values.size + 1 / 4))[index].reshape(values.shape)


def _plain_rhat(values: np.ndarray) -> float:
    draws = values.shape[1]
    between, within = draws * values.mean(1).var(ddof=1), values.var(1, ddof=1).mean()
    if within == 0:  # folded values may be constant where the values are not
        return math.inf if between > 0 else 1.0
    return math.sqrt((between / within + draws - 1) / draws)


def _autocovariance(values: np.ndarray) -> np.ndarray:
    """Of each row at every lag, divided by the number of draws; shape of `values`."""
    draws = values.shape[1]
    size = 1 << (2 * draws - 1).bit_length()
    spectrum = np.fft.rfft(values - values.mean(1, keepdims=True), size, axis=1)
    return np.fft.irfft(np.abs(spectrum) ** 2, size, axis=1)[:, :draws] / draws


def _ess(values: np.ndarray) -> float:
    """Draws / tau of all chains, tau by Geyer's initial monotone sequence; NaN where no chain's halves vary."""
    chains, draws = values.shape
    covariance = _autocovariance(values).mean(0)
    within = covariance[0] * draws / (draws - 1)
    total = covariance[0] + (float(values.mean(1).var(ddof=1)) if chains > 1 else 0.0)
    if total == 0:
        return math.nan
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    even, odd = rho[0 : draws - 1 : 2], rho[1:draws:2]
    pairs = even + odd  # of neighbouring lags: for a reversible chain these are positive and fall
    end = max(0, (draws - 3) // 2)  # later pairs rest on too few draws
    end = next((j for j in range(end) if pairs[j] <= 0), end)
    tau = -1 + 2 * float(np.minimum.accumulate(pairs[:end]).sum())
    if even[end] > 0 or (end and pairs[end] >= 0):
        tau += float(even[end])
    return values.size / max(tau, 1 / math.log10(values.size))
