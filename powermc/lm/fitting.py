"""Fitting exit heads: normal equations in a stream, the temperature by a search, the map refined on KL(p || p~).

With h the state at the exit and y that after the last layer (before the final norm), x = (h - mean h) / std h:

    W = argmin mean |W x - (y - mean y)|^2 + lambda |W|^2 = C (G + lambda I)^-1,  G = E[x x'],  C = E[(y - mean y) x'],
    A = W diag(1 / std h),  b = mean y - A mean h.

Standardised, the strength lambda has no unit, and is chosen by KL on validation text: states hold a few features that
are larger than all others together, so that neither a strength tied to their mean nor the squared error is a guide.

log sum_v exp(beta z_v) is convex in beta, and so is KL(p || softmax(beta z)): its minimum over the temperature 1 / beta
is bracketed by the sign of its derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from powermc.errors import ArgumentError
from powermc.lm.decoder import Decoder
from powermc.lm.heads import ExitHead

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths that validation chooses from."""

HEAD_ROWS = 64
"""Positions whose logits are held at once."""

_SCAN = tuple(2.0 ** (i / 2) for i in range(-8, 5))  # inverse temperatures 1/16 to 4
_COARSE = (0.5, 0.7, 0.85, 1.0, 1.2)  # where affine heads have it
_FLOOR = -1e30
_LEARNING_RATE, _TRAINED_AT_ONCE, _CHECKED_EVERY = 1e-3, 256, 25


class NormalEquations:
    """Sums over pairs (h, y), in float64: all that ridge regression needs, in memory that does not grow.

    2 width^2 + 4 width numbers.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        # Some accelerators have no float64: there the sums are taken on the CPU.
        self._device = device if device is not None and device.type != "mps" else torch.device("cpu")
        zeros = {"dtype": torch.float64, "device": self._device}
        self.n = 0
        self.h, self.y = torch.zeros(width, **zeros), torch.zeros(width, **zeros)
        self.hh, self.yh = torch.zeros(width, width, **zeros), torch.zeros(width, width, **zeros)
        self.yy = torch.zeros(width, **zeros)

    def add(self, h: torch.Tensor, y: torch.Tensor) -> None:
        """Count states h and y, each (n, width)."""
        h, y = h.to(self._device).double(), y.to(self._device).double()
        self.n += len(h)
        self.h += h.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum(0)
        self.hh.addmm_(h.T, h)
        self.yh.addmm_(y.T, h)

    def solve(self) -> Ridge:
        """Raises `ArgumentError` for fewer pairs than features, which leave the map undetermined."""
        width = len(self.h)
        if self.n <= width:
            raise ArgumentError(f"an affine map of {width} features needs at least {width + 1} tokens, got {self.n}")
        mean, target = self.h / self.n, self.y / self.n
        covariance = self.hh / self.n - torch.outer(mean, mean)
        scale = _scale(covariance.diagonal(), self.hh.diagonal() / self.n)
        spread = _scale(self.yy / self.n - target.square(), self.yy / self.n)
        gram = covariance / scale / scale[:, None]
        values, vectors = torch.linalg.eigh(gram)
        cross = (self.yh / self.n - torch.outer(target, mean)) / scale
        return Ridge(mean, scale, target, spread, values.clamp_min(0), vectors, cross @ vectors)


def _scale(variance: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Standard deviations; 1 for features that do not vary beyond rounding."""
    return torch.where(variance > 1e-12 * square, variance.clamp_min(0), torch.ones_like(variance)).sqrt()


@dataclass(frozen=True)
class Ridge:
    """The solution for every strength: one eigendecomposition of G serves all.

    mean, scale: of h. target, spread: mean and standard deviation of y. cross: C in the eigenbasis.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    target: torch.Tensor
    spread: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor
    cross: torch.Tensor

    def affine(self, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A (width, width) and b (width,) in float64. A strength of 0 leaves out directions that do not vary."""
        kept = self.values + strength
        inverse = torch.where(kept > 1e-12 * self.values[-1], 1 / kept, torch.zeros_like(kept))
        weight = (self.cross * inverse) @ self.vectors.T / self.scale
        return weight, self.target - weight @ self.mean


class Chunk(NamedTuple):
    """Some positions: states h at the exit, log p (n, V) of the full model there."""

    h: torch.Tensor
    log_p: torch.Tensor


Chunks = Callable[[], Iterator[Chunk]]
"""Goes through the validation text, a few positions at a time."""


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """log softmax in float32 or better."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def expected(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """sum_v p_v values_v along the last axis, where p_v = 0 excludes a value of -inf."""
    products = p * values
    return (products if torch.isfinite(values.amin()) else torch.where(p > 0, products, 0.0)).sum(-1)


def curve(
    decoder: Decoder, heads: Sequence[ExitHead], chunks: Chunks, betas: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """KL(p || p~) in nats per token and its derivative in beta, shape (heads, betas), at inverse temperatures beta.

    d/d beta KL = E_p~[z] - E_p[z], z the logits at temperature 1. The heads' own temperatures are not used.
    """
    plain = [replace(head, temperature=1.0) for head in heads]
    totals, n = np.zeros((2, len(heads), len(betas))), 0
    with torch.no_grad():
        for h, log_p in chunks():
            p = log_p.exp()
            fixed = expected(p, log_p)
            for j, head in enumerate(plain):
                z = head.logits(decoder, h, np.full(len(h), -1)).to(log_p.dtype).clamp_min_(_FLOOR)
                z -= z.amax(-1, keepdim=True)
                mean = expected(p, z)
                for i, beta in enumerate(betas):
                    weights = (z * beta).exp_()
                    total = weights.sum(-1)
                    totals[0, j, i] += float((fixed - beta * mean + total.log()).double().sum())
                    totals[1, j, i] += float((weights.mul_(z).sum(-1) / total - mean).double().sum())
            n += len(h)
    return totals[0] / n, totals[1] / n


Curve = Callable[[Sequence[float]], tuple[np.ndarray, np.ndarray]]
"""Values and derivatives, each (n,), of a convex function of the inverse temperature at n points."""


def search_temperature(evaluate: Curve, grid: Sequence[float] = _SCAN) -> tuple[float, float]:
    """The temperature of least KL, and that KL (nats).

    A grid brackets the zero of the derivative, a second one inside the bracket narrows it, linear interpolation finds
    it. A minimum beyond the ends of the grid (temperatures 1/4 to 16) is taken at the end.
    """
    values, slopes = evaluate(grid)
    above = int(np.searchsorted(slopes > 0, True))
    if above in (0, len(grid)):
        best = 0 if above == 0 else -1
        return 1 / float(grid[best]), float(values[best])
    fine = np.geomspace(grid[above - 1], grid[above], 7)
    values, slopes = evaluate([float(beta) for beta in fine])
    above = min(max(int(np.searchsorted(slopes > 0, True)), 1), len(fine) - 1)
    low, high, slope = fine[above - 1], fine[above], slopes[above - 1]
    rise = slopes[above] - slope
    step = min(max(-slope * (high - low) / rise, 0.0), high - low) if rise > 0 else 0.0
    return 1 / float(low + step), float(max(values[above - 1] + slope * step / 2, 0.0))


def with_temperature(
    decoder: Decoder, head: ExitHead, chunks: Chunks, grid: Sequence[float] = _SCAN
) -> tuple[ExitHead, float]:
    """The head at the temperature of least KL on the validation text, and that KL (nats per token)."""

    def evaluate(betas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = curve(decoder, [head], chunks, betas)
        return values[0], slopes[0]

    temperature, kl = search_temperature(evaluate, grid)
    return replace(head, temperature=temperature), kl


def ridge(
    decoder: Decoder, layer: int, solution: Ridge, chunks: Chunks, strengths: Sequence[float] = STRENGTHS
) -> tuple[ExitHead, float, float]:
    """The head and the strength of least KL on the validation text, each at its best temperature; and that KL.

    The temperatures of all strengths are compared on a grid; that of the best is then searched for.
    """
    heads = [affine_head(decoder, layer, *solution.affine(strength)) for strength in strengths]
    values, _ = curve(decoder, heads, chunks, _COARSE)
    best = int(values.min(1).argmin())
    head, kl = with_temperature(decoder, heads[best], chunks, (_SCAN[0], *_COARSE, _SCAN[-1]))
    return head, strengths[best], kl


def affine_head(
    decoder: Decoder, layer: int, weight: torch.Tensor, bias: torch.Tensor, kind: str = "ridge"
) -> ExitHead:
    """The head of an affine map, in the dtype of the model."""
    return ExitHead(layer, kind, 1.0, weight, bias).to(decoder.device, decoder.dtype)


class Refinement:
    """Adam on the affine map of one head, the loss KL(p || p~) at the head's temperature.

    The map is written y = mean y + std y * (W x + c) in standardised features x, so that one learning rate suits all
    of its entries; it falls linearly to 0. `best` is the head of least KL on the validation text of all that were
    seen, the first one included.
    """

    def __init__(self, decoder: Decoder, head: ExitHead, solution: Ridge, chunks: Chunks, steps: int) -> None:
        self._decoder, self._head, self._solution, self._chunks = decoder, head, solution, chunks
        assert head.weight is not None
        assert head.bias is not None
        weight, bias = head.weight.to(solution.mean), head.bias.to(solution.mean)
        rest = (weight @ solution.mean + bias - solution.target) / solution.spread
        start = (weight * solution.scale / solution.spread[:, None], rest)
        dtype = torch.promote_types(decoder.dtype, torch.float32)
        self._parameters = [t.to(decoder.device, dtype).requires_grad_() for t in start]
        self._adam = torch.optim.Adam(self._parameters, lr=_LEARNING_RATE)
        self._fall = torch.optim.lr_scheduler.LinearLR(self._adam, 1.0, 1.0 / steps, steps)
        self.best, self.kl, self._done = replace(head, kind="kl"), self._validate(head), 0

    def _validate(self, head: ExitHead) -> float:
        return float(curve(self._decoder, [head], self._chunks, [1 / head.temperature])[0][0, 0])

    def step(self, h: torch.Tensor, log_p: torch.Tensor) -> None:
        """One step of Adam on states h (n, width) with log p (n, V)."""
        s, (weight, rest) = self._solution, self._parameters
        x = ((h.to(s.mean) - s.mean) / s.scale).to(weight)
        y = s.target.to(weight) + s.spread.to(weight) * (x @ weight.T + rest)
        logits = self._decoder.head(self._decoder.finish(y.to(self._decoder.dtype)))
        log_q = torch.log_softmax(logits.to(log_p.dtype) / self._head.temperature, dim=-1)
        loss = -expected(log_p.exp(), log_q).mean()
        for parameter, gradient in zip(self._parameters, torch.autograd.grad(loss, self._parameters), strict=True):
            parameter.grad = gradient
        self._adam.step()
        self._fall.step()
        self._done += 1
        if self._done % _CHECKED_EVERY == 0:
            self.check()

    def check(self) -> None:
        """Compare the map as it is now with the best so far."""
        s, (weight, rest) = self._solution, (p.detach().to(self._solution.mean) for p in self._parameters)
        weight = weight * s.spread[:, None] / s.scale
        bias = s.target + s.spread * rest - weight @ s.mean
        head = affine_head(self._decoder, self._head.layer, weight, bias, "kl")
        head = replace(head, temperature=self._head.temperature)
        if (kl := self._validate(head)) < self.kl:
            self.best, self.kl = head, kl


def thinned(h: torch.Tensor, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of a batch for one step of refinement, evenly spaced."""
    every = math.ceil(len(h) / _TRAINED_AT_ONCE)
    return h[::every], normed[::every]
