"""The table of families in the documentation: `python -m tests.lm.families_table > docs/families.md`."""

from __future__ import annotations

import logging
import sys
import warnings

import torch
import transformers

from powermc.lm import CausalLM
from powermc.lm.recompute import Recomputing
from tests.lm.families import ALL, UNCACHED, untouched_model
from tests.lm.test_resume import resumed

_HEAD = """\
# Model families

powermc drives stock Hugging Face decoders through their own forward. Whether it can drive one is found out when a
model is attached, by comparing logits: driven row by row with the plain forward, and, when an exit is attached, run to
that layer first and resumed from there in other passes with the plain forward. A model that differs row by row is
sampled without a cache, one that cannot be split at full depth only, so the lists below are what was tried and not what
is allowed. `powermc doctor --model M` says it of a model of yours.

This page is made by `python -m tests.lm.families_table > docs/families.md`, here with transformers {transformers} and
torch {torch}, in float32 on a CPU. The models are tiny (four layers or seven, width 32, vocabulary 37) and have random
weights.

- **rows** and **resumed**: max |difference of logits| from the plain forward, as the class initialises the model.
- **chains**: weights scaled up until the distributions are peaked; early-exit chains of three prompts share three rows,
  drafting at the middle layer, some proposals rejected there, some at full depth, some accepted. Then max |difference|
  of log p, entropy and log Z from the plain forward, over every state, at full depth and at the exit. The tests hold it
  to 1e-5.

## Driven

| Family | Class | Split | rows | resumed | chains |
|---|---|---|---|---|---|
"""
_UNCACHED = """
## Without a cache

Their cache cannot be addressed by row and position. A `RuntimeWarning` says so when they are attached: each token is a
pass over its whole prefix, and early exits are off. **without cache**: max |difference of logits| from the plain
forward, batched and prefix by prefix.

| Family | Class | without cache | Reason |
|---|---|---|---|
"""


def driven(family: str) -> str:
    """A row of the first table."""
    lm = CausalLM(untouched_model(family))
    layer = lm.depth // 2
    found = [lm.decoder.deviation, lm.engine.check_split(layer), max(resumed(family)[0].values())]
    return f"| {family} | `{ALL[family][0]}` | {layer} of {lm.depth} | {' | '.join(f'{x:.1e}' for x in found)} |"


def uncached(family: str) -> str:
    """A row of the second. Raises `RuntimeError` if the model is driven row by row."""
    decoder = CausalLM(untouched_model(family)).decoder
    if not isinstance(decoder, Recomputing):
        raise RuntimeError(f"{family} is driven now; move it to the families that are")
    return f"| {family} | `{UNCACHED[family][0]}` | {decoder.deviation:.1e} | {decoder.reason} |"


def main() -> None:
    """Print the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    page = [_HEAD.format(transformers=transformers.__version__, torch=torch.__version__)]
    page += [driven(family) + "\n" for family in sorted(ALL)]
    page += [_UNCACHED, *(uncached(family) + "\n" for family in sorted(UNCACHED))]
    sys.stdout.write("".join(page))


if __name__ == "__main__":
    main()
