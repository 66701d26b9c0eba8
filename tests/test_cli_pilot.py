"""`powermc pilot`, and `powermc sample --exit`, on a tiny saved model with a lens fitted to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import powermc.cli.sample
import powermc.lm
from powermc.cli import demo, main
from powermc.lm import CausalLM, Lens, calibrate
from tests.lm.families import tiny_model
from tests.lm.lenses import lens_of
from tests.lm.test_calibration import texts
from tests.lm.test_loading import tokenizer

SMALL = ["--max-new-tokens", "6", "--steps", "4", "--chains", "2", "--alpha", "1.5", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer, a lens, prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    calibrate(CausalLM.from_pretrained(str(folder)), texts(100), layers=[2, 3]).save(folder / "a.lens")
    prompts = ["w1 w2 w7", {"question": "w4 w4"}, {"prompt": "w30 w31 w32 w33"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)) + "\n")
    return folder


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        code = main([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return run


def given(folder: Path) -> list[Any]:
    return ["--model", folder, "--exit", folder / "a.lens", "--data", folder / "prompts.jsonl", *SMALL]


def test_the_table_and_the_recommendation(cli, folder, tmp_path):
    out = tmp_path / "pilot.json"
    code, screen, notes = cli("pilot", *given(folder), "--out", out)
    assert code == 0, notes
    assert notes == ""
    found = json.loads(out.read_text())
    names = ["plain MH", *[f"exit {n}, {p}" for n in (2, 3) for p in ("exit", "substitution", "full")]]
    assert [row["name"] for row in found["choices"]] == names
    assert f"{folder}: 3 prompts, 2 chains of 4 steps each" in screen.replace("\n", "")
    assert [line.split(" | ")[0].strip("| ") for line in screen.splitlines() if line.startswith("| ")][2:] == names
    assert "How to read it: " in screen
    assert screen.rstrip().split("\n\n")[-1].replace("\n", " ").startswith(f"recommended: {found['recommended']}")
    lens = Lens.load(folder / "a.lens")
    assert [row["kl"] for row in found["choices"][1::3]] == [row.kl for row in lens.report]
    assert {p.name for p in tmp_path.iterdir()} <= {"pilot.json", "cache"}


def test_json_is_all_that_is_on_standard_output(cli, folder, tmp_path):
    options = ["--layers", "3", "--proposals", "exit", "--limit", "2", "--seed", "4", "--eta", "2.5", "--delta", "0.01"]
    code, screen, notes = cli("pilot", *given(folder), *options, "--temperature", "0.9", "--plain", "0.2", "--json")
    assert (code, notes, screen.count("\n")) == (0, "", 1)

    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(screen, parse_constant=refused)
    assert [row["name"] for row in found["choices"]] == ["plain MH", "exit 3, exit"]
    assert found["settings"] == {
        "model": str(folder),
        "prompts": 2,
        "alpha": 1.5,
        "temperature": 0.9,
        "max_new_tokens": 6,
        "steps": 4,
        "chains": 2,
        "plain": 0.2,
        "exit_temperatures": [None],
        "eta": 2.5,
        "delta": 0.01,
        "seed": 4,
    }


def test_without_quiet_every_choice_is_announced(cli, folder):
    options = [o for o in given(folder) if o != "--quiet"]
    code, screen, notes = cli("pilot", *options, "--layers", "2", "--proposals", "exit,full", "--json")
    assert code == 0
    json.loads(screen)
    running = re.findall(r"powermc: running (.*)", notes)
    assert running == ["plain MH", "exit 2, exit", "exit 2, full"]


def test_temperatures_of_the_exit(cli, folder):
    code, screen, _ = cli("pilot", *given(folder), "--proposals", "exit", "--exit-temperatures", "0.5,1", "--json")
    assert code == 0
    names = [row["name"] for row in json.loads(screen)["choices"]]
    assert [name.partition(" at ")[2] for name in names[:3]] == ["", "T 0.5", "T 1"]
    code, _, notes = cli("pilot", *given(folder), "--exit-temperatures", "warm")
    assert code == 2
    assert "--exit-temperatures must be numbers with commas between, such as 0.25,0.5; got 'warm'" in notes


def test_without_a_lens_the_cached_one_and_without_data_the_shipped_prompts(cli, folder, monkeypatch):
    asked = []

    def cached(model: CausalLM, layers: Any, *, progress: Any) -> Lens:
        asked.append(layers)
        lens = Lens.load(folder / "a.lens")
        return lens_of(model, [lens.head(2)])  # of whose report nothing is known

    monkeypatch.setitem(powermc.lm.__dict__, "cached_lens", cached)
    monkeypatch.setattr(demo, "questions", lambda: [type("Question", (), {"question": "w1 w2"})] * 3)
    options = ["--model", folder, *SMALL, "--proposals", "exit", "--json"]
    code, screen, notes = cli("pilot", *options, "--layers", "2")
    assert code == 0, notes
    found = json.loads(screen)
    assert found["settings"]["prompts"] == 3
    assert found["choices"][1]["kl"] is None
    assert cli("pilot", *options)[0] == 0
    assert asked == [[2], None]


BAD = [
    (["--data", "no/such.jsonl"], "cannot read no/such.jsonl: No such file or directory"),
    (["--exit", "no/such.lens"], "there is no file no/such.lens; make a lens with: powermc calibrate"),
    (["--exit", "{folder}/prompts.jsonl"], "prompts.jsonl is no lens"),
    (["--layers", "two"], "--layers must be whole numbers with commas between, such as 12,16,20; got 'two'"),
    (["--proposals", "exit,tail"], "unknown proposal 'tail'; choose one of exit, substitution, full"),
    (["--proposals", ""], "unknown proposal ''"),
    (["--limit", "0"], "limit must be at least 1 prompt, got 0"),
    (["--steps", "3"], "steps must be an integer >= 4, got 3"),
    (["--chains", "0"], "chains must be an integer >= 1, got 0"),
    (["--alpha", "-1"], "alpha must be a finite number >= 0, got -1.0"),
    (["--temperature", "0"], "temperature must be a finite number > 0, got 0.0"),
    (["--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1, got 0"),
    (["--plain", "2"], "the share of plain steps must be between 0 and 1, got 2.0"),
    (["--plain", "0"], "mix in plain steps (plain > 0)"),
    (["--eta", "-1"], "eta must be a number >= 0, got -1.0"),
    (["--delta", "0"], "no margin is under delta 0"),
    (["--seed", "-1"], "seed must be an integer >= 0, got -1"),
    (["--out", "no/such/pilot.json"], "cannot write no/such/pilot.json: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_refused_before_the_model_is_loaded(cli, folder, arguments, message, monkeypatch):
    class Unloaded:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> None:
            raise AssertionError("the model was loaded")

    monkeypatch.setitem(powermc.lm.__dict__, "CausalLM", Unloaded)
    arguments = [a.format(folder=folder) for a in arguments]
    code, out, err = cli("pilot", *given(folder), *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1"], "the lens has no head at layer 1; it has 2, 3"),
        (["--eta", "4"], "eta 4.0 can never be exceeded, so the gate can never open"),
        (["--max-new-tokens", "62"], "exceeds the model's context of 64"),
        (["--dtype", "float64"], "the lens was fitted to float32 weights"),
    ],
)
def test_what_only_the_model_can_tell(cli, folder, arguments, message):
    code, out, err = cli("pilot", *given(folder), *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


# powermc sample with an exit.


def sampling(folder: Path) -> list[Any]:
    return ["sample", "w1 w2 w7", "--model", folder, "--exit", folder / "a.lens", *SMALL, "--block-size", "3"]


def test_every_option_reaches_power_sample(cli, folder, monkeypatch):
    calls = []

    def stand_in(model: Any, prompts: Any, **options: Any) -> Any:
        calls.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(powermc.cli.sample, "power_sample", stand_in)
    options = {"kernel": "early-exit", "layer": 2, "proposal": "substitution", "screen": 0.7, "plain": 0.3}
    options |= {"eta": 2.5, "delta": 0.02, "aggregate": "mean"}
    code, *_ = cli(*sampling(folder), *[part for name, v in options.items() for part in (f"--{name}", str(v))])
    assert code == 130
    rest = {"alpha": 1.5, "max_new_tokens": 6, "steps": 4, "chains": 2, "block_size": 3, "progress": False}
    rest |= {"store": None, "resume": False, "thin": 1, "keep_proposals": True, "first_chain": 0}
    assert calls == [{**options, **rest, "exit": folder / "a.lens"}]


def test_fitting_the_cached_lens_can_be_watched(cli, folder, monkeypatch):
    """It takes minutes on a real model, before the run's own display begins; it is `power_sample` that shows it."""
    lens, asked = Lens.load(folder / "a.lens"), []

    def cached(model: CausalLM, layers: Any, *, progress: Any = None) -> Lens:
        asked.append(layers)
        if progress is not None:
            progress("writing text", 0.0)
        return lens_of(model, [lens.head(2)])

    monkeypatch.setitem(powermc.lm.__dict__, "cached_lens", cached)
    small = [part for part in SMALL if part != "--quiet"]
    options = ["sample", "w1 w2 w7", "--model", folder, *small, "--kernel", "early-exit", "--layer", "2"]
    code, _, notes = cli(*options)
    assert (code, asked) == (0, [[2]])
    assert notes.count("powermc: writing text\n") == 1
    assert "powermc: writing" not in cli(*options, "--quiet")[2]
    assert "powermc: writing" not in cli("sample", "w1", "--model", folder, *small)[2]


def test_an_early_exit_run(cli, folder):
    options = ["--layer", "2", "--eta", "2.5"]
    code, screen, notes = cli(*sampling(folder), *options, "--json")
    assert code == 0, notes
    run = json.loads(screen)
    exit = str(folder / "a.lens")
    assert (run["settings"]["exit"], run["settings"]["kernel"], run["settings"]["eta"]) == (exit, "early-exit", 2.5)
    assert (run["early_exit"]["layer"], run["early_exit"]["eta"]) == (2, 2.5)
    code, screen, notes = cli(*sampling(folder), *options)
    assert code == 0
    assert "layer 2, ridge;" in screen
    assert "stage 1: " in screen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit", "no/such.lens"], "there is no file no/such.lens"),
        (["--kernel", "metropolis"], "exit has no effect with kernel 'metropolis'"),
        (["--kernel", "auto", "--layer", "2"], "kernel 'auto' chooses layer itself"),
        (["--eta", "-2"], "eta must be a number >= 0, got -2.0"),
        (["--plain", "1.5"], "the share of plain steps must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(cli, folder, arguments, message, monkeypatch):
    monkeypatch.setitem(powermc.lm.__dict__, "CausalLM", None)
    code, out, err = cli(*sampling(folder), *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_layer_without_a_head(cli, folder):
    code, out, err = cli(*sampling(folder), "--layer", "1")
    assert (code, out) == (2, "")
    assert "the lens has no head at layer 1; it has 2, 3" in err
