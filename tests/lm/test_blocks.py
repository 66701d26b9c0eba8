"""Passes in one compiled call: the same states as block by block, where nothing stands against it, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import powermc
from powermc.lm import CausalLM, blocks
from powermc.lm import blocks_numba as compiled
from powermc.lm.decoder import Work
from powermc.lm.product import available
from powermc.lm.rows import Prefix
from powermc.lm.tiles import MOST_LANES
from powermc.sequences import Prompt
from tests.lm.families import tiny_model

pytestmark = pytest.mark.skipif(not available(), reason="torch's OpenMP library has no GOMP_parallel")

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, one head of keys": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama, scaled rotary": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The spans run by compiled passes."""
    made: list[tuple[int, int]] = []
    plain = blocks.Compiled.__call__

    def counted(self: blocks.Compiled, first: int, last: int, *rest: Any) -> torch.Tensor:
        made.append((first, last))
        return plain(self, first, last, *rest)

    monkeypatch.setattr(blocks.Compiled, "__call__", counted)
    return made


def logits(lm: CausalLM, lists: list[list[int]], counts: list[int], depths: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """Logits at every position of these rows, run `counts` positions at a time, each stretch in spans."""
    decoder = lm.decoder
    spans = list(zip((0, *depths), (*depths, decoder.layers), strict=True))
    with torch.no_grad():
        slots = [decoder.rows.acquire(Prefix(), len(ids)) for ids in lists]
        for n in counts:
            for first, last in spans:
                work = [
                    Work(slot, ids, min(n, len(ids) - slot.filled[last]))
                    for slot, ids in zip(slots, lists, strict=True)
                    if slot.filled[last] < len(ids)
                ]
                if work:
                    decoder.forward(work, first, last)
        hidden = decoder.rows.hidden[decoder.layers]
        out = [decoder.head(hidden[s.index, : len(ids)]) for s, ids in zip(slots, lists, strict=True)]
        for slot in slots:
            decoder.rows.release(slot)
    return out


def assert_plain(lm: CausalLM, lists: list[list[int]], out: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for ids, found in zip(lists, out, strict=True):
            plain = lm.decoder.model(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(found, plain, atol=5e-5, rtol=1e-4)


def rows_of(model: Any, n: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, model.config.vocab_size, length + i % 3).tolist() for i in range(n)]


@pytest.mark.parametrize("name", SHAPES)
def test_states_are_those_of_the_plain_forward(name: str, passes: list[tuple[int, int]]) -> None:
    """Rows of different lengths, one token each or several, in one span or in three, with any number of lanes."""
    family, changes = SHAPES[name]
    lm = CausalLM(tiny_model(family, **changes), reuse=False)
    passes.clear()
    for n in (1, 2, 4, 5, 9, 17):
        if n <= MOST_LANES:
            lists = rows_of(lm.decoder.model, n, 5, seed=n)
            assert_plain(lm, lists, logits(lm, lists, [3, *[1] * 6] if 3 * n <= MOST_LANES else [1] * 9))
    assert set(passes) == {(0, lm.depth)}
    passes.clear()
    for depth in (1, 3):
        lm.engine.keep(depth)
    lists = rows_of(lm.decoder.model, 3, 6)
    passes.clear()
    assert_plain(lm, lists, logits(lm, lists, [2, 1, 1, 1, 1, 1, 1], (1, 3)))
    assert set(passes) == {(0, 1), (1, 3), (3, lm.depth)}
    passes.clear()
    assert_plain(lm, lists, logits(lm, lists, [1] * 8))  # one span, states kept on the way
    assert set(passes) == {(0, 1), (1, 3), (3, lm.depth)}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_numbers(threads: int) -> None:
    before = torch.get_num_threads()
    lm = CausalLM(tiny_model("qwen3"), reuse=False)
    lists = rows_of(lm.decoder.model, 3, 5)
    torch.set_num_threads(1)
    try:
        one = logits(lm, lists, [2, *[1] * 6])
        torch.set_num_threads(threads)
        for _ in range(20):  # a race would not show every time
            assert all(map(torch.equal, one, logits(lm, lists, [2, *[1] * 6])))
    finally:
        torch.set_num_threads(before)


def test_a_lane_depends_on_no_other(passes: list[tuple[int, int]]) -> None:
    """Beside others a row's states are, bit for bit, what they are among two."""
    lm = CausalLM(tiny_model("llama"), reuse=False)
    lists = [ids[:5] for ids in rows_of(lm.decoder.model, min(MOST_LANES, 20), 5)]
    whole = logits(lm, lists, [1] * 5)
    for i in range(0, len(lists) - 1, 2):
        with torch.no_grad():
            assert torch.equal(whole[i], logits(lm, [lists[i], lists[i + 1]], [1] * 5)[0])


@pytest.mark.parametrize("family", ["gemma2", "mistral", "olmo2", "gpt2", "granite"])
def test_other_blocks_run_as_they_are(family: str, passes: list[tuple[int, int]]) -> None:
    """Sliding windows, other norms, other attention, multipliers: block by block."""
    lm = CausalLM(tiny_model(family), reuse=False)
    lists = rows_of(lm.decoder.model, 2, 6)
    assert_plain(lm, lists, logits(lm, lists, [1] * 8))
    assert passes == []


def test_other_settings_run_as_they_are(passes: list[tuple[int, int]]) -> None:
    """float64, the switch, and more tokens than lanes."""
    for lm in (CausalLM(tiny_model("llama").double()), CausalLM(tiny_model("llama"), compiled=False)):
        lists = rows_of(lm.decoder.model, 2, 6)
        out = logits(lm, lists, [1] * 8)
        assert passes == []
        for ids, found in zip(lists, out, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(found, lm.decoder.model(input_ids=torch.tensor([ids])).logits[0])
    lm = CausalLM(tiny_model("llama"))
    passes.clear()
    lists = rows_of(lm.decoder.model, 3, MOST_LANES // 3 + 2)
    assert_plain(lm, lists, logits(lm, lists, [MOST_LANES]))
    assert passes == []


def test_what_the_owner_changes_is_seen(passes: list[tuple[int, int]]) -> None:
    """Hooks, replaced modules and methods run as the owner wrote them; new weights are read."""
    model: Any = tiny_model("llama")
    lm = CausalLM(model, reuse=False)
    lists = rows_of(model, 2, 5)
    block = model.model.layers[2]

    def run() -> bool:
        passes.clear()
        assert_plain(lm, lists, logits(lm, lists, [1] * 8))
        return bool(passes)

    assert run()
    for module in (block, block.mlp.act_fn, block.self_attn.q_proj):
        handle = module.register_forward_hook(_louder)
        assert not run()
        handle.remove()
        assert run()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, args: None)
    assert not run()
    handle.remove()
    block.mlp.forward = lambda x: torch.zeros_like(x)
    assert not run()
    del block.mlp.forward
    assert run()

    class Adapted(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 0.5

    old = block.mlp.up_proj
    block.mlp.up_proj = Adapted(old.in_features, old.out_features, bias=False)
    assert not run()
    block.mlp.up_proj = nn.Linear(old.in_features, old.out_features, bias=False)
    assert run()
    with torch.no_grad():
        block.mlp.down_proj.weight.mul_(0.5)
    block.self_attn.o_proj.weight = nn.Parameter(torch.randn_like(block.self_attn.o_proj.weight) / 8)
    block.input_layernorm.weight.data = torch.rand_like(block.input_layernorm.weight)
    assert run()
    old = block.mlp.gate_proj.weight.data
    block.mlp.gate_proj.weight.data = old.T.contiguous().T  # the same numbers, laid out otherwise
    assert not run()
    block.mlp.gate_proj.weight.data = old
    assert run()
    parametrize.register_parametrization(block.self_attn.k_proj, "weight", _Halved())
    assert not run()


def test_numbers_that_are_no_parameters_are_seen(passes: list[tuple[int, int]]) -> None:
    """Epsilon and scaling, set later: the same in all blocks they are compiled anew, else block by block."""
    model: Any = tiny_model("qwen3")
    lm = CausalLM(model, reuse=False)
    lists = rows_of(model, 2, 5)
    layers = list(model.model.layers)

    def run() -> bool:
        passes.clear()
        assert_plain(lm, lists, logits(lm, lists, [1] * 8))
        return bool(passes)

    assert run()
    for get, name in (
        (lambda layer: [layer.input_layernorm, layer.post_attention_layernorm], "variance_epsilon"),
        (lambda layer: [layer.self_attn.q_norm, layer.self_attn.k_norm], "variance_epsilon"),
        (lambda layer: [layer.self_attn], "scaling"),
    ):
        old, new = getattr(get(layers[0])[0], name), getattr(get(layers[0])[0], name) * 1.5 + 0.2
        for layer in layers[:-1]:
            for module in get(layer):
                setattr(module, name, new)
        assert not run(), "the last block has another one"
        setattr(get(layers[-1])[0], name, new)
        for module in get(layers[-1])[1:]:
            assert not run(), "two norms of a block differ"
            setattr(module, name, new)
        assert run()
        for layer in layers:
            for module in get(layer):
                setattr(module, name, old)
        assert run()


class _Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def _louder(module: nn.Module, args: Any, out: Any) -> Any:
    return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1


@pytest.mark.parametrize("wrong", ["granite's multipliers", "epsilon", "scaling", "a norm that adds one"])
def test_blocks_that_only_look_alike_are_found_out(
    wrong: str, monkeypatch: pytest.MonkeyPatch, passes: list[tuple[int, int]]
) -> None:
    """The mutants: whatever the compiled pass gets wrong, the check at the start turns it off."""
    family = "llama"
    if wrong.startswith("granite"):
        family = "granite"
        monkeypatch.setattr(blocks, "KNOWN", (*blocks.KNOWN, "GraniteDecoderLayer"))
        changes: dict[str, Any] = {"residual_multiplier": 0.5}
    else:
        changes = {}
        learn = blocks.Compiled._learn

        def mutant(self: blocks.Compiled) -> None:
            learn(self)
            if wrong == "epsilon":
                self._numbers[0] += 0.1
            elif wrong == "scaling":
                self._numbers[2] *= 1.1
            else:
                for at in range(0, len(self._slots), compiled.PER_LAYER):
                    self._slots[at] = ({"weight": self._slots[at][0]["weight"] + 1}, *self._slots[at][1:])

        monkeypatch.setattr(blocks.Compiled, "_learn", mutant)
    lm = CausalLM(tiny_model(family, **changes), reuse=False)
    assert passes, "it was tried"
    assert lm.decoder.body.passes is None
    passes.clear()
    lists = rows_of(lm.decoder.model, 2, 5)
    assert_plain(lm, lists, logits(lm, lists, [1] * 8))
    assert passes == []


def test_exp_of_attention_weights() -> None:
    x = np.concatenate([-np.logspace(-8, np.log10(86.9), 20_000), [0.0]]).astype(np.float32)
    found = np.array([compiled._exp(v) for v in x])
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=2e-7)
    assert compiled._exp(np.float32(-88.0)) == compiled._exp(np.float32(-np.inf)) == 0.0
    assert np.isnan(compiled._exp(np.float32(np.nan)))


def test_chains_are_the_same_with_and_without() -> None:
    """float32: equal tokens up to counted near-ties."""
    runs = []
    for on in (True, False):
        lm = CausalLM(tiny_model("llama"), reuse=False, compiled=on)
        prompts = [Prompt((3, 5, 7), key=1), Prompt((9, 2), key=2)]
        options: dict[str, Any] = {"max_new_tokens": 16, "block_size": 8, "steps": 12, "chains": 3, "alpha": 3.0}
        runs.append(powermc.power_sample(lm, prompts, **options))
    one, other = runs
    if one.draws != other.draws:
        assert one.near_ties["tokens"] + one.near_ties["accepts"] > 0
    else:
        for a, b in zip(one.infos, other.infos, strict=True):
            np.testing.assert_allclose(a["log_p"], b["log_p"], atol=1e-3)
