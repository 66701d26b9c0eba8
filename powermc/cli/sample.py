"""`powermc sample`: read prompts, check everything that can be checked, load, run, write, print."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from powermc.cli import demo, jsonl
from powermc.cli.show import console, say, texts
from powermc.errors import ArgumentError
from powermc.power import LanguageModel, power_sample
from powermc.results import Run, shorten
from powermc.settings import Settings

if TYPE_CHECKING:
    from powermc.lm import CausalLM


class Source(NamedTuple):
    """Where the prompts come from; exactly one of them must be given."""

    question: str | None
    file: Path | None
    demo: bool

    def prompts(self) -> list[str]:
        """Raises `ArgumentError` unless there is exactly one source, and it can be read."""
        if (self.question is not None) + (self.file is not None) + self.demo != 1:
            raise ArgumentError(
                'give one of: a question in quotes, --file prompts.jsonl, --demo; see "powermc sample -h"'
            )
        if self.demo:
            return [question.question for question in demo.questions()]
        return read_prompts(self.file) if self.file is not None else [self.question or ""]


def run(
    source: Source,
    model_name: str,
    options: dict[str, Any],
    given: dict[str, Any],
    *,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run the command; returns the exit code. `given` holds the settings the user gave, `options` the loader's."""
    prompts = source.prompts()
    given = {**demo.SETTINGS, **given} if source.demo else given
    settings = Settings(**given)
    settings.check_prompts(prompts)
    if out is not None:
        check_writable(out)
    notes = console(sys.stderr)
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(), warnings.catch_warnings():
        if source.demo and not as_json:
            demo.introduce(console(), model_name, settings)
        model = load(model_name, options, notes, quiet)
        warnings.filterwarnings("ignore", message="prompt .* stopped after", category=RuntimeWarning)
        warnings.showwarning = _one_line
        result = power_sample(model, prompts, **given, progress=not quiet)
    written, second = out is None or _write(result, out), None
    if as_json:
        json.dump(result.to_dict(), stdout, allow_nan=False, default=str)
        stdout.write("\n")
        stdout.flush()  # a closed pipe shows here, not when the interpreter ends
    elif source.demo:
        demo.conclude(console(), result)
        if settings.kernel == "metropolis" and _has_exits(model) and not (result.interrupted or result.errors):
            second = demo.early_exit(console(), cast("CausalLM", model), result, given, quiet=quiet)
    else:
        show(result)
    for (p, c), error in result.errors.items():
        print(f"error: prompt {p}, chain {c} stopped: {error}", file=sys.stderr)
    if not written:
        return 2
    if out is not None and not quiet:
        say(notes, f"the whole run is in {out}")
    if result.interrupted or (second is not None and second.interrupted):
        return 130
    return 2 if result.errors else 0


def _has_exits(model: Any) -> bool:
    return hasattr(model, "engine") and model.decoder.lost is None


def _one_line(message: Warning | str, *where: object, **more: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _write(result: Run, out: Path) -> bool:
    try:
        result.to_json(out)
    except OSError as error:
        print(f"error: cannot write {out}: {error.strerror}", file=sys.stderr)
        return False
    return True


def load(name: str, options: dict[str, Any], notes: Any, quiet: bool) -> LanguageModel:
    """Load the model; say so, and which of the checkpoint's sampling settings are not applied."""
    waiting = contextlib.nullcontext() if quiet or not notes.is_terminal else notes.status(f"loading {name}")
    with waiting:
        from powermc.lm import CausalLM

        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=".* is sampled without a cache", category=RuntimeWarning)
            warnings.showwarning = _one_line
            model = CausalLM.from_pretrained(name, **options)
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
