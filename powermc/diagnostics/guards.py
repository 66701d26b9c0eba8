"""What stands between a run and a misleading number: guards, and the draws that figures are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc.errors import ArgumentError
from powermc.sequences.path import Path

if TYPE_CHECKING:
    from powermc.results import Run

KINDS = (
    *("failed", "no-draws", "unequal", "block-scope", "non-finite", "short", "few-chains"),
    *("stuck", "constant", "constant-chain", "disagree", "few-effective"),
)
"""Kinds of guards, in the order in which they are told: what makes the next ones moot comes first."""

_STILL, _OFTEN_STILL = ("constant", "constant-chain"), ("length", "finished")

LEAST_CHAINS = 4
"""Fewer chains than this cannot be told to agree by luck (Vehtari et al. 2021 recommend four)."""


@dataclass(frozen=True)
class Guard:
    """Something that makes a figure wrong, missing, or less than it seems.

    Attributes
    ----------
    kind
        One of `KINDS`; "disagree" is about R-hat, "few-effective" about effective sample size.
    message
        What was seen, as a clause: without a capital or a full stop.
    advice
        What to do about it, likewise.
    prompt, chain, functional
        Where; None: everywhere.
    weight
        How bad it is beside others of its kind: `sentences` names the worst.
    """

    kind: str
    message: str
    advice: str
    prompt: int | None = None
    chain: int | None = None
    functional: str | None = None
    weight: float = 0.0

    @property
    def where(self) -> str:
        """ "prompt 1, chain 2, log_p", as far as it is known."""
        parts = [f"{n} {v}" for n, v in (("prompt", self.prompt), ("chain", self.chain)) if v is not None]
        return ", ".join([*parts, *([] if self.functional is None else [self.functional])])

    def __str__(self) -> str:
        return f"{self.where}: {self.message}; {self.advice}" if self.where else f"{self.message}; {self.advice}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Kept:
    """The draws of one prompt that figures are computed from: as many of every chain, from its first on.

    Attributes
    ----------
    prompt
        Which.
    chains
        The chains used.
    paths, texts
        Of every chain used, its draws.
    thin
        Kernel steps from one draw to the next.
    guards
        Chains left out, draws left out, and chains that never moved.
    """

    prompt: int
    chains: tuple[int, ...]
    paths: tuple[tuple[Path, ...], ...]
    texts: tuple[tuple[str | None, ...], ...]
    thin: int
    guards: tuple[Guard, ...]

    @property
    def draws(self) -> int:
        """Per chain."""
        return len(self.paths[0]) if self.paths else 0

    def values(self, functional: Callable[[Path], Any], name: str) -> np.ndarray:
        """Shape (chain, draw), float64: a functional of the path. Raises `ArgumentError` if it gives no number."""
        distinct, codes = self._distinct
        return np.array([as_number(functional(path), name) for path, _ in distinct])[codes]

    def text_values(self, functional: Callable[[str], Any], name: str) -> np.ndarray:
        """The same of a functional of the text. Raises `ArgumentError` for a model without a tokenizer."""
        distinct, codes = self._distinct
        found = []
        for _, text in distinct:
            if text is None:
                raise ArgumentError(f"{name} is a functional of the text, and the model has no tokenizer")
            found.append(as_number(functional(text), name))
        return np.array(found)[codes]

    @cached_property
    def _distinct(self) -> tuple[list[tuple[Path, str | None]], np.ndarray]:
        """Each path once, with its text, and which of them every draw is: a chain that stays is asked about once."""
        seen: dict[Path, int] = {}
        distinct: list[tuple[Path, str | None]] = []
        codes = np.zeros((len(self.chains), self.draws), dtype=np.int64)
        for c, (paths, texts) in enumerate(zip(self.paths, self.texts, strict=True)):
            last, code = None, 0
            for i, path in enumerate(paths):
                if path is not last:
                    last, code = path, seen.setdefault(path, len(distinct))
                    if code == len(distinct):
                        distinct.append((path, texts[i]))
                codes[c, i] = code
        return distinct, codes


def kept_draws(run: Run, prompt: int) -> Kept:
    """The draws of one prompt, and what had to be left out.

    Left out are chains that failed, chains without a draw, and chains with less than half the draws of the longest;
    the others are cut to the shortest of them.
    """
    chains, guards = run.chains[prompt], []
    counts: dict[int, int] = {}
    for c, chain in enumerate(chains):
        if chain.error is not None:
            why = f"it failed after {chain.steps} steps ({chain.error})"
            guards.append(Guard("failed", why, "its draws are left out of all figures", prompt, c))
        elif not chain.draws:
            why = f"no draw from the target: it took {chain.steps} steps and did not reach the last block, or its end"
            guards.append(Guard("no-draws", why, "let the run finish", prompt, c))
        else:
            counts[c] = len(chain.draws)
    longest = max(counts.values(), default=0)
    for c in [c for c, n in counts.items() if 2 * n < longest]:
        why = f"it has {counts.pop(c)} of another chain's {longest} draws"
        guards.append(Guard("unequal", why, "it is left out of all figures; let the run finish", prompt, c))
    draws = min(counts.values(), default=0)
    if draws < longest:
        why = f"chains have {draws} to {longest} draws"
        guards.append(Guard("unequal", why, f"the first {draws} of each are used; let the run finish", prompt))
    for c in counts:
        paths = chains[c].draws
        if len(paths) > 1 and all(path == paths[0] for path in paths):
            why = f"the chain never moved: all {len(paths)} draws are one path"
            how = "take more draws, lower alpha, or start more chains"
            guards.append(Guard("stuck", why, how, prompt, c))
    used = tuple(counts)
    return Kept(
        prompt,
        used,
        tuple(chains[c].draws[:draws] for c in used),
        tuple(chains[c].draw_texts[:draws] for c in used),
        _thin(run, prompt),
        tuple(guards),
    )


def draw_steps(run: Run, prompt: int, chain: int) -> list[int]:
    """The kernel step, counted over all blocks, that made each of `Chain.draws`."""
    drawn, first = run.chains[prompt][chain], first_step(run)
    if not drawn.history:
        return list(range(first, first + len(drawn.draws)))
    return [i for i in range(first, len(drawn.history)) if drawn.history[i] is not None]


def first_step(run: Run) -> int:
    """The number of the first kernel step on the last block."""
    return (blocks(run) - 1) * run.settings["steps"]


def blocks(run: Run) -> int:
    """How many blocks the run's paths are grown in."""
    return -(-run.settings["max_new_tokens"] // run.settings["block_size"])


def sentences(guards: Iterable[Guard]) -> list[str]:
    """One plain sentence per kind of trouble and what to do about it: many chains or prompts in one.

    That length or `finished` never vary is no trouble, only a reason to have no R-hat of them: it is not told.
    """
    kinds: dict[str, list[Guard]] = {}
    for guard in guards:
        if not (guard.kind in _STILL and guard.functional in _OFTEN_STILL):
            kinds.setdefault(guard.kind, []).append(guard)
    out = []
    for same in (kinds[kind] for kind in KINDS if kind in kinds):
        worst = max(same, key=lambda guard: guard.weight)
        places = [worst.where] if worst.where else []
        if len(same) > 1:
            places.append(f"and {len(same) - 1} more")
        text = f"{worst.message} ({', '.join(places)})" if places else worst.message
        out.append(f"{text[0].upper()}{text[1:]}; {worst.advice}.")
    return out


def _thin(run: Run, prompt: int) -> int:
    steps = next((s for c in range(len(run.chains[prompt])) if len(s := draw_steps(run, prompt, c)) > 1), [0, 1])
    return steps[1] - steps[0]


def as_number(value: Any, name: str) -> float:
    """What a functional of this name gave, as a number. Raises `ArgumentError` if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} must give a number of every draw, got {value!r}") from None
