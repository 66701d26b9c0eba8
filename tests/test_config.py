"""Configuration files: read strictly, written so that they read back the same; and every command takes one."""

from __future__ import annotations

import inspect
import json
import math
import re
import tomllib
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

import powermc.lm
from powermc import config
from powermc.cli import app, main
from powermc.cli.command import COMMANDS as REGISTERED
from powermc.cli.command import kinds, options_of
from powermc.cli.sampling import Sample
from powermc.errors import ArgumentError
from powermc.settings import Settings
from powermc.visible import visible
from tests.fake_lm import FakeLM

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
    ("alpha = " + "[" * 20_000, " is not TOML: "),
    ("alpha = 1" + "0" * 400, ":alpha: must be a number, got 1000"),
    ("[[sample]]\nalpha = 1", ":sample: no option of 'powermc sample'"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[str(text)[:30] for text, _ in BAD])
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


# Every command, whatever commands there are.

GROUP = typer.main.get_command(app)
NAMES = list(GROUP.commands)  # type: ignore[attr-defined]

VALUE = {
    config.TEXT: "some text",
    config.INTEGER: 3,
    config.NUMBER: 0.5,
    config.SWITCH: True,
    config.FILE: "some/file",
    config.TEXTS: ["a", "b"],
    config.FILES: ["a", "b"],
    config.COMMAS: [3, "x"],
}
TAKEN = {config.FILE: Path("some/file"), config.FILES: [Path("a"), Path("b")], config.COMMAS: "3,x"}


def parsed(name, *arguments):
    """The options of a command as it would get them."""
    command = GROUP.commands[name]  # type: ignore[attr-defined]
    return command.make_context(name, [str(argument) for argument in arguments]).params


@pytest.fixture
def toml(tmp_path):
    def write(values, name=None):
        file = tmp_path / "run.toml"
        file.write_text(config.write(name, values) if name else values)
        return file

    return write


def test_every_command_is_known():
    assert set(NAMES) == set(REGISTERED)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_all_its_options_from_a_file(toml, name):
    options = kinds(REGISTERED[name])
    file = toml({option: VALUE[kind] for option, kind in options.items()}, name)
    found = parsed(name, "--config", file)
    for option, kind in options.items():
        value = list(found[option]) if isinstance(found[option], tuple) else found[option]
        assert value == TAKEN.get(kind, VALUE[kind]), option
    assert found["print_config"] is False


@pytest.mark.parametrize("name", NAMES)
def test_every_command_refuses_what_it_does_not_know(toml, capsys, name):
    for text, message in [
        ("verbos = 1", f"verbos: no option of 'powermc {name}'; did you mean 'verbose'?"),
        ("verbose = 0.5", "verbose: must be a whole number, got 0.5"),
        ("config = 'a'", f"config: no option of 'powermc {name}'"),
    ]:
        file = toml(text)
        assert main([name, "--config", str(file)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: {file}:{message}")
        assert err.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_help_is_a_line_or_two_per_option(capsys, name):
    assert main([name, "--help"]) == 0
    out, _ = capsys.readouterr()
    for option, (annotation, _) in options_of(REGISTERED[name]).items():
        info = next(part for part in annotation.__metadata__ if hasattr(part, "help"))
        assert info.help, option
        assert info.help[0].isupper() or info.help[0] in "'-", option
        assert info.help[-1] == ".", option
    for option in ("--config", "--print-config", "--verbose"):
        assert option in out


def needed(name):
    """What a command cannot do without."""
    required = [parameter for parameter in GROUP.commands[name].params if parameter.required]  # type: ignore[attr-defined]
    return [part for parameter in required for part in (*parameter.opts[-1:], "x") if part != parameter.name]


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_configuration_works_unchanged(tmp_path, capsys, name):
    assert main([name, *needed(name), "--print-config"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert list(tomllib.loads(out)) == [name]
    file = tmp_path / "printed.toml"
    file.write_text(out)
    assert main([name, "--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr() == (out, "")


@given(
    name=st.sampled_from(["alpha", "steps", "seed", "chains", "max_new_tokens"]),
    line=st.none() | st.integers(1, 9),
    table=st.none() | st.integers(10, 19),
    top=st.none() | st.integers(20, 29),
)
def test_the_command_line_goes_before_the_table_before_the_top(tmp_path_factory, name, line, table, top):
    file = tmp_path_factory.getbasetemp() / "precedence.toml"
    parts = [] if top is None else [f"{name} = {top}"]
    parts += ["[sample]", *([] if table is None else [f"{name} = {table}"]), "[pilot]", f"{name} = 99"]
    file.write_text("\n".join(parts))
    given = [] if line is None else [f"--{name.replace('_', '-')}", line]
    found = parsed("sample", *given, "--config", file)[name]
    assert found == next((value for value in (line, table, top) if value is not None), None)


# Runs.


@pytest.fixture
def cli(monkeypatch, capsys):
    class Loader:
        calls: list = []  # noqa: RUF012

        def from_pretrained(self, name, **options):
            self.calls.append((name, options))
            return FakeLM()

    loader = Loader()
    monkeypatch.setitem(powermc.lm.__dict__, "CausalLM", loader)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    run.loader = loader  # type: ignore[attr-defined]
    return run


def drawn(text):
    return [[chain["text"] for chain in prompt["chains"]] for prompt in json.loads(text)["prompts"]]


SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 3, "chains": 3, "alpha": 2, "seed": 5}


def test_a_file_does_what_the_options_do(cli, toml):
    options = [str(part) for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", value)]
    _, plain, _ = cli("sample", "q", *options, "--no-chat", "--model", "m", "--json", "-q")
    file = toml({**SMALL, "chat": False, "json": True, "quiet": True, "question": "q", "model": "m"}, "sample")
    code, out, err = cli("sample", "--config", file)
    assert (code, err) == (0, "")
    assert drawn(out) == drawn(plain)
    _, other, _ = cli("sample", "--config", file, "--seed", "6", "--chat")
    assert drawn(other) != drawn(out)
    assert json.loads(other)["settings"]["seed"] == 6
    assert [name for name, _ in cli.loader.calls] == ["m"] * 3


def test_what_is_printed_repeats_the_run(cli, tmp_path):
    given = [
        "sample",
        "--prompt",
        "é\x1b[2J",
        "--prompt",
        'b "c"',
        "--stop",
        "7",
        "--stop",
        "\u202e",
        "--memory",
        "1GB",
    ]
    small = {**SMALL, "temperature": 0.3, "cut": "entropy", "draws": 5}
    given += [part for name, value in small.items() for part in (f"--{name.replace('_', '-')}", value)]
    _, printed, _ = cli(*given, "--print-config")
    file = tmp_path / "printed.toml"
    file.write_text(printed, encoding="utf-8")
    _, first, _ = cli(*given, "--json", "-q")
    _, second, _ = cli("sample", "--config", file, "--json", "-q")
    assert drawn(first) == drawn(second)
    assert json.loads(first)["settings"] == json.loads(second)["settings"]
    assert cli.loader.calls[0] == cli.loader.calls[1]


def test_the_settings_of_a_run_repeat_it(cli, tmp_path):
    run = powermc.power_sample(FakeLM(), ["a", "b"], **SMALL, stop=["7"], kernel="metropolis")
    text = config.from_settings(run.settings, "m", {"dtype": "float64"}, [prompt.text for prompt in run.prompts])
    file = tmp_path / "stored.toml"
    file.write_text(text, encoding="utf-8")
    code, out, _ = cli("sample", "--config", file, "--json", "-q")
    assert code == 0
    assert drawn(out) == run.texts
    name, options = cli.loader.calls[0]
    assert (name, options["dtype"]) == ("m", "float64")


POSITIVE = st.floats(0.01, 100)
SHARES = st.floats(0.05, 0.95)
SETTINGS = {
    "alpha": st.floats(0, 100),
    "temperature": POSITIVE,
    "max_new_tokens": st.integers(1, 10**6),
    "block_size": st.integers(1, 10**6),
    "steps": st.integers(0, 10**6),
    "draws": st.integers(0, 10**6),
    "chains": st.integers(1, 10**6),
    "scope": st.sampled_from(["sequence", "block"]),
    "cut": st.sampled_from(["length", "horizon", "entropy"]),
    "seed": st.integers(0, 2**63 - 1),
    "stop": st.lists(TEXT.filter(bool)),
    "early_rejection": st.booleans(),
    "chat": st.booleans(),
}
SCREENED = {
    "layer": st.integers(1, 99),
    "proposal": st.sampled_from(["exit", "substitution", "full"]),
    "screen": st.floats(0, 10),
    "exit_temperature": POSITIVE,
    "plain": SHARES,
    "eta": POSITIVE,
    "delta": SHARES,
    "aggregate": st.sampled_from(["max", "mean"]),
}


@given(
    st.fixed_dictionaries({}, optional=SETTINGS),
    st.just({}) | st.fixed_dictionaries({"kernel": st.just("early-exit")}, optional=SCREENED),
    st.lists(TEXT, max_size=2),
)
def test_any_settings_come_back_from_their_text(tmp_path_factory, plain, screened, prompts):
    settings = Settings(**plain, **screened)
    file = tmp_path_factory.getbasetemp() / "settings.toml"
    file.write_text(config.from_settings(settings.as_dict(), "m", prompts=prompts), encoding="utf-8", newline="\n")
    found = parsed("sample", "--config", file)
    chosen = Sample(**{name: value for name, value in found.items() if name in kinds(Sample)})
    assert Settings(**chosen.given).as_dict() == settings.as_dict()
    assert list(chosen.prompt or []) == prompts
    assert chosen.model == "m"


def test_every_argument_of_the_api_is_an_option():
    """But for what only Python can give. A new one is either added to the command line or named here."""
    arguments = set(inspect.signature(powermc.power_sample).parameters)
    only_python = {"prompts", "reward", "reward_at_most", "progress", "callbacks"}
    assert arguments - only_python <= set(kinds(REGISTERED["sample"]))


def test_what_only_python_can_give_is_a_comment():
    settings = {"kernel": "early-exit", "exit": "Lens(m, layers 2, 3)", "reward": "length", "rows": 4, "alpha": 2.0}
    text = config.from_settings(settings, "m")
    assert tomllib.loads(text) == {"sample": {"model": "m", "kernel": "early-exit", "alpha": 2.0}}
    assert text.count("# ") == 2
    assert "function length" in text
    assert "exit, Lens(m, layers 2, 3), is no file" in text
    assert "lens.safetensors" in config.from_settings({**settings, "exit": "/a/lens.safetensors"}, "m")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('question = "a"\nprompt = ["b"]', "give one of: a question in quotes"),
        ('demo = true\nfile = "p.jsonl"', "give one of: a question in quotes"),
        ("alpha = -1", "alpha must be a finite number >= 0, got -1.0"),
        ('cut = "deep"', "unknown cut law 'deep'"),
        ("eta = 1.0", "eta has no effect with kernel 'metropolis'"),
        ('prompt = "a"\nresume = true', "--resume has no effect without a store"),
    ],
)
def test_the_checks_are_those_of_the_command_line(cli, toml, given, message):
    question = [] if re.search("question|demo|prompt", given) else ["q"]
    for extra in ([], ["--json"]):
        code, out, err = cli("sample", *question, "--config", toml(given), *extra)
        assert (code, out, cli.loader.calls) == (2, "", [])
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1


def test_a_source_on_the_command_line_replaces_that_of_the_file(cli, toml):
    file = toml({**SMALL, "prompt": ["of the file"]}, "sample")
    _, out, _ = cli("sample", "mine", "--config", file, "--json", "-q")
    assert [prompt["text"] for prompt in json.loads(out)["prompts"]] == ["mine"]
    _, out, _ = cli("sample", "--config", file, "--json", "-q")
    assert [prompt["text"] for prompt in json.loads(out)["prompts"]] == ["of the file"]
    code, _, err = cli("sample", "mine", "--demo", "--config", file)
    assert (code, "give one of" in err) == (2, True)


def test_no_such_file(cli, tmp_path):
    code, _, err = cli("sample", "--config", tmp_path / "none.toml")
    assert (code, err) == (2, f"error: cannot read {tmp_path / 'none.toml'}: No such file or directory\n")


def test_the_printed_demo_keeps_its_small_settings(cli):
    _, out, _ = cli("sample", "--demo", "--print-config", "--alpha", "3")
    printed = tomllib.loads(out)["sample"]
    assert (printed["demo"], printed["max_new_tokens"], printed["steps"], printed["alpha"]) == (True, 96, 3, 3.0)
