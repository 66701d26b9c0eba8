"""Runs many chains at once: collects what their generators ask for and lets each oracle answer it in batches.

This is all the concurrency there is. A program (one chain's generator) is advanced as soon as its answer is there;
whatever it asks next joins the next batch of that oracle. Chains of different prompts, lengths and steps therefore
share every batch, and none waits for another to finish a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from powermc.errors import ChainError
from powermc.types import PENDING, Oracle, Request, Steps, T


class Finished(NamedTuple):
    """A program returned `value`."""

    key: Hashable
    value: Any


class Failed(NamedTuple):
    """A program ended with an error of its own; the others go on."""

    key: Hashable
    error: ChainError


class Event(NamedTuple):
    """A program yielded something that is not a request, such as a committed draw."""

    key: Hashable
    value: Any


def drive(
    programs: Iterable[tuple[Hashable, Steps[Any]]], *, active: int | None = None
) -> Iterator[Event | Finished | Failed]:
    """Run programs to their end, yielding what they yield (requests apart) as soon as it happens.

    Parameters
    ----------
    programs
        (key, generator) pairs; taken from the iterable as places become free.
    active
        How many may be under way at once; None for all.

    A `ChainError` raised by a program ends that program only. Any other exception is a bug or a wrong argument and
    propagates. When this generator is closed, every program under way is closed, so their `with` blocks end.
    """
    waiting = iter(programs)
    ready: deque[tuple[Hashable, Steps[Any], Any]] = deque()
    pending: list[tuple[Hashable, Steps[Any], Request]] = []
    exhausted = False
    try:
        while True:
            while not exhausted and (active is None or len(ready) + len(pending) < active):
                try:
                    key, program = next(waiting)
                except StopIteration:
                    exhausted = True
                else:
                    ready.append((key, program, None))
            if not ready and not pending:
                return
            while ready:
                key, program, answer = ready[0]
                try:
                    asked = program.throw(answer) if isinstance(answer, ChainError) else program.send(answer)
                except StopIteration as stop:
                    ready.popleft()
                    yield Finished(key, stop.value)
                except ChainError as error:
                    ready.popleft()
                    yield Failed(key, error)
                else:
                    ready.popleft()
                    if isinstance(asked, Request):
                        pending.append((key, program, asked))
                    else:  # to the back: chains that ask for nothing take turns
                        ready.append((key, program, None))
                        yield Event(key, asked)
            pending = _ask(pending, ready)
    finally:
        for _, program, _ in [*ready, *pending]:
            program.close()


def _ask(
    pending: list[tuple[Hashable, Steps[Any], Request]], ready: deque[tuple[Hashable, Steps[Any], Any]]
) -> list[Any]:
    """Let each oracle answer its requests; move what was answered to `ready`, return the rest in order."""
    by_oracle: dict[int, tuple[Oracle, list[int]]] = {}
    for i, (_, _, request) in enumerate(pending):
        by_oracle.setdefault(id(request.oracle), (request.oracle, []))[1].append(i)
    left: list[int] = []
    for oracle, places in by_oracle.values():
        answers = oracle.answer([pending[i][2] for i in places])
        for i, answer in zip(places, answers, strict=True):
            if answer is PENDING:
                left.append(i)
            else:
                ready.append((pending[i][0], pending[i][1], answer))
    if pending and len(left) == len(pending):
        raise RuntimeError(f"no oracle answered any of {len(pending)} requests; the run cannot go on")
    return [pending[i] for i in sorted(left)]


def run(program: Steps[T]) -> T:
    """Run one program to its end and return its value; events are dropped, a `ChainError` is raised."""
    for outcome in drive([(None, program)]):
        if isinstance(outcome, Failed):
            raise outcome.error
        if isinstance(outcome, Finished):
            return outcome.value
    raise RuntimeError("the program ended without a result")
