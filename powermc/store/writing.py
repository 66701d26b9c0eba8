"""Writing a run down as it happens: one transaction per event, holding all that it takes to go on from there."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from powermc.errors import ChainError, StoreError
from powermc.lm.ledger import Ledger
from powermc.recording import Decoder, Key, Recorder, kept
from powermc.results import Run
from powermc.sequences.growth import BlockwisePower, Committed, Grown, Point
from powermc.sequences.path import Path, Prompt, Tokens
from powermc.store.base import StoreFile
from powermc.store.file import RUN, SCHEMA, Execute, explained
from powermc.store.header import Header, this_process
from powermc.store.packing import Layout, Tokenization, fields_from_json, text_delta, text_to_bytes
from powermc.store.reading import Reader, ledger_as_json


class Store(StoreFile):
    """The store of a run, open for writing; see `StoreFile` for what is refused."""

    KIND = RUN
    header: Header | None

    def _read(self, connection: sqlite3.Connection) -> Header:
        return Reader(connection, self.path).header

    @property
    def reader(self) -> Reader:
        return Reader(self.connection, self.path)

    def begin(self, header: Header, prompts: Sequence[Prompt]) -> None:
        """Write the header of a new run."""
        header = replace(header, writer=this_process())
        with self.transaction() as execute:
            self._begin(execute, SCHEMA, header.rows())
            for p, prompt in enumerate(prompts):
                ids = np.array(prompt.ids, dtype="<i8").tobytes()
                execute(
                    "INSERT INTO prompts VALUES (?, ?, ?, ?)", (p, str(prompt.key), ids, text_to_bytes(prompt.text))
                )
            execute("INSERT INTO totals VALUES (1, 0.0, ?, ?)", (ledger_as_json(Ledger()),) * 2)
        self.header = header

    def update(self, header: Header) -> None:
        """Write a changed header."""
        self.header = replace(header, writer=this_process())
        self._rewrite(self.header.rows())

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `StoreError` unless these are the prompts of the run, in their order."""
        mine = self.reader.prompts
        if len(mine) != len(prompts):
            raise StoreError(
                f"{self.path}: it has {len(mine)} prompts, and {len(prompts)} are given; give the same ones, or "
                "another file for others (powermc merge joins them)"
            )
        for p, (here, there) in enumerate(zip(mine, prompts, strict=True)):
            if (here.ids, here.key) != (there.ids, there.key):
                raise StoreError(
                    f"{self.path}: prompt {p} was {_shown(here)}, and {_shown(there)} is given; give the same ones in "
                    "the same order, or another file for others (powermc merge joins them)"
                )


class Writer:
    """The `Journal` of a store. Sums go on from what the store holds; a chain that failed is tried again."""

    def __init__(self, store: Store, plan: BlockwisePower, prompts: Sequence[Prompt], decode: Decoder) -> None:
        assert store.header is not None
        self.store, self.plan, self.prompts, self.decode, self.header = store, plan, prompts, decode, store.header
        self.layout = Layout(fields_from_json(self.header.fields))
        self.tokens = Tokenization(self.header.vocabulary)
        # The last path and draw's text that were written of each chain, which the next are written as differences
        # from; and where each chain is.
        self._stored: dict[Key, Tokens] = {}
        self._text: dict[Key, str] = {}
        self._current: dict[Key, tuple[Tokens, str | None]] = {}
        with explained(store.path):
            reader = store.reader
            self._seconds, *self._ledgers = reader.totals()
            self._places = reader.places(prompts)
            self._done = {key for key, place in self._places.items() if reader.done(place)}
            self._pieces = {token for token, _ in reader.pieces()}
            for key, place in self._places.items():
                story = reader.story(key, prompts[key[0]])
                if story.stored is not None and place.path is not None:
                    self._stored[key], self._current[key] = story.stored.tokens, (place.path.tokens, place.text)
                if story.text is not None:
                    self._text[key] = story.text
        self._recorder: Recorder | None = None

    def points(self, chains: int) -> dict[Key, Point | None]:
        """Where the chains that have something left to do go on."""
        points: dict[Key, Point | None] = {}
        for key in ((p, c) for p in range(len(self.prompts)) for c in range(chains)):
            place = self._places.get(key)
            if place is None or place.path is None:
                points[key] = None
            elif key not in self._done:
                bare = Path(self.prompts[key[0]], place.path.tokens, place.path.finished)
                points[key] = Point(place.block, place.steps - place.block * self.plan.steps, bare)
        return points

    def start(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def grow(self, key: Key, event: Grown) -> None:
        path, words = event.path, self.decode.text(event.path.tokens)
        delta = self.tokens.delta(path, self._stored.get(key, ()))
        cost = np.array([event.tokens], dtype="<i4").tobytes()
        with self.store.transaction() as execute:
            self._learn(execute, path.tokens)
            row = (*self._number(key), event.block, *delta, event.near_ties, cost)
            execute("INSERT INTO growth VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._move(execute, key, event.block, event.block * self.plan.steps, path, words)
            self._count(execute)
        self._stored[key], self._current[key] = path.tokens, (path.tokens, words)

    def commit(self, key: Key, event: Committed, proposed: Tokens | None) -> None:
        path, info, last = event.state.value, event.info, event.block == self.plan.blocks - 1
        stored, text = self._stored.get(key, ()), self._text.get(key)
        before, words = self._current.get(key, ((), None))
        moved = path.tokens != before
        if moved:
            words = self.decode.text(path.tokens)
        delta: Sequence[Any] = (None, None, None, None)
        told: Sequence[Any] = (None, None)
        if kept(self.plan, event.step, self.header.thin):
            if path.tokens != stored:
                delta, stored = self.tokens.delta(path, stored), path.tokens
            if last and words is not None and words != text:
                told, text = text_delta(words, text or ""), words
        cost = np.array([info.get(name, f.fill) for name, f in self.layout.costs.items()], dtype="<i4").tobytes()
        drawn = self._proposed(info, proposed, path, stored)
        with self.store.transaction() as execute:
            self._learn(execute, (*path.tokens, *(proposed or ())) if moved else proposed or ())
            row = (*self._number(key), event.step, self.layout.pack(info), drawn, *delta, *told, cost)
            execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            if moved:
                self._move(execute, key, event.block, event.step + 1, path, words)
            else:
                where = (event.block, event.step + 1, *self._number(key))
                execute("UPDATE chains SET block = ?, steps = ?, error = NULL WHERE prompt = ? AND chain = ?", where)
            self._count(execute)
        self._stored[key], self._current[key] = stored, (path.tokens, words)
        if text is not None:
            self._text[key] = text

    def fail(self, key: Key, error: ChainError, steps: int) -> None:
        text = f"{type(error).__name__}: {error}"
        with self.store.transaction() as execute:
            execute("INSERT OR IGNORE INTO chains VALUES (?, ?, 0, 0, NULL, NULL, NULL, NULL, NULL)", self._number(key))
            execute("UPDATE chains SET error = ? WHERE prompt = ? AND chain = ?", (text, *self._number(key)))
            self._count(execute)

    def finish(self, recorder: Recorder) -> Run:
        """The whole run, as the file has it: what this and earlier sessions drew."""
        with self.store.transaction() as execute:
            self._count(execute)
        with explained(self.store.path):
            run = self.store.reader.run()
        result = recorder.prepared.result(recorder.model, run.infos, run.prompts, run.cost)
        self.store.update(replace(self.header, result=result))
        with explained(self.store.path):
            reader = self.store.reader
            return replace(run, early_exit=reader.early_exit(run.infos, reader.totals()[2]))

    def _number(self, key: Key) -> Key:
        """The numbers of prompt and chain in the file."""
        return key[0], key[1] + self.header.first_chain

    def _learn(self, execute: Execute, tokens: Tokens) -> None:
        """Write the pieces of tokens not seen before."""
        new = set(tokens) - self._pieces
        for token in sorted(new):
            if (piece := self.decode.piece(token)) is not None:
                execute("INSERT INTO pieces VALUES (?, ?)", (token, text_to_bytes(piece)))
        self._pieces |= new

    def _move(self, execute: Execute, key: Key, block: int, steps: int, path: Path, words: str | None) -> None:
        """A chain is at a new path."""
        _, tokens, log_p, finished = self.tokens.delta(path, ())
        text = None if words is None else text_to_bytes(words)
        row = (*self._number(key), block, steps, tokens, log_p, finished, text)
        execute("INSERT OR REPLACE INTO chains VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)", row)

    def _count(self, execute: Execute) -> None:
        """Times and costs so far, with every event."""
        if self._recorder is not None:
            session = (self._recorder.cost, self._recorder.prepared.spent or Ledger())
            spent = (ledger_as_json(together(a, b)) for a, b in zip(self._ledgers, session, strict=True))
            row = (self._seconds + self._recorder.seconds, *spent)
            execute("UPDATE totals SET seconds = ?, ledger = ?, surrogate = ?", row)

    def _proposed(self, info: Mapping[str, Any], proposed: Tokens | None, path: Path, stored: Tokens) -> Any:
        """Proposed tokens as bytes; their number, where they are those of the path that is written, after the cut."""
        if proposed is None:
            return None
        cut = info["cut"]
        if info["accepted"] and stored == path.tokens and path.tokens[cut : cut + len(proposed)] == proposed:
            return len(proposed)
        return self.tokens.pack(proposed) if self.header.keep_proposals else None


def together(one: Ledger, other: Ledger) -> Ledger:
    """The sum of two ledgers of the same model."""
    total = Ledger(layers=max(one.layers, other.layers))
    for f in fields(Ledger):
        if f.name != "layers":
            setattr(total, f.name, getattr(one, f.name) + getattr(other, f.name))
    return total


def _shown(prompt: Prompt) -> str:
    text = repr(prompt.text) if prompt.text else f"{len(prompt.ids)} tokens"
    return text if len(text) <= 60 else text[:57] + "..."
