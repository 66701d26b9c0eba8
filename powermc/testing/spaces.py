"""Whole spaces of paths, listed: what a kernel on sequences is proved on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from powermc.sequences.path import Path, Prompt, Space, Tokens


@dataclass(frozen=True)
class EndsWith:
    """A stop rule that holds where a prefix ends with `tokens`: the token form of a stop string."""

    tokens: Tokens

    def __call__(self, prefix: Tokens) -> bool:
        return prefix[-len(self.tokens) :] == self.tokens


def _walk(space: Space, vocab_size: int) -> Iterator[tuple[Tokens, bool]]:
    """(tokens, whether they are a whole path) for every prefix of the space but the empty one, depth first."""
    waiting: list[Tokens] = [(v,) for v in reversed(range(vocab_size))]
    while waiting:
        tokens = waiting.pop()
        whole = len(tokens) == space.horizon or space.ends(tokens)
        yield tokens, whole
        if not whole:
            waiting.extend((*tokens, v) for v in reversed(range(vocab_size)))


def paths_of(space: Space, vocab_size: int, prompt: Prompt = Prompt()) -> list[Path]:
    """Every path of `space`, stop rule included, in lexicographic order; none of them scored.

    All of them, whatever a model thinks of them: where its probability is zero, `enumerate_kernel` leaves them out.

    >>> [path.tokens for path in paths_of(Space(frozenset({1}), 2), 2)]
    [(0, 0), (0, 1), (1,)]
    """
    return [space.path(prompt, tokens) for tokens, whole in _walk(space, vocab_size) if whole]


def prefixes_of(space: Space, vocab_size: int) -> list[Tokens]:
    """Every prefix that a path of `space` goes through and does not end at, the empty one first."""
    return [(), *(tokens for tokens, whole in _walk(space, vocab_size) if not whole)]
