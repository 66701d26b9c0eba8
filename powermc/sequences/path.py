"""Paths, and the finite set of them a sampler moves on.

A path is the token ids after the prompt, the end token included. It ends at its first end-of-sequence id (or where a
stop rule first holds) or at the horizon. The prompt is never part of a path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from powermc.errors import ArgumentError

Tokens = tuple[int, ...]
StopRule = Callable[[Tokens], bool]
"""A predicate of a prefix (all tokens so far); a path ends at the first prefix for which it is true."""

_EMPTY = np.zeros(0)
_EMPTY.flags.writeable = False


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two paths have in common before they part."""
    if a == b:
        return len(a)
    return next((t for t, (u, v) in enumerate(zip(a, b, strict=False)) if u != v), min(len(a), len(b)))


class Cache(Protocol):
    """A model's handle on the activations of prompt and path, position by position; immutable."""

    def upto(self, length: int) -> Cache:
        """The same for the first `length` positions, the prompt's included."""
        ...


class Cut(NamedTuple):
    """What a move on paths and its reverse share: the position cut at, and the tokens before it."""

    position: int
    prefix: Tokens


@dataclass(frozen=True)
class Prompt:
    """What every path of a chain follows. `key` names its random streams; `text` is for people."""

    ids: Tokens = ()
    text: str = ""
    key: int = 0


@dataclass(frozen=True)
class Space:
    """The set X of all paths: absorbing end ids, an optional absorbing stop rule, and a horizon in tokens.

    The length of a path counts its end token. "End token at the horizon" and "no end token by the horizon" are
    different paths. Raises `ArgumentError` for a horizon below 1.
    """

    eos: frozenset[int]
    horizon: int
    stop: StopRule | None = None

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ArgumentError(f"the horizon must be at least 1 token, got {self.horizon}")

    def ends(self, tokens: Tokens) -> bool:
        """Whether a path whose proper prefixes do not end, ends with its last token."""
        return tokens[-1] in self.eos or (self.stop is not None and self.stop(tokens))

    def contains(self, tokens: Tokens) -> bool:
        """Whether `tokens` is a whole path of this space: it ends exactly where it stops, or fills the horizon."""
        if not 1 <= len(tokens) <= self.horizon:
            return False
        if any(self.ends(tokens[:t]) for t in range(1, len(tokens))):
            return False
        return len(tokens) == self.horizon or self.ends(tokens)

    def path(self, prompt: Prompt, tokens: Sequence[int]) -> Path:
        """The path of these tokens, nothing of it evaluated yet. Raises `ArgumentError` if it is none of the space."""
        tokens = tuple(int(t) for t in tokens)
        if not self.contains(tokens):
            raise ArgumentError(
                f"tokens {tokens} are not a path: it must end at its first end token or at {self.horizon}"
            )
        return Path(prompt, tokens, self.ends(tokens))


@dataclass(frozen=True, eq=False, repr=False)
class Path:
    """Token ids and what has been evaluated of them. Immutable; equal if prompt and tokens are.

    Attributes
    ----------
    tokens
        L ids, the end token included.
    finished
        True if the path ended by an end token or a stop rule, False if it was cut by the horizon.
    log_p
        Shape (L,), nats: log p(x_t | prompt, x_<t) for the model's raw softmax. None: not evaluated. Shorter where
        only the first positions have been evaluated, those shared with an earlier path.
    entropy
        Shape of log_p, nats: entropy of p(. | prompt, x_<t).
    margin
        Shape of log_p: probability of the likeliest next token less that of the second, under p(. | prompt, x_<t).
    log_z
        For each exponent e evaluated: shape (L,) or shorter, nats, log sum_v p(v | prompt, x_<t)^e, the log normaliser
        of the proposal at temperature 1/e. A key may also be a `powermc.sequences.Without`.
    cache
        The model's own handle on activations of this path; immutable, shared between paths with a common prefix.
    by
        The model that all of these come from.
    others
        The same path as other models scored it; see `view`.
    """

    prompt: Prompt
    tokens: Tokens
    finished: bool
    log_p: np.ndarray | None = None
    entropy: np.ndarray = field(default_factory=lambda: _EMPTY)
    margin: np.ndarray = field(default_factory=lambda: _EMPTY)
    log_z: Mapping[Any, np.ndarray] = field(default_factory=lambda: MappingProxyType({}))
    cache: Any = None
    by: Any = None
    others: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Path):
            return NotImplemented
        return self.tokens == other.tokens and self.prompt.ids == other.prompt.ids

    def __hash__(self) -> int:
        return hash(self.tokens)

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.tokens[:12])) + (", ..." if len(self.tokens) > 12 else "")
        return f"Path([{shown}], {'finished' if self.finished else 'unfinished'}, length {len(self)})"

    @cached_property
    def log_prob(self) -> float:
        """log p(path | prompt) in nats, summed in float64."""
        if self.log_p is None or len(self.log_p) < len(self):
            raise ArgumentError(f"{self!r} has not been scored by a model yet")
        return float(self.log_p.sum())

    def view(self, model: Any) -> Path | None:
        """This path with the scores of `model` in front, or None if that very model has not scored any of it."""
        if self.by is model:
            return self
        for other in self.others:
            if other.by is model:
                rest = (o for o in self.others if o is not other)
                mine = () if self.log_p is None else (replace(self, others=()),)
                return replace(other, tokens=self.tokens, finished=self.finished, others=(*rest, *mine))
        return None

    def scored(self, model: Any, exponents: Sequence[Any] = ()) -> bool:
        """Whether `model` has found log p and the log normalisers of these exponents, for the whole path."""
        path, n = self.view(model), len(self)
        if path is None or path.log_p is None or len(path.log_p) < n:
            return False
        return all(len(path.log_z.get(e, _EMPTY)) == n for e in exponents)

    def evaluated(self, exponents: Sequence[Any] = ()) -> int:
        """For how many positions, from the first on, log p and the log normalisers of these exponents are there."""
        if self.log_p is None:
            return 0
        return min([len(self.log_p), *(len(self.log_z.get(e, _EMPTY)) for e in exponents)])

    def with_scores(
        self,
        model: Any,
        log_p: np.ndarray,
        entropy: np.ndarray,
        margin: np.ndarray,
        log_z: Mapping[Any, np.ndarray],
        cache: Any,
    ) -> Path:
        """This path evaluated by `model`. Normalisers that it has found before, and other models' scores, are kept."""
        known = self.view(model)
        others = self.others if known is None else known.others
        if known is None and self.log_p is not None:
            others = (*others, replace(self, others=()))
        merged = MappingProxyType({**(known.log_z if known else {}), **log_z})
        return Path(
            self.prompt, self.tokens, self.finished, log_p, entropy, margin, merged, cache, by=model, others=others
        )

    def continued(self, cut: int, tokens: Tokens, finished: bool) -> Path:
        """The path `tokens`, which shares its first `cut` tokens with this one: what any model found of those is kept.

        So a model that scores the new path starts at the cut.
        """

        def kept(view: Path) -> Path:
            cache = None if view.cache is None else view.cache.upto(len(self.prompt.ids) + cut)
            log_z = MappingProxyType({e: z[:cut] for e, z in view.log_z.items()})
            log_p = None if view.log_p is None else view.log_p[:cut]
            scores = (log_p, view.entropy[:cut], view.margin[:cut], log_z, cache)
            return Path(self.prompt, tokens, finished, *scores, by=view.by)

        return replace(kept(self), others=tuple(map(kept, self.others)))

    def detached(self) -> Path:
        """This path without any model's activations: what a result keeps."""
        return replace(self, cache=None, others=tuple(replace(o, cache=None) for o in self.others))
