"""`Run`: answers, summary, JSON."""

from __future__ import annotations

import json
import math
import os
import re
import stat

import numpy as np
import pytest

from powermc import ArgumentError, power_sample
from powermc.evaluation import last_number
from powermc.results import Run, shorten, write_whole
from tests.fake_lm import EOS, FakeLM

SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 3, "chains": 4, "alpha": 2.0}


@pytest.fixture(scope="module")
def run() -> Run:
    return power_sample(FakeLM(), ["first question", "second\nquestion"], **SMALL)


def one_failed() -> Run:
    with pytest.warns(RuntimeWarning):
        return power_sample(FakeLM(fail_at={70}), ["a", "b"], **SMALL)


def sevens(text: str) -> int | None:
    return text.count("7") or None


# Answers.


def test_final_answers_count_each_chain_once(run):
    answers = run.answers(sevens)
    for p, texts in enumerate(run.texts):
        assert sum(answers[p].values()) == sum("7" in t for t in texts)
        assert answers[p] == {n: sum(t.count("7") == n for t in texts) for n in {t.count("7") for t in texts} - {0}}


def test_answers_over_draws_count_the_last_block(run):
    counted = run.answers(lambda text: "any", over="draws")
    assert [c["any"] for c in counted] == [4 * 3, 4 * 3]
    seen = run.answers(len, over="draws")[1]
    assert seen == {
        n: sum(len(t) == n for chain in run.chains[1] for t in chain.draw_texts)
        for n in {len(t) for chain in run.chains[1] for t in chain.draw_texts}
    }


def test_failed_and_unfinished_chains_give_no_final_answer():
    failed = one_failed()
    ((p, _),) = failed.errors
    assert failed.answers(lambda text: "any")[p]["any"] == 3
    assert failed.answers(lambda text: "any")[1 - p]["any"] == 4
    cut_short = power_sample(FakeLM(interrupt_at=130), ["a", "b"], **SMALL)
    whole = [[cut_short.whole(p, c) for c in range(4)] for p in range(2)]
    assert 0 < sum(map(sum, whole)) < 8
    assert [a["any"] for a in cut_short.answers(lambda text: "any")] == [sum(row) for row in whole]
    ends = {cut_short.ending(p, c) for p in range(2) for c in range(4) if not whole[p][c]}
    assert ends == {"growing"}


def test_answers_over_something_else_is_refused(run):
    with pytest.raises(ArgumentError, match="over must be 'final' or 'draws', got 'all'"):
        run.answers(len, over="all")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("no number", None),
        ("3 apples and 4 pears", "4"),
        ("#### 18", "18"),
        ("$1,050.00.", "1050"),
        ("it is 7.", "7"),
        ("0.50", "0.5"),
        ("-3", "-3"),
        ("10-3", "3"),
        ("x = -12,000.5", "-12000.5"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        ("007", "7"),
        ("-0", "0"),
        ("1" * 50, "1" * 50),
        ("\u0663", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


# The summary.


def test_the_summary_states_every_chain(run):
    text = run.summary()
    assert text.splitlines()[0] == "fake: target p(x)^2, proposals at temperature 0.5, cut law length"
    assert "4 chains, 12 tokens in 3 blocks, 3 steps after each, scope sequence, seed 0" in text
    assert "prompt 1: 'second question'" in text
    for p in range(2):
        for c in range(4):
            steps, accepted, changed = run.acceptance(p, c)
            info, path = run.infos[p], run.paths[p][c]
            assert (steps, accepted, changed) == (9, info["accepted"][c].sum(), info["changed"][c].sum())
            end = "finished" if path.finished else "cut at 12"
            row = rf"  {c} +{len(path)}  {end} +{run.log_p[p][c]:.2f} +{accepted}/9 {accepted / 9:.0%}"
            row += rf" +{changed}/{accepted} {changed / accepted:.0%}" if accepted else " +-"
            assert re.search(row, text), (row, text)
    assert f"cost: {run.tokens:,} tokens evaluated in " in text
    assert f" tokens/s): {run.tokens:,} at layers 0-2;\n" in text
    assert f"{run.cost.ticks} sequential steps, {run.cost.prefills} prefills" in text
    assert "near-ties" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_summary_of_a_block_run_says_what_it_is_not():
    text = power_sample(FakeLM(), "a", **SMALL, scope="block").summary()
    assert "which is not p^alpha of the whole path" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_summary_names_reward_errors_and_interruptions():
    assert "target p(x)^2 exp(sevens(x)), " in power_sample(
        FakeLM(), "a", **SMALL, reward=lambda t: 0.0
    ).summary().replace("<lambda>", "sevens")
    failed = one_failed()
    (p, c), error = next(iter(failed.errors.items()))
    assert f"prompt {p}, chain {c} stopped: {error}" in failed.summary()
    stopped = power_sample(FakeLM(interrupt_at=90), ["a", "b"], **SMALL)
    steps = sum(chain.steps for chains in stopped.chains for chain in chains)
    assert f"interrupted after {steps} of 72 steps" in stopped.summary()


def test_many_prompts_still_fit_one_screen():
    many = power_sample(FakeLM(), [f"question {i}" for i in range(40)], **SMALL)
    lines = many.summary().splitlines()
    assert len(lines) < 36
    assert "... and 28 more prompts" in lines
    row = next(line for line in lines if line.startswith("3 "))
    steps, accepted, changed = np.sum([many.acceptance(3, c) for c in range(4)], axis=0)
    assert re.search(
        rf" {many.log_p[3].mean():.2f} +{accepted / steps:.0%} +{changed / accepted:.0%}  'question 3'", row
    )
    assert max(map(len, lines)) <= 80


def test_the_summary_tells_how_the_chains_mix():
    run = power_sample(FakeLM(), ["a", "b"], **{**SMALL, "alpha": 1.0}, draws=40)
    lines, found = run.summary().splitlines(), run.diagnostics()
    assert "3 steps after each and 40 after the last" in " ".join(lines)
    for p in range(2):
        row = found.of("log_p", p)
        mixing = f"  log p {row.mean:.2f} +- {row.mcse:.2f}; R-hat {row.rhat:.2f}; {row.ess_bulk:.0f} effective of "
        assert any(line.startswith(mixing + "160 draws") for line in lines)
    cuts = " ".join(line.strip() for line in lines)
    first = found.cuts and run.diagnostics(bins=5).cuts[0]
    assert f"accepted by token cut at: {first.acceptance:.0%} at {first.first}-{first.last - 1}, " in cuts
    rate = found.efficiency[0]
    assert (
        f"effective draws of log p: {rate.per_second:.3g} a second, {1e3 * rate.per_full_token:.3g} per 1,000" in cuts
    )
    assert len(lines) <= 40


def test_the_summary_ends_with_a_sentence_per_warning():
    run = power_sample(FakeLM(), "a", **{**SMALL, "chains": 2})
    text = run.summary()
    table, _, warnings = text.rpartition("\n\n")
    said = " ".join(warnings.split())
    assert said.startswith(
        "warning: 3 draws per chain are too few for R-hat and effective sample size (prompt 0, log_p, "
    )
    assert "take at least 10. warning: 2 chains: too few to notice" in said
    assert "R-hat and effective draws unknown: 3 draws per chain, at least 4 are needed" in " ".join(table.split())
    assert said.endswith(".")
    assert max(map(len, text.splitlines())) <= 80


def test_many_failures_do_not_fill_the_screen():
    with pytest.warns(RuntimeWarning):
        run = power_sample(FakeLM(fail_at=range(60, 400, 9)), [str(i) for i in range(9)], **SMALL)
    assert len(run.errors) > 6
    lines = run.summary().splitlines()
    assert sum(" stopped: " in line for line in lines) == 4
    assert f"... and {len(run.errors) - 4} more chains" in lines
    assert len(lines) <= 40


def test_the_summary_shows_a_prompt_safely():
    text = power_sample(FakeLM(), "\x1b[31mred\x07 [bold]", **SMALL).summary()
    assert r"prompt 0: '\x1b[31mred\x07 [bold]'" in text
    assert "\x1b" not in text


# Near-ties.


def test_near_ties_are_counted():
    exact = power_sample(FakeLM(), "a", **SMALL)
    assert exact.accept_tolerance == 0
    assert exact.near_ties == {"tokens": 0, "accepts": 0}
    coarse = power_sample(FakeLM(resolution=1e-3), "a", **SMALL)
    assert coarse.accept_tolerance == pytest.approx(0.1)
    info = coarse.infos[0]
    close = np.abs(info["log_level"] - info["log_ratio"]) < 0.1
    assert coarse.near_ties["accepts"] == close.sum() > 0
    assert coarse.near_ties["tokens"] == 0  # the fake's slack is 1
    assert f"0 tokens, {close.sum()} accept decision" in coarse.summary()
    every = power_sample(FakeLM(resolution=2.0), "a", **SMALL)
    drawn = int(every.infos[0]["proposal_length"].sum())
    assert every.near_ties["tokens"] == drawn + sum(chain.grown for chain in every.chains[0])


# JSON.


def test_to_dict_holds_everything_and_is_json(run):
    content = json.loads(json.dumps(run.to_dict(), allow_nan=False))
    assert content["model"] == "fake"
    assert content["settings"] == dict(run.settings)
    assert content["ignored_warpers"] == {"top_k": 50}
    assert content["cost"] == run.cost.as_dict()
    assert content["cost"]["tokens_by_depth"] == {"0-2": run.tokens}
    assert [p["text"] for p in content["prompts"]] == ["first question", "second\nquestion"]
    for p, prompt in enumerate(content["prompts"]):
        assert prompt["tokens"] == list(run.prompts[p].ids)
        for c, chain in enumerate(prompt["chains"]):
            path = run.paths[p][c]
            assert chain["text"] == run.texts[p][c]
            assert chain["tokens"] == list(path.tokens)
            assert (chain["length"], chain["finished"]) == (len(path), path.finished)
            assert chain["log_p"] == path.log_prob
            assert (chain["steps"], chain["accepted"], chain["changed"]) == run.acceptance(p, c)
            assert chain["error"] is None
            assert [d["tokens"] for d in chain["draws"]] == [list(d.tokens) for d in run.draws[p][c]]
            for name, values in run.infos[p].items():
                expected = [None if isinstance(v, float) and math.isnan(v) else v for v in values[c].tolist()]
                assert chain["infos"][name] == expected


def test_nan_and_infinity_become_null():
    def no_sevens(text: str) -> float:
        return -math.inf if "7" in text else 0.0

    with pytest.warns(RuntimeWarning, match="probability zero"):
        run = power_sample(FakeLM(), ["a", "b", "c"], **{**SMALL, "chains": 8}, reward=no_sevens)
    ratios = [info["log_ratio"] for info in run.infos]
    assert any(np.isneginf(r).any() for r in ratios)
    content = json.loads(run_json := json.dumps(run.to_dict(), allow_nan=False))
    assert "NaN" not in run_json
    for p, prompt in enumerate(content["prompts"]):
        for c, chain in enumerate(prompt["chains"]):
            steps = chain["steps"]
            finite = np.isfinite(run.infos[p]["log_ratio"][c, :steps])
            assert [v is not None for v in chain["infos"]["log_ratio"]] == finite.tolist()
            assert (chain["error"] is None) == (run.chains[p][c].error is None)


def test_a_failed_chain_in_json():
    run = one_failed()
    (p, c), error = next(iter(run.errors.items()))
    chain = run.to_dict()["prompts"][p]["chains"][c]
    assert chain["error"] == str(error)
    assert {len(values) for values in chain["infos"].values()} == {chain["steps"]}


def test_to_json_writes_the_dict(run, tmp_path):
    file = tmp_path / "run.json"
    file.write_text("old")
    run.to_json(file)
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(run.to_dict()))
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    file.write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path):
    write_whole(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_link_keeps_pointing_to_its_file(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_device_is_written_to_and_not_replaced():
    write_whole("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_shorten():
    assert shorten("a\n  b", 10) == "'a b'"
    assert shorten("x" * 50, 12) == "'xxxxxxx'..."
    assert len(shorten("x" * 50, 12)) == 12
    assert shorten("\u202e\x00", 40) == r"'\u202e\x00'"


def test_paths_end_where_they_say(run):
    for p in range(2):
        for c in range(4):
            path = run.paths[p][c]
            assert run.ending(p, c) == ("finished" if path.tokens[-1] == EOS else f"cut at {len(path)}")
