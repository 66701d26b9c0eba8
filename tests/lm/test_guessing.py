"""Whether guesses pay: measured, recommended only where clear, in force for the run alone, and no draw changed."""

from __future__ import annotations

from typing import Any

import pytest

from powermc import power_sample
from powermc.evaluation import guessing as module
from powermc.evaluation.guessing import Guesses, guessing
from powermc.lm import CausalLM
from powermc.lm.guesses import Lookup
from powermc.lm.heads import ExitHead
from powermc.sequences import Prompt
from tests.lm.families import tiny_model
from tests.lm.lenses import lens_of

SMALL: dict[str, Any] = {"alpha": 2.0, "max_new_tokens": 10, "block_size": 5, "steps": 3, "chains": 2}


def test_only_what_is_clearly_faster_is_recommended() -> None:
    assert Guesses({0: 2.0, 3: 1.0, 7: 1.2}).best == 3
    assert Guesses({0: 1.05, 3: 1.0, 7: 1.2}).best == 0
    assert Guesses({0: 1.0, 3: 1.5}).best == 0
    assert Guesses({0: 2.0, 3: 1.0, 7: 1.6}).verdict() == (
        "guessing 3: as fast as without guesses, with 3 tokens 2.00 times, 7 tokens 1.25 times."
    )


def test_every_width_runs_the_same_steps_from_the_same_state_of_the_model() -> None:
    lm = CausalLM(tiny_model("llama").double())
    widths: list[int] = []

    class Watched(Lookup):
        def guess(self, rows: Any, most: int) -> None:
            widths.append(most)
            super().guess(rows, most)

    found = guessing(
        lm, [Prompt((3, 5, 7), key=1)], alpha=2.0, temperature=None, max_new_tokens=12, chains=1, seed=0, tokens=(3,)
    )
    assert set(found.seconds) == {0, 3}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert lm.engine.guesser is None
    lm.engine.guesser = Watched(2)
    with lm.engine.guessing(0):
        assert lm.engine.guesser is None
    assert isinstance(lm.engine.guesser, Watched)


@pytest.mark.parametrize("best", [0, 3])
def test_auto_makes_guesses_where_the_pilot_saw_them_pay(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(module, "guessing", lambda *args, **options: Guesses({0: 2.0, 3: 1.0 if best else 3.0}))
    guess = Lookup.guess
    monkeypatch.setattr(Lookup, "guess", lambda self, rows, most: seen.append(most) or guess(self, rows, most))

    def run(**options: Any) -> Any:
        seen.clear()
        lm = CausalLM(tiny_model("llama").double())
        return power_sample(lm, [Prompt((3, 5, 7), key=1)], **{**SMALL, **options})

    lens = lens_of(CausalLM(tiny_model("llama").double()), [ExitHead(2)], kl=0.7)
    plain = run()
    chosen = run(kernel="auto", exit=lens)
    if chosen.early_exit["kernel"] != "metropolis":
        pytest.skip("the pilot chose an exit")
    assert chosen.early_exit["speculate"] == best
    assert bool(seen) == bool(best)
    assert chosen.draws == plain.draws
    assert chosen.early_exit["guesses"] in chosen.summary().replace("\n", " ")
    assert "speculate" not in run(kernel="auto", exit=lens, chains=module.MOST_ROWS + 1).early_exit
