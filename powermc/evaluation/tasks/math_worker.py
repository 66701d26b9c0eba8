"""The process that compares two mathematical answers with math-verify; run by `maths.py` as a script.

One JSON line in, [reference, answer]; one out, whether they are equal. SymPy can run for ever, and inside a single
operation that no Python signal interrupts: the parent watches the time and kills this process. Standard library and
math-verify only.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from typing import Any

_MEMORY = 4 << 30


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable(logging.CRITICAL)  # math-verify warns that it does not watch the time
    replies, sys.stdout = sys.stdout, sys.stderr  # what the parsers print must not come between the replies
    import math_verify

    _equal(math_verify, "1", "2")  # loads the grammar, which takes longer than most comparisons
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        reference, answer = json.loads(line)
        print(json.dumps(_equal(math_verify, reference, answer)), file=replies, flush=True)


def _equal(math_verify: Any, reference: str, answer: str) -> bool | str:
    """Whether they are equal, or what went wrong."""
    try:
        gold, given = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (reference, answer))
        return bool(math_verify.verify(gold, given, timeout_seconds=None))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


if __name__ == "__main__":
    main()
