"""Running a comparison: what is missing in its folder is done, graded and committed, unit by unit."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from powermc.errors import ArgumentError, StoreError
from powermc.evaluation.comparison import grading
from powermc.evaluation.comparison.executors import Executor, InProcess, Job, Source, modules_of
from powermc.evaluation.comparison.merging import absorb, keep
from powermc.evaluation.comparison.plan import Entry, Plan, Unit, from_json, units
from powermc.evaluation.comparison.results import FILE, Results
from powermc.evaluation.methods import prepared
from powermc.sequences.path import Prompt
from powermc.store.header import identity, session

WORKERS = "workers"
"""The folder of the workers' files, in the comparison's."""


PREPARED_ON = 8
"""Methods are prepared on so many questions, the first ones: adding more changes nothing then."""


class Display(Protocol):
    """Somewhere to show what is being done (`powermc.progress.Parts`)."""

    total: int | None

    def begin(self, name: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """units: how many were done in this session. interrupted: by Ctrl-C, and the rest is left to be done."""

    units: int
    interrupted: bool


def compare(
    plan: Plan,
    model: Any,
    out: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    loader: Callable[[], Any] | None = None,
    display: Display | None = None,
    session_facts: dict[str, Any] | None = None,
    header: dict[str, Any] | None = None,
) -> Outcome:
    """Run a comparison, or go on with the one in its folder.

    Parameters
    ----------
    plan
        What is compared.
    model
        A live model, or a `Source` that says how to load one.
    out
        The folder of the comparison; made if need be.
    executor
        Where units are done; here by default. Workers need a `Source`.
    loader
        How this process loads the model of a `Source`, if not by `Source.load`.
    display
        Where progress is shown.
    session_facts, header
        What else is written of this session, and of the comparison.

    Ctrl-C ends it after the last committed unit. Raises `StoreError` where the folder holds another comparison,
    `WorkerError`, and whatever loading and methods raise; what was committed is kept.
    """
    folder = folder_of(out)
    executor = InProcess() if executor is None else executor
    if executor.apart and not isinstance(model, Source):
        raise ArgumentError("workers load the model by name: give a Source, or run without workers")
    grading.check(plan.task, plan.items[0])
    with Results(folder / FILE) as results:
        try:
            source = model if isinstance(model, Source) else None
            live = model if source is None else (loader or source.load)()
            plan = plan.settled(live)
            prompts = plan.prompts(live)
            facts = {**session(), "workers": executor.workers, "group": plan.group, **(session_facts or {})}
            _open(results, plan, live, prompts, facts, header or {})
            absorb(results, plan.task, plan.items, folder / WORKERS)
            entries = _prepared(results, plan, live, prompts, display)
            left = list(units(plan, entries, prompts, results.reader.done))
            if left:
                job = _job(results, plan, source, folder)
                if executor.apart:
                    del live, model
                    gc.collect()  # workers hold models of their own
                    live = None
                return _work(results, plan, left, executor, job, live, display)
        except KeyboardInterrupt:
            return Outcome(0, True)
        return Outcome(0, False)


def folder_of(out: str | os.PathLike[str]) -> Path:
    """The folder, made if need be. Raises `ArgumentError` for a place where there can be none."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def _open(
    results: Results, plan: Plan, model: Any, prompts: Sequence[Prompt], facts: dict[str, Any], more: dict[str, Any]
) -> None:
    """Write the header and the questions, or check that those in the file are these."""
    who = identity(model)
    if results.begun:
        results.check(plan, who)
        header = results.reader.header
        results.learn_questions(plan.items, prompts)
        results.update(samples=plan.samples, sessions=[*header["sessions"], facts], **more)
        return
    decoder = getattr(model, "decoder", None)
    results.begin(
        {
            "settings": plan.settings(),
            "identity": who,
            "model": getattr(model, "name", type(model).__name__),
            "dtype": None if decoder is None else str(decoder.dtype).removeprefix("torch."),
            "samples": plan.samples,
            "sessions": [facts],
            **more,
        }
    )
    results.learn_questions(plan.items, prompts)


def _prepared(
    results: Results, plan: Plan, model: Any, prompts: Sequence[Prompt], display: Display | None
) -> list[tuple[int, Entry]]:
    """Every entry with its number and the method that answers: as it was prepared before, or prepared now."""
    known = results.reader.methods()
    entries: list[tuple[int, Entry]] = []
    for entry in plan.entries:
        if entry.spec in known:
            number, options, ready = known[entry.spec]
            _check_options(results.path, entry, options)
            method = from_json(ready)
        else:
            if display is not None:
                display.begin(f"preparing {entry.spec}")
            begun = time.perf_counter()
            method, spent = prepared(entry.method, model, prompts[:PREPARED_ON], entry.terms)
            number = results.learn_method(entry, method, time.perf_counter() - begun, spent)
        entries.append((number, Entry(entry.spec, method, entry.terms)))
    return entries


def _check_options(path: Path, entry: Entry, known: dict[str, Any]) -> None:
    """Raise `StoreError` where a spec no longer means what it meant: defaults may change from version to version."""
    for name, value in entry.method.options().items():
        if name in known and known[name] != value:
            raise StoreError(
                f"{path}: its method {entry.spec!r} has {name} = {known[name]!r}, and {value!r} is what the spec "
                f"means now; write {name} out for a method of its own, or use another folder"
            )


def _job(results: Results, plan: Plan, source: Source | None, folder: Path) -> Job:
    header = results.reader.header
    return Job(
        plan.task.name,
        modules_of(plan.task),
        source,
        header["identity"],
        header["run"],
        (folder / WORKERS).resolve(),
    )


def _work(
    results: Results,
    plan: Plan,
    left: Sequence[Unit],
    executor: Executor,
    job: Job,
    model: Any,
    display: Display | None,
) -> Outcome:
    """Do the units."""
    if display is not None:
        display.total = len(left)

    def told(unit: Unit) -> None:
        if display is not None:
            display.begin(f"{unit.name} of {len(plan.items)}")

    done, interrupted = 0, False
    try:
        with executor:
            executor.begin(job, model)
            for result in executor.results(left, told):
                keep(results, plan.task, plan.items, result)
                done += 1
    except KeyboardInterrupt:
        interrupted = True
    absorb(results, plan.task, plan.items, job.folder)
    return Outcome(done, interrupted)
