"""The numbers behind plots and report: one function per picture, arrays and counts, nothing drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from powermc.lm.ledger import Ledger

if TYPE_CHECKING:
    from powermc.results import Run


@dataclass(frozen=True)
class Share:
    """A part of what a run cost. `head`: states turned into logits; otherwise tokens through layers."""

    name: str
    amount: float
    head: bool


@dataclass(frozen=True)
class Cuts:
    """Steps that proposed something, by where they cut: bin i holds cuts edges[i] <= cut < edges[i + 1]."""

    edges: np.ndarray
    proposed: np.ndarray
    accepted: np.ndarray
    changed: np.ndarray


@dataclass(frozen=True)
class Funnel:
    """Per block (rows of `blocks`), how many steps came how far; `stages` from first to last: name and counts."""

    blocks: np.ndarray
    stages: tuple[tuple[str, np.ndarray], ...]


def trace(run: Run, prompt: int) -> np.ndarray:
    """Shape (chain, step), nats: log p of the path after every step of all blocks; NaN where a chain did not get."""
    return run.infos[prompt]["log_p"]


def block_starts(run: Run, prompt: int) -> list[int]:
    """The steps, counted from 0, that are the first of their block."""
    blocks = run.infos[prompt]["block"].max(axis=0, initial=-1)
    return [i for i, block in enumerate(blocks.tolist()) if i == 0 or block != blocks[i - 1]]


def spent(run: Run, prompt: int) -> np.ndarray:
    """Shape (chain, step): tokens run through the model for the chain's steps so far, growth left out."""
    return np.cumsum(run.infos[prompt]["tokens"], axis=1)


def draws(run: Run, prompt: int) -> np.ndarray:
    """Shape (chain, draw), nats: log p after every step on the last block, of the chains that took all of them."""
    info, last = run.infos[prompt], _last_block(run)
    rows = [log_p[blocks == last] for log_p, blocks in zip(info["log_p"], info["block"], strict=True)]
    most = max((len(row) for row in rows), default=0)
    return np.array([row for row in rows if len(row) == most and most])


def ranks(values: np.ndarray, bins: int) -> np.ndarray:
    """Shape (chain, bin): draws of each chain by their rank among the draws of all; ties share their mean rank."""
    from scipy.stats import rankdata

    share = (rankdata(values, method="average").reshape(values.shape) - 0.5) / values.size
    found = np.minimum((share * bins).astype(int), bins - 1)
    return np.stack([np.bincount(row, minlength=bins) for row in found])


def costs(ledger: Ledger) -> tuple[list[Share], str]:
    """What was spent by range of layers and by head, largest first, and its unit: FLOPs, or tokens if unknown."""
    counted = ledger.flops > 0
    spans, heads = (ledger.span_flops, ledger.head_flops) if counted else (ledger.spans, ledger.heads)
    shares = [Share(f"layers {a}\u2013{b}", float(n), False) for (a, b), n in spans.items()]
    if counted:
        shares += [Share(f"head at {depth}", float(n), True) for depth, n in heads.items()]
    shares = [share for share in shares if share.amount > 0]
    return sorted(shares, key=lambda share: -share.amount), "FLOPs" if counted else "tokens"


def cuts(run: Run, prompts: Sequence[int], bins: int = 16) -> Cuts:
    """Proposals of these prompts by their cut; null moves are none."""
    infos = [run.infos[p] for p in prompts]
    cut = np.concatenate([info["cut"].ravel() for info in infos])
    taken = np.concatenate([((info["block"] >= 0) & ~info["null"]).ravel() for info in infos]) & (cut >= 0)
    width = max(1, -(-int(run.settings["max_new_tokens"]) // bins))
    edges = np.arange(0, int(run.settings["max_new_tokens"]) + width, width)

    def count(name: str | None) -> np.ndarray:
        chosen = taken if name is None else taken & np.concatenate([info[name].ravel() for info in infos])
        return np.histogram(cut[chosen], edges)[0]

    return Cuts(edges, count(None), count("accepted"), count("changed"))


def funnel(run: Run, prompts: Sequence[int]) -> Funnel:
    """How far the steps of these prompts came, by block.

    Screened kernels have a first stage; gated and plain steps, which have none, count as passing it.
    """
    infos = [run.infos[p] for p in prompts]

    def column(name: str) -> np.ndarray:
        return np.concatenate([info[name].ravel() for info in infos])

    block, changed, accepted = column("block"), column("changed"), column("accepted")
    proposed = (block >= 0) & ~column("null")
    stages = [("proposed", proposed)]
    if all("stage1_accepted" in info for info in infos):
        one_stage = (column("component") == 1) | column("gated") | column("same")
        stages.append(("passed stage 1", proposed & (column("stage1_accepted") | one_stage)))
    stages += [("accepted", proposed & accepted), ("changed the path", proposed & changed)]
    blocks = np.unique(block[block >= 0])
    return Funnel(
        blocks, tuple((name, np.array([(mask & (block == b)).sum() for b in blocks])) for name, mask in stages)
    )


def _last_block(run: Run) -> int:
    return -(-int(run.settings["max_new_tokens"]) // int(run.settings["block_size"])) - 1
