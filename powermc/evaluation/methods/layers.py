"""DoLa: decoding by contrasting layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from powermc.errors import ArgumentError
from powermc.evaluation.methods.base import Answer, Answers, Method, Question, Terms, register
from powermc.evaluation.methods.call import ByRule, Call, Key
from powermc.evaluation.methods.checks import check_share
from powermc.evaluation.methods.plain import likeliest
from powermc.sequences.path import Tokens
from powermc.types import Steps

HALVES = ("low", "high")


@register
@dataclass(frozen=True)
class DoLa(Method):
    """Every token from the last layer's distribution over that of the earlier layer farthest from it.

    The likeliest token under that contrast is taken, among those whose probability at the last layer is at least
    `plausible` times the highest (see `powermc.lm.contrast` for the formulas).

    layers: "low" or "high", the even layers of the lower or upper half (at most the 20 lowest or highest), as
    published, but for the embedding itself; or depths joined by "+", such as 12+16. plausible: above 0, at most 1.
    norm: whether states of earlier layers pass the model's final norm; as published they do not. The repetition
    penalty of the published code is not applied.
    """

    name: ClassVar[str] = "dola"
    about: ClassVar[str] = "last layer against an earlier one (DoLa, Chuang et al. 2024, arXiv:2309.03883)"
    deterministic: ClassVar[bool] = True

    layers: str = "low"
    plausible: float = 0.1
    norm: bool = False

    def __post_init__(self) -> None:
        check_share(self, "plausible")
        if self.layers not in HALVES and not all(part.isdecimal() for part in self.layers.split("+")):
            raise ArgumentError(
                f"{self.name}:layers must be {', '.join(HALVES)} or depths joined by +, such as 12+16, "
                f"got {self.layers!r}"
            )

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        from powermc.lm.contrast import LayerContrast

        oracle = LayerContrast(model, self.depths(model.decoder.layers), self.plausible, self.norm)
        with model.engine.keeping(oracle.layers):
            call = Call(model, questions, terms, samples)
            found = call.run(lambda key: self._written(call, oracle, key), once=True)
        return call.answers(
            found,
            lambda _, answers: answers[0],
            {"drawn": sum(len(answer.tokens) for answer in found.values())},
        )

    def depths(self, layers: int) -> list[int]:
        """The earlier layers of a model of so many. Raises `ArgumentError` if there are none."""
        if self.layers not in HALVES:
            return [int(part) for part in self.layers.split("+")]
        middle = layers // 2
        low, high = ((2, middle), (middle, layers)) if layers <= 40 else ((2, 20), (layers - 20, layers))
        found = [depth for depth in range(*(low if self.layers == "low" else high)) if depth % 2 == 0]
        if not found:
            raise ArgumentError(f"{self.name}:layers={self.layers} holds no layer of {layers}; name some: layers=1+2")
        return found

    def _written(self, call: Call, oracle: Any, key: Key) -> Steps[Answer]:
        choices = ByRule(likeliest, call.stream(self.name, key))
        start = yield from call.empty(key)
        row, tokens, log_p = oracle.branch(start, 0), (), 0.0
        try:
            while len(tokens) < call.space.horizon and not (tokens and call.space.ends(tokens)):
                drawn = yield row.extend((1.0,), choices.at("token", len(tokens)))
                tokens: Tokens = (*tokens, drawn.token)
                log_p += float(row.last[drawn.token])
        finally:
            row.release()
        return Answer(tokens, call.text(tokens), log_p)
