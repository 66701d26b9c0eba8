"""Nothing is run twice: agreement with the current path, the pool, guesses. Counts of work, equal states, mutants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from powermc.choices import Stream
from powermc.kernels import Metropolis
from powermc.lm import CausalLM
from powermc.lm import drafts as drafts_module
from powermc.lm.drafts import DecoderRow
from powermc.lm.exits import EarlyExit
from powermc.lm.guesses import LikeliestAtExit, Lookup, lookup, share
from powermc.lm.heads import ExitHead
from powermc.lm.pool import Entry, Pool
from powermc.scheduling import Finished, drive, run
from powermc.sequences import (
    BlockwisePower,
    Committed,
    Length,
    Path,
    Prompt,
    SequenceProbability,
    Space,
    Suffix,
    draft,
    scored,
)
from powermc.targets import Power
from powermc.testing import assert_same_kernel, enumerate_kernel, prove
from tests.lm.families import tiny_model
from tests.lm.test_cost import Kept
from tests.lm.toys import PROMPT, all_paths, toy_lm

COLD = 0.3
"""A temperature at which drafts agree with each other for a while."""


ALWAYS = 100_000
"""Tokens a single row would guess, so that any number of rows guess some."""


class Arbitrary:
    """A guesser that knows nothing, and is right now and then."""

    def __init__(self, vocab: int, tokens: int = ALWAYS) -> None:
        self.vocab, self.tokens = vocab, tokens

    def guess(self, rows: Sequence[DecoderRow], most: int) -> None:
        for row in rows:
            row.guess([(sum(row.ids) + i) % self.vocab for i in range(min(most, 3))])


class Eager:
    """Another guesser, however many rows there are."""

    def __init__(self, of: Any) -> None:
        self.of, self.tokens = of, ALWAYS

    def guess(self, rows: Sequence[DecoderRow], most: int) -> None:
        self.of.guess(rows, min(most, self.of.tokens))


def variants(lm: CausalLM) -> dict[str, CausalLM]:
    """The same model with every way of not running a token twice, alone and together."""
    model: Any = lm.decoder.model

    def made(reuse: bool, guesser: Callable[[CausalLM], Any] | None = None) -> CausalLM:
        new = CausalLM(model, max_rows=lm.max_rows, reuse=reuse)
        new.engine.guesser = None if guesser is None else guesser(new)
        new.engine.ahead = ALWAYS
        return new

    def by_exit(new: CausalLM) -> Eager:
        return Eager(LikeliestAtExit(EarlyExit(new, ExitHead(1)), 3))

    def forgetful(new: CausalLM) -> CausalLM:
        new.engine.pool.budget = 5 * new.decoder.rows.bytes_per_token
        return new

    return {
        "plain": made(False),
        "reuse": made(True),
        "small pool": forgetful(made(True)),
        "lookup": made(False, lambda _: Eager(Lookup(5))),
        "wrong guesses": made(False, lambda new: Arbitrary(new.vocab_size)),
        "guesses at an exit": made(False, by_exit),
        "all": made(True, lambda _: Eager(Lookup(3))),
    }


def chains(lm: CausalLM, *, alpha: float = 3.0, n: int = 3, horizon: int = 24, steps: int = 6) -> Any:
    """Committed steps and last states of some chains."""
    schedule = BlockwisePower(lm, Space(frozenset({1}), horizon), alpha=alpha, block_size=8, steps=steps)
    prompts = [Prompt((3, 5, 7, 5), "a", 1), Prompt((9, 2, 4), "b", 2)]
    programs = (
        ((p.key, c), schedule.program(Stream(0, prompt=p.key, chain=c).step, p)) for p in prompts for c in range(n)
    )
    found: dict[Any, list[Any]] = {}
    for outcome in drive(programs):
        if isinstance(outcome, Finished):
            continue
        if isinstance(outcome.value, Committed):  # type: ignore[union-attr]
            found.setdefault(outcome.key, []).append(outcome.value)  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_variant_visits_the_same_states(family: str) -> None:
    """Equal streams, float64: token for token, decision for decision, and scores to rounding; fewer tokens run."""
    rounding = 1e-5 if family == "gemma2" else 1e-9  # its norms are float32 in any dtype
    lms = variants(CausalLM(tiny_model(family).double(), max_rows=8))
    plain = chains(lms["plain"])
    ran = {name: lm.ledger for name, lm in lms.items()}
    for name, lm in lms.items():
        if name == "plain":
            continue
        other = chains(lm)
        for key, steps in plain.items():
            for a, b in zip(steps, other[key], strict=True):
                assert a.state.value.tokens == b.state.value.tokens, name
                assert a.info["accepted"] == b.info["accepted"]
                assert a.info["log_ratio"] == pytest.approx(b.info["log_ratio"], abs=rounding, nan_ok=True)
                assert a.state.value.log_p == pytest.approx(b.state.value.log_p, abs=rounding)
    tokens = {name: ledger.decoded + ledger.prefilled for name, ledger in ran.items()}
    assert tokens["reuse"] < 0.9 * tokens["plain"]
    assert tokens["wrong guesses"] > tokens["plain"]
    assert ran["lookup"].ticks < ran["plain"].ticks


def started(lm: CausalLM, length: int = 16) -> Path:
    """A path drawn cold, fully scored."""
    space = Space(frozenset(), length)

    def begin() -> Any:
        x = yield from scored(lm, Path(Prompt((3, 5, 7, 5)), (), False), (1 / COLD,))
        return (yield from draft(lm, space, x, 0, COLD, Stream(0).step(0)))

    return run(begin())[0]


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    return next((t for t, (u, v) in enumerate(zip(a, b, strict=False)) if u != v), min(len(a), len(b)))


def test_layers_run_from_the_first_divergence_on() -> None:
    """A draft of n tokens that agrees with the current path in k runs n - 1 - k, and none if they are the same.

    Heads: the n - cut states that are known, read at once, and one for every draw after that which left the path.
    """
    lm, n = CausalLM(tiny_model("llama"), max_rows=4), 16
    x = started(lm, n)
    seen = set()
    for seed in range(1, 40):
        lm.forget()
        before, cut = lm.ledger.copy(), 2 if seed % 2 else n - 3
        y, ran, _ = run(draft(lm, Space(frozenset(), n), x, cut, COLD, Stream(seed).step(0)))
        spent, k = lm.ledger.since(before), agreement(x.tokens, y.tokens)
        assert ran == spent.tokens(0, lm.depth) == max(n - 1 - k, 0)
        assert spent.heads[lm.depth] == n - cut + max(n - 1 - k, 0)
        if y == x:
            assert not +spent.spans
        seen.add(k)
    assert len(seen) > 4
    assert n in seen, "a draft was the current path itself"


def test_no_prefix_is_run_twice() -> None:
    """Step by step, one chain: the tokens run are exactly the prefixes that were never needed before."""
    lm = CausalLM(tiny_model("llama"), max_rows=4)
    space = Space(frozenset({1}), 12)
    proposal = Kept(Suffix(lm, space, Length(), COLD))
    kernel = Metropolis(Power(SequenceProbability(lm), 2.0), proposal, early_rejection=False)
    state = run(kernel.init(started(lm, 12)))
    seen = {state.value.tokens[:t] for t in range(1, len(state.value))}
    ran = []
    for step in range(1, 121):
        before = lm.ledger.copy()
        state, info = run(kernel.step(Stream(3).step(step), state))
        tokens = proposal.moves[-1].value.tokens
        needed = {tokens[:t] for t in range(max(info["cut"], 1), len(tokens))}
        assert info["tokens"] == lm.ledger.since(before).tokens(0, lm.depth) == len(needed - seen)
        seen |= needed
        ran.append(info["tokens"])
    assert sum(ran[60:]) < 0.8 * sum(ran[:60]), "less and less is new"


def test_the_pool_serves_what_a_rejected_draft_has_run() -> None:
    """The same draft again, from the path it was drafted from, costs no layer; without reuse all of it again."""
    for reuse in (True, False):
        lm, n = CausalLM(tiny_model("llama"), max_rows=4, reuse=reuse), 16
        x = run(scored(lm, started(lm, n), (1.0,)))
        draws = [run(draft(lm, Space(frozenset(), n), x, 2, 1.0, Stream(5).step(0))) for _ in range(2)]
        assert draws[0][0] == draws[1][0]
        assert draws[0][1] > 0
        assert draws[1][1] == (0 if reuse else n - 3)
        fresh = run(scored(lm, Space(frozenset(), n).path(x.prompt, draws[1][0].tokens), (1.0,)))
        assert draws[1][0].log_p == pytest.approx(fresh.log_p, abs=1e-5)


def test_a_pool_of_no_bytes_keeps_nothing_and_a_small_one_the_latest() -> None:
    lm = CausalLM(tiny_model("llama"), max_rows=4)
    x = run(scored(lm, started(lm), (1.0,)))
    one = lm.engine.pool.bytes
    assert one > 0
    lm.engine.pool.budget = int(2.5 * one)
    for seed in range(12):
        run(draft(lm, Space(frozenset(), 16), x, 0, 1.0, Stream(seed).step(0)))
        assert lm.engine.pool.bytes <= lm.engine.pool.budget
    assert 1 <= len(lm.engine.pool) <= 4
    lm.engine.pool.budget = 0
    run(draft(lm, Space(frozenset(), 16), x, 0, 1.0, Stream(99).step(0)))
    assert len(lm.engine.pool) == 0
    assert lm.engine.pool.bytes == 0


def test_segments_that_drafts_share_are_counted_once() -> None:
    lm = CausalLM(tiny_model("llama"), max_rows=4)
    x = started(lm)
    cache, before = x.cache, lm.engine.pool.bytes
    pool = Pool()
    for _ in range(3):
        pool.add((*x.prompt.ids, *x.tokens), 4, cache)
    assert pool.bytes <= before + sum(s.keys.nbytes + s.values.nbytes + sum(h.nbytes for h in s.hidden.values())
                                      for s in cache.segments)  # fmt: skip
    assert len(pool) == 3


def test_a_model_trained_in_between_is_not_served_from_the_pool() -> None:
    model = tiny_model("llama")
    lm = CausalLM(model, max_rows=4)
    chains(lm, n=1, steps=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after, fresh = chains(lm, n=1, steps=2), chains(CausalLM(model, max_rows=4), n=1, steps=2)
    for key, steps in fresh.items():
        assert [s.state.value.tokens for s in steps] == [s.state.value.tokens for s in after[key]]
        assert steps[-1].state.value.log_p == pytest.approx(after[key][-1].state.value.log_p, abs=1e-5)


# The law, entry by entry.


def kernel_of(lm: CausalLM, alpha: float, temperature: float, horizon: int) -> Metropolis[Path]:
    space = Space(frozenset({2}), horizon)
    return Metropolis(Power(SequenceProbability(lm), alpha), Suffix(lm, space, Length(), temperature))


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 1.0), (4.0, 0.25)])
def test_same_transition_matrix(alpha: float, temperature: float) -> None:
    """P_fast = P_plain for each variant, and P_2 = P P with activations carried over."""
    lms = variants(toy_lm())
    paths = all_paths(Space(frozenset({2}), 2), 3)
    plain = enumerate_kernel(kernel_of(lms["plain"], alpha, temperature, 2), paths)
    for name, lm in lms.items():
        if name != "plain":
            fast = prove(kernel_of(lm, alpha, temperature, 2), paths)
            assert_same_kernel(fast, plain)
    decoded = {name: lm.ledger.decoded for name, lm in lms.items()}
    assert decoded["small pool"] > decoded["reuse"], "drafts ran layers there too"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reuse", "small pool", "wrong guesses", "guesses at an exit", "all"])
@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_same_transition_matrix_of_three_tokens(name: str, alpha: float) -> None:
    lms = variants(toy_lm())
    paths = all_paths(Space(frozenset({2}), 3), 3)
    plain = enumerate_kernel(kernel_of(lms["plain"], alpha, 0.5, 3), paths)
    assert_same_kernel(prove(kernel_of(lms[name], alpha, 0.5, 3), paths), plain)


# Mutants: each correction left out.


def stale_agreement(self: DecoderRow, token: int) -> None:
    """Goes on reading the current path's states after the draft has left it."""
    self.logits.clear()
    self.ids.append(token)
    self.ahead = self.ahead[1:]


def stale_guess(self: DecoderRow, token: int) -> None:
    """Takes what was guessed for what was drawn: the slot's states are not cut back."""
    self.logits.clear()
    self.ahead = self.ahead[1:]
    self.ids.append(token)
    if self.slot is None:
        self.prefix = self.prefix.upto(len(self.ids) - 1)


def by_length(self: Pool, key: int, ids: Sequence[int], depth: int) -> Entry | None:
    """Finds whatever has come as far, whatever its tokens."""
    long_enough = (e for e in self._entries.values() if e.prefix.reaches(depth) >= len(ids))
    return next(long_enough, None)


def old_logits(self: DecoderRow, token: int) -> None:
    """Keeps logits read ahead on another path."""
    kept = list(self.logits)[1:]
    RIGHT_APPEND(self, token)
    if not self.logits:
        self.logits.extend(kept)


RIGHT_APPEND = DecoderRow.append
MUTANTS: dict[str, tuple[type, str, Any, str]] = {
    "stale agreement": (DecoderRow, "append", stale_agreement, "reuse"),
    "stale guess": (DecoderRow, "append", stale_guess, "wrong guesses"),
    "pool by length": (Pool, "find", by_length, "reuse"),
    "old logits": (DecoderRow, "append", old_logits, "reuse"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, wrong, variant = MUTANTS[name]
    lm = variants(toy_lm())[variant]
    monkeypatch.setattr(owner, method, wrong)
    monkeypatch.setattr(drafts_module, "DecoderRow", DecoderRow)
    with pytest.raises(AssertionError):
        prove(kernel_of(lm, 2.0, 0.8, 3), all_paths(Space(frozenset({2}), 3), 3))


# Guesses


def test_lookup_takes_the_longest_match_and_the_latest_place() -> None:
    text = (1, 2, 3, 4, 9, 9, 2, 3, 7, 8)
    assert lookup((5, 2, 3), [text], 2) == (7, 8)
    assert lookup((1, 2, 3), [text], 3) == (4, 9, 9), "three tokens before two"
    assert lookup((5, 6, 5, 6), [], 4) == (5, 6), "in itself"
    assert lookup((5, 6), [text], 4) == ()
    assert lookup((3,), [text], 4) == ()


@pytest.mark.parametrize(("most", "rows", "each"), [(7, 1, 7), (7, 2, 3), (7, 4, 1), (7, 8, 0), (7, 9, 0), (0, 1, 0)])
def test_many_rows_guess_less(most: int, rows: int, each: int) -> None:
    assert share(most, rows) == each


def test_guesses_stay_within_the_context() -> None:
    """A model with learned positions has no more of them."""
    lm = CausalLM(tiny_model("gpt2"), max_rows=2)
    lm.engine.guesser = Arbitrary(lm.vocab_size, 9)
    assert lm.decoder.context is not None
    space = Space(frozenset(), lm.decoder.context - len(PROMPT.ids))

    def program() -> Any:
        x = yield from scored(lm, Path(PROMPT, (), False), (1.0,))
        return (yield from draft(lm, space, x, 0, 1.0, Stream(0).step(0)))

    path, ran, _ = run(program())
    assert len(path) == space.horizon
    assert ran > len(path), "wrong guesses are counted as run"
    assert np.isfinite(path.log_p).all()
