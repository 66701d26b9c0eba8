"""Values between the judge and the solver as JSON: plain data by value, anything else as the number of an object.

Nothing that is read can run code: no pickle, no eval. Floats, integers of any size, text with lone surrogates and
nested containers arrive as they were sent; of a subclass of a plain type the plain value arrives (a `Counter` as a
dict). What is *not* kept: identity (an argument that the solver changes in place stays as it was in the judge).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable

TYPE_CHECKING = False  # importing typing would take a tenth of the time that a run takes
if TYPE_CHECKING:
    from typing import Any

_SMALL = 1 << 62


class Closed(Exception):
    """The other side is gone."""


class TooLong(Exception):
    """A message is longer than allowed."""


class Wire:
    """Messages over two pipes, at most `limit` bytes each."""

    def __init__(self, reads: int, writes: int, limit: int) -> None:
        self._reads, self._writes, self._limit = reads, writes, limit

    def send(self, message: Any) -> None:
        """Raises `TooLong`, `Closed`, and `ValueError` or `TypeError` for what JSON cannot hold."""
        data = json.dumps(message).encode("ascii")
        if len(data) > self._limit:
            raise TooLong
        data = struct.pack(">I", len(data)) + data
        while data:
            try:
                data = data[os.write(self._writes, data) :]
            except BrokenPipeError:
                raise Closed from None

    def receive(self) -> Any:
        """Raises `TooLong`, `Closed`, and `ValueError` or `RecursionError` for what is not JSON."""
        (size,) = struct.unpack(">I", self._exactly(4))
        if size > self._limit:
            raise TooLong
        return json.loads(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = os.read(self._reads, min(size - len(data), 1 << 20))
            if not part:
                raise Closed
            data += part
        return bytes(data)


def pack(value: Any, refer: Callable[[Any], int]) -> Any:
    """The JSON of a value; `refer` numbers an object that is not plain, or raises."""
    if value is None or isinstance(value, bool | str | float):
        return _scalar(value)
    if isinstance(value, int):
        return int(value) if -_SMALL < value < _SMALL else ["int", hex(value)]
    if isinstance(value, list | tuple | set | frozenset):
        kind: Any = next(t for t in (list, tuple, set, frozenset) if isinstance(value, t))
        return [kind.__name__, *(pack(item, refer) for item in kind.__iter__(value))]
    if isinstance(value, dict):
        return ["dict", *([pack(key, refer), pack(item, refer)] for key, item in dict.items(value))]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", *(pack(part, refer) for part in (value.start, value.stop, value.step))]
    return ["object", refer(value)]


def _scalar(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    return float.__float__(value) if isinstance(value, float) else value


def unpack(packed: Any, resolve: Callable[[int], Any]) -> Any:
    """The value of `pack`'s JSON; `resolve` gives the object of a number. Raises `ValueError` for anything else."""
    if not isinstance(packed, list):
        if isinstance(packed, dict):
            raise ValueError("a JSON object is no value")
        return packed
    kind, *parts = packed
    if kind in ("list", "tuple", "set", "frozenset"):
        build = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return build(unpack(part, resolve) for part in parts)
    if kind == "dict":
        return {unpack(key, resolve): unpack(item, resolve) for key, item in parts}
    if kind == "int":
        return int(parts[0], 16)
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray).fromhex(parts[0])
    if kind == "complex":
        return complex(parts[0], parts[1])
    if kind == "range":
        return range(*(unpack(part, resolve) for part in parts))
    if kind == "object":
        return resolve(parts[0])
    raise ValueError(f"unknown kind of value {kind!r}")
