"""Blockwise growth: the schedule, its events, and the law of the whole program by enumeration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.choices import Stream
from powermc.errors import ArgumentError, ZeroProbability
from powermc.kernels import Metropolis
from powermc.scheduling import Event, Failed, Finished, drive, run
from powermc.sequences import (
    BlockwisePower,
    Committed,
    Grown,
    Horizon,
    Length,
    Path,
    Prompt,
    SequenceProbability,
    Space,
)
from powermc.sequences.growth import Point
from powermc.targets import Power, Tilted
from powermc.testing import enumerate_kernel, enumerate_outcomes, paths_of
from powermc.testing import strategies as toys


def schedule(toy, **settings):
    return BlockwisePower(toy.model, toy.space, **settings)


def events(growth, seed=0, chain=0):
    stream = Stream(seed, chain=chain)
    return list(drive([(0, growth.program(stream.step, Prompt()))]))


@given(st.data())
@settings(max_examples=12)
def test_the_law_of_the_program_is_its_stages_multiplied_out(data):
    """mu_K = (...(mu_0 G_1 P_1^N) G_2 P_2^N...), G_k growth from q. Catches a stage on the wrong horizon, a kernel step
    too many or too few, growth at another temperature, and numbers used twice between growth and steps."""
    toy = data.draw(toys.toys(max_paths=15, stop=False))
    growth = schedule(
        toy,
        alpha=data.draw(toys.alphas()),
        temperature=data.draw(st.one_of(st.none(), toys.temperatures())),
        block_size=data.draw(st.integers(1, 3)),
        steps=1,
        scope=data.draw(st.sampled_from(["sequence", "block"])),
        cut=data.draw(st.sampled_from(["length", "horizon", "entropy"])),
    )

    def program(choices):
        state = yield from growth.program(lambda i: choices.at("step", i), Prompt())
        return state.value

    found: dict = {}
    for value, probability in enumerate_outcomes([program])[0]:
        found[value.tokens] = found.get(value.tokens, 0.0) + probability
    expected = program_law(toy, growth)
    assert found.keys() <= expected.keys()
    assert all(found.get(k, 0.0) == pytest.approx(v, abs=1e-12) for k, v in expected.items())


@given(st.data())
@settings(max_examples=25)
def test_a_program_goes_on_from_any_event(data):
    """From what any event committed, the rest of the program commits what the whole one does, number for number."""
    toy = data.draw(toys.toys(max_paths=15, stop=False))
    growth = schedule(
        toy,
        alpha=2.0,
        block_size=data.draw(st.integers(1, 3)),
        steps=data.draw(st.integers(0, 3)),
        draws=data.draw(st.one_of(st.none(), st.integers(0, 4))),
        cut=data.draw(st.sampled_from(["length", "horizon", "entropy"])),
    )
    stream = Stream(data.draw(st.integers(0, 99)))
    whole = [o.value for o in drive([(0, growth.program(stream.step, Prompt()))]) if isinstance(o, Event)]
    assert len([e for e in whole if isinstance(e, Committed)]) == growth.total
    n = data.draw(st.integers(0, len(whole) - 1))
    event = whole[n]
    path = event.path if isinstance(event, Grown) else event.state.value
    done = 0 if isinstance(event, Grown) else event.step - event.block * growth.steps + 1
    point = Point(event.block, done, Path(path.prompt, path.tokens, path.finished))
    rest = [o.value for o in drive([(0, growth.program(stream.step, Prompt(), point))]) if isinstance(o, Event)]
    assert len(rest) == len(whole) - n - 1
    for one, other in zip(rest, whole[n + 1 :], strict=True):
        assert type(one) is type(other)
        assert one.block == other.block
        if isinstance(one, Committed):
            assert one.step == other.step
            assert one.state.value.tokens == other.state.value.tokens
            assert one.info.keys() == other.info.keys()
            assert one.info["accepted"] == other.info["accepted"]
            assert one.info.get("proposed") == other.info.get("proposed")
        else:
            assert one.path.tokens == other.path.tokens


def program_law(toy, growth):
    """{tokens: probability} of the last value, from the enumerated matrices of the stages."""
    law = {(): 1.0}
    for block in range(growth.blocks):
        stage = growth.stage(block)
        paths = paths_of(stage.space, toy.model.vocab_size)
        grown = dict.fromkeys((x.tokens for x in paths), 0.0)
        for x in paths:
            for prefix, mass in law.items():
                ended = bool(prefix) and stage.space.ends(prefix)
                if x.tokens[: len(prefix)] == prefix and (not ended or x.tokens == prefix):
                    grown[x.tokens] += mass * drawn(toy, x.tokens, len(prefix), growth.q_temperature)
        kernel = enumerate_kernel(stage.kernel, paths)
        row = np.array([grown[x.tokens] for x in kernel.values])
        assert row.sum() == pytest.approx(1.0)
        law = dict(zip((x.tokens for x in kernel.values), row @ kernel.matrix, strict=True))
    return law


def drawn(toy, tokens, start, temperature):
    q = 1.0
    for t in range(start, len(tokens)):
        row = toy.model.table[toy.model.context(tokens[:t])] ** (1 / temperature)
        q *= row[tokens[t]] / row.sum()
    return q


def test_events_are_grown_then_its_steps_block_by_block(peaked):
    for chain in range(10):
        found = events(schedule(peaked, block_size=2, steps=3, alpha=1.0), chain=chain)
        assert isinstance(found[-1], Finished)
        inner = [e.value for e in found[:-1]]
        assert [e.step for e in inner if isinstance(e, Committed)] == list(range(6))
        assert [e.block for e in inner if isinstance(e, Committed)] == [0, 0, 0, 1, 1, 1]
        assert isinstance(inner[0], Grown)
        assert inner[0].tokens == len(inner[0].path) <= 2
        ended = inner[3].state.value.finished
        assert isinstance(inner[4], Committed if ended else Grown)
        assert found[-1].value.value == inner[-1].state.value


def test_a_finished_path_is_not_extended_but_goes_on_moving(peaked):
    """Sequences must be able to grow back after an early end: a path that ended in block 0 may be longer at the end.

    About 140 of the chains end at once; that none of them comes back to length 2 (probability .11) has chance 1e-7.
    """
    lengths = set()
    for chain in range(400):
        found = [e.value for e in events(schedule(peaked, block_size=1, steps=4, alpha=1.0), chain=chain)[:-1]]
        first = next(e for e in found if isinstance(e, Grown))
        if first.path.finished:
            lengths.add(len(found[-1].state.value))
    assert lengths == {1, 2, 3}


def test_stage_horizons_and_cut_laws(peaked):
    g = schedule(peaked, block_size=2, steps=1)
    assert [g.stage(b).space.horizon for b in range(g.blocks)] == [2, 3]
    assert [g.stage(b).kernel.proposal.cuts for b in range(2)] == [Length(), Length()]
    assert g.stage(0).kernel.proposal.temperature == 0.25
    block = replace(g, scope="block")
    assert [block.stage(b).kernel.proposal.cuts for b in range(2)] == [Length(), Length(2)]
    assert replace(block, cut="block").stage(1).kernel.proposal.cuts == Horizon(3, 2)
    assert replace(block, cut="block").stage(0).kernel.proposal.cuts == Horizon(2, 0)
    assert schedule(peaked, block_size=50).blocks == 1


def test_scope_block_never_changes_an_earlier_block(peaked):
    for chain in range(20):
        found = [e.value for e in events(schedule(peaked, block_size=1, steps=5, scope="block"), chain=chain)[:-1]]
        at_end = {e.block: e.state.value.tokens for e in found if isinstance(e, Committed)}
        for e in found:
            if isinstance(e, Committed):
                for earlier in range(e.block):
                    kept = at_end[earlier][: earlier + 1]
                    assert e.state.value.tokens[: len(kept)] == kept


def test_no_steps_is_a_plain_draw_from_q(peaked):
    found = events(schedule(peaked, block_size=2, steps=0, temperature=0.5))
    assert all(isinstance(e.value, Grown) for e in found[:-1])
    assert peaked.space.contains(found[-1].value.value.tokens)


def test_a_tilt_makes_the_target_of_the_power(peaked):
    def tilted(power):
        return Tilted(power, lambda x: float(x.tokens[-1] == 2))

    stage = schedule(peaked, block_size=3, tilt=tilted, alpha=2.0).stage(0)
    found = enumerate_kernel(stage.kernel, peaked.paths)
    law = peaked.power(2.0) * np.exp([float(x.tokens[-1] == 2) for x in peaked.paths])
    assert np.allclose(found.pi, (law / law.sum())[peaked.p > 0])


def test_a_target_that_forbids_the_grown_path_ends_that_chain_with_an_error(peaked):
    growth = schedule(peaked, block_size=1, tilt=lambda power: Tilted(power, lambda x: -np.inf))
    (outcome,) = (e for e in events(growth) if not isinstance(e, Event))
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, ZeroProbability)


def test_the_same_numbers_give_the_same_chain(peaked):
    growth = schedule(peaked, block_size=1, steps=6)
    assert events(growth, seed=4) == events(growth, seed=4)
    assert events(growth, seed=4) != events(growth, seed=5)


def test_program_needs_no_more_than_a_choices_per_step(peaked):
    """Growth of block k and its steps take the numbers k (N + 1) ... k (N + 1) + N, each once (no end token: all)."""
    asked = []
    endless = replace(peaked, space=Space(frozenset(), 3))

    def choices(i):
        asked.append(i)
        return Stream(0).step(i)

    run(schedule(endless, block_size=1, steps=4).program(choices, Prompt()))
    assert asked == list(range(15))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"alpha": -1.0}, "alpha must be a finite number >= 0"),
        ({"alpha": np.nan}, "alpha must be a finite number >= 0"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"block_size": 0}, "block size must be at least 1"),
        ({"steps": -1}, "steps per block must be at least 0"),
        ({"scope": "word"}, "unknown scope 'word'; choose one of sequence, block"),
        ({"cut": "middle"}, "unknown cut law 'middle'"),
        ({"cut": "block"}, "use scope='block' with it"),
    ],
)
def test_arguments_out_of_range(peaked, settings, text):
    with pytest.raises(ArgumentError, match=text):
        schedule(peaked, **settings)


def test_the_kernel_of_a_whole_sequence_stage_is_plain_metropolis(peaked):
    g = schedule(peaked, block_size=3, alpha=2.0, temperature=0.7)
    assert g.stage(0).kernel == Metropolis(Power(SequenceProbability(peaked.model), 2.0), peaked.suffix(Length(), 0.7))
