"""What counts as an answer, and as a right one. Against the real files in ../shared/data where they are there."""

from __future__ import annotations

import importlib.util
import itertools
import os
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.errors import PowermcError
from powermc.evaluation import last_number, tasks
from powermc.evaluation.tasks import GPQA, GSM8K, HUMANEVAL, MATH, MBPP, Item, countdown, maths
from powermc.evaluation.tasks.choice import letter
from powermc.evaluation.tasks.maths import Comparer, expression
from powermc.evaluation.tasks.numeric import number, spell

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data files are not there: {DATA}")
needs_math = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed: pip install 'powermc[math]'"
)
needs_sandbox = pytest.mark.skipif(None in tasks.containment().values(), reason="this system does not contain code")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 18", 18),
        ("3 eggs\n#### 18 dollars and 5 cents", 18),
        ("#### 17\nNo wait.\n#### 18", 18),
        ("#### 3 + 4 = 7", 7),
        ("####", None),
        ("it is 5\n####", 5),
        (r"\boxed{18} of 20", 18),
        (r"\boxed{17}, no, \boxed{18}", 18),
        (r"\boxed{x = 18\text{ in } 2 \text{ days}}", 18),
        (r"#### 18 \boxed{17}", 18),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{-\dfrac{1}{2}}", Fraction(-1, 2)),
        (r"\boxed{3\frac{1}{2}}", Fraction(7, 2)),
        (r"\boxed{1{,}050}", 1050),
        (r"\boxed{1,\!050}", 1050),
        (r"\boxed{18", 18),
        (r"\fbox{18} of 20", 18),
        ("She earns $1,050.00.", 1050),
        ("It cost -$5", -5),
        ("It cost $-5", -5),
        ("minus \N{MINUS SIGN}5", -5),
        ("10-3", 3),
        ("10 - 3", 3),
        ("= -3.", -3),
        ("5%", 5),
        ("half: 1/2", Fraction(1, 2)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("48/2 = 24", 24),
        ("1/0", None),
        ("12/25/2024", 2024),
        (".5", Fraction(1, 2)),
        ("0.50", Fraction(1, 2)),
        ("1.5e3 m", 1500),
        ("2e", 2),
        ("1,2", 2),
        ("1,2345", 2345),
        ("1000,000", 0),
        ("no idea", None),
        ("", None),
        ("9" * 5000, None),
        ("\N{ARABIC-INDIC DIGIT FIVE}", None),
    ],
)
def test_numbers(text, value):
    assert number(text) == value


@given(st.fractions(max_denominator=10**6), st.sampled_from(["#### {}", r"\boxed{{{}}}", "so it is {}", "{} units"]))
def test_numbers_are_read_as_they_are_spelled(value, form):
    assert number("there are 99 of 7, " + form.format(spell(value))) == value


@given(st.integers(-(10**9), 10**9), st.integers(0, 999), st.integers(0, 3))
def test_spellings_of_one_number_are_one_number(whole, part, zeros):
    decimals = f"{part:03d}" + "0" * zeros
    value = Fraction(f"{whole}.{decimals}")
    for text in (f"{whole}.{decimals}", f"${whole:,}.{decimals}"):
        assert spell(number(text) or Fraction(0)) == spell(value)


@given(st.text("0123456789.,-/$ =#e\\{}boxedfrac", max_size=40))
def test_any_text_has_a_number_or_none(text):
    found = number(text)
    assert found is None or number(spell(found)) == found


@given(st.lists(st.integers(-999, 99_999), min_size=1, max_size=4))
def test_it_reads_whole_numbers_as_the_demo_does(values):
    """`powermc.evaluation.last_number` is what votes are counted by in the demo and in examples."""
    text = "; ".join(f"x is {value:,}" for value in values)
    assert spell(number(text) or Fraction(0)) == last_number(text) == str(values[-1])


def item(reference: str, **data: object) -> Item:
    return Item("1", "?", reference, data=data)


def test_gsm8k_grades():
    assert GSM8K.grade(item("18"), "It is 18.00").correct
    grade = GSM8K.grade(item("18"), "It is 17")
    assert grade == (False, "17", "wrong: 17, not 18")
    assert grade.kind == "wrong"
    assert GSM8K.grade(item("18"), "no idea") == (False, None, "no answer")
    assert GSM8K.grade(item("18"), "#### 18\n\nQuestion: what is 5 + 6?\nAnswer: #### 11").correct


@needs_data
@pytest.mark.parametrize(("file", "count"), [("gsm8k_test_500.jsonl", 500), ("gsm8k_train_1500.jsonl", 1500)])
def test_every_gsm8k_reference_is_right(file, count):
    found = tasks.load("gsm8k", DATA / file)
    assert len(found) == count
    assert all(GSM8K.grade(i, i.solution).correct for i in found)
    assert all(GSM8K.grade(i, f"The answer is \\boxed{{{i.reference}}}.").correct for i in found)
    wrong = [GSM8K.grade(i, f"#### {Fraction(i.reference) + 1}") for i in found]
    assert tasks.count_kinds(wrong) == {"wrong": count}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{C. mitochondria}", "C"),
        (r"\boxed{42}, answer (C)", "C"),
        ("(A) is tempting. The answer is (C).", "C"),
        ("Answer: C", "C"),
        ("**Answer:** C", "C"),
        ("**Answer: (C)**", "C"),
        ("the correct answer choice is C", "C"),
        ("The answer is A. No: the answer is C", "C"),
        ("so\n(C)\nas said", "C"),
        ("C.", "C"),
        ("I pick (C), not", "C"),
        ("The answer is A's", None),
        ("the answer is a matter of taste", None),
        ("(E)", None),
        ("A cell has DNA", None),
        ("", None),
    ],
)
def test_letters(text, found):
    assert letter(text, "ABCD") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{\frac{1}{2}} or \boxed{\frac{1}{3}}", r"\frac{1}{3}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{1}, then \boxed{", "1"),
        ("#### $x^2$", "x^2"),
        (r"Hence the answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
        ("The answer is 3.5. I hope it is correct.", "3.5"),
        ("The final answer is: x + 1", "x + 1"),
        ("First $1$.\n\nThus $x = 2$ and $y = 3$.\n", "y = 3"),
        (r"So \(x = 2\)", "x = 2"),
        ("who knows", None),
        ("", None),
    ],
)
def test_expressions(text, found):
    assert expression(text) == found


@needs_math
@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        ("p - q", "-q + p", True),
        (r"\frac{14}{3}", "14/3", True),
        (r"\frac{1}{2}", "0.5", True),
        ("6 - 5i", "-5i + 6", True),
        (r"90^\circ", "90", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{even}", "odd", False),
        ("p - q", "q - p", False),
        (r"\frac{14}{3}", "4.67", False),
        ("1, 2", "2, 3", False),
    ],
)
def test_math_is_compared_by_value(reference, answer, equal):
    grade = MATH.grade(item(reference), f"\\boxed{{{answer}}}")
    assert grade.correct == equal, grade
    assert grade.kind == ("right" if equal else "wrong")


@needs_data
@needs_math
@pytest.mark.parametrize("each", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_every_math_reference_is_right(each):
    found = tasks.load("math500", DATA / "math500_first250.json")
    assert len(found) == 250
    found = found[::each]
    wrong = [(i.id, i.reference) for i in found if not MATH.grade(i, f"Thus $\\boxed{{{i.reference}}}$.").correct]
    assert not wrong
    # Somebody else's answer is wrong, but where two references happen to be equal.
    pairs = list(itertools.pairwise(found))[::2]
    right = [(a.reference, b.reference) for a, b in pairs if MATH.grade(a, b.solution).correct]
    assert len(right) < 0.05 * len(pairs), right


@needs_math
def test_a_comparison_that_hangs_is_wrong_and_the_next_one_is_not():
    comparer = Comparer(seconds=1.0)
    try:
        assert comparer.equal("1", "9^{9^{9^{9^9}}} + 10^{10^{10^{10}}}") == "timeout: not compared within 1 s"
        assert comparer.restarts == 1
        comparer._seconds = 60
        found: list[bool | str] = []
        threads = [threading.Thread(target=lambda: found.append(comparer.equal("x", "x"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 3
    finally:
        comparer.close()


def test_math_needs_math_verify(monkeypatch):
    monkeypatch.setattr(maths.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(maths, "_comparer", Comparer())
    with pytest.raises(PowermcError, match=r"needs the package math-verify: pip install 'powermc\[math\]'"):
        MATH.grade(item("1"), r"\boxed{1}")


def test_a_grader_that_crashes_makes_the_item_wrong():
    task = tasks.Task("mine", "", lambda i, text: text, lambda i, answer: 1 / 0, GSM8K.chat, GSM8K.plain)  # type: ignore
    grade = task.grade(item("1"), "2")
    assert grade == (False, "2", "grader crashed: ZeroDivisionError: division by zero")
    assert tasks.count_kinds([grade, grade]) == {"grader crashed": 2}


# Countdown


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 5))
def test_every_item_has_a_solution(seed, count, numbers):
    for made in countdown.generate(count, seed, numbers):
        assert len(made.data["numbers"]) == numbers
        assert tasks.COUNTDOWN.grade(made, made.solution).correct


def test_items_depend_on_seed_and_place_alone():
    assert countdown.generate(5, 3)[:2] == countdown.generate(2, 3)
    assert countdown.generate(2, 3) != countdown.generate(2, 4)
    assert len({i.question for i in countdown.generate(200, 0)}) == 200


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("(3 + 4) * 6", None),
        ("6*(4+3)", None),
        ("6/(1/7)", "uses 6, 1, 7"),
        ("3 + 4 + 6", "makes 13, not 42"),
        ("42", "uses 42, not"),
        ("(3 + 4) * 6 + 0", "uses 3, 4, 6, 0"),
        ("3 / (4 - 4) * 6", "divides by zero"),
        ("3 ** 4 + 6", "only whole numbers"),
        ("3.0 + 4 + 6", "only whole numbers"),
        ("__import__('os')", "only whole numbers"),
        ("(3 + 4", "not an expression"),
        ("+" * 300, "longer than 200"),
        ("3 +" + "-" * 150 + "4 * 6", "makes"),
    ],
)
def test_countdown_verifies_exactly(answer, why):
    found = countdown.verify(answer, [3, 4, 6], 42)
    assert found is None if why is None else why in (found or "")


@given(st.lists(st.integers(1, 25), min_size=4, max_size=4), st.lists(st.sampled_from("+-*/"), min_size=3, max_size=3))
def test_countdown_computes_as_fractions_do(numbers, signs):
    a, b, c, d = map(Fraction, numbers)
    names = {"a": a, "b": b, "c": c, "d": d}
    text = f"({numbers[0]} {signs[0]} {numbers[1]}) {signs[1]} ({numbers[2]} {signs[2]} {numbers[3]})"
    try:
        left, right = eval(f"a {signs[0]} b", names), eval(f"c {signs[2]} d", names)
        expected = eval(f"left {signs[1]} right", {"left": left, "right": right})
    except ZeroDivisionError:
        assert countdown.verify(text, numbers, 1) == "divides by zero"
    else:
        assert countdown.evaluate(text) == (expected, numbers)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I try 3 + 4 = 7.\n#### (3 + 4) * 6 = 42", "(3 + 4) * 6"),
        (r"\boxed{(3 + 4) \times 6}", "(3 + 4) * 6"),
        ("Answer: 6 * (3 + 4)", "6 * (3 + 4)"),
        ("3 + 4 = 7, then (3 + 4) * 6 = 42.", "(3 + 4) * 6"),
        ("none", None),
        ("#### none", None),
        ("#### 42", None),
    ],
)
def test_countdown_finds_the_expression(text, found):
    assert countdown.expression(text) == found


# Programs

ADD = Item(
    "add", "import math\n\n\ndef add(a, b):\n    \"\"\"Add.\"\"\"\n", "add", "    return a + b\n",
    {"check": tasks.coding.Check("assert add(1, 2) == 3", ("add",), "def add(a, b):\n    pass\n")},
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "    return a + b\n",
        "    return a + b\n\n\ndef main():\n    print(add(",
        "    return a + b\n\nprint(add(1, 2))\n# more",
        "    return a + b\n```\nThis adds.",
        "```python\ndef add(a, b):\n    return a + b\n```",
        "Sure!\n```python\ndef add(a, b):\n    return a + b\n```\nUsage:\n```python\nadd(1, 2)\n```\n",
        "```\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return a + b",
        "def add(a, b):\n    return a + b\n\nThis function adds two numbers.",
        "Here it is:\n\nfrom typing import List\ndef add(a: int, b: int) -> int:\n    return a + b\n\nIt adds. (Yes",
        "```python\ndef add(a, b):\n    return int(math.fsum([a, b]))\n```",
    ],
)
@needs_sandbox
def test_programs_are_found(text):
    grade = HUMANEVAL.grade(ADD, text)
    assert grade.correct, grade


def test_texts_without_a_program():
    for text in ("", "\n\n", "def other(): pass"):
        assert HUMANEVAL.grade(ADD, text) == (False, None, "no answer")
    assert MBPP.grade(item("add"), "I can not do that").why == "no answer"


@needs_sandbox
def test_a_wrong_program_says_why():
    assert HUMANEVAL.grade(ADD, "    return a - b").why == "failed: assert add(1, 2) == 3"
    hurried = tasks.with_limits(HUMANEVAL, tasks.Limits(seconds=0.3))
    assert hurried.grade(ADD, "    while True: pass").kind == "timeout"
    assert hurried.name == "humaneval"


MUTATIONS = {
    "nothing": lambda body: "    return None\n",
    "leaves": lambda body: "    import os\n    os._exit(0)\n",
}


def humaneval_agrees(items, mutants):
    for found in items:
        grade = HUMANEVAL.grade(found, found.solution)
        assert grade.correct, (found.id, grade)
    for n, found in enumerate(mutants):
        mutate = list(MUTATIONS.values())[n % 2]
        assert not HUMANEVAL.grade(found, mutate(found.solution)).correct, found.id


@needs_data
@needs_sandbox
def test_humaneval_solutions_pass_and_mutants_fail():
    found = tasks.load("humaneval", DATA / "HumanEval.jsonl.gz")
    assert len(found) == 164
    humaneval_agrees(found[::8], found[::40])
    first = found[0]
    assert not HUMANEVAL.grade(first, first.solution.replace("<", ">")).correct
    whole = f"```python\n{first.question}{first.solution}```"
    assert HUMANEVAL.grade(first, whole).correct


@needs_data
@needs_sandbox
@pytest.mark.slow
def test_all_humaneval_solutions_pass_and_mutants_fail():
    found = tasks.load("humaneval", DATA / "HumanEval.jsonl.gz")
    humaneval_agrees(found, found)


def test_gpqa_letters(tmp_path):
    options = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    row = {"Question": "Which?", "Correct Answer": "right", **options}
    made = [GPQA.item(tasks.Row("f, line 1", n, {**row, "Question": f"Which of {n}?"})) for n in range(40)]  # type: ignore
    assert {i.reference for i in made} == set("ABCD")
    for i in made:
        assert f"({i.reference}) right" in i.question
        assert GPQA.grade(i, i.solution).correct


@needs_math
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_gets_a_comparer_of_its_own():
    comparer = Comparer()
    try:
        assert comparer.equal("1", "1") is True
        ours = comparer._process
        child = os.fork()
        if not child:
            good = comparer.equal("2", "3") is False and comparer._process is not ours
            comparer.close()
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert comparer.equal("2", "2") is True
        assert ours is not None
        assert comparer._process is ours
        ours.kill()
        ours.wait()
        assert comparer.equal("2", "2") is True
    finally:
        comparer.close()
