"""Whether guessing tokens makes a model's plain chains faster here: the same steps, timed with guesses and without.

What is drawn does not depend on guesses (`powermc.lm.guesses`), so that seconds are all there is to compare. They
depend on the text, as guesses are looked up in earlier drafts of it, and on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powermc.choices import Stream
from powermc.kernels import Metropolis
from powermc.scheduling import Failed, drive
from powermc.sequences import Length, Path, Prompt, SequenceProbability, Suffix, default_temperature
from powermc.targets import Power
from powermc.tuning import grown
from powermc.types import Steps

if TYPE_CHECKING:
    from powermc.lm import CausalLM

CLEAR = 1.1
"""Guessing is recommended only if the same steps take this many times as long without."""
MOST_ROWS = 4
"""More rows than this leave no room for guesses (`powermc.lm.guesses.share`)."""
TOKENS = (3, 7)
_ROUNDS, _STEPS = 2, 4


@dataclass(frozen=True)
class Guesses:
    """Seconds of the same steps by number of tokens guessed; 0: none. The least of the rounds, run in turns."""

    seconds: dict[int, float]

    @property
    def best(self) -> int:
        """How many to guess; 0 unless it is clearly faster."""
        fastest = min(self.seconds, key=lambda n: self.seconds[n])
        return fastest if self.gain(fastest) > CLEAR else 0

    def gain(self, tokens: int) -> float:
        """How many times as long the steps take without guesses."""
        return self.seconds[0] / self.seconds[tokens]

    def verdict(self) -> str:
        """What was found, in words."""
        ratios = ", ".join(f"{n} tokens {self.gain(n):.2f} times" for n in self.seconds if n)
        chosen = f"guessing {self.best}" if self.best else "guessing none"
        return f"{chosen}: as fast as without guesses, with {ratios}."


def guessing(
    model: CausalLM,
    prompts: Sequence[Prompt],
    *,
    alpha: float,
    temperature: float | None,
    max_new_tokens: int,
    chains: int,
    seed: int,
    tokens: Sequence[int] = TOKENS,
) -> Guesses:
    """Time plain Metropolis-Hastings on whole paths of these prompts, with each number of guesses and with none.

    Every run begins with nothing left of the others but the paths themselves. Raises the first `ChainError`.
    """
    heat = default_temperature(alpha) if temperature is None else temperature
    space = model.space(max_new_tokens)
    starts = grown(model, space, prompts, temperature=heat, chains=chains, seed=seed)
    kernel = Metropolis(Power(SequenceProbability(model), alpha), Suffix(model, space, Length(), heat))

    def program(start: Path, stream: Stream) -> Steps[None]:
        state = yield from kernel.init(start)
        for i in range(_STEPS):
            state, _ = yield from kernel.step(stream.step(i).at("guessing"), state)
            yield i

    def timed(n: int) -> float:
        model.forget()
        programs = (
            (i, program(start, Stream(seed, prompt=start.prompt.key, chain=i % chains)))
            for i, start in enumerate(starts)
        )
        with model.engine.guessing(n):
            begun = time.perf_counter()
            for outcome in drive(programs, active=model.max_rows):
                if isinstance(outcome, Failed):
                    raise outcome.error
            return time.perf_counter() - begun

    widths = (0, *tokens)
    rounds = [{n: timed(n) for n in widths} for _ in range(_ROUNDS)]
    return Guesses({n: min(seconds[n] for seconds in rounds) for n in widths})
