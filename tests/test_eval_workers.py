"""Executors: the same paths by one process, by several, by a Ray cluster, whoever dies meanwhile."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from powermc.errors import ArgumentError, ModelError, StoreError
from powermc.evaluation import tasks
from powermc.evaluation.comparison import Plan, Source, WorkerError, compare, differences, load, write
from powermc.evaluation.comparison.plan import specs_of
from powermc.evaluation.comparison.pool import ProcessPool, threads_each
from powermc.evaluation.comparison.results import Results
from powermc.evaluation.methods import Terms
from tests.eval_fakes import FakeSource, Model
from tests.test_eval import answers, plan, questions

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="needs ray: pip install 'powermc[ray]'")


@pytest.fixture
def data(tmp_path) -> Path:
    return questions(tmp_path / "digits.jsonl", 10)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Workers of tests take one thread each; torch is not needed by fakes, and slow to import."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def pool(**changes) -> ProcessPool:
    return ProcessPool(2, **changes)


def test_two_processes_give_what_one_does(data, tmp_path):
    """Answers, grades and costs; workers' files are merged and gone."""
    one, two = tmp_path / "one", tmp_path / "two"
    compare(plan(data, samples=2), Model(), one)
    compare(plan(data, samples=2), FakeSource(), two, executor=pool())
    assert answers(one) == answers(two)
    assert sorted(p.name for p in two.iterdir()) == ["results.db"]
    assert not multiprocessing.active_children()
    assert load(two).header["sessions"][0]["workers"] == 2


def test_a_worker_that_is_killed_is_replaced(data, tmp_path):
    """Its unit is done again by another, and no other is."""
    one, two = tmp_path / "one", tmp_path / "two"
    specs = f"dice:kill=d4:flag={tmp_path / 'killed'}"
    (tmp_path / "killed").touch()
    compare(plan(data, specs), Model(), one)
    (tmp_path / "killed").unlink()
    compare(plan(data, specs), FakeSource(), two, executor=pool())
    assert (tmp_path / "killed").exists()
    assert answers(one) == answers(two)


def test_a_unit_that_kills_every_worker_is_named(data, tmp_path):
    out = tmp_path / "out"
    named = r"a worker died 2 times \(killed by SIGKILL\) at: dice:kill=d4, questions 4-6"
    with pytest.raises(WorkerError, match=named):
        compare(plan(data, "dice:kill=d4"), FakeSource(), out, executor=pool(retries=1))
    assert not multiprocessing.active_children()
    kept = {q for q, _ in load(out).lines[0].answers}
    assert kept.isdisjoint({3, 4, 5})


def test_what_goes_wrong_in_a_worker_is_raised_here(data, tmp_path):
    with pytest.raises(ModelError, match="a worker has loaded another model than the comparison's"):
        compare(plan(data), Changing("fake", str(tmp_path / "seen")), tmp_path / "out", executor=pool())
    with pytest.raises(ArgumentError, match="workers load the model by name"):
        compare(plan(data), Model(), tmp_path / "out", executor=pool())
    with pytest.raises(ArgumentError, match="workers must be"):
        ProcessPool(0)


class Changing(FakeSource):
    """Another model every time it is loaded."""

    def load(self):
        flag = Path(self.options)
        flag.write_text((flag.read_text() if flag.exists() else "") + "x")
        return Model(f"fake {len(flag.read_text())}")


def worker_file(results: Path, file: Path, *, change: bool = False) -> None:
    """A worker's file with all units of a comparison, one answer changed if so asked."""
    with Results(results) as mine, Results(file) as other:
        other.begin({"run": mine.reader.header["run"]})
        for n, result in enumerate(list(mine.reader.results())):
            if change and n == 0:
                result.answers[0][0] = result.answers[0][0]._replace(tokens=(1, 2, 3))
            other.commit(result, None, None)


def test_what_dead_workers_left_is_taken_over(data, tmp_path):
    """Graded here; what is there already must be the same."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    compare(plan(data), Model(), whole)
    compare(plan(data, limit=3), Model(), out)
    (out / "workers").mkdir()
    worker_file(whole / "results.db", out / "workers" / "worker-0.db")
    with pytest.raises(StoreError, match=r"worker-0\.db: it belongs to another comparison"):
        compare(plan(data), Model(), out)
    with Results(whole / "results.db") as mine, Results(out / "results.db") as other:
        other.update(run=mine.reader.header["run"])
    model = Model()
    assert compare(plan(data), model, out).units == 0
    assert model.ledger.flops == 0
    assert not (out / "workers").exists()
    record, other = load(out), load(whole)
    assert [line.answers.keys() for line in record.lines] == [line.answers.keys() for line in other.lines]
    assert [repr(line.answers) for line in record.lines] == [repr(line.answers) for line in other.lines]


def test_answers_that_differ_are_refused(data, tmp_path):
    out = tmp_path / "out"
    compare(plan(data), Model(), out)
    (out / "workers").mkdir()
    worker_file(out / "results.db", out / "workers" / "w.db", change=True)
    with pytest.raises(StoreError, match=r"w\.db: its answer of dice to question 1 \('d0'\), sample 1, differs"):
        compare(plan(data), Model(), out)


def test_threads_are_shared_out(monkeypatch):
    from powermc.evaluation.comparison import pool

    monkeypatch.setattr(pool, "cores", lambda: 8)
    assert [threads_each(n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]


# Real models.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A float64 model of four layers with a tokenizer of 37 words, and 20 questions in its words."""
    from tests.lm.families import tiny_model
    from tests.lm.test_loading import tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").double().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    words = [f"w{9 + i} w{11 + i % 7} w{13 + i % 5}" for i in range(20)]
    rows = [{"question": text, "answer": f"#### {i % 8}"} for i, text in enumerate(words)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def real(folder: Path, **changes) -> Plan:
    items = tasks.load("gsm8k", folder / "data.jsonl")
    specs = specs_of("greedy,temperature,power:steps=2:block_size=4")
    return Plan(tasks.GSM8K, items, specs, Terms(12, (), 2.0, 5), **{"group": 4, **changes})


def paths(out: Path):
    return [{key: (g.tokens, g.text, g.log_p) for key, g in line.answers.items()} for line in load(out).lines]


@pytest.mark.slow
def test_twenty_questions_by_one_process_and_by_two(tiny, tmp_path):
    """Show 4 of the issue, in float64: equal paths, whatever is grouped with what."""
    model = Source(str(tiny), {"dtype": "float64"})
    one, two = tmp_path / "one", tmp_path / "two"
    compare(real(tiny, group=20), model, one)
    compare(real(tiny), model, two, executor=pool())
    assert len(paths(one)) == 3
    assert all(len(line) == 20 for line in paths(one))
    assert paths(one) == paths(two)
    assert differences(load(one), load(two)) == ([], 60)
    shown, remarks = write(two)
    assert [f.spec for f in shown.figures] == ["greedy", "temperature", "power:block_size=4:steps=2"]
    assert remarks == []


# Ray.


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two CPUs of this machine as a cluster; nothing is left of it."""
    import ray

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")}
    root = str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = root  # where actors find the tests' fakes
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_twenty_questions_by_two_ray_workers_one_of_them_killed(cluster, tiny, tmp_path):
    """Show 4 and 3: the paths of one process; an actor's process gets SIGKILL after its first unit."""
    from powermc.evaluation.comparison.ray_executor import RayExecutor

    model = Source(str(tiny), {"dtype": "float64"})
    one, two = tmp_path / "one", tmp_path / "two"
    compare(real(tiny), model, one)
    executor = RayExecutor(2)
    killed: list[int] = []

    class Killing:
        total = None

        def begin(self, name: str) -> None:
            if "questions 9-12" in name and not killed:
                pid = cluster.get(executor._crew[0].actor.ready.remote())
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)

    compare(real(tiny), model, two, executor=executor, display=Killing())
    assert len(killed) == 1
    assert paths(one) == paths(two)
    assert sorted(p.name for p in two.iterdir()) == ["results.db"]


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_ray_gives_what_one_process_does(cluster, data, tmp_path):
    """With an actor that dies in the middle of a unit; and one that always does is named."""
    from powermc.evaluation.comparison.ray_executor import RayExecutor

    one, two = tmp_path / "one", tmp_path / "two"
    specs = f"dice:kill=d4:flag={tmp_path / 'killed'}"
    (tmp_path / "killed").touch()
    compare(plan(data, specs), Model(), one)
    (tmp_path / "killed").unlink()
    compare(plan(data, specs), FakeSource(), two, executor=RayExecutor(2))
    assert answers(one) == answers(two)
    with pytest.raises(WorkerError, match=r"an actor died 1 times .* at: dice:kill=d4, questions 4-6"):
        compare(plan(data, "dice:kill=d4"), FakeSource(), tmp_path / "out", executor=RayExecutor(2, retries=0))


@needs_ray
def test_a_cluster_that_cannot_be_reached(monkeypatch):
    import ray

    from powermc.evaluation.comparison import ray_executor

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "nowhere:port"):
        with pytest.raises(ArgumentError, match=f"cannot reach a Ray cluster at '{address}'"):
            ray_executor.RayExecutor(2, address).connect()


def test_ray_that_is_not_installed(monkeypatch):
    import sys

    from powermc.evaluation.comparison import ray_executor

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModelError, match=r"needs the package ray: pip install 'powermc\[ray\]'"):
        ray_executor.RayExecutor(2)
