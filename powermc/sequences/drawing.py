"""Drawing tokens one after the other beyond a prefix, for every proposal that does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from powermc.sequences.model import Autoregressive, Exponent, Token, Without
from powermc.sequences.path import Path, Tokens, agreement
from powermc.types import Choices, Field, Fields, Info, Steps

DRAWN: Fields = {
    "cut": Field("int32", -1),
    "proposal_length": Field("int32", 0),
    "tokens": Field("int32", 0),
    "near_ties": Field("int32", 0),
    "proposed": Field("object", None),
}
"""What a proposal of tokens tells: where it cut, how many tokens it drew, how many it ran through the model (fewer
where some were known), how many draws rounding could have changed, and the tokens drawn (`Tokens`, without scores)."""


@dataclass(frozen=True, eq=False)
class Block:
    """Tokens drawn beyond the first `cut` of a path, and what the model computed on the way.

    `tokens` are all tokens, the kept ones included; `finished` if the last one drawn ended the path. `scores` has shape
    (tokens drawn, 4): log p, entropy, margin, and log Z of the law `exponent` they were drawn from. `abandoned`: the
    one who asked for them wanted no more, and there is no `cache`.
    """

    model: Autoregressive
    exponent: Exponent
    cut: int
    tokens: Tokens
    finished: bool
    scores: np.ndarray
    cache: Any
    ran: int
    near_ties: int
    abandoned: bool = False

    def onto(self, path: Path, tokens: Tokens, finished: bool) -> Path:
        """The path `tokens`, which begins with `self.tokens`: scored by the model as far as those go.

        `path` is the one that was drawn from, scored up to the cut. What other models found of it is kept as far as
        the two agree, which is to the cut at least.
        """
        assert path.log_p is not None, "a draft continues a scored path"
        heads = (path.log_p, path.entropy, path.margin, path.log_z[self.exponent])
        log_p, entropy, margin, log_z = (
            np.concatenate((head[: self.cut], column)) for head, column in zip(heads, self.scores.T, strict=True)
        )
        new = path.continued(agreement(path.tokens, tokens), tokens, finished)
        return new.with_scores(self.model, log_p, entropy, margin, {self.exponent: log_z}, self.cache)

    def info(self) -> Info:
        """`DRAWN` but the cut."""
        drawn = self.tokens[self.cut :]
        return {"proposal_length": len(drawn), "tokens": self.ran, "near_ties": self.near_ties, "proposed": drawn}


def draw(
    model: Autoregressive,
    path: Path,
    cut: int,
    stop: int,
    exponent: Exponent,
    choices: Choices,
    ends: Callable[[Tokens], bool] | None = None,
    hopeless: Callable[[Token], bool] | None = None,
) -> Steps[Block]:
    """Draw tokens after `path.tokens[:cut]` from the law of `exponent`, up to `stop` tokens in all.

    Ends earlier where `ends` holds of the tokens so far, and where the law has no token left (fewer tokens then come
    back). `path` must be scored up to the cut, log Z of this law included. `hopeless` is shown each token after which
    there is another to draw, and abandons the rest.
    """
    assert path.log_p is not None, "a draft continues a scored path"
    tokens = path.tokens[:cut]
    drawn: list[tuple[float, float, float, float]] = []
    ran = near_ties = 0
    finished = abandoned = False
    row = model.branch(path, cut)
    try:
        while not finished and not abandoned and len(tokens) < stop:
            token = yield row.extend((exponent,), choices.at("token", len(tokens)))
            if token.token < 0:
                break
            tokens += (token.token,)
            drawn.append((token.log_p, token.entropy, token.margin, token.log_z[0]))
            ran += token.tokens_run
            near_ties += token.slack < model.resolution
            finished = ends is not None and ends(tokens)
            if hopeless is not None and not finished and len(tokens) < stop:
                abandoned = hopeless(token)
        cache = None if abandoned else row.cache()
    finally:
        row.release()
    scores = np.array(drawn, dtype=np.float64).reshape(-1, 4)
    return Block(model, exponent, cut, tokens, finished, scores, cache, ran, near_ties, abandoned)


def log_q(path: Path, law: Exponent, start: int, stop: int) -> float:
    """log of the probability, in nats, that the tokens [start, stop) of a scored path are drawn from `law` in turn.

    NaN where the law has no token at all.
    """
    assert path.log_p is not None
    exponent = law.exponent if isinstance(law, Without) else law
    log_z = float(path.log_z[law][start:stop].sum())
    return exponent * float(path.log_p[start:stop].sum()) - log_z if log_z > -math.inf else math.nan
