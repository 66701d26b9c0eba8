"""`powermc eval`, `ablate` and `table`, and their options. What they do is in `powermc.cli.eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from powermc import config
from powermc.cli.command import Command
from powermc.cli.options import OUTPUT, TARGET, Alpha, Json, Loading, Rows

TASK, WORKERS = "Questions", "Workers"
"""Headings of the help."""

Reference = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", help="The method that the others are compared with; default: the first.", rich_help_panel=OUTPUT
    ),
]
PassAt = Annotated[
    str | None,
    typer.Option(
        metavar="1,5", rich_help_panel=OUTPUT,
        help="Show the probability that one of k samples is right, for these k; at most --samples.",
    ),
    config.COMMAS,
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Comparing(Loading, Rows, Json):
    """Options of the commands that run a comparison."""

    task: Annotated[str, typer.Argument(help="Which questions, such as gsm8k.", show_default=False)]
    data: Annotated[
        Path | None,
        typer.Option(
            help="The task's file (.jsonl, .json or .csv, maybe with .gz); default: the hub's, or generated.",
            rich_help_panel=TASK,
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(help="Use the first so many questions; more may be added.", rich_help_panel=TASK)
    ] = None
    style: Annotated[
        str | None,
        typer.Option(
            metavar="chat|plain",
            help="How prompts are written; default: chat if the model has a chat template.",
            rich_help_panel=TASK,
        ),
    ] = None
    shots: Annotated[int, typer.Option(help="Worked examples before every question.", rich_help_panel=TASK)] = 0
    shots_data: Annotated[
        Path | None, typer.Option(help="The task's file that the examples are taken from.", rich_help_panel=TASK)
    ] = None
    data_seed: Annotated[
        int, typer.Option(help="Of generated questions, and of the choice of examples.", rich_help_panel=TASK)
    ] = 0
    samples: Annotated[
        int,
        typer.Option(help="Answers of each method to each question; more may be added.", rich_help_panel=TARGET),
    ] = 1
    alpha: Alpha = 4.0
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=TARGET)] = 256
    seed: Annotated[int, typer.Option(help="The same seed draws the same answers.", rich_help_panel=TARGET)] = 0
    group: Annotated[
        int,
        typer.Option(
            help="Questions answered side by side and committed together; changes costs, no answer.",
            rich_help_panel=WORKERS,
        ),
    ] = 8
    executor: Annotated[
        str | None,
        typer.Option(
            metavar="none|process|ray",
            help="Where to work: here, in processes, on a Ray cluster; default: process if there are --workers.",
            rich_help_panel=WORKERS,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(help="How many, each with the model loaded once; default 2.", rich_help_panel=WORKERS),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray cluster: host:port, auto, or local for one on this machine; default auto.",
            rich_help_panel=WORKERS,
        ),
    ] = None
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The folder of the comparison; made, or gone on with.", rich_help_panel=OUTPUT
        ),
    ] = Path("results")
    pass_at: PassAt = None
    reference: Reference = None

    INTERRUPTED: ClassVar[str] = "interrupted; what was committed is kept"


@dataclass(frozen=True, kw_only=True)
class Eval(Comparing):
    """Compare methods on a task: accuracy, costs, intervals.

    Every method gets the same prompts, horizon and stop strings, and is charged by the same ledger. What is finished is
    committed to the folder and never run again: the same command goes on, with more questions, samples or methods too.
    """

    methods: Annotated[
        str,
        typer.Option(
            metavar="SPECS",
            help="Methods with commas between, each with its options: greedy,power:steps=4:alpha=2.",
        ),
        config.COMMAS,
    ] = "greedy,temperature,low-temperature,power"

    def run(self) -> int:
        from powermc.cli.eval import evaluate

        return evaluate(self)


@dataclass(frozen=True, kw_only=True)
class Ablate(Comparing):
    """Vary the options of a method, and compare the variants.

    One option at a time, the others as in --method; with --grid all combinations. It is a comparison like that of
    'eval', in the same kind of folder.
    """

    method: Annotated[str, typer.Option(metavar="SPEC", help="The method, with the options that stay.")] = "power"
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=A,B,C", help="An option and its values, alpha among them; may be repeated."),
    ] = None
    grid: Annotated[bool, typer.Option("--grid", help="All combinations of the values.")] = False

    def run(self) -> int:
        from powermc.cli.eval import ablate

        return ablate(self)


@dataclass(frozen=True, kw_only=True)
class Table(Command):
    """Make the tables of a comparison again, from its folder alone; also while it runs.

    Writes table.md, index.html, results.json and accuracy-cost.png into the folder, and prints the first.
    """

    folder: Annotated[Path, typer.Argument(help="The folder that 'eval --out' was given.", metavar="results/")]
    pass_at: PassAt = None
    reference: Reference = None
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")] = False

    INTERRUPTED: ClassVar[str] = "interrupted"

    def run(self) -> int:
        from powermc.cli.eval import table

        return table(self)
