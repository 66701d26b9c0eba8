"""HumanEval and MBPP: programs, run against tests in the sandbox.

The program of a text, by the first rule that applies (for HumanEval a text that begins with an indented line goes on
from the prompt, by rule 3):

1. fenced blocks (```): the last closed one that defines the wanted function, else the last closed one; an open block
   at the end of the text counts as closed;
2. else, where the text defines the wanted function in its first column: from the first line of code on, without what
   follows the program (the lines from the first one that is no Python);
3. else (HumanEval) the text goes on from the prompt: up to the first line in the first column that begins something
   else (`def`, `class`, `if`, `print`, `#`, `@`, an import, a fence), as Chen et al. (2021, arXiv:2107.03374) cut it.

A whole function (1 and 2) is given what the prompt has before the function (imports, helpers).
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Callable
from dataclasses import replace

from powermc.errors import ArgumentError
from powermc.evaluation.tasks.base import Hub, Item, Row, Task, Template, register
from powermc.evaluation.tasks.sandbox import Check, Limits, run

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_NEXT = re.compile(r"\n(?=(?:def|class|if|print|import|from|assert|@|#|```)\b|@|#|```)")
_GOES_ON = re.compile(r"(?:[ \t]*\n)*(?:  |\t)")
_FIRST_CODE = re.compile(r"^(?:from\s|import\s|def\s|class\s|@|[A-Za-z_]\w*\s*=)", re.MULTILINE)


def judge_with(limits: Limits) -> Callable[[Item, str], tuple[bool, str]]:
    """The judge of programs within these limits."""

    def judge(item: Item, program: str) -> tuple[bool, str]:
        verdict = run(program, item.data["check"], limits)
        return (True, "right") if verdict.passed else (False, f"{verdict.kind}: {verdict.details}")

    return judge


def with_limits(task: Task, limits: Limits) -> Task:
    """A coding task whose programs run within other limits."""
    return replace(task, judge=judge_with(limits))


def defines(source: str, name: str) -> bool:
    """Whether a program text defines a function or class of that name in its first column; it need not compile."""
    return re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", source, re.MULTILINE) is not None


def fenced(text: str, name: str) -> str | None:
    """The program of a text's fenced blocks, by rule 1; None without a block."""
    blocks = [block for block in _FENCE.findall(text) if block.strip()]
    wanted = [block for block in blocks if defines(block, name)]
    return (wanted or blocks or [None])[-1]


def _whole(text: str, name: str) -> str | None:
    """Rule 2."""
    if not defines(text, name):
        return None
    first = _FIRST_CODE.search(text)
    assert first is not None
    program = _without_tail(text[first.start() :])
    return program if defines(program, name) else text[first.start() :]


def _without_tail(program: str) -> str:
    """The lines before the first that Python's parser objects to."""
    lines = program.splitlines()
    while lines:
        try:
            ast.parse("\n".join(lines))
            break
        except SyntaxError as error:
            del lines[max(0, min(error.lineno or 1, len(lines)) - 1) :]
    return "\n".join(lines) + "\n"


# HumanEval


def _humaneval_item(row: Row) -> Item:
    prompt, name, tests = row.text("prompt"), row.text("entry_point"), row.text("test")
    if not defines(prompt, name):
        raise ArgumentError(f"{row.where}: field 'prompt' does not define entry_point {name!r}")
    _compiled(row, "prompt", prompt)
    _compiled(row, "test", tests)
    check = Check(f"{tests}\ncheck({name})\n", (name,), prompt)
    solution = row.text("canonical_solution") if row.named("canonical_solution") else ""
    return Item(row.id("task_id"), prompt, name, solution, {"check": check})


def _compiled(row: Row, field: str, source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ArgumentError(f"{row.where}: field {field!r} is no Python: {error}") from error


def _humaneval_program(item: Item, text: str) -> str | None:
    name = item.reference
    block = None if _GOES_ON.match(text) else fenced(text, name)
    whole = _whole(text, name) if block is None else block if defines(block, name) else None
    if whole is not None:
        return _before(item.question, name) + "\n" + whole
    body = _NEXT.split("\n" + text.rstrip("\n") if block is None else "\n" + block, maxsplit=1)
    return item.question + body[0].removeprefix("\n") + "\n" if body[0].strip() else None


def _before(prompt: str, name: str) -> str:
    """What a prompt has before the function that is asked for."""
    found = re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", prompt, re.MULTILINE)
    assert found is not None
    return prompt[: found.start()]


HUMANEVAL = register(
    Task(
        name="humaneval",
        about="Python functions from their docstrings; run against tests",
        item=_humaneval_item,
        extract=_humaneval_program,
        judge=judge_with(Limits()),
        chat=Template(
            "Complete this Python function. Write it out whole, with its imports, in one ```python block.\n\n"
            "```python\n{question}```",
            answer="\n\n```python\n{question}{solution}```",
        ),
        plain=Template(
            "{question}", answer="{solution}", stop=("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#", "\n@", "\n```")
        ),
        hub=Hub("openai/openai_humaneval", None, "test"),
    )
)

# MBPP


def _mbpp_item(row: Row) -> Item:
    tests = row.texts("test_list")
    if not tests:
        raise ArgumentError(f"{row.where}: field 'test_list' is empty")
    setup = "\n".join(row.texts("test_imports")) if row.named("test_imports") else _setup(row)
    body = "\n".join(tests)
    free = _free(_compiled(row, "test_list", body), _compiled(row, "test_setup_code", setup))
    known = [name for name in free if name in sys.stdlib_module_names]
    names = tuple(name for name in free if name not in known)
    if not names:
        raise ArgumentError(f"{row.where}: field 'test_list' calls nothing that a solution could define")
    if _uses(setup, names):  # such as `root = Node(1)`, with the solution's Node: it runs after the names are there
        setup, body = "", f"{setup}\n{body}"
    prelude = "\n".join([*(f"import {name}" for name in known), setup])
    question = f"{row.text('text', 'prompt').strip()}\nThe code must pass these tests:\n\n" + "\n".join(tests)
    solution = row.text("code").replace("\r\n", "\n") if row.named("code") else ""
    wanted = _called(_compiled(row, "test_list", "\n".join(tests)), names)
    block = f"```python\n{solution.strip()}\n```" if solution else ""
    return Item(f"mbpp-{row.id('task_id')}", question, wanted, block, {"check": Check(body, names, prelude)})


def _setup(row: Row) -> str:
    setup = row.any("test_setup_code") if row.named("test_setup_code") else ""
    if not isinstance(setup, str):
        raise ArgumentError(f"{row.where}: field 'test_setup_code' must be text, got {setup!r}")
    return setup


def _free(tests: ast.Module, setup: ast.Module) -> list[str]:
    """Names that tests and set-up read and neither binds nor Python has: the solution's, or modules of Python's."""
    nodes = [node for tree in (setup, tests) for node in ast.walk(tree)]
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    read = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    return [name for name in dict.fromkeys(read) if name not in bound and not hasattr(builtins, name)]


def _uses(source: str, names: tuple[str, ...]) -> bool:
    return any(isinstance(node, ast.Name) and node.id in names for node in ast.walk(ast.parse(source)))


def _called(tests: ast.Module, names: tuple[str, ...]) -> str:
    """The function that the tests call first."""
    calls = (node.func for node in ast.walk(tests) if isinstance(node, ast.Call))
    return next((call.id for call in calls if isinstance(call, ast.Name) and call.id in names), names[0])


def _mbpp_program(item: Item, text: str) -> str | None:
    block = fenced(text, item.reference)
    if block is None:
        block = _whole(text, item.reference)
    return block


MBPP = register(
    Task(
        name="mbpp",
        about="short Python programs from a sentence; run against tests",
        item=_mbpp_item,
        extract=_mbpp_program,
        judge=judge_with(Limits()),
        chat=Template("{question}\n\nWrite the whole program in one ```python block.", answer="\n\n{solution}"),
        plain=Template("Task: {question}\n\nSolution:\n", answer="{solution}", stop=("\nTask:",)),
        hub=Hub("google-research-datasets/mbpp", "full", "test"),
    )
)
