"""Write Python functions, run them against their tests, and count how many pass: pass@k on HumanEval.

    python examples/06_code_humaneval.py HumanEval.jsonl.gz --limit 3

The programs are a model's own: each runs confined, without network and with limits on time and memory (docs/tasks.md,
"What is contained"); where that is not possible, this says so and runs none. A model as small as SmolLM2-135M solves
hardly any problem.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import powermc
from powermc.evaluation import tasks
from powermc.evaluation.comparison import Plan, Source, compare, load, write
from powermc.evaluation.comparison.figures import kinds
from powermc.evaluation.comparison.plan import specs_of
from powermc.evaluation.comparison.table import markdown
from powermc.evaluation.methods import Terms
from powermc.progress import Parts


def run() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="HumanEval.jsonl, maybe with .gz")
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, hub id (default smollm2)")
    parser.add_argument("--dtype", default="float32", help="of the model's weights (default float32)")
    parser.add_argument("--limit", type=int, default=3, help="problems (default 3)")
    parser.add_argument("--samples", type=int, default=2, help="programs per problem and method (default 2)")
    parser.add_argument("--methods", default="temperature,power:steps=2", help="(default temperature,power:steps=2)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer (default 96)")
    parser.add_argument("--out", type=Path, default=Path("humaneval"), help="folder (default humaneval)")
    options = parser.parse_args()

    plan = Plan(
        task=tasks.HUMANEVAL,
        items=tasks.load(tasks.HUMANEVAL, options.data, limit=options.limit),
        specs=specs_of(options.methods),
        terms=Terms(max_new_tokens=options.max_new_tokens),
        samples=options.samples,
    )
    with Parts() as display:
        compare(plan, Source(options.model, {"dtype": options.dtype}), options.out, display=display)
    shown, _ = write(options.out, pass_at=sorted({1, options.samples}))
    print(markdown(shown))
    for line in load(options.out).lines:
        found = ", ".join(f"{kind} {n}" for kind, n in kinds(line).most_common())
        print(f"what became of the programs of {line.spec}: {found}")


def main() -> None:
    try:
        run()
    except powermc.PowermcError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
