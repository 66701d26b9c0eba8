"""Markov kernels, generic over the value they move."""

from powermc.kernels.composition import Cycle, Mixture
from powermc.kernels.delayed import Conditional, DelayedAcceptance, Gate
from powermc.kernels.metropolis import Metropolis

__all__ = ["Conditional", "Cycle", "DelayedAcceptance", "Gate", "Metropolis", "Mixture"]
