"""Ways to answer questions with a language model, side by side, found by name."""

from __future__ import annotations

from powermc.evaluation.methods import (  # noqa: F401  # they register themselves
    beams,
    early_exits,
    layers,
    plain,
    power,
    published,
    voting,
)
from powermc.evaluation.methods.base import (
    COUNTS,
    Answer,
    Answers,
    Method,
    Prepared,
    Question,
    Terms,
    get,
    names,
    parse,
    prepared,
    register,
    with_options,
)

__all__ = [
    "COUNTS",
    "Answer",
    "Answers",
    "Method",
    "Prepared",
    "Question",
    "Terms",
    "get",
    "names",
    "parse",
    "prepared",
    "register",
    "with_options",
]
