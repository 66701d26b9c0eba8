"""Linear layers for a handful of rows on a CPU.

A product of a few rows with a large matrix is slow the way `torch.nn.functional.linear` asks for it: with the matrix as
the second factor, oneMKL rearranges it for every call. From 4 rows on `powermc.lm.product` takes its place; where that
cannot (float64, more rows than registers), the matrix as the *first* factor, W x^T, which need not be rearranged. Up to
three rows are read-bound as they are; many rows are compute-bound. `powermc bench` prints what a pass takes.

The owner's modules are not touched: `lean` makes shadows that share every parameter, buffer and hook.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from powermc.lm.product import available, product
from powermc.lm.tiles import MOST_LANES

_FEWEST = 4
"""Rows from which `product` was seen to be faster than `nn.Linear`."""
_FEWEST_TALL, _MOST_TALL = 12, 64
"""Rows for which W x^T was (oneMKL, AVX-512)."""


class FewRows(nn.Linear):
    """`nn.Linear`, the same parameters, by other products where the rows are few."""

    compiled: bool = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name is nn.Linear's
        n, dtype = input.numel() // max(input.shape[-1], 1), input.dtype
        if input.device.type != "cpu" or not _FEWEST <= n <= _MOST_TALL or torch.is_grad_enabled():
            return super().forward(input)
        if self.compiled and dtype == torch.float32 == self.weight.dtype and n <= MOST_LANES and available():
            output = product(input.reshape(n, -1), self.weight)
        elif dtype in (torch.float32, torch.float64) and n >= _FEWEST_TALL:
            output = torch.mm(self.weight, input.reshape(n, -1).T).T.contiguous()
        else:
            return super().forward(input)
        if self.bias is not None:
            output += self.bias
        return output.view(*input.shape[:-1], -1)


def lean(module: nn.Module, compiled: bool = True) -> nn.Module:
    """A shadow of a module and all within it: the same parameters, buffers and hooks, each `nn.Linear` a `FewRows`.

    `compiled`: whether it may use `product`. Subclasses of `nn.Linear`, such as quantised or adapted ones, stay what
    they are.
    """
    shadow = shallow(module)
    for name, child in module._modules.items():
        shadow._modules[name] = None if child is None else lean(child, compiled)
    if type(module) is nn.Linear:
        shadow.__class__ = FewRows
        shadow.__dict__["compiled"] = compiled
    return shadow


def shallow(module: Any) -> Any:
    """A module of its own with the same parameters, buffers, hooks and children."""
    shadow = object.__new__(type(module))  # not copy.copy, which parametrised modules refuse
    shadow.__dict__.update(module.__dict__, _modules=dict(module._modules))
    return shadow


class Numbers:
    """Attributes of modules that are floats, such as an epsilon or a scaling: no parameters, yet part of the law."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        own = [m.__dict__ for m in modules]
        self._seen = [(at, name, value) for at in own for name, value in at.items() if type(value) is float]

    def changed(self) -> bool:
        """Whether somebody has set one of them since."""
        return any(at.get(name) != value for at, name, value in self._seen)


class Shadowed:
    """Lean shadows of a list of blocks, made anew when their owner replaces a module, a forward or a number in one."""

    def __init__(self, blocks: nn.ModuleList, compiled: bool = True) -> None:
        self._blocks, self._compiled = blocks, compiled
        self._seen: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], Any]] = []
        self._shadows: list[nn.Module] = []
        self._numbers = Numbers([])

    def refresh(self) -> None:
        """To be called before a pass."""
        replaced = any(now != then or own.get("forward") is not f for now, then, own, f in self._seen)
        if not self._shadows or replaced or self._numbers.changed():
            modules = list(self._blocks.modules())
            self._seen = [(m._modules, dict(m._modules), m.__dict__, m.__dict__.get("forward")) for m in modules]
            self._numbers = Numbers(modules)
            self._shadows = [lean(block, self._compiled) for block in self._blocks]

    def __getitem__(self, index: int) -> nn.Module:
        return self._shadows[index]
