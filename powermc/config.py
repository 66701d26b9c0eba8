"""Configuration files: TOML that is read strictly, and written so that it reads back the same.

A file holds options of the command line by their names: `max_new_tokens = 96`; dashes do as well. Keys at the top are
for whichever command reads the file. Those of a table named after a command, `[sample]`, are for that command alone,
and go before the keys at the top. What this module does not know: which options there are and how they are declared
(`powermc.cli` does), and whether their values make sense together (whoever takes them does).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from powermc.errors import ArgumentError
from powermc.visible import visible

_WRONG = object()


class Kind(NamedTuple):
    """What an option holds: in words, and a function that gives the option's value of a TOML value, or `_WRONG`."""

    words: str
    take: Callable[[Any], Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    try:
        return float(value) if _is_number(value) else _WRONG
    except OverflowError:  # a whole number of more than 300 digits
        return _WRONG


def _texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else _WRONG


def _files(texts: Any) -> Any:
    return _WRONG if texts is _WRONG or "" in texts else [Path(text) for text in texts]


def _commas(value: Any) -> Any:
    """What the command line writes with commas between may be a list here."""
    parts = value if isinstance(value, list) else [value]
    good = isinstance(value, str | list) and all(isinstance(part, str) or _is_number(part) for part in parts)
    return ",".join(map(str, parts)) if good else _WRONG


TEXT = Kind("a string", lambda value: value if isinstance(value, str) else _WRONG)
FILE = Kind("the name of a file, a string", lambda value: Path(value) if isinstance(value, str) and value else _WRONG)
INTEGER = Kind("a whole number", lambda value: value if isinstance(value, int) and _is_number(value) else _WRONG)
NUMBER = Kind("a number", _number)
SWITCH = Kind("true or false", lambda value: value if isinstance(value, bool) else _WRONG)
TEXTS = Kind("a string or a list of strings", _texts)
FILES = Kind("the name of a file or a list of them", lambda value: _files(_texts(value)))
COMMAS = Kind("a list, or a string with commas between", _commas)

Options = Mapping[str, Kind]
"""The options of a command by name."""


def read(path: Path, command: str, commands: Mapping[str, Options]) -> dict[str, Any]:
    """The values that a file has for `command`, by the names of its options.

    Everything in the file is checked, the tables of other commands too. Raises `ArgumentError`, on one line and with
    file and key, for what cannot be read, is no TOML, names no option, or is not what that option holds.
    """
    shared: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for key, value in _load(path).items():
        if isinstance(value, dict):
            if key not in commands:
                raise ArgumentError(f"{path}:{key}: there is no command of this name{_nearest(key, commands)}")
            tables[key] = _check(value, f"{path}:{key}.", key, commands)
        else:
            shared[key] = value
    return {**_check(shared, f"{path}:", command, commands), **tables.get(command, {})}


def _load(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode())
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"cannot read {path}: it is not UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ArgumentError(f"{path} is not TOML: {error}") from error


def _check(values: Mapping[str, Any], where: str, command: str, commands: Mapping[str, Options]) -> dict[str, Any]:
    options, checked = commands[command], {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in options:
            others = [other for other in commands if name in commands[other]]
            place = f"; it is one of {others[0]}: put it under [{others[0]}]" if others else _nearest(name, options)
            raise ArgumentError(f"{where}{key}: no option of 'powermc {command}'{place}")
        if name in checked:
            raise ArgumentError(f"{where}{key}: given twice, with dashes and without")
        checked[name] = options[name].take(value)
        if checked[name] is _WRONG:
            raise ArgumentError(f"{where}{key}: must be {options[name].words}, got {_shown(value)}")
    return checked


def _nearest(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, valid, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str | int | float | list) else f"{value} ({type(value).__name__})"


def write(command: str, values: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """TOML of one table, with `notes` as comments above it; what is None is left out.

    No character acts on a terminal that shows it. Raises `ArgumentError` for text that is not Unicode, which no TOML
    can hold.
    """
    import tomli_w

    plain = {name: _plain(value) for name, value in values.items() if value is not None}
    comments = "".join(f"# {line}\n" for note in notes for line in (visible(note).splitlines() or [""]))
    text = comments + tomli_w.dumps({command: plain})
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{text[error.start]!r} is not Unicode text, and cannot be written as TOML") from error
    return re.sub(r"[^\x20-\x7e\n]", lambda found: _escaped(found[0]), text)


def _plain(value: Any) -> Any:
    """What TOML has a form for."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # a NumPy scalar
        return value.item()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _escaped(character: str) -> str:
    """A character that does something on a terminal as TOML's escape; others as they are. All stand inside strings."""
    if visible(character) == character:
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


_SCREENED = ("exit", "layer", "proposal", "screen", "exit_temperature", "plain", "eta", "delta", "gated", "aggregate")


def from_settings(
    settings: Mapping[str, Any], model: str, options: Mapping[str, Any] | None = None, prompts: Sequence[str] = ()
) -> str:
    """TOML for `powermc sample --config` that repeats a run.

    Parameters
    ----------
    settings
        Those of a `Run`, or `Settings.as_dict()`.
    model
        What the model was loaded by.
    options
        What `CausalLM.from_pretrained` was given beside the name.
    prompts
        The texts of the prompts; none, and the file needs a question on the command line beside it.

    What only Python can give, a reward or an exit that is an object, is not in the table but in a comment.
    """
    values, notes = repeatable(settings)
    source: dict[str, Any] = {"prompt": list(prompts) or None}
    return write("sample", {**source, "model": model, **(options or {}), **values}, notes)


def repeatable(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Those settings of a run that are options of `powermc sample` and did something; a sentence for each other one."""
    values, notes = dict(settings), []
    if values.get("reward") is not None:
        notes.append(f"The run also had a reward, the Python function {values['reward']}: not in this file.")
    exit = values.get("exit")
    if exit is not None and not (Path(str(exit)).suffix == ".safetensors" or Path(str(exit)).is_file()):
        notes.append(f"The run's exit, {exit}, is no file here: not in this file; name a lens with exit = ...")
        del values["exit"]
    # With plain Metropolis-Hastings the early exit's settings are at their defaults: nothing else is allowed.
    idle = _SCREENED if values.get("kernel") == "metropolis" else ()
    for name in ("reward", "reward_at_most", "rows", *idle):
        values.pop(name, None)
    return values, notes
