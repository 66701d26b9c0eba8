"""`powermc calibrate` on a tiny saved model, and what `powermc doctor` says of exits."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import powermc.lm
from powermc.cli import main
from powermc.cli.calibrate import read_texts
from powermc.cli.doctor import splits
from powermc.errors import ModelError
from powermc.lm import CausalLM, Lens, corpus
from powermc.lm.engine import Engine
from tests.lm.families import tiny_model
from tests.lm.test_calibration import texts
from tests.lm.test_loading import tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    lines = [" ".join(f"w{token}" for token in ids) for ids in texts(100)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        code = main([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return run


def test_from_texts_to_a_lens(cli, folder, data, tmp_path):
    out, plot, others = tmp_path / "lens.safetensors", tmp_path / "kl.png", tmp_path / "others.jsonl"
    others.write_text("\n".join(json.dumps({"text": f"w{i} w{i + 1} w2 w7"}) for i in range(20)))
    code, screen, notes = cli(
        *["calibrate", "--model", folder, "--data", data, "--layers", "3,2", "--held-out", others, "--alpha", "2"],
        *["--out", out, "--plot", plot],
    )
    assert code == 0, notes
    lens = Lens.load(out)
    assert lens.layers == (2, 3)
    assert lens.table() in screen
    assert lens.report[0].tokens == 60
    assert re.search(r"fitted on 1,\d{3} tokens, chosen on 17\d, reported on 60 others", screen)
    assert "How to read it: KL and entropies H are nats per token" in screen
    assert "draws at temperature 0.5" in screen
    assert re.search(r"calibration took \d+\.\d s, peak memory \d+\.\d\d GB, which it raised by \d\.\d\d GB\n", screen)
    assert [line for line in notes.splitlines() if line.startswith("powermc: fitting")]
    assert f"the lens is in {out}" in notes
    assert plot.read_bytes().startswith(b"\x89PNG")
    lens.check(CausalLM.from_pretrained(str(folder)))


def test_settings_reach_the_calibration(cli, folder, data, tmp_path):
    out = tmp_path / "lens"
    code, screen, notes = cli(
        *[
            "calibrate",
            "--model",
            folder,
            "--data",
            data,
            "--head",
            "temperature",
            "--tokens",
            "300",
            "--out",
            out,
            "-q",
        ]
    )
    assert (code, notes) == (0, "")
    lens = Lens.load(out)
    assert {lens.head(layer).kind for layer in lens.layers} == {"temperature"}
    assert 300 <= lens.origin.fit_tokens + lens.origin.validation_tokens < 320
    assert "ridge" in screen  # the column, empty
    assert lens.origin.alpha == 4.0


def test_without_data_and_without_out(cli, folder, monkeypatch):
    """The model's own samples; the lens goes to the cache, where the API finds it."""
    monkeypatch.setattr(corpus, "OWN_TOKENS", 400)
    code, screen, notes = cli("calibrate", "--model", folder, "--layers", "2")
    assert code == 0
    assert "powermc: writing text" in notes
    model = CausalLM.from_pretrained(str(folder))
    monkeypatch.setattr(powermc.lm.calibration, "calibrate", None)  # not called again
    assert powermc.lm.cached_lens(model, [2]).table() in screen


def test_texts_of_every_form(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf"plain"\n{"text": "a", "question": "no"}\n{"question": "q", "answer": "a"}\n{"question": "q"}\n'
        b'{"prompt": "2+2=", "completion": "4"}\r\n{"prompt": "p"}\n'
    )
    assert read_texts(file) == ["plain", "a", "q\na", "q", "2+2=4", "p"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is empty; it needs one JSON line per text"),
        (b'"a"\n\n"b"', ", line 2: the line is empty"),
        (b'"a"\nhello\n', ", line 2: not JSON: Expecting value"),
        (b'"\xff"', ", line 1: not JSON: it is not UTF-8"),
        (b'{"answer": "a"}', ", line 1: the object has none of 'text', 'question' and 'prompt'"),
        (b"7", ", line 1: the text must be a string, got int"),
        (b'{"question": "q", "answer": 7}', ", line 1: the text must be a string, got int"),
        (b'{"text": " "}', ", line 1: the text is empty"),
    ],
)
def test_bad_files_of_texts(cli, tmp_path, monkeypatch, content, message):
    monkeypatch.setitem(powermc.lm.__dict__, "CausalLM", None)  # nothing is loaded
    file = tmp_path / "t.jsonl"
    file.write_bytes(content)
    for option in ("--data", "--held-out"):
        code, out, err = cli("calibrate", option, file)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {file}{message}")
        assert err.count("\n") == 1


BAD = [
    (["--layers", "12,x"], "--layers must be whole numbers with commas between, such as 12,16,20; got '12,x'"),
    (["--head", "tuned"], "unknown head 'tuned'; choose one of lens, temperature, ridge, kl"),
    (["--alpha", "0"], "alpha must be a finite number > 0, got 0.0"),
    (["--tokens", "0"], "tokens must be at least 1, got 0"),
    (["--data", "no/such.jsonl"], "cannot read no/such.jsonl: No such file or directory"),
    (["--out", "no/such/lens"], "cannot write no/such/lens: No such file or directory"),
    (["--plot", "."], "cannot write .: it is a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[a[0][0] for a in BAD])
def test_bad_input_is_found_before_the_model_is_loaded(cli, monkeypatch, arguments, message):
    monkeypatch.setitem(powermc.lm.__dict__, "CausalLM", None)
    code, out, err = cli("calibrate", *arguments)
    assert (code, out) == (2, "")
    assert err == f"error: {message}\n" or err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_bad_input_that_only_the_model_shows(cli, folder, data, tmp_path):
    for arguments, message in (
        (["--layers", "4"], "exit layer 4 is out of range"),
        (["--data", data, "--tokens", "30"], "needs at least 33 tokens to fit its 32 features"),
    ):
        code, out, err = cli(
            "calibrate", "--model", folder, "--data", data, *arguments, "--out", tmp_path / "lens", "-q"
        )
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "lens").exists()


def test_without_matplotlib(cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = cli("calibrate", "--plot", tmp_path / "p.png")
    assert code == 2
    assert err == "error: plots need the package matplotlib: pip install 'powermc[plots]'\n"


def test_a_plot_of_no_format(cli, folder, data, tmp_path):
    """The lens, which took the time, is there all the same."""
    code, _, err = cli(
        *[
            "calibrate",
            "--model",
            folder,
            "--data",
            data,
            "--out",
            tmp_path / "lens",
            "--plot",
            tmp_path / "p.xyz",
            "-q",
        ]
    )
    assert code == 2
    assert "cannot write the plot" in err
    assert err.count("\n") == 1
    assert Lens.load(tmp_path / "lens").layers


def test_help_says_what_the_defaults_are(cli):
    code, out, _ = cli("calibrate", "--help")
    assert code == 0
    for option in ("--data", "--layers", "--head", "--held-out", "--tokens", "--alpha", "--out", "--plot"):
        assert option in out


# Doctor.


def test_doctor_says_whether_a_model_can_be_split(cli, folder):
    code, out, _ = cli("doctor", "--model", folder)
    assert code == 0
    assert "blocks  4 in LlamaForCausalLM.model.layers\n" in out
    assert re.search(
        r"split   \d\.\de[-+]\d\d \(largest difference of logits, run in two parts after any of 3 of 3", out
    )


def test_doctor_says_why_not(monkeypatch):
    model = CausalLM(tiny_model("llama"))

    def refuse(self: Engine, depth: int) -> float:
        if depth == 2:
            raise ModelError("it cannot")
        return 1e-6 * depth

    monkeypatch.setattr(Engine, "check_split", refuse)
    lines = splits(model)
    assert lines[1].startswith("split   3.0e-06 (largest difference of logits, run in two parts after any of 2 of 3")
    assert lines[2] == "refused at layer 2: it cannot"
    assert splits(CausalLM(tiny_model("llama", num_hidden_layers=1))) == ["none: the model has 1 layer"]
