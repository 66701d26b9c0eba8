"""`powermc bench`: what a chain-transition costs on this machine, beside the published algorithm."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from powermc.cli import demo
from powermc.cli.sample import check_writable, load, read_prompts, written
from powermc.cli.show import console, say
from powermc.errors import ArgumentError
from powermc.progress import Parts

if TYPE_CHECKING:
    from powermc.cli.commands import Bench
    from powermc.evaluation.bench import Plan

ALPHAS = (1.0, 2.0, 4.0)
"""Of the table of savings."""

TABLES = ("speed", "floor", "savings")

_SAVING_CHAINS = 4
_SETTINGS = ("steps", "block_size", "alpha", "seed", "repeats", "ignore_eos")


def run(chosen: Bench) -> int:
    """Run the command; returns the exit code. Checks what can be checked before the model is loaded."""
    if chosen.prompts < 1:
        raise ArgumentError(f"prompts must be at least 1, got {chosen.prompts}")
    texts = [q.question for q in demo.asked(chosen.model)] if chosen.data is None else read_prompts(chosen.data)
    listed: dict[str, Any] = {name: numbers(name, getattr(chosen, name)) for name in ("chains", "horizons")}
    methods = tuple(chosen.methods.split(",")) if chosen.methods else ()
    wanted = chosen.tables.split(",")
    if unknown := sorted(set(wanted) - set(TABLES)):
        raise ArgumentError(f"unknown table {unknown[0]!r}; choose from {', '.join(TABLES)}")
    if chosen.out is not None:
        check_writable(chosen.out)
    from powermc.evaluation.bench import Plan
    from powermc.evaluation.bench_tables import as_dict, heading

    settings: dict[str, Any] = {name: getattr(chosen, name) for name in _SETTINGS}
    plan = Plan(**settings, **listed, methods=methods)
    model: Any = load(chosen.model, chosen.loader, console(sys.stderr), chosen.quiet)
    if not hasattr(model, "engine"):
        raise ArgumentError(f"{chosen.model} is not a Hugging Face model that powermc drives; the bench needs one")
    prompts = [model.prompt(text) for text in texts[: chosen.prompts]]
    say_table = _shown(chosen.json)
    say_table(heading(model.name, len(prompts), plan))
    parts = measure(model, prompts, plan, wanted, say_table, quiet=chosen.quiet)
    text = json.dumps(as_dict(model.name, len(prompts), plan, **parts), allow_nan=False) + "\n"
    if chosen.out is not None:
        written(chosen.out, text)
    if chosen.json:
        sys.stdout.write(text)
    return 0


def measure(
    model: Any, prompts: Sequence[Any], plan: Plan, wanted: Sequence[str], show: Callable[[str], None], *, quiet: bool
) -> dict[str, Any]:
    """The tables that are wanted, each shown when it is there."""
    from powermc.evaluation.bench import bench, fresh
    from powermc.evaluation.bench_tables import floor_report, savings_report, speed_report
    from powermc.evaluation.floor import floor
    from powermc.evaluation.savings import savings

    rounds = plan.repeats * len(prompts) * len(plan.cells) + 1 if "speed" in wanted else 0
    parts: dict[str, Any] = {}
    # The display takes time of the machine that is measured: once a second is under a thousandth of it.
    with Parts(rounds + len({"floor", "savings"} & set(wanted)), quiet=quiet, refresh=1.0) as display:
        if "speed" in wanted:
            parts["result"] = bench(model, prompts, plan, display.begin)
            show(speed_report(parts["result"]))
        if "floor" in wanted:
            display.begin("decode steps against the floor of this machine")
            parts["floor"] = floor(fresh(model, reuse=False, guess=False), prompts[0])
            show(floor_report(parts["floor"]))
        if "savings" in wanted:
            display.begin(f"savings at alpha {', '.join(f'{alpha:g}' for alpha in ALPHAS)}")
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
    return parts


def _shown(as_json: bool) -> Callable[[str], None]:
    return lambda text: None if as_json else say(console(), text + "\n")


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
