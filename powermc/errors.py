"""Every error powermc raises on purpose; the command line prints their text and exits with code 2."""

from __future__ import annotations


class PowermcError(Exception):
    """Base of all errors raised on purpose. The message is one line: the value that is wrong, and the fix."""


class ArgumentError(PowermcError, ValueError):
    """An argument that no run can be made of: out of range, contradictory or empty."""


class ModelError(PowermcError):
    """A model that cannot be found, read, or driven row by row."""


class NotSlotAddressable(ModelError):
    """A causal language model whose cache has no slot per row and position; it is sampled without a cache."""


class ChainError(PowermcError):
    """One chain cannot go on. The others do: the scheduler reports it and drops that chain only."""


class ZeroProbability(ChainError):
    """The initial value of a chain lies outside the support of its target."""


class NonFiniteLogits(ChainError):
    """A model returned NaN or +inf logits, or only -inf ones, for one row."""


class StoreError(PowermcError):
    """A store that cannot be read, written or gone on with. The message names the file and the fix."""
