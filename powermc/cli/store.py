"""`powermc resume`, `show` and `merge`: going on with stores, looking into them, joining them."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from powermc import config as toml
from powermc.cli import samples
from powermc.cli.sample import load as load_model
from powermc.cli.sample import show as show_run
from powermc.cli.show import console, say
from powermc.errors import ArgumentError
from powermc.results import Run, jsonable
from powermc.store import SAMPLES, Facts, about, kind, load_run
from powermc.store import merge as merge_stores
from powermc.store import resume as go_on
from powermc.store.opening import header_of, settings_of
from powermc.visible import visible

POLL = 1.0
"""Seconds between two looks at a store that is followed."""


def resume(
    file: Path,
    *,
    model: str | None,
    draws: int | None,
    chains: int | None,
    options: dict[str, Any],
    quiet: bool,
    as_json: bool,
    exit: Path | None = None,
) -> int:
    """Go on with a run, and print it; returns the exit code.

    `options` are those of `CausalLM.from_pretrained`; a `dtype` of None is the one that the run was drawn in.
    """
    header, notes = header_of(file), console(sys.stderr)
    settings_of(header, file, exit=exit)  # what only Python can give is asked for before the model is loaded
    options = {**options, "dtype": options.get("dtype") or header.dtype or "float32"}
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(), warnings.catch_warnings():
        loaded = load_model(header.model if model is None else model, options, notes, quiet)
        warnings.filterwarnings("ignore", message="prompt .* stopped after", category=RuntimeWarning)
        warnings.showwarning = _one_line
        result = go_on(file, loaded, draws=draws, chains=chains, exit=exit, progress=not quiet)
    if as_json:
        _print_json(result, stdout)
    else:
        show_run(result)
        if not quiet:
            say(notes, _size(about(file), file))
    for (p, c), error in result.errors.items():
        print(f"error: prompt {p}, chain {c} stopped: {visible(str(error))}", file=sys.stderr)
    return 130 if result.interrupted else 2 if result.errors else 0


def show(file: Path, *, follow: bool, config: bool, as_json: bool) -> int:
    """Print what a store holds, and where it is; returns the exit code.

    `follow`: a line whenever it has grown, until its run is over. `config`: the settings as TOML that repeats the run.
    """
    if follow + config + as_json > 1:
        raise ArgumentError("give one of --follow, --config and --json; each prints something else")
    if follow:
        return _follow(file)
    if kind(file) == SAMPLES:
        return samples.show(file, config=config, as_json=as_json)
    if config:
        return _config(file)
    run = load_run(file)
    if as_json:
        _print_json(run, sys.stdout)
        return 0
    show_run(run)
    facts, screen = about(file), console()
    say(screen, _size(facts, file))
    for session in facts.header.sessions:
        versions = ", ".join(f"{name} {version}" for name, version in session.items() if name != "begun" and version)
        say(screen, f"session of {session['begun']}: {versions}")
    if not facts.done:
        say(screen, "it is being written" if facts.written else _go_on(file))
    return 0


def merge(files: Sequence[Path], out: Path) -> int:
    """Join stores of several workers, and say what came of it; returns the exit code."""
    merge_stores(files, out)
    facts, screen = about(out), console()
    many = "s" if facts.prompts != 1 else ""
    say(screen, f"{len(files)} stores joined: {facts.prompts} prompt{many}, {facts.chains} chains of each")
    say(screen, _size(facts, out))
    if not facts.done:
        say(screen, _go_on(out))
    return 0


def _follow(file: Path) -> int:
    shown, ours = None, kind(file) != SAMPLES
    while True:
        facts, line = _progress(file) if ours else samples.progress(file)
        if line != shown:
            print(line, flush=True)
            shown = line
        if facts.done:
            return 0
        if not facts.written:
            print(visible(_go_on(file) if ours else samples.GO_ON), file=sys.stderr)
            return 0
        time.sleep(POLL)


def _progress(file: Path) -> tuple[Facts, str]:
    facts = about(file)
    share = f"  accepted {facts.accepted / facts.steps:.0%}" if facts.steps else ""
    failed = f"  {facts.failed} failed" if facts.failed else ""
    return facts, (
        f"{facts.steps:,}/{facts.planned:,} steps{share}  {facts.draws:,} draws  {facts.tokens:,} tokens  "
        f"{facts.seconds:,.0f} s{failed}"
    )


def _size(facts: Facts, file: Path) -> str:
    each = f", {facts.bytes_per_draw:,.0f} bytes per step" if facts.steps else ""
    steps = f"{facts.steps:,} of {facts.planned:,} steps, {facts.draws:,} of them draws"
    return f"{file}: {steps}; {_bytes(facts.bytes)}{each}"


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def _go_on(file: Path) -> str:
    return f"nobody is writing it, and something is left to be drawn; go on with: powermc resume {file}"


def _config(file: Path) -> int:
    header = header_of(file)
    run = load_run(file)
    settings = {**header.settings, "thin": header.thin if header.thin > 1 else None}
    settings["first_chain"] = header.first_chain or None
    options = {} if header.dtype is None else {"dtype": header.dtype}
    sys.stdout.write(toml.from_settings(settings, header.model, options, [prompt.text for prompt in run.prompts]))
    return 0


def _print_json(run: Run, stream: Any) -> None:
    json.dump(jsonable(run.to_dict()), stream, allow_nan=False, default=str)
    stream.write("\n")
    stream.flush()


def _one_line(message: Warning | str, *where: object, **more: object) -> None:
    print(f"warning: {visible(str(message))}", file=sys.stderr)
