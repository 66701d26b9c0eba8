"""Resumed = full forward, on many architectures, through the production scheduler.

Chains of delayed acceptance draft with an exit and complete with the full model, with prompts of different lengths and
fewer rows than chains. Every state they visit is then evaluated again by one plain forward of the stock model, without
cache and without batch; its exit by the same forward with the blocks above the exit made identities by hooks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from powermc.choices import Stream
from powermc.kernels import DelayedAcceptance, Metropolis, Mixture
from powermc.lm import CausalLM
from powermc.lm.depth import Gated
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.scheduling import Event, Failed, drive, run
from powermc.sequences import Length, Path, SequenceProbability, Space, Suffix, draft, scored
from powermc.targets import Power
from powermc.types import Kernel, State, Steps
from tests.lm.families import ALL, FAMILIES, tiny_model
from tests.lm.test_oracle_laws import PROMPTS, TOLERANCE, end_token, plain

HORIZON = 8
TEMPERATURE = 1.5


def delayed(space: Space, stages: Sequence[tuple[Any, float]], temperature: float = TEMPERATURE) -> Any:
    """Delayed acceptance on (model, exponent) stages, drafting with the first of the models."""
    targets = [Power(SequenceProbability(model), exponent) for model, exponent in stages]
    return DelayedAcceptance(targets, Suffix(stages[0][0], space, Length(), temperature))


def space_of(lm: CausalLM) -> Space:
    return Space(frozenset({end_token(lm)}), HORIZON)


def walk(kernel: Kernel[Path], space: Space, drafts: Suffix, path: Path, stream: Stream, steps: int) -> Steps[None]:
    """A chain that yields every state with its info. It starts at a draft: at a path of no one it would be stuck."""
    model: Any = drafts.model
    path = yield from scored(model, path, (1 / drafts.temperature,))
    path, _, _ = yield from draft(model, space, path, 0, drafts.temperature, stream.step(steps))
    state: State[Path] = yield from kernel.init(path)
    for step in range(steps):
        state, info = yield from kernel.step(stream.step(step), state)
        yield state.value, info


def chains(
    kernel: Kernel[Path], space: Space, drafts: Suffix, *, each: int = 2, steps: int = 6
) -> list[tuple[Path, dict[str, Any]]]:
    """Every (state, info) of `each` chains per prompt, all side by side."""
    tokens = [t for t in range(11, 11 + HORIZON + 1) if t not in space.eos][:HORIZON]
    programs = (
        ((p.key, c), walk(kernel, space, drafts, space.path(p, tokens), Stream(0, prompt=p.key, chain=c), steps))
        for p, c in itertools.product(PROMPTS, range(each))
    )
    visited = []
    for outcome in drive(programs):
        assert not isinstance(outcome, Failed), outcome
        if isinstance(outcome, Event):
            visited.append(outcome.value)
    return visited


@contextmanager
def stopped_at(model: Any, layer: int) -> Iterator[None]:
    """The stock model whose blocks from `layer` on hand their input on: its logits are the logit lens there."""

    def identity(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    with ExitStack() as stack:
        for block in Gated(model.base_model, model.config.get_text_config().num_hidden_layers).blocks[layer:]:
            stack.callback(block.register_forward_hook(identity, with_kwargs=True).remove)
        yield


def gap(model: Any, path: Path, law: float) -> float:
    """Largest difference of log p, entropy and log Z between the scores in front and the stock model as it is now.

    log Z as far as it is there: after a move by the other generator that is up to the cut.
    """
    assert path.log_p is not None
    known = (path.log_p, path.entropy, path.log_z.get(law, np.zeros(0)))
    gaps = [np.abs(a - b[: len(a)]) for a, b in zip(known, plain(model, path, law), strict=True)]
    return float(np.concatenate(gaps).max())


def deviations(lm: CausalLM, exits: Sequence[EarlyExit], paths: Sequence[Path]) -> dict[int, float]:
    """By depth: the largest `gap` over all paths that have been scored there."""
    model = lm.decoder.model
    found: dict[int, list[float]] = {}
    for oracle in (lm, *exits):
        with ExitStack() as stack:
            if oracle is not lm:
                stack.enter_context(stopped_at(model, oracle.depth))
            views = dict.fromkeys(v for p in paths if (v := p.view(oracle)) is not None and v.scored(oracle))
            found[oracle.depth] = [gap(model, v, 1 / TEMPERATURE) for v in views]
    assert len(found[lm.depth]) > 5, "the test needs states of its own at full depth"
    assert all(len(gaps) > 3 for gaps in found.values()), "and at each exit"
    return {depth: max(gaps) for depth, gaps in found.items()}


def outcomes(visited: Sequence[tuple[Path, dict[str, Any]]]) -> set[Any]:
    """(stages passed, accepted) of every move that was one, and was to another path."""
    return {(i.get("stage"), i["accepted"]) for _, i in visited if not i["null"] and not i.get("same", False)}


def resumed(family: str) -> tuple[dict[int, float], set[Any]]:
    """Deviations by depth after chains with an exit in the middle, and what became of their proposals."""
    lm = CausalLM(tiny_model(family), max_rows=3)
    exit_ = EarlyExit(lm, ExitHead(lm.depth // 2))
    space = space_of(lm)
    kernel = delayed(space, [(exit_, 1.2), (lm, 0.5)])
    visited = chains(kernel, space, kernel.proposal)
    assert not lm.decoder.rows.used, "every row was given back"
    return deviations(lm, [exit_], [path for path, _ in visited]), outcomes(visited)


QUICK = (*FAMILIES, "deepseek-v3", "falcon", "glm4", "gpt-oss", "opt", "phi", "qwen3-moe", "stablelm")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in ALL])
def test_resumed_equals_the_full_forward(family: str) -> None:
    """States reached by drafts at the exit, some rejected there, some at full depth, some accepted."""
    found, became = resumed(family)
    assert became == {(0, False), (1, False), (2, True)}, "the test needs proposals of all three fates"
    assert max(found.values()) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_an_exit_is_the_models_own_norm_and_head(family: str) -> None:
    """The logit lens written out: states of the stock model by a hook on the block, its final norm, its head."""
    model: Any = tiny_model(family)
    lm = CausalLM(model)
    exit_ = EarlyExit(lm, ExitHead(3, temperature=1.7))
    path = Space(frozenset(), 9).path(PROMPTS[1], range(20, 29))
    captured = []
    hook = lm.decoder.blocks[2].register_forward_hook(lambda m, a, out: captured.append(out))
    ids = torch.tensor([[*path.prompt.ids, *path.tokens]])
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        hook.remove()
        states = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
        norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
        logits = model.lm_head(norm(states))[0, len(path.prompt.ids) - 1 : -1].double()
    if family == "gemma2":
        logits = 30 * torch.tanh(logits / 30)
    if family == "granite":
        logits = logits / 3
    log_p = (logits / 1.7).log_softmax(-1)
    found: Path = run(scored(exit_, path, (1.3,)))
    assert found.log_p == pytest.approx(log_p[torch.arange(9), list(path.tokens)].numpy(), abs=TOLERANCE)
    assert found.log_z[1.3] == pytest.approx((1.3 * log_p).logsumexp(-1).numpy(), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "deepseek-v3"])
def test_two_exits_in_three_stages(family: str) -> None:
    """Drafted at the first layer, screened there and at the last but one, completed in full: three depths resume."""
    lm = CausalLM(tiny_model(family), max_rows=3)
    low, high = EarlyExit(lm, ExitHead(1)), EarlyExit(lm, ExitHead(lm.depth - 1))
    space = space_of(lm)
    kernel = delayed(space, [(low, 1.2), (high, 0.6), (lm, 0.5)])
    visited = chains(kernel, space, kernel.proposal, steps=10)
    assert {(0, False), (1, False), (3, True)} <= outcomes(visited)
    assert max(deviations(lm, [low, high], [path for path, _ in visited]).values()) <= TOLERANCE
    spans = {span for span, n in lm.ledger.spans.items() if n}
    start = {(1, lm.depth)}  # the first states of the chains skip the screen
    assert spans == {(0, 1), (1, lm.depth - 1), (lm.depth - 1, lm.depth)} | start, "no layer runs what another span has"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "deepseek-v3"])
def test_drafts_of_both_depths_mixed(family: str) -> None:
    """Metropolis with full-depth drafts and delayed acceptance with exit drafts cut each other's paths."""
    lm = CausalLM(tiny_model(family), max_rows=3)
    exit_ = EarlyExit(lm, ExitHead(lm.depth // 2))
    space = space_of(lm)
    cheap = delayed(space, [(exit_, 1.2), (lm, 0.5)])
    plain_mh = Metropolis(Power(SequenceProbability(lm), 0.5), Suffix(lm, space, Length(), TEMPERATURE))
    visited = chains(Mixture([plain_mh, cheap], [0.5, 0.5]), space, cheap.proposal, steps=10)
    moved = {i["component"] for _, i in visited if i["changed"]}
    assert moved == {0, 1}, "both components must move the chain"
    assert max(deviations(lm, [exit_], [path for path, _ in visited]).values()) <= TOLERANCE
    assert not lm.decoder.rows.used


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_an_exit_attached_later(family: str) -> None:
    """Paths evaluated at full depth before there was an exit are scored by it, drafted from and completed again."""
    lm = CausalLM(tiny_model(family), max_rows=3)
    space = space_of(lm)
    drafts = Suffix(lm, space, Length(), TEMPERATURE)
    paths = [path for path, _ in chains(Metropolis(Power(SequenceProbability(lm), 0.5), drafts), space, drafts)]
    exit_ = EarlyExit(lm, ExitHead(lm.depth - 2))
    kernel = delayed(space, [(exit_, 1.2), (lm, 0.5)])

    def onward(path: Path, stream: Stream) -> Steps[None]:
        state = yield from kernel.init(path)
        for step in range(4):
            state, _ = yield from kernel.step(stream.step(step), state)
            yield state.value

    programs = ((i, onward(p, Stream(1, chain=i))) for i, p in enumerate([*dict.fromkeys(paths)][:9]))
    later = [o.value for o in drive(programs) if isinstance(o, Event)]
    assert max(deviations(lm, [exit_], [*paths, *later]).values()) <= TOLERANCE
