"""Diagnostics of a run, with guards: a figure that would mislead is NaN, and says why.

`diagnose(run)` computes everything; the parts are there one by one. R-hat and effective sample sizes are of scalar
functionals: log p, length, whether a path finished, any function of the path or the text, the indicator of an answer.
NumPy and `scipy.special` only: ArviZ, which takes seconds to import, is not needed (`powermc.arviz_export` is for it).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from powermc.diagnostics.answers import Answers, AnswerShare, answer_shares, wilson
from powermc.diagnostics.convergence import ESS_PER_CHAIN, RHAT_LIMIT, Convergence, convergence, measure
from powermc.diagnostics.efficiency import Efficiency, efficiency, flops, full_depth_tokens
from powermc.diagnostics.guards import Guard, Kept, draw_steps, kept_draws, sentences
from powermc.diagnostics.mixing import (
    autocorrelation_time,
    ess_bulk,
    ess_mean,
    ess_tail,
    mcse_mean,
    nested_rhat,
    rhat,
)
from powermc.diagnostics.moves import (
    CutBin,
    FalseRejections,
    Funnel,
    estimate_false_rejections,
    false_rejections,
    funnel,
    moves_by_cut,
)

if TYPE_CHECKING:
    from powermc.results import Run

__all__ = [
    "ESS_PER_CHAIN",
    "RHAT_LIMIT",
    "AnswerShare",
    "Answers",
    "Convergence",
    "CutBin",
    "Diagnostics",
    "Efficiency",
    "FalseRejections",
    "Funnel",
    "Guard",
    "Kept",
    "answer_shares",
    "autocorrelation_time",
    "convergence",
    "diagnose",
    "draw_steps",
    "efficiency",
    "ess_bulk",
    "ess_mean",
    "ess_tail",
    "estimate_false_rejections",
    "false_rejections",
    "flops",
    "full_depth_tokens",
    "funnel",
    "kept_draws",
    "mcse_mean",
    "measure",
    "moves_by_cut",
    "nested_rhat",
    "rhat",
    "sentences",
    "wilson",
]


@dataclass(frozen=True)
class Diagnostics:
    """Everything that `diagnose` found.

    Attributes
    ----------
    convergence
        One row per prompt and functional, prompts in order.
    efficiency
        One row per functional.
    funnel
        One row per block, and last that of all blocks; all prompts together.
    cuts
        Moves on the last block by where they cut; all prompts together.
    false_rejections
        Of the first stage; None for plain Metropolis-Hastings.
    answers
        One row per prompt, if an `answer` was given.
    guards
        Everything that was noticed, chains left out first.
    """

    convergence: tuple[Convergence, ...]
    efficiency: tuple[Efficiency, ...]
    funnel: tuple[Funnel, ...]
    cuts: tuple[CutBin, ...]
    false_rejections: FalseRejections | None
    answers: tuple[Answers, ...]
    guards: tuple[Guard, ...]

    @property
    def warnings(self) -> list[str]:
        """One plain sentence per kind of trouble, and what to do about it."""
        return sentences(self.guards)

    def of(self, functional: str, prompt: int = 0) -> Convergence:
        """The row of one functional and prompt. Raises `KeyError` if there is none."""
        for row in self.convergence:
            if (row.functional, row.prompt) == (functional, prompt):
                return row
        raise KeyError((functional, prompt))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN and infinities are None, with a reason beside them."""
        rows = ("convergence", "efficiency", "funnel", "cuts", "answers", "guards")
        false = self.false_rejections
        return {
            **{name: [row.to_dict() for row in getattr(self, name)] for name in rows},
            "false_rejections": None if false is None else false.to_dict(),
            "warnings": self.warnings,
        }


def diagnose(
    run: Run,
    *,
    of_path: Mapping[str, Callable[[Any], Any]] | None = None,
    of_text: Mapping[str, Callable[[str], Any]] | None = None,
    answer: Callable[[str], Hashable | None] | None = None,
    over: str = "draws",
    superchains: Sequence[Any] | None = None,
    prompts: Sequence[int] | None = None,
    bins: int = 10,
) -> Diagnostics:
    """All diagnostics of a run.

    Parameters
    ----------
    of_path, of_text
        Name to a scalar function of the path, or of its text; beside log_p, length and finished.
    answer, over
        The answer of a text (None for none) and what it is counted over: see `answer_shares`.
    superchains
        superchains[chain], for nested R-hat: chains of one superchain started at one path. None: none is computed.
    prompts
        For which prompts R-hat, ESS and answers are computed; None for all.
    bins
        Ranges of cut positions.

    Raises `ArgumentError` for a functional that gives no number, for names that occur twice, and where a text is needed
    of a model without a tokenizer. Whatever a function given raises is passed on.
    """
    found, guards = convergence(run, of_path=of_path, of_text=of_text, prompts=prompts, superchains=superchains)
    return Diagnostics(
        convergence=found,
        efficiency=efficiency(run, found),
        funnel=funnel(run),
        cuts=moves_by_cut(run, bins=bins),
        false_rejections=false_rejections(run),
        answers=() if answer is None else answer_shares(run, answer, prompts=prompts, over=over),
        guards=guards,
    )
