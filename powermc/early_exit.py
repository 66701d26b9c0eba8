"""Early-exit power sampling as `power_sample` sets it up: the surrogate found, the warm-up run, the kernel frozen.

Whatever is fitted or chosen here is fixed before the first step that counts, and is written into the result.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc.errors import ArgumentError
from powermc.sequences.cuts import Length
from powermc.sequences.path import Prompt, Space
from powermc.sequences.screening import Screening
from powermc.sequences.suffix import default_temperature
from powermc.settings import Settings
from powermc.stages import Stages, count_stages
from powermc.tuning import fit_exponent, grown, pairs, surrogate_name

if TYPE_CHECKING:
    from powermc.lm import EarlyExit, Ledger, Lens

DRIFTED = 2.0
"""A run warns when KL(p || p~) on completed tails is over this many times the lens's held-out figure."""

_PILOT_PROMPTS, _PILOT_STEPS = 4, 8
_FIT_PROMPTS, _FIT_EACH = 8, 4
_DRIFT_POSITIONS = 64


@dataclass
class Prepared:
    """A frozen kernel and what is known of it.

    screening: None for plain Metropolis-Hastings. facts: JSON-able, for the result. drift: the running KL, where the
    surrogate is an exit of the model. reference: held-out KL(p || p~), nats; NaN if unknown.
    """

    screening: Screening | None
    facts: dict[str, Any] = field(default_factory=dict)
    drift: Any = None
    reference: float = math.nan
    _warned: bool = False
    _before: Ledger | None = None

    def __post_init__(self) -> None:
        ledger = self._own_ledger()
        self._before = None if ledger is None else ledger.copy()

    def _own_ledger(self) -> Ledger | None:
        """That of a surrogate which is a model of its own; exits are counted by the full model's."""
        surrogate: Any = None if self.screening is None else self.screening.surrogate
        return None if hasattr(surrogate, "layer") else getattr(surrogate, "ledger", None)

    def check_drift(self) -> None:
        """Warn, once, if the surrogate has drifted from the model."""
        drift = self.drift
        if self._warned or drift is None or drift.seen < _DRIFT_POSITIONS or not drift.kl > DRIFTED * self.reference:
            return
        self._warned = True
        layer, name = drift.exit.layer, drift.exit.model.name
        warnings.warn(
            f"KL(p || p~) at layer {layer} is {drift.kl:.2f} nats on completed tails, {self.reference:.2f} on the text "
            "the lens was reported on: the chain is still exact but its screen is worse than calibrated; refit on text "
            f"like this: powermc calibrate --model {name} --data TEXTS --layers {layer} --out LENS",
            RuntimeWarning,
            stacklevel=6,
        )

    def result(
        self, model: Any, infos: Sequence[Mapping[str, np.ndarray]], prompts: Sequence[Prompt], cost: Ledger
    ) -> dict[str, Any]:
        """The facts, with what the stages did and what they cost."""
        if self.screening is None:
            return self.facts
        stages = count_stages(infos)
        facts = {**self.facts, "advice": stages.advice()}
        ledger = self._own_ledger()
        if ledger is not None and self._before is not None:
            facts["surrogate_cost"] = ledger.since(self._before).as_dict()
        if self.drift is not None:
            facts |= {"kl": self.drift.kl, "kl_positions": self.drift.seen, "kl_held_out": self.reference}
            facts["cost"] = screened_cost(model, self.drift.exit, stages, infos, prompts, cost)
        return facts


def prepare(model: Any, settings: Settings, prompts: Sequence[Prompt], space: Space) -> Prepared:
    """Find the surrogate, run the warm-up that the settings ask for, and freeze the kernel.

    Raises `ArgumentError` and `ModelError` for a lens that does not fit the model or a surrogate with another
    vocabulary.
    """
    if settings.kernel == "metropolis":
        return Prepared(None, {"kernel": "metropolis"})
    lens, surrogates = _surrogates(model, settings)
    if settings.kernel == "auto":
        return _chosen(model, settings, prompts, lens, surrogates)
    surrogate = surrogates[-1]
    exponent, fitted = settings.alpha, False
    if settings.proposal != "exit" and settings.screen is None:
        exponent, fitted = _fitted(model, surrogate, settings, prompts, space), True
    if settings.proposal == "full":
        warnings.warn(
            "proposal 'full' draws at full depth before it screens: log p is paid for already, so nothing is saved; "
            "it is there for comparison",
            UserWarning,
            stacklevel=4,
        )
    return _prepared(settings.screening(surrogate, exponent), lens, {"kernel": "early-exit", "exponent_fitted": fitted})


def _surrogates(model: Any, settings: Settings) -> tuple[Lens | None, list[Any]]:
    """The lens, if there is one, and the surrogates to choose from, shallow ones first."""
    given = settings.exit
    if hasattr(given, "branch"):
        if settings.layer is not None:
            raise ArgumentError("layer has no effect with a model as the exit; leave it out")
        if given.vocab_size != model.vocab_size:
            raise ArgumentError(
                f"the surrogate has a vocabulary of {given.vocab_size} tokens, the model one of {model.vocab_size}: "
                "use one with the same tokenizer"
            )
        return None, [given]
    from powermc.lm import CausalLM, Lens, cached_lens

    if not isinstance(model, CausalLM):
        raise ArgumentError(f"early exits need a CausalLM, got {type(model).__name__}; give a surrogate model as exit")
    layers = None if settings.layer is None else [settings.layer]
    if given is None:
        given = cached_lens(model, layers)
    elif isinstance(given, str | os.PathLike):
        given = Lens.load(given)
    elif not isinstance(given, Lens):
        raise ArgumentError(f"exit must be a lens, its file or a surrogate model, got {type(given).__name__}")
    return given, [given.exit(model, layer) for layer in layers or given.layers]


def _chosen(model: Any, settings: Settings, prompts: Sequence[Prompt], lens: Any, surrogates: list[Any]) -> Prepared:
    from powermc.evaluation.pilot import pilot

    found = pilot(
        model,
        surrogates,
        prompts[:_PILOT_PROMPTS],
        alpha=settings.alpha,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        steps=_PILOT_STEPS,
        plain=settings.plain,
        proposals=("exit", "substitution"),
        kl=_held_out(lens),
        seed=settings.seed,
    )
    facts = {"pilot": found.to_dict(), "verdict": found.verdict()}
    best = found.best
    if best.proposal is None:
        return Prepared(None, {"kernel": "metropolis", **facts})
    surrogate = next(s for s in surrogates if surrogate_name(s) == best.surrogate)
    screening = Screening(surrogate, best.exponent, proposal=best.proposal, plain=settings.plain)
    return _prepared(screening, lens, {"kernel": "early-exit", "exponent_fitted": best.proposal != "exit", **facts})


def _prepared(screening: Screening, lens: Any, facts: dict[str, Any]) -> Prepared:
    surrogate: Any = screening.surrogate
    layer = getattr(surrogate, "layer", None)
    drift, reference = None, math.nan
    if layer is not None:
        from powermc.lm.drift import Drift

        drift, reference = Drift(surrogate), _held_out(lens)(layer)
    own = {
        name: getattr(screening, name)
        for name in ("proposal", "exponent", "temperature", "plain", "eta", "delta", "aggregate", "tokens")
    }
    return Prepared(
        screening, {**facts, "surrogate": surrogate_name(surrogate), "layer": layer, **own}, drift, reference
    )


def _held_out(lens: Any) -> Any:
    rows = {} if lens is None else {row.layer: row.kl for row in lens.report}
    return lambda layer: rows.get(layer, math.nan)


def _fitted(model: Any, surrogate: Any, settings: Settings, prompts: Sequence[Prompt], space: Space) -> float:
    """The screening exponent, fitted on proposals from paths drawn for some of the prompts."""
    heat = default_temperature(settings.alpha) if settings.temperature is None else settings.temperature
    starts = grown(model, space, prompts[:_FIT_PROMPTS], temperature=heat, chains=1, seed=settings.seed)
    proposal = settings.screening(surrogate, 1.0).proposals(model, space, Length(), heat)[settings.proposal]
    found = pairs(model, surrogate, proposal, starts, each=_FIT_EACH, seed=settings.seed)
    return fit_exponent(found, settings.alpha)


def screened_cost(
    model: Any,
    exit: EarlyExit,
    stages: Stages,
    infos: Sequence[Mapping[str, np.ndarray]],
    prompts: Sequence[Prompt],
    spent: Ledger,
) -> dict[str, float]:
    """FLOPs per screened proposal: the cost model (1 - rho) C_mid + rho (C_mid + C_tail), and what was counted.

    C_mid: drafting a tail of the mean length at the exit; C_tail: completing it; both at the mean context. Counted: all
    that ran below the exit or from it on, the exit's heads, and the full head on completed tails. NaN where nothing
    was screened.
    """
    proposals = stages.screened + stages.gated
    if not proposals:
        return dict.fromkeys(("rho", "c_mid", "c_tail", "model", "counted", "full_depth"), math.nan)
    cost, depth, layers = model.engine.cost, exit.depth, model.depth
    n = stages.proposed_tokens / proposals
    cuts = np.concatenate([info["cut"][(info["component"] == 0) & ~info["null"]].ravel() for info in infos])
    context = float(np.mean([len(p.ids) for p in prompts])) + float(cuts.mean()) + n / 2
    head = exit.head.flops(cost)
    c_mid = n * (cost.span(0, depth, context) + head)
    c_tail = n * (cost.span(depth, layers, context) + cost.head)
    rho = (stages.passed + stages.gated) / proposals
    counted = spent.span_flops[0, depth] + spent.span_flops[depth, layers] + spent.head_flops[depth]
    counted += stages.completed_tokens * cost.head
    return {
        "rho": rho,
        "c_mid": c_mid,
        "c_tail": c_tail,
        "model": (1 - rho) * c_mid + rho * (c_mid + c_tail),
        "counted": counted / proposals,
        "full_depth": n * (cost.span(0, layers, context) + cost.head),
    }
