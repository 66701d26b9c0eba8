"""What a store costs: bytes per draw, and how long writing takes, with made-up paths of 256 tokens.

    python -m tests.store_size --draws 100000 --accepted 0.3

Tokens and log probabilities are random, so nothing is smaller than it would be in a real run. Reference for the time:
SmolLM2-135M on two CPU cores runs some hundred tokens per second, a step at least a third of a second of one chain.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import numpy as np

from powermc.early_exit import Prepared
from powermc.lm.ledger import Ledger
from powermc.recording import Decoder, Keeping, about, fields_of
from powermc.sequences import Committed, Grown, Path, Prompt, Space
from powermc.settings import Settings
from powermc.store import Header, Store, Writer, load
from powermc.types import State

LENGTH, VOCABULARY, CHAINS = 256, 49_152, 16


class Words:
    """What a writer asks of a model: 49,152 tokens of 1 to 8 letters, 4.5 on average."""

    name, vocab_size, resolution, ignored_warpers = "words", VOCABULARY, 1e-5, {}

    def __init__(self) -> None:
        numbers = np.random.default_rng(0)
        letters = numbers.integers(97, 123, (VOCABULARY, 8), dtype=np.uint8)
        lengths = numbers.integers(1, 9, VOCABULARY)
        self.pieces = [bytes(row[:n]).decode() for row, n in zip(letters, lengths, strict=True)]
        self.ledger = Ledger(layers=30)

    def decode(self, tokens: Any) -> str:
        return "".join(self.pieces[t] for t in tokens)


def measure(folder: File, *, draws: int, accepted: float, keep_proposals: bool = True) -> dict[str, float]:
    """Write `draws` steps of 16 chains that accept this share of proposals, cut uniformly: bytes, seconds, per draw."""
    numbers, model = np.random.default_rng(1), Words()
    settings = Settings(max_new_tokens=LENGTH, block_size=LENGTH, draws=-(-draws // CHAINS), chains=CHAINS)
    plan: Any = settings.schedule(model, Space(frozenset(), LENGTH), model.decode)  # type: ignore[arg-type]
    prompts, file = [Prompt((1, 2, 3), "prompt", 7)], folder / "size.db"
    facts = about(model, plan, prompts, settings, CHAINS, ())
    header = Header.of_run(facts, model, fields_of(plan), Prepared(None, {}), settings, Keeping(1, keep_proposals))

    def path(head: tuple[int, ...], log_p: np.ndarray) -> Path:
        n = LENGTH - len(head)
        tail = tuple(numbers.integers(0, VOCABULARY, n).tolist())
        return Path(prompts[0], head + tail, False, np.concatenate((log_p, -numbers.exponential(1.0, n))))

    spent, current = 0.0, {}
    with Store(file, resume=False) as store:
        store.begin(header, prompts)
        writer = Writer(store, plan, prompts, Decoder(model))
        writer.start(SimpleNamespace(cost=model.ledger, seconds=0.0, prepared=Prepared(None, {})))  # type: ignore[arg-type]
        for c in range(CHAINS):
            current[c] = path((), np.zeros(0))
            writer.grow((0, c), Grown(0, current[c], LENGTH, 0))
        for step in range(settings.draws or 0):
            for c in range(CHAINS):
                here, cut = current[c], int(numbers.integers(LENGTH))
                new = path(here.tokens[:cut], here.log_p[:cut])  # type: ignore[index]
                moved = numbers.random() < accepted
                current[c] = new if moved else here
                density = 4 * current[c].log_prob
                info = {"accepted": moved, "changed": moved, "null": False, "abandoned": False, "block": 0,
                        "log_ratio": numbers.normal(), "log_level": numbers.normal(), "cut": cut, "near_ties": 0,
                        "proposal_length": LENGTH - cut, "tokens": LENGTH - cut, "log_p": current[c].log_prob,
                        "log_density": density, "length": LENGTH}  # fmt: skip
                event = Committed(step, 0, State(current[c], density), info)
                begun = time.perf_counter()
                writer.commit((0, c), event, new.tokens[cut:])
                spent += time.perf_counter() - begun
    taken = CHAINS * (settings.draws or 0)
    begun = time.perf_counter()
    loaded = load(file)
    assert [chain.path for chain in loaded.chains[0]] == list(current.values())
    size = os.path.getsize(file)
    return {
        "megabytes": size / 1e6,
        "bytes_per_draw": size / taken,
        "microseconds_per_draw": spent / taken * 1e6,
        "seconds_to_load": time.perf_counter() - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--accepted", type=float, default=0.3, help="share of the proposals")
    parser.add_argument("--no-proposals", action="store_true", help="leave out the tokens of rejected ones")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(File(folder), draws=given.draws, accepted=given.accepted, keep_proposals=not given.no_proposals)
    print("  ".join(f"{name} {value:,.1f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
