"""How tokens, log probabilities, infos and texts become bytes in a store, and back.

Every number that comes from a model is rounded to 1e-6 nats before it is written. No model is good to that, and what
a path's prefix was computed by (one token after the other, or all at once after a restart) no longer shows: so the
bytes of a run in float64 that was stopped and gone on with are those of one that was not.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from powermc.sequences.path import Path, Tokens, agreement
from powermc.types import Field, Fields, Info

DECIMALS = 6
"""Of nats, in what is written."""

COSTS = ("tokens",)
"""Infos that say what a step cost: they depend on what happened to be known, and not on the run alone."""

_CODES = {
    "|b1": "?",
    "|i1": "b",
    "<i2": "h",
    "<i4": "i",
    "<i8": "q",
    "|u1": "B",
    "<u2": "H",
    "<u4": "I",
    "<u8": "Q",
    "<f2": "e",
    "<f4": "f",
    "<f8": "d",
}


class Layout:
    """The infos of a step as one packed record; costs apart. `exact`: nothing is rounded, and nothing apart."""

    def __init__(self, fields: Fields, *, exact: bool = False) -> None:
        costs = () if exact else COSTS
        self.fields = {name: field for name, field in fields.items() if name not in costs}
        self.costs = {name: field for name, field in fields.items() if name in costs}
        kinds = {name: np.dtype(field.dtype).newbyteorder("<") for name, field in self.fields.items()}
        self._exact, self._struct = exact, struct.Struct("<" + "".join(_CODES[kind.str] for kind in kinds.values()))
        self._dtype = np.dtype(list(kinds.items()))

    @staticmethod
    def takes(field: Field) -> bool:
        """Whether a field is of a kind of number that has a place in a record."""
        return np.dtype(field.dtype).newbyteorder("<").str in _CODES

    def pack(self, info: Info) -> bytes:
        """The record of an info; what is not in it gets the declared fill value."""
        given = [info.get(name, field.fill) for name, field in self.fields.items()]
        if not self._exact:
            given = [rounded(value) if isinstance(value, float) else value for value in given]
        try:
            return self._struct.pack(*given)
        except struct.error:  # of another kind than declared: what an array of the declared dtype makes of it
            kinds = (field.dtype for field in self.fields.values())
            return self._struct.pack(*(np.array(x).astype(kind).item() for x, kind in zip(given, kinds, strict=True)))

    def unpack(self, records: Sequence[bytes]) -> np.ndarray:
        """Records as a structured array."""
        return np.frombuffer(b"".join(records), dtype=self._dtype)

    def empty(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Name to an array of fill values."""
        fields = {**self.fields, **self.costs}
        return {name: np.full(shape, field.fill, dtype=field.dtype) for name, field in fields.items()}


def fields_as_json(fields: Fields) -> list[list[Any]]:
    """A declaration of infos for the header."""
    return [[name, field.dtype, None if field.fill != field.fill else field.fill] for name, field in fields.items()]


def fields_from_json(rows: Iterable[Sequence[Any]]) -> Fields:
    """The inverse; None stands for NaN."""
    return {name: Field(dtype, math.nan if fill is None else fill) for name, dtype, fill in rows}


def rounded(value: float) -> float:
    """To `DECIMALS`; never -0.0. NaN and infinities stay."""
    return round(float(value), DECIMALS) + 0.0


class Delta(NamedTuple):
    """A path as the first `kept` tokens of the path before it in its chain, and the rest; log p of those, float32."""

    kept: int
    tokens: bytes
    log_p: bytes
    finished: bool


class Tokenization:
    """Token ids as bytes: two of them each where the vocabulary allows, else four."""

    def __init__(self, vocabulary: float) -> None:
        self._dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")

    def pack(self, tokens: Tokens) -> bytes:
        return np.array(tokens, dtype=self._dtype).tobytes()

    def unpack(self, data: bytes) -> np.ndarray:
        """int32."""
        return np.frombuffer(data, dtype=self._dtype).astype(np.int32)

    def delta(self, path: Path, before: Tokens) -> Delta:
        """What makes `path` of the tokens before it."""
        kept = agreement(path.tokens, before)
        assert path.log_p is not None, "only scored paths are committed"
        log_p = np.round(path.log_p[kept:], DECIMALS) + 0.0
        return Delta(kept, self.pack(path.tokens[kept:]), log_p.astype("<f4").tobytes(), path.finished)


def log_p_of(data: bytes) -> np.ndarray:
    """float64 of what `Delta.log_p` holds."""
    return np.frombuffer(data, dtype="<f4").astype(np.float64)


def text_to_bytes(text: str) -> bytes:
    """UTF-8; a lone surrogate, which a prompt may hold, is written as it is."""
    return text.encode("utf-8", "surrogatepass")


def text_from_bytes(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def text_delta(text: str, before: str) -> tuple[int, bytes]:
    """(characters in common with the text before, the rest)."""
    kept = len(os.path.commonprefix((text, before)))  # noqa: RUF071  (character by character it is)
    return kept, text_to_bytes(text[kept:])


def hash_rows(rows: Iterable[Sequence[Any]]) -> str:
    """A hash of rows of numbers, bytes and None."""
    hashed = hashlib.blake2b(digest_size=16)
    for row in rows:
        hashed.update(repr(row).encode())
    return hashed.hexdigest()
