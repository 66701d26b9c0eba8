"""Exit heads: from the states after some layers to a distribution over the next token.

An affine map A h + b takes the state at the exit to what stands for the state after the last layer; the model's own
final norm and head follow, and a temperature. Without A it is the logit lens (nostalgebraist 2020), with A the tuned
lens (Belrose et al. 2023, arXiv:2303.08112). A head is a function of the state alone, so p~(. | prefix) is one of the
prefix alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from powermc.errors import ArgumentError

if TYPE_CHECKING:
    from powermc.lm.cost import Cost
    from powermc.lm.decoder import Decoder

KINDS = ("lens", "temperature", "ridge", "kl")
"""Logit lens; logit lens with a temperature; ridge affine map with one; the same refined on KL(p || p~)."""


@dataclass(frozen=True, eq=False)
class ExitHead:
    """The distribution softmax(head(norm(A h + b)) / temperature) of states h at depth `layer`.

    Parameters
    ----------
    layer
        How many layers the states have passed, 1..L-1.
    kind
        One of `KINDS`: how it was fitted.
    temperature
        > 0; divides the logits.
    weight, bias
        A (width, width) and b (width,), or None for the identity.
    vocabulary
        Token ids the distribution is restricted to, or None for all. All others have probability 0.
    scoring
        With a `vocabulary`: the token to be scored is added to it, position by position. Cheap to screen with; not a
        distribution to draw from.

    Raises `ArgumentError` for values out of range.
    """

    layer: int
    kind: str = "lens"
    temperature: float = 1.0
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    vocabulary: torch.Tensor | None = None
    scoring: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError(f"unknown head {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ArgumentError(f"a head's temperature must be a finite number > 0, got {self.temperature}")
        if (self.weight is None) != (self.bias is None):
            raise ArgumentError("a head needs both the matrix and the offset of its affine map, or neither")
        if self.vocabulary is not None and len(self.vocabulary) == 0:
            raise ArgumentError("a head's vocabulary must hold at least one token")

    def pruned(self, tokens: Sequence[int], *, scoring: bool = False) -> ExitHead:
        """The same on fewer tokens; see `vocabulary` and `scoring`."""
        return replace(self, vocabulary=torch.tensor(sorted(set(map(int, tokens)))), scoring=scoring)

    def to(self, device: torch.device, dtype: torch.dtype) -> ExitHead:
        """The same where the model is, in its dtype."""
        moved = {
            name: tensor.to(device=device, dtype=dtype)
            for name in ("weight", "bias")
            if (tensor := getattr(self, name)) is not None
        }
        if self.vocabulary is not None:
            moved["vocabulary"] = self.vocabulary.to(device)
        return replace(self, **moved)

    def logits(self, decoder: Decoder, states: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        """Logits (n, V) of states (n, width); `tokens` (n,): those to be scored, -1 for none."""
        if self.weight is not None:
            states = torch.addmm(self.bias, states, self.weight.T)  # type: ignore[arg-type]
        normed = decoder.finish(states)
        if self.vocabulary is None:
            return decoder.head(normed) / self.temperature
        few = decoder.head(normed, self.vocabulary) / self.temperature
        logits = few.new_full((len(states), decoder.vocab_size), -torch.inf)
        logits[:, self.vocabulary] = few
        given = np.flatnonzero(tokens >= 0)
        if self.scoring and len(given):
            ids = torch.as_tensor(tokens[given], device=logits.device)
            own = decoder.head(normed[given], ids).diagonal() / self.temperature
            logits[torch.as_tensor(given, device=logits.device), ids] = own
        return logits

    def flops(self, cost: Cost) -> float:
        """Floating-point operations per state."""
        share = 1.0 if self.vocabulary is None else (len(self.vocabulary) + self.scoring) * cost.width * 2 / cost.head
        return share * cost.head + (0 if self.weight is None else cost.affine())
