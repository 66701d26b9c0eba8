"""Finding the part of a text that answers: after a marker, in a box, before the model's next question."""

from __future__ import annotations

from collections.abc import Iterable


def cut(text: str, stop: Iterable[str]) -> str:
    """What stands before the first of the stop strings.

    >>> cut("#### 18\\n\\nQuestion: and now?", ["\\nQuestion:"])
    '#### 18\\n'
    """
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last closed \boxed{...} or \fbox{...}, braces balanced; None if there is none.

    >>> last_boxed(r"so \boxed{\frac{1}{2}} it is")
    '\\frac{1}{2}'
    """
    starts = sorted(
        (i + len(mark) for mark in ("\\boxed{", "\\fbox{") for i in _all(text, mark)),
        reverse=True,
    )
    return next((found for start in starts if (found := _balanced(text, start)) is not None), None)


def _all(text: str, part: str) -> Iterable[int]:
    i = text.find(part)
    while i >= 0:
        yield i
        i = text.find(part, i + 1)


def _balanced(text: str, start: int) -> str | None:
    """The text from `start`, after an opening brace, to the brace that closes it."""
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # \{ and \} are letters
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start:i].strip()
        i += 1
    return None


def after(text: str, marker: str) -> str | None:
    """The rest of the line after the last `marker`, or None."""
    _, found, rest = text.rpartition(marker)
    return rest.partition("\n")[0] if found else None
