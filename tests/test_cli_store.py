"""Stores from the command line: written by `sample`, then `resume`, `show`, `merge` and `report`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import powermc.lm
from powermc.cli import main
from tests.fake_lm import FakeLM

SMALL = ["--max-new-tokens", "12", "--block-size", "4", "--steps", "3", "--chains", "2", "--alpha", "2"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def faults():
    return {}


@pytest.fixture
def cli(monkeypatch, capsys, faults):
    class Loader:
        calls: list = []  # noqa: RUF012

        def from_pretrained(self, name, **options):
            self.calls.append((name, options))
            return FakeLM(**faults)

    loader = Loader()
    loader.calls = []
    monkeypatch.setitem(powermc.lm.__dict__, "CausalLM", loader)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    run.calls = loader.calls  # type: ignore[attr-defined]
    return run


def drawn(text):
    return [[chain["text"] for chain in prompt["chains"]] for prompt in json.loads(text)["prompts"]]


def test_an_interrupted_run_is_shown_and_gone_on_with(cli, faults, tmp_path):
    file = tmp_path / "run.db"
    _, whole, _ = cli("sample", "q", *SMALL, "--json", "-q")
    faults["interrupt_at"] = 40
    assert cli("sample", "q", *SMALL, "--store", file, "-q")[0] == 130
    faults.clear()
    code, out, err = cli("show", file)
    assert (code, err) == (0, "")
    assert re.search(r"interrupted after \d+ of 18 steps", out)
    assert f"go on with: powermc resume {file}" in out.replace("\n", " ").replace("  ", " ")
    code, out, _ = cli("resume", file, "--json", "--max-rows", "3", "--speculate", "2", "--no-reuse")
    assert code == 0
    assert drawn(out) == drawn(whole)
    name, options = cli.calls[-1]
    wanted = {"max_rows": 3, "speculate": 2, "reuse": False, "dtype": "float32", "device": "cpu", "compiled": True}
    assert options == {**wanted, "gguf_file": None, "memory": None}
    assert name == "fake"
    _, shown, _ = cli("show", file, "--json")
    assert drawn(shown) == drawn(whole)
    code, out, _ = cli("resume", file, "--draws", "8", "--chains", "3", "-q")
    assert code == 0
    assert "3 chains, 12 tokens in 3 blocks" in out


def test_sample_resumes_too(cli, tmp_path):
    file = tmp_path / "run.db"
    options = ["sample", "q", *SMALL, "--store", file, "-q"]
    assert cli(*options, "--thin", "2", "--no-keep-proposals")[0] == 0
    calls = len(cli.calls)
    code, out, err = cli(*options)
    assert (code, out, len(cli.calls)) == (2, "", calls)  # before the model is loaded
    assert f"powermc resume {file}" in err
    assert cli(*options, "--thin", "2", "--no-keep-proposals", "--resume", "--draws", "5")[0] == 0
    code, _, err = cli(*options, "--thin", "2", "--no-keep-proposals", "--resume", "--seed", "8")
    assert code == 2
    assert "seed = 0" in err


def test_the_settings_of_a_store_repeat_its_run(cli, tmp_path):
    file, toml = tmp_path / "run.db", tmp_path / "run.toml"
    _, first, _ = cli("sample", "--prompt", "a", "--prompt", "b", *SMALL, "--store", file, "--json", "-q")
    _, text, _ = cli("show", file, "--settings")
    toml.write_text(text)
    _, second, _ = cli("sample", "--config", toml, "--json", "-q")
    assert drawn(first) == drawn(second)


def test_follow_ends_with_the_run(cli, tmp_path):
    file = tmp_path / "run.db"
    cli("sample", "q", *SMALL, "--store", file, "-q")
    code, out, err = cli("show", file, "--follow")
    assert (code, err) == (0, "")
    assert out.startswith("18/18 steps  accepted ")
    code, out, err = cli("show", file, "--follow", "--json")
    assert (code, out) == (2, "")
    assert err == "error: give one of --follow, --settings and --json; each prints something else\n"


def test_stores_are_joined(cli, tmp_path):
    for chains in ("2", "2"):
        cli("sample", "q", *SMALL, "--chains", chains, "--store", tmp_path / "a.db", "-q", "--resume")
    cli("sample", "r", *SMALL, "--store", tmp_path / "b.db", "-q")
    toml = tmp_path / "merge.toml"
    toml.write_text(f'[merge]\nfiles = ["{tmp_path / "a.db"}", "{tmp_path / "b.db"}"]\nout = "{tmp_path / "all.db"}"\n')
    code, out, _ = cli("merge", "--config", toml)
    assert code == 0
    assert "2 stores joined: 2 prompts, 2 chains of each" in out
    assert [p["text"] for p in json.loads(cli("show", tmp_path / "all.db", "--json")[1])["prompts"]] == ["q", "r"]


def test_workers_share_the_chains_of_a_prompt(cli, tmp_path):
    _, whole, _ = cli("sample", "q", *SMALL, "--chains", "4", "--json", "-q")
    for first in (0, 2):
        assert cli("sample", "q", *SMALL, "--first-chain", first, "--store", tmp_path / f"{first}.db", "-q")[0] == 0
    assert cli("merge", tmp_path / "0.db", tmp_path / "2.db", "-o", tmp_path / "all.db")[0] == 0
    assert drawn(cli("show", tmp_path / "all.db", "--json")[1]) == drawn(whole)


def test_a_report_is_written(cli, tmp_path):
    pytest.importorskip("plotly")
    file = tmp_path / "run.db"
    cli("sample", "q", *SMALL, "--store", file, "-q")
    code, out, err = cli("report", file)
    assert (code, out) == (0, "")
    assert "the report is in" in err
    assert (tmp_path / "run.html").read_text(encoding="utf-8").startswith("<!")
    assert cli("report", file, "-o", tmp_path / "other.html", "-q") == (0, "", "")
    assert (tmp_path / "other.html").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["show", "{}/no.db"], "no.db: there is no such file"),
        (["resume", "{}/no.db"], "no.db: there is no such file"),
        (["report", "{}/no.db"], "no.db: there is no such file"),
        (["merge", "{}/no.db", "{}/no2.db", "-o", "{}/all.db"], "no.db: there is no such file"),
        (["sample", "q", "--store", "{}"], "it is a folder"),
        (["sample", "q", "--store", "{}/no/x.db"], "there is no folder"),
        (["sample", "q", "--thin", "0"], "thin must be an integer >= 1, got 0"),
        (["sample", "q", "--first-chain", "-1"], "first_chain must be an integer >= 0, got -1"),
        (["sample", "q", "--resume"], "--resume has no effect without a store"),
        (["sample", "q", "--no-keep-proposals"], "--no-keep-proposals has no effect without a store"),
        (["merge", "{}/a.db"], "Missing option '--out'"),
        (["show"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(cli, tmp_path, given, message):
    code, out, err = cli(*[part.format(tmp_path) for part in given])
    assert (code, out, cli.calls) == (2, "", [])
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("given", [["sample", "--print-config"], ["--help"], ["--version"]])
def test_a_closed_pipe_is_quiet(given):
    command = [sys.executable, "-m", "powermc", *given]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("given", [["sample", "--print-config"], ["sample", "--help"], ["--version"]])
def test_output_to_a_full_disk_is_one_line(given):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "powermc", *given], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "error: cannot write the output: No space left on device\n"


def test_ctrl_c_while_looking(cli, monkeypatch, tmp_path):
    def pressed(file):
        raise KeyboardInterrupt

    monkeypatch.setattr("powermc.cli.store.kind", pressed)
    assert cli("show", tmp_path / "run.db") == (130, "", "interrupted\n")


def test_the_configuration_of_a_store_is_toml(cli, tmp_path):
    file = tmp_path / "run.db"
    cli("sample", "\x1b[2J\u202e", *SMALL, "--store", file, "-q", "--thin", "2")
    _, text, _ = cli("show", file, "--settings")
    assert "\x1b" not in text
    assert "\u202e" not in text
    table = tomllib.loads(text)["sample"]
    assert table["prompt"] == ["\x1b[2J\u202e"]
    assert (table["thin"], table["draws"], table["model"]) == (2, 3, "fake")
