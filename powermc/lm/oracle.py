"""Next-token distributions read off the states at one depth: many rows, one batch, nothing evaluated twice.

`answer` is handed the pending requests of all chains. Rows whose state is known already (the first token after a cut,
and all that has been run before) need the head only and go first, until every row needs its last token run: those then
share one pass through the layers, whatever their prompts and lengths, one head and one softmax.
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
from powermc.lm.drafts import DecoderRow, non_finite
from powermc.lm.engine import Engine
from powermc.lm.guesses import share
from powermc.lm.rows import Prefix
from powermc.lm.softmax import Rows, log_softmax
from powermc.lm.softmax_torch import evaluate_logits
from powermc.sequences.model import Exponent, Extend, Score, Token, Without
from powermc.sequences.path import Path
from powermc.types import PENDING, Request

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
        self.engine.pool.settle()
        started = time.perf_counter()
        answers: list[Any] = [PENDING] * len(requests)
        scores = [i for i, r in enumerate(requests) if isinstance(r, Score)]
        for i, scored in zip(scores, self._score([requests[i] for i in scores]), strict=True):  # type: ignore[misc]
            answers[i] = scored
        extends = [(i, r) for i, r in enumerate(requests) if isinstance(r, Extend)]
        going = [(i, r, n) for i, r in extends if (n := r.row.behind()) is not None]
        # Cheaper work first: rows that need the head only do not wait for a pass, and a pass waits to be full.
        going = [x for x in going if not x[2]] or going
        self._advance([r.row for _, r, n in going if n])
        work = [(r, n and n + len(r.row.ahead)) for _, r, n in going]
        for (i, _, _), token in zip(going, self._draw(work), strict=True):
            answers[i] = token
        self.engine.ledger.seconds += time.perf_counter() - started
        return answers

    def _advance(self, rows: Sequence[DecoderRow]) -> None:
        """Run these rows' last tokens, and what is guessed of the next ones."""
        engine, guesser = self.engine, self.engine.guesser
        most = 0
        if rows and guesser is not None and self.depth == engine.decoder.layers:
            most = share(guesser.tokens, len(rows))
            if engine.decoder.context is not None:
                most = min(most, engine.decoder.context - max(len(row.ids) for row in rows))
            if most > 0:
                guesser.guess(rows, most)
        engine.rows.reserve(0, max((len(row.wanted) for row in rows), default=0))
        engine.run([(row.slot, row.wanted) for row in rows if row.slot is not None], self.depth, width=most + 1)

    def _softmax(
        self, logits: torch.Tensor, exponents: Sequence[Sequence[Exponent]], uniform: np.ndarray, token: np.ndarray,
        draw: Any = None,
    ) -> Rows:  # fmt: skip
        """The softmax of these logits; `draw(i, logits)` names the token of rows that a `Choices` wants to see."""
        if draw is not None:
            rows = logits.double().cpu().numpy()
            token = np.array([draw(i, row) if np.isfinite(row.max()) else -1 for i, row in enumerate(rows)])
        widest = max(map(len, exponents))
        laws = [(*e, *[1.0] * (widest - len(e))) for e in exponents]
        sets = list(dict.fromkeys(law.tokens for row in laws for law in row if isinstance(law, Without)))
        masks = np.zeros((len(sets), logits.shape[1]), np.bool_)
        for mask, left_out in zip(masks, sets, strict=True):
            mask[[v for v in left_out if 0 <= v < len(mask)]] = True
        powers = np.array([[law.exponent if isinstance(law, Without) else law for law in row] for row in laws], float)
        which = np.array([[sets.index(law.tokens) if isinstance(law, Without) else -1 for law in row] for row in laws])
        return evaluate_logits(logits, powers, uniform, token, torch.get_num_threads(), masks, which)

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
                self._next_logits([request.row for request in requests]),
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
                    request.row.append(token.token)
                answers.append(token)
        return answers

    def _next_logits(self, rows: Sequence[DecoderRow]) -> torch.Tensor:
        """Logits (n, V) of the next draw of each row.

        Where tokens ahead of a row have been run, the head reads those in the same call, the fewer the more rows there
        are: it is bound by reading its weights, so that states cost little that are not drawn from in the end.
        """
        fresh = [row for row in rows if not row.logits]
        most = max(self.engine.ahead // max(len(rows), 1), 1)
        states = [row.states(most) for row in fresh]
        if fresh:
            logits = self.logits(torch.cat(states), np.full(sum(map(len, states)), -1))
            if len(logits) == len(fresh) == len(rows):
                for row, own in zip(rows, logits, strict=True):
                    row.logits.append(own)
                return logits
            for row, own in zip(fresh, logits.split([len(s) for s in states]), strict=True):
                row.logits.extend(own)
        return torch.stack([row.logits[0] for row in rows])

    def _score(self, requests: Sequence[Score]) -> list[Path | NonFiniteLogits]:
        """Evaluate whole paths: each prompt once however many ask, then tails, then the head on what is not known."""
        self.engine.run_prompts([r.path for r in requests], self.depth)
        whole = [r.path.prompt.ids + r.path.tokens[:-1] for r in requests]
        known = [
            self.engine.met(self.engine.known(r.path, self.depth), ids, self.depth)
            for r, ids in zip(requests, whole, strict=True)
        ]
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
            logits = self.logits(states, given)
            parts.append(self._softmax(logits, [exponents] * (end - begin), nothing, given))
            if not parts[-1].finite.all():
                return non_finite(row, begin + int(parts[-1].finite.argmin()), path.prompt)

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
        return request.choices.categorical(weights) if weights.max() > -np.inf else -1
    return request.choices.categorical(log_softmax(logits, law))
