"""A lens: the calibrated exit heads of one model, with what is known of them, in one file.

The file is safetensors: the affine maps, the most frequent tokens of the calibration text, and a JSON description in
its metadata. It belongs to the very weights that it was fitted to, in the dtype that they had; for any others it is
refused. What is not checked: whether the text to be sampled resembles the calibration text. The held-out report is
about text like that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from powermc.errors import ArgumentError, ModelError
from powermc.files import write_whole
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.lm.model import CausalLM

_KEY, _FORMAT = "powermc.lens", 1


@dataclass(frozen=True)
class ExitReport:
    """What one exit head does on text that it was not fitted to; means over tokens, in nats where it says so.

    Attributes
    ----------
    layer, kind
        The layer and the kind of head.
    temperature
        Of the head, fitted.
    strength
        Ridge strength in standardised features, chosen on validation text; None without an affine map.
    kl, reverse_kl
        KL(p || p~) and KL(p~ || p), nats, at temperature 1.
    top1
        Share of tokens at which the likeliest next token is the same.
    overlap
        1 - TV(p^alpha, p~^alpha), both normalised: the share of draws at temperature 1/alpha that the two have in
        common.
    entropy, exit_entropy
        Of p and of p~, nats, at temperature 1.
    tokens
        How many tokens.
    """

    layer: int
    kind: str
    temperature: float
    strength: float | None
    kl: float
    reverse_kl: float
    top1: float
    overlap: float
    entropy: float
    exit_entropy: float
    tokens: int


@dataclass(frozen=True)
class Origin:
    """Which model a lens is for, and how it was made.

    Attributes
    ----------
    model
        The name of the model.
    fingerprint
        `fingerprint` of its weights.
    depth, width, dtype
        Its number of layers, the width of its states, the dtype of its weights.
    corpus
        A hash of the token ids fitted and validated on.
    fit_tokens, validation_tokens
        How many positions each.
    alpha
        1/temperature at which `ExitReport.overlap` was measured.
    seconds
        Wall-clock time of the calibration.
    peak_bytes, grown_bytes
        Largest memory of the process until the end of the calibration, and by how much the calibration raised it.
        None where the system does not say.
    """

    model: str
    fingerprint: str
    depth: int
    width: int
    dtype: str
    corpus: str
    fit_tokens: int
    validation_tokens: int
    alpha: float
    seconds: float = 0.0
    peak_bytes: int | None = None
    grown_bytes: int | None = None


@dataclass(frozen=True, eq=False)
class Lens:
    """Exit heads by layer. `calibrate` makes one; `save` and `Lens.load` keep it.

    Parameters
    ----------
    heads
        Layer to head.
    report
        One row per layer, on held-out text.
    frequent
        Token ids of the calibration text, most frequent first.
    origin
        The model, and how the lens was made.
    """

    heads: Mapping[int, ExitHead]
    report: tuple[ExitReport, ...]
    frequent: tuple[int, ...]
    origin: Origin
    _exits: Any = field(default_factory=WeakValueDictionary, init=False, repr=False)
    _checked: Any = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    def __repr__(self) -> str:
        return f"Lens({self.origin.model}, layers {', '.join(map(str, self.layers))})"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a head, in order."""
        return tuple(sorted(self.heads))

    @property
    def fingerprint(self) -> str:
        """Of the model's weights."""
        return self.origin.fingerprint

    def head(self, layer: int) -> ExitHead:
        """The head at this layer. Raises `ArgumentError` if there is none."""
        if layer not in self.heads:
            raise ArgumentError(f"the lens has no head at layer {layer}; it has {', '.join(map(str, self.layers))}")
        return self.heads[layer]

    def exit(self, model: CausalLM, layer: int, vocabulary: int | None = None) -> EarlyExit:
        """The early exit of `model` at `layer`: the same object for the same model, as long as anybody holds it.

        With `vocabulary` a screening head over that many of the most frequent tokens, and the one to be scored: it
        cannot draw. Raises as `check` does, and `ArgumentError` for a layer without a head or a `vocabulary` out of
        range.
        """
        head = self.head(layer)
        self.check(model)
        if vocabulary is not None:
            if not 1 <= vocabulary <= len(self.frequent):
                raise ArgumentError(
                    f"vocabulary must be 1 to {len(self.frequent)}, the number of frequent tokens that the lens knows; "
                    f"got {vocabulary}"
                )
            head = head.pruned(self.frequent[:vocabulary], scoring=True)
        key = (id(model), layer, vocabulary)  # an exit that is alive keeps its model alive: no other has that id
        found = self._exits.get(key)
        if found is None:
            found = self._exits[key] = EarlyExit(model, head)
        return found

    def check(self, model: CausalLM) -> None:
        """Raise `ModelError` unless these are the weights that the lens was fitted to, in the same dtype."""
        state = hash(tuple((id(p), p._version) for p in model.decoder.model.parameters()))
        if self._checked.get(model) == state:
            return
        origin, decoder = self.origin, model.decoder
        again = f"calibrate for this one: powermc calibrate --model {model.name}"
        if decoder.layers != origin.depth:
            raise ModelError(
                f"the lens is for {origin.model} with {origin.depth} layers, {model.name} has {decoder.layers}: {again}"
            )
        if (dtype := _name(decoder.dtype)) != origin.dtype:
            raise ModelError(
                f"the lens was fitted to {origin.dtype} weights, {model.name} is loaded in {dtype}: load it with "
                f"dtype={origin.dtype}, or {again}"
            )
        if (found := fingerprint(model)) != origin.fingerprint:
            raise ModelError(
                f"the lens was fitted to other weights than those of {model.name} (fingerprint "
                f"{origin.fingerprint[:8]} of {origin.model}, not {found[:8]}): {again}"
            )
        self._checked[model] = state

    def table(self) -> str:
        """The report, one line per layer."""
        columns = (
            ("layer", lambda r: str(r.layer)),
            ("head", lambda r: r.kind),
            ("temp.", lambda r: f"{r.temperature:.3f}"),
            ("ridge", lambda r: "-" if r.strength is None else f"{r.strength:.0e}"),
            ("KL(p||p~)", lambda r: f"{r.kl:.3f}"),
            ("KL(p~||p)", lambda r: f"{r.reverse_kl:.3f}"),
            ("top-1", lambda r: f"{r.top1:.3f}"),
            ("1-TV", lambda r: f"{r.overlap:.3f}"),
            ("H(p)", lambda r: f"{r.entropy:.3f}"),
            ("H(p~)", lambda r: f"{r.exit_entropy:.3f}"),
            ("tokens", lambda r: f"{r.tokens:,}"),
        )
        rows = [[name for name, _ in columns], *([show(r) for _, show in columns] for r in self.report)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)

    # Files.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the lens to a file, whole or not at all. Raises `ArgumentError` if it cannot be written."""
        tensors = {"frequent": torch.tensor(self.frequent, dtype=torch.int64)}
        for layer, head in self.heads.items():
            if head.weight is not None and head.bias is not None:
                tensors[f"{layer}.weight"] = head.weight.detach().cpu().contiguous()
                tensors[f"{layer}.bias"] = head.bias.detach().cpu().contiguous()
        description = {
            "format": _FORMAT,
            "origin": asdict(self.origin),
            "heads": [{"layer": n, "kind": h.kind, "temperature": h.temperature} for n, h in self.heads.items()],
            "report": [asdict(row) for row in self.report],
            "digest": _digest(tensors),
        }
        try:
            write_whole(path, save(tensors, {_KEY: json.dumps(description)}))
        except OSError as error:
            raise ArgumentError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lens:
        """Read a lens. Raises `ArgumentError` for a file that is missing, truncated, damaged or something else."""
        if not Path(path).is_file():
            raise ArgumentError(f"there is no file {path}; make a lens with: powermc calibrate --out {path}")
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArgumentError(f"{path} is no lens, or was cut short ({_line(error)}); calibrate again") from error
        if text is None:
            raise ArgumentError(f"{path} is no lens, but a safetensors file of something else; name a lens")
        try:
            description = json.loads(text)
            if description["format"] != _FORMAT:
                raise ValueError(f"its format is {description['format']!r}, this version reads {_FORMAT!r}")
            if description["digest"] != _digest(tensors):
                raise ValueError("its numbers have changed since it was written")
            heads = {
                entry["layer"]: ExitHead(
                    entry["layer"],
                    entry["kind"],
                    entry["temperature"],
                    tensors.get(f"{entry['layer']}.weight"),
                    tensors.get(f"{entry['layer']}.bias"),
                )
                for entry in description["heads"]
            }
            report = tuple(ExitReport(**row) for row in description["report"])
            return cls(heads, report, tuple(tensors["frequent"].tolist()), _known(Origin, description["origin"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"{path} cannot be used ({_line(error)}); calibrate again") from error


def _known(kind: Any, values: Mapping[str, Any]) -> Any:
    return kind(**{f.name: values[f.name] for f in fields(kind)})


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        _hash_tensor(hashed, name, tensors[name])
    return hashed.hexdigest()


def fingerprint(model: CausalLM) -> str:
    """A hash of all weights: names, shapes, dtypes and bytes, one tensor at a time. Two thirds of a second per GB."""
    hashed, seen = hashlib.blake2b(digest_size=16), set()
    for name, tensor in sorted(model.decoder.model.state_dict().items()):
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:  # tied
            continue
        seen.add(place)
        _hash_tensor(hashed, name, tensor)
    return hashed.hexdigest()


def _hash_tensor(hashed: Any, name: str, tensor: torch.Tensor) -> None:
    hashed.update(f"{name} {_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
    if tensor.numel():
        hashed.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
