"""`powermc pilot`: short chains of every choice of early exit, side by side, and which one pays."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

from powermc.cli import demo
from powermc.cli.calibrate import layer_list
from powermc.cli.sample import check_writable, load, read_prompts, written
from powermc.cli.show import console, say
from powermc.errors import ArgumentError
from powermc.progress import Parts
from powermc.sequences.suffix import check_temperature

if TYPE_CHECKING:
    from powermc.cli.commands import Pilot

_SETTINGS = ("alpha", "temperature", "max_new_tokens", "steps", "chains", "plain", "eta", "delta", "seed")


def run(chosen: Pilot) -> int:
    """Run the command; returns the exit code. Checks what can be checked before the model is loaded."""
    if chosen.limit < 1:
        raise ArgumentError(f"limit must be at least 1 prompt, got {chosen.limit}")
    prompts = [q.question for q in demo.asked(chosen.model)] if chosen.data is None else read_prompts(chosen.data)
    wanted, heats = layer_list(chosen.layers), temperatures(chosen.exit_temperatures)
    if chosen.out is not None:
        check_writable(chosen.out)
    from powermc.evaluation.pilot import check, pilot
    from powermc.lm import Lens, cached_lens

    proposals = tuple(chosen.proposals.split(","))
    settings: dict[str, Any] = {name: getattr(chosen, name) for name in _SETTINGS} | {"proposals": proposals}
    check(**settings)
    lens = None if chosen.exit is None else Lens.load(chosen.exit)
    notes = console(sys.stderr)
    model: Any = load(chosen.model, chosen.loader, notes, chosen.quiet)
    if lens is None:
        with Parts(quiet=chosen.quiet) as display:
            lens = cached_lens(model, wanted, progress=display.report)
    reported = {row.layer: row.kl for row in lens.report}
    ready = [model.prompt(text) for text in prompts[: chosen.limit]]
    for prompt in ready:
        model.check_fits(prompt, settings["max_new_tokens"])
    exits = [lens.exit(model, layer) for layer in wanted or lens.layers]
    total = 1 + len(exits) * sum(len(heats) if proposal != "full" else 1 for proposal in proposals)
    ledger = model.ledger
    steps, tokens = len(ready) * chosen.chains * chosen.steps, lambda: ledger.decoded + ledger.prefilled
    with Parts(total, steps=steps, tokens=tokens, quiet=chosen.quiet) as display:
        found = pilot(
            model,
            exits,
            ready,
            **settings,
            exit_temperatures=heats,
            kl=lambda layer: reported.get(layer, math.nan),
            notify=lambda name: display.begin(f"running {name}"),
            watch=display.step,
        )
    text = json.dumps(found.to_dict(), allow_nan=False, default=str) + "\n"
    if chosen.out is not None:
        written(chosen.out, text)
    if chosen.json:
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
