"""Values of chains as text in a store, and back; and what a store can say of a kernel, which it cannot hold.

Text is JSON. What JSON has no word for is an object with one: `{"tuple": [...]}`, `{"array": ...}`, `{"path": ...}`.
Floats are written so that they are read back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType
from typing import Any

import numpy as np

from powermc.errors import ArgumentError
from powermc.sequences.path import Path, Prompt

_LONG_INT = 4096
"""Bits of an integer that is written in base 16: Python reads no number of so many decimal digits."""
_ARRAY_KINDS = "biufcSUmM"
_SHOWN = 100
_DEEP = 8


@dataclass(frozen=True)
class Codec:
    """How values become text: through `encode` and `decode`, functions of the user's, where there are any.

    Raises `ArgumentError` for one without the other, and for what is no function.
    """

    encode: Callable[[Any], Any] | None = None
    decode: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name, function in (("encode", self.encode), ("decode", self.decode)):
            if function is not None and not callable(function):
                raise ArgumentError(f"{name} must be a function, got {function!r}")
        if (self.encode is None) != (self.decode is None):
            raise ArgumentError("encode and decode undo each other: give both, or neither")

    @property
    def name(self) -> str | None:
        """Of `encode`; None without one."""
        return None if self.encode is None else _name(self.encode)

    def write(self, value: Any) -> str:
        """The text of a value. Raises `ArgumentError` for a value that has none."""
        return to_text(value if self.encode is None else self.encode(value))

    def read(self, text: str) -> Any:
        """The value of a text."""
        value = from_text(text)
        return value if self.decode is None else self.decode(value)

    def check(self, value: Any) -> str:
        """`write`, after a look at whether `decode` undoes `encode` here. Raises `ArgumentError` if it does not."""
        text = self.write(value)
        if self.encode is not None and self.write(self.read(text)) != text:
            raise ArgumentError(
                f"decode does not undo encode: {_short(repr(value))} comes back as {_short(repr(self.read(text)))}"
            )
        return text


def to_text(value: Any) -> str:
    """JSON of numbers, strings, booleans, None, NumPy scalars and arrays, paths, and tuples and lists of these.

    Of a path: prompt, tokens and log p by the model in front. Raises `ArgumentError` for any other type, subclasses of
    these included: they would come back as something else.
    """
    return json.dumps(_tree(value), separators=(",", ":"))


def from_text(text: str) -> Any:
    """The inverse."""
    return _value(json.loads(text))


def without_scores(text: str) -> str:
    """The text of the same value, paths without what a model found of them."""

    def bare(tree: Any) -> Any:
        if isinstance(tree, list):
            return [bare(part) for part in tree]
        if isinstance(tree, dict):
            return {name: None if name == "log_p" else bare(part) for name, part in tree.items()}
        return tree

    return text if '"log_p"' not in text else json.dumps(bare(json.loads(text)), separators=(",", ":"))


def _tree(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if value.bit_length() < _LONG_INT else {"int": hex(value)}
    if kind is list:
        return [_tree(part) for part in value]
    if kind is tuple:
        return {"tuple": [_tree(part) for part in value]}
    if kind is Path and isinstance(value, Path):
        scores = None if value.log_p is None else b64encode(value.log_p.astype("<f8").tobytes()).decode("ascii")
        prompt = {"ids": list(map(int, value.prompt.ids)), "text": value.prompt.text, "key": int(value.prompt.key)}
        tokens = list(map(int, value.tokens))
        return {"path": tokens, "finished": bool(value.finished), "prompt": prompt, "log_p": scores}
    if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in _ARRAY_KINDS:
        word = "array" if kind is np.ndarray else "number"
        return {word: value.dtype.str, "shape": list(value.shape), "data": b64encode(value.tobytes()).decode("ascii")}
    named = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray | np.generic):
        named += f" of dtype {value.dtype}"
    raise ArgumentError(
        f"a value of type {named} cannot be written to a store; give encode=... and decode=..., functions to and from "
        "numbers, strings, booleans, None, NumPy arrays, paths, tuples or lists of these"
    )


def _value(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_value(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "tuple" in tree:
        return tuple(_value(part) for part in tree["tuple"])
    if "int" in tree:
        return int(tree["int"], 16)
    if "path" in tree:
        prompt = tree["prompt"]
        scores = None if tree["log_p"] is None else np.frombuffer(b64decode(tree["log_p"]), "<f8").astype(float)
        given = Prompt(tuple(prompt["ids"]), prompt["text"], prompt["key"])
        return Path(given, tuple(tree["path"]), tree["finished"], scores)
    dtype = tree.get("array", tree.get("number"))
    array = np.frombuffer(b64decode(tree["data"]), dtype).reshape(tree["shape"]).copy()
    return array if "array" in tree else array[()]


def described(thing: Any, name: str = "kernel", depth: int = 0) -> dict[str, Any]:
    """What can be compared of a kernel when its run is gone on with, as numbers and strings by dotted names.

    The types of the kernel and of its parts, as far as those are frozen dataclasses; their numbers, tables and arrays
    (long ones by a hash); functions by name. Not what a function does, nor what an object of another kind holds.
    """
    if thing is None or isinstance(thing, bool | int | str) or (isinstance(thing, float) and math.isfinite(thing)):
        return {name: thing}
    if isinstance(thing, Mapping):
        pairs = list(thing.items())
        try:
            return {name: _digested(sorted(map(to_text, pairs)), f"{len(pairs)} entries")}
        except ArgumentError:
            return {name: f"{type(thing).__name__} of {len(pairs)} entries"}
    try:
        text = to_text(thing)
        return {name: summary(text)}
    except ArgumentError:
        pass
    found = {name: _name(thing)}
    if depth == _DEEP:
        return found
    if isinstance(thing, Sequence):
        parts = [(str(i), part) for i, part in enumerate(thing)]
    elif is_dataclass(thing) and not isinstance(thing, type) and type(thing).__dataclass_params__.frozen:  # type: ignore[attr-defined]
        parts = [(f.name, getattr(thing, f.name)) for f in fields(thing) if f.compare]
    else:
        parts = []
    for part, inner in parts:
        found |= described(inner, f"{name}.{part}", depth + 1)
    return found


def summary(text: str) -> str:
    """A text, or the beginning of a long one and a hash."""
    return text if len(text) <= _SHOWN else _digested([text], f"{text[: _SHOWN // 2]}...")


def _digested(texts: Sequence[str], what: str) -> str:
    return f"{what}, hash {hashlib.blake2b(repr(texts).encode(), digest_size=6).hexdigest()}"


def _name(thing: Any) -> str:
    return thing.__qualname__ if isinstance(thing, FunctionType | type) else type(thing).__qualname__


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
