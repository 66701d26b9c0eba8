"""Pictures: what is in them, what they refuse, and that none stays open."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from powermc import ArgumentError, ModelError, plots, power_sample, series
from powermc.lm.ledger import Ledger
from tests.fake_lm import FakeLM
from tests.runs import made_up

SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 12, "chains": 4, "alpha": 2.0}


@pytest.fixture(scope="module")
def run():
    return made_up(prompts=2, chains=4, steps=80, blocks=2)


def axes_of(figure):
    return figure.axes[0]


def test_all_that_there_is_of_a_run(run, tmp_path):
    figures = plots.all(run, 1)
    assert set(figures) == set(plots.OF_A_RUN)
    for name, figure in figures.items():
        plots.save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("name", plots.OF_A_RUN)
def test_every_picture_says_what_it_shows_and_in_what_unit(run, name):
    figure = plots.OF_A_RUN[name](run)
    words = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert any(word[:1].isupper() for word in words), "a title"
    units = {"trace": "nats", "rank": "nats", "log-p-by-cost": "nats", "cost-breakdown": "FLOPs"}
    assert any(units.get(name, "") in word for word in words)


def test_trace_and_rank_through_arviz(run):
    trace = plots.trace(run)
    names = [axes.get_title(loc="left") or axes.get_xlabel() for axes in trace.axes[::2]]  # ArviZ 0.x, 1.x
    assert names == ["log p (nats)", "length (tokens)"]
    drawn = [line.get_ydata() for line in trace.axes[1].lines]
    assert all(np.array_equal(y, [p.log_prob for p in c.draws]) for y, c in zip(drawn, run.chains[0], strict=True))
    assert len(plots.rank(run).axes) == 2


def test_acceptance_by_cut_has_the_counts(run):
    figure = plots.acceptance_by_cut(run, 0, bins=4)
    info = run.infos[0]
    here = (info["block"] == 1) & ~info["null"] & (info["cut"] < 16)
    heights = [bar.get_height() for bar in axes_of(figure).containers[0]]
    assert heights[0] == pytest.approx(info["accepted"][here].mean())


def test_the_funnel_narrows(run):
    names, counts = zip(*series.stages(run), strict=True)
    assert names == ("proposed", "passed stage 1", "accepted", "changed the path")
    assert (np.diff(counts, axis=0) <= 0).all()
    drawn = [[bar.get_height() for bar in bars] for bars in axes_of(plots.stage_funnel(run)).containers]
    assert drawn == [list(row) for row in counts]


def test_plain_metropolis_has_no_stage_to_pass():
    plain = power_sample(FakeLM(), "q", **SMALL)
    assert [name for name, _ in series.stages(plain)] == ["proposed", "accepted", "changed the path"]
    assert len(axes_of(plots.stage_funnel(plain)).containers) == 3


def test_log_p_by_cost_accumulates(run):
    lines = axes_of(plots.log_p_by_cost(run, 1)).lines
    for chain, line in enumerate(lines):
        assert np.array_equal(line.get_xdata(), np.cumsum(run.infos[1]["tokens"][chain]))
        assert np.array_equal(line.get_ydata(), run.infos[1]["log_p"][chain])


def test_costs_are_those_of_the_ledger(run):
    shares, unit = series.costs(run.cost)
    assert unit == "FLOPs"
    assert sum(share.amount for share in shares) == run.cost.flops
    assert [share.amount for share in shares] == sorted((share.amount for share in shares), reverse=True)
    without = Ledger(layers=2)
    without.spans.update({(0, 2): 7})
    assert series.costs(without) == ([series.Share("layers 0\u20132", 7.0, False)], "tokens")


def test_ranks_are_flat_for_one_law_and_shared_by_equal_values():
    values = np.random.default_rng(0).normal(size=(4, 1000))
    counts = series.ranks(values, 20)
    assert counts.shape == (4, 20)
    assert (counts.sum(1) == 1000).all()
    assert (counts.sum(0) == 200).all()
    assert series.ranks(np.ones((2, 10)), 5).tolist() == [[0, 0, 10, 0, 0]] * 2


def test_kl_by_layer():
    rows = [SimpleNamespace(layer=layer, kl=3.0 / layer, overlap=layer / 10) for layer in (2, 5, 8)]
    lens = SimpleNamespace(report=tuple(rows), origin=SimpleNamespace(model="m", alpha=4.0))
    left, right = plots.kl_by_layer(lens).axes
    assert left.lines[0].get_xdata().tolist() == [2, 5, 8]
    assert left.lines[0].get_ydata().tolist() == [1.5, 0.6, 0.375]
    assert right.lines[0].get_ydata().tolist() == [0.2, 0.5, 0.8]
    assert left.get_ylabel() == "nats per token"
    with pytest.raises(ArgumentError, match="the lens has no report"):
        plots.kl_by_layer(SimpleNamespace(report=()))


def test_nothing_to_draw_says_what_is_missing(run):
    nothing = power_sample(FakeLM(), "q", **{**SMALL, "steps": 0})
    for function, message in [
        (plots.trace, "prompt 0 has 0 draws per chain: at least 2"),
        (plots.rank, "prompt 0 has 0 draws per chain: at least 2"),
        (plots.acceptance_by_cut, "no step of the last block proposed anything"),
        (plots.stage_funnel, "no step proposed anything"),
        (plots.log_p_by_cost, "no chain of prompt 0 took a step"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            function(nothing)
    assert set(plots.all(nothing)) == {"cost-breakdown"}
    with pytest.raises(ArgumentError, match="the model counted no cost"):
        plots.cost_breakdown(replace(run, cost=Ledger()))
    with pytest.raises(ArgumentError, match="ranks compare chains, and prompt 0 has draws of 1"):
        plots.rank(made_up(chains=1))
    with pytest.raises(ArgumentError, match="there is no prompt 2; the run has prompts 0 to 1"):
        plots.all(run, 2)


def test_chains_that_never_move_have_no_density():
    run = made_up(chains=2, steps=10, blocks=1)
    chains = tuple(replace(c, draws=(run.chains[0][0].draws[0],) * 10) for c in run.chains[0])
    with pytest.raises(ArgumentError, match="every draw of prompt 0 has the same log p and length"):
        plots.trace(replace(run, chains=(chains,)))


def test_a_prompt_with_dollars_is_no_mathematics(run, tmp_path):
    costly = replace(run, prompts=(replace(run.prompts[0], text="It costs $4, or $\\frac{, \x1b[31m"), run.prompts[1]))
    figure = plots.log_p_by_cost(costly)
    plots.save(figure, tmp_path / "a.svg")
    assert "frac" in axes_of(figure).get_title(loc="left")


def test_saving(run, tmp_path):
    figure = plots.cost_breakdown(run)
    with pytest.raises(ArgumentError, match=r"cannot write the plot .*no/such\.png"):
        plots.save(figure, tmp_path / "no/such.png")
    with pytest.raises(ArgumentError, match=r"cannot write the plot .*a\.docx: Format 'docx' is not supported"):
        plots.save(figure, tmp_path / "a.docx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("package", "function"), [("matplotlib", plots.cost_breakdown), ("arviz", plots.trace)])
def test_without_the_packages(run, monkeypatch, package, function):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"plots need the package {package}: pip install 'powermc\[plots\]'"):
        function(run)
