"""One pass, token by token: greedy decoding, temperature, nucleus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from powermc.evaluation.methods.base import Answers, Method, Question, Terms, register
from powermc.evaluation.methods.call import Call, temperature_of
from powermc.evaluation.methods.checks import check_share, check_temperature
from powermc.types import Choices

TEMPERATURE = "temperature"
"""The purpose of draws from p^(1/temperature): whoever makes those of one sample with it draws the same."""


@register
@dataclass(frozen=True)
class Greedy(Method):
    """The likeliest token each time; of equal ones that with the lowest id."""

    name: ClassVar[str] = "greedy"
    about: ClassVar[str] = "the likeliest token each time"
    deterministic: ClassVar[bool] = True

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        call = Call(model, questions, terms, samples)
        return call.answers(call.draws(self.name, rule=likeliest, once=True), call.first)


@register
@dataclass(frozen=True)
class Temperature(Method):
    """Every token from p^(1/temperature), normalised.

    temperature: > 0; none for 1/alpha of the terms.
    """

    name: ClassVar[str] = "temperature"
    about: ClassVar[str] = "every token from p(token)^(1/temperature)"

    temperature: float | None = 1.0

    def __post_init__(self) -> None:
        check_temperature(self)

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        call = Call(model, questions, terms, samples)
        return call.answers(call.draws(TEMPERATURE, temperature=temperature_of(self.temperature, terms)), call.first)


@register
@dataclass(frozen=True)
class LowTemperature(Method):
    """`temperature` at 1/alpha: each token sharpened as much as power sampling sharpens the whole answer."""

    name: ClassVar[str] = "low-temperature"
    about: ClassVar[str] = "every token from p(token)^alpha: power sampling, token by token"

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        return Temperature(None).answer(model, questions, terms, samples)


@register
@dataclass(frozen=True)
class Nucleus(Method):
    """Every token from the smallest set of likeliest tokens that holds `top_p` of p^(1/temperature), renormalised.

    top_p: above 0, at most 1. temperature: > 0, applied first; none for 1/alpha of the terms. Of equal tokens those
    with the lowest ids are taken into the set.
    """

    name: ClassVar[str] = "nucleus"
    about: ClassVar[str] = "every token from the likeliest that hold top_p (Holtzman et al. 2020, arXiv:1904.09751)"

    top_p: float = 0.95
    temperature: float | None = 1.0

    def __post_init__(self) -> None:
        check_temperature(self)
        check_share(self, "top_p")

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        call = Call(model, questions, terms, samples)

        def rule(log_weights: np.ndarray, choices: Choices) -> int:
            return choices.categorical(nucleus(log_weights, self.top_p))

        return call.answers(
            call.draws(self.name, temperature=temperature_of(self.temperature, terms), rule=rule), call.first
        )


def likeliest(log_weights: np.ndarray, choices: Choices) -> int:
    """The rule of greedy decoding."""
    return int(log_weights.argmax())


def nucleus(log_weights: np.ndarray, top_p: float) -> np.ndarray:
    """`log_weights`, -inf outside the smallest set of likeliest tokens that holds `top_p` of the mass."""
    weights = np.exp(log_weights - log_weights.max())
    total = weights.sum()
    # Those under (1 - top_p) / V hold less than 1 - top_p together: the rest, which is short, holds the set.
    few = np.flatnonzero(weights >= total * (1 - top_p) / len(weights))
    order = few[np.argsort(-weights[few], kind="stable")]
    n = int(np.searchsorted(weights[order].cumsum(), top_p * total)) + 1
    kept = np.full(len(log_weights), -np.inf)
    kept[order[:n]] = log_weights[order[:n]]
    return kept
