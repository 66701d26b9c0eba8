"""Transformers small enough to enumerate: float64, 3 or 4 tokens, peaked."""

from __future__ import annotations

import itertools
from typing import Any

from powermc.lm import CausalLM
from powermc.sequences import Path, Prompt, Space
from tests.lm.families import tiny_model

PROMPT = Prompt((0, 1, 0, 2), "toy", 7)


def toy_lm(
    vocab: int = 3,
    *,
    family: str = "llama",
    seed: int = 0,
    max_rows: int = 512,
    logit_scale: float = 2.5,
    layers: int = 2,
    reuse: bool = False,
) -> CausalLM:
    """A float64 model whose rows hold both likely and unlikely tokens.

    Without reuse: on so few paths the pool would soon hold every state, and no draft would run a layer.
    """
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": vocab - 1, "pad_token_id": 0}
    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        **ids,
    }
    if family == "gpt2":
        shape = {"vocab_size": vocab, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 64, **ids}
    model = tiny_model(family, seed=seed, logit_scale=logit_scale, **shape).double()
    return CausalLM(model, max_rows=max_rows, reuse=reuse)


def all_paths(space: Space, vocab: int, prompt: Prompt = PROMPT) -> list[Path]:
    """Every member of a space."""
    candidates = (t for n in range(1, space.horizon + 1) for t in itertools.product(range(vocab), repeat=n))
    return [space.path(prompt, t) for t in candidates if space.contains(t)]
