"""The examples run as scripts and show what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output(script, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "MPLCONFIGDIR": str(cwd), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_toy_target(tmp_path):
    """The exact column is the law (checked by hand for one path), the sampled one is close, and a plot is saved."""
    pytest.importorskip("matplotlib")
    text = output("01_toy_target.py", "--out", "plot.png", "--draws", "200", "--chains", "8", cwd=tmp_path)
    rows = {m[1]: [float(v) for v in m.groups()[1:]] for m in re.finditer(
        r"^([ab.~]+) +([\d.]+) +([\d.]+) +([\d.]+) ± ([\d.]+) +([\d.]+)$", text, re.MULTILINE
    )}  # fmt: skip
    assert len(rows) == 10
    p, exact, _, _, cold = rows["bbbb~"]
    assert p == pytest.approx(0.4 * 0.85**3, abs=1e-4)
    assert exact == max(row[1] for row in rows.values())
    assert cold < exact
    assert sum(row[1] for row in rows.values()) == pytest.approx(1.0, abs=0.05)
    sampled = float(re.search(r"sampled ([\d.]+) \(chance", text)[1])  # type: ignore[index]
    assert sampled < 0.2
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_own_kernel(tmp_path):
    text = output("03_own_kernel.py", cwd=tmp_path)
    assert re.search(r"proved on 15 paths, \d+ outcomes enumerated", text)
    assert re.search(r"chains with production random numbers agree", text)
    assert re.search(r"caught without the Hastings term: pi P differs from pi by [+-]\d", text)
