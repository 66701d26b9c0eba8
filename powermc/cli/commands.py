"""The other commands and their options. What they do is in modules of their own, imported when they run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from powermc import config
from powermc.cli.command import Command
from powermc.cli.options import (
    EXIT,
    OUTPUT,
    TARGET,
    Alpha,
    Guessing,
    Lens,
    Loading,
    PromptFile,
    Quiet,
    Rows,
    Seed,
    StoreFile,
    Weights,
    Written,
)
from powermc.errors import ArgumentError


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
            "--out",
            "-o",
            help="Write the lens to this file; default: the cache, by fingerprint of the model.",
            rich_help_panel=OUTPUT,
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
class Pilot(Loading, Rows, Written):
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
class Bench(Loading, Rows, Guessing, Written):
    """Measure the cost of a step beside the published algorithm.

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


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """Show the run in a store, finished or not.

    Prints what 'sample' prints, and how far it is; also while it is being written.
    """

    file: StoreFile
    follow: Annotated[
        bool, typer.Option("--follow", help="Print a line whenever the run has gone on, until it is over.")
    ] = False
    settings: Annotated[
        bool, typer.Option("--settings", help="Print the run's settings as TOML that repeats it: 'sample --config'.")
    ] = False
    json: Annotated[bool, typer.Option("--json", help="Print the run as JSON, and nothing else.")] = False

    INTERRUPTED: ClassVar[str] = "interrupted"

    def run(self) -> int:
        from powermc.cli.store import show

        if self.follow + self.settings + self.json > 1:
            raise ArgumentError("give one of --follow, --settings and --json; each prints something else")
        return show(self.file, follow=self.follow, config=self.settings, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Merge(Command):
    """Join stores of one run that several workers wrote.

    Chains and prompts are put side by side. Where two stores have the same step, they must have the same in it.
    """

    files: Annotated[list[Path], typer.Argument(help="Stores, two or more.", metavar="run.db")]
    out: Annotated[Path, typer.Option("--out", "-o", metavar="all.db", help="Write the joined store to this file.")]

    INTERRUPTED: ClassVar[str] = "interrupted; nothing was joined"

    def run(self) -> int:
        from powermc.cli.store import merge

        return merge(self.files, self.out)


@dataclass(frozen=True, kw_only=True)
class Report(Quiet):
    """Write the run in a store as one HTML file.

    Everything is in the file: no network is needed to look at it.
    """

    file: StoreFile
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="run.html", help="Write to this file; default: beside the store."),
    ] = None
    open: Annotated[bool, typer.Option("--open", help="Open it in a browser when it is written.")] = False

    INTERRUPTED: ClassVar[str] = "interrupted; nothing was written"

    def run(self) -> int:
        from powermc.cli.report import report

        out = self.file.with_suffix(".html") if self.out is None else self.out
        return report(self.file, out=out, open_browser=self.open, quiet=self.quiet)
