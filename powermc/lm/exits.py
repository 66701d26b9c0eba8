"""Early exits of a language model, each an autoregressive model of its own on the same activations.

p~(. | prefix) is read off the states at layer L* of the full model. As a generator an exit drafts at the cost of the
lower layers; as a surrogate it scores at that cost, or for nothing where the full model has been. What it has run, the
full model resumes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from powermc.errors import ArgumentError
from powermc.lm.drafts import DecoderRow
from powermc.lm.heads import ExitHead
from powermc.lm.model import CausalLM
from powermc.lm.oracle import DepthOracle
from powermc.sequences.path import Path


class EarlyExit(DepthOracle):
    """The model that `head` makes of the lower layers of `model`.

    Raises `ArgumentError` for a layer that is not strictly between the first and the last or a head of another width,
    and `ModelError` for a model that cannot be split there (it is still sampled at full depth).
    """

    def __init__(self, model: CausalLM, head: ExitHead) -> None:
        decoder = model.decoder
        if not 0 < head.layer < decoder.layers:
            raise ArgumentError(
                f"exit layer {head.layer} is out of range: {model.name} has {decoder.layers} layers, "
                f"choose 1 to {decoder.layers - 1}"
            )
        if head.weight is not None and tuple(head.weight.shape) != (model.engine.cost.width,) * 2:
            raise ArgumentError(
                f"the head is for states of width {len(head.weight)}, {model.name} has {model.engine.cost.width}"
            )
        super().__init__(model.engine, head.layer)
        model.engine.keep(head.layer)
        self.model, self.layer = model, head.layer
        self.name = f"{model.name}, layer {head.layer}, {head.kind}"
        self.head = head.to(decoder.device, decoder.dtype)

    def __repr__(self) -> str:
        return f"EarlyExit({self.name})"

    def branch(self, path: Path, cut: int) -> DecoderRow:
        if self.head.scoring:
            raise ArgumentError("a screening head is not a distribution to draw from; generate with the whole one")
        return super().branch(path, cut)

    def logits(self, states: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        self.engine.ledger.read(self.depth, len(states), len(states) * self.head.flops(self.engine.cost))
        return self.head.logits(self.engine.decoder, states, tokens)

    def pruned(self, tokens: Sequence[int], *, scoring: bool = False) -> EarlyExit:
        """The same exit on fewer tokens; see `ExitHead.pruned`."""
        return EarlyExit(self.model, self.head.pruned(tokens, scoring=scoring))
