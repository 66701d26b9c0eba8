"""Power sampling for `model.generate(..., custom_generate="path/to/this/folder", trust_remote_code=True)`."""

from __future__ import annotations

from typing import Any


def generate(model: Any, **arguments: Any) -> Any:
    """What transformers calls, with every argument of `model.generate` as it was given."""
    from powermc.hf import generate as power_generate

    return power_generate(model, **arguments)
