"""What a draft's log ratio can be at most while the draft is being written (design section 4, item 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from powermc.sequences.cuts import CutLaw, log_most
from powermc.sequences.model import Token
from powermc.types import Level

_MARGIN = 1e-9
"""Nats, and relative to the terms of the floor. The bound and the ratio add the same numbers in another order: this is
far above what rounding makes of that, and a bound that is too high only costs a token now and then."""


class Ceiling:
    """An upper bound of log r for a draft x' cut at m, as its tokens t = m, m + 1, ... come in:

        log r <= sum of `terms` + sum_t [(a - e) log p_t + log Z_t] + sup log C(m | .),

    the supremum being over all paths that begin with these tokens and go on.

    Parameters
    ----------
    level
        The u that log r will be compared with.
    terms
        Nats, finite: a log p(x_<m), the supremum of log g(x') - a log p(x'), and less log g(x) - log q(x_>=m)
        + log C(m | x), the weight of the current path x.
    excess
        a - e, >= 0.
    cuts, cut
        C and m.
    entropy
        Of x_<m by the model that weighs cuts if that is the one that draws, else None; the tokens drawn are added.

    Attributes
    ----------
    bound
        As of the last token, nats; before the first one nothing is known (inf).
    """

    def __init__(
        self,
        level: Level,
        terms: Sequence[float],
        excess: float,
        cuts: CutLaw,
        cut: int,
        entropy: list[float] | None,
    ) -> None:
        self.level, self.excess, self.bound = level, excess, math.inf
        self.total = sum(terms) + _MARGIN * (1 + sum(map(abs, terms)))
        self.cuts, self.cut, self.length, self.entropy = cuts, cut, cut, entropy

    def rejects(self, token: Token) -> bool:
        """Whether the level rejects the draft whatever follows this token, where another must follow."""
        self.total += self.excess * token.log_p + token.log_z[0]
        self.length += 1
        if self.entropy is not None:
            self.entropy.append(token.entropy)
        self.bound = self.total + log_most(self.cuts, self.cut, self.length, self.entropy)
        return not self.level.below(self.bound)
