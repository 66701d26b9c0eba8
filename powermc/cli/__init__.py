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
Speculate = Annotated[
    int, typer.Option(help="Tokens guessed from earlier text and run in one pass, where few rows decode; 0: none.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="4GB", help="What the process may hold: as many rows as fit; default: what the machine has available."
    ),
]


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
    memory: Memory = None,
    reuse: Annotated[
        bool, typer.Option("--reuse/--no-reuse", help="Never run again what has been run of the same tokens.")
    ] = True,
    speculate: Speculate = 0,
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
    kernel: Annotated[
        str | None,
        typer.Option(
            metavar="metropolis|early-exit|auto",
            help="Plain Metropolis-Hastings; proposals drawn and screened by an early exit; or what a pilot finds "
            "cheaper. All sample the same target. Default: early-exit if --exit is given.",
        ),
    ] = None,
    exit: Annotated[
        Path | None, typer.Option(help="A lens made by 'powermc calibrate'; default: the model's cached one.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Which exit of the lens; default: its deepest.")] = None,
    proposal: Annotated[
        str | None,
        typer.Option(
            metavar="exit|substitution|full",
            help="Tails drawn by the exit (default); a few tokens redrawn by it; or tails drawn at full depth and "
            "screened all the same, for comparison.",
        ),
    ] = None,
    screen: Annotated[
        float | None, typer.Option(help="Exponent of the exit in the first stage; default: alpha, or fitted.")
    ] = None,
    exit_temperature: Annotated[
        float | None, typer.Option(help="Of what the exit draws; default: that of the proposals.")
    ] = None,
    plain: Annotated[float | None, typer.Option(help="Share of plain full-depth steps mixed in; default 0.1.")] = None,
    eta: Annotated[
        float | None, typer.Option(help="Gate: tails with an entropy over this (nats) skip the screen.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Gate: tails with a top-two margin under this skip the screen.")
    ] = None,
    gated: Annotated[
        float | None, typer.Option(help="Gate: fit --eta so that about this share of tails skips the screen.")
    ] = None,
    aggregate: Annotated[
        str | None, typer.Option(metavar="max|mean", help="Gate on a tail's worst token (default) or its mean.")
    ] = None,
    early_rejection: Annotated[
        bool | None,
        typer.Option(
            "--early-rejection/--no-early-rejection",
            help="Abandon drafts that are sure to be rejected: the same draws for fewer tokens; default: on.",
        ),
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
        "kernel": kernel,
        "exit": exit,
        "layer": layer,
        "proposal": proposal,
        "screen": screen,
        "exit_temperature": exit_temperature,
        "plain": plain,
        "eta": eta,
        "delta": delta,
        "gated": gated,
        "aggregate": aggregate,
        "early_rejection": early_rejection,
    }
    options = {"gguf_file": gguf_file, "dtype": dtype, "device": device, "max_rows": max_rows, "memory": memory}
    options |= {"reuse": reuse, "speculate": speculate}
    source = Source(question, file, demo)
    settings = {name: value for name, value in given.items() if value is not None}
    raise typer.Exit(_guard(lambda: run(source, model, options, settings, out=out, as_json=json, quiet=quiet)))


@app.command()
def calibrate(
    model: Model = "smollm2",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Texts from a JSONL file: each line a string, or an object with 'text', 'question' (and 'answer') or "
            "'prompt' (and 'completion'). Default: samples of the model itself on prompts that ship with powermc.",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="12,16,20", help="Exit after these layers; default four in the upper half.")
    ] = None,
    head: Annotated[
        str,
        typer.Option(
            metavar="lens|temperature|ridge|kl",
            help="The final norm and head as they are, with a temperature, with an affine map before them, or with one "
            "refined by gradient steps on KL.",
        ),
    ] = "ridge",
    held_out: Annotated[
        Path | None, typer.Option(help="Report on the texts of this file; default: the last tenth of the data.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Use about this many tokens of the data; default all, or 20000 of its own.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Report the overlap of draws at temperature 1/alpha.")] = 4.0,
    out: Annotated[
        Path | None, typer.Option(help="Write the lens to this file; default: the cache, by fingerprint of the model.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot KL and overlap by layer to this file (.png, .svg).")] = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on standard error.")] = False,
) -> None:
    """Fit exit heads that read p(next token) off the middle layers.

    Prints how close each comes to the full model on text that it was not fitted to, and writes a lens file for
    early-exit sampling with this model.
    """
    from powermc.cli.calibrate import run

    options = {"gguf_file": gguf_file, "dtype": dtype, "device": device}
    settings = {"layers": layers, "head": head, "tokens": tokens, "alpha": alpha}
    files = {"data": data, "held_out": held_out, "out": out, "plot": plot}
    raise typer.Exit(_guard(lambda: run(model, options, **files, **settings, quiet=quiet)))  # type: ignore[arg-type]


@app.command()
def pilot(
    model: Model = "smollm2",
    data: Annotated[
        Path | None, typer.Option(help="Prompts, JSONL as for 'sample --file'; default: those that ship with powermc.")
    ] = None,
    exit: Annotated[
        Path | None, typer.Option(help="A lens made by 'powermc calibrate'; default: the model's cached one.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Which exits, such as 20,24; default: all of the lens.")] = None,
    proposals: Annotated[
        str, typer.Option(help="Which proposals to try at every exit, with commas between.")
    ] = "exit,substitution,full",
    limit: Annotated[int, typer.Option(help="Use the first so many prompts.")] = 20,
    gguf_file: GgufFile = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    max_rows: Annotated[int, typer.Option(help="Most rows decoded side by side.")] = 64,
    memory: Memory = None,
    alpha: Annotated[float, typer.Option(help="Power of the target p(x)^alpha.")] = 4.0,
    temperature: Annotated[float | None, typer.Option(help="Of the proposals; default min(1, 1/alpha).")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps of each chain, at least 4.")] = 8,
    chains: Annotated[int, typer.Option(help="Chains per prompt.")] = 2,
    plain: Annotated[float, typer.Option(help="Share of plain full-depth steps mixed in.")] = 0.1,
    exit_temperatures: Annotated[
        str | None, typer.Option(help="Of what the exits draw, such as 0.25,0.5; default: that of the proposals.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Gate on the exit's entropy, nats.")] = None,
    delta: Annotated[float | None, typer.Option(help="Gate on the exit's top-two margin.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same chains.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Find out which early exit pays on a model, if any.

    Runs short chains of plain Metropolis-Hastings and of every exit with every proposal from the same starts, and
    prints what each did and cost, per step, per accepted move that changed the path and per effective sample of log p.
    """
    from powermc.cli.pilot import run

    options = {"gguf_file": gguf_file, "dtype": dtype, "device": device, "max_rows": max_rows, "memory": memory}
    settings = {
        "alpha": alpha,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "steps": steps,
        "chains": chains,
        "plain": plain,
        "proposals": tuple(proposals.split(",")),
        "exit_temperatures": exit_temperatures,
        "eta": eta,
        "delta": delta,
        "seed": seed,
    }
    raise typer.Exit(
        _guard(lambda: run(model, options, data, exit, layers, limit, settings, out=out, as_json=json, quiet=quiet))
    )


@app.command()
def bench(
    model: Model = "smollm2",
    data: Annotated[
        Path | None, typer.Option(help="Prompts, JSONL as for 'sample --file'; default: those that ship with powermc.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Use the first so many prompts.")] = 1,
    methods: Annotated[
        str, typer.Option(help="Which to run, with commas between.")
    ] = "published,published-batched,powermc",
    chains: Annotated[str, typer.Option(metavar="1,4,16", help="Numbers of chains.")] = "1,4,16",
    horizons: Annotated[str, typer.Option(metavar="64,128,256", help="Longest answers T, in tokens.")] = "64",
    steps: Annotated[int, typer.Option(help="Kernel steps N after each block.")] = 2,
    block_size: Annotated[int, typer.Option(help="Tokens B an answer grows by.")] = 32,
    alpha: Annotated[float, typer.Option(help="Power of the target p(x)^alpha.")] = 4.0,
    seed: Annotated[int, typer.Option(help="The same seed does the same work.")] = 0,
    tables: Annotated[
        str, typer.Option(help="What to measure: speed, floor and savings, with commas between.")
    ] = "speed,floor,savings",
    repeats: Annotated[int, typer.Option(help="Do everything so often; the least time counts.")] = 2,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="End tokens end nothing: all answers have T tokens, and all methods the same law."
        ),
    ] = False,
    gguf_file: GgufFile = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    max_rows: Annotated[int, typer.Option(help="Most rows decoded side by side.")] = 64,
    memory: Memory = None,
    speculate: Speculate = 0,
    out: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")] = False,
) -> None:
    """Measure what a chain-transition costs on this machine, beside the published algorithm.

    Runs the published power sampler (Karan & Du 2025), the same batched over chains, and powermc on the same prompts,
    in turns; then decode steps against what the machine's bandwidth and arithmetic allow, and how many proposed tokens
    are never run. Prints Markdown tables.
    """
    from powermc.cli.bench import run

    options = {"gguf_file": gguf_file, "dtype": dtype, "device": device, "max_rows": max_rows, "memory": memory}
    options |= {"speculate": speculate}
    settings = {
        "methods": methods,
        "chains": chains,
        "horizons": horizons,
        "steps": steps,
        "block_size": block_size,
        "alpha": alpha,
        "seed": seed,
        "repeats": repeats,
        "ignore_eos": ignore_eos,
    }
    raise typer.Exit(
        _guard(lambda: run(model, options, data, prompts, settings, tables, out=out, as_json=json, quiet=quiet))
    )


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Also load this model and check how powermc drives it.")] = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Check this machine, and whether a model can be used.

    Prints versions, threads and the speed of each dtype; with --model the facts of the model, its attach check, and
    whether its layers can be run in two parts for an early exit.
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
