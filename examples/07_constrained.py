"""Constraints as a reward: Countdown answers from p(x)^alpha exp(reward(x)), beside p(x)^alpha and low temperature.

    python examples/07_constrained.py --limit 2

A Countdown question asks for an expression of given numbers. The reward says how well a text keeps to them, whatever
its value is; the target is then exactly p(x)^alpha exp(reward(x)), and every step leaves it invariant. First the reward
goes into `power_sample`; then the same sampler is made a method of a comparison, in the few lines of `Rewarded`.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import powermc
from powermc.evaluation import methods, tasks
from powermc.evaluation.comparison import Plan, compare, load, write
from powermc.evaluation.comparison.table import markdown
from powermc.evaluation.methods import Answer, Answers, Method, Question, Terms
from powermc.evaluation.tasks.countdown import expression


def numbers_of(question: str) -> Counter[str]:
    """The numbers that the last question of a prompt gives."""
    given = re.findall(r"Numbers: ([\d, ]+)\.", question)
    return Counter(re.findall(r"\d+", given[-1])) if given else Counter()


@dataclass(frozen=True)
class Keeps:
    """A reward of a text, nats, at most 0: minus `weight` per number that is missing, foreign or used too often."""

    given: Counter[str]
    weight: float

    def __call__(self, text: str) -> float:
        used = Counter(re.findall(r"\d+", expression(text) or ""))
        return -self.weight * ((self.given - used).total() + (used - self.given).total())


@methods.register
@dataclass(frozen=True)
class Rewarded(Method):
    """`power_sample` with the reward of each question: one call per question, as each has a reward of its own."""

    name: ClassVar[str] = "rewarded"
    about: ClassVar[str] = "p(x)^alpha exp(reward(x)) by Metropolis-Hastings"

    weight: float = 4.0
    steps: int = 2
    block_size: int = 32

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        before, rows, counts = model.ledger.copy(), [], Counter[str]()
        for question in questions:
            run = rewarded(model, question.prompt, terms, self.weight, self.steps, self.block_size, samples)
            paths = [path for path in run.paths[0] if path is not None]
            texts = [text or "" for text in run.texts[0]]
            rows.append([Answer(p.tokens, text, p.log_prob) for p, text in zip(paths, texts, strict=True)])
            counts["steps"] += sum(chain.steps for chain in run.chains[0])
            counts["accepted"] += int(run.infos[0]["accepted"].sum())
            counts["changed"] += int(run.infos[0]["changed"].sum())
        return Answers(rows, model.ledger.since(before), counts)


def rewarded(
    model: Any, prompt: Any, terms: Terms, weight: float, steps: int, block_size: int, samples: range
) -> powermc.Run:
    """Chains on p(x)^alpha exp(reward(x)) for one prompt."""
    return powermc.power_sample(
        model,
        [prompt],
        alpha=terms.alpha,
        max_new_tokens=terms.max_new_tokens,
        stop=terms.stop,
        seed=terms.seed,
        reward=Keeps(numbers_of(prompt.text), weight),
        reward_at_most=0.0,  # so that proposals can still be rejected early
        steps=steps,
        block_size=block_size,
        chains=len(samples),
        first_chain=samples.start,
    )


def run() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, hub id (default smollm2)")
    parser.add_argument("--limit", type=int, default=2, help="questions (default 2)")
    parser.add_argument("--weight", type=float, default=4.0, help="nats per number that is wrong (default 4)")
    parser.add_argument("--alpha", type=float, default=2.0, help="power of the target (default 2)")
    parser.add_argument("--steps", type=int, default=2, help="kernel steps per block (default 2)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer (default 48)")
    parser.add_argument("--out", type=Path, default=Path("constrained"), help="folder (default constrained)")
    options = parser.parse_args()

    # One worked example shows the format: small models do not guess it.
    items, terms = tasks.load("countdown", limit=options.limit), Terms(options.max_new_tokens, (), options.alpha)
    shots = tuple(tasks.COUNTDOWN.generate(1, 1)) if tasks.COUNTDOWN.generate else ()
    own = f"rewarded:weight={options.weight:g}:steps={options.steps}"
    plan = Plan(tasks.COUNTDOWN, items, ["low-temperature", f"power:steps={options.steps}", own], terms, shots=shots)
    model = powermc.CausalLM.from_pretrained(options.model)
    plan = plan.settled(model)

    # 1. A reward in power_sample.
    prompt = plan.prompts(model)[0]
    found = rewarded(model, prompt, plan.terms, options.weight, options.steps, 32, range(2))
    reward = Keeps(numbers_of(prompt.text), options.weight)
    print(f"{items[0].question} Two chains on p(x)^{options.alpha:g} exp(reward):")
    for text in found.texts[0]:
        print(f"  reward {reward(text or ''):.0f} nats: {' '.join((text or '').split())[:70]!r}")

    # 2. The same as a method among others.
    compare(plan, model, options.out)
    shown, _ = write(options.out)
    print(f"\n{markdown(shown)}")
    for line in load(options.out).lines:
        kept = [Keeps(numbers_of(items[q].question), 1.0)(given.text) for (q, _), given in line.answers.items()]
        print(f"numbers used wrongly per answer of {line.spec}: {-sum(kept) / len(kept):.1f}")


def main() -> None:
    try:
        run()
    except powermc.PowermcError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
