"""Hugging Face causal language models as autoregressive oracles. torch is imported when the model is."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powermc.lm.calibration import cached_lens, calibrate
    from powermc.lm.exits import EarlyExit
    from powermc.lm.ledger import Ledger
    from powermc.lm.lens import Lens
    from powermc.lm.model import CausalLM

__all__ = ["CausalLM", "EarlyExit", "Ledger", "Lens", "cached_lens", "calibrate"]

_HOMES = {
    "CausalLM": "model",
    "EarlyExit": "exits",
    "Ledger": "ledger",
    "Lens": "lens",
    "cached_lens": "calibration",
    "calibrate": "calibration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"powermc.lm.{_HOMES[name]}"), name)
