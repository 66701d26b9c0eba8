"""Progress on terminals of every kind, in lines, and in what is logged."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time

import numpy as np
import pytest
from rich.cells import cell_len

from powermc import power_sample
from powermc.cli import main
from powermc.cli.logs import shown
from powermc.errors import ArgumentError
from powermc.progress import Best, Parts, Progress, clock, encodable, shortened
from powermc.sequences import Path, Prompt
from tests.fake_lm import FakeLM


class Terminal(io.StringIO):
    def isatty(self):
        return True

    @property
    def screen(self):
        """What was written, without control codes."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


class Narrow(io.TextIOWrapper):
    """A terminal that knows few characters, and says so by an error."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="")

    def isatty(self):
        return True

    @property
    def screen(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


class Gone(Terminal):
    """A terminal that was closed meanwhile."""

    def write(self, text):
        raise OSError(5, "Input/output error")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def now(monkeypatch):
    """A clock that goes on by hand: now[0] += seconds."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def path(tokens, log_p, finished=True):
    return Path(Prompt(), tuple(tokens), finished, np.array([log_p / len(tokens)] * len(tokens)))


ACCEPTED, REJECTED = {"accepted": True}, {"accepted": False}


# Steps.


def test_the_live_display():
    stream = Terminal()
    count = 0
    with Progress(steps=4, work=8.0, tokens=lambda: count, stream=stream) as progress:
        count = 500
        progress.step(ACCEPTED, 2.0)
        progress.step(REJECTED, 2.0)
        assert progress.share == 0.5
        assert re.fullmatch(r"2/4 steps  accepted 50%  [\d,]+ tokens/s  0:00  about 0:00 left", progress.line())
        progress._live.refresh()
        assert "2/4 steps" in stream.screen
        assert "━" in stream.screen
    assert "\n\n" not in stream.screen


def test_lines_where_there_is_no_terminal(now):
    stream = io.StringIO()
    with Progress(steps=100, stream=stream) as progress:
        for _ in range(30):
            now[0] += 1.0
            progress.step(ACCEPTED)
    assert stream.getvalue() == (
        "powermc: 10/100 steps  accepted 100%  1 steps/s  0:10  about 1:30 left\n"
        "powermc: 20/100 steps  accepted 100%  1 steps/s  0:20  about 1:20 left\n"
        "powermc: 30/100 steps  accepted 100%  1 steps/s  0:30  about 1:10 left\n"
    )


def test_a_dumb_terminal_gets_lines(now, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(steps=100, stream=stream) as progress:
        now[0] += 11.0
        progress.step(ACCEPTED)
    assert stream.getvalue() == "powermc: 1/100 steps  accepted 100%  0 steps/s  0:11\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_is_silent(now, stream):
    with Progress(steps=3, stream=stream, quiet=True) as progress, Parts(2, stream=stream, quiet=True) as parts:
        now[0] += 60.0
        progress.step(ACCEPTED, path=path([1], -1.0))
        parts.begin("a")
        parts.report("b", 0.5)
    assert stream.getvalue() == ""


def test_acceptance_by_stage(now):
    progress = Progress(steps=10)
    infos = [
        {"accepted": True, "gated": False, "stage1_accepted": True},
        {"accepted": False, "gated": False, "stage1_accepted": True},
        {"accepted": False, "gated": False, "stage1_accepted": False, "abandoned": True},
        {"accepted": False, "gated": False, "stage1_accepted": False},
        {"accepted": True, "gated": True},  # not the first stage's decision
        {"accepted": True, "gated": False, "same": True},
        {"accepted": False, "null": True},
        {"accepted": False, "abandoned": True},  # a plain step
    ]
    for info in infos:
        progress.step(info)
    assert (progress.moves.screened, progress.moves.passed, progress.moves.survived) == (4, 2, 1)
    assert "accepted 38%  stage 1 passed 50%  then accepted 50%  abandoned 25%" in progress.line()


def test_the_stages_are_those_of_the_run():
    """Counted while it runs as `Run.stages` counts them afterwards."""
    progress = Progress(steps=1)
    settings = {"alpha": 2.0, "max_new_tokens": 8, "block_size": 4, "steps": 12, "chains": 3, "exit": FakeLM(seed=3)}
    run = power_sample(FakeLM(), "q", **settings, callbacks=[lambda p, c, step, state, info: progress.step(info)])
    stages = run.stages
    assert stages is not None
    moves = progress.moves
    assert (moves.screened, moves.passed, moves.survived) == (stages.screened, stages.passed, stages.accepted)
    assert moves.done == stages.steps
    assert stages.screened > stages.passed > 0


# The best answer.


def texts(tokens):
    return " ".join(f"w{token}" for token in tokens)


def test_only_whole_answers_are_compared(now):
    best = Best(texts, horizon=3)
    for tokens, log_p, finished in [((1, 2), -1.0, False), ((1, 2), -9.0, True), ((1, 2, 3), -7.0, False)]:
        best.see(path(tokens, log_p, finished), 0)
        now[0] += 1.0
        best.look()
    assert best.lines() == ["best answer so far, log p -7.00: w1 w2 w3"]
    best.see(path((4,), -8.0), 0)
    now[0] += 1.0
    best.look()
    assert best.lines() == ["best answer so far, log p -7.00: w1 w2 w3"]
    best.see(path((4,), -8.0), 2)
    now[0] += 1.0
    best.look()
    assert best.lines() == ["best answer so far to prompt 2, log p -8.00: w4"]


def test_decoding_is_lazy(now):
    decoded = []

    def decode(tokens):
        decoded.append(tokens)
        return "x"

    stream = Terminal()
    with Progress(steps=1000, decode=decode, stream=stream) as progress:
        for i in range(100):
            now[0] += 0.125
            progress.step(ACCEPTED, path=path((i,), -100.0 + i))
    assert len(decoded) == 25
    decoded.clear()
    with Progress(steps=1000, decode=decode, stream=io.StringIO()) as progress:
        for i in range(100):
            now[0] += 0.21
            progress.step(ACCEPTED, path=path((i,), -100.0 + i))
    assert len(decoded) == 2  # once per plain line


def test_plain_lines_tell_an_answer_once(now):
    stream = io.StringIO()
    with Progress(steps=9, decode=texts, stream=stream) as progress:
        for log_p in (-3.0, -4.0, -2.0):
            now[0] += 20.0
            progress.step(REJECTED, path=path((1,), log_p))
    lines = [re.sub(r" steps.*", "", line) for line in stream.getvalue().splitlines()]
    best = "powermc: best answer so far, log p -{}.00: w1"
    assert lines == [best.format(3), "powermc: 1/9", "powermc: 2/9", best.format(2), "powermc: 3/9"]


def test_no_tokenizer_no_text(now):
    def decode(tokens):
        raise ArgumentError("the model has no tokenizer")

    best = Best(decode, None)
    best.see(path((1,), -2.0), 0)
    best.look()
    assert best.lines() == ["best answer so far, log p -2.00"]


HOSTILE = "a\x1b[2J\x1b]0;title\x07 \u202eb [red]c[/]\n\n漢字 é\x9b"


@pytest.mark.parametrize("terminal", [True, False])
def test_model_text_is_data(now, terminal):
    stream = Terminal() if terminal else io.StringIO()
    with Progress(steps=10, decode=lambda tokens: HOSTILE, stream=stream) as progress:
        now[0] += 20.0
        progress.step(ACCEPTED, path=path((1,), -2.0))
        if terminal:
            progress._live.refresh()
    shown = stream.getvalue()
    assert r"a\x1b[2J\x1b]0;title\x07 \u202eb [red]c[/] 漢字 é\x9b" in shown
    for raw in ("\x1b[2J", "\x07", "\u202e", "\x9b", "\x1b]"):
        assert raw not in shown


def test_a_run_shows_its_best_answer(capsys, monkeypatch):
    monkeypatch.setattr("powermc.progress.PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr("powermc.progress.DECODE_INTERVAL", 0.0)
    run = power_sample(FakeLM(), ["a", "b"], max_new_tokens=8, block_size=4, steps=3, chains=3, progress=True)
    err = capsys.readouterr().err
    shown = {(int(p), x) for p, x in re.findall(r"best answer so far to prompt (\d), log p (-\d+\.\d\d)", err)}
    for p in range(2):
        whole = [x for chain in run.chains[p] for x in chain.history if x is not None and (x.finished or len(x) == 8)]
        assert (p, f"{max(x.log_prob for x in whole):.2f}") in shown


def test_what_a_run_logs(caplog, tmp_path):
    caplog.set_level(logging.DEBUG, logger="powermc")
    settings = {"max_new_tokens": 8, "block_size": 4, "steps": 1, "chains": 2, "kernel": "early-exit"}
    power_sample(FakeLM(), "a", **settings, exit=FakeLM(seed=2), store=tmp_path / "run.db")
    text = "\n".join(f"{record.name}: {record.getMessage()}" for record in caplog.records)
    assert f"powermc.store.base: {tmp_path / 'run.db'} opened, empty" in text
    assert "powermc.early_exit: warm-up done: kernel early-exit, surrogate fake, proposal exit, exponent 4" in text
    assert "powermc.recording: 2 chains, 2 of them under way at once" in text
    assert "powermc.recording: prompt 0, chain 1: block 2 of 2 begins" in text


# Terminals.


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_terminals_without_utf_8(encoding):
    stream = Narrow(encoding)
    with Progress(steps=10, decode=lambda tokens: "漢字 é " * 50, stream=stream) as progress:
        progress.step(ACCEPTED, path=path((1,), -2.0))
        progress._live.refresh()
    assert "1/10 steps" in stream.screen
    assert ("漢字" in stream.screen) == (encoding == "utf-8")
    assert (r"\u6f22\u5b57" in stream.screen) == (encoding != "utf-8")
    assert ("é" in stream.screen) == (encoding != "ascii")


def test_the_display_follows_the_width_of_the_terminal(monkeypatch):
    stream, width = Terminal(), 150
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(os, "get_terminal_size", lambda *fd: os.terminal_size((width, 20)))
    with Progress(steps=10, decode=lambda tokens: "漢字 words " * 50, stream=stream) as progress:
        progress.step(ACCEPTED, path=path((1,), -2.0))
        for width in (150, 40, 11, 3, 1, 90):
            stream.seek(0)
            stream.truncate()
            progress._live.refresh()
            lines = stream.screen.replace("\r", "").split("\n")
            assert len([line for line in lines if line]) == 2
            assert all(cell_len(line) <= width for line in lines), (width, lines)
            assert (len(max(lines, key=len)) > width / 2) or width < 3


def test_a_terminal_that_goes_away_ends_nothing(now):
    for stream in (Gone(), io.StringIO()):
        with Progress(steps=10, stream=stream) as progress:
            if not stream.isatty():
                stream.close()
            for _ in range(3):
                now[0] += 20.0
                progress.step(ACCEPTED)
            if progress._live is not None:
                progress._live.refresh()
        assert progress.moves.done == 3


def test_what_is_printed_to_a_file_stays_there(monkeypatch):
    """A live display redirects standard output to its own terminal only where that is one too."""
    file, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(steps=10):
        print("a result")
        print("a remark", file=sys.stderr)
    assert file.getvalue() == "a result\n"
    assert "a remark" in terminal.getvalue()
    assert sys.stderr is terminal


def test_small_parts():
    assert [clock(s) for s in (0, 59.4, 61, 3599.6, 7384)] == ["0:00", "0:59", "1:01", "1:00:00", "2:03:04"]
    assert shortened("abcdef", 6, "utf-8") == "abcdef"
    assert shortened("abcdefg", 6, "utf-8") == "abc..."
    assert [cell_len(shortened("漢字漢字漢字", width, "utf-8")) <= width for width in range(12)] == [True] * 12
    assert encodable("aé漢\ud800", "latin-1") == r"aé\u6f22\ud800"


# Parts.


def test_parts_in_lines(now):
    stream = io.StringIO()
    with Parts(3, tokens=lambda: int(100 * now[0]), stream=stream) as parts:
        parts.begin("one")
        now[0] += 6.0
        parts.begin("two\n\x1b[2J")
        now[0] += 12.0
        parts.report(parts.name, 0.5)
    assert stream.getvalue() == (
        "powermc: one\npowermc: two \\x1b[2J\npowermc: 2/3  two \\x1b[2J  50%  100 tokens/s  0:18  about 0:18 left\n"
    )


def test_parts_of_unknown_number(now):
    parts = Parts(stream=io.StringIO())
    with parts:
        now[0] += 30.0
        parts.report("fitting", 0.0)
        assert parts.lines() == ["fitting  0:30"]
        now[0] += 10.0
        parts.report("fitting", 0.25)
        assert parts.lines() == ["fitting  25%  0:40  about 0:30 left of this"]
        parts.report("reporting", 1.0)
        assert parts.lines() == ["reporting  100%  0:40"]


def test_parts_of_steps(now):
    with Parts(2, steps=4, stream=io.StringIO()) as parts:
        parts.begin("one")
        now[0] += 8.0
        parts.step({"accepted": True, "gated": False, "stage1_accepted": True})
        parts.step({"accepted": False, "gated": False, "stage1_accepted": False})
        assert parts.share == 0.25
        shares = "accepted 50%  stage 1 passed 50%  then accepted 100%"
        assert parts.lines() == [f"1/2  one  50%  {shares}  0:08  about 0:24 left"]
        parts.begin("two")
        assert parts.lines() == ["2/2  two  0:08  about 0:08 left"]


def test_parts_live():
    stream = Terminal()
    with Parts(2, stream=stream) as parts:
        parts.begin("the first")
        parts._live.refresh()
        assert "1/2  the first  0:00" in stream.screen
    assert "powermc: " not in stream.screen


# What is logged.


def test_logs_are_shown_if_asked_for(capsys):
    log = logging.getLogger("powermc.somewhere")
    for verbose, expected in ((0, []), (1, ["info"]), (2, ["info", "debug"]), (3, ["info", "debug"])):
        with shown(verbose):
            log.info("info %d\x1b[2J\nline", 3)
            log.debug("debug")
        lines = capsys.readouterr().err.splitlines()
        assert [re.sub(r"^\[ *\d+\.\d\d s\] powermc\.somewhere: (\w+).*", r"\1", line) for line in lines] == expected
        assert not lines or lines[0].endswith(r"info 3\x1b[2J\nline")
    log.warning("after")
    assert logging.getLogger("powermc").handlers == []


def test_logs_go_above_a_live_display(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown(1), Progress(steps=10) as progress:
        logging.getLogger("powermc.x").info("a line")
        progress._live.refresh()
    assert re.search(r"powermc\.x: a line", terminal.screen)


def test_verbose_on_the_command_line(monkeypatch, capsys):
    class Loader:
        def from_pretrained(self, name, **options):
            return FakeLM()

    monkeypatch.setitem(sys.modules["powermc.lm"].__dict__, "CausalLM", Loader())
    small = ["--max-new-tokens", "4", "--block-size", "4", "--steps", "1", "--chains", "1"]
    assert main(["sample", "q", *small, "-v", "--quiet"]) == 0
    assert re.search(r"^\[ *\d+\.\d\d s\] powermc\.cli\.sample: model smollm2 loaded in ", capsys.readouterr().err)
    assert main(["sample", "q", *small, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
