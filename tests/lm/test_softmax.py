"""The compiled softmax and its torch twin against the plain NumPy form.

The bounds asserted are those that `powermc.lm.softmax` and `powermc.lm.softmax_torch` state.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from scipy.special import logsumexp

from powermc.choices import inverse_cdf
from powermc.errors import ArgumentError
from powermc.lm import softmax, softmax_numba, softmax_torch
from powermc.lm.softmax import NO_MASKS, Rows, log_softmax, softmax_rows
from powermc.lm.softmax_torch import evaluate_logits


class Form(NamedTuple):
    """A form of the function with its stated errors: of sums, relative to 1 + |value|, and of a draw's boundaries."""

    accumulate: torch.dtype | None
    of_sums: float
    of_mass: float

    def __call__(
        self, logits: np.ndarray, exponents: Any, uniform: Any, token: Any = None, masks: Any = None, mask: Any = None
    ) -> Rows:
        powers, u = np.array(exponents, dtype=float), np.array(uniform, dtype=float)
        given = np.full(len(u), -1) if token is None else np.array(token)
        hidden = NO_MASKS if masks is None else np.array(masks)
        if self.accumulate is None:
            return softmax_rows(logits, powers, u, given, 1, hidden, mask)
        return softmax_torch.softmax_torch(torch.from_numpy(logits), powers, u, given, hidden, mask, self.accumulate)


FORMS = {
    "numba": Form(None, 1e-12, 1e-12),
    "torch": Form(torch.float64, 1e-12, 1e-12),
    "torch-float32": Form(torch.float32, 1e-4, 1e-5),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
EXPONENTS = [0.5, 1.0, 2.0, 3.7, 4.0, 8.0]


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


@each_form
@pytest.mark.parametrize("bad", [[np.nan, 0.0], [np.inf, 0.0], [0.0, np.nan], [-np.inf, -np.inf], [-np.inf, np.nan]])
def test_damaged_rows_are_marked_and_alone(form: Form, bad: list[float]) -> None:
    logits = np.array([bad, [0.0, 1.0]], dtype=np.float32)
    out = form(logits, np.ones((2, 1)), [0.5, 0.5])
    assert out.finite.tolist() == [False, True]
    assert out.token[1] in (0, 1)


def test_slack_is_the_distance_to_the_boundary() -> None:
    """p = (.25, .75): u = .2 lies .05 below the boundary."""
    logits = np.log(np.array([[0.25, 0.75]]))
    out = softmax_rows(logits, np.ones((1, 1)), np.array([0.2]), np.full(1, -1))
    assert out.token[0] == 0
    assert out.slack[0] == pytest.approx(0.05)


@each_form
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 511, 512, 1299])
def test_one_damaged_logit_anywhere(form: Form, bad: float, at: int) -> None:
    logits = rows(0, 3, 1300, 3.0, "float32")
    logits[1, at] = bad
    assert form(logits, np.full((3, 1), 4.0), [0.5] * 3).finite.tolist() == [True, False, True]


def varied(vocab: int, dtype: str) -> np.ndarray:
    """Rows of every kind: usual, nearly flat, huge, tied at the top, mostly -inf, all -inf but one."""
    out = rows(vocab, 6, vocab, 3.0, dtype)
    out[1] /= 3e3
    out[2] *= 1e5
    out[3, [0, -1]] = 130.0
    out[4, np.random.default_rng(1).random(vocab) < 0.95] = -np.inf
    out[4, vocab // 2] = 101.0
    out[5] = -np.inf
    out[5, vocab - 1] = -3e4
    return out


@each_form
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(3, "float32"), (3, "float64"), (50, "float32"), (50, "float64"), (49_152, "float64"), (152_064, "float32")],
)
def test_errors_are_as_stated(form: Form, vocab: int, dtype: str) -> None:
    """Every field, over six kinds of rows; each row draws at another exponent. Slack too, hence both boundaries."""
    logits = varied(vocab, dtype)
    exponents = np.array([np.roll(EXPONENTS, shift) for shift in range(6)])
    uniform = np.random.default_rng(2).random(6)
    out = form(logits, exponents, uniform)
    assert out.finite.all()
    for i, row in enumerate(logits.astype(np.float64)):
        gaps = row - row.max()
        log_p = gaps - logsumexp(gaps)
        p = np.exp(log_p)
        second, first = np.sort(p)[-2:]

        def close(value: float, error: float = form.of_sums) -> object:
            return pytest.approx(value, abs=error * (1 + abs(value)))

        assert out.log_p[i] == close(log_p[out.token[i]])
        assert out.entropy[i] == close(-(p[p > 0] * log_p[p > 0]).sum())
        assert out.margin[i] == pytest.approx(first - second, abs=form.of_mass)
        for log_z, exponent in zip(out.log_z[i], exponents[i], strict=True):
            assert log_z == close(logsumexp(exponent * log_p))
        weights = np.exp((exponents[i, 0] * gaps).astype(np.longdouble))
        reached = np.concatenate([[0], weights.cumsum() / weights.sum()])
        token, u = out.token[i], uniform[i]
        assert weights[token] > 0
        assert out.slack[i] >= 0
        below, above = float(u - reached[token]), float(reached[token + 1] - u)
        assert out.slack[i] == pytest.approx(max(min(below, above), 0.0), abs=form.of_mass)
        assert min(below, above) >= -form.of_mass
        if out.slack[i] > form.of_mass + 1e-16 * vocab:
            assert token == inverse_cdf(exponents[i, 0] * log_p, u)
    assert out.margin[3] == 0
    assert (out.log_z[exponents == 1.0] == 0).all()


def test_the_exponential() -> None:
    """Within 4e-16 of itself down to e^-708; 0 beyond, NaN for NaN."""

    @njit
    def compiled(x: np.ndarray, out: np.ndarray) -> None:
        for j in range(len(x)):
            out[j] = softmax_numba._exp(x[j])

    rng = np.random.default_rng(0)
    x = -np.concatenate([rng.random(1000) * 708, rng.random(1000), 10 ** rng.uniform(-20, 0, 200), [0.0, 708.0]])
    out = np.empty_like(x)
    compiled(x, out)
    for value, w in zip(x.tolist(), out.tolist(), strict=True):
        exact = Decimal(value).exp()
        assert abs(Decimal(w) - exact) <= Decimal("4e-16") * exact
    beyond = np.array([-708.1, -1e308, -np.inf, np.nan])
    out = np.empty_like(beyond)
    compiled(beyond, out)
    assert out[:3].tolist() == [0, 0, 0]
    assert np.isnan(out[3])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_and_company_change_no_bit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, two and three threads, and every row by itself: the same bits; never more threads than asked for."""
    logits = np.concatenate([varied(49_152, dtype), rows(7, 1, 49_152, 1.0, dtype)])
    masks = np.random.default_rng(3).random((1, 49_152)) < 0.5
    mask = np.where(np.arange(21).reshape(7, 3) % 4 == 0, 0, -1)
    exponents = np.array([np.roll([4.0, 3.7, 1.0], shift) for shift in range(7)])
    uniform, token = np.random.default_rng(4).random(7), np.full(7, -1)
    started = []

    class Counted(softmax.Thread):
        def start(self) -> None:
            started.append(self)
            super().start()

    monkeypatch.setattr(softmax, "Thread", Counted)
    alone = softmax_rows(logits, exponents, uniform, token, 1, masks, mask)
    assert not started
    for threads, others in ((2, 1), (3, 2), (100, 6)):
        started.clear()
        for one, many in zip(alone, softmax_rows(logits, exponents, uniform, token, threads, masks, mask), strict=True):
            np.testing.assert_array_equal(one, many)
        assert len(started) == others
    for i in range(7):
        at = slice(i, i + 1)
        row = softmax_rows(logits[at], exponents[at], uniform[at], token[at], 1, masks, mask[at])
        for one, many in zip(row, alone, strict=True):
            np.testing.assert_array_equal(one, many[at])


def test_small_work_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "Thread", None)
    assert softmax_rows(np.zeros((9, 3)), np.ones((9, 1)), np.full(9, 0.5), np.full(9, -1), 2).finite.all()


@each_form
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("masked", [False, True])
def test_frequencies_over_all_uniforms(form: Form, exponent: float, masked: bool) -> None:
    """Every u on a grid of n points: each token is drawn p^e / Z times n, up to the one point at each boundary."""
    n = 5000
    p = np.array([0.0, 0.2, 0.05, 0.0, 0.5, 0.25, 0.0])
    left_out = np.array([[False, True, False, True, False, True, False]])
    with np.errstate(divide="ignore"):
        logits = np.repeat(np.log(p)[None] + 7, n, axis=0)
    grid, which = (np.arange(n) + 0.5) / n, np.full((n, 1), 0 if masked else -1)
    out = form(logits, np.full((n, 1), exponent), grid, masks=left_out, mask=which)
    weights = np.where(masked & left_out[0], 0, p**exponent)
    counts = np.bincount(out.token, minlength=7)
    assert counts == pytest.approx(n * weights / weights.sum(), abs=1.0)
    assert (counts[weights == 0] == 0).all()
    assert out.log_z[0, 0] == pytest.approx(np.log(weights.sum()), abs=form.of_sums)


@each_form
@pytest.mark.parametrize("exponent", [1.0, 4.0, 0.3])
def test_no_token_of_zero_weight_at_either_end(form: Form, exponent: float) -> None:
    """u = 0 and the largest u below 1, where blocks of zero weight stand before and behind the others."""
    logits = np.full((2, 2600), -np.inf, dtype=np.float32)
    logits[:, 600:1900] = rows(1, 2, 1300, 3.0, "float32", banned=0.5)
    logits[:, 600] = logits[:, 1899] = -np.inf
    out = form(logits, np.full((2, 1), exponent), [0.0, np.nextafter(1, 0)])
    support = np.flatnonzero(logits[0] > -np.inf)
    assert out.token[0] == support[0]
    assert logits[1, out.token[1]] > -np.inf
    assert out.slack[0] == 0


@each_form
def test_given_tokens(form: Form) -> None:
    """Scored, not drawn: log p may be -inf, -1 scores nothing."""
    logits = np.log([[0.25, 0.75], [1.0, 1e-300], [0.5, 0.5]])
    logits[1, 1] = -np.inf
    out = form(logits, np.full((3, 1), 4.0), [np.nan] * 3, [1, 1, -1])
    assert out.token.tolist() == [1, 1, -1]
    assert out.log_p == pytest.approx([np.log(0.75), -np.inf, 0.0], abs=form.of_sums)
    assert out.slack.tolist() == [1, 1, 1]
    for token in (2, -2):
        with pytest.raises(ArgumentError, match=rf"token {token} is not in the vocabulary: give one of 0\.\.1, or -1"):
            form(logits, np.ones((3, 1)), [np.nan] * 3, [0, token, 0])


@each_form
def test_drawn_and_given_rows_side_by_side(form: Form) -> None:
    logits = rows(5, 4, 700, 3.0, "float32")
    out = form(logits, np.full((4, 1), 2.0), [0.3, np.nan, 0.9, np.nan], [-1, 5, -1, 6])
    alone = form(logits[[0, 2]], np.full((2, 1), 2.0), [0.3, 0.9])
    assert out.token.tolist() == [alone.token[0], 5, alone.token[1], 6]
    assert (out.slack < 1).tolist() == [True, False, True, False]


@each_form
def test_laws_that_leave_tokens_out(form: Form) -> None:
    """Each exponent its own mask; what is left may be as unlikely as it likes; nothing left is -1 and -inf."""
    logits = np.array([[0.0, -900.0, -901.0], [3.0, 2.0, -np.inf], [3.0, 2.0, 1.0]])
    masks = [[True, False, False], [True, True, False]]
    out = form(logits, [[4.0, 1.0]] * 3, [0.999, 0.5, 0.5], masks=masks, mask=np.array([[0, -1], [1, 0], [-1, 1]]))
    assert out.token.tolist() == [2, -1, 0]
    assert out.log_p[:2] == pytest.approx([-901.0, 0.0], abs=form.of_sums * 1000)
    assert out.slack[:2] == pytest.approx([0.001, 1.0], abs=form.of_mass)
    log_p = logits - logsumexp(logits, axis=1)[:, None]
    expected = [[-3600 + np.log1p(np.exp(-4.0)), 0.0], [-np.inf, log_p[1, 1]], [logsumexp(4 * log_p[2]), log_p[2, 2]]]
    np.testing.assert_allclose(out.log_z, expected, rtol=form.of_sums, atol=form.of_sums)


@each_form
def test_masks_at_full_size(form: Form) -> None:
    """A masked law is that of the row with -inf where the mask holds; entropy and margin stay those of the row."""
    logits = rows(6, 2, 49_152, 3.0, "float32", banned=0.3)
    mask = np.random.default_rng(5).random((1, 49_152)) < 0.5
    mask[0, logits.argmax(1)] = True
    laws, uniform = [[4.0, 3.7], [3.7, 1.0]], [0.4, 0.7]
    out = form(logits, laws, uniform, masks=mask, mask=np.zeros((2, 2), int))
    whole = form(logits, laws, uniform)
    without = np.where(mask, -np.inf, logits).astype(np.float64)
    for i in range(2):
        log_total = logsumexp(logits[i].astype(np.float64))
        for e, exponent in enumerate(laws[i]):
            expected = logsumexp(exponent * (without[i] - log_total))
            assert out.log_z[i, e] == pytest.approx(expected, abs=form.of_sums * (1 + abs(expected)))
        assert out.token[i] == inverse_cdf(laws[i][0] * without[i], uniform[i])
        assert out.log_p[i] == pytest.approx(logits[i, out.token[i]] - log_total, abs=form.of_sums * 20)
    assert (out.entropy == whole.entropy).all()
    assert (out.margin == whole.margin).all()


@each_form
def test_exponent_zero_is_uniform_over_the_support(form: Form) -> None:
    logits = np.array([[-np.inf, 5.0, -np.inf, -2000.0, 0.0, 1.0]] * 4)
    out = form(logits, np.zeros((4, 1)), np.arange(4) / 4 + 0.1)
    assert out.token.tolist() == [1, 3, 4, 5]
    assert out.log_z == pytest.approx(np.log(4), abs=form.of_sums)
    out = form(logits[:1], np.zeros((1, 1)), [0.5], masks=[[False, True, True, True, True, True]], mask=np.array([[0]]))
    assert (out.token[0], out.log_z[0, 0]) == (-1, -np.inf)


def test_a_goal_that_rounding_put_before_the_block() -> None:
    """The sum so far exceeds it already: then the first token of positive weight is drawn, not the first one."""
    weights = np.array([[0.0, 0.0, 0.25, 0.5, 0.0]])
    for goal, place in ((0.1, 2), (0.3, 2), (0.5, 3), (0.95, 3), (1.2, 3)):
        found = softmax_torch._find(torch.from_numpy(weights), torch.tensor([goal]), torch.tensor([0.2]))
        assert found[0].tolist() == [place]
        assert softmax_numba._find(weights[0], goal, 0.2)[0] == place


@each_form
@pytest.mark.parametrize("vocab", [5, 60_000])
def test_no_rows(form: Form, vocab: int) -> None:
    out = form(np.zeros((0, vocab), np.float32), np.zeros((0, 2)), [])
    assert [field.shape for field in out] == [(0,)] * 5 + [(0, 2), (0,)]


def test_the_twin_works_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more logits at a time than a chunk holds, one row at least; the answers are put together in order."""
    logits = rows(8, 9, 1000, 3.0, "float32")
    laws, uniform = np.full((9, 1), 4.0), np.random.default_rng(6).random(9)
    whole = FORMS["torch"](logits, laws, uniform)
    work, shapes = softmax_torch._chunk, []

    def watched(part: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(part.shape))
        return work(part, *rest)

    monkeypatch.setattr(softmax_torch, "_chunk", watched)
    for size, expected in ((2500, [2, 2, 2, 2, 1]), (999, [1] * 9)):
        monkeypatch.setattr(softmax_torch, "_CHUNK", size)
        shapes.clear()
        parts = FORMS["torch"](logits, laws, uniform)
        assert shapes == [(n, 1000) for n in expected]
        for one, many in zip(whole, parts, strict=True):
            np.testing.assert_allclose(one, many, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_device_decides(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors of any type and layout go to numba, with threads; others to torch as they are, untouched."""
    logits = torch.from_numpy(rows(9, 50, 6, 3.0, "float64").T).to(dtype).requires_grad_()
    laws, uniform, token = np.full((6, 1), 4.0), np.full(6, 0.5), np.full(6, -1)
    wide = logits.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous().numpy()
    for one, many in zip(
        evaluate_logits(logits, laws, uniform, token, 2), softmax_rows(wide, laws, uniform, token), strict=True
    ):
        np.testing.assert_array_equal(one, many)
    elsewhere, seen = torch.empty(6, 50, device="meta", dtype=dtype), []
    monkeypatch.setattr(softmax_torch, "softmax_torch", lambda *args: seen.append(args))
    evaluate_logits(elsewhere, laws, uniform, token, 2, NO_MASKS, None)
    assert seen[0][0] is elsewhere
    assert [id(a) for a in seen[0][1:]] == [id(a) for a in (laws, uniform, token, NO_MASKS, None)]
