"""Accuracy against cost, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from powermc import plots
from powermc.errors import ModelError
from powermc.evaluation.comparison.figures import Figures
from powermc.series import si

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from powermc.evaluation.comparison.table import Tables


def points(found: Sequence[Figures]) -> list[Figures]:
    """The methods whose cost is known."""
    return [f for f in found if f.flops]


def accuracy_by_cost(shown: Tables) -> Figure:
    """Exact match with its 95% interval over FLOPs per question, on a logarithmic axis.

    Raises `ModelError` without matplotlib, and where no cost is known.
    """
    found = points(shown.figures)
    if not found:
        raise ModelError("no method has a known cost in FLOPs: there is nothing to draw")
    found = sorted(found, key=lambda f: f.flops or 0)
    with plots._figure((7.5, 5)) as figure:
        axes = figure.add_subplot()
        for i, (f, colour) in enumerate(zip(found, plots._shades(len(found)), strict=True), 1):
            assert f.flops is not None
            low, middle, high = f.exact.low, f.exact.estimate, f.exact.high
            # A bootstrap interval need not hold its estimate.
            ends = [[max(middle - low, 0)], [max(high - middle, 0)]]
            name = f"{i} {f.spec}".replace("$", r"\$")  # matplotlib would take $ for mathematics
            axes.errorbar(f.flops, middle, yerr=ends, fmt="o", color=colour, capsize=3, markersize=5, label=name)
            axes.annotate(str(i), (f.flops, middle), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.set(xlabel="FLOPs per question", ylabel="exact match", title="Accuracy against cost")
        axes.margins(x=0.1)
        first, last = axes.get_xlim()
        axes.xaxis.set_major_formatter(_flops)
        axes.xaxis.set_minor_formatter(_flops if last / first < 5 else "")
        plots._percent(axes.yaxis)
        plots._legend(axes, 3)
    return figure


def _flops(value: float, _: object) -> str:
    return si(value).strip()


def picture(shown: Tables) -> bytes:
    """The same as PNG."""
    buffer = BytesIO()
    accuracy_by_cost(shown).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
