"""How many rows fit into memory: what a run will hold, computed before it starts.

`memory` is what the whole process may hold: its resident set on a CPU, what is allocated there on an accelerator. What
is resident when a run starts (interpreter, libraries, weights) is read from the system; what the run adds is computed
here from the shapes of the model, part by part (`Need`). Rows are as many as fit. What is computed is a bound, which
most runs stay far below: the pool of activations to be reused (`powermc.lm.pool`) gets what they leave, as measured
while they run (`Fit.spare`), and gives it back as they come to need it.

What this module does not know: the user's own data and callbacks, calibration, other models in the process, and
loading, whose peak is past when a run starts. How many outdated positions the segments of a path hold is a mean
(`Need.tails`), close for many rows; a single row can exceed its share. Where there is no /proc (macOS, Windows) what is
resident is taken from the largest it has been, and where the system does not say either, as on accelerators other than
CUDA, from the weights alone.
"""

from __future__ import annotations

import ctypes
import gc
import math
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from powermc.errors import ArgumentError

if TYPE_CHECKING:
    from powermc.lm.decoder import Decoder

PASS_TOKENS, PASS_ROWS, HEAD_ROWS, AHEAD, RECENT_PROMPTS, LENGTH_STEP = 1024, 16, 64, 32, 16, 64
"""Limits of the engine, the oracle and the rows; a test holds them to theirs."""

_SLACK = 1.1
"""Resident memory over what tensors hold, segments of many sizes coming and going; see `steady`."""
_RUNTIME = 64 * 2**20
"""What the first run adds once: compiled draws, thread stacks, work space of the linear algebra libraries."""
_SHARE = 0.9
"""Of the memory available on the machine, where no budget is given: others live there too."""
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse(value: int | str) -> int:
    """Bytes of a size such as 4000000000, "512MB", "4GB" (10^9 bytes each) or "4GiB" (2^30 bytes each).

    Raises `ArgumentError` for anything else, and for a size below one byte.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        if found is None:
            raise ArgumentError(
                f"memory must be a size such as 4GB, 512MB or 4GiB, or a number of bytes; got {value!r}"
            )
        number, unit = float(found[1]), (found[2] or "").lower()
        power = " kmgt".index(unit[0]) if unit else 0
        size = int(number * (1024 if unit.endswith("i") else 1000) ** power)
    if size < 1:
        raise ArgumentError(f"memory must be at least 1 byte, got {value!r}")
    return size


def shown(size: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


@dataclass(frozen=True)
class Shape:
    """What the memory of a run depends on in a model. Sizes of a number in bytes, counts otherwise.

    position: bytes of one position of a row: keys, values and the states kept. drafted: of those, what has been run at
    the deepest exit; 0 without one. element: bytes per number. width: of a state. inner: of the widest map of a layer.
    heads, dims: query heads, and the sizes of a key and a value together. vocab: logits per state. kept: depths kept.
    masks: different masks of a pass. eager: whether attention scores are held as a tensor. whole: whether passes run
    paths from their beginning, without a cache.
    """

    position: int
    drafted: int
    element: int
    width: int
    inner: int
    heads: int
    dims: int
    vocab: int
    kept: int = 1
    masks: int = 1
    eager: bool = False
    whole: bool = False


def shape_of(decoder: Decoder) -> Shape:
    """The shape of an attached model, exits included."""
    config, rows = decoder.config, decoder.rows
    element = torch.empty(0, dtype=decoder.dtype).element_size()
    width = config.hidden_size
    exits = [d for d in rows.depths if d < decoder.layers]
    # The widest map of a layer, whatever the architecture calls it; experts are stacked, one is wide at a time.
    block = decoder.blocks[0]
    wide = [max(p.shape[-2:]) for p in block.parameters() if p.ndim >= 2]
    return Shape(
        rows.bytes_per_token,
        math.ceil(rows.bytes_per_token * max(exits) / decoder.layers) if exits else 0,
        element,
        width,
        max([width, *wide]),
        getattr(config, "num_attention_heads", 0),
        sum(decoder.head_dims),
        decoder.vocab_size,
        len(rows.depths),
        max(len(getattr(decoder, "mask_types", ())), 1),
        config._attn_implementation == "eager",
        decoder.lost is not None,
    )


@dataclass(frozen=True)
class Need:
    """Bytes that a run adds to the process.

    shape: of the model. prompts: their lengths, in tokens. horizon: the most new tokens of a path. chains: of all
    prompts together. draws: paths that each chain leaves in the result. held: whether all chains hold the path that
    they start from while they wait (a pilot).
    """

    shape: Shape
    prompts: tuple[int, ...]
    horizon: int
    chains: int
    draws: int = 0
    held: bool = False

    @property
    def longest(self) -> int:
        """Positions of the longest path."""
        return max(self.prompts) + self.horizon

    @property
    def tails(self) -> float:
        """Tails that the segments of one path hold in the mean: the one that is read, and what later cuts outdated.

        A segment that begins at s is still held if no later accepted cut was below s, which has probability
        1 / (s + 1) where cuts are uniform; it holds up to T - s positions: sum_s (T - s) / (s + 1) in all.
        """
        return sum((self.horizon - s) / (s + 1) for s in range(self.horizon)) / self.horizon

    def buffer(self, rows: int) -> int:
        """The slots of all rows."""
        slots = -(-self.longest // LENGTH_STEP) * LENGTH_STEP + 1
        return rows * slots * self.shape.position

    def paths(self, rows: int) -> int:
        """Activations outside the buffer: of each chain's path and of its proposal, and of the prompts."""
        s, waiting = self.shape, self.chains * self.held
        prompts = sum(sorted(self.prompts)[-(max(rows, waiting) + RECENT_PROMPTS) :])
        per_row = self.horizon * ((self.tails + 1) * s.position + 2 * s.drafted)
        return math.ceil(rows * per_row) + (prompts + waiting * self.horizon) * s.position

    def passes(self, rows: int) -> int:
        """The largest pass: states and maps of one layer, keys and values by query head, masks."""
        s, a = self.shape, max(min(rows, PASS_ROWS), 1)
        stretch = self.longest if s.whole else max(*self.prompts, self.horizon)  # prompts, and tails to complete
        most = min(a * stretch, max(PASS_TOKENS, a))

        def one(rows: int, tokens: int) -> int:
            states = tokens * ((8 + s.kept) * s.width + 4 * s.inner + 2 * s.heads * s.dims) * s.element
            spread = rows * self.longest * s.heads * s.dims * s.element
            mask = tokens * self.longest * (s.masks * s.element + 3)
            scores = tokens * self.longest * s.heads * (s.element + 8) if s.eager else 0
            return states + spread + mask + scores

        return max(one(a, most), one(rows, rows))

    def head(self, rows: int) -> int:
        """Logits of one call of the head, with their copies and the scratch of the draws."""
        states = min(HEAD_ROWS, max(rows, self.horizon, min(AHEAD, rows * self.horizon), 8))
        return states * self.shape.vocab * (4 * self.shape.element + 4)

    def ahead(self, rows: int) -> int:
        """Logits read ahead of the draws, which wait for them.

        With n rows a call reads AHEAD / n states of each and is gone after as many ticks, or with the last of its rows:
        calls of AHEAD states, min(n, AHEAD / n) of them at a time.
        """
        calls = min(rows, math.isqrt(AHEAD - 1) + 1)
        return calls * min(AHEAD, rows * self.horizon) * self.shape.vocab * self.shape.element

    @property
    def results(self) -> int:
        """Paths and infos kept for the result, of all chains."""
        return self.chains * self.draws * (80 * self.horizon + 2000)

    def passing(self, rows: int) -> int:
        """Of `total`, what is held only while a pass or a head is run."""
        return math.ceil(_SLACK * (self.passes(rows) + self.head(rows)))

    def total(self, rows: int) -> int:
        """All of it for a run with so many rows."""
        held = self.buffer(rows) + self.paths(rows) + self.ahead(rows) + self.results
        return math.ceil(_SLACK * held) + self.passing(rows)


@dataclass(frozen=True)
class Fit:
    """What memory allows. rows: side by side. pool: bytes left for activations to be reused, whatever the run does.
    limit, resident, need: bytes, of the process in all, before the run, and added by it. passing: of those added, what
    is held only while something is run. budget: whether the limit was given. asked: rows that the run could have used.
    """

    rows: int
    pool: int
    limit: int
    resident: int
    need: int
    passing: int
    budget: bool
    asked: int

    def spare(self, device: torch.device) -> int:
        """Bytes that the process may still take now, between two passes; less than 0 where it holds too much."""
        return self.limit - self.passing - resident(device)

    @property
    def binds(self) -> bool:
        """Whether there are fewer rows than the run could have used."""
        return self.rows < self.asked

    @property
    def note(self) -> str | None:
        """What to tell the user; None where memory did not matter."""
        if not self.binds:
            return None
        limit = f"a budget of {shown(self.limit)}" if self.budget else f"the {shown(self.limit)} that the machine has"
        return f"{self.rows} rows instead of {self.asked} side by side: {limit}, {shown(self.resident)} of it resident"


def fit(
    need: Need, asked: int, memory: int | None, device: torch.device, *, weights: int = 0, reusable: int = 0
) -> Fit:
    """The most rows, up to `asked`, that `memory` bytes allow (None: what the machine has available).

    weights: bytes of the model, of which a part may not be resident yet. reusable: bytes resident now that the run may
    use (the pool). Raises `ArgumentError` where one row does not fit.
    """
    found = _fit(need, asked, memory, device, weights, reusable)
    if found.rows < asked and device.type == "cpu":  # what is garbage by now may be given back
        gc.collect()
        trim()
        found = _fit(need, asked, memory, device, weights, reusable)
    if found.rows < 1:
        one = need.total(1) + found.resident
        has = f"memory of {shown(memory)}" if memory is not None else f"the {shown(found.limit)} of this machine"
        raise ArgumentError(
            f"{has} cannot hold one row: with prompts and answers of up to {need.longest} tokens it needs "
            f"{shown(need.total(1))}, and {shown(found.resident)} are resident already; give at least "
            f"{shown(math.ceil(one * 1.01))}, or shorten prompts or max_new_tokens"
        )
    return found


def _fit(need: Need, asked: int, memory: int | None, device: torch.device, weights: int, reusable: int) -> Fit:
    now = resident(device)
    before = max(now - reusable, weights)
    if device.type == "cpu":
        before += _RUNTIME
    if memory is None:
        free = available(device)
        limit = sys.maxsize if free is None else now + int(_SHARE * free)
    else:
        limit = memory
    low, high = 0, asked
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before + need.total(middle) <= limit else (low, middle - 1)
    held = need.total(max(low, 1))
    pool = max(int((limit - before - held) / _SLACK), 0)
    return Fit(low, pool, limit, before, held, need.passing(max(low, 1)), memory is not None, asked)


def resident(device: torch.device) -> int:
    """Bytes that the process holds now, on an accelerator those allocated there."""
    if device.type != "cpu":
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        import resource
    except ImportError:  # Windows: the weights are counted all the same
        return 0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available(device: torch.device) -> int | None:
    """Bytes that the process can still get from its machine or container; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_meminfo(), _cgroup()] if device.type == "cpu" else []
    return min((n for n in found if n is not None), default=None)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the limit of the container leaves, its page cache counted as free; version 2, then version 1."""
    for limit, usage, stat in (
        (root / "memory.max", root / "memory.current", root / "memory.stat"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes", root / "memory/memory.stat"),
    ):
        try:
            most, used = int(limit.read_text()), int(usage.read_text())
            lines = dict(line.split()[:2] for line in stat.read_text().splitlines())
        except (OSError, ValueError):  # "max" is no number: no limit
            continue
        return max(most - used + int(lines.get("inactive_file", 0)), 0)
    return None


def trim() -> None:
    """Let glibc give free memory back to the system; nothing elsewhere."""
    _glibc("malloc_trim", 0)


def steady() -> None:
    """Have glibc map blocks of 1 MB and more one by one, and so give each back when it is freed.

    By default it moves that border up to 32 MB as such blocks are freed; segments of many sizes then share a heap whose
    holes stay resident. Costs a page fault per 4 kB of a large block, so only where a budget was given.
    """
    m_mmap_threshold = -3
    _glibc("mallopt", m_mmap_threshold, 2**20)


def _glibc(name: str, *arguments: int) -> None:
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), name)(*arguments)


def lengths(prompts: Sequence[Any]) -> tuple[int, ...]:
    """Token counts of some prompts."""
    return tuple(len(prompt.ids) for prompt in prompts)
