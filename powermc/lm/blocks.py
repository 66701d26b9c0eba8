"""A pass through a span of decoder blocks in one compiled call, for the blocks that most checkpoints are made of.

Run module by module, a decode pass of a 135M model spends as long on two thousand small operations as on reading its
weights. Where every block is an RMS norm, attention over all positions (rotary), an RMS norm and a SwiGLU, nothing of
it modified or watched, the whole span runs in one call (`powermc.lm.blocks_numba`); the body's own forward still makes
the embeddings, the rotary angles and the final norm. Everything else runs block by block, as its owner wrote it.

That a block does what is compiled here is not taken from its name alone: `Decoder` compares the logits of both with the
model's plain forward before it uses either.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import nn

from powermc.lm import blocks_numba as compiled
from powermc.lm.lean import Numbers
from powermc.lm.product import available, barrier, together
from powermc.lm.rows import Rows, SlotCache
from powermc.lm.tiles import MOST_LANES, TILE, lanes_for

KNOWN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Blocks of transformers that are made so."""

_LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_ACTIVATIONS = ("SiLU", "SiLUActivation")
_EPSILONS = ("variance_epsilon", "eps")
_GLOBAL_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
)


class Compiled:
    """Compiled passes through the blocks of one decoder; None of its weights is copied.

    `usable` says, before every pass, whether nothing has been changed that it would not see; `fits` whether the blocks
    are of a kind that is compiled here.
    """

    def __init__(self, blocks: nn.ModuleList, rows: Rows) -> None:
        self._blocks, self._rows = blocks, rows
        self._modules: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._slots: list[tuple[dict[str, Any], str, torch.Size | None]] = []
        self._watched: list[dict[str, Any]] = []
        self._plain = Numbers([])
        self.fits = False

    def usable(self, cache: Any) -> bool:
        """Whether a pass over the slots that this cache is aimed at can be run here."""
        if not isinstance(cache, SlotCache) or not available() or torch.is_grad_enabled():
            return False
        if cache.slots.shape[0] > MOST_LANES or not 1 <= int((cache.slots != cache.rows.length).sum()) <= MOST_LANES:
            return False
        if not self._modules or any(now != then for now, then in self._modules) or self._plain.changed():
            self._learn()
        if not self.fits or any(_GLOBAL_HOOKS):
            return False
        for own in self._watched:
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                return False
        # What is read by address must be what it was taken for: a weight may have been replaced, or set to other data.
        return all(
            (p is None and name == "bias")
            or (p is not None and p.dtype is torch.float32 and p.is_cpu and p.is_contiguous() and p.shape == shape)
            for p, (_, name, shape) in zip(self._tensors(), self._slots, strict=True)
            if shape is not None
        )

    def _learn(self) -> None:
        """Look at the blocks anew: some module has been replaced, or a number that is no parameter set."""
        modules = list(self._blocks.modules())
        self._watched = [m.__dict__ for m in modules]
        self._modules = [(m._modules, dict(m._modules)) for m in modules]
        self._plain = Numbers(modules)
        known = [(block, part) for block in self._blocks if (part := _parts(block)) is not None]
        parts, numbers = [part for _, part in known], {_numbers(*one) for one in known}
        shapes = {tuple(None if m is None else tuple(m.weight.shape) for m in part) for part in parts}
        keys, values = self._rows.keys, self._rows.values
        self.fits = (
            len(parts) == len(self._blocks)
            and len(shapes) == len(numbers) == 1
            and None not in next(iter(numbers))
            and keys.dtype == torch.float32
            and keys.shape[2:] == values.shape[2:]
        )
        if self.fits:
            first: Any = self._blocks[0]
            attention, (q, _, _, _, gate) = first.self_attn, parts[0][4:9]
            self._dim = attention.head_dim
            self._heads, self._groups = q.out_features // self._dim, keys.shape[2]
            self._width, self._middle = q.in_features, gate.out_features
            none: dict[str, Any] = {}
            self._slots = [
                (none, name, None)
                if m is None
                else (m._parameters, name, m.weight.shape if name == "weight" else m.weight.shape[:1])
                for part in parts
                for m, names in zip(part, [["weight"]] * 4 + [["weight", "bias"]] * 7, strict=True)
                for name in names
            ]
            self._numbers = np.array(next(iter(numbers))[:3], np.float32)

    def _tensors(self) -> list[torch.Tensor | None]:
        """Per block: four norms, then seven matrices, each followed by its bias."""
        return [own.get(name) for own, name, _ in self._slots]

    def __call__(
        self, first: int, last: int, states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], cache: SlotCache
    ) -> torch.Tensor:
        """States (A, Q, width) after blocks first..last-1; keys and values go to the cache's slots (A, Q).

        `angles`: cosines and sines of the positions, (A or 1, Q, dim). Padding (slots in the bin) stays as it is.
        """
        rows = self._rows
        real = cache.slots != rows.length
        slots, places = real.nonzero()[:, 0].contiguous(), cache.slots[real]
        given = states[real]
        n = len(given)
        lanes = int(lanes_for(n))
        packed = given.new_zeros(self._width, lanes)
        packed[:, :n] = given.T
        cos, sin = (a.expand(*real.shape, -1)[real].float().contiguous() for a in angles)
        sizes = 2 * (self._heads + self._groups) * self._dim + self._middle
        # Zeros: in lanes without a token may lie denormal numbers, and those take 100 times as long.
        scratch = given.new_zeros(sizes * lanes)
        addresses = [0 if t is None else t.data_ptr() for t in self._tensors()]
        weights = np.array(addresses, np.int64).reshape(-1, compiled.PER_LAYER)[first:last]
        counters = np.zeros((last - first, compiled.PHASES), np.int64)
        job = np.zeros(compiled.JOB, np.int64)
        job[:8] = lanes, self._width, self._heads, self._groups, self._dim, self._middle, last - first, n
        job[8:12] = weights.ctypes.data, packed.data_ptr(), cos.data_ptr(), sin.data_ptr()
        job[12:14] = slots.data_ptr(), places.data_ptr()
        job[14:16] = rows.keys[first].data_ptr(), rows.values[first].data_ptr()
        job[16:19] = rows.keys.stride()[:3]
        job[19:22] = scratch.data_ptr(), counters.ctypes.data, barrier()
        job[22:] = self._numbers.ctypes.data, torch.get_num_threads()
        together(compiled.run, (ctypes.c_int64 * compiled.JOB)(*job.tolist()))
        out = states.clone()
        out[real] = packed[:, :n].T
        return out


def _parts(block: Any) -> list[Any] | None:
    """Norms and matrices of a block, in the order of `blocks_numba`; None if it is not made of just these."""
    kind = type(block)
    if kind.__name__ not in KNOWN or not kind.__module__.startswith("transformers.models."):
        return None
    modules: Any = dict(block.named_modules())
    norms, matrices = [modules.get(name) for name in _NORMS], [modules.get(name) for name in _LINEAR]
    own = {"", "self_attn", "mlp", "mlp.act_fn", *_LINEAR, *_NORMS}
    if not set(modules) <= own or any(type(m) is not nn.Linear for m in matrices) or None in norms[:2]:
        return None
    if type(modules.get("mlp.act_fn")).__name__ not in _ACTIVATIONS:
        return None
    if (norms[2] is None) != (norms[3] is None):
        return None
    if any(not type(norm).__name__.endswith("RMSNorm") for norm in norms if norm is not None):
        return None
    weights = [m.weight for m in (*norms, *matrices) if m is not None]
    if any(not w.is_contiguous() or w.dtype != torch.float32 for w in weights) or any(
        m.weight.shape[0] % TILE for m in matrices
    ):
        return None
    return [*norms, *matrices]


def _numbers(block: Any, part: list[Any]) -> tuple[float | None, ...]:
    """Epsilon of the norms before the parts, and of those of queries and keys; scaling and size of the attention.

    None where two norms of a block, which have one number here, differ in theirs.
    """
    first, second, queries, keys = ({0.0} if norm is None else {_epsilon(norm)} for norm in part[:4])
    whole, heads = first | second, queries | keys
    attention = block.self_attn
    own = (float(attention.scaling), float(attention.head_dim))
    return (whole.pop() if len(whole) == 1 else None, heads.pop() if len(heads) == 1 else None, *own)


def _epsilon(norm: Any) -> float:
    return float(next((getattr(norm, name) for name in _EPSILONS if hasattr(norm, name)), 0.0))
