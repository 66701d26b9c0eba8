"""Beam search on the engine's rows: beams of all questions share every pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from powermc.errors import ArgumentError
from powermc.evaluation.methods.base import Answer, Answers, Method, Question, Terms, register
from powermc.evaluation.methods.call import Call, Joint, Key, Together
from powermc.evaluation.methods.checks import check_counts, is_number
from powermc.sequences.path import Path, Tokens
from powermc.types import Steps


@register
@dataclass(frozen=True)
class Beam(Method):
    """Beam search: the `width` likeliest unfinished beginnings are kept; the best ended one is given.

    The score of an ended answer, or of one cut off at the horizon, is log p / length^length_penalty, its end token
    counted: 0 looks for the likeliest answer, 1 (the default of transformers) for the likeliest per token. As in
    transformers an end counts if its answer is among the `width` likeliest continuations of all beams. The search
    ends when nothing unfinished can score more (there: early_stopping="never").

    width: >= 1. length_penalty: finite.
    """

    name: ClassVar[str] = "beam"
    about: ClassVar[str] = "beam search, scored by log p / length^length_penalty"
    deterministic: ClassVar[bool] = True

    width: int = 4
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, width=1)
        if not (is_number(self.length_penalty) and math.isfinite(self.length_penalty)):
            raise ArgumentError(f"{self.name}:length_penalty must be a finite number, got {self.length_penalty}")

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        call = Call(model, questions, terms, samples)
        joint = Joint(model)
        found = call.run(lambda key: self._search(call, joint, key), once=True, width=self.width)
        return call.answers(
            found,
            lambda _, ends: Answer(ends[0].tokens, call.text(ends[0].tokens), ends[0].log_p),
            {"drawn": sum(end.drawn for end in found.values())},
        )

    def _search(self, call: Call, joint: Joint, key: Key) -> Steps[_End]:
        space = call.space
        start = yield from call.empty(key)
        beams = [_Beam((), 0.0, call.model.branch(start, 0))]
        best, score, drawn = None, -math.inf, 0
        try:
            while beams:
                n = len(beams[0].tokens) + 1
                looks = [_Likeliest(2 * self.width + len(space.eos)) for _ in beams]
                asked = zip(beams, looks, strict=True)
                yield Together(joint, tuple(beam.row.extend((1.0,), look) for beam, look in asked))
                drawn += len(beams)
                going: list[_Step] = []
                for rank, step in enumerate(_ranked(beams, looks)):
                    if len(going) == self.width:
                        break
                    tokens = (*beams[step.beam].tokens, step.token)
                    if n < space.horizon and not space.ends(tokens):
                        going.append(step)
                    elif rank < self.width and step.log_p / n**self.length_penalty > score:
                        best, score = _End(tokens, step.log_p, 0), step.log_p / n**self.length_penalty
                if going and self._attainable(going[0].log_p, n + 1, space.horizon) <= score:
                    going = []
                beams = _moved(call, beams, going)
        finally:
            for beam in beams:
                beam.row.release()
        assert best is not None, "some continuation is among the likeliest, and at the horizon all of them end"
        return best._replace(drawn=drawn)

    def _attainable(self, log_p: float, shortest: int, longest: int) -> float:
        """The highest score of what continues a beginning of this log p."""
        return max(log_p / shortest**self.length_penalty, log_p / longest**self.length_penalty)


class _End(NamedTuple):
    tokens: Tokens
    log_p: float
    drawn: int


class _Beam(NamedTuple):
    tokens: Tokens
    log_p: float
    row: Any


class _Step(NamedTuple):
    """One token more behind a beam, and log p of all."""

    log_p: float
    beam: int
    token: int


@dataclass
class _Likeliest:
    """What stands for the choices of a row that draws no token: it notes the `most` likeliest ones and their log p."""

    most: int
    tokens: list[int] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)

    def at(self, purpose: str, index: int = 0) -> _Likeliest:
        return self

    def categorical(self, log_weights: np.ndarray) -> int:
        log_p = log_weights - log_weights.max()
        log_p -= np.log(np.exp(log_p).sum())
        n = min(self.most, len(log_p))
        few = np.flatnonzero(log_p >= np.partition(log_p, -n)[-n])
        order = few[np.argsort(-log_p[few], kind="stable")][: self.most]
        order = order[log_p[order] > -np.inf]
        self.tokens, self.log_p = order.tolist(), log_p[order].tolist()
        return -1


def _ranked(beams: Sequence[_Beam], looks: Sequence[_Likeliest]) -> Iterator[_Step]:
    """All continuations noted, the likeliest first; of equal ones that of the earlier beam, then of the lower token."""
    steps = (
        _Step(beam.log_p + log_p, i, token)
        for i, (beam, look) in enumerate(zip(beams, looks, strict=True))
        for token, log_p in zip(look.tokens, look.log_p, strict=True)
    )
    return iter(sorted(steps, key=lambda step: (-step.log_p, step.beam, step.token)))


def _moved(call: Call, beams: Sequence[_Beam], going: Sequence[_Step]) -> list[_Beam]:
    """The beams after these steps: the first step of a beam stays in its row, others branch off; the rest are released.

    Rows are given back before new ones are taken, so that a search never has more than its width.
    """
    first = {step.beam: step for step in reversed(going)}
    forks = {step.beam for step in going if first[step.beam] is not step}
    caches = {i: beams[i].row.cache() for i in forks}
    for i, beam in enumerate(beams):
        if i not in first:
            beam.row.release()
    moved = []
    for step in going:
        beam = beams[step.beam]
        row = beam.row
        if first[step.beam] is not step:
            prompt = row.prompt
            path = Path(prompt, beam.tokens, finished=False, cache=caches[step.beam], by=call.model)
            row = call.model.branch(path, len(beam.tokens))
        moved.append(_Beam((*beam.tokens, step.token), step.log_p, row))
    for beam in moved:  # only now: a fork branches off before its parent's row moves on
        beam.row.append(beam.tokens[-1])
    return moved
