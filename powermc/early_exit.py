"""Early-exit power sampling as `power_sample` sets it up: the surrogate found, the warm-up run, the kernel frozen.

Whatever is fitted or chosen here is fixed before the first step that counts, and is written into the result.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc.errors import ArgumentError
from powermc.sequences.cuts import Length
from powermc.sequences.path import Prompt, Space
from powermc.sequences.screening import Screening
from powermc.sequences.suffix import default_temperature
from powermc.settings import Settings
from powermc.stages import Stages, count_stages
from powermc.tuning import Pair, fit_eta, fit_exponent, grown, pairs, surrogate_ledger, surrogate_name

if TYPE_CHECKING:
    from powermc.lm import Ledger, Lens
    from powermc.progress import Parts

DRIFTED = 2.0
"""A run warns when KL(p || p~) on completed tails is over this many times the lens's held-out figure."""

_log = logging.getLogger(__name__)

_FROZEN = ("proposal", "exponent", "temperature", "plain", "eta", "delta", "aggregate", "tokens")
"""What a `Screening` is made of, beside the surrogate."""

_PILOT_PROMPTS, _PILOT_CHAINS, _PILOT_STEPS = 4, 2, 8
_FIT_PROMPTS, _FIT_EACH = 8, 4
_DRIFT_POSITIONS = 64


@dataclass
class Prepared:
    """A frozen kernel and what is known of it.

    screening: None for plain Metropolis-Hastings. facts: JSON-able, for the result. drift: the running KL, where the
    surrogate is an exit of the model. reference: held-out KL(p || p~), nats; NaN if unknown. ledger: that of a
    surrogate that is a model of its own; what an exit runs is counted by the model's.
    """

    screening: Screening | None
    facts: dict[str, Any] = field(default_factory=dict)
    drift: Any = None
    reference: float = math.nan
    ledger: Ledger | None = None
    _warned: bool = False
    _before: Ledger | None = None

    def __post_init__(self) -> None:
        self._before = None if self.ledger is None else self.ledger.copy()

    @property
    def spent(self) -> Ledger | None:
        """What a surrogate that is a model of its own has run since; None where there is none."""
        return None if self.ledger is None or self._before is None else self.ledger.since(self._before)

    @contextmanager
    def running(self, model: Any) -> Iterator[None]:
        """For the time of the run: the drift is watched, and guesses are made if the pilot found that they pay."""
        with ExitStack() as stack:
            if self.drift is not None:
                stack.enter_context(self.drift.watching())
            if tokens := self.facts.get("speculate", 0):
                stack.enter_context(model.engine.guessing(tokens))
            yield

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
            stacklevel=4,
        )

    def result(
        self, model: Any, infos: Sequence[Mapping[str, np.ndarray]], prompts: Sequence[Prompt], cost: Ledger
    ) -> dict[str, Any]:
        """The facts, with what the stages did and what they cost."""
        if self.screening is None:
            return self.facts
        stages = count_stages(infos)
        facts = {**self.facts, "advice": stages.advice()}
        if self.spent is not None:
            facts["surrogate_cost"] = self.spent.as_dict()
        if self.drift is not None:
            facts |= {"kl": self.drift.kl, "kl_positions": self.drift.seen, "kl_held_out": self.reference}
            if self.screening.proposal != "full":  # which drafts nothing at the exit
                facts["cost"] = screened_cost(model, self.screening, stages, infos, prompts, cost)
        return facts


def prepare(
    model: Any, settings: Settings, prompts: Sequence[Prompt], space: Space, *, progress: bool = False
) -> Prepared:
    """Find the surrogate, run the warm-up that the settings ask for, and freeze the kernel.

    `progress` shows on standard error what is being done. Raises `ArgumentError` and `ModelError` for a lens that does
    not fit the model or a surrogate with another vocabulary.
    """
    if settings.kernel == "metropolis":
        return Prepared(None, {"kernel": "metropolis"})
    before = model.ledger.copy()
    with _display(model, progress) as display:
        lens, surrogates = _surrogates(model, settings, display)
        if settings.kernel == "auto":
            prepared = _chosen(model, settings, prompts, lens, surrogates, display)
        else:
            prepared = _asked_for(model, settings, prompts, space, lens, surrogates[-1], display)
    prepared.facts["warmup_cost"] = model.ledger.since(before).as_dict()
    said = {name: prepared.facts.get(name) for name in ("kernel", "surrogate", *_FROZEN)}
    _log.info("warm-up done: %s", ", ".join(f"{name} {value}" for name, value in said.items() if value is not None))
    return prepared


def restored(
    model: Any, settings: Settings, facts: Mapping[str, Any], identity: str | None, *, progress: bool = False
) -> Prepared:
    """What `prepare` froze, from its facts: nothing is fitted again, but for a lens that has gone from the cache.

    `identity` is that of the surrogate then (`surrogate_identity`); `progress` as in `prepare`. Raises `ArgumentError`
    for another surrogate.
    """
    facts = dict(facts)
    if facts["kernel"] == "metropolis":
        return Prepared(None, facts)
    with _display(model, progress) as display:
        lens, surrogates = _surrogates(model, settings, display)
    surrogate = next((s for s in surrogates if getattr(s, "layer", None) == facts["layer"]), None)
    if surrogate is None or surrogate_identity(surrogate) != identity:
        found = "no exit there" if surrogate is None else f"{surrogate_name(surrogate)}, fitted or trained otherwise"
        raise ArgumentError(
            f"the run was screened by {facts['surrogate']}, and the exit given now is {found}; "
            "give the one of the run: exit=... or --exit"
        )
    own = {name: facts[name] for name in _FROZEN}
    exponent = own.pop("exponent")
    return _prepared(model, Screening(surrogate, exponent, **own), lens, facts)


def surrogate_identity(surrogate: Any) -> str:
    """A hash of what an exit adds to its model, or of a model's weights; a name where there is neither."""
    head = getattr(surrogate, "head", None)
    if getattr(surrogate, "layer", None) is not None and head is not None:
        hashed = hashlib.blake2b(repr((head.layer, head.kind, head.temperature)).encode(), digest_size=16)
        for tensor in (head.weight, head.bias):
            hashed.update(b"-" if tensor is None else tensor.detach().cpu().double().numpy().tobytes())
        return hashed.hexdigest()
    if hasattr(getattr(surrogate, "decoder", None), "model"):
        from powermc.lm.lens import fingerprint

        return fingerprint(surrogate)
    return f"name {surrogate_name(surrogate)}"


def _display(model: Any, progress: bool) -> Parts:
    """Where a warm-up says what it does; what is not shown is logged all the same."""
    from powermc.progress import Parts

    ledger = model.ledger
    return Parts(tokens=(lambda: ledger.decoded + ledger.prefilled) if progress else None, quiet=not progress)


def _asked_for(
    model: Any,
    settings: Settings,
    prompts: Sequence[Prompt],
    space: Space,
    lens: Any,
    surrogate: Any,
    display: Parts,
) -> Prepared:
    screening = settings.screening(surrogate, settings.alpha)  # what cannot be used is refused before any work
    fitted: list[str] = []
    if settings.proposal != "exit" and settings.screen is None:
        fitted.append("exponent")
    if settings.gated is not None:
        fitted.append("eta")
    if fitted:
        display.begin(f"fitting {' and '.join(fitted)} of the screen")
        found = _warm_up(model, screening, settings, prompts, space)
        if "exponent" in fitted:
            screening = replace(screening, exponent=fit_exponent(found, settings.alpha))
        if settings.gated is not None:
            screening = replace(screening, eta=fit_eta(found, settings.gated))
    if settings.proposal == "full":
        warnings.warn(
            "proposal 'full' draws at full depth before it screens: log p is paid for already, so nothing is saved; "
            "it is there for comparison",
            UserWarning,
            stacklevel=5,
        )
    return _prepared(model, screening, lens, {"kernel": "early-exit", "fitted": fitted})


def _surrogates(model: Any, settings: Settings, display: Parts) -> tuple[Lens | None, list[Any]]:
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
        given = cached_lens(model, layers, progress=display.report)
    elif isinstance(given, str | os.PathLike):
        given = Lens.load(given)
    elif not isinstance(given, Lens):
        raise ArgumentError(f"exit must be a lens, its file or a surrogate model, got {type(given).__name__}")
    if layers is None:
        layers = given.layers if settings.kernel == "auto" else given.layers[-1:]
    return given, [given.exit(model, layer) for layer in layers]


def _chosen(
    model: Any,
    settings: Settings,
    prompts: Sequence[Prompt],
    lens: Any,
    surrogates: list[Any],
    display: Parts,
) -> Prepared:
    from powermc.evaluation.pilot import pilot

    display.begin("pilot: paths to start from")
    display.steps = len(prompts[:_PILOT_PROMPTS]) * _PILOT_CHAINS * _PILOT_STEPS
    found = pilot(
        model,
        surrogates,
        prompts[:_PILOT_PROMPTS],
        alpha=settings.alpha,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        steps=_PILOT_STEPS,
        chains=_PILOT_CHAINS,
        plain=settings.plain,
        proposals=("exit", "substitution") if settings.plain else ("exit",),
        kl=_held_out(lens),
        early_rejection=settings.early_rejection,
        seed=settings.seed,
        notify=lambda name: display.begin(f"pilot: {name}"),
        watch=display.step,
    )
    facts = {"pilot": found.to_dict(), "verdict": found.verdict()}
    best = found.best
    if best.proposal is None:
        return Prepared(None, {"kernel": "metropolis", **facts, **_guesses(model, settings, prompts, display)})
    surrogate = next(s for s in surrogates if surrogate_name(s) == best.surrogate)
    screening = Screening(
        surrogate, best.exponent, temperature=best.temperature, proposal=best.proposal, plain=settings.plain
    )
    facts = {"kernel": "early-exit", "fitted": [] if best.proposal == "exit" else ["exponent"], **facts}
    return _prepared(model, screening, lens, facts)


def _guesses(model: Any, settings: Settings, prompts: Sequence[Prompt], display: Parts) -> dict[str, Any]:
    """How many tokens few rows guess, by measurement; nothing where there is no room for guesses or they were set."""
    from powermc.evaluation.guessing import MOST_ROWS, guessing

    engine = getattr(model, "engine", None)
    if engine is None or engine.guesser is not None or not engine.reuse or settings.chains * len(prompts) > MOST_ROWS:
        return {}
    display.begin("timing guesses")
    found = guessing(
        model,
        prompts,
        alpha=settings.alpha,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        chains=settings.chains,
        seed=settings.seed,
    )
    return {"speculate": found.best, "guesses": found.verdict()}


def _prepared(model: Any, screening: Screening, lens: Any, facts: dict[str, Any]) -> Prepared:
    surrogate: Any = screening.surrogate
    layer, ledger = getattr(surrogate, "layer", None), surrogate_ledger(model, surrogate)
    drift, reference = None, math.nan
    if layer is not None and ledger is None:
        from powermc.lm.drift import Drift

        drift, reference = Drift(surrogate), _held_out(lens)(layer)
    own = {name: getattr(screening, name) for name in _FROZEN}
    facts = {**facts, "surrogate": surrogate_name(surrogate), "layer": layer, **own}
    return Prepared(screening, facts, drift, reference, ledger)


def _held_out(lens: Any) -> Any:
    rows = {} if lens is None else {row.layer: row.kl for row in lens.report}
    return lambda layer: rows.get(layer, math.nan)


def _warm_up(
    model: Any, screening: Screening, settings: Settings, prompts: Sequence[Prompt], space: Space
) -> list[Pair]:
    """Proposals from paths drawn for some of the prompts, as both models see them."""
    heat = default_temperature(settings.alpha) if settings.temperature is None else settings.temperature
    starts = grown(model, space, prompts[:_FIT_PROMPTS], temperature=heat, chains=1, seed=settings.seed)
    proposal = screening.proposals(model, space, Length(), heat)[screening.proposal]
    return pairs(model, screening.surrogate, proposal, starts, each=_FIT_EACH, seed=settings.seed)


def screened_cost(
    model: Any,
    screening: Screening,
    stages: Stages,
    infos: Sequence[Mapping[str, np.ndarray]],
    prompts: Sequence[Prompt],
    spent: Ledger,
) -> dict[str, float]:
    """FLOPs per screened proposal: the cost model (1 - rho) C_mid + rho (C_mid + C_tail), and what was counted.

    C_mid: evaluating a tail of the mean length at the exit, drawn there but for what a substitution keeps; C_tail:
    completing it; both at the mean context. Counted: all that ran below the exit or from it on, the exit's heads, and
    the full head on completed tails. The two differ as the first token of a tail is read off a known state, as tails
    that pass are of another mean length and may begin as the current one does, as paths are scored by the exit before
    they are moved from, and by the heads that watch the drift. rho: the share of proposals that were
    completed. Not for proposals drawn at full depth. NaN where nothing was screened.
    """
    proposals = stages.screened + stages.gated + stages.same
    if not proposals:
        return dict.fromkeys(("rho", "c_mid", "c_tail", "model", "counted", "full_depth"), math.nan)
    exit: Any = screening.surrogate
    cost, depth, layers = model.engine.cost, exit.depth, model.depth
    moves = [(info["component"] == 0) & ~info["null"] for info in infos]
    column = {
        name: np.concatenate([info[name][at] for info, at in zip(infos, moves, strict=True)])
        for name in ("cut", "length", "proposal_length")
    }
    tails = column["proposal_length"]
    if screening.proposal == "substitution":  # keeps the length, and what it keeps is evaluated anew
        tails = column["length"] - column["cut"]
    n = float(tails.mean())
    context = float(np.mean([len(p.ids) for p in prompts])) + float(column["cut"].mean()) + n / 2
    head = exit.head.flops(cost)
    c_mid = n * (cost.span(0, depth, context) + head)
    c_tail = n * (cost.span(depth, layers, context) + cost.head)
    rho = (stages.passed + stages.gated) / proposals
    counted = sum(f for (first, last), f in spent.span_flops.items() if last <= depth or first >= depth)
    # A tail is read from the state before it on, and that one is known: one more position is read than was run.
    completed = sum(n for (first, _), n in spent.spans.items() if first >= depth) + stages.passed + stages.gated
    counted += spent.head_flops[depth] + completed * cost.head
    return {
        "rho": rho,
        "c_mid": c_mid,
        "c_tail": c_tail,
        "model": (1 - rho) * c_mid + rho * (c_mid + c_tail),
        "counted": counted / proposals,
        "full_depth": n * (cost.span(0, layers, context) + cost.head),
    }
