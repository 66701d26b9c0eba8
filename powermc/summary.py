"""What a person reads after a run: one screen of plain text.

It ends with a sentence per warning and what to do about it. ArviZ is never imported; SciPy only where there are draws
enough for R-hat.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from powermc.diagnostics.convergence import Convergence, convergence
from powermc.diagnostics.efficiency import efficiency
from powermc.diagnostics.guards import blocks, sentences
from powermc.diagnostics.moves import false_rejections, moves_by_cut
from powermc.results import shorten

if TYPE_CHECKING:
    from powermc.results import Run

_MOST_LINES, _MOST_PROMPTS, _MOST_ERRORS = 20, 12, 4
_CUTS = 5


def summarise(run: Run) -> str:
    """Settings, what each chain did, how the chains mix, what it cost, and warnings. Prompts are quoted safely."""
    found, guards = convergence(run)
    mixing = [row for row in found if row.functional == "log_p"]
    by_chain = _by_chain(run, mixing)
    lines = _settings_lines(run)
    lines += by_chain if len(by_chain) <= _MOST_LINES else [*_by_prompt(run), *_mixing_of_all(mixing)]
    ends = _ending_lines(run)
    notes = [line for note in run.notes for line in _wrap(f"note: {note}")]
    told = sentences(guard for guard in guards if guard.kind != "failed")  # of those `ends` tells
    warnings = [line for text in told for line in _wrap(f"warning: {text}")]
    tail = [*_stage_lines(run), *_cut_lines(run), *_cost_lines(run), *_effective_lines(run, mixing), *notes]
    return "\n".join([*lines, "", *ends, *tail, *([""] if warnings else []), *warnings])


def _ending_lines(run: Run) -> list[str]:
    lines: list[str] = []
    if run.interrupted:
        steps = sum(chain.steps for chains in run.chains for chain in chains)
        whole = (blocks(run) - 1) * run.settings["steps"] + run.settings["draws"]
        planned = sum(len(chains) for chains in run.chains) * whole
        lines.append(f"interrupted after {steps:,} of {planned:,} steps")
    errors = list(run.errors.items())
    lines += [f"prompt {p}, chain {c} stopped: {error}" for (p, c), error in errors[:_MOST_ERRORS]]
    if len(errors) > _MOST_ERRORS:
        lines.append(f"... and {_count(len(errors) - _MOST_ERRORS, 'more chain')}")
    if errors:
        lines.append("chains that stopped are left out of R-hat and of what follows from draws")
    return lines


def _settings_lines(run: Run) -> list[str]:
    s = run.settings
    reward = "" if s["reward"] is None else f" exp({s['reward']}(x))"
    what = (
        f"{run.model}: target p(x)^{s['alpha']:g}{reward}, proposals at temperature {s['temperature']:g}, "
        f"cut law {s['cut']}"
    )
    after = f"{_count(s['steps'], 'step')} after each"
    if s["draws"] != s["steps"]:
        after += f" and {s['draws']:,} after the last"
    how = (
        f"{_count(s['chains'], 'chain')}, {_count(s['max_new_tokens'], 'token')} in {_count(blocks(run), 'block')}, "
        f"{after}, scope {s['scope']}, seed {s['seed']}"
    )
    lines = [*_wrap(what), *_wrap(how)]
    if s["scope"] == "block":
        lines.append("scope block: each block is exact for p^alpha given its prefix,")
        lines.append("which is not p^alpha of the whole path")
    return lines


def _by_chain(run: Run, mixing: Sequence[Convergence]) -> list[str]:
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
        lines += _mixing_of(mixing[p])
    return lines


def _mixing_of(row: Convergence) -> list[str]:
    """R-hat and effective draws of one prompt, or why there are none."""
    if not row.draws:
        return []
    parts = [f"log p {row.mean:.2f}" + ("" if math.isnan(row.mcse) else f" +- {row.mcse:.2f}")]
    if not math.isnan(row.rhat):
        parts.append(f"R-hat {row.rhat:.2f}")
    if not math.isnan(row.ess_bulk):
        parts.append(f"{row.ess_bulk:,.0f} effective of {_count(len(row.chains) * row.draws, 'draw')}")
    missing = [what for what, name in (("R-hat", "rhat"), ("effective draws", "ess_bulk")) if name in row.reasons]
    if missing:
        why = row.reasons.get("rhat") or row.reasons["ess_bulk"]
        parts.append(f"{' and '.join(missing)} unknown: {why}")
    return _wrap(f"  {'; '.join(parts)}")


def _mixing_of_all(mixing: Sequence[Convergence]) -> list[str]:
    """R-hat and effective draws over many prompts: the middle and the worst."""
    lines: list[str] = []
    known = [row for row in mixing if not math.isnan(row.rhat)]
    if known:
        worst = max(known, key=lambda row: row.rhat)
        middle = float(np.median([row.rhat for row in known]))
        lines.append(f"R-hat of log p: median {middle:.2f}, worst {worst.rhat:.2f} (prompt {worst.prompt})")
    known = [row for row in mixing if not math.isnan(row.ess_bulk)]
    if known:
        least = min(known, key=lambda row: row.ess_bulk)
        total, draws = sum(row.ess_bulk for row in known), sum(len(row.chains) * row.draws for row in known)
        lines.append(
            f"effective draws of log p: {total:,.0f} of {draws:,}; least {least.ess_bulk:,.0f} (prompt {least.prompt})"
        )
    return ["", *lines] if lines else []


def _by_prompt(run: Run) -> list[str]:
    lines = ["", "prompt  chains  tokens     log p  accepted  of these changed  text"]
    for p, prompt in enumerate(run.prompts[:_MOST_PROMPTS]):
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
    if len(run.prompts) > _MOST_PROMPTS:
        lines.append(f"... and {len(run.prompts) - _MOST_PROMPTS} more prompts")
    return lines


def _stage_lines(run: Run) -> list[str]:
    """What a screened kernel did, and the cost of its proposals beside the cost model's."""
    facts, stages = run.early_exit, run.stages
    lines = [line for name in ("verdict", "guesses") if name in facts for line in textwrap.wrap(facts[name], 80)]
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
    false = false_rejections(run)
    if false is not None and false.reason is None:
        error = "" if math.isnan(false.error) else f" +- {100 * false.error:.2g}"
        lines.append(f"      falsely rejected by stage 1: {100 * false.share:.2g}{error}% of proposals")
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


def _cut_lines(run: Run) -> list[str]:
    """The share of proposals accepted, by where they cut."""
    bins = [b for b in moves_by_cut(run, bins=_CUTS) if b.proposed]
    if not bins:
        return []
    shares = ", ".join(f"{_percent(b.accepted, b.proposed)} at {b.first}-{b.last - 1}" for b in bins)
    return _wrap(f"accepted by token cut at: {shares}")


def _effective_lines(run: Run, mixing: Sequence[Convergence]) -> list[str]:
    (rates,) = efficiency(run, mixing) or (None,)
    if rates is None or math.isnan(rates.ess):
        return []
    parts = [
        f"{scale * rate:.3g} {unit}"
        for rate, scale, unit in (
            (rates.per_second, 1, "a second"),
            (rates.per_full_token, 1e3, "per 1,000 tokens at full depth"),
            (rates.per_flop, 1e12, "per TFLOP"),
        )
        if not math.isnan(rate)
    ]
    return _wrap(f"effective draws of log p: {', '.join(parts)}") if parts else []


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
