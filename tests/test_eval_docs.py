"""docs/evaluation.md defines every column of the tables, and no other; the methods that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

from powermc.evaluation.comparison.table import ANSWERS, COSTS, KERNELS
from powermc.evaluation.methods import names

TEXT = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")


def defined(title: str) -> list[str]:
    """The first cells of a section's table."""
    section = re.split(r"^##+ ", TEXT.split(f"### {title}\n")[1], flags=re.M)[0]
    return [line.split(" | ")[0].strip("| ") for line in section.splitlines() if line.startswith("| ")][1:]


def test_every_column_is_defined():
    places = [column.title for column in ANSWERS]
    places.insert(places.index("no answer"), "pass@k")
    assert defined("Answers") == places
    assert defined("Cost") == [column.title for column in COSTS]
    assert defined("Kernels") == [column.title for column in KERNELS]


def test_the_methods_that_it_names_exist():
    commands = re.findall(r"--methods? ([\w,-]+)", TEXT)
    assert commands
    assert {name for command in commands for name in command.split(",")} <= set(names())
