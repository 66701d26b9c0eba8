"""What a task is: items, prompts, and a grade for each text; and the registry that finds a task by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from powermc.choices import Stream
from powermc.errors import ArgumentError, PowermcError

STYLES = ("chat", "plain")


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes
    ----------
    id
        Unique within a data set.
    question
        What the template puts into the prompt.
    reference
        The right answer, or what it is graded by, as text.
    solution
        A worked answer in the task's own format, for few-shot prompts; empty if there is none.
    data
        What else the grader needs.
    """

    id: str
    question: str
    reference: str
    solution: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


class Grade(NamedTuple):
    """`why` begins with its kind: "right", "wrong", "no answer", "grader crashed" or what the task adds."""

    correct: bool
    answer: str | None
    why: str

    @property
    def kind(self) -> str:
        """`why` up to its first colon, to count by."""
        return self.why.partition(":")[0]


class Row(NamedTuple):
    """One line of a data file: `where` it stands, for errors, and its fields."""

    where: str
    number: int
    fields: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The first of these fields that there is. Raises `ArgumentError` if none is, or it is no text."""
        value = self.any(*names)
        if not isinstance(value, str) or not value.strip():
            raise ArgumentError(f"{self.where}: field {self.named(*names)!r} must be text, got {value!r}")
        return value

    def texts(self, *names: str) -> tuple[str, ...]:
        """A field that is a list of texts, maybe empty. Raises `ArgumentError`."""
        value = self.any(*names)
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise ArgumentError(f"{self.where}: field {self.named(*names)!r} must be a list of texts, got {value!r}")
        return tuple(value)

    def any(self, *names: str) -> Any:
        """The first of these fields that there is. Raises `ArgumentError` if none is."""
        name = self.named(*names)
        if name is None:
            fields = " or ".join(repr(name) for name in names)
            raise ArgumentError(f"{self.where}: no field {fields}; it has {', '.join(self.fields) or 'none'}")
        return self.fields[name]

    def named(self, *names: str) -> str | None:
        """Which of these fields there is, first come first served."""
        return next((name for name in names if name in self.fields), None)

    def id(self, *names: str) -> str:
        """The field that names the row, or its number."""
        name = self.named(*names)
        return str(self.number) if name is None else str(self.fields[name])


@dataclass(frozen=True)
class Template:
    """How a prompt is written.

    Attributes
    ----------
    ask
        With `{question}` where the question goes.
    answer
        What follows `ask` in a few-shot example, with `{solution}`, and `{question}` where need be.
    stop
        Strings that end an answer, for the measure's stop strings: where a model goes on with a question of its own.
    """

    ask: str
    answer: str = " {solution}"
    stop: tuple[str, ...] = ()

    def prompt(self, question: str, shots: Sequence[Item]) -> str:
        """The prompt of a question, after examples."""
        example = self.ask + self.answer
        examples = [example.format(question=shot.question, solution=shot.solution) for shot in shots]
        return "\n\n".join([*examples, self.ask.format(question=question)])


class Hub(NamedTuple):
    """Where a task's data set is on the Hugging Face hub."""

    path: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes
    ----------
    name, about
        What it is called, and one line on it.
    item
        The item of a row of the data file; None for a task that is generated. Raises `ArgumentError`.
    extract
        (item, text) -> the answer that a text gives, in one spelling as far as possible (so that votes can be
        counted), or None.
    judge
        (item, answer) -> (correct, why).
    chat, plain
        How prompts are written for a model with a chat template (as its one user message), and for one without.
    hub
        Where the data set is, None for none.
    generate
        (number of items, seed) -> items; None for a task that is read.
    """

    name: str
    about: str
    extract: Callable[[Item, str], str | None]
    judge: Callable[[Item, str], tuple[bool, str]]
    chat: Template
    plain: Template
    item: Callable[[Row], Item] | None = None
    hub: Hub | None = None
    generate: Callable[[int, int], list[Item]] | None = None

    def template(self, style: str) -> Template:
        """Raises `ArgumentError` for a style that is not "chat" or "plain"."""
        if style not in STYLES:
            raise ArgumentError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
        return self.chat if style == "chat" else self.plain

    def prompt(self, item: Item, style: str = "chat", shots: Sequence[Item] = ()) -> str:
        """The prompt of an item, after worked examples if any are given.

        Raises `ArgumentError` for an example without a solution and for one that asks what the item asks.
        """
        template = self.template(style)
        for shot in shots:
            if not shot.solution:
                raise ArgumentError(f"example {shot.id!r} has no worked solution: it cannot be a few-shot example")
            if shot.question == item.question:
                raise ArgumentError(f"example {shot.id!r} asks what item {item.id!r} asks: it would give the answer")
        return template.prompt(item.question, shots)

    def grade(self, item: Item, text: str) -> Grade:
        """Whether a text answers an item, and why. A grader that raises makes the item wrong, and says so.

        Raises `PowermcError` only where no text could be graded (a package is missing, code cannot be contained).
        """
        answer = None
        try:
            answer = self.extract(item, text)
            if answer is None:
                return Grade(False, None, "no answer")
            return Grade(*self._judged(item, answer))
        except PowermcError:
            raise
        except Exception as error:
            return Grade(False, answer, f"grader crashed: {type(error).__name__}: {error}")

    def _judged(self, item: Item, answer: str) -> tuple[bool, str, str]:
        correct, why = self.judge(item, answer)
        return correct, answer, why


def count_kinds(grades: Iterable[Grade]) -> Counter[str]:
    """How many grades there are of each kind."""
    return Counter(grade.kind for grade in grades)


def choose_shots(pool: Sequence[Item], count: int, seed: int = 0) -> list[Item]:
    """`count` different items of `pool` that have a worked solution, by the seed; the same for every prompt.

    Raises `ArgumentError` if there are fewer.
    """
    worked = [item for item in pool if item.solution]
    if not 0 <= count <= len(worked):
        raise ArgumentError(f"{count} few-shot examples were asked for; {len(worked)} items have a worked solution")
    order = shuffled(len(worked), Stream(seed).at("shots"))
    return [worked[i] for i in order[:count]]


def shuffled(n: int, choices: Stream) -> list[int]:
    """0, ..., n - 1 in a uniform order (Fisher and Yates)."""
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = choices.integers(i + 1)
        order[i], order[j] = order[j], order[i]
    return order


_tasks: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Make a task known by its name. Raises `ArgumentError` if another has that name, or it has no items."""
    if task.name in _tasks:
        raise ArgumentError(f"there is a task {task.name!r} already")
    if (task.item is None) == (task.generate is None):
        raise ArgumentError(f"task {task.name!r} needs either item (read) or generate")
    _tasks[task.name] = task
    return task


def names() -> list[str]:
    """All tasks."""
    return sorted(_tasks)


def get(name: str) -> Task:
    """Raises `ArgumentError`, which lists all, for an unknown name."""
    if name not in _tasks:
        raise ArgumentError(f"no task {name!r}; there are {', '.join(names())}")
    return _tasks[name]
