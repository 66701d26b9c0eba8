"""FLOPs of the cost model against torch's counter, and the ledger against what a resumed tail must cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from powermc.choices import Stream
from powermc.kernels import DelayedAcceptance
from powermc.lm import CausalLM
from powermc.lm.decoder import Work
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.lm.rows import Prefix
from powermc.scheduling import run
from powermc.sequences import Length, Path, Prompt, SequenceProbability, Space, Suffix, draft, scored
from powermc.targets import Power
from powermc.types import Choices, Fields, Move, State, Steps
from tests.lm.families import ALL, tiny_model
from tests.lm.test_oracle_laws import TOLERANCE

COUNTED: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""On a CPU torch counts these only."""
WIDER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 101, **COUNTED}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": WIDER,
    "llama, tied": {**WIDER, "tie_word_embeddings": True},
    "mixtral": WIDER,
    "gpt2": {"vocab_size": 101, "n_embd": 64, **COUNTED},
}
CLOSE = 0.02


COUNTED_SHORT = ("diffllama", "modernbert-decoder")
"""Values twice as wide, and a dense layer before the head: 11% and half of the head are missing."""


def model_of(name: str) -> CausalLM:
    """Without reuse, so that what a move costs is a function of the two paths."""
    return CausalLM(
        tiny_model(name.split(",")[0], **SHAPES.get(name, COUNTED)), max_rows=4, reuse=False, compiled=False
    )


def counted(run_it: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_it()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", sorted({*SHAPES, *ALL} - {*COUNTED_SHORT}))
def test_flops_of_spans_and_heads(name: str) -> None:
    """Prompt in one pass, then single tokens, to a middle layer and from there to the end; and the head."""
    lm = model_of(name)
    decoder, cost, middle = lm.decoder, lm.engine.cost, 2
    lm.engine.keep(middle)
    ids = [(7 * i + 3) % lm.vocab_size for i in range(24)]
    slot = decoder.rows.acquire(Prefix(), len(ids))
    for n in (20, 1, 3):
        for first, last in ((0, middle), (middle, lm.depth)):
            slots = slot.filled[last] + n
            found = counted(lambda n=n, first=first, last=last: decoder.forward([Work(slot, ids, n)], first, last))
            assert n * cost.span(first, last, slots, n) == pytest.approx(found, rel=CLOSE), (n, first, last)
    states = decoder.rows.hidden[lm.depth][slot.index, :5]
    assert 5 * cost.head == pytest.approx(counted(lambda: decoder.head(states)), rel=CLOSE)


def test_flops_of_rows_side_by_side() -> None:
    """A decode pass of three rows of one length costs three times a single one."""
    lm = model_of("llama")
    ids = list(range(12))
    slots = [lm.decoder.rows.acquire(Prefix(), 12) for _ in range(3)]
    lm.decoder.forward([Work(s, ids, 11) for s in slots], 0, lm.depth)
    found = counted(lambda: lm.decoder.forward([Work(s, ids, 1) for s in slots], 0, lm.depth))
    assert 3 * lm.engine.cost.span(0, lm.depth, 12) == pytest.approx(found, rel=CLOSE)


@pytest.mark.parametrize("kind", ["lens", "affine", "pruned", "screening"])
def test_flops_of_exit_heads(kind: str) -> None:
    lm = model_of("llama")
    head = ExitHead(2)
    if kind == "affine":
        head = ExitHead(2, "ridge", 1.2, torch.eye(64), torch.zeros(64))
    if kind in ("pruned", "screening"):
        head = head.pruned(range(40), scoring=kind == "screening")
    exit_ = EarlyExit(lm, head)
    path = Space(frozenset(), 1).path(Prompt((1, 2, 3)), [7])
    run(scored(exit_, path, ()))  # the layers have run
    before = lm.ledger.copy()
    found = counted(lambda: run(scored(exit_, path, (2.0,))))
    spent = lm.ledger.since(before)
    assert not +spent.spans
    assert spent.heads == {2: 1}
    assert spent.flops == pytest.approx(found, rel=CLOSE)


# What a move by delayed acceptance costs.


def settled(lm: CausalLM, exit_: EarlyExit, space: Space) -> tuple[Any, State[Path]]:
    """A kernel whose second stage decides everything, and a state whose activations are all there."""
    stages = [Power(SequenceProbability(exit_), 1.0), Power(SequenceProbability(lm), 0.3)]
    kernel = DelayedAcceptance(stages, Suffix(exit_, space, Length(), 1.0))

    def program() -> Steps[State[Path]]:
        path = yield from scored(exit_, space.path(Prompt(tuple(range(20, 32))), range(40, 40 + space.horizon)), (1.0,))
        path, _, _ = yield from draft(exit_, space, path, 0, 1.0, Stream(0).step(0))
        return (yield from kernel.init(path))

    return kernel, run(program())


@dataclass(frozen=True)
class Kept:
    """A proposal that keeps its moves."""

    proposal: Any
    moves: list[Move[Path]] = field(default_factory=list)

    @property
    def fields(self) -> Fields:
        return self.proposal.fields

    def propose(self, choices: Choices, value: Path) -> Steps[Move[Path]]:
        self.moves.append((yield from self.proposal.propose(choices, value)))
        return self.moves[-1]


def parting(x: Path, y: Path) -> int:
    """How many tokens two paths begin with alike."""
    n = 0
    while x.tokens[: n + 1] == y.tokens[: n + 1] and n < max(len(x), len(y)):
        n += 1
    return n


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_nothing_below_the_exit_runs_twice(family: str, layer: int) -> None:
    """Per step: the tokens drafted pass [0, exit) once each; those of survivors pass [exit, L) once each, from the one
    on that differs from the current path; no others.

    A draft of n tokens costs n - 1: the last token is not run, and the state before the cut is known. Scoring a tail
    of n tokens needs the head on n states, and the layers on n - 1. What is drafted as it was needs neither.
    """
    lm = model_of(family)
    exit_ = EarlyExit(lm, ExitHead(layer))
    space = Space(frozenset(), 14)
    kernel, state = settled(lm, exit_, space)
    kernel = replace(kernel, proposal=Kept(kernel.proposal))
    fates = set()
    for step in range(1, 25):
        before = lm.ledger.copy()
        state, info = run(kernel.step(Stream(0).step(step), state))
        spent, n = lm.ledger.since(before), info["proposal_length"]
        move = kernel.proposal.moves[-1]
        assert info.get("same", False) == (move.value == move.origin)
        completed = len(move.value) - parting(move.origin, move.value) if info.get("stage", 0) >= 1 else 0
        assert completed <= n
        assert spent.tokens(0, layer) == info["tokens"] == n - 1
        assert spent.tokens(layer, lm.depth) == max(completed - 1, 0)
        assert set(+spent.spans) <= {(0, layer), (layer, lm.depth)}
        assert spent.heads[layer] == n
        assert spent.heads[lm.depth] == completed
        fates.add((info.get("stage"), info["accepted"]))
    assert {(1, False), (2, True)} <= fates


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_completion_starts_where_the_draft_leaves_the_current_path(family: str, layer: int) -> None:
    """Layers [exit, L) and the head from the first token on that differs, not from the cut on. The scores are those of
    the path scored from nothing."""
    lm = model_of(family)
    exit_ = EarlyExit(lm, ExitHead(layer))
    n, cut, cold = 12, 3, 0.3  # cold enough for drafts to repeat themselves for a while
    space = Space(frozenset(), n)

    def begun() -> Steps[Path]:
        x = yield from scored(exit_, space.path(Prompt(tuple(range(20, 32))), range(40, 40 + n)), (1 / cold,))
        x, _, _ = yield from draft(exit_, space, x, 0, cold, Stream(0).step(0))
        x = yield from scored(lm, x)
        return (yield from scored(exit_, x, (1 / cold,)))

    x = run(begun())
    partings = set()
    for seed in range(1, 60):
        y, _, _ = run(draft(exit_, space, x, cut, cold, Stream(seed).step(0)))
        same = parting(x, y)
        before = lm.ledger.copy()
        y = run(scored(lm, y))
        spent = lm.ledger.since(before)
        assert +spent.spans == +Counter({(layer, lm.depth): max(n - same - 1, 0)})
        assert +spent.heads == +Counter({lm.depth: n - same})
        if same not in partings:
            found, anew = y.view(lm), run(scored(lm, space.path(x.prompt, y.tokens)))
            assert found is not None
            assert found.log_p == pytest.approx(anew.log_p, abs=TOLERANCE)
            assert found.entropy == pytest.approx(anew.entropy, abs=TOLERANCE)
        partings.add(same)
    assert len(partings) > 4
    assert max(partings) > cut + 4


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_flops_of_a_completed_tail(family: str) -> None:
    """The second stage alone: the counter, the ledger, and layers [exit, L) + head on the tail agree."""
    lm = model_of(family)
    layer = 2
    exit_ = EarlyExit(lm, ExitHead(layer))
    space = Space(frozenset(), 40)
    _, state = settled(lm, exit_, space)

    def drafted() -> Steps[Path]:
        x = yield from scored(exit_, state.value, (1.0,))
        path, _, _ = yield from draft(exit_, space, x, 9, 1.0, Stream(1).step(0))
        return path

    path = run(drafted())
    assert path.tokens != state.value.tokens
    before = lm.ledger.copy()
    found = counted(lambda: run(scored(lm, path)))
    spent, tail = lm.ledger.since(before), 40 - parting(state.value, path)
    assert spent.spans == {(layer, lm.depth): tail - 1}
    assert spent.heads == {lm.depth: tail}
    slots = 12 + 40 - 1
    stated = (tail - 1) * lm.engine.cost.span(layer, lm.depth, slots, tail - 1) + tail * lm.engine.cost.head
    assert spent.flops == pytest.approx(stated, rel=1e-12)
    assert spent.flops == pytest.approx(found, rel=CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_of_a_whole_step(family: str) -> None:
    """Draft, both stages, and all: one chain, no padding."""
    lm = model_of(family)
    exit_ = EarlyExit(lm, ExitHead(2))
    kernel, state = settled(lm, exit_, Space(frozenset(), 20))
    stages = set()
    for step in range(1, 9):
        before, ended = lm.ledger.copy(), []
        move = kernel.step(Stream(2).step(step), state)
        found = counted(lambda move=move, ended=ended: ended.append(run(move)))
        state, info = ended[0]
        stages.add(info["stage"])
        assert lm.ledger.since(before).flops == pytest.approx(found, rel=CLOSE)
    assert len(stages) > 1


def test_the_prompt_is_run_once_per_depth() -> None:
    """Prompts begun by an exit are resumed, not run again, when the full model needs them; so are drafts after them."""
    lm = model_of("llama")
    exit_ = EarlyExit(lm, ExitHead(2))
    space = Space(frozenset(), 10)
    prompt = Prompt(tuple(range(20, 32)))

    def program(seed: int) -> Steps[Any]:
        x = yield from scored(exit_, space.path(prompt, range(40, 50)), (1.0,))
        path, ran, _ = yield from draft(exit_, space, x, 0, 1.0, Stream(seed).step(0))
        path = yield from scored(lm, path)
        return path, ran

    before = lm.ledger.copy()
    _, ran = run(program(0))
    assert lm.ledger.since(before).spans == {(0, 2): 12 + 9 + ran, (2, lm.depth): 12 + ran}
    before = lm.ledger.copy()
    _, ran = run(program(1))
    assert lm.ledger.since(before).spans == {(0, 2): 9 + ran, (2, lm.depth): ran}


def test_scoring_where_all_has_been_run_costs_heads_only() -> None:
    """What one oracle of a model has run serves the others: an exit scores a path of full depth without a layer."""
    lm = model_of("llama")
    exits = [EarlyExit(lm, ExitHead(layer)) for layer in (1, 3)]
    path = run(scored(lm, Space(frozenset(), 10).path(Prompt((1, 2, 3)), range(40, 50))))
    before = lm.ledger.copy()
    for exit_ in exits:
        path = run(scored(exit_, path, (1.0,)))
    path = run(scored(lm, path, (2.0,)))
    spent = lm.ledger.since(before)
    assert not +spent.spans
    assert spent.heads == {1: 10, 3: 10, 4: 10}


def test_an_exit_attached_later_leaves_what_the_full_model_has_run() -> None:
    """Scoring by the new exit runs the lower layers once more, and nothing of the full depth is lost by it."""
    lm = model_of("llama")
    path = run(scored(lm, Space(frozenset(), 10).path(Prompt((1, 2, 3)), range(40, 50))))
    exit_ = EarlyExit(lm, ExitHead(2))
    before = lm.ledger.copy()
    path = run(scored(exit_, path))
    assert +lm.ledger.since(before).spans == {(0, 2): 12}
    before = lm.ledger.copy()
    run(scored(lm, path, (2.0,)))
    assert not +lm.ledger.since(before).spans
