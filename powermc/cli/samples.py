"""`powermc show` of a store that `powermc.sample` wrote: samples of a kernel, which only Python has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from powermc.cli.show import console, say
from powermc.diagnostics import measure
from powermc.errors import ArgumentError
from powermc.results import jsonable
from powermc.store.samples import SamplesFacts, SamplesHeader, SamplesReader, about_samples, reading
from powermc.store.values import summary

GO_ON = (
    "nobody is writing it, and something is left to be drawn; go on with it in Python: "
    "powermc.sample(kernel, initial, ..., store=..., resume=True)"
)


def show(file: Path, *, config: bool, as_json: bool) -> int:
    """Print what a store of samples holds, and where it is; returns the exit code."""
    if config:
        raise ArgumentError(f"{file} holds samples of a kernel, which no settings repeat; leave --settings out")
    with reading(file) as reader:
        facts, lines = reader.about(), [] if as_json else _lines(reader)
        found = _everything(reader) if as_json else {}
    if as_json:
        json.dump(jsonable(found), sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
        sys.stdout.flush()
        return 0
    screen = console()
    for line in lines:
        say(screen, line)
    say(screen, size(facts, file))
    for session in facts.header.sessions:
        versions = ", ".join(f"{name} {version}" for name, version in session.items() if name != "begun" and version)
        say(screen, f"session of {session['begun']}: {versions}")
    if not facts.done:
        say(screen, "it is being written" if facts.written else GO_ON)
    return 0


def progress(file: Path) -> tuple[SamplesFacts, str]:
    """Facts, and a line of how far it is."""
    facts = about_samples(file)
    share = f"  accepted {facts.accepted / facts.steps:.0%}" if facts.steps and facts.accepted is not None else ""
    failed = f"  {facts.failed} failed" if facts.failed else ""
    return facts, f"{facts.steps:,}/{facts.planned:,} steps{share}  {facts.draws:,} draws{failed}"


def size(facts: SamplesFacts, file: Path) -> str:
    """How much is there, and how many bytes that is."""
    each = f", {facts.bytes / facts.steps:,.0f} bytes per step" if facts.steps else ""
    return f"{file}: {facts.steps:,} of {facts.planned:,} steps, {facts.draws:,} draws; {facts.bytes:,} bytes{each}"


def kernel_of(header: SamplesHeader) -> str:
    """Metropolis (target Table, proposal RandomWalk): types, by name, of the kernel and of its immediate parts."""
    parts = [
        f"{name.partition('.')[2]} {value}"
        for name, value in header.kernel.items()
        if name.count(".") == 1 and isinstance(value, str)
    ]
    return header.kernel["kernel"] + (f" ({', '.join(parts)})" if parts else "")


def _lines(reader: SamplesReader) -> list[str]:
    header, s = reader.header, reader.schedule
    text: list[str | None] = [place.value for _, place in sorted(reader.places.items())]
    samples = reader.samples(lambda text: text)
    lines = [
        f"samples of {kernel_of(header)}",
        f"{s.chains} chains, {s.warmup} steps of warm-up, {s.draws} draws, one every {s.thin} steps, seed {s.seed}",
        "",
        "  chain   draws  accepted  log density  value",
    ]
    accepted = samples.infos.get("accepted")
    for chain, values in enumerate(samples.values):
        n = len(values)
        share = "-" if accepted is None or not n else f"{accepted[chain, :n].mean():.0%}"
        density = f"{samples.log_density[chain, n - 1] + 0.0:.2f}" if n else "-"
        now = summary(text[chain] or "-") if chain < len(text) else "-"
        error = f"  stopped: {samples.errors[chain]}" if chain in samples.errors else ""
        lines.append(f"  {chain:>5}  {n:>6}  {share:>8}  {density:>11}  {now}{error}")
    begun = [chain for chain, values in enumerate(samples.values) if values]
    whole = min((len(samples.values[chain]) for chain in begun), default=0)
    if begun:
        found = measure(samples.log_density[begun, :whole], functional="log density", chains=begun, thin=s.thin)
        known = {"R-hat": found.rhat, "effective draws": found.ess_bulk}
        told = [f"{name} {value:.4g}" for name, value in known.items() if np.isfinite(value)]
        lines += ["", "; ".join([f"log density {found.mean:.2f}", *told])]
        lines += [f"warning: {guard.message}; take more draws, or another kernel" for guard in found.guards]
    return [*lines, ""]


def _everything(reader: SamplesReader) -> dict[str, Any]:
    """JSON-able: values as they are written (`powermc.store.values`)."""
    samples = reader.samples(json.loads)
    infos = {"infos": samples.infos, "warmup_infos": samples.warmup_infos}
    return {
        "kind": reader.header.kind,
        "kernel": dict(reader.header.kernel),
        "settings": dict(reader.header.settings),
        "values": samples.values,
        "log_density": samples.log_density.tolist(),
        **{kind: {name: values.tolist() for name, values in arrays.items()} for kind, arrays in infos.items()},
        "errors": {str(chain): str(error) for chain, error in samples.errors.items()},
        "interrupted": samples.interrupted,
    }
