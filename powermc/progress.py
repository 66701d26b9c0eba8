"""Progress of runs of many chains, on standard error: live on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from powermc.types import Info

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

PLAIN_INTERVAL = 10.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Counts steps and shows them: done of total, acceptance so far, tokens per second, time left.

    Parameters
    ----------
    steps
        Steps of all chains together.
    work
        The cost of the whole run in any unit, for the time left; None when every step costs the same.
    tokens
        Tokens the model has evaluated so far; None to show steps per second.
    stream
        Where to write; standard error by default.

    A context manager. The display is gone when it ends; nothing of it reaches standard output.
    """

    def __init__(
        self,
        *,
        steps: int,
        work: float | None = None,
        tokens: Callable[[], int] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.steps, self.work, self._tokens = steps, float(steps if work is None else work), tokens
        self.done = self.accepted = 0
        self.spent = 0.0
        self._stream = sys.stderr if stream is None else stream
        self._live: Any = None
        self._begun = self._shown = time.monotonic()
        self._tokens_before = 0

    def __enter__(self) -> Progress:
        self._begun = self._shown = time.monotonic()
        self._tokens_before = 0 if self._tokens is None else self._tokens()
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, markup=False, highlight=False, emoji=False)
            self._live = Live(self, console=console, transient=True, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def step(self, info: Info, work: float = 1.0) -> None:
        """One step is done."""
        self.done += 1
        self.accepted += bool(info.get("accepted", False))
        self.add(work)

    def add(self, work: float) -> None:
        """Work other than a step is done."""
        self.spent += work
        now = time.monotonic()
        if self._live is None and now - self._shown >= PLAIN_INTERVAL:
            self._shown = now
            print(f"powermc: {self.line()}", file=self._stream, flush=True)

    @property
    def share(self) -> float:
        """The share of the work that is done, 0 to 1."""
        return min(self.spent / self.work, 1.0) if self.work else 0.0

    def line(self) -> str:
        """The state of the run in one line of text."""
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        parts = [f"{self.done:,}/{self.steps:,} steps"]
        if self.done:
            parts.append(f"accepted {self.accepted / self.done:.0%}")
        if self._tokens is None:
            parts.append(f"{self.done / elapsed:,.0f} steps/s")
        else:
            parts.append(f"{(self._tokens() - self._tokens_before) / elapsed:,.0f} tokens/s")
        parts.append(_clock(elapsed))
        if 0.02 < self.share < 1:  # earlier guesses are wild
            parts.append(f"about {_clock(elapsed * (1 - self.share) / self.share)} left")
        return "  ".join(parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = self.line()
        room = min(options.max_width - len(line) - 2, 24)
        if room < 6:
            yield Text(line, no_wrap=True, overflow="ellipsis")
            return
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=1.0, completed=self.share, width=room), Text(line, no_wrap=True))
        yield grid


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
