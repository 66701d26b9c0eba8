"""Grading that always ends: a grader that crashes or hangs makes the answer wrong, and says so.

Tasks that run foreign code or SymPy have limits of their own, in processes of their own. This one is for whatever else
a grader does in Python: it is interrupted by a signal, which needs the main thread of a Unix system; elsewhere there is
no limit, and none for code in C that never comes back to Python.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from powermc.evaluation.tasks import Grade, Item, Task

SECONDS = 60.0
"""Of one grade. The tasks' own limits are shorter."""

FAULTS = ("grader crashed", "grader hung")
"""Kinds of grades that say nothing of the answer."""


class _TooLong(BaseException):
    """Not an `Exception`: a grader that catches those is interrupted all the same."""


def grade(task: Task, item: Item, text: str, seconds: float = SECONDS) -> Grade:
    """The grade of a text; see `Task.grade`, which says what is raised."""
    try:
        with _limit(seconds):
            return task.grade(item, text)
    except _TooLong:
        return Grade(False, None, f"grader hung: no verdict within {seconds:g} s")
    except SystemExit as error:
        return Grade(False, None, f"grader crashed: SystemExit: {error}")


def check(task: Task, item: Item) -> None:
    """Raise what `Task.grade` raises where nothing could be graded here: before hours of work, not after."""
    grade(task, item, item.solution or item.reference)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    live = True

    def stop(*_: object) -> None:
        if live:
            raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again every second: a bare `except` may swallow one
    try:
        yield
    finally:
        live = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
