"""`power_sample`: whole answers of a language model from p(x)^alpha, many prompts and chains in one batch."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from powermc.early_exit import prepare, restored
from powermc.errors import ArgumentError, ChainError
from powermc.recording import Callback, Decoder, Keeping, Memory, Recorder, about, fields_of
from powermc.results import Run
from powermc.sampling import check_callbacks, check_count
from powermc.sequences.model import Autoregressive
from powermc.sequences.path import Prompt, Space, Tokens
from powermc.settings import Settings

if TYPE_CHECKING:
    from powermc.lm.ledger import Ledger
    from powermc.store import Store

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
    draws: int | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    thin: int = 1,
    keep_proposals: bool = True,
    first_chain: int = 0,
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
    draws
        Kernel steps after the last block, None for `steps`: the draws from the target. More of them go on from where
        fewer end.
    store
        Write the run to this file as it is drawn (`powermc.store`): what has been committed survives whatever ends the
        process, and `powermc.load` reads it at any time. The `Run` returned is what the file holds.
    resume
        Go on with the run in `store`, if there is one; without it an existing run is refused. Settings, model and
        prompts must be those of the run, but `chains` and `draws` may be more. No step is taken again, and with an
        unchanged schedule a float64 model draws what it would have drawn without the stop, bit for bit.
    thin
        Keep the path after every so manyth step on the last block. What happened in each step is kept of all.
    keep_proposals
        Whether `store` holds the tokens of rejected proposals too.
    first_chain
        The number of the first chain: it draws what that chain of a larger run draws. So workers can share the chains
        of a prompt, each with a store of its own, and `powermc.merge` joins them.
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
        Show a display on standard error, of the warm-up too.
    callbacks
        Called in order as (prompt, chain, step, state, info) after every step.

    Returns a `Run`. A chain that fails (`ChainError`) keeps what it drew, is listed in `Run.errors`, and a
    `RuntimeWarning` is issued; if all fail before a draw, the first error is raised. Ctrl-C ends the run and returns
    what has been drawn. Raises `ArgumentError` before any work of the model for an argument out of range, and
    `ModelError` for a model that cannot be loaded, and `StoreError` for a store that cannot be written or gone on with:
    what it held before, it still holds.
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
        draws=draws,
    )
    check_count("thin", thin, least=1)
    check_count("first_chain", first_chain, least=0)
    for name, value in (("resume", resume), ("keep_proposals", keep_proposals)):
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False, got {value!r}")
    if store is None and (resume or not keep_proposals):
        name = "resume=True" if resume else "keep_proposals=False"
        raise ArgumentError(f"{name} has no effect without a store; name a file with store=..., or leave it out")
    given = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
    settings.check_prompts(given)
    check_callbacks(callbacks)
    keeping = Keeping(thin, keep_proposals, first_chain)
    with ExitStack() as stack:
        file = None
        if store is not None:
            from powermc.store import Store

            file = stack.enter_context(Store(store, resume=resume))
            if file.header is not None:
                file.header.check(file.path, settings, keeping)
        recorder = _recorder(_loaded(model), given, settings, file, keeping, progress)
        run = recorder.run(callbacks, progress)
    _tell(run, recorder.errors)
    return run


def _loaded(model: LanguageModel | str | os.PathLike[str]) -> LanguageModel:
    if isinstance(model, str | os.PathLike):
        from powermc.lm import CausalLM

        return cast(LanguageModel, CausalLM.from_pretrained(os.fspath(model)))
    if not hasattr(model, "branch"):
        raise ArgumentError(
            f"model must be a CausalLM or the name of one, got {type(model).__name__}; "
            "wrap a model of your own: CausalLM(model, tokenizer)"
        )
    return model


def _recorder(
    model: LanguageModel,
    given: Sequence[str | Prompt],
    settings: Settings,
    file: Store | None,
    keeping: Keeping,
    progress: bool,
) -> Recorder:
    """Prompts, kernel and schedule made; what is in the store compared with them, or written there."""
    chat, chains, horizon = settings.chat, settings.chains, settings.max_new_tokens
    prompts = distinct([p if isinstance(p, Prompt) else model.prompt(p, chat=chat) for p in given])
    old = None if file is None else file.header
    if file is not None and old is not None:
        old.check_model(file.path, model)
        file.check_prompts(prompts)
    for prompt in prompts:
        model.check_fits(prompt, horizon)
    space = model.space(horizon, cast("Sequence[str]", settings.stop))
    _fit(model, prompts, settings)  # for what runs before the chains
    if old is None:
        prepared = prepare(model, settings, prompts, space, progress=progress)
    else:
        prepared = restored(model, settings, old.early_exit, old.surrogate, progress=progress)
    plan = settings.schedule(model, space, model.decode, prepared.screening)
    fit = _fit(model, prompts, settings)
    rows = min(getattr(model, "max_rows", ACTIVE), len(prompts) * chains)
    notes = () if fit is None or fit.note is None else (fit.note,)
    decode = Decoder(model)
    if file is None:
        journal = Memory(plan, prompts, chains, decode, keeping.thin)
        points = dict.fromkeys((p, c) for p in range(len(prompts)) for c in range(chains))
    else:
        from powermc.store import Header, Writer

        if old is None:
            facts = about(model, plan, prompts, settings, rows, notes)
            file.begin(Header.of_run(facts, model, fields_of(plan), prepared, settings, keeping), prompts)
        else:
            file.update(old.extended(settings))
        journal = Writer(file, plan, prompts, decode)
        points = journal.points(chains)
    return Recorder(
        model,
        plan,
        prompts,
        settings,
        prepared,
        journal,
        points,
        rows=rows,
        notes=notes,
        first_chain=keeping.first_chain,
    )


def _tell(run: Run, errors: Mapping[tuple[int, int], ChainError]) -> None:
    """Warn of the chains that failed; raise if that is all there is."""
    chains = [chain for row in run.chains for chain in row]
    if errors and not run.interrupted and all(chain.error and not chain.draws for chain in chains):
        raise next(iter(errors.values()))
    for (p, c), error in errors.items():
        text = f"prompt {p}, chain {c} stopped after {run.chains[p][c].steps} steps: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _fit(model: LanguageModel, prompts: Sequence[Prompt], settings: Settings) -> Any:
    """Bound the model's rows by memory, where it can be asked to; None where it cannot."""
    fit = getattr(model, "fit", None)
    blocks = -(-settings.max_new_tokens // settings.block_size)
    left = (blocks - 1) * settings.steps + (settings.steps if settings.draws is None else settings.draws)
    return fit and fit(prompts, settings.max_new_tokens, chains=settings.chains, draws=left)


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


def _hash(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little")
