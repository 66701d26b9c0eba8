"""What a run of `power_sample` drew, what happened in every step, and what it cost."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc._version import __version__
from powermc.errors import ArgumentError, ChainError
from powermc.files import write_whole
from powermc.sequences.path import Path, Prompt
from powermc.stages import Stages, count_stages

if TYPE_CHECKING:
    from powermc.lm.ledger import Ledger

ACCEPT_TOLERANCE = 100
"""An accept decision is a near-tie if |log u - log r| is below this many times the model's `resolution`: log r sums
hundreds of log probabilities, each good to about the resolution (1e-3 nats for a float32 model, 0 in float64)."""

_MANY_ROWS, _MANY_PROMPTS = 24, 16


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
        "block", from the target of the last block given the chain's earlier ones.)
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
    """

    path: Path | None
    text: str | None
    draws: tuple[Path, ...]
    draw_texts: tuple[str | None, ...]
    steps: int
    grown: int
    growth_near_ties: int
    error: ChainError | None


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
        Whether Ctrl-C ended the run.
    notes
        What else the user should know, such as rows bounded by memory.
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
        """One screen of plain text: settings, what each chain did, what it cost. Prompts are quoted safely."""
        lines = self._settings_lines()
        rows = sum(len(chains) for chains in self.chains)
        lines += self._by_chain() if rows <= _MANY_ROWS else self._by_prompt()
        lines += [""]
        if self.interrupted:
            steps = sum(chain.steps for chains in self.chains for chain in chains)
            lines.append(f"interrupted after {steps:,} of {rows * self._steps_per_chain():,} steps")
        lines += [f"prompt {p}, chain {c} stopped: {error}" for (p, c), error in self.errors.items()]
        notes = [line for note in self.notes for line in _wrap(f"note: {note}")]
        return "\n".join([*lines, *self._stage_lines(), *self._cost_lines(), *notes])

    def _steps_per_chain(self) -> int:
        return -(-self.settings["max_new_tokens"] // self.settings["block_size"]) * self.settings["steps"]

    def _settings_lines(self) -> list[str]:
        s = self.settings
        reward = "" if s["reward"] is None else f" exp({s['reward']}(x))"
        blocks = -(-s["max_new_tokens"] // s["block_size"])
        what = (
            f"{self.model}: target p(x)^{s['alpha']:g}{reward}, proposals at temperature {s['temperature']:g}, "
            f"cut law {s['cut']}"
        )
        lines = [
            *_wrap(what),
            f"{_count(s['chains'], 'chain')}, {_count(s['max_new_tokens'], 'token')} in {_count(blocks, 'block')}, "
            f"{_count(s['steps'], 'step')} after each, scope {s['scope']}, seed {s['seed']}",
        ]
        if s["scope"] == "block":
            lines.append("scope block: each block is exact for p^alpha given its prefix,")
            lines.append("which is not p^alpha of the whole path")
        return lines

    def _by_chain(self) -> list[str]:
        lines: list[str] = []
        for p, prompt in enumerate(self.prompts):
            lines += ["", f"prompt {p}: {shorten(prompt.text, 68)}"]
            lines.append("  chain  tokens  end           log p   accepted     of these changed the path")
            for c, chain in enumerate(self.chains[p]):
                if chain.path is None:
                    lines.append(f"  {c:<5}  nothing drawn")
                    continue
                steps, accepted, changed = self.acceptance(p, c)
                lines.append(
                    f"  {c:<5}  {len(chain.path):>6}  {self.ending(p, c):<9}  {chain.path.log_prob:>8.2f}   "
                    f"{_share(accepted, steps):<11}  {_share(changed, accepted)}"
                )
        return lines

    def _by_prompt(self) -> list[str]:
        lines = ["", "prompt  chains  tokens     log p  accepted  of these changed  text"]
        for p, prompt in enumerate(self.prompts[:_MANY_PROMPTS]):
            paths = [chain.path for chain in self.chains[p] if chain.path is not None]
            if not paths:
                lines.append(f"{p:<6}  {0:>6}  nothing drawn")
                continue
            steps, accepted, changed = np.sum([self.acceptance(p, c) for c in range(len(self.chains[p]))], axis=0)
            lines.append(
                f"{p:<6}  {len(paths):>6}  {np.mean([len(x) for x in paths]):>6.1f}  "
                f"{np.mean([x.log_prob for x in paths]):>8.2f}  {_percent(accepted, steps):>8}  "
                f"{_percent(changed, accepted):>16}  {shorten(prompt.text, 22)}"
            )
        if len(self.prompts) > _MANY_PROMPTS:
            lines.append(f"... and {len(self.prompts) - _MANY_PROMPTS} more prompts")
        return lines

    def _stage_lines(self) -> list[str]:
        """What a screened kernel did, and the cost of its proposals beside the cost model's."""
        facts, stages = self.early_exit, self.stages
        lines = textwrap.wrap(facts["verdict"], 80) if "verdict" in facts else []
        if stages is None:
            return lines
        fitted = f" (fitted: {', '.join(facts['fitted'])})" if facts["fitted"] else ""
        lines += [
            f"early exit: {facts['surrogate']};",
            *_wrap(
                f"      proposal {facts['proposal']}, screening exponent {facts['exponent']:.3g}, "
                f"plain steps {facts['plain']:.0%}{fitted}"
            ),
            f"stage 1: {_share(stages.passed, stages.screened)} passed, {_count(stages.saved, 'completion')} saved;",
            f"      stage 2: {_share(stages.accepted, stages.passed)} accepted; "
            f"gated {_share(stages.gated, stages.screened + stages.gated)}, plain {stages.plain:,}",
        ]
        if facts["advice"]:
            lines += textwrap.wrap(f"note: {facts['advice']}", 80)
        if stages.screened and (cost := facts.get("cost")):
            mid, tail, model, counted, full = (
                f"{cost[name] / 1e9:.3g}" for name in ("c_mid", "c_tail", "model", "counted", "full_depth")
            )
            lines += [
                f"GFLOP per screened proposal: {counted} counted; {full} at full depth;",
                f"      (1-rho) C_mid + rho (C_mid + C_tail) = {model}",
                f"      with rho {cost['rho']:.2f}, C_mid {mid}, C_tail {tail}",
            ]
        if facts.get("kl_positions"):
            lines += [
                f"KL(p||p~) on completed tails: {facts['kl']:.2f} nats "
                f"({_count(facts['kl_positions'], 'position')}, survivors only);",
                "      held out " + ("unknown" if math.isnan(facts["kl_held_out"]) else f"{facts['kl_held_out']:.2f}"),
            ]
        return lines

    def _cost_lines(self) -> list[str]:
        cost, ties = self.cost.as_dict(), self.near_ties
        depths = ", ".join(f"{n:,} at layers {depth}" for depth, n in cost["tokens_by_depth"].items())
        rate = self.tokens / self.seconds if self.seconds > 0 else 0.0
        spent = f"cost: {_count(self.tokens, 'token')} evaluated in {self.seconds:.1f} s ({rate:,.0f} tokens/s):"
        one = f"{spent} {depths};"
        lines = [
            *([one] if len(one) <= 80 else [spent, *_wrap(f"      {depths};")]),
            f"      {_count(self.cost.ticks, 'sequential step')}, {_count(self.cost.prefills, 'prefill')}",
        ]
        if self.resolution > 0:
            drawn, decided = _count(ties["tokens"], "token"), _count(ties["accepts"], "accept decision")
            line = f"near-ties (another batch shape could turn them): {drawn}, {decided}"
            lines += [line] if len(line) <= 80 else [line[: -len(decided) - 1], f"      {decided}"]
        return lines

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


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} {_percent(part, whole)}" if whole else "-"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
