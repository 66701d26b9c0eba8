"""What a command is: a dataclass whose fields are its options, and whose docstring is its help.

An option is declared once, and its value travels in one object from the command line or a configuration file to the
function that does the work. Options that several commands have stand in a base class (`powermc.cli.options`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import typer

from powermc import config
from powermc.cli.help import PlainCommand
from powermc.errors import PowermcError
from powermc.visible import visible

SETUP = "Configuration"

COMMANDS: dict[str, type[Command]] = {}
"""Every command by its name."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """The options that every command has."""

    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, show_default=False, rich_help_panel=SETUP,
            help="Say what is being done, on standard error; -vv in more detail.",
        ),
    ] = 0  # fmt: skip

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ()
    """Options of which one is given. One from the command line replaces any from a file."""

    INTERRUPTED: ClassVar[str] = "interrupted; nothing was drawn"
    """What to say after Ctrl-C."""

    def run(self) -> int:
        """Do it; returns the exit code."""
        raise NotImplementedError

    def effective(self) -> tuple[dict[str, Any], list[str]]:
        """The values that repeat this run, by option, and remarks. Raises `ArgumentError` for some that cannot be."""
        return {name: getattr(self, name) for name in options_of(type(self))}, []


def _read(ctx: typer.Context, value: Path | None) -> Path | None:
    """Before any other option is looked at, take the file's values for defaults."""
    if value is not None and not ctx.resilient_parsing:
        name = str(ctx.command.name)
        try:
            ctx.default_map = config.read(value, name, {other: kinds(command) for other, command in COMMANDS.items()})
        except PowermcError as error:
            raise typer.Exit(failed(str(error))) from error
    return value


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        is_eager=True, callback=_read, metavar="run.toml", rich_help_panel=SETUP,
        help="Take options from this TOML file, unless they are given here.",
    ),
]  # fmt: skip
PrintConfig = Annotated[
    bool,
    typer.Option(
        "--print-config", rich_help_panel=SETUP,
        help="Print all options in force as TOML for --config, and do nothing else.",
    ),
]  # fmt: skip


def add(app: typer.Typer, name: str, command: type[Command], panel: str) -> None:
    """Give the application a command."""
    COMMANDS[name] = command

    def call(ctx: typer.Context, config: Path | None, print_config: bool, **options: Any) -> None:
        options = _settled(ctx, command, options)
        raise typer.Exit(guarded(lambda: _run(name, command(**options), print_config), command.INTERRUPTED))

    options = options_of(command)
    parameters = [
        _parameter("ctx", typer.Context, MISSING),
        *(_parameter(option, annotation, default) for option, (annotation, default) in options.items()),
        _parameter("config", ConfigFile, None),
        _parameter("print_config", PrintConfig, False),
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=inspect.getdoc(command), rich_help_panel=panel, cls=PlainCommand)(call)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    missing = inspect.Parameter.empty
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=missing if default is MISSING else default, annotation=annotation)


@cache
def options_of(command: type[Command]) -> dict[str, tuple[Any, Any]]:
    """(annotation, default) of every option, a command's own before those of its bases."""
    hints = get_type_hints(command, include_extras=True)
    own = [field for field in fields(command) if field.name in command.__annotations__]
    return {field.name: (hints[field.name], field.default) for field in [*own, *fields(command)]}


_KINDS = {
    str: config.TEXT,
    int: config.INTEGER,
    float: config.NUMBER,
    bool: config.SWITCH,
    Path: config.FILE,
    list[str]: config.TEXTS,
    list[Path]: config.FILES,
}


@cache
def kinds(command: type[Command]) -> config.Options:
    """What a configuration file may hold for a command."""
    return {name: _kind(annotation) for name, (annotation, _) in options_of(command).items()}


def _kind(annotation: Any) -> config.Kind:
    kind, *more = get_args(annotation)
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return next((part for part in more if isinstance(part, config.Kind)), None) or _KINDS[kind]


def _settled(ctx: typer.Context, command: type[Command], options: dict[str, Any]) -> dict[str, Any]:
    """The options, alternatives taken from a file left out where the command line gives another of them."""
    sources = {name: getattr(ctx.get_parameter_source(name), "name", "") for name in command.ALTERNATIVES}
    if "COMMANDLINE" not in sources.values():
        return options
    left = {name for name, source in sources.items() if source == "DEFAULT_MAP"}
    return {name: options_of(command)[name][1] if name in left else value for name, value in options.items()}


def _run(name: str, command: Command, print_config: bool) -> int:
    from powermc.cli.logs import shown

    if print_config:
        values, notes = command.effective()
        sys.stdout.write(config.write(name, values, notes))
        return 0
    with shown(command.verbose):
        return command.run()


def guarded(work: Callable[[], int], interrupted: str) -> int:
    """Do some work; an error made on purpose becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        return work()
    except PowermcError as error:
        return failed(str(error))
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def failed(message: str) -> int:
    """Print an error on one line; returns its exit code."""
    print(f"error: {visible(message).strip()}", file=sys.stderr)
    return 2
