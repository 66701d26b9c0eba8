"""Reading JSONL files, with errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from powermc.errors import ArgumentError


def read(path: Path, noun: str) -> list[tuple[str, Any]]:
    """(where, value) of every line; `noun` is what a line holds. Raises `ArgumentError` for what cannot be read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror}") from error
    lines = raw.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise ArgumentError(f"{path} is empty; it needs one JSON line per {noun}")
    places = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
    return [(where, _value(line, where)) for where, line in zip(places, lines, strict=True)]


def _value(line: bytes, where: str) -> Any:
    if not line.strip():
        raise ArgumentError(f"{where}: the line is empty; remove it, or write a JSON string or object")
    try:
        return json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8"
        raise ArgumentError(f"{where}: not JSON: {reason}") from error
