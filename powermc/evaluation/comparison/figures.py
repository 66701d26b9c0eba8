"""From answers and costs to the figures of a table. What a method does not have is None, and never 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from powermc.diagnostics import wilson
from powermc.errors import ArgumentError
from powermc.evaluation import metrics
from powermc.evaluation.comparison.reading import Costs, Given, Line, Record
from powermc.evaluation.metrics import Interval, Paired
from powermc.lm.ledger import Ledger


@dataclass(frozen=True)
class Figures:
    """One line of the tables. docs/evaluation.md defines every column.

    Attributes
    ----------
    questions, samples
        Answered questions; answers to each that the shares below are of.
    exact, interval
        Share of right answers with its 95% interval, and which interval that is: "wilson" or "bca".
    pass_at
        k to the probability that one of k samples is right.
    unfinished, no_answer
        Shares of answers that the horizon cut off, and in which no answer was found.
    tokens
        Tokens of an answer, on average.
    entropy, distinct, disagreement
        Of the answers to a question, on average over questions: see `metrics.Spread`.
    acceptance, changed
        Of kernel steps: share that accepted, and that changed the path.
    stage1
        Share of screened proposals that passed the first stage.
    stage2_per_token
        Completions to full depth per token of the answers.
    kl
        KL(p || surrogate) per token, nats.
    kept
        Share of guessed tokens that were kept.
    drawn
        Tokens drawn per token of the answers.
    flops_per_token, flops, tokens_run, sequential, parallel, seconds, grading
        FLOPs per token of the answers; then per answer: FLOPs, tokens run in units of the whole depth, decode passes,
        parallel passes, wall-clock seconds, seconds of grading.
    preparing_flops, preparing_seconds
        Of the preparation, once; None if it ran nothing.
    """

    spec: str
    questions: int
    samples: int
    exact: Interval
    interval: str
    pass_at: dict[int, Interval]
    unfinished: float | None
    no_answer: float
    tokens: float
    entropy: float | None
    distinct: float | None
    disagreement: float | None
    acceptance: float | None
    changed: float | None
    stage1: float | None
    stage2_per_token: float | None
    kl: float | None
    kept: float | None
    drawn: float | None
    flops_per_token: float | None
    flops: float | None
    tokens_run: float | None
    sequential: float | None
    parallel: float | None
    seconds: float
    grading: float
    preparing_flops: float | None
    preparing_seconds: float | None


def figures(line: Line, pass_at: Sequence[int] = ()) -> Figures | None:
    """The figures of a method; None if it has answered nothing yet."""
    rows = answered(line)
    if not rows:
        return None
    grades = graded(rows)
    every = [given for row in rows.values() for given in row]
    exact, interval = share(grades)
    values: dict[str, float | None] = {
        "unfinished": _part(line.costs.counts, "unfinished", len(line.answers)),
        **_spread(rows),
        **_moves(line),
        **_spent(line.costs, _length(line)),
        "preparing_flops": line.preparing.flops or None,
        "preparing_seconds": line.preparing_seconds if line.preparing.flops else None,
    }
    return Figures(
        spec=line.spec,
        questions=len(rows),
        samples=grades.shape[1],
        exact=exact,
        interval=interval,
        pass_at={k: found for k in pass_at if (found := _pass_at(grades, k, line.same)) is not None},
        no_answer=float(np.mean([given.answer is None for given in every])),
        tokens=float(np.mean([len(given.tokens) for given in every])),
        seconds=line.costs.seconds / line.costs.answers,
        grading=line.costs.grading / line.costs.answers,
        **values,
    )


def answered(line: Line) -> dict[int, list[Given]]:
    """Questions that have answers, each with as many of the first samples as all of them have."""
    by_question: dict[int, dict[int, Given]] = {}
    for (question, sample), given in line.answers.items():
        by_question.setdefault(question, {})[sample] = given
    lengths = [next(i for i in range(len(row) + 1) if i not in row) for row in by_question.values()]
    common = min((n for n in lengths if n), default=0)
    return {q: [row[s] for s in range(common)] for q, row in sorted(by_question.items()) if common and 0 in row}


def graded(rows: dict[int, list[Given]]) -> np.ndarray:
    """Right or wrong, shape (questions, samples)."""
    return np.array([[given.correct for given in row] for row in rows.values()])


def share(grades: np.ndarray) -> tuple[Interval, str]:
    """The share of right answers with a 95% interval over questions, and which: see `interval_of`."""
    return interval_of(metrics.exact_match(grades))


def interval_of(values: np.ndarray) -> tuple[Interval, str]:
    """The mean of one value per question with a 95% interval: Wilson's if all are 0 or 1, or alike, else BCa.

    Where all are alike the bootstrap sees no spread.
    """
    if np.isin(values, (0, 1)).all() or np.ptp(values) == 0:
        mean = float(values.mean())
        return Interval(mean, *wilson(mean, len(values))), "wilson"
    return metrics.bootstrap(values), "bca"


def _pass_at(grades: np.ndarray, k: int, same: bool) -> Interval | None:
    """None where there are too few samples. Samples that are all the same add nothing to the first."""
    n = grades.shape[1]
    return None if k > n and not same else interval_of(metrics.pass_at_k(grades, min(k, n)))[0]


def _spread(rows: dict[int, list[Given]]) -> dict[str, float | None]:
    if len(next(iter(rows.values()))) < 2:
        return dict.fromkeys(("entropy", "distinct", "disagreement"))
    found = [metrics.answer_spread([given.answer for given in row]) for row in rows.values()]
    return {
        name: float(np.mean([getattr(spread, name) for spread in found]))
        for name in ("entropy", "distinct", "disagreement")
    }


def _part(counts: Mapping[str, float], name: str, whole: float) -> float | None:
    return counts[name] / whole if name in counts and whole else None


def _moves(line: Line) -> dict[str, float | None]:
    counts, length = line.costs.counts, _length(line)
    return {
        "acceptance": _part(counts, "accepted", counts.get("steps", 0)),
        "changed": _part(counts, "changed", counts.get("steps", 0)),
        "stage1": _part(counts, "passed", counts.get("screened", 0)),
        "stage2_per_token": _part(counts, "completed", length),
        "kl": _part(counts, "kl", counts.get("kl_tokens", 0)),
        "kept": _part(counts, "draft_accepted", counts.get("draft_tokens", 0)),
        "drawn": _part(counts, "drawn", length),
    }


def _length(line: Line) -> int:
    """Tokens of all answers together."""
    return sum(len(given.tokens) for given in line.answers.values())


def _spent(costs: Costs, length: int) -> dict[str, float | None]:
    ledger, n = costs.ledger, costs.answers
    flops, run = ledger.flops or None, depth_tokens(ledger)
    return {
        "flops_per_token": flops / length if flops and length else None,
        "flops": flops / n if flops else None,
        "tokens_run": run / n if run else None,
        "sequential": ledger.ticks / n if run else None,
        "parallel": ledger.prefills / n if run else None,
    }


def depth_tokens(ledger: Ledger) -> float:
    """Tokens run through layers, a token through half of them counting half; heads are not in it."""
    depth = ledger.layers or max((last for _, last in ledger.spans), default=1)
    return sum(tokens * (last - first) / depth for (first, last), tokens in ledger.spans.items())


@dataclass(frozen=True)
class Comparison:
    """A method beside the reference, on the questions that both have answered."""

    spec: str
    reference: str
    questions: int
    paired: Paired


def comparisons(record: Record, reference: str | None) -> list[Comparison]:
    """Every other method beside the reference (None: the first), where they have two questions or more in common."""
    lines = {line.spec: answered(line) for line in record.lines}
    base = check_reference(record, reference)
    found = []
    for spec, rows in lines.items():
        common = [q for q in rows if q in lines[base]]
        if spec != base and len(common) > 1:
            one, other = ({q: lines[name][q] for q in common} for name in (spec, base))
            paired = metrics.compare(graded(one), graded(other))
            found.append(Comparison(spec, base, len(common), paired))
    return found


def check_reference(record: Record, reference: str | None) -> str:
    """The spec of the reference. Raises `ArgumentError`, which lists all, for one that is not there."""
    specs = [line.spec for line in record.lines]
    if reference is None and specs:
        return specs[0]
    if reference not in specs:
        raise ArgumentError(f"there is no method {reference!r} to compare with; there are {', '.join(specs) or 'none'}")
    return reference


def kinds(line: Line) -> Counter[str]:
    """How many answers there are of each kind."""
    return Counter(given.kind for given in line.answers.values())
