"""The files of a comparison that people read, made from its store alone: Markdown, a page, JSON, a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from powermc.errors import ArgumentError, ModelError
from powermc.evaluation.comparison import page, plot
from powermc.evaluation.comparison.figures import kinds
from powermc.evaluation.comparison.reading import Line, Record, reading
from powermc.evaluation.comparison.results import APPLICATION, FILE, FORMAT
from powermc.evaluation.comparison.table import Tables, markdown, tables
from powermc.files import write_whole
from powermc.results import jsonable

MARKDOWN, PAGE, JSON, PICTURE = "table.md", "index.html", "results.json", "accuracy-cost.png"


def load(folder: str | os.PathLike[str]) -> Record:
    """A comparison, finished or not, also while it runs. Raises `StoreError` for what cannot be read."""
    with reading(Path(folder) / FILE, APPLICATION, FORMAT) as reader:
        return reader.record()


def write(
    folder: str | os.PathLike[str], *, pass_at: Sequence[int] | None = None, reference: str | None = None
) -> tuple[Tables, list[str]]:
    """Write table.md, index.html, results.json and accuracy-cost.png into a comparison's folder, each whole.

    `pass_at` and `reference` are those that the comparison was last run with, unless given. Returns the tables, and
    a remark for each file that could not be made because a package is missing, or there is nothing to show in it.

    Raises `StoreError` for a comparison that cannot be read, and `ArgumentError` for a reference that is not there or
    files that cannot be written.
    """
    record = load(folder)
    wanted = record.header.get("pass_at", []) if pass_at is None else pass_at
    shown = tables(record, pass_at=wanted, reference=reference or record.header.get("reference"))
    remarks: list[str] = []
    out = Path(folder)
    _save(out / MARKDOWN, markdown(shown))
    _save(out / JSON, json.dumps(as_dict(record, shown), allow_nan=False) + "\n")
    for name, make in ((PAGE, lambda: page.page(record, shown)), (PICTURE, lambda: plot.picture(shown))):
        try:
            _save(out / name, make())
        except ModelError as error:
            remarks.append(f"{name} was not made: {error}")
    return shown, remarks


def _save(path: Path, content: str | bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror}") from error


def as_dict(record: Record, shown: Tables) -> dict[str, Any]:
    """All figures, JSON-able; what a method does not have is None."""
    return jsonable(
        {
            **record.header,
            "questions": len(record.questions),
            "methods": [_method(line, shown) for line in record.lines],
            "comparisons": [asdict(pair) for pair in shown.pairs],
            "notes": list(shown.notes),
        }
    )


def _method(line: Line, shown: Tables) -> dict[str, Any]:
    found = next((f for f in shown.figures if f.spec == line.spec), None)
    return {
        "spec": line.spec,
        "options": dict(line.options),
        "prepared": {"method": line.prepared[0], "options": dict(line.prepared[1])},
        "figures": None if found is None else asdict(found),
        "grades": dict(kinds(line)),
        "counts": dict(line.costs.counts),
        "ledger": line.costs.ledger.as_dict(),
        "seconds": line.costs.seconds,
        "grading_seconds": line.costs.grading,
        "preparing": {**line.preparing.as_dict(), "wall_seconds": line.preparing_seconds},
    }
