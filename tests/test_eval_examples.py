"""The examples of comparisons run as scripts, with a tiny model, and show what they say."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from tests.test_examples import output

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a float64 model of four layers that knows the digits and signs, and questions for it."""
    from tests.lm.families import tiny_model
    from tests.lm.test_loading import tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", max_position_embeddings=512).double().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    rows = [{"question": f"w{9 + i} w{11 + i}", "answer": f"#### {i}"} for i in range(4)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problem = {
        "task_id": "HumanEval/0",
        "prompt": 'def one():\n    """One."""\n',
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode() + b"\n"))
    return folder


SMALL = ("--max-new-tokens", "12")


def rows(text: str, title: str) -> list[str]:
    """The first cells of the lines of a table."""
    part = text.split(f"## {title}\n")[1].split("\n## ")[0]
    return [line.split(" | ")[0].strip("| ").replace("\\", "") for line in part.splitlines() if line.startswith("| ")][
        2:
    ]


def test_comparing_methods(tiny):
    specs = "greedy,power:steps=2:block_size=4"
    given = ("gsm8k", "--data", "gsm8k.jsonl", "--model", str(tiny), "--methods", specs, *SMALL)
    text = output("05_compare_methods.py", *given, "--limit", "2", cwd=tiny)
    assert rows(text, "Answers") == ["greedy", "power:block_size=4:steps=2"]
    assert "2 units were done in this session" in text
    text = output("05_compare_methods.py", *given, "--limit", "2", cwd=tiny)
    assert "0 units were done in this session; the page is comparison/index.html" in text
    assert (tiny / "comparison" / "index.html").exists()


def test_humaneval(tiny):
    from powermc.evaluation import tasks

    try:
        tasks.containment()
    except tasks.SandboxError as error:
        pytest.skip(str(error))
    text = output(
        "06_code_humaneval.py", "HumanEval.jsonl.gz", "--model", str(tiny), "--dtype", "float64", *SMALL, cwd=tiny
    )
    assert "| pass@1 | pass@2 |" in text
    assert re.search(r"what became of the programs of temperature: \w+", text)


def test_constrained(tiny):
    given = ("--model", str(tiny), *SMALL, "--limit", "2", "--weight", "2")
    text = output("07_constrained.py", *given, cwd=tiny)
    assert len(re.findall(r"^  reward -?\d+ nats: ", text, flags=re.M)) == 2
    assert rows(text, "Answers") == ["low-temperature", "power:steps=2", "rewarded:weight=2.0"]
    assert len(re.findall(r"^numbers used wrongly per answer of ", text, flags=re.M)) == 3


def test_ray(tiny):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs ray: pip install 'powermc[ray]'")
    specs = "greedy,temperature,power:steps=2:block_size=4"
    before = os.environ.get("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    try:
        text = output("08_ray_cluster.py", "--model", str(tiny), "--methods", specs, *SMALL, "--limit", "10", cwd=tiny)
    finally:
        os.environ.pop("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
        if before is not None:
            os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = before
    assert "30 of 30 answers of the two runs are equal, token for token" in text


def test_ray_that_is_missing(tmp_path, monkeypatch):
    """It says what to install, before anything is loaded."""
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here', name='ray')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        AssertionError, match=r"error: a Ray cluster needs the package ray: pip install 'powermc\[ray\]'"
    ):
        output("08_ray_cluster.py", cwd=tmp_path)
