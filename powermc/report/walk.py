"""One chain for the report: its steps as columns, its paths as what changed from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from powermc.report.packing import Alphabet, join, numbers, pack_scores
from powermc.results import Chain
from powermc.sequences.path import Path, agreement

NOT_TAKEN, MOVED, SAME, STAGE1, TURNED_DOWN, ABANDONED, NULL = range(7)
"""What a step came to; `page/data.js` has the same numbers."""

_COLUMNS = (
    *("block", "cut", "proposal_length", "tokens", "component", "gated", "stage", "length"),
    *("log_p", "log_ratio", "log_level", "log_surrogate", "log_target"),
)


def outcomes(info: Mapping[str, np.ndarray], chain: int, steps: int) -> np.ndarray:
    """Shape (steps,): one of the numbers above for every step of a chain."""

    def flag(name: str) -> np.ndarray:
        return np.asarray(info[name][chain, :steps], bool) if name in info else np.zeros(steps, bool)

    outcome = np.full(steps, TURNED_DOWN)
    if "component" in info:  # a mixture of a screened kernel and a plain one, which has no first stage
        screened = np.asarray(info["component"][chain, :steps]) == 0
        outcome[screened & ~flag("gated") & ~flag("stage1_accepted")] = STAGE1
    outcome[flag("accepted")] = SAME
    outcome[flag("changed")] = MOVED
    outcome[flag("abandoned")] = ABANDONED
    outcome[flag("null")] = NULL
    return outcome


def tokens_of(chain: Chain) -> set[int]:
    """Every token id in the paths of a chain."""
    paths = {id(p): p for p in (*chain.history, *chain.starts.values(), chain.path) if p is not None}
    return {token for path in paths.values() for token in path.tokens}


def walk(
    chain: Chain,
    index: int,
    info: Mapping[str, np.ndarray],
    proposals: tuple[np.ndarray | None, ...],
    alphabet: Alphabet,
) -> dict[str, Any]:
    """JSON-able: see `Walk` in `page/data.js`, which reads it."""
    steps = chain.steps
    outcome = outcomes(info, index, steps)
    columns = {name: numbers(info[name][index, :steps]) for name in _COLUMNS if name in info}
    return {
        "steps": steps,
        "error": None if chain.error is None else str(chain.error),
        "columns": {**columns, **_second(info, index, steps), "verdict": outcome.tolist()},
        **_deltas(chain, info["block"][index, :steps], outcome, alphabet),
        **_proposals(proposals[:steps], outcome, alphabet),
    }


def _second(info: Mapping[str, np.ndarray], chain: int, steps: int) -> dict[str, list[Any]]:
    """Of proposals that reached stage 2, its log ratio, and whether the ratio on record is that one or stage 1's."""
    if "log_surrogate" not in info:
        return {}
    target, surrogate, stage1, ratio = (
        info[name][chain, :steps] for name in ("log_target", "log_surrogate", "log_stage1", "log_ratio")
    )
    second = target - surrogate
    # Not `second == ratio`: a store has rounded each of the three by itself.
    return {"log_ratio_2": numbers(second), "on_record_2": (np.isfinite(second) & (ratio != stage1)).tolist()}


def _deltas(chain: Chain, blocks: np.ndarray, outcome: np.ndarray, alphabet: Alphabet) -> dict[str, Any]:
    """What every path has beyond what it shares with the one before; of growth and of steps, in that order.

    `keep`: how many tokens are shared, None where the path was not kept. `starts`: the steps that growth came before.
    """
    last: Path | None = None
    starts: list[int] = []
    keep: dict[str, list[int | None]] = {"grown": [], "step": []}
    lengths: list[int] = []
    tails: list[np.ndarray] = []
    scores: list[np.ndarray] = []

    def add(path: Path | None, kind: str) -> None:
        nonlocal last
        if path is None:
            keep[kind].append(None)
            lengths.append(0)
            return
        shared = 0 if last is None else len(path) if path is last else agreement(last.tokens, path.tokens)
        keep[kind].append(shared)
        lengths.append(len(path) - shared)
        tails.append(np.array(path.tokens[shared:], dtype=np.int64))
        scores.append(_scores(path, shared))
        last = path

    fresh = True  # whether `last` is the path that the step sets out from
    for step in range(chain.steps):
        if (step == 0 or blocks[step] != blocks[step - 1]) and int(blocks[step]) in chain.starts:
            starts.append(step)
            add(chain.starts[int(blocks[step])], "grown")
            fresh = True
        path = chain.history[step] if step < len(chain.history) else None
        if path is None and fresh and outcome[step] != MOVED:
            path = last
        add(path, "step")
        fresh = path is not None
    return {
        "keep": keep["step"],
        "starts": starts,
        "startKeep": keep["grown"],
        "lengths": lengths,
        "tails": alphabet.pack(join(tails, np.int64)),
        "scores": pack_scores(join(scores, np.float64)),
    }


def _scores(path: Path, start: int) -> np.ndarray:
    found = np.full(len(path), np.nan)
    if path.log_p is not None:
        found[: len(path.log_p)] = path.log_p[: len(path)]
    return found[start:]


def _proposals(proposals: tuple[np.ndarray | None, ...], outcome: np.ndarray, alphabet: Alphabet) -> dict[str, Any]:
    """What was drawn and not taken; -1 for none, as what was taken is in the paths."""
    told = [
        None if tokens is None or verdict in (MOVED, SAME) else tokens
        for tokens, verdict in zip(proposals, outcome.tolist(), strict=False)
    ]
    told += [None] * (len(outcome) - len(told))
    return {
        "proposals": alphabet.pack(join([t for t in told if t is not None], np.int64)),
        "proposalLengths": [-1 if t is None else len(t) for t in told],
    }
