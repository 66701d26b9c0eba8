"""Configuration files: read strictly, written so that they read back the same; and every command takes one."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc import config
from powermc.errors import ArgumentError
from powermc.visible import visible

OPTIONS = {
    "alpha": config.NUMBER,
    "steps": config.INTEGER,
    "cut": config.TEXT,
    "json": config.SWITCH,
    "stop": config.TEXTS,
    "out": config.FILE,
    "max_new_tokens": config.INTEGER,
    "layers": config.COMMAS,
}
COMMANDS = {"sample": OPTIONS, "doctor": {"model": config.TEXT}, "pilot": OPTIONS}


@pytest.fixture
def read(tmp_path):
    def read(text, command="sample"):
        file = tmp_path / "run.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return config.read(file, command, COMMANDS)

    return read


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "alpha": st.floats(),
        "steps": st.integers(-(2**63), 2**63 - 1),
        "cut": TEXT,
        "json": st.booleans(),
        "stop": st.lists(TEXT),
        "max_new_tokens": st.none(),
    },
)


def same(a, b):
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@given(VALUES, st.lists(TEXT, max_size=2))
def test_what_is_written_reads_back_the_same(tmp_path_factory, values, notes):
    text = config.write("sample", values, notes)
    file = tmp_path_factory.getbasetemp() / "written.toml"
    file.write_text(text, encoding="utf-8", newline="\n")
    found = config.read(file, "sample", COMMANDS)
    expected = {name: value for name, value in values.items() if value is not None}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same(found[name], value), name
    assert visible(text) == text  # nothing acts on a terminal


def test_a_table_goes_before_the_keys_at_the_top_and_others_do_not_count(read):
    text = "alpha = 2\nsteps = 3\n[sample]\nalpha = 5\n[pilot]\nalpha = 7\njson = true\n"
    assert read(text) == {"alpha": 5.0, "steps": 3}
    assert read(text, "pilot") == {"alpha": 7.0, "steps": 3, "json": True}
    assert read("[sample]\nalpha = 5\n", "doctor") == {}
    assert read(b"") == {}


def test_values_become_what_the_options_hold(read):
    text = '\ufeffalpha = 2\nstop = "x"\nout = "a/b.json"\nmax-new-tokens = 7\nlayers = [12, 16]\r\n'
    found = read(text)
    assert found == {"alpha": 2.0, "stop": ["x"], "out": Path("a/b.json"), "max_new_tokens": 7, "layers": "12,16"}
    assert isinstance(found["alpha"], float)


BAD = [
    ("alhpa = 2", ":alhpa: no option of 'powermc sample'; did you mean 'alpha'?"),
    ("[sample]\nmax_tokens = 2", ":sample.max_tokens: no option of 'powermc sample'; did you mean 'max_new_tokens'?"),
    ("[pilot]\nxyzzy = 2", ":pilot.xyzzy: no option of 'powermc pilot'"),
    ("[smaple]\nalpha = 2", ":smaple: there is no command of this name; did you mean 'sample'?"),
    ('model = "m"', ":model: no option of 'powermc sample'; it is one of doctor: put it under [doctor]"),
    ("alpha = true", ":alpha: must be a number, got true"),
    ('alpha = "4"', ":alpha: must be a number, got '4'"),
    ("steps = 4.0", ":steps: must be a whole number, got 4.0"),
    ("steps = false", ":steps: must be a whole number, got false"),
    ("json = 1", ":json: must be true or false, got 1"),
    ("cut = 3", ":cut: must be a string, got 3"),
    ('cut = ["a"]', ":cut: must be a string, got ['a']"),
    ('stop = ["a", 3]', ":stop: must be a string or a list of strings, got ['a', 3]"),
    ("stop = 2020-01-01", ":stop: must be a string or a list of strings, got 2020-01-01 (date)"),
    ('out = ""', ":out: must be the name of a file, a string, got ''"),
    ("layers = [[1]]", ":layers: must be a list, or a string with commas between, got [[1]]"),
    ("max-new-tokens = 3\nmax_new_tokens = 3", ":max_new_tokens: given twice, with dashes and without"),
    ("[sample.alpha]\nx = 1", ":sample.alpha: must be a number, got {'x': 1} (dict)"),
    ("alpha 3", " is not TOML: "),
    ("alpha = 3\nalpha = 4", " is not TOML: "),
    (b"\xff", ": it is not UTF-8"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[str(text) for text, _ in BAD])
def test_bad_files_name_the_file_and_the_key(read, tmp_path, text, message):
    with pytest.raises(ArgumentError) as caught:
        read(text)
    assert f"{tmp_path / 'run.toml'}{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot read .*: Is a directory"):
        config.read(tmp_path, "sample", COMMANDS)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ArgumentError, match=r"'\\udc80' is not Unicode text"):
        config.write("sample", {"cut": "a\udc80"})


def test_comments_stay_comments():
    text = config.write("sample", {"steps": 1}, ["one\ntwo = 2\x1b[2J", "", "\r[doctor]"])
    assert tomllib.loads(text) == {"sample": {"steps": 1}}
    assert all(re.match(r"#|\[sample\]|steps", line) for line in text.splitlines() if line)
