"""The laws of decoding token by token: greedy, temperature, nucleus, beam search, layer contrast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from powermc.choices import Stream, inverse_cdf
from powermc.evaluation.methods import Question, Terms, parse
from powermc.evaluation.methods.beams import Beam
from powermc.evaluation.methods.plain import nucleus
from powermc.lm import CausalLM
from powermc.lm.contrast import divergence
from powermc.sequences import Prompt
from powermc.sequences.path import Tokens
from powermc.testing import chi_square_p, sequential_test
from tests.lm.families import EOS
from tests.lm.test_loading import tokenizer
from tests.lm.toys import all_paths, toy_lm
from tests.methods_lab import TERMS, TEXTS, lab, log_p_of, model_of, next_log_p, questions, tokens_of

LONG = Terms(max_new_tokens=14, alpha=2.0, seed=5)


def generated(model: CausalLM, prompt: Tokens, horizon: int, **how: object) -> Tokens:
    """What `generate` says, by the settings given and no others."""
    config = GenerationConfig(do_sample=False, max_new_tokens=horizon, eos_token_id=list(EOS), pad_token_id=0, **how)
    ids = torch.tensor([prompt])
    out = model.decoder.model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
    tokens = tuple(out[0, len(prompt) :].tolist())
    end = next((i for i, token in enumerate(tokens) if token in EOS), len(tokens) - 1)
    return tokens[: end + 1]


# Greedy.


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_is_what_generate_does_without_sampling(seed: int) -> None:
    model = model_of(seed=seed)
    asked = questions(model)
    found = tokens_of(parse("greedy").answer(model, asked, LONG, range(1)))
    assert found == [[generated(model, q.prompt.ids, 14)] for q in asked]
    assert len(set(map(len, itertools.chain(*found)))) > 1


def test_the_ledger_of_greedy_counted_anew() -> None:
    """Prompts once, then every token but the last of each answer in a pass of its own; one head per token."""
    model = lab()
    asked = questions(model)
    found = parse("greedy").answer(model, asked, LONG, range(2))
    lengths = [len(row[0].tokens) for row in found.answers]
    prompts, depth = [len(q.prompt.ids) for q in asked], model.depth
    spent, cost = found.spent, model.engine.cost
    assert (spent.prefilled, spent.decoded) == (sum(prompts), sum(lengths) - len(asked))
    assert spent.heads == {depth: sum(lengths)}
    assert spent.ticks == max(lengths) - 1
    assert found.counts["drawn"] == sum(lengths)
    assert spent.head_flops[depth] == sum(lengths) * cost.head


def test_the_flops_of_greedy_are_those_that_torch_counts() -> None:
    model = model_of(eager=True, reuse=False, compiled=False)
    (asked, *_) = questions(model)
    parse("greedy").answer(model, [asked], LONG, range(1))
    with FlopCounterMode(display=False) as counter:
        found = parse("greedy").answer(model, [asked], LONG, range(1))
    assert found.spent.flops == pytest.approx(counter.get_total_flops(), rel=0.03)


# Temperature and nucleus: every token drawn again, by hand.


def by_hand(
    model: CausalLM, prompt: Tokens, purpose: str, sample: int, law: Callable[[np.ndarray], np.ndarray]
) -> Tokens:
    """The path that inverse CDF draws from `law(log p)`, -inf where nothing is drawn, of the plain forward."""
    key, space, tokens = model.prompt(TEXTS[0]).key, model.space(LONG.max_new_tokens), ()
    for text in TEXTS:
        if model.prompt(text).ids == prompt:
            key = model.prompt(text).key
    stream = Stream(LONG.seed, prompt=key, chain=sample).step(0).at(purpose)
    while len(tokens) < LONG.max_new_tokens and not (tokens and space.ends(tokens)):
        log_p = next_log_p(model, (*prompt, *tokens))[-1].double().numpy()
        tokens: Tokens = (*tokens, inverse_cdf(law(log_p), stream.at("token", len(tokens)).uniform()))
    return tokens


def cut_to(top_p: float, temperature: float) -> Callable[[np.ndarray], np.ndarray]:
    """The law of nucleus sampling, by sorting everything and adding up one by one."""

    def law(log_p: np.ndarray) -> np.ndarray:
        p = np.exp(log_p / temperature) / np.exp(log_p / temperature).sum()
        held, kept = 0.0, np.full(len(p), -np.inf)
        for token in sorted(range(len(p)), key=lambda v: -p[v]):
            kept[token] = np.log(p[token])
            held += p[token]
            if held >= top_p:
                break
        return kept

    return law


@pytest.mark.parametrize(
    ("spec", "purpose", "law"),
    [
        ("temperature", "temperature", lambda log_p: log_p),
        ("temperature:temperature=0.9", "temperature", lambda log_p: log_p / 0.9),
        ("temperature:temperature=none", "temperature", lambda log_p: 2 * log_p),
        ("low-temperature", "temperature", lambda log_p: 2 * log_p),
        ("nucleus:top_p=0.6", "nucleus", cut_to(0.6, 1.0)),
        ("nucleus:top_p=0.9:temperature=1.4", "nucleus", cut_to(0.9, 1.4)),
        ("nucleus:top_p=1", "nucleus", lambda log_p: log_p),
    ],
)
def test_every_token_drawn_again_by_hand(spec: str, purpose: str, law: Callable[[np.ndarray], np.ndarray]) -> None:
    model = lab()
    asked = questions(model)[:2]
    found = tokens_of(parse(spec).answer(model, asked, LONG, range(2)))
    assert found == [[by_hand(model, q.prompt.ids, purpose, s, law) for s in range(2)] for q in asked]


def test_the_law_of_a_nucleus_by_hand() -> None:
    p = np.array([0.1, 0.4, 0.05, 0.4, 0.05])

    def held(top_p: float) -> list[int]:
        return np.flatnonzero(nucleus(np.log(p) + 3.0, top_p) > -np.inf).tolist()

    assert [held(x) for x in (0.3, 0.5, 0.8001, 0.92, 0.97, 1.0)] == [
        *([1], [1, 3], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    ]
    assert nucleus(np.log(p), 0.5)[1] == np.log(p)[1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_of_whole_answers(temperature: float) -> None:
    """Sequential test of chi-square p-values at a false-positive rate of 1e-6: 600 answers at first. That of
    temperature 2 differs by a total variation above .1 and fails."""
    model = toy_lm(3)
    model.text._tokenizer = tokenizer()
    space = model.space(2)
    paths = all_paths(space, 3)
    prompt = Prompt((0, 1, 0, 2))
    seeds = itertools.count()

    def law(heat: float) -> np.ndarray:
        rows = [next_log_p(model, (*prompt.ids, *x.tokens))[3:-1] / heat for x in paths]
        return np.array([float(r.log_softmax(-1)[range(len(r)), list(x.tokens)].sum().exp()) for r, x in
                         zip(rows, paths, strict=True)])  # fmt: skip

    def p_value(n: int, heat: float = temperature) -> float:
        terms = Terms(max_new_tokens=2, seed=next(seeds))
        method = parse(f"temperature:temperature={temperature}")
        (row,) = tokens_of(method.answer(model, [Question("", prompt, str)], terms, range(n)))
        counts = np.array([row.count(x.tokens) for x in paths])
        return chi_square_p(counts, law(heat))

    assert law(temperature).sum() == pytest.approx(1.0)
    assert np.abs(law(temperature) - law(2.0)).sum() / 2 > 0.1
    assert sequential_test(p_value, n=600).passed
    assert p_value(600, 2.0) < 1e-6


# Beam search.


def best_of_all(model: CausalLM, prompt: Tokens, horizon: int, penalty: float) -> tuple[float, Tokens]:
    """The best score of all paths, by walking through all of them."""
    space = model.space(horizon)

    def walk(tokens: Tokens, log_p: float) -> tuple[float, Tokens]:
        if tokens and (space.ends(tokens) or len(tokens) == horizon):
            return log_p / len(tokens) ** penalty, tokens
        row = next_log_p(model, (*prompt, *tokens))[-1].tolist()
        return max(walk((*tokens, v), log_p + x) for v, x in enumerate(row))

    return walk((), 0.0)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_wide_beam_finds_the_best_of_all_paths(penalty: float, seed: int) -> None:
    model = toy_lm(4, seed=seed)
    model.text._tokenizer = tokenizer()
    prompt, terms = Prompt((0, 1, 0, 2)), Terms(max_new_tokens=4)
    asked = [Question("", prompt, str)]
    found = Beam(100, penalty).answer(model, asked, terms, range(1)).answers[0][0]
    score, tokens = best_of_all(model, prompt.ids, 4, penalty)
    assert found.tokens == tokens
    assert found.log_p / len(tokens) ** penalty == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 4])
def test_beam_search_is_that_of_generate(width: int, penalty: float) -> None:
    model = lab()
    asked = questions(model)
    method = parse(f"beam:width={width}:length_penalty={penalty}")
    found = tokens_of(method.answer(model, asked, LONG, range(1)))
    how = {"num_beams": width, "length_penalty": penalty, "early_stopping": "never"}
    assert found == [[generated(model, q.prompt.ids, 14, **how)] for q in asked]


def test_one_beam_is_greedy_and_more_find_likelier_answers() -> None:
    model = lab()
    asked = questions(model)
    greedy = parse("greedy").answer(model, asked, LONG, range(1))
    one, four = (parse(f"beam:width={w}:length_penalty=0").answer(model, asked, LONG, range(1)) for w in (1, 4))
    assert tokens_of(one) == tokens_of(greedy)
    gain = [b[0].log_p - a[0].log_p for a, b in zip(greedy.answers, four.answers, strict=True)]
    assert sum(gain) > 1  # not for each: a beam may drop what greedy decoding goes through


# Layer contrast.


def dola_by_hand(model: CausalLM, prompt: Tokens, depths: tuple[int, ...], norm: bool, horizon: int) -> Tokens:
    """DoLa by the formulas of the paper, on `output_hidden_states` of the plain forward."""
    hf, space, tokens = model.decoder.model, model.space(horizon), ()
    while len(tokens) < horizon and not (tokens and space.ends(tokens)):
        with torch.no_grad():
            out = hf(input_ids=torch.tensor([[*prompt, *tokens]]), output_hidden_states=True)  # type: ignore[operator]
            last, chosen, far = out.logits[0, -1].softmax(-1), None, -1.0
            for depth in depths:
                state = out.hidden_states[depth][0, -1]
                early = hf.lm_head(hf.model.norm(state) if norm else state).softmax(-1)  # type: ignore[operator,union-attr]
                middle = (last + early) / 2
                apart = sum(float((x * (x / middle).log()).sum()) for x in (last, early)) / 2
                assert apart == pytest.approx(float(divergence(last.log()[None], early.log()[None])))
                if apart > far:
                    chosen, far = early, apart
        score = (last / chosen).log()
        score[last < 0.1 * last.max()] = -math.inf
        tokens: Tokens = (*tokens, int(score.argmax()))
    return tokens


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("layers", "depths"), [("low", (2,)), ("high", (4,)), ("1+3+5+4", (1, 3, 4, 5))])
def test_dola_by_hand(layers: str, depths: tuple[int, ...], norm: bool) -> None:
    model = lab()
    asked = questions(model)[:2]
    found = parse(f"dola:layers={layers}:norm={norm}").answer(model, asked, LONG, range(1))
    assert tokens_of(found) == [[dola_by_hand(model, q.prompt.ids, depths, norm, 14)] for q in asked]
    assert found.answers[0][0].log_p == pytest.approx(
        log_p_of(model, asked[0].prompt.ids, found.answers[0][0].tokens), abs=1e-9
    )
    assert {d: n for d, n in found.spent.heads.items() if n} == dict.fromkeys((*depths, 6), found.counts["drawn"])


def test_dola_is_neither_greedy_nor_one_layer_and_leaves_no_depth_behind() -> None:
    model = lab()
    before = model.decoder.rows.depths
    asked = questions(model)
    found = [tokens_of(parse(s).answer(model, asked, TERMS, range(1))) for s in ("greedy", "dola", "dola:layers=1+5")]
    assert found[0] != found[1] != found[2] != found[0]
    assert model.decoder.rows.depths == before


@pytest.mark.parametrize(
    ("layers", "half", "depths"),
    [
        (32, "low", range(2, 16, 2)),
        (32, "high", range(16, 32, 2)),
        (30, "high", range(16, 30, 2)),
        (60, "low", range(2, 20, 2)),
        (60, "high", range(40, 60, 2)),
    ],
)
def test_the_layers_of_the_two_halves(layers: int, half: str, depths: range) -> None:
    assert parse(f"dola:layers={half}").depths(layers) == list(depths)  # type: ignore[attr-defined]


# Mutants: each is caught by a law above.


def one_too_few(log_weights: np.ndarray, top_p: float) -> np.ndarray:
    """A nucleus without the token that brings it over `top_p`."""
    kept = nucleus(log_weights, top_p)
    if np.isfinite(kept).sum() > 1:
        kept[np.where(np.isfinite(kept), kept, np.inf).argmin()] = -np.inf
    return kept


def implausible(last: torch.Tensor, early: torch.Tensor, plausible: float) -> torch.Tensor:
    """A contrast over all tokens."""
    return last - early


def one_sided(last: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
    """KL(early || last) for the divergence."""
    return (early.exp() * (early - last)).sum(-1, keepdim=True)


MUTANTS: list[tuple[str, Any, Callable[[], None]]] = [
    (
        "powermc.evaluation.methods.plain.nucleus",
        one_too_few,
        lambda: test_every_token_drawn_again_by_hand("nucleus:top_p=0.6", "nucleus", cut_to(0.6, 1.0)),
    ),
    (
        "powermc.evaluation.methods.plain.likeliest",
        lambda log_weights, choices: int(np.argsort(log_weights)[-2]),
        lambda: test_greedy_is_what_generate_does_without_sampling(0),
    ),
    ("powermc.lm.contrast.contrasted", implausible, lambda: test_dola_by_hand("low", (2,), False)),
    ("powermc.lm.contrast.divergence", one_sided, lambda: test_dola_by_hand("1+3+5+4", (1, 3, 4, 5), False)),
]


@pytest.mark.parametrize(("where", "mutant", "law"), MUTANTS, ids=[where.rpartition(".")[2] for where, *_ in MUTANTS])
def test_the_laws_catch_mutants(
    where: str, mutant: Any, law: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, mutant)
    with pytest.raises(AssertionError):
        law()
