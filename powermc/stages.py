"""What the stages of delayed acceptance did: counted from the infos of a run or a pilot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

USELESS = 0.05
"""A first stage that turns down less than this share, or lets less than this share through, is reported."""


@dataclass(frozen=True)
class Stages:
    """Counts over the steps of a `Mixture` of a screened kernel (component 0) and a plain one (component 1).

    Attributes
    ----------
    steps
        All steps.
    screened
        Steps of the screened kernel that proposed something and were not gated: those the first stage decided on.
    passed
        Of these, how many passed the first stage, and were completed to full depth.
    accepted
        Of those, how many were accepted.
    same
        Steps of the screened kernel that proposed the current path: accepted as it is, nothing evaluated.
    gated
        Steps decided by the single-stage ratio as either tail was uncertain.
    null
        Steps of the screened kernel that could propose nothing.
    plain
        Steps of the plain kernel.
    changed
        Accepted moves of either kernel that changed the path.
    proposed_tokens
        Tokens drawn by the screened kernel, gated or not.
    completed_tokens
        Of these, tokens of proposals that reached the full depth.
    """

    steps: int
    screened: int
    passed: int
    accepted: int
    same: int
    gated: int
    null: int
    plain: int
    changed: int
    proposed_tokens: int
    completed_tokens: int

    @property
    def pass_rate(self) -> float:
        """rho: the share of screened proposals that reach the second stage."""
        return _share(self.passed, self.screened)

    @property
    def stage2_rate(self) -> float:
        """The share of those that are accepted."""
        return _share(self.accepted, self.passed)

    @property
    def gated_share(self) -> float:
        """Of the screened kernel's proposals, those that were gated."""
        return _share(self.gated, self.screened + self.gated)

    @property
    def saved(self) -> int:
        """Proposals never completed to full depth."""
        return self.screened - self.passed

    def advice(self) -> str | None:
        """What to say of a first stage that decides nearly nothing, or nearly everything; None of any other."""
        if not self.screened:
            return None
        counts = f"{self.screened - self.passed} of {self.screened} proposals, so {self.saved} completions were saved"
        if self.pass_rate > 1 - USELESS:
            return f"the first stage screens nothing: it turned down {counts}; plain Metropolis-Hastings may be cheaper"
        if self.pass_rate < USELESS:
            return f"the first stage lets nearly nothing through: it turned down {counts}; a later exit may move more"
        return None


def count_stages(infos: Sequence[Mapping[str, np.ndarray]]) -> Stages:
    """Count over any number of tables of infos. Entries of steps that were not taken (`component` -1) do not count."""

    def column(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(info[name]).ravel() for info in infos]) if infos else np.zeros(0)

    component, gated, null = column("component"), column("gated").astype(bool), column("null").astype(bool)
    same = column("same").astype(bool)
    early, plain = component == 0, component == 1
    screened = early & ~gated & ~null & ~same
    passed = screened & column("stage1_accepted").astype(bool)
    accepted, lengths = column("accepted").astype(bool), column("proposal_length")
    return Stages(
        steps=int((early | plain).sum()),
        screened=int(screened.sum()),
        passed=int(passed.sum()),
        accepted=int((passed & accepted).sum()),
        same=int((early & same).sum()),
        gated=int((early & gated).sum()),
        null=int((early & null).sum()),
        plain=int(plain.sum()),
        changed=int(((early | plain) & column("changed").astype(bool)).sum()),
        proposed_tokens=int(lengths[early].sum()),
        completed_tokens=int(lengths[passed | (early & gated)].sum()),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
