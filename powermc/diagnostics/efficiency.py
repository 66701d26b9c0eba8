"""What an effective draw costs: seconds, tokens at full depth, floating-point operations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from powermc.diagnostics.convergence import Convergence, finite

if TYPE_CHECKING:
    from powermc.results import Run


@dataclass(frozen=True)
class Efficiency:
    """Effective draws of one functional, all prompts together, over all that the run has cost, growth included.

    Attributes
    ----------
    functional
        Which.
    ess
        Sum of bulk ESS over the prompts that have one; NaN if none has.
    prompts
        How many have one.
    per_second
        Per wall-clock second.
    per_full_token
        Per token that passed the model's last layer.
    per_flop
        Per floating-point operation, those of a surrogate that is a model of its own included.
    reasons
        Name of a figure that is NaN, or that counts less than it might, to why.
    """

    functional: str
    ess: float
    prompts: int
    per_second: float
    per_full_token: float
    per_flop: float
    reasons: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, NaN as None."""
        numbers = {n: finite(getattr(self, n)) for n in ("ess", "per_second", "per_full_token", "per_flop")}
        return {
            "functional": self.functional,
            **numbers,
            "prompts": self.prompts,
            "reasons": dict(self.reasons),
        }


def efficiency(run: Run, found: Iterable[Convergence]) -> tuple[Efficiency, ...]:
    """One row per functional. Prompts without an ESS count as 0 draws, as what they cost cannot be told apart."""
    rows: dict[str, list[Convergence]] = {}
    for row in found:
        rows.setdefault(row.functional, []).append(row)
    return tuple(_row(run, name, of) for name, of in rows.items())


def full_depth_tokens(run: Run) -> int:
    """Tokens that passed the model's last layer."""
    return sum(n for (_, last), n in run.cost.spans.items() if last == run.cost.layers)


def flops(run: Run) -> float:
    """Floating-point operations of the run, those of a surrogate that is a model of its own included."""
    surrogate = run.early_exit.get("surrogate_cost") or {}
    return run.cost.flops + float(surrogate.get("flops", 0.0))


def _row(run: Run, name: str, of: list[Convergence]) -> Efficiency:
    reasons: dict[str, str] = {}
    having = [row.ess_bulk for row in of if math.isfinite(row.ess_bulk)]
    ess = sum(having) if having else math.nan
    if not having:
        reasons["ess"] = of[0].reasons.get("ess_bulk", "no prompt has an effective sample size")
    elif len(having) < len(of):
        missing = [row for row in of if not math.isfinite(row.ess_bulk)]
        why = missing[0].reasons.get("ess_bulk", "")
        reasons["ess"] = f"a lower bound: {len(missing)} of {len(of)} prompts count as 0 ({why})"
    spent = {
        "per_second": (run.seconds, "the run took no time that could be measured"),
        "per_full_token": (full_depth_tokens(run), "no token passed the last layer"),
        "per_flop": (flops(run), "the model does not count its operations"),
    }
    rates = {figure: ess / of_it if of_it > 0 else math.nan for figure, (of_it, _) in spent.items()}
    for figure, (of_it, why) in spent.items():
        if not of_it > 0:
            reasons[figure] = why
        elif not having:
            reasons[figure] = reasons["ess"]
    return Efficiency(name, ess, len(having), **rates, reasons=reasons)
