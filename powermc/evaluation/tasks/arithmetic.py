"""Chains of sums with written steps: what `tiny-reasoner` was trained for. Generated, graded by the exact integer.

A problem starts with a number and adds, subtracts or multiplies, two to five times; every value on the way is from 1 to
99. A hash of the question alone says whether a problem is held out, so that no problem is on both sides: `draw` takes a
side, the task's items are held-out ones, and the training script (`examples/train_tiny_reasoner.py`) draws the others
from the same function. Items of a seed are the same everywhere; item i does not depend on how many are asked for.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from powermc.choices import Stream
from powermc.evaluation.tasks.base import Item, Task, Template, register
from powermc.evaluation.tasks.numeric import number, spell
from powermc.evaluation.tasks.texts import cut

LENGTHS = (2, 3, 4, 5)
"""Steps of a problem; each as often as the others."""
LARGEST = 99
_LARGEST_OPERAND = 9
_HELD_OUT = 16
"""One problem in so many is held out."""

_VERBS = {"+": "Add", "-": "Subtract", "*": "Multiply by"}
_NEXT_QUESTION = ("\nStart with",)


class Problem(NamedTuple):
    """A first number, and signs with the numbers behind them, in their order (no precedence).

    >>> problem = Problem(17, (("+", 25), ("-", 12), ("*", 3)))
    >>> problem.question
    'Start with 17. Add 25. Subtract 12. Multiply by 3.'
    >>> print(problem.solution)
    17+25=42
    42-12=30
    30*3=90
    #### 90
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def values(self) -> tuple[int, ...]:
        """The value after each step."""
        found = [self.start]
        for sign, operand in self.steps:
            found.append(_apply(found[-1], sign, operand))
        return tuple(found[1:])

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def question(self) -> str:
        return " ".join([f"Start with {self.start}.", *(f"{_VERBS[sign]} {operand}." for sign, operand in self.steps)])

    @property
    def result(self) -> str:
        """The line that ends every answer."""
        return f"#### {self.answer}"

    @property
    def solution(self) -> str:
        """A line for each step, and the result."""
        before = (self.start, *self.values)
        lines = [f"{a}{sign}{b}={c}" for a, (sign, b), c in zip(before, self.steps, self.values, strict=False)]
        return "\n".join([*lines, self.result])

    @property
    def held_out(self) -> bool:
        """Whether it is kept for evaluation: a property of the question's text and of nothing else."""
        return hashlib.blake2b(self.question.encode(), digest_size=8).digest()[0] % _HELD_OUT == 0


def _apply(value: int, sign: str, operand: int) -> int:
    return value + operand if sign == "+" else value - operand if sign == "-" else value * operand


def draw(choices: Stream, length: int, *, held_out: bool) -> Problem:
    """A problem of so many steps on one side of the split."""
    while True:
        start = value = 2 + choices.integers(LARGEST - 1)
        steps: list[tuple[str, int]] = []
        for _ in range(length):
            sign, operand = _step(value, choices)
            value = _apply(value, sign, operand)
            steps.append((sign, operand))
        problem = Problem(start, tuple(steps))
        if problem.held_out == held_out:
            return problem


def _step(value: int, choices: Stream) -> tuple[str, int]:
    """A sign that can follow, each as likely, and an operand from 2 that keeps the value within 1 to `LARGEST`."""
    most = {"+": LARGEST - value, "-": value - 1, "*": LARGEST // value}
    signs = [sign for sign, largest in most.items() if largest >= 2]
    sign = signs[choices.integers(len(signs))]
    return sign, 2 + choices.integers(min(most[sign], _LARGEST_OPERAND) - 1)


def training_problems(count: int, seed: int) -> list[Problem]:
    """Problems that are not held out, of 2, 3, 4, 5, 2, ... steps."""
    stream = Stream(seed)
    return [draw(stream.at("corpus", i), LENGTHS[i % len(LENGTHS)], held_out=False) for i in range(count)]


def generate(count: int, seed: int) -> list[Item]:
    """`count` held-out items, of 2, 3, 4, 5, 2, ... steps."""
    return [_item(seed, i) for i in range(count)]


def _item(seed: int, i: int) -> Item:
    length = LENGTHS[i % len(LENGTHS)]
    problem = draw(Stream(seed).at("arithmetic", i), length, held_out=True)
    data = {"steps": length, "values": problem.values}
    return Item(f"arithmetic-{seed}-{i + 1}", problem.question, str(problem.answer), problem.solution, data)


def _extract(item: Item, text: str) -> str | None:
    value = number(cut(text, _NEXT_QUESTION))
    return None if value is None else spell(value)


def _judge(item: Item, answer: str) -> tuple[bool, str]:
    return (True, "right") if answer == item.reference else (False, f"wrong: {answer}, not {item.reference}")


ARITHMETIC = register(
    Task(
        name="arithmetic",
        about="two to five sums in a row, with written steps; generated, graded exactly",
        generate=generate,
        extract=_extract,
        judge=_judge,
        chat=Template(
            "{question}\n\nWrite a line for each step. End with the result on a line of its own after ####.",
            answer="\n\n{solution}",
        ),
        plain=Template("{question}\n", answer="{solution}", stop=_NEXT_QUESTION),
    )
)
