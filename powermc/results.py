"""What a run of `power_sample` drew, what happened in every step, and what it cost."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc._version import __version__
from powermc.errors import ArgumentError, ChainError
from powermc.files import write_whole
from powermc.sequences.path import Path, Prompt
from powermc.stages import Stages, count_stages

if TYPE_CHECKING:
    from xarray import DataTree

    from powermc.diagnostics import Diagnostics
    from powermc.lm.ledger import Ledger

ACCEPT_TOLERANCE = 100
"""An accept decision is a near-tie if |log u - log r| is below this many times the model's `resolution`: log r sums
hundreds of log probabilities, each good to about the resolution (1e-3 nats for a float32 model, 0 in float64)."""


@dataclass(frozen=True)
class Chain:
    """One chain of one prompt.

    Attributes
    ----------
    path
        The last path: the chain's answer. None if the chain ended before it had one.
    text
        The same decoded, without special tokens; None too for a model without a tokenizer.
    draws
        The path after each kernel step on the last block: the draws from the target over whole paths. (With scope
        "block", from the target of the last block given the chain's earlier ones.) Where the run was thinned, those
        that were kept.
    draw_texts
        The same decoded.
    steps
        Kernel steps taken, all blocks together.
    grown
        Tokens drawn to extend the path by its blocks.
    growth_near_ties
        Of these, how many could have been another token by rounding.
    error
        What ended the chain early, or None.
    history
        The path after every step of all blocks, None where it was thinned away.
    starts
        Block to the path that its growth left, for the blocks that extended it.
    """

    path: Path | None
    text: str | None
    draws: tuple[Path, ...]
    draw_texts: tuple[str | None, ...]
    steps: int
    grown: int
    growth_near_ties: int
    error: ChainError | None
    history: tuple[Path | None, ...] = ()
    starts: Mapping[int, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """The result of `power_sample`. Prompts and chains are counted from 0, in the order given.

    Attributes
    ----------
    model
        The name of the model.
    settings
        Every argument of the run, defaults filled in; and `rows`, how many chains were under way at once.
    prompts
        The prompts, with the keys of their random streams.
    chains
        chains[prompt][chain].
    infos
        Per prompt: name to array of shape (chain, step), over the steps of all blocks. Beside what the kernel
        declares: `block`, and `log_p` (nats), `log_density` (nats, of the target) and `length` (tokens) after the
        step. Where a chain did not get, arrays hold the declared fill value (-1 for `block`).
    early_exit
        The kernel that ran, what was fitted or chosen before the first step, and for a screened kernel what its stages
        cost; JSON-able. See `stages` for the counts.
    cost
        The model's ledger for this run.
    seconds
        Wall-clock time of the run.
    resolution
        The model's: probabilities closer than this may be ordered differently by another batch shape.
    ignored_warpers
        What the checkpoint's generation config asks for that p leaves out.
    interrupted
        Whether Ctrl-C ended the run; of one that was loaded, whether it ended before its steps did.
    notes
        What else the user should know, such as rows bounded by memory.
    proposals
        proposals[prompt][chain][step]: int32, the tokens drawn by that step after its cut (of an abandoned draft,
        those drawn by then; of a substitution, without the kept tail); None where nothing was drawn or kept.
    pieces
        Token id to its text by itself, for every token that occurs; empty for a model without a tokenizer. Text split
        within a character is only right as a whole.
    """

    model: str
    settings: Mapping[str, Any]
    prompts: tuple[Prompt, ...]
    chains: tuple[tuple[Chain, ...], ...]
    infos: tuple[dict[str, np.ndarray], ...]
    early_exit: Mapping[str, Any]
    cost: Ledger
    seconds: float
    resolution: float
    ignored_warpers: Mapping[str, Any]
    interrupted: bool
    notes: tuple[str, ...] = ()
    proposals: tuple[tuple[tuple[np.ndarray | None, ...], ...], ...] = ()
    pieces: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """The run in a store, finished or not; see `powermc.load`."""
        from powermc.store import load_run

        return load_run(path)

    @property
    def texts(self) -> list[list[str | None]]:
        """texts[prompt][chain]: the last text of each chain; None where a chain never had one."""
        return [[chain.text for chain in chains] for chains in self.chains]

    @property
    def paths(self) -> list[list[Path | None]]:
        """paths[prompt][chain]: the last path of each chain, without the model's cache."""
        return [[chain.path for chain in chains] for chains in self.chains]

    @property
    def draws(self) -> list[list[tuple[Path, ...]]]:
        """draws[prompt][chain]: the path after each step on the last block, the draws from the target."""
        return [[chain.draws for chain in chains] for chains in self.chains]

    @property
    def log_p(self) -> list[np.ndarray]:
        """Per prompt, shape (chain,), nats: log p of the last path; NaN where there is none."""
        return [np.array([math.nan if c.path is None else c.path.log_prob for c in chains]) for chains in self.chains]

    @property
    def errors(self) -> dict[tuple[int, int], ChainError]:
        """(prompt, chain) to what ended that chain early."""
        return {
            (p, c): chain.error
            for p, chains in enumerate(self.chains)
            for c, chain in enumerate(chains)
            if chain.error is not None
        }

    @property
    def accept_tolerance(self) -> float:
        """Nats; an accept decision closer than this counts as a near-tie."""
        return ACCEPT_TOLERANCE * self.resolution

    @property
    def near_ties(self) -> dict[str, int]:
        """How many token draws and accept decisions rounding could have turned: what float32 does not promise."""
        grown = sum(chain.growth_near_ties for chains in self.chains for chain in chains)
        drawn = sum(int(info["near_ties"].sum()) for info in self.infos)
        gaps = [np.abs(info["log_level"] - info["log_ratio"]) for info in self.infos]
        return {"tokens": grown + drawn, "accepts": sum(int((gap < self.accept_tolerance).sum()) for gap in gaps)}

    @property
    def tokens(self) -> int:
        """Tokens evaluated by the model, decoded and prefilled, each counted once however many spans it passed."""
        return sum(n for (first, _), n in self.cost.spans.items() if first == 0)

    @property
    def stages(self) -> Stages | None:
        """What the stages of delayed acceptance did; None for plain Metropolis-Hastings."""
        return count_stages(self.infos) if self.early_exit["kernel"] == "early-exit" else None

    def whole(self, prompt: int, chain: int) -> bool:
        """Whether the chain's last path is one of the whole space: ended by itself or at the horizon."""
        path = self.chains[prompt][chain].path
        return path is not None and (path.finished or len(path) == self.settings["max_new_tokens"])

    def acceptance(self, prompt: int, chain: int) -> tuple[int, int, int]:
        """(steps taken, proposals accepted, accepted proposals that changed the path) of one chain."""
        info = self.infos[prompt]
        return self.chains[prompt][chain].steps, int(info["accepted"][chain].sum()), int(info["changed"][chain].sum())

    def answers(self, extract: Callable[[str], Hashable | None], *, over: str = "final") -> list[Counter[Hashable]]:
        """Per prompt: how often each answer was given, `extract(text)` being the answer of a text, None for no answer.

        `over="final"` counts each chain once, by its last text, if that is whole and the chain did not fail.
        `over="draws"` counts every draw of the last block: an estimate of each answer's probability under the target.
        `most_common(1)` of a counter is the majority answer. Raises `ArgumentError` for another `over`.
        """
        if over not in ("final", "draws"):
            raise ArgumentError(f"over must be 'final' or 'draws', got {over!r}")
        counters: list[Counter[Hashable]] = []
        for p, chains in enumerate(self.chains):
            if over == "draws":
                texts = [text for chain in chains for text in chain.draw_texts]
            else:
                texts = [x.text for c, x in enumerate(chains) if x.error is None and self.whole(p, c)]
            found = [extract(text) for text in texts if text is not None]
            counters.append(Counter(answer for answer in found if answer is not None))
        return counters

    def summary(self) -> str:
        """One screen of plain text; see `powermc.summary.summarise`."""
        from powermc.summary import summarise

        return summarise(self)

    def diagnostics(self, **options: Any) -> Diagnostics:
        """R-hat, effective sample sizes, acceptance, costs and what to be wary of; options: `powermc.diagnostics`."""
        from powermc.diagnostics import diagnose

        return diagnose(self, **options)

    def to_datatree(self, prompt: int | None = None, **functionals: Any) -> DataTree:
        """An xarray `DataTree` in ArviZ's schema; see `powermc.arviz_export.to_datatree`."""
        from powermc.arviz_export import to_datatree

        return to_datatree(self, prompt, **functionals)

    def to_netcdf(self, path: str | os.PathLike[str], prompt: int | None = None, **functionals: Any) -> None:
        """The same as a netCDF file, written whole or not at all; see `powermc.arviz_export.to_netcdf`."""
        from powermc.arviz_export import to_netcdf

        to_netcdf(self, path, prompt, **functionals)

    def report(self, path: str | os.PathLike[str]) -> None:
        """The run as one HTML file that holds everything it shows; see `powermc.report.write`."""
        from powermc.report import write

        write(self, path)

    def ending(self, prompt: int, chain: int) -> str:
        """How the last path ends: "finished", "cut at T" (the horizon), or "growing" if the run stopped first."""
        path = self.chains[prompt][chain].path
        if path is None or not self.whole(prompt, chain):
            return "growing"
        return "finished" if path.finished else f"cut at {len(path)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as numbers, strings, lists and dicts that JSON can hold. NaN and infinities become None."""
        return {
            "powermc": __version__,
            "model": self.model,
            "settings": dict(self.settings),
            "ignored_warpers": dict(self.ignored_warpers),
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "cost": self.cost.as_dict(),
            "near_ties": self.near_ties,
            "early_exit": jsonable(self.early_exit),
            "notes": list(self.notes),
            "prompts": [
                {
                    "text": prompt.text,
                    "tokens": list(prompt.ids),
                    "key": prompt.key,
                    "chains": [self._chain_dict(p, c) for c in range(len(self.chains[p]))],
                }
                for p, prompt in enumerate(self.prompts)
            ],
        }

    def _chain_dict(self, p: int, c: int) -> dict[str, Any]:
        chain = self.chains[p][c]
        steps, accepted, changed = self.acceptance(p, c)
        return {
            "text": chain.text,
            **_path_dict(chain.path),
            "end": self.ending(p, c),
            "steps": steps,
            "accepted": accepted,
            "changed": changed,
            "grown": chain.grown,
            "error": None if chain.error is None else str(chain.error),
            "draws": [
                {"text": text, **_path_dict(path)} for text, path in zip(chain.draw_texts, chain.draws, strict=True)
            ],
            "infos": {name: _plain(values[c, :steps]) for name, values in self.infos[p].items()},
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a file: whole or not at all. Raises `OSError` if it cannot be written."""
        write_whole(path, json.dumps(self.to_dict(), allow_nan=False, default=str) + "\n")


def shorten(text: str, width: int) -> str:
    """Text on one line of at most `width` characters, quoted like a Python string so that no control character acts."""
    quoted = repr(" ".join(text.split()))
    return quoted if len(quoted) <= width else quoted[: width - 4] + quoted[0] + "..."


def _path_dict(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {"tokens": None, "length": None, "log_p": None, "finished": None}
    return {"tokens": list(path.tokens), "length": len(path), "log_p": path.log_prob, "finished": path.finished}


def jsonable(value: Any) -> Any:
    """The same with NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(values: np.ndarray) -> list[Any]:
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in values.tolist()]
