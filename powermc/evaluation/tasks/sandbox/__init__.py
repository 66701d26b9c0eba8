"""Running a model's code against tests, contained and with a verdict that it cannot forge.

Two bare interpreters are started for every run. The *solver* runs the code. The *judge* runs the tests, calls into
the solver over pipes, compares plain copies of what comes back and writes the verdict into a pipe that the solver
does not have. Exiting early, printing, replacing `assert` or returning objects that equal everything changes nothing
in the judge. Both confine themselves first (`confine.py`); time and output are watched here. Python's standard library
only is there for the code, with string hashes fixed. docs/tasks.md says what is contained and what is not.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from powermc.errors import ArgumentError, PowermcError
from powermc.evaluation.tasks.sandbox import confine

_HERE = Path(__file__).parent
_START_SECONDS = 60.0
"""For both interpreters to start, which on a busy machine can take long; the program's time begins after it."""


class SandboxError(PowermcError):
    """Code cannot be run here as safely as asked for."""


@dataclass(frozen=True)
class Limits:
    """What a run may use.

    Attributes
    ----------
    seconds
        Wall clock, from when the program starts to the verdict; also the limit of CPU seconds of each process,
        rounded up.
    memory_bytes
        Address space of each process.
    output_bytes
        Of what the solution prints, and of one argument or result.
    weak
        Run even where this system cannot contain the code (`containment` says what is missing). Off: refuse.

    Raises `ArgumentError` for limits that are not positive.
    """

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20
    weak: bool = False

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_bytes", "output_bytes"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name} must be > 0, got {getattr(self, name)!r}")


class Check(NamedTuple):
    """Tests. `prelude` is run by the judge before them; `names` are the solution's, and shadow the prelude's."""

    tests: str
    names: tuple[str, ...]
    prelude: str = ""


class Verdict(NamedTuple):
    """`kind` is "passed" or one of: failed, error, syntax, missing, exited, crashed, memory, timeout, output."""

    kind: str
    details: str = ""

    @property
    def passed(self) -> bool:
        return self.kind == "passed"


def run(program: str, check: Check, limits: Limits = Limits()) -> Verdict:
    """Run a program and tests against it. Safe to call from several threads.

    Raises `SandboxError` where this system cannot contain the code, unless `limits.weak`, and where the processes do
    not start.
    """
    if not limits.weak:
        missing = [name for name, how in containment().items() if how is None]
        if missing:
            raise SandboxError(
                f"code cannot be contained here ({', '.join(missing)}): it needs Linux 6.2 or later with Landlock and "
                "seccomp on x86_64 or aarch64; Limits(weak=True) runs it with what there is"
            )
    with _folders() as (theirs, ours):
        _write(theirs / "solution.py", program)
        _write(ours / "tests.json", json.dumps(check._asdict()))
        return _Run(theirs, ours, limits).verdict()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")


@contextmanager
def _folders() -> Iterator[tuple[Path, Path]]:
    """Two empty folders, so that the solver's does not hold the tests; removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="powermc-code-"))
    try:
        (root / "solver").mkdir()
        (root / "judge").mkdir()
        yield root / "solver", root / "judge"
    finally:
        shutil.rmtree(root, ignore_errors=True)


class _Run:
    """One run: both processes, their pipes, and the wait for the verdict."""

    def __init__(self, theirs: Path, ours: Path, limits: Limits) -> None:
        self._limits = limits
        self._deadline = time.monotonic() + _START_SECONDS
        asks, answers, verdict, self._printed = os.pipe(), os.pipe(), os.pipe(), os.pipe()
        self._verdict = verdict[0]
        try:
            self._solver = _start("solver.py", theirs, limits, (asks[0], answers[1]), self._printed[1])
            try:
                ends = (answers[0], asks[1])
                self._judge = _start("judge.py", ours, limits, ends, subprocess.DEVNULL, verdict=verdict[1])
            except OSError:
                _end(self._solver)
                raise
        except OSError:
            _close(self._verdict, self._printed[0])
            raise
        finally:
            _close(*asks, *answers, verdict[1], self._printed[1])

    def verdict(self) -> Verdict:
        try:
            written, trouble = self._wait()
        finally:
            _end(self._solver)
            _end(self._judge)
            _close(self._verdict, self._printed[0])
        return trouble or self._read(written)

    def _wait(self) -> tuple[bytes, Verdict | None]:
        """What the judge wrote until it closed its pipe, or what went wrong before."""
        written, printed = b"", 0
        with selectors.DefaultSelector() as selector:
            selector.register(self._verdict, selectors.EVENT_READ)
            selector.register(self._printed[0], selectors.EVENT_READ)
            while self._verdict in selector.get_map():
                left = self._deadline - time.monotonic()
                ready = selector.select(left) if left > 0 else []
                if not ready:
                    return written, self._late(written)
                for key, _ in ready:
                    part = os.read(key.fd, 1 << 16)
                    if not part:
                        selector.unregister(key.fd)
                    elif key.fd == self._verdict:
                        if not written:  # both are confined, and the program starts
                            self._deadline = time.monotonic() + self._limits.seconds
                        written += part
                    else:
                        printed += len(part)
                if printed > self._limits.output_bytes:
                    return written, Verdict("output", f"printed more than {self._limits.output_bytes} bytes")
        return written, None

    def _late(self, written: bytes) -> Verdict:
        if written:
            return Verdict("timeout", f"no verdict within {self._limits.seconds:g} s")
        raise SandboxError(f"no interpreter started within {_START_SECONDS:g} s")

    def _read(self, written: bytes) -> Verdict:
        if not written.strip():
            return _death(self._judge.returncode, "the judge")
        kind, details = json.loads(written)
        if kind == "sandbox":
            raise SandboxError(details)
        if kind != "crashed":
            return Verdict(kind, details)
        return _death(self._solver.returncode, "the solution's process")


def _death(code: int, who: str) -> Verdict:
    """Why a process ended before the tests did."""
    if -code in (signal.SIGXCPU, signal.SIGKILL):  # SIGKILL: the hard limit, one second later
        return Verdict("timeout", f"{who} used up its CPU seconds")
    if code < 0:
        return Verdict("crashed", f"{who} died of {signal.Signals(-code).name}")
    return Verdict("exited" if code == 0 else "crashed", f"{who} ended with exit code {code} before the tests did")


def _start(
    script: str, folder: Path, limits: Limits, pipes: tuple[int, int], out: int, **more: int
) -> subprocess.Popen[bytes]:
    """A bare interpreter in a session of its own, with an empty environment."""
    seconds = max(1, -int(-limits.seconds // 1))
    given: dict[str, Any] = {
        "folder": str(folder),
        "reads": pipes[0],
        "writes": pipes[1],
        "message_bytes": limits.output_bytes,
        "confine": {"cpu_seconds": seconds, "memory_bytes": limits.memory_bytes, "strict": not limits.weak},
        **more,
    }
    return subprocess.Popen(
        [*_PYTHON, str(_HERE / script), json.dumps(given)],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=out,
        cwd=folder,
        env=_environment(),
        pass_fds=(*pipes, *more.values()),
        start_new_session=True,
    )


_PYTHON = (sys.executable, "-sSPB", "-X", "utf8")
"""No installed packages, no site, no path of the caller's, no bytecode written."""


def _environment() -> dict[str, str]:
    found = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
    if "LD_LIBRARY_PATH" in os.environ:  # where an interpreter may have its own library
        found["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of a process group, and collect the leader."""
    if process.poll() is None:
        _settle(process)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _settle(process: subprocess.Popen[bytes]) -> None:
    """A moment for a process that is ending by itself, so that its exit code is its own."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.02)


def _close(*ends: int) -> None:
    for end in ends:
        os.close(end)


_PROBE = """
import os, socket, subprocess, sys, threading
def refused(action):
    try:
        action()
    except (OSError, RuntimeError, MemoryError):
        return True
    return False
def probe(outside, marker):
    return {
        "memory": refused(lambda: bytearray(8 << 30)),
        "processes": refused(os.fork) and refused(lambda: threading.Thread(target=int).start()),
        "network": refused(socket.socket),
        "reading outside": refused(lambda: open(outside).read()),
        "writing": refused(lambda: open(outside, "a")) and refused(lambda: open(marker, "w"))
        and refused(lambda: os.remove(outside)),
        "file attributes": refused(lambda: os.chmod(outside, 0o644)),
        "signals": refused(lambda: os.kill(os.getppid(), 0)),
    }
"""

_probing = threading.Lock()


def containment() -> dict[str, str | None]:
    """What this system refuses to a model's code, tried out in a confined process: how, or None where it does not.

    Tried once per process; the keys are memory, processes, network, reading outside, writing, file attributes,
    signals.
    """
    with _probing:
        return dict(_containment())


@cache
def _containment() -> dict[str, str | None]:
    by = {
        "memory": "limits",
        "processes": "system calls",
        "network": "system calls",
        "reading outside": "files",
        "writing": "files",
        "file attributes": "system calls",
        "signals": "system calls",
    }
    layers = _layers()
    with tempfile.TemporaryDirectory(prefix="powermc-probe-") as folder:
        outside = Path(folder, "outside")
        outside.write_text("x")
        refused = _probe(str(outside), str(Path(folder, "marker")))
    return {what: layers.get(layer) if refused.get(what) else None for what, layer in by.items()}


def _probe(outside: str, marker: str) -> dict[str, bool]:
    """Which of the probe's actions were refused. A test per action, since the judge tells only pass from fail."""
    weak = Limits(weak=True)
    names = ("memory", "processes", "network", "reading outside", "writing", "file attributes", "signals")
    tests = "\n".join(f"refused[{name!r}] or open_.append({name!r})" for name in names)
    prelude = "open_ = []"
    check = Check(f"refused = probe({outside!r}, {marker!r})\n{tests}\nassert not open_, open_", ("probe",), prelude)
    found = run(_PROBE, check, weak)
    if found.passed:
        return dict.fromkeys(names, True)
    # Something is open: ask for one at a time, which is slow but rare.
    return {
        name: run(_PROBE, Check(f"assert probe({outside!r}, {marker!r})[{name!r}]", ("probe",)), weak).passed
        for name in names
    }


def _layers() -> dict[str, str]:
    """The layers that a child can put on, as it reports them."""
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import confine; "
        "print(json.dumps(confine.confine('/', cpu_seconds=5, memory_bytes=1 << 30, strict=False)))"
    )
    done = subprocess.run(
        [*_PYTHON, "-c", script, str(_HERE)], capture_output=True, text=True, env=_environment(), check=False
    )
    return json.loads(done.stdout) if done.returncode == 0 else {}


__all__ = ["Check", "Limits", "SandboxError", "Verdict", "confine", "containment", "run"]
