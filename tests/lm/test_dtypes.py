"""Which dtype to use: measured on the model, refused ones named, the words following the figures."""

from __future__ import annotations

import pytest
import torch

from powermc.errors import ArgumentError, ModelError
from powermc.evaluation.dtypes import ROWS, Steps, compare, verdict
from powermc.lm import CausalLM
from tests.lm.families import tiny_model


def load(dtype: str) -> CausalLM:
    if dtype == "float16":
        raise ModelError("no float16 here\nat all")
    return CausalLM(tiny_model("llama").to(getattr(torch, dtype)))


def test_every_dtype_is_measured_or_its_refusal_named() -> None:
    found = compare(load, range(1, 9))
    assert [s.dtype for s in found] == ["float32", "bfloat16", "float16"]
    assert [len(s.seconds) for s in found] == [len(ROWS), len(ROWS), 0]
    assert all(seconds > 0 for s in found for seconds in s.seconds)
    assert found[0].resolution < found[1].resolution
    assert found[2].refused == "no float16 here"
    assert verdict(found).startswith("use ")
    with pytest.raises(ArgumentError, match="no dtype can be used: no float16 here"):
        compare(load, range(1, 9), ["float16"])


def test_the_words_follow_the_figures() -> None:
    wide = Steps("float32", (0.04, 0.06, 0.10), 1e-5)
    slow, fast = Steps("bfloat16", (0.4, 0.6, 1.0), 1e-2), Steps("float16", (0.01, 0.02, 0.02), 1e-2)
    assert verdict([wide]) == "use float32"
    assert verdict([wide, slow]) == "use float32: bfloat16 takes 10.0 times as long, and rounds p"
    assert verdict([wide, slow, fast]).startswith("use float16 for speed: float32 takes 4.0 times as long. Its log")
    close = Steps("bfloat16", (0.04, 0.06, 0.08), 1e-2)
    assert verdict([wide, close]) == "use float32: bfloat16 takes 0.9 times as long, and rounds p"
