"""Lenses written down rather than fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from powermc.lm import CausalLM, Lens
from powermc.lm.heads import ExitHead
from powermc.lm.lens import ExitReport, Origin, fingerprint


def lens_of(lm: CausalLM, heads: Sequence[ExitHead], *, kl: float = math.nan) -> Lens:
    """A lens of these heads that claims a held-out KL of `kl` nats at every layer."""
    dtype = str(lm.decoder.dtype).removeprefix("torch.")
    width = lm.engine.cost.width
    origin = Origin(lm.name, fingerprint(lm), lm.depth, width, dtype, "none", 1, 1, 4.0)
    report = tuple(
        ExitReport(h.layer, h.kind, h.temperature, None, kl, kl, 0.5, 0.5, 2.0, 2.0, 1)
        for h in heads
        if not math.isnan(kl)
    )
    return Lens({h.layer: h for h in heads}, report, tuple(range(lm.vocab_size)), origin)
