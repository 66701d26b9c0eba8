"""Several answers are drawn, one is given: the likeliest, the one most agree with, the first to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from powermc.evaluation.methods.base import Answer, Answers, Method, Question, Terms, register
from powermc.evaluation.methods.call import Call, Joint, Key, Together, temperature_of
from powermc.evaluation.methods.checks import check_counts, check_temperature
from powermc.sequences.path import Path, Tokens
from powermc.types import Steps


@dataclass(frozen=True)
class _Several(Method):
    """n: answers drawn for each one given, >= 1. temperature: of the draws, > 0; none for 1/alpha of the terms."""

    n: int = 8
    temperature: float | None = 1.0

    def __post_init__(self) -> None:
        check_counts(self, n=1)
        check_temperature(self)


@register
@dataclass(frozen=True)
class BestOfN(_Several):
    """Of `n` answers drawn at `temperature` the one with the highest log p, ends included; of equal ones the first."""

    name: ClassVar[str] = "best-of-n"
    about: ClassVar[str] = "the likeliest, by log p, of n answers"

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        call = Call(model, questions, terms, samples)
        drawn = call.draws(self.name, temperature=temperature_of(self.temperature, terms), candidates=self.n)
        return call.answers(drawn, lambda _, paths: call.answer(max(paths, key=lambda path: path.log_prob)))


@register
@dataclass(frozen=True)
class SelfConsistency(_Several):
    """Of `n` answers drawn at `temperature` the first that states what most of them state (`Question.read`).

    Of statements with equally many votes the one drawn first. An answer that states nothing has no vote; where none
    does, the first is given.
    """

    name: ClassVar[str] = "self-consistency"
    about: ClassVar[str] = "what most of n answers state (Wang et al. 2022, arXiv:2203.11171)"

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        call = Call(model, questions, terms, samples)
        drawn = call.draws(self.name, temperature=temperature_of(self.temperature, terms), candidates=self.n)

        def choose(question: Question, paths: list[Path]) -> Answer:
            stated = [question.read(call.text(path.tokens)) for path in paths]
            return call.answer(paths[majority(stated)])

        return call.answers(drawn, choose)


@register
@dataclass(frozen=True)
class FirstFinish(_Several):
    """`n` answers at `temperature` side by side, token for token; the first to end is given, the others are stopped.

    Of those that end with the same token the first by number; where none ends by the horizon, number 0, cut off.
    """

    name: ClassVar[str] = "first-finish"
    about: ClassVar[str] = "the first of n answers to end (Agarwal et al. 2025, arXiv:2505.18149)"

    n: int = 4

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        call = Call(model, questions, terms, samples)
        exponent = 1 / temperature_of(self.temperature, terms)
        joint = Joint(model)
        found = call.run(lambda key: self._race(call, joint, key, exponent), width=self.n)
        return call.answers(
            found,
            lambda _, races: Answer(races[0].tokens, call.text(races[0].tokens), races[0].log_p),
            {"drawn": sum(race.drawn for race in found.values())},
        )

    def _race(self, call: Call, joint: Joint, key: Key, exponent: float) -> Steps[_Race]:
        start = yield from call.empty(key)
        streams = [call.stream(self.name, key._replace(candidate=i)) for i in range(self.n)]
        rows = [call.model.branch(start, 0) for _ in streams]
        paths: list[Tokens] = [()] * self.n
        log_p = [0.0] * self.n
        ended: list[int] = []
        try:
            while not ended and len(paths[0]) < call.space.horizon:
                asked = zip(rows, streams, strict=True)
                parts = tuple(row.extend((exponent,), own.at("token", len(paths[0]))) for row, own in asked)
                tokens = yield Together(joint, parts)
                for i, token in enumerate(tokens):
                    paths[i], log_p[i] = (*paths[i], token.token), log_p[i] + token.log_p
                ended = [i for i, path in enumerate(paths) if call.space.ends(path)]
        finally:
            for row in rows:
                row.release()
        first = ended[0] if ended else 0
        return _Race(paths[first], log_p[first], self.n * len(paths[first]))


class _Race(NamedTuple):
    tokens: Tokens
    log_p: float
    drawn: int


def majority(stated: Sequence[str | None]) -> int:
    """The first place of the statement made most often; of equals, of the one made first. 0 where none is made."""
    votes = Counter(s for s in stated if s is not None)  # keeps the order of first votes
    return stated.index(max(votes, key=lambda s: votes[s])) if votes else 0
