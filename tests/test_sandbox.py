"""Code of a model: what it may do, what it may not, and that it cannot forge a verdict."""

from __future__ import annotations

import glob
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.errors import ArgumentError
from powermc.evaluation.tasks import sandbox
from powermc.evaluation.tasks.sandbox import Check, Limits, SandboxError, Verdict, containment, run, wire

CHECK = Check("assert f(3) == 4\nassert f(10) == 11", ("f",))
RIGHT = "def f(x):\n    return x + 1\n"

contained = pytest.mark.skipif(
    None in containment().values(), reason=f"this system does not contain code: {containment()}"
)
pytestmark = contained


def left_over():
    return glob.glob(os.path.join(tempfile.gettempdir(), "powermc-code-*"))


def test_right_and_wrong():
    assert run(RIGHT, CHECK) == Verdict("passed")
    assert run("def f(x):\n    return 4\n", CHECK) == Verdict("failed", "assert f(10) == 11")


def test_this_system_contains_code():
    assert set(containment()) == {
        "memory", "processes", "network", "reading outside", "writing", "file attributes", "signals",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("def f(x:", "syntax"),
        ("def f(x):\n    return x / 0", "error"),
        ("def g(x):\n    return x + 1", "missing"),
        ("import sys\ndef f(x):\n    sys.exit(0)", "exited"),
        ("raise SystemExit(0)", "exited"),
        ("import os\nos._exit(0)", "exited"),
        ("import os\ndef f(x):\n    os._exit(1)", "crashed"),
        ("import ctypes\ndef f(x):\n    ctypes.string_at(0)", "crashed"),
        ("def f(x):\n    return len(bytearray(8 << 30))", "memory"),
        ("def f(x):\n    return f(x)", "error"),
        ("def f(x):\n    return 'x' * (1 << 22)", "output"),
        ("def f(x):\n    print('x' * (1 << 22))\n    return x + 1", "output"),
        ("import sys\nsys.stderr.write('x' * (1 << 22))", "output"),
        ("def f(x):\n    a = []\n    a.append(a)\n    return a", "error"),
        ("def f(x):\n    raise ExceptionGroup('many', [ValueError()])", "error"),
        ("class E(BaseException): pass\ndef f(x):\n    raise E('passed')", "error"),
        ("import importlib\nimportlib.import_module('numpy')", "error"),
    ],
)
def test_what_goes_wrong_is_named(program, kind):
    before = left_over()
    assert run(program, CHECK).kind == kind
    assert left_over() == before


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ndef f(x):\n    time.sleep(3600)",
        "import signal, time\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\ntime.sleep(3600)",
        "def f(x):\n    return (y for y in iter(int, 1))\n".replace("return (", "return sum("),
        "def f(x):\n    return 9 ** 9 ** 9\n",
    ],
)
def test_what_hangs_is_ended(program):
    start = time.monotonic()
    assert run(program, CHECK, Limits(seconds=0.4)).kind == "timeout"
    assert time.monotonic() - start < 30


def test_a_loop_that_uses_cpu_ends_by_itself_if_nobody_watches():
    """The limit of CPU seconds, which holds if powermc is killed."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import confine\n"
        "confine.confine('/', cpu_seconds=1, memory_bytes=1 << 30, strict=True)\nwhile True: pass"
    )
    done = subprocess.run([sys.executable, "-c", code, os.path.dirname(sandbox.__file__)], timeout=60, check=False)
    assert -done.returncode in (signal.SIGXCPU, signal.SIGKILL)


def test_children_end_with_whoever_started_them(tmp_path):
    """powermc killed in the middle of a run: neither process stays, though the program sleeps."""
    code = (
        "import sys\nfrom powermc.evaluation.tasks.sandbox import *\n"
        "run('import time; time.sleep(3600)', Check('f()', ('f',)), Limits(seconds=3600, weak=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        wait(lambda: len(started_by(parent.pid)) == 2)
        children = started_by(parent.pid)
        wait(lambda: all("Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text() for pid in children))
    finally:
        parent.kill()
        parent.wait()
    wait(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in children))


def started_by(parent: int) -> list[int]:
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        return [int(pid) for pid in file.read().split()]


def wait(until):
    end = time.monotonic() + 120
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


# What must be refused: each is tried, and the solution is right only if it was not.
ATTEMPTS = {
    "fork": "os.fork()",
    "fork bomb": "[os.fork() for _ in range(1000)]",
    "child left behind": "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "another program": "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "thread": "threading.Thread(target=int).start()",
    "socket": "socket.socket()",
    "local socket": "socket.socket(socket.AF_UNIX)",
    "pair of sockets": "socket.socketpair()",
    "name look-up": "socket.create_connection(('localhost', 80))",
    "file outside": "open(OUTSIDE + '.new', 'w')",
    "file changed": "open(OUTSIDE, 'a')",
    "file emptied": "os.truncate(OUTSIDE, 0)",
    "file removed": "os.remove(OUTSIDE)",
    "file renamed": "os.rename(OUTSIDE, OUTSIDE + '.new')",
    "file linked": "os.link(OUTSIDE, 'mine')",
    "file's mode": "os.chmod(OUTSIDE, 0o777)",
    "file's owner": "os.chown(OUTSIDE, 1, 1)",
    "file's times": "os.utime(OUTSIDE, (0, 0))",
    "file in its folder": "open('mine', 'w')",
    "folder": "os.mkdir(OUTSIDE + '.new')",
    "reading a file": "open(OUTSIDE).read()",
    "reading ..": "os.listdir('..')",
    "reading the tests": "open('../judge/tests.json').read()",
    "reading the root": "os.listdir('/')",
    "reading passwords": "open('/etc/passwd').read()",
    "reading the parent": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "writing the parent": "open(f'/proc/{os.getppid()}/mem', 'r+b')",
    "killing the parent": "os.kill(os.getppid(), signal.SIGKILL)",
    "killing the judge": "os.kill(os.getpid() + 1, signal.SIGKILL)",
    "killing a group": "os.killpg(os.getppid(), signal.SIGKILL)",
    "killing all": "os.kill(-1, signal.SIGKILL)",
    "signals by a pipe": "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "limits of the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "priority of the parent": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "8 GB": "bytearray(8 << 30)",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "memory of the system": "os.memfd_create('x')",
    "tracing": "check(libc.ptrace(16, os.getppid(), 0, 0))",
    "namespaces": "check(libc.unshare(0x10000000))",
    "mounting": "check(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
}
ATTEMPT = """
import ctypes, fcntl, os, resource, signal, socket, subprocess, threading
libc = ctypes.CDLL(None)
OUTSIDE = {outside!r}
def check(code):
    if code < 0:
        raise OSError
def f(x):
    refused = []
    for name, code in {attempts!r}.items():
        try:
            eval(code, globals())
        except (OSError, ValueError, MemoryError, RuntimeError):
            refused.append(name)
    return refused
"""


def test_what_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    os.utime(outside, (1_000_000, 1_000_000))
    before = outside.stat()
    names = list(ATTEMPTS)
    check = Check(f"got = f(0)\nassert got == {names!r}, set({names!r}) - set(got)", ("f",))
    verdict = run(ATTEMPT.format(outside=str(outside), attempts=ATTEMPTS), check)
    assert verdict == Verdict("passed"), verdict
    after = outside.stat()
    assert outside.read_text() == "mine"
    assert (after.st_mode, after.st_uid, after.st_mtime) == (before.st_mode, before.st_uid, before.st_mtime)
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


@pytest.mark.parametrize("name", ["socket", "file outside", "killing the parent", "fork", "reading the tests"])
def test_an_attempt_that_is_not_caught_is_an_error_of_the_solution(name, tmp_path):
    code = ATTEMPT.format(outside=str(tmp_path / "x"), attempts={}) + f"\ndef f(x):\n    {ATTEMPTS[name]}\n"
    assert run(code, CHECK).kind == "error"
    assert not list(tmp_path.iterdir())


# Solutions that know nothing and want to pass.
FORGERIES = {
    "leaves early": "import sys\nsys.exit(0)",
    "leaves early at once": "import os\nos._exit(0)",
    "leaves when called": "import os\ndef f(x):\n    os._exit(0)",
    "prints success": """print('["passed", ""]', flush=True)\ndef f(x):\n    print('["passed", ""]')""",
    "writes success everywhere": """
import os
for fd in range(1, 256):
    try:
        os.write(fd, b'["passed", ""]')
    except OSError:
        pass
def f(x):
    return 0
""",
    "answers ahead": """
import json, os, struct, sys
data = json.dumps(["value", 4]).encode()
for fd in range(3, 64):
    for _ in range(9):
        try:
            os.write(fd, struct.pack(">I", len(data)) + data)
        except OSError:
            break
""",
    "equals everything": """
class Same:
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
def f(x):
    return Same()
""",
    "an integer that equals everything": """
class Same(int):
    __eq__ = lambda self, other: True
    __hash__ = lambda self: 0
def f(x):
    return Same(7)
""",
    "no asserts": """
import builtins, sys, unittest
builtins.AssertionError = type('Quiet', (Exception,), {'__init__': lambda self, *a: sys.exit(0)})
unittest.TestCase.assertEqual = lambda *a: None
builtins.compile = builtins.exec = lambda *a, **k: None
sys.excepthook = lambda *a: None
def f(x):
    return 0
""",
    "defines the tests": """
def check(candidate):
    pass
def f(x):
    return 0
import sys
sys.modules['tests'] = sys.modules['__main__'] = sys.modules[__name__]
""",
    "looks for the answers": """
import gc, sys
def f(x):
    frame = sys._getframe()
    seen = []
    while frame:
        seen.append(repr(frame.f_locals) + repr(frame.f_globals))
        frame = frame.f_back
    seen += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, str))][:2000]
    return 4 if any('assert f(3) ==' in s.replace('assert f(3) ==' + chr(39), '') for s in seen) and x == 3 else 0
""",
    "changes its arguments": """
def f(x):
    x = 4
    return None
""",
    "raises what the tests might": "def f(x):\n    raise AssertionError",
    "generates": "def f(x):\n    yield 4",
    "never ends being true": "class A:\n    def __bool__(self): return True\ndef f(x): return A()",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(name):
    assert not run(FORGERIES[name], CHECK, Limits(seconds=3)).passed


def test_what_the_judge_sees_is_plain():
    """Comparisons run on copies that the solver has no part in."""
    program = "from collections import Counter\ndef f(x):\n    return {'a': Counter('aab'), 'b': (1, 2.5, None)}"
    assert run(program, Check("assert f(1) == {'a': {'a': 2, 'b': 1}, 'b': (1, 2.5, None)}", ("f",))).passed
    assert run("def f(*args): return args", Check("assert f(1, [2], {3}) == (1, [2], {3})", ("f",))).passed


def test_objects_of_the_solution_can_be_used():
    """As MBPP does: classes of the solution made by the tests, attributes set, generators read."""
    program = """
class Pair:
    def __init__(self, a, b):
        self.a, self.b = a, b
def total(pairs):
    return sum(p.a + p.b for p in pairs)
def count(n):
    yield from range(n)
"""
    tests = """
pair = Pair(1, 2)
pair.b = 5
assert total([pair, Pair(3, b=4)]) == 13 and pair.a == 1
assert list(count(3)) == [0, 1, 2] and next(count(2)) == 0
assert pair == pair and pair != Pair(1, 5)
"""
    assert run(program, Check(tests, ("Pair", "total", "count"))) == Verdict("passed")


def test_runs_are_the_same_every_time():
    """Hashes of text are fixed: the order of a set is."""
    program = "def f(x):\n    return list({'a', 'b', 'c', 'd', x})"
    program = run(program, Check("raise KeyError(str(f('e')))", ("f",))).details, program
    assert run(program[1], Check("raise KeyError(str(f('e')))", ("f",))).details == program[0]


def test_several_threads():
    found: list[Verdict] = []
    threads = [threading.Thread(target=lambda: found.append(run(RIGHT, CHECK))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Verdict("passed")] * 4


def test_bad_limits():
    with pytest.raises(ArgumentError, match="seconds must be > 0, got 0"):
        Limits(seconds=0)
    with pytest.raises(ArgumentError, match="memory_bytes must be > 0, got nan"):
        Limits(memory_bytes=math.nan)  # type: ignore[arg-type]


def test_refused_where_code_is_not_contained(monkeypatch):
    monkeypatch.setattr(sandbox, "_containment", lambda: {"network": None, "memory": "limits"})
    with pytest.raises(SandboxError, match=r"cannot be contained here \(network\)"):
        run(RIGHT, CHECK)
    assert run(RIGHT, CHECK, Limits(weak=True)).passed


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=1 << 200)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner)
        | st.sets(st.integers() | st.text())
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_values_cross_unchanged(value):
    """By value and by type, through real pipes."""
    there, back = os.pipe()
    sender, receiver = wire.Wire(-1, back, 1 << 16), wire.Wire(there, -1, 1 << 16)
    try:
        sender.send(wire.pack(value, lambda o: pytest.fail(f"{o!r} is plain")))
        got = wire.unpack(receiver.receive(), lambda n: pytest.fail("nothing was referred to"))
    finally:
        os.close(there)
        os.close(back)
    assert got == value
    assert repr(got) == repr(value) or isinstance(value, set | dict | list | tuple)
