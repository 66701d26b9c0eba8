"""Hypothesis profiles, and models that several test modules share.

`ci` (the default) draws the same examples every time; `dev` draws new ones, and more of them: run it after a change to
a kernel with `HYPOTHESIS_PROFILE=dev` or `--hypothesis-profile dev`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

from powermc.sequences import Space
from powermc.testing.strategies import Toy
from powermc.toy import TabularModel

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("ci", max_examples=40, derandomize=True, database=None, phases=PHASES, **COMMON)
settings.register_profile("dev", max_examples=200, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def peaked() -> Toy:
    """Three tokens, the last one ends; every prefix of up to two tokens has a row of its own, peaked and uneven.

    Written out, not drawn: it exposes every mutant in `tests/exactness/mutants.py`.
    """
    rows = {
        (): (0.55, 0.10, 0.35),
        (0,): (0.05, 0.80, 0.15),
        (1,): (0.70, 0.00, 0.30),
        (0, 0): (0.20, 0.20, 0.60),
        (0, 1): (0.02, 0.90, 0.08),
        (1, 0): (0.40, 0.50, 0.10),
        (1, 1): (1.00, 0.00, 0.00),
    }
    flat = TabularModel(np.full((16, 3), 1 / 3), 2)
    table = flat.table.copy()
    for prefix, row in rows.items():
        table[flat.context(prefix)] = row
    return Toy(TabularModel(table, 2), Space(frozenset({2}), 3))
