"""What a store says of its run: all that it takes to go on with it, and to show it without the model."""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from powermc._version import __version__
from powermc.early_exit import Prepared, surrogate_identity
from powermc.errors import StoreError
from powermc.recording import Keeping
from powermc.sequences.suffix import default_temperature
from powermc.settings import Settings
from powermc.store.packing import fields_as_json
from powermc.types import Fields

_FREE = {"exit", "chat", "rows", "chains", "draws"}
"""May change: what an exit is called, what made the prompts, rows; and there may be more chains and draws."""


@dataclass(frozen=True)
class Header:
    """Attributes
    ----------
    model, identity, dtype
        The model's name; a hash of its weights, or its name where it has none that are known; their dtype.
    settings
        Those of the `Run`: every argument, defaults filled in.
    thin, keep_proposals, first_chain
        What is left out, paths of the last block and tokens of rejected proposals; and the number of the first chain.
    fields
        Declaration of the infos (`packing.fields_as_json`).
    vocabulary
        Number of token ids.
    early_exit, surrogate
        The frozen facts of the warm-up (`Prepared.facts`), and a hash of the surrogate.
    exit
        The file of the lens, if the run was given one.
    resolution, ignored_warpers, notes
        As in `Run`.
    sessions
        When the run was begun and gone on with, and by which versions of what.
    result
        `Run.early_exit` when the run last ended by itself or by Ctrl-C.
    writer
        (host, process id) of the one who writes now.
    """

    model: str
    identity: str
    dtype: str | None
    settings: Mapping[str, Any]
    thin: int
    keep_proposals: bool
    first_chain: int
    fields: list[list[Any]]
    vocabulary: float
    early_exit: Mapping[str, Any]
    surrogate: str | None
    exit: str | None
    resolution: float
    ignored_warpers: Mapping[str, Any]
    notes: list[str]
    sessions: list[dict[str, Any]] = field(default_factory=list)
    result: Mapping[str, Any] | None = None
    writer: list[Any] | None = None

    def rows(self) -> list[tuple[str, str]]:
        """(name, JSON) of every attribute. NaN and infinities are written as Python writes them."""
        return as_rows(asdict(self))

    @classmethod
    def of_rows(cls, rows: Mapping[str, str]) -> Header:
        """The inverse. Raises `KeyError` and `ValueError` for what is no header."""
        return cls(**{f.name: json.loads(rows[f.name]) for f in fields(cls)})

    def check(self, path: Path, settings: Settings, keeping: Keeping) -> None:
        """Raise `StoreError`, with name and both values, for a setting that is not the run's."""
        asked, mine = effective(settings), self.settings
        both = {name: (mine[name], value) for name, value in asked.items() if name not in _FREE}
        both |= {name: (getattr(self, name), value) for name, value in keeping._asdict().items()}
        refuse_changes(path, both)
        refuse_fewer(path, mine, asked)

    @classmethod
    def of_run(
        cls,
        facts: Mapping[str, Any],
        model: Any,
        fields: Fields,
        prepared: Prepared,
        settings: Settings,
        keeping: Keeping,
    ) -> Header:
        """For a run that begins; `facts` are those of `powermc.recording.about`."""
        screening, exit = prepared.screening, settings.exit
        decoder = getattr(model, "decoder", None)
        return cls(
            model=facts["model"],
            identity=identity(model),
            dtype=None if decoder is None else str(decoder.dtype).removeprefix("torch."),
            settings=as_json(facts["settings"]),
            **keeping._asdict(),
            fields=fields_as_json(fields),
            vocabulary=model.vocab_size,
            early_exit=prepared.facts,
            surrogate=None if screening is None else surrogate_identity(screening.surrogate),
            exit=os.path.abspath(exit) if isinstance(exit, str | os.PathLike) else None,
            resolution=facts["resolution"],
            ignored_warpers=facts["ignored_warpers"],
            notes=list(facts["notes"]),
            sessions=[session()],
        )

    def check_model(self, path: Path, model: Any) -> None:
        """Raise `StoreError` unless this is the model that drew the run."""
        name, found = model.name, identity(model)
        if found != self.identity:
            raise StoreError(
                f"{path}: it was drawn from {self.model} ({_short(self.identity)}), and {name} ({_short(found)}) is "
                "another model, or has other weights or another dtype; load the one that drew it"
            )

    def extended(self, settings: Settings) -> Header:
        """For a session that goes on, with more chains or draws if so asked."""
        asked = effective(settings)
        more = {**self.settings, "chains": asked["chains"], "draws": asked["draws"]}
        return replace(self, settings=more, sessions=[*self.sessions, session()])


def as_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, JSON) of a header's attributes. NaN and infinities are written as Python writes them."""
    return [(name, json.dumps(value, default=_plain)) for name, value in values.items()]


def refuse_changes(path: Path, both: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise `StoreError` for the first name of which the store has another value than what is asked for."""
    for name, (here, there) in both.items():
        if here != there:
            raise StoreError(
                f"{path}: it was drawn with {name} = {here!r}, and {there!r} is asked for; only more chains and "
                f"more draws can be added: give {name} = {here!r}, or another file"
            )


def refuse_fewer(path: Path, mine: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise `StoreError` if fewer chains or draws are asked for than the store has."""
    for name in ("chains", "draws"):
        if asked[name] < mine[name]:
            raise StoreError(
                f"{path}: it has {name} = {mine[name]}, and fewer, {asked[name]}, are asked for; give at least "
                f"{mine[name]}, or another file"
            )


def effective(settings: Settings) -> dict[str, Any]:
    """The settings as a `Run` has them, defaults that depend on others filled in; lists for tuples, as in JSON."""
    values = settings.as_dict()
    if values["temperature"] is None:
        values["temperature"] = default_temperature(settings.alpha)
    if values["draws"] is None:
        values["draws"] = values["steps"]
    return as_json(values)


def as_json(value: Any) -> Any:
    """A value as it comes back from a header: lists for tuples, plain numbers for NumPy's."""
    return json.loads(json.dumps(value, default=_plain))


def identity(model: Any) -> str:
    """A hash of the weights of a `CausalLM` (2/3 s per GB); the name of anything else."""
    if hasattr(getattr(model, "decoder", None), "model"):
        from powermc.lm.lens import fingerprint

        return fingerprint(model)
    return f"name {getattr(model, 'name', type(model).__name__)}"


def session() -> dict[str, Any]:
    """When, where and with what."""
    packages = {}
    for package in ("torch", "transformers", "numpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"begun": begun, "powermc": __version__, "python": platform.python_version(), **packages}


def this_process() -> list[Any]:
    """(host, process id)."""
    return [socket.gethostname(), os.getpid()]


def is_alive(writer: list[Any] | None) -> bool:
    """Whether the one who wrote may still do so; True of those who cannot be asked, on another host or on Windows."""
    if writer is None or writer[0] != socket.gethostname() or os.name == "nt":
        return writer is not None
    try:
        os.kill(writer[1], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _short(identity: str) -> str:
    return identity if identity.startswith("name ") else f"fingerprint {identity[:8]}"


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
