"""Early exit from start to end: calibrate, pilot, sample, and put the screened run beside a plain one.

    python examples/04_early_exit.py texts.jsonl

Each line of the file is a string, or an object with "text", or with "question" and "answer", as in GSM8K. Heads are
fitted to the first 100 of them; without a file the model writes its own text. The pilot then runs short chains of every
exit on three questions that ship with powermc, and says which one pays, if any. If none does, the best of them is run
all the same, so that you see by how much it does not.

With SmolLM2-135M it takes several minutes on two cores; --layers 24 --max-new-tokens 24 took three.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import powermc
from powermc.cli.calibrate import layer_list, read_texts
from powermc.cli.demo import comparison, questions
from powermc.cli.sample import read_prompts
from powermc.evaluation.pilot import Choice, check, pilot


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
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default 32)")
    parser.add_argument("--steps", type=int, default=4, help="steps in the pilot and after each block, at least 4")
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
