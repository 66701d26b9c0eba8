"""Next-token distributions read off the states at one depth: many rows, one batch, nothing evaluated twice.

`answer` is handed the pending requests of all chains. Rows that need their last token run through the layers do so in
one pass, whatever their prompts and lengths; rows whose state is known already (the first token after a cut) join at
the head. All rows then share one softmax.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from powermc.errors import NonFiniteLogits
from powermc.lm.engine import Engine
from powermc.lm.rows import Prefix, Slot
from powermc.lm.softmax import Rows, log_softmax, softmax_rows
from powermc.sequences.model import Exponent, Extend, Score, Token, Without
from powermc.sequences.path import Path, Prompt
from powermc.types import PENDING, Choices, Request

_HEAD_ROWS = 64
_RESOLUTION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class DepthOracle(ABC):
    """An `Autoregressive` model: an engine, a depth, and a way to turn states there into logits.

    Oracles of one engine share activations: what one has run the others resume.
    """

    def __init__(self, engine: Engine, depth: int) -> None:
        self.engine, self.depth = engine, depth
        self.resolution = _RESOLUTION.get(engine.decoder.dtype, 1e-2)

    @abstractmethod
    def logits(self, states: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
        """Logits (n, V) of states (n, width) at this depth; `tokens` (n,): those to score, -1 where one is drawn."""

    @property
    def vocab_size(self) -> int:
        return self.engine.decoder.vocab_size

    def branch(self, path: Path, cut: int) -> DecoderRow:
        return DecoderRow(self, path, cut)

    def score(self, path: Path, exponents: Sequence[Exponent]) -> Request:
        return Score(self, path, tuple(exponents))

    @torch.no_grad()
    def answer(self, requests: Sequence[Extend[DecoderRow] | Score]) -> list[Any]:
        self.engine.check_mode()
        started = time.perf_counter()
        answers: list[Any] = [PENDING] * len(requests)
        scores = [i for i, r in enumerate(requests) if isinstance(r, Score)]
        for i, scored in zip(scores, self._score([requests[i] for i in scores]), strict=True):  # type: ignore[misc]
            answers[i] = scored
        extends = [(i, r) for i, r in enumerate(requests) if isinstance(r, Extend)]
        going = [(i, r, n) for i, r in extends if (n := r.row.behind()) is not None]
        self.engine.run([(r.row.slot, r.row.ids) for _, r, n in going if n and r.row.slot is not None], self.depth)
        for (i, _, _), token in zip(going, self._draw([(r, n) for _, r, n in going]), strict=True):
            answers[i] = token
        self.engine.ledger.seconds += time.perf_counter() - started
        return answers

    def _softmax(
        self, states: torch.Tensor, exponents: Sequence[Sequence[Exponent]], uniform: np.ndarray, token: np.ndarray,
        draw: Any = None,
    ) -> Rows:  # fmt: skip
        """The softmax of these states; `draw(i, logits)` names the token of rows that a `Choices` wants to see."""
        logits = self.logits(states, token)
        rows = (logits if logits.dtype == torch.float64 else logits.float()).contiguous().cpu().numpy()
        if draw is not None:
            token = np.array([draw(i, row) if np.isfinite(row.max()) else -1 for i, row in enumerate(rows)])
        widest = max(map(len, exponents))
        laws = [(*e, *[1.0] * (widest - len(e))) for e in exponents]
        sets = list(dict.fromkeys(law.tokens for row in laws for law in row if isinstance(law, Without)))
        masks = np.zeros((len(sets), rows.shape[1]), np.bool_)
        for mask, left_out in zip(masks, sets, strict=True):
            mask[[v for v in left_out if 0 <= v < len(mask)]] = True
        powers = np.array([[law.exponent if isinstance(law, Without) else law for law in row] for row in laws])
        which = np.array([[sets.index(law.tokens) if isinstance(law, Without) else -1 for law in row] for row in laws])
        return softmax_rows(rows, powers, uniform, token, torch.get_num_threads(), masks, which)

    def _draw(self, work: Sequence[tuple[Extend[DecoderRow], int]]) -> list[Token | NonFiniteLogits]:
        """Draw the next token of each row from its state."""
        answers: list[Token | NonFiniteLogits] = []
        for begin in range(0, len(work), _HEAD_ROWS):
            requests = [request for request, _ in work[begin : begin + _HEAD_ROWS]]
            streams = [getattr(request.choices, "uniform", None) for request in requests]
            uniform = np.array([np.nan if stream is None else stream() for stream in streams])

            def named(i: int, logits: np.ndarray, requests: Any = requests, streams: Any = streams) -> int:
                return -1 if streams[i] is not None else _drawn(requests[i], logits)

            out = self._softmax(
                torch.stack([request.row.state() for request in requests]),
                [request.exponents for request in requests],
                uniform,
                np.full(len(requests), -1),
                named if any(stream is None for stream in streams) else None,
            )
            for i, (request, ran) in enumerate(work[begin : begin + _HEAD_ROWS]):
                if not out.finite[i]:
                    answers.append(request.row.fail(begin + i))
                    continue
                token = Token(
                    int(out.token[i]),
                    float(out.log_p[i]),
                    float(out.entropy[i]),
                    float(out.margin[i]),
                    tuple(out.log_z[i, : len(request.exponents)].tolist()),
                    float(out.slack[i]),
                    ran,
                )
                if token.token >= 0:
                    request.row.ids.append(token.token)
                answers.append(token)
        return answers

    def _score(self, requests: Sequence[Score]) -> list[Path | NonFiniteLogits]:
        """Evaluate whole paths: each prompt once however many ask, then tails, then the head on what is not known."""
        self.engine.run_prompts([r.path for r in requests], self.depth)
        known = [self.engine.known(r.path, self.depth) for r in requests]
        whole = [r.path.prompt.ids + r.path.tokens[:-1] for r in requests]
        caches = self.engine.prefixes(list(zip(known, whole, strict=True)), self.depth)
        return [self._score_one(r, cache, row) for row, (r, cache) in enumerate(zip(requests, caches, strict=True))]

    def _score_one(self, request: Score, cache: Prefix, row: int) -> Path | NonFiniteLogits:
        path, first, n = request.path, len(request.path.prompt.ids), len(request.path)
        before = path.view(self)
        done = 0 if before is None else before.evaluated(request.exponents)
        # Normalisers known so far are carried on: asked for later, they would cost the head once more.
        known = () if before is None or not done else (e for e, z in before.log_z.items() if len(z) >= done)
        laws = tuple(dict.fromkeys((*request.exponents, *known)))
        exponents = laws or (1.0,)
        parts: list[Rows] = []
        for begin in range(done, n, _HEAD_ROWS):
            end = min(begin + _HEAD_ROWS, n)
            given, nothing = np.array(path.tokens[begin:end]), np.full(end - begin, np.nan)
            states = cache.hidden(self.depth, first - 1 + begin, first - 1 + end)
            parts.append(self._softmax(states, [exponents] * (end - begin), nothing, given))
            if not parts[-1].finite.all():
                return _non_finite(row, begin + int(parts[-1].finite.argmin()), path.prompt)

        def joined(head: np.ndarray | None, tails: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([np.zeros(0) if head is None else head[:done], *tails])

        old = before if done else None
        scored = path.with_scores(
            self,
            joined(None if old is None else old.log_p, [p.log_p for p in parts]),
            joined(None if old is None else old.entropy, [p.entropy for p in parts]),
            joined(None if old is None else old.margin, [p.margin for p in parts]),
            {
                e: joined(None if old is None else old.log_z[e], [p.log_z[:, i] for p in parts])
                for i, e in enumerate(laws)
            },
            cache,
        )
        begun = 0 if before is None else before.evaluated()
        for watcher in self.engine.watchers:  # a tail drafted at the exit has just been completed
            exit = watcher.exit
            if self is exit.model and begun < n and path.view(exit) is not None:
                watcher.completed(cache, first - 1 + begun, first - 1 + n)
        # What the layers have run serves every oracle of the engine; the others' shallower copies can go.
        others = (replace(o, cache=cache) if self._serves(cache, o) else o for o in scored.others)
        return replace(scored, others=tuple(others))

    def _serves(self, cache: Prefix, view: Path) -> bool:
        """Whether another oracle's view of the path finds in `cache` all that it has in its own."""
        oracle = view.by
        if getattr(oracle, "engine", None) is not self.engine:
            return False
        return view.cache is None or cache.reaches(oracle.depth) >= view.cache.reaches(oracle.depth)


def _drawn(request: Extend[Any], logits: np.ndarray) -> int:
    """The token that choices without a uniform, such as those that enumerate, name from the weights."""
    law = request.exponents[0]
    if isinstance(law, Without):
        weights = log_softmax(logits, law.exponent, [v for v in law.tokens if 0 <= v < len(logits)])
        return request.choices.categorical(weights) if np.exp(weights).any() else -1
    return request.choices.categorical(log_softmax(logits, law))


class DecoderRow:
    """A path being written. It takes a slot of the buffer only once a token has to run through the layers."""

    def __init__(self, model: DepthOracle, path: Path, cut: int) -> None:
        self.model, self.prompt = model, path.prompt
        self.ids = [*path.prompt.ids, *path.tokens[:cut]]
        self.prefix = model.engine.known(path, model.depth).upto(len(self.ids))
        self.slot: Slot | None = None

    def extend(self, exponents: tuple[Exponent, ...], choices: Choices) -> Request:
        return Extend(self, exponents, choices)

    def behind(self) -> int | None:
        """How many tokens the row must run before its next draw; it gets a slot if any. None: no slot is free."""
        depth, rows = self.model.depth, self.model.engine.rows
        if self.slot is None:
            if self.prefix.reaches(depth) == len(self.ids):
                return 0
            if not rows.free:
                return None
            self.slot = rows.acquire(self.prefix, len(self.ids))
        rows.reserve(0, len(self.ids))
        return len(self.ids) - self.slot.filled[depth]

    def state(self) -> torch.Tensor:
        """The state of the last position at the model's depth."""
        n, depth = len(self.ids), self.model.depth
        if self.slot is None:
            return self.prefix.hidden(depth, n - 1, n)[0]
        return self.model.engine.rows.hidden[depth][self.slot.index, n - 1]

    def fail(self, row: int) -> NonFiniteLogits:
        if self.slot is not None:
            self.slot.poisoned = True
        return _non_finite(row, len(self.ids) - len(self.prompt.ids), self.prompt)

    def cache(self) -> Prefix:
        if self.slot is None:
            return self.prefix
        return self.model.engine.extended(self.prefix, self.slot, self.model.depth)

    def release(self) -> None:
        if self.slot is not None:
            self.model.engine.rows.release(self.slot)
            self.slot = None


def _non_finite(row: int, position: int, prompt: Prompt) -> NonFiniteLogits:
    shown = prompt.text if len(prompt.text) <= 40 else prompt.text[:37] + "..."
    return NonFiniteLogits(
        f"the model's logits are NaN or infinite in row {row} at position {position} after the prompt {shown!r}; "
        "this chain stops (try dtype float32, or check the checkpoint)"
    )
