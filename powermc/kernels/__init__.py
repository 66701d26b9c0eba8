"""Markov kernels, generic over the value they move."""

from powermc.kernels.composition import Cycle, Mixture
from powermc.kernels.metropolis import Metropolis

__all__ = ["Cycle", "Metropolis", "Mixture"]
