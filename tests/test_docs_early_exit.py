"""What docs/early-exit.md says in numbers, computed anew: its code, its wrong gates, its ratios, its arithmetic."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest

from powermc import DelayedAcceptance, Horizon, Length, Metropolis, Mixture, Power, SequenceProbability, Space, Suffix
from powermc.proposals import RandomWalk
from powermc.targets import Table
from powermc.testing import enumerate_kernel, paths_of, transition_matrix
from powermc.toy import TabularModel, exact_law
from tests.exactness.mutants_delayed import (
    CutRatioTwice,
    GateOfTheProposal,
    HastingsTwice,
    SecondStageAlone,
    WrittenOut,
)

PAGE = (Path(__file__).parents[1] / "docs" / "early-exit.md").read_text(encoding="utf-8")
ALPHA = 2.0


def stationary(matrix: np.ndarray) -> np.ndarray:
    """The law that a transition matrix leaves invariant, by solving for it."""
    n = len(matrix)
    system = np.vstack([matrix.T - np.eye(n), np.ones(n)])
    return np.linalg.lstsq(system, np.append(np.zeros(n), 1.0), rcond=None)[0]


# The two paths, and the code.


class UnsureOfB:
    def uncertain(self, value, auxiliary):
        return value, value == "B"
        yield


def test_the_code_prints_what_the_page_says():
    code, printed = re.search(r"```python\n(import math.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL).groups()  # type: ignore[union-attr]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "docs/early-exit.md", "exec"), {})
    assert out.getvalue() == printed


@pytest.mark.parametrize(
    ("kind", "gated", "there", "back", "share"),
    [
        (DelayedAcceptance, True, 1, 1, 1 / 2),
        (DelayedAcceptance, False, 1 / 4, 1 / 4, 1 / 2),
        (GateOfTheProposal, True, 1, 1 / 4, 1 / 5),
        (SecondStageAlone, True, 1, 1 / 4, 1 / 5),
    ],
)
def test_two_paths_and_four_gates(kind, gated, there, back, share):
    stages = [Table({"A": math.log(4), "B": 0.0}), Table({"A": 0.0, "B": 0.0})]
    other = RandomWalk({"A": "B", "B": "A"}.__getitem__)
    matrix = transition_matrix(kind(stages, other, UnsureOfB() if gated else None), "AB")
    assert matrix == pytest.approx(np.array([[1 - there, there], [back, 1 - back]]), abs=1e-15)
    assert stationary(matrix) == pytest.approx(np.array([share, 1 - share]), abs=1e-12)


# What enters once, on a table of paths with a surrogate that knows nothing of the target.


class NoHastings(WrittenOut):
    """Takes the q-ratio into neither stage."""

    def log_ratios(self, screen, change, move, gated):
        return [screen, change - screen]


@pytest.fixture(scope="module")
def tables():
    """(target model, surrogate model, space, its paths)"""
    space = Space(frozenset({2}), 3)
    models = (TabularModel.random(seed, vocab_size=3, order=2, concentration=0.7) for seed in (1, 11))
    return (*models, space, paths_of(space, 3))


def powers(tables):
    return [Power(SequenceProbability(model), ALPHA) for model in tables[1::-1]]


@pytest.mark.parametrize(
    ("kind", "cuts", "tilt"),
    [
        (DelayedAcceptance, Length(), lambda length, q: 1.0),
        (CutRatioTwice, Length(), lambda length, q: 1 / length),
        (HastingsTwice, Horizon(1), lambda length, q: 1 / q),
        (NoHastings, Horizon(1), lambda length, q: q),
    ],
)
def test_what_a_factor_in_the_wrong_stages_samples(tables, kind, cuts, tilt):
    _, surrogate, space, paths = tables
    found = enumerate_kernel(kind(powers(tables), Suffix(surrogate, space, cuts, 1 / ALPHA)), paths)
    sharp = surrogate.table**ALPHA / (surrogate.table**ALPHA).sum(1, keepdims=True)
    q = dict(zip(paths, exact_law(TabularModel(sharp, 2), space).power(1.0), strict=True))
    law = found.pi * [tilt(len(x), q[x]) for x in found.values]
    law /= law.sum()
    flow = law[:, None] * found.matrix
    assert np.abs(flow - flow.T).max() < 1e-12
    assert (np.abs(law - found.pi).max() > 0.01) == (kind is not DelayedAcceptance)


def test_stage_1_reads_log_z_and_stage_2_two_models(tables):
    """log a_1 is the difference of the sums of log Z~ and of the cuts, log a_1 + log a_2 is log r."""
    target, surrogate, space, paths = tables
    found = enumerate_kernel(DelayedAcceptance(powers(tables), Suffix(surrogate, space, Length(), 1 / ALPHA)), paths)
    sums = {}
    for path in paths:
        rows = [surrogate.tempered_row(surrogate.context(path.tokens[:t]), ALPHA)[1] for t in range(len(path))]
        sums[path] = np.array(rows)
    law, shadow = (exact_law(model, space) for model in (target, surrogate))
    log_p = dict(zip(law.paths(space), law.log_p, strict=True))
    log_s = dict(zip(shadow.paths(space), shadow.log_p, strict=True))
    seen = 0
    for x, leaves in zip(found.values, found.leaves, strict=True):
        for (state, info), _ in leaves:
            if not info["accepted"]:
                continue
            y, m = state.value, info["cut"]
            log_a1 = sums[y][m:].sum() - sums[x][m:].sum() + math.log(len(x)) - math.log(len(y))
            log_a2 = ALPHA * (log_p[y] - log_s[y] - log_p[x] + log_s[x])
            assert info.get("same", False) == (x == y)
            if x == y:  # accepted as it is, for both ratios are 1
                assert log_a1 == log_a2 == 0
                continue
            assert info["log_target"] - info["log_surrogate"] == pytest.approx(log_a2, abs=1e-12)
            screened = info["log_surrogate"] + log_hastings(surrogate, x, y, m)
            assert screened == pytest.approx(log_a1, abs=1e-12)
            seen += 1
    assert seen > 20


def log_hastings(model, x, y, m):
    """log q(x | y) - log q(y | x) at temperature 1 / ALPHA, the law of the cut included."""

    def log_q(path):
        rows = (model.tempered_row(model.context(path.tokens[:t]), ALPHA)[0][path.tokens[t]] for t in range(len(path)))
        return sum(list(rows)[m:])

    return log_q(x) - log_q(y) + math.log(len(x)) - math.log(len(y))


# Per step.


@pytest.mark.parametrize("kind", [DelayedAcceptance, Metropolis])
def test_how_often_a_path_can_be_left_at_most(tables, kind):
    """The bound of the page, with and without stages: by what the generator thinks of the path's tails."""
    _, surrogate, space, paths = tables
    q = Suffix(surrogate, space, Length(), 1 / ALPHA)
    stages = powers(tables)
    found = enumerate_kernel(kind(stages if kind is DelayedAcceptance else stages[-1], q), paths)
    tight = 0
    for i, x in enumerate(found.values):
        bound = 0.0
        for m in range(len(x)):
            mass = sum(p for y, p in zip(found.values, found.pi, strict=True) if y.tokens[:m] == x.tokens[:m])
            rows = [surrogate.tempered_row(surrogate.context(x.tokens[:t]), ALPHA)[0] for t in range(m, len(x))]
            bound += math.exp(sum(row[token] for row, token in zip(rows, x.tokens[m:], strict=True))) * mass
        bound /= found.pi[i]
        assert 1 - found.matrix[i, i] <= bound + 1e-12
        tight += bound < 0.5
    assert tight, "no path here is one that the surrogate holds fast"


def test_stages_leave_a_path_no_more_often_than_the_plain_rule(tables):
    """Peskun's order, and what a plain share does to the gap where the surrogate is wrong."""
    target, surrogate, space, paths = tables
    q, own = (Suffix(model, space, Length(), 1 / ALPHA) for model in (surrogate, target))
    stages = powers(tables)
    delayed, plain = DelayedAcceptance(stages, q), Metropolis(stages[-1], q)
    off = ~np.eye(len(paths), dtype=bool)
    a, b = (transition_matrix(kernel, paths) for kernel in (delayed, plain))
    assert (a[off] <= b[off] + 1e-15).all()
    assert (a[off] < b[off] - 1e-3).any()

    def gap(*kernels):
        return 1 - np.sort(np.linalg.eigvals(transition_matrix(Mixture(kernels, [0.9, 0.1]), paths)).real)[-2]

    assert gap(delayed, Metropolis(stages[-1], own)) > 10 * gap(delayed, plain)


# Arithmetic.


def test_the_share_of_costs_by_layer():
    """The table of C_mid, C_tail and break-even pass rates, from the shape of SmolLM2-135M without its weights."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    from powermc.lm.cost import cost_of

    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    cost = cost_of(model.model.layers, config, 64, 64, model.lm_head)
    full, head = cost.span(0, 30, 0) + cost.head, cost.head + cost.affine()
    assert round(cost.head / full, 2) == 0.21
    rows = re.findall(r"^\| (\d+) \| (\.\d+) \| (\.\d+) \| (\.\d+) \|$", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [15, 20, 22, 24, 26]
    for layer, *shares in rows:
        mid, tail = cost.span(0, int(layer), 0) + head, cost.span(int(layer), 30, 0) + cost.head
        assert [float(share) for share in shares] == [round(v, 3) for v in (mid / full, tail / full, 1 - head / tail)]
