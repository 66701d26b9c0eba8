"""A tiny model, questions and settings that the tests of methods share."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from powermc.evaluation import methods
from powermc.evaluation.methods import Answers, Method, Question, Terms, parse
from powermc.lm import CausalLM
from powermc.lm.heads import ExitHead
from powermc.sequences.path import Tokens
from tests.lm.families import tiny_model
from tests.lm.lenses import lens_of
from tests.lm.test_loading import tokenizer

TERMS = Terms(max_new_tokens=8, stop=("w12", "w20 w"), alpha=2.0, seed=3)
TEXTS = ("w1 w2 w7", "w4 w4", "w30 w31 w32 w33", "w9")
SMALL = "block_size=3:steps=2"


def model_of(*, layers: int = 6, max_rows: int = 64, seed: int = 0, eager: bool = False, **options: bool) -> CausalLM:
    """Float64, peaked, with a tokenizer of words; three end tokens."""
    more = {"attn_implementation": "eager"} if eager else {}
    model = tiny_model("llama", num_hidden_layers=layers, logit_scale=1.5, seed=seed, **more).double()
    return CausalLM(model, tokenizer(), max_rows=max_rows, **options)


@functools.cache
def lab() -> CausalLM:
    return model_of()


@functools.cache
def lens_file() -> str:
    """A lens for `lab()`, and any other `model_of` of the same weights, at layers 3 and 4."""
    path = Path(tempfile.mkdtemp()) / "a.lens"
    lens_of(lab(), [ExitHead(3, "temperature", 1.3), ExitHead(4)]).save(path)
    return str(path)


def specs() -> dict[str, str]:
    """Every method with settings small enough for a test."""
    return {
        "beam": "beam:width=3",
        "best-of-n": "best-of-n:n=3",
        "dola": "dola",
        "early-exit": f"early-exit:lens={lens_file()}:layer=3:{SMALL}:plain=0.3",
        "first-finish": "first-finish:n=3",
        "greedy": "greedy",
        "low-temperature": "low-temperature",
        "nucleus": "nucleus:top_p=0.7",
        "power": f"power:{SMALL}",
        "power-auto": f"power-auto:lens={lens_file()}:{SMALL}",
        "published": "published:block_size=5:steps=1",
        "published-batched": "published-batched:block_size=5:steps=1:chains=2",
        "self-consistency": "self-consistency:n=4",
        "self-speculative": f"self-speculative:lens={lens_file()}:layer=4",
        "temperature": "temperature:temperature=0.9",
    }


@functools.cache
def ready(name: str) -> Method:
    """The method of `specs`, prepared."""
    model = lab()
    return parse(specs()[name]).prepare(model, [q.prompt for q in questions(model)], TERMS)


def questions(model: CausalLM, texts: Sequence[str] = TEXTS) -> list[Question]:
    """A text states its second word, if that is one of some."""
    return [Question(str(i), model.prompt(text), read) for i, text in enumerate(texts)]


def shipped() -> list[str]:
    """The methods of powermc itself: tests of comparisons register some of their own."""
    return [name for name in methods.names() if methods.get(name).__module__.startswith("powermc.")]


def read(text: str) -> str | None:
    word = text.split()[1:2]
    return word[0][:2] if word else None


def tokens_of(answers: Answers) -> list[list[Tokens]]:
    return [[answer.tokens for answer in row] for row in answers.answers]


@torch.no_grad()
def next_log_p(model: CausalLM, ids: Sequence[int]) -> torch.Tensor:
    """log p of every next token, shape (len(ids), V), by the model's plain forward."""
    return model.decoder.model(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(-1)  # type: ignore[operator]


def log_p_of(model: CausalLM, prompt: Tokens, tokens: Tokens) -> float:
    rows = next_log_p(model, (*prompt, *tokens))[len(prompt) - 1 : -1]
    return float(rows[range(len(tokens)), list(tokens)].sum())
