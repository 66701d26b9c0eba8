"""Laws that every registered method is held to, on a tiny model in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from powermc.errors import ArgumentError
from powermc.evaluation import methods
from powermc.evaluation.methods import COUNTS, Method, Question, parse, prepared
from tests.methods_lab import (
    TERMS,
    TEXTS,
    lab,
    lens_file,
    log_p_of,
    model_of,
    questions,
    ready,
    shipped,
    specs,
    tokens_of,
)

NAMES = sorted(specs())
HUGGING_FACE = ("published", "published-batched")
"""They run by `generate`, which is slow and hands out float32 logits, and have faults where sequences end."""


def some(name: str) -> list[Question]:
    return questions(lab(), TEXTS[:2] if name in HUGGING_FACE else TEXTS)


def test_every_method_is_tested_here() -> None:
    assert shipped() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_paths_with_their_texts_and_log_p(name: str) -> None:
    model = lab()
    space, asked = model.space(TERMS.max_new_tokens, TERMS.stop), some(name)
    found = ready(name).answer(model, asked, TERMS, range(3))
    assert [len(row) for row in found.answers] == [3] * len(asked)
    cut = 0
    for question, row in zip(asked, found.answers, strict=True):
        for answer in row:
            short = name in HUGGING_FACE and not any(map(space.ends, beginnings(answer.tokens)))
            assert space.contains(answer.tokens) or short
            text = model.decode(answer.tokens)
            assert text.startswith(answer.text)
            assert not any(stop in answer.text for stop in TERMS.stop)
            assert answer.text == text or any(text[len(answer.text) :].startswith(stop) for stop in TERMS.stop)
            exact = log_p_of(model, question.prompt.ids, answer.tokens)
            assert answer.log_p == pytest.approx(exact, abs=1e-4 if name in HUGGING_FACE else 1e-9)
            cut += not space.ends(answer.tokens)
    assert found.counts["unfinished"] == cut
    assert set(found.counts) <= set(COUNTS)
    assert found.counts["drawn"] >= max(len(a.tokens) for row in found.answers for a in row)
    if ready(name).deterministic:
        assert all(len(set(row)) == 1 for row in tokens_of(found))


def beginnings(tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tokens[:n] for n in range(1, len(tokens) + 1)]


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_does_not_depend_on_what_else_is_asked(name: str) -> None:
    """Question by question, sample by sample, on few rows and in another order: the same."""
    model, few, method = lab(), model_of(max_rows=4), ready(name)
    asked = some(name)
    whole = tokens_of(method.answer(model, asked, TERMS, range(3)))
    for sample in (0, 2)[-1 if name in HUGGING_FACE else 0 :]:
        alone = [tokens_of(method.answer(model, [q], TERMS, range(sample, sample + 1)))[0] for q in asked]
        assert alone == [row[sample : sample + 1] for row in whole]
    backwards = tokens_of(method.answer(few, asked[::-1], TERMS, range(1, 3)))[::-1]
    assert backwards == [row[1:] for row in whole]
    skipping = tokens_of(method.answer(model, asked[:1], TERMS, range(0, 3, 2)))
    assert skipping == [whole[0][::2]]


@pytest.mark.parametrize("name", NAMES)
def test_equal_prompts_have_equal_answers_and_are_asked_once(name: str) -> None:
    model, method = lab(), ready(name)
    once = method.answer(model, questions(model, TEXTS[:1]), TERMS, range(2))
    twice = method.answer(model, questions(model, (TEXTS[0], TEXTS[0])), TERMS, range(2))
    assert tokens_of(twice) == tokens_of(once) * 2
    assert twice.spent.flops == once.spent.flops


@pytest.mark.parametrize("name", NAMES)
def test_the_ledger_of_the_model_is_charged_the_same_whatever_went_before(name: str) -> None:
    model, method = lab(), ready(name)
    asked, depth = some(name), model.depth
    method.answer(model, asked[:1], TERMS, range(1))
    before = model.ledger.copy()
    found = method.answer(model, asked, TERMS, range(2))
    assert model.ledger.since(before) == found.spent
    assert found.spent.prefilled >= sum(len(q.prompt.ids) for q in asked)
    assert found.spent.heads[depth] > 0
    assert found.spent.flops > 0 < found.spent.seconds
    assert sum(found.spent.span_flops.values()) > 0 < sum(found.spent.head_flops.values())
    again = method.answer(model, asked, TERMS, range(2))
    assert replace(again.spent, seconds=0) == replace(found.spent, seconds=0)
    assert again.counts == found.counts


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(name: str) -> None:
    model, method = lab(), ready(name)
    asked = some(name)
    here, there = (tokens_of(method.answer(model, asked, replace(TERMS, seed=s), range(3))) for s in (1, 2))
    assert (here == there) == method.deterministic
    assert any(len(set(row)) > 1 for row in here) != method.deterministic


@pytest.mark.parametrize("name", NAMES)
def test_specs_and_options_say_it_all(name: str) -> None:
    for method in (parse(name), parse(specs()[name]), ready(name)):
        assert parse(method.spec) == method
        assert type(method)(**json.loads(json.dumps(method.options()))) == method
    assert ready(name).prepare(lab(), [], TERMS) == ready(name)
    assert methods.get(name).about == methods.get(name).about.strip() != ""
    assert parse(name) == methods.get(name)()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_asked_and_nothing_is_answered(name: str) -> None:
    model, method = lab(), ready(name)
    assert method.answer(model, [], TERMS, range(2)).answers == []
    assert method.answer(model, questions(model), TERMS, range(0)).answers == [[]] * len(TEXTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_does_not_fit_is_refused(name: str) -> None:
    model = lab()
    with pytest.raises(ArgumentError, match="exceeds the model's context of 64"):
        ready(name).answer(model, questions(model, ["w1 " * 60]), TERMS, range(1))


def test_what_preparing_costs_can_be_had() -> None:
    model = lab()
    prompts = [q.prompt for q in questions(model)]
    assert prepared(parse("greedy"), model, prompts, TERMS).spent.flops == 0
    method: Method = parse(f"early-exit:lens={lens_file()}:block_size=3:steps=2:gated=0.4")
    found = prepared(method, model, prompts, TERMS)
    assert found.spent.flops > 0
    assert found.method.options()["gated"] is None
    assert not math.isnan(found.method.options()["eta"])


BAD = [
    ("temperature:temperature=0", r"temperature:temperature must be a finite number > 0, or none for 1/alpha, got 0"),
    ("temperature:temperature=nan", r"temperature:temperature must be a finite number > 0"),
    ("nucleus:temperature=inf", r"nucleus:temperature must be a finite number > 0"),
    ("nucleus:top_p=0", r"nucleus:top_p must be above 0 and at most 1, got 0"),
    ("nucleus:top_p=1.5", r"nucleus:top_p must be above 0 and at most 1, got 1.5"),
    ("beam:width=0", r"beam:width must be an integer >= 1, got 0"),
    ("beam:length_penalty=nan", r"beam:length_penalty must be a finite number, got nan"),
    ("best-of-n:n=0", r"best-of-n:n must be an integer >= 1, got 0"),
    ("self-consistency:n=0", r"self-consistency:n must be an integer >= 1, got 0"),
    ("first-finish:n=-1", r"first-finish:n must be an integer >= 1, got -1"),
    ("published:steps=-1", r"published:steps must be an integer >= 0, got -1"),
    ("published-batched:chains=0", r"published-batched:chains must be an integer >= 1, got 0"),
    ("power:cut=no", r"unknown cut law 'no'"),
    ("power:steps=-1", r"steps must be an integer >= 0, got -1"),
    ("power:speculate=-1", r"power:speculate must be an integer >= 0, got -1"),
    ("early-exit:proposal=no", r"unknown proposal 'no'"),
    ("early-exit:layer=0", r"early-exit:layer must be an integer >= 1, got 0"),
    ("early-exit:head=big", r"early-exit:head must be one of lens, temperature, ridge, kl, got 'big'"),
    ("early-exit:lens=/no/such", r"there is no file /no/such"),
    ("early-exit:eta=1:gated=0.5", r"gated fits eta, so that only one of the two can be given"),
    ("dola:layers=middle", r"dola:layers must be low, high or depths joined by \+, such as 12\+16, got 'middle'"),
    ("dola:layers=1+", r"dola:layers must be low, high"),
    ("dola:plausible=0", r"dola:plausible must be above 0 and at most 1, got 0"),
    ("self-speculative:tokens=0", r"self-speculative:tokens must be an integer >= 1, got 0"),
]


@pytest.mark.parametrize(("spec", "message"), BAD)
def test_options_of_no_use_are_refused_before_any_work(spec: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse(spec)


def test_options_that_the_model_does_not_allow() -> None:
    model = lab()
    asked, few = questions(model), model_of(max_rows=4)
    prompts = [q.prompt for q in asked]
    for spec in ("beam:width=5", "first-finish:n=5"):
        with pytest.raises(ArgumentError, match="5 rows side by side were asked for and the model has 4"):
            parse(spec).answer(few, asked, TERMS, range(1))
    with pytest.raises(ArgumentError, match=r"layers 2, 6 are out of range: .* has 6 layers, choose some of 1 to 5"):
        parse("dola:layers=2+6").answer(model, asked, TERMS, range(1))
    with pytest.raises(ArgumentError, match=r"dola:layers=low holds no layer of 3; name some: layers=1\+2"):
        parse("dola").answer(model_of(layers=3), asked, TERMS, range(1))
    with pytest.raises(ArgumentError, match="has a temperature head at layer 3, not 'kl'"):
        parse(f"early-exit:lens={lens_file()}:layer=3:head=kl").prepare(model, prompts, TERMS)
    with pytest.raises(ArgumentError, match="the lens has no head at layer 2; it has 3, 4"):
        parse(f"self-speculative:lens={lens_file()}:layer=2").prepare(model, prompts, TERMS)


@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        ("early-exit", "lens or no layer"),
        ("self-speculative:layer=3", "lens or no layer"),
        ("early-exit:lens={lens}:layer=3:gated=0.5", "eta"),
        ("early-exit:lens={lens}:layer=3:proposal=substitution", "screen"),
        ("power-auto", "kernel"),
    ],
)
def test_what_has_not_been_prepared_is_refused(spec: str, missing: str) -> None:
    model = lab()
    with pytest.raises(ArgumentError, match=f"has no {missing} yet: call `prepare` first"):
        parse(spec.format(lens=lens_file())).answer(model, questions(model), TERMS, range(1))
