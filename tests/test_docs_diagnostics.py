"""docs/diagnostics.md: its code prints what the page says, but for seconds."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from powermc.diagnostics.guards import KINDS

PAGE = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
TIMING = re.compile(r"[\d.,]+ s \([\d,]+ tokens/s\)|[\d.e+]+ a second,")


@pytest.mark.slow
def test_the_code_prints_what_the_page_says():
    pairs = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert len(pairs) == 2
    names: dict = {}
    for code, printed in pairs:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "docs/diagnostics.md", "exec"), names)
        assert TIMING.sub("", out.getvalue()).split() == TIMING.sub("", printed).split()


def test_every_guard_is_explained():
    table = re.search(r"\| kind \|.*?\n\n", PAGE, re.DOTALL).group()  # type: ignore[union-attr]
    told = [name for row in table.strip().splitlines()[2:] for name in row.split("|")[1].replace(",", "").split()]
    assert set(told) == set(KINDS)
