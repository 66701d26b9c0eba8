"""Floating-point operations per token, from the weights and the configuration of a decoder.

A matrix product of an (m, k) with a (k, n) matrix counts 2 m k n; norms, activations, softmax and rotary positions,
below 1% of any model here, count nothing. Attention counts every slot that a pass attends to, masked or not, as it
is computed. Checked against `torch.utils.flop_counter` in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Cost:
    """FLOPs of one token.

    linear: per layer, its weights. attention: per layer and slot attended to, queries times keys and weights times
    values, all query heads. head: states to logits. width: of a state.
    """

    linear: tuple[int, ...]
    attention: int
    head: int
    width: int

    def span(self, first: int, last: int, slots: float) -> float:
        """FLOPs of one token through layers first..last-1 when it attends to `slots` positions, itself included."""
        return sum(self.linear[first:last]) + (last - first) * self.attention * slots

    def affine(self) -> int:
        """FLOPs of a full affine map of one state."""
        return 2 * self.width**2


def cost_of(blocks: nn.ModuleList, config: Any, key_dim: int, value_dim: int, head: nn.Module) -> Cost:
    """The cost of a decoder with these blocks. Experts count as many as a token is sent to (`num_experts_per_tok`)."""
    vocab, width = head.weight.shape  # type: ignore[misc]
    heads = config.num_attention_heads
    linear = tuple(sum(_products(p, config) for p in block.parameters()) for block in blocks)
    return Cost(linear, 2 * heads * (key_dim + value_dim), 2 * int(vocab) * int(width), int(width))  # type: ignore[arg-type]


def _products(parameter: nn.Parameter, config: Any) -> int:
    if parameter.ndim == 2:
        return 2 * parameter.numel()
    if parameter.ndim == 3:  # one matrix per expert
        sent = getattr(config, "num_experts_per_tok", None) or 1
        return 2 * parameter.numel() * min(sent, len(parameter)) // len(parameter)
    return 0
