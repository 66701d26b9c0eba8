"""Early exit from start to end: calibrate, pilot, sample, and put the screened run beside a plain one.

    python examples/04_early_exit.py texts.jsonl

Each line of the file is a string, or an object with "text", or with "question" and "answer", as in GSM8K. Heads are
fitted to the first 100 of them; without a file the model writes its own text. The pilot then runs short chains of every
exit on three questions that ship with powermc, and says which one pays, if any. If none does, the best of them is run
all the same, so that you see by how much it does not.

With the defaults and SmolLM2-135M it takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import powermc
from powermc.cli.calibrate import layer_list, read_texts
from powermc.cli.demo import questions
from powermc.cli.sample import read_prompts
from powermc.evaluation.pilot import Choice, check, pilot


def moves(run: powermc.Run) -> int:
    """Accepted moves that changed the path, over all chains and blocks."""
    return sum(int(info["changed"].sum()) for info in run.infos)


def per_move(cost: float, run: powermc.Run) -> str:
    """What a move cost; nothing to say where there was none."""
    return f"{cost / moves(run):,.3g}" if moves(run) else "-"


def comparison(plain: powermc.Run, early: powermc.Run, name: str) -> str:
    """What both runs computed, did and cost, one line each. Growth, which is the same work in both, is included."""
    runs = (plain, early)
    spans = sorted({span for run in runs for span in run.cost.spans})
    depths = sorted({depth for run in runs for depth in run.cost.heads})
    lines: list[tuple[str, Callable[[powermc.Run], str]]] = [
        ("kernel steps", lambda run: f"{sum(c.steps for chains in run.chains for c in chains):,}"),
        *((f"tokens run through layers {a}-{b}", lambda run, a=a, b=b: f"{run.cost.tokens(a, b):,}") for a, b in spans),
        *((f"states read by the head at {d}", lambda run, d=d: f"{run.cost.heads[d]:,}") for d in depths),
        ("sequential passes", lambda run: f"{run.cost.ticks:,}"),
        ("GFLOP", lambda run: f"{run.cost.flops / 1e9:,.4g}"),
        ("seconds", lambda run: f"{run.seconds:,.1f}"),
        ("moves that changed the path", lambda run: f"{moves(run):,}"),
        ("GFLOP per move", lambda run: per_move(run.cost.flops / 1e9, run)),
        ("seconds per move", lambda run: per_move(run.seconds, run)),
        ("mean log p of the last paths", lambda run: f"{sum(p.sum() for p in run.log_p) / len(run.log_p[0]):,.2f}"),
    ]
    rows = [("", "plain MH", name), *((what, show(plain), show(early)) for what, show in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def stages(run: powermc.Run) -> str:
    """What the stages did."""
    counts = run.stages
    assert counts is not None
    return (
        f"stage 1 let {counts.passed} of {counts.screened} proposals through and saved {counts.saved} completions; "
        f"stage 2 accepted {counts.accepted} of them; {counts.plain} plain steps"
    )


def note(text: str) -> None:
    """Say on standard error what is being done."""
    print(f"powermc: {text}", file=sys.stderr, flush=True)


def run(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "texts", nargs="?", type=Path, help="JSONL of calibration text (default: the model's own samples)"
    )
    parser.add_argument("--prompts", type=Path, help="JSONL of prompts (default: three questions that ship with it)")
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, hub id, or smollm2 (default)")
    parser.add_argument("--limit", type=int, default=100, help="calibrate on the first so many texts (default 100)")
    parser.add_argument("--layers", default="20,24", help="exit after these layers (default 20,24 of SmolLM2's 30)")
    parser.add_argument("--alpha", type=float, default=4.0, help="power of the target (default 4)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer (default 48)")
    parser.add_argument("--steps", type=int, default=6, help="steps in the pilot and after each block (default 6)")
    parser.add_argument("--chains", type=int, default=2, help="chains per prompt (default 2)")
    parser.add_argument("--plain", type=float, default=0.1, help="share of plain full-depth steps (default 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args(arguments)
    if options.limit < 1:
        parser.error("--limit must be at least 1")

    # Everything that can be wrong without a model is found before one is loaded.
    common = {name: getattr(options, name) for name in ("alpha", "max_new_tokens", "steps", "chains", "seed")}
    piloted = {**common, "plain": options.plain, "proposals": ("exit", "substitution")}
    layers = layer_list(options.layers)
    texts = None if options.texts is None else read_texts(options.texts)[: options.limit]
    asked = [q.question for q in questions()] if options.prompts is None else read_prompts(options.prompts)
    check(**piloted, temperature=None, eta=None, delta=None)
    model = powermc.CausalLM.from_pretrained(options.model)

    # 1. Calibrate: a head per layer, and on text that was not fitted on, how close each comes to the full model.
    note(f"calibrating layers {options.layers} on {'its own samples' if texts is None else f'{len(texts)} texts'}")
    lens = powermc.calibrate(
        model, texts, layers=layers, tokens=None if texts else 10_000, alpha=options.alpha, seed=options.seed
    )
    print(f"{lens.table()}\n")

    # 2. Pilot: short chains of every choice from the same starts.
    found = pilot(
        model,
        [lens.exit(model, layer) for layer in lens.layers],
        [model.prompt(text) for text in asked],
        **piloted,
        kl={row.layer: row.kl for row in lens.report}.__getitem__,
        notify=lambda name: note(f"pilot of {name}"),
    )
    print(f"{found.table()}\n\n{found.verdict()}\n")

    # 3. Sample: the recommended exit, or the best of those that were not, beside plain Metropolis-Hastings.
    choice = found.top
    assert choice is not None
    plain, early = sample(model, asked, lens, choice, options, common)
    print(comparison(plain, early, choice.name))
    print(f"\n{stages(early)}")
    if early.early_exit["advice"]:
        print(f"note: {early.early_exit['advice']}")
    print("\nBoth runs have the same target; they differ in what a step costs and in how often it moves.")
    if plain.interrupted or early.interrupted:
        sys.exit(130)


def sample(
    model: powermc.CausalLM,
    prompts: Sequence[str],
    lens: powermc.Lens,
    choice: Choice,
    options: argparse.Namespace,
    common: dict[str, Any],
) -> tuple[powermc.Run, powermc.Run]:
    """The plain run and the screened one, with the same settings otherwise."""
    settings = {**common, "block_size": max(1, options.max_new_tokens // 2), "progress": True}
    note("sampling by plain MH")
    plain = powermc.power_sample(model, prompts, **settings)
    note(f"sampling by {choice.name}")
    early = powermc.power_sample(
        model,
        prompts,
        exit=lens,
        layer=choice.layer,
        proposal=choice.proposal or "exit",
        screen=choice.exponent,
        plain=options.plain,
        **settings,
    )
    return plain, early


def main() -> None:
    try:
        run()
    except powermc.PowermcError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
