"""The laws of methods that draw several answers and give one, or that guess, screen and accept."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from powermc import power_sample
from powermc.choices import Stream
from powermc.errors import NonFiniteLogits
from powermc.evaluation.methods import Answers, Question, Terms, parse, prepared
from powermc.evaluation.methods.call import Call, Joint, Key, Together
from powermc.evaluation.methods.voting import majority
from powermc.evaluation.published import Generate, Published
from powermc.lm import Lens
from powermc.lm.calibration import cache_path
from powermc.lm.guesses import Counted, LikeliestAtExit
from powermc.sequences.path import Path
from powermc.types import PENDING
from tests.methods_lab import TERMS, lab, lens_file, log_p_of, model_of, questions, ready, specs, tokens_of

LONG = Terms(max_new_tokens=14, alpha=2.0, seed=5)


def drawn(purpose: str, terms: Terms, samples: int, candidates: int) -> list[list[list[Path]]]:
    """What is drawn for each question, sample and candidate."""
    call = Call(lab(), questions(lab()), terms, range(samples))
    found = call.draws(purpose, candidates=candidates)
    return [
        [[found[Key(p, s, c)] for c in range(candidates)] for s in range(samples)] for p in range(len(call.prompts))
    ]


# Votes.


def test_best_of_n_is_the_likeliest() -> None:
    found = parse("best-of-n:n=5").answer(lab(), questions(lab()), LONG, range(2))
    places = set()
    for row, paths in zip(found.answers, drawn("best-of-n", LONG, 2, 5), strict=True):
        for answer, candidates in zip(row, paths, strict=True):
            log_p = [log_p_of(lab(), c.prompt.ids, c.tokens) for c in candidates]
            places.add(int(np.argmax(log_p)))
            assert answer.tokens == candidates[int(np.argmax(log_p))].tokens
            assert answer.log_p == pytest.approx(max(log_p))
    assert len(places) > 1
    assert found.counts["drawn"] == sum(len(x) for p in drawn("best-of-n", LONG, 2, 5) for s in p for x in s)


@pytest.mark.parametrize(
    ("stated", "place"),
    [
        (["a", "b", "b"], 1),
        (["a", "b", "b", "a"], 0),
        ([None, "c", None, None], 1),
        ([None, None], 0),
        (["x", "a", "b", "b", "a"], 1),
        ([None, "b", "a", "a"], 2),
    ],
)
def test_the_majority_and_its_ties(stated: list[str | None], place: int) -> None:
    assert majority(stated) == place


def test_self_consistency_gives_the_first_answer_of_the_majority() -> None:
    model = lab()
    asked = questions(model)
    found = parse("self-consistency:n=6").answer(model, asked, LONG, range(2))
    won = 0
    for question, row, samples in zip(asked, found.answers, drawn("self-consistency", LONG, 2, 6), strict=True):
        for answer, paths in zip(row, samples, strict=True):
            stated = [question.read(model.decode(path.tokens)) for path in paths]
            votes = {s: stated.count(s) for s in stated if s is not None}
            top = [s for s in votes if votes[s] == max(votes.values())]
            first = next((i for i, s in enumerate(stated) if s in top), 0)
            assert answer.tokens == paths[first].tokens
            won += first > 0
    assert won


def test_questions_with_one_prompt_are_read_each_in_its_own_way() -> None:
    model = lab()
    (asked, *_) = questions(model)
    last = asked._replace(read=lambda text: text.split()[-1] if text else None)
    both = parse("self-consistency:n=6").answer(model, [asked, last], LONG, range(6))
    alone = parse("self-consistency:n=6").answer(model, [last], LONG, range(6))
    assert tokens_of(both)[1] == tokens_of(alone)[0] != tokens_of(both)[0]
    assert both.spent.flops == alone.spent.flops


# The first to end.


def test_first_finish_is_the_first_to_end_and_runs_no_more_than_that() -> None:
    model, n = lab(), 4
    asked = questions(model)
    found = parse(f"first-finish:n={n}").answer(model, asked, LONG, range(2))
    ties, late, whole = 0, 0, 0
    for row, samples in zip(found.answers, drawn("first-finish", LONG, 2, n), strict=True):
        for answer, paths in zip(row, samples, strict=True):
            ended = [(len(x), i) for i, x in enumerate(paths) if x.finished]
            first = min(ended)[1] if ended else 0
            assert answer.tokens == paths[first].tokens
            assert answer.log_p == pytest.approx(paths[first].log_prob, abs=1e-9)
            ties += sum(length == min(ended)[0] for length, _ in ended) > 1 if ended else 0
            late += first > 0
            whole += sum(map(len, paths))
    assert late
    lengths = [len(a.tokens) for row in found.answers for a in row]
    assert found.counts["drawn"] == n * sum(lengths)
    prompts = sum(len(q.prompt.ids) for q in asked)
    assert found.spent.tokens(0, model.depth) - prompts <= n * sum(length - 1 for length in lengths) < whole
    assert not model.decoder.rows.used


def test_where_none_ends_number_0_is_given() -> None:
    model, terms = lab(), replace(TERMS, max_new_tokens=1, stop=())
    found = parse("first-finish:n=3").answer(model, questions(model), terms, range(8))
    cut = 0
    for row, samples in zip(found.answers, drawn("first-finish", terms, 8, 3), strict=True):
        for answer, paths in zip(row, samples, strict=True):
            if not any(path.finished for path in paths):
                assert answer.tokens == paths[0].tokens
                cut += 1
    assert cut == found.counts["unfinished"] > 0


# Several requests at once.


class Slow:
    """Answers the last request of a batch only; refuses those of 13."""

    def answer(self, requests: Any) -> list[Any]:
        *rest, last = requests
        return [PENDING] * len(rest) + [NonFiniteLogits("13") if last == 13 else last * 10]


def test_parts_are_answered_in_order_however_they_come() -> None:
    joint = Joint(Slow())
    assert joint.answer([Together(joint, (1, 2)), Together(joint, (3,))]) == [[10, 20], [30]]  # type: ignore[arg-type]
    found = joint.answer([Together(joint, (1, 13, 2)), Together(joint, (3,))])  # type: ignore[arg-type]
    assert isinstance(found[0], NonFiniteLogits)
    assert found[1] == [30]
    Slow.answer = lambda self, requests: [PENDING] * len(requests)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the model answered none of 1 requests"):
        joint.answer([Together(joint, (1,))])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(set(specs()) - {"published", "published-batched"}))
def test_a_question_without_probabilities_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = lab(), ready(name)
    method.answer(model, questions(model)[:1], TERMS, range(1))  # what is checked of the model has been checked
    head = model.decoder.head

    def broken(states: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
        return head(states, *columns) * torch.nan

    monkeypatch.setattr(model.decoder, "head", broken)
    with pytest.raises(NonFiniteLogits):
        method.answer(model, questions(model), TERMS, range(2))
    assert not model.decoder.rows.used


# Power sampling.


def test_power_is_power_sample() -> None:
    model = lab()
    asked = questions(model)
    options = {"block_size": 4, "steps": 2, "draws": 3, "cut": "entropy", "temperature": 0.7, "scope": "sequence"}
    spec = "power:" + ":".join(f"{k}={v}" for k, v in options.items())
    found = parse(f"{spec}:speculate=2").answer(model, asked, TERMS, range(1, 3))
    run = power_sample(
        model, [q.prompt for q in asked], alpha=2.0, max_new_tokens=8, stop=TERMS.stop, seed=3, chains=2,
        first_chain=1, **options,
    )  # fmt: skip
    assert tokens_of(found) == [[path.tokens for path in paths] for paths in run.paths]  # type: ignore[union-attr]
    assert found.counts["steps"] == 4 * 2 * (2 + 3)
    assert found.counts["accepted"] == sum(int(info["accepted"].sum()) for info in run.infos)
    assert 0 < found.counts["changed"] <= found.counts["accepted"]
    grown = sum(chain.grown for chains in run.chains for chain in chains)
    assert found.counts["drawn"] == grown + sum(int(info["proposal_length"].sum()) for info in run.infos)


def test_early_exit_is_power_sample_with_an_exit() -> None:
    model = lab()
    asked = questions(model)
    options = {"block_size": 4, "steps": 6, "plain": 0.2, "eta": 3.2, "exit_temperature": 0.8, "layer": 3}
    spec = f"early-exit:lens={lens_file()}:" + ":".join(f"{k}={v}" for k, v in options.items())
    method = parse(spec).prepare(model, [], TERMS)
    found = method.answer(model, asked, TERMS, range(3))
    run = power_sample(
        model, [q.prompt for q in asked], alpha=2.0, max_new_tokens=8, stop=TERMS.stop, seed=3, chains=3,
        exit=Lens.load(lens_file()), **options,
    )  # fmt: skip
    assert tokens_of(found) == [[path.tokens for path in paths] for paths in run.paths]  # type: ignore[union-attr]
    stages = run.stages
    assert stages is not None
    assert (found.counts["screened"], found.counts["passed"]) == (stages.screened, stages.passed)
    assert found.counts["completed"] == stages.passed + stages.gated > stages.passed > 0
    assert found.counts["kl_tokens"] == run.early_exit["kl_positions"] > 0
    assert found.counts["kl"] / found.counts["kl_tokens"] == pytest.approx(run.early_exit["kl"])


@pytest.mark.slow
def test_what_is_fitted_is_fitted_once() -> None:
    """What `prepare` returns says all in its spec: another process that reads it draws the same."""
    model = lab()
    asked = questions(model)
    for rest in ("gated=0.4", "proposal=substitution", "proposal=substitution:gated=0.4:screen=0.5"):
        given = parse(f"early-exit:lens={lens_file()}:block_size=3:steps=3:{rest}")
        method, spent = prepared(given, model, [q.prompt for q in asked], TERMS)
        assert spent.flops > 0
        options = method.options()
        assert (options["layer"], options["gated"]) == (4, None)
        assert (options["eta"] is None) == ("gated" not in rest)
        assert options["screen"] is not None or "substitution" not in rest
        assert options["screen"] == 0.5 or "screen=0.5" not in rest
        other = model_of()
        again = parse(method.spec).answer(other, questions(other), TERMS, range(2))
        assert tokens_of(again) == tokens_of(method.answer(model, asked, TERMS, range(2)))


@pytest.mark.slow
def test_the_lens_is_fitted_once_and_kept(tmp_path, monkeypatch) -> None:
    """A cached lens that grows by another layer does not change what a prepared method is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = model_of(layers=4)
    one, spent = prepared(parse("self-speculative:layer=2:head=temperature"), model, [], TERMS)
    assert spent.flops > 0
    path = one.options()["lens"]
    assert path.startswith(str(tmp_path))
    written = Lens.load(path)
    assert (written.layers, written.head(2).kind) == ((2,), "temperature")
    before = cache_path(model, "temperature").read_bytes()
    other, _ = prepared(parse("self-speculative:layer=3:head=temperature"), model, [], TERMS)
    assert cache_path(model, "temperature").read_bytes() != before
    assert Lens.load(path).head(2).temperature == written.head(2).temperature
    assert other.options()["lens"] != path
    again, spent = prepared(parse("self-speculative:layer=2:head=temperature"), model, [], TERMS)
    assert spent.flops == 0
    assert again.options()["layer"] == 2


@pytest.mark.parametrize(("kernel", "kind"), [("metropolis", "power"), ("early-exit", "early-exit")])
def test_power_auto_is_what_the_pilot_recommends(kernel: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {"kernel": kernel, "speculate": 3}
    if kernel == "early-exit":
        facts = {"kernel": kernel, "layer": 4, "proposal": "substitution", "exponent": 0.7, "temperature": 0.6}
    asked: dict[str, Any] = {}

    class Found:
        pass

    def stand_in(model: Any, settings: Any, prompts: Any, space: Any) -> Any:
        asked.update(settings=settings, prompts=prompts)
        Found.facts = facts  # type: ignore[attr-defined]
        return Found

    monkeypatch.setattr("powermc.early_exit.prepare", stand_in)
    model = lab()
    given = parse(f"power-auto:lens={lens_file()}:steps=3:plain=0.2:cut=entropy")
    method = given.prepare(model, [q.prompt for q in questions(model)], TERMS)
    assert asked["settings"].kernel == "auto"
    assert (asked["settings"].plain, asked["settings"].alpha, asked["settings"].stop) == (0.2, 2.0, TERMS.stop)
    assert (method.name, method.options()["steps"], method.options()["cut"]) == (kind, 3, "entropy")
    if kernel == "metropolis":
        assert method.options()["speculate"] == 3
    else:
        own = method.options()
        assert (own["layer"], own["proposal"], own["screen"], own["exit_temperature"], own["plain"]) == (
            *(4, "substitution", 0.7, 0.6, 0.2),
        )


# Self-speculation.


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("rows", [1, 64])
def test_self_speculation_draws_what_temperature_draws(tokens: int, rows: int) -> None:
    """Token for token; guesses are counted, and every one that is kept saves a sequential pass of the full depth."""
    model = model_of(max_rows=rows)
    asked = questions(model)
    spec = f"self-speculative:lens={lens_file()}:layer=4:tokens={tokens}:temperature=0.6"
    found = parse(spec).answer(model, asked, LONG, range(2))
    plain = parse("temperature:temperature=0.6").answer(model, asked, LONG, range(2))
    assert tokens_of(found) == tokens_of(plain)
    log_p = [[a.log_p for row in x.answers for a in row] for x in (found, plain)]
    assert log_p[0] == pytest.approx(log_p[1], abs=1e-12)
    counts, depth = found.counts, model.depth
    assert 0 < counts["draft_accepted"] < counts["draft_tokens"]
    assert counts["drawn"] == plain.counts["drawn"]
    # Of every pass that guesses, all tokens guessed pass the layers below the exit, and one that is drawn passes all.
    above = found.spent.tokens(4, depth)
    assert above == found.spent.tokens(0, 4)
    assert found.spent.tokens(0, depth) == plain.spent.prefilled
    passes = above - counts["draft_tokens"]
    assert passes + counts["draft_accepted"] == plain.spent.decoded
    assert counts["kl_tokens"] > 0 < counts["kl"]
    assert model.engine.guesser is None


def test_a_guess_is_right_as_far_as_it_is_drawn() -> None:
    """By hand: an exit that guesses (7, 8, 9) where 7, 8, 1 is drawn is right twice."""

    class Row:
        def __init__(self) -> None:
            self.ids, self.ahead = [1, 2], ()

    class Script:
        tokens = 3

        def guess(self, rows: Any, most: int) -> None:
            assert most == 3
            for row in rows:
                row.ahead = (7, 8, 9)

    row, other, counted = Row(), Row(), Counted(Script(), 4)  # type: ignore[arg-type]
    assert counted.tokens == 15
    counted.guess([row, other], 15)  # type: ignore[list-item]
    row.ids += [7, 8, 1]
    counted.guess([row], 15)  # type: ignore[list-item]
    row.ids += [7]  # and the draft ended
    other.ids += [3, 8, 9]
    assert counted.counts() == (9, 3)
    assert isinstance(LikeliestAtExit.tokens, int)


# As published.


def test_the_published_sampler_is_run_and_charged() -> None:
    model = lab()
    asked, terms = questions(model)[:2], replace(TERMS, stop=())
    found = parse("published-batched:chains=3:block_size=5:steps=1").answer(model, asked, terms, range(4))
    draw = Generate(model.decoder.model, model.text.eos, 2.0)
    sampler = Published(draw, model.text.eos, 8, 5, 1)
    steps = 0
    for question, row in zip(asked, found.answers, strict=True):
        paths = []
        for group in (0, 1):
            stream = Stream(3, prompt=question.prompt.key, chain=group).step(0).at("published-batched")
            trace = sampler.run(question.prompt.ids, chains=3, seed=stream.integers(2**53), batched=True)
            paths += trace.paths
            steps += len(trace.accepted)
        assert [a.tokens for a in row] == [path.tokens for path in paths[:4]]
        assert [a.log_p for a in row] == pytest.approx([path.log_target.sum() / 2 for path in paths[:4]])
    assert found.counts["steps"] == steps


def test_the_published_sampler_is_charged_one_by_one_to_the_flop() -> None:
    model = model_of(eager=True, compiled=False)
    with FlopCounterMode(display=False) as counter:
        found = parse("published:block_size=5:steps=1").answer(model, questions(model)[:1], TERMS, range(1))
    assert found.spent.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert found.spent.heads[model.depth] == found.counts["drawn"]


def test_stop_strings_are_cut_off_what_was_published() -> None:
    model = lab()
    (asked, *_) = questions(model)
    method, free = parse("published:block_size=5:steps=1"), replace(TERMS, stop=())
    whole: Answers = method.answer(model, [asked], free, range(2))
    words = [model.decode(a.tokens).split() for a in whole.answers[0]]
    word = next(w for w in itertools.chain(*(ws[1:-1] for ws in words)))
    cut = method.answer(model, [asked], replace(free, stop=(word,)), range(2))
    space, some = model.space(8, (word,)), 0
    for a, b in zip(whole.answers[0], cut.answers[0], strict=True):
        n = next((n for n in range(1, len(a.tokens)) if space.ends(a.tokens[:n])), len(a.tokens))
        assert b.tokens == a.tokens[:n]
        assert b.text == model.decode(a.tokens[:n]).partition(word)[0]
        assert b.log_p == pytest.approx(log_p_of(model, asked.prompt.ids, b.tokens), abs=1e-4)
        some += n < len(a.tokens)
    assert some


def test_a_method_needs_no_chat_template_nor_a_key() -> None:
    """Streams are keyed by the tokens of a prompt, whatever key it comes with."""
    model = lab()
    (asked, *_) = questions(model)
    other = Question("", replace(asked.prompt, key=77, text="other"), str)
    for spec in ("temperature", "power:block_size=3:steps=2"):
        here, there = (parse(spec).answer(model, [q], TERMS, range(2)) for q in (asked, other))
        assert tokens_of(here) == tokens_of(there)
