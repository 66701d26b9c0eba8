"""Peak resident memory of a stretch of code, by the kernel's own high-water mark (Linux; elsewhere not measured)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

HOW = "high-water mark of resident memory (VmHWM of /proc/self/status, reset through /proc/self/clear_refs before it)"


@dataclass
class Peak:
    """Bytes, all of the process: resident when the stretch began, and the most while it ran. None: not measured."""

    before: int | None = None
    most: int | None = None

    @property
    def added(self) -> int | None:
        """Bytes on top of what was there before."""
        return None if self.before is None or self.most is None else self.most - self.before


@contextmanager
def peak() -> Iterator[Peak]:
    """Yields a `Peak` that is filled in at the end. Garbage, and pages the allocator holds on to, are freed first."""
    found = Peak()
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        found.before = _status("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found.most = _status("VmHWM")


@contextmanager
def settled() -> Iterator[None]:
    """What is loaded now is left out of the collections that `peak` makes in the meantime: they take half a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
