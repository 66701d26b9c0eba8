"""The results of `powermc bench` as Markdown tables and as JSON."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from powermc._version import __version__
from powermc.evaluation.bench import Plan, Result
from powermc.evaluation.floor import Floor
from powermc.evaluation.memory import HOW
from powermc.evaluation.savings import Saving
from powermc.results import jsonable


def machine() -> dict[str, Any]:
    """What the figures were measured on, and when (UTC)."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "powermc": __version__,
        **{package: version(package) for package in ("torch", "transformers", "numpy", "numba")},
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_dict(
    model: str,
    prompts: int,
    plan: Plan,
    result: Result | None = None,
    floor: Floor | None = None,
    saved: Sequence[Saving] | None = None,
) -> dict[str, Any]:
    """Everything that was measured, JSON-able; NaN is None, and so is what was not measured."""
    found: dict[str, Any] = {
        "machine": machine(),
        "settings": {"model": model, "prompts": prompts, **asdict(plan)},
        "memory": HOW,
        "rows": None,
        "overhead": None,
        "floor": None,
        "savings": None if saved is None else [asdict(saving) for saving in saved],
    }
    if result is not None:
        found |= {"rows": [], "overhead": result.overhead}
        for row in result.rows:
            ratio = result.ratio(row)
            derived = {name: getattr(row, name) for name in ("per_second", "per_second_whole", "seconds_per_prompt")}
            found["rows"].append({**asdict(row), **derived, "ratio": None if ratio is None else asdict(ratio)})
    if floor is not None:
        steps = [{**asdict(step), "ratio": step.ratio, "read_ratio": step.read_ratio} for step in floor.steps]
        found["floor"] = {**asdict(floor), "steps": steps}
    return jsonable(found)


def heading(model: str, prompts: int, plan: Plan) -> str:
    """One paragraph: the settings and the machine."""
    here = machine()
    return (
        f"{model}, {prompts} prompt{'s' if prompts != 1 else ''}, B {plan.block_size}, N {plan.steps}, alpha "
        f"{plan.alpha:g}, seed {plan.seed}{', end tokens ignored' if plan.ignore_eos else ''}; least of {plan.repeats} "
        f"repeat{'s' if plan.repeats != 1 else ''}. {here['cpu']}, {here['cores']} cores, {here['threads']} "
        f"thread{'s' if here['threads'] != 1 else ''}, powermc {here['powermc']}, torch {here['torch']}, "
        f"transformers {here['transformers']}, {here['date']}."
    )


def cells(result: Result) -> str:
    """One line per cell."""
    head = [
        "T", "method", "chains", "transitions", "transitions/s", "x published", "per proposed token", "with growth /s",
        "x published", "tokens/transition", "proposal", "cut", "length", "accepted", "changed", "s/prompt", "peak MB",
        "added MB",
    ]  # fmt: skip
    lines = []
    for row in result.rows:
        ratio = result.ratio(row)
        raw, whole, per_token = (ratio.raw, ratio.whole, ratio.per_token) if ratio else (math.nan,) * 3
        line = [
            row.horizon, row.method, row.chains, row.transitions, _number(row.per_second), _times(raw),
            _times(per_token), _number(row.per_second_whole), _times(whole), f"{row.tokens:.1f}",
            f"{row.proposal_length:.1f}", f"{row.cut:.1f}", f"{row.length:.1f}", f"{row.accepted:.0%}",
            f"{row.changed:.0%}", f"{row.seconds_per_prompt:.1f}", _megabytes(row.peak_bytes),
            _megabytes(row.added_bytes),
        ]  # fmt: skip
        lines.append(line)
    return _table(head, lines)


def overheads(result: Result) -> str:
    """One line: the baseline's decoding over bare `generate`."""
    found = ", ".join(
        f"{name} chain{'' if name.endswith(' 1') else 's'}: {value:.3f}" for name, value in result.overhead.items()
    )
    return f"Seconds per decoded token inside the baseline over bare generate of the same lengths: {found or 'not run'}"


def scaling(result: Result) -> str:
    """Seconds of the steps per chain-transition, by T (down) and chains (across)."""
    plan = result.plan
    found = {(row.method, row.horizon, row.chains): row for row in result.rows}
    lines = []
    for method in plan.methods:
        for horizon in plan.horizons:
            rows = [found.get((method, horizon, chains)) for chains in plan.chains]
            lines.append([method, horizon, *(_number(1 / row.per_second) if row else "" for row in rows)])
    return _table(["method", "T", *(f"{n} chain{'s' if n > 1 else ''}" for n in plan.chains)], lines)


def floors(floor: Floor) -> str:
    """The rates of the machine, and one line per number of rows."""
    facts = (
        f"{floor.weight_bytes / 1e6:.0f} MB of weights, {floor.copying / 1e9:.1f} GB/s copying (bytes read and "
        f"written), {floor.reading / 1e9:.1f} GB/s reading at best, "
        f"{floor.throughput / 1e9:.0f} GFLOP/s, {floor.context} positions before the first step, median of "
        f"{floor.ticks} steps\n\n"
    )
    head = [
        "rows", "step ms", "copy floor ms", "read floor ms", "arithmetic floor ms", "step / copy floor",
        "step / read floor",
    ]  # fmt: skip
    lines = [
        [
            s.rows, *(f"{t * 1e3:.1f}" for t in (s.step, s.copy_floor, s.read_floor, s.arithmetic_floor)),
            f"{s.ratio:.2f}", f"{s.read_ratio:.2f}",
        ]
        for s in floor.steps
    ]  # fmt: skip
    return facts + _table(head, lines)


def saved(rows: Sequence[Saving]) -> str:
    """One line per alpha."""
    head = [
        "alpha", "transitions", "proposed tokens", "not run: agreement", "not run: early rejection", "not drawn",
        "abandoned", "same chain",
    ]  # fmt: skip
    lines = [
        [
            f"{s.alpha:g}", s.transitions, s.proposed, f"{s.agreement:.1%}", f"{s.rejection:.1%}", f"{s.undrawn:.1%}",
            f"{s.abandoned / s.transitions:.0%}", "yes" if s.same_chain else "no",
        ]
        for s in rows
    ]  # fmt: skip
    return _table(head, lines)


def speed_report(result: Result) -> str:
    """The methods side by side."""
    parts = [cells(result), overheads(result), NOTES, "### Seconds per chain-transition", scaling(result)]
    return "\n\n".join(parts)


def floor_report(floor: Floor) -> str:
    """Decode steps."""
    return f"### Decode step over floor\n\n{floors(floor)}\n\n{FLOOR_NOTE}"


def savings_report(rows: Sequence[Saving]) -> str:
    """What was not run."""
    return f"### Proposed tokens never run through the layers\n\n{saved(rows)}"


FLOOR_NOTE = (
    "floor: the larger of the weights' bytes over bandwidth and the pass's operations over throughput; bandwidth of "
    "copying, and of the fastest way to read."
)

NOTES = (
    "transitions/s: kernel steps of all chains per second, growth excluded. x published: over the published algorithm "
    "at batch one with the same T, first as it is, then per proposed token, where its proposals are shorter or longer. "
    "tokens/transition: positions run through the layers. proposal, cut, length: mean tokens drawn, mean cut, mean "
    "length of the last paths. changed: accepted moves that changed the path. peak MB: "
    f"{HOW}, weights included; added: on top of what was resident before the run. 'published' runs one chain: its cost "
    "per transition does not depend on how many follow."
)


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rule = "| " + " | ".join("---" if name == "method" else "---:" for name in head) + " |"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(map(str, x)) + " |" for x in lines)])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _times(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"
