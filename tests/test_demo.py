"""The second half of `powermc sample --demo`: the same questions by an early exit, on a tiny saved model."""

from __future__ import annotations

import re

import pytest

from powermc.cli import demo, main
from tests.lm.families import tiny_model
from tests.lm.test_loading import tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    words = [" ".join(f"w{(7 * i * i + 3 * t * i + t) % 30}" for t in range(12)) for i in range(40)]
    monkeypatch.setattr(demo, "shipped_texts", lambda: [{"prompt": w[:12], "completion": w} for w in words])
    monkeypatch.setattr(demo, "questions", lambda: [demo.Question("w1 w2 w7?", "w7 #### 7")])
    return tmp_path


@pytest.mark.filterwarnings("ignore:KL:RuntimeWarning")
def test_the_demo_ends_with_both_ledgers(folder, capsys):
    arguments = ["sample", "--demo", "--model", str(folder), "--max-new-tokens", "8", "--steps", "3", "--quiet"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    plain, early = first.split("The same by an early exit")
    assert "majority answers are right" in plain
    assert re.search(r"^kernel steps +12 +12$", early, re.MULTILINE)
    layer = re.search(r"^ +plain MH +exit (\d)$", early, re.MULTILINE)[1]  # type: ignore[index]
    assert re.search(rf"^tokens run through layers 0-{layer} +0 +[1-9]\d*$", early, re.MULTILINE)
    assert re.search(r"Stage 1 turned down \d+ of \d+ proposals before the upper layers were asked", early)


def test_a_demo_of_another_kernel_runs_once(folder, capsys):
    arguments = ["sample", "--demo", "--model", str(folder), "--max-new-tokens", "8", "--steps", "1", "--quiet"]
    assert main([*arguments, "--kernel", "early-exit"]) == 0
    assert "The same by an early exit" not in capsys.readouterr().out


def test_the_shipped_texts_are_enough_for_one_exit_of_the_demo_model():
    texts = demo.shipped_texts()
    assert len(texts) > 30
    assert all(text["prompt"] and text["completion"] for text in texts)
    assert sum(len(text["completion"].split()) for text in texts) > 4000
