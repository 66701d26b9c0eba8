"""Exits as models of their own: what they refuse, pruned heads, the ledger, damage, and one row for many chains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from powermc.choices import Stream
from powermc.errors import ArgumentError, NonFiniteLogits
from powermc.kernels import Metropolis
from powermc.lm import CausalLM
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.scheduling import Event, Failed, Finished, drive, run
from powermc.sequences import Length, Path, Prompt, SequenceProbability, Space, Suffix, scored
from powermc.targets import Power
from powermc.types import Steps
from tests.lm.families import VOCAB, tiny_model
from tests.lm.test_oracle_laws import PROMPTS, TOLERANCE
from tests.lm.test_resume import chains, delayed, deviations, outcomes, space_of

FEW = (2, 3, 7, 11, 12, 30)
PROMPT = Prompt((1, 2, 3))


def path_of(tokens: Any) -> Path:
    tokens = list(tokens)
    return Space(frozenset(), len(tokens)).path(PROMPT, tokens)


def scores(model: Any, path: Path, exponents: Sequence[float] = ()) -> Any:
    return run(scored(model, path, exponents))


def affine(layer: int = 2, width: int = 32, seed: int = 0) -> ExitHead:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    return ExitHead(layer, "ridge", 1.4, weight, torch.randn(width, generator=generator))


# What is refused


@pytest.mark.parametrize("layer", [-1, 0, 4, 5])
def test_layers_out_of_range(layer: int) -> None:
    with pytest.raises(ArgumentError, match=rf"exit layer {layer} is out of range: .* has 4 layers, choose 1 to 3"):
        EarlyExit(CausalLM(tiny_model()), ExitHead(layer))


def test_a_head_of_another_width() -> None:
    with pytest.raises(ArgumentError, match=r"for states of width 16, .* has 32"):
        EarlyExit(CausalLM(tiny_model()), affine(width=16))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "lense"}, "unknown head 'lense'; choose one of lens, temperature, ridge, kl"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be a finite number > 0, got nan"),
        ({"weight": torch.eye(32)}, "both the matrix and the offset"),
        ({"bias": torch.zeros(32)}, "both the matrix and the offset"),
        ({"vocabulary": torch.zeros(0)}, "at least one token"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        ExitHead(2, **options)


def test_a_screening_head_does_not_generate() -> None:
    lm = CausalLM(tiny_model())
    exit_ = EarlyExit(lm, ExitHead(2)).pruned(FEW, scoring=True)
    space = space_of(lm)
    with pytest.raises(ArgumentError, match="not a distribution to draw from; generate with the whole one"):
        chains(delayed(space, [(exit_, 1.0), (lm, 1.0)]), space, Suffix(exit_, space, Length()))
    assert not lm.decoder.rows.used


# Pruned heads


@pytest.mark.parametrize("head", [ExitHead(2, temperature=1.3), affine()])
def test_a_strict_head_is_the_whole_one_renormalised(head: ExitHead) -> None:
    """Zero outside; inside log p less the log of the mass inside; entropy and log Z over the inside alone."""
    lm = CausalLM(tiny_model())
    whole = EarlyExit(lm, head)
    strict = whole.pruned(FEW)
    inside = path_of([7, 2, 30, 11, 3, 12])
    found = scores(strict, inside, (2.0,))
    masses, entropies, powers = [], [], []
    for t in range(len(inside)):  # the whole head's log p of every token of FEW after the same prefix
        each = [scores(whole, path_of([*inside.tokens[:t], v])).log_p[t] for v in FEW]
        log_mass = np.logaddexp.reduce(each)
        kept = np.array(each) - log_mass
        masses.append(log_mass)
        entropies.append(-(np.exp(kept) * kept).sum())
        powers.append(np.logaddexp.reduce(2 * kept))
    full = scores(whole, inside)
    assert found.log_p == pytest.approx(full.log_p - np.array(masses), abs=TOLERANCE)
    assert found.entropy == pytest.approx(entropies, abs=TOLERANCE)
    assert found.log_z[2.0] == pytest.approx(powers, abs=TOLERANCE)
    outside = scores(strict, path_of([7, 4, 2]))
    assert outside.log_p[1] == -math.inf
    assert np.isfinite(outside.log_p[[0, 2]]).all()


def test_a_strict_head_draws_from_its_tokens_only() -> None:
    lm = CausalLM(tiny_model(), max_rows=3)
    exit_ = EarlyExit(lm, ExitHead(2)).pruned(FEW)
    space = Space(frozenset(), 8)
    kernel = Metropolis(Power(SequenceProbability(exit_), 1.0), Suffix(exit_, space, Length()))

    def program(stream: Stream) -> Steps[None]:
        state = yield from kernel.init(path_of([7] * 8))
        for step in range(6):
            state, _ = yield from kernel.step(stream.step(step), state)
            yield state.value

    drawn = [o.value for o in drive((c, program(Stream(0, chain=c))) for c in range(4)) if isinstance(o, Event)]
    assert {t for path in drawn for t in path.tokens} <= set(FEW)
    assert len(set(drawn)) > 5


def test_a_tail_that_a_strict_head_cannot_draw_is_a_null_move() -> None:
    """Its support misses the current path: the chain stays, and counts it."""
    lm = CausalLM(tiny_model())
    exit_ = EarlyExit(lm, ExitHead(2)).pruned(FEW)
    space = Space(frozenset(), 4)
    kernel = delayed(space, [(exit_, 1.0), (lm, 0.5)])
    state = run(kernel.init(path_of([4, 4, 4, 4])))
    for step in range(5):
        new, info = run(kernel.step(Stream(0).step(step), state))
        assert info["null"]
        assert not info["accepted"]
        assert new.value == state.value


def test_a_screening_head_scores_the_token() -> None:
    """The token scored has its weight of the whole head, beside the few: log p = l - log(sum over few and token)."""
    lm = CausalLM(tiny_model())
    whole = EarlyExit(lm, affine())
    screen = whole.pruned(FEW, scoring=True)
    path = path_of([7, 4, 5, 2, 36])
    found, full = scores(screen, path), scores(whole, path)
    for t, token in enumerate(path.tokens):
        each = [scores(whole, path_of([*path.tokens[:t], v])).log_p[t] for v in {*FEW, token}]
        assert found.log_p[t] == pytest.approx(full.log_p[t] - np.logaddexp.reduce(each), abs=TOLERANCE)


def test_pruned_heads_of_a_tied_softcapped_model() -> None:
    """The rows of the head are picked under the model's own scaling: Gemma 2 caps its logits after them."""
    lm = CausalLM(tiny_model("gemma2"))
    whole = EarlyExit(lm, ExitHead(2))
    every = whole.pruned(range(VOCAB))
    path = path_of([7, 4, 5, 2, 36])
    assert scores(every, path).log_p == pytest.approx(scores(whole, path).log_p, abs=TOLERANCE)


def test_flops_of_pruned_heads() -> None:
    cost = CausalLM(tiny_model()).engine.cost
    assert cost.head == 2 * 32 * VOCAB
    assert ExitHead(2).flops(cost) == cost.head
    assert ExitHead(2).pruned(FEW).flops(cost) == pytest.approx(2 * 32 * len(FEW))
    assert ExitHead(2).pruned(FEW, scoring=True).flops(cost) == pytest.approx(2 * 32 * (len(FEW) + 1))
    assert affine().flops(cost) == cost.head + 2 * 32 * 32


# The ledger


def test_heads_by_depth() -> None:
    lm = CausalLM(tiny_model())
    low, high = EarlyExit(lm, ExitHead(1)), EarlyExit(lm, affine(3))
    path = path_of(range(20, 26))
    for oracle in (low, high, high.pruned(FEW), lm):
        path = scores(oracle, path)
    told = lm.ledger.as_dict()
    assert told["heads_by_depth"] == {"1": 6, "3": 12, "4": 6}
    assert told["tokens_by_depth"] == {"0-1": 8, "1-3": 8, "3-4": 8}
    cost = lm.engine.cost
    heads = 6 * low.head.flops(cost) + 6 * high.head.flops(cost) + 6 * high.pruned(FEW).head.flops(cost) + 6 * cost.head
    layers = sum(3 * cost.span(a, b, 3, 3) + 5 * cost.span(a, b, 8, 5) for a, b in ((0, 1), (1, 3), (3, 4)))
    assert told["flops"] == pytest.approx(heads + layers)


# Damage


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("depth", [2, 4])
def test_damaged_activations_stop_their_chain_only(value: float, depth: int) -> None:
    """A token whose embedding is damaged: chains that draft it stop, at the exit or at full depth; the rest are right,
    in reused rows too."""
    model: Any = tiny_model("llama", tie_word_embeddings=False)
    bad = VOCAB - 1
    if depth == 2:
        model.get_input_embeddings().weight.data[bad] = value
    else:  # only the layers above the exit choke on it

        def damage(block: Any, args: Any, kwargs: Any) -> Any:
            states = args[0].clone()
            states[(states - mark).abs().amax(-1) < 1e-3] = value
            return (states, *args[1:]), kwargs

        marks: list[torch.Tensor] = []
        hook = model.model.layers[2].register_forward_pre_hook(lambda m, args: marks.append(args[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([[*PROMPTS[0].ids]]), use_cache=False)
        hook.remove()
        mark = marks[0][0, -1]
        model.model.layers[2].register_forward_pre_hook(damage, with_kwargs=True)
    lm = CausalLM(model, max_rows=3)
    exit_ = EarlyExit(lm, ExitHead(2))
    space = Space(frozenset(), 8)
    kernel = delayed(space, [(exit_, 1.2), (lm, 0.5)])

    def program(prompt: Prompt, chain: int) -> Steps[Any]:
        stream = Stream(0, prompt=prompt.key, chain=chain)
        state = yield from kernel.init(space.path(prompt, range(20, 28)))
        for step in range(8):
            state, _ = yield from kernel.step(stream.step(step), state)
        return state.value

    ended = list(drive(((p.key, c), program(p, c)) for p, c in itertools.product(PROMPTS, range(8))))
    failed: list[Any] = [o for o in ended if isinstance(o, Failed)]
    done = [o.value for o in ended if isinstance(o, Finished)]
    assert failed
    assert len(done) > 3
    assert all(isinstance(o.error, NonFiniteLogits) for o in failed)
    if depth == 4:
        assert {o.key[0] for o in failed} == {PROMPTS[0].key}, "its prompt ends in the damaged state"
    assert max(deviations(lm, [exit_], done).values()) <= TOLERANCE
    assert not lm.decoder.rows.used


# One row


def test_one_row_for_many_chains_and_two_exits() -> None:
    """Drafts wait for the only row; scoring at three depths goes on beside them; all states are right."""
    lm = CausalLM(tiny_model(), max_rows=1)
    low, high = EarlyExit(lm, ExitHead(1)), EarlyExit(lm, ExitHead(3))
    space = space_of(lm)
    kernel = delayed(space, [(low, 1.2), (high, 0.8), (lm, 0.5)])
    visited = chains(kernel, space, kernel.proposal, each=3)
    assert len(visited) == len(PROMPTS) * 3 * 6
    assert {(0, False), (3, True)} <= outcomes(visited)
    assert max(deviations(lm, [low, high], [path for path, _ in visited]).values()) <= TOLERANCE
    assert lm.decoder.rows.capacity <= 2
    assert not lm.decoder.rows.used


def test_company_does_not_matter_with_exits() -> None:
    """Float64: one row or eight, the same states with the same densities."""
    model = tiny_model().double()

    def states(rows: int) -> list[Any]:
        lm = CausalLM(model, max_rows=rows)
        exit_ = EarlyExit(lm, ExitHead(2))
        space = space_of(lm)
        kernel = delayed(space, [(exit_, 1.2), (lm, 0.5)])
        visited = chains(kernel, space, kernel.proposal)
        return sorted((p.prompt.key, p.tokens, round(view.log_prob, 9)) for p, _ in visited if (view := p.view(lm)))

    assert states(1) == states(8)
