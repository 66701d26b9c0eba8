"""The command line, in process and with a fake model; what needs real pipes and signals gets its own process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import powermc.lm
from powermc._version import __version__
from powermc.cli import demo, main
from powermc.cli.sample import read_prompts
from powermc.cli.show import names, visible
from powermc.errors import ArgumentError, ModelError
from powermc.evaluation import last_number
from powermc.settings import Settings
from tests.fake_lm import FakeLM

SMALL = ["--max-new-tokens", "12", "--block-size", "4", "--steps", "3", "--chains", "3", "--alpha", "2"]
ROOT = Path(__file__).parent.parent


class Loader:
    """Stands where `CausalLM` does; remembers what was asked for."""

    def __init__(self, **faults) -> None:
        self.faults, self.calls = faults, []

    def from_pretrained(self, name, **options):
        print("some library talks on standard output")
        self.calls.append((name, options))
        if name == "slow":
            raise KeyboardInterrupt
        if name.startswith("unknown"):
            raise ModelError(f"there is no model {name}")
        return FakeLM(**self.faults)


@pytest.fixture
def loader(monkeypatch):
    stand_in = Loader()
    monkeypatch.setitem(powermc.lm.__dict__, "CausalLM", stand_in)
    return stand_in


@pytest.fixture
def cli(loader, capsys):
    """Run the command line: (exit code, standard output, standard error)."""

    def run(*arguments):
        code = main([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return run


# Version, help, speed.


def test_version_and_help_import_nothing_heavy():
    code = (
        "import sys; from powermc.cli import main;"
        "assert main(['--version']) == 0 and main(['sample', '--help']) == 0 and main(['doctor', '-h']) == 0;"
        "heavy = {'torch', 'transformers', 'numba', 'scipy', 'arviz', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"powermc {__version__}\n")
    assert "--max-new-tokens" in done.stdout


def test_python_m_powermc():
    done = subprocess.run([sys.executable, "-m", "powermc", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"powermc {__version__}\n"


# What is printed.


def test_sample_prints_every_text_and_the_summary(cli):
    code, out, err = cli("sample", "how many?", *SMALL)
    assert code == 0
    run = powermc.power_sample(FakeLM(), "how many?", max_new_tokens=12, block_size=4, steps=3, chains=3, alpha=2.0)
    for c, (text, path) in enumerate(zip(run.texts[0], run.paths[0], strict=True)):
        assert re.search(rf"\b{c}\b.*: log p {path.log_prob:.2f}, {len(path)} tokens?, {run.ending(0, c)}\n", out)
        for line in visible(text).split("\n"):
            assert line.strip() in out
    timing = re.compile(r"\d+\.\d s \([\d,]+ tokens/s\)")
    assert timing.sub("", run.summary()) in timing.sub("", out)
    assert err.count("top_k=50") == 1
    assert "p(x) is the raw model without them" in err


def test_equal_texts_are_printed_once(cli):
    _, out, _ = cli("sample", "q", *SMALL, "--max-new-tokens", "1", "--chains", "12", "--alpha", "50")
    headings = re.findall(r"^chains? (.*): log p", out, flags=re.M)
    chains = [int(c) for heading in headings for c in re.split(r", | and ", heading)]
    assert sorted(chains) == list(range(12))
    assert len(headings) < 12


def test_quiet_says_nothing_on_standard_error(cli):
    code, out, err = cli("sample", "q", *SMALL, "--quiet")
    assert (code, err) == (0, "")
    assert "log p" in out


def test_options_reach_the_run(cli, loader):
    _, out, _ = cli(
        *[
            "sample",
            "q",
            "--json",
            "--alpha",
            "3",
            "--temperature",
            "0.7",
            "--max-new-tokens",
            "10",
            "--block-size",
            "5",
        ],
        *["--steps", "2", "--chains", "5", "--scope", "block", "--cut", "horizon", "--seed", "9", "--stop", "7"],
        *["--stop", "one", "--no-chat", "--model", "m", "--gguf-file", "g", "--dtype", "float64", "--device", "meta"],
        *["--max-rows", "3", "--memory", "4GB", "--no-early-rejection", "--speculate", "5", "--draws", "7"],
    )
    run = json.loads(out)
    expected = {"alpha": 3.0, "temperature": 0.7, "max_new_tokens": 10, "block_size": 5, "steps": 2, "chains": 5}
    expected |= {"scope": "block", "cut": "horizon", "seed": 9, "stop": ["7", "one"], "reward": None, "chat": False}
    expected |= {"kernel": "metropolis", "exit": None, "layer": None, "proposal": "exit", "screen": None, "plain": 0.1}
    expected |= {"exit_temperature": None, "gated": None, "eta": None, "delta": None, "aggregate": "max"}
    expected |= {"rows": 5, "early_rejection": False, "reward_at_most": None, "draws": 7}
    assert run["settings"] == expected
    options = {"gguf_file": "g", "dtype": "float64", "device": "meta", "max_rows": 3, "memory": "4GB"}
    options |= {"reuse": True, "speculate": 5, "compiled": True}
    assert loader.calls == [("m", options)]


def test_the_help_states_the_defaults_of_the_api(cli):
    _, out, _ = cli("sample", "--help")
    text = re.sub(r"\s+", " ", out)
    api = Settings()
    for option in ("alpha", "max_new_tokens", "block_size", "steps", "chains", "seed"):
        assert re.search(rf"--{option.replace('_', '-')} <\w+>[^-]*default {getattr(api, option):g}\.", text), option
    assert (api.scope, api.cut, api.temperature) == ("sequence", "length", None)


def test_json_is_all_that_is_on_standard_output(cli):
    code, out, err = cli("sample", "q", *SMALL, "--json")
    assert code == 0
    run = json.loads(out)
    assert out.count("\n") == 1
    assert len(run["prompts"][0]["chains"]) == 3
    assert "some library talks" in err


def test_out_holds_the_run(cli, tmp_path):
    file = tmp_path / "run.json"
    code, out, err = cli("sample", "q", *SMALL, "--json", "--out", file)
    assert code == 0
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(out)
    assert f"the whole run is in {file}" in re.sub(r"\n", "", err)
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]


# Hostile text.

HOSTILE = r"[red] [/] \x1b[31m \u202e"


@pytest.mark.parametrize("terminal", [False, True])
def test_generated_text_is_data(cli, loader, monkeypatch, terminal):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
    loader.faults = {"seed": 1}
    code, out, _ = cli(
        "sample", "[bold]q", *SMALL, "--max-new-tokens", "40", "--chains", "8", "--alpha", "1", "--quiet"
    )
    assert code == 0
    for literal in HOSTILE.split():
        assert literal in out
    assert "\x1b[31m" not in out
    assert "\u202e" not in out
    assert ("\x1b[" in out) == terminal  # ours, for headings
    assert "[bold]q" in out


def test_visible_escapes_control_characters_only():
    assert visible("a\tb\nc é 漢 \U0001f469\u200d\U0001f52c") == "a\tb\nc é 漢 \U0001f469\u200d\U0001f52c"
    assert visible("\x00\x07\x1b]0;x\x07\r\x7f\x9b") == r"\x00\x07\x1b]0;x\x07\r\x7f\x9b"
    assert visible("\u2028\u202e\u2066\ud800\ufeff") == r"\u2028\u202e\u2066\ud800\ufeff"


def test_names():
    assert [names("chain", n) for n in ([0], [0, 2], [0, 1, 3])] == ["chain 0", "chains 0 and 2", "chains 0, 1 and 3"]


# Bad input: one line, exit code 2, no model loaded, nothing on standard output.

BAD = [
    (["q", "--alpha", "-1"], "alpha must be a finite number >= 0, got -1.0"),
    (["q", "--alpha", "nan"], "alpha must be a finite number >= 0, got nan"),
    (["q", "--temperature", "0"], "temperature must be a finite number > 0, got 0.0"),
    (["q", "--temperature", "inf"], "temperature must be a finite number > 0, got inf"),
    ([""], "prompt 0 is empty"),
    (["  "], "prompt 0 is empty"),
    (["q", "--block-size", "0"], "block_size must be an integer >= 1, got 0"),
    (["q", "--chains", "0"], "chains must be an integer >= 1, got 0"),
    (["q", "--steps", "-1"], "steps must be an integer >= 0, got -1"),
    (["q", "--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1, got 0"),
    (["q", "--seed", "-3"], "seed must be an integer >= 0, got -3"),
    (["q", "--scope", "world"], "unknown scope 'world'; choose one of sequence, block"),
    (["q", "--cut", "deep"], "unknown cut law 'deep'"),
    (["q", "--cut", "block", "--scope", "sequence"], "use scope='block' with it"),
    (["q", "--stop", ""], "stop strings must be strings of at least one character"),
    ([], "give one of: a question in quotes, --prompt, --file prompts.jsonl, --demo"),
    (["q", "--prompt", "r"], "give one of"),
    (["q", "--demo"], "give one of"),
    (["q", "--file", "x.jsonl"], "give one of"),
    (["--file", "no/such.jsonl"], "cannot read no/such.jsonl: No such file or directory"),
    (["--file", "."], "cannot read .: Is a directory"),
    (["q", "--out", "no/such/run.json"], "cannot write no/such/run.json: No such file or directory"),
    (["q", "--out", "."], "cannot write .: it is a folder; name a file in it"),
    (["q", "--out", "/proc/run.json"], "cannot write /proc/run.json"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_bad_input(cli, loader, arguments, message, extra):
    code, out, err = cli("sample", *arguments, *extra)
    assert (code, out, loader.calls) == (2, "", [])
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["q", "--alhpa", "4"], ["q", "--alpha", "four"], ["a", "b"], ["q", "--chains", "1.5"]]
)
def test_usage_errors(cli, loader, arguments):
    code, out, err = cli("sample", *arguments)
    assert (code, out, loader.calls) == (2, "", [])
    assert "Traceback" not in err
    assert cli("smaple", "q")[0] == 2


def test_an_unknown_model(cli):
    code, out, err = cli("sample", "q", "--model", "unknown\x1b[2J")
    assert (code, out) == (2, "some library talks on standard output\n")
    assert err == "error: there is no model unknown\\x1b[2J\n"


def test_a_prompt_that_does_not_fit(cli, loader):
    loader.faults = {"context": 20}
    code, _, err = cli("sample", "x" * 30, *SMALL, "--quiet")
    assert code == 2
    assert err == "error: the prompt has 36 tokens; with 12 that exceeds the context\n"


# Files of prompts.


def test_prompts_from_a_file(cli, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes('"plain é"\n{"prompt": "by prompt", "question": "no"}\r\n{"question": "by question"}'.encode())
    assert read_prompts(file) == ["plain é", "by prompt", "by question"]
    _, out, _ = cli("sample", "--file", file, *SMALL, "--json")
    assert [p["text"] for p in json.loads(out)["prompts"]] == ["plain é", "by prompt", "by question"]
    _, out, _ = cli("sample", "--file", file, *SMALL, "-q")
    assert [f"prompt {p}: " in out for p in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is empty"),
        (b"\n", " is empty"),
        (b'"a"\n\n"b"', ", line 2: the line is empty"),
        (b'"a"\n"b"\n\n', ", line 3: the line is empty"),
        (b'"a"\nhello\n', ", line 2: not JSON: Expecting value"),
        (b'"a"\n{"question": "b"\n', ", line 2: not JSON"),
        (b'"a"\n"\xff"', ", line 2: not JSON: it is not UTF-8"),
        (b'{"text": "a"}', ", line 1: the object has neither 'prompt' nor 'question'"),
        (b'"a"\n"b"\n7', ", line 3: the prompt must be a string, got int"),
        (b'{"prompt": null}', ", line 1: the prompt must be a string, got NoneType"),
        (b'"a"\n" "', ", line 2: the prompt is empty"),
        (b'{"question": ""}', ", line 1: the prompt is empty"),
    ],
)
def test_bad_files_of_prompts(cli, loader, tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    code, out, err = cli("sample", "--file", file)
    assert (code, out, loader.calls) == (2, "", [])
    assert f"{file}{message}" in err
    assert err.count("\n") == 1


def test_a_byte_order_mark_is_no_error(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'\xef\xbb\xbf"a"\n')
    assert read_prompts(file) == ["a"]


# Faults in the middle of a run.


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_prints_and_writes_what_was_drawn(cli, loader, tmp_path, as_json):
    loader.faults = {"interrupt_at": 60}
    file = tmp_path / "run.json"
    code, out, _ = cli("sample", "q", *SMALL, "--out", file, *(["--json"] if as_json else []))
    assert code == 130
    run = json.loads(file.read_text())
    assert run["interrupted"]
    steps = sum(chain["steps"] for chain in run["prompts"][0]["chains"])
    assert 0 < steps < 27
    if as_json:
        assert json.loads(out) == run
    else:
        assert f"interrupted after {steps} of 27 steps" in out
        assert "log p" in out


@pytest.mark.parametrize("command", [["sample", "q"], ["doctor"]])
def test_ctrl_c_while_loading(cli, command):
    code, _, err = cli(*command, "--model", "slow")
    assert code == 130
    assert err == "interrupted; nothing was drawn\n"


def test_a_failing_chain_is_an_error_and_the_others_are_printed(cli, loader):
    loader.faults = {"fail_at": {60}}
    code, out, err = cli("sample", "q", *SMALL)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.fullmatch(r"error: prompt 0, chain \d stopped: logits are NaN in row 0 at position 3", errors[0])
    assert len(re.findall(r"\d/9 \d", out)) >= 2


def test_all_chains_failing_is_one_error(cli, loader):
    loader.faults = {"fail_at": range(100)}
    code, _, err = cli("sample", "q", *SMALL, "--quiet")
    assert code == 2
    assert err == "error: logits are NaN in row 0 at position 3\n"


def test_a_full_disk_at_the_end_loses_no_text(cli, monkeypatch, tmp_path):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(powermc.Run, "to_json", full)
    code, out, err = cli("sample", "q", *SMALL, "--out", tmp_path / "run.json")
    assert code == 2
    assert "log p" in out
    assert f"error: cannot write {tmp_path / 'run.json'}: No space left on device\n" in err


SCRIPT = """
import sys, powermc.lm
from powermc.cli import main
from tests.fake_lm import FakeLM
class Loader:
    def from_pretrained(self, name, **options):
        return FakeLM(delay=0.02)
powermc.lm.CausalLM = Loader()
sys.exit(main(sys.argv[1:]))
"""


def start(*arguments, **pipes):
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **pipes)


def test_a_real_ctrl_c(tmp_path):
    file = tmp_path / "run.json"
    process = start("sample", "q", *SMALL, "--steps", "10000", "--out", str(file))
    assert process.stderr is not None
    process.stderr.readline()  # the note on the model: it is loaded
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after " in out
    assert "Traceback" not in err
    assert 0 < sum(chain["steps"] for chain in json.loads(file.read_text())["prompts"][0]["chains"]) < 90_000


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_closed_pipe_is_no_traceback(extra):
    process = start("sample", "q", *SMALL, "--quiet", *extra)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr is not None
    assert "Error" not in (err := process.stderr.read()), err
    assert "Traceback" not in err
    process.stderr.close()


# The demo.


def test_the_shipped_questions_have_answers():
    questions = demo.questions()
    assert len(questions) == 3
    for question in questions:
        assert question.question.endswith("?")
        final = question.answer.splitlines()[-1]
        assert final == f"#### {last_number(question.answer)}"
        for left, right in re.findall(r"<<(.*?)=(.*?)>>", question.answer):
            assert str(eval(left)) == right


def test_the_demo_tells_what_happens(cli, loader):
    loader.faults = {"pieces": ("24 ", "7 ", "90 ", "so ", "")}
    code, out, _ = cli("sample", "--demo", "--quiet", "--steps", "2")
    assert code == 0
    assert "p(x)^4" in out
    assert "drawn 16 times as often" in out
    assert "proposes 2 times" in out
    verdicts = re.findall(
        r"Majority answer: (\w+)(?: \((\d) of 4 chains\))?\. Reference answer: (\w+)\.(?: (\w+)\.)?", out
    )
    right = 0
    for p, (question, (majority, count, reference, word)) in enumerate(zip(demo.questions(), verdicts, strict=True)):
        assert f"Question {p + 1} of 3" in out
        assert question.question in out
        assert reference == last_number(question.answer)
        assert (majority == "none") == (count == "") == (word == "")
        assert (majority == reference) == (word == "Right")
        right += majority == reference
    assert f"{right} of 3 majority answers are right." in out
    assert re.search(r"^2 +4 +\d", out, flags=re.M)  # the summary


def test_the_demo_takes_options_and_json(cli):
    _, out, _ = cli("sample", "--demo", "--json", "--chains", "2", "--steps", "1")
    run = json.loads(out)
    assert run["settings"]["chains"] == 2
    assert run["settings"]["max_new_tokens"] == demo.SETTINGS["max_new_tokens"]


def test_an_interrupted_demo_ends_well(cli, loader):
    loader.faults = {"interrupt_at": 5}
    code, out, _ = cli("sample", "--demo")
    assert code == 130
    assert "none finished" in out
    assert "0 of 3 majority answers are right." in out


# Doctor.


def test_doctor(cli):
    code, out, _ = cli("doctor", "--model", "m")
    assert code == 0
    assert f"powermc {__version__}" in out
    for line in (r"numpy +\d", r"torch +\d", r"CPUs for this process +\d", r"float32 +\d+\.\d\d ms", r"bfloat16 +\d"):
        assert re.search(line, out), line
    assert re.search(r"architecture +table", out)
    assert re.search(r"attach deviation +0\.0e\+00 \(largest difference of logits", out)
    code, out, _ = cli("doctor")
    assert "no model checked" in out
    code, out, err = cli("doctor", "--model", "unknown")
    assert code == 2
    assert err == "error: there is no model unknown\n"


# The example.


def test_the_gsm8k_example(loader, capsys, tmp_path, monkeypatch):
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(json.dumps(q._asdict()) for q in demo.questions()))
    loader.faults = {"pieces": ("24 ", "7 ", "90 ", "so ", "")}
    source = (ROOT / "examples" / "02_reason_gsm8k.py").read_text(encoding="utf-8")
    script = compile(source, "02_reason_gsm8k.py", "exec")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["02", *arguments])
        exec(script, {"__name__": "__main__"})

    run(str(file), "--limit", "2", "--steps", "1", "--chains", "3")
    out = capsys.readouterr().out
    assert len(re.findall(r"^(right|wrong)  majority", out, flags=re.M)) == 2
    assert re.search(r"majority answers right: [012] of 2", out)
    assert re.search(r"single chains right: [0-6] of 6", out)
    file.write_text('{"question": "a"}\n')
    with pytest.raises(SystemExit, match=r"q\.jsonl, line 1: needs 'question' and 'answer'"):
        run(str(file))
    file.write_text('{"question": "a", "answer": "#### 4"}\n')
    with pytest.raises(SystemExit, match="alpha must be a finite number"):
        run(str(file), "--alpha", "-1")
    with pytest.raises(SystemExit, match=r"cannot read no\.jsonl"):
        run("no.jsonl")


def test_read_prompts_names_an_unreadable_file(tmp_path):
    with pytest.raises(ArgumentError, match="cannot read"):
        read_prompts(tmp_path)
    assert os.listdir(tmp_path) == []
