"""docs/methods.md: its code runs, its table names every method with all of its options."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

import powermc
import powermc.lm
from powermc.evaluation import methods
from powermc.evaluation.methods import base
from tests.methods_lab import TERMS, lab, log_p_of, questions, shipped

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TABLE = {row[1].strip("` "): row[2:-1] for row in (line.split("|") for line in PAGE.splitlines() if line[:3] == "| `")}
GROUPS = {"those of `power` but speculate": "temperature, block_size, steps, draws, scope, cut, early_rejection"}


def options(cell: str) -> set[str]:
    for group, members in GROUPS.items():
        cell = cell.replace(group, members)
    return {name.strip() for name in re.split("[,;]", cell) if name.strip()}


def test_the_table_has_every_method_and_option() -> None:
    assert sorted(TABLE) == shipped()
    for name, (_, listed, cost, _) in TABLE.items():
        assert options(listed) == {field.name for field in fields(methods.get(name))}, name
        assert cost.strip()


def test_sources_are_those_of_the_methods() -> None:
    for name, (*_, source) in TABLE.items():
        cited = re.search(r"arXiv:(\d{4}\.\d{5})", methods.get(name).about)
        assert cited is None or cited[1] in source, name


class Loader:
    @staticmethod
    def from_pretrained(name: str) -> powermc.lm.CausalLM:
        assert name == "smollm2"
        return lab()


def test_the_first_code_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(powermc.__dict__, "CausalLM", Loader)
    exec(CODE[0].replace("max_new_tokens=64", "max_new_tokens=6"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["greedy", "beam:width=3", "power:steps=2"]


def test_a_method_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_methods", dict(base._methods))
    own = ModuleType("own")
    monkeypatch.setitem(sys.modules, "own", own)  # where dataclasses look annotations up
    exec(CODE[1], own.__dict__)
    model = lab()
    asked = questions(model)
    method = methods.parse("min-p:min_p=1")
    greedy = methods.parse("greedy").answer(model, asked, TERMS, range(1))
    found = method.answer(model, asked, TERMS, range(1))
    assert [row[0].tokens for row in found.answers] == [row[0].tokens for row in greedy.answers]
    wide = methods.parse("min-p:min_p=0.2").answer(model, asked, TERMS, range(3))
    assert wide.answers != greedy.answers
    for question, row in zip(asked, wide.answers, strict=True):
        assert all(a.log_p == pytest.approx(log_p_of(model, question.prompt.ids, a.tokens)) for a in row)
