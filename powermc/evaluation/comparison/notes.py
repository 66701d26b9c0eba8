"""What a table's reader has to know beside the figures, in sentences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from powermc.evaluation.comparison.figures import kinds
from powermc.evaluation.comparison.grading import FAULTS
from powermc.evaluation.comparison.reading import Line, Record
from powermc.series import si

_NAMED = 5
"""Questions that a sentence names at most."""

_RESOURCES = ("workers", "executor", "threads", "group", "max_rows", "memory", "compiled", "device", "powermc", "torch")
"""What may differ between sessions, and makes their costs differ."""


def notes(record: Record) -> list[str]:
    """All there is to say."""
    found: list[str] = []
    for line in record.lines:
        found += _missing(line, record)
        found += _named(line, record, FAULTS, "counted as wrong: the grader did not decide")
        found += _named(line, record, ("failed",), "counted as wrong: the method could not answer")
        found += _unfinished(line)
        found += _prepared(line)
    return [*found, *_sessions(record)]


def _missing(line: Line, record: Record) -> list[str]:
    wanted = len(record.questions) * (1 if line.same else record.header["samples"])
    left = wanted - len(line.answers)
    return [f"{line.spec}: {left} of {wanted} answers are not there yet; the same command goes on."] if left else []


def _named(line: Line, record: Record, wanted: Sequence[str], what: str) -> list[str]:
    hits = [(q, given) for (q, _), given in line.answers.items() if given.kind in wanted]
    if not hits:
        return []
    names = list(dict.fromkeys(record.questions[q].id for q, _ in hits))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    why = hits[0][1].error or hits[0][1].why
    many = f"{len(hits)} answer{'s' if len(hits) != 1 else ''}"
    return [f"{line.spec}: {many} {what} (questions {', '.join(names[:_NAMED])}{more}; the first: {why})."]


def _unfinished(line: Line) -> list[str]:
    cut, n = line.costs.counts.get("unfinished", 0), len(line.answers)
    none = kinds(line)["no answer"]
    found = [f"{cut:.0f} of {n} answers were cut off by the horizon"] if cut else []
    found += [f"in {none} no answer was found"] if none else []
    return [f"{line.spec}: {', and '.join(found)}."] if found else []


def _prepared(line: Line) -> list[str]:
    name, options = line.prepared
    new = [f"{option} = {_short(value)}" for option, value in options.items() if line.options.get(option) != value]
    other = name != line.spec.partition(":")[0]
    if not new and not other and not line.preparing.flops:
        return []
    flops = line.preparing.flops
    cost = f"{si(flops)}FLOP and {line.preparing_seconds:.1f} s, not in the tables" if flops else "at no cost"
    return [f"{line.spec}: prepared once ({cost}) as {name}{' with ' if new else ''}{', '.join(new)}."]


def _short(value: Any) -> str:
    """A value; of a file its name alone, since folders say nothing about a method."""
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else str(value)


def _sessions(record: Record) -> list[str]:
    sessions = record.header["sessions"]
    found = []
    for name in _RESOURCES:
        values = list(dict.fromkeys(str(session.get(name)) for session in sessions))
        if len(values) > 1:
            found.append(f"{name} {' and '.join(values)}")
    if not found:
        return []
    return [f"The {len(sessions)} sessions differ in {', '.join(found)}: costs and seconds are of all together."]
