"""Runs made up without a model: of any size, of either kernel, in a moment. What they claim was never computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from powermc import power_sample
from powermc.errors import ChainError
from powermc.lm.ledger import Ledger
from powermc.results import Chain, Run
from powermc.sequences import Path, Prompt
from powermc.settings import Settings
from tests.fake_lm import FakeLM

WORDS = ("the", "of", "a", "loaf", "costs", "so", "then", "she", "earns", "four", "dollars", "each", "is", "we", "add")
HOSTILE = (
    *("<script>alert(1)</script>", "</script>", "<img src=x onerror=alert(1)>", "<!--", "{{7*7}}", "&lt;b&gt;"),
    *("\u2028", "\u202egnp.exe", "\x1b[31m", "\x00", "\ud800", "\n", "\t", "'\"`", "]]>", "javascript:alert(1)"),
)


def made_up(
    *,
    prompts: int = 1,
    chains: int = 4,
    steps: int = 60,
    blocks: int = 2,
    horizon: int = 64,
    kernel: str = "early-exit",
    pieces: tuple[str, ...] | None = None,
    thin: int = 1,
    seed: int = 0,
) -> Run:
    """A run of `steps` steps per chain, as many on every block; paths of half the horizon or more. `thin` as there."""
    draw = np.random.default_rng(seed)
    texts = pieces or tuple(f" {word}{i // len(WORDS) or ''}" for i in range(2000) for word in (WORDS[i % len(WORDS)],))
    settings = Settings(alpha=4.0, max_new_tokens=horizon, block_size=-(-horizon // blocks), steps=steps // blocks)
    asked = tuple(Prompt((1, 2, p), f"Prompt {p}: how much does she earn?", p + 1) for p in range(prompts))
    rows = [
        [_chain(draw, prompt, texts, steps, blocks, horizon, kernel, thin) for _ in range(chains)] for prompt in asked
    ]
    ledger = Ledger(layers=30, ticks=900, prefills=12, decoded=90_000, prefilled=4_000, seconds=60.0)
    ledger.spans.update({(0, 24): 60_000, (24, 30): 20_000, (0, 30): 30_000})
    ledger.span_flops.update({(0, 24): 9e12, (24, 30): 1e12, (0, 30): 7e12})
    ledger.head_flops.update({24: 3e12, 30: 2e12})
    facts: dict[str, Any] = {"kernel": "metropolis"}
    if kernel == "early-exit":
        facts = {
            "kernel": kernel,
            "surrogate": "made up at layer 24",
            "proposal": "exit",
            "exponent": 4.0,
            "plain": 0.1,
            "fitted": [],
            "advice": None,
            "layer": 24,
        }
    filled = {"temperature": 0.25, "draws": steps // blocks, "rows": chains}
    return Run(
        model="made-up",
        settings={**settings.as_dict(), **filled, "kernel": kernel, "chains": chains},
        prompts=asked,
        chains=tuple(tuple(chain for chain, _, _ in row) for row in rows),
        infos=tuple({name: np.stack([info[name] for _, info, _ in row]) for name in row[0][1]} for row in rows),
        early_exit=facts,
        cost=ledger,
        seconds=75.0,
        resolution=1e-5,
        ignored_warpers={},
        interrupted=False,
        proposals=tuple(tuple(proposed for _, _, proposed in row) for row in rows),
        pieces=dict(enumerate(texts)),
    )


Info = Mapping[str, np.ndarray]


def _chain(
    draw: np.random.Generator,
    prompt: Prompt,
    texts: tuple[str, ...],
    steps: int,
    blocks: int,
    horizon: int,
    kernel: str,
    thin: int,
) -> tuple[Chain, Info, tuple[np.ndarray | None, ...]]:
    """A chain that redraws tails at random and keeps some of them."""
    screened = kernel == "early-exit"
    info = _columns(steps, screened)
    history: list[Path | None] = []
    proposed: list[np.ndarray | None] = []
    starts: dict[int, Path] = {}
    x = Path(prompt, (), False, np.zeros(0))
    for step in range(steps):
        block = step * blocks // steps
        longest = (block + 1) * horizon // blocks
        if block not in starts and len(x) < longest:
            x = starts[block] = _redrawn(draw, x, len(x), longest, len(texts))
        cut = int(draw.integers(len(x)))
        y = _redrawn(draw, x, cut, longest, len(texts))
        kind = draw.choice(
            ["moved", "same", "stage1", "rejected", "abandoned", "null"], p=[0.3, 0.1, 0.25, 0.2, 0.1, 0.05]
        )
        plain = bool(draw.random() < 0.2) or not screened
        length = len(y) - cut
        row: dict[str, Any] = {"block": block, "cut": cut, "proposal_length": length, "tokens": length}
        row |= {"log_ratio": float(draw.normal(-3, 4)), "log_level": float(np.log(draw.random()))}
        if screened:
            row |= {"component": int(plain)}
            passed = not plain and kind in ("moved", "rejected")
            row |= {"stage1_accepted": passed, "stage": 2 * passed if kind == "moved" else int(passed)}
            change = float(draw.normal(0, 3))
            row |= {
                "log_surrogate": change if not plain and kind != "same" else math.nan,
                "log_stage1": row["log_ratio"] if not plain and kind != "same" else math.nan,
                "same": kind == "same" and not plain,
            }
            if row["same"]:
                row |= {"log_ratio": math.nan, "log_level": math.nan}
            if passed:  # and either stage may have come nearer to a tie
                row |= {
                    "log_target": change - 5.0,
                    **({"log_ratio": change - 5.0 - change} if draw.random() < 0.5 else {}),
                }
        if kind in ("moved", "same"):
            row |= {"accepted": True, "changed": kind == "moved"}
            x = y if kind == "moved" else x
        elif kind == "abandoned":
            row |= {"abandoned": True, "proposal_length": max(length // 3, 1)}
        elif kind == "null":
            row |= {"null": True, "proposal_length": 0, "tokens": 0, "cut": len(x), "log_ratio": math.nan}
        tokens = np.array(y.tokens[cut : cut + row["proposal_length"]], dtype=np.int32)
        proposed.append(None if kind == "null" else tokens)
        row |= {"log_p": x.log_prob, "log_density": 4 * x.log_prob, "length": len(x)}
        for name, value in row.items():
            info[name][step] = value
        last = (step - steps * (blocks - 1) // blocks + 1) % thin == 0 or block < blocks - 1
        history.append(x if last else None)
    draws = tuple(p for p in history[steps * (blocks - 1) // blocks :] if p is not None)

    def text(path: Path) -> str:
        return "".join(texts[t] for t in path.tokens[: len(path) - path.finished])

    chain = Chain(
        x, text(x), draws, tuple(map(text, draws)), steps, horizon, 0, None, history=tuple(history), starts=starts
    )
    return chain, info, tuple(proposed)


def _redrawn(draw: np.random.Generator, x: Path, cut: int, longest: int, vocabulary: int) -> Path:
    """x with a fresh tail; the last token of the vocabulary ends it, if it does not fill the horizon."""
    length = int(draw.integers(max(cut + 1, longest // 2), longest + 1))
    tokens = (*x.tokens[:cut], *draw.integers(vocabulary - 1, size=length - cut).tolist())
    finished = length < longest
    if finished:
        tokens = (*tokens[:-1], vocabulary - 1)
    assert x.log_p is not None
    log_p = np.concatenate((x.log_p[:cut], -draw.gamma(0.4, 2.0, size=length - cut)))
    return Path(x.prompt, tokens, finished, log_p)


def _columns(steps: int, screened: bool) -> dict[str, np.ndarray]:
    integers = (
        "block",
        "cut",
        "proposal_length",
        "tokens",
        "near_ties",
        "length",
        *(("component", "stage") * screened),
    )
    flags = ("accepted", "changed", "null", "abandoned", *(("gated", "same", "stage1_accepted") * screened))
    floats = (
        "log_p",
        "log_density",
        "log_ratio",
        "log_level",
        *(("log_surrogate", "log_stage1", "log_target") * screened),
    )
    return {
        **{name: np.zeros(steps, dtype=np.int32) for name in integers},
        **{name: np.zeros(steps, dtype=bool) for name in flags},
        **{name: np.full(steps, np.nan) for name in floats},
    }


SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 3, "chains": 2, "alpha": 2.0}


def _failed(run: Run) -> Run:
    error = ChainError("logits are NaN")
    chain = replace(run.chains[0][1], error=error, path=None, text=None, draws=(), history=(), steps=0)
    return replace(run, chains=((run.chains[0][0], chain, *run.chains[0][2:]),))


def _without_text(run: Run) -> Run:
    chains = tuple(replace(c, text=None, draw_texts=(None,) * len(c.draws)) for c in run.chains[0])
    return replace(run, chains=(chains,), pieces={})


def _without_history(run: Run) -> Run:
    """As someone makes one by hand."""
    chains = tuple(replace(c, history=(), starts={}) for c in run.chains[0])
    return replace(run, chains=(chains,), proposals=())


def _substituted(run: Run) -> Run:
    return replace(run, early_exit={**run.early_exit, "proposal": "substitution"})


ODD: dict[str, Callable[[], Run]] = {
    "no steps": lambda: power_sample(FakeLM(), "q", **{**SMALL, "steps": 0}),
    "one chain": lambda: power_sample(FakeLM(), "q", **{**SMALL, "chains": 1}),
    "thinned": lambda: power_sample(FakeLM(), "q", **SMALL, draws=9, thin=3),
    "interrupted": lambda: power_sample(FakeLM(interrupt_at=70), ["a", "b"], **SMALL),
    "a surrogate": lambda: power_sample(FakeLM(), "q", **SMALL, kernel="early-exit", exit=FakeLM(seed=1)),
    "metropolis": lambda: made_up(kernel="metropolis", steps=20),
    "substitution": lambda: _substituted(made_up(steps=20)),
    "a failed chain": lambda: _failed(made_up(steps=20)),
    "no text": lambda: _without_text(made_up(steps=20)),
    "no history": lambda: _without_history(made_up(steps=20)),
}
"""Runs that a picture or a report must cope with, by what is odd about them."""
