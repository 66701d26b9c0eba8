"""A run as one HTML file that holds everything it shows: `Run.report`, `powermc report`."""

from powermc.report.build import page, write

__all__ = ["page", "write"]
