"""Runs that outlive the process: `power_sample(store=...)` and `sample(store=...)` write them; here they are read, gone
on with and joined."""

from powermc.store.file import FORMAT, RUN, SAMPLES
from powermc.store.header import Header
from powermc.store.merging import merge
from powermc.store.opening import Facts, about, digest, kind, load, load_run, resume
from powermc.store.samples import SamplesFacts, SamplesHeader, about_samples, load_samples
from powermc.store.writing import Store, Writer

__all__ = [
    "FORMAT",
    "RUN",
    "SAMPLES",
    "Facts",
    "Header",
    "SamplesFacts",
    "SamplesHeader",
    "Store",
    "Writer",
    "about",
    "about_samples",
    "digest",
    "kind",
    "load",
    "load_run",
    "load_samples",
    "merge",
    "resume",
]
