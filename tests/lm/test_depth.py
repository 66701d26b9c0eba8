"""Spans of blocks through the model's own forward, and the owner's model left as it was."""

from __future__ import annotations

import copy
import threading
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import nn

from powermc.errors import ModelError
from powermc.lm import CausalLM
from powermc.lm.depth import Gated, Span
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.scheduling import run
from powermc.sequences import Prompt, Space, scored
from tests.lm.families import ALL, VOCAB, tiny_model

IDS = torch.tensor([[1, 2, 4, 7, 9, 11, 20], [6, 6, 30, 2, 0, 13, 14]])


def with_exit(family: str = "llama", **changes: Any) -> tuple[Any, CausalLM, EarlyExit]:
    model = tiny_model(family, **changes)
    lm = CausalLM(model, max_rows=4)
    return model, lm, EarlyExit(lm, ExitHead(2))


def path_of(n: int = 9) -> Any:
    return Space(frozenset(), n).path(Prompt((1, 2, 3)), [(5 * t + 2) % VOCAB for t in range(n)])


# Spans


@pytest.mark.parametrize("family", ALL)
def test_spans_compose(family: str) -> None:
    """[0, 1), [1, L-1), [L-1, L) one after the other give the states and the output of the whole, bit for bit."""
    model = tiny_model(family)
    layers = model.config.num_hidden_layers
    body = Gated(model.base_model, layers, compiled=False)
    with torch.no_grad():
        plain = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        whole = Span(0, layers, wanted=(1, layers - 1))
        assert torch.equal(body(whole, input_ids=IDS, use_cache=False), plain)
        states = None
        for first, last in ((0, 1), (1, layers - 1), (layers - 1, layers)):
            span = Span(first, last, states, wanted=(last,))
            out = body(span, input_ids=IDS, use_cache=False)
            states = span.found[last]
            if last < layers:
                assert torch.equal(states, whole.found[last])
    assert torch.equal(out, plain)


def test_blocks_that_return_tuples() -> None:
    """Older models' blocks return (states, weights, ...): what the loop unpacks has that length also where skipped."""

    class Old(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.block(*args, **kwargs), None

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Old(nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            for layer in self.layers:
                x, _ = layer(x)
            return type("Output", (), {"last_hidden_state": x})()

    loop, x = Loop(), torch.randn(2, 4)
    body = Gated(loop, 3)
    with torch.no_grad():
        plain = loop(x).last_hidden_state
        assert torch.equal(body(Span(0, 3), x=x), plain)  # the gates learn the length
        low = Span(0, 2, wanted=(2,))
        body(low, x=x)
        assert torch.equal(body(Span(2, 3, low.found[2]), x=x), plain)


@pytest.mark.parametrize("layers", [3, 5])
def test_a_body_without_its_list_of_blocks(layers: int) -> None:
    with pytest.raises(ModelError, match=rf"LlamaModel has 0 lists of {layers} blocks, not one: .* run in part"):
        Gated(tiny_model("llama").base_model, layers)


def test_a_body_with_two_lists_of_blocks() -> None:
    body: Any = tiny_model("llama").base_model
    body.others = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(ModelError, match="has 2 lists of 4 blocks"):
        Gated(body, 4)


def test_lists_within_blocks_do_not_count() -> None:
    """As many experts per block as there are blocks: the outer list is meant."""
    body: Any = tiny_model("llama").base_model
    for block in body.layers:
        block.experts = nn.ModuleList(nn.Identity() for _ in range(4))
    assert Gated(body, 4).path == "layers"


# A model that cannot be split


class _Sums(nn.Module):
    """A final norm that also sees what the first block gave: a state the upper layers alone do not determine."""

    def __init__(self, norm: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.seen = norm, torch.zeros(())
        block.register_forward_hook(self.note)

    def note(self, block: nn.Module, args: Any, output: Any) -> None:
        self.seen = output

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        fits = self.seen.shape == states.shape
        return self.norm(states + (self.seen if fits else 0 * states))


def test_a_model_that_cannot_be_split_is_refused() -> None:
    """It runs row by row as a whole; the part above the exit needs what the part below it left in the module."""
    model: Any = tiny_model("llama")
    model.model.norm = _Sums(model.model.norm, model.model.layers[0])
    lm = CausalLM(model)
    path = run(scored(lm, path_of()))
    assert path.log_p is not None, "at full depth it is sampled"
    for _ in range(2):  # a second attempt is refused too
        with pytest.raises(ModelError, match=r"cannot be driven in two parts at layer 2: .*sampled at full depth only"):
            EarlyExit(lm, ExitHead(2))
    assert not lm.decoder.rows.used
    assert lm.decoder.rows.depths == (lm.depth,)


# The owner's model


def test_the_owners_model_is_untouched(tmp_path: File) -> None:
    """Same modules, keys, outputs and files as before, with exits attached and in use."""
    reference: Any = tiny_model("llama")
    model, lm, exit_ = with_exit()
    run(scored(lm, run(scored(exit_, path_of()))))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in reference.named_modules()]
    assert list(model.state_dict()) == list(reference.state_dict())
    assert {n: m.__dict__.keys() for n, m in model.named_modules()} == {
        n: m.__dict__.keys() for n, m in reference.named_modules()
    }
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        mine, theirs = (m(input_ids=IDS, output_hidden_states=True) for m in (model, reference))
        twin = copy.deepcopy(model)(input_ids=IDS)
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(twin.logits, theirs.logits)
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 5
    assert all(torch.equal(a, b) for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **options), reference.generate(IDS, **options))
    model.save_pretrained(tmp_path)
    loaded: Any = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, theirs.logits)


def test_hidden_states_are_those_of_the_exits() -> None:
    """The state an exit reads is what the owner captures at that depth."""
    model, lm, exit_ = with_exit()
    path = run(scored(exit_, path_of()))
    with torch.no_grad():
        ids = torch.tensor([[*path.prompt.ids, *path.tokens]])
        captured = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, :-1]
    assert torch.allclose(path.cache.hidden(2, 0, ids.shape[1] - 1), captured, atol=1e-5)
    assert lm.depth == 4


def test_the_owner_in_another_thread() -> None:
    """Forwards and generation of the owner while spans run: neither sees the other."""
    model, lm, exit_ = with_exit()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    generated = model.generate(IDS, **options)
    expected = run(scored(lm, run(scored(exit_, path_of()))))
    stop, wrong = threading.Event(), []
    rounds = 0

    def owner() -> None:
        nonlocal rounds
        while not stop.is_set():
            with torch.no_grad():
                same = torch.equal(model(input_ids=IDS).logits, logits)
            same = same and torch.equal(model.generate(IDS, **options), generated)
            rounds += 1
            if not same:
                wrong.append(rounds)

    thread = threading.Thread(target=owner)
    thread.start()
    try:
        while rounds < 4 and thread.is_alive():
            found = run(scored(lm, run(scored(exit_, path_of()))))
            assert found.log_p == pytest.approx(expected.log_p, abs=1e-6)
            assert found.others[0].log_p == pytest.approx(expected.others[0].log_p, abs=1e-6)
    finally:
        stop.set()
        thread.join()
    assert rounds >= 4
    assert not wrong


def test_training_in_place_is_seen() -> None:
    """The gates hold the owner's blocks: new weights are used at once, and old activations are not."""
    model, lm, exit_ = with_exit()
    before: Any = run(scored(exit_, path_of()))
    run(scored(lm, before))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    fresh = CausalLM(model)
    expected = run(scored(fresh, path_of()))
    low = run(scored(EarlyExit(fresh, ExitHead(2)), path_of()))
    assert run(scored(lm, path_of())).log_p == pytest.approx(expected.log_p, abs=1e-5)
    found: Any = run(scored(exit_, path_of()))
    assert found.log_p == pytest.approx(low.log_p, abs=1e-5)
    assert abs(found.log_p - before.log_p).max() > 1e-2


def test_a_replaced_block_is_seen() -> None:
    """Also by prompts that were run before."""
    model, lm, exit_ = with_exit()
    run(scored(lm, run(scored(exit_, path_of()))))
    other: Any = tiny_model("llama", seed=3)
    model.model.layers[0] = other.model.layers[0]
    fresh = CausalLM(model)
    found, expected = run(scored(exit_, path_of())), run(scored(EarlyExit(fresh, ExitHead(2)), path_of()))
    assert found.log_p == pytest.approx(expected.log_p, abs=1e-6)
    assert run(scored(lm, found)).log_p == pytest.approx(run(scored(fresh, path_of())).log_p, abs=1e-6)


@pytest.mark.parametrize("deep", [False, True])
def test_training_mode_is_refused(deep: bool) -> None:
    model, lm, exit_ = with_exit()
    model.train()
    with pytest.raises(ModelError, match=r"is in training mode; call model\.eval\(\)"):
        run(scored(lm if deep else exit_, path_of()))
    model.eval()
    assert run(scored(exit_, path_of())).log_p is not None


def test_long_rotary_factors_bound_the_context() -> None:
    """Phi 3 changes all its rotary factors once any row is longer than the original context: paths stay below."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    lm = CausalLM(tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32))
    assert lm.decoder.context == 32
    assert CausalLM(tiny_model("phi3")).decoder.context == 64
