"""Options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from powermc.cli.command import Command
from powermc.models import default_model

MODEL, TARGET, EXIT, STORE, OUTPUT = "Model", "Target and chains", "Early exit", "Store", "Output"
"""Headings of the help; `powermc.cli.help` has their order."""

DTYPES = "float32|float64|bfloat16|float16"

Model = Annotated[
    str,
    typer.Option(help="A folder, a .gguf file, a hub id, 'smollm2' or 'tiny-reasoner'.", rich_help_panel=MODEL),
]
PromptFile = Annotated[
    Path | None, typer.Option(help="Prompts, JSONL as for 'sample --file'; default: those that ship with powermc.")
]
Lens = Annotated[
    Path | None,
    typer.Option(
        help="A lens made by 'powermc calibrate'; default: the model's cached one.", rich_help_panel=EXIT
    ),
]  # fmt: skip
StoreFile = Annotated[Path, typer.Argument(help="A store that 'sample --store' wrote.", metavar="run.db")]
Alpha = Annotated[float, typer.Option(help="Power of the target p(x)^alpha.", rich_help_panel=TARGET)]
Seed = Annotated[int, typer.Option(help="The same seed draws the same chains.", rich_help_panel=TARGET)]


@dataclass(frozen=True, kw_only=True)
class Loader(Command):
    """How a model is loaded; those below add to `loader`."""

    gguf_file: Annotated[
        str | None,
        typer.Option(help="Name of a GGUF file in the model's folder or repository.", rich_help_panel=MODEL),
    ] = None
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda:0.", rich_help_panel=MODEL)] = (
        "cpu"
    )

    @property
    def loader(self) -> dict[str, Any]:
        """What `CausalLM.from_pretrained` is given beside the name."""
        return {"gguf_file": self.gguf_file, "device": self.device}


@dataclass(frozen=True, kw_only=True)
class Weights(Loader):
    dtype: Annotated[str, typer.Option(metavar=DTYPES, help="Of the model's weights.", rich_help_panel=MODEL)] = (
        "float32"
    )

    @property
    def loader(self) -> dict[str, Any]:
        return {**super().loader, "dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class Loading(Weights):
    model: Model = default_model()


@dataclass(frozen=True, kw_only=True)
class Rows(Loader):
    max_rows: Annotated[
        int, typer.Option(help="Most rows decoded side by side; more chains take turns.", rich_help_panel=MODEL)
    ] = 64
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="4GB", rich_help_panel=MODEL,
            help="What the process may hold: as many rows as fit; default: what the machine has available.",
        ),
    ] = None  # fmt: skip
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled/--no-compiled",
            help="Run passes of few rows in compiled code, where model and device allow it.",
            rich_help_panel=MODEL,
        ),
    ] = True

    @property
    def loader(self) -> dict[str, Any]:
        return {**super().loader, "max_rows": self.max_rows, "memory": self.memory, "compiled": self.compiled}


@dataclass(frozen=True, kw_only=True)
class Guessing(Loader):
    speculate: Annotated[
        int,
        typer.Option(
            help="Tokens guessed from earlier text and run in one pass, where few rows decode; 0: none.",
            rich_help_panel=MODEL,
        ),
    ] = 0  # fmt: skip

    @property
    def loader(self) -> dict[str, Any]:
        return {**super().loader, "speculate": self.speculate}


@dataclass(frozen=True, kw_only=True)
class Reusing(Loader):
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse/--no-reuse", help="Never run again what has been run of the same tokens.", rich_help_panel=MODEL
        ),
    ] = True

    @property
    def loader(self) -> dict[str, Any]:
        return {**super().loader, "reuse": self.reuse}


@dataclass(frozen=True, kw_only=True)
class Quiet(Command):
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no notes on standard error.", rich_help_panel=OUTPUT)
    ] = False


@dataclass(frozen=True, kw_only=True)
class Json(Quiet):
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else.", rich_help_panel=OUTPUT)
    ] = False


@dataclass(frozen=True, kw_only=True)
class Written(Json):
    """A result that may also be written to a file."""

    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the whole result to this JSON file.", rich_help_panel=OUTPUT),
    ] = None
