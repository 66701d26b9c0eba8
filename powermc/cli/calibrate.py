"""`powermc calibrate`: fit exit heads to a model, say how good they are, write them to a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powermc import jsonl, plots
from powermc.cli.sample import check_writable, load
from powermc.cli.show import console, say
from powermc.errors import ArgumentError
from powermc.progress import Parts

if TYPE_CHECKING:
    from powermc.cli.commands import Calibrate
    from powermc.lm.lens import Lens

_log = logging.getLogger(__name__)


def run(chosen: Calibrate) -> int:
    """Run the command; returns the exit code. Checks what can be checked before the model is loaded."""
    wanted = layer_list(chosen.layers)
    texts, others = (None if path is None else read_texts(path) for path in (chosen.data, chosen.held_out))
    for path in (chosen.out, chosen.plot):
        if path is not None:
            check_writable(path)
    if chosen.plot is not None:
        plots.matplotlib()  # before the work: it may be missing
    from powermc.lm.calibration import cache_path, calibrate, check_settings

    check_settings(chosen.head, chosen.tokens, chosen.alpha)
    notes = console(sys.stderr)
    model: Any = load(chosen.model, chosen.loader, notes, chosen.quiet)
    ledger = model.ledger
    with Parts(tokens=lambda: ledger.decoded + ledger.prefilled, quiet=chosen.quiet) as display:
        lens = calibrate(
            model,
            texts,
            layers=wanted,
            head=chosen.head,
            held_out=others,
            tokens=chosen.tokens,
            alpha=chosen.alpha,
            progress=display.report,
        )
    out = chosen.out
    if out is None:
        out = cache_path(model, chosen.head)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(f"cannot write {out}: {error.strerror}; name another file with --out") from error
    lens.save(out)
    _log.info("lens written to %s", out)
    if chosen.plot is not None:
        plots.save(plots.kl_by_layer(lens), chosen.plot)
    show(lens)
    if not chosen.quiet:
        say(notes, f"the lens is in {out}")
    return 0


def show(lens: Lens) -> None:
    """Print the report and what it cost."""
    screen, origin = console(), lens.origin
    say(
        screen,
        f"exit heads of {origin.model}, {origin.depth} layers: fitted on {origin.fit_tokens:,} tokens, chosen on "
        f"{origin.validation_tokens:,}, reported on {lens.report[0].tokens:,} others",
    )
    say(screen, "\n" + lens.table() + "\n")
    say(
        screen,
        "How to read it: KL and entropies H are nats per token, p the full model and p~ the exit; KL is 0 and top-1 "
        f"and 1-TV (the share of draws at temperature {1 / origin.alpha:g} that the two have in common) are 1 where "
        "the exit says what the model says.",
    )
    memory = "" if origin.peak_bytes is None else f", peak memory {origin.peak_bytes / 1e9:.2f} GB"
    if origin.grown_bytes is not None:
        memory += f", which it raised by {origin.grown_bytes / 1e9:.2f} GB"
    say(screen, f"calibration took {origin.seconds:.1f} s{memory}")


def layer_list(text: str | None) -> list[int] | None:
    """The layers of an option such as 12,16,20; None for none. Raises `ArgumentError` for anything else."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        wanted = "whole numbers with commas between, such as 12,16,20"
        raise ArgumentError(f"--layers must be {wanted}; got {text!r}") from error


def read_texts(path: Path) -> list[str]:
    """The texts of a JSONL file. Raises `ArgumentError` that names the file and the line.

    A line is a string, or an object with "text", or "question" and "answer" (joined by a newline; the answer may be
    missing), or "prompt" and "completion" (joined as they are; the completion may be missing).
    """
    return [_text(value, where) for where, value in jsonl.read(path, "text")]


_FORMS = (("text", "", ""), ("question", "\n", "answer"), ("prompt", "", "completion"))


def _text(value: Any, where: str) -> str:
    parts: Sequence[Any] = [value]
    joint = ""
    if isinstance(value, dict):
        form = next((form for form in _FORMS if form[0] in value), None)
        if form is None:
            raise ArgumentError(f"{where}: the object has none of 'text', 'question' and 'prompt'")
        first, joint, second = form
        parts = [value[key] for key in (first, second) if key in value]
    for part in parts:
        if not isinstance(part, str):
            raise ArgumentError(f"{where}: the text must be a string, got {type(part).__name__}")
    text = joint.join(parts)
    if not text.strip():
        raise ArgumentError(f"{where}: the text is empty")
    return text
