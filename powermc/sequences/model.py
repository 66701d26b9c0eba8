"""The one protocol every sequence move is written against: an autoregressive model.

It does not know alpha, horizons, end tokens or kernels; it knows next-token distributions. A tabular toy model and a
batch-decoding transformer look the same from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from powermc.bounds import Bound
from powermc.errors import ArgumentError
from powermc.sequences.path import Path
from powermc.types import Choices, Oracle, Request, Steps


class Without(NamedTuple):
    """The law q proportional to p^exponent on all tokens but these: its log normaliser sums over the others only."""

    exponent: float
    tokens: frozenset[int]


Exponent: TypeAlias = "float | Without"
"""What a next-token law is drawn from and normalised by: p^e, or p^e without some tokens."""


class Token(NamedTuple):
    """One token drawn from q(. | prefix) proportional to p(. | prefix)^e, and what the same pass computed.

    `log_z` holds log sum_v p(v)^e for each exponent asked for, the drawn one first (nats). `slack` is the distance
    in probability of the uniform used to the nearest boundary of the inverse CDF: where it is below the model's
    `resolution`, rounding could have drawn another token. `tokens_run` counts tokens sent through the layers for it.
    Where q has no token at all (p gives all its mass to those a `Without` leaves out), `token` is -1 and nothing is
    appended to the row.
    """

    token: int
    log_p: float
    entropy: float
    margin: float
    log_z: tuple[float, ...]
    slack: float
    tokens_run: int


class Row(Protocol):
    """A path being written, one token at a time, beyond a prefix of an existing one."""

    @property
    def model(self) -> Autoregressive: ...

    def extend(self, exponents: tuple[Exponent, ...], choices: Choices) -> Request:
        """Ask for the next `Token`, drawn at the first exponent; it becomes part of the row's prefix."""
        ...

    def cache(self) -> Any:
        """An immutable handle on the activations of everything written so far, for `Path.cache`."""
        ...

    def release(self) -> None:
        """Give the row's memory back. Safe to call twice."""
        ...


class Autoregressive(Oracle, Protocol):
    """A model of next-token distributions given a prompt and a prefix."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def resolution(self) -> float:
        """Probabilities closer than this may be ordered differently by another batch shape (0 if never)."""
        ...

    def branch(self, path: Path, cut: int) -> Row:
        """A row that continues `path.tokens[:cut]`. No work is done yet."""
        ...

    def score(self, path: Path, exponents: Sequence[Exponent]) -> Request:
        """Ask for `path` with log_p, entropy, margin, the log_z of these exponents and its cache, `by` this very model.

        What the model has found of its first positions is taken as it is. An empty path is legal: it gets the cache of
        its prompt.
        """
        ...


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True)
class Extend(Request, Generic[R]):
    """The request of `Row.extend`; answered by a `Token`, or a `ChainError`."""

    row: R
    exponents: tuple[Exponent, ...]
    choices: Choices

    @property
    def oracle(self) -> Oracle:
        return self.row.model


@dataclass(frozen=True, slots=True)
class Score(Request):
    """The request of `Autoregressive.score`; answered by the path scored, or a `ChainError`."""

    model: Autoregressive
    path: Path
    exponents: tuple[Exponent, ...]

    @property
    def oracle(self) -> Oracle:
        return self.model


def scored(
    model: Autoregressive, path: Path, exponents: Sequence[Exponent] = (), upto: int | None = None
) -> Steps[Path]:
    """`path` with the scores of `model` in front, on its first `upto` positions at least (None: on all).

    Asks the model only if something of that is missing.
    """
    known = path.view(model)
    if known is None or known.evaluated(exponents) < (len(path) if upto is None else upto):
        known = yield model.score(path, tuple(exponents))
    return known


@dataclass(frozen=True)
class SequenceProbability:
    """The target p(x) itself: log density = sum_t log p(x_t | prompt, x_<t). Wrap it in `Power` for p^alpha."""

    model: Autoregressive

    def log_density(self, value: Path) -> float:
        scored = value.view(self.model)
        if scored is None:
            raise ArgumentError(f"{value!r} has not been scored by this model yet; `evaluate` asks for that")
        return scored.log_prob

    def missing(self, value: Path) -> Request | None:
        return None if value.scored(self.model) else self.model.score(value, ())

    def bound(self, model: Any) -> Bound:
        """Itself beside log p of its own model, and at most 0 beside any other's."""
        return Bound(1.0 if model is self.model else 0.0, 0.0)
