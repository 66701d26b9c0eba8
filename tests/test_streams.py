"""Production streams: the generator, its addresses, its uniformity, and runs that repeat themselves exactly."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest

from powermc.choices import Stream
from powermc.kernels import Mixture
from powermc.scheduling import Event, drive
from powermc.sequences import BlockwisePower, Committed, Entropy, Prompt
from powermc.testing import assert_streams, chi_square_p, sequential_test

# The generator


def test_philox_is_numpys_at_the_same_key_and_counter():
    """Draw d at (step, purpose, index) is the first word of the block at counter (d, index, purpose, step). NumPy's
    generator, made afresh with that key and counter, is the reference: catches words in the wrong order, a buffer
    left over from the last read, and a counter that is not set."""
    for step, index, purpose in [(0, 0, ""), (5, 0, "cut"), (2**40, 7, "token"), (3, 2**64 - 1, "accept")]:
        stream = Stream(11, prompt=3, chain=2, replica=1).step(step)
        stream = stream.at(purpose, index) if purpose else stream
        key, counter = stream._key, (index, stream._purpose, step)
        for draw in range(6):
            reference = np.random.Philox(key=np.array(key, np.uint64), counter=np.array([draw, *counter], np.uint64))
            word = int(reference.random_raw())
            assert stream.uniform() == ((word >> 12) + 0.5) * 2.0**-52


def test_philox_known_answer():
    """The Random123 test vector of Philox 4x64-10 for key 0: the block at counter 0 (NumPy adds 1 before a block)."""
    reference = np.random.Philox(key=0, counter=2**256 - 1)
    assert f"{int(reference.random_raw()):016x}" == "16554d9eca36314c"


def addresses():
    """(label, stream) at many addresses, neighbours in every coordinate."""
    for seed, prompt, chain, replica in product((0, 1), (0, 1, 10**12), (0, 1, 2), (0, 1)):
        root = Stream(seed, prompt=prompt, chain=chain, replica=replica)
        for step, purpose, index in product((0, 1, 2, 1000), ("cut", "accept", "token"), (0, 1, 2)):
            yield (seed, prompt, chain, replica, step, purpose, index), root.step(step).at(purpose, index)
        yield (seed, prompt, chain, replica, 0, "nested", 0), root.step(0).at("cut").at("accept")
        yield (seed, prompt, chain, replica, 0, "nested1", 0), root.step(0).at("cut", 1).at("accept")
        yield (seed, prompt, chain, replica, 0, "root", 0), root.step(0)


def test_no_two_addresses_share_a_number():
    """About 5,600 numbers of 52 bits: by chance any two agree with probability 4e-9. Catches a coordinate that does
    not enter the key or the counter, and draws of one address that are the first draws of the next."""
    numbers = {}
    for label, stream in addresses():
        for draw in range(4):
            u = stream.uniform()
            assert u not in numbers, f"{(*label, draw)} repeats {numbers[u]}"
            numbers[u] = (*label, draw)
    assert len(numbers) > 5000


def test_two_prompts_never_share_a_stream():
    """Keys of 128 bits, all different on a grid of (seed, prompt, chain, replica); also where words are swapped."""
    keys = {Stream(s, prompt=p, chain=c, replica=r)._key for s, p, c, r in product(range(6), repeat=4)}
    assert len(keys) == 6**4
    assert len({half for key in keys for half in key}) == 2 * 6**4


def test_the_order_of_other_draws_is_irrelevant():
    def numbers(order):
        step = Stream(2, chain=1).step(9)
        found = {}
        for purpose, index in order:
            found[purpose, index] = step.at(purpose, index).uniform()
            Stream(2, chain=2).step(9).at(purpose, index).uniform()
        return found

    order = [(p, i) for p in ("cut", "token", "accept") for i in range(4)]
    assert numbers(order) == numbers(order[::-1]) == numbers(order[5:] + order[:5])


# Uniformity. Every test below: false positives 1e-6, whatever the seed (sequential test of chi-square p-values on
# cells that expect 150 counts and more).


def uniforms(coordinate, n, start):
    """n numbers that differ in one coordinate of the address only."""
    at = range(start, start + n)
    if coordinate == "draw":
        stream = Stream(1, chain=start).step(0).at("x")
        return np.array([stream.uniform() for _ in at])
    if coordinate == "step":
        return np.array([Stream(1).step(i).at("x").uniform() for i in at])
    if coordinate == "index":
        return np.array([Stream(1).step(0).at("x", i).uniform() for i in at])
    if coordinate == "purpose":
        return np.array([Stream(1).step(0).at(f"x{i}").uniform() for i in at])
    return np.array([Stream(1, **{coordinate: i}).step(0).at("x").uniform() for i in at])


@pytest.mark.parametrize("coordinate", ["draw", "step", "index", "purpose", "chain", "prompt", "replica"])
def test_numbers_are_uniform_and_successive_ones_independent(coordinate):
    """Along each coordinate: 64 cells of u, and 8 x 8 cells of (u_i, u_i+1). 10,000 numbers find one cell in 64 that
    is 80% too full, or 5,000 pairs that are on the diagonal 40% too often."""
    start = [0]

    def p_values(n):
        u = uniforms(coordinate, n, start[0])
        start[0] += n
        pairs = (u[:-1:2] * 8).astype(int) * 8 + (u[1::2] * 8).astype(int)
        flat = np.full(64, 1 / 64)
        return [
            chi_square_p(np.bincount((u * 64).astype(int), minlength=64), flat),
            chi_square_p(np.bincount(pairs, minlength=64), flat),
        ]

    assert sequential_test(p_values, n=10_000).passed


def test_integers_and_categorical_have_their_law():
    """A categorical with a zero and a tiny weight, and integers(6): 10,000 draws of each find a bias of .03."""
    log_weights = np.log([0.5, 1e-300, 0.2, 0.3])
    law = np.exp(log_weights)
    start = [0]

    def p_values(n):
        streams = [Stream(3, chain=start[0] + i).step(0) for i in range(n)]
        start[0] += n
        categories = np.bincount([s.at("c").categorical(log_weights) for s in streams], minlength=4)
        assert categories[1] == 0
        numbers = np.bincount([s.at("i").integers(6) for s in streams], minlength=6)
        return [chi_square_p(categories[[0, 2, 3]], law[[0, 2, 3]]), chi_square_p(numbers, np.full(6, 1 / 6))]

    assert sequential_test(p_values, n=10_000).passed


def test_a_level_is_below_a_bound_with_that_probability():
    bounds = np.array([0.01, 0.3, 0.9])
    start = [0]

    def p_values(n):
        levels = [Stream(4, chain=start[0] + i).step(0).at("accept").level() for i in range(n)]
        start[0] += n
        below = [sum(level.below(math.log(b)) for level in levels) for b in bounds]
        return [chi_square_p(np.array([k, n - k]), np.array([b, 1 - b])) for k, b in zip(below, bounds, strict=True)]

    assert sequential_test(p_values, n=10_000).passed


def test_steps_of_a_chain_are_as_good_as_steps_of_fresh_chains(peaked):
    """10 steps with the state carried over, the pairs of the last one: streams do not correlate along a chain.
    False positives 1e-6."""
    kernel = Mixture([peaked.metropolis(1.0), peaked.metropolis(1.0, Entropy(), 2.0)], [0.5, 0.5])
    assert_streams(kernel, peaked.paths, n=1000, steps=10)


# Same seed, same tokens


def trace(growth, seed, keys, active=None):
    """{(prompt, chain): committed (tokens, log density, info)} of a run of several prompts and chains."""
    programs = [
        ((key, chain), growth.program(Stream(seed, prompt=key, chain=chain).step, Prompt((key,), key=key)))
        for key, chain in keys
    ]
    found: dict = {label: [] for label, _ in programs}
    for outcome in drive(programs, active=active):
        if isinstance(outcome, Event) and isinstance(outcome.value, Committed):
            state = outcome.value.state
            found[outcome.key].append((state.value.tokens, state.log_density, repr(outcome.value.info)))
    return found


@pytest.fixture
def growth(peaked):
    return BlockwisePower(peaked.model, peaked.space, alpha=2.0, temperature=1.0, block_size=1, steps=30)


def test_the_same_seed_gives_the_same_run_bit_for_bit(growth):
    keys = list(product((7, 8), range(2)))
    assert trace(growth, 5, keys) == trace(growth, 5, keys)


def test_a_chain_is_the_same_alone_and_beside_others(growth):
    """Whatever else runs, in whatever order and however many at once: catches a stream that counts across chains, and
    answers that go to the wrong chain."""
    keys = list(product((7, 8), range(4)))
    together = trace(growth, 5, keys)
    for key in keys:
        assert trace(growth, 5, [key])[key] == together[key]
    assert trace(growth, 5, keys[::-1]) == together
    assert trace(growth, 5, keys, active=3) == together


def test_chains_prompts_and_seeds_differ(growth):
    """If two of these runs of 90 steps were equal, they would share a stream."""
    runs = [trace(growth, seed, [key])[key] for seed in (5, 6) for key in product((7, 8), range(2))]
    assert all(len(run) == 90 for run in runs)
    assert all(a != b for a, b in combinations(runs, 2))
