"""`powermc bench` from the command line, on a tiny saved model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from powermc.cli import main
from tests.lm.families import tiny_model
from tests.lm.test_loading import tokenizer

SMALL = [
    "--horizons",
    "4,6",
    "--chains",
    "1,2",
    "--block-size",
    "3",
    "--steps",
    "1",
    "--repeats",
    "1",
    "--max-rows",
    "4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    prompts = ["w1 w2 w7", {"question": "w4 w4"}, {"prompt": "w30 w31"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)) + "\n")
    return folder


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        code = main(["bench", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return run


def test_tables_on_screen_and_all_figures_in_the_file(cli, folder, tmp_path):
    out = tmp_path / "bench.json"
    given = ["--model", folder, "--data", folder / "prompts.jsonl", "--prompts", 2, "--ignore-eos", "--alpha", 2]
    code, screen, notes = cli(*given, *SMALL, "--out", out)
    assert code == 0, notes
    assert "powermc: repeat 1/1, prompt 2/2: published-batched, 2 chains, T 6" in notes
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "settings", "memory", "rows", "overhead", "floor", "savings"}
    assert set(found["machine"]) >= {"date", "cpu", "cores", "threads", "powermc", "torch", "transformers"}
    assert found["settings"] == {
        "model": str(folder),
        "prompts": 2,
        "methods": ["published", "published-batched", "powermc"],
        "chains": [1, 2],
        "horizons": [4, 6],
        "steps": 1,
        "block_size": 3,
        "alpha": 2.0,
        "seed": 0,
        "repeats": 1,
        "ignore_eos": True,
    }
    cells = [("published", 1), ("published-batched", 2), ("powermc", 1), ("powermc", 2)]
    assert [(r["horizon"], r["method"], r["chains"]) for r in found["rows"]] == [(t, *c) for t in (4, 6) for c in cells]
    for row in found["rows"]:
        assert set(row) >= {
            "transitions", "seconds", "growth_seconds", "per_second", "per_second_whole", "seconds_per_prompt",
            "tokens", "growth_tokens", "proposal_length", "cut", "accepted", "changed", "length", "peak_bytes",
            "added_bytes", "times", "ratio",
        }  # fmt: skip
        assert set(row["ratio"]) == {"raw", "whole", "per_token"}
        assert [len(t["whole"]) for t in row["times"]] == [1, 1]
    assert set(found["overhead"]) == {"published, 1", "published-batched, 2"}
    assert [step["rows"] for step in found["floor"]["steps"]] == [1, 2, 4]
    assert set(found["floor"]["steps"][0]) == {
        *("rows", "step", "copy_floor", "read_floor", "arithmetic_floor", "ratio", "read_ratio")
    }
    assert [saving["alpha"] for saving in found["savings"]] == [1, 2, 4]
    assert f"{folder}, 2 prompts, B 3, N 1, alpha 2, seed 0, end tokens ignored; least of 1 repeat." in screen
    lines = [line for line in screen.splitlines() if re.match(r"\| \d", line)]
    assert len(lines) == 8 + 3 + 3
    assert [line.split(" | ")[1] for line in lines[:4]] == [method for method, _ in cells]
    assert "inside the baseline over bare generate" in screen


def test_json_is_all_that_is_on_standard_output(cli, folder):
    given = ["--model", folder, "--data", folder / "prompts.jsonl", "--methods", "powermc", "--horizons", "4"]
    code, screen, notes = cli(*given, "--chains", "1", "--block-size", "4", "--steps", "1", "--repeats", "1",
                              "--max-rows", "2", "--json", "--quiet")  # fmt: skip
    assert (code, notes, screen.count("\n")) == (0, "", 1)
    found = json.loads(screen)
    assert [row["method"] for row in found["rows"]] == ["powermc"]
    assert found["rows"][0]["ratio"] is None
    assert found["overhead"] == {}
    assert found["settings"]["prompts"] == 1


def test_some_tables_only_with_guesses(cli, folder):
    """Neither the floor nor the savings let guesses in; what was not asked for is neither measured nor shown."""
    given = ["--model", folder, "--data", folder / "prompts.jsonl", *SMALL, "--speculate", "7"]
    code, screen, _ = cli(*given, "--tables", "floor,savings")
    assert code == 0
    assert "### Decode step over floor" in screen
    assert "### Proposed tokens never run" in screen
    assert "x published" not in screen
    code, screen, _ = cli(*given, "--tables", "speed", "--json", "--quiet")
    found = json.loads(screen)
    assert (code, found["floor"], found["savings"]) == (0, None, None)
    assert found["rows"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "0"], "steps must be an integer >= 1, got 0"),
        (["--chains", "0"], "chains must be an integer >= 1, got 0"),
        (["--chains", ""], "chains is empty; name at least one"),
        (["--chains", "one"], "--chains must be whole numbers with commas between, such as 1,4,16; got 'one'"),
        (["--horizons", "64,"], "--horizons must be whole numbers"),
        (["--methods", "published,other"], "unknown method 'other'; choose from published, published-batched, powermc"),
        (["--methods", ""], "methods is empty"),
        (["--prompts", "0"], "prompts must be at least 1, got 0"),
        (["--tables", "speed,other"], "unknown table 'other'; choose from speed, floor, savings"),
        (["--repeats", "0"], "repeats must be an integer >= 1"),
        (["--alpha", "0"], "alpha must be above 0 here"),
        (["--data", "/no/such/file"], "cannot read /no/such/file"),
        (["--out", "/no/such/folder/file"], "cannot write /no/such/folder/file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(cli, monkeypatch, given, message):
    monkeypatch.setattr("powermc.cli.bench.load", lambda *a: pytest.fail("a model was loaded"))
    code, screen, notes = cli(*given)
    assert (code, screen) == (2, "")
    assert notes.startswith("error: ")
    assert message in notes
    assert notes.count("\n") == 1
