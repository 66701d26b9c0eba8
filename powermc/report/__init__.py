"""A run as one HTML file that holds everything it shows: `Run.report`, `powermc report`."""

from powermc.report.build import check_packages, page, write

__all__ = ["check_packages", "page", "write"]
