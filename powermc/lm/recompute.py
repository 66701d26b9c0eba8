"""Models whose cache cannot be addressed by row and position: sampled exactly, and slowly, without any cache.

Recurrent and hybrid models keep one state per layer that cannot be read at an earlier position; ALiBi and other odd
attention cannot be told a row's positions. Here every pass is the model's plain forward over whole paths. Final states
are kept as with any other model, so that prompts, current paths and earlier drafts are not run again; a token that is
run costs its whole prefix. Early exits need keys and values of the layers above, and are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from powermc.errors import ModelError, NotSlotAddressable
from powermc.lm.decoder import FOREIGN, Decoder, Work
from powermc.lm.rows import Rows

_CALL_TOKENS = 4096


def attach(model: PreTrainedModel, most_rows: int, compiled: bool = True) -> Decoder:
    """The `Decoder` of a model; without a cache, and with a `RuntimeWarning`, where there is no other way.

    Raises `ModelError` for what cannot be driven without a cache either.
    """
    try:
        return Decoder(model, most_rows, compiled)
    except NotSlotAddressable as reason:
        decoder = Recomputing(model, most_rows, str(reason), compiled)
        warnings.warn(f"{decoder.name} is sampled without a cache: {decoder.lost}", RuntimeWarning, stacklevel=4)
        return decoder


class Recomputing(Decoder):
    """A decoder whose rows hold final states only: no keys, no values, no states between layers.

    Rows of one length run together, so that nothing is padded or masked. Raises `ModelError` if the logits of a
    position change with what follows it (a model that is not causal).
    """

    def __init__(self, model: PreTrainedModel, most_rows: int, reason: str, compiled: bool = True) -> None:
        self.reason = reason
        self.lost = f"each token is a pass over its whole prefix; early exits are off ({reason})"
        super().__init__(model, most_rows, compiled)

    def _open(self, most_rows: int) -> None:
        lists = (m for m in self._plain_body.modules() if isinstance(m, nn.ModuleList))
        self.blocks = next(lists, None) or nn.ModuleList([self._plain_body])
        self.window = getattr(self.config, "sliding_window", None)
        try:
            with torch.no_grad():
                width = self._states([[0]]).shape[-1]
        except FOREIGN as error:
            raise ModelError(f"{self.name} does not run on one token: {type(error).__name__}: {error}") from error
        none = (0, 0)
        self.rows = Rows(self.layers, none, none, width, most=most_rows, dtype=self.dtype, device=self.device)

    @property
    def head_dims(self) -> tuple[int, int]:
        heads = getattr(self.config, "num_attention_heads", 0)
        dim = getattr(self.config, "head_dim", None) or (self.config.hidden_size // heads if heads else 0)
        return dim, dim

    def _check(self) -> float:
        return self._deviation(
            self._ragged, "without a cache", "its logits depend on later tokens, or on which rows run together"
        )

    def check_split(self, depth: int) -> float:
        raise ModelError(f"{self.name} cannot be run in two parts at layer {depth}: {self.lost}")

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        raise ModelError(f"{self.name} has no early exits: {self.lost}")

    def tokens(self, work: Sequence[Work], last: int) -> int:
        return sum(w.slot.filled[last] + w.n for w in work)

    def forward(self, work: Sequence[Work], first: int, last: int) -> int:
        """Run all ids of these rows, up to the next `n` positions; the final states of those stay in the rows.

        Returns the length of the longest row.
        """
        if (first, last) != (0, self.layers):
            raise ModelError(f"{self.name} cannot be run from layer {first} to {last}: {self.lost}")

        def length(w: Work) -> int:
            return w.slot.filled[last] + w.n

        for n, same in groupby(sorted(work, key=length), length):
            rows, most = list(same), max(1, _CALL_TOKENS // n)
            for batch in (rows[i : i + most] for i in range(0, len(rows), most)):
                states = self._states([list(w.ids[:n]) for w in batch])
                for w, own in zip(batch, states, strict=True):
                    start = w.slot.filled[last]
                    self.rows.hidden[last][w.slot.index, start:n] = own[start:]
                    w.slot.filled[last] = n
        return max(w.slot.filled[last] for w in work)

    def _states(self, ids: list[list[int]]) -> torch.Tensor:
        """Final states (rows, n, width) of the plain body."""
        out: Any = self._plain_body(input_ids=torch.tensor(ids, device=self.device), use_cache=False)
        return out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
