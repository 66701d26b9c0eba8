"""Tasks: questions, prompts and graders, found by name. docs/tasks.md has the rules of every grader.

>>> from powermc.evaluation import tasks
>>> task = tasks.get("countdown")
>>> item = tasks.load(task, limit=1)[0]
>>> task.grade(item, item.solution).correct
True

A task of one's own is a `Task` given to `register`. Needs no torch.
"""

from __future__ import annotations

from powermc.evaluation.tasks.arithmetic import ARITHMETIC
from powermc.evaluation.tasks.base import (
    STYLES,
    Grade,
    Hub,
    Item,
    Row,
    Task,
    Template,
    choose_shots,
    count_kinds,
    get,
    names,
    register,
)
from powermc.evaluation.tasks.coding import HUMANEVAL, MBPP, with_limits
from powermc.evaluation.tasks.countdown import COUNTDOWN
from powermc.evaluation.tasks.gpqa import GPQA
from powermc.evaluation.tasks.maths import GSM8K, MATH
from powermc.evaluation.tasks.reading import load
from powermc.evaluation.tasks.sandbox import Limits, SandboxError, containment

__all__ = [
    "ARITHMETIC",
    "COUNTDOWN",
    "GPQA",
    "GSM8K",
    "HUMANEVAL",
    "MATH",
    "MBPP",
    "STYLES",
    "Grade",
    "Hub",
    "Item",
    "Limits",
    "Row",
    "SandboxError",
    "Task",
    "Template",
    "choose_shots",
    "containment",
    "count_kinds",
    "get",
    "load",
    "names",
    "register",
    "with_limits",
]
