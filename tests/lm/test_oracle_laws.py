"""Laws of a language model as an oracle, on many architectures, through the production scheduler.

Chains of several prompts and lengths run side by side, with fewer rows than chains so that rows are handed on; then
every path they visited is evaluated again by one plain forward of the stock model, without cache and without batch.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from powermc.choices import Stream
from powermc.lm import CausalLM
from powermc.scheduling import Event, Failed, Finished, drive, run
from powermc.sequences import BlockwisePower, Committed, Path, Prompt, Space
from tests.lm.families import FAMILIES, VOCAB, tiny_model

TOLERANCE = 1e-5
PROMPTS = [Prompt(tuple((7 * i + 11 * j) % VOCAB for i in range(n)), key=j) for j, n in enumerate((3, 9, 17))]


def end_token(lm: CausalLM) -> int:
    """A token this model likes a little: some paths then end, and some do not."""
    ids = torch.arange(60)[None] * 11 % VOCAB
    with torch.no_grad():
        mean = lm.decoder.model(input_ids=ids).logits[0].softmax(-1).mean(0)
    return int((mean - 0.07).abs().argmin())


def sample(
    lm: CausalLM, *, chains: int, prompts: list[Prompt] = PROMPTS, seed: int = 0, **settings: Any
) -> dict[Any, list[Committed]]:
    """Every committed step of `chains` chains per prompt, by (prompt, chain)."""
    options = {"alpha": 2.0, "temperature": 0.7, "block_size": 5, "steps": 6, **settings}
    schedule = BlockwisePower(lm, Space(frozenset({end_token(lm)}), 15), **options)
    programs = (
        ((p.key, c), schedule.program(Stream(seed, prompt=p.key, chain=c).step, p))
        for p, c in itertools.product(prompts, range(chains))
    )
    steps: dict[Any, list[Committed]] = {}
    for outcome in drive(programs):
        assert not isinstance(outcome, Failed), outcome
        if isinstance(outcome, Event) and isinstance(outcome.value, Committed):
            steps.setdefault(outcome.key, []).append(outcome.value)
    return steps


def plain(model: torch.nn.Module, path: Path, exponent: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p, entropy and log Z of a path by one forward of the stock model."""
    ids = torch.tensor([[*path.prompt.ids, *path.tokens]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(path.prompt.ids) - 1 : -1].double()
    log_p = logits.log_softmax(-1)
    taken = log_p[torch.arange(len(path)), list(path.tokens)]
    return taken.numpy(), torch.special.entr(log_p.exp()).sum(-1).numpy(), (exponent * log_p).logsumexp(-1).numpy()


def deviation(model: torch.nn.Module, path: Path, exponent: float) -> float:
    log_p, entropy, log_z = plain(model, path, exponent)
    assert path.log_p is not None
    gaps = (path.log_p - log_p, path.entropy - entropy, path.log_z[exponent] - log_z)
    return max(float(np.abs(gap).max()) for gap in gaps)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_agree_with_the_plain_forward(family: str) -> None:
    """Batched = single and cached = recomputed, after accepted and rejected proposals cut at different places."""
    model = tiny_model(family)
    lm = CausalLM(model, max_rows=5)
    steps = sample(lm, chains=3)
    infos = [s.info for chain in steps.values() for s in chain]
    assert any(i["accepted"] for i in infos), "the test needs accepted moves"
    assert any(not i["accepted"] and not i["null"] for i in infos), "and rejected ones"
    assert len({i["cut"] for i in infos if "cut" in i}) > 3, "at different cuts"
    paths = {(key, s.state.value): s.state.value for key, chain in steps.items() for s in chain}
    assert {p.finished for p in paths.values()} == {True, False}
    assert max(deviation(model, path, 1 / 0.7) for path in paths.values()) <= TOLERANCE
    assert not lm.decoder.rows.used, "every row was given back"


@pytest.mark.parametrize("family", FAMILIES)
def test_scored_path_agrees_with_the_plain_forward(family: str) -> None:
    """A path given by its tokens: prompt and tail in parallel passes, from nothing and from a shared prompt."""
    model = tiny_model(family)
    lm = CausalLM(model)
    space = Space(frozenset(), 12)
    paths = [space.path(p, [(5 * t + k) % VOCAB for t in range(12)]) for p in PROMPTS for k in range(2)]

    def scored(path: Path) -> Any:
        return (yield lm.score(path, (1.3, 1.0)))

    for result in [*(run(scored(p)) for p in paths[:2]), *_all(scored(p) for p in paths)]:
        assert deviation(model, result, 1.3) <= TOLERANCE
        assert np.abs(result.log_z[1.0]).max() <= TOLERANCE


def _all(programs: Any) -> list[Any]:
    return [outcome.value for outcome in drive(enumerate(programs)) if not isinstance(outcome, Event)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_prompts_run_once(family: str) -> None:
    """However many chains share a prompt, and whatever they reject, its tokens pass the layers once."""
    lm = CausalLM(tiny_model(family), max_rows=4)
    sample(lm, chains=5)
    # All of a prompt's tokens in one parallel pass; nothing else is ever run in parallel.
    assert lm.ledger.prefilled == sum(len(p.ids) for p in PROMPTS)
    steps = sample(lm, chains=1, seed=1)
    assert lm.ledger.prefilled == sum(len(p.ids) for p in PROMPTS)
    assert steps


def test_one_row_many_chains() -> None:
    """Chains admitted while the only row is held by another's draft still get their prompt run, and agree."""
    model = tiny_model()
    lm = CausalLM(model, max_rows=1)
    schedule = BlockwisePower(lm, Space(frozenset({end_token(lm)}), 9), alpha=2.0, block_size=4, steps=2)
    programs = ((p.key, schedule.program(Stream(0, prompt=p.key).step, p)) for p in PROMPTS)
    ends = [o.value.value for o in drive(programs, active=2) if isinstance(o, Finished)]
    assert len(ends) == len(PROMPTS)
    assert max(deviation(model, path, 2.0) for path in ends) <= TOLERANCE


def test_tokens_run_equal_tokens_decoded() -> None:
    """The `tokens` of the infos add up to the ledger: a draft of n tokens cut at known ground costs n - 1 at most, and
    without reuse always."""
    reusing = CausalLM(tiny_model())
    for step in (s for chain in sample(reusing, chains=2).values() for s in chain if not s.info["null"]):
        assert step.info["tokens"] <= step.info["proposal_length"] - 1
    lm = CausalLM(tiny_model(), reuse=False)
    steps = sample(lm, chains=2)
    infos = [s.info for chain in steps.values() for s in chain]
    drafts = [i for i in infos if not i["null"]]
    assert all(i["tokens"] == i["proposal_length"] - 1 for i in drafts)
    assert sum(i["tokens"] for i in drafts) < lm.ledger.decoded  # growth decodes too
    assert lm.ledger.ticks < lm.ledger.decoded / 2, "rows shared passes"
    assert reusing.ledger.decoded < lm.ledger.decoded


def test_trained_model_is_not_served_from_old_prompts() -> None:
    """A live model that its owner trains between two runs is evaluated with its new weights."""
    model = tiny_model()
    lm = CausalLM(model)
    sample(lm, chains=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    steps = sample(lm, chains=1)
    path = steps[0, 0][-1].state.value
    assert deviation(model, path, 1 / 0.7) <= TOLERANCE
