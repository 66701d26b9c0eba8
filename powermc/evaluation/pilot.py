"""Which early exit pays on this model, if any: short chains of every choice from the same starts, side by side.

For each prompt, whole paths are drawn from the model at the proposals' temperature. From these, every choice (plain
Metropolis-Hastings; every exit layer with every proposal) runs the same number of steps under the same seed. Tokens,
heads, FLOPs and seconds are those of the steps alone. What a pilot does not measure: mixing over runs much longer than
its own; effective sample sizes of so few draws are rough, and are shown for orders of magnitude.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc.choices import Stream
from powermc.diagnostics import mixing
from powermc.errors import ArgumentError
from powermc.kernels import Metropolis
from powermc.results import jsonable
from powermc.sampling import Records, check_count
from powermc.scheduling import Event, Failed, drive
from powermc.sequences import (
    Autoregressive,
    Length,
    Path,
    Prompt,
    Screening,
    SequenceProbability,
    Suffix,
    default_temperature,
)
from powermc.sequences.screening import PROPOSALS
from powermc.settings import Settings
from powermc.stages import Stages, count_stages
from powermc.targets import Power
from powermc.tuning import correlation, fit_exponent, grown, pairs, surrogate_ledger, surrogate_name
from powermc.types import Info, Kernel, State, Steps

if TYPE_CHECKING:
    from powermc.lm import CausalLM, Ledger

CLEAR = 1.1
"""An early exit is recommended only if its figure of merit is this many times that of plain Metropolis-Hastings."""


@dataclass(frozen=True)
class Choice:
    """One row of the pilot: a kernel, what it did, and what that cost.

    surrogate, layer and proposal are None for plain Metropolis-Hastings, layer also for a model of its own.
    temperature: of what the exit draws, None for that of the full model's proposals. exponent: of p~ in stage 1.
    correlation: of the log-ratios of both models over proposals. kl: KL(p || p~) per token (nats) held out, from
    the lens. stages: None for plain. changed: accepted moves that changed the path. ess: effective samples of log
    p, summed over prompts. flops, seconds: of all steps together, those of a surrogate that is a model of its own
    included. tokens: of the full model by span of layers; heads: by depth.
    """

    surrogate: str | None
    layer: int | None
    proposal: str | None
    exponent: float
    correlation: float
    kl: float
    stages: Stages | None
    steps: int
    accepted: int
    changed: int
    ess: float
    flops: float
    seconds: float
    tokens: dict[str, int]
    heads: dict[str, int]
    temperature: float | None = None

    @property
    def name(self) -> str:
        if self.proposal is None:
            return "plain MH"
        heat = "" if self.temperature is None else f" at T {self.temperature:g}"
        return f"{self.surrogate if self.layer is None else f'exit {self.layer}'}, {self.proposal}{heat}"

    @property
    def merit(self) -> float:
        """Accepted moves that changed the path, per 10^12 FLOPs."""
        return self.changed / self.flops * 1e12


@dataclass(frozen=True)
class Pilot:
    """All choices, plain Metropolis-Hastings first, and the settings they ran under."""

    choices: tuple[Choice, ...]
    settings: dict[str, Any]

    @property
    def plain(self) -> Choice:
        return self.choices[0]

    @property
    def top(self) -> Choice | None:
        """The early exit of the highest merit. "full" is for comparison: it pays for log p before it screens."""
        rivals = [c for c in self.choices[1:] if c.proposal != "full"]
        return max(rivals, key=lambda c: c.merit, default=None)

    @property
    def best(self) -> Choice:
        """The recommendation: `top` if its merit is clearly above plain Metropolis-Hastings', else that.

        Clearly: by `CLEAR`, and by two standard errors of the ratio of two Poisson counts of moves.
        """
        top, plain = self.top, self.plain
        if top is None or not top.changed:
            return plain
        moves = max(plain.changed, 1)  # of none seen, that there is none does not follow
        error = math.sqrt(1 / top.changed + 1 / moves)
        gain = top.merit / (moves / plain.flops * 1e12)
        return top if gain > max(CLEAR, math.exp(2 * error)) else plain

    def verdict(self) -> str:
        """The recommendation in words."""
        top = self.top
        if top is None:
            return "recommended: plain MH. No early exit was tried."
        if self.best is self.plain:
            return (
                "recommended: plain MH. No exit clearly pays here: the best of them, "
                f"{top.name}, makes {_ratio(top.merit, self.plain.merit)} its moves per FLOP."
            )
        seconds = _ratio(top.changed / top.seconds, self.plain.changed / self.plain.seconds)
        return (
            f"recommended: {top.name}. It makes {_ratio(top.merit, self.plain.merit)} of plain MH's moves per FLOP "
            f"and {seconds} per second."
        )

    def table(self) -> str:
        """A Markdown table, one line per choice."""
        head = (
            "| kernel | exponent | corr | KL | stage 1 pass | saved | stage 2 accept | gated | changed / steps "
            "| GFLOP / step | s / step | GFLOP / move | s / move | ESS | GFLOP / ESS | s / ESS |"
        )
        return "\n".join([head, "| --- " + "| ---: " * 15 + "|", *map(_line, self.choices)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able. NaN and infinities become None."""
        rows = [{**asdict(c), "name": c.name, "merit": c.merit} for c in self.choices]
        return jsonable({"settings": self.settings, "choices": rows, "recommended": self.best.name})


def pilot(
    model: CausalLM,
    exits: Sequence[Autoregressive],
    prompts: Sequence[Prompt],
    *,
    alpha: float = 4.0,
    temperature: float | None = None,
    max_new_tokens: int = 128,
    steps: int = 8,
    chains: int = 2,
    plain: float = 0.1,
    proposals: Sequence[str] = PROPOSALS,
    exit_temperatures: Sequence[float | None] = (None,),
    eta: float | None = None,
    delta: float | None = None,
    kl: Callable[[int], float] = lambda layer: math.nan,
    early_rejection: bool = True,
    seed: int = 0,
    notify: Callable[[str], None] = lambda name: None,
    watch: Callable[[Info], None] = lambda info: None,
) -> Pilot:
    """Run plain Metropolis-Hastings and every exit with every proposal from the same starts.

    Parameters
    ----------
    model, exits, prompts
        The full model; exits of it, or other models with its tokenizer; and at least one prompt.
    alpha, temperature, max_new_tokens, early_rejection, seed
        As in `power_sample`.
    steps, chains
        Steps of each chain, at least 4; chains per prompt.
    plain, proposals, exit_temperatures, eta, delta
        Every temperature is tried with every proposal that the exit draws. See `powermc.sequences.Screening`.
        The exponent is alpha for tails the exit draws itself; for others it is fitted on proposals from the
        starts, which are not counted.
    kl
        KL(p || p~) of a layer, for the table.
    notify
        Called with the name of each choice before it runs.
    watch
        Called with what every step of every choice did.

    Raises `ArgumentError` for values out of range and for a model whose ledger counts no FLOPs, and the first
    `ChainError` of any chain.
    """
    if not prompts:
        raise ArgumentError("a pilot needs at least one prompt")
    gate: Any = {"eta": eta, "delta": delta}
    check(
        alpha=alpha,
        temperature=temperature,
        steps=steps,
        chains=chains,
        plain=plain,
        proposals=proposals,
        max_new_tokens=max_new_tokens,
        seed=seed,
        **gate,
    )
    for exit in exits:
        Screening(exit, alpha, **gate)
    if (fit := getattr(model, "fit", None)) is not None:
        fit(prompts, max_new_tokens, chains=chains, draws=steps, held=True)
    heat = default_temperature(alpha) if temperature is None else temperature
    space = model.space(max_new_tokens)
    starts = grown(model, space, prompts, temperature=heat, chains=chains, seed=seed)
    target = Power(SequenceProbability(model), alpha)

    def measured(kernel: Kernel[Path], exit: Autoregressive | None, **facts: Any) -> Choice:
        ledger = None if exit is None else surrogate_ledger(model, exit)
        return _measure(model, ledger, kernel, starts, chains, steps, seed, facts, watch)

    notify("plain MH")
    facts: dict[str, Any] = dict.fromkeys(("surrogate", "layer", "proposal", "temperature"))
    facts |= dict.fromkeys(("exponent", "correlation", "kl"), math.nan)
    baseline = Metropolis(target, Suffix(model, space, Length(), heat), early_rejection)
    choices = [measured(baseline, None, **facts)]
    for exit, proposal in itertools.product(exits, proposals):
        for own in exit_temperatures if proposal != "full" else (None,):
            layer, name = getattr(exit, "layer", None), surrogate_name(exit)
            screening = Screening(exit, alpha, own, proposal, plain, eta, delta)
            moves = screening.proposals(model, space, Length(), heat)[proposal]
            found = pairs(model, exit, moves, starts, each=2, seed=seed)
            if proposal != "exit" and found:
                screening = replace(screening, exponent=fit_exponent(found, alpha))
            facts = {"surrogate": name, "layer": layer, "proposal": proposal, "temperature": own}
            facts |= {"exponent": screening.exponent, "correlation": correlation(found)}
            place = name if layer is None else f"exit {layer}"
            notify(f"{place}, {proposal}" + ("" if own is None else f" at T {own:g}"))
            kernel = screening.kernel(model, space, Length(), heat, target, early_rejection=early_rejection)
            choices.append(measured(kernel, exit, kl=math.nan if layer is None else kl(layer), **facts))
    settings = {
        "model": model.name,
        "prompts": len(prompts),
        "alpha": alpha,
        "temperature": heat,
        "max_new_tokens": max_new_tokens,
        "steps": steps,
        "chains": chains,
        "plain": plain,
        "exit_temperatures": list(exit_temperatures),
        "eta": eta,
        "delta": delta,
        "seed": seed,
    }
    return Pilot(tuple(choices), settings)


def check(
    *,
    alpha: float,
    temperature: float | None,
    steps: int,
    chains: int,
    plain: float,
    proposals: Sequence[str],
    max_new_tokens: int,
    eta: float | None,
    delta: float | None,
    seed: int,
) -> None:
    """Raise `ArgumentError` for settings that no pilot can run under, whatever the model."""
    Settings(alpha=alpha, temperature=temperature, max_new_tokens=max_new_tokens, chains=chains, seed=seed)
    check_count("steps", steps, least=4)  # fewer draws have no effective sample size
    for proposal in proposals:
        Settings(kernel="early-exit", proposal=proposal, plain=plain, eta=eta, delta=delta)


def _measure(
    model: CausalLM,
    other: Ledger | None,
    kernel: Kernel[Path],
    starts: Sequence[Path],
    chains: int,
    steps: int,
    seed: int,
    facts: dict[str, Any],
    watch: Callable[[Info], None],
) -> Choice:
    records = Records(kernel.fields, (len(starts), steps))
    log_p = np.zeros((len(starts), steps))

    def program(n: int, start: Path, stream: Stream) -> Steps[None]:
        state: State[Path] = yield from kernel.init(start)
        for i in range(steps):
            state, info = yield from kernel.step(stream.step(i).at("pilot"), state)
            path = state.value.view(model)
            assert path is not None
            yield (n, i), info, path.log_prob

    programs = (
        (n, program(n, start, Stream(seed, prompt=start.prompt.key, chain=n % chains)))
        for n, start in enumerate(starts)
    )
    if (forget := getattr(model, "forget", None)) is not None:
        forget()  # what earlier choices drafted would make later ones look cheaper than they are
    ledgers = [model.ledger] if other is None else [model.ledger, other]
    before, begun = [ledger.copy() for ledger in ledgers], time.perf_counter()
    for outcome in drive(programs, active=getattr(model, "max_rows", None)):
        if isinstance(outcome, Failed):
            raise outcome.error
        if isinstance(outcome, Event):
            at, info, log_prob = outcome.value
            records.write(at, info)
            log_p[at] = log_prob
            watch(info)
    seconds = time.perf_counter() - begun
    spent = [ledger.since(earlier) for ledger, earlier in zip(ledgers, before, strict=True)]
    if any(cost.spans and not cost.flops for cost in spent):
        raise ArgumentError(f"the ledger of {model.name} or its surrogate counts no FLOPs, by which a pilot compares")
    info = records.arrays
    return Choice(
        **facts,
        stages=count_stages([info]) if facts["proposal"] is not None else None,
        steps=info["accepted"].size,
        accepted=int(info["accepted"].sum()),
        changed=int(info["changed"].sum()),
        ess=sum(effective_samples(group) for group in log_p.reshape(-1, chains, steps)),
        flops=sum(cost.flops for cost in spent),
        seconds=seconds,
        **_by_depth(spent[0]),
    )


def _by_depth(spent: Ledger) -> dict[str, Any]:
    counted = spent.as_dict()
    return {"tokens": counted["tokens_by_depth"], "heads": counted["heads_by_depth"]}


def effective_samples(values: np.ndarray) -> float:
    """Bulk effective sample size of (chain, draw) values, at most one a draw; a chain that never moves counts as one.

    A constant chain says nothing of mixing, so those are left out. Under 10 draws per chain the estimator looks at no
    lag, and finds log10(n) per draw whatever the n draws are (an odd one is left out by its halves); NaN under 4.
    """
    moving = values[np.ptp(values, axis=1) > 0]
    still = len(values) - len(moving)
    if not len(moving):
        return float(still)
    if moving.shape[1] >= mixing.LEAST_DRAWS_ESS:
        found = mixing.ess_bulk(moving)
    elif moving.shape[1] >= mixing.LEAST_DRAWS:
        n = len(moving) * (moving.shape[1] // 2 * 2)
        found = n * math.log10(n)
    else:
        return math.nan
    return min(found, float(moving.size)) + still


def _line(c: Choice) -> str:
    s = c.stages
    stage = [_percent(s.pass_rate), str(s.saved), _percent(s.stage2_rate), _percent(s.gated_share)] if s else ["-"] * 4
    cells = [
        c.name,
        _number(c.exponent),
        _number(c.correlation),
        _number(c.kl),
        *stage,
        f"{c.changed} / {c.steps}",
        _number(c.flops / c.steps / 1e9),
        _number(c.seconds / c.steps),
        _number(_per(c.flops / 1e9, c.changed)),
        _number(_per(c.seconds, c.changed)),
        f"{c.ess:.0f}",
        _number(_per(c.flops / 1e9, c.ess)),
        _number(_per(c.seconds, c.ess)),
    ]
    return "| " + " | ".join(cells) + " |"


def _per(cost: float, n: float) -> float:
    return cost / n if n else math.inf


def _number(x: float) -> str:
    if math.isnan(x):
        return "-"
    return "inf" if math.isinf(x) else f"{x:.3g}"


def _percent(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.0%}"


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f} times" if b else "infinitely many times"
