"""Kill a run at random moments, go on with it each time, and compare with a run that was left alone.

    python -m tests.kill_and_resume --kills 100                      SIGKILL
    python -m tests.kill_and_resume --kills 100 --signal INT         Ctrl-C
    python -m tests.kill_and_resume --kernel early-exit --thin 3
    python -m tests.kill_and_resume --kernel table                   `powermc.sample` on a table

The model is a small float64 transformer. After every kill `PRAGMA integrity_check` must say ok and no committed step
may be gone; in the end digests and draws must be equal. Exits with 1 if not. Needs os.fork (Linux, macOS).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import powermc
from powermc.store import SAMPLES, about, about_samples, digest, kind, load

SETTINGS: dict[str, Any] = {"alpha": 3.0, "max_new_tokens": 20, "block_size": 8, "steps": 3, "chains": 3, "draws": 60}


def transformer(kernel: str) -> tuple[Any, dict[str, Any]]:
    """A model, and the settings that go with it."""
    from powermc.lm import CausalLM
    from powermc.lm.heads import ExitHead
    from tests.lm.families import tiny_model
    from tests.lm.lenses import lens_of

    lm: Any = CausalLM(tiny_model("llama").double(), max_rows=4)
    lm.decode = lambda tokens: "".join(chr(97 + t % 26) for t in tokens)  # so that there are texts
    more = {"exit": lens_of(lm, [ExitHead(lm.depth // 2)]), "kernel": kernel} if kernel != "metropolis" else {}
    return lm, more


def prompts() -> list[powermc.Prompt]:
    return [powermc.Prompt((5, 6, 7, 8), "one", 11), powermc.Prompt((9, 3), "two", 12)]


def forked(work: Callable[[Callable[..., object]], object]) -> tuple[int, int]:
    """Do something in a child process; its id and a pipe. What `work` is given writes a byte there when called."""
    there, here = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # hooks after a fork would swallow it
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(here)
        return child, there
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), sys.stdout.fileno())
        work(lambda *_: os.write(here, b"."))
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def ended(child: int, pipe: int) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    while os.read(pipe, 4096):
        pass
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def integrity(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]


def facts_of(path: Path) -> Any:
    """`about`, whatever kind of store it is."""
    return about_samples(path) if kind(path) == SAMPLES else about(path)


def _complaint(path: Path) -> str:
    try:
        facts_of(path)
    except powermc.StoreError as error:
        return str(error)
    return ""


Run = Callable[[Path, Callable[..., object]], object]
"""Begins the run in a file or goes on with it, and calls a function after every step."""


def runner(kernel: str, thin: int, **changes: Any) -> Run:
    """`power_sample` with a small transformer, or `sample` on a table."""
    if kernel == "table":
        options: dict[str, Any] = {"draws": 60, "chains": 3, "warmup": 5, "seed": 3, **changes, "thin": thin}

        def sampled(path: Path, tell: Callable[..., object]) -> None:
            table = powermc.Table({(i, j): -0.1 * (i - j) ** 2 - 0.3 * j for i in range(9) for j in range(9)})
            walk = powermc.RandomWalk(lambda at: [x for x in _around(*at) if x in table.log_weights])
            kept = powermc.Metropolis(table, walk)
            powermc.sample(kept, (0, 0), **options, store=path, resume=True, callbacks=[tell])

        return sampled
    model, more = transformer(kernel)
    settings = {**SETTINGS, **changes, **more, "thin": thin}

    def run(path: Path, tell: Callable[..., object]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            powermc.power_sample(model, prompts(), **settings, store=path, resume=True, callbacks=[tell])

    return run


def _around(i: int, j: int) -> list[tuple[int, int]]:
    return [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]


def kill_and_resume(
    folder: Path,
    *,
    kills: int,
    sent: signal.Signals = signal.SIGKILL,
    kernel: str = "metropolis",
    thin: int = 1,
    seed: int = 0,
    say: Callable[[str], object] = print,
    **changes: Any,
) -> dict[str, Any]:
    """Returns what was seen: digests, kills that hit a run, steps found after each. Raises `AssertionError`."""
    run = runner(kernel, thin, **changes)
    whole, broken = folder / "whole.db", folder / "broken.db"
    begun = time.monotonic()
    assert ended(*forked(lambda tell: run(whole, tell))) == 0
    took, steps = time.monotonic() - begun, facts_of(whole).steps
    say(f"left alone: {took:.1f} s, {steps} steps, digest {digest(whole)}")
    clock, seen, hit = random.Random(seed), [0], 0
    while hit < kills:
        child, pipe = forked(lambda tell: run(broken, tell))
        for _ in range(clock.randint(0, int(steps / kills))):  # so many steps, and somewhere in the next
            os.read(pipe, 1)
        time.sleep(clock.uniform(0, 2 * took / steps))
        os.kill(child, sent)
        code = ended(child, pipe)
        hit += code != 0 or sent is signal.SIGINT
        if not broken.exists() or not broken.stat().st_size:
            continue  # hit before the header was there
        assert integrity(broken) == "ok"
        if seen[-1] == 0 and "nothing has been written" in _complaint(broken):
            continue
        facts = facts_of(broken)
        assert facts.steps >= seen[-1], f"{seen[-1]} steps were committed, {facts.steps} are there"
        seen.append(facts.steps)
        if facts.done and hit < kills:  # faster than the kills: once more from the beginning
            assert digest(whole) == digest(broken), "the digests differ"
            broken.unlink()
            seen.append(0)
    say(f"{hit} kills; steps found after them: {seen}")
    assert ended(*forked(lambda tell: run(broken, tell))) == 0
    assert integrity(broken) == "ok"
    assert digest(whole) == digest(broken), "the digests differ"
    one, other = load(whole), load(broken)
    assert not other.interrupted
    if kernel == "table":
        assert one.values == other.values
        assert np.array_equal(one.log_density, other.log_density)
    else:
        assert [c.draws for row in one.chains for c in row] == [c.draws for row in other.chains for c in row]
        assert one.proposals
    say(f"equal: {digest(broken)}")
    return {"kills": hit, "steps": seen, "digest": digest(broken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=["KILL", "INT"], default="KILL")
    parser.add_argument("--kernel", choices=["metropolis", "early-exit", "table"], default="metropolis")
    parser.add_argument("--thin", type=int, default=1)
    parser.add_argument("--draws", type=int, default=SETTINGS["draws"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(
            Path(folder),
            kills=given.kills,
            sent=signal.Signals[f"SIG{given.signal}"],
            kernel=given.kernel,
            thin=given.thin,
            seed=given.seed,
            draws=given.draws,
        )


if __name__ == "__main__":
    main()
