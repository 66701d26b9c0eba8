"""Runs that outlive the process: `power_sample(store=...)` writes one; here they are read, gone on with and joined."""

from powermc.store.file import FORMAT
from powermc.store.header import Header
from powermc.store.merging import merge
from powermc.store.opening import Facts, about, digest, load, resume
from powermc.store.writing import Store, Writer

__all__ = ["FORMAT", "Facts", "Header", "Store", "Writer", "about", "digest", "load", "merge", "resume"]
