"""A store open for writing, whatever it holds: opened, locked, begun, closed. Its header is for the kind to say."""

from __future__ import annotations

import logging
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from powermc.errors import StoreError
from powermc.store.file import (
    APPLICATION,
    FORMAT,
    HEADER,
    Execute,
    check_kind,
    check_place,
    connect,
    explained,
    kind_of,
    lock,
    prepare_writing,
    recognise,
    settle,
    taken,
    transaction,
    unlock,
)

_log = logging.getLogger(__name__)


class StoreFile(ABC):
    """A context manager. `header` is None as long as nothing has been written.

    Raises `StoreError` for a file that holds something already (without `resume`), that somebody is writing, that is
    something else, damaged or newer, and for a place that cannot be written.
    """

    KIND: str
    """What it holds: a constant of `powermc.store.file`."""

    def __init__(self, path: str | os.PathLike[str], *, resume: bool) -> None:
        self.path = Path(path)
        self.header: Any = None
        check_place(self.path, resume=resume)
        self._new = not self.path.exists()
        self._lock = lock(self.path)
        try:
            self.connection = connect(self.path, write=True)
            try:
                ours = recognise(self.connection, self.path)
                if ours and resume:
                    check_kind(self.connection, self.path, self.KIND)
                with explained(self.path):
                    self.header = self._read(self.connection) if ours and resume else None
                prepare_writing(self.connection, self.path)
            except BaseException:
                self.connection.close()
                raise
            if ours and not resume:  # somebody was faster
                kind = kind_of(self.connection, self.path)
                settle(self.connection)
                raise StoreError(f"{self.path}: {taken(kind, self.path)}")
        except BaseException:
            unlock(self._lock)
            raise
        _log.info("%s opened, %s", self.path, "to go on with" if ours else "empty")

    @abstractmethod
    def _read(self, connection: sqlite3.Connection) -> Any:
        """The header of a store that is there."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # A disk may be full, and what was committed is safe: nothing is left to be done but to let go.
            with suppress(StoreError), self.transaction() as execute:
                if self.header is not None:
                    execute("UPDATE header SET value = 'null' WHERE name = 'writer'")
            settle(self.connection)
            if self.header is None and self._new:  # it never came to a run
                self.path.unlink(missing_ok=True)
        finally:
            unlock(self._lock)

    def transaction(self) -> AbstractContextManager[Execute]:
        """All or nothing; Ctrl-C inside is nothing. Yields what executes a statement."""
        return transaction(self.connection, self.path)

    def _begin(self, execute: Execute, schema: str, header: Sequence[tuple[str, str]]) -> None:
        """Tables and header of a new store."""
        for statement in (HEADER, *schema.split(";")):
            execute(statement)
        execute(f"PRAGMA application_id = {APPLICATION}")
        execute(f"PRAGMA user_version = {FORMAT}")
        for row in header:
            execute("INSERT INTO header VALUES (?, ?)", row)

    def _rewrite(self, header: Sequence[tuple[str, str]]) -> None:
        """A changed header."""
        with self.transaction() as execute:
            for name, value in header:
                execute("UPDATE header SET value = ? WHERE name = ?", (value, name))
