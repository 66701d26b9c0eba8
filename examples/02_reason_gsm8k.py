"""Answer grade-school maths questions from p(x)^alpha, by the majority of several chains.

    python examples/02_reason_gsm8k.py questions.jsonl --limit 5

Each line of the file is an object with "question" and "answer", as in GSM8K; the reference is the last number of
"answer". With the defaults and a 135M model a question takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys

import powermc
from powermc.evaluation import last_number


def read(path: str, limit: int) -> list[tuple[str, str]]:
    """(question, reference answer) of the first `limit` lines."""
    pairs: list[tuple[str, str]] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(pairs) == limit:
                break
            try:
                entry = json.loads(line)
                question, reference = entry["question"], last_number(entry["answer"])
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"error: {path}, line {number}: needs 'question' and 'answer' ({error!r})") from None
            if reference is None:
                raise SystemExit(f"error: {path}, line {number}: the answer holds no number")
            pairs.append((question, reference))
    if not pairs:
        raise SystemExit(f"error: {path} holds no questions")
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", help="JSONL with 'question' and 'answer'")
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, hub id, or smollm2 (default)")
    parser.add_argument("--limit", type=int, default=3, help="questions to answer (default 3)")
    parser.add_argument("--alpha", type=float, default=4.0, help="power of the target (default 4)")
    parser.add_argument("--chains", type=int, default=4, help="chains per question (default 4)")
    parser.add_argument("--steps", type=int, default=4, help="kernel steps per block (default 4)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer (default 96)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args()

    try:
        pairs = read(options.file, options.limit)
    except OSError as error:
        raise SystemExit(f"error: cannot read {options.file}: {error.strerror}") from None

    # All questions and chains run in one batch; `run` keeps every step of every chain.
    try:
        run = powermc.power_sample(
            options.model,
            [question for question, _ in pairs],
            alpha=options.alpha,
            chains=options.chains,
            steps=options.steps,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            progress=True,
        )
    except powermc.PowermcError as error:
        raise SystemExit(f"error: {error}") from None

    right_chains = right_majorities = 0
    for (question, reference), votes in zip(pairs, run.answers(last_number), strict=True):
        majority = votes.most_common(1)[0][0] if votes else None
        right_chains += votes[reference]
        right_majorities += majority == reference
        print(f"{'right' if majority == reference else 'wrong'}  majority {majority}, reference {reference}, ", end="")
        print(f"votes {dict(votes)}  {question[:60]}...")

    n = len(pairs)
    print(f"\nmajority answers right: {right_majorities} of {n} ({right_majorities / n:.0%})")
    print(f"single chains right: {right_chains} of {n * options.chains} ({right_chains / (n * options.chains):.0%})")
    print(f"\n{run.summary()}")
    if run.interrupted:
        sys.exit(130)


if __name__ == "__main__":
    main()
