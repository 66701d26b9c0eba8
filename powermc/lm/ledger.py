"""What a model was asked to compute, counted where it is computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Ledger:
    """Counters of one model. `copy` and `since` give the cost of a part of a run.

    Attributes
    ----------
    spans
        (first, last) to tokens run through layers first..last-1, one per row and pass or many.
    heads
        Depth to states there turned into logits: the model's own head at its full depth, exit heads below.
    decoded
        Tokens run in decode passes, whatever the span: one per row, or a few where they were guessed.
    prefilled
        Tokens run many per row and pass (prompts, given paths, tails completed), whatever the span.
    ticks
        Sequential decode passes: a pass of one row and a pass of sixty count the same.
    prefills
        Parallel passes.
    span_flops, head_flops
        Floating-point operations of these, by `powermc.lm.cost`; padding is not counted.
    seconds
        Wall-clock seconds inside the model, drawing included.
    layers
        Depth of the model; not a counter.
    """

    spans: Counter[tuple[int, int]] = field(default_factory=Counter)
    heads: Counter[int] = field(default_factory=Counter)
    decoded: int = 0
    prefilled: int = 0
    ticks: int = 0
    prefills: int = 0
    span_flops: Counter[tuple[int, int]] = field(default_factory=Counter)
    head_flops: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    layers: int = 0

    def ran(self, span: tuple[int, int], tokens: int, *, parallel: bool, flops: float = 0.0) -> None:
        """Count one pass."""
        self.spans[span] += tokens
        self.span_flops[span] += flops  # type: ignore[assignment]  # a counter of floats
        if parallel:
            self.prefilled += tokens
            self.prefills += 1
        else:
            self.decoded += tokens
            self.ticks += 1

    def read(self, depth: int, states: int, flops: float = 0.0) -> None:
        """Count states turned into logits."""
        self.heads[depth] += states
        self.head_flops[depth] += flops  # type: ignore[assignment]

    @property
    def flops(self) -> float:
        """Floating-point operations of layers and heads together."""
        return float(self.span_flops.total() + self.head_flops.total())

    def copy(self) -> Ledger:
        return self.since(Ledger())

    def since(self, earlier: Ledger) -> Ledger:
        """What was added to `earlier`, an older copy of this ledger."""
        spent = {f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        return Ledger(**{**spent, "layers": self.layers})

    def tokens(self, first: int, last: int) -> int:
        """Tokens that passed layer `last - 1` in a span that began at layer `first`."""
        return self.spans[first, last]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the tokens evaluated by range of layers and the heads by depth."""
        return {
            "tokens_by_depth": {f"{a}-{b}": n for (a, b), n in sorted(self.spans.items())},
            "heads_by_depth": {str(depth): n for depth, n in sorted(self.heads.items())},
            "decoded": self.decoded,
            "prefilled": self.prefilled,
            "sequential_steps": self.ticks,
            "prefills": self.prefills,
            "flops": self.flops,
            "seconds": self.seconds,
        }
