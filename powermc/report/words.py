"""The report's sentences and headings: what the template prints of a run as it is."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from powermc import config
from powermc.diagnostics import convergence, efficiency, false_rejections
from powermc.results import jsonable
from powermc.series import si
from powermc.visible import visible

if TYPE_CHECKING:
    from powermc.results import Run


_NAMES = {"log_p": "log p, nats", "length": "length, tokens", "finished": "ended by itself, share"}


def functional(name: str) -> str:
    """What a functional is called in a table."""
    return visible(_NAMES.get(name, name))


def text(run: Run) -> dict[str, Any]:
    """Everything that the template prints."""
    names = [f"{p}: {_short(prompt.text, 40)}" for p, prompt in enumerate(run.prompts)]
    return {
        "title": f"{visible(run.model)}: powermc",
        "heading": visible(run.model),
        "lead": _lead(run),
        "figures": _figures(run),
        "prompts": len(run.prompts),
        "prompt_names": names,
        "cost_sentence": _cost_sentence(run),
        "stage_sentences": [visible(sentence) for sentence in _stage_sentences(run)],
        "efficiency_head": ("effective draws", *(title for title, _, _ in _RATES)),
        "efficiency": _efficiency(run),
        **_configuration(run),
        "facts": visible(json.dumps(jsonable(dict(run.early_exit)), indent=1, default=str, ensure_ascii=False))
        if len(run.early_exit) > 1
        else "",
    }


def _configuration(run: Run) -> dict[str, str]:
    """The settings as TOML, with the prompts where they are text that TOML can hold."""
    hint = "As TOML: powermc sample --config FILE repeats the run."
    texts = [prompt.text for prompt in run.prompts]
    if not all(text.strip() and _encodable(text) for text in texts):
        texts, hint = [], "As TOML, without the prompts, which are no text."
    return {
        "configuration": config.from_settings(run.settings, visible(run.model), prompts=texts),
        "configuration_hint": hint,
    }


def _encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _lead(run: Run) -> str:
    s, facts = run.settings, run.early_exit
    reward = "" if s["reward"] is None else f" exp({s['reward']}(x))"
    kernel = "Metropolis\u2013Hastings" if "surrogate" not in facts else f"early exit by {facts['surrogate']}"
    parts = [
        f"Target p(x)^{s['alpha']:g}{reward}",
        kernel,
        f"proposals at temperature {s['temperature']:g}",
        f"up to {s['max_new_tokens']} tokens",
        f"seed {s['seed']}",
    ]
    return visible(", ".join(parts) + ".")


def _figures(run: Run) -> list[dict[str, str]]:
    chains = [chain for row in run.chains for chain in row]
    steps = sum(chain.steps for chain in chains)
    accepted, changed = (sum(int(info[name].sum()) for info in run.infos) for name in ("accepted", "changed"))
    rows = [
        ("prompts", f"{len(run.prompts):,}", ""),
        ("chains", f"{len(chains):,}", ""),
        ("steps", f"{steps:,}", ""),
        ("accepted", f"{accepted / steps:.0%}" if steps else "\u2013", ""),
        ("changed the path", f"{changed / steps:.0%}" if steps else "\u2013", ""),
        ("time", *_duration(run.seconds)),
    ]
    return [{"name": n, "value": v, "unit": u} for n, v, u in rows if n != "prompts" or len(run.prompts) > 1]


def _duration(seconds: float) -> tuple[str, str]:
    if seconds < 120:
        return f"{seconds:.1f}", "s"
    return (f"{seconds / 60:.3g}", "min") if seconds < 7200 else (f"{seconds / 3600:.1f}", "h")


def _cost_sentence(run: Run) -> str:
    cost = run.cost
    rate = f" ({run.tokens / run.seconds:,.0f} per second)" if run.seconds > 0 else ""
    flops = f", {si(cost.flops)}FLOP" if cost.flops else ""
    return (
        f"{run.tokens:,} tokens evaluated in {' '.join(_duration(run.seconds))}{rate}, by {cost.ticks:,} sequential "
        f"steps and {cost.prefills:,} parallel passes{flops}."
    )


def _stage_sentences(run: Run) -> list[str]:
    """What the stages of a screened kernel did, all prompts together; none for a plain kernel."""
    stages, facts, false = run.stages, run.early_exit, false_rejections(run)
    if stages is None or not stages.screened:
        return []
    everywhere = "All prompts together: stage" if len(run.prompts) > 1 else "Stage"
    found = [
        f"{everywhere} 1 passed {stages.pass_rate:.0%} of {stages.screened:,} screened proposals, which saved "
        f"{stages.saved:,} completions; stage 2 accepted {_percent(stages.stage2_rate)} of those it saw. "
        f"{stages.plain:,} steps were plain, {stages.gated:,} gated."
    ]
    if false is not None and false.reason is None:
        found.append(
            f"Of screened proposals, stage 1 turned down {false.share:.1%} that a single stage would have accepted."
        )
    if facts.get("kl_positions"):
        found.append(f"KL(p||p~) on completed tails was {facts['kl']:.2f} nats, {_held_out(facts['kl_held_out'])}.")
    return found


def _held_out(kl: float) -> str:
    return "and is not known on held-out text" if math.isnan(kl) else f"and {kl:.2f} on held-out text"


def _percent(share: float) -> str:
    return "none" if math.isnan(share) else f"{share:.0%}"


_RATES = (
    ("all prompts", "ess", 1.0),
    ("per second", "per_second", 1.0),
    ("per 1,000 full-depth tokens", "per_full_token", 1e3),
    ("per TFLOP", "per_flop", 1e12),
)


def _efficiency(run: Run) -> list[list[str]]:
    """Rows of a table: a functional, and its effective draws as `_RATES` names them."""
    found, _ = convergence(run)
    return [
        [functional(row.functional).partition(",")[0], *(_figure(getattr(row, name) * x) for _, name, x in _RATES)]
        for row in efficiency(run, found)
        if math.isfinite(row.ess)
    ]


def _figure(value: float) -> str:
    if math.isnan(value):
        return "\u2013"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(text: str, width: int) -> str:
    flat = visible(" ".join(text.split()))
    return flat if len(flat) <= width else flat[: width - 1] + "\u2026"
