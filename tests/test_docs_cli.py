"""docs/cli.md names every option of every command, no other, and the defaults that the commands have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from powermc.cli import app, main
from powermc.cli.command import COMMANDS, options_of
from powermc.settings import Settings

TEXT = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.M | re.S))
GROUP = typer.main.get_command(app)


def rows(section):
    """(options, default) of every line of the table."""
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `-")]
    return [(re.findall(r"`(-[\w-]+)`", first), default.strip(" `|")) for first, default, *_ in cells]


def documented(section):
    return {option for options, _ in rows(section) for option in options}


def real(name):
    return [
        option
        for parameter in GROUP.commands[name].params  # type: ignore[attr-defined]
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    ]


COMMON = documented(SECTIONS["Options of every command"])
MODELS = documented(SECTIONS["Models"])


def test_every_command_has_a_section():
    assert {name.removeprefix("powermc ") for name in SECTIONS if name.startswith("powermc ")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_there_and_no_other(name):
    own = documented(SECTIONS[f"powermc {name}"])
    options = set(real(name))
    assert options | {"--help", "-h"} >= COMMON
    assert options - COMMON - MODELS == own - MODELS
    if options & MODELS:
        assert "#models" in SECTIONS[f"powermc {name}"] or name == "sample"


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_those_of_the_command(name):
    of_settings = Settings()
    for options, default in rows(SECTIONS[f"powermc {name}"]):
        long = next((option for option in options if option.startswith("--")), "").removeprefix("--").replace("-", "_")
        _, value = options_of(COMMANDS[name])[long]
        if value is None and name == "sample":
            value = getattr(of_settings, long, None)
        if isinstance(value, bool):
            assert default == ("on" if value else "")
        elif isinstance(value, str | int | float) and long not in ("kernel", "scope"):
            assert default == (value if isinstance(value, str) else f"{value:g}"), long


def test_the_models_section_has_their_defaults():
    found = {options[0]: default for options, default in rows(SECTIONS["Models"])}
    assert [found[name] for name in ("--model", "--dtype", "--device", "--max-rows", "--speculate")] == [
        "smollm2",
        "float32",
        "cpu",
        "64",
        "0",
    ]


def test_the_example_of_a_configuration_works(tmp_path, capsys):
    (toml,) = re.findall(r"```toml\n(.*?)```", SECTIONS["Configuration files"], flags=re.S)
    file = tmp_path / "run.toml"
    file.write_text(toml)
    assert main(["sample", "--config", str(file), "--print-config"]) == 0
    assert "max_new_tokens = 256" in capsys.readouterr().out
    assert main(["pilot", "--config", str(file), "--print-config"]) == 0
    assert 'layers = "20,24"' in capsys.readouterr().out
