"""The command line. Everything heavy is imported by the command that needs it, so that `--help` is immediate."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from powermc._version import __version__
from powermc.errors import PowermcError

app = typer.Typer(
    name="powermc",
    help="Exact MCMC sampling of whole sequences from a language model's power distribution p(x)^alpha.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option(help="A folder, a .gguf file, a hub id, or 'smollm2'.")]
GgufFile = Annotated[str | None, typer.Option(help="Name of a GGUF file in the model's folder or repository.")]
Dtype = Annotated[str, typer.Option(metavar="float32|float64|bfloat16|float16", help="Of the model's weights.")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda:0.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"powermc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def sample(
    question: Annotated[str | None, typer.Argument(help="The prompt.", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts from a JSONL file: each line a string, or an object with 'prompt' or 'question'."),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Three questions that ship with powermc, small settings, explained.")
    ] = False,
    model: Model = "smollm2",
    gguf_file: GgufFile = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    max_rows: Annotated[int, typer.Option(help="Most rows decoded side by side; more chains take turns.")] = 64,
    alpha: Annotated[float | None, typer.Option(help="Power of the target p(x)^alpha; default 4.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the proposals, not of the target; default min(1, 1/alpha).")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens; default 128.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens an answer grows by; default 32.")] = None,
    steps: Annotated[int | None, typer.Option(help="Kernel steps after each block; default 10.")] = None,
    chains: Annotated[int | None, typer.Option(help="Independent chains per prompt; default 4.")] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="sequence|block",
            help="'sequence' (default) cuts anywhere; 'block' freezes earlier blocks: each block is then exact given "
            "its prefix, which is not p(x)^alpha of the whole answer.",
        ),
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option(
            metavar="length|horizon|block|entropy",
            help="Where steps cut: uniformly over the answer (length, the default), the horizon or the last block "
            "(which implies --scope block), or where the model is uncertain (entropy).",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answers; default 0.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="STR", help="End an answer where this text appears; may be repeated.")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Apply the chat template; default: if there is one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the whole run to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the run as JSON, and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on standard error.")] = False,
) -> None:
    """Sample answers to a question from p(x)^alpha.

    Give a QUESTION, --file or --demo. Ctrl-C ends the run and prints what has been drawn (exit code 130). An error is
    one line on standard error (exit code 2); where single chains fail, the others are kept and printed.
    """
    from powermc.cli.sample import Source, run

    given = {
        "alpha": alpha,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "block_size": block_size,
        "steps": steps,
        "chains": chains,
        "scope": scope,
        "cut": cut,
        "seed": seed,
        "stop": stop or None,
        "chat": chat,
    }
    options = {"gguf_file": gguf_file, "dtype": dtype, "device": device, "max_rows": max_rows}
    source = Source(question, file, demo)
    settings = {name: value for name, value in given.items() if value is not None}
    raise typer.Exit(_guard(lambda: run(source, model, options, settings, out=out, as_json=json, quiet=quiet)))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Also load this model and check how powermc drives it.")] = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Check this machine, and whether a model can be used.

    Prints versions, threads and the speed of each dtype; with --model the facts of the model and its attach check.
    """
    from powermc.cli.doctor import run

    raise typer.Exit(_guard(lambda: run(model, {"gguf_file": gguf_file, "dtype": dtype, "device": device})))


def _guard(command: Callable[[], int]) -> int:
    """Run a command; an error made on purpose becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        return command()
    except PowermcError as error:
        from powermc.cli.show import visible

        print(f"error: {visible(str(error)).strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was drawn", file=sys.stderr)
        return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for an error, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="powermc")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    return 0
