"""Toy models with known laws."""

from powermc.toy.enumeration import ExactLaw, exact_law
from powermc.toy.tabular import TabularModel

__all__ = ["ExactLaw", "TabularModel", "exact_law"]
