"""Countdown: make a number of given numbers, each used once, with + - * / and parentheses. Generated, graded exactly.

The items of a seed are the same everywhere; item i does not depend on how many are asked for. Each has a solution, by
construction. Gandhi et al. (2024, arXiv:2404.03683) use the game to study search in language models.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from powermc.choices import Stream
from powermc.evaluation.tasks.base import Item, Task, Template, register
from powermc.evaluation.tasks.texts import after, cut, last_boxed

_LARGEST_NUMBER, _LARGEST_TARGET = 25, 100
_LONGEST = 200
"""Characters of an expression; a longer one is no answer."""

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = str.maketrans("\N{MULTIPLICATION SIGN}\N{MIDDLE DOT}\N{DIVISION SIGN}\N{MINUS SIGN}[]", "**/-()")
_LATEX = re.compile(r"\\(times|cdot|div|left|right)\b")
_EXPRESSION = re.compile(r"[-+*/() \d]*\d[-+*/() \d]*")


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The value of an expression, exactly, and the numbers it uses in their order.

    Raises `ValueError` for anything but whole numbers, + - * / and parentheses, `ZeroDivisionError`.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError:
        raise ValueError("not an expression") from None
    used: list[int] = []
    return _value(tree.body, used), used


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, used), _value(node.right, used)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, used)
    raise ValueError("only whole numbers, + - * / and parentheses are allowed")


def verify(expression: str, numbers: Sequence[int], target: int) -> str | None:
    """What is wrong with an expression; None if it makes the target of the numbers, each used once.

    >>> verify("(3 + 4) * 6", [3, 4, 6], 42)
    >>> verify("3 * 14", [3, 4, 6], 42)
    'uses 3, 14, not 3, 4, 6'
    """
    try:
        value, used = evaluate(expression)
    except ZeroDivisionError:
        return "divides by zero"
    except ValueError as error:
        return str(error)
    if Counter(used) != Counter(numbers):
        return f"uses {', '.join(map(str, used))}, not {', '.join(map(str, numbers))}"
    return None if value == target else f"makes {value}, not {target}"


def expression(text: str) -> str | None:
    r"""The expression that a text gives: after the last "####", else in the last \boxed{...}, else after the last
    "Answer:", else the last stretch of numbers and signs that holds two numbers. What follows a "=" is left out.
    """
    marked = (after(text, "####"), last_boxed(text), after(text, "Answer:"))
    for part in marked:
        if part is not None and (found := _expressions(part)):
            return found[0]
    found = _expressions(text)
    return found[-1] if found else None


def _expressions(text: str) -> list[str]:
    words = {"times": "*", "cdot": "*", "div": "/", "left": "", "right": ""}
    text = _LATEX.sub(lambda match: words[match[1]], text).translate(_SIGNS)
    found = [part.strip() for part in _EXPRESSION.findall(text)]
    return [part for part in found if len(re.findall(r"\d+", part)) >= 2 and re.search(r"[-+*/]", part)]


def generate(count: int, seed: int, numbers: int = 4) -> list[Item]:
    """`count` items of so many numbers from 1 to 25, targets from 1 to 100."""
    return [_item(seed, i, numbers) for i in range(count)]


def _item(seed: int, i: int, numbers: int) -> Item:
    choices = Stream(seed).at("countdown", i)
    while True:
        drawn = [1 + choices.integers(_LARGEST_NUMBER) for _ in range(numbers)]
        value, solution = _combine([(Fraction(n), str(n)) for n in drawn], choices)
        if value.denominator == 1 and 1 <= value <= _LARGEST_TARGET and value not in drawn:
            break
    target = int(value)
    listed = ", ".join(map(str, drawn))
    question = f"Numbers: {listed}. Target: {target}."
    data = {"numbers": tuple(drawn), "target": target}
    return Item(f"countdown-{seed}-{i + 1}", question, f"{listed} -> {target}", f"#### {solution}", data)


def _combine(parts: list[tuple[Fraction, str]], choices: Stream) -> tuple[Fraction, str]:
    """Join two at random by a random sign until one is left; a division by zero becomes a sum."""
    while len(parts) > 1:
        left, a = parts.pop(choices.integers(len(parts)))
        right, b = parts.pop(choices.integers(len(parts)))
        sign = "+-*/"[choices.integers(4)]
        sign = "+" if sign == "/" and right == 0 else sign
        value = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[sign](left, right)
        parts.append((value, f"({a} {sign} {b})"))
    value, text = parts[0]
    return value, text[1:-1]


def _judge(item: Item, answer: str) -> tuple[bool, str]:
    wrong = verify(answer, item.data["numbers"], item.data["target"])
    return wrong is None, "right" if wrong is None else f"wrong: {answer} {wrong}"


COUNTDOWN = register(
    Task(
        name="countdown",
        about="make a number of four others with + - * /; generated, graded exactly",
        generate=generate,
        extract=lambda item, text: expression(cut(text, ("\nNumbers:",))),
        judge=_judge,
        chat=Template(
            "{question}\n\nWrite an expression that equals the target. Use each of the numbers exactly once, and only "
            "+ - * / and parentheses. End with the expression on a line of its own after ####.",
            answer="\n{solution}",
        ),
        plain=Template("{question}\n", answer="{solution}", stop=("\nNumbers:",)),
    )
)
