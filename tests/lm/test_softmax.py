"""The compiled softmax against the plain NumPy form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp

from powermc.choices import inverse_cdf
from powermc.lm.softmax import log_softmax, softmax_rows


def rows(seed: int, n: int, vocab: int, spread: float, dtype: str, banned: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(n, vocab)) * spread + 100).astype(dtype)
    mask = rng.random(logits.shape) < banned
    mask[:, 0] = False
    logits[mask] = -np.inf
    return logits


@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 60),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
    dtype=st.sampled_from(["float32", "float64"]),
    banned=st.sampled_from([0.0, 0.6]),
    exponent=st.sampled_from([0.25, 1.0, 4.0]),
)
def test_equals_the_plain_form(
    seed: int, vocab: int, spread: float, dtype: str, banned: float, exponent: float
) -> None:
    """log p, entropy, both normalisers and the drawn token; the same uniform gives the same token as `inverse_cdf`."""
    logits = rows(seed, 5, vocab, spread, dtype, banned)
    uniform = np.random.default_rng(seed + 1).random(5)
    out = softmax_rows(logits, np.array([[exponent, 2.0]] * 5), uniform, np.full(5, -1))
    for i, row in enumerate(logits.astype(np.float64)):
        log_p = row - logsumexp(row)
        p = np.exp(log_p)
        assert out.finite[i]
        assert out.token[i] == inverse_cdf(exponent * log_p, uniform[i])
        assert out.log_p[i] == pytest.approx(log_p[out.token[i]], abs=1e-10)
        assert out.entropy[i] == pytest.approx(-(p[p > 0] * log_p[p > 0]).sum(), abs=1e-10)
        assert out.log_z[i] == pytest.approx([logsumexp(exponent * log_p), logsumexp(2 * log_p)], abs=1e-9)
        assert inverse_cdf(log_softmax(logits[i], exponent), uniform[i]) == out.token[i]


def test_large_vocabulary() -> None:
    """152k tokens, float32: float64 sums keep the normaliser to 1e-9."""
    logits = rows(0, 2, 152_064, 3.0, "float32")
    out = softmax_rows(logits, np.full((2, 1), 4.0), np.array([0.5, np.nan]), np.array([-1, 151_999]))
    log_p = logits.astype(np.float64) - logsumexp(logits.astype(np.float64), axis=1)[:, None]
    assert out.log_z[:, 0] == pytest.approx(logsumexp(4.0 * log_p, axis=1), abs=1e-9)
    assert out.token[0] == inverse_cdf(4.0 * log_p[0], 0.5)
    assert out.log_p[1] == pytest.approx(log_p[1, 151_999], abs=1e-9)


@pytest.mark.parametrize("bad", [[np.nan, 0.0], [np.inf, 0.0], [0.0, np.nan], [-np.inf, -np.inf], [-np.inf, np.nan]])
def test_damaged_rows_are_marked_and_alone(bad: list[float]) -> None:
    logits = np.array([bad, [0.0, 1.0]], dtype=np.float32)
    out = softmax_rows(logits, np.ones((2, 1)), np.array([0.5, 0.5]), np.full(2, -1))
    assert out.finite.tolist() == [False, True]
    assert out.token[1] in (0, 1)


def test_slack_is_the_distance_to_the_boundary() -> None:
    """p = (.25, .75): u = .2 lies .05 below the boundary."""
    logits = np.log(np.array([[0.25, 0.75]]))
    out = softmax_rows(logits, np.ones((1, 1)), np.array([0.2]), np.full(1, -1))
    assert out.token[0] == 0
    assert out.slack[0] == pytest.approx(0.05)
