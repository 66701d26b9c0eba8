"""Methods side by side on a task, in a folder that outlives the process: run, gone on with, tabulated."""

from __future__ import annotations

from powermc.evaluation.comparison.ablation import ablation
from powermc.evaluation.comparison.agreement import Difference, differences
from powermc.evaluation.comparison.executors import Executor, InProcess, Source, WorkerError
from powermc.evaluation.comparison.plan import Entry, Plan, Unit, entry
from powermc.evaluation.comparison.reading import Record
from powermc.evaluation.comparison.running import Outcome, compare
from powermc.evaluation.comparison.tables import load, write

__all__ = [
    "Difference",
    "Entry",
    "Executor",
    "InProcess",
    "Outcome",
    "Plan",
    "Record",
    "Source",
    "Unit",
    "WorkerError",
    "ablation",
    "compare",
    "differences",
    "entry",
    "load",
    "write",
]
