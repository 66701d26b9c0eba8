"""Floating-point operations per token, from the weights and the configuration of a decoder.

A matrix product of an (m, k) with a (k, n) matrix counts 2 m k n; norms, activations, softmax and rotary positions,
below 1% of any model here, count nothing. Attention counts every slot that a pass attends to, masked or not, as it
is computed. Checked against `torch.utils.flop_counter` in the tests, on more than fifty families.

What it does not know: attention with values of another width than those cached (DiffLlama: 11% short), layers between
the final norm and the head (ModernBERT's decoder), and the scans of recurrent layers (a hybrid's count as attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Cost:
    """FLOPs of one token.

    linear: per layer, its weights. attention: per layer and slot attended to, queries times keys and weights times
    values, all query heads. head: states to logits. width: of a state. expansion: per layer and slot attended to, once
    per row and pass: from what is cached to keys and values, where those are cached as latents.
    """

    linear: tuple[int, ...]
    attention: int
    head: int
    width: int
    expansion: int = 0

    def span(self, first: int, last: int, slots: float, tokens: float = 1) -> float:
        """FLOPs of one token through layers first..last-1 when it attends to `slots` positions, itself included.

        `tokens`: how many of its row run in the same pass.
        """
        return sum(self.linear[first:last]) + (last - first) * slots * (self.attention + self.expansion / tokens)

    def affine(self) -> int:
        """FLOPs of a full affine map of one state."""
        return 2 * self.width**2


def cost_of(blocks: nn.ModuleList, config: Any, key_dim: int, value_dim: int, head: nn.Module) -> Cost:
    """The cost of a decoder with these blocks. Experts count as many as a token is sent to (`num_experts_per_tok`)."""
    vocab, width = head.weight.shape  # type: ignore[misc]
    latent = getattr(config, "kv_lora_rank", None) is not None
    weights = [{n: _products(n, p, config) for n, p in block.named_parameters()} for block in blocks]
    expanding = [sum(flops for name, flops in block.items() if latent and "kv_b_proj" in name) for block in weights]
    linear = tuple(sum(block.values()) - of for block, of in zip(weights, expanding, strict=True))
    if latent:
        key_dim, value_dim = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    attention = 2 * getattr(config, "num_attention_heads", 0) * (key_dim + value_dim)
    return Cost(linear, attention, 2 * int(vocab) * int(width), int(width), max(expanding))  # type: ignore[arg-type]


def _products(name: str, parameter: nn.Parameter, config: Any) -> int:
    if name.endswith("bias"):  # those of experts are stacked
        return 0
    if parameter.ndim == 2:
        return 2 * parameter.numel()
    if parameter.ndim == 3:  # one matrix per expert
        sent = getattr(config, "num_experts_per_tok", None) or 1
        return 2 * parameter.numel() * min(sent, len(parameter)) // len(parameter)
    return 0
