"""What powermc relies on of vLLM 0.32, over a table: its classes, defaults, and what its documentation warns of.

`tests/test_vllm.py` asks the same questions of this and, where it is installed, of vLLM itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from powermc.toy import TabularModel

STALE = -0.25
"""What a buffer holds that nothing was written to."""


@dataclass
class SamplingParams:
    """Those fields that are used, with vLLM's defaults."""

    temperature: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = self.prompt_logprobs is not None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs:
    """Of many positions one after the other: position i is [start_indices[i], end_indices[i])."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, entries: list[tuple[int, Logprob]]) -> None:
        self.start_indices.append(len(self.logprobs))
        for token, entry in entries:
            self.token_ids.append(token)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.logprobs))


class LLM:
    """An engine whose next-token law is a table's, given the last tokens of prompt and output alike.

    Prompts are cached in whole blocks; the last token of a prompt is always run. `interrupt`: the number of the call at
    which Ctrl-C is pressed, its requests left behind as vLLM leaves them. `calls`: (prompts, params) of every call.
    """

    def __init__(
        self,
        model: TabularModel,
        *,
        max_logprobs: int = 20,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
        max_model_len: int = 64,
        block_size: int = 2,
        eos: tuple[int, ...] = (2,),
        dtype: str = "float32",
        tokenizer: Any = None,
        speculative_config: Any = None,
        interrupt: int = -1,
    ) -> None:
        self.table, self.mode, self.most = model, logprobs_mode, max_logprobs
        self.tokenizer, self.interrupt = tokenizer, interrupt
        self.calls: list[tuple[list[tuple[int, ...]], list[SamplingParams]]] = []
        self.waiting: list[tuple[tuple[int, ...], SamplingParams]] = []
        self.blocks: set[tuple[int, ...]] = set()
        self.numbers, self.block = 0, block_size
        generation = {"eos_token_id": list(eos), "top_k": 1, "temperature": 0.3, "do_sample": True}
        config = SimpleNamespace(
            model="table",
            max_model_len=max_model_len,
            dtype=f"torch.{dtype}",
            generation_config=generation_config,
            get_vocab_size=lambda: model.vocab_size,
            try_get_generation_config=lambda: generation,
            hf_text_config=SimpleNamespace(num_hidden_layers=2, eos_token_id=None),
        )
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(
                model_config=config,
                speculative_config=speculative_config,
                cache_config=SimpleNamespace(block_size=block_size),
            )
        )

    def get_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("Tokenizer not available when `skip_tokenizer_init=True`")
        return self.tokenizer

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool = True) -> list[Any]:
        asked = [tuple(prompt["prompt_token_ids"]) for prompt in prompts]
        self.calls.append((asked, list(sampling_params)))
        for ids, params in zip(asked, sampling_params, strict=True):
            self._validate(ids, params)
        self.waiting += zip(asked, sampling_params, strict=True)
        if len(self.calls) - 1 == self.interrupt:
            raise KeyboardInterrupt
        answers = [self._answer(ids, params) for ids, params in self.waiting]
        self.waiting.clear()
        return answers

    def _validate(self, ids: tuple[int, ...], params: SamplingParams) -> None:
        vocab = self.table.vocab_size
        most = vocab if self.most == -1 else self.most
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if (vocab if asked == -1 else asked or 0) > most:
                raise ValueError(f"Requested {name} of {asked}, which is greater than max allowed: {most}")
        if not ids:
            raise ValueError("The decoder prompt cannot be empty")
        if len(ids) >= self.llm_engine.vllm_config.model_config.max_model_len:
            raise ValueError("The prompt is longer than the maximum model length")

    def raw(self, ids: tuple[int, ...]) -> np.ndarray:
        return self.table.log_row(self.table.context(ids))[0]

    def _answer(self, ids: tuple[int, ...], params: SamplingParams) -> Any:
        assert params.max_tokens == 1, "one token is all that is asked for"
        cached = 0 if params.skip_reading_prefix_cache else self._cached(ids)
        ends = range(self.block, len(ids) + 1, self.block)
        self.blocks |= {ids[:end] for end in ends}
        raw = self.raw(ids)
        processed = self._processed(raw, params)
        token = int(processed.argmax())  # whatever it draws, it is not used
        shown = processed if self.mode == "processed_logprobs" else raw + (3.0 if self.mode == "raw_logits" else 0.0)
        flat = FlatLogprobs()
        if params.logprobs is not None:
            flat.append(self._entries(shown, token, params.logprobs))
        prompt: list[Any] | None = None
        if params.prompt_logprobs is not None:
            prompt = [None]
            for t in range(1, len(ids)):
                row = self.raw(ids[:t]) if t > cached else np.full(self.table.vocab_size, STALE)
                prompt.append(dict(self._entries(row, ids[t], params.prompt_logprobs)))
        self.numbers += 1
        return SimpleNamespace(
            request_id=str(self.numbers),
            prompt_token_ids=list(ids),
            prompt_logprobs=prompt,
            outputs=[SimpleNamespace(index=0, token_ids=[token], logprobs=flat, finish_reason="length")],
            num_cached_tokens=cached,
            finished=True,
        )

    def _cached(self, ids: tuple[int, ...]) -> int:
        n = 0
        while n + self.block < len(ids) and ids[: n + self.block] in self.blocks:
            n += self.block
        return n

    def _processed(self, raw: np.ndarray, params: SamplingParams) -> np.ndarray:
        """After temperature and top-k, normalised."""
        row = raw / (params.temperature or 1.0)
        if params.top_k > 0:
            row = np.where(row >= np.sort(row)[-params.top_k], row, -np.inf)
        return row - np.logaddexp.reduce(row)

    def _entries(self, row: np.ndarray, token: int, most: int) -> list[tuple[int, Logprob]]:
        """The sampled token first, then the likeliest in order: the sampled one may come twice."""
        order = np.argsort(-row, kind="stable")
        rank = {int(v): i + 1 for i, v in enumerate(order)}
        listed = [token, *(int(v) for v in order[: len(order) if most == -1 else most])]
        return [(v, Logprob(float(row[v]), rank[v])) for v in listed]
