"""GSM8K and MATH: an exact number, and an expression compared by math-verify."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from powermc.errors import ArgumentError, PowermcError
from powermc.evaluation.tasks.base import Hub, Item, Row, Task, Template, register
from powermc.evaluation.tasks.numeric import number, spell
from powermc.evaluation.tasks.texts import after, cut, last_boxed

_NEXT_QUESTION = ("\nQuestion:", "\nProblem:")
"""Where a plain model goes on with a question of its own; nothing behind it is graded."""

# GSM8K

_CALCULATOR = re.compile(r"<<[^<>]*>>")
"""The calculator annotations in GSM8K's solutions, left out of few-shot examples."""


def _gsm8k_item(row: Row) -> Item:
    solution = row.text("answer")
    value = number(solution) if "####" in solution else None
    if value is None:
        raise ArgumentError(f"{row.where}: field 'answer' must end with '#### ' and a number, got {solution[-40:]!r}")
    name = f"gsm8k-{row.id('id')}"
    return Item(name, row.text("question").strip(), spell(value), _CALCULATOR.sub("", solution).strip())


def _number_of(item: Item, text: str) -> str | None:
    value = number(cut(text, _NEXT_QUESTION))
    return None if value is None else spell(value)


def _same_number(item: Item, answer: str) -> tuple[bool, str]:
    return (True, "right") if answer == item.reference else (False, f"wrong: {answer}, not {item.reference}")


GSM8K = register(
    Task(
        name="gsm8k",
        about="grade-school maths in words; an exact number",
        item=_gsm8k_item,
        extract=_number_of,
        judge=_same_number,
        chat=Template(
            "{question}\n\nThink step by step. End with the answer, a number, on a line of its own after ####.",
            answer="\n\n{solution}",
        ),
        plain=Template("Question: {question}\nAnswer:", stop=("\nQuestion:",)),
        hub=Hub("openai/gsm8k", "main", "test"),
    )
)

# MATH

_SAID = re.compile(r"answer\s*(?:is\s*:?|:)\s*(.+?)(?:\.?\s*$|\.\s|\n)", re.IGNORECASE | re.MULTILINE)
_INLINE = re.compile(r"\$+([^$\n]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]")


def expression(text: str) -> str | None:
    r"""The expression that a text answers. The first of these decides: the last closed \boxed{...}; what follows the
    last "####"; the last "answer is ..." to the end of the sentence; the last formula of the last line that is not
    empty.

    >>> expression(r"Hence the answer is $\frac{1}{2}$.")
    '\\frac{1}{2}'
    """
    boxed = last_boxed(text)
    if boxed:
        return boxed
    marked = after(text, "####")
    if marked is not None and marked.strip():
        return _bare(marked)
    said = _SAID.findall(text)
    if said:
        return _bare(said[-1])
    lines = [line for line in text.splitlines() if line.strip()]
    formulas = _INLINE.findall(lines[-1]) if lines else []
    return next(part for part in formulas[-1] if part).strip() if formulas else None


def _bare(text: str) -> str | None:
    """Without the marks of a formula around it."""
    text = text.strip().rstrip(".").strip()
    formula = _INLINE.fullmatch(text)
    return (next(part for part in formula.groups() if part) if formula else text).strip() or None


def _math_item(row: Row) -> Item:
    reference = row.text("answer").strip()
    solution = row.text("solution") if row.named("solution") else f"The answer is $\\boxed{{{reference}}}$."
    name = row.id("unique_id", "id")
    return Item(f"math-{name}" if name.isdigit() else name, row.text("problem", "prompt").strip(), reference, solution)


class Comparer:
    """A process of its own that compares expressions, started when first needed; safe to use from several threads.

    seconds: for one comparison; the process is killed after it and started anew. start_seconds: for its start, which
    imports SymPy.
    """

    def __init__(self, seconds: float = 30.0, start_seconds: float = 120.0) -> None:
        self._seconds, self._start_seconds = seconds, start_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self.restarts = 0

    def equal(self, reference: str, answer: str) -> bool | str:
        """Whether they are equal, or why that is not known: "timeout: ..." or "grader crashed: ...".

        Raises `PowermcError` without math-verify.
        """
        with self._lock:
            process = self._running()
            try:
                process.stdin.write(json.dumps([reference, answer]) + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                line = self._line(process, self._seconds)
            except BrokenPipeError:
                line = ""
            if not line:
                self.close()
                self.restarts += 1
                if line is None:
                    return f"timeout: not compared within {self._seconds:g} s"
                return "grader crashed: the process that compares ended"
            found = json.loads(line)
            return found if isinstance(found, bool) else f"grader crashed: {found}"

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and (self._owner != os.getpid() or self._process.poll() is not None):
            self.close()
        if self._process is None:
            self._process, self._owner = self._start(), os.getpid()
        return self._process

    def _start(self) -> subprocess.Popen[str]:
        if importlib.util.find_spec("math_verify") is None:
            raise PowermcError("grading MATH needs the package math-verify: pip install 'powermc[math]'")
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        if not self._line(process, self._start_seconds):
            _kill(process)
            raise PowermcError("math-verify did not start: see python -c 'import math_verify'")
        return process

    def _line(self, process: subprocess.Popen[str], seconds: float) -> str | None:
        """The next line; empty if the process ended, None if there is none in time."""
        assert process.stdout is not None
        end, found = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    return ""
                found += part
        return found.decode()

    def close(self) -> None:
        """End the process, if there is one; it is started again when needed."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._owner == os.getpid():
            _kill(process)
        else:  # after a fork it is the parent's, who goes on using it
            process.returncode = 0  # so that nobody waits for a process that is not a child
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()


def _kill(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.communicate()


_comparer = Comparer()
atexit.register(_comparer.close)


def _same_expression(item: Item, answer: str) -> tuple[bool, str]:
    found = _comparer.equal(item.reference, answer)
    if isinstance(found, str):
        return False, found
    return (True, "right") if found else (False, f"wrong: {answer}, not {item.reference}")


MATH = register(
    Task(
        name="math500",
        about="competition maths; an expression, compared by math-verify",
        item=_math_item,
        extract=lambda item, text: expression(cut(text, _NEXT_QUESTION)),
        judge=_same_expression,
        chat=Template(
            "{question}\n\nThink step by step. Put the final answer into \\boxed{{}}.",
            answer="\n\n{solution}",
        ),
        plain=Template("Problem: {question}\nSolution:", stop=("\nProblem:",)),
        hub=Hub("HuggingFaceH4/MATH-500", None, "test"),
    )
)
