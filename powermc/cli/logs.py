"""`--verbose`: what powermc logs, on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from powermc.visible import visible


class Lines(logging.Handler):
    """Writes to whatever `sys.stderr` is at the time: while a live display runs, that prints above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = visible(self.format(record)).replace("\n", "\\n")
            print(f"[{record.relativeCreated / 1e3:7.2f} s] {record.name}: {text}", file=sys.stderr, flush=True)
        except Exception:  # logging must not end a run
            self.handleError(record)


@contextmanager
def shown(verbose: int) -> Iterator[None]:
    """Show what is logged under "powermc" on standard error: at 0 nothing, at 1 `INFO`, from 2 on `DEBUG`."""
    if verbose < 1:
        yield
        return
    logger, handler = logging.getLogger("powermc"), Lines()
    before = logger.level
    logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
