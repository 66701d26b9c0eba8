"""What a kernel drew (`powermc.sample`), in a store: what the header says, and reading it back. No kernel is needed."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path as File
from typing import Any

import numpy as np

from powermc.errors import ArgumentError, ChainError, StoreError
from powermc.sampling import Samples, Schedule, check_declared
from powermc.store.file import SAMPLES, check_kind, explained
from powermc.store.header import as_json, as_rows, is_alive, refuse_changes, refuse_fewer, session, this_process
from powermc.store.packing import Layout, fields_as_json, fields_from_json, hash_rows
from powermc.store.reading import connected, error_of
from powermc.store.values import Codec, from_text, summary, to_text
from powermc.types import Field, Fields, Info

_MAY_GROW = ("draws", "chains")


@dataclass(frozen=True)
class SamplesHeader:
    """Attributes
    ----------
    kernel
        What can be told of the kernel (`powermc.store.values.described`).
    fields
        Declaration of the infos (`packing.fields_as_json`).
    settings
        Those of the `Schedule`.
    initial
        The initial value of each chain, as text.
    encode
        Name of the function that the values went through; None without one.
    sessions
        When the run was begun and gone on with, and by which versions of what.
    writer
        (host, process id) of the one who writes now.
    kind
        What kind of store it is.
    """

    kernel: Mapping[str, Any]
    fields: list[list[Any]]
    settings: Mapping[str, int]
    initial: list[str]
    encode: str | None
    sessions: list[dict[str, Any]] = field(default_factory=list)
    writer: list[Any] | None = None
    kind: str = SAMPLES

    @classmethod
    def of_run(
        cls, kernel: Mapping[str, Any], declared: Fields, schedule: Schedule, initial: list[str], codec: Codec
    ) -> SamplesHeader:
        """For a run that begins."""
        plain = as_json(fields_as_json(declared))
        settings = {name: int(value) for name, value in asdict(schedule).items()}
        return cls(dict(kernel), plain, settings, initial, codec.name, [session()], this_process())

    @classmethod
    def of_rows(cls, rows: Mapping[str, str]) -> SamplesHeader:
        """The inverse of `rows`. Raises `KeyError` and `ValueError` for what is no header."""
        return cls(**{f.name: json.loads(rows[f.name]) for f in fields(cls)})

    def rows(self) -> list[tuple[str, str]]:
        """(name, JSON) of every attribute."""
        return as_rows(asdict(self))

    @property
    def schedule(self) -> Schedule:
        return Schedule(**self.settings)

    def check(self, path: File, asked: SamplesHeader) -> None:
        """Raise `StoreError`, with name and both values, for anything that is not the run's; draws and chains apart."""
        both = {n: (v, asked.settings[n]) for n, v in self.settings.items() if n not in _MAY_GROW}
        names = dict.fromkeys((*self.kernel, *asked.kernel))
        both |= {name: (self.kernel.get(name), asked.kernel.get(name)) for name in names}
        here, there = ({name: rest for name, *rest in header.fields} for header in (self, asked))
        both |= {f"field {name}": (here.get(name), there.get(name)) for name in dict.fromkeys((*here, *there))}
        both["encode"] = (self.encode, asked.encode)
        pairs = enumerate(zip(map(summary, self.initial), map(summary, asked.initial), strict=False))
        refuse_changes(path, both | {f"initial value {c}": pair for c, pair in pairs})
        refuse_fewer(path, self.settings, asked.settings)

    def extended(self, asked: SamplesHeader) -> SamplesHeader:
        """For a session that goes on, with more chains or draws if so asked."""
        sessions = [*self.sessions, *asked.sessions]
        return replace(self, settings=asked.settings, initial=asked.initial, sessions=sessions)


@dataclass(frozen=True)
class SamplesFacts:
    """A store of samples at a glance.

    steps, planned: taken by all chains together, and of how many. accepted: of the steps taken; None where the kernel
    does not say. draws: made. done: whether every chain is at its end, or has failed. failed: how many. written:
    whether the process that writes it may still be at it. bytes: of the file, and of its log.
    """

    header: SamplesHeader
    steps: int
    planned: int
    accepted: int | None
    draws: int
    done: bool
    failed: int
    written: bool
    bytes: int


@dataclass(frozen=True)
class Place:
    """Where a chain is now: its value as text, None before the first. `began`: the log density of its initial value."""

    steps: int
    log_density: float
    value: str | None
    began: float
    error: ChainError | None


class Records:
    """The infos of steps: a record of the numbers, and text of what is none."""

    def __init__(self, declared: Fields) -> None:
        self.fields = declared
        self.layout = Layout({name: f for name, f in declared.items() if Layout.takes(f)}, exact=True)
        self.others = {name: f for name, f in declared.items() if name not in self.layout.fields}

    def pack(self, info: Info) -> tuple[bytes, str | None]:
        """Both, of one info. Raises `ArgumentError` for an entry that is not declared, or that has no text."""
        check_declared(info, self.fields)
        found: list[Any] = []
        for name, f in self.others.items():
            value = info.get(name, f.fill)
            value = value if np.dtype(f.dtype).kind == "O" else np.array(value).astype(f.dtype)[()]
            try:
                to_text(value)
            except ArgumentError as error:
                raise ArgumentError(
                    f"info {name!r} holds {type(value).__qualname__}, which cannot be written to a store; let the "
                    "kernel give numbers, strings, or tuples of them"
                ) from error
            found.append(value)
        return self.layout.pack(info), to_text(found) if found else None

    def fill(self, arrays: dict[str, np.ndarray], chain: int, packed: Sequence[tuple[bytes, str | None]]) -> None:
        """Write the infos of the first so many steps of a chain into arrays of shape (chain, step)."""
        if packed and self.layout.fields:
            table = self.layout.unpack([numbers for numbers, _ in packed])
            for name in self.layout.fields:
                arrays[name][chain, : len(packed)] = table[name]
        for i, (_, more) in enumerate(packed):
            for name, value in zip(self.others, from_text(more or "[]"), strict=True):
                arrays[name][chain, i] = value


class SamplesReader:
    """Reads a store of samples through an open connection."""

    def __init__(self, connection: sqlite3.Connection, path: File) -> None:
        self.connection, self.path = connection, path
        rows = dict(connection.execute("SELECT name, value FROM header"))
        try:
            self.header = SamplesHeader.of_rows(rows)
            self.schedule = self.header.schedule
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(f"{path}: its header is not whole ({error}); go back to a copy") from error
        self.records = Records(_fields(self.header.fields))

    @cached_property
    def places(self) -> dict[int, Place]:
        """Where each chain is that has begun."""
        rows = self.connection.execute("SELECT chain, steps, log_density, value, began, error FROM chains")
        return {
            chain: Place(steps, double(now), value, double(began), None if error is None else error_of(error))
            for chain, steps, now, value, began, error in rows
        }

    def last(self, chain: int) -> str | None:
        """The value, as text, that was written last with a draw of a chain."""
        row = self.connection.execute(
            "SELECT value FROM steps WHERE chain = ? AND value IS NOT NULL ORDER BY step DESC LIMIT 1", (chain,)
        ).fetchone()
        return None if row is None else row[0]

    def samples(self, read: Callable[[str], Any]) -> Samples[Any]:
        """Everything; `read` makes a value of its text. Raises `StoreError` where rows contradict each other."""
        schedule, places = self.schedule, self.places
        chains, fields = schedule.chains, self.records.fields
        kept, warm = (
            {name: np.full((chains, n), f.fill, dtype=f.dtype) for name, f in fields.items()}
            for n in (schedule.draws, schedule.warmup)
        )
        log_density = np.full((chains, schedule.draws), np.nan)
        values: list[list[Any]] = []
        for chain in range(chains):
            place = places.get(chain)
            rows = self.connection.execute(
                "SELECT step, log_density, info, more, value FROM steps WHERE chain = ? ORDER BY step", (chain,)
            ).fetchall()
            first = [row[0] for row in rows]
            if first != list(schedule.steps[: 0 if place is None else place.steps]):
                raise StoreError(
                    f"{self.path}: chain {chain} has {len(rows)} of {0 if place is None else place.steps} steps: it is "
                    "damaged; go back to a copy"
                )
            made = [i for i, row in enumerate(rows) if schedule.draw(row[0]) is not None]
            self.records.fill(warm, chain, [row[2:4] for row in rows[: schedule.warmup]])
            self.records.fill(kept, chain, [rows[i][2:4] for i in made])
            log_density[chain, : len(made)] = [double(rows[i][1]) for i in made]
            values.append([])
            for i in made:  # where a chain stayed, the value before
                values[-1].append(values[-1][-1] if rows[i][4] is None else read(rows[i][4]))
        errors = {c: place.error for c, place in places.items() if place.error is not None}
        return Samples(values, log_density, kept, warm, errors, self._left > 0)

    @property
    def _left(self) -> int:
        """Chains that are neither at their end nor failed."""
        whole = len(self.schedule.steps)
        ended = sum(place.steps >= whole or place.error is not None for place in self.places.values())
        return self.schedule.chains - ended

    def digest(self) -> str:
        """A hash of what was drawn."""
        queries = (
            "SELECT chain, step, log_density, info, more, value FROM steps ORDER BY 1, 2",
            "SELECT chain, began, steps, log_density, value, error FROM chains ORDER BY 1",
        )
        return hash_rows(row for query in queries for row in self.connection.execute(query))

    def about(self) -> SamplesFacts:
        """Facts, without the values."""
        schedule, places, header = self.schedule, self.places, self.header
        taken = self.connection.execute("SELECT step, info FROM steps").fetchall()
        accepted = None
        if "accepted" in self.records.layout.fields:
            accepted = int(self.records.layout.unpack([info for _, info in taken])["accepted"].sum()) if taken else 0
        return SamplesFacts(
            header=header,
            steps=len(taken),
            planned=schedule.chains * len(schedule.steps),
            accepted=accepted,
            draws=sum(schedule.draw(step) is not None for step, _ in taken),
            done=self._left == 0,
            failed=sum(place.error is not None for place in places.values()),
            written=is_alive(header.writer),
            bytes=sum(os.path.getsize(f"{self.path}{e}") for e in ("", "-wal") if os.path.exists(f"{self.path}{e}")),
        )


def _fields(rows: list[list[Any]]) -> Fields:
    """Declared fields from the header, where null stands for NaN, or of objects for None."""

    def own(f: Field) -> Field:
        return Field(f.dtype, None) if np.dtype(f.dtype).kind == "O" and f.fill != f.fill else f

    return {name: own(f) for name, f in fields_from_json(rows).items()}


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[SamplesReader]:
    """A reader of a store of samples. Raises `StoreError` for anything else."""
    file = File(path)
    with closing(connected(file)) as connection:
        check_kind(connection, file, SAMPLES)
        with explained(file):
            yield SamplesReader(connection, file)


def load_samples(path: str | os.PathLike[str], *, decode: Callable[[Any], Any] | None = None) -> Samples[Any]:
    """The samples in a store, all of them drawn or not, as of now; it may be written meanwhile. No kernel is needed.

    `Samples.interrupted` says whether something is left to be drawn.

    `decode` undoes the `encode` that the values were written by, if there was one: `StoreError` without it.
    """
    with reading(path) as reader:
        name = reader.header.encode
        if name is not None and decode is None:
            raise StoreError(f"{path}: its values were written by encode={name}; give what undoes it: decode=...")
        if name is None and decode is not None:
            raise StoreError(f"{path}: its values were written as they are; leave decode out")
        return reader.samples(from_text if decode is None else lambda text: decode(from_text(text)))


def about_samples(path: str | os.PathLike[str]) -> SamplesFacts:
    """Facts of a store of samples. Raises as `load_samples` does."""
    with reading(path) as reader:
        return reader.about()


def double(data: bytes | None) -> float:
    """A float64 from its eight bytes; NaN where there are none."""
    return math.nan if data is None else struct.unpack("<d", data)[0]


def eight_bytes(value: float) -> bytes:
    """The inverse: SQLite's own numbers know no NaN and no -0.0."""
    return struct.pack("<d", value)
