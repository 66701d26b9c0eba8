"""Reading JSONL files, compressed by gzip or not, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from powermc.errors import ArgumentError


def read(path: Path, noun: str) -> list[tuple[str, Any]]:
    """(where, value) of every line; `noun` is what a line holds. Raises `ArgumentError` for what cannot be read."""
    raw = read_bytes(path)
    lines = raw.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise ArgumentError(f"{path} is empty; it needs one JSON line per {noun}")
    places = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
    return [(where, _value(line, where)) for where, line in zip(places, lines, strict=True)]


def read_bytes(path: Path) -> bytes:
    """A file's bytes, decompressed if its name ends in `.gz`. Raises `ArgumentError` for what cannot be read."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise ArgumentError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _value(line: bytes, where: str) -> Any:
    if not line.strip():
        raise ArgumentError(f"{where}: the line is empty; remove it, or write a JSON string or object")
    try:
        return json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8"
        raise ArgumentError(f"{where}: not JSON: {reason}") from error
