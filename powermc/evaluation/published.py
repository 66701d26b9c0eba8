"""The published power sampler (Karan & Du 2025, arXiv:2510.14901, Algorithm 1), as a baseline to time against.

**Its law is wrong where sequences end: for timing, never for sampling.** Blocks of B tokens are appended one by one;
after each, N times: cut uniformly among the tokens generated so far, draw the rest anew at temperature 1/alpha with
one call of `generate`, which runs the prompt and the kept tokens through the model again, and accept by

    log r = sum alpha log p(proposed) - sum alpha log p(current) + sum log q(current) - sum log q(proposed)

Faults on sequences that end, part of the algorithm as published and kept here:

- a proposal has at most as many tokens as the *current* tail, so that sequences shrink and never grow back; one that
  loses its end token again goes on with the next block, and stays short of T;
- the current tail is cut to the proposal's length, so that the ratio lacks the terms beyond;
- the uniform cut's probability 1/L is not in the ratio, though the lengths differ.

Where no end token can be drawn all lengths are equal, the faults vanish, and the kernel is that of `powermc`.

What is not kept of the published code: end tokens are looked for in the answer only (in prompt and answer, a chat
prompt that holds one ends the run after its first block), and no default warper of a checkpoint or of `generate`
(such as top_k=50) is applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from powermc.errors import ArgumentError
from powermc.sampling import check_count
from powermc.sequences.path import Tokens


@dataclass(frozen=True)
class Tail:
    """Tokens after a prefix; `log_q` and `log_target`, shape (n,), nats: log q and alpha log p of each.

    ran: positions that the call ran through the layers for this row: its prefix, and one per token but the last.
    Rows of a batch run until the longest is done.
    """

    tokens: Tokens
    log_q: np.ndarray
    log_target: np.ndarray
    ran: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def onto(self, current: Tail, cut: int) -> Tail:
        """The first `cut` tokens of `current`, then these."""
        return Tail(
            (*current.tokens[:cut], *self.tokens),
            np.concatenate([current.log_q[:cut], self.log_q]),
            np.concatenate([current.log_target[:cut], self.log_target]),
        )


EMPTY = Tail((), np.zeros(0), np.zeros(0))


def log_ratio(current: Tail, cut: int, proposed: Tail) -> float:
    """log r of the published rule: the current tail is read as far as the proposed one is long."""
    now = slice(cut, cut + len(proposed))
    target = proposed.log_target.sum() - current.log_target[now].sum()
    return float(target + current.log_q[now].sum() - proposed.log_q.sum())


class Draw(Protocol):
    """Draws tails from q."""

    def __call__(self, prefixes: Sequence[Tokens], most: Sequence[int], seed: int) -> list[Tail]:
        """One tail per prefix (prompt included), of at most `most[i]` tokens, ended by its first end token."""
        ...


@dataclass(frozen=True)
class Generate:
    """`model.generate` as the source of tails: one call for all prefixes, left-padded, nothing cached before.

    eos: ids that end a row; none: every tail has its full length. alpha > 0: q is at temperature 1/alpha.
    """

    model: PreTrainedModel
    eos: frozenset[int]
    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha < np.inf:
            raise ArgumentError(f"alpha must be a finite number > 0, as proposals are at 1/alpha; got {self.alpha}")

    def __call__(self, prefixes: Sequence[Tokens], most: Sequence[int], seed: int) -> list[Tail]:
        out = self.bare(prefixes, max(most), seed, output_scores=True, output_logits=True)
        start, steps = max(map(len, prefixes)), len(out.scores)
        drawn = out.sequences[:, start:]
        log_q = _log_prob(out.scores, drawn)
        log_p = _log_prob(out.logits, drawn)
        tails = []
        for row, prefix in enumerate(prefixes):
            ids = tuple(drawn[row].tolist())
            ended = next((i + 1 for i, token in enumerate(ids) if token in self.eos), len(ids))
            n = min(most[row], ended)
            ran = len(prefix) + steps - 1
            tails.append(Tail(ids[:n], log_q[row, :n], self.alpha * log_p[row, :n], ran))
        return tails

    @torch.no_grad()
    def bare(self, prefixes: Sequence[Tokens], most: int, seed: int, **outputs: bool) -> Any:
        """The call of `generate` alone, under the same settings. Leaves the global random state as it was."""
        start, device = max(map(len, prefixes)), self.model.device
        ids = torch.tensor([[0] * (start - len(p)) + list(p) for p in prefixes], device=device)
        mask = torch.tensor([[0] * (start - len(p)) + [1] * len(p) for p in prefixes], device=device)
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0 / self.alpha,
            top_k=0,
            top_p=1.0,
            max_new_tokens=most,
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            **outputs,
        )
        with _no_defaults(self.model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self.model.generate(ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]


def _log_prob(logits: Sequence[torch.Tensor], tokens: torch.Tensor) -> np.ndarray:
    """Log softmax of each token, shape (rows, steps), from one (rows, V) tensor per step."""
    columns = [step.gather(1, tokens[:, i : i + 1])[:, 0] - step.logsumexp(1) for i, step in enumerate(logits)]
    return torch.stack(columns, 1).double().cpu().numpy()


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """Without the generation config of the checkpoint, which fills in whatever a call leaves unset."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@dataclass
class Trace:
    """What a run of the baseline did: per transition, in order of time, and the tokens run through the layers.

    cut; proposal_length (tokens drawn); tokens (run through the layers); accepted; changed (accepted, and another
    path than before); paths: the last one of each chain; calls: (prefixes, tokens decoded) of every call.
    growth_tokens: those run to append the blocks.
    """

    cut: list[int] = field(default_factory=list)
    proposal_length: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)
    paths: list[Tail] = field(default_factory=list)
    calls: list[tuple[list[Tokens], int]] = field(default_factory=list)
    growth_tokens: int = 0


@dataclass(frozen=True)
class Published:
    """The algorithm. Published settings: batch of one, N = 10, alpha = 4, T = 3072 in 16 blocks.

    Parameters
    ----------
    draw
        Where tails come from.
    eos
        End token ids: a chain is over after the block in which it holds one.
    horizon, block_size, steps
        T >= 1 and B >= 1 in tokens; N >= 0 transitions after each block.

    Raises `ArgumentError` for counts out of range.
    """

    draw: Draw
    eos: frozenset[int]
    horizon: int
    block_size: int
    steps: int

    def __post_init__(self) -> None:
        for name, least in (("horizon", 1), ("block_size", 1), ("steps", 0)):
            check_count(name, getattr(self, name), least=least)

    def run(self, prompt: Tokens, *, chains: int, seed: int, batched: bool) -> Trace:
        """Run every chain from start to end: one by one, or side by side, all of a round in one call of `generate`.

        The law of each chain is the same either way; the draws are not.
        """
        check_count("chains", chains, least=1)
        trace = Trace()
        groups = [range(chains)] if batched else [range(c, c + 1) for c in range(chains)]
        for group in groups:
            self._group(prompt, [np.random.default_rng([seed, c]) for c in group], trace)
        return trace

    def _group(self, prompt: Tokens, choices: Sequence[np.random.Generator], trace: Trace) -> None:
        """Chains side by side; those that have ended wait for the others."""
        chains = [EMPTY] * len(choices)
        going = list(range(len(choices)))
        for begin in range(0, self.horizon, self.block_size):
            kept = [chains[c] for c in going]
            block = min(self.block_size, self.horizon - begin)
            tails = self._tails(prompt, kept, [len(x) for x in kept], [block] * len(kept), choices, trace)
            trace.growth_tokens += sum(tail.ran for tail in tails)
            for c, tail in zip(going, tails, strict=True):
                chains[c] = tail.onto(chains[c], len(chains[c]))
            for _ in range(self.steps):
                self._round(prompt, chains, going, choices, trace)
            going = [c for c in going if not self.eos.intersection(chains[c].tokens)]
            if not going:
                break
        trace.paths.extend(chains)

    def _round(
        self,
        prompt: Tokens,
        chains: list[Tail],
        going: Sequence[int],
        choices: Sequence[np.random.Generator],
        trace: Trace,
    ) -> None:
        """One transition of every chain that is going; changes `chains`."""
        now = [chains[c] for c in going]
        cuts = [int(choices[c].integers(len(chains[c]))) for c in going]
        most = [len(x) - cut for x, cut in zip(now, cuts, strict=True)]
        tails = self._tails(prompt, now, cuts, most, choices, trace)
        for c, x, cut, tail in zip(going, now, cuts, tails, strict=True):
            with np.errstate(over="ignore"):
                accepted = bool(choices[c].random() < np.exp(log_ratio(x, cut, tail)))
            trace.cut.append(cut)
            trace.proposal_length.append(len(tail))
            trace.tokens.append(tail.ran)
            trace.accepted.append(accepted)
            trace.changed.append(accepted and tail.tokens != x.tokens[cut:])
            if accepted:
                chains[c] = tail.onto(x, cut)

    def _tails(
        self,
        prompt: Tokens,
        now: Sequence[Tail],
        cuts: Sequence[int],
        most: Sequence[int],
        choices: Sequence[np.random.Generator],
        trace: Trace,
    ) -> list[Tail]:
        prefixes = [(*prompt, *x.tokens[:cut]) for x, cut in zip(now, cuts, strict=True)]
        tails = self.draw(prefixes, most, int(choices[0].integers(2**62)))
        trace.calls.append((prefixes, max(map(len, tails))))
        return tails
