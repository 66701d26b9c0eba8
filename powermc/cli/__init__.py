"""The command line. Everything heavy is imported by the command that needs it, so that `--help` is immediate."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from powermc._version import __version__
from powermc.cli import commands, evaluating, sampling
from powermc.cli.command import add, failed
from powermc.cli.help import PlainGroup

app = typer.Typer(
    name="powermc",
    cls=PlainGroup,
    help="Exact MCMC sampling of whole sequences from a language model's power distribution p(x)^alpha.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"powermc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help(), file=sys.stderr)
        raise typer.Exit(2)


SAMPLING, COMPARING, STORES = "Sampling", "Comparing methods", "Stored runs"
TUNING, MACHINE = "Early exit", "This machine"

add(app, "sample", sampling.Sample, SAMPLING)
add(app, "resume", sampling.Resume, SAMPLING)
add(app, "eval", evaluating.Eval, COMPARING)
add(app, "ablate", evaluating.Ablate, COMPARING)
add(app, "table", evaluating.Table, COMPARING)
add(app, "show", commands.Show, STORES)
add(app, "report", commands.Report, STORES)
add(app, "merge", commands.Merge, STORES)
add(app, "calibrate", commands.Calibrate, TUNING)
add(app, "pilot", commands.Pilot, TUNING)
add(app, "bench", commands.Bench, MACHINE)
add(app, "doctor", commands.Doctor, MACHINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for a closed pipe, 2 for an error, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()  # a closed pipe or a full disk shows here, not when the interpreter ends
        return code
    except OSError as error:  # where powermc opens a file it says what is wrong with it, so this is standard output
        with contextlib.suppress(OSError, io.UnsupportedOperation):  # and the interpreter tries again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if error.errno == errno.EPIPE else failed(f"cannot write the output: {error.strerror or error}")


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="powermc", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except Exception as error:
        # A wrong use of the command line. Typer brings the class along since 0.26, and had it from click before.
        if not hasattr(error, "format_message"):
            raise
        return failed(_usage(error))
    return code if isinstance(code, int) else 0 if code is None else 2


def _usage(error: Exception) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    ctx = getattr(error, "ctx", None)
    return f'{message}; see "{ctx.command_path if ctx else "powermc"} -h"'
