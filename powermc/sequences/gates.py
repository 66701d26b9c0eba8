"""Gates: where a surrogate model is too unsure of a tail for its word to be taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from powermc.errors import ArgumentError
from powermc.sequences.model import scored
from powermc.sequences.path import Cut, Path
from powermc.sequences.routing import ByCut, Models, checked_cut, model_at
from powermc.types import Steps

Threshold: TypeAlias = "float | Callable[[Cut], float]"
"""A number, or a pure function of the cut: it is never shown the tail."""

AGGREGATES = ("max", "mean")


@dataclass(frozen=True)
class UncertainTail:
    """A tail [m, L) is uncertain if the entropy of `model` on it is strictly over `eta`, or its margin strictly under
    `delta`.

    Entropy (nats) is that of the next-token law p~(. | prompt, x_<t) at temperature 1, margin the gap between its two
    largest probabilities; of the tail's positions t = m, ..., L - 1 the least certain one counts (aggregate "max": the
    largest entropy, the smallest margin) or their mean ("mean"). Nothing before m enters, and no padding. Equality with
    a threshold is not uncertain. An empty tail is certain.

    A path that `model` has not scored to its end is completed by it. Where the model's numbers depend on the shape of a
    batch (float32, 1e-6), so does a tail within that of a threshold.

    Parameters
    ----------
    model
        The surrogate model, or a `ByCut` of several.
    eta, delta
        At least one. A number or a function of the `Cut` (position, prefix), values >= 0. A number must leave the gate
        something to do: eta below log(vocabulary size), which no entropy exceeds, 0 < delta <= 1.
    aggregate
        "max" or "mean".

    Raises `ArgumentError` for values out of range.
    """

    model: Models
    eta: Threshold | None = None
    delta: Threshold | None = None
    aggregate: str = "max"

    def __post_init__(self) -> None:
        if self.eta is None and self.delta is None:
            raise ArgumentError("the gate has neither eta nor delta; give at least one, or use no gate")
        if self.aggregate not in AGGREGATES:
            raise ArgumentError(f"unknown aggregate {self.aggregate!r}; choose one of {', '.join(AGGREGATES)}")
        if isinstance(self.eta, float | int):
            models = self.model.options if isinstance(self.model, ByCut) else [self.model]
            most = math.log(max(model.vocab_size for model in models))
            if _checked("eta", self.eta) >= most:
                raise ArgumentError(
                    f"eta {self.eta} can never be exceeded, so the gate can never open: "
                    f"the largest entropy is log(vocabulary size) = {most:.4g} nats"
                )
        if isinstance(self.delta, float | int):
            if _checked("delta", self.delta) == 0:
                raise ArgumentError("no margin is under delta 0, so the gate can never open; use 0 < delta <= 1")
            if self.delta > 1:
                raise ArgumentError(f"every margin is under delta {self.delta}, so the gate is always open; use <= 1")

    def uncertain(self, value: Path, auxiliary: Any) -> Steps[tuple[Path, bool]]:
        """`value` as `model` scored it, and whether its tail from the cut on is uncertain."""
        cut = checked_cut(auxiliary)
        path = yield from scored(model_at(self.model, cut), value)
        entropy, margin = path.entropy[cut.position :], path.margin[cut.position :]
        if not len(entropy):
            return path, False
        highest, lowest = (np.max, np.min) if self.aggregate == "max" else (np.mean, np.mean)
        over = self.eta is not None and highest(entropy) > _at("eta", self.eta, cut)
        under = self.delta is not None and lowest(margin) < _at("delta", self.delta, cut)
        return path, bool(over or under)


def _at(name: str, threshold: Threshold, cut: Cut) -> float:
    return _checked(name, threshold(cut)) if callable(threshold) else threshold


def _checked(name: str, value: float) -> float:
    if not value >= 0:
        raise ArgumentError(f"{name} must be a number >= 0, got {value}")
    return value
