"""`powermc eval`, `ablate` and `table`; the page in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import powermc.cli.eval
from powermc.cli import main
from powermc.evaluation.comparison import compare, load, write
from powermc.evaluation.comparison.page import picture
from tests import browser
from tests.eval_fakes import Model
from tests.runs import HOSTILE
from tests.test_eval import plan, questions


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """The command line with a fake model, in a folder of its own."""
    monkeypatch.setattr(powermc.cli.eval, "load", lambda name, options, notes, quiet: Model(name))
    monkeypatch.chdir(tmp_path)
    questions(tmp_path / "digits.jsonl", 6)

    def run(*arguments):
        code = main([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return run


SMALL = ("--model", "fake", "--data", "digits.jsonl", "--max-new-tokens", "12", "--alpha", "2")


def test_a_comparison_and_going_on_with_it(cli, tmp_path):
    code, screen, notes = cli("eval", "digits", *SMALL, "--limit", "4", "--methods", "dice,fixed", "--quiet")
    assert (code, notes) == (0, "")
    assert screen.startswith(
        "# digits with fake\n\n4 questions, plain prompts, at most 12 tokens, target p(x)^2, seed 0"
    )
    assert {p.name for p in Path("results").iterdir()} == {
        *("results.db", "table.md", "index.html", "results.json", "accuracy-cost.png"),
    }
    code, again, _ = cli("eval", "digits", *SMALL, "--methods", "dice:cost=2,fixed", "--group", "2")
    assert code == 0
    assert [line.spec for line in load("results").lines] == ["dice", "fixed", "dice:cost=2"]
    assert "dice: 2 of 6 answers are not there yet; the same command goes on." in again
    assert "The 2 sessions differ in group 8 and 2: costs and seconds are of all together." in again
    assert Path("results/table.md").read_text() == again
    code, table, _ = cli("table", "results")
    assert (code, table) == (0, again)
    code, text, _ = cli("table", "results", "--json", "--reference", "fixed")
    found = json.loads(text)
    assert {row["reference"] for row in found["comparisons"]} == {"fixed"}
    assert json.loads(Path("results/results.json").read_text()) == found


def test_samples_and_pass_at_k(cli):
    options = ("--samples", "3", "--pass-at", "1,3", "--methods", "dice,fixed", "-q")
    code, screen, _ = cli("eval", "digits", *SMALL, *options)
    assert code == 0
    assert "| pass@1 | pass@3 |" in screen
    code, screen, _ = cli("table", "results", "--pass-at", "2")
    assert "| pass@2 |" in screen
    code, _, notes = cli("table", "results", "--pass-at", "4")
    assert code == 2
    assert notes.startswith("error: pass@k needs k of at least 1, at most the number of samples (3): raise")


def test_an_ablation(cli):
    vary = ("--method", "dice:cost=5", "--vary", "cost=1,2", "--vary", "alpha=1")
    code, screen, _ = cli("ablate", "digits", *SMALL, *vary, "--out", "a", "-q")
    assert code == 0
    assert [line.spec for line in load("a").lines] == [
        "dice:cost=5",
        "dice:cost=1",
        "dice:cost=2",
        "dice:cost=5:alpha=1",
    ]
    assert "## Beside dice:cost=5" in screen
    assert cli("ablate", "digits", *SMALL, *vary, "--grid", "--out", "b", "-q")[0] == 0
    assert [line.spec for line in load("b").lines][1:] == ["dice:cost=1:alpha=1", "dice:cost=2:alpha=1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no task 'nonsense'; there are arithmetic, countdown, "),
        (["digits", "--methods", "x"], "no method 'x'; there are "),
        (["digits", "--data", "none.jsonl"], "cannot read none.jsonl: No such file"),
        (["digits", "--data", "broken.jsonl"], "broken.jsonl, line 2: no field 'question'; it has id"),
        (
            ["digits", "--samples", "2", "--pass-at", "1,5"],
            "pass@k needs k of at least 1, at most the number of samples (2)",
        ),
        (["digits", "--pass-at", "one"], "--pass-at must be whole numbers"),
        (["digits", "--executor", "threads"], "executor must be one of none, process, ray, got 'threads'"),
        (["digits", "--executor", "none", "--workers", "2"], "--executor none works here, without workers"),
        (["digits", "--workers", "0"], "workers must be"),
        (["digits", "--address", "auto"], "an address is that of a Ray cluster"),
        (["digits", "--reference", "fixed"], "there is no method 'fixed' to compare with; there are dice"),
        (["digits", "--shots", "2"], "2 examples need a file of their own: --shots-data"),
        (["digits", "--shots-data", "digits.jsonl"], "digits.jsonl would not be used: say how many"),
        (["digits", "--data-seed", "2"], "a data seed has no effect: task 'digits' is read from its file"),
        (["digits", "--style", "verse"], "style must be one of chat, plain, got 'verse'"),
        (["digits", "--max-new-tokens", "0"], "max_new_tokens must be"),
        (["countdown", "--data", "digits.jsonl"], "task 'countdown' is generated from its seed and reads no file"),
        (["digits", "--out", "digits.jsonl"], "cannot make the folder digits.jsonl"),
    ],
)
def test_bad_input_is_one_line(cli, arguments, message):
    Path("broken.jsonl").write_text('{"id": "a", "question": "b", "answer": "1"}\n{"id": "c"}\n')
    given = ["--methods", "dice"] if "--methods" not in arguments else []
    data = ["--data", "digits.jsonl"] if "--data" not in arguments and arguments[0] == "digits" else []
    code, screen, notes = cli("eval", *arguments, *given, *data, "-q")
    assert (code, screen) == (2, "")
    assert notes.startswith(f"error: {message}"), notes
    assert notes.count("\n") == 1


def test_a_table_of_nothing(cli):
    assert cli("table", "nowhere")[2].startswith("error: nowhere/results.db: there is no such file; name the folder")
    assert cli("ablate", "digits", *SMALL)[2].startswith("error: nothing is varied")


def test_control_c(cli):
    code, screen, notes = cli("eval", "digits", *SMALL, "--methods", "dice:interrupt=d4", "--group", "3", "-q")
    assert code == 130
    assert "3 of 6 answers are not there yet" in screen
    assert notes == "interrupted; what was committed is kept, and the same command goes on\n"


def test_the_configuration_reads_back(cli):
    given = ("--methods", "dice,fixed", "--samples", "2", "--pass-at", "1,2")
    code, toml, _ = cli("eval", "digits", *SMALL, *given, "--print-config")
    assert code == 0
    Path("run.toml").write_text(toml)
    assert cli("eval", "--config", "run.toml", "--print-config", "digits")[1] == toml


def test_examples_stand_before_the_question(cli):
    """Those of a file of their own; another number of them is another comparison."""
    questions(Path("shots.jsonl"), 9)
    shots = Path("shots.jsonl")
    shots.write_text(shots.read_text().replace("number", "digit"))
    given = ("--methods", "fixed", "--shots-data", "shots.jsonl", "-q")
    assert cli("eval", "digits", *SMALL, *given, "--shots", "2")[0] == 0
    assert load("results").header["settings"]["shots"] == 2
    code, _, notes = cli("eval", "digits", *SMALL, *given, "--shots", "3")
    assert code == 2
    assert "made with shots = 2, and 3 is asked for" in notes


# The page.


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A comparison in which every text tries something."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [f"{i} {text}" for i, text in enumerate(HOSTILE) if text.isascii() or text > "\ue000" or text < "\ud800"]
    rows = [{"id": f"<b>{i}", "question": text, "answer": str(i)} for i, text in enumerate(texts)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Model("<script>alert(1)</script>")
    compare(plan(folder / "data.jsonl", "dice,fixed,dice:cost=400", samples=2), model, folder / "out")
    write(folder / "out", pass_at=[1, 2])
    return folder / "out"


def test_markdown_is_escaped(hostile):
    text = (hostile / "table.md").read_text()
    assert "<script>" not in text
    assert r"\<script\>" in text


def test_names_in_the_picture_stand_apart(hostile):
    record = load(hostile)
    shown, _ = write(hostile)
    found = picture(shown.figures)
    assert found is not None
    assert len(found.points) == 2  # of one method no cost is known
    assert all(found.top <= p.y <= found.bottom and found.left <= p.x <= found.right for p in found.points)
    assert len(record.questions) == len(HOSTILE) - 1


@pytest.mark.skipif(browser.COMMAND is None, reason=browser.MISSING)
def test_the_page_in_a_browser(hostile):
    """Nothing is loaded, nothing complains, nothing runs that a text brought along; sorted and dimmed by keyboard."""
    file = hostile / "index.html"
    try:
        with browser.chromium() as page:
            page.size(1100, 800)
            page.open(file)
            assert page.requests == [file.as_uri()]
            assert page.complaints == []
            assert page.text("h1") == "digits with <script>alert(1)</script>"
            assert page.run("document.querySelectorAll('script').length") == 1
            shown = page.run("[...document.querySelectorAll('.prompt')].map((e) => e.textContent)")
            assert len(shown) == len(HOSTILE) - 1
            rows = "[...document.querySelectorAll('#table-2 tbody th')].map((e) => e.textContent)"
            assert page.run(rows) == ["dice", "fixed", "dice:cost=400"]
            page.run("document.querySelectorAll('#table-2 th button')[2].focus()")
            page.press("Enter")
            assert page.run(rows) == ["dice", "dice:cost=400", "fixed"]  # what is empty comes last
            page.press("Enter")
            assert page.run(rows) == ["dice:cost=400", "dice", "fixed"]
            assert page.run("document.querySelectorAll('#table-2 th')[2].getAttribute('aria-sort')") == "descending"
            light = page.run("getComputedStyle(document.body).backgroundColor")
            page.run("document.getElementById('theme').focus()")
            page.press("Enter")
            assert page.run("getComputedStyle(document.body).backgroundColor") != light
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
    except browser.NotStarted as error:
        pytest.skip(str(error))
