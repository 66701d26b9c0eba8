"""The memory budget: sizes, what a run holds against what was computed before it, rows that queue, and errors."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from powermc import Prompt, power_sample
from powermc.errors import ArgumentError
from powermc.lm import CausalLM, engine, memory, oracle, pool, rows
from powermc.lm.drafts import DecoderRow
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.lm.pool import Pool
from powermc.lm.rows import Prefix, Segment
from tests.lm.families import VOCAB, tiny_model

CPU = torch.device("cpu")
PROMPTS = [Prompt(tuple((7 * i + 11 * j) % VOCAB for i in range(6 + 5 * j)), key=j + 1) for j in range(4)]
RUN: dict[str, Any] = {"max_new_tokens": 12, "block_size": 6, "steps": 2, "chains": 3, "alpha": 2.0, "seed": 3}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4000, 4000),
        ("4000", 4000),
        ("512MB", 512_000_000),
        ("4GB", 4 * 10**9),
        ("4 gb", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("4GiB", 2**32),
        ("1.5GiB", 3 * 2**29),
        (".5kB", 500),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert memory.parse(text) == size


@pytest.mark.parametrize("text", ["", "much", "4XB", "GB", "-4GB", "4GBs", "4 4GB", True, 4.0, None, [4]])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ArgumentError, match="memory must be a size such as 4GB, 512MB or 4GiB"):
        memory.parse(text)


@pytest.mark.parametrize("text", [0, -1, "0", "0.1"])
def test_no_bytes_at_all(text: int | str) -> None:
    with pytest.raises(ArgumentError, match="at least 1 byte"):
        memory.parse(text)


def test_a_wrong_size_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ArgumentError, match="got 'lots'"):
        CausalLM.from_pretrained("/no/such/folder", memory="lots")


def test_limits_are_those_of_the_engine() -> None:
    assert memory.PASS_TOKENS == engine._PASS_TOKENS
    assert memory.PASS_ROWS == engine._PASS_ROWS
    assert memory.RECENT_PROMPTS == engine._RECENT_PROMPTS
    assert memory.HEAD_ROWS == oracle._HEAD_ROWS
    assert memory.AHEAD == engine._AHEAD
    assert memory.LENGTH_STEP == rows._LENGTH_STEP


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and something still refers to, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._size: dict[int, int] = {}
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._size:
                if key in given:  # a view of a weight, or of what was there before
                    continue
                self._size[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
            self._users[key] += 1
            weakref.finalize(tensor, self._drop, key)
        return out

    def _drop(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= self._size.pop(key)


def needed(lm: CausalLM, prompts: list[Prompt] = PROMPTS, **changes: Any) -> memory.Need:
    """What `power_sample` computes for `RUN`."""
    run = {**RUN, **changes}
    shape, lengths = memory.shape_of(lm.decoder), memory.lengths(prompts)
    kept = run["steps"] * -(-run["max_new_tokens"] // run["block_size"])  # the path after every step
    return memory.Need(shape, lengths, run["max_new_tokens"], run["chains"] * len(prompts), kept)


def test_the_counter_counts() -> None:
    with Live() as live:
        a = torch.zeros(1000)
        b = a[:10] + 1
        view = a.view(10, 100)
        assert live.now == 4040
        del a
        assert live.now == 4040, "the view still holds it"
        del view
        assert (live.now, live.most) == (40, 4040)
    assert len(b) == 10


@pytest.mark.parametrize(
    ("width", "attention", "exit"),
    [(1, "sdpa", False), (12, "sdpa", False), (12, "eager", True)],
)
def test_the_need_bounds_what_tensors_hold(width: int, attention: str, exit: bool) -> None:
    """From above, and not by more than a factor of 4."""
    model = tiny_model("llama", attn_implementation=attention, eos_token_id=VOCAB - 1)  # most paths are long
    lm = CausalLM(model, max_rows=width, reuse=False)
    options: dict[str, Any] = {"exit": EarlyExit(lm, ExitHead(2))} if exit else {}
    changes: dict[str, Any] = {"chains": 3 if width > 1 else 1}
    need = needed(lm, **changes)
    with Live() as live:
        run = power_sample(lm, PROMPTS, **{**RUN, **changes}, **options)
    assert run.settings["rows"] == width
    tensors = need.buffer(width) + need.paths(width) + need.passes(width) + need.head(width)
    assert live.most <= tensors <= 4 * live.most
    assert tensors < need.total(width)


@pytest.mark.parametrize("width", [1, 4, 12])
def test_logits_that_wait_for_their_draws_are_bounded(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything has been run before, so that the head reads ahead for all rows: from above, at most sixfold."""
    lm, live, held = CausalLM(tiny_model("llama"), max_rows=width), weakref.WeakSet(), [0]
    begun, read = DecoderRow.__init__, oracle.DepthOracle._next_logits

    def begin(self: DecoderRow, *args: Any) -> None:
        begun(self, *args)
        live.add(self)

    def watched(self: oracle.DepthOracle, rows: Any) -> torch.Tensor:
        logits = read(self, rows)
        storages = {s._cdata: s.nbytes() for row in live for s in (x.untyped_storage() for x in row.logits)}
        held.append(sum(storages.values()))
        return logits

    monkeypatch.setattr(DecoderRow, "__init__", begin)
    monkeypatch.setattr(oracle.DepthOracle, "_next_logits", watched)
    run = {**RUN, "max_new_tokens": 40, "block_size": 40, "steps": 12, "alpha": 6.0}
    power_sample(lm, PROMPTS, **run)
    assert 0 < max(held) <= needed(lm, max_new_tokens=40).ahead(width) <= 6 * max(held)


def resident_is(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "resident", lambda device: size)
    monkeypatch.setattr(memory, "steady", lambda: None)  # the tests share a process


def budget_for(lm: CausalLM, n: int, resident: int) -> int:
    """A budget for exactly `n` rows."""
    weights = sum(p.numel() * p.element_size() for p in lm.decoder.model.parameters())
    return max(resident, weights) + memory._RUNTIME + needed(lm).total(n)


@pytest.mark.parametrize("n", [1, 3])
def test_chains_queue_for_the_rows_that_fit(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve chains on one row or three draw what they draw on twelve."""
    resident_is(monkeypatch, 10**9)
    model = tiny_model("llama").double()
    free = power_sample(CausalLM(model), PROMPTS, **RUN)
    lm = CausalLM(model)
    lm.memory = budget_for(lm, n, 10**9)
    tight = power_sample(lm, PROMPTS, **RUN)
    assert (free.settings["rows"], tight.settings["rows"]) == (12, n)
    assert lm.max_rows == n
    assert lm.decoder.rows.capacity <= n + 1
    assert tight.paths == free.paths
    assert free.notes == ()
    assert tight.notes == (f"{n} rows instead of 12 side by side: a budget of 1.07 GB, 1.07 GB of it resident",)
    assert "note: " in tight.summary()
    assert tight.to_dict()["notes"] == list(tight.notes)


def test_rows_come_back_for_a_shorter_run(monkeypatch: pytest.MonkeyPatch) -> None:
    resident_is(monkeypatch, 10**9)
    lm = CausalLM(tiny_model("llama"), max_rows=8)
    lm.memory = budget_for(lm, 2, 10**9)
    assert lm.fit(PROMPTS, 12, chains=3, draws=4).rows == 2 == lm.max_rows
    short = lm.fit(PROMPTS[:1], 2, chains=3)
    assert (short.rows, short.binds, short.note) == (3, False, None)
    assert lm.max_rows == 8, "as asked for"


def test_less_than_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    resident_is(monkeypatch, 10**9)
    lm = CausalLM(tiny_model("llama"))
    lm.memory = budget_for(lm, 1, 10**9) - 1
    text = (
        r"memory of 1\.07 GB cannot hold one row: with prompts and answers of up to 33 tokens it needs \S+ [kM]B, and "
        r"1\.07 GB are resident already; give at least \S+ GB, or shorten prompts or max_new_tokens"
    )
    before = lm.ledger.copy()
    with pytest.raises(ArgumentError, match=text) as caught:
        power_sample(lm, PROMPTS, **RUN)
    assert "\n" not in str(caught.value)
    assert not lm.ledger.since(before).spans, "nothing was run"
    lm.memory += 1
    assert lm.fit(PROMPTS, 12, chains=3, draws=4).rows == 1


def test_the_machine_bounds_rows_where_no_budget_does(monkeypatch: pytest.MonkeyPatch) -> None:
    resident_is(monkeypatch, 10**9)
    lm = CausalLM(tiny_model("llama"))
    added = budget_for(lm, 2, 10**9) - 10**9
    monkeypatch.setattr(memory, "available", lambda device: int(added / memory._SHARE) + 2)
    run = power_sample(lm, PROMPTS, **RUN)
    assert run.settings["rows"] == 2
    assert "that the machine has" in run.notes[0]
    monkeypatch.setattr(memory, "available", lambda device: 0)
    with pytest.raises(ArgumentError, match="of this machine cannot hold one row"):
        power_sample(lm, PROMPTS, **RUN)
    monkeypatch.setattr(memory, "available", lambda device: None)
    assert power_sample(lm, PROMPTS, **RUN).notes == (), "a system that does not say bounds nothing"


def test_what_rows_leave_is_the_pool_s(monkeypatch: pytest.MonkeyPatch) -> None:
    resident_is(monkeypatch, 10**9)
    lm = CausalLM(tiny_model("llama"))
    lm.memory = budget_for(lm, 12, 10**9)
    assert lm.fit(PROMPTS, 12, chains=3, draws=4).pool == lm.engine.pool.budget == 0
    lm.memory += 10**6
    found = lm.fit(PROMPTS, 12, chains=3, draws=4)
    assert 0.8e6 < found.pool == lm.engine.pool.budget
    assert found.resident + found.need + found.pool <= found.limit == lm.memory


def segments(n: int, size: int) -> list[tuple[list[int], Prefix]]:
    """Sequences of one token, each with activations of `size` bytes of its own."""
    one, none = torch.zeros(1, 1, 1, size // 4 - 1), torch.zeros(0)
    return [([i], Prefix((Segment(0, one.clone(), none, {1: torch.zeros(1, 1)}),), 1)) for i in range(n)]


def test_the_pool_follows_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows while the process may, gives back what it holds too much and a step more, never less than its budget."""
    monkeypatch.setattr(pool, "_STEP", 1000)
    spare, held = 0, Pool(budget=3000)
    held.spare = lambda: spare
    for ids, prefix in segments(20, 1000):
        held.add(ids, 0, prefix)
    assert held.bytes == 20_000, "nothing is over the limit"
    spare = -2500
    held.settle()
    assert held.bytes == 16_000, "3500 bytes and what is left of a sequence"
    assert held.find(pool.key_of([3]), [3], 1) is None
    assert held.find(pool.key_of([4]), [4], 1) is not None, "the oldest have gone"
    spare = -(10**6)
    held.settle()
    assert held.bytes == 3000, "what the rows have left in any case"
    held.spare = None
    held.add([99], 0, segments(1, 1000)[0][1])
    assert held.bytes == 3000


def test_a_run_under_a_budget_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured, the states are the same; what is free is used, and given back between passes."""
    model = tiny_model("llama").double()
    states, bytes_held = [], []
    for full in (False, True):  # rows hold nothing of what was computed for them; all of it, and more
        resident_is(monkeypatch, 10**9)
        lm = CausalLM(model)
        lm.memory = budget_for(lm, 3, 10**9)
        lm.fit(PROMPTS, 12, chains=3, draws=4)
        spare = lm.engine.pool.spare
        assert spare is not None
        assert spare() == lm.memory - needed(lm).passing(3) - 10**9

        def measured(device: torch.device, lm: CausalLM = lm, full: bool = full) -> int:
            return 2 * 10**9 if full and lm.decoder.rows.used else 10**9

        monkeypatch.setattr(memory, "resident", measured)
        states.append(power_sample(lm, PROMPTS, **RUN).paths)
        bytes_held.append(lm.engine.pool.bytes)
        assert full == (lm.engine.pool.bytes <= lm.engine.pool.budget)
    assert states[0] == states[1]
    assert bytes_held[0] > bytes_held[1]


def test_without_a_budget_nothing_is_measured() -> None:
    lm = CausalLM(tiny_model("llama"))
    lm.fit(PROMPTS, 12)
    assert lm.engine.pool.spare is None
    assert lm.engine.pool.budget <= pool.DEFAULT_BUDGET


def test_tails_that_a_path_holds_in_the_mean() -> None:
    """Against cuts drawn uniformly: a segment stays until a later cut is below its beginning."""
    horizon, rng, held = 12, np.random.default_rng(0), []
    shape = memory.shape_of(CausalLM(tiny_model("llama")).decoder)
    begins: list[int] = [0]
    for _ in range(20_000):
        cut = int(rng.integers(horizon))
        begins = [*(s for s in begins if s < cut), cut]
        held.append(sum(horizon - s for s in begins) / horizon)
    assert memory.Need(shape, (5,), horizon, 1).tails == pytest.approx(np.mean(held[100:]), rel=0.02)


def test_need_grows_with_everything() -> None:
    lm = CausalLM(tiny_model("llama"))
    need = needed(lm)
    totals = [need.total(n) for n in range(1, 30)]
    assert all(a < b for a, b in itertools.pairwise(totals))
    assert needed(lm, max_new_tokens=40).total(4) > need.total(4)
    assert needed(lm, PROMPTS * 2).total(4) > need.total(4)
    before = memory.shape_of(lm.decoder).position
    exit = EarlyExit(lm, ExitHead(3))
    assert exit.layer == 3
    assert memory.shape_of(lm.decoder).position > before
    assert memory.shape_of(lm.decoder).drafted > before / 2


def test_a_pilot_holds_the_paths_it_starts_from() -> None:
    lm = CausalLM(tiny_model("llama"))
    plain = memory.Need(memory.shape_of(lm.decoder), (10,) * 8, 16, 16)
    held = memory.Need(memory.shape_of(lm.decoder), (10,) * 8, 16, 16, held=True)
    assert held.paths(2) - plain.paths(2) == 16 * 16 * lm.decoder.rows.bytes_per_token


def test_resident_is_what_the_system_says() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")
    block = torch.ones(50_000_000 // 4)
    with_it = memory.resident(CPU)
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS:"))
    assert abs(with_it - int(line.split()[1]) * 1024) < 20e6
    assert with_it > block.numel() * 4
    assert (memory.available(CPU) or 0) > 0


def test_resident_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest it has been, which is no less than what it is."""
    now = memory.resident(CPU)

    def missing(*args: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert memory.resident(CPU) >= 0.9 * now
    assert memory.available(CPU) is None


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (
            {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 500\ninactive_file 100\n"},
            400,
        ),
        ({"memory.max": "max\n", "memory.current": "700\n", "memory.stat": "anon 5\n"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "1200",
                "memory/memory.stat": "cache 1",
            },
            0,
        ),
        ({}, None),
    ],
)
def test_containers(tmp_path: Path, files: dict[str, str], left: int | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory._cgroup(tmp_path) == left


@pytest.mark.parametrize("size", [(999, "999 bytes"), (2_500_000, "2.5 MB"), (4_000, "4 kB"), (10**10, "10 GB")])
def test_sizes_for_people(size: tuple[int, str]) -> None:
    assert memory.shown(size[0]) == size[1]
