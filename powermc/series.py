"""The numbers behind plots and report that are not diagnostics: arrays and counts, nothing is drawn here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from powermc.diagnostics import funnel

if TYPE_CHECKING:
    from powermc.lm.ledger import Ledger
    from powermc.results import Run


@dataclass(frozen=True)
class Share:
    """A part of what a run cost. `head`: states turned into logits; otherwise tokens through layers."""

    name: str
    amount: float
    head: bool


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


def ranks(values: np.ndarray, bins: int) -> np.ndarray:
    """Shape (chain, bin): draws of each chain by their rank among the draws of all; ties share their mean rank."""
    _, which, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2  # of the ranks that equal values have, from 0 to all
    share = (middle[which] / values.size).reshape(values.shape)
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


def stages(run: Run, prompt: int | None = None) -> list[tuple[str, list[int]]]:
    """How far steps came: a name and the counts of all blocks, from steps that proposed to those that moved the path.

    "passed stage 1" is there for a screened kernel only: what had no first stage to pass counts as passing.
    """
    found = funnel(run, prompt)[:-1]
    named = [("proposed", [f.proposed for f in found])]
    if run.early_exit["kernel"] == "early-exit":
        named.append(("passed stage 1", [f.proposed - f.screened + f.passed for f in found]))
    return [*named, ("accepted", [f.accepted for f in found]), ("changed the path", [f.changed for f in found])]


def si(value: float) -> str:
    """3.2e12 as "3.2 T": three digits, and the prefix that a unit follows."""
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    power = min(int(np.log10(value)) // 3, len(prefixes) - 1) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {prefixes[power]}"
