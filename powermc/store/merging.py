"""Joining what several workers drew, each into a store of its own."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import reduce
from pathlib import Path as File
from typing import Any

from powermc.errors import ArgumentError, StoreError
from powermc.sequences.path import Prompt
from powermc.store.file import explained
from powermc.store.header import Header, session
from powermc.store.packing import text_to_bytes
from powermc.store.reading import DIGESTED, Key, Reader, ledger_as_json, opened
from powermc.store.writing import Store, together

_SAME = ("identity", "dtype", "thin", "keep_proposals", "fields", "vocabulary", "surrogate", "resolution")
_MORE = {"chains", "draws", "rows", "exit", "chat"}
_FROZEN = ("kernel", "proposal", "exponent", "temperature", "plain", "eta", "delta", "aggregate", "tokens", "layer")
_COLUMNS = {
    "growth": "block, kept, tokens, log_p, finished, near_ties, cost",
    "steps": "step, info, proposed, kept, tokens, log_p, finished, text_kept, text, cost",
    "chains": "block, steps, tokens, log_p, finished, text, error",
}


def merge(inputs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> None:
    """Join stores by (prompt, chain, step) into a new one, which can be gone on with like any other.

    Prompts are told apart by their tokens and stream keys, and keep the order in which they first come; of a chain that
    several stores hold, the longest is taken, and what the others hold of it must be the same, byte for byte. Costs and
    seconds are added up.

    Raises `ArgumentError` without inputs, and `StoreError` for an output that exists, for stores whose model or
    settings differ (but for chains and draws: the most is taken), and for chains that differ.
    """
    files = [File(path) for path in inputs]
    if not files:
        raise ArgumentError("there is nothing to merge; name the stores of the workers")
    with ExitStack() as stack:
        readers: list[Reader] = []
        for path in files:
            connection, reader = opened(path)
            stack.enter_context(closing(connection))
            readers.append(reader)
        with explained(files[0]):
            header, numbers = _header(readers), [_numbers(reader) for reader in readers]
            prompts = {name: prompt for reader in readers for prompt in reader.prompts for name in [_name(prompt)]}
            chosen = [
                (p, c, *found)
                for p, name in enumerate(prompts)
                for c in range(header.first_chain, header.first_chain + header.settings["chains"])
                if (found := _longest(readers, [(n.get(name, -1), c) for n in numbers])) is not None
            ]
        with Store(output, resume=False) as store:
            store.begin(header, list(prompts.values()))
            _add_up(store, readers)
            for p, c, reader, key in chosen:
                _copy(store, (p, c), reader, key)


def _header(readers: Sequence[Reader]) -> Header:
    """That of all. Raises `StoreError` by the name of what differs."""
    first, headers = readers[0], [reader.header for reader in readers]
    for reader in readers[1:]:
        pairs = {name: (getattr(first.header, name), getattr(reader.header, name)) for name in _SAME}
        pairs |= {n: (v, reader.header.settings[n]) for n, v in first.header.settings.items() if n not in _MORE}
        early = (first.header.early_exit, reader.header.early_exit)
        pairs |= {f"early exit: {name}": (early[0].get(name), early[1].get(name)) for name in _FROZEN}
        for name, (here, there) in pairs.items():
            if here != there:
                raise StoreError(
                    f"{reader.path}: its {name} is {there!r}, that of {first.path} is {here!r}; "
                    "only runs of the same settings can be joined"
                )
    most = {name: max(header.settings[name] for header in headers) for name in ("draws", "rows")}
    least = min(header.first_chain for header in headers)
    most["chains"] = max(header.first_chain + header.settings["chains"] for header in headers) - least
    notes = list(dict.fromkeys(note for header in headers for note in header.notes))
    sessions = [*(s for header in headers for s in header.sessions), {**session(), "merged": len(headers)}]
    return replace(
        headers[0],
        settings={**headers[0].settings, **most},
        first_chain=least,
        notes=notes,
        sessions=sessions,
        result=None,
        writer=None,
    )


def _name(prompt: Prompt) -> tuple[Any, int]:
    return prompt.ids, prompt.key


def _numbers(reader: Reader) -> dict[Any, int]:
    return {_name(prompt): n for n, prompt in enumerate(reader.prompts)}


def _longest(readers: Sequence[Reader], keys: Sequence[Key]) -> tuple[Reader, Key] | None:
    """Who holds most of a chain, which each reader has under its own key. Raises `StoreError` if they differ."""
    query = "SELECT steps, block FROM chains WHERE prompt = ? AND chain = ?"
    held = [(r.connection.execute(query, key).fetchone(), r, key) for r, key in zip(readers, keys, strict=True)]
    holders = [(row, reader, key) for row, reader, key in held if row is not None]
    if not holders:
        return None
    _, longest, where = max(holders, key=lambda holder: holder[0])
    for _, reader, key in holders:
        if reader is not longest:
            _compare(longest, where, reader, key)
    return longest, where


def _add_up(store: Store, readers: Sequence[Reader]) -> None:
    pieces = {token: text for reader in readers for token, text in reader.pieces()}
    totals = [reader.totals() for reader in readers]
    seconds, *ledgers = zip(*totals, strict=True)
    sums = (ledger_as_json(reduce(together, ledger)) for ledger in ledgers)
    with store.transaction() as execute:
        for token, text in sorted(pieces.items()):
            execute("INSERT INTO pieces VALUES (?, ?)", (token, text_to_bytes(text)))
        execute("UPDATE totals SET seconds = ?, ledger = ?, surrogate = ?", (sum(seconds), *sums))


def _copy(store: Store, to: Key, reader: Reader, key: Key) -> None:
    """One chain, in one transaction."""
    with store.transaction() as execute:
        for table, columns in _COLUMNS.items():
            marks = ", ".join("?" * (2 + len(columns.split(","))))
            for row in _rows(reader.connection, table, columns, key):
                execute(f"INSERT INTO {table} VALUES ({marks})", (*to, *row))


def _compare(one: Reader, here: Key, other: Reader, there: Key) -> None:
    """Raise `StoreError` unless what both hold of a chain is the same."""
    for table, what in (("growth", "block"), ("steps", "step")):
        columns = DIGESTED[table].removeprefix("prompt, chain, ")
        mine, theirs = (_rows(r.connection, table, columns, k) for r, k in ((one, here), (other, there)))
        for a, b in zip(mine, theirs, strict=False):  # the shorter one is a beginning of the longer
            if a != b:
                raise StoreError(
                    f"{other.path}: prompt {there[0]}, chain {there[1]} differs from that of {one.path} (prompt "
                    f"{here[0]}) at {what} {a[0]}; runs that overlap must be the same run"
                )


def _rows(connection: sqlite3.Connection, table: str, columns: str, key: Key) -> Any:
    order = "" if table == "chains" else "ORDER BY 1"
    return connection.execute(f"SELECT {columns} FROM {table} WHERE prompt = ? AND chain = ? {order}", key)
