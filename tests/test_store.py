"""Stores: what is written is what was drawn, resuming, what is refused, merging. With a table as the model."""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import powermc
from powermc import ArgumentError, NonFiniteLogits, Prompt, Run, StoreError, power_sample
from powermc.store import Store, about, digest, load, merge, resume
from powermc.store.file import APPLICATION, FORMAT
from powermc.store.packing import DECIMALS, Tokenization, text_delta, text_from_bytes
from tests.fake_lm import FakeLM, score

SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 3, "chains": 2, "alpha": 2.0}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.db"


def same_draws(one, other):
    """All but the rounding: paths, texts, proposals, decisions."""
    assert one.prompts == other.prompts
    for name in ("chains", "proposals"):
        assert [len(row) for row in getattr(one, name)] == [len(row) for row in getattr(other, name)]
    for a, b in zip((c for row in one.chains for c in row), (c for row in other.chains for c in row), strict=True):
        for name in ("path", "text", "draws", "draw_texts", "steps", "grown", "growth_near_ties", "history", "starts"):
            assert getattr(a, name) == getattr(b, name), name
        assert [x and x.finished for x in a.history] == [x and x.finished for x in b.history]
        assert repr(a.error) == repr(b.error)
    flat = ([x for row in run.proposals for chain in row for x in chain] for run in (one, other))
    for a, b in zip(*flat, strict=True):
        assert (a is None and b is None) or (a.dtype == b.dtype == np.int32 and a.tolist() == b.tolist())
    for a, b in zip(one.infos, other.infos, strict=True):
        assert a.keys() == b.keys()
        for name, values in a.items():
            assert values.dtype == b[name].dtype
            assert values.astype(float) == pytest.approx(b[name].astype(float), abs=10.0**-DECIMALS, nan_ok=True), name
    assert one.pieces == other.pieces


# What is written.


@pytest.mark.parametrize(
    "options",
    [{}, {"draws": 9}, {"draws": 9, "thin": 4}, {"scope": "block"}, {"cut": "entropy"}, {"stop": ["7"]}, {"steps": 0},
     {"steps": 0, "draws": 5}, {"draws": 0}, {"early_rejection": False}],
    ids=str,
)  # fmt: skip
def test_a_stored_run_is_the_run(file, options):
    arguments = {**SMALL, **options}
    memory = power_sample(FakeLM(), ["a", "b"], **arguments)
    stored = power_sample(FakeLM(), ["a", "b"], **arguments, store=file)
    loaded = load(file)
    for run in (stored, loaded):
        same_draws(memory, run)
        assert run.model == memory.model
        assert run.settings == memory.settings
        assert run.early_exit == memory.early_exit
        assert run.resolution == memory.resolution
        assert run.ignored_warpers == memory.ignored_warpers
        assert not run.interrupted
        assert run.cost == memory.cost
    assert stored.to_dict() == loaded.to_dict() == Run.load(str(file)).to_dict()
    assert loaded.summary()
    assert os.listdir(file.parent) == ["run.db"], "one file, no log and no lock"


def test_log_probabilities_of_paths_are_there(file):
    model = FakeLM()
    run = power_sample(model, ["a", "b"], **SMALL, store=file)
    for info, row in zip(run.infos, run.chains, strict=True):
        for c, chain in enumerate(row):
            assert info["log_p"][c] == pytest.approx([score(model, path) for path in chain.history], abs=1e-6)
            for path in (*chain.history, *chain.starts.values(), chain.path):
                assert len(path.log_p) == len(path)
                assert path.log_prob == pytest.approx(score(model, path), abs=1e-5)


def test_rejected_proposals_can_be_left_out(file, tmp_path):
    every = power_sample(FakeLM(), "a", **SMALL, draws=40, store=file)
    fewer = power_sample(FakeLM(), "a", **SMALL, draws=40, store=tmp_path / "fewer.db", keep_proposals=False)
    accepted = every.infos[0]["accepted"]
    for c in range(2):
        for step, (one, other) in enumerate(zip(every.proposals[0][c], fewer.proposals[0][c], strict=True)):
            assert (other is None) == (one is None or not accepted[c, step])
            assert other is None or other.tolist() == one.tolist()
        assert every.chains[0][c].history == fewer.chains[0][c].history
    assert file.stat().st_size >= (tmp_path / "fewer.db").stat().st_size


def test_a_model_without_a_tokenizer(file):
    class Mute(FakeLM):
        def decode(self, tokens):
            raise ArgumentError("this model was given no tokenizer")

    memory = power_sample(Mute(), Prompt((1, 2)), **SMALL)
    power_sample(Mute(), Prompt((1, 2)), **SMALL, store=file)
    same_draws(memory, load(file))
    assert load(file).texts == [[None, None]]
    assert load(file).pieces == {}


def test_texts_survive_whatever_they_are(file):
    prompt = Prompt((1, 2), "a\x00b\ud800\u202e", 5)
    run = power_sample(FakeLM(pieces=("\x00", "é", "\n", "")), prompt, **SMALL, store=file)
    assert load(file).prompts == (prompt,)
    assert load(file).texts == run.texts == power_sample(FakeLM(pieces=("\x00", "é", "\n", "")), prompt, **SMALL).texts


def test_the_same_run_has_the_same_digest(tmp_path):
    def drawn(name, **options):
        power_sample(FakeLM(), ["a", "b"], **{**SMALL, **options}, store=tmp_path / name)
        return digest(tmp_path / name)

    assert drawn("a") == drawn("b")
    others = [drawn("c", seed=1), drawn("d", draws=4), drawn("e", chains=3), drawn("f", alpha=2.5)]
    assert len({drawn("g"), *others}) == 5


@given(
    st.lists(st.lists(st.integers(0, 70_000), max_size=9), min_size=1, max_size=6),
    st.lists(st.text(st.characters(codec=None), max_size=12), min_size=1, max_size=6),
    st.sampled_from([70_001, 1 << 20]),
)
@settings(max_examples=60)
def test_differences_add_up(paths, texts, vocabulary):
    """Hypothesis: tokens and texts, each written as what it adds to the one before, come back."""
    packing, tokens, text = Tokenization(vocabulary), (), ""
    for ids in paths:
        log_p = -np.arange(len(ids), dtype=float)
        path = powermc.Path(Prompt(), tuple(ids), True, log_p)
        delta = packing.delta(path, tokens)
        tokens = tokens[: delta.kept] + tuple(packing.unpack(delta.tokens).tolist())
        assert tokens == path.tokens
        assert np.frombuffer(delta.log_p, "<f4").tolist() == log_p[delta.kept :].tolist()
    for words in texts:
        kept, rest = text_delta(words, text)
        text = text[:kept] + text_from_bytes(rest)
        assert text == words


@given(
    st.integers(1, 3),
    st.integers(1, 13),
    st.integers(1, 6),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 6)),
    st.integers(1, 3),
    st.integers(0, 200),
    st.sampled_from(["length", "horizon", "entropy", "block"]),
)
@settings(max_examples=30, deadline=None)
def test_any_run_stopped_anywhere_is_the_run(tmp_path_factory, chains, horizon, block, steps, draws, thin, stop, cut):
    """Hypothesis: stop at any token, go on, and load: the digest and the run are those of one that was not stopped."""
    folder = tmp_path_factory.mktemp("any")
    options = {"max_new_tokens": horizon, "block_size": block, "steps": steps, "draws": draws, "chains": chains}
    options |= {"thin": thin, "cut": cut, "alpha": 2.0}
    memory = power_sample(FakeLM(), ["a", "b"], **options)
    power_sample(FakeLM(), ["a", "b"], **options, store=folder / "whole")
    same_draws(memory, load(folder / "whole"))
    power_sample(FakeLM(interrupt_at=stop), ["a", "b"], **options, store=folder / "stopped")
    resume(folder / "stopped", FakeLM())
    same_draws(memory, load(folder / "stopped"))
    assert digest(folder / "stopped") == digest(folder / "whole")


# Going on.


@pytest.mark.parametrize("thin", [1, 3])
@pytest.mark.parametrize("stops", [(0,), (1,), (40, 41, 42), (90, 7, 33)])
def test_resumed_is_never_stopped(file, tmp_path, stops, thin):
    options = {**SMALL, "draws": 8, "thin": thin}
    whole = tmp_path / "whole.db"
    power_sample(FakeLM(), ["a", "b"], **options, store=whole)
    for n, stop in enumerate(stops):
        run = power_sample(FakeLM(interrupt_at=stop), ["a", "b"], **options, store=file, resume=n > 0)
        assert run.interrupted
        assert load(file).interrupted
    run = power_sample(FakeLM(), ["a", "b"], **options, store=file, resume=True)
    assert not run.interrupted
    assert digest(file) == digest(whole)
    same_draws(run, load(whole))


def test_no_stored_step_is_taken_again(file):
    """What the second session draws is what is proposed in the steps it takes; each open chain is scored once."""
    stopped = power_sample(FakeLM(interrupt_at=100), ["a", "b"], **SMALL, store=file)
    taken = {(p, c): chain.steps for p, row in enumerate(stopped.chains) for c, chain in enumerate(row)}
    grown = sum(chain.grown for row in stopped.chains for chain in row)
    model, calls = FakeLM(), []
    whole = power_sample(
        model, ["a", "b"], **SMALL, store=file, resume=True, callbacks=[lambda p, c, s, *_: calls.append((p, c, s))]
    )
    assert min(step for *_, step in calls) > 0
    assert sorted(calls) == [(*key, step) for key in sorted(taken) for step in range(taken[key], 9)]
    lengths = sum(
        int(whole.infos[p]["proposal_length"][c, step])
        for p, c, step in calls
    ) + sum(chain.grown for row in whole.chains for chain in row) - grown  # fmt: skip
    assert model.ledger.decoded == lengths
    assert model.ledger.prefills <= 4
    assert whole.cost.decoded == stopped.cost.decoded + lengths


def test_a_finished_run_asks_the_model_for_nothing(file):
    power_sample(FakeLM(), ["a", "b"], **SMALL, store=file)
    before, model = digest(file), FakeLM()
    run = power_sample(model, ["a", "b"], **SMALL, store=file, resume=True)
    assert model.ledger.ticks == model.ledger.prefills == 0
    assert digest(file) == before
    assert run.to_dict()["prompts"] == load(file).to_dict()["prompts"]


def test_more_chains_and_more_draws(file, tmp_path):
    power_sample(FakeLM(interrupt_at=150), ["a", "b"], **SMALL, store=file)
    resume(file, FakeLM(), draws=11, chains=4)
    power_sample(FakeLM(), ["a", "b"], **{**SMALL, "chains": 4}, draws=11, store=tmp_path / "whole.db")
    assert digest(file) == digest(tmp_path / "whole.db")
    run = load(file)
    assert (run.settings["draws"], run.settings["chains"]) == (11, 4)
    assert [len(row) for row in run.chains] == [4, 4]
    with pytest.raises(StoreError, match=r"it has draws = 11, and fewer, 3, are asked for; give at least 11"):
        power_sample(FakeLM(), ["a", "b"], **{**SMALL, "chains": 4}, store=file, resume=True)
    with pytest.raises(StoreError, match=r"it has chains = 4, and fewer, 2, are asked for"):
        power_sample(FakeLM(), ["a", "b"], **SMALL, draws=11, store=file, resume=True)


def test_resume_begins_where_there_is_nothing(file, tmp_path):
    power_sample(FakeLM(), "a", **SMALL, store=file, resume=True)
    power_sample(FakeLM(), "a", **SMALL, store=tmp_path / "other.db")
    assert digest(file) == digest(tmp_path / "other.db")


def test_an_empty_file_is_a_place_like_any_other(file):
    file.touch()
    power_sample(FakeLM(), "a", **SMALL, store=file)
    assert not load(file).interrupted


def test_a_run_that_never_began_leaves_no_file(file):
    with pytest.raises(ArgumentError):
        power_sample(FakeLM(context=3), "a", **SMALL, store=file)
    assert os.listdir(file.parent) == []


def test_a_crash_of_the_model_loses_nothing(file, tmp_path):
    class Crashing(FakeLM):
        def answer(self, requests):
            if self.drawn > 80:
                raise RuntimeError("CUDA error")
            return super().answer(requests)

    with pytest.raises(RuntimeError, match="CUDA"):
        power_sample(Crashing(), ["a", "b"], **SMALL, store=file)
    assert 0 < about(file).steps < 36
    resume(file, FakeLM())
    power_sample(FakeLM(), ["a", "b"], **SMALL, store=tmp_path / "whole.db")
    assert digest(file) == digest(tmp_path / "whole.db")


def test_a_chain_that_failed_is_tried_again(file, tmp_path):
    with pytest.warns(RuntimeWarning, match="stopped after"):
        run = power_sample(FakeLM(fail_at={55}), ["a", "b"], **SMALL, store=file)
    (key, error), = run.errors.items()  # fmt: skip
    assert isinstance(error, NonFiniteLogits)
    assert load(file).errors.keys() == {key}
    assert isinstance(load(file).errors[key], NonFiniteLogits)
    assert str(load(file).errors[key]) == str(error)
    assert about(file).failed == 1
    assert about(file).done
    assert not load(file).interrupted
    assert resume(file, FakeLM()).errors == {}
    power_sample(FakeLM(), ["a", "b"], **SMALL, store=tmp_path / "whole.db")
    assert digest(file) == digest(tmp_path / "whole.db")


def test_all_chains_failing_at_once_raises(file):
    with pytest.raises(NonFiniteLogits):
        power_sample(FakeLM(fail_at=range(100)), "a", **SMALL, store=file)
    assert about(file).failed == 2


def sevens(text: str) -> float:
    return 1.5 * text.count("7")


def test_a_reward_is_asked_for_by_name(file, tmp_path):
    options = {**SMALL, "reward": sevens, "stop": ["one"]}
    power_sample(FakeLM(interrupt_at=60), "a", **options, store=file)
    with pytest.raises(StoreError, match=r"drawn with the reward sevens, a Python function; give it"):
        resume(file, FakeLM())
    with pytest.raises(StoreError, match=r"drawn with reward = 'sevens', and '<lambda>' is asked for"):
        resume(file, FakeLM(), reward=lambda text: 0.0)
    resume(file, FakeLM(), reward=sevens)
    power_sample(FakeLM(), "a", **options, store=tmp_path / "whole.db")
    assert digest(file) == digest(tmp_path / "whole.db")


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 3.0}, "alpha = 2.0, and 3.0 is asked for; only more chains and more draws can be added"),
        ({"temperature": 0.7}, "temperature = 0.5, and 0.7 is asked for"),
        ({"max_new_tokens": 16}, "max_new_tokens = 12, and 16 is asked for"),
        ({"block_size": 3}, "block_size = 4, and 3 is asked for"),
        ({"steps": 4}, "steps = 3, and 4 is asked for"),
        ({"scope": "block"}, "scope = 'sequence', and 'block' is asked for"),
        ({"cut": "entropy"}, "cut = 'length', and 'entropy' is asked for"),
        ({"seed": 1}, "seed = 0, and 1 is asked for"),
        ({"stop": ["7"]}, r"stop = [], and ['7'] is asked for"),
        ({"early_rejection": False}, "early_rejection = True, and False is asked for"),
        ({"reward": sevens}, "reward = None, and 'sevens' is asked for"),
        ({"thin": 2}, "thin = 1, and 2 is asked for"),
        ({"keep_proposals": False}, "keep_proposals = True, and False is asked for"),
        ({"first_chain": 3}, "first_chain = 0, and 3 is asked for"),
        ({"chains": 1}, "it has chains = 2, and fewer, 1, are asked for"),
        ({"draws": 2}, "it has draws = 3, and fewer, 2, are asked for"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",  # not str: a function's address differs by process
)
def test_any_other_setting_is_refused_by_name(file, change, message, monkeypatch):
    power_sample(FakeLM(interrupt_at=60), ["a", "b"], **SMALL, store=file)
    before = digest(file)

    def fail(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("powermc.lm.__getattr__", fail)
    with pytest.raises(StoreError) as caught:  # before the model is so much as looked up
        power_sample("smollm2", ["a", "b"], **{**SMALL, **change}, store=file, resume=True)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert digest(file) == before


def test_other_prompts_are_refused(file):
    power_sample(FakeLM(), ["a", "b"], **SMALL, store=file)
    for prompts, message in (
        (["a"], "it has 2 prompts, and 1 are given"),
        (["b", "a"], "prompt 0 was 'a', and 'b' is given"),
        (["a", "b", "c"], "it has 2 prompts, and 3 are given"),
    ):
        with pytest.raises(StoreError, match=message):
            power_sample(FakeLM(), prompts, **SMALL, store=file, resume=True)


def test_another_model_is_refused(file):
    power_sample(FakeLM(), "a", **SMALL, store=file)
    other = FakeLM()
    object.__setattr__(other, "name", "other")
    with pytest.raises(StoreError, match=r"drawn from fake \(name fake\), and other \(name other\) is another model"):
        power_sample(other, "a", **SMALL, store=file, resume=True)


def test_an_existing_run_is_not_written_over(file):
    power_sample(FakeLM(), "a", **SMALL, store=file)
    before = file.read_bytes()
    with pytest.raises(StoreError, match=r"holds a run already; go on with it: resume=True, or: powermc resume "):
        power_sample(FakeLM(), "a", **SMALL, store=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("options", [{"resume": True}, {"keep_proposals": False}])
def test_options_of_a_store_need_one(options):
    with pytest.raises(ArgumentError, match="has no effect without a store; name a file with store="):
        power_sample(FakeLM(), "a", **SMALL, **options)
    with pytest.raises(ArgumentError, match="must be True or False, got 'yes'"):
        power_sample(FakeLM(), "a", **SMALL, store="x", **dict.fromkeys(options, "yes"))


def broken_file(kind, path):
    if kind == "text":
        path.write_text("these are notes, and no database at all\n" * 100)
    elif kind == "foreign":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE notes (text)")
    elif kind == "folder":
        path.mkdir()
    else:
        power_sample(FakeLM(), ["a", "b"], **SMALL, draws=200, store=path)
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            if kind == "newer":
                connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
            elif kind == "header":
                connection.execute("DELETE FROM header WHERE name = 'settings'")
            elif kind == "rows":
                connection.execute("DELETE FROM steps WHERE step = 5")
        if kind == "damaged":
            data = bytearray(path.read_bytes())
            data[8192:40_000] = os.urandom(40_000 - 8192)
            path.write_bytes(data)
        elif kind == "cut":
            path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize(
    ("kind", "message", "also_load"),
    [
        ("text", "it is no store of powermc, but another kind of file; name another file", True),
        ("foreign", "it is a database of another program, and is left alone; name another file", True),
        ("folder", "it is a folder; name a file in it", False),
        ("newer", "it was written by a newer powermc (format 2, this one knows 1); upgrade", True),
        ("damaged", "it is damaged", True),
        ("cut", "it is damaged", True),
        ("header", "its header is not whole", True),
        ("rows", "steps: it is damaged", True),
    ],
)
def test_what_is_no_store_is_named_and_left_alone(file, kind, message, also_load):
    broken_file(kind, file)
    before = None if kind == "folder" else file.read_bytes()
    calls = [lambda: power_sample(FakeLM(), ["a", "b"], **SMALL, draws=200, store=file, resume=True)]
    if also_load:
        calls += [lambda: load(file)]
    for call in calls:
        with pytest.raises(StoreError) as caught:
            call()
        assert message in str(caught.value)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    if before is not None and kind not in ("damaged", "cut", "rows"):
        assert file.read_bytes() == before
        assert os.listdir(file.parent) == ["run.db"]


def test_missing_files(file):
    with pytest.raises(StoreError, match="there is no such file; name a store"):
        load(file)
    with pytest.raises(StoreError, match="there is no such file"):
        resume(file, FakeLM())
    with pytest.raises(StoreError, match=r"there is no folder .*; make it first"):
        power_sample(FakeLM(), "a", **SMALL, store=file.parent / "no" / "run.db")
    file.touch()
    with pytest.raises(StoreError, match="nothing has been written into it yet"):
        load(file)


def test_two_writers(file):
    with Store(file, resume=False), pytest.raises(StoreError, match="another process is writing it; wait for its end"):
        power_sample(FakeLM(), "a", **SMALL, store=file, resume=True)
    power_sample(FakeLM(), "a", **SMALL, store=file)
    seen = []

    def second(*_):
        if not seen:
            with pytest.raises(StoreError, match="another process is writing it"):
                resume(file, FakeLM(), draws=9)
            seen.append(load(file))  # but it can be read

    resume(file, FakeLM(), draws=5, callbacks=[second])
    assert sum(chain.steps for chain in seen[0].chains[0]) == 19
    assert seen[0].interrupted


def test_two_writers_by_two_names(file, tmp_path):
    (tmp_path / "link.db").symlink_to(file)
    with Store(file, resume=False), pytest.raises(StoreError, match="another process is writing it"):
        power_sample(FakeLM(), "a", **SMALL, store=tmp_path / "link.db", resume=True)


def test_a_display_of_a_run_that_is_done(file, capsys):
    for _ in range(2):
        power_sample(FakeLM(), "a", **SMALL, store=file, resume=True, progress=True)
    assert capsys.readouterr().out == ""


def test_a_database_held_by_another_program(file, monkeypatch):
    monkeypatch.setattr("powermc.store.file.BUSY", 0.1)
    power_sample(FakeLM(), "a", **SMALL, store=file)
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="another program holds it locked"):
            resume(file, FakeLM())
        connection.execute("ROLLBACK")
    resume(file, FakeLM())


UNPRIVILEGED = """
import os, sys
sys.path.insert(0, {root!r})
from tests.fake_lm import FakeLM
from powermc import power_sample
from powermc.store import load, resume
power_sample(FakeLM(), "a", max_new_tokens=4, store={folder!r} + "/first.db")  # what is imported needs rights
resume({folder!r} + "/first.db", FakeLM(), draws=20)
load({folder!r} + "/first.db")
os.setgid(65534); os.setuid(65534)
def tell(call):
    try:
        print(type(call()).__name__)
    except Exception as error:
        print(type(error).__name__, error)
tell(lambda: power_sample(FakeLM(), "a", max_new_tokens=4, store={folder!r} + "/new.db"))
tell(lambda: resume({folder!r} + "/run.db", FakeLM(), draws=20))
tell(lambda: load({folder!r} + "/run.db"))
"""


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="drops rights, which needs root")
def test_a_read_only_folder(file):
    power_sample(FakeLM(), "a", **SMALL, store=file)
    for place in (file.parent, *file.parent.parents):
        if place.stat().st_uid == 0 and place != place.parent:
            place.chmod(place.stat().st_mode | 0o055)
    file.chmod(0o444)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script = UNPRIVILEGED.format(root=root, folder=str(file.parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    new, more, loaded = done.stdout.splitlines()
    for line in (new, more):
        assert line.startswith("StoreError")
        assert "it cannot be written" in line
    assert loaded == "Run"


FULL = """
import resource, sys
sys.path.insert(0, {root!r})
from tests.fake_lm import FakeLM
from powermc import StoreError, power_sample
resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))
try:
    power_sample(FakeLM(), ["a", "b"], **{options!r}, store={file!r})
except StoreError as error:
    print(error)
"""


def test_a_full_disk_loses_nothing(file, tmp_path):
    """A file that may not grow is a disk that is full, to SQLite."""
    pytest.importorskip("resource")
    options = {**SMALL, "draws": 300}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script = FULL.format(root=root, options=options, file=str(file))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert "what was committed is kept: " in done.stdout
    assert str(file) in done.stdout
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    kept = about(file).steps
    assert kept > 10
    resume(file, FakeLM())
    power_sample(FakeLM(), ["a", "b"], **options, store=tmp_path / "whole.db")
    assert digest(file) == digest(tmp_path / "whole.db")


def test_what_a_store_is_recognised_by(file):
    power_sample(FakeLM(), "a", **SMALL, store=file)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete", "a single file when it is closed"


def test_facts(file):
    run = power_sample(FakeLM(interrupt_at=100), ["a", "b"], **SMALL, store=file)
    facts = about(file)
    steps = sum(chain.steps for row in run.chains for chain in row)
    assert (facts.prompts, facts.chains, facts.steps, facts.planned) == (2, 2, steps, 36)
    assert facts.accepted == sum(int(info["accepted"].sum()) for info in run.infos)
    assert not facts.done
    assert not facts.written
    assert facts.tokens == run.tokens
    assert facts.bytes_per_draw == file.stat().st_size / steps
    assert facts.header.sessions[0]["powermc"] == powermc.__version__
    resume(file, FakeLM())
    assert len(about(file).header.sessions) == 2
    assert about(file).done


# Several workers.


def worker(path, prompts, **options):
    power_sample(FakeLM(), prompts, **{**SMALL, **options}, store=path)
    return path


def test_merged_is_drawn_at_once(tmp_path):
    parts = [worker(tmp_path / "1", ["a", "b"]), worker(tmp_path / "2", ["c"]), worker(tmp_path / "3", ["b", "d"])]
    merge(parts, tmp_path / "all")
    worker(tmp_path / "whole", ["a", "b", "c", "d"])
    assert digest(tmp_path / "all") == digest(tmp_path / "whole")
    same_draws(load(tmp_path / "all"), load(tmp_path / "whole"))
    costs = [load(part).cost.decoded for part in parts]
    assert load(tmp_path / "all").cost.decoded == sum(costs)


def test_the_longest_of_a_chain_is_taken_and_can_be_gone_on_with(tmp_path):
    power_sample(FakeLM(interrupt_at=70), ["a", "b"], **SMALL, store=tmp_path / "short")
    parts = [tmp_path / "short", worker(tmp_path / "long", ["b"], draws=8, chains=3)]
    merge(parts, tmp_path / "all")
    assert load(tmp_path / "all").interrupted
    run = resume(tmp_path / "all", FakeLM())
    worker(tmp_path / "whole", ["a", "b"], draws=8, chains=3)
    assert digest(tmp_path / "all") == digest(tmp_path / "whole")
    assert (run.settings["draws"], run.settings["chains"]) == (8, 3)


def test_workers_share_the_chains_of_a_prompt(tmp_path):
    """Each draws what those chains of the whole run draw, also after a stop; what nobody drew can be gone on with."""
    worker(tmp_path / "1", ["a", "b"], chains=2)
    power_sample(FakeLM(interrupt_at=50), ["b", "a"], **{**SMALL, "chains": 3}, first_chain=2, store=tmp_path / "2")
    second = resume(tmp_path / "2", FakeLM())
    same_draws(second, power_sample(FakeLM(), ["b", "a"], **{**SMALL, "chains": 3}, first_chain=2))
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "all")
    worker(tmp_path / "whole", ["a", "b"], chains=5)
    assert digest(tmp_path / "all") == digest(tmp_path / "whole")
    same_draws(load(tmp_path / "all"), load(tmp_path / "whole"))
    worker(tmp_path / "7", ["a", "b"], chains=1, first_chain=6)
    merge([tmp_path / "2", tmp_path / "7"], tmp_path / "gap")
    assert load(tmp_path / "gap").interrupted
    resume(tmp_path / "gap", FakeLM())
    merge([tmp_path / "1", tmp_path / "gap"], tmp_path / "filled")
    worker(tmp_path / "seven", ["a", "b"], chains=7)
    same_draws(load(tmp_path / "filled"), load(tmp_path / "seven"))


def test_overlaps_that_differ_are_refused(tmp_path):
    one, other = worker(tmp_path / "1", ["a", "b"]), worker(tmp_path / "2", ["b", "c"])
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("UPDATE steps SET info = zeroblob(length(info)) WHERE prompt = 0 AND chain = 1 AND step = 4")
    with pytest.raises(StoreError, match=r"prompt 0, chain 1 differs from that of .* \(prompt 1\) at step 4"):
        merge([one, other], tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"alpha": 3.0}, "its alpha is 3.0, that of"), ({"seed": 4}, "its seed is 4"), ({"thin": 2}, "its thin is 2")],
)
def test_other_runs_are_not_joined(tmp_path, change, message):
    one, other = worker(tmp_path / "1", ["a"]), worker(tmp_path / "2", ["b"], **change)
    with pytest.raises(StoreError, match=message):
        merge([one, other], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_merging_needs_inputs_and_a_free_output(tmp_path):
    one = worker(tmp_path / "1", ["a"])
    with pytest.raises(ArgumentError, match="there is nothing to merge"):
        merge([], tmp_path / "all")
    with pytest.raises(StoreError, match="holds a run already"):
        merge([one], one)
    with pytest.raises(StoreError, match="there is no such file"):
        merge([one, tmp_path / "2"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_reading_while_it_is_written(file):
    """A copy of the file and its log at any moment is a store too: that is what a killed process leaves behind."""
    steps = []

    def look(*_):
        run = load(file)
        steps.append(sum(chain.steps for row in run.chains for chain in row))
        if len(steps) == 11:
            for end in ("", "-wal"):
                shutil.copy(f"{file}{end}", f"{file}.copy{end}")

    power_sample(FakeLM(), ["a", "b"], **SMALL, store=file, callbacks=[look])
    assert steps == list(range(1, 37))
    copy = f"{file}.copy"
    assert about(copy).steps == 11
    resume(copy, FakeLM())
    assert digest(copy) == digest(file)
    assert not math.isnan(load(copy).log_p[0][0])
