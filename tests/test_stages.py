"""Counting what the stages did, on infos written by hand."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from powermc.kernels import Metropolis, Mixture
from powermc.sampling import Records
from powermc.sequences import Length, Screening, SequenceProbability
from powermc.stages import USELESS, Stages, count_stages
from powermc.targets import Power
from tests.fake_lm import FakeLM

# component, null, same, gated, stage1_accepted, accepted, changed, proposal_length
KINDS = {
    "rejected in stage 1": (0, 0, 0, 0, 0, 0, 0, 5),
    "rejected in stage 2": (0, 0, 0, 0, 1, 0, 0, 7),
    "accepted": (0, 0, 0, 0, 1, 1, 1, 11),
    "the same again": (0, 0, 1, 0, 0, 1, 0, 2),
    "gated, rejected": (0, 0, 0, 1, 0, 0, 0, 13),
    "gated, accepted": (0, 0, 0, 1, 0, 1, 1, 17),
    "null": (0, 1, 0, 0, 0, 0, 0, 0),
    "null, after drawing": (0, 1, 0, 0, 0, 0, 0, 3),
    "plain, rejected": (1, 0, 0, 0, 0, 0, 0, 19),
    "plain, accepted": (1, 0, 0, 0, 0, 1, 1, 23),
    "plain, null": (1, 1, 0, 0, 0, 0, 0, 0),
    "not taken": (-1, 0, 0, 0, 0, 0, 0, 0),
}
NAMES = ("component", "null", "same", "gated", "stage1_accepted", "accepted", "changed", "proposal_length")


def table(*kinds: str, shape: tuple[int, ...] = (-1,)) -> dict[str, np.ndarray]:
    dtypes = ("int32", *["bool"] * 6, "int32")
    columns = zip(*(KINDS[kind] for kind in kinds), strict=True)
    return {n: np.array(c, dtype=d).reshape(shape) for n, c, d in zip(NAMES, columns, dtypes, strict=True)}


def test_every_kind_of_step():
    found = count_stages([table(*KINDS, shape=(3, 4))])
    assert asdict(found) == {
        "steps": 11,
        "screened": 3,
        "passed": 2,
        "accepted": 1,
        "same": 1,
        "gated": 2,
        "null": 2,
        "plain": 3,
        "changed": 3,
        "proposed_tokens": 5 + 7 + 11 + 2 + 13 + 17 + 3,
        "completed_tokens": 7 + 11 + 13 + 17,
    }
    assert found.steps == found.screened + found.same + found.gated + found.null + found.plain
    assert found.pass_rate == 2 / 3
    assert found.stage2_rate == 1 / 2
    assert found.gated_share == 2 / 5
    assert found.saved == 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(kind):
    component, null, same, gated, stage1, accepted, changed, length = KINDS[kind]
    early, plain = component == 0, component == 1
    screened = early and not null and not gated and not same
    passed = bool(screened and stage1)
    expected = Stages(
        steps=2 * (early or plain),
        screened=2 * screened,
        passed=2 * passed,
        accepted=2 * (passed and accepted),
        same=2 * (early and same),
        gated=2 * (early and gated),
        null=2 * (early and null),
        plain=2 * plain,
        changed=2 * changed,
        proposed_tokens=2 * early * length,
        completed_tokens=2 * (passed or (early and gated)) * length,
    )
    assert count_stages([table(kind), table(kind, "not taken", "not taken")]) == expected


def test_tables_add_up():
    names = list(KINDS)
    one = count_stages([table(*names[:5]), table(*names[5:], "accepted")])
    assert one == count_stages([table(*names, "accepted")])
    assert one.accepted == 2


def test_shares_of_nothing_are_nan():
    for found in (count_stages([]), count_stages([table("not taken")])):
        assert found == Stages(*[0] * 11)
        assert all(math.isnan(x) for x in (found.pass_rate, found.stage2_rate, found.gated_share))
        assert found.saved == 0
        assert found.advice() is None
    assert math.isnan(count_stages([table("rejected in stage 1")]).stage2_rate)
    assert count_stages([table("rejected in stage 1")]).gated_share == 0
    assert count_stages([table("gated, accepted")]).gated_share == 1


def test_the_fill_values_of_a_kernel_do_not_count():
    """The arrays of a run that took one step of ten: the rest is what `Records` fills in."""
    model, surrogate = FakeLM(), FakeLM(seed=1)
    target = Power(SequenceProbability(model), 2.0)
    kernel = Screening(surrogate, 2.0, eta=1.0).kernel(model, model.space(4), Length(), 0.5, target)
    assert isinstance(kernel, Mixture)
    records = Records(kernel.fields, (2, 5))
    assert count_stages([records.arrays]) == Stages(*[0] * 11)
    records.write((0, 0), {"component": 0, "stage1_accepted": True, "accepted": True, "proposal_length": 3})
    found = count_stages([records.arrays])
    assert (found.steps, found.screened, found.accepted, found.completed_tokens) == (1, 1, 1, 3)
    plain = kernel.kernels[1]
    assert isinstance(plain, Metropolis)
    assert not {"gated", "stage1_accepted"} & set(plain.fields), "for those only fills are there in plain steps"


def stages(screened: int, passed: int) -> Stages:
    kinds = ["rejected in stage 2"] * passed + ["rejected in stage 1"] * (screened - passed)
    return count_stages([table(*kinds)])


@pytest.mark.parametrize(
    ("screened", "passed", "says"),
    [
        (100, 100, "screens nothing: it turned down 0 of 100 proposals, so 0 completions were saved"),
        (100, 96, "screens nothing: it turned down 4 of 100 proposals, so 4 completions were saved"),
        (100, 95, None),
        (100, 50, None),
        (100, 5, None),
        (100, 4, "nearly nothing through: it turned down 96 of 100 proposals, so 96 completions were saved"),
        (100, 0, "nearly nothing through: it turned down 100 of 100 proposals, so 100 completions were saved"),
    ],
)
def test_advice_names_a_first_stage_that_decides_nothing(screened, passed, says):
    assert USELESS == 0.05
    advice = stages(screened, passed).advice()
    if says is None:
        assert advice is None
    else:
        assert advice is not None
        assert says in advice
        assert ("later exit" in advice) == (passed < 50)
        assert ("plain Metropolis-Hastings may be cheaper" in advice) == (passed > 50)
