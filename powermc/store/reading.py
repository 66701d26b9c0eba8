"""From a store to a `Run`. No model is needed: texts were written with the paths."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path as File
from typing import Any

import numpy as np

from powermc import errors
from powermc.errors import ChainError, StoreError
from powermc.lm.ledger import Ledger
from powermc.results import Chain, Run
from powermc.sequences.path import Path, Prompt, Tokens
from powermc.stages import count_stages
from powermc.store.file import RUN, check_kind, connect, explained, recognise
from powermc.store.header import Header
from powermc.store.packing import (
    Layout,
    Tokenization,
    fields_from_json,
    hash_rows,
    log_p_of,
    text_from_bytes,
)

Key = tuple[int, int]

DIGESTED = {
    "prompts": "prompt, key, ids",
    "growth": "prompt, chain, block, kept, tokens, log_p, finished, near_ties",
    "steps": "prompt, chain, step, info, proposed, kept, tokens, log_p, finished, text_kept, text",
    "chains": "prompt, chain, block, steps, tokens, log_p, finished, text, error",
}
"""What two stores of the same run have in common, byte for byte: all but times, costs and the header."""


@dataclass
class Story:
    """What one chain did, from its rows. `stored` and `text` are the last path and the last text that were written."""

    starts: dict[int, Path] = field(default_factory=dict)
    history: list[Path | None] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    infos: list[bytes] = field(default_factory=list)
    costs: list[bytes] = field(default_factory=list)
    proposals: list[np.ndarray | None] = field(default_factory=list)
    grown: int = 0
    near_ties: int = 0
    stored: Path | None = None
    text: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a chain is now."""

    block: int
    steps: int
    path: Path | None
    text: str | None
    error: ChainError | None


class Reader:
    """Reads a store through an open connection."""

    def __init__(self, connection: sqlite3.Connection, path: File) -> None:
        self.connection, self.path = connection, path
        rows = dict(connection.execute("SELECT name, value FROM header"))
        try:
            self.header = Header.of_rows(rows)
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(f"{path}: its header is not whole ({error}); go back to a copy") from error
        self.layout = Layout(fields_from_json(self.header.fields))
        self.tokens = Tokenization(self.header.vocabulary)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        rows = self.connection.execute("SELECT ids, text, key FROM prompts ORDER BY prompt")
        return tuple(
            Prompt(tuple(np.frombuffer(ids, "<i8").tolist()), text_from_bytes(text), int(key))
            for ids, text, key in rows
        )

    @property
    def blocks(self) -> int:
        """How many blocks cover the horizon."""
        settings = self.header.settings
        return -(-settings["max_new_tokens"] // settings["block_size"])

    @property
    def first(self) -> int:
        """The number of the first step on the last block."""
        return (self.blocks - 1) * self.header.settings["steps"]

    @property
    def total(self) -> int:
        """Kernel steps of a chain."""
        return self.first + self.header.settings["draws"]

    def done(self, place: Place) -> bool:
        """Whether there is nothing left for this chain to do."""
        last = place.block == self.blocks - 1 or (place.path is not None and place.path.finished)
        return last and place.steps == self.total

    def places(self, prompts: Sequence[Prompt]) -> dict[Key, Place]:
        """Where each chain is that has begun."""
        rows = self.connection.execute(
            "SELECT prompt, chain, block, steps, tokens, log_p, finished, text, error FROM chains"
        )
        found: dict[Key, Place] = {}
        for p, number, block, steps, tokens, log_p, finished, text, error in rows:
            c = number - self.header.first_chain
            path = None
            if tokens is not None:
                path = Path(prompts[p], self._tuple(tokens), bool(finished), log_p_of(log_p))
            words = None if text is None else text_from_bytes(text)
            found[p, c] = Place(block, steps, path, words, None if error is None else error_of(error))
        return found

    def story(self, key: Key, prompt: Prompt) -> Story:
        """What one chain did; chains are counted from the store's first, as in a `Run`."""
        key = (key[0], key[1] + self.header.first_chain)
        story, thin = Story(), self.header.thin
        growth = iter(
            self.connection.execute(
                "SELECT block, kept, tokens, log_p, finished, near_ties FROM growth "
                "WHERE prompt = ? AND chain = ? ORDER BY block",
                key,
            ).fetchall()
        )
        steps = self.connection.execute(
            "SELECT step, info, proposed, kept, tokens, log_p, finished, text_kept, text, cost FROM steps "
            "WHERE prompt = ? AND chain = ? ORDER BY step",
            key,
        )
        grown = next(growth, None)

        def grow(until: int | None) -> None:
            nonlocal grown
            while grown is not None and (until is None or grown[0] * self.header.settings["steps"] <= until):
                block, *delta, ties = grown
                path = self._path(prompt, story.stored, *delta)
                story.grown += len(path) - (0 if story.stored is None else len(story.stored))
                story.near_ties += ties
                story.stored = story.starts[block] = path
                grown = next(growth, None)

        for step, info, proposed, kept, tokens, log_p, finished, text_kept, text, cost in steps:
            grow(step)
            if tokens is not None:
                story.stored = self._path(prompt, story.stored, kept, tokens, log_p, finished)
            here = step < self.first or (step - self.first + 1) % thin == 0
            story.history.append(story.stored if here else None)
            if text is not None:
                story.text = (story.text or "")[:text_kept] + text_from_bytes(text)
            if here and step >= self.first:
                story.texts.append(story.text)
            story.infos.append(info)
            story.costs.append(cost)
            story.proposals.append(self._proposed(proposed, info, story.stored))
        grow(None)
        return story

    def _path(self, prompt: Prompt, before: Path | None, kept: int, tokens: bytes, log_p: bytes, finished: int) -> Path:
        head = () if before is None else before.tokens[:kept]
        scores = log_p_of(log_p)
        if kept and before is not None and before.log_p is not None:
            scores = np.concatenate((before.log_p[:kept], scores))
        return Path(prompt, head + self._tuple(tokens), bool(finished), scores)

    def _proposed(self, proposed: bytes | int | None, info: bytes, path: Path | None) -> np.ndarray | None:
        if isinstance(proposed, int) and path is not None:  # that many tokens of the path, after the cut
            cut = int(self.layout.unpack([info])["cut"][0])
            return np.array(path.tokens[cut : cut + proposed], dtype=np.int32)
        return None if proposed is None else self.tokens.unpack(proposed)  # type: ignore[arg-type]

    def _tuple(self, data: bytes) -> Tokens:
        return tuple(self._ids[self.tokens.unpack(data)])

    @cached_property
    def _ids(self) -> np.ndarray:
        """One int object per token id, however many paths there are."""
        return np.arange(int(self.header.vocabulary)).astype(object)

    def run(self) -> Run:
        """Everything. Raises `StoreError` where rows contradict each other."""
        header, prompts = self.header, self.prompts
        places, chains, total = self.places(prompts), header.settings["chains"], self.total
        infos = tuple(self.layout.empty((chains, total)) for _ in prompts)
        made: list[tuple[Chain, ...]] = []
        proposals: list[tuple[tuple[np.ndarray | None, ...], ...]] = []
        for p, prompt in enumerate(prompts):
            row: list[Chain] = []
            proposed: list[tuple[np.ndarray | None, ...]] = []
            for c in range(chains):
                place = places.get((p, c), Place(0, 0, None, None, None))
                story = self.story((p, c), prompt)
                n = len(story.history)
                if n != place.steps:
                    raise StoreError(
                        f"{self.path}: prompt {p}, chain {c} has {n} of {place.steps} steps: it is damaged; "
                        "go back to a copy"
                    )
                self._fill(infos[p], c, story)
                same = story.stored is not None and place.path is not None and story.stored == place.path
                path = story.stored if same else place.path
                draws = tuple(x for x in story.history[self.first :] if x is not None)
                row.append(
                    Chain(
                        path,
                        place.text,
                        draws,
                        tuple(story.texts),
                        n,
                        story.grown,
                        story.near_ties,
                        place.error,
                        tuple(story.history),
                        story.starts,
                    )
                )
                proposed.append((*story.proposals, *[None] * (total - n)))
            made.append(tuple(row))
            proposals.append(tuple(proposed))
        begun = {key for key, place in places.items() if self.done(place) or place.error is not None}
        seconds, ledger, surrogate = self.totals()
        return Run(
            model=header.model,
            settings={**header.settings},
            prompts=prompts,
            chains=tuple(made),
            infos=infos,
            early_exit=self.early_exit(infos, surrogate),
            cost=ledger,
            seconds=seconds,
            resolution=header.resolution,
            ignored_warpers=dict(header.ignored_warpers),
            interrupted=len(begun) < len(prompts) * chains,
            notes=tuple(header.notes),
            proposals=tuple(proposals),
            pieces=dict(self.pieces()),
        )

    def _fill(self, infos: dict[str, np.ndarray], chain: int, story: Story) -> None:
        n = len(story.infos)
        if n:
            table = self.layout.unpack(story.infos)
            for name in self.layout.fields:
                infos[name][chain, :n] = table[name]
            for name, values in _costs(self.layout, story.costs).items():
                infos[name][chain, :n] = values

    def early_exit(self, infos: Sequence[dict[str, np.ndarray]], surrogate: Ledger) -> dict[str, Any]:
        """`Run.early_exit`: as the run ended, or as far as it is known of one that was killed."""
        facts = dict(self.header.early_exit if self.header.result is None else self.header.result)
        if facts.get("kernel") == "early-exit":
            facts["advice"] = count_stages(infos).advice()
        return facts | {"surrogate_cost": surrogate.as_dict()} if surrogate.spans else facts

    def pieces(self) -> Iterator[tuple[int, str]]:
        for token, text in self.connection.execute("SELECT token, text FROM pieces ORDER BY token"):
            yield token, text_from_bytes(text)

    def totals(self) -> tuple[float, Ledger, Ledger]:
        """Seconds so far, and the ledgers of the model and of a surrogate that is another one."""
        seconds, *ledgers = self.connection.execute("SELECT seconds, ledger, surrogate FROM totals").fetchone()
        return (seconds, *map(ledger_from_json, ledgers))  # type: ignore[return-value]

    def digest(self) -> str:
        """A hash of what the run drew: prompts, every event, where each chain is; not of times, costs or versions."""
        queries = (f"SELECT {columns} FROM {table} ORDER BY 1, 2, 3" for table, columns in DIGESTED.items())
        return hash_rows(row for query in queries for row in self.connection.execute(query))


def _costs(layout: Layout, rows: Sequence[bytes]) -> dict[str, np.ndarray]:
    table = np.frombuffer(b"".join(rows), dtype="<i4").reshape(len(rows), -1)
    return {name: table[:, i] for i, name in enumerate(layout.costs)}


def error_of(text: str) -> ChainError:
    name, _, message = text.partition(": ")
    kind = getattr(errors, name, ChainError)
    return kind(message) if isinstance(kind, type) and issubclass(kind, ChainError) else ChainError(message)


def ledger_as_json(ledger: Ledger) -> str:
    values = {f.name: getattr(ledger, f.name) for f in fields(ledger)}
    return json.dumps({name: _pairs(value) if hasattr(value, "items") else value for name, value in values.items()})


def _pairs(counter: Any) -> list[list[Any]]:
    return [[key, n] for key, n in sorted(counter.items())]


def ledger_from_json(text: str) -> Ledger:
    ledger = Ledger()
    for name, value in json.loads(text).items():
        if isinstance(value, list):
            getattr(ledger, name).update({tuple(key) if isinstance(key, list) else key: n for key, n in value})
        else:
            setattr(ledger, name, value)
    return ledger


def opened(path: File) -> tuple[sqlite3.Connection, Reader]:
    """A connection for reading a run, in a transaction: what others write meanwhile does not show. Close it."""
    connection = connected(path)
    try:
        check_kind(connection, path, RUN)
        with explained(path):
            return connection, Reader(connection, path)
    except BaseException:
        connection.close()
        raise


def connected(path: File) -> sqlite3.Connection:
    """A connection for reading a store of any kind, in a transaction. Raises `StoreError` for what is none."""
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file; name a store, as written with: powermc sample --store")
    connection = connect(path, write=False)
    try:
        if not recognise(connection, path):
            raise StoreError(f"{path}: nothing has been written into it yet; begin the run again")
        with explained(path):
            connection.execute("BEGIN")
        return connection
    except BaseException:
        connection.close()
        raise
