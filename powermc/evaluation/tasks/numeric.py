"""Exact numbers in a text. Rules, in this order; the first that finds a number decides:

1. after the last "####", to the end of the line;
2. in the last closed \\boxed{...};
3. the last number of the text.

Where 1 or 2 hold an equation, what stands behind its last "=" counts; then the first number counts, so that units may
follow. A number may have a sign, thousands commas, decimals, a power of ten (1.5e3); it may be a fraction (3/4,
\\frac{3}{4}) or mixed (1 1/2). Currency signs are skipped, a per cent sign means nothing. Numbers are compared exactly:
0.5 is 1/2, and 0.33 is not 1/3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from powermc.evaluation.tasks.texts import after, last_boxed

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus sign counts as one where it does not follow a word or a number ("10-3" ends with 3).
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.,)])-)?"
    rf"(?:(?P<mixed>\d+)[ ](?=\d+/\d))?"
    rf"(?P<value>{_PLAIN})(?:(?P<power>[eE][+-]?\d{{1,3}})(?!\w)|/(?P<below>{_PLAIN})(?!\d*/\d))?",
    re.ASCII,
)
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}")
_NOISE = re.compile(r"\\?[$€£¥]|\\[,;!: ]|\\left|\\right|~")
_DIGITS = 1000
"""A longer number is read as none: it is no answer, and reading it takes long."""


def number(text: str) -> Fraction | None:
    """The number that a text answers, by the rules above.

    >>> number("3 + 4 = 7, so she pays $1,007.50 in all.")
    Fraction(2015, 2)
    """
    for marked in (after(text, "####"), last_boxed(text)):
        if marked is not None and (found := next(_numbers(_value(marked)), None)) is not None:
            return found
    return _last(text)


def last_number(text: str) -> str | None:
    """The last number of a text by rule 3 alone, in one spelling ("1,050.00" and "1050" are the same), or None.

    What votes are counted by where there is no task to say how an answer is marked.

    >>> last_number("so she earns $1,050.00 in all.")
    '1050'
    """
    found = _last(text)
    return None if found is None else spell(found)


def _last(text: str) -> Fraction | None:
    found = None
    for found in _numbers(text):  # noqa: B007  (the last one)
        pass
    return found


def _value(marked: str) -> str:
    """What stands behind the last "=", if anything does."""
    _, equal, right = marked.rpartition("=")
    return right if equal and re.search(r"\d", right) else marked


def _numbers(text: str) -> Iterator[Fraction]:
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    text = re.sub(r"(?<=\d)\s*(?=\\[dtc]?frac)", " ", _NOISE.sub("", text))
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    for match in _NUMBER.finditer(text):
        if len(match[0]) <= _DIGITS and (found := _fraction(match)) is not None:
            yield found


def _fraction(match: re.Match[str]) -> Fraction | None:
    def plain(part: str) -> Fraction:
        return Fraction(part.replace(",", ""))

    value = plain(match["value"])
    if match["power"]:
        value *= Fraction(10) ** int(match["power"][1:])
    if match["below"]:
        below = plain(match["below"])
        if match.string[: match.start()].endswith("/"):  # the end of a date
            return below
        if below == 0:
            return None
        value /= below
    value += plain(match["mixed"]) if match["mixed"] else 0
    return -value if match["sign"] else value


def spell(value: Fraction) -> str:
    """One spelling of a number: an integer, a decimal where it ends, else a fraction.

    >>> spell(Fraction("1050.50")), spell(Fraction(1, 3))
    ('1050.5', '1/3')
    """
    below, places = value.denominator, 0
    while below % 10 == 0:
        below, places = below // 10, places + 1
    for prime in (2, 5):
        while below % prime == 0:
            below, places = below // prime, places + 1
    if below != 1 or places == 0:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
