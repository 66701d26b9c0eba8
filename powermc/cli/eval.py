"""`powermc eval`, `ablate` and `table`: read, check everything that can be checked, load, run, write, print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powermc.cli.bench import numbers
from powermc.cli.sample import load
from powermc.cli.show import console, say
from powermc.errors import ArgumentError
from powermc.progress import Parts

if TYPE_CHECKING:
    from powermc.cli.evaluating import Ablate, Comparing, Eval, Table
    from powermc.evaluation.comparison import Executor, Plan

EXECUTORS = ("none", "process", "ray")


def evaluate(chosen: Eval) -> int:
    """Run `powermc eval`; returns the exit code."""
    from powermc.evaluation.comparison.plan import specs_of

    return _compare(chosen, specs_of(chosen.methods))


def ablate(chosen: Ablate) -> int:
    """Run `powermc ablate`; returns the exit code."""
    from powermc.evaluation.comparison import ablation

    return _compare(chosen, ablation(chosen.method, chosen.vary or [], _terms(chosen), grid=chosen.grid))


def _terms(chosen: Comparing) -> Any:
    from powermc.evaluation.methods import Terms

    return Terms(max_new_tokens=chosen.max_new_tokens, alpha=chosen.alpha, seed=chosen.seed)


def plan_of(chosen: Comparing, specs: Sequence[str]) -> Plan:
    """What is to be compared. Raises `ArgumentError` for all that can be wrong without a model."""
    from powermc.evaluation.comparison import Plan
    from powermc.evaluation.comparison.plan import read

    terms = _terms(chosen)
    asked = read(
        chosen.task,
        chosen.data,
        limit=chosen.limit,
        data_seed=chosen.data_seed,
        shots=chosen.shots,
        shots_data=chosen.shots_data,
    )
    return Plan(**asked, specs=specs, terms=terms, style=chosen.style, samples=chosen.samples, group=chosen.group)


def pass_numbers(text: str | None, samples: int | None) -> list[int]:
    """The k of pass@k. Raises `ArgumentError` for one below 1, and for one above the number of samples."""
    found = list(numbers("pass-at", text or ""))
    for k in found:
        if k < 1 or (samples is not None and k > samples):
            most = (
                "" if samples is None else f", at most the number of samples ({samples}): raise --samples, or lower k"
            )
            raise ArgumentError(f"pass@k needs k of at least 1{most}; got k = {k}")
    return found


def executor_of(chosen: Comparing) -> Executor:
    """Where the work is done. Raises `ArgumentError` for options that contradict each other."""
    from powermc.evaluation.comparison import InProcess

    kind = chosen.executor or ("process" if chosen.workers is not None else "none")
    if kind not in EXECUTORS:
        raise ArgumentError(f"executor must be one of {', '.join(EXECUTORS)}, got {kind!r}")
    if chosen.address is not None and kind != "ray":
        raise ArgumentError("an address is that of a Ray cluster: say --executor ray, or leave it out")
    if kind == "none":
        if chosen.workers is not None:
            raise ArgumentError("--executor none works here, without workers: leave --workers out")
        return InProcess()
    workers = 2 if chosen.workers is None else chosen.workers
    if kind == "process":
        from powermc.evaluation.comparison.pool import ProcessPool

        return ProcessPool(workers)
    from powermc.evaluation.comparison.ray_executor import RayExecutor

    found = RayExecutor(workers, chosen.address or "auto")
    found.connect()
    return found


def _compare(chosen: Comparing, specs: Sequence[str]) -> int:
    from powermc.evaluation.comparison import Source, compare
    from powermc.evaluation.comparison.plan import entry

    plan = plan_of(chosen, specs)
    pass_at = pass_numbers(chosen.pass_at, chosen.samples)
    reference = None if chosen.reference is None else entry(chosen.reference, plan.terms).spec
    _check_reference(reference, plan, chosen.out)
    executor = executor_of(chosen)
    source = Source(chosen.model, chosen.loader)
    resources = {name: chosen.loader[name] for name in ("max_rows", "memory", "compiled", "device")}
    with Parts(quiet=chosen.quiet) as display:
        outcome = compare(
            plan,
            source,
            chosen.out,
            executor=executor,
            loader=partial(load, chosen.model, chosen.loader, console(sys.stderr), chosen.quiet),
            display=display,
            session_facts={"executor": type(executor).__name__, **resources},
            header={"pass_at": pass_at, "reference": reference},
        )
    _show(chosen.out, as_json=chosen.json, quiet=chosen.quiet)
    if outcome.interrupted:
        print("interrupted; what was committed is kept, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def _check_reference(reference: str | None, plan: Plan, out: Path) -> None:
    """Raise `ArgumentError` unless the reference is one of the methods, or of those that the folder has."""
    from powermc.evaluation.comparison import load
    from powermc.evaluation.comparison.results import FILE

    named = [entry.spec for entry in plan.entries]
    if reference is None or reference in named:
        return
    there = [line.spec for line in load(out).lines] if (out / FILE).is_file() else []
    if reference not in there:
        raise ArgumentError(
            f"there is no method {reference!r} to compare with; there are {', '.join(dict.fromkeys((*there, *named)))}"
        )


def table(chosen: Table) -> int:
    """Run `powermc table`; returns the exit code."""
    from powermc.evaluation.comparison import entry, load

    reference, pass_at = None, None
    record = load(chosen.folder)
    if chosen.reference is not None:
        from powermc.evaluation.methods import Terms

        settings = record.header["settings"]
        reference = entry(chosen.reference, Terms(alpha=settings["alpha"])).spec
    if chosen.pass_at is not None:
        pass_at = pass_numbers(chosen.pass_at, record.header["samples"])
    _show(chosen.folder, as_json=chosen.json, pass_at=pass_at, reference=reference)
    return 0


def _show(folder: Path, *, as_json: bool, quiet: bool = False, **options: Any) -> None:
    from powermc.evaluation.comparison import write
    from powermc.evaluation.comparison.table import markdown

    shown, remarks = write(folder, **options)
    for remark in () if quiet else remarks:
        say(console(sys.stderr), f"note: {remark}")
    if as_json:
        sys.stdout.write((folder / "results.json").read_text(encoding="utf-8"))
        return
    say(console(), markdown(shown).rstrip())
    if not quiet:
        say(console(sys.stderr), f"the tables are in {folder}: table.md, index.html, results.json")
