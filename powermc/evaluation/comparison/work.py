"""Doing a unit of work: a method answers, timed and charged. This is all that a worker needs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from powermc.errors import ChainError
from powermc.evaluation.comparison.plan import Unit
from powermc.evaluation.methods import Answer, Question
from powermc.evaluation.tasks import Task
from powermc.lm.ledger import Ledger
from powermc.store.writing import together


@dataclass(frozen=True)
class Result:
    """What a unit gave.

    Attributes
    ----------
    number, questions, samples
        Those of the unit.
    answers
        For each question one per sample.
    spent, counts
        As in `Answers`, summed over the unit.
    seconds
        Of the method, everything in it included; not of grading.
    worker
        Who did it: empty for the process that asked.
    errors
        Position of a question to what went wrong: its answers are empty.
    """

    number: int
    questions: tuple[int, ...]
    samples: range
    answers: list[list[Answer]]
    spent: Ledger
    counts: Mapping[str, float]
    seconds: float
    worker: str = ""
    errors: Mapping[int, str] = field(default_factory=dict)


def do(model: Any, task: Task, unit: Unit, worker: str = "") -> Result:
    """Answer the questions of a unit.

    A question that cannot be answered (`ChainError`) does not stop the others: they are asked one by one then, and
    what the failed calls cost is charged.
    """
    asked = [
        Question(item.id, prompt, partial(task.extract, item))
        for item, prompt in zip(unit.items, unit.prompts, strict=True)
    ]
    begun = time.perf_counter()
    answers, spent, counts, errors = _ask(model, unit, asked)
    seconds = time.perf_counter() - begun
    return Result(unit.number, unit.questions, unit.samples, answers, spent, counts, seconds, worker, errors)


Given = tuple[list[list[Answer]], Ledger, Counter[str], dict[int, str]]


def _ask(model: Any, unit: Unit, asked: Sequence[Question]) -> Given:
    before = model.ledger.copy()
    try:
        found = unit.entry.method.answer(model, asked, unit.entry.terms, unit.samples)
        return found.answers, found.spent, Counter(found.counts), {}
    except ChainError as error:
        spent = model.ledger.since(before)
        if len(asked) == 1:
            nothing = [Answer((), "") for _ in unit.samples]
            return [nothing], spent, Counter(), {0: f"{type(error).__name__}: {error}"}
    answers: list[list[Answer]] = []
    counts, errors = Counter[str](), dict[int, str]()
    for position, question in enumerate(asked):
        one, cost, seen, wrong = _ask(model, unit, [question])
        answers += one
        spent = together(spent, cost)
        counts.update(seen)  # and not `+`, which would lose those of 0
        if wrong:
            errors[position] = wrong[0]
    return answers, spent, counts, errors
