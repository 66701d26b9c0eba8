"""Reading a comparison's file. No model and no task is needed: what was graded was written down."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from powermc.errors import StoreError
from powermc.evaluation.comparison.work import Result
from powermc.evaluation.methods import Answer
from powermc.lm.ledger import Ledger
from powermc.sequences.path import Tokens
from powermc.store.file import connect, explained, recognise
from powermc.store.packing import text_from_bytes
from powermc.store.reading import ledger_from_json
from powermc.store.writing import together


@dataclass(frozen=True)
class Given:
    """One answer, graded. error: why there is none, where the method failed."""

    tokens: Tokens
    text: str
    log_p: float
    error: str | None
    correct: bool
    answer: str | None
    why: str

    @property
    def kind(self) -> str:
        """What is counted: the kind of the grade, or "failed"."""
        return "failed" if self.error is not None else self.why.partition(":")[0]


@dataclass(frozen=True)
class Costs:
    """Sums over the units of a method; `answers` of them, answered in `seconds`, graded in `grading`."""

    answers: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    counts: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    grading: float = 0.0


@dataclass(frozen=True)
class Line:
    """One method: its spec and options, what it answered by (question, sample), what that and its preparation cost.

    same: all samples of a question are the same answer, and only the first was asked for. prepared: the name and the
    options of the method that answered.
    """

    spec: str
    options: Mapping[str, Any]
    same: bool
    prepared: tuple[str, Mapping[str, Any]]
    answers: Mapping[tuple[int, int], Given]
    costs: Costs
    preparing: Ledger
    preparing_seconds: float


@dataclass(frozen=True)
class Asked:
    """One question, as a table shows it."""

    id: str
    text: str
    reference: str


@dataclass(frozen=True)
class Record:
    """A whole comparison, finished or not."""

    header: Mapping[str, Any]
    questions: tuple[Asked, ...]
    lines: tuple[Line, ...]


class Reader:
    """Reads a comparison's file through an open connection."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection, self.path = connection, path

    @property
    def header(self) -> dict[str, Any]:
        with explained(self.path):
            rows = self.connection.execute("SELECT name, value FROM header").fetchall()
        return {name: json.loads(value) for name, value in rows}

    def hashes(self) -> list[str]:
        """Of the questions, in their order."""
        with explained(self.path):
            return [h for (h,) in self.connection.execute("SELECT hash FROM questions ORDER BY question")]

    def methods(self) -> dict[str, tuple[int, dict[str, Any], str]]:
        """Spec to number, options and prepared method, in the order in which they were added."""
        query = "SELECT spec, method, options, prepared FROM methods ORDER BY method"
        with explained(self.path):
            rows = self.connection.execute(query).fetchall()
        return {spec: (number, json.loads(options), prepared) for spec, number, options, prepared in rows}

    def done(self, method: int, question: int) -> set[int]:
        """The samples that there are."""
        query = "SELECT sample FROM answers WHERE method = ? AND question = ?"
        with explained(self.path):
            return {sample for (sample,) in self.connection.execute(query, (method, question))}

    def tokens(self, method: int, question: int, sample: int) -> Tokens | None:
        """The tokens of an answer, None if there is none."""
        query = "SELECT tokens FROM answers WHERE method = ? AND question = ? AND sample = ?"
        with explained(self.path):
            row = self.connection.execute(query, (method, question, sample)).fetchone()
        return None if row is None else _tokens(row[0])

    def results(self) -> Iterator[Result]:
        """Every unit, as the worker that did it gave it."""
        with explained(self.path):
            rows = self.connection.execute(
                "SELECT unit, method, questions, first, last, seconds, ledger, counts, worker FROM units ORDER BY unit"
            ).fetchall()
        for unit, method, questions, first, last, seconds, ledger, counts, worker in rows:
            query = "SELECT question, sample, tokens, text, log_p, error FROM answers WHERE unit = ?"
            with explained(self.path):
                found = {(q, s): rest for q, s, *rest in self.connection.execute(query, (unit,))}
            numbers, samples = tuple(json.loads(questions)), range(first, last + 1)
            yield Result(
                method,
                numbers,
                samples,
                [[_answer(*found[q, s][:3]) for s in samples] for q in numbers],
                ledger_from_json(ledger),
                json.loads(counts),
                seconds,
                worker,
                {i: text_from_bytes(e) for i, q in enumerate(numbers) if (e := found[q, first][3]) is not None},
            )

    def record(self) -> Record:
        with explained(self.path):
            questions = self.connection.execute("SELECT id, text, reference FROM questions ORDER BY question")
            asked = tuple(Asked(*map(text_from_bytes, row)) for row in questions)
            lines = self.connection.execute(
                "SELECT method, spec, options, same, prepared, seconds, ledger FROM methods ORDER BY method"
            ).fetchall()
        return Record(self.header, asked, tuple(self._line(*row) for row in lines))

    def _line(
        self, number: int, spec: str, options: str, same: int, prepared: str, seconds: float, ledger: str
    ) -> Line:
        answers = {
            (q, s): Given(
                _tokens(tokens),
                text_from_bytes(text),
                _log_p(log_p),
                _text(error),
                bool(correct),
                _text(answer),
                _text(why) or "",
            )
            for q, s, tokens, text, log_p, error, correct, answer, why in self.connection.execute(
                "SELECT question, sample, tokens, text, log_p, error, correct, answer, why FROM answers "
                "WHERE method = ? ORDER BY question, sample",
                (number,),
            )
        }
        spent, counts, taken, grading = Ledger(), Counter[str](), 0.0, 0.0
        units = self.connection.execute(
            "SELECT seconds, grading, ledger, counts FROM units WHERE method = ?", (number,)
        ).fetchall()
        for one, two, text, counted in units:
            taken, grading = taken + one, grading + (two or 0.0)
            counts.update(json.loads(counted))
            spent = together(spent, ledger_from_json(text))
        return Line(
            spec,
            json.loads(options),
            bool(same),
            tuple(json.loads(prepared)),
            answers,
            Costs(len(answers), spent, dict(counts), taken, grading),
            ledger_from_json(ledger),
            seconds,
        )


@contextmanager
def reading(path: Path, application: int, newest: int) -> Iterator[Reader]:
    """A reader of a file, finished or being written: what others write meanwhile does not show.

    Raises `StoreError` for a file that is missing, damaged, newer, or something else.
    """
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file; name the folder that 'powermc eval --out' was given")
    connection = connect(path, write=False)
    try:
        if not recognise(connection, path, application=application, newest=newest):
            raise StoreError(f"{path}: nothing has been written into it yet; begin the comparison again")
        with explained(path):
            connection.execute("BEGIN")
        yield Reader(connection, path)
    finally:
        connection.close()


def _answer(tokens: bytes, text: bytes, log_p: float | None) -> Answer:
    return Answer(_tokens(tokens), text_from_bytes(text), _log_p(log_p))


def _tokens(data: bytes) -> Tokens:
    return tuple(np.frombuffer(data, dtype="<i4").tolist())


def _log_p(value: float | None) -> float:
    return float("nan") if value is None else value


def _text(data: bytes | None) -> str | None:
    return None if data is None else text_from_bytes(data)
