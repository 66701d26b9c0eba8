"""Tasks by name: reading files, prompts, few-shot examples, and what bad files are told."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

from powermc.errors import ArgumentError
from powermc.evaluation import metrics, tasks
from powermc.evaluation.tasks import GPQA, GSM8K, HUMANEVAL, MATH, MBPP
from powermc.evaluation.tasks.base import _tasks

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

GSM = {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5.\n#### 5"}
HUMAN = {
    "task_id": "H/0",
    "prompt": 'def one():\n    """One."""\n',
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
PROGRAM = {"task_id": 7, "text": "Add one.", "code": "def f(x):\r\n    return x + 1", "test_setup_code": ""}
needs_sandbox = pytest.mark.skipif(None in tasks.containment().values(), reason="this system does not contain code")


def write(path: Path, *rows: object) -> Path:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_unknown_tasks_are_told_what_there_is():
    own = "(digits, )?"  # of tests/eval_fakes.py, where this process has run its tests
    with pytest.raises(ArgumentError, match=f"no task 'gsm9k'; there are arithmetic, countdown, {own}gpqa-diamond, "):
        tasks.get("gsm9k")
    with pytest.raises(ArgumentError, match="no task 'x'"):
        tasks.load("x")


def test_a_task_of_ones_own_is_a_few_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("powermc.evaluation.tasks.base._tasks", dict(_tasks))
    capitals = tasks.register(
        tasks.Task(
            name="capitals",
            about="capitals of countries",
            item=lambda row: tasks.Item(row.id("id"), row.text("country"), row.text("capital")),
            extract=lambda item, text: text.strip() or None,
            judge=lambda item, answer: (answer == item.reference, "right" if answer == item.reference else "wrong"),
            chat=tasks.Template("What is the capital of {question}?"),
            plain=tasks.Template("{question}:", stop=("\n",)),
        )
    )
    (item,) = tasks.load("capitals", write(tmp_path / "f.jsonl", {"country": "Peru", "capital": "Lima"}))
    assert capitals.prompt(item) == "What is the capital of Peru?"
    assert capitals.grade(item, " Lima\n").correct
    with pytest.raises(ArgumentError, match="there is a task 'capitals' already"):
        tasks.register(capitals)
    with pytest.raises(ArgumentError, match="has no data set on the hub"):
        tasks.load("capitals")


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.json", "f.json.gz", "odd.txt"])
def test_formats(tmp_path, name):
    rows = [GSM, {**GSM, "question": "really?"}, {**GSM, "question": "third"}]
    if ".json" in name and ".jsonl" not in name:
        text = json.dumps(rows).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    else:
        write(tmp_path / name, *rows)
    found = tasks.load("gsm8k", tmp_path / name, limit=2)
    assert [(i.id, i.question, i.reference) for i in found] == [("gsm8k-1", "2 + 3?", "5"), ("gsm8k-2", "really?", "5")]
    assert found[0].solution == "2 + 3 = 5.\n#### 5"


def test_gpqa_is_read_from_its_table(tmp_path):
    header = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Record ID\n"
    path = tmp_path / "gpqa_diamond.csv"
    path.write_text(header + '"Which,\nthen?",right,a,b,c,rec1\n', encoding="utf-8")
    (item,) = tasks.load("gpqa-diamond", path)
    assert item.id == "gpqa-rec1"
    assert f"({item.reference}) right" in item.question
    assert GPQA.grade(item, item.solution).correct
    path.write_text(header + '"Which,\nthen?",right,a,b\n', encoding="utf-8")
    with pytest.raises(
        ArgumentError, match=r"gpqa_diamond.csv, line 3: no field 'Incorrect Answer 3'; it has Question"
    ):
        tasks.load("gpqa-diamond", path)
    path.write_text(header + "q,right,a,b,c,1,more\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match="line 2: more cells than the header has names"):
        tasks.load("gpqa-diamond", path)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm8k", {"question": "?"}, "line 2: no field 'answer'; it has question"),
        ("gsm8k", {}, "line 2: no field 'answer'; it has none"),
        ("gsm8k", {**GSM, "question": 3}, "line 2: field 'question' must be text, got 3"),
        ("gsm8k", {**GSM, "question": "  "}, "line 2: field 'question' must be text, got '  '"),
        ("gsm8k", {**GSM, "answer": "5"}, "line 2: field 'answer' must end with '#### ' and a number, got '5'"),
        ("gsm8k", "text", "line 2: must be an object with fields, got str"),
        ("gsm8k", {**GSM, "id": 1}, "line 2: the id 'gsm8k-1' is that of .*line 1 too"),
        ("math500", {"problem": "?"}, "line 2: no field 'answer'"),
        ("math500", {"answer": "1"}, "line 2: no field 'problem' or 'prompt'; it has answer"),
        ("humaneval", {**HUMAN, "entry_point": "two"}, "line 2: field 'prompt' does not define entry_point 'two'"),
        ("humaneval", {**HUMAN, "test": "def check("}, "line 2: field 'test' is no Python"),
        ("mbpp", {**PROGRAM, "test_list": "f"}, "line 2: field 'test_list' must be a list of texts, got 'f'"),
        ("mbpp", {**PROGRAM, "test_list": []}, "line 2: field 'test_list' is empty"),
        ("mbpp", {**PROGRAM, "test_list": ["assert 1"]}, "line 2: field 'test_list' calls nothing"),
        ("mbpp", {**PROGRAM, "test_list": ["f("]}, "line 2: field 'test_list' is no Python"),
        ("mbpp", {**PROGRAM, "test_list": ["f()"], "test_setup_code": 1}, "field 'test_setup_code' must be text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, task, row, message):
    good = {
        "gsm8k": GSM,
        "math500": {"problem": "?", "answer": "1"},
        "humaneval": {**HUMAN, "task_id": "H/1"},
        "mbpp": {**PROGRAM, "task_id": 8, "test_list": ["assert f(1) == 2"]},
    }[task]
    with pytest.raises(ArgumentError, match=message):
        tasks.load(task, write(tmp_path / "f.jsonl", good, row))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot read .*none[.]jsonl: No such file"):
        tasks.load("gsm8k", tmp_path / "none.jsonl")
    (tmp_path / "f.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ArgumentError, match=r"cannot read .*f.jsonl.gz: Not a gzipped file"):
        tasks.load("gsm8k", tmp_path / "f.jsonl.gz")
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b"x" * 100)[:20])
    with pytest.raises(ArgumentError, match=r"cannot read .*f.jsonl.gz: Compressed file ended"):
        tasks.load("gsm8k", tmp_path / "f.jsonl.gz")
    for name, text, message in [
        ("f.jsonl", "", "is empty"),
        ("f.jsonl", "{", "line 1: not JSON"),
        ("f.json", "[", "not JSON"),
        ("f.json", "{}", "must be a list of objects, got dict"),
        ("f.json", "[]", "holds no items"),
        ("f.csv", "Question\n", "holds no items"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ArgumentError, match=message):
            tasks.load("gsm8k", tmp_path / name)


def test_wrong_uses(tmp_path):
    with pytest.raises(ArgumentError, match="limit must be >= 1, got 0"):
        tasks.load("countdown", limit=0)
    with pytest.raises(ArgumentError, match="say how many items"):
        tasks.load("countdown")
    with pytest.raises(ArgumentError, match=r"reads no file: leave x[.]jsonl out"):
        tasks.load("countdown", "x.jsonl", limit=1)
    with pytest.raises(ArgumentError, match="style must be one of chat, plain, got 'poem'"):
        GSM8K.prompt(tasks.Item("1", "?", "1"), "poem")


def test_the_hub_needs_a_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"needs a data file, or the package datasets .* openai/gsm8k"):
        tasks.load("gsm8k")


def test_the_hub_is_asked_for_the_right_thing(monkeypatch):
    """By a stand-in: nothing here reaches the hub."""
    asked = []
    fake = types.ModuleType("datasets")
    fake.__spec__ = importlib.util.spec_from_loader("datasets", None)

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return [GSM, {**GSM, "answer": "none"}][: 1 if "[" in split else 2]

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert tasks.load("gsm8k", limit=1)[0].reference == "5"
    with pytest.raises(ArgumentError, match=r"openai/gsm8k \(test\), row 2: field 'answer' must end"):
        tasks.load("gsm8k")
    assert asked == [("openai/gsm8k", "main", "test[:1]"), ("openai/gsm8k", "main", "test")]
    monkeypatch.setattr(fake, "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(ArgumentError, match="cannot fetch openai/gsm8k from the hub: ZeroDivisionError"):
        tasks.load("gsm8k")


def test_prompts(tmp_path):
    (item,) = tasks.load("gsm8k", write(tmp_path / "f.jsonl", {**GSM, "question": "{x} 2?"}))
    (shot,) = tasks.load("gsm8k", write(tmp_path / "f.jsonl", GSM))
    assert GSM8K.prompt(item, "plain") == "Question: {x} 2?\nAnswer:"
    assert GSM8K.prompt(item, "plain", [shot]) == (
        "Question: 2 + 3?\nAnswer: 2 + 3 = 5.\n#### 5\n\nQuestion: {x} 2?\nAnswer:"
    )
    assert GSM8K.prompt(item).startswith("{x} 2?\n\nThink step by step.")
    assert r"\boxed{}." in MATH.prompt(item)
    with pytest.raises(ArgumentError, match="example 'gsm8k-1' asks what item 'gsm8k-1' asks"):
        GSM8K.prompt(item, shots=[item])
    with pytest.raises(ArgumentError, match="example '1' has no worked solution"):
        GSM8K.prompt(item, shots=[tasks.Item("1", "?", "1")])


def test_every_few_shot_example_is_right_by_its_own_grader(tmp_path):
    """What a template shows is what the grader wants: the text after the question."""
    pool = tasks.load("countdown", limit=3)
    for task, items in [
        (tasks.COUNTDOWN, pool),
        (GSM8K, tasks.load("gsm8k", write(tmp_path / "g.jsonl", GSM))),
    ]:
        for style in tasks.STYLES:
            template = task.template(style)
            shown = template.answer.format(question=items[0].question, solution=items[0].solution)
            assert task.grade(items[0], shown).correct


@needs_sandbox
def test_code_examples_are_right_by_their_own_grader(tmp_path):
    human = tasks.load("humaneval", write(tmp_path / "h.jsonl", HUMAN))[0]
    mbpp = tasks.load("mbpp", write(tmp_path / "m.jsonl", {**PROGRAM, "test_list": ["assert f(1) == 2"]}))[0]
    for task, item in [(HUMANEVAL, human), (MBPP, mbpp)]:
        for style in tasks.STYLES:
            shown = task.template(style).answer.format(question=item.question, solution=item.solution)
            assert task.grade(item, shown).correct, (task.name, style)


@needs_sandbox
@pytest.mark.parametrize(
    ("row", "code", "passes"),
    [
        ({"test_list": ["assert f(1) == 2", "assert f(2) == 3"]}, "def f(x): return x + 1", True),
        ({"test_list": ["assert f(1) == 2", "assert f(2) == 4"]}, "def f(x): return x + 1", False),
        ({"test_list": ["assert math.isclose(f(1), 2)"]}, "def f(x): return x + 1", True),
        ({"test_list": ["assert math.isclose(f(1), 2)"]}, "class math:\n  isclose = lambda *a: 1\ndef f(x): 0", False),
        ({"test_list": ["assert set(f(1)) == {1}"]}, "def set(x): return {1}\ndef f(x): return []", False),
        (
            {"test_list": ["assert cbrt(f(1)) == 2"], "test_imports": ["from math import cbrt"]},
            "def f(x): return 8",
            True,
        ),
        ({"test_list": ["assert f(a) == 5"], "test_setup_code": "a = 4"}, "def f(x): return x + 1", True),
        (
            {"test_list": ["assert f(root) == 5"], "test_setup_code": "root = Node(1)\nroot.left = Node(4)"},
            "class Node:\n    def __init__(self, n): self.n = n\ndef f(r): return r.n + r.left.n",
            True,
        ),
    ],
)
def test_mbpp_rows(tmp_path, row, code, passes):
    (item,) = tasks.load("mbpp", write(tmp_path / "f.jsonl", {**PROGRAM, **row}))
    assert MBPP.grade(item, f"```python\n{code}\n```").correct == passes
    assert "must pass these tests" in MBPP.prompt(item)


def test_shots_are_chosen_by_the_seed():
    pool = tasks.load("countdown", limit=30)
    first = tasks.choose_shots(pool, 4)
    assert first == tasks.choose_shots(pool, 4) != tasks.choose_shots(pool, 4, seed=1)
    assert len({shot.id for shot in first}) == 4
    assert tasks.choose_shots(pool, 0) == []
    with pytest.raises(ArgumentError, match="31 few-shot examples were asked for; 30 items have"):
        tasks.choose_shots(pool, 31)


def documented(heading: str) -> str:
    """The first Python block of docs/tasks.md under a heading."""
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
    return text.partition(f"# {heading}\n")[2].partition("```python\n")[2].partition("```")[0]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data files are not there: {DATA}")
def test_the_documented_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(DATA)
    exec(documented("Tasks and grading"), {})
    assert capsys.readouterr().out == "True 18 right\n"


def test_the_documented_metrics_and_task_run(monkeypatch):
    monkeypatch.setattr("powermc.evaluation.tasks.base._tasks", dict(_tasks))
    correct, baseline = [[1, 0, 1, 1], [0, 0, 1, 0]], [[0, 0, 1, 1], [0, 0, 1, 0]]
    exec(documented("Metrics"), {"metrics": metrics, "correct": correct, "baseline": baseline})
    exec(documented("A task of one's own"), {"tasks": tasks})
    assert "capitals" in tasks.names()
