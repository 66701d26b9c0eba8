"""What a person reads after a run: one screen of plain text."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from powermc.results import shorten

if TYPE_CHECKING:
    from powermc.results import Run

_MANY_ROWS, _MANY_PROMPTS = 24, 16


def summarise(run: Run) -> str:
    """One screen of plain text: settings, what each chain did, what it cost. Prompts are quoted safely."""
    lines = _settings_lines(run)
    rows = sum(len(chains) for chains in run.chains)
    lines += _by_chain(run) if rows <= _MANY_ROWS else _by_prompt(run)
    lines += [""]
    if run.interrupted:
        steps = sum(chain.steps for chains in run.chains for chain in chains)
        lines.append(f"interrupted after {steps:,} of {rows * _steps_per_chain(run):,} steps")
    lines += [f"prompt {p}, chain {c} stopped: {error}" for (p, c), error in run.errors.items()]
    notes = [line for note in run.notes for line in _wrap(f"note: {note}")]
    return "\n".join([*lines, *_stage_lines(run), *_cost_lines(run), *notes])


def _steps_per_chain(run: Run) -> int:
    return -(-run.settings["max_new_tokens"] // run.settings["block_size"]) * run.settings["steps"]


def _settings_lines(run: Run) -> list[str]:
    s = run.settings
    reward = "" if s["reward"] is None else f" exp({s['reward']}(x))"
    blocks = -(-s["max_new_tokens"] // s["block_size"])
    what = (
        f"{run.model}: target p(x)^{s['alpha']:g}{reward}, proposals at temperature {s['temperature']:g}, "
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


def _by_chain(run: Run) -> list[str]:
    lines: list[str] = []
    for p, prompt in enumerate(run.prompts):
        lines += ["", f"prompt {p}: {shorten(prompt.text, 68)}"]
        lines.append("  chain  tokens  end           log p   accepted     of these changed the path")
        for c, chain in enumerate(run.chains[p]):
            if chain.path is None:
                lines.append(f"  {c:<5}  nothing drawn")
                continue
            steps, accepted, changed = run.acceptance(p, c)
            lines.append(
                f"  {c:<5}  {len(chain.path):>6}  {run.ending(p, c):<9}  {chain.path.log_prob:>8.2f}   "
                f"{_share(accepted, steps):<11}  {_share(changed, accepted)}"
            )
    return lines


def _by_prompt(run: Run) -> list[str]:
    lines = ["", "prompt  chains  tokens     log p  accepted  of these changed  text"]
    for p, prompt in enumerate(run.prompts[:_MANY_PROMPTS]):
        paths = [chain.path for chain in run.chains[p] if chain.path is not None]
        if not paths:
            lines.append(f"{p:<6}  {0:>6}  nothing drawn")
            continue
        steps, accepted, changed = np.sum([run.acceptance(p, c) for c in range(len(run.chains[p]))], axis=0)
        lines.append(
            f"{p:<6}  {len(paths):>6}  {np.mean([len(x) for x in paths]):>6.1f}  "
            f"{np.mean([x.log_prob for x in paths]):>8.2f}  {_percent(accepted, steps):>8}  "
            f"{_percent(changed, accepted):>16}  {shorten(prompt.text, 22)}"
        )
    if len(run.prompts) > _MANY_PROMPTS:
        lines.append(f"... and {len(run.prompts) - _MANY_PROMPTS} more prompts")
    return lines


def _stage_lines(run: Run) -> list[str]:
    """What a screened kernel did, and the cost of its proposals beside the cost model's."""
    facts, stages = run.early_exit, run.stages
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


def _cost_lines(run: Run) -> list[str]:
    cost, ties = run.cost.as_dict(), run.near_ties
    depths = ", ".join(f"{n:,} at layers {depth}" for depth, n in cost["tokens_by_depth"].items())
    rate = run.tokens / run.seconds if run.seconds > 0 else 0.0
    spent = f"cost: {_count(run.tokens, 'token')} evaluated in {run.seconds:.1f} s ({rate:,.0f} tokens/s):"
    one = f"{spent} {depths};"
    lines = [
        *([one] if len(one) <= 80 else [spent, *_wrap(f"      {depths};")]),
        f"      {_count(run.cost.ticks, 'sequential step')}, {_count(run.cost.prefills, 'prefill')}",
    ]
    if run.resolution > 0:
        drawn, decided = _count(ties["tokens"], "token"), _count(ties["accepts"], "accept decision")
        line = f"near-ties (another batch shape could turn them): {drawn}, {decided}"
        lines += [line] if len(line) <= 80 else [line[: -len(decided) - 1], f"      {decided}"]
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} {_percent(part, whole)}" if whole else "-"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
