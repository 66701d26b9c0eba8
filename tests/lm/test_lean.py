"""Linear layers for few rows: the same numbers, the owner's modules untouched and still looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from powermc.errors import ModelError
from powermc.lm import CausalLM
from powermc.lm.lean import _FEWEST, _MOST, FewRows, lean
from powermc.scheduling import run
from powermc.sequences import Prompt, Space, scored
from tests.lm.families import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, _FEWEST - 1, _FEWEST, 17, _MOST, _MOST + 1])
def test_equals_the_layer(dtype: torch.dtype, bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).to(dtype)
    shadow = lean(layer)
    assert type(shadow) is FewRows
    assert type(layer) is nn.Linear
    assert shadow.weight is layer.weight
    for shape in ((rows, 24), (rows, 1, 24)):
        x = torch.randn(*shape, dtype=dtype)
        with torch.no_grad():
            a, b = layer(x), shadow(x)
        assert a.shape == b.shape
        assert b.is_contiguous()
        torch.testing.assert_close(a, b)


def test_few_rows_take_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 12 to 64 rows, and from 6 where the weights are large: `nn.Linear`'s own forward is not asked."""
    asked: list[int] = []
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: asked.append(len(x)) or plain(self, x))
    small, large = lean(nn.Linear(8, 8)), lean(nn.Linear(2**12, 2**12 + 1, bias=False, device="meta"))
    large.weight = nn.Parameter(torch.zeros(2**12 + 1, 2**12), requires_grad=False)
    with torch.no_grad():
        for n in (1, 5, 6, 11, 12, 64, 65):
            small(torch.zeros(n, 8))
        assert asked == [1, 5, 6, 11, 65]
        asked.clear()
        for n in (5, 6):
            large(torch.zeros(n, 2**12))
    assert asked == [5]


def test_subclasses_stay_what_they_are() -> None:
    class Adapted(nn.Linear):
        pass

    block = nn.Sequential(Adapted(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    shadow = lean(block)
    assert [type(m) for m in shadow.children()] == [Adapted, FewRows, nn.LayerNorm]
    assert [type(m) for m in block.children()] == [Adapted, nn.Linear, nn.LayerNorm]


def test_hooks_and_replaced_modules_of_the_owner_are_seen() -> None:
    """A forward hook, and a layer that the owner swaps deep inside a block after attaching."""
    model = tiny_model("llama").double()
    lm = CausalLM(model, reuse=False)
    block = model.model.layers[1]

    def log_p() -> float:
        lm.engine._prompts.clear()
        return run(scored(lm, Space(frozenset(), 3).path(Prompt((3, 5, 7)), (4, 9, 2)))).log_prob

    def plain() -> float:
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([[3, 5, 7, 4, 9, 2]])).logits[0].log_softmax(-1)
        return sum(float(logs[2 + t, token]) for t, token in enumerate((4, 9, 2)))

    before = log_p()
    handle = block.mlp.register_forward_hook(lambda module, args, output: 1.5 * output)
    assert log_p() == pytest.approx(plain(), abs=1e-9)
    assert log_p() != pytest.approx(before, abs=1e-3)
    handle.remove()
    assert log_p() == pytest.approx(before, abs=1e-9)
    old = block.mlp.down_proj
    block.mlp.down_proj = nn.Linear(old.in_features, old.out_features, bias=False).double()
    assert log_p() == pytest.approx(plain(), abs=1e-9)
    assert log_p() != pytest.approx(before, abs=1e-3)
    block.mlp.down_proj = old
    assert log_p() == pytest.approx(before, abs=1e-9)


def test_a_head_out_of_reach_gives_all_columns_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the head is no child of the model, few columns are refused, not replaced by all of them."""
    lm = CausalLM(tiny_model("llama"))
    states, few = torch.randn(13, lm.engine.cost.width), torch.tensor([1, 5])
    whole = lm.decoder.head(states)
    torch.testing.assert_close(lm.decoder.head(states, few), whole[:, few])
    monkeypatch.setattr(lm.decoder.model, "named_children", lambda: iter(()))
    torch.testing.assert_close(lm.decoder.head(states), whole)
    with pytest.raises(ModelError, match="keeps its head out of reach"):
        lm.decoder.head(states, few)
