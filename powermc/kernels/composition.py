"""Kernels made of kernels that share one target: a random one per step, or one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from powermc.errors import ArgumentError
from powermc.types import Choices, Field, Fields, Info, Kernel, State, Steps, X


@dataclass(frozen=True)
class Mixture(Generic[X]):
    """Apply one kernel, drawn with fixed probabilities that do not depend on the state.

    P = sum_i w_i P_i leaves invariant what all P_i do, and is reversible if they are. The kernels must have the same
    target. Info: that of the kernel drawn, and `component`, its index. Weights are normalised; `ArgumentError` if one
    is negative or none is positive.
    """

    kernels: Sequence[Kernel[X]]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.kernels or len(self.kernels) != len(self.weights):
            raise ArgumentError(f"Mixture needs one weight per kernel, got {len(self.kernels)} and {len(self.weights)}")
        if not all(math.isfinite(w) and w >= 0 for w in self.weights) or not any(self.weights):
            raise ArgumentError(f"mixture weights must be >= 0, finite and not all 0, got {list(self.weights)}")

    @property
    def fields(self) -> Fields:
        merged: dict[str, Field] = {"component": Field("int32", -1)}
        for kernel in self.kernels:
            merged.update(kernel.fields)
        return merged

    def init(self, value: X) -> Steps[State[X]]:
        return self.kernels[0].init(value)

    def step(self, choices: Choices, state: State[X]) -> Steps[tuple[State[X], Info]]:
        with np.errstate(divide="ignore"):
            log_weights = np.log(np.asarray(self.weights, dtype=np.float64))
        component = choices.at("component").categorical(log_weights)
        state, info = yield from self.kernels[component].step(choices.at("mixture"), state)
        return state, {**info, "component": component}


@dataclass(frozen=True)
class Cycle(Generic[X]):
    """Apply each kernel in turn: P = P_1 P_2 ... P_n, which leaves invariant what all P_i do.

    A cycle of reversible kernels is in general not reversible. Info: that of kernel i under the suffix `_i`, and
    `accepted` and `changed`, true if they are for any of them.
    """

    kernels: Sequence[Kernel[X]]

    def __post_init__(self) -> None:
        if not self.kernels:
            raise ArgumentError("Cycle needs at least one kernel, got none")

    @property
    def fields(self) -> Fields:
        own = {"accepted": Field("bool", False), "changed": Field("bool", False)}
        parts = {f"{name}_{i}": f for i, kernel in enumerate(self.kernels) for name, f in kernel.fields.items()}
        return {**own, **parts}

    def init(self, value: X) -> Steps[State[X]]:
        return self.kernels[0].init(value)

    def step(self, choices: Choices, state: State[X]) -> Steps[tuple[State[X], Info]]:
        merged: Info = {"accepted": False, "changed": False}
        for i, kernel in enumerate(self.kernels):
            state, info = yield from kernel.step(choices.at("cycle", i), state)
            merged["accepted"] |= bool(info.get("accepted", False))
            merged["changed"] |= bool(info.get("changed", False))
            merged.update({f"{name}_{i}": value for name, value in info.items()})
        return state, merged
