"""`power_sample`: whole answers of a language model from p(x)^alpha, many prompts and chains in one batch."""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from powermc.choices import Stream
from powermc.early_exit import Prepared, prepare
from powermc.errors import ArgumentError, ChainError
from powermc.results import Chain, Run
from powermc.sampling import Records, check_callbacks, without_cache
from powermc.scheduling import Event, Failed, drive
from powermc.sequences.growth import BlockwisePower, Committed, Grown
from powermc.sequences.model import Autoregressive
from powermc.sequences.path import Path, Prompt, Space, Tokens
from powermc.settings import Settings
from powermc.types import Field, Fields, Info, State

if TYPE_CHECKING:
    from powermc.lm.ledger import Ledger

ACTIVE = 64
"""Chains under way at once when the model does not say how many rows it has (`max_rows`); the others wait."""


class LanguageModel(Autoregressive, Protocol):
    """What `power_sample` needs of a model; `powermc.CausalLM` is one.

    It may also have `max_rows` (chains under way at once), `fit(prompts, horizon, chains=..., draws=...)` (bound
    `max_rows` by memory; see `CausalLM`), `reserve(rows, length)` (allocate before the run),
    `forget()` (drop what earlier runs left to be reused) and `ignored_warpers` (what the checkpoint asks for and p
    leaves out).
    """

    @property
    def name(self) -> str: ...

    @property
    def ledger(self) -> Ledger:
        """Counters of everything the model has computed."""
        ...

    def prompt(self, text: str, *, chat: bool | None = None) -> Prompt:
        """The prompt of this text; `chat=None` applies the chat template if there is one."""
        ...

    def space(self, horizon: int, stop: Sequence[str] = ()) -> Space:
        """All paths of up to `horizon` tokens, with the model's own end tokens and these stop strings."""
        ...

    def check_fits(self, prompt: Prompt, horizon: int) -> None:
        """Raise `ArgumentError` if the prompt and `horizon` tokens exceed the model's context."""
        ...

    def decode(self, tokens: Tokens) -> str:
        """The text of these tokens, special ones left out."""
        ...


Callback = Callable[[int, int, int, State[Path], Info], None]
"""Called as (prompt, chain, step, state, info) after every committed step; steps count over all blocks."""


def power_sample(
    model: LanguageModel | str | os.PathLike[str],
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    alpha: float = 4.0,
    temperature: float | None = None,
    max_new_tokens: int = 128,
    block_size: int = 32,
    steps: int = 10,
    chains: int = 4,
    scope: str | None = None,
    cut: str = "length",
    seed: int = 0,
    stop: str | Sequence[str] = (),
    reward: Callable[[str], float] | None = None,
    reward_at_most: float | None = None,
    early_rejection: bool = True,
    chat: bool | None = None,
    kernel: str | None = None,
    exit: Any = None,
    layer: int | None = None,
    proposal: str = "exit",
    screen: float | None = None,
    exit_temperature: float | None = None,
    plain: float = 0.1,
    eta: float | None = None,
    delta: float | None = None,
    gated: float | None = None,
    aggregate: str = "max",
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Sample whole answers to each prompt from pi(x) proportional to p(x)^alpha exp(reward(x)).

    Blockwise growth (Karan & Du 2025, Algorithm 1): each chain extends its path by a block, then takes `steps`
    Metropolis-Hastings steps that cut the path and draw the rest anew, until `max_new_tokens` are reached. Every step
    leaves its target invariant; a finite run is a finite run.

    Parameters
    ----------
    model
        A `CausalLM`, anything with the interface of `LanguageModel`, or a name to load with
        `CausalLM.from_pretrained`.
    prompts
        One or several; a `Prompt` is taken as it is, token ids and stream key.
    alpha
        Power of the target, >= 0.
    temperature
        Of the proposals, > 0; None for min(1, 1/alpha). It changes the speed of the chain, not its target.
    max_new_tokens
        The horizon T: a path ends at its first end token, at a stop string, or here.
    block_size, steps
        Tokens per block, and kernel steps after each block.
    chains
        Independent chains per prompt.
    scope
        "sequence": steps cut anywhere. "block": earlier blocks are frozen, so that each block is exact for p^alpha
        *given its prefix*, which is not p^alpha of the whole path. None: "block" if `cut` is "block", else "sequence".
    cut
        Where steps cut: "length" (uniform over the path), "horizon" (uniform over the horizon, cuts past the end
        being free no-ops), "block" (uniform over the current block), or "entropy" (by the model's own uncertainty).
    seed
        Every number drawn is a function of (seed, the prompt's tokens, chain, step). A prompt's draws do not depend
        on the other prompts, unless the kernel is chosen ("auto") or its exponent fitted (`screen`) on them; where a
        prompt occurs twice, the two draw different numbers.
    stop
        Strings that end a path where they first appear.
    reward
        Adds reward(text) nats to the log density, text being the whole answer decoded without special tokens: a
        function of the text alone. It also sees the unfinished texts of earlier blocks. A chain whose path has reward
        -inf when a block begins ends with `ZeroProbability`; prefer a finite penalty.
    reward_at_most
        A bound of `reward`, nats: declare it, and drafts can be rejected early in spite of the reward. Checked at every
        evaluation (`ArgumentError`).
    early_rejection
        Whether a draft is abandoned as soon as it is sure to be rejected. The draws are the same either way, for fewer
        tokens. Off by itself where nothing bounds the ratio: alpha below 1, a temperature of the proposals under
        1/alpha or over 1, a reward without a bound, and screened steps under a gate.
    chat
        Whether to apply the chat template; None: if the tokenizer has one.
    kernel
        "metropolis": plain Metropolis-Hastings. "early-exit": proposals are drawn and screened by a surrogate, and only
        survivors are completed to full depth (delayed acceptance). "auto": whichever a short pilot on the first prompts
        finds clearly cheaper. All have the same target. None: "early-exit" if there is an `exit`.
    exit
        The surrogate: a `Lens` of this model or the name of its file, or another model with the same tokenizer. None
        with another kernel than "metropolis": the model's cached lens, fitted on its own samples if there is none.
    layer
        Which exit of the lens; None for its deepest.
    proposal, plain, eta, delta, aggregate
        See `powermc.sequences.Screening`: what is proposed ("exit", "substitution", "full"), the share of plain steps,
        and the gate on the surrogate's entropy (over `eta` nats) or margin (under `delta`).
    screen
        Exponent of the surrogate in the first stage, >= 0; None for alpha where the surrogate draws the tail, else
        fitted on proposals before the first step, and recorded.
    exit_temperature
        Of what the surrogate draws, > 0; None for that of the model's proposals.
    gated
        Fit `eta` before the first step so that about this share of proposed tails is uncertain; recorded.
    progress
        Show a display on standard error.
    callbacks
        Called in order as (prompt, chain, step, state, info) after every step.

    Returns a `Run`. A chain that fails (`ChainError`) keeps what it drew, is listed in `Run.errors`, and a
    `RuntimeWarning` is issued; if all fail before a draw, the first error is raised. Ctrl-C ends the run and returns
    what has been drawn. Raises `ArgumentError` before any work of the model for an argument out of range, and
    `ModelError` for a model that cannot be loaded.
    """
    settings = Settings(
        alpha=alpha,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        steps=steps,
        chains=chains,
        scope=scope,
        cut=cut,
        seed=seed,
        stop=stop,
        reward=reward,
        reward_at_most=reward_at_most,
        early_rejection=early_rejection,
        chat=chat,
        kernel=kernel,
        exit=exit,
        layer=layer,
        proposal=proposal,
        screen=screen,
        exit_temperature=exit_temperature,
        plain=plain,
        eta=eta,
        delta=delta,
        gated=gated,
        aggregate=aggregate,
    )
    given = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
    settings.check_prompts(given)
    check_callbacks(callbacks)
    if isinstance(model, str | os.PathLike):
        from powermc.lm import CausalLM

        model = cast(LanguageModel, CausalLM.from_pretrained(os.fspath(model)))
    elif not hasattr(model, "branch"):
        raise ArgumentError(
            f"model must be a CausalLM or the name of one, got {type(model).__name__}; "
            "wrap a model of your own: CausalLM(model, tokenizer)"
        )
    ready = distinct([p if isinstance(p, Prompt) else model.prompt(p, chat=chat) for p in given])
    for prompt in ready:
        model.check_fits(prompt, max_new_tokens)
    space = model.space(max_new_tokens, settings.stop)
    _fit(model, ready, settings)  # for what runs before the chains
    prepared = prepare(model, settings, ready, space)
    plan = settings.schedule(model, space, model.decode, prepared.screening)
    return _Recorder(model, plan, ready, settings, prepared).run(callbacks, progress)


class _Recorder:
    """Runs the chains and writes down what they commit."""

    def __init__(
        self,
        model: LanguageModel,
        plan: BlockwisePower,
        prompts: list[Prompt],
        settings: Settings,
        prepared: Prepared,
    ) -> None:
        self.prepared = prepared
        self.model, self.plan, self.prompts, self.settings = model, plan, prompts, settings
        self.chains, self.steps = settings.chains, plan.blocks * plan.steps
        fields: Fields = {
            **plan.stage(0).kernel.fields,
            "block": Field("int32", -1),
            "log_p": Field("float64", math.nan),
            "log_density": Field("float64", math.nan),
            "length": Field("int32", 0),
        }
        keys = [(p, c) for p in range(len(prompts)) for c in range(self.chains)]
        self.records = [Records(fields, (self.chains, self.steps)) for _ in prompts]
        self.last: dict[tuple[int, int], Path] = {}
        self.draws: dict[tuple[int, int], list[Path]] = {key: [] for key in keys}
        self.taken = dict.fromkeys(keys, 0)
        self.grown = dict.fromkeys(keys, 0)
        self.ties = dict.fromkeys(keys, 0)
        self.errors: dict[tuple[int, int], ChainError] = {}
        self.interrupted = False

    def run(self, callbacks: Sequence[Callback], progress: bool) -> Run:
        model, plan = self.model, self.plan
        fit = _fit(model, self.prompts, self.settings)
        self.notes = () if fit is None or fit.note is None else (fit.note,)
        self.rows = active = min(getattr(model, "max_rows", ACTIVE), len(self.taken))
        if (reserve := getattr(model, "reserve", None)) is not None:
            longest = max(len(prompt.ids) for prompt in self.prompts)
            reserve(active, longest + plan.space.horizon)
        if (forget := getattr(model, "forget", None)) is not None:
            forget()
        milestones, reached = work(plan), dict.fromkeys(self.taken, 0.0)
        before, begun = model.ledger.copy(), time.monotonic()
        programs = (
            (
                (p, c),
                plan.program(Stream(self.settings.seed, prompt=self.prompts[p].key, chain=c).step, self.prompts[p]),
            )
            for p, c in self.taken
        )
        with ExitStack() as stack:
            display = None
            if progress:
                from powermc.progress import Progress

                display = Progress(
                    steps=len(self.taken) * self.steps,
                    work=len(self.taken) * milestones[-1][-1],
                    tokens=lambda: model.ledger.decoded + model.ledger.prefilled,
                )
                stack.enter_context(display)
            if self.prepared.drift is not None:
                stack.enter_context(self.prepared.drift.watching())
            outcomes = stack.enter_context(closing(drive(programs, active=active)))  # type: ignore[type-var]
            try:
                for outcome in outcomes:
                    key = cast("tuple[int, int]", outcome.key)
                    event = outcome.value if isinstance(outcome, Event) else None
                    at = milestones[-1][-1]  # nothing is left of a chain that has finished or failed
                    if isinstance(outcome, Failed):
                        self.errors[key] = outcome.error
                    elif isinstance(event, Grown):
                        self._grow(key, event)
                        at = milestones[event.block][0]
                    elif isinstance(event, Committed):
                        self._commit(key, event)
                        self.prepared.check_drift()
                        at = milestones[event.block][1 + event.step % plan.steps]
                        for callback in callbacks:
                            callback(*key, event.step, event.state, event.info)
                    if display is not None:
                        if isinstance(event, Committed):
                            display.step(event.info, at - reached[key])
                        else:
                            display.add(at - reached[key])
                        reached[key] = at
            except KeyboardInterrupt:
                self.interrupted = True
        return self._result(model.ledger.since(before), time.monotonic() - begun)

    def _grow(self, key: tuple[int, int], event: Grown) -> None:
        before = len(self.last[key]) if key in self.last else 0
        self.last[key] = without_cache(event.path)
        self.grown[key] += len(event.path) - before
        self.ties[key] += event.near_ties

    def _commit(self, key: tuple[int, int], event: Committed) -> None:
        path = without_cache(event.state.value)
        own = {
            "block": event.block,
            "log_p": path.log_prob,
            "log_density": event.state.log_density,
            "length": len(path),
        }
        self.records[key[0]].write((key[1], event.step), {**event.info, **own})
        self.last[key] = path
        if event.block == self.plan.blocks - 1:
            self.draws[key].append(path)
        self.taken[key] += 1

    def _result(self, cost: Ledger, seconds: float) -> Run:
        if (
            self.errors
            and not self.interrupted
            and len(self.errors) == len(self.taken)
            and not any(self.draws.values())
        ):
            raise next(iter(self.errors.values()))
        texts: dict[Tokens, str | None] = {}

        def decode(path: Path) -> str | None:
            if path.tokens not in texts:
                try:
                    texts[path.tokens] = self.model.decode(path.tokens)
                except ArgumentError:  # a model without a tokenizer
                    texts[path.tokens] = None
            return texts[path.tokens]

        def chain(key: tuple[int, int]) -> Chain:
            path = self.last.get(key)
            return Chain(
                path,
                None if path is None else decode(path),
                tuple(self.draws[key]),
                tuple(decode(x) for x in self.draws[key]),
                self.taken[key],
                self.grown[key],
                self.ties[key],
                self.errors.get(key),
            )

        for (p, c), error in self.errors.items():
            text = f"prompt {p}, chain {c} stopped after {self.taken[p, c]} steps: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        infos = tuple(records.arrays for records in self.records)
        return Run(
            model=self.model.name,
            settings={**self.settings.as_dict(), "temperature": self.plan.q_temperature, "rows": self.rows},
            prompts=tuple(self.prompts),
            chains=tuple(tuple(chain((p, c)) for c in range(self.chains)) for p in range(len(self.prompts))),
            infos=infos,
            early_exit=self.prepared.result(self.model, infos, self.prompts, cost),
            cost=cost,
            seconds=seconds,
            resolution=self.model.resolution,
            ignored_warpers=dict(getattr(self.model, "ignored_warpers", {})),
            interrupted=self.interrupted,
            notes=self.notes,
        )


def _fit(model: LanguageModel, prompts: Sequence[Prompt], settings: Settings) -> Any:
    """Bound the model's rows by memory, where it can be asked to; None where it cannot."""
    fit = getattr(model, "fit", None)
    return fit and fit(prompts, settings.max_new_tokens, chains=settings.chains, draws=settings.steps)


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same prompts with stream keys that differ: where a key occurs again, it is hashed with its occurrence.

    The first of equal prompts keeps its key, whatever stands beside it. A prompt without a key gets a hash of its ids.
    """
    seen: dict[int, int] = {}
    result: list[Prompt] = []
    for prompt in prompts:
        key = prompt.key or _hash(prompt.ids)
        occurrence = seen[key] = seen.get(key, -1) + 1
        result.append(replace(prompt, key=_hash((key, occurrence)) if occurrence else key))
    return result


def work(plan: BlockwisePower) -> list[list[float]]:
    """Tokens a chain is expected to have drawn after the growth of each block, and after each step on it.

    For the time left only: as if no path ended early.
    """
    total, milestones = 0.0, []
    for block in range(plan.blocks):
        start = block * plan.block_size
        end = min(start + plan.block_size, plan.space.horizon)
        span = end - start if plan.scope == "block" else end
        milestones.append([total + end - start + i * (span + 1) / 2 for i in range(plan.steps + 1)])
        total = milestones[-1][-1]
    return milestones


def _hash(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little")
