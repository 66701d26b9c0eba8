"""Accuracy against cost, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from powermc import plots
from powermc.errors import ModelError
from powermc.evaluation.comparison.figures import Figures

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
    with plots._figure((7.5, 4.5)) as figure:
        axes = figure.add_subplot()
        for i, f in enumerate(sorted(found, key=lambda f: f.flops or 0)):
            assert f.flops is not None
            low, middle, high = f.exact.low, f.exact.estimate, f.exact.high
            # A bootstrap interval need not hold its estimate.
            ends = [[max(middle - low, 0)], [max(high - middle, 0)]]
            axes.errorbar(f.flops, middle, yerr=ends, fmt="o", color=plots.ACCENT, capsize=3, markersize=5)
            place = {"xytext": (6, 5 if i % 2 else -11), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f.spec.replace("$", r"\$"), (f.flops, middle), **place)
        axes.set_xscale("log")
        axes.set(xlabel="FLOPs per question", ylabel="exact match", title="Accuracy against cost")
        axes.margins(x=0.15)
        plots._percent(axes.yaxis)
    return figure


def picture(shown: Tables) -> bytes:
    """The same as PNG."""
    buffer = BytesIO()
    accuracy_by_cost(shown).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
