"""Early-exit power sampling: a cheap model generates and screens, the full model confirms what survives.

The surrogate is a role: an exit of the same model, a smaller model with the same tokenizer, any `Autoregressive`. What
this module does not know is which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from powermc.errors import ArgumentError
from powermc.kernels.composition import Mixture
from powermc.kernels.delayed import DelayedAcceptance, Gate
from powermc.kernels.metropolis import Metropolis
from powermc.sequences.cuts import CutLaw
from powermc.sequences.gates import Threshold, UncertainTail
from powermc.sequences.model import Autoregressive, SequenceProbability
from powermc.sequences.path import Path, Space
from powermc.sequences.substitution import Substitution
from powermc.sequences.suffix import Suffix, check_temperature
from powermc.targets import Power
from powermc.types import Kernel, Target

PROPOSALS = ("exit", "substitution", "full")
"""(a) the tail drawn by the surrogate; (b) a few tokens redrawn by it, the rest kept; (c) the tail drawn by the full
model and screened all the same, for comparison: log p is paid for by then."""


@dataclass(frozen=True)
class Screening:
    """How a surrogate p~ takes part in a kernel on p^alpha.

    With probability `plain` a step is plain Metropolis-Hastings with a tail drawn by the full model. Otherwise a move
    of kind `proposal` is screened by g = p~^exponent, and only what passes is completed:

        log a_1 = exponent [log p~(x') - log p~(x)] + log q(x | x') - log q(x' | x)
        log a_2 = [log pi(x') - log pi(x)] - exponent [log p~(x') - log p~(x)].

    With proposal "exit", temperature 1 / exponent and no cut ratio, log a_1 is the difference of the sums of log Z~. A
    surrogate can be wrong without bound, so that a chain of screened moves alone may stick: `plain` > 0 bounds that.

    Parameters
    ----------
    surrogate
        The model that screens, and generates unless `proposal` is "full".
    exponent
        Of p~ in the first stage, >= 0; any fixed one is exact.
    temperature
        Of the surrogate's proposals, > 0; None: that of the full model's.
    proposal
        One of `PROPOSALS`.
    plain
        Share of plain steps, 0..1; above 0 for "substitution", which alone never changes the length.
    eta, delta, aggregate
        Thresholds of an `UncertainTail` gate on the surrogate; no gate if both are None.
    tokens
        How many tokens "substitution" redraws.

    Raises `ArgumentError` for values out of range.
    """

    surrogate: Autoregressive
    exponent: float
    temperature: float | None = None
    proposal: str = "exit"
    plain: float = 0.1
    eta: Threshold | None = None
    delta: Threshold | None = None
    aggregate: str = "max"
    tokens: int = 4

    def __post_init__(self) -> None:
        if self.proposal not in PROPOSALS:
            raise ArgumentError(f"unknown proposal {self.proposal!r}; choose one of {', '.join(PROPOSALS)}")
        if not (math.isfinite(self.exponent) and self.exponent >= 0):
            raise ArgumentError(f"the screening exponent must be a finite number >= 0, got {self.exponent}")
        if self.temperature is not None:
            check_temperature(self.temperature)
        if not 0 <= self.plain <= 1:
            raise ArgumentError(f"the share of plain steps must be between 0 and 1, got {self.plain}")
        if self.proposal == "substitution" and self.plain == 0:
            raise ArgumentError("substitution never changes the length of a path: mix in plain steps (plain > 0)")
        if self.tokens < 1:
            raise ArgumentError(f"a substitution redraws at least 1 token, got {self.tokens}")
        self.gate()

    def gate(self) -> Gate[Path] | None:
        """The gate, or None."""
        if self.eta is None and self.delta is None:
            return None
        return UncertainTail(self.surrogate, self.eta, self.delta, self.aggregate)

    def proposals(self, model: Autoregressive, space: Space, cuts: CutLaw, temperature: float) -> dict[str, Any]:
        """Every kind of proposal by its name; `temperature` is that of the full model's."""
        own = temperature if self.temperature is None else self.temperature
        return {
            "exit": Suffix(self.surrogate, space, cuts, own),
            "substitution": Substitution(self.surrogate, space, self.tokens, own),
            "full": Suffix(model, space, cuts, temperature),
        }

    def kernel(
        self,
        model: Autoregressive,
        space: Space,
        cuts: CutLaw,
        temperature: float,
        target: Target[Path],
        tilt: Callable[[Target[Path]], Target[Path]] = lambda base: base,
        early_rejection: bool = True,
    ) -> Kernel[Path]:
        """The kernel on `target`. `tilt` is what the target adds to the power of p; the surrogate gets it too.

        `temperature` is that of the full model's proposals, `early_rejection` that of both kernels. Component 0 of the
        mixture is screened, component 1 plain.
        """
        moves = self.proposals(model, space, cuts, temperature)
        surrogate = tilt(Power(SequenceProbability(self.surrogate), self.exponent))
        screened = DelayedAcceptance([surrogate, target], moves[self.proposal], self.gate(), early_rejection)
        plain = Metropolis(target, moves["full"], early_rejection)
        return Mixture([screened, plain], [1 - self.plain, self.plain])
