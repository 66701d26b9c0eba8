"""The file of a comparison: one transaction per unit of work, holding its answers, its grades and what it cost.

A process that is killed loses the units that it had not finished, and nothing else. What is there is never run again.
Workers write files of the same kind, which are merged into the comparison's own. Rules and errors of the file are those
of `powermc.store.file`.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from powermc.errors import StoreError
from powermc.evaluation.comparison.plan import Entry, Plan, as_json
from powermc.evaluation.comparison.reading import Reader
from powermc.evaluation.comparison.work import Result
from powermc.evaluation.methods import Method
from powermc.evaluation.tasks import Grade, Item
from powermc.lm.ledger import Ledger
from powermc.sequences.path import Prompt
from powermc.store.file import (
    Execute,
    connect,
    lock,
    prepare_writing,
    recognise,
    settle,
    transaction,
    unlock,
)
from powermc.store.packing import rounded, text_to_bytes
from powermc.store.reading import ledger_as_json

APPLICATION = 0x706D6332
"""SQLite's application_id of a comparison: "pmc2"."""

FORMAT = 1
"""SQLite's user_version: raised whenever an older powermc could not read it."""

FILE = "results.db"
"""The comparison's own file in its folder."""

SCHEMA = """
CREATE TABLE header (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE questions (
    question INTEGER PRIMARY KEY, id BLOB NOT NULL, text BLOB NOT NULL, reference BLOB NOT NULL, hash TEXT NOT NULL);
CREATE TABLE methods (
    method INTEGER PRIMARY KEY, spec TEXT NOT NULL UNIQUE, options TEXT NOT NULL, prepared TEXT NOT NULL,
    same INTEGER NOT NULL, seconds REAL NOT NULL, ledger TEXT NOT NULL);
CREATE TABLE units (
    unit INTEGER PRIMARY KEY, method INTEGER NOT NULL, questions TEXT NOT NULL, first INTEGER NOT NULL,
    last INTEGER NOT NULL, seconds REAL NOT NULL, grading REAL, ledger TEXT NOT NULL, counts TEXT NOT NULL,
    worker TEXT NOT NULL);
CREATE TABLE answers (
    method INTEGER, question INTEGER, sample INTEGER, tokens BLOB NOT NULL, text BLOB NOT NULL, log_p REAL,
    error BLOB, correct INTEGER, answer BLOB, why BLOB, unit INTEGER NOT NULL,
    PRIMARY KEY (method, question, sample));
"""
"""header: JSON values by name. methods: `same` says that all samples are the same answer, `prepared` is the method that
answers, with all its options; seconds and ledger are those of the preparation. units: `last` is the last sample,
included. answers: correct, answer, why and a unit's `grading` (seconds) are NULL in a worker's file."""


class Results:
    """A comparison's file, open for writing; a context manager. `reader` reads it.

    Raises `StoreError` for a file that somebody is writing, that is something else, damaged or newer, and for a place
    that cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise StoreError(f"{self.path}: there is no folder {self.path.parent}; make it first")
        self._lock = _locked(self.path)
        try:
            self.connection = connect(self.path, write=True)
            try:
                self.begun = recognise(self.connection, self.path, application=APPLICATION, newest=FORMAT)
                prepare_writing(self.connection, self.path)
            except BaseException:
                self.connection.close()
                raise
        except BaseException:
            unlock(self._lock)
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            settle(self.connection)
            if not self.begun:  # it never came to anything
                self.path.unlink(missing_ok=True)
        finally:
            unlock(self._lock)

    def transaction(self) -> AbstractContextManager[Execute]:
        """All or nothing; Ctrl-C inside is nothing. Yields what executes a statement."""
        return transaction(self.connection, self.path)

    @property
    def reader(self) -> Reader:
        return Reader(self.connection, self.path)

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the header of a new file; `run` names the comparison, for workers' files to refer to."""
        with self.transaction() as execute:
            for statement in SCHEMA.split(";"):
                execute(statement)
            execute(f"PRAGMA application_id = {APPLICATION}")
            execute(f"PRAGMA user_version = {FORMAT}")
            for name, value in {"run": uuid.uuid4().hex, **header}.items():
                execute("INSERT INTO header VALUES (?, ?)", (name, json.dumps(value)))
        self.begun = True

    def update(self, **values: Any) -> None:
        """Change some of the header."""
        with self.transaction() as execute:
            for name, value in values.items():
                execute("INSERT OR REPLACE INTO header VALUES (?, ?)", (name, json.dumps(value)))

    def check(self, plan: Plan, identity: str) -> None:
        """Raise `StoreError` by name for a setting that is not the comparison's, and for fewer samples."""
        header = self.reader.header
        mine = {**header["settings"], "model": header["identity"]}
        asked = {**json.loads(json.dumps(plan.settings())), "model": identity}
        for name in mine:
            if mine[name] != asked.get(name):
                raise StoreError(
                    f"{self.path}: it was made with {name} = {mine[name]!r}, and {asked.get(name)!r} is asked for; "
                    "only more questions, samples and methods can be added: give what it was made with, or another "
                    "folder"
                )
        if plan.samples < header["samples"]:
            raise StoreError(
                f"{self.path}: it has {header['samples']} samples, and fewer, {plan.samples}, are asked for; give at "
                f"least {header['samples']}, or another folder"
            )

    def learn_questions(self, items: Sequence[Item], prompts: Sequence[Prompt]) -> None:
        """Write the questions that are new. Raises `StoreError` unless those that are there come first, unchanged."""
        known = self.reader.hashes()
        if len(items) < len(known):
            raise StoreError(
                f"{self.path}: it has {len(known)} questions, and fewer, {len(items)}, are given; give at least "
                f"{len(known)}, or another folder"
            )
        hashes = [_hash(item, prompt) for item, prompt in zip(items, prompts, strict=True)]
        for number, (here, there) in enumerate(zip(known, hashes, strict=False), 1):
            if here != there:
                raise StoreError(
                    f"{self.path}: question {number} ({items[number - 1].id!r}) is not the one that it has (its text, "
                    "its reference or the tokens of its prompt differ): give the same data, examples and tokenizer, "
                    "or another folder"
                )
        with self.transaction() as execute:
            for number in range(len(known), len(items)):
                item = items[number]
                texts = (text_to_bytes(text) for text in (item.id, item.question, item.reference))
                execute("INSERT INTO questions VALUES (?, ?, ?, ?, ?)", (number, *texts, hashes[number]))

    def learn_method(self, entry: Entry, prepared: Method, seconds: float, spent: Ledger) -> int:
        """Write a method that is ready to answer; returns its number."""
        with self.transaction() as execute:
            number = execute("SELECT count(*) FROM methods").fetchone()[0]
            options = json.dumps({**entry.method.options(), "alpha of the target": entry.terms.alpha}, sort_keys=True)
            facts = (as_json(prepared), entry.method.deterministic, seconds, ledger_as_json(spent))
            execute("INSERT INTO methods VALUES (?, ?, ?, ?, ?, ?, ?)", (number, entry.spec, options, *facts))
        return number

    def commit(self, result: Result, grades: Sequence[Sequence[Grade]] | None, grading: float | None) -> None:
        """Write a finished unit: one transaction. Answers that are there stay as they are."""
        tokens = [[np.array(a.tokens, dtype="<i4").tobytes() for a in row] for row in result.answers]
        with self.transaction() as execute:
            unit = execute(
                "INSERT INTO units VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    result.number,
                    json.dumps(result.questions),
                    result.samples.start,
                    result.samples.stop - 1,
                    result.seconds,
                    grading,
                    ledger_as_json(result.spent),
                    json.dumps(dict(result.counts)),
                    result.worker,
                ),
            ).lastrowid
            for i, question in enumerate(result.questions):
                error = result.errors.get(i)
                for j, sample in enumerate(result.samples):
                    given = result.answers[i][j]
                    log_p = rounded(given.log_p) if given.log_p == given.log_p else None  # SQLite has no NaN
                    row = (tokens[i][j], text_to_bytes(given.text), log_p, _bytes(error))
                    grade = (None,) * 3 if grades is None else _grade(grades[i][j])
                    where = (result.number, question, sample)
                    execute(
                        "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (*where, *row, *grade, unit),
                    )


def _locked(path: Path) -> Any:
    try:
        return lock(path)
    except StoreError as error:
        if "another process" not in str(error):
            raise
        raise StoreError(f"{path}: another process is writing it; wait for its end, or name another folder") from error


def _grade(grade: Grade) -> tuple[int, bytes | None, bytes]:
    return int(grade.correct), _bytes(grade.answer), text_to_bytes(grade.why)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text_to_bytes(text)


def _hash(item: Item, prompt: Prompt) -> str:
    facts = json.dumps([item.id, item.question, item.reference, list(prompt.ids)])
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def remove(path: Path) -> None:
    """Delete a file of a worker and what SQLite left beside it."""
    for end in ("", "-wal", "-shm", ".lock"):
        with suppress(OSError):
            os.unlink(f"{path}{end}")
