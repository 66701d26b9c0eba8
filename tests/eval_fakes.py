"""Methods, a task and a model for tests of comparisons; another process can import them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from powermc.choices import Stream
from powermc.errors import ChainError
from powermc.evaluation import methods, tasks
from powermc.evaluation.comparison import Source
from powermc.evaluation.methods import Answer, Answers, Method, Question, Terms
from powermc.evaluation.tasks import Item, Task, Template
from powermc.lm.ledger import Ledger
from tests.fake_lm import FakeLM

LAYERS = 4


def _draw(question: Question, terms: Terms, sample: int, name: str) -> int:
    stream = Stream(terms.seed, prompt=question.prompt.key, chain=sample).at(f"{name} {terms.alpha:g}")
    return stream.integers(10)


@methods.register
@dataclass(frozen=True)
class Dice(Method):
    """A number 0 to 9 for every sample; it costs what its options say.

    wait: seconds per question. fail: questions of this id cannot be answered. interrupt: Ctrl-C at the question of
    this id. kill: the process dies at the question of this id, once if there is no such file yet.
    """

    name: ClassVar[str] = "dice"
    about: ClassVar[str] = "for tests"

    cost: int = 10
    wait: float = 0.0
    fail: str | None = None
    interrupt: str | None = None
    kill: str | None = None
    flag: str | None = None

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        before = model.ledger.copy()
        rows = []
        for question in questions:
            time.sleep(self.wait)
            if question.id == self.fail:
                model.ledger.ran((0, LAYERS), 1, parallel=False, flops=1.0)
                raise ChainError(f"cannot answer {question.id}")
            if question.id == self.interrupt:
                raise KeyboardInterrupt
            if question.id == self.kill:
                die(self.flag)
            drawn = [_draw(question, terms, s, self.name) for s in samples]
            rows.append([Answer((d, 99), f"it is {d}", -float(d)) for d in drawn])
            model.ledger.ran(
                (0, LAYERS), self.cost * len(samples), parallel=False, flops=1e9 * self.cost * len(samples)
            )
        n = len(questions) * len(samples)
        counts = {"drawn": 4.0 * n, "steps": 10.0 * n, "accepted": 5.0 * n, "changed": 0.0, "unfinished": 0.0}
        return Answers(rows, model.ledger.since(before), counts)


@methods.register
@dataclass(frozen=True)
class Fixed(Method):
    """Always the same number, prepared once: `scale` is fitted."""

    name: ClassVar[str] = "fixed"
    about: ClassVar[str] = "for tests"
    deterministic: ClassVar[bool] = True

    number: int = 7
    scale: float | None = None

    def prepare(self, model: Any, prompts: Any, terms: Terms) -> Method:
        model.ledger.ran((0, LAYERS), 5, parallel=True, flops=5e9)
        PREPARED.append(self.spec)
        return Fixed(self.number, 0.5)

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        assert self.scale is not None, "it was not prepared"
        return Answers([[Answer((self.number,), f"{self.number}") for _ in samples] for _ in questions], Ledger())


PREPARED: list[str] = []
"""Specs in the order in which they were prepared in this process."""


def die(flag: str | None) -> None:
    """Kill this process; only once if a flag is named."""
    if flag is None or not Path(flag).exists():
        if flag is not None:
            Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _extract(item: Item, text: str) -> str | None:
    words = text.split()
    if item.data.get("crash"):
        raise RuntimeError("the grader fell over")
    while item.data.get("hang"):
        time.sleep(0.01)
    return words[-1] if words else None


def _judge(item: Item, answer: str) -> tuple[bool, str]:
    return answer == item.reference, "right" if answer == item.reference else f"wrong: {item.reference}"


DIGITS = tasks.register(
    Task(
        name="digits",
        about="for tests",
        item=lambda row: Item(
            row.id("id"),
            row.text("question"),
            row.text("answer"),
            f"it is {row.text('answer')}",
            {name: row.fields.get(name, False) for name in ("crash", "hang")},
        ),
        extract=_extract,
        judge=_judge,
        chat=Template("{question}", stop=("\nQ:",)),
        plain=Template("Q: {question}\nA:", stop=("\nQ:",)),
    )
)


class Model(FakeLM):
    """A fake with a fingerprint of its own name."""

    def __init__(self, name: str = "fake") -> None:
        super().__init__()
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "ledger", Ledger(layers=LAYERS))


@dataclass(frozen=True)
class FakeSource(Source):
    """Loads `Model`."""

    name: str = "fake"
    options: Any = None

    def load(self) -> Any:
        return Model(self.name)
