"""Chain-transitions per second: the published algorithm, the same batched over chains, and powermc, side by side.

Every repeat goes round all prompts, horizons and methods before the next begins, so that a noisy machine hits all
alike, and does the same work (same seed): the least time over the repeats counts. Every run starts with nothing cached
but the weights. A run is timed whole, and once more with no kernel steps: the difference is the time of the steps.

What it does not measure: mixing. With paths that end, the published algorithm has another law (see
`powermc.evaluation.published`) and ends early, so that its cuts and tails differ: they are reported, and the ratio is
also given per proposed token. `ignore_eos` makes end tokens ordinary ones: all paths then have T tokens and both
methods the same law.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from powermc.errors import ArgumentError
from powermc.evaluation.memory import Peak, peak, settled
from powermc.evaluation.published import Generate, Published
from powermc.lm import CausalLM
from powermc.power import power_sample
from powermc.sampling import check_count
from powermc.sequences.path import Prompt, Tokens
from powermc.settings import Settings

METHODS = ("published", "published-batched", "powermc")
"""Batch of one; all chains of a round in one call of `generate`; `power_sample` with plain Metropolis-Hastings."""

Calls = list[tuple[list[Tokens], int]]

_CALLS, _CALL_TOKENS = 3, 16
"""Of the comparison with bare `generate`: calls, and the most tokens of each."""


@dataclass(frozen=True)
class Cell:
    method: str
    chains: int
    horizon: int


@dataclass(frozen=True)
class Plan:
    """What is run. Raises `ArgumentError` for an empty list, an unknown method, or a number out of range.

    steps: N >= 1 kernel steps after each block of `block_size` tokens. repeats >= 1.
    """

    methods: tuple[str, ...] = METHODS
    chains: tuple[int, ...] = (1, 4, 16)
    horizons: tuple[int, ...] = (64,)
    steps: int = 2
    block_size: int = 32
    alpha: float = 4.0
    seed: int = 0
    repeats: int = 2
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("methods", "chains", "horizons"):
            values = getattr(self, name)
            if not values:
                raise ArgumentError(f"{name} is empty; name at least one")
            if len(set(values)) < len(values):
                raise ArgumentError(f"{name} names one twice: {', '.join(map(str, values))}")
        for method in self.methods:
            if method not in METHODS:
                raise ArgumentError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
        for horizon in self.horizons:
            check_count("horizon", horizon, least=1)
        for chains in self.chains:
            check_count("chains", chains, least=1)
        check_count("repeats", self.repeats, least=1)
        check_count("steps", self.steps, least=1)
        Settings(**self.settings(Cell("powermc", 1, max(self.horizons)), self.steps))
        if not self.alpha > 0:
            raise ArgumentError(f"alpha must be above 0 here: the published proposals are at 1/alpha, got {self.alpha}")

    @property
    def cells(self) -> list[Cell]:
        """In the order of a round. "published" runs one chain only: its cost per transition does not depend on how
        many follow. Batched over one chain it is the same, and left out."""
        cells = []
        for horizon in self.horizons:
            for method in self.methods:
                counts = (1,) if method == "published" else self.chains
                if method == "published-batched" and "published" in self.methods:
                    counts = tuple(n for n in counts if n > 1)
                cells += [Cell(method, n, horizon) for n in counts]
        return cells

    def settings(self, cell: Cell, steps: int) -> dict[str, Any]:
        """Of `power_sample`."""
        return {
            "alpha": self.alpha,
            "max_new_tokens": cell.horizon,
            "block_size": self.block_size,
            "steps": steps,
            "chains": cell.chains,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Did:
    """What one run did. Arrays have one entry per transition; tokens are positions run through the layers.

    calls: those of `generate`, with the tokens that each decoded.
    """

    cut: np.ndarray
    proposal_length: np.ndarray
    tokens: np.ndarray
    accepted: np.ndarray
    changed: np.ndarray
    growth_tokens: int
    lengths: list[int]
    calls: Calls = field(default_factory=list)


@dataclass
class Times:
    """Of one cell and prompt, by repeat: seconds of the whole run and of growth alone."""

    whole: list[float] = field(default_factory=list)
    growth: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A cell over all prompts. Seconds are sums over prompts of the least over repeats.

    transitions of all chains and prompts; proposal_length, cut, tokens: means per transition; growth_tokens: mean per
    chain; accepted, changed: shares of transitions; length: mean of the last paths. peak_bytes: the process at its
    largest, added_bytes: the most on top of what was resident before a run; None where not measured.
    """

    method: str
    chains: int
    horizon: int
    prompts: int
    transitions: int
    seconds: float
    growth_seconds: float
    tokens: float
    growth_tokens: float
    proposal_length: float
    cut: float
    accepted: float
    changed: float
    length: float
    peak_bytes: int | None
    added_bytes: int | None
    times: tuple[Times, ...]

    @property
    def per_second(self) -> float:
        """Transitions per second, growth excluded; NaN where noise made growth alone take longer than the whole."""
        steps = self.seconds - self.growth_seconds
        return self.transitions / steps if steps > 0 else float("nan")

    @property
    def per_second_whole(self) -> float:
        """Transitions per second of the whole run."""
        return self.transitions / self.seconds

    @property
    def seconds_per_prompt(self) -> float:
        return self.seconds / self.prompts


@dataclass(frozen=True)
class Ratio:
    """A row over the row of "published" with the same horizon: transitions per second of the steps, of whole runs, and
    tokens proposed per second of the steps."""

    raw: float
    whole: float
    per_token: float


@dataclass(frozen=True)
class Result:
    """rows: in the order of `Plan.cells`. overhead: seconds per decoded token inside the baseline over those of bare
    `generate`, by method and number of chains."""

    plan: Plan
    rows: tuple[Row, ...]
    overhead: dict[str, float]

    def ratio(self, row: Row) -> Ratio | None:
        """None if "published" did not run."""
        base = next((r for r in self.rows if r.method == "published" and r.horizon == row.horizon), None)
        if base is None:
            return None
        raw = row.per_second / base.per_second
        whole = row.per_second_whole / base.per_second_whole
        return Ratio(raw, whole, raw * row.proposal_length / base.proposal_length)


def fresh(model: CausalLM, *, ignore_eos: bool = False, reuse: bool = True, guess: bool = True) -> CausalLM:
    """The same weights with nothing run yet: no prompt, draft or buffer is kept from earlier runs.

    It guesses as `model` does, or not at all.
    """
    kept: dict[str, Any] = {"max_rows": model.max_rows, "memory": model.memory, "name": model.name}
    speculate = 0 if model.engine.guesser is None or not guess else model.engine.guesser.tokens
    new = CausalLM(model.decoder.model, **kept, reuse=reuse, speculate=speculate)
    new.text.eos = frozenset() if ignore_eos else model.text.eos
    return new


def bench(model: CausalLM, prompts: Sequence[Prompt], plan: Plan, notify: Callable[[str], object] = str) -> Result:
    """Run the plan; `notify` is told what is about to run. Raises `ArgumentError` for prompts that do not fit."""
    for prompt in prompts:
        model.check_fits(prompt, max(plan.horizons))
    every = range(len(prompts))
    times = {(cell, p): Times() for cell in plan.cells for p in every}
    peaks: dict[Cell, list[Peak]] = {cell: [] for cell in plan.cells}
    did: dict[tuple[Cell, int], Did] = {}
    with settled():
        for method in plan.methods:  # compile, and bring the weights into memory
            _run(model, plan, Cell(method, 2, 2), prompts[0], 1)
        for cell, p in _rounds(plan, len(prompts), notify):
            seconds, _, _ = _run(model, plan, cell, prompts[p], 0)
            times[cell, p].growth.append(seconds)
            seconds, top, did[cell, p] = _run(model, plan, cell, prompts[p], plan.steps)
            times[cell, p].whole.append(seconds)
            peaks[cell].append(top)
    rows = tuple(
        _row(cell, [did[cell, p] for p in every], [times[cell, p] for p in every], peaks[cell]) for cell in plan.cells
    )
    notify("decoding of the baseline against generate")
    return Result(plan, rows, dict(_overheads(model, plan, {c: d for (c, p), d in did.items() if p == 0})))


def _rounds(plan: Plan, prompts: int, notify: Callable[[str], object]) -> Iterator[tuple[Cell, int]]:
    """Every (cell, prompt) once per repeat; every other repeat goes through the cells backwards."""
    for repeat in range(plan.repeats):
        for p in range(prompts):
            for cell in plan.cells if repeat % 2 == 0 else reversed(plan.cells):
                chains = f"{cell.chains} chain{'s' if cell.chains > 1 else ''}"
                notify(
                    f"repeat {repeat + 1}/{plan.repeats}, prompt {p + 1}/{prompts}: {cell.method}, {chains}, "
                    f"T {cell.horizon}"
                )
                yield cell, p


def _run(model: CausalLM, plan: Plan, cell: Cell, prompt: Prompt, steps: int) -> tuple[float, Peak, Did]:
    """One run, timed. What it needs beforehand is made ready outside the clock."""
    if cell.method == "powermc":
        mine = fresh(model, ignore_eos=plan.ignore_eos)
        work: Callable[[], Did] = lambda: _powermc(mine, plan.settings(cell, steps), prompt)  # noqa: E731
    else:
        eos = frozenset() if plan.ignore_eos else model.text.eos
        draw = Generate(model.decoder.model, eos, plan.alpha)
        sampler = Published(draw, eos, cell.horizon, plan.block_size, steps)
        batched = cell.method == "published-batched"
        work = lambda: _published(sampler, prompt, cell.chains, plan.seed, batched)  # noqa: E731
    with peak() as top:
        begun = time.perf_counter()
        did = work()
        seconds = time.perf_counter() - begun
    return seconds, top, did


def _powermc(model: CausalLM, settings: dict[str, Any], prompt: Prompt) -> Did:
    run = power_sample(model, prompt, **settings)
    for error in run.errors.values():
        raise error
    info = {name: values.ravel() for name, values in run.infos[0].items()}
    return Did(
        cut=info["cut"][~info["null"]],
        proposal_length=info["proposal_length"],
        tokens=info["tokens"],
        accepted=info["accepted"],
        changed=info["changed"],
        growth_tokens=run.tokens - int(info["tokens"].sum()),
        lengths=[len(path) for path in run.paths[0] if path is not None],
    )


def _published(sampler: Published, prompt: Prompt, chains: int, seed: int, batched: bool) -> Did:
    trace = sampler.run(prompt.ids, chains=chains, seed=seed, batched=batched)
    return Did(
        cut=np.array(trace.cut),
        proposal_length=np.array(trace.proposal_length),
        tokens=np.array(trace.tokens),
        accepted=np.array(trace.accepted),
        changed=np.array(trace.changed),
        growth_tokens=trace.growth_tokens,
        lengths=[len(path) for path in trace.paths],
        calls=trace.calls,
    )


def _row(cell: Cell, did: Sequence[Did], times: Sequence[Times], peaks: Iterable[Peak]) -> Row:
    def mean(name: str) -> float:
        return float(np.concatenate([getattr(d, name) for d in did]).mean())

    most = [top.most for top in peaks if top.most is not None]
    added = [top.added for top in peaks if top.added is not None]
    names = ("tokens", "proposal_length", "cut", "accepted", "changed")
    return Row(
        method=cell.method,
        chains=cell.chains,
        horizon=cell.horizon,
        prompts=len(did),
        transitions=sum(len(d.tokens) for d in did),
        seconds=sum(min(t.whole) for t in times),
        growth_seconds=sum(min(t.growth) for t in times),
        growth_tokens=sum(d.growth_tokens for d in did) / (len(did) * cell.chains),
        length=float(np.mean([length for d in did for length in d.lengths])),
        peak_bytes=max(most, default=None),
        added_bytes=max(added, default=None),
        times=tuple(times),
        **{name: mean(name) for name in names},
    )


def _overheads(model: CausalLM, plan: Plan, did: dict[Cell, Did]) -> Iterable[tuple[str, float]]:
    """By method and chains, at the longest horizon, over some calls of the first prompt's run, shortened."""
    for cell, done in did.items():
        if done.calls and cell.horizon == max(plan.horizons):
            some = np.linspace(0, len(done.calls) - 1, _CALLS).round().astype(int)
            calls = [(prefixes, min(n, _CALL_TOKENS)) for prefixes, n in (done.calls[i] for i in some)]
            yield f"{cell.method}, {cell.chains}", overhead(model, plan.alpha, calls, max(plan.repeats, 3))


def overhead(model: CausalLM, alpha: float, calls: Calls, repeats: int) -> float:
    """Time of the baseline's draws over that of `generate` alone, for the same prefixes and numbers of tokens.

    Call by call, one after the other in turn, the least over repeats; no end token, so that lengths are equal.
    """
    draw = Generate(model.decoder.model, frozenset(), alpha)
    best = np.full((2, len(calls)), np.inf)
    for repeat in range(repeats):
        for i, (prefixes, n) in enumerate(calls):
            ways = (partial(draw, prefixes, [n] * len(prefixes), 0), partial(draw.bare, prefixes, n, 0))
            for way in (0, 1) if (repeat + i) % 2 else (1, 0):
                begun = time.perf_counter()
                ways[way]()
                best[way, i] = min(best[way, i], time.perf_counter() - begun)
    return float(best[0].sum() / best[1].sum())
