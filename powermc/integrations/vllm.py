"""vLLM: full-depth power sampling from one of its engines (extra `vllm`).

`power_sample(VLLM("Qwen/Qwen2.5-0.5B"), prompts)` runs plain Metropolis-Hastings. The engine is asked for one thing
only: log p(. | prefix) of the *whole vocabulary*, as a request of one new token with `logprobs=-1`. Tokens are drawn
from that here, by inverse CDF with powermc's own streams, and log p, log q and log Z of every exponent are read off the
very numbers that drew them. So nothing rests on the engine's sampler:

- temperature, top-k, penalties and seeds of the engine do not enter, nor does the checkpoint's generation config;
- the log-probabilities reported must be raw (`logprobs_mode="raw_logprobs"`, vLLM's default, or "raw_logits"), and it
  must report all of them (`max_logprobs=-1`); both are checked when the engine is attached, by what it answers;
- prompt log-probabilities are never read. vLLM leaves those of positions before `num_cached_tokens` unwritten where a
  request reads the prefix cache; what follows the last token of a prompt is computed always, cache or not.

A given path is scored the same way, one request per position, so that it gets the numbers it would be drawn with.

What it costs: one request per token. With prefix caching the engine runs no more than the tokens behind the last full
block of the cache for it, but every row of V log-probabilities comes through vLLM's Python lists, and that is what the
time goes into (measured in docs/integrations.md). The last rows are kept, so that a draft asks for nothing while it
agrees with the current path.

Rejected: letting vLLM draw whole tails and charge what it reports of the sampled tokens. An engine reports either log q
("processed_logprobs") or log p, so that log p takes a second pass, which rounds otherwise than the one that drew; alpha
multiplies the difference. Nor is there a log Z of a path that was not drawn so, nor entropy, and draws would be the
engine's own.

Not there: early exits (another model may be the surrogate), FLOPs (the ledger counts tokens and seconds), LoRA,
speculative decoding, reproducible bits: an engine's logits depend on which rows run together, unless it is made batch
invariant.

Tested against vLLM 0.32.0 (CPU build). That build fails to start in process once numba has been imported, so this
module imports it late; make the engine before anything else does.
"""

from __future__ import annotations

import importlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc.errors import ArgumentError, ModelError, NonFiniteLogits
from powermc.lm.drafts import non_finite
from powermc.lm.ledger import Ledger
from powermc.lm.text import Text
from powermc.sequences.model import Exponent, Extend, Score, Token, Without
from powermc.sequences.path import Path, Prompt, Space, Tokens
from powermc.types import Choices, Request

if TYPE_CHECKING:
    from powermc.lm.softmax import Rows

_RESOLUTION = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
_ALLOWED = {"float32": 1e-3}
"""How far two answers of one engine may differ, in probability; 0.1 for types not named."""


class VLLM:
    """A `LanguageModel` whose next-token distributions are those of a vLLM engine.

    Log probabilities are those of the raw softmax in float64 (nats). Random streams are powermc's.

    Parameters
    ----------
    model
        A `vllm.LLM`, or the name of a model to make one of.
    max_rows
        Requests per call of the engine, and chains under way at once. A row is held as Python objects for a moment:
        about 120 bytes per token of the vocabulary.
    keep
        How many rows of log-probabilities are kept to be used again, 8 bytes per token of the vocabulary each.
    name
        What results call the model; None for the engine's own name of it.
    engine
        Of `vllm.LLM`, where `model` is a name: dtype, tensor_parallel_size, ... `max_logprobs` is -1 and
        `generation_config` "vllm" unless given.

    Raises `ModelError` without vLLM, and for an engine that does not report the raw log-probability of every token.
    """

    def __init__(
        self, model: Any, *, max_rows: int = 16, keep: int = 256, name: str | None = None, **engine: Any
    ) -> None:
        if max_rows < 1:
            raise ArgumentError(f"max_rows must be at least 1, got {max_rows}")
        if keep < 0:
            raise ArgumentError(f"keep is a number of rows >= 0, got {keep}")
        try:
            vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise ModelError(f"vLLM cannot be imported ({error}): pip install 'powermc[vllm]'") from error
        if isinstance(model, str):
            model = vllm.LLM(model, **{"max_logprobs": -1, "generation_config": "vllm", **engine})
        elif engine:
            raise ArgumentError(f"{next(iter(engine))} has no effect on an engine that is there; give it to vllm.LLM")
        self.llm, self.max_rows = model, max_rows
        configs = model.llm_engine.vllm_config
        self._config = config = configs.model_config
        if configs.speculative_config is not None:
            raise ModelError("an engine with speculative decoding is not supported: make it without")
        self.name = name or str(config.model)
        self.vocab_size = int(config.get_vocab_size())
        self.context = int(config.max_model_len)
        self.dtype = str(config.dtype).removeprefix("torch.")
        self.resolution = _RESOLUTION.get(self.dtype, 1e-2)
        self.text = _text(model, config)
        self.ledger = Ledger(layers=int(config.hf_text_config.num_hidden_layers))
        # The engine draws a token too, which is not used.
        common = {"max_tokens": 1, "logprobs": -1, "flat_logprobs": True, "detokenize": False, "ignore_eos": True}
        self._ask = vllm.SamplingParams(temperature=0.0, **common)
        self._rows = _Recent(keep)
        probe = vllm.SamplingParams(temperature=0.5, top_k=1, **common)
        self.deviation = self._check(probe, int(getattr(configs.cache_config, "block_size", None) or 16))

    # What a run needs to know of the model.

    @property
    def ignored_warpers(self) -> dict[str, Any]:
        """Settings of the checkpoint's generation config that would bend p, and are not applied."""
        return self.text.warpers

    def prompt(self, text: str, *, chat: bool | None = None) -> Prompt:
        """Tokenise a prompt, as a user message if `chat` (None: if the tokenizer has a chat template).

        Raises `ArgumentError` for an empty prompt, `chat` without a template, or an engine without a tokenizer.
        """
        return Prompt(self.text.encode(text, chat), text)

    def space(self, horizon: int, stop: Sequence[str] = ()) -> Space:
        """All paths of up to `horizon` tokens; they end at any stop id of the model, or where a stop string appears."""
        return Space(self.text.eos, horizon, self.text.stop_rule(stop))

    def check_fits(self, prompt: Prompt, horizon: int) -> None:
        """Raise `ArgumentError` unless there is a prompt, and it and the horizon fit the engine's context."""
        n = len(prompt.ids)
        if not n:
            raise ArgumentError(
                "vLLM takes no empty prompt: begin with a token, such as the tokenizer's first of texts"
            )
        if n + horizon > self.context:
            raise ArgumentError(
                f"the prompt has {n} tokens; with {horizon} new ones that exceeds the engine's context of "
                f"{self.context}: shorten the prompt, lower max_new_tokens to at most {max(self.context - n, 0)}, or "
                "make the engine with a larger max_model_len"
            )

    def forget(self) -> None:
        """Forget the rows of earlier runs, so that what a run computes does not depend on them."""
        self._rows.clear()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special tokens left out."""
        return self.text.decode(tokens)

    def piece(self, token: int) -> str | None:
        """The text of one token, special ones by name; None without a tokenizer."""
        return self.text.piece(token)

    # The autoregressive protocol.

    def branch(self, path: Path, cut: int) -> EngineRow:
        return EngineRow(self, path, cut)

    def score(self, path: Path, exponents: Sequence[Exponent]) -> Request:
        return Score(self, path, tuple(exponents))

    def answer(self, requests: Sequence[Extend[EngineRow] | Score]) -> list[Any]:
        started = time.perf_counter()
        extends = [r for r in requests if isinstance(r, Extend)]
        drawn = iter([token for part in _parts(extends, self.max_rows) for token in self._draw(part)])
        answers = [next(drawn) if isinstance(r, Extend) else self._score(r) for r in requests]
        self.ledger.seconds += time.perf_counter() - started
        return answers

    def _draw(self, requests: Sequence[Extend[EngineRow]]) -> list[Token | NonFiniteLogits]:
        """The next token of each row, appended to it."""
        rows, ran = self._next([request.row.ids for request in requests], parallel=False)
        streams = [getattr(request.choices, "uniform", None) for request in requests]
        uniform = [np.nan if stream is None else stream() for stream in streams]
        named = [
            -1 if stream is not None else _enumerated(request, row)
            for stream, request, row in zip(streams, requests, rows, strict=True)
        ]
        out = _softmax(rows, [request.exponents for request in requests], uniform, named)
        answers: list[Token | NonFiniteLogits] = []
        for i, request in enumerate(requests):
            row, token = request.row, int(out.token[i])
            if not out.finite[i]:
                answers.append(non_finite(i, len(row.ids) - row.first, row.prompt))
                continue
            if token >= 0:
                row.ids += (token,)
            log_p, entropy, margin, slack = (float(x[i]) for x in (out.log_p, out.entropy, out.margin, out.slack))
            log_z = tuple(out.log_z[i, : len(request.exponents)].tolist())
            answers.append(Token(token, log_p, entropy, margin, log_z, slack, ran[i]))
        return answers

    def _score(self, request: Score) -> Path | NonFiniteLogits:
        """Evaluate a path from where this model has not, position by position."""
        path = request.path
        before = path.view(self)
        done = 0 if before is None else before.evaluated(request.exponents)
        laws = request.exponents or (1.0,)
        whole, first = path.prompt.ids + path.tokens, len(path.prompt.ids)
        columns: list[np.ndarray] = []
        for part in _parts(range(done, len(path)), self.max_rows):
            rows, _ = self._next([whole[: first + t] for t in part], parallel=True)
            out = _softmax(rows, [laws] * len(part), [np.nan] * len(part), [path.tokens[t] for t in part])
            if not out.finite.all():
                return non_finite(0, part[int(out.finite.argmin())], path.prompt)
            columns.append(np.column_stack([out.log_p, out.entropy, out.margin, out.log_z]))
        fresh = np.concatenate([np.zeros((0, 3 + len(laws))), *columns]).T
        head: list[Any] = [np.zeros(0)] * len(fresh)
        if before is not None and before.log_p is not None and done:
            head = [before.log_p, before.entropy, before.margin, *(before.log_z.get(e, np.zeros(0)) for e in laws)]
        log_p, entropy, margin, *log_z = (np.concatenate([h[:done], f]) for h, f in zip(head, fresh, strict=True))
        # Of laws that were not asked for nothing is kept, as it may be shorter.
        return path.with_scores(self, log_p, entropy, margin, dict(zip(request.exponents, log_z, strict=False)), None)

    # The engine.

    def _next(self, prefixes: Sequence[Tokens], *, parallel: bool) -> tuple[list[np.ndarray], list[int]]:
        """log p(. | prefix) of each, shape (V,), float64, nats up to a constant; and the tokens run for it."""
        known = {ids: row for ids in prefixes if (row := self._rows.get(ids)) is not None}
        wanted = list(dict.fromkeys(ids for ids in prefixes if ids not in known))
        ran = dict.fromkeys(prefixes, 0)
        if wanted:
            for ids, (row, tokens) in zip(wanted, self._request(wanted, self._ask), strict=True):
                known[ids], ran[ids] = row, tokens
                self._rows.put(ids, row)
            self.ledger.ran((0, self.ledger.layers), sum(ran.values()), parallel=parallel)
            self.ledger.read(self.ledger.layers, len(wanted))
        # Rows that share a prefix share its cost: the first has it.
        return [known[ids] for ids in prefixes], [ran.pop(ids, 0) for ids in prefixes]

    def _request(self, prefixes: Sequence[Tokens], params: Any) -> list[tuple[np.ndarray, int]]:
        """One call of the engine: of each prefix log p of the next token, and the tokens run."""
        prompts = [{"prompt_token_ids": list(ids)} for ids in prefixes]
        outputs = self.llm.generate(prompts, [params] * len(prompts), use_tqdm=False)
        # A call that was interrupted leaves requests behind; they are answered first, with the next call's.
        outputs = outputs[-len(prompts) :]
        if [tuple(output.prompt_token_ids) for output in outputs] != list(prefixes):
            raise ModelError("vLLM answered other requests than it was sent: is the engine in use elsewhere?")
        return [(self._row(x), len(x.prompt_token_ids) - (x.num_cached_tokens or 0)) for x in outputs]

    def _row(self, output: Any) -> np.ndarray:
        """The log-probabilities of all tokens. Raises `ModelError` if the engine left any out."""
        found = output.outputs[0].logprobs
        begin, end = found.start_indices[0], found.end_indices[0]
        ids, values = np.array(found.token_ids[begin:end]), np.array(found.logprobs[begin:end], np.float64)
        inside = (ids >= 0) & (ids < self.vocab_size)
        row, there = np.zeros(self.vocab_size), np.zeros(self.vocab_size, np.bool_)
        row[ids[inside]], there[ids[inside]] = values[inside], True
        if not (inside.all() and there.all()):
            raise ModelError(
                f"vLLM reported {there.sum()} of {self.vocab_size} log-probabilities; a law without the others is not "
                "the model's: make the engine with max_logprobs=-1"
            )
        return row

    def _check(self, probe: Any, block: int) -> float:
        """Attach: the largest difference in probability between answers that should be one and the same.

        A prefix of over a block is asked for three times: the third reads the prefix cache, if there is one, and is
        sampled at another temperature from one token only. Raises `ModelError` if that changes what is reported.
        """
        n = max(min(block + 2, self.context - 1), 1)
        ids = tuple((7919 * i + 11) % self.vocab_size for i in range(n))
        try:
            answers = [self._request([ids], params)[0][0] for params in (self._ask, self._ask, probe)]
        except ValueError as error:
            raise ModelError(
                f"vLLM refuses to report every log-probability ({error}): make the engine with max_logprobs=-1"
            ) from error
        plain, again, processed = (np.exp(row - np.logaddexp.reduce(row)) for row in answers)
        allowed = _ALLOWED.get(self.dtype, 0.1)
        if not np.isfinite(plain).all():
            raise ModelError(f"{self.name} has no finite log-probabilities after tokens {ids[:4]}...")
        if (
            not np.abs(processed - plain).max() <= allowed
            or np.isneginf(answers[2]).sum() > np.isneginf(answers[0]).sum()
        ):
            raise ModelError(
                "the engine reports log-probabilities after temperature and top-k, which are not the model's: make it "
                "with logprobs_mode='raw_logprobs'"
            )
        deviation = float(np.abs(again - plain).max())
        if not deviation <= allowed:
            raise ModelError(f"{self.name} answers the same request with probabilities that differ by {deviation:.2g}")
        return deviation


class EngineRow:
    """A prefix being written: all tokens so far, `first` of them the prompt's. The engine holds what it has cached."""

    __slots__ = ("first", "ids", "model", "prompt")

    def __init__(self, model: VLLM, path: Path, cut: int) -> None:
        self.model, self.prompt, self.first = model, path.prompt, len(path.prompt.ids)
        self.ids: Tokens = path.prompt.ids + path.tokens[:cut]

    def extend(self, exponents: tuple[Exponent, ...], choices: Choices) -> Request:
        return Extend(self, exponents, choices)

    def cache(self) -> None:
        return None

    def release(self) -> None:
        pass


class _Recent:
    """The last `most` rows asked for, by prefix."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._rows: OrderedDict[Tokens, np.ndarray] = OrderedDict()

    def get(self, ids: Tokens) -> np.ndarray | None:
        if ids in self._rows:
            self._rows.move_to_end(ids)
        return self._rows.get(ids)

    def put(self, ids: Tokens, row: np.ndarray) -> None:
        self._rows[ids] = row
        while len(self._rows) > self.most:
            self._rows.popitem(last=False)

    def clear(self) -> None:
        self._rows.clear()


def _parts(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    return [items[begin : begin + most] for begin in range(0, len(items), most)]


def _softmax(
    rows: Sequence[np.ndarray], laws: Sequence[Sequence[Exponent]], uniform: Sequence[float], token: Sequence[int]
) -> Rows:
    """`softmax_rows` of rows with laws of their own: drawn at the first of them, or `token` where `uniform` is NaN."""
    from powermc.lm.softmax import softmax_rows  # numba, after the engine

    widest = max(map(len, laws))
    table = [(*law, *[1.0] * (widest - len(law))) for law in laws]
    sets = list(dict.fromkeys(law.tokens for row in table for law in row if isinstance(law, Without)))
    masks = np.zeros((len(sets), len(rows[0])), np.bool_)
    for mask, left_out in zip(masks, sets, strict=True):
        mask[[v for v in left_out if 0 <= v < len(mask)]] = True
    powers = np.array([[law.exponent if isinstance(law, Without) else law for law in row] for row in table], float)
    which = np.array([[sets.index(law.tokens) if isinstance(law, Without) else -1 for law in row] for row in table])
    return softmax_rows(np.stack(rows), powers, np.array(uniform, float), np.array(token), 1, masks, which)


def _enumerated(request: Extend[EngineRow], row: np.ndarray) -> int:
    """The token that choices without a uniform, such as those that enumerate, name from the weights."""
    from powermc.lm.softmax import log_softmax

    if not np.isfinite(row.max()):
        return -1
    law = request.exponents[0]
    if not isinstance(law, Without):
        return request.choices.categorical(log_softmax(row, law))
    weights = log_softmax(row, law.exponent, [v for v in law.tokens if 0 <= v < len(row)])
    return request.choices.categorical(weights) if weights.max() > -np.inf else -1


def _text(llm: Any, config: Any) -> Text:
    """The tokenizer, and what the checkpoint's configs say of stop ids and warpers."""
    try:
        tokenizer = llm.get_tokenizer()
    except ValueError:  # skip_tokenizer_init
        tokenizer = None
    generation = SimpleNamespace(**config.try_get_generation_config())
    return Text(SimpleNamespace(generation_config=generation, config=config.hf_text_config), tokenizer)  # type: ignore[arg-type]
