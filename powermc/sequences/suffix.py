"""The suffix proposal: cut the path, redraw everything after the cut from the model at its own temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

from powermc.bounds import Bound, Floor, bound_of, claims
from powermc.errors import ArgumentError
from powermc.sequences.ceiling import Ceiling
from powermc.sequences.cuts import CutLaw, log_prob
from powermc.sequences.drawing import DRAWN, draw, log_q
from powermc.sequences.model import Autoregressive, scored
from powermc.sequences.path import Cut, Path, Space
from powermc.sequences.routing import Models, first_model, model_at
from powermc.types import Choices, Fields, Move, Steps, evaluate

_ULPS = 1 + 1e-15
"""1 / (1 / alpha), the exponent at the default temperature, may be over alpha by a unit in the last place."""


def default_temperature(alpha: float) -> float:
    """min(1, 1/alpha): a proposal at least as wide as the target's own conditionals are sharp."""
    return 1.0 / alpha if alpha > 1 else 1.0


def check_temperature(temperature: float) -> None:
    """Raise `ArgumentError` unless the temperature is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ArgumentError(f"temperature must be a finite number > 0, got {temperature}")


def draft(
    model: Autoregressive, space: Space, path: Path, cut: int, temperature: float, choices: Choices
) -> Steps[tuple[Path, int, int]]:
    """Continue `path.tokens[:cut]` with tokens drawn from q until the path ends.

    q(. | h) = p(. | h)^(1/temperature) / Z(h). `path` must be scored, log Z at this temperature included, up to the
    cut. Returns the new path (fully scored), the number of tokens run through the model, and the number of draws
    that rounding could have changed.
    """
    block = yield from draw(model, path, cut, space.horizon, 1.0 / temperature, choices, space.ends)
    return block.onto(path, block.tokens, block.finished), block.ran, block.near_ties


@dataclass(frozen=True)
class Suffix:
    """Draw a cut m from C(m | x), keep x_<m, draw the rest from q at `temperature`.

    log q(x | x') - log q(x' | x) = sum_{t>=m} log q(x_t | x_<t) - sum_{t>=m} log q(x'_t | x'_<t)
    + log C(m | x') - log C(m | x), with log q_t = log p_t / temperature - log Z_t over *whole* tails. The temperature
    is independent of the target's alpha.

    `model` may be a `ByCut` of several: q is then that of the model chosen by (m, x_<m), the same in both directions;
    a cut law that needs scores takes those of the first option, for both paths.

    A cut at or past the end of x, and a current tail that q could not have drawn, are null moves.

    Above a `Floor` a draft is abandoned once its tokens so far bound log r too low (`powermc.sequences.ceiling`). That
    takes a target bounded by p^a of the very model that draws, with 1 <= 1/temperature <= a. All else is drafted to its
    end; so is what a subclass drafts that has a ratio of its own.

    Info: `cut`; `proposal_length` (tokens drawn); `tokens` (tokens run through the model); `near_ties` (draws that
    rounding could have changed); `proposed` (the tokens drawn: of an abandoned draft, those drawn by then).
    """

    model: Models
    space: Space
    cuts: CutLaw
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @property
    def fields(self) -> Fields:
        return DRAWN

    def propose(self, choices: Choices, value: Path) -> Steps[Move[Path]]:
        return self._propose(choices, value, None)

    def propose_above(self, choices: Choices, value: Path, floor: Floor[Path]) -> Steps[Move[Path]]:
        known = claims(self, "propose_above", "log_hastings", "log_q", "log_cut")
        return self._propose(choices, value, floor if known else None)

    def _propose(self, choices: Choices, value: Path, floor: Floor[Path] | None) -> Steps[Move[Path]]:
        exponent, x = 1.0 / self.temperature, value
        if self.cuts.needs_scores:
            x = yield from scored(first_model(self.model), x, (exponent,))
        weights = self.cuts.log_weights(x)
        if not len(weights):
            return Move(x, x, null=True)
        m = self.cuts.start + choices.at("cut").categorical(weights)
        if m >= len(x):
            return Move(x, x, null=True, info={"cut": m})
        cut = Cut(m, x.tokens[:m])
        model = model_at(self.model, cut)
        x = yield from scored(model, x, (exponent,))
        if not self.log_q(x, m) > -math.inf:
            return Move(x, x, null=True, info={"cut": m})
        ceiling = None
        if floor is not None:
            x, ceiling = yield from self._ceiling(floor, model, x, cut)
        hopeless = None if ceiling is None else ceiling.rejects
        block = yield from draw(model, x, m, self.space.horizon, exponent, choices, self.space.ends, hopeless)
        info = {"cut": m, **block.info()}
        if ceiling is not None and block.abandoned:
            return Move(x, x, info=info, auxiliary=cut, bound=ceiling.bound)
        y = block.onto(x, block.tokens, block.finished)
        if self.cuts.needs_scores:  # by the first model, and back to the front with those of q
            y = yield from scored(first_model(self.model), y, (exponent,))
            y = yield from scored(model, y, (exponent,))
        return Move(y, x, self.log_hastings(x, y, m), info=info, auxiliary=cut)

    def _ceiling(
        self, floor: Floor[Path], model: Autoregressive, x: Path, cut: Cut
    ) -> Steps[tuple[Path, Ceiling | None]]:
        """What bounds a draft by `model` from x, and x with what it took to say so; None: nothing does."""
        exponent, m, target = 1.0 / self.temperature, cut.position, floor.target(cut)
        bound = bound_of(target, model)
        if bound is None or not self._falls(bound):
            return x, None
        here = floor.log_density
        if here is None:
            x, here = yield from evaluate(target, x)
            x = yield from scored(model, x, (exponent,))
        assert x.log_p is not None
        prefix = bound.exponent * float(x.log_p[:m].sum())
        terms = (prefix, bound.rest, -here, self.log_q(x, m), -self.log_cut(x, m))
        if not all(map(math.isfinite, terms)):
            return x, None
        entropy = x.entropy[:m].tolist() if self.cuts.needs_scores and first_model(self.model) is model else None
        return x, Ceiling(floor.level, terms, bound.exponent - exponent, self.cuts, m, entropy)

    def _falls(self, bound: Bound) -> bool:
        """Whether no token can raise a draft's log ratio: log Z <= 0 as e >= 1, and (a - e) log p <= 0 as e <= a."""
        return 1 <= 1.0 / self.temperature <= bound.exponent * _ULPS

    def log_hastings(self, x: Path, y: Path, m: int) -> float:
        """log q(x | y) - log q(y | x), in nats, for a move from x to y cut at m; both with the scores of q in front."""
        return self.log_q(x, m) - self.log_q(y, m) + self.log_cut(y, m) - self.log_cut(x, m)

    def log_q(self, path: Path, m: int) -> float:
        """log q of the tail of `path` from position m on, given what comes before."""
        return log_q(path, 1.0 / self.temperature, m, len(path))

    def log_cut(self, path: Path, m: int) -> float:
        """log C(m | path)."""
        weighed = path.view(first_model(self.model)) if self.cuts.needs_scores else path
        assert weighed is not None, "the cut law needs the scores of the first model"
        return log_prob(self.cuts, m, weighed)
