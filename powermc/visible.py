"""A model's text is data: made visible wherever a person reads it, never markup and never control codes."""

from __future__ import annotations

import unicodedata

_UNSAFE = {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}
# Characters that reorder, hide or end text; other format characters (joiners in emoji and scripts) are harmless.
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


def visible(text: str) -> str:
    """The same text with control characters as escapes (\\x1b); newlines and tabs stay."""
    return "".join(
        c if c in "\n\t" or not (unicodedata.category(c) in _UNSAFE or c in _BIDI) else repr(c)[1:-1] for c in text
    )
