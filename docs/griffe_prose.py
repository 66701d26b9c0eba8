"""Griffe extension: reads the docstrings of powermc as they are meant.

The NumPy parser of griffe takes every unindented line below "Parameters" for a parameter, drops what it cannot
parse, and gives names that share a line one default. Here prose that follows such a section moves above it, and
shared lines are split. Index chains such as values[chain][draw] are escaped and doctests fenced, since Markdown reads
them as links and quotations.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTIONS = ("Parameters", "Attributes")
_ITEM = re.compile(r"\*{0,2}\w+(, \*{0,2}\w+)*( : .*)?")
_INDEX = re.compile(r"`[^`]*`|\](?=\[)")


def rewrite(text: str) -> str:
    """The docstring with its sections last, one name per item, and no accidental links."""
    prose: list[str] = []
    sections: list[str] = []
    lines = text.split("\n")
    i = 0
    current: list[str] = prose
    while i < len(lines):
        line, after = lines[i], lines[i + 1] if i + 1 < len(lines) else ""
        if after and not after.strip("-"):
            # Only sections made of items can be told from the prose below them.
            current = sections if line in _SECTIONS else prose
            current += [line, after]
            i += 2
        elif current is sections and line and not line[0].isspace():
            stop = i + 1
            while stop < len(lines) and (not lines[stop] or lines[stop][0].isspace()):
                stop += 1
            body = lines[i + 1 : stop]
            if _ITEM.fullmatch(line) and any(part.strip() for part in body):
                names, _, kind = line.partition(" : ")
                for name in names.split(", "):
                    sections += [f"{name} : {kind}" if kind else name, *body]
                i = stop
            else:
                current = prose
        elif line.startswith(">>>"):
            stop = next((j for j in range(i, len(lines)) if not lines[j].strip()), len(lines))
            current += ["```pycon", *lines[i:stop], "```"]
            i = stop
        else:
            current.append(line)
            i += 1
    whole = "\n".join([*prose, "", *sections] if sections else prose)
    return _INDEX.sub(lambda match: "]\\" if match[0] == "]" else match[0], whole).rstrip()


class Prose(griffe.Extension):
    """Applies `rewrite` to every docstring as it is collected."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value)
