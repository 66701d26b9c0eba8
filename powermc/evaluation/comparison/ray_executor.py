"""Units on a Ray cluster: actors, each with the model loaded once. One that dies is replaced, and its unit done again.

Ray is an extra: `pip install 'powermc[ray]'`. powermc and the model have to be there on every node.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from powermc.errors import ArgumentError, ModelError, PowermcError
from powermc.evaluation.comparison.executors import RETRIES, Job, Told, WorkerError, model_of, task_of
from powermc.evaluation.comparison.plan import Unit
from powermc.evaluation.comparison.pool import bound_threads, finished, threads_each
from powermc.evaluation.comparison.results import Results
from powermc.evaluation.comparison.work import Result, do
from powermc.sampling import check_count

LOCAL = "local"
"""The address of a cluster that is begun on this machine, and ended with the work."""

_REACH = 5.0
"""Seconds that a cluster has to answer."""


class Actor:
    """What runs on the cluster: the model, the task, and a file of its own on the node's disk."""

    def __init__(self, job: Job, file: Path, threads: int) -> None:
        bound_threads(threads)
        self._task, self._model = task_of(job), model_of(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._results = Results(file)
        self._results.begin({"run": job.run})

    def ready(self) -> int:
        """Its process id, when the model is loaded."""
        import os

        return os.getpid()

    def do(self, unit: Unit, name: str) -> Result:
        """Do a unit, and commit it before it is reported."""
        result = do(self._model, self._task, unit, name)
        self._results.commit(result, None, None)
        return result

    def close(self) -> None:
        """Close the file."""
        self._results.__exit__()


@dataclass(eq=False)
class _Member:
    """An actor, the file it writes, and what it is doing."""

    actor: Any
    file: Path
    name: str
    pending: Any
    unit: Unit | None = None


@dataclass
class RayExecutor:
    """An executor: units on `workers` actors of a Ray cluster.

    address: `host:port` or `ray://host:port` of a cluster; "auto", the one that this machine belongs to; `LOCAL`. A
    cluster that this process is connected to already is used whatever the address.

    Each actor asks for one CPU, and takes as many threads as a process of a pool would take here. Files of actors on
    other machines stay there; their results come with the answers. Raises `ModelError` without the package,
    `ArgumentError` for a cluster that cannot be reached.
    """

    workers: int = 2
    address: str = "auto"
    retries: int = RETRIES
    apart: bool = field(default=True, init=False)
    _crew: list[_Member] = field(default_factory=list, init=False, repr=False)
    _mine: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("workers", self.workers, least=1)
        check_count("retries", self.retries, least=0)
        ray()

    def connect(self) -> None:
        """Connect to the cluster, unless this process is: early, so that one that is not there costs no time."""
        package = ray()
        if package.is_initialized():
            return
        if ":" in self.address:
            _reach(self.address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.address == LOCAL:
            options |= {"num_cpus": max(self.workers, 1), "include_dashboard": False}
        else:
            options["address"] = self.address
        try:
            package.init(**options)
        except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and its own
            raise ArgumentError(
                f"cannot reach a Ray cluster at {self.address!r} ({_line(error)}); start one with 'ray start --head', "
                f"or give --address {LOCAL}"
            ) from error
        self._mine = True

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        package = ray()
        for member in self._crew:
            with contextlib.suppress(Exception):
                if exc[0] is None:
                    package.get(member.actor.close.remote(), timeout=_REACH)
            with contextlib.suppress(Exception):
                package.kill(member.actor)
        self._crew.clear()
        if self._mine:
            package.shutdown()
            self._mine = False

    def begin(self, job: Job, model: Any) -> None:
        del model  # actors load their own
        job.loadable()
        self.connect()
        job.folder.mkdir(parents=True, exist_ok=True)
        self._job, self._begun = job, 0

    def results(self, units: Sequence[Unit], told: Told) -> Iterator[Result]:
        package = ray()
        left, deaths = deque(units), dict[str, int]()
        self._crew = [self._start() for _ in range(min(self.workers, len(units)))]
        # An actor that the cluster has no room for is not waited for: the others do its share.
        while left or any(member.unit is not None for member in self._crew):
            pending = {member.pending: member for member in self._crew if member.pending is not None}
            done, _ = package.wait(list(pending), num_returns=1)
            for reference in done:
                member = pending[reference]
                try:
                    answer = package.get(reference)
                except package.exceptions.RayActorError as error:
                    yield from self._replace(member, left, deaths, error)
                    continue
                except package.exceptions.RayTaskError as error:
                    raise _cause(error) from error
                if member.unit is not None:
                    yield answer
                member.unit = left.popleft() if left else None
                member.pending = None
                if member.unit is not None:
                    told(member.unit)
                    member.pending = member.actor.do.remote(member.unit, member.name)

    def _start(self) -> _Member:
        threads = threads_each(self.workers)
        self._begun += 1
        file = self._job.folder / f"ray-{self._job.run[:8]}-{self._begun}.db"
        remote = ray().remote(num_cpus=1, max_restarts=0)(Actor)
        actor = remote.remote(self._job, file, threads)
        return _Member(actor, file, f"ray {self._begun}", actor.ready.remote())

    def _replace(
        self, member: _Member, left: deque[Unit], deaths: dict[str, int], error: Exception
    ) -> Iterator[Result]:
        """An actor has died: take its unit from its file if that is here and it got so far, else have it done again."""
        self._crew.remove(member)
        with contextlib.suppress(Exception):  # it may only be out of reach, and must not go on beside the next
            ray().kill(member.actor)
        cause = getattr(error, "cause", None)  # its constructor raised: the model cannot be loaded, say
        if isinstance(cause, PowermcError):
            raise cause
        unit = member.unit
        name = "waiting for a unit" if unit is None else unit.name
        deaths[name] = deaths.get(name, 0) + 1
        if unit is not None and member.file.exists() and (found := finished(member.file, unit)) is not None:
            yield found
        elif deaths[name] > self.retries:
            raise WorkerError(
                f"an actor died {deaths[name]} times ({_line(error)}) at: {name}; what was committed is kept"
            ) from error
        elif unit is not None:
            left.appendleft(unit)
        if left:
            self._crew.append(self._start())


def ray() -> Any:
    """The package. Raises `ModelError` without it."""
    try:
        return import_module("ray")
    except ImportError as error:
        raise ModelError("a Ray cluster needs the package ray: pip install 'powermc[ray]'") from error


def _reach(address: str) -> None:
    """Raise `ArgumentError` unless something listens there: Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(f"cannot reach a Ray cluster at {address!r} ({reason}); is it running?") from error


def _cause(error: Any) -> BaseException:
    """What a method raised, as it was raised."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, PowermcError) else WorkerError(_line(error))


def _line(error: BaseException) -> str:
    """The last line of an error's text: Ray's run over pages, and end with what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
