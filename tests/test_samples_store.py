"""`powermc.sample` with a store: what is written is what was drawn, resuming, values of all types, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import powermc
from powermc import (
    ArgumentError,
    ChainError,
    Field,
    Metropolis,
    Mixture,
    NonFiniteLogits,
    Power,
    Prompt,
    RandomWalk,
    Run,
    Samples,
    SequenceProbability,
    State,
    StoreError,
    Suffix,
    Table,
    ZeroProbability,
    power_sample,
    sample,
)
from powermc.cli import main
from powermc.sequences import cut_law
from powermc.store import FORMAT, about, about_samples, digest, load_run, load_samples, merge, resume
from powermc.store.samples_writing import SamplesWriter
from powermc.store.values import from_text, to_text, without_scores
from tests.fake_lm import FakeLM


def near(i):
    return [j for j in (i - 1, i + 1) if 0 <= j < 6]


TABLE = Table({i: -0.5 * (i - 2) ** 2 for i in range(6)})
WALK = Metropolis(TABLE, RandomWalk(near))
RUN = {"draws": 7, "warmup": 3, "thin": 2, "chains": 3, "seed": 1}


@dataclass(frozen=True)
class Counter:
    """Counts its steps in values that `make` makes of numbers; a chain ends with an error at a step of `fail`."""

    make: object = int
    fail: tuple[int, ...] = ()
    fields = {"odd": Field("bool", False), "age": Field("int16", -7), "word": Field("object", None)}  # noqa: RUF012

    def init(self, value):
        return State(value, -0.0)
        yield

    def step(self, choices, state):
        age = int(1 - state.log_density)
        if age in self.fail:
            raise NonFiniteLogits(f"NaN logits at {age}")
        info = {"odd": bool(age % 2), "age": age} | ({"word": (age, "x")} if age > 2 else {})
        return State(self.make(age // 2), -float(age)), info
        yield


class Press:
    """Presses Ctrl-C after so many steps of all chains."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self, *step):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.db"


def same(one, other):
    """Bit for bit, but for errors, which are the same in words."""
    assert one.values == other.values
    for a, b in ((one.infos, other.infos), (one.warmup_infos, other.warmup_infos)):
        assert a.keys() == b.keys()
        for name, values in a.items():
            assert values.dtype == b[name].dtype
            assert values.shape == b[name].shape
            assert repr(values.tolist()) == repr(b[name].tolist()), name
    assert one.log_density.tobytes() == other.log_density.tobytes()
    assert {c: repr(e) for c, e in one.errors.items()} == {c: repr(e) for c, e in other.errors.items()}
    assert one.interrupted == other.interrupted


# What is written.


@pytest.mark.parametrize("options", [{}, {"thin": 1, "warmup": 0}, {"first": 11}, {"draws": 1}, {"chains": 1}], ids=str)
@pytest.mark.parametrize("kernel", [WALK, Counter()], ids=["walk", "counter"])
def test_what_is_stored_is_what_was_drawn(file, kernel, options):
    arguments = {**RUN, **options}
    stored = sample(kernel, 2, **arguments, store=file)
    for found in (stored, powermc.load(file), Samples.load(file), load_samples(str(file))):
        same(found, sample(kernel, 2, **arguments))
    assert os.listdir(file.parent) == ["run.db"], "one file, no log and no lock"


def test_paths_are_stored_with_their_scores(file):
    model = FakeLM()
    space = model.space(6)
    kernel = Metropolis(
        Power(SequenceProbability(model), 2.0),
        Suffix(model, space, cut_law("length", start=0, horizon=6, block_size=6), 0.5),
    )
    start = space.path(Prompt((1, 2), "a\ud800", 5), (0, 1, 2, 3, 4, 5))
    memory = sample(kernel, start, **RUN)
    sample(kernel, start, **RUN, store=file, callbacks=[Press(20)])
    stored = sample(kernel, start, **RUN, store=file, resume=True)
    assert stored.values == memory.values
    paths = [path for chain in stored.values for path in chain]
    assert [p.log_prob for p in paths] == [p.log_prob for chain in memory.values for p in chain]
    assert {p.prompt for p in paths} == {start.prompt}
    assert [p.finished for p in paths] == [p.finished for chain in memory.values for p in chain]
    assert stored.infos["proposed"].tolist() == memory.infos["proposed"].tolist(), "infos that are no numbers"
    assert stored.infos["tokens"].dtype == np.int32


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
        st.integers(-100, 100).map(np.int8), st.floats(width=32).map(np.float32), st.floats().map(np.float64),
        st.complex_numbers().map(np.complex128), st.booleans().map(np.bool_), st.just(np.datetime64("2026-11-22")),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)  # fmt: skip


@given(VALUES)
def test_values_come_back_as_they_were(value):
    """Type by type, NaN and -0.0 included; and their text says it all."""
    found = from_text(to_text(value))
    assert type(found) is type(value)
    assert repr(found) == repr(value)
    assert to_text(found) == to_text(value) == without_scores(to_text(value))


@pytest.mark.parametrize(
    "array",
    [np.arange(6).reshape(2, 3).T, np.zeros((0, 3), "f4"), np.array(1.5), np.array(["a", "bc"]), np.array([True])],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_arrays_come_back_as_they_were(array):
    found = from_text(to_text((array, 1)))[0]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)
    assert found.flags.writeable


def test_numbers_of_any_size():
    for value in (10**5000, -(2**4096), 2**64):
        assert from_text(to_text(value)) == value


class Named(str):
    pass


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Fraction(1, 2), "fractions.Fraction"),
        ({1: 2}, "dict"),
        ((1, [object()]), "object"),
        (b"ab", "bytes"),
        (Named("a"), "tests.test_samples_store.Named"),
        (np.array([None]), "numpy.ndarray of dtype object"),
        (np.ma.masked_array([1.0]), "MaskedArray of dtype float64"),
        (np.zeros(1, [("a", "i4")]), r"numpy.ndarray of dtype \[\('a'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_values_of_other_types_are_refused_before_anything_is_done(file, value, name):
    with pytest.raises(ArgumentError, match=f"a value of type .*{name}.* cannot be written to a store; give encode="):
        sample(Counter(), value, draws=2, store=file)
    assert not os.listdir(file.parent)


def as_fraction(value):
    return Fraction(*value)


def as_pair(value):
    return value.as_integer_ratio()


def test_other_types_by_functions_of_ones_own(file):
    kernel, options = Counter(Fraction), {**RUN, "encode": as_pair, "decode": as_fraction}
    sample(kernel, Fraction(1, 3), **options, store=file, callbacks=[Press(9)])
    stored = sample(kernel, Fraction(1, 3), **options, store=file, resume=True)
    same(stored, sample(kernel, Fraction(1, 3), **RUN))
    same(powermc.load(file, decode=as_fraction), stored)
    with pytest.raises(StoreError, match="its values were written by encode=as_pair; give what undoes it: decode="):
        powermc.load(file)
    with pytest.raises(StoreError, match="drawn with encode = 'as_pair', and None is asked for"):
        sample(kernel, (1, 3), **RUN, store=file, resume=True)


def test_functions_must_undo_each_other(file):
    for options, message in (
        ({"encode": as_pair}, "encode and decode undo each other: give both, or neither"),
        ({"encode": as_pair, "decode": 3}, "decode must be a function, got 3"),
        ({"encode": as_pair, "decode": lambda pair: Fraction(7)}, r"decode does not undo encode: Fraction\(1, 3\)"),
        ({"encode": as_fraction, "decode": as_pair}, "cannot be written|got multiple|argument after"),
    ):
        with pytest.raises((ArgumentError, TypeError), match=message):
            sample(Counter(Fraction), Fraction(1, 3), **RUN, **options, store=file)
    assert not os.listdir(file.parent)


def test_a_value_of_another_type_later_ends_the_run_and_loses_nothing(file):
    def make(n):
        return n if n < 2 else {n}

    with pytest.raises(ArgumentError, match="a value of type set cannot be written"):
        sample(Counter(make), 0, draws=9, chains=1, store=file)
    assert len(powermc.load(file).values[0]) == 3


def test_infos_that_cannot_be_written_are_named(file):
    class Chatty(Counter):
        def step(self, choices, state):
            return state, {self.said[0]: self.said[1]}
            yield

    for said, message in (
        (("word", {1}), "info 'word' holds set, which cannot be written to a store"),
        (("secret", 1), "info 'secret' but does not declare it"),
    ):
        kernel = Chatty()
        object.__setattr__(kernel, "said", said)
        with pytest.raises(ArgumentError, match=message):
            sample(kernel, 0, draws=1, store=file.with_name(said[0]))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int8", 3), ("uint64", 2**63), ("float16", 1.5), ("float32", 0.1), ("complex64", 1 + 2j), ("<U3", "abc"),
     ("bool", True), ("int32", 2.0), ("float64", True)],
)  # fmt: skip
def test_infos_of_any_dtype(file, dtype, value):
    class Kind(Counter):
        fields = {"it": Field(dtype, 0)}  # noqa: RUF012

        def step(self, choices, state):
            return state, {"it": value} if choices.at("x").integers(2) else {}
            yield

    same(sample(Kind(), 0, **RUN, store=file), sample(Kind(), 0, **RUN))


# Going on.


@settings(max_examples=20, deadline=None)
@given(
    stops=st.lists(st.integers(1, 30), max_size=4),
    chains=st.integers(1, 3),
    draws=st.integers(1, 6),
    warmup=st.integers(0, 4),
    thin=st.integers(1, 3),
    first=st.integers(0, 5),
)
def test_any_run_stopped_anywhere_is_the_run(tmp_path_factory, stops, **options):
    folder = tmp_path_factory.mktemp("stops")
    file, arguments = folder / "run.db", {**options, "seed": 4}
    for stop in stops:
        sample(WALK, 0, **arguments, store=file, resume=True, callbacks=[Press(stop)])
    taken = 0 if not stops else about_samples(file).steps
    seen = []
    found = sample(WALK, 0, **arguments, store=file, resume=True, callbacks=[lambda *step: seen.append(step[:2])])
    same(found, sample(WALK, 0, **arguments))
    assert len(seen) == len(set(seen)) == about_samples(file).planned - taken, "no stored step is taken again"
    sample(WALK, 0, **arguments, store=folder / "whole.db")
    assert digest(file) == digest(folder / "whole.db")


def test_more_draws_and_more_chains(file):
    sample(WALK, [0, 3], **{**RUN, "chains": 2}, store=file)
    more = {**RUN, "draws": 12, "chains": 3}
    found = sample(WALK, [0, 3, 5], **more, store=file, resume=True)
    same(found, sample(WALK, [0, 3, 5], **more))
    assert about_samples(file).header.settings["draws"] == 12
    assert len(about_samples(file).header.sessions) == 2


def test_a_run_that_is_done_asks_for_nothing(file):
    sample(WALK, 0, **RUN, store=file)

    class Idle(Metropolis):
        def init(self, value):
            raise AssertionError("it was begun")

    idle = Idle(WALK.target, WALK.proposal)
    Idle.__qualname__ = "Metropolis"
    same(sample(idle, 0, **RUN, store=file, resume=True), sample(WALK, 0, **RUN))


def test_a_chain_that_failed_is_tried_again(file):
    with pytest.warns(RuntimeWarning, match="chain 0 stopped after 1 draws: NaN logits at 4"):
        found = sample(Counter(fail=(4,)), 0, draws=5, thin=2, chains=1, store=file)
    assert isinstance(found.errors[0], NonFiniteLogits)
    assert isinstance(powermc.load(file).errors[0], NonFiniteLogits)
    assert not found.interrupted
    with pytest.raises(StoreError, match=r"kernel.fail = '\{\"tuple\":\[4\]\}', and '\{\"tuple\":\[\]\}' is asked for"):
        sample(Counter(), 0, draws=5, thin=2, chains=1, store=file, resume=True)
    mended = Counter(fail=(4,))
    object.__setattr__(mended, "step", Counter().step)
    found = sample(mended, 0, draws=5, thin=2, chains=1, store=file, resume=True)
    same(found, sample(Counter(), 0, draws=5, thin=2, chains=1))


def test_all_chains_failing_at_once(file):
    for _ in range(2):
        with pytest.raises(ZeroProbability, match="initial value 17 has probability zero"):
            sample(WALK, 17, draws=3, store=file, resume=True)
    assert all(isinstance(error, ZeroProbability) for error in powermc.load(file).errors.values())
    assert about_samples(file).failed == 4


def test_a_crash_loses_nothing(file, tmp_path):
    def crash(chain, step, state, info):
        if step == 4:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        sample(WALK, 0, **RUN, store=file, callbacks=[crash])
    same(sample(WALK, 0, **RUN, store=file, resume=True), sample(WALK, 0, **RUN))


def test_reading_while_it_is_written(file):
    """A copy of the file and its log at any moment is a store too: that is what a killed process leaves behind."""
    steps = []

    def look(*_):
        steps.append(about_samples(file).steps)
        assert powermc.load(file).interrupted == (len(steps) < 51)
        if len(steps) == 20:
            for end in ("", "-wal"):
                shutil.copy(f"{file}{end}", f"{file}.copy{end}")

    sample(WALK, 0, **RUN, store=file, callbacks=[look])
    assert steps == list(range(1, 52))
    assert about_samples(f"{file}.copy").steps == 20
    sample(WALK, 0, **RUN, store=f"{file}.copy", resume=True)
    assert digest(f"{file}.copy") == digest(file)


def test_what_stays_takes_no_room(file):
    """A value is written where it is another than before; here at every other draw."""
    sample(Counter(lambda n: "v" * 1000), "v" * 1000, draws=50, chains=1, store=file)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM steps WHERE value IS NOT NULL").fetchone()[0] == 1
    assert len(powermc.load(file).values[0]) == 50


def test_progress_counts_what_is_left(file, capsys, monkeypatch):
    monkeypatch.setattr("powermc.progress.PLAIN_INTERVAL", 0.0)
    sample(WALK, 0, **RUN, store=file, callbacks=[Press(11)])
    sample(WALK, 0, **RUN, store=file, resume=True, progress=True)
    assert capsys.readouterr().err.splitlines()[-1].startswith("powermc: 40/40 steps")


# What is refused.


def further(i):
    return [j for j in (i - 1, i + 1) if 0 <= j < 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed = 1, and 2 is asked for; only more chains and more draws can be added"),
        ({"warmup": 2}, "warmup = 3, and 2 is asked for"),
        ({"thin": 1}, "thin = 2, and 1 is asked for"),
        ({"first": 3}, "first = 0, and 3 is asked for"),
        ({"draws": 6}, "it has draws = 7, and fewer, 6, are asked for; give at least 7"),
        ({"chains": 2}, "it has chains = 3, and fewer, 2, are asked for"),
        ({"initial": [2, 2, 1]}, "initial value 2 = '2', and '1' is asked for"),
        ({"initial": 2.0}, "initial value 0 = '2', and '2.0' is asked for"),
        ({"kernel": Mixture([WALK], [1.0])}, "kernel = 'Metropolis', and 'Mixture' is asked for"),
        ({"kernel": replace(WALK, early_rejection=False)}, "kernel.early_rejection = True, and False is asked for"),
        ({"kernel": replace(WALK, target=Power(TABLE, 2.0))}, "kernel.target = 'Table', and 'Power' is asked for"),
        ({"kernel": replace(WALK, target=Table({2: 0.0}))}, "kernel.target.log_weights = '6 entries, hash "),
        (
            {"kernel": replace(WALK, proposal=RandomWalk(further))},
            "kernel.proposal.neighbours = 'near', and 'further' is asked for",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_any_other_change_is_refused_by_name(file, change, message):
    sample(WALK, 2, **RUN, store=file, callbacks=[Press(15)])
    before = digest(file)
    arguments = {"kernel": WALK, "initial": 2, **RUN, **change}
    with pytest.raises(StoreError) as caught:
        sample(arguments.pop("kernel"), arguments.pop("initial"), **arguments, store=file, resume=True)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert digest(file) == before
    same(sample(WALK, 2, **RUN, store=file, resume=True), sample(WALK, 2, **RUN))


def test_a_weight_in_a_mixture_is_refused(file):
    two = Mixture([WALK, replace(WALK, target=Power(TABLE, 1.0))], [0.5, 0.5])
    sample(two, 2, **RUN, store=file)
    with pytest.raises(StoreError, match=r"kernel\.weights = '\[0\.5,0\.5\]', and '\[0\.4,0\.6\]' is asked for"):
        sample(replace(two, weights=[0.4, 0.6]), 2, **RUN, store=file, resume=True)


def test_declared_fields_are_compared(file):
    class Other(Counter):
        fields = {**Counter.fields, "age": Field("int32", -7)}  # noqa: RUF012

    sample(Counter(), 0, **RUN, store=file)
    Other.__qualname__ = "Counter"
    with pytest.raises(StoreError, match=r"field age = \['int16', -7\], and \['int32', -7\] is asked for"):
        sample(Other(), 0, **RUN, store=file, resume=True)


def test_another_target_is_noticed_by_its_density(file):
    """A function is compared by name only; but the initial values must have the log density that they had."""

    def with_scale(scale):
        class Target:
            def log_density(self, value):
                return -scale * (value - 1) ** 2

            def missing(self, value):
                return None

        return Metropolis(Target(), RandomWalk(near))

    sample(with_scale(1.0), 5, **RUN, store=file, callbacks=[Press(15)])
    before = digest(file)
    with pytest.raises(StoreError, match=r"value of chain 0 had log density -16, and has -14\.4 under the kernel"):
        sample(with_scale(0.9), 5, **{**RUN, "draws": 9}, store=file, resume=True)
    assert digest(file) == before
    assert about_samples(file).header.settings["draws"] == 7, "what it held, it still holds"
    sample(with_scale(1 + 1e-9), 5, **RUN, store=file, resume=True)


def test_a_store_is_not_written_over(file):
    sample(WALK, 0, **RUN, store=file)
    before = file.read_bytes()
    with pytest.raises(StoreError, match="it holds samples already; go on with them: resume=True; or name another"):
        sample(WALK, 0, **RUN, store=file)
    assert file.read_bytes() == before


def test_options_of_a_store_need_one():
    for options in ({"resume": True}, {"encode": as_pair, "decode": as_fraction}):
        with pytest.raises(ArgumentError, match=r"has no effect without a store; name a file with store="):
            sample(WALK, 0, draws=1, **options)
    with pytest.raises(ArgumentError, match="resume must be True or False, got 'yes'"):
        sample(WALK, 0, draws=1, store="x", resume="yes")


def test_two_writers(file):
    seen = []

    def second(*_):
        if not seen:
            with pytest.raises(StoreError, match="another process is writing it; wait for its end"):
                sample(WALK, 0, **RUN, store=file, resume=True)
            seen.append(powermc.load(file))  # but it can be read

    sample(WALK, 0, **RUN, store=file, callbacks=[second])
    assert seen[0].interrupted


def test_a_run_and_samples_are_not_taken_for_each_other(file, tmp_path):
    run = tmp_path / "power.db"
    small = {"max_new_tokens": 4, "steps": 2, "chains": 2}
    power_sample(FakeLM(), "a", **small, store=run)
    sample(WALK, 0, **RUN, store=file)
    assert isinstance(powermc.load(run), Run)
    assert isinstance(powermc.load(file), Samples)
    for call in (
        lambda: load_run(file),
        lambda: Run.load(file),
        lambda: about(file),
        lambda: resume(file, FakeLM()),
        lambda: merge([file], tmp_path / "all.db"),
        lambda: power_sample(FakeLM(), "a", **small, store=file, resume=True),
    ):
        with pytest.raises(StoreError, match=r"it holds samples of a kernel \(powermc\.sample\), and no run"):
            call()
    for call in (
        lambda: Samples.load(run),
        lambda: about_samples(run),
        lambda: sample(WALK, 0, **RUN, store=run, resume=True),
    ):
        with pytest.raises(StoreError, match="it holds a run of power_sample, and no samples of a kernel"):
            call()
    with pytest.raises(StoreError, match="it holds a run of power_sample, which decode has no effect on"):
        powermc.load(run, decode=str)
    with pytest.raises(StoreError, match="its values were written as they are; leave decode out"):
        powermc.load(file, decode=str)
    assert not (tmp_path / "all.db").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("DELETE FROM steps WHERE step = 5 AND chain = 1", "chain 1 has 16 of 17 steps: it is damaged"),
        ("UPDATE header SET value = '{}' WHERE name = 'settings'", "its header is not whole"),
        ("DELETE FROM header WHERE name = 'initial'", "its header is not whole"),
        ("UPDATE header SET value = '\"wine\"' WHERE name = 'kind'", "it holds wine, which this powermc does not know"),
        (f"PRAGMA user_version = {FORMAT + 1}", "it was written by a newer powermc"),
    ],
)
def test_damage_is_named(file, damage, message):
    sample(WALK, 0, **RUN, store=file)
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute(damage)
    for call in (lambda: powermc.load(file), lambda: sample(WALK, 0, **RUN, store=file, resume=True)):
        with pytest.raises(StoreError) as caught:
            call()
        assert message in str(caught.value)
        assert str(file) in str(caught.value)


FULL = """
import resource, sys
sys.path.insert(0, {root!r})
from powermc import StoreError, sample
from tests.test_samples_store import Counter
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
try:
    sample(Counter(str), "0", draws=20_000, chains=2, store={file!r})
except StoreError as error:
    print(error)
"""


def test_a_full_disk_loses_nothing(file):
    """A file that may not grow is a disk that is full, to SQLite."""
    pytest.importorskip("resource")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script = FULL.format(root=root, file=str(file))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert "what was committed is kept: " in done.stdout
    steps = about_samples(file).steps
    assert steps > 10
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    with closing(sqlite3.connect(file)) as connection, connection:  # the rest of 20,000 draws is not waited for
        text = json.dumps({**about_samples(file).header.settings, "draws": steps})
        connection.execute("UPDATE header SET value = ? WHERE name = 'settings'", (text,))
    same(
        sample(Counter(str), "0", draws=steps, chains=2, store=file, resume=True),
        sample(Counter(str), "0", draws=steps, chains=2),
    )


# What is shown.


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run


def test_a_store_is_shown(cli, file):
    sample(WALK, [0, 2, 4], **RUN, store=file, callbacks=[Press(40)])
    code, out, err = cli("show", file)
    assert (code, err) == (0, "")
    assert "samples of Metropolis (target Table, proposal RandomWalk)" in out
    assert "3 chains, 3 steps of warm-up, 7 draws, one every 2 steps, seed 1" in out
    assert "40 of 51 steps, 15 draws" in out
    assert "go on with it in Python: powermc.sample(" in out.replace("\n", " ")
    _, out, err = cli("show", file, "--follow")
    assert out.startswith("40/51 steps  accepted ")
    assert "go on with it in Python" in err
    sample(WALK, [0, 2, 4], **RUN, store=file, resume=True)
    code, out, err = cli("show", file, "--json")
    found = json.loads(out)
    assert found["values"] == sample(WALK, [0, 2, 4], **RUN).values
    assert (code, err, found["interrupted"], found["kind"]) == (0, "", False, "samples")
    assert cli("show", file, "--follow")[:1] == (0,)
    assert "something is left" not in cli("show", file)[1]


def test_a_chain_without_a_step_is_shown(cli, file):
    class Half(Counter):
        def step(self, choices, state):
            if state.value == "bad":
                raise NonFiniteLogits("NaN logits")
            return (yield from super().step(choices, state))

    with pytest.warns(RuntimeWarning):
        sample(Half(), [0, "bad"], draws=2, chains=2, store=file)
    code, out, _ = cli("show", file)
    assert code == 0
    assert "stopped: NaN logits" in out


def test_commands_that_need_a_run_say_so(cli, file, tmp_path):
    sample(WALK, 0, **RUN, store=file)
    for command in (
        ("resume", file),
        ("report", file, "-o", tmp_path / "x.html"),
        ("merge", file, "-o", tmp_path / "all.db"),
    ):
        code, out, err = cli(*command)
        assert (code, out) == (2, "")
        assert "it holds samples of a kernel (powermc.sample)" in err
        assert len(err.splitlines()) == 1
    code, _, err = cli("show", file, "--settings")
    assert code == 2
    assert "which no settings repeat; leave --settings out" in err


def test_the_writer_is_closed_by_whatever_goes_wrong(file, monkeypatch):
    """The lock is given back, and an empty file is not left behind."""

    def broken(self, asked):
        raise KeyboardInterrupt

    monkeypatch.setattr(SamplesWriter, "_opened", broken)
    with pytest.raises(KeyboardInterrupt):
        sample(WALK, 0, **RUN, store=file)
    assert not os.listdir(file.parent)
    monkeypatch.undo()
    sample(WALK, 0, **RUN, store=file)
    assert not math.isnan(powermc.load(file).log_density[0, 0])
    assert issubclass(ZeroProbability, ChainError)
