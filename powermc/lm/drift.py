"""How far an exit is from the full model where a run goes: KL(p || p~), watched as tails are completed.

Only tails that pass the screen are completed, so the figure is that of survivors: biased towards what the exit finds
likely. It can show that a lens no longer fits the text at hand; it cannot show that it does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from powermc.lm.exits import EarlyExit
from powermc.lm.rows import Prefix

WINDOW = 512
"""Over how many of the latest positions the running mean is."""


class Drift:
    """Watches one exit. At each completion a few positions of the tail are read by both heads, and KL(p || p~) taken.

    Parameters
    ----------
    exit
        The exit to watch.
    window
        How many of the latest positions the running mean is over.
    positions
        How many positions of each completed tail are read, evenly spaced. Each costs two heads, counted in the ledger.
    """

    def __init__(self, exit: EarlyExit, *, window: int = WINDOW, positions: int = 2) -> None:
        self.exit, self.positions = exit, positions
        self.seen = 0
        self._recent: deque[float] = deque(maxlen=window)

    @property
    def kl(self) -> float:
        """Mean KL(p || p~) per token over the window, nats, temperature 1; NaN before the first completion."""
        return float(np.mean(self._recent)) if self._recent else math.nan

    @torch.no_grad()
    def completed(self, cache: Prefix, start: int, stop: int) -> None:
        """States start..stop-1 (positions, the prompt's included) have just come to the full depth."""
        evenly = np.linspace(start, stop - 1, min(self.positions, stop - start)).round().astype(int)
        # What had passed all layers before the exit was there has no state at it.
        at = np.array([t for t in np.unique(evenly) if cache.has(self.exit.depth, t)], dtype=int)
        if not len(at):
            return
        nothing = np.full(len(at), -1)

        def log_softmax(model: EarlyExit | object, depth: int) -> torch.Tensor:
            states = torch.cat([cache.hidden(depth, int(t), int(t) + 1) for t in at])
            return model.logits(states, nothing).double().log_softmax(-1)  # type: ignore[attr-defined]

        full = log_softmax(self.exit.model, self.exit.model.depth)
        early = log_softmax(self.exit, self.exit.depth)
        terms = torch.where(full > -torch.inf, full.exp() * (full - early), 0.0).sum(-1)
        self._recent.extend(terms.tolist())
        self.seen += len(at)

    @contextmanager
    def watching(self) -> Iterator[Drift]:
        """Watch within a `with` block."""
        self.exit.engine.watchers.append(self)
        try:
            yield self
        finally:
            self.exit.engine.watchers.remove(self)
