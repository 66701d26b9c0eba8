"""Where units of work are done: in this process, by a pool of processes, on a Ray cluster.

An executor is given a job, then units; it yields results as they come, in any order. If a worker dies, its unit is done
again by another one, up to `RETRIES` times; then there is an error that names the unit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from powermc.errors import ArgumentError, ModelError, PowermcError
from powermc.evaluation import tasks
from powermc.evaluation.comparison.plan import Unit
from powermc.evaluation.comparison.work import Result, do
from powermc.evaluation.tasks import Task

RETRIES = 2
"""How often a unit is done again after its worker died."""


class WorkerError(PowermcError):
    """A unit whose workers died, or a worker that could not begin."""


@dataclass(frozen=True)
class Source:
    """A model by name, with the options of `CausalLM.from_pretrained`: what another process can load."""

    name: str
    options: Mapping[str, Any]

    def load(self) -> Any:
        from powermc.lm import CausalLM

        return CausalLM.from_pretrained(self.name, **self.options)


@dataclass(frozen=True)
class Job:
    """What all units of a comparison have in common.

    Attributes
    ----------
    task
        Its name, and the modules that make it known: another process imports them.
    model
        What workers load; None where only this process has it.
    identity
        The hash of the model's weights: a worker that has loaded others is refused.
    run
        The comparison's name, written into the files of workers.
    folder
        Where workers write their files.
    """

    task: str
    modules: tuple[str, ...]
    model: Source | None
    identity: str
    run: str
    folder: Path

    def loadable(self) -> Source:
        """Raises `ArgumentError` where workers have nothing to load."""
        if self.model is None:
            raise ArgumentError("workers load the model by name: give its name, or run without workers")
        return self.model


def modules_of(task: Task) -> tuple[str, ...]:
    """Where a task's functions are defined."""
    homes = {getattr(function, "__module__", None) for function in (task.item, task.extract, task.judge, task.generate)}
    return tuple(sorted(home for home in homes if home and home != "__main__"))


def task_of(job: Job) -> Task:
    """The task in a worker. Raises `WorkerError` for one that is not known there."""
    for module in job.modules:
        importlib.import_module(module)
    try:
        return tasks.get(job.task)
    except ArgumentError as error:
        raise WorkerError(f"a worker does not know the task: {error}; register it in a module of its own") from error


def model_of(job: Job) -> Any:
    """The model in a worker. Raises `ModelError` for another one than the comparison's."""
    from powermc.store.header import identity

    model = job.loadable().load()
    if (found := identity(model)) != job.identity:
        raise ModelError(f"a worker has loaded another model than the comparison's ({found}, not {job.identity})")
    return model


Told = Callable[[Unit], None]
"""Called when a unit is begun."""


class Executor(Protocol):
    """Does units of work. A context manager: what it has started is ended with the block."""

    workers: int
    """How many units are done at a time."""

    apart: bool
    """Whether workers load the model themselves, and this process no longer needs it."""

    def begin(self, job: Job, model: Any) -> None:
        """Get ready. `model` is the live one, None if `apart`."""
        ...

    def results(self, units: Sequence[Unit], told: Told) -> Iterator[Result]:
        """Do the units; results come in any order. Raises what a method raises, and `WorkerError`."""
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(self, *exc: object) -> None: ...


class InProcess:
    """One after the other, here."""

    workers, apart = 1, False

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def begin(self, job: Job, model: Any) -> None:
        self._task, self._model = tasks.get(job.task), model

    def results(self, units: Sequence[Unit], told: Told) -> Iterator[Result]:
        for unit in units:
            told(unit)
            yield do(self._model, self._task, unit)
