"""The letter of a multiple choice. Rules, in this order; the first that finds a letter decides:

1. in the last closed \\boxed{...}: a letter, maybe in parentheses or \\text{...};
2. the last "answer is B", "answer: (B)" and the like, capital letters only;
3. the last line that is a letter and nothing else, as in "(B)" or "B.";
4. the last letter in parentheses.
"""

from __future__ import annotations

import re

from powermc.evaluation.tasks.texts import last_boxed

_BOXED = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?\s*([A-Z])\s*\)?\s*\}?(?:\W.*)?", re.DOTALL)
_SAID = re.compile(
    r"(?i:\banswer)[\s*_]*(?i:(?:choice|option)[\s*_]*)?(?:(?i:is)\b|[:=])[\s*_$]*(?i:option\s+)?[(\[]?([A-Z])\b(?!')"
)
_LINE = re.compile(r"^[\s*_]*[(\[]?([A-Z])[)\].]?[\s*_]*$", re.MULTILINE)
_PARENTHESES = re.compile(r"\(([A-Z])\)")


def letter(text: str, letters: str) -> str | None:
    """The letter that a text chooses, one of `letters`, by the rules above.

    >>> letter("(A) is tempting. The answer is (C).", "ABCD")
    'C'
    """
    boxed = last_boxed(text)
    match = _BOXED.fullmatch(boxed) if boxed is not None else None
    if match is not None and match[1] in letters:
        return match[1]
    for rule in (_SAID, _LINE, _PARENTHESES):
        found = [c for c in rule.findall(text) if c in letters]
        if found:
            return found[-1]
    return None
