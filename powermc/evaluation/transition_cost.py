"""What one chain-transition costs: `python -m powermc.evaluation.transition_cost`.

For each number of chains the whole schedule is run twice with the same seed: growth alone (no kernel steps), then
growth and steps. The difference is the cost of the steps; growth is stated beside it. Tokens are counted by the
model's ledger. What it does not measure: memory, and how the cost of a step grows with the length (see `by_block`
in the JSON for the tokens).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from powermc._version import __version__
from powermc.errors import PowermcError
from powermc.power import LanguageModel, power_sample
from powermc.results import Run

QUESTION = (
    "A farmer packs 18 boxes with 24 apples each. He sells 11 of the boxes for 9 dollars each and gives 3 boxes to his "
    "neighbours. How many apples does he have left, and how much money did he make?"
)


@dataclass(frozen=True)
class Cost:
    """The cost of the transitions of one run. A transition is one kernel step of one chain.

    seconds, tokens and passes are per transition, growth excluded: wall-clock; tokens evaluated by the model; and
    sequential decode passes, which chains share. growth_seconds and growth_tokens are per chain. accepted is the share
    of transitions accepted, changed the share that changed the path. by_block: tokens per transition on each block.
    """

    chains: int
    transitions: int
    seconds: float
    tokens: float
    passes: float
    accepted: float
    changed: float
    growth_seconds: float
    growth_tokens: float
    by_block: tuple[float, ...]


def measure(model: LanguageModel, chains: int, **settings: Any) -> Cost:
    """Run growth alone, then growth and steps, on `QUESTION`. `settings` go to `power_sample`; steps must be >= 1."""
    growth = power_sample(model, QUESTION, chains=chains, **{**settings, "steps": 0})
    whole = power_sample(model, QUESTION, chains=chains, **settings)
    info, transitions = whole.infos[0], sum(chain.steps for chain in whole.chains[0])
    by_block = [float(info["tokens"][info["block"] == b].mean()) for b in np.unique(info["block"])]
    return Cost(
        chains=chains,
        transitions=transitions,
        seconds=(whole.seconds - growth.seconds) / transitions,
        tokens=(whole.tokens - _grown(whole)) / transitions,
        passes=(whole.cost.ticks - growth.cost.ticks) / transitions,
        accepted=float(info["accepted"].mean()),
        changed=float(info["changed"].mean()),
        growth_seconds=growth.seconds / chains,
        growth_tokens=_grown(growth) / chains,
        by_block=tuple(by_block),
    )


def _grown(run: Run) -> int:
    """Tokens evaluated in growth, the prompt's included: all that no step has run."""
    return run.tokens - sum(int(info["tokens"].sum()) for info in run.infos)


def table(costs: Sequence[Cost]) -> str:
    """A Markdown table."""
    head = "| chains | transitions | s / transition | transitions / s | tokens / transition | passes / transition "
    head += "| accepted | changed the path | growth: s / chain | growth: tokens / chain |"
    lines = [head, "| ---: " * 10 + "|"]
    for c in costs:
        lines.append(
            f"| {c.chains} | {c.transitions} | {c.seconds:.3f} | {1 / c.seconds:.2f} | {c.tokens:.1f} | {c.passes:.1f} "
            f"| {c.accepted:.0%} | {c.changed:.0%} | {c.growth_seconds:.2f} | {c.growth_tokens:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m powermc.evaluation.transition_cost", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file, a hub id, or smollm2 (default)")
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 16], help="numbers of chains (default 1 16)")
    parser.add_argument("--steps", type=int, default=4, help="kernel steps after each block (default 4)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="the horizon T (default 128)")
    parser.add_argument("--block-size", type=int, default=32, help="B (default 32)")
    parser.add_argument("--alpha", type=float, default=4.0, help="(default 4)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1: there are no transitions to measure")
    settings = {name: getattr(options, name) for name in ("steps", "max_new_tokens", "block_size", "alpha", "seed")}
    try:
        model = load(options.model)
        power_sample(model, QUESTION, chains=1, max_new_tokens=4, block_size=4, steps=1)  # compile, and warm the caches
        costs = []
        for chains in options.chains:
            print(f"measuring {chains} chain{'s' if chains != 1 else ''} ...", file=sys.stderr, flush=True)
            costs.append(measure(model, chains, **settings))
    except PowermcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threads = _threads()
    print(
        f"powermc {__version__}, {model.name}, T {options.max_new_tokens}, B {options.block_size}, "
        f"{options.steps} steps per block, alpha {options.alpha:g}, seed {options.seed}, {threads} "
        f"thread{'s' if threads != 1 else ''}, {platform.machine()}\n"
    )
    print(table(costs))
    if options.json:
        facts = {"powermc": __version__, "model": model.name, "threads": threads, "machine": platform.machine()}
        content = {**facts, "settings": settings, "costs": [asdict(cost) for cost in costs]}
        try:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
        except OSError as error:
            print(f"error: cannot write {options.json}: {error.strerror}", file=sys.stderr)
            return 2
    return 0


def load(name: str) -> LanguageModel:
    """The model to measure."""
    from powermc.lm import CausalLM

    return CausalLM.from_pretrained(name)


def _threads() -> int:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else int(os.environ.get("OMP_NUM_THREADS", "1"))


if __name__ == "__main__":
    sys.exit(main())
