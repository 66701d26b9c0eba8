"""Sums in a row by `tiny-reasoner`: the model as it is, sharpened token by token, and sharpened as a whole.

    python examples/09_tiny_reasoner.py
    python examples/09_tiny_reasoner.py --problems 500 --out tiny-reasoner.json --plot tiny-reasoner.svg

Held-out problems of the task `arithmetic`, answered by

- base: the model at temperature 1;
- low temperature: at 1/alpha, every token by itself;
- greedy: the likeliest token every time;
- power: p(x)^alpha by `powermc.power_sample`: an answer drawn at the low temperature, then kernel steps that cut it
  somewhere and propose another end, at the same temperature.

Shares of right answers have 95% intervals: Wilson's for one answer per problem, else the bootstrap over problems. The
column "written" is the share of answers that write the steps: there the methods differ. "tokens run" are those that
went through the layers. With the defaults it takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import powermc
from powermc import plots
from powermc.diagnostics import wilson
from powermc.evaluation import metrics, tasks
from powermc.evaluation.tasks.arithmetic import LENGTHS
from powermc.tuning import grown

GREEDY = 1e-3
"""A temperature so low that the likeliest token is drawn, unless another is within a thousandth of its probability."""
HORIZON = 64
"""Longer than any worked answer."""


@dataclass(frozen=True)
class Row:
    """A method's grades and which of its answers have the steps written, shape (problems, chains), and its cost.

    after: the share of right answers after each kernel step, shape (steps,); empty for a method without any.
    """

    name: str
    correct: np.ndarray
    written: np.ndarray
    seconds: float
    tokens: int
    after: np.ndarray

    def share(self, which: np.ndarray | slice = slice(None)) -> metrics.Interval:
        """Of right answers, with its interval."""
        correct = self.correct[which]
        if correct.shape[1] == 1:
            return metrics.Interval(correct.mean(), *wilson(correct.mean(), len(correct)))
        return metrics.bootstrap(metrics.exact_match(correct))


def measure(
    name: str, model: powermc.CausalLM, items: Sequence[tasks.Item], answers: Callable[[], list[list[list[str]]]]
) -> Row:
    """Run a method and grade what it answers: by problem and chain, the texts in the order they were drawn."""
    print(f"powermc: {name}", file=sys.stderr, flush=True)
    model.forget()
    before, begun = model.ledger.copy(), time.perf_counter()
    texts = answers()
    seconds, cost = time.perf_counter() - begun, model.ledger.since(before)
    task = tasks.get("arithmetic")
    right = [
        [[task.grade(item, text).correct for text in chain] for chain in chains]
        for item, chains in zip(items, texts, strict=True)
    ]
    correct = np.array(right)  # (problems, chains, draws)
    written = np.array([["=" in chain[-1] for chain in chains] for chains in texts])
    after = correct.mean(axis=(0, 1)) if correct.shape[2] > 1 else np.zeros(0)
    return Row(name, correct[..., -1], written, seconds, cost.decoded + cost.prefilled, after)


def compare(model: powermc.CausalLM, items: Sequence[tasks.Item], options: argparse.Namespace) -> list[Row]:
    """All methods on the same problems, with as many answers each."""
    asked = [tasks.get("arithmetic").prompt(item, "plain") for item in items]
    prompts = [model.prompt(text) for text in asked]
    space = model.space(HORIZON)

    def drawn(temperature: float) -> list[list[list[str]]]:
        paths = grown(model, space, prompts, temperature=temperature, chains=options.chains, seed=options.seed)
        texts = [[model.decode(path.tokens)] for path in paths]
        return [texts[i : i + options.chains] for i in range(0, len(texts), options.chains)]

    def power() -> list[list[list[str]]]:
        run = powermc.power_sample(
            model,
            asked,
            alpha=options.alpha,
            steps=options.steps,
            block_size=HORIZON,
            max_new_tokens=HORIZON,
            chains=options.chains,
            seed=options.seed,
            progress=True,
        )
        return [[[model.decode(path.tokens) for path in chain.draws] for chain in chains] for chains in run.chains]

    low = 1 / options.alpha
    return [
        measure("base", model, items, lambda: drawn(1.0)),
        measure("low temperature", model, items, lambda: drawn(low)),
        measure("greedy", model, items, lambda: drawn(GREEDY)),
        measure("power", model, items, power),
    ]


def lengths(items: Sequence[tasks.Item]) -> np.ndarray:
    """Steps of each problem."""
    return np.array([item.data["steps"] for item in items])


def table(rows: Sequence[Row], items: Sequence[tasks.Item]) -> str:
    """Markdown: shares of right answers by the number of steps and of all, what was written, and what it cost."""
    steps = [n for n in LENGTHS if (lengths(items) == n).any()]
    head = ["", *(f"{n} steps" for n in steps), "all", "95% interval", "written", "tokens run", "seconds"]
    lines = [f"| {' | '.join(head)} |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for row in rows:
        of = row.share()
        cells = [row.name, *(f"{row.share(lengths(items) == n).estimate:.1%}" for n in steps)]
        cells += [f"{of.estimate:.1%}", f"{of.low:.1%} to {of.high:.1%}", f"{row.written.mean():.1%}"]
        lines.append(f"| {' | '.join([*cells, f'{row.tokens:,}', f'{row.seconds:.1f}'])} |")
    return "\n".join(lines)


def differences(rows: Sequence[Row]) -> str:
    """Power against each other method on the same problems."""
    power = rows[-1]
    lines = []
    for row in rows[:-1]:
        found = metrics.compare(power.correct, row.correct).difference
        low, high = 100 * found.low, 100 * found.high
        lines.append(f"power - {row.name}: {100 * found.estimate:+.1f} points ({low:+.1f} to {high:+.1f})")
    return "\n".join(lines)


def plot(methods: Mapping[str, Any], path: Path) -> None:
    """Right answers by the number of steps, with intervals; and of power, by how many kernel steps it has taken.

    methods: those of `summary`, fresh or from its file.
    """
    plots.matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = [plots.GREY, "#c07a2c", plots.INK, plots.ACCENT]
    for i, ((name, found), colour) in enumerate(zip(methods.items(), colours, strict=True)):
        at = np.array([int(n) for n in found["by_steps"]])
        middle, *ends = np.array(list(found["by_steps"].values())).T
        errors = np.abs(np.array(ends) - middle)
        left.errorbar(at + 0.06 * (i - 1.5), middle, errors, marker="o", ms=4, capsize=2, color=colour, label=name)
        left.set_xticks(at)
        if found["after"]:
            right.plot([methods["low temperature"]["all"][0], *found["after"]], color=colour)
        else:
            right.axhline(found["all"][0], color=colour)
    left.set(xlabel="steps of the problem", ylabel="right answers", ylim=(0, 1.02))
    right.set(xlabel="kernel steps after a draw at the low temperature")
    left.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e6e8", linewidth=0.8)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, ncols=4, loc="outside upper center")
    plots.save(figure, path)


def run(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner", help="folder, hub id, or tiny-reasoner (default)")
    parser.add_argument("--problems", type=int, default=100, help="held-out problems (default 100)")
    parser.add_argument("--chains", type=int, default=1, help="answers per problem by each method (default 1)")
    parser.add_argument("--alpha", type=float, default=4.0, help="power of the target (default 4)")
    parser.add_argument("--steps", type=int, default=40, help="kernel steps of each chain (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of problems and chains (default 0)")
    parser.add_argument("--out", type=Path, help="write the shares to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw them into this file (.png, .svg)")
    options = parser.parse_args(arguments)
    for name in ("problems", "chains"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.alpha <= 0:
        parser.error("--alpha must be above 0")
    if options.plot is not None:
        plots.matplotlib()  # before the work: it may be missing

    model = powermc.CausalLM.from_pretrained(options.model)
    items = tasks.load(tasks.get("arithmetic"), limit=options.problems, seed=options.seed)
    rows = compare(model, items, options)
    print(f"{len(items)} held-out problems, {options.chains} answers each\n")
    print(f"{table(rows, items)}\n\n{differences(rows)}")
    found = summary(rows, items, options)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(found["methods"], options.plot)


def summary(rows: Sequence[Row], items: Sequence[tasks.Item], options: argparse.Namespace) -> dict[str, Any]:
    """What the table shows, JSON-able."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    shares = {
        row.name: {
            "all": row.share(),
            "by_steps": {str(n): row.share(lengths(items) == n) for n in LENGTHS if (lengths(items) == n).any()},
            "written": float(row.written.mean()),
            "tokens": row.tokens,
            "seconds": row.seconds,
            "after": row.after.tolist(),
        }
        for row in rows
    }
    return {"settings": settings, "methods": shares}


def main() -> None:
    try:
        run()
    except powermc.PowermcError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
