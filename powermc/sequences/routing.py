"""A choice by the cut: another model, surrogate or exit layer for each place where a path is cut.

A fixed function of the cut position and the tokens before it may choose anything, for both directions of a move share
it (design section 3). It may look at nothing else: not at the tail, and not at what the chain did before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from powermc.errors import ArgumentError
from powermc.sequences.model import Autoregressive
from powermc.sequences.path import Cut

T = TypeVar("T")


@dataclass(frozen=True)
class ByCut(Generic[T]):
    """One of `options`, chosen by a rule that sees the cut only: `options[rule(cut)]`.

    As the model of `Suffix` or `Substitution`, and of `UncertainTail`, the options are models: the exit layer is a
    fixed function of the cut. As a stage of `DelayedAcceptance` they are targets. A cut law with weights of its own
    (`Entropy`) takes them from the *first* option, whatever the rule says, as the cut is drawn before the rule applies.

    `rule` must be a pure function. Raises `ArgumentError` where it returns no index from 0 to len(options) - 1.
    """

    options: Sequence[T]
    rule: Callable[[Cut], int]

    def __post_init__(self) -> None:
        if not self.options:
            raise ArgumentError("ByCut needs at least one option, got none")

    def given(self, cut: Any, /) -> T:
        """The option for a cut."""
        chosen = self.rule(checked_cut(cut))
        try:
            index = operator.index(chosen)
        except TypeError:
            index = -1
        if not 0 <= index < len(self.options):
            raise ArgumentError(
                f"the rule of ByCut returned {chosen!r} for a cut at {cut.position}; "
                f"return an index from 0 to {len(self.options) - 1}"
            )
        return self.options[index]


Models: TypeAlias = "Autoregressive | ByCut[Autoregressive]"
"""One model, or one of several by the cut."""


def checked_cut(auxiliary: Any) -> Cut:
    """The auxiliary of a move on paths. Raises `ArgumentError` if the proposal gave no cut."""
    if not isinstance(auxiliary, Cut):
        raise ArgumentError(
            f"the proposal gave {auxiliary!r} where a cut is needed; use Suffix, Substitution, or a proposal "
            "whose moves have auxiliary=Cut(position, prefix)"
        )
    return auxiliary


def model_at(model: Models, cut: Cut) -> Autoregressive:
    """The model for a cut."""
    return model.given(cut) if isinstance(model, ByCut) else model


def first_model(model: Models) -> Autoregressive:
    """The model that weighs cuts."""
    return model.options[0] if isinstance(model, ByCut) else model
