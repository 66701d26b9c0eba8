"""The benchmark: that it counts what it says, on tiny models. Nothing here asserts a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from powermc.errors import ArgumentError
from powermc.evaluation.bench import METHODS, Cell, Plan, Result, Row, Times, bench, fresh, overhead
from powermc.evaluation.bench_tables import as_dict, floor_report, heading, savings_report, speed_report
from powermc.evaluation.floor import Floor, Step, decode_steps, floor, weight_bytes
from powermc.evaluation.memory import peak
from powermc.evaluation.savings import Saving, savings
from powermc.lm import CausalLM
from powermc.power import power_sample
from powermc.sequences import Prompt
from tests.lm.families import EOS, tiny_model

PROMPTS = [Prompt((1, 2, 7), "a", 5), Prompt((4, 4, 9, 11, 30), "b", 6)]


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return CausalLM(tiny_model("llama"), max_rows=8)


PLAN = Plan(chains=(1, 3), horizons=(6, 4), steps=2, block_size=3, alpha=2.0, repeats=1, ignore_eos=True)


@pytest.fixture(scope="module")
def result(lm: CausalLM) -> Result:
    return bench(lm, PROMPTS, PLAN)


def test_cells(result: Result) -> None:
    """The published algorithm once, its batched form from two chains on."""
    each = [("published", 1), ("published-batched", 3), ("powermc", 1), ("powermc", 3)]
    assert [(r.horizon, r.method, r.chains) for r in result.rows] == [(t, m, c) for t in (6, 4) for m, c in each]
    alone = Plan(methods=("published-batched",), chains=(1, 3))
    assert alone.cells == [Cell("published-batched", 1, 64), Cell("published-batched", 3, 64)]


def test_what_the_published_algorithm_runs_by_hand(result: Result) -> None:
    """Where nothing ends, a step at length L runs prompt + L - 1 positions, whatever the cut; so does a block."""
    for row in result.rows:
        blocks = [3, 6] if row.horizon == 6 else [3, 4]
        assert row.transitions == row.chains * 2 * len(blocks) * len(PROMPTS)
        assert row.length == row.horizon
        assert 1 <= row.proposal_length <= row.horizon
        if row.method == "published":
            assert row.cut + row.proposal_length == pytest.approx(np.mean(blocks))
        if row.method != "powermc":
            means = [np.mean([len(p.ids) + n - 1 for n in blocks]) for p in PROMPTS]
            assert row.growth_tokens == pytest.approx(np.mean(means) * len(blocks))
        if row.method == "published":
            assert row.tokens == pytest.approx(np.mean(means))
        if row.method == "published-batched":  # rows wait for the longest tail
            assert row.tokens >= np.mean(means)


def test_powermc_is_the_production_run_with_nothing_cached_before(lm: CausalLM, result: Result) -> None:
    """Twice the same work on one model, growth first, costs what it costs on a new one."""
    for row in (r for r in result.rows if r.method == "powermc"):
        found, grown = [], []
        for prompt in PROMPTS:
            cold = fresh(lm, ignore_eos=True)
            run = power_sample(cold, prompt, **PLAN.settings(Cell("powermc", row.chains, row.horizon), 2))
            found.append(run.infos[0])
            grown.append((run.tokens - found[-1]["tokens"].sum()) / row.chains)
        assert row.tokens == pytest.approx(np.mean([info["tokens"] for info in found]))
        assert row.proposal_length == pytest.approx(np.mean([info["proposal_length"] for info in found]))
        assert row.accepted == pytest.approx(np.mean([info["accepted"] for info in found]))
        assert row.changed == pytest.approx(np.mean([info["changed"] for info in found]))
        assert row.growth_tokens == pytest.approx(np.mean(grown))
        assert row.tokens < row.proposal_length
        assert max(map(len, (t.whole for t in row.times))) == 1


def test_paths_end_unless_told_otherwise(lm: CausalLM) -> None:
    rows = bench(lm, PROMPTS, Plan(chains=(2,), horizons=(16,), steps=1, block_size=8, alpha=1.0, repeats=1)).rows
    assert {row.method for row in rows} == set(METHODS)
    assert all(row.length < 16 for row in rows)
    assert fresh(lm).text.eos == set(EOS)
    assert not fresh(lm, ignore_eos=True).text.eos


def test_repeats_turn_round_and_the_least_time_counts(lm: CausalLM) -> None:
    told: list[str] = []
    plan = Plan(methods=("published", "powermc"), chains=(1,), horizons=(2,), steps=1, block_size=2, repeats=2)
    found = bench(lm, PROMPTS, plan, told.append)
    runs = [(line.split(",")[0], line.split(": ")[1].split(",")[0]) for line in told if line.startswith("repeat")]
    assert runs[:4] == [("repeat 1/2", m) for m in ("published", "powermc") * 2]
    assert runs[4:] == [("repeat 2/2", m) for m in ("powermc", "published") * 2]
    assert len(runs) == 8
    for row in found.rows:
        assert [len(t.whole) for t in row.times] == [len(t.growth) for t in row.times] == [2, 2]
        assert row.seconds == sum(min(t.whole) for t in row.times)
        assert row.growth_seconds == sum(min(t.growth) for t in row.times)


def row(method: str, **changes: float) -> Row:
    values = {
        "chains": 1, "horizon": 8, "prompts": 2, "transitions": 12, "seconds": 5.0, "growth_seconds": 2.0,
        "tokens": 9.0, "growth_tokens": 8.0, "proposal_length": 4.0, "cut": 3.0, "accepted": 0.5, "changed": 0.25,
        "length": 7.0, "peak_bytes": None, "added_bytes": None, "times": (Times([5.0], [2.0]),), **changes,
    }  # fmt: skip
    return Row(method=method, **values)  # type: ignore[arg-type]


def test_rates_and_ratios_by_hand() -> None:
    base = row("published")
    fast = row("powermc", transitions=24, seconds=3.0, growth_seconds=1.0, proposal_length=3.0)
    lost = row("powermc", seconds=1.0, growth_seconds=1.5, horizon=9)
    found = Result(Plan(), (base, fast, lost), {"published, 1": 1.03})
    assert (base.per_second, base.per_second_whole, base.seconds_per_prompt) == (4.0, 2.4, 2.5)
    ratio = found.ratio(fast)
    assert ratio is not None
    assert (ratio.raw, ratio.whole, ratio.per_token) == pytest.approx((3.0, 8 / 2.4, 3.0 * 3 / 4))
    assert found.ratio(lost) is None, "another horizon"
    assert math.isnan(lost.per_second)
    machine_floor = Floor(1000, 1e9, 2e9, 1e9, 3, 4, (Step(1, 3e-6, 1e-6, 5e-7, 2e-6),))
    saved = [Saving(4.0, 10, 100, 90, 0.2, 0.1, 0.05, 3, True)]
    told = json.loads(json.dumps(as_dict("m", 2, found.plan, found, machine_floor, saved), allow_nan=False))
    assert told["rows"][2]["per_second"] is None
    assert told["rows"][1]["ratio"]["raw"] == pytest.approx(3.0)
    assert told["floor"]["steps"][0]["ratio"] == pytest.approx(1.5)
    text = "\n\n".join(
        [heading("m", 2, found.plan), speed_report(found), floor_report(machine_floor), savings_report(saved)]
    )
    assert (
        "| 8 | powermc | 1 | 24 | 12 | 3.00 | 2.25 | 8 | 3.33 | 9.0 | 3.0 | 3.0 | 7.0 | 50% | 25% | 1.5 | - | - |"
        in text
    )
    assert "published, 1 chain: 1.030" in text
    assert "| 4 | 10 | 100 | 20.0% | 10.0% | 5.0% | 30% | yes |" in text


def test_overhead_compares_calls_of_the_same_lengths(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    generate = type(lm.decoder.model).generate

    def spied(model, ids, **options):
        out = generate(model, ids, **options)
        lengths.append((options["generation_config"].output_scores, out.sequences.shape[1] - ids.shape[1]))
        return out

    monkeypatch.setattr(type(lm.decoder.model), "generate", spied)
    assert overhead(lm, 1.0, [([(1, 2), (3,)], 9), ([(1, 2)], 5)], 2) > 0
    assert sorted(lengths, key=str) == sorted([(kind, n) for kind in (True, None) for n in (9, 5)] * 2, key=str)


# The floor.


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_weights(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    stored = sum(p.numel() * 4 for p in {id(p): p for p in model.parameters()}.values())
    table = model.get_input_embeddings().weight.numel() * 4  # type: ignore[union-attr,operator]
    assert weight_bytes(model) == stored - (0 if tied else table)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied  # type: ignore[union-attr]


def test_a_decode_step_runs_one_position_per_row(lm: CausalLM) -> None:
    cold = fresh(lm, reuse=False)
    before = cold.ledger.copy()
    assert len(decode_steps(cold, PROMPTS[0], 5, 4)) == 4
    spent = cold.ledger.since(before)
    assert spent.ticks == 6  # three to warm up, of which the first reads the state of the prompt
    assert spent.decoded == 6 * 5
    assert spent.heads == {cold.depth: 7 * 5}
    assert not cold.decoder.rows.used


def test_the_floor(lm: CausalLM) -> None:
    found = floor(fresh(lm, reuse=False), PROMPTS[0], ticks=2, rounds=1)
    assert [step.rows for step in found.steps] == [1, 2, 4, 8]  # max_rows
    assert found.weight_bytes == weight_bytes(lm.decoder.model)
    one, *_, eight = found.steps
    assert one.copy_floor == eight.copy_floor == found.weight_bytes / found.copying
    assert one.read_floor == eight.read_floor == found.weight_bytes / found.reading
    assert eight.arithmetic_floor == pytest.approx(8 * one.arithmetic_floor)
    flops = lm.engine.cost.span(0, lm.depth, 3 + 3 + 1) + lm.engine.cost.head
    assert one.arithmetic_floor * found.throughput == pytest.approx(flops)
    step = Step(1, 12.0, 4.0, 2.0, 3.0)
    assert (step.ratio, step.read_ratio) == (3.0, 4.0)
    for change in ({"ticks": 0}, {"rounds": 0}, {"rows": (9, 16)}):
        with pytest.raises(ArgumentError, match="needs ticks and rounds of at least 1 and rows from 1 to 8"):
            floor(lm, PROMPTS[0], **change)  # type: ignore[arg-type]


# Savings and memory.


def test_savings_are_differences_of_the_same_chain() -> None:
    lm = CausalLM(tiny_model("llama").double(), max_rows=8)
    settings = {"max_new_tokens": 8, "block_size": 4, "steps": 3, "chains": 3, "seed": 1}
    (found,) = savings(lambda reuse: fresh(lm, reuse=reuse), PROMPTS, [4.0], **settings)

    def counts(reuse: bool, early: bool) -> dict[str, int]:
        run = power_sample(fresh(lm, reuse=reuse), PROMPTS, alpha=4.0, early_rejection=early, **settings)
        return {name: sum(int(i[name].sum()) for i in run.infos) for name in ("tokens", "proposal_length", "abandoned")}

    nothing, agreement, both = counts(False, False), counts(True, False), counts(True, True)
    assert found.same_chain
    assert found.transitions == 2 * 3 * 2 * 3
    assert (found.proposed, found.run) == (nothing["proposal_length"], nothing["tokens"])
    assert found.agreement == (nothing["tokens"] - agreement["tokens"]) / found.proposed > 0
    assert found.rejection == (agreement["tokens"] - both["tokens"]) / found.proposed >= 0
    assert found.undrawn == (nothing["proposal_length"] - both["proposal_length"]) / found.proposed > 0
    assert found.abandoned == both["abandoned"] > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_peak_memory_sees_what_was_there_for_a_moment() -> None:
    size = 200 * 2**20
    with peak() as first:
        del_me = torch.ones(size // 4)
        del del_me
    with peak() as second:
        pass
    if first.added is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert first.added > 0.9 * size
    assert second.added is not None
    assert second.added < 0.1 * size


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, "methods is empty"),
        (
            {"methods": ("published", "ours")},
            "unknown method 'ours'; choose from published, published-batched, powermc",
        ),
        ({"chains": ()}, "chains is empty"),
        ({"chains": (0,)}, "chains must be an integer >= 1, got 0"),
        ({"chains": (4, 4)}, "chains names one twice: 4, 4"),
        ({"horizons": (64, 0)}, "horizon must be an integer >= 1, got 0"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"repeats": 0}, "repeats must be an integer >= 1, got 0"),
        ({"block_size": 0}, "block_size must be an integer >= 1"),
        ({"alpha": 0.0}, "alpha must be above 0 here"),
        ({"seed": -1}, "seed"),
    ],
)
def test_plans_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Plan(**change)


def test_prompts_must_fit(lm: CausalLM) -> None:
    with pytest.raises(ArgumentError, match="context of 64"):
        bench(lm, PROMPTS, Plan(horizons=(4, 62)))
