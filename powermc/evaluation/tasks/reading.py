"""The items of a task: from a local file, from the hub, or generated."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from powermc import jsonl
from powermc.errors import ArgumentError
from powermc.evaluation.tasks.base import Hub, Item, Row, Task, get


def load(task: Task | str, source: str | Path | None = None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """The items of a task, in the order of the file.

    Parameters
    ----------
    task
        A task or its name.
    source
        A file: JSON lines (`.jsonl`), a JSON list (`.json`) or a table (`.csv`), each maybe with `.gz` behind. None:
        the data set on the hub, which needs the package `datasets`; or, for a task that is generated, nothing.
    limit
        At most so many, from the beginning; None for all. A generated task needs it.
    seed
        Of a generated task.

    Raises `ArgumentError`, with file, line and field, for what cannot be read.
    """
    task = get(task) if isinstance(task, str) else task
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit must be >= 1, got {limit}")
    if task.generate is not None:
        return _generated(task, source, limit, seed)
    assert task.item is not None
    rows = _from_hub(task, limit) if source is None else _from_file(Path(source), limit)
    return _unique([(row, task.item(row)) for row in rows])


def _generated(task: Task, source: Any, limit: int | None, seed: int) -> list[Item]:
    assert task.generate is not None
    if source is not None:
        raise ArgumentError(f"task {task.name!r} is generated from its seed and reads no file: leave {source} out")
    if limit is None:
        raise ArgumentError(f"task {task.name!r} is generated: say how many items (limit)")
    return task.generate(limit, seed)


def _unique(found: list[tuple[Row, Item]]) -> list[Item]:
    seen: dict[str, str] = {}
    for row, item in found:
        if item.id in seen:
            raise ArgumentError(f"{row.where}: the id {item.id!r} is that of {seen[item.id]} too")
        seen[item.id] = row.where
    return [item for _, item in found]


def _from_file(path: Path, limit: int | None) -> list[Row]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    read = {".json": _json, ".csv": _csv}.get(suffix, _lines)
    found = read(path)
    if not found:
        raise ArgumentError(f"{path} holds no items")
    return [_row(where, number, value) for number, (where, value) in enumerate(found[:limit], 1)]


def _row(where: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ArgumentError(f"{where}: must be an object with fields, got {type(value).__name__}")
    return Row(where, number, value)


def _lines(path: Path) -> list[tuple[str, Any]]:
    return jsonl.read(path, "item")


def _json(path: Path) -> list[tuple[str, Any]]:
    try:
        values = json.loads(jsonl.read_bytes(path))
    except ValueError as error:
        raise ArgumentError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, list):
        raise ArgumentError(f"{path}: must be a list of objects, got {type(values).__name__}")
    return [(f"{path}, item {number}", value) for number, value in enumerate(values, 1)]


def _csv(path: Path) -> list[tuple[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(jsonl.read_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        found: list[tuple[str, Any]] = []
        for fields in reader:
            where = f"{path}, line {reader.line_num}"  # the last line of a row that spans several
            if None in fields:
                raise ArgumentError(f"{where}: more cells than the header has names")
            found.append((where, {name: text for name, text in fields.items() if text is not None}))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArgumentError(f"{path}: not a table in UTF-8: {error}") from error
    return found


def _from_hub(task: Task, limit: int | None) -> list[Row]:
    hub = task.hub
    if hub is None:
        raise ArgumentError(f"task {task.name!r} has no data set on the hub: give a file")
    if importlib.util.find_spec("datasets") is None:
        raise ArgumentError(
            f"task {task.name!r} needs a data file, or the package datasets to fetch {hub.path} from the hub: "
            "pip install 'powermc[datasets]'"
        )
    split = hub.split if limit is None else f"{hub.split}[:{limit}]"
    return [_row(f"{hub.path} ({hub.split}), row {n}", n, dict(value)) for n, value in enumerate(_fetch(hub, split), 1)]


def _fetch(hub: Hub, split: str) -> Iterable[Any]:
    datasets: Any = importlib.import_module("datasets")
    try:
        return datasets.load_dataset(hub.path, hub.config, split=split)
    except Exception as error:  # whatever its back ends raise: no network, a gated set, a name that moved
        raise ArgumentError(f"cannot fetch {hub.path} from the hub: {type(error).__name__}: {error}") from error
