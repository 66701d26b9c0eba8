"""Sample a law that can be written down, and put the samples beside it.

    python examples/01_toy_target.py --out toy_target.png

A toy language model over three tokens (`a`, `b` and the end token `.`) with paths of up to four tokens: 31 paths, so
p(x)^2 can be computed by visiting them all. The same law is then sampled with the production kernel, and both are
printed side by side and plotted. Beside them stands what low temperature does to the same model: it sharpens each
token, and begins with `a` because p does, where p^2 sharpens whole paths and prefers the steady run of `b`.

Takes a few seconds.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from powermc import Length, Metropolis, Path, Power, SequenceProbability, Space, Suffix, sample
from powermc.testing import frequencies
from powermc.toy import TabularModel, exact_law

TOKENS = "ab."
ALPHA = 2.0

# Next-token probabilities of a, b and the end token, given the last token. After `a` everything is open, after `b`
# the model is nearly certain. The row of the end token is never used: a path stops there.
TABLE = np.array(
    [
        [0.40, 0.35, 0.25],  # after a
        [0.05, 0.85, 0.10],  # after b
        [1 / 3, 1 / 3, 1 / 3],  # after the end
        [0.60, 0.40, 0.00],  # at the start
    ]
)


def spelled(path: Path) -> str:
    """`ab.` for a path that ended, `abab~` for one that was cut by the horizon."""
    return "".join(TOKENS[token] for token in path.tokens) + ("" if path.finished else "~")


def total_variation(one: np.ndarray, other: np.ndarray) -> float:
    """Half the sum of |differences|: the share of probability that lies elsewhere."""
    return float(np.abs(one - other).sum() / 2)


def plot(
    file: str, labels: list[str], exact: np.ndarray, sampled: np.ndarray, error: np.ndarray, cold: np.ndarray
) -> None:
    """Bars for the exact law, points with two standard errors for the samples, open circles for low temperature."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    at = np.arange(len(labels))
    axes.bar(at, exact, width=0.7, color="#9ecae1", label=f"$p(x)^{ALPHA:g}$, exact")
    axes.errorbar(at, sampled, 2 * error, fmt="o", color="#08306b", ms=4, capsize=3, label="sampled, ± 2 std. errors")
    axes.plot(at, cold, "o", mfc="none", color="#d94801", label=f"token by token at temperature {1 / ALPHA:g}")
    axes.set_xticks(at, labels, family="monospace")
    axes.set_xlabel("path (. ended, ~ cut by the horizon)")
    axes.set_ylabel("probability")
    axes.set_title("The power distribution of a toy model")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="toy_target.png", help="where to save the plot (default toy_target.png)")
    parser.add_argument("--chains", type=int, default=16, help="independent chains, at least 2 (default 16)")
    parser.add_argument("--draws", type=int, default=1000, help="draws of each chain (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    options = parser.parse_args()
    if options.chains < 2:
        parser.error("--chains must be at least 2: the standard errors come from the spread between chains")

    # The model, the set of all its paths, and the exact law on them.
    model = TabularModel(TABLE, order=1)
    space = Space(eos=frozenset({TOKENS.index(".")}), horizon=4)
    law = exact_law(model, space)
    paths, exact = law.paths(space), law.power(ALPHA)

    # The same law by Markov chain Monte Carlo: cut the path somewhere, redraw the rest, accept or not.
    target = Power(SequenceProbability(model), ALPHA)
    kernel = Metropolis(target, Suffix(model, space, Length(), temperature=1 / ALPHA))
    drawn = sample(
        kernel, paths[0], draws=options.draws, chains=options.chains, warmup=options.draws // 10, seed=options.seed
    )
    by_chain = np.array([frequencies(values, paths) / len(values) for values in drawn.values])
    sampled = by_chain.mean(0)
    error = by_chain.std(0, ddof=1) / math.sqrt(options.chains)

    # Low temperature: every row sharpened on its own, which is another law altogether.
    sharp = TABLE**ALPHA / (TABLE**ALPHA).sum(1, keepdims=True)
    cold = exact_law(TabularModel(sharp, order=1), space).power(1.0)

    order = np.argsort(-exact)[:10]
    print(f"path    p        p^{ALPHA:g}      sampled           T = {1 / ALPHA:g}")
    for i in order:
        print(
            f"{spelled(paths[i]):6}  {math.exp(law.log_p[i]):.4f}   {exact[i]:.4f}   "
            f"{sampled[i]:.4f} ± {error[i]:.4f}   {cold[i]:.4f}"
        )
    # |sampled - exact| of a path is on average sqrt(2 / pi) of its standard error if nothing but chance is at work.
    chance = error.sum() / 2 * math.sqrt(2 / math.pi)
    accepted, changed = (drawn.infos[name].mean() for name in ("accepted", "changed"))
    print(f"\nmoves accepted {accepted:.2f}, accepted and different from before {changed:.2f}")
    print(f"total variation from p^{ALPHA:g}:")
    print(f"  sampled {total_variation(sampled, exact):.4f} (chance alone would give about {chance:.4f})")
    print(f"  token by token at temperature {1 / ALPHA:g}: {total_variation(cold, exact):.4f}\n")

    plot(options.out, [spelled(paths[i]) for i in order], exact[order], sampled[order], error[order], cold[order])
    print(f"plot: {options.out}")


if __name__ == "__main__":
    main()
