"""What a report shows of a run, as plain numbers and strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc import series
from powermc.diagnostics import Convergence, convergence, kept_draws, moves_by_cut, sentences
from powermc.report.packing import Alphabet, alphabet, numbers, short
from powermc.report.walk import tokens_of, walk
from powermc.report.words import functional, text
from powermc.visible import visible

if TYPE_CHECKING:
    from powermc.results import Run

_RANK_BINS, _CUT_BINS = 20, 16


@dataclass(frozen=True)
class Report:
    """text: what the template prints. run, prompts[prompt], chains[prompt, chain]: the page's JSON blocks."""

    text: Mapping[str, Any]
    run: Mapping[str, Any]
    prompts: list[Mapping[str, Any]]
    chains: Mapping[tuple[int, int], Mapping[str, Any]]


def report(run: Run) -> Report:
    """Everything the report of a run says."""
    letters = _alphabet(run)
    return Report(
        text(run),
        {
            "prompts": len(run.prompts),
            "pieces": letters.pieces,
            "bytes": letters.bytes,
            "special": _special(run, letters),
            "substitution": run.early_exit.get("proposal") == "substitution",
            "cost": _cost(run),
            "warnings": _warnings(run),
        },
        [_prompt(run, p) for p in range(len(run.prompts))],
        {
            (p, c): walk(chain, c, run.infos[p], _proposals(run, p, c), letters)
            for p, chains in enumerate(run.chains)
            for c, chain in enumerate(chains)
        },
    )


def _proposals(run: Run, p: int, c: int) -> tuple[np.ndarray | None, ...]:
    return run.proposals[p][c] if run.proposals else ()


def _alphabet(run: Run) -> Alphabet:
    ids: set[int] = set()
    for p, chains in enumerate(run.chains):
        for c, chain in enumerate(chains):
            ids |= tokens_of(chain)
            ids.update(*(tokens.tolist() for tokens in _proposals(run, p, c) if tokens is not None))
    return alphabet(ids, run.pieces)


def _special(run: Run, letters: Alphabet) -> list[int]:
    """Tokens that ended a path and are no part of its text."""
    found = set()
    for chain in (chain for chains in run.chains for chain in chains):
        if chain.path is not None and chain.path.finished and chain.text is not None:
            piece = run.pieces.get(chain.path.tokens[-1], "")
            if not piece or not chain.text.endswith(piece):
                found.add(chain.path.tokens[-1])
    return np.searchsorted(letters.ids, sorted(found)).tolist()


def _cost(run: Run) -> dict[str, Any]:
    shares, unit = series.costs(run.cost)
    return {"unit": unit, "rows": [{"name": s.name, "amount": s.amount, "head": s.head} for s in shares]}


def _warnings(run: Run) -> list[str]:
    interrupted = ["The run was interrupted before its end."] if run.interrupted else []
    return [visible(text) for text in [*interrupted, *run.notes]]


def _prompt(run: Run, p: int) -> dict[str, Any]:
    found, guards = convergence(run, prompts=[p])
    bins = [cut for cut in moves_by_cut(run, p, bins=_CUT_BINS) if cut.proposed]
    named = series.stages(run, p)
    return {
        "text": visible(run.prompts[p].text) or f"{len(run.prompts[p].ids)} token ids, no text",
        "chains": [_chain(run, p, c) for c in range(len(run.chains[p]))],
        "block_starts": series.block_starts(run, p),
        "log_p": _rows(series.trace(run, p), run, p),
        "spent": _rows(series.spent(run, p), run, p),
        "ranks": _ranks(run, p),
        "cuts": {
            "first": [cut.first + 1 for cut in bins],
            **{name: [getattr(cut, name) for cut in bins] for name in ("last", "proposed", "accepted", "changed")},
        }
        if bins
        else None,
        "funnel": [{"name": name, "counts": counts} for name, counts in named] if any(named[0][1]) else None,
        "diagnostics": [_figures_of(row) for row in found],
        "warnings": [visible(text) for text in sentences(replace(guard, prompt=None) for guard in guards)],
    }


def _figures_of(row: Convergence) -> dict[str, Any]:
    names = ("mean", "sd", "mcse", "rhat", "ess_bulk", "ess_tail", "tau")
    found = {name: short(getattr(row, name)) for name in names}
    return {"name": functional(row.functional), **found, "reasons": {k: visible(v) for k, v in row.reasons.items()}}


def _chain(run: Run, p: int, c: int) -> dict[str, Any]:
    chain = run.chains[p][c]
    steps, accepted, changed = run.acceptance(p, c)
    return {
        "text": None if chain.text is None else visible(chain.text),
        "log_p": None if chain.path is None else short(chain.path.log_prob),
        "length": None if chain.path is None else len(chain.path),
        "ending": run.ending(p, c),
        "steps": steps,
        "accepted": accepted,
        "changed": changed,
        "error": None if chain.error is None else visible(str(chain.error)),
    }


def _rows(values: np.ndarray, run: Run, p: int) -> list[list[Any]]:
    """One list per chain, as long as it took steps."""
    return [numbers(row[: run.chains[p][c].steps]) for c, row in enumerate(values)]


def _ranks(run: Run, p: int) -> dict[str, Any] | None:
    kept = kept_draws(run, p)
    if len(kept.chains) < 2 or kept.draws < _RANK_BINS:
        return None
    counts = series.ranks(kept.values(lambda path: path.log_prob, "log_p"), _RANK_BINS)
    return {"chains": kept.chains, "counts": counts.tolist(), "expected": kept.draws / _RANK_BINS}
