"""The examples run as scripts and show what they say."""

from __future__ import annotations

import json
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of four layers and a tokenizer of 37 words; calibration text; and a prompt."""
    from tests.lm.families import tiny_model
    from tests.lm.test_calibration import texts
    from tests.lm.test_loading import tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    lines = [json.dumps({"text": " ".join(f"w{token}" for token in ids)}) for ids in texts(100)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    (folder / "prompts.jsonl").write_text('"w1 w2 w7"\n"w4 w6"\n')
    return folder


SMALL = ("--layers", "2,3", "--max-new-tokens", "12", "--steps", "4", "--alpha", "2")


def test_early_exit(tiny):
    """Three parts: the report of each layer, the pilot of all choices, and two runs beside each other."""
    text = output(
        "04_early_exit.py", "texts.jsonl", "--prompts", "prompts.jsonl", "--model", str(tiny), *SMALL, cwd=tiny
    )
    report, table, verdict, compared, stages = text.split("\n\n")[:5]
    assert [line.split()[:2] for line in report.splitlines()[1:]] == [["2", "ridge"], ["3", "ridge"]]
    kernels = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert kernels == ["plain MH", "exit 2, exit", "exit 2, substitution", "exit 3, exit", "exit 3, substitution"]
    assert verdict.startswith("recommended: ")
    rows = {line[:34].strip(): line[34:].split() for line in compared.splitlines()}
    assert rows["kernel steps"] == ["32", "32"]
    chosen = re.search(r"exit (\d), (exit|substitution)$", compared.splitlines()[0])[1]  # type: ignore[index]
    plain, early = (int(n.replace(",", "")) for n in rows["tokens run through layers 0-4"])
    assert plain > early
    assert rows[f"tokens run through layers 0-{chosen}"][0] == "0"
    assert int(rows[f"tokens run through layers 0-{chosen}"][1]) > 0
    passed, screened, saved = map(int, re.findall(r"\d+", stages)[1:4])
    assert passed + saved == screened > 0
    assert text.rstrip().endswith("how often it moves.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "error: cannot read none.jsonl: No such file or directory"),
        (["--layers", "half"], "error: --layers must be whole numbers with commas between"),
        (["--steps", "2"], "error: steps must be an integer >= 4, got 2"),
        (["texts.jsonl", "--layers", "9"], "error: exit layer 9 is out of range"),
    ],
)
def test_early_exit_with_bad_input(tiny, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(tiny)
    monkeypatch.setattr(sys, "argv", ["04", "--model", str(tiny), *arguments])
    source = (EXAMPLES / "04_early_exit.py").read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        exec(compile(source, "04_early_exit.py", "exec"), {"__name__": "__main__", "__doc__": "x"})
    assert str(caught.value).startswith(message), caught.value
