"""The code of docs/results.md runs, with a table for a model and fewer draws, and does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import powermc.lm
from powermc.store import about
from tests.fake_lm import FakeLM

PAGE = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")


class Loader:
    @staticmethod
    def from_pretrained(name):
        assert name == "smollm2"
        return FakeLM()


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(powermc.lm.__dict__, "CausalLM", Loader)
    monkeypatch.setitem(powermc.__dict__, "CausalLM", Loader)
    monkeypatch.chdir(tmp_path)
    names = {"prompts": ["a", "b"]}
    first, second, third, fourth = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(first.replace("draws=500", "draws=12"), names)
    assert (about("run.db").prompts, about("run.db").chains, about("run.db").draws) == (2, 8, 2 * 8 * 12)
    exec(second.replace("draws=2000", "draws=14"), names)
    assert about("run.db").draws == 2 * 16 * 14
    exec(third, names)
    assert about("all.db").chains == 16
    assert about("all.db").done
    exec(fourth.replace("draws=1000", "draws=10"), names)
    assert [len(values) for values in names["samples"].values] == [10] * 4
