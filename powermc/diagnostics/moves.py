"""What became of proposals: by block, by where they cut, and what the first stage turned down for nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc.diagnostics.guards import blocks

if TYPE_CHECKING:
    from powermc.results import Run


@dataclass(frozen=True)
class Funnel:
    """Counts of steps, from all that were taken to those that changed the path.

    steps = null + plain + same + gated + screened. For plain Metropolis-Hastings every step that proposes is `plain`.

    Attributes
    ----------
    block
        Which; None for all blocks together.
    steps
        Kernel steps taken.
    null
        Could propose nothing.
    plain
        Proposals decided by one ratio at full depth.
    same
        Proposals of the screened kernel that were the current path: accepted as it is, nothing evaluated.
    gated
        Proposals of the screened kernel decided at full depth as the surrogate was too uncertain.
    screened
        Proposals that the first stage decided on.
    passed
        Of those, completed to full depth.
    abandoned
        Drafts dropped before their end as they were sure to be rejected, of whatever kind.
    accepted, changed
        Moves accepted, and of these those that changed the path.
    """

    block: int | None
    steps: int
    null: int
    plain: int
    same: int
    gated: int
    screened: int
    passed: int
    abandoned: int
    accepted: int
    changed: int

    @property
    def proposed(self) -> int:
        """Steps that proposed something."""
        return self.steps - self.null

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class CutBin:
    """What became of the moves that cut at positions first..last-1, in tokens after the prompt.

    null: cuts at or past the end of the path. screened and passed are those of `Funnel`; 0 for a plain kernel. tokens:
    drawn by all proposals together.
    """

    first: int
    last: int
    proposed: int
    null: int
    abandoned: int
    screened: int
    passed: int
    accepted: int
    changed: int
    tokens: int

    @property
    def acceptance(self) -> float:
        """The share of proposals accepted; NaN without any."""
        return self.accepted / self.proposed if self.proposed else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class FalseRejections:
    """How many proposals stage 1 rejects that a single stage would accept.

    For a move from x to y write a = min(1, a_1) for the chance to pass stage 1 and r = a_1 a_2 for the ratio of plain
    Metropolis-Hastings. With one level u for both, stage 1 rejects falsely if a_1 <= u < r, which has the probability
    F = E[(min(1, r) - a)_+]. Of a proposal that stage 1 rejects r is never known. But a_i(y, x) = 1 / a_i(x, y), so in
    equilibrium the moves that are falsely rejected are matched, one to one in probability flow, by their reverse: moves
    that stage 1 is sure to pass (a_1 > 1) and stage 2 may turn down (a_2 < 1). Hence

        F = E[(min(1, a_1 a_2) - a_2) 1{a_1 > 1, a_2 < 1}],

    an average over proposals that were completed, of which both ratios are on record: unbiased, and nothing that was
    rejected is completed for it. Delayed acceptance loses 2 F of the acceptance rate: F at stage 1, F at stage 2.

    Assumes equilibrium (steps of the last block are used, none before) and the two stages of a `Screening`; gated,
    plain, null and unchanged proposals are not counted. Scope "block" included: each chain has an equilibrium.

    Attributes
    ----------
    screened, passed
        Proposals that stage 1 decided on, and those that it passed.
    share, error
        The estimate of F, a share of `screened`, and its Monte Carlo standard error, from what chains differ in; NaN
        with a reason, and for fewer than two chains.
    accepted
        The share of `screened` that was accepted.
    reason
        Why there is no estimate; None if there is.
    """

    screened: int
    passed: int
    share: float
    error: float
    accepted: float
    reason: str | None = None

    @property
    def single_stage(self) -> float:
        """The share of the same proposals that a single stage would accept: accepted + 2 F."""
        return self.accepted + 2 * self.share

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, NaN as None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def funnel(run: Run, prompt: int | None = None) -> tuple[Funnel, ...]:
    """One `Funnel` per block, and last that of all blocks; of one prompt or of all (None)."""
    table = _Table(run, prompt)
    numbers: list[int | None] = [*range(blocks(run)), None]
    return tuple(table.funnel(block) for block in numbers)


def moves_by_cut(run: Run, prompt: int | None = None, *, bins: int = 10, last_block: bool = True) -> tuple[CutBin, ...]:
    """What became of moves by where they cut, in `bins` equal ranges of the horizon (fewer where it is shorter).

    last_block: only steps on the last block, whose paths have their full length. prompt: which; None for all.
    """
    horizon = run.settings["max_new_tokens"]
    edges = np.unique(np.linspace(0, horizon, min(bins, horizon) + 1).round().astype(int))
    table = _Table(run, prompt)
    cut = table["cut"]
    here = table.taken & (cut >= 0)
    if last_block:
        here &= table["block"] == blocks(run) - 1
    found = []
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        # A cut law may place a cut at the horizon itself, a null move: it counts for the last range.
        mine = here & (cut >= first) & ((cut < last) | (last == horizon))
        moves = mine & ~table.null
        counted = {
            "proposed": moves,
            "null": mine & table.null,
            "abandoned": mine & table["abandoned"],
            "screened": mine & table.screened,
            "passed": mine & table.passed,
            "accepted": moves & table["accepted"],
            "changed": moves & table["changed"],
        }
        tokens = int(table["proposal_length"][moves].sum())
        found.append(CutBin(first, last, **{name: int(c.sum()) for name, c in counted.items()}, tokens=tokens))
    return tuple(found)


def false_rejections(run: Run, prompt: int | None = None) -> FalseRejections | None:
    """`FalseRejections` of one prompt or of all (None); None for plain Metropolis-Hastings."""
    if run.early_exit["kernel"] != "early-exit":
        return None
    infos = run.infos if prompt is None else run.infos[prompt : prompt + 1]
    last = blocks(run) - 1
    return estimate_false_rejections([_screened(info, last) for info in infos])


def estimate_false_rejections(tables: Sequence[Mapping[str, np.ndarray]]) -> FalseRejections:
    """The estimate from infos of steps in equilibrium; chains of all tables are independent.

    tables: of shape (chain, step) each: `screened` (bool, which steps count), `stage1_accepted`, `accepted`,
    `log_stage1`, `log_surrogate`, `log_target`, as `DelayedAcceptance` declares them.
    """
    n, sums, passes, accepted = [], [], 0, 0
    for table in tables:
        passed = table["screened"] & table["stage1_accepted"]
        log_a1 = table["log_stage1"]
        with np.errstate(over="ignore", invalid="ignore"):  # where a density is 0, and in steps that do not count
            log_a2 = table["log_target"] - table["log_surrogate"]
            lost = np.exp(np.minimum(log_a1 + log_a2, 0)) - np.exp(np.minimum(log_a2, 0))
        n += table["screened"].sum(1).tolist()
        sums += np.where(passed & (log_a1 > 0) & (log_a2 < 0), lost, 0.0).sum(1).tolist()
        passes += int(passed.sum())
        accepted += int((passed & table["accepted"]).sum())
    total = sum(n)
    if not total:
        return FalseRejections(0, 0, math.nan, math.nan, math.nan, "nothing was screened on the last block")
    return FalseRejections(total, passes, *_ratio(np.array(sums), np.array(n)), accepted / total)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """sum / count over independent chains, and its standard error (linearised)."""
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return value, math.nan
    rest = sums - value * counts
    return value, float(math.sqrt(len(sums) * rest.var(ddof=1)) / counts.sum())


def _screened(info: Mapping[str, np.ndarray], block: int) -> dict[str, np.ndarray]:
    screened = (info["component"] == 0) & ~info["gated"] & ~info["null"] & ~info["same"] & (info["block"] == block)
    return {**info, "screened": screened}


class _Table:
    """Infos of all steps of a run or a prompt in one row each; what a kernel does not declare is all False."""

    def __init__(self, run: Run, prompt: int | None) -> None:
        self._infos = run.infos if prompt is None else run.infos[prompt : prompt + 1]
        self.taken = self["block"] >= 0
        self.null = self.taken & self["null"]
        early = self.taken & (self["component"] == 0) if self._has("component") else np.zeros_like(self.taken)
        self.same, self.gated = early & self["same"], early & self["gated"]
        self.screened = early & ~self.null & ~self.same & ~self.gated
        self.passed = self.screened & self["stage1_accepted"]
        self.plain = self.taken & ~early & ~self.null

    def _has(self, name: str) -> bool:
        return all(name in info for info in self._infos)

    def __getitem__(self, name: str) -> np.ndarray:
        if not self._has(name):
            return np.zeros(len(self.taken), dtype=bool)
        return np.concatenate([info[name].ravel() for info in self._infos]) if self._infos else np.zeros(0, dtype=bool)

    def funnel(self, block: int | None) -> Funnel:
        here = self.taken if block is None else self.taken & (self["block"] == block)
        count: Callable[[np.ndarray], int] = lambda which: int((here & which).sum())  # noqa: E731
        return Funnel(
            block,
            int(here.sum()),
            *map(count, (self.null, self.plain, self.same, self.gated, self.screened, self.passed)),
            *(count(self[name]) for name in ("abandoned", "accepted", "changed")),
        )
