"""The laws of a Markov kernel as assertions, each on the enumerated transition matrix.

Each docstring names the kind of fault that the assertion finds and the others need not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from powermc.testing.enumeration import Transitions, enumerate_kernel, two_step_matrix
from powermc.types import Kernel, X

TOLERANCE = 1e-12


def _transitions(kernel: Kernel[X] | Transitions[X], space: Sequence[X] | None) -> Transitions[X]:
    if isinstance(kernel, Transitions):
        return kernel
    if space is None:
        raise TypeError("name the space: assert_...(kernel, space), or pass Transitions from enumerate_kernel")
    return enumerate_kernel(kernel, space)


def assert_stochastic(
    kernel: Kernel[X] | Transitions[X], space: Sequence[X] | None = None, *, tol: float = TOLERANCE
) -> None:
    """Every row of P sums to 1: no outcome is lost, none counted twice."""
    found = _transitions(kernel, space)
    worst = np.abs(found.matrix.sum(1) - 1)
    i = int(worst.argmax())
    assert worst[i] <= tol, f"the row of {found.values[i]!r} sums to 1 {found.matrix[i].sum() - 1:+.3g}"


def assert_law(
    kernel: Kernel[X] | Transitions[X],
    space: Sequence[X],
    law: Sequence[float] | np.ndarray,
    *,
    tol: float = TOLERANCE,
) -> None:
    """The kernel's target is the law you mean: `law` gives it for every value of `space`, normalised or not.

    The other assertions take the kernel's own word for what its target is; this one finds a wrong exponent, a missing
    reward, or a value that is supported and should not be.
    """
    found = _transitions(kernel, space)
    weights = np.asarray(law, dtype=np.float64)
    assert len(weights) == len(space), f"the law has {len(weights)} entries for a space of {len(space)} values"
    expected = dict(zip(space, weights / weights.sum(), strict=True))
    own = dict(zip(found.values, found.pi, strict=True))
    value = max(space, key=lambda v: abs(own.get(v, 0.0) - expected[v]))
    gap = own.get(value, 0.0) - expected[value]
    assert abs(gap) <= tol, f"the target gives {value!r} probability {own.get(value, 0.0):.3g}, {gap:+.3g} too much"


def assert_invariant(
    kernel: Kernel[X] | Transitions[X], space: Sequence[X] | None = None, *, tol: float = TOLERANCE
) -> None:
    """pi P = pi, with pi the kernel's own target normalised over the space: the chain samples what it says.

    Finds every wrong or missing factor of the ratio that does not happen to cancel in the sum over origins.
    """
    found = _transitions(kernel, space)
    gap = found.pi @ found.matrix - found.pi
    j = int(np.abs(gap).argmax())
    assert abs(gap[j]) <= tol, f"pi P differs from pi by {gap[j]:+.3g} at {found.values[j]!r} (pi = {found.pi[j]:.3g})"


def assert_reversible(
    kernel: Kernel[X] | Transitions[X], space: Sequence[X] | None = None, *, tol: float = TOLERANCE
) -> None:
    """Detailed balance: pi_i P_ij = pi_j P_ji. Finds pairs of errors that cancel in pi P."""
    found = _transitions(kernel, space)
    flow = found.pi[:, None] * found.matrix
    gap = flow - flow.T
    i, j = np.unravel_index(int(np.abs(gap).argmax()), gap.shape)
    assert abs(gap[i, j]) <= tol, (
        f"the flow between {found.values[i]!r} and {found.values[j]!r} is unbalanced by {gap[i, j]:+.3g}"
    )


def assert_irreducible(kernel: Kernel[X] | Transitions[X], space: Sequence[X] | None = None) -> None:
    """Every supported value can be reached from every other. Finds values that a proposal forgets on both sides."""
    found = _transitions(kernel, space)
    n, label = connected_components(csr_matrix(found.matrix > 0), directed=True, connection="strong")
    assert n == 1, (
        f"the space falls into {n} classes; no way both to and from between {found.values[0]!r} "
        f"and {found.values[int(np.flatnonzero(label != label[0])[0])]!r}"
    )


def assert_carries_state(
    kernel: Kernel[X] | Transitions[X], space: Sequence[X] | None = None, *, tol: float = TOLERANCE
) -> None:
    """P_2 = P P where P_2 takes two steps with the state carried over.

    Finds what goes stale in a state (a cached density, a cache of the rejected proposal), which one step from a fresh
    state never shows.
    """
    found = _transitions(kernel, space)
    gap = two_step_matrix(found) - found.matrix @ found.matrix
    i, j = np.unravel_index(int(np.abs(gap).argmax()), gap.shape)
    assert abs(gap[i, j]) <= tol, (
        f"two steps from {found.values[i]!r} to {found.values[j]!r} with the state carried over differ from P P "
        f"by {gap[i, j]:+.3g}: a state keeps something that its value does not determine"
    )


def assert_same_kernel(
    fast: Kernel[X] | Transitions[X],
    plain: Kernel[X] | Transitions[X],
    space: Sequence[X] | None = None,
    *,
    tol: float = TOLERANCE,
) -> None:
    """P_fast = P_plain entry by entry, for a speed-up that claims to change no law."""
    one, other = _transitions(fast, space), _transitions(plain, space)
    assert one.values == other.values, "the two kernels support different values of the space"
    gap = one.matrix - other.matrix
    i, j = np.unravel_index(int(np.abs(gap).argmax()), gap.shape)
    assert abs(gap[i, j]) <= tol, f"P differs by {gap[i, j]:+.3g} from {one.values[i]!r} to {one.values[j]!r}"


def prove(
    kernel: Kernel[X],
    space: Sequence[X],
    *,
    law: Sequence[float] | np.ndarray | None = None,
    reversible: bool = True,
    irreducible: bool = True,
    carried: bool = True,
) -> Transitions[X]:
    """Enumerate `kernel` on `space` and assert all it should satisfy; return what was enumerated.

    Always: rows sum to 1 and pi P = pi. Unless switched off: irreducible, reversible, and P_2 = P P. With `law`, the
    probabilities you mean the kernel to have on `space` (normalised or not): that its target is that law.
    """
    found = enumerate_kernel(kernel, space)
    assert_stochastic(found)
    if law is not None:
        assert_law(found, space, law)
    assert_invariant(found)
    if irreducible:
        assert_irreducible(found)
    if reversible:
        assert_reversible(found)
    if carried:
        assert_carries_state(found)
    return found
