"""The process that runs a model's code: confines itself, runs the program, answers the judge's calls.

It holds neither the tests nor what they expect, and has no part in the verdict. Run by `powermc` as a script:
`solver.py '{"folder": ..., "reads": ..., "writes": ..., ...}'`.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import sys
import types
from collections.abc import Callable

TYPE_CHECKING = False  # importing typing would take a tenth of the time that a run takes
if TYPE_CHECKING:
    from typing import Any

# A script of a bare interpreter: its neighbours are found by this line.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from confine import confine  # noqa: E402
from wire import Closed, TooLong, Wire, pack, unpack  # noqa: E402

del sys.path[0]

_ITEMS = 1_000_000
"""At most so many of an iterable are sent."""

_SPECIAL: dict[str, Callable[..., Any]] = {
    "__iter__": lambda value: list(itertools.islice(value, _ITEMS)),
    "__next__": next,
    "__len__": len,
    "__bool__": bool,
    "__str__": str,
    "__getitem__": operator.getitem,
    "__call__": lambda value, *args, **named: value(*args, **named),
    "__getattr__": getattr,
    "__setattr__": setattr,
}


class Objects:
    """What the judge knows by number; objects stay alive as long as the process."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module, self._known, self._numbers = module, [], {}

    def number(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._known)
            self._known.append(value)
        return self._numbers[id(value)]

    def answer(self, request: Any) -> Any:
        """`["name", name]`, or `[number, special method, arguments, named arguments]`."""
        if request[0] == "name":
            if not hasattr(self._module, request[1]):
                raise NameError(f"the solution defines no {request[1]!r}")
            return pack(getattr(self._module, request[1]), self.number)
        number, method, args, named = request
        args = [unpack(arg, self._known.__getitem__) for arg in args]
        named = {name: unpack(arg, self._known.__getitem__) for name, arg in named.items()}
        return pack(_SPECIAL[method](self._known[number], *args, **named), self.number)


def attempt(action: Callable[[], Any]) -> list[Any]:
    """`["value", ...]`, or `["raised", type, message]` whatever was raised, `SystemExit` included."""
    try:
        return ["value", action()]
    except BaseException as error:
        try:
            message = str(error)[:500]
        except BaseException:
            message = ""
        return ["raised", type(error).__name__, message]


def load(path: str) -> types.ModuleType:
    """The module of the program. Its name is not `__main__`: what a script would do besides defining is left out."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    with open(path, encoding="utf-8", errors="surrogatepass") as file:
        source = file.read()
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    return module


def main() -> None:
    given = json.loads(sys.argv[1])
    wire = Wire(given["reads"], given["writes"], given["message_bytes"])
    os.chdir(given["folder"])
    confine(given["folder"], **given["confine"])
    wire.send("confined")
    sys.argv = ["solution.py"]
    loaded: list[types.ModuleType] = []
    outcome = attempt(lambda: loaded.append(load(os.path.join(given["folder"], "solution.py"))))
    wire.send(outcome)
    if not loaded:
        return
    objects = Objects(loaded[0])
    while True:
        request = wire.receive()
        reply = attempt(lambda request=request: objects.answer(request))
        try:
            wire.send(reply)
        except TooLong:
            wire.send(["raised", "TooLong", "the result is too large"])


if __name__ == "__main__":
    try:
        main()
    except Closed:  # the judge is done
        os._exit(0)
