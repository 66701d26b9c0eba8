"""The scheduler: batches, order, failure of one program among many, and tidy closing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.errors import ChainError
from powermc.scheduling import Event, Failed, Finished, drive, run
from powermc.types import PENDING, Request


class Ask(Request):
    __slots__ = ("oracle_", "value")

    def __init__(self, oracle, value):
        self.oracle_, self.value = oracle, value

    @property
    def oracle(self):
        return self.oracle_


@dataclass
class Doubler:
    """Answers 2v, ChainError for negative v; holds back all but the first `room` requests."""

    room: int = 1 << 30
    batches: list[list[Any]] = field(default_factory=list)

    def answer(self, requests):
        self.batches.append([r.value for r in requests])
        return [
            PENDING if i >= self.room else ChainError("negative") if r.value < 0 else 2 * r.value
            for i, r in enumerate(requests)
        ]


def doubling(oracle, value, times):
    for _ in range(times):
        value = yield Ask(oracle, value)
    return value


def test_requests_of_all_programs_share_a_batch():
    """Would catch a scheduler that serves programs one by one."""
    oracle = Doubler()
    outcomes = list(drive((i, doubling(oracle, i, 2)) for i in range(3)))
    assert oracle.batches == [[0, 1, 2], [0, 2, 4]]
    assert outcomes == [Finished(0, 0), Finished(1, 4), Finished(2, 8)]


def test_programs_do_not_wait_for_each_other():
    """A program that needs fewer answers ends while the others go on."""
    oracle = Doubler()
    keys = [o.key for o in drive([("long", doubling(oracle, 1, 3)), ("short", doubling(oracle, 1, 1))])]
    assert keys == ["short", "long"]
    assert [len(b) for b in oracle.batches] == [2, 1, 1]


def test_active_limits_how_many_are_under_way_and_takes_the_next_lazily():
    oracle = Doubler()
    taken = []

    def programs():
        for i in range(5):
            taken.append(i)
            yield i, doubling(oracle, i, 1)

    running = drive(programs(), active=2)
    next(running)
    assert taken == [0, 1]
    assert sorted(o.key for o in running) == [1, 2, 3, 4]
    assert max(map(len, oracle.batches)) == 2


def test_active_counts_programs_that_wait_for_an_answer():
    """An oracle that answers one request at a time must not have ever more of them piled up."""
    oracle = Doubler(room=1)
    list(drive(((i, doubling(oracle, i, 2)) for i in range(6)), active=2))
    assert max(map(len, oracle.batches)) == 2


def test_requests_left_over_come_first_and_in_order():
    """Otherwise one of many could wait for ever."""
    oracle = Doubler(room=1)
    list(drive((i, doubling(oracle, 10 + i, 1)) for i in range(4)))
    assert oracle.batches == [[10, 11, 12, 13], [11, 12, 13], [12, 13], [13]]


@given(st.integers(1, 4), st.lists(st.integers(0, 4), max_size=6), st.integers(1, 6))
def test_results_do_not_depend_on_batches(room, times, active):
    """Every program gets the answer to its own request, however few are answered at a time."""
    oracle = Doubler(room=room)
    programs = [(i, doubling(oracle, i + 1, n)) for i, n in enumerate(times)]
    found = {o.key: o.value for o in drive(programs, active=active)}
    assert found == {i: (i + 1) * 2**n for i, n in enumerate(times)}


def test_each_oracle_gets_its_own_requests_only():
    a, b = Doubler(), Doubler()
    list(drive([(0, doubling(a, 1, 1)), (1, doubling(b, 10, 1)), (2, doubling(a, 2, 1))]))
    assert a.batches == [[1, 2]]
    assert b.batches == [[10]]


def test_a_chain_error_ends_its_own_program_only():
    oracle = Doubler()
    outcomes = {o.key: o for o in drive((i, doubling(oracle, v, 1)) for i, v in enumerate([1, -1, 2]))}
    assert isinstance(outcomes[1], Failed)
    assert str(outcomes[1].error) == "negative"
    assert outcomes[0] == Finished(0, 2)
    assert outcomes[2] == Finished(2, 4)


def test_a_program_may_catch_the_error_it_is_sent():
    def careful():
        try:
            yield Ask(oracle, -1)
        except ChainError:
            return "caught"

    oracle = Doubler()
    assert run(careful()) == "caught"


def test_a_chain_error_of_the_program_itself_is_reported_too():
    def failing():
        raise ChainError("own")
        yield

    assert [type(o) for o in drive([(0, failing())])] == [Failed]
    with pytest.raises(ChainError, match="own"):
        run(failing())


def test_events_come_out_at_once_and_in_order():
    def chatty(oracle):
        yield "first"
        value = yield Ask(oracle, 1)
        yield value
        return "end"

    seen = list(drive([(0, chatty(Doubler())), (1, chatty(Doubler()))]))
    for key in (0, 1):
        assert [o for o in seen if o.key == key] == [Event(key, "first"), Event(key, 2), Finished(key, "end")]


def test_closing_closes_every_program_under_way():
    """Rows of a model are released in `finally`; a scheduler that forgets a program leaks them."""
    closed = []

    def holding(i, oracle):
        try:
            yield Ask(oracle, i)
            yield "event"
            yield Ask(oracle, i)
        finally:
            closed.append(i)

    oracle = Doubler(room=2)
    programs = [(i, holding(i, oracle)) for i in range(3)]  # kept here, or the garbage collector would close them
    running = drive(programs)
    next(running)
    running.close()
    assert sorted(closed) == [0, 1, 2]


def test_any_other_exception_propagates_and_closes_the_rest():
    closed = []

    def holding():
        try:
            yield Ask(oracle, 1)
        finally:
            closed.append(True)

    def wrong():
        yield Ask(oracle, 1)
        raise ZeroDivisionError

    oracle = Doubler(room=1)
    programs = [(0, wrong()), (1, holding())]
    with pytest.raises(ZeroDivisionError):
        list(drive(programs))
    assert closed == [True]


def test_an_oracle_that_answers_nothing_is_an_error_not_a_hang():
    with pytest.raises(RuntimeError, match="no oracle answered any of 1 requests"):
        list(drive([(0, doubling(Doubler(room=0), 1, 1))]))


def test_an_oracle_that_loses_a_request_is_an_error():
    class Short(Doubler):
        def answer(self, requests):
            return [0] * (len(requests) - 1)

    oracle = Short()
    with pytest.raises(ValueError, match="shorter"):
        list(drive((i, doubling(oracle, i, 1)) for i in range(2)))


def test_run_drops_events_and_returns_the_value():
    def program():
        yield "event"
        return 5

    assert run(program()) == 5
