"""Models whose cache cannot be addressed by slots: sampled without one, exactly, with a warning of what is lost."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from powermc import Prompt, calibrate, power_sample
from powermc.cli.doctor import splits
from powermc.cli.sample import load
from powermc.cli.show import console
from powermc.errors import ModelError, NotSlotAddressable
from powermc.lm import CausalLM
from powermc.lm.decoder import Work
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.lm.recompute import Recomputing
from powermc.scheduling import run
from powermc.sequences import Entropy, Length, Path, Space
from powermc.testing import prove
from tests.lm.families import UNCACHED, tiny_model
from tests.lm.test_lm_exactness import suffix_kernel
from tests.lm.test_oracle_laws import PROMPTS, TOLERANCE, deviation, sample
from tests.lm.toys import all_paths, toy_lm

LOST = r"is sampled without a cache: each token is a pass over its whole prefix; early exits are off \("


def attached(model: PreTrainedModel, **options: Any) -> CausalLM:
    """The model, with the warning that it must give."""
    with pytest.warns(RuntimeWarning, match=rf"^{type(model).__name__} {LOST}") as given:
        lm = CausalLM(model, **options)
    assert [w.filename for w in given] == [__file__], "one warning, at the caller"
    return lm


def toy(family: str, vocab: int = 3) -> CausalLM:
    with pytest.warns(RuntimeWarning, match=LOST):
        return toy_lm(vocab, family=family)


class Counted:
    """The shapes (rows, tokens) of what the body of a model is given, once `lm` is attached."""

    def __init__(self, lm: CausalLM) -> None:
        self.calls: list[tuple[int, int]] = []
        states = lm.decoder._states  # type: ignore[attr-defined]

        def counted(ids: list[list[int]]) -> torch.Tensor:
            self.calls.append((len(ids), len(ids[0])))
            return states(ids)

        lm.decoder._states = counted  # type: ignore[attr-defined]

    @property
    def tokens(self) -> int:
        return sum(rows * tokens for rows, tokens in self.calls)


QUICK = ("bloom (ALiBi)", "gpt-neo", "gpt (the first)", "lfm2")


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in UNCACHED])
def test_states_agree_with_the_plain_forward(family: str) -> None:
    """Batched = single and kept = recomputed, after accepted and rejected proposals, fewer rows than chains.

    Mamba in float64: in float32 a peaked one alone differs by 4e-4 between batch shapes.
    """
    model = tiny_model(family)
    model = model.double() if family.startswith("mamba") else model
    lm = attached(model, max_rows=5)
    steps = sample(lm, chains=2)
    infos = [s.info for chain in steps.values() for s in chain]
    assert any(i["accepted"] for i in infos), "the test needs accepted moves"
    assert any(not i["accepted"] and not i["null"] for i in infos), "and rejected ones"
    paths = {(key, s.state.value): s.state.value for key, chain in steps.items() for s in chain}
    assert max(deviation(model, path, 1 / 0.7) for path in paths.values()) <= TOLERANCE
    assert not lm.decoder.rows.used, "every row was given back"


@pytest.mark.parametrize(
    ("cut", "horizon"), [(Length(), 2), (Entropy(), 2), pytest.param(Length(), 3, marks=pytest.mark.slow)]
)
def test_suffix_kernel_is_exact_on_bloom(cut: Any, horizon: int) -> None:
    """Enumerated in float64 through kept states and recomputed passes."""
    space = Space(frozenset({2}), horizon)
    found = prove(suffix_kernel(toy("bloom (ALiBi)"), space, cut), all_paths(space, 3))
    assert found.pi.max() > 0.25, "the model should be peaked"


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_suffix_kernel_is_exact_on_mamba(alpha: float) -> None:
    space = Space(frozenset({1, 3}), 2)
    prove(suffix_kernel(toy("mamba", 4), space, Length(), alpha=alpha, temperature=0.7), all_paths(space, 4))


class _NewTokensOnly(Recomputing):
    """Mutant: runs the tokens that are new and not what comes before them, as one would with a cache."""

    def _states(self, ids: list[list[int]]) -> torch.Tensor:
        used = self.rows.used if hasattr(self, "rows") else []
        start = min((s.filled[self.layers] for s in used if s.filled[self.layers] < len(ids[0])), default=0)
        states = super()._states([row[start:] for row in ids])
        return torch.cat([states.new_zeros(len(ids), start, states.shape[-1]), states], dim=1)


@pytest.mark.parametrize("family", ["bloom (ALiBi)", "mamba"])
def test_mutant_without_the_prefix_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="cannot be driven without a cache: its logits differ"):
        _NewTokensOnly(tiny_model(family), 4, "a reason")


class _Padded(Recomputing):
    """Mutant: rows of all lengths run together, the shorter ones padded on the left; past the attach check."""

    def _check(self) -> float:
        return 0.0

    def forward(self, work: Sequence[Work], first: int, last: int) -> int:
        stops = [w.slot.filled[last] + w.n for w in work]
        n = max(stops)
        states = self._states([[0] * (n - stop) + list(w.ids[:stop]) for w, stop in zip(work, stops, strict=True)])
        for w, stop, own in zip(work, stops, states, strict=True):
            start = w.slot.filled[last]
            self.rows.hidden[last][w.slot.index, start:stop] = own[n - stop + start :]
            w.slot.filled[last] = stop
        return n


@pytest.mark.parametrize(
    "mutant", [pytest.param(False, id="exact", marks=pytest.mark.slow), pytest.param(True, id="padded")]
)
def test_mutant_of_padded_rows_is_not_exact(mutant: bool) -> None:
    """States then depend on which rows ran together, and the kernel is that of no law."""
    lm, space = toy("mamba"), Space(frozenset({2}), 3)
    lm.decoder.__class__ = _Padded if mutant else Recomputing
    kernel = suffix_kernel(lm, space, Length())
    if not mutant:
        prove(kernel, all_paths(space, 3))
        return
    with pytest.raises(AssertionError, match=r"differ|unbalanced|sums to|came to other"):
        prove(kernel, all_paths(space, 3))


def test_ledger_counts_every_token_run() -> None:
    """A draft of n tokens behind a prompt of P runs P + 1, ..., P + n - 1 tokens, and the ledger says so."""
    lm = attached(tiny_model("bloom (ALiBi)"))
    seen, prompt, space = Counted(lm), Prompt((1, 2, 4, 6)), Space(frozenset(), 5)

    def drawn() -> Any:
        path = yield lm.score(Path(prompt, (), finished=False), (1.0,))
        from powermc.choices import Stream
        from powermc.sequences.suffix import draft

        return (yield from draft(lm, space, path, 0, 1.0, Stream(0)))

    path = run(drawn())[0]
    assert len(path) == 5
    assert seen.tokens == lm.ledger.tokens(0, lm.depth) == 4 + sum(range(5, 9))
    assert (lm.ledger.prefilled, lm.ledger.decoded) == (4, sum(range(5, 9)))
    assert (lm.ledger.prefills, lm.ledger.ticks) == (1, 4)
    assert len(seen.calls) == 5
    per_token = sum(lm.engine.cost.linear)
    assert lm.ledger.span_flops.total() >= per_token * seen.tokens


def test_ledger_of_chains_adds_up() -> None:
    """Rows of several lengths side by side, each length in a call of its own."""
    lm = attached(tiny_model("mamba"), max_rows=4)
    seen = Counted(lm)
    sample(lm, chains=2)
    assert seen.tokens == lm.ledger.prefilled + lm.ledger.decoded
    assert len(seen.calls) > lm.ledger.prefills + lm.ledger.ticks


def test_long_rows_are_split_into_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("powermc.lm.recompute._CALL_TOKENS", 20)
    model = tiny_model("mamba")
    lm = attached(model)
    seen = Counted(lm)
    steps = sample(lm, chains=3, prompts=PROMPTS[:2])
    assert any(rows > 1 for rows, _ in seen.calls)
    assert all(rows == 1 or rows * tokens <= 20 for rows, tokens in seen.calls)
    assert deviation(model, steps[1, 0][-1].state.value, 1 / 0.7) <= TOLERANCE


def test_early_exits_are_off() -> None:
    lm = attached(tiny_model("mamba"))
    with pytest.raises(ModelError, match=r"cannot be run in two parts at layer 2: .*early exits are off"):
        EarlyExit(lm, ExitHead(2))
    texts = [[(5 * i + j) % 37 for i in range(40)] for j in range(40)]
    with pytest.raises(ModelError, match="early exits are off"):
        calibrate(lm, texts)
    assert lm.engine.rows.depths == (lm.depth,)
    (line,) = splits(lm)
    assert line.startswith("none: each token is a pass over its whole prefix; early exits are off (Mamba")
    assert "each token is a pass over its whole prefix" in lm.describe()["lost"]


def test_power_sample_runs_and_repeats() -> None:
    lm = attached(tiny_model("mamba"), max_rows=3)
    prompts = [Prompt((1, 2, 4)), Prompt((7, 9, 2, 6, 11))]
    settings: dict[str, Any] = {"max_new_tokens": 8, "block_size": 4, "steps": 3, "chains": 2, "alpha": 2.0}
    first, second = (power_sample(lm, prompts, **settings, seed=5) for _ in range(2))
    assert first.paths == second.paths
    assert all(path is not None for path in itertools.chain(*first.paths))


def test_what_is_not_causal_is_refused() -> None:
    """Without a cache too: its states change with what follows."""
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(vocab_size=37, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = BertLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    with pytest.raises(ModelError, match=r"BertLMHeadModel cannot be driven without a cache: .*depend on later tokens"):
        CausalLM(model)  # type: ignore[arg-type]


def test_the_command_line_says_it_in_one_line(monkeypatch: Any, capsys: Any) -> None:
    model = tiny_model("mamba")
    monkeypatch.setattr(CausalLM, "from_pretrained", lambda name: CausalLM(model))
    load("any", {}, console(sys.stderr), quiet=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: MambaForCausalLM is sampled without a cache: each token is a pass over")


def test_what_has_slots_keeps_them() -> None:
    """No warning, and none of the slow path, for a model that rows can drive."""
    lm = CausalLM(tiny_model("llama"))
    assert not isinstance(lm.decoder, Recomputing)
    assert lm.describe()["lost"] is None


def test_the_error_is_a_model_error() -> None:
    assert issubclass(NotSlotAddressable, ModelError)
