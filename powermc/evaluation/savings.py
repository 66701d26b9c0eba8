"""How many proposed tokens were never run through the layers: known from prefix agreement, or never drawn.

Each alpha runs three times with the same seed: nothing saved; agreement (`reuse`); agreement and early rejection. Both
savings leave every state as it is, so that the counts are those of one and the same chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from powermc.power import power_sample
from powermc.results import Run
from powermc.sequences.path import Prompt

if TYPE_CHECKING:
    from powermc.lm import CausalLM


@dataclass(frozen=True)
class Saving:
    """Of one alpha. proposed: tokens of all proposals when none is abandoned, `kernel steps` of them.

    agreement: share of the proposed tokens that did not run since the proposal agreed with what had been run before.
    rejection: share that did not run since the proposal was abandoned, agreement taken already; undrawn: share not
    drawn at all. same_chain: whether all three runs visited the same paths; if not (rounding), shares are those of
    different chains.
    """

    alpha: float
    transitions: int
    proposed: int
    run: int
    agreement: float
    rejection: float
    undrawn: float
    abandoned: int
    same_chain: bool


def savings(
    fresh: Callable[[bool], CausalLM], prompts: Sequence[Prompt], alphas: Sequence[float], **settings: Any
) -> list[Saving]:
    """`fresh(reuse)` is the model with nothing run yet; `settings` go to `power_sample`."""
    found = []
    for alpha in alphas:

        def measured(reuse: bool, early: bool, alpha: float = alpha) -> Run:
            return power_sample(
                fresh(reuse), prompts, **{**settings, "alpha": alpha, "temperature": None, "early_rejection": early}
            )

        runs = [measured(False, False), measured(True, False), measured(True, True)]
        drawn = [_total(run, "proposal_length") for run in runs]
        ran = [_total(run, "tokens") for run in runs]
        found.append(
            Saving(
                alpha=alpha,
                transitions=sum(chain.steps for chains in runs[0].chains for chain in chains),
                proposed=drawn[0],
                run=ran[0],
                agreement=(ran[0] - ran[1]) / drawn[0],
                rejection=(ran[1] - ran[2]) / drawn[0],
                undrawn=(drawn[0] - drawn[2]) / drawn[0],
                abandoned=_total(runs[2], "abandoned"),
                same_chain=_draws(runs[0]) == _draws(runs[1]) == _draws(runs[2]),
            )
        )
    return found


def _total(run: Run, name: str) -> int:
    return sum(int(info[name].sum()) for info in run.infos)


def _draws(run: Run) -> list[Any]:
    return [[[path.tokens for path in draws] for draws in chains] for chains in run.draws]
