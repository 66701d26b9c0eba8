"""What a comparison consists of: questions, methods, and units of work that are finished one by one.

A method is asked for by its spec (`powermc.evaluation.methods.parse`). Every spec may also have `alpha=`, which holds
for this method instead of the comparison's: `power:steps=4:alpha=2`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from powermc.errors import ArgumentError
from powermc.evaluation import methods, tasks
from powermc.evaluation.methods import Method, Terms
from powermc.evaluation.tasks import Item, Task
from powermc.sampling import check_count
from powermc.sequences.path import Prompt


@dataclass(frozen=True)
class Entry:
    """One line of the table. `spec` names it: that of the method, and `alpha` where it is not the comparison's."""

    spec: str
    method: Method
    terms: Terms


def entry(spec: str, terms: Terms) -> Entry:
    """The entry of a spec. Raises `ArgumentError` for an unknown method, option or value."""
    name, *options = spec.strip().split(":")
    own = {f.name for f in fields(methods.get(name))}
    alphas = [option.partition("=")[2] for option in options if option.partition("=")[0] == "alpha"]
    if "alpha" in own or not alphas:
        method = methods.parse(spec)
        return Entry(method.spec, method, terms)
    if len(alphas) > 1:
        raise ArgumentError(f"option 'alpha' of method {name!r} is given twice")
    method = methods.parse(":".join([name, *(option for option in options if option.partition("=")[0] != "alpha")]))
    try:
        alpha = float(alphas[0])
    except ValueError:
        raise ArgumentError(f"{name}:alpha must be float, got {alphas[0]!r}") from None
    changed = replace(terms, alpha=alpha)
    return Entry(method.spec if alpha == terms.alpha else f"{method.spec}:alpha={alpha:g}", method, changed)


def as_json(method: Method) -> str:
    """A method with all its options: a spec would not do for one with a colon in it, such as some names of files."""
    return json.dumps([method.name, method.options()])


def from_json(text: str) -> Method:
    """The inverse."""
    name, options = json.loads(text)
    return methods.get(name)(**options)


def specs_of(text: str) -> list[str]:
    """The specs of an option such as `greedy,power:steps=4`. Raises `ArgumentError` for an empty one."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise ArgumentError(f"methods must be specs with commas between, such as greedy,power:steps=4; got {text!r}")
    return found


@dataclass(frozen=True)
class Plan:
    """A comparison before it runs.

    Attributes
    ----------
    task, items
        The questions, in the order of the data.
    specs
        Of the methods.
    terms
        What all methods are given alike; its stop strings are taken from the template (`settled`).
    style
        "chat" or "plain"; None: "chat" if the model has a chat template.
    shots
        Worked examples before every question.
    samples
        Answers of each method to each question; one of a method whose samples are all the same.
    group
        Questions of one unit of work: they are answered side by side. It changes costs, and no answer.
    data_seed
        Of the items of a generated task and of the choice of the examples; for the record.

    Raises `ArgumentError` for what no comparison can be made of.
    """

    task: Task
    items: Sequence[Item]
    specs: Sequence[str]
    terms: Terms
    style: str | None = None
    shots: tuple[Item, ...] = ()
    samples: int = 1
    group: int = 8
    data_seed: int = 0

    def __post_init__(self) -> None:
        check_count("samples", self.samples, least=1)
        check_count("group", self.group, least=1)
        if not self.items:
            raise ArgumentError("there are no questions")
        if not self.specs:
            raise ArgumentError(f"no method is named; there are {', '.join(methods.names())}")
        if self.style is not None:
            self.task.template(self.style)
        named = [e.spec for e in self.entries]
        if twice := sorted({spec for spec in named if named.count(spec) > 1}):
            raise ArgumentError(f"method {twice[0]!r} is given twice")
        self.task.prompt(self.items[0], self.style or "plain", self.shots)

    @property
    def entries(self) -> list[Entry]:
        return [entry(spec, self.terms) for spec in self.specs]

    def settled(self, model: Any) -> Plan:
        """The plan with the style that suits a model, and the stop strings of that style's template."""
        style = self.style or ("chat" if _has_template(model) else "plain")
        return replace(self, style=style, terms=replace(self.terms, stop=self.task.template(style).stop))

    def prompts(self, model: Any) -> list[Prompt]:
        """The prompt of every question. Raises `ArgumentError`, with the question's id, for one that does not fit."""
        assert self.style is not None, "a plan is settled first"
        found = []
        for item in self.items:
            text = self.task.prompt(item, self.style, self.shots)
            prompt = model.prompt(text, chat=self.style == "chat")
            try:
                model.check_fits(prompt, self.terms.max_new_tokens)
            except ArgumentError as error:
                raise ArgumentError(f"question {item.id!r}: {error}") from error
            found.append(prompt)
        return found

    def settings(self) -> dict[str, Any]:
        """What has to be the same when a comparison is gone on with, JSON-able."""
        return {
            "task": self.task.name,
            "style": self.style,
            "shots": len(self.shots),
            "data_seed": self.data_seed,
            **{f.name: getattr(self.terms, f.name) for f in fields(Terms)},
            "stop": list(self.terms.stop),
        }


def _has_template(model: Any) -> bool:
    return bool(getattr(getattr(model, "text", None), "has_chat_template", False))


@dataclass(frozen=True)
class Unit:
    """Some questions, answered by one method: the least that is committed.

    number: of the method in the store. questions: their numbers, in the order of the data.
    """

    number: int
    entry: Entry
    questions: tuple[int, ...]
    items: tuple[Item, ...]
    prompts: tuple[Prompt, ...]
    samples: range

    @property
    def name(self) -> str:
        """For people."""
        first, last = self.questions[0] + 1, self.questions[-1] + 1
        which = f"question {first}" if first == last else f"questions {first}-{last}"
        more = "" if self.samples == range(1) else f", samples {self.samples.start + 1}-{self.samples.stop}"
        return f"{self.entry.spec}, {which}{more}"


Done = Callable[[int, int], set[int]]
"""(method's number, question's number) to the samples that there are."""


def units(plan: Plan, entries: Sequence[tuple[int, Entry]], prompts: Sequence[Prompt], done: Done) -> Iterator[Unit]:
    """What is left to be done: groups of questions in turn, and of each group one method after the other."""
    for start in range(0, len(plan.items), plan.group):
        group = range(start, min(start + plan.group, len(plan.items)))
        for number, one in entries:
            wanted = set(range(1 if one.method.deterministic else plan.samples))
            left = [(tuple(sorted(wanted - done(number, q))), q) for q in group]
            for missing, members in groupby(sorted(left), key=lambda pair: pair[0]):
                questions = tuple(q for _, q in members)
                for samples in _runs(missing):
                    yield Unit(
                        number,
                        one,
                        questions,
                        tuple(plan.items[q] for q in questions),
                        tuple(prompts[q] for q in questions),
                        samples,
                    )


def _runs(numbers: Sequence[int]) -> Iterator[range]:
    """Ascending numbers as ranges without gaps."""
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [n for _, n in run]
        yield range(members[0], members[-1] + 1)


def read(task: str, data: Any, *, limit: int | None, data_seed: int, shots: int, shots_data: Any) -> dict[str, Any]:
    """The fields `task`, `items`, `shots` and `data_seed` of a plan, from names of files.

    Raises `ArgumentError` for what cannot be read, and for options that would do nothing.
    """
    found = tasks.get(task)
    check_count("shots", shots, least=0)
    if shots_data is not None and not shots:
        raise ArgumentError(f"{shots_data} would not be used: say how many examples are taken from it (--shots)")
    if data_seed and found.generate is None and not shots:
        raise ArgumentError(f"a data seed has no effect: task {task!r} is read from its file, without examples")
    items = tasks.load(found, data, limit=limit, seed=data_seed)
    return {"task": found, "items": items, "shots": _shots(found, shots, shots_data, data_seed), "data_seed": data_seed}


def _shots(task: Task, count: int, source: Any, seed: int) -> tuple[Item, ...]:
    if not count:
        return ()
    if source is None:
        if task.generate is None:
            raise ArgumentError(f"{count} examples need a file of their own: --shots-data")
        return tuple(task.generate(count, seed + 1))  # other items than those that are asked
    return tuple(tasks.choose_shots(tasks.load(task, source), count, seed))
