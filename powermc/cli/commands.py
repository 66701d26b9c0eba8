"""The commands and their options. What they do is in modules of their own, imported when they run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from powermc import config
from powermc.cli.command import Command
from powermc.cli.options import (
    EXIT,
    OUTPUT,
    STORE,
    TARGET,
    Alpha,
    Decoding,
    Guessing,
    Lens,
    Loading,
    PromptFile,
    Quiet,
    Seed,
    Weights,
    Written,
)


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """The arguments of `power_sample`. None: not given; `powermc.settings` has the defaults, and checks the rest."""

    alpha: Annotated[
        float | None, typer.Option(help="Power of the target p(x)^alpha; default 4.", rich_help_panel=TARGET)
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the proposals, not of the target; default min(1, 1/alpha).", rich_help_panel=TARGET),
    ] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens; default 128.", rich_help_panel=TARGET)
    ] = None
    block_size: Annotated[
        int | None, typer.Option(help="Tokens an answer grows by; default 32.", rich_help_panel=TARGET)
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Kernel steps after each block; default 10.", rich_help_panel=TARGET)
    ] = None
    draws: Annotated[
        int | None,
        typer.Option(help="Kernel steps after the last block; default: as after the others.", rich_help_panel=TARGET),
    ] = None
    chains: Annotated[
        int | None, typer.Option(help="Independent chains per prompt; default 4.", rich_help_panel=TARGET)
    ] = None
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="sequence|block", rich_help_panel=TARGET,
            help="'sequence' (default) cuts anywhere; 'block' freezes earlier blocks: each block is then exact given "
            "its prefix, which is not p(x)^alpha of the whole answer.",
        ),
    ] = None  # fmt: skip
    cut: Annotated[
        str | None,
        typer.Option(
            metavar="length|horizon|block|entropy", rich_help_panel=TARGET,
            help="Where steps cut: uniformly over the answer (length, the default), the horizon or the last block "
            "(which implies --scope block), or where the model is uncertain (entropy).",
        ),
    ] = None  # fmt: skip
    seed: Annotated[
        int | None, typer.Option(help="The same seed draws the same answers; default 0.", rich_help_panel=TARGET)
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STR", help="End an answer where this text appears; may be repeated.", rich_help_panel=TARGET
        ),
    ] = None
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Apply the chat template; default: if there is one.", rich_help_panel=TARGET
        ),
    ] = None
    early_rejection: Annotated[
        bool | None,
        typer.Option(
            "--early-rejection/--no-early-rejection", rich_help_panel=TARGET,
            help="Abandon drafts that are sure to be rejected: the same draws for fewer tokens; default: on.",
        ),
    ] = None  # fmt: skip
    kernel: Annotated[
        str | None,
        typer.Option(
            metavar="metropolis|early-exit|auto", rich_help_panel=EXIT,
            help="Plain Metropolis-Hastings; proposals drawn and screened by an early exit; or what a pilot finds "
            "cheaper. All sample the same target. Default: early-exit if --exit is given.",
        ),
    ] = None  # fmt: skip
    exit: Lens = None
    layer: Annotated[
        int | None, typer.Option(help="Which exit of the lens; default: its deepest.", rich_help_panel=EXIT)
    ] = None
    proposal: Annotated[
        str | None,
        typer.Option(
            metavar="exit|substitution|full", rich_help_panel=EXIT,
            help="Tails drawn by the exit (default); a few tokens redrawn by it; or tails drawn at full depth and "
            "screened all the same, for comparison.",
        ),
    ] = None  # fmt: skip
    screen: Annotated[
        float | None,
        typer.Option(
            help="Exponent of the exit in the first stage; default: alpha, or fitted.", rich_help_panel=EXIT
        ),
    ] = None  # fmt: skip
    exit_temperature: Annotated[
        float | None,
        typer.Option(help="Of what the exit draws; default: that of the proposals.", rich_help_panel=EXIT),
    ] = None
    plain: Annotated[
        float | None,
        typer.Option(help="Share of plain full-depth steps mixed in; default 0.1.", rich_help_panel=EXIT),
    ] = None
    eta: Annotated[
        float | None,
        typer.Option(help="Gate: tails with an entropy over this (nats) skip the screen.", rich_help_panel=EXIT),
    ] = None
    delta: Annotated[
        float | None,
        typer.Option(help="Gate: tails with a top-two margin under this skip the screen.", rich_help_panel=EXIT),
    ] = None
    gated: Annotated[
        float | None,
        typer.Option(
            help="Gate: fit --eta so that about this share of tails skips the screen.", rich_help_panel=EXIT
        ),
    ] = None  # fmt: skip
    aggregate: Annotated[
        str | None,
        typer.Option(
            metavar="max|mean", help="Gate on a tail's worst token (default) or its mean.", rich_help_panel=EXIT
        ),
    ] = None  # fmt: skip

    @staticmethod
    def names() -> list[str]:
        """Of the arguments."""
        return list(Settings.__annotations__)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that were given."""
        values = {name: getattr(self, name) for name in self.names()}
        return {name: value for name, value in values.items() if value not in (None, [], ())}


@dataclass(frozen=True, kw_only=True)
class Sample(Settings, Guessing, Written):
    """Sample answers to a question from p(x)^alpha.

    Give a QUESTION, --prompt, --file or --demo. Ctrl-C ends the run and prints what has been drawn (exit code 130). An
    error is one line on standard error (exit code 2); where single chains fail, the others are kept and printed.
    """

    question: Annotated[str | None, typer.Argument(help="The prompt.", show_default=False)] = None
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="STR", help="A prompt; may be repeated to give several.")
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts from a JSONL file: each line a string, or an object with 'prompt' or 'question'."),
    ] = None
    demo: Annotated[
        bool, typer.Option("--demo", help="Three questions that ship with powermc, small settings, explained.")
    ] = False
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse/--no-reuse", help="Never run again what has been run of the same tokens.", rich_help_panel="Model"
        ),
    ] = True

    store: Annotated[
        Path | None,
        typer.Option(
            metavar="run.db",
            help="Write the run to this file as it is drawn; it survives a kill.",
            rich_help_panel=STORE,
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --store, if there is one.", rich_help_panel=STORE),
    ] = False
    thin: Annotated[
        int,
        typer.Option(help="Keep the answer after every so manyth step on the last block.", rich_help_panel=STORE),
    ] = 1
    keep_proposals: Annotated[
        bool,
        typer.Option(
            "--keep-proposals/--no-keep-proposals", rich_help_panel=STORE,
            help="Whether --store holds the tokens of rejected proposals too.",
        ),
    ] = True  # fmt: skip

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("question", "prompt", "file", "demo")

    @property
    def loader(self) -> dict[str, Any]:
        return {**super().loader, "reuse": self.reuse}

    def effective(self) -> tuple[dict[str, Any], list[str]]:
        from powermc.cli.sample import prompts_of, settings

        rest, _ = super().effective()
        sources = {name: rest.pop(name) or None for name in self.ALTERNATIVES}
        if any(sources.values()):  # none will do here: a file of settings for whatever question
            prompts_of(self)
        values, notes = config.repeatable(settings(self).as_dict())
        return {**sources, **{name: rest[name] for name in rest if name not in Settings.names()}, **values}, notes

    def run(self) -> int:
        from powermc.cli.sample import run

        return run(self)


@dataclass(frozen=True, kw_only=True)
class Calibrate(Loading, Quiet):
    """Fit exit heads that read p(next token) off the middle layers.

    Prints how close each comes to the full model on text that it was not fitted to, and writes a lens file for
    early-exit sampling with this model.
    """

    data: Annotated[
        Path | None,
        typer.Option(
            help="Texts from a JSONL file: each line a string, or an object with 'text', 'question' (and 'answer') or "
            "'prompt' (and 'completion'). Default: samples of the model itself on prompts that ship with powermc.",
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(metavar="12,16,20", help="Exit after these layers; default four in the upper half."),
        config.COMMAS,
    ] = None
    head: Annotated[
        str,
        typer.Option(
            metavar="lens|temperature|ridge|kl",
            help="The final norm and head as they are, with a temperature, with an affine map before them, or with one "
            "refined by gradient steps on KL.",
        ),
    ] = "ridge"
    held_out: Annotated[
        Path | None, typer.Option(help="Report on the texts of this file; default: the last tenth of the data.")
    ] = None
    tokens: Annotated[
        int | None, typer.Option(help="Use about this many tokens of the data; default all, or 20000 of its own.")
    ] = None
    alpha: Annotated[float, typer.Option(help="Report the overlap of draws at temperature 1/alpha.")] = 4.0
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the lens to this file; default: the cache, by fingerprint of the model.", rich_help_panel=OUTPUT
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot KL and overlap by layer to this file (.png, .svg).", rich_help_panel=OUTPUT),
    ] = None

    def run(self) -> int:
        from powermc.cli.calibrate import run

        return run(self)


@dataclass(frozen=True, kw_only=True)
class Pilot(Decoding, Written):
    """Find out which early exit pays on a model, if any.

    Runs short chains of plain Metropolis-Hastings and of every exit with every proposal from the same starts, and
    prints what each did and cost, per step, per accepted move that changed the path and per effective sample of log p.
    """

    data: PromptFile = None
    limit: Annotated[int, typer.Option(help="Use the first so many prompts.")] = 20
    exit: Lens = None
    layers: Annotated[
        str | None,
        typer.Option(help="Which exits, such as 20,24; default: all of the lens.", rich_help_panel=EXIT),
        config.COMMAS,
    ] = None
    proposals: Annotated[
        str,
        typer.Option(help="Which proposals to try at every exit, with commas between.", rich_help_panel=EXIT),
        config.COMMAS,
    ] = "exit,substitution,full"
    exit_temperatures: Annotated[
        str | None,
        typer.Option(
            help="Of what the exits draw, such as 0.25,0.5; default: that of the proposals.", rich_help_panel=EXIT
        ),
        config.COMMAS,
    ] = None
    plain: Annotated[float, typer.Option(help="Share of plain full-depth steps mixed in.", rich_help_panel=EXIT)] = 0.1
    eta: Annotated[float | None, typer.Option(help="Gate on the exit's entropy, nats.", rich_help_panel=EXIT)] = None
    delta: Annotated[float | None, typer.Option(help="Gate on the exit's top-two margin.", rich_help_panel=EXIT)] = None
    alpha: Alpha = 4.0
    temperature: Annotated[
        float | None, typer.Option(help="Of the proposals; default min(1, 1/alpha).", rich_help_panel=TARGET)
    ] = None
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=TARGET)] = 128
    steps: Annotated[int, typer.Option(help="Steps of each chain, at least 4.", rich_help_panel=TARGET)] = 8
    chains: Annotated[int, typer.Option(help="Chains per prompt.", rich_help_panel=TARGET)] = 2
    seed: Seed = 0

    def run(self) -> int:
        from powermc.cli.pilot import run

        return run(self)


@dataclass(frozen=True, kw_only=True)
class Bench(Guessing, Written):
    """Measure what a chain-transition costs on this machine, beside the published algorithm.

    Runs the published power sampler (Karan & Du 2025), the same batched over chains, and powermc on the same prompts,
    in turns; then decode steps against what the machine's bandwidth and arithmetic allow, and how many proposed tokens
    are never run. Prints Markdown tables.
    """

    data: PromptFile = None
    prompts: Annotated[int, typer.Option(help="Use the first so many prompts.")] = 1
    methods: Annotated[str, typer.Option(help="Which to run, with commas between."), config.COMMAS] = (
        "published,published-batched,powermc"
    )
    tables: Annotated[
        str, typer.Option(help="What to measure: speed, floor and savings, with commas between."), config.COMMAS
    ] = "speed,floor,savings"
    repeats: Annotated[int, typer.Option(help="Do everything so often; the least time counts.")] = 2
    chains: Annotated[
        str, typer.Option(metavar="1,4,16", help="Numbers of chains.", rich_help_panel=TARGET), config.COMMAS
    ] = "1,4,16"
    horizons: Annotated[
        str,
        typer.Option(metavar="64,128,256", help="Longest answers T, in tokens.", rich_help_panel=TARGET),
        config.COMMAS,
    ] = "64"
    steps: Annotated[int, typer.Option(help="Kernel steps N after each block.", rich_help_panel=TARGET)] = 2
    block_size: Annotated[int, typer.Option(help="Tokens B an answer grows by.", rich_help_panel=TARGET)] = 32
    alpha: Alpha = 4.0
    seed: Seed = 0
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", rich_help_panel=TARGET,
            help="End tokens end nothing: all answers have T tokens, and all methods the same law.",
        ),
    ] = False  # fmt: skip

    def run(self) -> int:
        from powermc.cli.bench import run

        return run(self)


@dataclass(frozen=True, kw_only=True)
class Doctor(Weights):
    """Check this machine, and whether a model can be used.

    Prints versions, threads and the speed of each dtype; with --model the facts of the model, its attach check, and
    whether its layers can be run in two parts for an early exit.
    """

    model: Annotated[str | None, typer.Option(help="Also load this model and check how powermc drives it.")] = None

    def run(self) -> int:
        from powermc.cli.doctor import run

        return run(self.model, self.loader)
