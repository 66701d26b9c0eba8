"""`powermc report`: a store as one HTML file."""

from __future__ import annotations

import logging
import sys
import webbrowser
from pathlib import Path

from powermc.cli.sample import check_writable
from powermc.cli.show import console, say
from powermc.errors import ArgumentError
from powermc.report import check_packages, write
from powermc.store import load_run

_log = logging.getLogger(__name__)


def report(file: Path, *, out: Path, open_browser: bool = False, quiet: bool) -> int:
    """Write the report of the run in a store, finished or not; returns the exit code.

    Raises `ArgumentError` for a file that cannot be written or is the store itself, `ModelError` without the packages
    of the extra `report`, and `StoreError` for a store that cannot be read.
    """
    if out.resolve() == file.resolve():
        raise ArgumentError(f"{out} is the store itself; name another file for the report")
    check_writable(out)
    check_packages()
    run = load_run(file)
    write(run, out)
    _log.info("report written to %s", out)
    if not quiet:
        unfinished = ", of a run that is not at its end" if run.interrupted else ""
        say(console(sys.stderr), f"the report is in {out} ({out.stat().st_size / 1e6:.1f} MB){unfinished}")
    if open_browser and not webbrowser.open(out.resolve().as_uri()) and not quiet:
        say(console(sys.stderr), "no browser could be started; open the file by hand")
    return 0
