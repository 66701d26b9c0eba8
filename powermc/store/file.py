"""The file of a store: opened, recognised, locked; and what SQLite's errors mean to the one who has the file.

One process writes, any number read meanwhile (SQLite in WAL mode, each event a transaction). A process that is killed
loses nothing that it had committed; a machine that loses power may lose the last moments, and never more than that.
A store that was closed is a single file.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from powermc.errors import StoreError

APPLICATION = 0x706D6331
"""SQLite's application_id of a store: "pmc1"."""

FORMAT = 1
"""SQLite's user_version of a store: raised whenever an older powermc could not read it."""

BUSY = 5.0
"""Seconds to wait for another program that holds the file."""

Execute = Callable[..., sqlite3.Cursor]

HEADER = "CREATE TABLE header (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
"""JSON values by name. What a store holds is its `kind`; without one it is a run."""

RUN, SAMPLES = "run", "samples"
"""Kinds of a store: what `power_sample` draws, and what `sample` does."""

SCHEMA = """
CREATE TABLE prompts (prompt INTEGER PRIMARY KEY, key TEXT NOT NULL, ids BLOB NOT NULL, text BLOB NOT NULL);
CREATE TABLE pieces (token INTEGER PRIMARY KEY, text BLOB NOT NULL);
CREATE TABLE growth (
    prompt INTEGER, chain INTEGER, block INTEGER, kept INTEGER NOT NULL, tokens BLOB NOT NULL, log_p BLOB NOT NULL,
    finished INTEGER NOT NULL, near_ties INTEGER NOT NULL, cost BLOB, PRIMARY KEY (prompt, chain, block));
CREATE TABLE steps (
    prompt INTEGER, chain INTEGER, step INTEGER, info BLOB NOT NULL, proposed BLOB, kept INTEGER, tokens BLOB,
    log_p BLOB, finished INTEGER, text_kept INTEGER, text BLOB, cost BLOB, PRIMARY KEY (prompt, chain, step));
CREATE TABLE chains (
    prompt INTEGER, chain INTEGER, block INTEGER NOT NULL, steps INTEGER NOT NULL, tokens BLOB, log_p BLOB,
    finished INTEGER, text BLOB, error TEXT, PRIMARY KEY (prompt, chain));
CREATE TABLE totals (
    one INTEGER PRIMARY KEY CHECK (one = 1), seconds REAL NOT NULL, ledger TEXT NOT NULL, surrogate TEXT NOT NULL);
"""
"""Of a run. growth, steps: one row per event, a path as what it shares with the one before it in its chain and the rest
(`powermc.store.packing.Delta`), nothing where it stayed; `text` the same way, from the text before; `cost` what depends
on more than the run. chains: where each chain is now, its whole path. totals: so far, and apart what a surrogate that
is a model of its own ran."""

SAMPLES_SCHEMA = """
CREATE TABLE steps (
    chain INTEGER, step INTEGER, log_density BLOB NOT NULL, info BLOB NOT NULL, more TEXT, value TEXT,
    PRIMARY KEY (chain, step));
CREATE TABLE chains (
    chain INTEGER PRIMARY KEY, began BLOB, steps INTEGER NOT NULL, log_density BLOB, value TEXT, error TEXT);
"""
"""Of what a kernel draws. steps: one row per step; a value where a draw was made and it is another than that of the
draw before it in its chain; `more`: infos that are no numbers. chains: where each is now, and the log density that it
began with."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors as `StoreError`s that name the file and the fix."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {_reason(error, path)}") from error


def _reason(error: sqlite3.Error, path: Path) -> str:
    code = getattr(error, "sqlite_errorname", "")
    what = " ".join(str(error).split())
    if code.startswith("SQLITE_FULL"):
        return f"no room is left on the disk ({what}); what was committed is kept: make room, then resume"
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"another program holds it locked ({what}); close that program, then try again"
    if code.startswith("SQLITE_READONLY"):
        return f"it cannot be written ({what}); make file and folder writable, or copy the store elsewhere"
    if code.startswith("SQLITE_CANTOPEN"):
        return f"it cannot be opened ({what}); check that {path.parent} exists and can be written"
    if code.startswith("SQLITE_NOTADB"):
        return "it is no store of powermc, but another kind of file; name another file"
    if code.startswith("SQLITE_CORRUPT"):
        return f"it is damaged ({what}); go back to a copy, or save what can be read: sqlite3 {path} .recover"
    if code.startswith("SQLITE_IOERR"):
        return f"reading or writing it failed ({what}); what was committed is kept: check the disk, then resume"
    return f"SQLite says {what}; is it a store of powermc, whole and of this version?"


def connect(path: Path, *, write: bool) -> sqlite3.Connection:
    """A connection without automatic transactions. Raises `StoreError` if there is no way to open the file."""
    with explained(path):
        uri = path.resolve().as_uri()
        connection = sqlite3.connect(
            f"{uri}?mode={'rwc' if write else 'ro'}", uri=True, timeout=BUSY, isolation_level=None
        )
        try:
            connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.OperationalError:
            connection.close()
            if write or not path.is_file() or Path(f"{path}-wal").exists():
                raise
            # A read-only folder has no place for the index that readers share; without a log none is needed.
            connection = sqlite3.connect(f"{uri}?immutable=1", uri=True, timeout=BUSY, isolation_level=None)
            connection.execute("PRAGMA user_version").fetchone()
        except BaseException:
            connection.close()
            raise
    return connection


def recognise(
    connection: sqlite3.Connection, path: Path, *, application: int = APPLICATION, newest: int = FORMAT
) -> bool:
    """Whether the file holds a store; False if it holds nothing at all. Raises `StoreError` for anything else.

    `application`, `newest`: the kind of store that is looked for, and the newest format of it that can be read.
    """
    with explained(path):
        found = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if found == 0 and tables == 0:
        return False
    if found != application:
        raise StoreError(f"{path}: it is a database of another program, and is left alone; name another file")
    if version > newest:
        raise StoreError(
            f"{path}: it was written by a newer powermc (format {version}, this one knows {newest}); "
            "upgrade: pip install --upgrade powermc"
        )
    return True


def check_place(path: Path, *, resume: bool) -> None:
    """Raise `StoreError` unless a store can be begun here, or gone on with."""
    if path.is_dir():
        raise StoreError(f"{path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise StoreError(f"{path}: there is no folder {path.parent}; make it first")
    if path.exists() and not path.is_file():
        raise StoreError(f"{path}: it is not an ordinary file; name another one")
    if path.is_file() and path.stat().st_size and not resume:
        connection = connect(path, write=False)
        try:
            if not recognise(connection, path):
                return
            kind = kind_of(connection, path)
        finally:
            connection.close()
        raise StoreError(f"{path}: {taken(kind, path)}")


def taken(kind: str, path: Path) -> str:
    """Why a store that is not to be gone on with cannot be begun."""
    if kind == SAMPLES:
        return "it holds samples already; go on with them: resume=True; or name another"
    return f"it holds a run already; go on with it: resume=True, or: powermc resume {path}; or name another"


def kind_of(connection: sqlite3.Connection, path: Path) -> str:
    """What a store holds: `RUN` or `SAMPLES`. Raises `StoreError` for what this powermc does not know."""
    with explained(path):
        row = connection.execute("SELECT value FROM header WHERE name = 'kind'").fetchone()
    kind = RUN if row is None else str(row[0]).strip('"')
    if kind not in (RUN, SAMPLES):
        raise StoreError(f"{path}: it holds {kind}, which this powermc does not know; pip install --upgrade powermc")
    return kind


def check_kind(connection: sqlite3.Connection, path: Path, wanted: str) -> None:
    """Raise `StoreError` where a store holds something else, and say who reads that."""
    kind = kind_of(connection, path)
    if kind == wanted:
        return
    if kind == SAMPLES:
        raise StoreError(
            f"{path}: it holds samples of a kernel (powermc.sample), and no run of power_sample; read it: "
            "powermc.load, powermc show; go on with it: sample(kernel, ..., store=..., resume=True)"
        )
    raise StoreError(
        f"{path}: it holds a run of power_sample, and no samples of a kernel; read it: powermc.load, powermc show; go "
        f"on with it: powermc resume {path}"
    )


def lock(path: Path) -> Any:
    """The lock of the one who writes. Raises `StoreError` if somebody does. A process that dies gives it back."""
    from filelock import FileLock, Timeout

    held = FileLock(f"{path.resolve()}.lock", timeout=0)  # whatever links lead to the file
    try:
        held.acquire()
    except Timeout as error:
        raise StoreError(
            f"{path}: another process is writing it; wait for its end, or watch it: powermc show {path} --follow"
        ) from error
    except OSError as error:
        raise StoreError(f"{path}: it cannot be written ({error.strerror}); choose a folder that can be") from error
    return held


def unlock(held: Any) -> None:
    """Give the lock back, and leave no file behind."""
    with suppress(OSError):
        os.unlink(held.lock_file)
    held.release()


def prepare_writing(connection: sqlite3.Connection, path: Path) -> None:
    """WAL, and no wait for the disk but at checkpoints. Raises `StoreError` for a damaged file."""
    with explained(path):
        end = time.monotonic() + BUSY
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL").fetchone()
                break
            except sqlite3.OperationalError as error:  # changing the mode does not wait for a lock by itself
                if time.monotonic() > end or not error.sqlite_errorname.startswith("SQLITE_BUSY"):
                    raise
                time.sleep(0.05)
        connection.execute("PRAGMA synchronous=NORMAL")
        found = " ".join(connection.execute("PRAGMA quick_check(1)").fetchone()[0].split())
    if found != "ok":
        raise StoreError(
            f"{path}: it is damaged ({found}); go back to a copy, or save what can be read: sqlite3 {path} .recover"
        )


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[Execute]:
    """All or nothing; Ctrl-C inside is nothing. Yields what executes a statement."""
    with explained(path):
        try:
            if connection.in_transaction:  # Ctrl-C found its way between two statements
                connection.execute("ROLLBACK")
            connection.execute("BEGIN IMMEDIATE")
            yield connection.execute
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise


def settle(connection: sqlite3.Connection) -> None:
    """Close, as a single file if nobody reads it and the disk lets us; else the log stays, and is used by the next."""
    try:
        with suppress(sqlite3.Error):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            connection.execute("PRAGMA busy_timeout=0")
            connection.execute("PRAGMA journal_mode=DELETE").fetchone()
    finally:
        connection.close()
