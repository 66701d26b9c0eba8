"""`powermc sample --demo`: three questions that ship with the package, and what happens to them in plain words."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, NamedTuple

from rich.console import Console

from powermc.cli.show import names, say, texts
from powermc.evaluation import last_number
from powermc.results import Run
from powermc.sequences import default_temperature
from powermc.settings import Settings

SETTINGS: dict[str, Any] = {"max_new_tokens": 96, "steps": 4}
"""Smaller than the defaults: about a minute on two cores with SmolLM2-135M."""


class Question(NamedTuple):
    """A question and its reference solution, which ends with "#### " and the answer."""

    question: str
    answer: str


def questions() -> list[Question]:
    """The questions that ship with the package."""
    text = resources.files("powermc").joinpath("data", "demo_questions.jsonl").read_text(encoding="utf-8")
    return [Question(**json.loads(line)) for line in text.splitlines()]


def introduce(out: Console, model: str, settings: Settings) -> None:
    """Say what is about to happen."""
    temperature = default_temperature(settings.alpha) if settings.temperature is None else settings.temperature
    say(
        out,
        f"powermc demo: {len(questions())} grade-school maths questions for a small language model, {model}.\n\n"
        "A low temperature sharpens every token by itself. "
        f"The power distribution p(x)^{settings.alpha:g} sharpens whole answers: one that is twice as probable under "
        f"the model is drawn {2**settings.alpha:g} times as often. It cannot be drawn token by token, so each chain "
        f"extends its answer by {settings.block_size} tokens, drawn at temperature {temperature:g}, and then proposes "
        f"{settings.steps} times to cut it somewhere and to write the rest anew. The Metropolis-Hastings rule decides "
        f"which version stays. Then come the next {settings.block_size} tokens, up to {settings.max_new_tokens}.\n\n"
        "The rule is exact: run for long, it draws answers in proportion to p(x)^alpha, whatever the proposals. "
        f"Here it runs for a minute or two, {settings.chains} chains per question, all in one batch.\n",
    )


def conclude(out: Console, run: Run) -> None:
    """Print the answers, the reference and the majority of the chains, and the summary."""
    asked = questions()
    right = 0
    for p, (question, answers) in enumerate(zip(asked, run.answers(last_number), strict=True)):
        reference = last_number(question.answer)
        say(out, f"Question {p + 1} of {len(asked)}", "bold")
        say(out, question.question + "\n", indent=2)
        texts(out, run, p, indent=2)
        given = [(c, last_number(chain.text or "")) for c, chain in enumerate(run.chains[p]) if run.whole(p, c)]
        by_answer: dict[str | None, list[int]] = {}
        for c, answer in given:
            by_answer.setdefault(answer, []).append(c)
        votes = [f"{answer or 'no number'} ({names('chain', chains)})" for answer, chains in by_answer.items()]
        say(out, f"Last number of each answer: {'; '.join(votes) if votes else 'none finished'}", indent=2)
        top = answers.most_common(2)
        if not top or (len(top) == 2 and top[0][1] == top[1][1]):
            say(out, f"Majority answer: none. Reference answer: {reference}.\n", "bold yellow", indent=2)
            continue
        majority, count = top[0]
        good = majority == reference
        right += good
        votes_for = f"{majority} ({count} of {len(run.chains[p])} chains)"
        verdict = f"Reference answer: {reference}. {'Right' if good else 'Wrong'}."
        style = "bold green" if good else "bold yellow"
        say(out, f"Majority answer: {votes_for}. {verdict}\n", style, indent=2)
    say(out, f"{right} of {len(asked)} majority answers are right.\n", "bold")
    say(out, run.summary())
    say(
        out,
        "\nAn accepted proposal can be the answer that was there already; the last column counts those that were not. "
        'Your own question: powermc sample "..."',
    )
