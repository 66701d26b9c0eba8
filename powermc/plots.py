"""Pictures of runs and lenses, by matplotlib: one function each, which returns the figure and shows or writes nothing.

Trace and ranks are ArviZ's. Figures are made without pyplot, so that none stays open and no screen is needed; `save`
writes one, `all` makes every one of a run. A picture with nothing in it is an `ArgumentError` that says what is
missing; without matplotlib there is a `ModelError`.

ArviZ 0.x draws on a figure of ours; from version 1 on (looked at with 1.3) it makes its own, with its own colours.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc import series
from powermc.diagnostics import Kept, kept_draws, moves_by_cut, wilson
from powermc.errors import ArgumentError, ModelError
from powermc.files import write_whole
from powermc.results import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from powermc.lm.lens import Lens
    from powermc.results import Run

ACCENT, PALE, GREY, INK = "#0b6b74", "#a4c8cb", "#8a949b", "#1b2024"

_STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.labelsize": 9.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6e8",
    "grid.linewidth": 0.8,
    "xtick.color": "#5a656d",
    "ytick.color": "#5a656d",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.2,
}


def trace(run: Run, prompt: int = 0) -> Figure:
    """Densities and traces of log p and length over the draws of a prompt, a line per chain; by ArviZ."""
    kept = _kept(run, prompt)
    with _figure((9, 5)) as figure:
        figure = _by_arviz("trace", _scalars(kept), figure)
        figure.suptitle(f"Draws of {_named(run, prompt)}", x=0.01, ha="left", fontweight="bold", fontsize=10.5)
    return figure


def rank(run: Run, prompt: int = 0) -> Figure:
    """Ranks of each chain's draws among those of all: flat bars where chains agree; by ArviZ."""
    kept = _kept(run, prompt)
    if len(kept.chains) < 2:
        raise ArgumentError(f"ranks compare chains, and prompt {prompt} has draws of 1; run more chains")
    with _figure((9, 1.6 + 0.45 * len(kept.chains))) as figure:
        figure = _by_arviz("rank", _scalars(kept), figure)
        figure.suptitle(f"Ranks of {_named(run, prompt)}", x=0.01, ha="left", fontweight="bold", fontsize=10.5)
    return figure


def acceptance_by_cut(run: Run, prompt: int | None = None, *, bins: int = 16) -> Figure:
    """Share of proposals accepted, and of those that changed the path, by where they cut; all prompts for None.

    Steps on the last block. Lines are 95% Wilson intervals of the share that changed the path, as if steps were
    independent.
    """
    found = [cut for cut in moves_by_cut(run, _checked(run, prompt), bins=bins) if cut.proposed]
    if not found:
        raise ArgumentError("no step of the last block proposed anything: there is no acceptance to draw")
    with _figure((7, 4)) as figure:
        axes = figure.add_subplot()
        centres = np.array([(cut.first + cut.last) / 2 + 0.5 for cut in found])
        widths = np.array([(cut.last - cut.first) * 0.86 for cut in found])
        accepted, changed = (
            np.array([getattr(cut, n) / cut.proposed for cut in found]) for n in ("accepted", "changed")
        )
        axes.bar(centres, accepted, widths, color=PALE, label="accepted")
        axes.bar(centres, changed, widths, color=ACCENT, label="changed the path")
        ends = np.array([wilson(share, cut.proposed) for share, cut in zip(changed, found, strict=True)])
        axes.vlines(centres, ends[:, 0], ends[:, 1], color=INK, linewidth=1)
        axes.set(xlabel="cut before token", ylabel="share of proposals", title="Acceptance by cut")
        axes.set_xlim(0.5, run.settings["max_new_tokens"] + 0.5)
        _percent(axes.yaxis)
        axes.grid(axis="x", visible=False)
        _legend(axes, 2)
    return figure


def stage_funnel(run: Run, prompt: int | None = None) -> Figure:
    """How many steps came how far, by block: proposed, passed stage 1 (if there is one), accepted, changed the path."""
    named = series.stages(run, _checked(run, prompt))
    if not sum(named[0][1]):
        raise ArgumentError("no step proposed anything: there is no funnel to draw")
    blocks = np.arange(len(named[0][1]))
    shades = _shades(len(named))
    with _figure((7, 4)) as figure:
        axes = figure.add_subplot()
        width = 0.84 / len(named)
        for i, ((name, counts), shade) in enumerate(zip(named, shades, strict=True)):
            axes.bar(blocks + (i - (len(named) - 1) / 2) * width, counts, width * 0.94, color=shade, label=name)
        axes.set(xlabel="block", ylabel="steps", title="From proposal to change")
        axes.set_xticks(blocks, [str(b + 1) for b in blocks])
        axes.grid(axis="x", visible=False)
        _legend(axes, len(named))
    return figure


def log_p_by_cost(run: Run, prompt: int = 0) -> Figure:
    """log p of the path after every step, over the tokens that the chain's steps have had evaluated so far."""
    _checked(run, prompt)
    log_p, spent = series.trace(run, prompt), series.spent(run, prompt)
    if not np.isfinite(log_p).any():
        raise ArgumentError(f"no chain of prompt {prompt} took a step: there is no log p to draw")
    with _figure((7, 4)) as figure:
        axes = figure.add_subplot()
        for chain, colour in enumerate(_shades(len(log_p))):
            axes.plot(spent[chain], log_p[chain], color=colour, label=f"chain {chain}")
        axes.set(xlabel="tokens evaluated for the chain's steps so far", ylabel="log p of the path (nats)")
        axes.set_title(f"What tokens buy: {_named(run, prompt)}")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if len(log_p) <= 8:
            _legend(axes, 4)
    return figure


def cost_breakdown(run: Run) -> Figure:
    """FLOPs by range of layers and by head, all prompts and chains together; tokens where FLOPs are not counted."""
    shares, unit = series.costs(run.cost)
    if not shares:
        raise ArgumentError("the model counted no cost: there is nothing to break down")
    total = sum(share.amount for share in shares)
    with _figure((7, 1.4 + 0.36 * len(shares))) as figure:
        axes = figure.add_subplot()
        rows = np.arange(len(shares))
        bars = axes.barh(rows, [s.amount for s in shares], 0.62, color=[PALE if s.head else ACCENT for s in shares])
        axes.bar_label(bars, [f"{s.amount / total:.0%}" for s in shares], padding=4, color=INK)
        axes.set_yticks(rows, [s.name for s in shares])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(xlabel=unit, title=f"Where {series.si(total)}{unit} went")
        axes.xaxis.set_major_formatter(lambda x, _: series.si(x).strip())
        axes.grid(axis="y", visible=False)
    return figure


def kl_by_layer(lens: Lens) -> Figure:
    """KL(p || p~) and 1 - TV of every exit of a lens, on held-out text."""
    layers = [row.layer for row in lens.report]
    if not layers:
        raise ArgumentError("the lens has no report: there is no KL to draw")
    with _figure((7, 4)) as figure:
        left = figure.add_subplot()
        right = left.twinx()
        (kl,) = left.plot(layers, [row.kl for row in lens.report], "o-", color=ACCENT, label="KL(p || p~), left")
        name = f"1 - TV at temperature {1 / lens.origin.alpha:g}, right"
        (overlap,) = right.plot(layers, [row.overlap for row in lens.report], "s--", color=GREY, label=name)
        left.set(xlabel="exit layer", ylabel="nats per token", ylim=(0, None), title=f"Exits of {lens.origin.model}")
        right.set(ylabel="share of draws in common", ylim=(0, 1))
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
        left.set_xticks(layers)
        _legend(left, 2, [kl, overlap])
    return figure


OF_A_RUN: dict[str, Callable[..., Figure]] = {
    "trace": trace,
    "rank": rank,
    "acceptance-by-cut": acceptance_by_cut,
    "stage-funnel": stage_funnel,
    "log-p-by-cost": log_p_by_cost,
    "cost-breakdown": cost_breakdown,
}
"""Every picture of a run by name."""


def all(run: Run, prompt: int = 0) -> dict[str, Figure]:
    """Every picture of a run that there is something to draw for, by name; cost is that of all prompts."""
    figures: dict[str, Figure] = {}
    for name, function in OF_A_RUN.items():
        try:
            figures[name] = function(run) if function is cost_breakdown else function(run, prompt)
        except ArgumentError:
            if not 0 <= prompt < len(run.prompts):
                raise
    return figures


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure: whole or not at all, in the format that the name ends with. `ArgumentError` if that fails."""
    from io import BytesIO

    name = os.fspath(path)
    form = os.path.splitext(name)[1].removeprefix(".") or "png"
    buffer = BytesIO()
    try:
        figure.savefig(buffer, format=form, dpi=150)
        write_whole(path, buffer.getvalue())
    except (OSError, ValueError) as error:  # a full disk; a suffix that names no format
        raise ArgumentError(f"cannot write the plot {name}: {error}") from error


def matplotlib() -> Any:
    """The module. Raises `ModelError` if it is not installed."""
    return _needed("matplotlib")


def _needed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ModelError(f"plots need the package {name}: pip install 'powermc[plots]'") from error


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[Figure]:
    """An empty figure, and the style it is drawn in."""
    with matplotlib().rc_context(_STYLE):
        yield _needed("matplotlib.figure").Figure(figsize=size, layout="constrained")


def _by_arviz(kind: str, values: dict[str, np.ndarray], figure: Figure) -> Figure:
    """ArviZ's plot of values of shape (chain, draw): on this figure, or from version 1 on, on one of its own."""
    az, xr = _needed("arviz"), _needed("xarray")
    chains, draws = next(iter(values.values())).shape
    coords = {"chain": np.arange(chains), "draw": np.arange(draws)}
    data = xr.Dataset({name: (("chain", "draw"), v) for name, v in values.items()}, coords)
    if int(az.__version__.partition(".")[0]) >= 1:
        plot = az.plot_trace_dist if kind == "trace" else az.plot_rank
        own = plot(xr.DataTree.from_dict({"posterior": data}), backend="matplotlib").viz["figure"].item()
        own.set_size_inches(figure.get_size_inches())
        own.set_layout_engine("constrained")
        _needed("matplotlib.pyplot").close(own)  # which would keep it for ever
        return own
    colours = _shades(len(data.chain))
    with warnings.catch_warnings():  # ArviZ 0.23 calls matplotlib 3.11 in ways that it will not have for ever
        warnings.simplefilter("ignore", matplotlib().MatplotlibDeprecationWarning)
        if kind == "rank":
            axes = figure.subplots(1, len(values), squeeze=False)[0]
            az.plot_rank(data, ax=axes, colors=colours)
            for one in axes:
                one.grid(visible=False)
        else:
            axes = figure.subplots(len(values), 2, squeeze=False, width_ratios=(1, 2))
            az.plot_trace(
                az.convert_to_inference_data(data),
                axes=axes,
                chain_prop={"color": colours},
                trace_kwargs={"alpha": 0.9},
            )
            for row in axes:
                row[1].set_xlabel("draw")
    return figure


def _kept(run: Run, prompt: int) -> Kept:
    _checked(run, prompt)
    kept = kept_draws(run, prompt)
    if kept.draws < 2:
        raise ArgumentError(f"prompt {prompt} has {kept.draws} draws per chain: at least 2 are needed to draw them")
    return kept


def _scalars(kept: Kept) -> dict[str, np.ndarray]:
    """log p and length, without one that never varies: a density of it cannot be drawn."""
    values = {
        "log p (nats)": kept.values(lambda path: path.log_prob, "log_p"),
        "length (tokens)": kept.values(len, "length"),
    }
    varied = {name: v for name, v in values.items() if np.ptp(v) > 0}
    if not varied:
        raise ArgumentError(
            f"every draw of prompt {kept.prompt} has the same log p and length: there is nothing to see"
        )
    return varied


def _checked(run: Run, prompt: int | None) -> int | None:
    if prompt is not None and not 0 <= prompt < len(run.prompts):
        raise ArgumentError(f"there is no prompt {prompt}; the run has prompts 0 to {len(run.prompts) - 1}")
    return prompt


def _named(run: Run, prompt: int) -> str:
    text = shorten(run.prompts[prompt].text, 48)
    return f"prompt {prompt}: {text}".replace("$", r"\$")  # matplotlib would take $ for mathematics


def _shades(n: int) -> list[str]:
    """n colours from pale to the accent."""
    colours = _needed("matplotlib.colors")
    ramp = colours.LinearSegmentedColormap.from_list("accent", ["#cfe0e2", "#5aa3a9", ACCENT, "#06373c"])
    return [colours.to_hex(ramp(x)) for x in np.linspace(0.05, 1, n)]


def _percent(axis: Any) -> None:
    axis.set_major_formatter(_needed("matplotlib.ticker").PercentFormatter(1, decimals=0))


def _legend(axes: Axes, columns: int, handles: Sequence[Any] | None = None) -> None:
    """A legend below the axes, where it hides nothing."""
    more = {} if handles is None else {"handles": handles}
    axes.figure.legend(loc="outside lower left", ncols=columns, **more)  # type: ignore[union-attr]
