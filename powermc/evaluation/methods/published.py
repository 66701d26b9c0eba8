"""The published power sampler as a method (Karan & Du 2025, arXiv:2510.14901, Algorithm 1), faults and all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from powermc.evaluation.methods.base import Answer, Answers, Method, Question, Terms, register
from powermc.evaluation.methods.call import Call, Key
from powermc.evaluation.methods.checks import check_counts
from powermc.sequences.path import Tokens

if TYPE_CHECKING:
    from powermc.evaluation.published import Tail

_SEEDS = 2**53


@dataclass(frozen=True)
class _Published(Method):
    """block_size, steps: B tokens per block, >= 1, and N transitions after each, >= 0.

    Its law is wrong where sequences end (`powermc.evaluation.published` says how and why): answers shrink and never
    grow back, and one that has lost its end token may stay short of the horizon: it is then no path of the space, and
    counted as unfinished. It knows end ids only: stop strings are cut off afterwards.
    """

    block_size: int = 32
    steps: int = 10

    def __post_init__(self) -> None:
        check_counts(self, block_size=1, steps=0)

    def _answers(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range, side: int) -> Answers:
        """`side` chains at once, numbered from a multiple of `side` on."""
        from powermc.evaluation.published import Generate, Published

        call = Call(model, questions, terms, samples)
        draw = _Charged(Generate(model.decoder.model, call.space.eos, terms.alpha), model)
        sampler = Published(draw, call.space.eos, terms.max_new_tokens, self.block_size, self.steps)
        counts = {"steps": 0, "accepted": 0, "changed": 0}
        found: dict[Key, Tail] = {}
        for p, prompt in enumerate(call.prompts):
            for group in sorted({s // side for s in samples}):
                seed = call.stream(self.name, Key(p, group)).integers(_SEEDS)
                trace = sampler.run(prompt.ids, chains=side, seed=seed, batched=True)
                found |= {Key(p, group * side + i): tail for i, tail in enumerate(trace.paths)}
                counts["steps"] += len(trace.accepted)
                counts["accepted"] += sum(trace.accepted)
                counts["changed"] += sum(trace.changed)

        def answer(_: Question, tails: list[Tail]) -> Answer:
            tokens = _cut(call, tails[0].tokens)
            return Answer(tokens, call.text(tokens), float(tails[0].log_target[: len(tokens)].sum()) / terms.alpha)

        return call.answers(found, answer, {**counts, "drawn": draw.drawn})


@register
@dataclass(frozen=True)
class AsPublished(_Published):
    """One chain at a time; every step runs the prompt and the kept tokens through the model again."""

    name: ClassVar[str] = "published"
    about: ClassVar[str] = "power sampling as published (Karan & Du 2025, arXiv:2510.14901): a batch of one, no cache"

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        return self._answers(model, questions, terms, samples, 1)


@register
@dataclass(frozen=True)
class PublishedBatched(_Published):
    """`chains` chains of a prompt side by side, one call of `generate` per step.

    A call draws for all its chains at once, so that a sample depends on those it is drawn with: samples 0 to
    chains - 1 are always drawn together, and so on, whichever of them are asked for.
    """

    name: ClassVar[str] = "published-batched"
    about: ClassVar[str] = "the same, some chains of a prompt in one batch"

    chains: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, chains=1)

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        return self._answers(model, questions, terms, samples, self.chains)


class _Charged:
    """A source of tails that charges the model's ledger for what its calls of `generate` run, padding left out.

    Every row runs until the last of its batch has ended. `drawn`: tokens of all tails.
    """

    def __init__(self, draw: Any, model: Any) -> None:
        self._draw, self._model, self.drawn = draw, model, 0

    def __call__(self, prefixes: Sequence[Tokens], most: Sequence[int], seed: int) -> list[Tail]:
        started = time.perf_counter()
        tails = self._draw(prefixes, most, seed)
        ledger, cost, depth = self._model.ledger, self._model.engine.cost, self._model.depth
        steps = tails[0].ran - len(prefixes[0]) + 1
        lengths = [len(prefix) for prefix in prefixes]
        flops = sum(n * cost.span(0, depth, n, n) for n in lengths)
        ledger.ran((0, depth), sum(lengths), parallel=True, flops=flops)
        for i in range(1, steps):
            ledger.ran((0, depth), len(tails), parallel=False, flops=sum(cost.span(0, depth, n + i) for n in lengths))
        ledger.read(depth, steps * len(tails), steps * len(tails) * cost.head)
        ledger.seconds += time.perf_counter() - started
        self.drawn += sum(map(len, tails))
        return tails


def _cut(call: Call, tokens: Tokens) -> Tokens:
    """Up to the first stop string."""
    if call.space.stop is None:
        return tokens
    return next((tokens[:n] for n in range(1, len(tokens)) if call.space.ends(tokens[:n])), tokens)
