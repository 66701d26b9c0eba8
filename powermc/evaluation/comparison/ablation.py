"""Ablations: one method, some of its options varied, each variant an entry of a comparison like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import product

from powermc.errors import ArgumentError
from powermc.evaluation import methods
from powermc.evaluation.comparison.plan import entry
from powermc.evaluation.methods import Terms


def ablation(method: str, vary: Sequence[str], terms: Terms, *, grid: bool = False) -> list[str]:
    """The specs of an ablation, the method as given first; equal ones once.

    Parameters
    ----------
    method
        The spec that is varied.
    vary
        Options with their values, such as `layer=20,24` or `alpha=1,2,4`.
    terms
        Of the comparison.
    grid
        All combinations; otherwise one option at a time, the others as in `method`.

    Raises `ArgumentError` for an option that the method does not have, and for a value of no use.
    """
    factors = [_factor(method, text) for text in vary]
    names = [name for name, _ in factors]
    if not factors:
        raise ArgumentError("nothing is varied: name an option and its values, such as --vary steps=2,4,8")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArgumentError(f"option {twice[0]!r} is varied twice; give all its values at once")
    if grid:
        chosen = [dict(zip(names, values, strict=True)) for values in product(*(values for _, values in factors))]
    else:
        chosen = [{name: value} for name, values in factors for value in values]
    specs = [entry(method, terms).spec, *(entry(_with(method, changes), terms).spec for changes in chosen)]
    return list(dict.fromkeys(specs))


def _factor(method: str, text: str) -> tuple[str, list[str]]:
    name, equal, values = (part.strip() for part in text.partition("="))
    if not equal or not name or not all(part.strip() for part in values.split(",")):
        raise ArgumentError(f"what is varied must be an option and its values, such as steps=2,4,8; got {text!r}")
    kind = methods.get(method.strip().partition(":")[0])
    known = [*(f.name for f in fields(kind)), "alpha"]
    if name not in known:
        raise ArgumentError(f"method {kind.name!r} has no option {name!r}; it has {', '.join(dict.fromkeys(known))}")
    return name, [part.strip() for part in values.split(",")]


def _with(method: str, changes: dict[str, str]) -> str:
    """A spec with some options changed, whatever they were."""
    name, *options = method.strip().split(":")
    left = [option for option in options if option.partition("=")[0] not in changes]
    return ":".join([name, *left, *(f"{option}={value}" for option, value in changes.items())])
