"""Adapters for other people's programs, each imported by its own name and installed by its own extra."""
