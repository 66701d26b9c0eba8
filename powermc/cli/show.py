"""Showing results on a terminal: a model's text is data, never markup and never control codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from powermc.visible import visible

if TYPE_CHECKING:
    from powermc.results import Run


def console(stream: TextIO | None = None) -> Console:
    """A console that prints strings as they are."""
    return Console(file=sys.stdout if stream is None else stream, markup=False, highlight=False, emoji=False)


def say(out: Console, text: str, style: str = "", indent: int = 0) -> None:
    """Print text, wrapped on a terminal only: what is piped keeps its lines."""
    body = Text(visible(text), style=style)
    if out.is_terminal:
        out.print(Padding(body, (0, 0, 0, indent)) if indent else body)
    else:
        lines = body.plain.split("\n")
        out.print(Text("\n".join(" " * indent + line if line else line for line in lines)), soft_wrap=True)


def texts(out: Console, run: Run, prompt: int, indent: int = 0) -> None:
    """Print the last text of every chain of a prompt, equal ones once."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for c, chain in enumerate(run.chains[prompt]):
        if chain.path is not None:
            groups.setdefault(chain.path.tokens, []).append(c)
    for members in groups.values():
        first = run.chains[prompt][members[0]]
        assert first.path is not None
        n = len(first.path)
        facts = f"log p {first.path.log_prob:.2f}, {n} token{'s' if n != 1 else ''}, {run.ending(prompt, members[0])}"
        say(out, f"{names('chain', members)}: {facts}", "bold cyan", indent)
        text = first.text if first.text is not None else "no tokenizer, no text"
        say(out, text.strip("\n") if text.strip() else "(empty)", indent=indent + 2)
        say(out, "")


def names(noun: str, numbers: Sequence[int]) -> str:
    """chain 0; chains 0 and 2; chains 0, 1 and 3."""
    head, last = [str(n) for n in numbers[:-1]], str(numbers[-1])
    return f"{noun} {last}" if not head else f"{noun}s {', '.join(head)} and {last}"
