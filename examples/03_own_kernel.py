"""Write a kernel of your own, prove it, and see the proof fail when a term is dropped.

    python examples/03_own_kernel.py

The kernel replaces one token of a path and keeps the rest. The new token comes from a fixed list of word frequencies,
so frequent tokens are proposed more often than rare ones, and the acceptance ratio must take that back. The second
kernel forgets to. Its samples would look plausible; the harness needs no samples to see it.

Takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from powermc import Length, Metropolis, Mixture, Path, Power, SequenceProbability, Space, State, Suffix, Target
from powermc.testing import assert_streams, paths_of, prove
from powermc.toy import TabularModel
from powermc.types import Choices, Field, Fields, Info, Steps, evaluate, start


@dataclass(frozen=True)
class ReplaceToken:
    """Draw a position, redraw its token from `frequencies`, keep all others; Metropolis-Hastings.

    The end token neither is replaced nor comes in, so the length stays (with a stop rule the result might be no path,
    and would have to be rejected). A move from token a to token b is proposed with probability proportional to f(b)
    and taken back with f(a), hence

        log r = log pi(y) - log pi(x) + log f(a) - log f(b).
    """

    target: Target[Path]
    space: Space
    frequencies: Sequence[float]

    @property
    def fields(self) -> Fields:
        """What `step` reports, with types, so that a run can store it."""
        return {"accepted": Field("bool", False), "position": Field("int32", -1)}

    def init(self, value: Path) -> Steps[State[Path]]:
        """The state to begin with: the value, and log pi of it."""
        return start(self.target, value)

    def step(self, choices: Choices, state: State[Path]) -> Steps[tuple[State[Path], Info]]:
        """One transition of one chain. `yield from` lets a language model answer for many chains at once."""
        x = state.value
        places = len(x) - (x.tokens[-1] in self.space.eos)
        if places == 0:
            return state, {"accepted": False}
        position = choices.at("position").integers(places)
        token = choices.at("token").categorical(self.log_weights())
        tokens = (*x.tokens[:position], token, *x.tokens[position + 1 :])

        y, log_density = yield from evaluate(self.target, self.space.path(x.prompt, tokens))
        log_ratio = log_density - state.log_density + self.log_hastings(x.tokens[position], token)
        accepted = choices.at("accept").level().below(log_ratio)
        return (State(y, log_density) if accepted else state), {"accepted": accepted, "position": position}

    def log_weights(self) -> np.ndarray:
        """log f, the end tokens left out."""
        weights = np.array(self.frequencies, dtype=float)
        weights[list(self.space.eos)] = 0.0
        with np.errstate(divide="ignore"):
            return np.log(weights)

    def log_hastings(self, old: int, new: int) -> float:
        """log q(x | y) - log q(y | x)."""
        return float(np.log(self.frequencies[old]) - np.log(self.frequencies[new]))


class Forgetful(ReplaceToken):
    """The same kernel with a dropped term: takes the proposal for symmetric."""

    def log_hastings(self, old: int, new: int) -> float:
        return 0.0


def main() -> None:
    model = TabularModel.random(0, vocab_size=3, order=2, concentration=0.5)
    space = Space(eos=frozenset({2}), horizon=3)
    target = Power(SequenceProbability(model), alpha=2.0)
    frequencies = (0.7, 0.2, 0.1)

    # Replacing tokens never changes the length, so a companion must: a mixture of both reaches every path.
    redraw = Metropolis(target, Suffix(model, space, Length(), temperature=0.5))
    kernel = Mixture([ReplaceToken(target, space, frequencies), redraw], [0.5, 0.5])

    # The proof, in three lines: list the space, enumerate every outcome of every random choice, check every law.
    paths = paths_of(space, vocab_size=3)
    proved = prove(kernel, paths)
    outcomes = sum(len(leaves) for leaves in proved.leaves)

    gap = np.abs(proved.pi @ proved.matrix - proved.pi).max()
    print(f"proved on {len(proved.values)} paths, {outcomes} outcomes enumerated: |pi P - pi| <= {gap:.0e}")
    report = assert_streams(kernel, paths, n=1000)
    print(
        f"{report.verdict.rounds[-1].n} chains with production random numbers agree: "
        f"a total variation of {report.detectable:.2f} would have shown"
    )

    # The same with a dropped term.
    wrong = Mixture([Forgetful(target, space, frequencies), redraw], [0.5, 0.5])
    try:
        prove(wrong, paths)
    except AssertionError as error:
        print(f"caught without the Hastings term: {error}")
    else:
        raise SystemExit("error: the harness let a wrong kernel pass")


if __name__ == "__main__":
    main()
