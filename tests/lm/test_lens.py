"""Lens files: what is kept, what is refused, and the exits that a lens makes of a model."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import powermc
from powermc.errors import ArgumentError, ModelError
from powermc.lm import CausalLM, EarlyExit, Lens, calibrate
from powermc.lm.heads import ExitHead
from powermc.lm.lens import ExitReport, Origin, fingerprint
from powermc.scheduling import run
from powermc.sequences import Prompt
from tests.lm.families import tiny_model
from tests.lm.test_calibration import texts


@cache
def model() -> CausalLM:
    return CausalLM(tiny_model("llama"))


@cache
def lens() -> Lens:
    return calibrate(model(), texts(100), layers=[3, 2])


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None if b is None else a is not None and a.dtype == b.dtype and torch.equal(a, b)


# Files.


@pytest.mark.parametrize("kind", ["lens", "temperature", "ridge"])
def test_what_is_saved_is_loaded_bit_by_bit(tmp_path: Path, kind: str) -> None:
    made = lens() if kind == "ridge" else calibrate(model(), texts(), layers=[2, 3], head=kind)
    made.save(tmp_path / "a")
    read = Lens.load(tmp_path / "a")
    assert (read.layers, read.report, read.frequent, read.origin) == ((2, 3), made.report, made.frequent, made.origin)
    for layer in read.layers:
        one, other = read.head(layer), made.head(layer)
        assert (one.layer, one.kind, one.temperature) == (other.layer, other.kind, other.temperature)
        assert same(one.weight, other.weight)
        assert same(one.bias, other.bias)
    read.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_lens_says_what_it_is_for() -> None:
    origin = lens().origin
    assert (origin.depth, origin.width, origin.dtype, origin.alpha) == (4, 32, "float32", 4.0)
    assert origin.fingerprint == lens().fingerprint == fingerprint(model())
    assert origin.fit_tokens > 1000
    assert origin.validation_tokens > 100
    assert origin.seconds > 0
    assert origin.peak_bytes is not None
    assert origin.peak_bytes > 1e7
    assert repr(lens()) == "Lens(LlamaForCausalLM, layers 2, 3)"
    assert origin.corpus == calibrate(model(), texts(100), layers=[1]).origin.corpus
    assert origin.corpus != calibrate(model(), texts(80), layers=[1]).origin.corpus


def test_the_table_has_a_line_per_layer() -> None:
    lines = lens().table().splitlines()
    assert len(lines) == 3
    assert lines[0].split() == [
        *["layer", "head", "temp.", "ridge", "KL(p||p~)", "KL(p~||p)", "top-1", "1-TV", "H(p)", "H(p~)", "tokens"]
    ]
    row = lens().report[1]
    assert lines[2].split()[:2] == ["3", "ridge"]
    assert lines[2].split()[4] == f"{row.kl:.3f}"
    assert len(set(map(len, lines))) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lens"
    file.write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArgumentError, match=r"cannot write .*lens: No space left on device"):
        lens().save(file)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["lens"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lens().save(tmp_path / "lens.safetensors")
    return tmp_path / "lens.safetensors"


def refusal(file: Path) -> str:
    with pytest.raises(ArgumentError) as caught:
        Lens.load(file)
    text = str(caught.value)
    assert "\n" not in text
    assert str(file) in text
    return text


def test_files_that_are_no_lens(file: Path, tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "none")
    assert "there is no file" in refusal(tmp_path)
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "is no lens, or was cut short" in refusal(file)
    file.write_text(json.dumps({"prompts": []}))
    assert "is no lens, or was cut short" in refusal(file)
    save_file({"x": torch.zeros(2)}, file)
    assert "a safetensors file of something else" in refusal(file)
    save_file({"x": torch.zeros(2)}, file, {"powermc.lens": '{"format": 9}'})
    assert "its format is 9, this version reads 1" in refusal(file)
    save_file({"x": torch.zeros(2)}, file, {"powermc.lens": '{"format": 1}'})
    assert "cannot be used" in refusal(file)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "its numbers have changed since it was written" in refusal(file)


def test_a_lens_without_its_numbers(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors["2.bias"]
    save_file(tensors, file, metadata)
    assert "cannot be used" in refusal(file)
    save_file(load_file(file), file, {"powermc.lens": "{"})
    assert "cannot be used" in refusal(file)


# The model it belongs to.


def refused(other: CausalLM) -> str:
    with pytest.raises(ModelError) as caught:
        lens().check(other)
    text = str(caught.value)
    assert "\n" not in text
    assert "powermc calibrate --model LlamaForCausalLM" in text
    return text


def test_the_model_it_was_made_for_is_accepted() -> None:
    lens().check(model())
    lens().check(CausalLM(tiny_model("llama")))


def test_other_models_are_refused() -> None:
    assert "with 4 layers, LlamaForCausalLM has 5" in refused(CausalLM(tiny_model("llama", num_hidden_layers=5)))
    double = refused(CausalLM(tiny_model("llama").double()))
    assert "fitted to float32 weights, LlamaForCausalLM is loaded in float64: load it with dtype=float32" in double
    assert "fitted to other weights" in refused(CausalLM(tiny_model("llama", seed=1)))


def test_a_model_that_was_trained_on_is_refused() -> None:
    other = CausalLM(tiny_model("llama"))
    lens().check(other)
    with torch.no_grad():
        other.decoder.model.get_output_embeddings().weight[3, 3] *= 1.001  # type: ignore[index,union-attr]
    assert f"fingerprint {lens().fingerprint[:8]} of LlamaForCausalLM, not {fingerprint(other)[:8]}" in refused(other)
    with pytest.raises(ModelError, match="fitted to other weights"):
        lens().exit(other, 2)


def test_the_fingerprint_is_one_of_all_bytes() -> None:
    def of(**changes) -> str:
        return fingerprint(CausalLM(tiny_model("llama", **changes)))

    assert of() == fingerprint(model())
    assert of(tie_word_embeddings=True) != of()
    assert len({of(), of(seed=1), of(num_hidden_layers=3), of(vocab_size=36)}) == 4
    half = [CausalLM(tiny_model("llama").to(dtype)) for dtype in (torch.bfloat16, torch.float64)]
    assert len({fingerprint(m) for m in (*half, model())}) == 3


# Exits.


def test_an_exit_is_the_same_object_while_it_lives() -> None:
    first = lens().exit(model(), 2)
    assert isinstance(first, EarlyExit)
    assert lens().exit(model(), 2) is first
    assert lens().exit(model(), 3) is not first
    screen = lens().exit(model(), 2, vocabulary=8)
    assert lens().exit(model(), 2, vocabulary=8) is screen
    assert screen is not first
    other = CausalLM(tiny_model("llama"))
    assert lens().exit(other, 2) is not first
    assert lens().exit(other, 2).model is other
    del other
    gc.collect()
    assert len(lens()._exits) <= 3  # nobody holds those of the other model
    assert len(lens()._checked) <= 2


def test_the_exit_reads_the_head() -> None:
    """log p~ of a path is that of the head on the states of a plain forward."""
    exit, head, prompt = lens().exit(model(), 2), lens().head(2), Prompt((1, 2, 4), "", 1)
    path = model().space(6).path(prompt, (7, 9, 11, 2, 6, 9))
    scored = run(score(exit, path))
    ids = torch.tensor([prompt.ids + path.tokens])
    with torch.no_grad():
        out = model().decoder.model(input_ids=ids, output_hidden_states=True)
        logits = head.logits(model().decoder, out.hidden_states[2][0, 2:-1], np.full(6, -1))
    log_p = torch.log_softmax(logits.double(), -1).gather(1, ids[0, 3:, None])[:, 0]
    np.testing.assert_allclose(scored.log_p, log_p.numpy(), atol=1e-4)


def score(exit: EarlyExit, path: powermc.Path):
    return (yield exit.score(path, ()))


def test_the_screening_head_knows_the_most_frequent_tokens() -> None:
    """Token v occurs v times for the last ones: they are the most frequent."""
    data = [[1, *[v] * v] for v in range(1, 30)]
    made = calibrate(model(), data, layers=[2], held_out=[[1, 2, 3]])
    assert made.frequent[:3] == (29, 28, 27)
    assert set(made.frequent) == set(range(1, 30))
    screen = made.exit(model(), 2, vocabulary=5)
    assert screen.head.scoring
    assert screen.head.vocabulary is not None
    assert screen.head.vocabulary.tolist() == [25, 26, 27, 28, 29]
    with pytest.raises(ArgumentError, match="not a distribution to draw from"):
        screen.branch(model().space(3).path(Prompt((1,), "", 1), (7, 9, 11)), 0)
    for wrong in (0, 30):
        with pytest.raises(ArgumentError, match=f"vocabulary must be 1 to 29.*got {wrong}"):
            made.exit(model(), 2, vocabulary=wrong)


def test_a_layer_without_a_head() -> None:
    with pytest.raises(ArgumentError, match="the lens has no head at layer 1; it has 2, 3"):
        lens().exit(model(), 1)


def test_the_names_are_public() -> None:
    assert powermc.Lens is Lens
    assert powermc.EarlyExit is EarlyExit
    assert powermc.calibrate is calibrate


def test_a_lens_of_ones_own_heads() -> None:
    """Nothing but the constructor is needed: a lens can be put together by hand."""
    origin = replace(lens().origin, model="mine")
    row = ExitReport(2, "lens", 1.0, None, 1.0, 1.0, 0.5, 0.5, 2.0, 2.0, 10)
    made = Lens({2: ExitHead(2)}, (row,), (), origin)
    assert isinstance(made.origin, Origin)
    assert made.exit(model(), 2).head.kind == "lens"
