"""The tables as one HTML file that loads nothing: escaped, light and dark, usable by keyboard.

Its policy lets nothing run but the script built here. What a model wrote is only ever shown as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module, resources
from typing import Any, NamedTuple

from powermc._version import __version__
from powermc.errors import ModelError
from powermc.evaluation.comparison.figures import Figures
from powermc.evaluation.comparison.plot import points
from powermc.evaluation.comparison.reading import Given, Record
from powermc.evaluation.comparison.table import Tables
from powermc.report.build import policy, source
from powermc.series import si
from powermc.visible import visible

SHOWN = 200
"""Questions whose answers are on the page, at most: the others are in the store."""

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 150, 16, 48


def page(record: Record, shown: Tables) -> str:
    """The page. Raises `ModelError` without jinja2."""
    try:
        jinja, markup = import_module("jinja2"), import_module("markupsafe").Markup
    except ImportError as error:
        raise ModelError(f"a page needs the package {error.name}: pip install 'powermc[report]'") from error
    script = _own("table.js")
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True)
    return environment.from_string(_own("table.html.j2")).render(
        shown=shown,
        picture=picture(shown.figures),
        questions=[_question(record, q) for q in range(min(len(record.questions), SHOWN))],
        left_out=max(0, len(record.questions) - SHOWN),
        policy=policy(script),
        style=markup(source("report.css") + _own("table.css")),
        script=markup(script),
        version=__version__,
    )


def _own(name: str) -> str:
    return (resources.files("powermc.evaluation.comparison") / "html" / name).read_text(encoding="utf-8")


def _question(record: Record, q: int) -> dict[str, Any]:
    """A question, and the first answer of every method to it."""
    asked = record.questions[q]
    rows = [(line.spec, line.answers.get((q, 0))) for line in record.lines]
    return {
        "id": visible(asked.id),
        "text": visible(asked.text),
        "reference": visible(asked.reference),
        "answers": [_answer(spec, given) for spec, given in rows if given is not None],
        "right": sum(given is not None and given.correct for _, given in rows),
        "of": sum(given is not None for _, given in rows),
    }


def _answer(spec: str, given: Given) -> dict[str, Any]:
    return {
        "spec": visible(spec),
        "correct": given.correct,
        "answer": "" if given.answer is None else visible(given.answer),
        "why": visible(given.error or given.why),
        "text": visible(given.text),
        "tokens": len(given.tokens),
        "log_p": "" if math.isnan(given.log_p) else f"{given.log_p:.1f}",
    }


class Point(NamedTuple):
    """A method in the picture, in its units; `low` and `high`: ends of the interval; `label`: where it is named."""

    name: str
    x: float
    y: float
    label: float
    low: float
    high: float
    words: str


class Tick(NamedTuple):
    at: float
    label: str


class Picture(NamedTuple):
    """Accuracy against cost as points and ticks, for SVG."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    points: list[Point]
    across: list[Tick]
    up: list[Tick]


def picture(found: Sequence[Figures]) -> Picture | None:
    """None if no method's cost is known."""
    known = points(found)
    if not known:
        return None
    logs = [math.log10(f.flops or 1) for f in known]
    first, last = min(logs), max(logs)
    gap = max((last - first) * 0.08, 0.15)
    first, last = first - gap, last + gap
    most = min(1.0, max(max(f.exact.high for f in known) * 1.08, 0.05))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(log: float) -> float:
        return round(_LEFT + (log - first) / (last - first) * (right - _LEFT), 1)

    def up(value: float) -> float:
        return round(bottom - value / most * (bottom - _TOP), 1)

    marks = [
        Point(
            visible(f.spec),
            across(log),
            up(f.exact.estimate),
            up(f.exact.estimate) - 6,
            up(f.exact.low),
            up(f.exact.high),
            f"{visible(f.spec)}: exact match {f.exact.estimate:.1%} ({f.exact.low:.1%} to {f.exact.high:.1%}), "
            f"{si(f.flops or 0)}FLOPs per question",
        )
        for f, log in zip(known, logs, strict=True)
    ]
    return Picture(
        *(_WIDTH, _HEIGHT, _LEFT, right, _TOP, bottom),
        _apart(marks),
        [Tick(across(log), si(10**log).strip()) for log in _ticks(first, last)],
        [Tick(up(value), f"{value:.0%}") for value in _steps(most)],
    )


_LETTER, _LINE = 6.6, 14


def _apart(marks: Sequence[Point]) -> list[Point]:
    """The points from left to right, names moved up until none stands on another."""
    placed: list[Point] = []
    for mark in sorted(marks, key=lambda point: point.x):
        while any(
            abs(mark.label - other.label) < _LINE and abs(mark.x - other.x) < _LETTER * (len(mark.name) + 1)
            for other in placed
            if other.x + _LETTER * (len(other.name) + 1) > mark.x
        ):
            mark = mark._replace(label=mark.label - _LINE)
        placed.append(mark)
    return placed


def _ticks(first: float, last: float) -> list[float]:
    """Logarithms of round numbers between two: powers of ten, and 2 and 5 times them where there are few of those."""
    whole = range(math.floor(first), math.ceil(last) + 1)
    factors = (1, 2, 5) if last - first < 3 else (1,)
    found = [n + math.log10(factor) for n in whole for factor in factors]
    return [log for log in found if first <= log <= last]


def _steps(most: float) -> list[float]:
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if most / s <= 6 or s == 0.25)
    return [i * step for i in range(int(most / step + 1e-9) + 1)]
