"""Hugging Face causal language models as autoregressive oracles. torch is imported when the model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powermc.lm.ledger import Ledger
    from powermc.lm.model import CausalLM

__all__ = ["CausalLM", "Ledger"]


def __getattr__(name: str) -> Any:
    if name == "CausalLM":
        from powermc.lm.model import CausalLM

        return CausalLM
    if name == "Ledger":
        from powermc.lm.ledger import Ledger

        return Ledger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
