"""A pool of processes, each with the model loaded once. One that dies is replaced, and its unit done again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from powermc.errors import PowermcError
from powermc.evaluation.comparison.executors import RETRIES, Job, Told, WorkerError, model_of, task_of
from powermc.evaluation.comparison.plan import Unit
from powermc.evaluation.comparison.results import Results
from powermc.evaluation.comparison.work import Result, do
from powermc.sampling import check_count

_GRACE = 5.0
"""Seconds that a worker has to end by itself."""


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(workers: int) -> int:
    """Threads of each worker, so that together they do not want more cores than there are."""
    return max(1, cores() // workers)


@dataclass(eq=False)
class _Worker:
    """process, and this side of the pipe; `file`: what it writes; `unit`: what it is doing, None for nothing."""

    process: Any
    pipe: Connection
    file: Path
    unit: Unit | None = None
    ready: bool = False


@dataclass
class ProcessPool:
    """An executor: units on `workers` processes of this machine.

    Processes are spawned, not forked: threads of torch and numba do not survive a fork. Each is bounded to its share of
    the cores, writes every unit into a file of its own before it reports it, ignores Ctrl-C, and ends when this process
    does, however that came.
    """

    workers: int = 2
    retries: int = RETRIES
    apart: bool = field(default=True, init=False)
    _crew: list[_Worker] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("workers", self.workers, least=1)
        check_count("retries", self.retries, least=0)

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._crew:
            with contextlib.suppress(OSError):
                worker.pipe.send_bytes(pickle.dumps(None))
        end = time.monotonic() + _GRACE if exc[0] is None else 0.0
        for worker in self._crew:
            worker.process.join(max(0.0, end - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
            worker.process.close()
        self._crew.clear()

    def begin(self, job: Job, model: Any) -> None:
        del model  # workers load their own
        job.loadable()
        job.folder.mkdir(parents=True, exist_ok=True)
        self._job = job

    def results(self, units: Sequence[Unit], told: Told) -> Iterator[Result]:
        left, deaths = deque(units), dict[str, int]()
        self._crew = [self._start() for _ in range(min(self.workers, len(units)))]
        while left or any(worker.unit is not None for worker in self._crew):
            for worker in self._crew:
                if worker.ready and worker.unit is None and left:
                    worker.unit = left.popleft()
                    told(worker.unit)
                    with contextlib.suppress(OSError):  # it has died: that is seen below
                        worker.pipe.send_bytes(pickle.dumps(worker.unit))
            yield from self._heard(left, deaths)

    def _heard(self, left: deque[Unit], deaths: dict[str, int]) -> Iterator[Result]:
        """What workers say next; who has died is replaced."""
        places: dict[Any, _Worker] = {thing: w for w in self._crew for thing in (w.pipe, w.process.sentinel)}
        for worker in dict.fromkeys(places[thing] for thing in wait(list(places))):
            try:
                answer = pickle.loads(worker.pipe.recv_bytes()) if worker.pipe.poll() else None
            except (EOFError, OSError):
                answer = None
            if answer is None:
                worker.process.join(_GRACE)  # a pipe closes a moment before its process has ended
                if not worker.process.is_alive():
                    yield from self._replace(worker, left, deaths)
            elif isinstance(answer, BaseException):
                raise answer
            elif isinstance(answer, Result):
                worker.unit = None
                yield answer
            else:
                worker.ready = True

    def _start(self) -> _Worker:
        here, there = multiprocessing.get_context("spawn").Pipe()
        number = next(n for n in range(10**6) if not self._file(n).exists())
        self._file(number).touch()
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(there, os.getpid(), threads_each(self.workers)), daemon=True
        )
        process.start()
        there.close()
        with contextlib.suppress(OSError):
            here.send_bytes(pickle.dumps((self._job, self._file(number), f"process {process.pid}")))
        return _Worker(process, here, self._file(number))

    def _file(self, number: int) -> Path:
        return self._job.folder / f"worker-{number}.db"

    def _replace(self, worker: _Worker, left: deque[Unit], deaths: dict[str, int]) -> Iterator[Result]:
        """A worker has died: take its unit from its file if it got so far, else have it done again."""
        code, unit = worker.process.exitcode, worker.unit
        worker.pipe.close()
        self._crew.remove(worker)
        name = "waiting for a unit" if unit is None else unit.name
        deaths[name] = deaths.get(name, 0) + 1
        if unit is not None and (found := finished(worker.file, unit)) is not None:
            yield found
        elif deaths[name] > self.retries:
            raise WorkerError(
                f"a worker died {deaths[name]} times ({_how(code)}) at: {name}; what was committed is kept"
            )
        elif unit is not None:
            left.appendleft(unit)
        if left:
            self._crew.append(self._start())


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def finished(file: Path, unit: Unit) -> Result | None:
    """What a dead worker had committed of a unit, but not reported."""
    with contextlib.suppress(PowermcError), Results(file) as results:
        if results.begun:
            key = (unit.number, unit.questions, unit.samples)
            return next((r for r in results.reader.results() if (r.number, r.questions, r.samples) == key), None)
    return None


def _work(pipe: Connection, parent: int, threads: int) -> None:
    """A worker: gets the job, then units; says that it is ready, then results, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to end
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    bound_threads(threads)
    try:
        job, file, name = pickle.loads(pipe.recv_bytes())
        task, model = task_of(job), model_of(job)
        with Results(file) as results:
            results.begin({"run": job.run})
            pipe.send_bytes(pickle.dumps("ready"))
            while (unit := pickle.loads(pipe.recv_bytes())) is not None:
                result = do(model, task, unit, name)
                results.commit(result, None, None)
                pipe.send_bytes(pickle.dumps(result))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone; what was done is in the file
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send_bytes(portable(error))


def portable(error: Exception) -> bytes:
    """An error as bytes; one that cannot be pickled as a `WorkerError` with its text."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return pickle.dumps(WorkerError(f"{type(error).__name__}: {error}"))
    return data


def bound_threads(threads: int) -> None:
    """Bound the threads of torch and numba in this process; not above what the environment says already."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        with contextlib.suppress(ValueError):
            threads = min(threads, int(os.environ[name])) if os.environ.get(name) else threads
        os.environ[name] = str(threads)
    if (torch := sys.modules.get("torch")) is not None:  # else it will see the environment
        torch.set_num_threads(threads)


def _watch(parent: int) -> None:
    """End this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
