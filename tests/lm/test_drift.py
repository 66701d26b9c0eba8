"""The running KL between an exit and its model: which positions it reads, whom it watches, what it costs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from powermc import Path, Power, SequenceProbability, power_sample
from powermc.choices import Stream
from powermc.lm import CausalLM
from powermc.lm.drift import Drift
from powermc.lm.exits import EarlyExit
from powermc.lm.heads import ExitHead
from powermc.scheduling import run
from powermc.sequences import Length, Prompt, Screening, Space, draft, scored
from powermc.tuning import grown
from tests.lm.families import tiny_model
from tests.lm.lenses import lens_of

PROMPT = Prompt((1, 2, 7, 9), "p", 5)
SPACE = Space(frozenset(), 12)


def pair(layer: int = 2, **options: Any) -> tuple[CausalLM, EarlyExit]:
    lm = CausalLM(tiny_model("llama").double(), **options)
    return lm, EarlyExit(lm, ExitHead(layer, "temperature", 1.3))


def drafted(lm: CausalLM, exit: EarlyExit, cut: int, seed: int = 0) -> Path:
    """A path drawn by the model, its tail from `cut` on by the exit, another token there; not completed."""
    (start,) = grown(lm, SPACE, [PROMPT], temperature=1.0, chains=1, seed=0)
    x = run(scored(exit, start, (1.0,)))
    tries = (run(draft(exit, SPACE, x, cut, 1.0, Stream(1000 * seed + i)))[0] for i in range(1000))
    return next(y for y in tries if y.tokens[cut] != x.tokens[cut])


def reference(lm: CausalLM, exit: EarlyExit, path: Path) -> np.ndarray:
    """KL(p || p~) of every position of the path by plain torch: stock forward, logit lens by hand."""
    model: Any = lm.decoder.model
    ids = torch.tensor([[*path.prompt.ids, *path.tokens]])
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
        low = model.lm_head(model.model.norm(out.hidden_states[exit.layer])) / 1.3
        p, q = (logits[0].log_softmax(-1) for logits in (out.logits, low))
        kl = (p.exp() * (p - q)).sum(-1)
    return kl[len(path.prompt.ids) - 1 : -1].numpy()


@pytest.mark.parametrize("cut", [0, 3, 10, 11])
@pytest.mark.parametrize("positions", [1, 2, 5, 99])
def test_the_positions_of_a_completed_tail(cut: int, positions: int) -> None:
    """Evenly spaced over the tail, its first and last token among them; a tail drawn from the first token on too."""
    lm, exit = pair()
    y = drafted(lm, exit, cut)
    with Drift(exit, positions=positions).watching() as drift:
        run(scored(lm, y))
    n = min(positions, 12 - cut)
    at = np.unique(np.linspace(3 + cut, 3 + 11, n).round().astype(int)) - 3  # counted with the prompt, halves to even
    assert drift.seen == len(at) == n
    assert drift.kl == pytest.approx(reference(lm, exit, y)[at].mean(), abs=1e-10)
    assert drift.kl > 0.01


def test_positions_that_a_tail_has_in_common_with_the_path_before_are_known() -> None:
    """They have been completed before: not read again."""
    lm, exit = pair()
    (start,) = grown(lm, SPACE, [PROMPT], temperature=1.0, chains=1, seed=0)
    x = run(scored(exit, start, (1.0,)))
    tries = (run(draft(exit, SPACE, x, 9, 1.0, Stream(i)))[0] for i in range(1000))
    y = next(y for y in tries if y.tokens[:10] == x.tokens[:10] and y != x)
    begun = next(t for t in range(12) if y.tokens[t] != x.tokens[t])
    with Drift(exit, positions=1).watching() as drift:
        run(scored(lm, y))
    assert begun > 9
    assert drift.kl == pytest.approx(reference(lm, exit, y)[begun], abs=1e-10)


def test_the_window_is_of_the_latest() -> None:
    lm, exit = pair()
    drift = Drift(exit, window=4, positions=3)
    assert math.isnan(drift.kl)
    seen: list[float] = []
    with drift.watching():
        for seed in range(3):
            y = drafted(lm, exit, 4, seed)
            run(scored(lm, y))
            seen += reference(lm, exit, y)[[4, 7, 11]].tolist()
            assert drift.kl == pytest.approx(np.mean(seen[-4:]), abs=1e-10)
    assert drift.seen == 9


def test_only_completions_of_that_exit_are_seen() -> None:
    lm, exit = pair()
    other = EarlyExit(lm, ExitHead(3))
    with Drift(exit).watching() as drift, Drift(other).watching() as second:
        (start,) = grown(lm, SPACE, [PROMPT], temperature=1.0, chains=1, seed=1)
        assert (drift.seen, second.seen) == (0, 0), "drawn at full depth"
        run(scored(lm, SPACE.path(PROMPT, start.tokens)))
        assert drift.seen == 0, "scored from nothing"
        x = run(scored(exit, start, (1.0,)))
        assert drift.seen == 0, "scored by the exit"
        tries = (run(draft(exit, SPACE, x, 4, 1.0, Stream(i)))[0] for i in range(1000))
        y = next(y for y in tries if y.tokens[4] != x.tokens[4])
        assert drift.seen == 0, "not completed"
        full = run(scored(lm, y))
        assert (drift.seen, second.seen) == (2, 0)
        run(scored(lm, full, (0.5,)))
        assert drift.seen == 2, "only a further normaliser"
    stranger, its = pair()
    with Drift(exit).watching() as drift:
        run(scored(stranger, drafted(stranger, its, 4)))
    assert drift.seen == 0


def test_it_stops_watching_also_after_an_error() -> None:
    lm, exit = pair()
    drift = Drift(exit)
    with drift.watching() as same:
        assert same is drift
        assert lm.engine.watchers == [drift]
    assert lm.engine.watchers == []
    with pytest.raises(KeyboardInterrupt), drift.watching():
        raise KeyboardInterrupt
    assert lm.engine.watchers == []
    run(scored(lm, drafted(lm, exit, 4)))
    assert drift.seen == 0


def test_two_runs_at_once_watch_for_themselves() -> None:
    lm, exit = pair()
    one, two = Drift(exit), Drift(exit, positions=5)
    with one.watching():
        with two.watching():
            run(scored(lm, drafted(lm, exit, 4)))
        run(scored(lm, drafted(lm, exit, 4, seed=1)))
    assert (one.seen, two.seen) == (4, 5)


def test_what_it_reads_is_in_the_ledger() -> None:
    counted = []
    for watched in (False, True):
        lm, exit = pair()
        y = drafted(lm, exit, 4)
        before, drift = lm.ledger.copy(), Drift(exit, positions=3)
        if watched:
            lm.engine.watchers.append(drift)
        run(scored(lm, y))
        counted.append(lm.ledger.since(before))
    without, with_ = counted
    assert without.heads == {4: 8}
    assert with_.heads == {4: 8 + 3, 2: 3}
    assert with_.spans == without.spans
    cost = lm.engine.cost
    assert with_.flops - without.flops == 3 * (cost.head + exit.head.flops(cost)) > 0


def test_a_token_that_the_exit_cannot_draw_shows_as_infinite() -> None:
    lm, _ = pair()
    exit = EarlyExit(lm, ExitHead(2)).pruned(range(20))
    (start,) = grown(lm, SPACE, [PROMPT], temperature=1.0, chains=1, seed=0)
    low = [v % 20 for v in start.tokens]
    x = run(scored(exit, run(scored(lm, SPACE.path(PROMPT, low))), (1.0,)))
    y = run(draft(exit, SPACE, x, 4, 1.0, Stream(0)))[0]
    with Drift(exit).watching() as drift:
        run(scored(lm, y))
    assert drift.seen == 2
    assert drift.kl == math.inf


class Counting:
    """Watches as a drift does; counts completed tails and their tokens."""

    def __init__(self, exit: EarlyExit) -> None:
        self.exit, self.tails, self.read = exit, 0, 0

    def completed(self, cache: Any, start: int, stop: int) -> None:
        self.tails += 1
        self.read += min(stop - start, 2)


def test_in_a_kernel_it_sees_the_survivors() -> None:
    """Over steps of the screened kernel: two positions per completed tail of two tokens or more."""
    lm, exit = pair()
    target = Power(SequenceProbability(lm), 1.5)
    kernel = Screening(exit, 1.5, plain=0.2).kernel(lm, SPACE, Length(), 1 / 1.5, target)
    (start,) = grown(lm, SPACE, [PROMPT], temperature=1 / 1.5, chains=1, seed=0)
    state, passed, stages = run(kernel.init(start)), 0, set()
    own: Any = Counting(exit)
    lm.engine.watchers.append(own)
    with Drift(exit).watching() as drift:
        for i in range(40):
            state, info = run(kernel.step(Stream(3).step(i), state))
            if "stage" in info:
                stages.add(info["stage"])
                passed += info["stage"] > 0
            assert own.tails == passed
            assert drift.seen == own.read
    assert stages == {0, 1, 2}


def test_a_run_warns_once_that_its_lens_has_drifted() -> None:
    """The lens claims a KL that the exit cannot have. The warning points at the call; no drift, no warning."""
    lm, exit = pair()
    options: dict[str, Any] = {"max_new_tokens": 8, "block_size": 8, "steps": 20, "chains": 4, "alpha": 1.2}
    with pytest.warns(RuntimeWarning, match="the chain is still exact but its screen is worse") as caught:
        found = power_sample(lm, PROMPT, **options, exit=lens_of(lm, [exit.head], kl=0.01))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert "at layer 2 is " in text
    assert "nats on completed tails, 0.01 on the text" in text
    assert text.endswith("powermc calibrate --model LlamaForCausalLM --data TEXTS --layers 2 --out LENS")
    facts = found.early_exit
    assert facts["kl_positions"] >= 64
    assert facts["kl_held_out"] == 0.01
    assert lm.engine.watchers == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kl in (facts["kl"], math.nan):
            quiet = power_sample(lm, PROMPT, **options, exit=lens_of(lm, [exit.head], kl=kl))
    assert quiet.early_exit["kl"] == pytest.approx(facts["kl"], abs=1e-9)
    assert "held out unknown" in quiet.summary()
