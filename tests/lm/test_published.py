"""The published algorithm: its rule by hand, its stated faults by enumeration, and its calls of `generate`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from powermc.errors import ArgumentError
from powermc.evaluation.published import Generate, Published, Tail, log_ratio
from powermc.kernels import Metropolis
from powermc.lm import CausalLM
from powermc.scheduling import run
from powermc.sequences import Length, SequenceProbability, Space, Suffix, scored
from powermc.sequences.path import Tokens
from powermc.targets import Power
from powermc.testing import transition_matrix
from tests.lm.families import EOS, tiny_model
from tests.lm.toys import PROMPT, toy_lm

CLOSE = 2e-5
"""`generate` hands out float32 logits."""


def tail(tokens: Sequence[int], log_q: Sequence[float], log_target: Sequence[float]) -> Tail:
    return Tail(tuple(tokens), np.array(log_q), np.array(log_target))


def test_the_ratio_by_hand() -> None:
    current = tail([5, 6, 7], [-0.1, -0.2, -0.4], [-1.0, -2.0, -4.0])
    same_length = tail([8, 9], [-0.5, -0.25], [-3.0, -5.0])
    assert log_ratio(current, 1, same_length) == pytest.approx(-3 - 5 + 2 + 4 - 0.2 - 0.4 + 0.5 + 0.25)
    # A shorter one: the current tail is read as far as that goes, and no cut probability enters.
    assert log_ratio(current, 1, tail([8], [-0.5], [-3.0])) == pytest.approx(-3 + 2 - 0.2 + 0.5)
    assert log_ratio(current, 0, tail([8], [-0.5], [-3.0])) == pytest.approx(-3 + 1 - 0.1 + 0.5)


# `generate` as the source of tails.


def recomputed(lm: CausalLM, prefix: Tokens, tokens: Tokens, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """log q at temperature 1/alpha and alpha log p of each token, by a plain forward."""
    with torch.no_grad():
        logits = lm.decoder.model(input_ids=torch.tensor([[*prefix, *tokens]])).logits[0].double()  # type: ignore[operator]
    at = logits[len(prefix) - 1 : -1]
    rows, ids = range(len(tokens)), list(tokens)
    return (alpha * at).log_softmax(-1)[rows, ids].numpy(), alpha * at.log_softmax(-1)[rows, ids].numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_tails_one_by_one_and_side_by_side_have_the_densities_of_the_model(family: str) -> None:
    """Left padding changes nothing: the same tail has the same log ratio however it was drawn."""
    model = tiny_model(family)
    model.generation_config.update(top_k=2, temperature=0.5, repetition_penalty=3.0, eos_token_id=[1])
    config = model.generation_config
    lm, alpha = CausalLM(model), 1.5
    draw = Generate(lm.decoder.model, frozenset(EOS), alpha)
    prefixes = [(1, 2, 7, 9, 11), (4,), (6, 6, 6)]
    most = [4, 9, 6]
    drawn = list(zip(prefixes, draw(prefixes, most, 0), strict=True))
    steps = max(len(t) for _, t in drawn)
    assert all(t.ran >= len(prefix) + steps - 1 for prefix, t in drawn)
    for prefix, n in zip(prefixes, most, strict=True):
        (alone,) = draw([prefix], [n], 3)
        assert alone.ran == len(prefix) + len(alone) - 1
        drawn.append((prefix, alone))
    for (prefix, found), n in zip(drawn, most * 2, strict=True):
        log_q, log_target = recomputed(lm, prefix, found.tokens, alpha)
        assert found.log_q == pytest.approx(log_q, abs=CLOSE)
        assert found.log_target == pytest.approx(log_target, abs=CLOSE)
        assert len(found) == n or (len(found) < n and found.tokens[-1] in EOS)
        assert not set(EOS) & set(found.tokens[:-1])
    assert model.generation_config is config
    assert len({len(t) for _, t in drawn}) > 1


def test_draws_are_seeded_and_touch_no_global_state() -> None:
    draw = Generate(tiny_model("llama"), frozenset(), 1.0)
    before = torch.random.get_rng_state()
    first, again, other = (draw([(1, 2)], [12], seed)[0].tokens for seed in (7, 7, 8))
    assert first == again != other
    assert len(other) == 12
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_of_one_over_alpha_must_exist(alpha: float) -> None:
    with pytest.raises(ArgumentError, match="alpha must be a finite number > 0"):
        Generate(tiny_model("llama"), frozenset(), alpha)


# The schedule, with tails that are given.


@dataclass
class Scripted:
    """Answers with tails of full length, or ended at `ends`; notes what it was asked."""

    ends: dict[int, int] = field(default_factory=dict)
    calls: list[tuple[list[Tokens], list[int]]] = field(default_factory=list)

    def __call__(self, prefixes: Sequence[Tokens], most: Sequence[int], seed: int) -> list[Tail]:
        self.calls.append((list(prefixes), list(most)))
        token, n = 10 + len(self.calls), [min(m, self.ends.get(len(self.calls), m)) for m in most]
        ids = [(*[token] * (k - 1), 3 if k < m else token) for k, m in zip(n, most, strict=True)]
        return [Tail(x, np.zeros(len(x)), np.zeros(len(x)), len(p)) for p, x in zip(prefixes, ids, strict=True)]


def test_every_step_runs_the_prefix_again_and_draws_to_the_current_length() -> None:
    draw = Scripted()
    trace = Published(draw, frozenset({3}), horizon=7, block_size=3, steps=2).run(
        (1, 2), chains=1, seed=4, batched=False
    )
    assert [most for _, most in draw.calls[::3]] == [[3], [3], [1]]
    assert [len(prefixes[0]) for prefixes, _ in draw.calls[::3]] == [2, 5, 8]
    steps = [call for i, call in enumerate(draw.calls) if i % 3]
    lengths = [3, 3, 6, 6, 7, 7]
    for (prefixes, most), cut, length, drawn in zip(steps, trace.cut, lengths, trace.proposal_length, strict=True):
        assert prefixes[0][:2] == (1, 2)
        assert len(prefixes[0]) == 2 + cut
        assert most == [length - cut] == [drawn]
    assert trace.accepted == [True] * 6  # log r = 0
    assert trace.changed == [True] * 6
    assert trace.tokens == [2 + cut for cut in trace.cut]
    assert trace.growth_tokens == 2 + 5 + 8
    (path,) = trace.paths
    assert len(path) == len(path.log_q) == len(path.log_target) == 7
    last = trace.cut[-1]
    assert path.tokens[last:] == (10 + len(draw.calls),) * (7 - last)


def test_an_accepted_end_shortens_the_path_for_good() -> None:
    """Later proposals of the block are as short, also where they lose the end token; then a block is appended."""
    draw = Scripted(ends={2: 1})
    sampler = Published(draw, frozenset({3}), horizon=20, block_size=10, steps=3)
    trace = sampler.run((1,), chains=1, seed=0, batched=False)
    short = trace.cut[0] + 1
    assert short < 10
    for (prefixes, most), cut in zip(draw.calls[2:4], trace.cut[1:3], strict=True):
        assert most == [short - cut]
        assert len(prefixes[0]) == 1 + cut
    assert draw.calls[4][1] == [10]
    assert len(draw.calls) == 8
    assert len(trace.paths[0]) == short + 10


def test_a_chain_is_over_after_the_block_in_which_it_has_ended() -> None:
    draw = Scripted(ends={4: 1})
    trace = Published(draw, frozenset({3}), horizon=30, block_size=10, steps=3).run(
        (1,), chains=1, seed=0, batched=False
    )
    assert len(draw.calls) == 4
    assert trace.paths[0].tokens[-1] == 3
    assert len(trace.paths[0]) == trace.cut[-1] + 1 < 10


def test_rejected_tails_leave_the_path() -> None:
    def draw(prefixes: Sequence[Tokens], most: Sequence[int], seed: int) -> list[Tail]:
        calls.append(len(prefixes))
        worse = -1e6 * (len(calls) > 1)
        return [Tail((len(calls),) * n, np.zeros(n), np.full(n, worse), 1) for n in most]

    calls: list[int] = []
    trace = Published(draw, frozenset(), horizon=4, block_size=4, steps=5).run((1,), chains=1, seed=0, batched=False)
    assert trace.accepted == trace.changed == [False] * 5
    assert trace.paths[0].tokens == (1,) * 4


def test_batched_one_call_per_round_of_the_chains_still_going() -> None:
    sizes = []

    def draw(prefixes: Sequence[Tokens], most: Sequence[int], seed: int) -> list[Tail]:
        sizes.append(len(prefixes))
        ended = len(sizes) == 1  # the first chain ends in its first block
        ids = [(9,) * (n - 1) + ((3,) if ended and i == 0 else (9,)) for i, n in enumerate(most)]
        return [Tail(x, np.full(len(x), -1.0), np.full(len(x), -1.0 - 1e6 * (len(sizes) == 2)), 1) for x in ids]

    sampler = Published(draw, frozenset({3}), horizon=4, block_size=2, steps=1)
    trace = sampler.run((1,), chains=3, seed=0, batched=True)
    assert sizes == [3, 3, 2, 2]
    assert len(trace.cut) == 3 + 2
    assert sorted(len(path) for path in trace.paths) == [2, 4, 4]
    sizes.clear()
    sampler.run((1,), chains=3, seed=0, batched=False)
    assert set(sizes) == {1}


# Its law: the transition matrix on all paths of a tiny transformer, horizon 2.

ALPHA = 2.0


def densities(lm: CausalLM, tokens: Tokens) -> Tail:
    return Tail(tokens, *recomputed(lm, PROMPT.ids, tokens, ALPHA))


def published_matrix(lm: CausalLM, space: Space) -> tuple[list[Tokens], np.ndarray]:
    """P of one step, with the production ratio: every cut, every tail of at most the current one's length.

    The paths of the space first; then those that only this rule makes: stopped by the cap, and not ended.
    """
    candidates = (t for n in (2, 1) for t in itertools.product(range(lm.vocab_size), repeat=n))
    paths = [t for t in candidates if not space.eos.intersection(t[:-1])]
    paths.sort(key=lambda t: not space.contains(t))
    p = np.zeros((len(paths), len(paths)))
    for i, x in enumerate(paths):
        current = densities(lm, x)
        for cut in range(len(x)):
            for j, y in enumerate(paths):
                ended = y[-1] in space.eos
                if y[:cut] != x[:cut] or not cut < len(y) <= len(x) or (len(y) < len(x) and not ended):
                    continue
                whole = densities(lm, y)
                proposed = Tail(y[cut:], whole.log_q[cut:], whole.log_target[cut:])
                assert proposed.onto(current, cut).log_q == pytest.approx(whole.log_q, abs=1e-9)
                accepted = min(1.0, math.exp(log_ratio(current, cut, proposed)))
                p[i, j] += math.exp(proposed.log_q.sum()) / len(x) * accepted
                p[i, i] += math.exp(proposed.log_q.sum()) / len(x) * (1 - accepted)
    return paths, p


def ours(lm: CausalLM, space: Space, paths: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """(pi, P) of the production kernel on the same paths."""
    kernel = Metropolis(Power(SequenceProbability(lm), ALPHA), Suffix(lm, space, Length(), 1 / ALPHA))
    states = [space.path(PROMPT, tokens) for tokens in paths]
    density = np.array([ALPHA * run(scored(lm, x)).log_prob for x in states])
    pi = np.exp(density - density.max())
    return pi / pi.sum(), transition_matrix(kernel, states)


def test_where_no_path_ends_it_is_our_kernel() -> None:
    lm = toy_lm()
    space = Space(frozenset(), 2)
    paths, published = published_matrix(lm, space)
    pi, mine = ours(lm, space, paths[:9])
    assert all(map(space.contains, paths[:9]))
    published = published[:9, :9]
    assert published.sum(1) == pytest.approx(np.ones(9), abs=1e-9)
    assert np.abs(published - mine).max() < 1e-9
    assert np.abs(pi @ published - pi).max() < 1e-9


def test_where_paths_end_its_law_is_another() -> None:
    """As the docstring states: sequences shrink and never grow back, and the ratio is wrong where lengths differ."""
    lm = toy_lm()
    space = Space(frozenset({2}), 2)
    paths, published = published_matrix(lm, space)
    inside = [t for t in paths if space.contains(t)]
    n = len(inside)
    assert n == 7
    pi, mine = ours(lm, space, inside)
    assert published.sum(1) == pytest.approx(np.ones(len(paths)), abs=1e-9)
    assert np.abs(pi @ mine - pi).max() < 1e-9
    assert np.abs(pi @ published[:n, :n] - pi).max() > 0.01
    short, long = paths.index((2,)), [i for i, p in enumerate(paths) if len(p) == 2]
    assert published[long, short].max() > 0
    assert (published[short, long] == 0).all()
    assert mine[short][long].max() > 0
    ended = densities(lm, (2,))
    for i in long:  # what the ratio lacks: the current tail beyond the proposal's length, and log 1/1 - log 1/2
        x = densities(lm, paths[i])
        right = float(np.sum(ended.log_target - ended.log_q) - np.sum(x.log_target - x.log_q)) + math.log(2)
        lacking = -float(x.log_target[1] - x.log_q[1]) + math.log(2)
        assert log_ratio(x, 0, ended) == pytest.approx(right - lacking, abs=1e-9)
        assert lacking > 0.69


def test_counts_out_of_range() -> None:
    def draw(prefixes: Sequence[Tokens], most: Sequence[int], seed: int) -> list[Tail]:
        raise AssertionError("nothing is drawn")

    for change in ({"horizon": 0}, {"block_size": 0}, {"steps": -1}):
        with pytest.raises(ArgumentError, match="must be an integer >="):
            Published(draw, frozenset(), **{"horizon": 2, "block_size": 2, "steps": 1, **change})
    with pytest.raises(ArgumentError, match="chains must be an integer >= 1"):
        Published(draw, frozenset(), 2, 2, 1).run((1,), chains=0, seed=0, batched=True)
