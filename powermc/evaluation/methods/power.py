"""powermc's own sampler, `power_sample`, as a method: blockwise Metropolis-Hastings on p(x)^alpha."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from powermc.evaluation.methods.base import Answers, Method, Question, Terms, register
from powermc.evaluation.methods.call import Call, Key
from powermc.evaluation.methods.checks import check_counts
from powermc.power import power_sample
from powermc.results import Run
from powermc.sequences.path import Path
from powermc.settings import Settings


@register
@dataclass(frozen=True)
class Power(Method):
    """`power_sample` with kernel "metropolis"; the answer is the last draw of a chain, a sample's number its chain's.

    Options are those of `power_sample`: temperature (of the proposals; none: min(1, 1/alpha)), block_size, steps (per
    block), draws (on the last block; none: steps), scope, cut, early_rejection. speculate: how many tokens a row that
    decodes alone guesses from earlier text, >= 0 (`powermc.lm.guesses`); it changes no draw.
    """

    name: ClassVar[str] = "power"
    about: ClassVar[str] = "p(x)^alpha of whole answers by blockwise Metropolis-Hastings, every step exact"

    temperature: float | None = None
    block_size: int = 32
    steps: int = 10
    draws: int | None = None
    scope: str | None = None
    cut: str = "length"
    early_rejection: bool = True
    speculate: int = 0

    def __post_init__(self) -> None:
        check_counts(self, speculate=0)
        Settings(**self._settings())

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.options().items() if name != "speculate"}

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        call = Call(model, questions, terms, samples)
        with model.engine.guessing(self.speculate) if self.speculate else nullcontext():
            found, counts = chains(call, kernel="metropolis", **self._settings())
        return call.answers(found, call.first, counts)


def chains(call: Call, **settings: Any) -> tuple[dict[Key, Path], dict[str, float]]:
    """The last draw of the chain of every prompt and sample, and what the chains did."""
    counts: dict[str, float] = {"drawn": 0}
    found: dict[Key, Path] = {}
    for block in _stretches(call.samples) if call.prompts else ():
        run = _run(call, block, settings)
        for p, paths in enumerate(run.paths):
            for sample, path in zip(block, paths, strict=True):
                assert path is not None, "a chain without an error has a path"
                found[Key(p, sample)] = path
        for name, count in counted(run).items():
            counts[name] = counts.get(name, 0) + count
    return found, counts


def _stretches(samples: range) -> list[range]:
    """The same numbers as ranges of step 1, which is how chains are numbered."""
    return [samples] * bool(samples) if samples.step == 1 else [range(s, s + 1) for s in samples]


def _run(call: Call, samples: range, settings: dict[str, Any]) -> Run:
    terms = call.terms
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"prompt \d+, chain \d+ stopped")  # the error itself is raised
        run = power_sample(
            call.model,
            call.prompts,
            alpha=terms.alpha,
            max_new_tokens=terms.max_new_tokens,
            stop=terms.stop,
            seed=terms.seed,
            chains=len(samples),
            first_chain=samples.start,
            **settings,
        )
    if run.interrupted:
        raise KeyboardInterrupt
    for error in run.errors.values():
        raise error
    return run


def counted(run: Run) -> dict[str, float]:
    """What the chains of a run did, as `COUNTS`."""
    cells = [chain for row in run.chains for chain in row]
    counts: dict[str, float] = {
        "drawn": sum(c.grown for c in cells) + sum(int(info["proposal_length"].sum()) for info in run.infos),
        "steps": sum(c.steps for c in cells),
        "accepted": sum(int(info["accepted"].sum()) for info in run.infos),
        "changed": sum(int(info["changed"].sum()) for info in run.infos),
    }
    if (stages := run.stages) is not None:
        counts["screened"], counts["passed"] = stages.screened, stages.passed
        counts["completed"] = stages.passed + stages.gated
    if measured := run.early_exit.get("kl_positions", 0):
        from powermc.lm.drift import WINDOW

        counts["kl_tokens"] = min(measured, WINDOW)  # the mean is over the latest ones
        counts["kl"] = run.early_exit["kl"] * counts["kl_tokens"]
    return counts
