"""What a model was asked to compute, counted where it is computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass
class Ledger:
    """Counters of one model. `copy` and `since` give the cost of a part of a run.

    Attributes
    ----------
    decoded
        Tokens run through all layers one per row and pass.
    prefilled
        Tokens run through all layers many per row and pass (prompts, given paths).
    head
        Hidden states turned into logits.
    ticks
        Sequential decode passes: a pass of one row and a pass of sixty count the same.
    prefills
        Parallel passes.
    seconds
        Wall-clock seconds inside the model, drawing included.
    layers
        Depth of the model; not a counter.
    """

    decoded: int = 0
    prefilled: int = 0
    head: int = 0
    ticks: int = 0
    prefills: int = 0
    seconds: float = 0.0
    layers: int = 0

    def copy(self) -> Ledger:
        return replace(self)

    def since(self, earlier: Ledger) -> Ledger:
        """What was added to `earlier`, an older copy of this ledger."""
        spent = {f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        return Ledger(**{**spent, "layers": self.layers})

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with the tokens evaluated by range of layers."""
        counters = asdict(self)
        layers = counters.pop("layers")
        tokens = self.decoded + self.prefilled
        return {"tokens_by_depth": {f"0-{layers}": tokens}, "sequential_steps": self.ticks, **counters}
