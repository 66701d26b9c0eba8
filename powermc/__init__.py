"""Exact MCMC sampling of whole sequences from a language model's power distribution p(x)^alpha.

`power_sample` is the one call most users need; `sample` and `iterate` run any kernel on any space. Names are imported
when they are first used, so that `import powermc` is fast and torch is loaded only for a language model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from powermc._version import __version__

if TYPE_CHECKING:
    from powermc.choices import Stream
    from powermc.errors import (
        ArgumentError,
        ChainError,
        ModelError,
        NonFiniteLogits,
        PowermcError,
        StoreError,
        ZeroProbability,
    )
    from powermc.kernels import Cycle, DelayedAcceptance, Metropolis, Mixture
    from powermc.lm import CausalLM, EarlyExit, Ledger, Lens, cached_lens, calibrate
    from powermc.power import LanguageModel, power_sample
    from powermc.proposals import Independent, RandomWalk
    from powermc.results import Chain, Run
    from powermc.sampling import Draw, Samples, iterate, sample
    from powermc.sequences import (
        Autoregressive,
        BlockwisePower,
        ByCut,
        Cut,
        Entropy,
        Horizon,
        Length,
        Path,
        Prompt,
        SequenceProbability,
        Space,
        Substitution,
        Suffix,
        Token,
        UncertainTail,
        Without,
    )
    from powermc.store import load, merge, resume
    from powermc.targets import Power, Product, Table, Tempered, Tilted
    from powermc.types import Choices, Field, Info, Kernel, Move, Proposal, Request, State, Steps, Target

__all__ = [
    "ArgumentError",
    "Autoregressive",
    "BlockwisePower",
    "ByCut",
    "CausalLM",
    "Chain",
    "ChainError",
    "Choices",
    "Cut",
    "Cycle",
    "DelayedAcceptance",
    "Draw",
    "EarlyExit",
    "Entropy",
    "Field",
    "Horizon",
    "Independent",
    "Info",
    "Kernel",
    "LanguageModel",
    "Ledger",
    "Length",
    "Lens",
    "Metropolis",
    "Mixture",
    "ModelError",
    "Move",
    "NonFiniteLogits",
    "Path",
    "Power",
    "PowermcError",
    "Product",
    "Prompt",
    "Proposal",
    "RandomWalk",
    "Request",
    "Run",
    "Samples",
    "SequenceProbability",
    "Space",
    "State",
    "Steps",
    "StoreError",
    "Stream",
    "Substitution",
    "Suffix",
    "Table",
    "Target",
    "Tempered",
    "Tilted",
    "Token",
    "UncertainTail",
    "Without",
    "ZeroProbability",
    "__version__",
    "cached_lens",
    "calibrate",
    "iterate",
    "load",
    "merge",
    "power_sample",
    "resume",
    "sample",
]

_HOMES = {
    "choices": "Stream",
    "errors": "ArgumentError ChainError ModelError NonFiniteLogits PowermcError StoreError ZeroProbability",
    "kernels": "Cycle DelayedAcceptance Metropolis Mixture",
    "lm": "CausalLM EarlyExit Ledger Lens cached_lens calibrate",
    "power": "LanguageModel power_sample",
    "proposals": "Independent RandomWalk",
    "results": "Chain Run",
    "sampling": "Draw Samples iterate sample",
    "sequences": "Autoregressive BlockwisePower ByCut Cut Entropy Horizon Length Path Prompt SequenceProbability "
    "Space Substitution Suffix Token UncertainTail Without",
    "store": "load merge resume",
    "targets": "Power Product Table Tempered Tilted",
    "types": "Choices Field Info Kernel Move Proposal Request State Steps Target",
}
_MODULE = {name: f"powermc.{module}" for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
