"""Help as plain text that says the same on every terminal, options and commands in groups."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

ORDER = (
    *("Arguments", "Options", "Questions", "Target and chains", "Early exit", "Model", "Workers", "Store", "Output"),
    "Configuration",
)
"""Of the headings of a command's options."""


class PlainCommand(TyperCommand):
    """Options under the headings that they name (`rich_help_panel`), those without one first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[Any]] = {heading: [] for heading in ORDER}
        for parameter in self.get_params(ctx):
            panel = getattr(parameter, "rich_help_panel", None)
            heading = "Arguments" if parameter.param_type_name == "argument" else panel or "Options"
            groups[heading].append(parameter.get_help_record(ctx))
        _write(formatter, groups)


class PlainGroup(TyperGroup):
    """Commands under the headings that they name, in the order in which they were added."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[Any]] = {
            "Options": [parameter.get_help_record(ctx) for parameter in self.get_params(ctx)]
        }
        commands = [self.commands[name] for name in self.list_commands(ctx)]
        room = formatter.width - 6 - max(len(str(command.name)) for command in commands)
        for command in commands:
            heading = getattr(command, "rich_help_panel", None) or "Commands"
            groups.setdefault(heading, []).append((command.name, command.get_short_help_str(room)))
        _write(formatter, groups)


def _write(formatter: Any, groups: dict[str, list[Any]]) -> None:
    for heading, rows in groups.items():
        if shown := [row for row in rows if row is not None]:
            with formatter.section(heading):
                formatter.write_dl(shown)
