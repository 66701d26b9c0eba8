"""Taking results into a comparison's file: graded, and those of workers' own files with them.

Each worker has a file of its own, so that nothing is lost with whoever dies. Where two files have the same answer, it
must be the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from powermc.errors import StoreError
from powermc.evaluation.comparison.grading import grade
from powermc.evaluation.comparison.reading import reading
from powermc.evaluation.comparison.results import APPLICATION, FORMAT, Results, remove
from powermc.evaluation.comparison.work import Result
from powermc.evaluation.tasks import Item, Task
from powermc.store.file import lock, unlock


def keep(results: Results, task: Task, items: Sequence[Item], result: Result) -> None:
    """Grade the answers of a unit and commit it."""
    begun = time.perf_counter()
    grades = [
        [grade(task, items[question], given.text) for given in row]
        for question, row in zip(result.questions, result.answers, strict=True)
    ]
    results.commit(result, grades, time.perf_counter() - begun)


def absorb(results: Results, task: Task, items: Sequence[Item], folder: Path) -> None:
    """Merge the files of a folder and delete them. One that is still being written is left for later."""
    if not folder.is_dir():
        return
    for path in sorted(folder.glob("*.db")):
        try:
            held = lock(path)
        except StoreError:
            continue
        try:
            take(results, task, items, path)
        finally:
            unlock(held)
        remove(path)
    if not any(folder.iterdir()):
        folder.rmdir()


def take(results: Results, task: Task, items: Sequence[Item], path: Path) -> int:
    """Take over what is new in a worker's file; returns how many units that were.

    Raises `StoreError` for a file of another comparison, and for an answer that is there already and differs.
    """
    if not path.stat().st_size:
        return 0  # its worker died before it began
    taken = 0
    with reading(path, APPLICATION, FORMAT) as reader:
        if reader.header.get("run") != results.reader.header["run"]:
            raise StoreError(f"{path}: it belongs to another comparison than {results.path}; move it away")
        for result in reader.results():
            if not _known(results, items, result, path):
                keep(results, task, items, result)
                taken += 1
    return taken


def _known(results: Results, items: Sequence[Item], result: Result, path: Path) -> bool:
    """Whether all answers of a unit are there. Raises `StoreError` if one of them is another."""
    known = True
    for question, row in zip(result.questions, result.answers, strict=True):
        for sample, given in zip(result.samples, row, strict=True):
            mine = results.reader.tokens(result.number, question, sample)
            known = known and mine is not None
            if mine is not None and mine != given.tokens:
                spec = next(s for s, (n, *_) in results.reader.methods().items() if n == result.number)
                raise StoreError(
                    f"{path}: its answer of {spec} to question {question + 1} ({items[question].id!r}), sample "
                    f"{sample + 1}, differs from that of {results.path}; results that overlap must be the same: "
                    "remove one of the files"
                )
    return known
