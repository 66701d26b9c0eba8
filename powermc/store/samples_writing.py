"""Writing down what a kernel draws, as it draws it: one transaction per step, holding all that it takes to go on."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic

from powermc.errors import ChainError, StoreError
from powermc.sampling import Draw, Point, Points, Samples, Schedule, without_cache
from powermc.store.base import StoreFile
from powermc.store.file import SAMPLES, SAMPLES_SCHEMA, explained
from powermc.store.header import this_process
from powermc.store.samples import Records, SamplesHeader, SamplesReader, eight_bytes
from powermc.store.values import Codec, described, without_scores
from powermc.types import Kernel, State, X

CHANGED = 0.01
"""By more than this share, or so many nats, the log density of an initial value is that of another target: no rounding
of a model in whatever dtype comes near it."""


class SamplesWriter(StoreFile, Generic[X]):
    """The store of samples, open for writing: the `Journal` of `powermc.sample`. A chain that failed is tried again.

    Raises `ArgumentError` for values that cannot be written, before there is a file, and `StoreError` for a store that
    cannot be begun or gone on with: see `StoreFile` and `SamplesHeader.check`.
    """

    KIND = SAMPLES
    header: SamplesHeader | None

    def __init__(
        self,
        path: str | os.PathLike[str],
        kernel: Kernel[X],
        starts: Sequence[X],
        schedule: Schedule,
        encode: Callable[[X], Any] | None,
        decode: Callable[[Any], X] | None,
        *,
        resume: bool,
    ) -> None:
        self.codec, self.schedule, self.records = Codec(encode, decode), schedule, Records(kernel.fields)
        initial = [without_scores(self.codec.check(value)) for value in starts]
        asked = SamplesHeader.of_run(described(kernel), kernel.fields, schedule, initial, self.codec)
        super().__init__(path, resume=resume)
        try:
            self._asked = self._opened(asked)
            with explained(self.path):
                reader = SamplesReader(self.connection, self.path)
                self._places = reader.places
                last = {chain: reader.last(chain) for chain in self._places}
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        # As text: the value that each chain is at, and the one that was written last with a draw.
        self._current = {chain: place.value for chain, place in self._places.items()}
        self._written = {chain: text and without_scores(text) for chain, text in last.items()}

    def _opened(self, asked: SamplesHeader) -> SamplesHeader | None:
        """Begin what is new; compare what is there. Returns the header that it has yet to get."""
        if self.header is None:
            with self.transaction() as execute:
                self._begin(execute, SAMPLES_SCHEMA, asked.rows())
            self.header = asked
            return None
        self.header.check(self.path, asked)
        self.header = replace(self.header, writer=this_process())
        self._rewrite(self.header.rows())
        return self.header.extended(asked)

    def _read(self, connection: sqlite3.Connection) -> SamplesHeader:
        return SamplesReader(connection, self.path).header

    def points(self) -> Points[X]:
        points: dict[int, Point[X] | None] = {}
        for chain in range(self.schedule.chains):
            place = self._places.get(chain)
            if place is None or place.value is None:
                points[chain] = None
            elif place.steps < len(self.schedule.steps):
                points[chain] = Point(State(self.codec.read(place.value), place.log_density), place.steps)
        return points

    def begin(self, chain: int, state: State[X]) -> None:
        """Raises `StoreError` where the initial value of a chain has another log density than when it began."""
        place = self._places.get(chain)
        if place is None or place.value is None:
            text, density = without_scores(self.codec.write(without_cache(state.value))), eight_bytes(state.log_density)
            with self.transaction() as execute:
                execute("INSERT OR REPLACE INTO chains VALUES (?, ?, 0, ?, ?, NULL)", (chain, density, density, text))
            self._current[chain] = text
        elif abs(state.log_density - place.began) > CHANGED * max(1.0, abs(place.began)):
            raise StoreError(
                f"{self.path}: the initial value of chain {chain} had log density {place.began:.6g}, and has "
                f"{state.log_density:.6g} under the kernel given now: it has another target; give the kernel of the "
                "run, or another file"
            )
        if self._asked is not None:  # the kernel has been seen to be that of the run
            self.header, self._asked = self._asked, None
            self._rewrite(self.header.rows())

    def commit(self, draw: Draw[X]) -> None:
        chain, step, state, info = draw
        text = self.codec.write(without_cache(state.value))
        bare, density = without_scores(text), eight_bytes(state.log_density)
        drawn = self.schedule.draw(step) is not None
        told = text if drawn and bare != self._written.get(chain) else None
        taken = step - self.schedule.first + 1
        with self.transaction() as execute:
            execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?)", (chain, step, density, *self.records.pack(info), told)
            )
            if bare != self._current[chain]:
                execute("UPDATE chains SET value = ? WHERE chain = ?", (bare, chain))
            where = (taken, density, chain)
            execute("UPDATE chains SET steps = ?, log_density = ?, error = NULL WHERE chain = ?", where)
        self._current[chain] = bare
        if drawn:
            self._written[chain] = bare

    def fail(self, chain: int, error: ChainError) -> None:
        text = f"{type(error).__name__}: {error}"
        with self.transaction() as execute:
            execute("INSERT OR IGNORE INTO chains VALUES (?, NULL, 0, NULL, NULL, NULL)", (chain,))
            execute("UPDATE chains SET error = ? WHERE chain = ?", (text, chain))

    def finish(self, interrupted: bool) -> Samples[X]:
        """All samples, as the file has them: what this and earlier sessions drew."""
        with explained(self.path):
            return SamplesReader(self.connection, self.path).samples(self.codec.read)
