"""`powermc bench`: what a chain-transition costs on this machine, beside the published algorithm."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from powermc.cli import demo
from powermc.cli.sample import check_writable, load, read_prompts
from powermc.cli.show import console, say
from powermc.errors import ArgumentError
from powermc.files import write_whole

ALPHAS = (1.0, 2.0, 4.0)
"""Of the table of savings."""

TABLES = ("speed", "floor", "savings")

_SAVING_CHAINS = 4


def run(
    model_name: str,
    options: dict[str, Any],
    data: Path | None,
    limit: int,
    settings: dict[str, Any],
    tables: str,
    *,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run the command; returns the exit code. Checks what can be checked before the model is loaded."""
    if limit < 1:
        raise ArgumentError(f"prompts must be at least 1, got {limit}")
    texts = [q.question for q in demo.questions()] if data is None else read_prompts(data)
    listed = {name: numbers(name, settings[name]) for name in ("chains", "horizons")}
    methods = tuple(settings["methods"].split(",")) if settings["methods"] else ()
    wanted = tables.split(",")
    if unknown := sorted(set(wanted) - set(TABLES)):
        raise ArgumentError(f"unknown table {unknown[0]!r}; choose from {', '.join(TABLES)}")
    if out is not None:
        check_writable(out)
    from powermc.evaluation.bench import Plan, bench, fresh

    plan = Plan(**{**settings, **listed, "methods": methods})
    from powermc.evaluation.bench_tables import as_dict, floor_report, heading, savings_report, speed_report
    from powermc.evaluation.floor import floor
    from powermc.evaluation.savings import savings

    notes = console(sys.stderr)

    def notify(text: str) -> None:
        if not quiet:
            say(notes, f"powermc: {text}")

    def show(text: str) -> None:
        if not as_json:
            say(console(), text + "\n")

    model: Any = load(model_name, options, notes, quiet)
    if not hasattr(model, "engine"):
        raise ArgumentError(f"{model_name} is not a Hugging Face model that powermc drives; the bench needs one")
    prompts = [model.prompt(text) for text in texts[:limit]]
    show(heading(model.name, len(prompts), plan))
    parts: dict[str, Any] = {}
    if "speed" in wanted:
        parts["result"] = bench(model, prompts, plan, notify)
        show(speed_report(parts["result"]))
    if "floor" in wanted:
        notify("decode steps against the floor of this machine")
        parts["floor"] = floor(fresh(model, reuse=False, guess=False), prompts[0])
        show(floor_report(parts["floor"]))
    if "savings" in wanted:
        notify(f"savings at alpha {', '.join(f'{alpha:g}' for alpha in ALPHAS)}")
        parts["saved"] = savings(
            partial(_fresh, fresh, model, plan.ignore_eos),
            prompts,
            ALPHAS,
            max_new_tokens=max(plan.horizons),
            block_size=plan.block_size,
            steps=plan.steps,
            chains=min(max(plan.chains), _SAVING_CHAINS),
            seed=plan.seed,
        )
        show(savings_report(parts["saved"]))
    text = json.dumps(as_dict(model.name, len(prompts), plan, **parts), allow_nan=False) + "\n"
    if out is not None:
        try:
            write_whole(out, text)
        except OSError as error:
            raise ArgumentError(f"cannot write {out}: {error.strerror}") from error
    if as_json:
        sys.stdout.write(text)
    return 0


def _fresh(fresh: Callable[..., Any], model: Any, ignore_eos: bool, reuse: bool) -> Any:
    return fresh(model, ignore_eos=ignore_eos, reuse=reuse, guess=False)


def numbers(name: str, text: str) -> Sequence[int]:
    """The numbers of an option such as 1,4,16; none for an empty text. Raises `ArgumentError` for anything else."""
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError as error:
        raise ArgumentError(
            f"--{name} must be whole numbers with commas between, such as 1,4,16; got {text!r}"
        ) from error
