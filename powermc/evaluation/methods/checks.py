"""Checks of options that several methods have. Each raises an `ArgumentError` that names the option as it is given."""

from __future__ import annotations

import math
from typing import Any

from powermc.errors import ArgumentError
from powermc.sampling import check_count


def check_temperature(method: Any) -> None:
    """`temperature` is a finite number above 0, or None."""
    value = method.temperature
    if value is not None and not (is_number(value) and math.isfinite(value) and value > 0):
        raise ArgumentError(f"{method.name}:temperature must be a finite number > 0, or none for 1/alpha, got {value}")


def check_share(method: Any, option: str) -> None:
    """An option above 0 and at most 1."""
    value = getattr(method, option)
    if not (is_number(value) and 0 < value <= 1):
        raise ArgumentError(f"{method.name}:{option} must be above 0 and at most 1, got {value}")


def check_counts(method: Any, **least: int) -> None:
    """Options that are integers, each at least so much."""
    for option, bound in least.items():
        check_count(f"{method.name}:{option}", getattr(method, option), least=bound)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
