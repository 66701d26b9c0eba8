"""The tables as cells of text, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from powermc.evaluation.comparison.figures import Comparison, Figures, comparisons, figures
from powermc.evaluation.comparison.notes import notes
from powermc.evaluation.comparison.reading import Record
from powermc.evaluation.metrics import Interval
from powermc.series import si
from powermc.visible import visible


class Column(NamedTuple):
    """title: of the column. cell: what stands in it, empty for what a method does not have."""

    title: str
    cell: Callable[[Figures], str]


@dataclass(frozen=True)
class Table:
    """Cells of text, the first of a row its name. `sort`: numbers behind the cells, None where there is none."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _flops(value: float | None) -> str:
    return "" if value is None else si(value)


def _ends(interval: Interval) -> str:
    return f"{interval.low:.1%} to {interval.high:.1%}"


def _figure(name: str, write: Callable[[Any], str]) -> Callable[[Figures], str]:
    return lambda found: write(getattr(found, name))


ANSWERS = (
    Column("questions", lambda f: str(f.questions)),
    Column("samples", lambda f: str(f.samples)),
    Column("exact match", lambda f: _share(f.exact.estimate)),
    Column("95% interval", lambda f: _ends(f.exact)),
    Column("no answer", _figure("no_answer", _share)),
    Column("unfinished", _figure("unfinished", _share)),
    Column("tokens", _figure("tokens", _number)),
    Column("entropy, nats", _figure("entropy", _number)),
    Column("distinct", _figure("distinct", _number)),
    Column("disagreement", _figure("disagreement", _share)),
)
COSTS = (
    Column("FLOPs / token", _figure("flops_per_token", _flops)),
    Column("FLOPs / question", _figure("flops", _flops)),
    Column("tokens run / question", _figure("tokens_run", _number)),
    Column("tokens drawn / token", _figure("drawn", _number)),
    Column("sequential steps / question", _figure("sequential", _number)),
    Column("seconds / question", _figure("seconds", _number)),
    Column("grading, s / question", _figure("grading", _number)),
)
KERNELS = (
    Column("MH acceptance", _figure("acceptance", _share)),
    Column("changed the path", _figure("changed", _share)),
    Column("stage-1 pass", _figure("stage1", _share)),
    Column("stage-2 calls / token", _figure("stage2_per_token", _number)),
    Column("mid-final KL, nats", _figure("kl", _number)),
    Column("guesses kept", _figure("kept", _share)),
)
PAIRED = ("method", "questions", "difference", "95% interval", "only this", "only the reference", "McNemar p")


@dataclass(frozen=True)
class Tables:
    """Everything that is shown of a comparison."""

    title: str
    lead: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    figures: tuple[Figures, ...]
    pairs: tuple[Comparison, ...]


def tables(record: Record, *, pass_at: Sequence[int] = (), reference: str | None = None) -> Tables:
    """The tables of a comparison. Raises `ArgumentError` for a reference that is not one of its methods."""
    found = [f for line in record.lines if (f := figures(line, pass_at)) is not None]
    pairs = comparisons(record, reference) if found else []
    extra = tuple(Column(f"pass@{k}", _pass(k)) for k in pass_at)
    place = [column.title for column in ANSWERS].index("no answer")
    shown = [
        _table("Answers", (*ANSWERS[:place], *extra, *ANSWERS[place:]), found),
        _table("Cost", COSTS, found),
        _table("Kernels", KERNELS, found),
        _paired(pairs),
    ]
    return Tables(
        _title(record),
        _lead(record),
        tuple(table for table in shown if table is not None),
        tuple(visible(" ".join(note.split())) for note in notes(record)),
        tuple(found),
        tuple(pairs),
    )


def _pass(k: int) -> Callable[[Figures], str]:
    def cell(found: Figures) -> str:
        interval = found.pass_at.get(k)
        return "" if interval is None else f"{_share(interval.estimate)} ({_ends(interval)})"

    return cell


def _table(title: str, columns: Sequence[Column], found: Sequence[Figures]) -> Table | None:
    """A table without the columns that no method has anything in; None if that leaves nothing."""
    filled = [c for c in columns if any(c.cell(f) for f in found)]
    if not filled:
        return None
    rows = tuple((visible(f.spec), *(c.cell(f) for c in filled)) for f in found)
    return Table(title, ("method", *(c.title for c in filled)), rows)


def _paired(pairs: Sequence[Comparison]) -> Table | None:
    if not pairs:
        return None

    def cells(one: Comparison) -> tuple[str, ...]:
        p = one.paired
        spread = p.difference.low < p.difference.high  # else the bootstrap saw none, and says nothing
        ends = f"{p.difference.low:+.1%} to {p.difference.high:+.1%}" if spread else ""
        counts = ("" if n is None else str(n) for n in (p.only_a, p.only_b))
        test = "" if p.p is None else f"{p.p:.3g}"
        return (visible(one.spec), str(one.questions), f"{p.difference.estimate:+.1%}", ends, *counts, test)

    return Table(f"Beside {visible(pairs[0].reference)}", PAIRED, tuple(cells(one) for one in pairs))


def _title(record: Record) -> str:
    settings = record.header["settings"]
    return visible(f"{settings['task']} with {record.header['model']}")


def _lead(record: Record) -> str:
    header, settings = record.header, record.header["settings"]
    samples = header["samples"]
    parts = [
        f"{len(record.questions)} questions",
        *([f"{samples} samples each"] if samples > 1 else []),
        f"{settings['style']} prompts" + (f" with {settings['shots']} examples" if settings["shots"] else ""),
        f"at most {settings['max_new_tokens']} tokens",
        f"target p(x)^{settings['alpha']:g}",
        f"seed {settings['seed']}",
        *([str(header["dtype"])] if header.get("dtype") else []),
    ]
    return visible(", ".join(parts) + ".")


def markdown(shown: Tables) -> str:
    """The tables as Markdown; what a method does not have is empty."""
    parts = [f"# {_cell(shown.title)}", _cell(shown.lead)]
    for table in shown.tables:
        lines = [_line(table.head), "|" + " --- |" + " ---: |" * (len(table.head) - 1), *map(_line, table.rows)]
        parts += [f"## {_cell(table.title)}", "\n".join(lines)]
    if shown.notes:
        parts += ["## Notes", "\n".join(f"- {_cell(note)}" for note in shown.notes)]
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Text that no Markdown takes for anything else."""
    flat = " ".join(text.split())
    for sign in "\\`*_[]<>|#":
        flat = flat.replace(sign, f"\\{sign}")
    return flat
