"""DoLa: the last layer's next-token distribution against that of an earlier layer (Chuang et al. 2024).

Of some earlier layers the one whose distribution is farthest from the last layer's is chosen anew for every token
(arXiv:2309.03883, equations 2 to 5):

    log q(x) = log p_last(x) - log p_early(x) + const  where p_last(x) >= plausible * max p_last, else q(x) = 0
    early = argmax_j JSD(p_last, p_j),  JSD(p, q) = (KL(p || m) + KL(q || m)) / 2,  m = (p + q) / 2

q is a function of the prefix alone. The distribution of an earlier layer is the model's own head on its states: as
published, without the final norm; with `norm` behind that, which is the logit lens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from powermc.errors import ArgumentError
from powermc.lm.drafts import DecoderRow
from powermc.lm.model import CausalLM
from powermc.lm.oracle import DepthOracle
from powermc.sequences.path import Path


class ContrastRow(DecoderRow):
    """A row of a `LayerContrast`. last: log p of all tokens at the last layer, of the latest draw, shape (V,)."""

    last: torch.Tensor


class LayerContrast(DepthOracle):
    """Rows that draw from q. Continue paths that the model itself has scored: `logits`, and scores, are the model's.

    The engine must be keeping the states at `layers` (`Engine.keeping`) from before the prompts are run.

    layers: depths of the earlier layers, 1 to L - 1, at least one. plausible: in [0, 1]. Raises `ArgumentError` for
    others.
    """

    def __init__(self, model: CausalLM, layers: Sequence[int], plausible: float = 0.1, norm: bool = False) -> None:
        depth = model.decoder.layers
        if not layers or not all(0 < layer < depth for layer in layers):
            raise ArgumentError(
                f"layers {', '.join(map(str, layers)) or 'none'} are out of range: {model.name} has {depth} layers, "
                f"choose some of 1 to {depth - 1}"
            )
        if not 0 <= plausible <= 1:
            raise ArgumentError(f"plausible must lie between 0 and 1, got {plausible}")
        super().__init__(model.engine, depth)
        self.model, self.layers, self.plausible, self.norm = model, tuple(sorted(set(layers))), plausible, norm

    def branch(self, path: Path, cut: int) -> ContrastRow:
        return ContrastRow(self, path, cut)

    def logits(self, states: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        return self.model.logits(states, tokens)

    def _next_logits(self, rows: Sequence[DecoderRow]) -> torch.Tensor:
        """log q of the next token of each row, up to a constant."""
        fresh = [row for row in rows if not row.logits]
        if fresh:
            last = self.logits(torch.cat([row.states(1) for row in fresh]), np.full(len(fresh), -1)).log_softmax(-1)
            early, farthest = last, last.new_full((len(fresh), 1), -math.inf)
            for layer in self.layers:
                found = self._early(layer, torch.cat([self._state(row, layer) for row in fresh]))
                distance = divergence(last, found)
                early = torch.where(distance > farthest, found, early)
                farthest = torch.maximum(distance, farthest)
            for row, contrast, own in zip(fresh, contrasted(last, early, self.plausible), last, strict=True):
                row.logits.append(contrast)
                row.last = own  # type: ignore[attr-defined]  # all rows are `ContrastRow`s
        return torch.stack([row.logits[0] for row in rows])

    def _early(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        decoder = self.engine.decoder
        self.engine.ledger.read(layer, len(states), len(states) * self.engine.cost.head)
        return decoder.head(decoder.finish(states) if self.norm else states).log_softmax(-1)

    def _state(self, row: DecoderRow, layer: int) -> torch.Tensor:
        """The state of the row's last position at this depth, shape (1, width)."""
        at = len(row.ids) - 1
        if row.slot is None:
            return row.prefix.hidden(layer, at, at + 1)
        return self.engine.rows.hidden[layer][row.slot.index, at : at + 1]


def divergence(last: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
    """The Jensen-Shannon divergence of rows of log probabilities (n, V), nats, shape (n, 1)."""
    middle = torch.logaddexp(last, early) - math.log(2)
    # x (log x - log m) is 0 at x = 0, where the difference is not a number
    parts = [torch.where(x > -torch.inf, x.exp() * (x - middle), 0.0) for x in (last, early)]
    return (parts[0] + parts[1]).sum(-1, keepdim=True) / 2


def contrasted(last: torch.Tensor, early: torch.Tensor, plausible: float) -> torch.Tensor:
    """log q up to a constant, of rows of log probabilities."""
    bound = last.amax(-1, keepdim=True) + (math.log(plausible) if plausible else -math.inf)
    return torch.where((last >= bound) & (last > -torch.inf), last - early, -torch.inf)
