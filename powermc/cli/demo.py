"""`powermc sample --demo`: a few questions that the model can be asked, and what happens to them in plain words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from powermc.cli.show import names, say, texts
from powermc.evaluation import last_number
from powermc.evaluation.tasks import arithmetic
from powermc.models import TINY_REASONER
from powermc.power import power_sample
from powermc.progress import Parts
from powermc.results import Run
from powermc.sequences import default_temperature
from powermc.settings import Settings

if TYPE_CHECKING:
    from powermc.lm import CausalLM

SETTINGS: dict[str, Any] = {"max_new_tokens": 96, "steps": 3}
"""Smaller than the defaults: about a minute on two cores with SmolLM2-135M, for the plain run."""
SUMS: dict[str, Any] = {"max_new_tokens": 64, "block_size": 16}
"""For `tiny-reasoner`: answers are short, and seconds are enough."""

_SUMS_ASKED, _SUMS_TO_CALIBRATE = 4, 400

_EXIT_SHARE = 0.8
"""Of the layers, below the exit."""


class Question(NamedTuple):
    """A question and its reference solution, which ends with "#### " and the answer."""

    question: str
    answer: str


def questions() -> list[Question]:
    """The grade-school questions that ship with the package."""
    text = resources.files("powermc").joinpath("data", "demo_questions.jsonl").read_text(encoding="utf-8")
    return [Question(**json.loads(line)) for line in text.splitlines()]


def asked(model: str) -> list[Question]:
    """The questions for a model, by its name. `tiny-reasoner` gets held-out problems of the kind it was trained on."""
    if model != TINY_REASONER:
        return questions()
    return [Question(item.question, item.solution) for item in arithmetic.generate(_SUMS_ASKED, seed=0)]


def settings(model: str) -> dict[str, Any]:
    """The demo's own settings for a model."""
    return SUMS if model == TINY_REASONER else SETTINGS


def calibration_texts(model: str) -> list[dict[str, str]]:
    """What its exit is calibrated on."""
    if model != TINY_REASONER:
        return shipped_texts()
    problems = arithmetic.training_problems(_SUMS_TO_CALIBRATE, seed=0)
    return [{"prompt": problem.question, "completion": f"\n{problem.solution}"} for problem in problems]


def shipped_texts() -> list[dict[str, str]]:
    """Prompts and what SmolLM2 wrote on them at temperature 1: enough to calibrate one exit of a small model on."""
    text = resources.files("powermc").joinpath("data", "calibration_texts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if json.loads(line)["completion"].strip()]


def introduce(out: Console, model: str, settings: Settings) -> None:
    """Say what is about to happen."""
    count, kind = len(asked(model)), "sums in a row" if model == TINY_REASONER else "grade-school maths questions"
    temperature = default_temperature(settings.alpha) if settings.temperature is None else settings.temperature
    say(
        out,
        f"powermc demo: {count} {kind} for a small language model, {model}.\n\n"
        "A low temperature sharpens every token by itself. "
        f"The power distribution p(x)^{settings.alpha:g} sharpens whole answers: one that is twice as probable under "
        f"the model is drawn {2**settings.alpha:g} times as often. It cannot be drawn token by token, so each chain "
        f"extends its answer by {settings.block_size} tokens, drawn at temperature {temperature:g}, and then proposes "
        f"{settings.steps} times to cut it somewhere and to write the rest anew. The Metropolis-Hastings rule decides "
        f"which version stays. Then come the next {settings.block_size} tokens, up to {settings.max_new_tokens}.\n\n"
        "The rule is exact: run for long, it draws answers in proportion to p(x)^alpha, whatever the proposals. "
        f"Here it runs for a short while, {settings.chains} chains per question, all in one batch.\n",
    )


def conclude(out: Console, run: Run, model: str) -> None:
    """Print the answers, the reference and the majority of the chains, and the summary."""
    put = asked(model)
    right = 0
    for p, (question, answers) in enumerate(zip(put, run.answers(last_number), strict=True)):
        reference = last_number(question.answer)
        say(out, f"Question {p + 1} of {len(put)}", "bold")
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
    say(out, f"{right} of {len(put)} majority answers are right.\n", "bold")
    say(out, run.summary())
    say(
        out,
        "\nAn accepted proposal can be the answer that was there already; the last column counts those that were not. "
        'Your own question: powermc sample "..."',
    )


def early_exit(out: Console, model: CausalLM, plain: Run, name: str, given: Mapping[str, Any], *, quiet: bool) -> Run:
    """Answer the same questions by an early exit, and print what either run computed. Calibrates first."""
    from powermc.lm import calibrate

    say(out, "\nThe same by an early exit", "bold")
    say(
        out,
        "So far every proposal went through all layers, the rejected ones too. Now a middle layer of the same model "
        "writes and screens the proposals; the layers above complete only what passes, and a second test makes up for "
        "whatever the middle layer got wrong. The distribution is the same. Whether it is cheaper depends on how well "
        "the middle layer knows what the last one will say.\n\n"
        f"First it is calibrated, here on a little text {_source(name)}.\n",
    )
    layer = max(1, round(_EXIT_SHARE * model.depth))
    texts = [
        (*model.prompt(text["prompt"]).ids, *model.text.encode(text["completion"], False))
        for text in calibration_texts(name)
    ]
    with Parts(quiet=quiet) as display:
        lens = calibrate(model, texts, layers=[layer], progress=display.report)
    say(out, lens.table() + "\n")
    run = power_sample(
        model, [q.question for q in asked(name)], **{**given, "exit": lens, "kernel": "early-exit"}, progress=not quiet
    )
    facts, stages = run.early_exit, run.stages
    assert stages is not None
    say(out, comparison(plain, run, f"exit {facts['layer']}") + "\n")
    say(
        out,
        f"Stage 1 turned down {stages.saved} of {stages.screened} proposals before the upper layers were asked, stage "
        f"2 accepted {stages.accepted} of the {stages.passed} others, and {stages.plain} steps were plain ones. "
        "So short a run says little of which is cheaper; powermc pilot measures that.",
    )
    return run


def _source(model: str) -> str:
    own, shipped = "of the kind it was trained on", "that SmolLM2 wrote and that ships with powermc"
    return own if model == TINY_REASONER else shipped


def comparison(plain: Run, early: Run, name: str) -> str:
    """What two runs computed and did, and what a move cost, line by line; growth, which is alike in both, included."""
    runs = (plain, early)
    moves = {id(run): sum(int(info["changed"].sum()) for info in run.infos) for run in runs}

    def per_move(run: Run, cost: float) -> str:
        return f"{cost / moves[id(run)]:,.3g}" if moves[id(run)] else "-"

    def log_p(run: Run) -> str:
        last = [path.log_prob for paths in run.paths for path in paths if path is not None]
        return f"{sum(last) / len(last):,.2f}" if last else "-"

    spans = sorted({span for run in runs for span in run.cost.spans})
    depths = sorted({depth for run in runs for depth in run.cost.heads})
    lines: list[tuple[str, Callable[[Run], str]]] = [
        ("kernel steps", lambda run: f"{sum(chain.steps for chains in run.chains for chain in chains):,}"),
        *((f"tokens run through layers {a}-{b}", lambda run, at=(a, b): f"{run.cost.tokens(*at):,}") for a, b in spans),
        *((f"states read by the head at {d}", lambda run, d=d: f"{run.cost.heads[d]:,}") for d in depths),
        ("sequential passes", lambda run: f"{run.cost.ticks:,}"),
        ("GFLOP", lambda run: f"{run.cost.flops / 1e9:,.4g}"),
        ("seconds", lambda run: f"{run.seconds:,.1f}"),
        ("moves that changed the path", lambda run: f"{moves[id(run)]:,}"),
        ("GFLOP per move", lambda run: per_move(run, run.cost.flops / 1e9)),
        ("seconds per move", lambda run: per_move(run, run.seconds)),
        ("mean log p of the last paths", log_p),
    ]
    rows = [("", "plain MH", name), *((what, show(plain), show(early)) for what, show in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)
