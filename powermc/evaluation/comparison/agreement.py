"""Whether two comparisons gave the same answers: by other workers, in other groups, on another machine."""

from __future__ import annotations

from typing import NamedTuple

from powermc.evaluation.comparison.reading import Record
from powermc.sequences.path import agreement


class Difference(NamedTuple):
    """An answer that differs: of which method, to which question and sample, from which token on.

    log_p: of both (nats). In float32 two paths may part where two tokens are a near-tie; what follows is then another
    draw, so that only `token` says where that was.
    """

    spec: str
    question: str
    sample: int
    token: int
    log_p: tuple[float, float]


def differences(one: Record, other: Record) -> tuple[list[Difference], int]:
    """(answers that both have and that differ, how many both have)."""
    there = {line.spec: line.answers for line in other.lines}
    found, common = [], 0
    for line in one.lines:
        for (question, sample), mine in line.answers.items():
            theirs = there.get(line.spec, {}).get((question, sample))
            if theirs is None:
                continue
            common += 1
            if mine.tokens != theirs.tokens:
                first = agreement(mine.tokens, theirs.tokens)
                name = one.questions[question].id
                found.append(Difference(line.spec, name, sample, first, (mine.log_p, theirs.log_p)))
    return found, common
