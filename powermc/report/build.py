"""The report as one file: template, style and scripts of `page/`, the run's data, and plotly, put together.

What a model wrote reaches the page as JSON without `<`, `>` and `&`, or escaped by the template, and is only ever shown
as text. The page's policy lets nothing else run than the two scripts built here, and nothing be loaded at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any

from powermc._version import __version__
from powermc.errors import ArgumentError, ModelError
from powermc.files import write_whole
from powermc.report.data import Report, report

if TYPE_CHECKING:
    from powermc.results import Run

_SCRIPTS = ("data", "dom", "tokens", "walk", "timeline", "charts", "tables", "app")
_KEYBOARD = (
    (("\u2190", "\u2192"), "previous and next step"),
    (("Shift \u2190", "Shift \u2192"), "previous and next change of the path"),
    (("k", "j"), "previous and next chain"),
    (("p", "n"), "previous and next prompt"),
    (("c",), "colour tokens by log p, by changes, not at all"),
    ((",", "."), "previous and next token, read out below the text"),
    (("d",), "light or dark"),
    (("?",), "this help"),
)


def write(run: Run, path: str | os.PathLike[str]) -> None:
    """Write the report of a run to a file: whole or not at all.

    Raises `ArgumentError` if the file cannot be written, and `ModelError` without the packages of the extra `report`.
    """
    html = page(run)
    try:
        write_whole(path, html)
    except OSError as error:
        raise ArgumentError(f"cannot write the report {os.fspath(path)}: {error.strerror}") from error


def page(run: Run) -> str:
    """The report of a run as HTML. Raises `ModelError` without the packages of the extra `report`."""
    jinja, markup, plotly = _needed()
    found = report(run)
    script = "(() => {\n'use strict';\n" + "\n".join(source(f"{name}.js") for name in _SCRIPTS) + "})();\n"
    template = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True).from_string(
        source("report.html.j2")
    )
    return template.render(
        **found.text,
        version=__version__,
        policy=policy(script, plotly),
        style=markup(source("report.css")),
        script=markup(script),
        plotly=markup(plotly),
        blocks=[(name, markup(_json(data))) for name, data in blocks(found)],
        keyboard=_KEYBOARD,
    )


def blocks(found: Report) -> list[tuple[str, Any]]:
    """(id, data) of every JSON block of the page."""
    prompts = [(f"prompt-{p}", data) for p, data in enumerate(found.prompts)]
    chains = [(f"chain-{p}-{c}", data) for (p, c), data in found.chains.items()]
    return [("run", found.run), *prompts, *chains]


def check_packages() -> None:
    """Raise `ModelError` without the packages of the extra `report`."""
    _needed()


def _needed() -> tuple[Any, Any, str]:
    """jinja2, its `Markup`, and the source of plotly.js."""
    try:
        plotly = import_module("plotly.offline").get_plotlyjs()
        return import_module("jinja2"), import_module("markupsafe").Markup, plotly
    except ImportError as error:
        raise ModelError(
            f"a report needs the package {error.name}, which is missing: pip install 'powermc[report]'"
        ) from error


def source(name: str) -> str:
    """A file of `page/`."""
    return (resources.files("powermc.report") / "page" / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON in ASCII that no HTML parser takes for anything but text, whatever strings are in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(*scripts: str) -> str:
    """Nothing is loaded; the scripts given run, and nothing else. Styles are inline as plotly sets them."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
