"""Compare ways of answering questions: how often each is right, and what it costs.

    python examples/05_compare_methods.py
    python examples/05_compare_methods.py gsm8k --data gsm8k.jsonl --model smollm2 --limit 5 --max-new-tokens 96

By default a model of 1.3 million parameters that ships with powermc does sums in a row. The folder keeps what is
finished: the same command goes on after a kill, also with more questions or methods. `powermc eval` does the same from
the command line; docs/evaluation.md says what the columns mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import powermc
from powermc.evaluation import tasks
from powermc.evaluation.comparison import Plan, Source, compare, write
from powermc.evaluation.comparison.plan import specs_of
from powermc.evaluation.comparison.table import markdown
from powermc.evaluation.methods import Terms
from powermc.progress import Parts

METHODS = "greedy,temperature,low-temperature,power:steps=4:block_size=16,self-consistency"


def run() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", nargs="?", default="arithmetic", help=f"one of {', '.join(tasks.names())}")
    parser.add_argument("--data", type=Path, help="the task's file, if it is not generated")
    parser.add_argument("--model", default="tiny-reasoner", help="folder, .gguf file, hub id (default tiny-reasoner)")
    parser.add_argument("--limit", type=int, default=20, help="questions (default 20)")
    parser.add_argument("--methods", default=METHODS, help=f"specs with commas between (default {METHODS})")
    parser.add_argument("--alpha", type=float, default=4.0, help="power of the target (default 4)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default 64)")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder (default comparison)")
    options = parser.parse_args()

    plan = Plan(
        task=tasks.get(options.task),
        items=tasks.load(options.task, options.data, limit=options.limit),
        specs=specs_of(options.methods),
        terms=Terms(max_new_tokens=options.max_new_tokens, alpha=options.alpha),
    )
    with Parts() as display:
        outcome = compare(plan, Source(options.model, {}), options.out, display=display)
    shown, remarks = write(options.out)
    print(markdown(shown))
    for remark in remarks:
        print(f"note: {remark}")
    print(f"{outcome.units} units were done in this session; the page is {options.out / 'index.html'}")
    if outcome.interrupted:
        raise SystemExit(130)


def main() -> None:
    try:
        run()
    except powermc.PowermcError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
