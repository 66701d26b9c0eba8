"""Measuring: what transitions cost, and whether answers are right."""

from __future__ import annotations

import re

# A minus sign counts as one where it does not follow a word or a number ("10-3" ends with 3).
_NUMBER = re.compile(r"((?<![\w.,)])-)?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.(\d+))?", re.ASCII)


def last_number(text: str) -> str | None:
    """The last number in a text, in one spelling ("1,050.00" and "1050" are the same), or None.

    The answer of a grade-school maths solution, by convention; it also reads GSM8K's references ("#### 18").

    >>> last_number("so she earns $1,050.00 in all.")
    '1050'
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, whole, decimals = found[-1]
    whole, decimals = whole.replace(",", "").lstrip("0") or "0", decimals.rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return value if value == "0" else sign + value
