"""Comparing methods: what is run, committed, gone on with, refused, and shown."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from powermc.errors import ArgumentError, StoreError
from powermc.evaluation import tasks
from powermc.evaluation.comparison import Plan, ablation, compare, differences, entry, grading, load, write
from powermc.evaluation.comparison.figures import figures
from powermc.evaluation.comparison.plan import specs_of
from powermc.evaluation.methods import Terms
from tests.eval_fakes import DIGITS, LAYERS, PREPARED, Model
from tests.test_store_kills import small_disk  # noqa: F401  (a fixture)

TERMS = Terms(max_new_tokens=12, alpha=2.0, seed=3)


@pytest.fixture
def data(tmp_path) -> Path:
    return questions(tmp_path / "digits.jsonl", 10)


def questions(path: Path, n: int, **marked: int) -> Path:
    """n questions; `crash=3` marks number 3."""
    rows = [
        {
            "id": f"d{i}",
            "question": f"number {i}?",
            "answer": str(i % 10),
            **{m: True for m, k in marked.items() if k == i},
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan(data: Path, specs: str = "dice,fixed", *, limit: int | None = None, **changes) -> Plan:
    terms = changes.pop("terms", TERMS)
    changes = {"group": 3, **changes}
    return Plan(DIGITS, tasks.load(DIGITS, data, limit=limit), specs_of(specs), terms, **changes)


def answers(folder: Path):
    """Everything that was answered and graded, and the sums of what it cost: not seconds."""
    return {
        line.spec: (
            {key: repr(given) for key, given in sorted(line.answers.items())},  # NaN equals NaN here
            dict(line.costs.ledger.spans),
            line.costs.ledger.flops,
            dict(line.costs.counts),
            line.prepared,
        )
        for line in load(folder).lines
    }


def test_a_comparison(data, tmp_path):
    """Every question is answered by every method, the preparation is done once and charged apart."""
    out = tmp_path / "out"
    PREPARED.clear()
    assert compare(plan(data, samples=2), Model(), out).units == 8
    record = load(out)
    dice, fixed = record.lines
    assert sorted(dice.answers) == [(q, s) for q in range(10) for s in range(2)]
    assert sorted(fixed.answers) == [(q, 0) for q in range(10)], "one sample is enough of what is deterministic"
    assert dice.costs.ledger.spans == {(0, LAYERS): 200}
    assert dice.costs.counts == {"drawn": 80, "steps": 200, "accepted": 100, "changed": 0, "unfinished": 0}
    assert (PREPARED, fixed.prepared) == (["fixed"], ("fixed", {"number": 7, "scale": 0.5}))
    assert (fixed.preparing.flops, fixed.costs.ledger.flops) == (5e9, 0)
    assert record.questions[3].reference == "3"
    for (q, _), given in dice.answers.items():
        assert given.correct == (given.answer == str(q)) == (given.text == f"it is {q}")


def test_the_same_command_runs_nothing_again(data, tmp_path):
    out = tmp_path / "out"
    compare(plan(data), Model(), out)
    before, model = answers(out), Model()
    PREPARED.clear()
    assert compare(plan(data), model, out).units == 0
    assert answers(out) == before
    assert (model.ledger.flops, PREPARED) == (0, [])
    assert len(load(out).header["sessions"]) == 2


def test_more_of_everything(data, tmp_path):
    """More questions, samples and methods in three sessions are what one session gives, in any groups."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    compare(plan(data, limit=4), Model(), out)
    compare(plan(data, limit=9, samples=3, group=4), Model(), out)
    compare(plan(data, "fixed,dice,dice:cost=3", samples=3, group=1), Model(), out)
    compare(plan(data, "dice,fixed,dice:cost=3", samples=3), Model(), whole)
    assert answers(out) == answers(whole)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"terms": Terms(12, (), 3.0, 3)}, r"made with alpha = 2\.0, and 3\.0 is asked for"),
        ({"terms": Terms(13, (), 2.0, 3)}, "made with max_new_tokens = 12, and 13"),
        ({"terms": Terms(12, (), 2.0, 4)}, "made with seed = 3, and 4"),
        ({"style": "chat"}, "made with style = 'plain', and 'chat'"),
        ({"data_seed": 1}, "made with data_seed = 0, and 1"),
        ({"samples": 1}, "it has 2 samples, and fewer, 1"),
        ({"limit": 3}, "it has 10 questions, and fewer, 3"),
    ],
)
def test_other_settings_are_refused_by_name(data, tmp_path, changes, named):
    out = tmp_path / "out"
    compare(plan(data, samples=2, style="plain"), Model(), out)
    with pytest.raises(StoreError, match=rf"results\.db: .*{named}.* or another folder"):
        compare(plan(data, **{"samples": 2, "style": "plain", **changes}), Model(), out)


def test_other_models_questions_and_tasks_are_refused(data, tmp_path):
    out = tmp_path / "out"
    compare(plan(data), Model(), out)
    with pytest.raises(StoreError, match="made with model = 'name fake', and 'name other'"):
        compare(plan(data), Model("other"), out)
    changed = data.read_text().replace("number 2?", "number two?")
    data.write_text(changed)
    with pytest.raises(StoreError, match=r"question 3 \('d2'\) is not the one that it has"):
        compare(plan(data), Model(), out)
    countdown = Plan(tasks.COUNTDOWN, tasks.load("countdown", limit=10), ["dice"], TERMS)
    with pytest.raises(StoreError, match="made with task = 'digits', and 'countdown'"):
        compare(countdown, Model(), out)


def test_a_spec_that_means_something_else_now_is_refused(data, tmp_path):
    out = tmp_path / "out"
    compare(plan(data), Model(), out)
    with closing(sqlite3.connect(out / "results.db")) as connection, connection:
        connection.execute("UPDATE methods SET options = replace(options, '\"cost\": 10', '\"cost\": 9')")
    with pytest.raises(StoreError, match="its method 'dice' has cost = 9, and 10 is what the spec means now"):
        compare(plan(data), Model(), out)


def test_other_files_are_left_alone(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with closing(sqlite3.connect(out / "results.db")) as connection, connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(StoreError, match="a database of another program"):
        compare(plan(data), Model(), out)
    (out / "results.db").write_bytes(b"not a database, but long enough to look at it" * 50)
    with pytest.raises(StoreError, match="no store of powermc"):
        compare(plan(data), Model(), out)
    with pytest.raises(ArgumentError, match="cannot make the folder"):
        compare(plan(data), Model(), out / "results.db")
    with pytest.raises(StoreError, match="there is no such file; name the folder"):
        load(tmp_path / "nothing")


def test_control_c_keeps_what_was_committed(data, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    outcome = compare(plan(data, "dice:interrupt=d4,fixed"), Model(), out)
    assert (outcome.interrupted, outcome.units) == (True, 2)
    assert [len(line.answers) for line in load(out).lines] == [3, 3]
    with closing(sqlite3.connect(out / "results.db")) as connection, connection:  # the same method, without Ctrl-C
        connection.execute("UPDATE methods SET spec = 'dice' WHERE method = 0")
        for column in ("options", "prepared"):
            connection.execute(f"UPDATE methods SET {column} = replace({column}, '\"d4\"', 'null')")
    compare(plan(data), Model(), out)
    compare(plan(data), Model(), whole)
    assert answers(out) == answers(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kill_and_resume(data, tmp_path):
    """SIGKILL in the middle of units, again and again: in the end the store is that of a run that was left alone."""
    from tests.kill_and_resume import ended, forked

    out, whole = tmp_path / "out", tmp_path / "whole"
    specs = "dice:wait=0.01,fixed"
    compare(plan(data, specs, group=2), Model(), whole)
    seen, kills = [0], 0
    while kills < 4:
        child, pipe = forked(lambda tell: compare(plan(data, specs, group=2), Model(), out, display=Telling(tell)))
        for _ in range(5 if not seen[-1] else 3):  # preparations and units begun
            os.read(pipe, 1)
        os.kill(child, signal.SIGKILL)
        kills += ended(child, pipe) == -signal.SIGKILL
        seen.append(sum(len(line.answers) for line in load(out).lines))
        assert seen[-1] >= seen[-2]
    assert seen[1] > 0
    compare(plan(data, specs, group=2), Model(), out)
    assert answers(out) == answers(whole)


class Telling:
    """A display that tells whoever waits when something is begun."""

    total = None

    def __init__(self, tell) -> None:
        self.begin = tell


def test_a_full_file_system_loses_nothing(small_disk, tmp_path):  # noqa: F811
    """Filled up in the middle; when room is made the same command goes on."""
    out, whole = small_disk / "out", tmp_path / "whole"
    long = questions(tmp_path / "long.jsonl", 4000)
    terms = Terms(max_new_tokens=12)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(450_000))
    with pytest.raises(StoreError, match=r"results\.db: no room is left on the disk .* then resume"):
        compare(plan(long, "dice", group=250, terms=terms), Model(), out)
    filler.unlink()
    some = plan(long, "dice", group=250, terms=terms)
    done = len(load(out).lines[0].answers)
    assert 0 < done < 4000
    with pytest.raises(StoreError, match="no room is left"):  # all of it does not fit
        compare(some, Model(), out)
    assert len(load(out).lines[0].answers) > done
    (whole).mkdir()
    for file in out.iterdir():
        shutil.copy(file, whole / file.name)
    compare(some, Model(), whole)
    assert len(load(whole).lines[0].answers) == 4000


def test_where_two_comparisons_differ(data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    compare(plan(data, "dice,fixed"), Model(), one)
    compare(plan(data, "dice,fixed:number=3", limit=6), Model(), two)
    assert differences(load(one), load(two)) == ([], 6)
    with closing(sqlite3.connect(two / "results.db")) as connection, connection:
        connection.execute("UPDATE answers SET tokens = x'6300000063000000' WHERE method = 0 AND question = 2")
    ((spec, question, sample, token, _),), common = differences(load(one), load(two))
    assert (spec, question, sample, token, common) == ("dice", "d2", 0, 0, 6)


def test_a_question_that_cannot_be_answered_is_wrong_and_named(data, tmp_path):
    """The others of its group are answered all the same, and what failed is charged."""
    out = tmp_path / "out"
    compare(plan(data, "dice:fail=d4", group=5), Model(), out)
    (line,) = load(out).lines
    assert len(line.answers) == 10
    assert [key for key, g in line.answers.items() if g.error] == [(4, 0)]
    assert line.answers[4, 0].error == "ChainError: cannot answer d4"
    assert not line.answers[4, 0].correct
    # 4 answers and a failure, then one by one: 4 answers and a failure; and the group of 5 without one.
    assert line.costs.ledger.spans == {(0, LAYERS): 40 + 1 + 40 + 1 + 50}
    shown, _ = write(out)
    assert any("1 answer counted as wrong: the method could not answer (questions d4" in note for note in shown.notes)


@pytest.mark.parametrize(
    ("fault", "why"), [("crash", "grader crashed: RuntimeError"), ("hang", "grader hung: no verdict")]
)
def test_a_grader_that_fails_makes_the_answer_wrong(tmp_path, monkeypatch, fault, why):
    monkeypatch.setattr(grading.grade, "__defaults__", (0.2,))
    out, data = tmp_path / "out", questions(tmp_path / "digits.jsonl", 4, **{fault: 2})
    compare(plan(data, "dice"), Model(), out)
    (line,) = load(out).lines
    assert [q for (q, _), g in line.answers.items() if g.why.startswith(why)] == [2]
    shown, _ = write(out)
    assert any("1 answer counted as wrong: the grader did not decide (questions d2" in note for note in shown.notes)
    assert "grader did not decide" in (out / "table.md").read_text()


def test_what_a_method_does_not_have_is_empty(data, tmp_path):
    out = tmp_path / "out"
    compare(plan(data, samples=3), Model(), out, header={"pass_at": [1, 3]})
    shown, _ = write(out)
    dice, fixed = load(out).lines
    found = figures(fixed, [1, 3])
    assert found is not None
    absent = ("flops", "flops_per_token", "tokens_run", "acceptance", "stage1", "kl", "entropy", "drawn", "unfinished")
    assert [getattr(found, name) for name in absent] == [None] * len(absent)
    assert found.pass_at[3] == found.pass_at[1]
    other = figures(dice, [1, 3])
    assert other is not None
    assert (other.acceptance, other.changed, other.flops, other.flops_per_token) == (0.5, 0.0, 1e10, 5e9)
    cost = next(table for table in shown.tables if table.title == "Cost")
    assert cost.rows[1][1:3] == ("", "")
    kernels = next(table for table in shown.tables if table.title == "Kernels")
    assert kernels.head == ("method", "MH acceptance", "changed the path")
    assert kernels.rows == (("dice", "50.0%", "0.0%"), ("fixed", "", ""))
    pairs = next(table for table in shown.tables if table.title == "Beside dice")
    assert [row[0] for row in pairs.rows] == ["fixed"]
    figure = json.loads((out / "results.json").read_text())["methods"][1]["figures"]
    assert figure["stage1"] is None


def test_bad_plans(data, tmp_path):
    for specs, message in (
        ("nothing", "no method 'nothing'; there are .*dice.*fixed"),
        ("dice,dice:cost=10", "method 'dice' is given twice"),
        ("dice:speed=3", "method 'dice' has no option 'speed'; it has cost"),
        ("dice:alpha=x", "dice:alpha must be float, got 'x'"),
        ("dice:alpha=1:alpha=2", "option 'alpha' of method 'dice' is given twice"),
        ("dice:alpha=-1", "alpha must be a finite number > 0"),
        ("dice,,fixed", "methods must be specs with commas between"),
    ):
        with pytest.raises(ArgumentError, match=message):
            plan(data, specs)
    with pytest.raises(ArgumentError, match="samples must be"):
        plan(data, samples=0)
    with pytest.raises(ArgumentError, match=r"question 'd0': the prompt has \d+ tokens"):
        compare(plan(data, terms=Terms(max_new_tokens=499)), Model(), tmp_path / "out")


def test_alpha_of_one_method(data, tmp_path):
    """Part of its spec, and left out where it is the comparison's own."""
    assert entry("dice:alpha=2", TERMS).spec == "dice"
    one = entry("dice:alpha=1:cost=3", TERMS)
    assert (one.spec, one.terms.alpha, one.method.options()["cost"]) == ("dice:cost=3:alpha=1", 1.0, 3)
    out = tmp_path / "out"
    compare(plan(data, "dice,dice:alpha=1"), Model(), out)
    two = load(out).lines
    assert [line.options["alpha of the target"] for line in two] == [2.0, 1.0]
    assert [g.tokens for g in two[0].answers.values()] != [g.tokens for g in two[1].answers.values()]


def test_ablations():
    vary = ["cost=1,2", "alpha=1,2"]
    assert ablation("dice:cost=5", vary, TERMS) == [
        "dice:cost=5",
        "dice:cost=1",
        "dice:cost=2",
        "dice:cost=5:alpha=1",
    ]
    assert ablation("dice", vary, TERMS, grid=True) == [
        "dice",
        "dice:cost=1:alpha=1",
        "dice:cost=1",
        "dice:cost=2:alpha=1",
        "dice:cost=2",
    ]
    for wrong, message in (
        ([], "nothing is varied"),
        (["speed=1"], "method 'dice' has no option 'speed'; it has cost, .*alpha"),
        (["cost"], "must be an option and its values"),
        (["cost=1", "cost=2"], "option 'cost' is varied twice"),
        (["cost=fast"], "dice:cost must be int, got 'fast'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ablation("dice", wrong, TERMS)
