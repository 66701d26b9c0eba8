"""One call of a method: every prompt asked once, many rows side by side on the model's engine, costs charged.

A method is a few lines on top of this. It says how a prompt's paths are drawn (`Call.draws`, or a program of its own
for `Call.run`) and which of them is the answer (`Call.answers`). Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from powermc.choices import Stream
from powermc.errors import ArgumentError, ChainError
from powermc.evaluation.methods.base import Answer, Answers, Question, Terms
from powermc.lm.ledger import Ledger
from powermc.scheduling import Failed, Finished, drive
from powermc.sequences.path import Path, Tokens
from powermc.sequences.suffix import draft
from powermc.types import PENDING, Choices, Request, Steps

T = TypeVar("T")

Rule = Callable[[np.ndarray, Choices], int]
"""(log weights of all next tokens, unnormalised, float64, shape (V,); choices) -> the next token."""

ROWS = 64
"""Rows side by side where the model does not say how many it has (`max_rows`)."""


class Key(NamedTuple):
    """Which prompt of the call, which sample of it, which of the candidates for that sample."""

    prompt: int
    sample: int
    candidate: int = 0


@dataclass(frozen=True)
class ByRule:
    """`Choices` that name a token by a rule on its log weights; numbers that the rule wants come from `choices`."""

    rule: Rule
    choices: Choices

    def at(self, purpose: str, index: int = 0) -> ByRule:
        return replace(self, choices=self.choices.at(purpose, index))

    def categorical(self, log_weights: np.ndarray) -> int:
        return self.rule(log_weights, self.choices)

    def integers(self, n: int) -> int:
        return self.choices.integers(n)

    def level(self) -> Any:
        return self.choices.level()


class Call:
    """What one `Method.answer` works with. The ledger is read, and what earlier calls left is forgotten, on entry.

    Attributes
    ----------
    prompts
        The different prompts of the questions, keyed by their tokens.
    space
        All paths that may be answers.
    before
        The model's ledger when the call began.

    Raises `ArgumentError` for a prompt that does not fit the model's context.
    """

    def __init__(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> None:
        self.model, self.questions, self.terms, self.samples = model, questions, terms, samples
        keyed = [replace(q.prompt, key=key_of(q.prompt.ids)) for q in questions]
        self.prompts = list({p.ids: p for p in keyed}.values())
        place = {p.ids: i for i, p in enumerate(self.prompts)}
        self.places = [place[p.ids] for p in keyed]
        for prompt in self.prompts:
            model.check_fits(prompt, terms.max_new_tokens)
        self.space = model.space(terms.max_new_tokens, terms.stop)
        forget_all(model)
        self.before: Ledger = model.ledger.copy()

    def stream(self, purpose: str, key: Key) -> Stream:
        """The random numbers for one purpose of one candidate: of the seed, the prompt's tokens and the key alone."""
        own = Stream(self.terms.seed, prompt=self.prompts[key.prompt].key, chain=key.sample, replica=key.candidate)
        return own.step(0).at(purpose)

    def draws(
        self,
        purpose: str,
        *,
        temperature: float = 1.0,
        rule: Rule | None = None,
        candidates: int = 1,
        once: bool = False,
    ) -> dict[Key, Path]:
        """Paths by `written`, as many `candidates` for every sample; `once`: for one sample, where all are the same."""

        def program(key: Key) -> Steps[Path]:
            path = yield from self.written(key, purpose, temperature, rule)
            return path.detached()

        return self.run(program, candidates=candidates, once=once)

    def written(self, key: Key, purpose: str, temperature: float = 1.0, rule: Rule | None = None) -> Steps[Path]:
        """A path drawn token by token, from p^(1/temperature) normalised, or by a rule on its log weights."""
        choices: Choices = self.stream(purpose, key)
        if rule is not None:
            choices = ByRule(rule, choices)
        path = yield from self.empty(key, 1 / temperature)
        path, _, _ = yield from draft(self.model, self.space, path, 0, temperature, choices)
        return path

    def empty(self, key: Key, *exponents: float) -> Steps[Path]:
        """The path of no tokens, to be continued by draws from these powers of p; its prompt is run."""
        path = yield self.model.score(Path(self.prompts[key.prompt], (), finished=False), exponents)
        return path

    def run(
        self, program: Callable[[Key], Steps[T]], *, candidates: int = 1, once: bool = False, width: int = 1
    ) -> dict[Key, T]:
        """Run a program for every key, as many side by side as there are rows; `width`: rows that each one takes.

        Raises the first `ChainError`, and `ArgumentError` for a program that needs more rows than the model has.
        """
        samples = self.samples[:1] if once else self.samples
        keys = [Key(p, s, c) for p in range(len(self.prompts)) for s in samples for c in range(candidates)]
        self._make_room(len(samples) * candidates * width)
        rows = getattr(self.model, "max_rows", ROWS)
        if width > rows:
            raise ArgumentError(f"{width} rows side by side were asked for and the model has {rows}: raise max_rows")
        found: dict[Key, T] = {}
        with closing(drive(((key, program(key)) for key in keys), active=rows // width)) as outcomes:  # type: ignore[type-var]
            for outcome in outcomes:
                if isinstance(outcome, Failed):
                    raise outcome.error
                if isinstance(outcome, Finished):
                    found[outcome.key] = outcome.value  # type: ignore[index]
        return found

    def _make_room(self, rows_each: int) -> None:
        """Bound the model's rows by memory and allocate them, where it can be asked to."""
        if not self.prompts or not rows_each:
            return
        if (fit := getattr(self.model, "fit", None)) is not None:
            fit(self.prompts, self.terms.max_new_tokens, chains=rows_each)
        if (reserve := getattr(self.model, "reserve", None)) is not None:
            rows = min(getattr(self.model, "max_rows", ROWS), len(self.prompts) * rows_each)
            reserve(rows, max(len(p.ids) for p in self.prompts) + self.terms.max_new_tokens)

    def text(self, tokens: Tokens) -> str:
        """The text of an answer: up to the first stop string, without it."""
        text = self.model.decode(tokens)
        return text[: min((at for s in self.terms.stop if (at := text.find(s)) >= 0), default=None)]

    def answer(self, path: Path) -> Answer:
        """A path, scored by the model, as an answer."""
        return Answer(path.tokens, self.text(path.tokens), path.log_prob)

    def answers(
        self,
        drawn: Mapping[Key, T],
        choose: Callable[[Question, list[T]], Answer],
        counts: Mapping[str, float] | None = None,
    ) -> Answers:
        """What `choose` makes of the candidates for each question and sample; what the call has cost.

        Where only one sample was drawn it stands for all of them. Counts `unfinished`, and `drawn` if these are paths.
        """
        candidates: dict[tuple[int, int], list[T]] = {}
        for key in sorted(drawn):
            candidates.setdefault((key.prompt, key.sample), []).append(drawn[key])
        answers = [
            [choose(question, candidates.get((place, s)) or candidates[place, self.samples[0]]) for s in self.samples]
            for question, place in zip(self.questions, self.places, strict=True)
        ]
        own = dict(counts or {})
        own["unfinished"] = sum(not self.space.ends(a.tokens) for row in answers for a in row)
        if "drawn" not in own:
            own["drawn"] = sum(len(path) for path in drawn.values())  # type: ignore[arg-type]
        return Answers(answers, self.model.ledger.since(self.before), own)

    def first(self, question: Question, candidates: list[Path]) -> Answer:
        """The only candidate, or the first."""
        return self.answer(candidates[0])


@dataclass(frozen=True, slots=True)
class Together(Request):
    """Several requests of one program to one model, answered side by side: by a list, or the first `ChainError`."""

    joint: Joint
    parts: tuple[Request, ...]

    @property
    def oracle(self) -> Joint:
        return self.joint


class Joint:
    """Answers `Together`s: the parts of all programs share the model's batches. All programs must share one."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def answer(self, requests: Sequence[Together]) -> list[Any]:
        parts = [part for request in requests for part in request.parts]
        found: list[Any] = [PENDING] * len(parts)
        while left := [i for i, answer in enumerate(found) if answer is PENDING]:
            answers = self._model.answer([parts[i] for i in left])
            if all(answer is PENDING for answer in answers):
                raise RuntimeError(f"the model answered none of {len(left)} requests; the run cannot go on")
            for i, answer in zip(left, answers, strict=True):
                found[i] = answer
        rest = iter(found)
        lists = [[next(rest) for _ in request.parts] for request in requests]
        return [next((a for a in own if isinstance(a, ChainError)), own) for own in lists]


def key_of(ids: Tokens) -> int:
    """The key of a prompt's random streams: a hash of its token ids, as `CausalLM.prompt` makes it."""
    digest = hashlib.blake2b(np.array(ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def forget_all(model: Any) -> None:
    """Forget what has been run, prompts included, so that a call costs the same whatever went before."""
    engine = getattr(model, "engine", None)
    if engine is not None:
        engine.forget()
    elif (forget := getattr(model, "forget", None)) is not None:
        forget()


def temperature_of(temperature: float | None, terms: Terms) -> float:
    """This, or 1/alpha where there is none."""
    return 1 / terms.alpha if temperature is None else temperature
