"""Linear layers for few rows: the same numbers, the owner's modules untouched and still looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from powermc.errors import ModelError
from powermc.lm import CausalLM
from powermc.lm.lean import _FEWEST, _MOST_TALL, FewRows, lean
from powermc.lm.product import available, product
from powermc.lm.tiles import MOST_LANES
from powermc.scheduling import run
from powermc.sequences import Prompt, Space, scored
from tests.lm.families import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, _FEWEST - 1, _FEWEST, 5, 8, 9, 16, 17, 32, 33, _MOST_TALL, _MOST_TALL + 1])
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
    """From 4 to 64 rows `nn.Linear`'s own forward is not asked; where `product` cannot be used, from 12."""
    asked: list[int] = []
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: asked.append(len(x)) or plain(self, x))
    single, double = lean(nn.Linear(8, 8)), lean(nn.Linear(8, 8).double())
    with torch.no_grad():
        for n in (1, 3, 4, 12, 64, 65):
            single(torch.zeros(n, 8))
        assert asked == [1, 3, 65] if available() else [1, 3, 4, 65]
        asked.clear()
        for n in (4, 11, 12, 64, 65):
            double(torch.zeros(n, 8, dtype=torch.float64))
    assert asked == [4, 11, 65]


@pytest.mark.skipif(not available(), reason="torch's OpenMP library has no GOMP_parallel")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (8, 16), (33, 50), (577, 64)])
def test_a_row_of_a_product_depends_on_no_other(shape: tuple[int, int], threads: int) -> None:
    """Any number of rows and threads, any remainder of outputs and of positions: the very same numbers."""
    before = torch.get_num_threads()
    torch.manual_seed(1)
    weight, x = torch.randn(shape), torch.randn(MOST_LANES, shape[1])
    torch.set_num_threads(threads)
    try:
        whole = product(x, weight)
        torch.testing.assert_close(whole.double(), x.double() @ weight.double().T, atol=1e-4, rtol=1e-5)
        for n in (2, 3, 4, 5, 8, 9, 16, 17):
            assert torch.equal(product(x[:n], weight), whole[:n])
        torch.testing.assert_close(product(x[:1], weight), whole[:1], atol=1e-4, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


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
