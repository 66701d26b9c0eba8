"""The process that runs a task's tests: calls into the solver as into local functions, and alone gives the verdict.

Comparisons run here, on plain copies of what the solver returned: an object whose `==` is always true does not cross.
Confined like the solver, since the tests come from a file. Run by `powermc` as a script, as solver.py is.
"""

from __future__ import annotations

import builtins
import json
import os
import sys

TYPE_CHECKING = False  # importing typing would take a tenth of the time that a run takes
if TYPE_CHECKING:
    from typing import Any

# A script of a bare interpreter: its neighbours are found by this line.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from confine import confine  # noqa: E402
from wire import Closed, TooLong, Wire, pack, unpack  # noqa: E402

del sys.path[0]


_MORE_ARGUMENTS = (UnicodeError, BaseExceptionGroup)
"""Exceptions that a message alone does not make."""


class SolutionError(Exception):
    """The solution raised something that is not an exception of Python's own."""


class Solver:
    """The other process, as seen by the tests."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.raised: BaseException | None = None
        """What the solution raised last."""

    def load(self) -> None:
        """Wait until the program has run. Raises what it raised."""
        self._reply()

    def ask(self, request: list[Any]) -> Any:
        self._wire.send(request)
        return self._reply()

    def name(self, name: str) -> Any:
        """What the solution calls by that name. Raises `NameError`."""
        return self.ask(["name", name])

    def _reply(self) -> Any:
        kind, *rest = self._wire.receive()
        if kind == "value":
            return unpack(rest[0], lambda number: Remote(self, number))
        name, message = rest
        found = getattr(builtins, name, None)
        if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, _MORE_ARGUMENTS):
            self.raised = found(message)
        else:
            self.raised = SolutionError(f"{name}: {message}")
        raise self.raised


class Remote:
    """An object that lives in the solver."""

    __slots__ = ("_number", "_solver")

    def __init__(self, solver: Solver, number: int) -> None:
        object.__setattr__(self, "_solver", solver)
        object.__setattr__(self, "_number", number)

    def _special(self, method: str, *args: Any, **named: Any) -> Any:
        packed = [pack(arg, number_of) for arg in args]
        return self._solver.ask([self._number, method, packed, {n: pack(arg, number_of) for n, arg in named.items()}])

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._special("__call__", *args, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy, pickle and the like look for
            raise AttributeError(name)
        return self._special("__getattr__", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._special("__setattr__", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._special("__getitem__", key)

    def __iter__(self) -> Any:
        return iter(self._special("__iter__"))

    def __next__(self) -> Any:
        return self._special("__next__")

    def __len__(self) -> int:
        return self._special("__len__")

    def __bool__(self) -> bool:
        return self._special("__bool__")

    def __str__(self) -> str:
        return self._special("__str__")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._number == self._number

    def __hash__(self) -> int:
        return hash(("remote", self._number))


def number_of(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"the tests pass a {type(value).__name__}, which cannot be sent to the solution")


def verdict(wire: Wire, given: dict[str, Any]) -> tuple[str, str]:
    """(kind, details); the kind is "passed" only after the last line of the tests has run."""
    solver = Solver(wire)
    try:
        solver.load()
        space: dict[str, Any] = {"__name__": "tests"}
        exec(compile(given["prelude"], "prelude.py", "exec"), space)
        space |= {name: solver.name(name) for name in given["names"]}
        exec(compile(given["tests"], "tests.py", "exec"), space)
    except Closed:
        return "crashed", "the solution's process ended before the tests did"
    except TooLong:
        return "output", "an argument or a result is too large"
    except BaseException as error:
        return _of_error(error, solver, given["tests"])
    return "passed", ""


def _of_error(error: BaseException, solver: Solver, tests: str) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if error is not solver.raised:
        return "failed", _line(error, tests) if isinstance(error, AssertionError) else text
    if isinstance(error, SolutionError) and str(error).startswith("SystemExit"):
        return "exited", "the solution called exit"
    if isinstance(error, SolutionError) and str(error).startswith("TooLong"):
        return "output", "a result is too large"
    kinds = {MemoryError: "memory", SyntaxError: "syntax", IndentationError: "syntax", TabError: "syntax"}
    if isinstance(error, NameError) and "the solution defines no" in str(error):
        return "missing", str(error)
    return kinds.get(type(error), "error"), str(error) if isinstance(error, SolutionError) else text


def _line(error: BaseException, tests: str) -> str:
    """The line of the tests that failed."""
    number, frame = 0, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "tests.py":
            number = frame.tb_lineno
        frame = frame.tb_next
    return " ".join(tests.split("\n")[number - 1].split())[:200] if number else "an assertion"


def main() -> None:
    given = json.loads(sys.argv[1])
    wire = Wire(given["reads"], given["writes"], given["message_bytes"])
    os.chdir(given["folder"])
    with open(os.path.join(given["folder"], "tests.json"), encoding="utf-8") as file:
        tests = json.load(file)
    confine(given["folder"], **given["confine"])
    try:
        wire.receive()
    except Closed:
        kind, details = "sandbox", "the solution's process ended before it was confined"
    else:
        os.write(given["verdict"], b"\n")  # from here on the time counts
        kind, details = verdict(wire, tests)
    os.write(given["verdict"], json.dumps([kind, details[:500]]).encode("ascii"))


if __name__ == "__main__":
    main()
