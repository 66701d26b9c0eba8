"""Runs that are killed, stopped and written to a full disk; what they cost on disk. Long forms are slow tests."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from powermc import StoreError, power_sample
from powermc.store import about, digest, resume
from tests.fake_lm import FakeLM
from tests.kill_and_resume import kill_and_resume
from tests.store_size import measure

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 3, "chains": 2, "alpha": 2.0}


def quiet(text: str) -> None:
    pass


def test_killed_five_times(tmp_path):
    found = kill_and_resume(tmp_path, kills=5, draws=6, say=quiet)
    assert found["kills"] == 5


def test_stopped_five_times(tmp_path):
    found = kill_and_resume(tmp_path, kills=5, sent=signal.SIGINT, kernel="early-exit", thin=2, draws=6, say=quiet)
    assert found["kills"] == 5


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_chains_of_a_kernel_killed_ten_times(tmp_path, sent):
    assert kill_and_resume(tmp_path, kills=10, sent=sent, kernel="table", thin=2, say=quiet)["kills"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(("kernel", "thin"), [("metropolis", 1), ("early-exit", 3), ("table", 2)])
def test_killed_a_hundred_times(tmp_path, sent, kernel, thin):
    found = kill_and_resume(tmp_path, kills=100, sent=sent, kernel=kernel, thin=thin, draws=150, say=quiet)
    assert found["kills"] == 100


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.getuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_file_system_loses_nothing(small_disk, tmp_path):
    """Filled up by the run itself, then by another file; each time room is made, and it resumes."""
    file, options = small_disk / "run.db", {**SMALL, "draws": 120}
    filler = small_disk / "filler"
    filler.write_bytes(bytes(650_000))
    with pytest.raises(StoreError, match=r"run\.db: no room is left on the disk .* make room, then resume"):
        power_sample(FakeLM(), ["a", "b"], **options, store=file)
    filler.unlink()
    steps = about(file).steps
    assert steps > 0

    def fill(*_):
        with open(filler, "ab") as out:
            out.write(bytes(20_000))

    with pytest.raises((StoreError, OSError)):
        resume(file, FakeLM(), callbacks=[fill])
    filler.unlink()
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert about(file).steps >= steps
    moved = tmp_path / "run.db"
    for end in ("", "-wal"):
        if (small_disk / f"run.db{end}").exists():
            shutil.copy(small_disk / f"run.db{end}", f"{moved}{end}")
    resume(moved, FakeLM())
    power_sample(FakeLM(), ["a", "b"], **options, store=tmp_path / "whole.db")
    assert digest(moved) == digest(tmp_path / "whole.db")


@pytest.mark.parametrize("accepted", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_draw_of_256_tokens_takes_less_than_two_kilobytes(tmp_path, accepted):
    """10^5 of them stay under 200 MB, a thousand already do so pro rata, but for the table of 49,152 pieces."""
    found = measure(tmp_path, draws=1000, accepted=accepted)
    pieces = 1_400_000
    assert found["megabytes"] * 1e6 - pieces < 1000 * 2000


@pytest.mark.slow
def test_a_hundred_thousand_draws_stay_under_200_megabytes(tmp_path):
    assert measure(tmp_path, draws=100_000, accepted=0.3)["megabytes"] < 200


@pytest.mark.slow
def test_the_script_can_be_run(tmp_path):
    root = Path(__file__).parent.parent
    script = [sys.executable, "-m", "tests.kill_and_resume", "--kills", "1", "--draws", "2"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "equal: " in done.stdout


SLOWLY = """
from tests.fake_lm import FakeLM
from powermc import power_sample
power_sample(FakeLM(delay=0.004), ["a", "b"], max_new_tokens=12, block_size=4, steps=3, chains=2, draws={draws}, store={file!r})
"""  # noqa: E501


@pytest.mark.parametrize("killed", [False, True])
def test_following_a_run_until_it_is_over(tmp_path, capsys, monkeypatch, killed):
    """Lines as the file grows, written by another process; the end of that process is noticed, however it came."""
    from powermc.cli import store

    file = tmp_path / "run.db"
    monkeypatch.setattr(store, "POLL", 0.02)
    script = [sys.executable, "-c", SLOWLY.format(draws=10_000 if killed else 30, file=str(file))]
    writer = subprocess.Popen(script, cwd=Path(__file__).parent.parent)
    try:
        for _ in range(3000):
            if file.exists() and file.stat().st_size and _steps(file):
                break
            time.sleep(0.02)
        assert about(file).written
        if killed:

            def kill(seconds: float) -> None:
                if writer.poll() is None:
                    writer.kill()
                    writer.wait()

            monkeypatch.setattr(store.time, "sleep", kill)
        assert store.show(file, follow=True, config=False, as_json=False) == 0
    finally:
        writer.kill()
        writer.wait()
    out, err = capsys.readouterr()
    counts = [int(line.split("/")[0].replace(",", "")) for line in out.splitlines()]
    assert counts == sorted(set(counts))
    if killed:
        assert f"go on with: powermc resume {file}" in err
        assert 0 < counts[-1] < 40_024
    else:
        assert counts[-1] == 4 * (2 * 3 + 30)
        assert len(counts) > 1
        assert not err


def _steps(file: Path) -> int:
    try:
        return about(file).steps
    except StoreError:
        return 0
