"""Progress of long work, on standard error: live on a terminal, a line now and then elsewhere.

Showing it never ends the work: a terminal that has gone away, or shows no UTF-8, or is made narrow, is no error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO, cast

from powermc.errors import ArgumentError
from powermc.sequences.path import Path, Tokens
from powermc.types import Info
from powermc.visible import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_log = logging.getLogger(__name__)

PLAIN_INTERVAL = 10.0
"""Seconds between two lines where there is no terminal."""

DECODE_INTERVAL = 0.5
"""Seconds between two looks at the best answer, for which tokens have to be decoded."""


class Lasting:
    """A stream that takes whatever is written: escapes for what its encoding lacks, and nothing once it is gone."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
            self.stream.write(encodable(text, self.stream.encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


class Display:
    """A place on standard error for what is being done; the base of `Progress` and `Parts`.

    Parameters
    ----------
    tokens
        Tokens the model has evaluated so far, for the rate; None: no such rate.
    stream
        Where to write; standard error by default.
    quiet
        Show nothing at all.
    refresh
        Times per second that a terminal is written to.

    A context manager. The display is gone when it ends; nothing of it reaches standard output.
    """

    def __init__(
        self,
        *,
        tokens: Callable[[], int] | None = None,
        stream: TextIO | None = None,
        quiet: bool = False,
        refresh: float = 4.0,
    ) -> None:
        self._tokens, self._quiet, self._refresh = tokens, quiet, refresh
        self._stream = Lasting(sys.stderr if stream is None else stream)
        self._live: Any = None
        self._begun = self._shown = time.monotonic()
        self._tokens_before = 0

    def __enter__(self) -> Any:
        self._begun = self._shown = time.monotonic()
        self._tokens_before = 0 if self._tokens is None else self._tokens()
        if not self._quiet and self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            from rich.console import Console
            from rich.live import Live

            console = Console(file=cast(TextIO, self._stream), markup=False, highlight=False, emoji=False)
            # What others print meanwhile goes above the display, but not what they print to a file.
            both = {"redirect_stdout": sys.stdout.isatty(), "redirect_stderr": self._stream.stream is sys.stderr}
            self._live = Live(self, console=console, transient=True, refresh_per_second=self._refresh, **both)
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    @property
    def share(self) -> float:
        """The share of the work that is done, 0 to 1."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """What there is to say now, the most important line first."""
        raise NotImplementedError

    def plain(self) -> list[str]:
        """The same for where lines stay: what has not changed since need not be said again."""
        return self.lines()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return max(time.monotonic() - self._begun, 1e-9)

    def _rate(self) -> str | None:
        return (
            None if self._tokens is None else f"{(self._tokens() - self._tokens_before) / self.elapsed:,.0f} tokens/s"
        )

    def _print(self) -> None:
        """Write the plain lines if it is time to."""
        now = time.monotonic()
        if self._live is None and now - self._shown >= PLAIN_INTERVAL:
            self._shown = now
            self._write(self.plain())

    def _write(self, lines: list[str]) -> None:
        """Write plain lines, unless there is a live display that shows them anyway."""
        if self._live is None and not self._quiet:
            self._stream.write("".join(f"powermc: {line}\n" for line in lines))
            self._stream.flush()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.cells import cell_len
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = options.max_width
        first, *rest = (shortened(line, width, console.encoding) for line in self.lines())
        room = min(width - cell_len(first) - 2, 24)
        if room < 6:
            yield Text(first, no_wrap=True, overflow="crop")
        else:
            grid = Table.grid(padding=(0, 1))
            grid.add_row(ProgressBar(total=1.0, completed=self.share, width=room), Text(first, no_wrap=True))
            yield grid
        for line in rest:
            yield Text(line, no_wrap=True, overflow="crop")


class Progress(Display):
    """Steps of chains: how many are done, how proposals fare stage by stage, the best answer, time left.

    Parameters
    ----------
    steps
        Steps of all chains together.
    work
        The cost of the whole run in any unit, for the time left; None when every step costs the same.
    decode
        The text of tokens, for the best answer; None: there are no texts.
    horizon
        Tokens of a path that is whole though it has no end; None: only paths that end are whole.

    The others are those of `Display`.
    """

    def __init__(
        self,
        *,
        steps: int,
        work: float | None = None,
        decode: Callable[[Tokens], str | None] | None = None,
        horizon: int | None = None,
        **display: Any,
    ) -> None:
        super().__init__(**display)
        self.steps, self.work = steps, float(steps if work is None else work)
        self.moves = Moves()
        self.spent = 0.0
        self._best = Best(decode, horizon)

    def step(self, info: Info, work: float = 1.0, *, path: Path | None = None, prompt: int = 0) -> None:
        """One step is done. `path`: where the chain is now, the answer so far to prompt number `prompt`."""
        self.moves.see(info)
        if path is not None:
            self._best.see(path, prompt)
            if self._live is not None:
                self._best.look()
        self.add(work)

    def add(self, work: float) -> None:
        """Work other than a step is done."""
        self.spent += work
        self._print()

    @property
    def share(self) -> float:
        return min(self.spent / self.work, 1.0) if self.work else 0.0

    def line(self) -> str:
        """The state of the run in one line of text."""
        done = self.moves.done
        parts = [f"{done:,}/{self.steps:,} steps", *self.moves.parts()]
        parts += [self._rate() or f"{done / self.elapsed:,.0f} steps/s", clock(self.elapsed)]
        if 0.02 < self.share < 1:  # earlier guesses are wild
            parts.append(f"about {clock(self.elapsed * (1 - self.share) / self.share)} left")
        return "  ".join(parts)

    def lines(self) -> list[str]:
        return [self.line(), *self._best.lines()]

    def plain(self) -> list[str]:
        self._best.look()
        return [*self._best.news(), self.line()]


class Moves:
    """What became of proposals, stage by stage: counted as `powermc.stages.Stages` counts them afterwards."""

    def __init__(self) -> None:
        self.done = self.accepted = self.abandoned = self.screened = self.passed = self.survived = 0

    def see(self, info: Info) -> None:
        """One step is done."""
        accepted = bool(info.get("accepted", False))
        self.done += 1
        self.accepted += accepted
        self.abandoned += bool(info.get("abandoned", False))
        if (passed := info.get("stage1_accepted")) is not None and not info.get("gated", False):
            self.screened += 1
            self.passed += bool(passed)
            self.survived += bool(passed) and accepted

    def parts(self) -> list[str]:
        """In words, as far as there is something to say."""
        shares = (
            ("accepted", self.accepted, self.done),
            ("stage 1 passed", self.passed, self.screened),
            ("then accepted", self.survived, self.passed),
        )
        parts = [f"{name} {part / whole:.0%}" for name, part, whole in shares if whole]
        return [*parts, *([f"abandoned {self.abandoned / self.done:.0%}"] if self.abandoned else [])]


class Best:
    """The whole answer of the highest log p per prompt. Shown is that of the prompt where it was found last."""

    def __init__(self, decode: Callable[[Tokens], str | None] | None, horizon: int | None) -> None:
        self._decode, self._horizon = decode, horizon
        self._log_p: dict[int, float] = {}
        self._new: tuple[int, Path] | None = None
        self._line: str | None = None
        self._told: str | None = None
        self._looked = -DECODE_INTERVAL

    def see(self, path: Path, prompt: int) -> None:
        """A chain is here now. Nothing is decoded yet."""
        whole = path.finished or len(path) == self._horizon
        if whole and path.log_prob > self._log_p.get(prompt, -float("inf")):
            self._log_p[prompt] = path.log_prob
            self._new = prompt, path

    def look(self) -> None:
        """Decode what is new, unless that was done a moment ago.

        By the caller's thread: tokenizers do not like to be used by two, and the display has one of its own.
        """
        now = time.monotonic()
        if self._new is None or now - self._looked < DECODE_INTERVAL:
            return
        (prompt, path), self._new, self._looked = self._new, None, now
        text = None
        if self._decode is not None:
            with contextlib.suppress(ArgumentError):  # a model without a tokenizer
                text = self._decode(path.tokens)
        answer = "" if text is None else f": {visible(' '.join(text.split()))}"
        of = f" to prompt {prompt}" if len(self._log_p) > 1 else ""
        self._line = f"best answer so far{of}, log p {path.log_prob:.2f}{answer}"

    def lines(self) -> list[str]:
        """One line, or none if nothing whole has been seen."""
        return [] if self._line is None else [self._line]

    def news(self) -> list[str]:
        """The same, but only once."""
        old, self._told = self._told, self._line
        return [] if self._told == old else self.lines()


class Parts(Display):
    """Work that consists of named parts: which one runs, which number it is, how much of it is done.

    Parameters
    ----------
    total
        How many parts there are; None: unknown. Taken to be alike, for the time left.
    steps
        Of each part, if it consists of steps of chains.

    The others are those of `Display`.
    """

    def __init__(self, total: int | None = None, *, steps: int | None = None, **display: Any) -> None:
        super().__init__(**display)
        self.total, self.steps, self.begun, self.part = total, steps, 0, 0.0
        self.moves = Moves()
        self.name = ""
        self._part_begun = self._begun

    def begin(self, name: str) -> None:
        """The next part begins; its name is a line of its own where there is no terminal."""
        self.name, self.begun, self.part = visible(" ".join(name.split())), self.begun + 1, 0.0
        self.moves = Moves()
        self._part_begun = self._shown = time.monotonic()
        _log.info("%s", self.name)
        self._write([self.name])

    def report(self, name: str, share: float) -> None:
        """So much of a part is done, 0 to 1; it begins where its name is new. As `powermc.lm.corpus.Report`."""
        if name != self.name:
            self.begin(name)
        self.part = share
        self._print()

    def step(self, info: Info) -> None:
        """One step of this part is done."""
        self.moves.see(info)
        self.part = min(self.moves.done / self.steps, 1.0) if self.steps else 0.0
        self._print()

    @property
    def share(self) -> float:
        if self.total is None:
            return self.part
        return min(max(self.begun - 1 + self.part, 0.0) / self.total, 1.0)

    def lines(self) -> list[str]:
        count = [f"{self.begun}/{self.total}"] if self.total else []
        done = [f"{self.part:.0%}"] if self.part else []
        parts = [*count, self.name, *done, *self.moves.parts(), self._rate(), clock(self.elapsed)]
        begun = self._begun if self.total else self._part_begun
        if 0.02 < self.share < 1:
            left = (time.monotonic() - begun) * (1 - self.share) / self.share
            parts.append(f"about {clock(left)} left{'' if self.total else ' of this'}")
        return ["  ".join(part for part in parts if part)]


def shortened(line: str, width: int, encoding: str | None) -> str:
    """A line of at most `width` columns, in characters that the encoding has."""
    from rich.cells import cell_len, set_cell_size

    line = encodable(line, encoding)
    return line if cell_len(line) <= width else set_cell_size(line, max(width - 3, 0)).rstrip() + "..."[:width]


def encodable(text: str, encoding: str | None) -> str:
    """The text with escapes for what the encoding does not have."""
    encoding = encoding or "utf-8"  # None: a stream in memory
    return text.encode(encoding, "backslashreplace").decode(encoding)


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
