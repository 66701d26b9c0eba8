"""`powermc pilot`: short chains of every choice of early exit, side by side, and which one pays."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from powermc.cli import demo
from powermc.cli.calibrate import layer_list
from powermc.cli.sample import check_writable, load, read_prompts
from powermc.cli.show import console, say
from powermc.errors import ArgumentError
from powermc.files import write_whole
from powermc.sequences.suffix import check_temperature


def run(
    model_name: str,
    options: dict[str, Any],
    data: Path | None,
    exit: Path | None,
    layers: str | None,
    limit: int,
    settings: dict[str, Any],
    *,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run the command; returns the exit code. Checks what can be checked before the model is loaded."""
    if limit < 1:
        raise ArgumentError(f"limit must be at least 1 prompt, got {limit}")
    prompts = [q.question for q in demo.questions()] if data is None else read_prompts(data)
    wanted, heats = layer_list(layers), temperatures(settings.pop("exit_temperatures"))
    if out is not None:
        check_writable(out)
    from powermc.evaluation.pilot import check, pilot
    from powermc.lm import Lens, cached_lens

    check(**settings)
    lens = None if exit is None else Lens.load(exit)
    notes = console(sys.stderr)
    model: Any = load(model_name, options, notes, quiet)
    lens = cached_lens(model, wanted) if lens is None else lens
    reported = {row.layer: row.kl for row in lens.report}

    def notify(name: str) -> None:
        if not quiet:
            say(notes, f"powermc: running {name}")

    ready = [model.prompt(text) for text in prompts[:limit]]
    for prompt in ready:
        model.check_fits(prompt, settings["max_new_tokens"])
    exits = [lens.exit(model, layer) for layer in wanted or lens.layers]
    found = pilot(
        model,
        exits,
        ready,
        **settings,
        exit_temperatures=heats,
        kl=lambda layer: reported.get(layer, math.nan),
        notify=notify,
    )
    text = json.dumps(found.to_dict(), allow_nan=False, default=str) + "\n"
    if out is not None:
        try:
            write_whole(out, text)
        except OSError as error:
            raise ArgumentError(f"cannot write {out}: {error.strerror}") from error
    if as_json:
        sys.stdout.write(text)
        return 0
    screen = console()
    say(screen, f"{model.name}: {len(ready)} prompts, {settings['chains']} chains of {settings['steps']} steps each\n")
    say(screen, found.table() + "\n")
    say(
        screen,
        "How to read it: exponent is that of the exit in stage 1; corr that of both models' log-ratios over proposals; "
        "KL(p||p~) held out, nats; saved counts proposals never completed to full depth; changed counts accepted moves "
        "that changed the path, and a move is one of these; ESS is rough at so few draws.\n",
    )
    say(screen, found.verdict(), "bold")
    return 0


def temperatures(text: str | None) -> tuple[float | None, ...]:
    """The temperatures of an option such as 0.25,0.5; none is (None,). Raises `ArgumentError` for anything else."""
    if text is None:
        return (None,)
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(
            f"--exit-temperatures must be numbers with commas between, such as 0.25,0.5; got {text!r}"
        ) from error
    for value in values:
        check_temperature(value)
    return tuple(values)
