"""`powermc.lm.softmax` for logits on an accelerator (torch): they stay there, only what comes out of them is fetched.

Sums are float64 where the device has it, with the errors of `powermc.lm.softmax`. Else (mps) they are float32: then
log p, log Z and entropy are right to 1e-4 (1 + |value|) nats, margin and a draw's boundaries to 1e-5 of the mass. In
either case a token of zero weight is never drawn.
"""

from __future__ import annotations

import numpy as np
import torch

from powermc.lm.softmax import NO_MASKS, Rows, check_tokens, softmax_rows

_CHUNK = 2**22  # logits worked on at a time: at most four temporaries of as many numbers, 32 MiB each in float64
_BLOCK = 512


def evaluate_logits(
    logits: torch.Tensor,
    exponents: np.ndarray,
    uniform: np.ndarray,
    token: np.ndarray,
    threads: int = 1,
    masks: np.ndarray = NO_MASKS,
    mask: np.ndarray | None = None,
) -> Rows:
    """`softmax_rows` of logits (A, V) of any floating type, where they live: numba on the CPU, torch elsewhere."""
    if logits.device.type != "cpu":
        return softmax_torch(logits, exponents, uniform, token, masks, mask)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return softmax_rows(wide.detach().contiguous().numpy(), exponents, uniform, token, threads, masks, mask)


@torch.no_grad()
def softmax_torch(
    logits: torch.Tensor,
    exponents: np.ndarray,
    uniform: np.ndarray,
    token: np.ndarray,
    masks: np.ndarray = NO_MASKS,
    mask: np.ndarray | None = None,
    dtype: torch.dtype | None = None,
) -> Rows:
    """`softmax_rows`, its parameters and errors, in torch. `dtype`: of the sums, by default the device's best."""
    n, laws = exponents.shape
    vocab, device = logits.shape[1], logits.device
    check_tokens(token, vocab)
    mask = np.full((n, laws), -1) if mask is None else mask
    dtype = dtype or (torch.float32 if device.type == "mps" else torch.float64)
    hidden = torch.from_numpy(masks).to(device)
    table = np.zeros((n, 6 + laws))
    step = max(_CHUNK // vocab, 1)
    for rows in (slice(begin, begin + step) for begin in range(0, n, step)):
        powers = torch.from_numpy(exponents[rows]).to(device, dtype)
        table[rows] = _chunk(logits[rows], powers, uniform[rows], token[rows], hidden, mask[rows]).cpu().numpy()
    finite, drawn, log_p, entropy, margin, slack = table[:, :6].T
    return Rows(finite == 1, drawn.astype(np.int64), log_p, entropy, margin, table[:, 6:], slack)


def _chunk(
    logits: torch.Tensor,
    exponents: torch.Tensor,
    uniform: np.ndarray,
    given: np.ndarray,
    hidden: torch.Tensor,
    mask: np.ndarray,
) -> torch.Tensor:
    """Shape (rows, 6 + E), in the type of `exponents`: finite, token, log p, entropy, margin, slack, every log Z."""
    dtype, device = exponents.dtype, exponents.device
    largest = logits.topk(min(2, logits.shape[1])).values.to(dtype)
    gaps = logits.to(dtype) - largest[:, :1]
    base = gaps.exp()
    total = base.sum(1)
    log_total = total.log()
    # exp of -1e3 is 0, and 0 times infinity NaN
    entropy = (log_total - base.mul_(gaps.clamp_min(-1e3)).sum(1) / total).clamp_min(0)
    margin = (1 - (largest[:, 1:] - largest[:, :1]).exp().sum(1)) / total
    del base

    token = torch.from_numpy(given).to(device, torch.int64)
    slack = torch.ones_like(total)
    log_z = torch.zeros_like(exponents)
    for e in range(exponents.shape[1]):
        law, peak = gaps, torch.zeros_like(total)
        if (mask[:, e] >= 0).any():
            which = torch.from_numpy(mask[:, e]).to(device)
            law = gaps.masked_fill(hidden[which.clamp_min(0)] & (which >= 0)[:, None], -torch.inf)
            peak = law.amax(1)
            peak = peak.where(peak > -torch.inf, 0)
        weights = ((law - peak[:, None]) * exponents[:, e, None]).exp_().masked_fill_(law == -torch.inf, 0)
        log_z[:, e] = weights.sum(1).log() + exponents[:, e] * (peak - log_total)
        if e == 0 and not np.isnan(uniform).all():
            u = torch.from_numpy(uniform).to(device, dtype)
            drawn, distance = _draw(weights, u)
            token, slack = drawn.where(u == u, token), distance.where(u == u, slack)
    of_token = gaps.gather(1, token.clamp_min(0)[:, None])[:, 0] - log_total
    log_p = of_token.where(token >= 0, 0)
    finite = total.isfinite()  # NaN where a logit is NaN or +inf, or all are -inf
    columns = [finite.to(dtype), token.to(dtype), log_p, entropy, margin, slack]
    return torch.cat([torch.stack(columns, 1), log_z], 1)


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row by inverse CDF, -1 where all weights (rows, V) are 0; and its slack, 1 there."""
    rows, vocab = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -vocab % _BLOCK)).view(rows, -1, _BLOCK)
    sums = blocks.sum(2)
    mass = sums.cumsum(1)[:, -1]
    goal = uniform * mass
    b, before, _ = _find(sums, goal, torch.zeros_like(mass))
    place, before, reached = _find(blocks[torch.arange(rows, device=b.device), b], goal, before)
    left = mass > 0
    slack = (torch.minimum(reached - goal, goal - before) / mass).clamp_min(0)
    return (b * _BLOCK + place).clamp_max(vocab - 1).where(left, -1), slack.where(left, 1)


def _find(
    weights: torch.Tensor, goal: torch.Tensor, reached: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row the first place of positive weight where `reached` and the weights up to it exceed the goal, else the
    last of positive weight; and the sums before it and with it.

    A parallel sum need not be monotone in its last bit: hence the question for the weight itself.
    """
    sums = weights.cumsum(1) + reached[:, None]
    positive = weights > 0
    over = positive & (sums > goal[:, None])
    last = weights.shape[1] - 1 - positive.flip(1).byte().argmax(1)
    place = over.byte().argmax(1).where(over.any(1), last)
    at = place[:, None]
    upto = sums.gather(1, at)[:, 0]
    return place, upto - weights.gather(1, at)[:, 0], upto
