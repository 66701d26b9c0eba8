"""Measuring: what transitions cost, and whether answers are right."""

from powermc.evaluation.tasks.numeric import last_number

__all__ = ["last_number"]
