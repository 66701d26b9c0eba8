"""The text that an exit is calibrated on: as token ids, and as a stream of states.

A text is encoded as plain text, the way the tokenizer encodes its own input: no chat template, whatever special tokens
it adds by itself. Texts longer than a bound become several pieces. The first position of a piece is left out: decoders
park attention there, its state is an outlier in every feature that matters.

Without text of the user's, the model's own samples serve, on prompts that ship with the package or lie in the model's
folder, as chat where there is a template; of those only the positions that the model wrote are used.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import numpy as np
import torch

from powermc.choices import Stream
from powermc.errors import ArgumentError, ModelError
from powermc.lm.depth import Span
from powermc.lm.model import CausalLM
from powermc.scheduling import Failed, Finished, drive
from powermc.sequences.path import Path, Prompt, Space
from powermc.sequences.suffix import draft
from powermc.types import Steps

Report = Callable[[str, float], None]
"""Told of progress: what is being done, and the share of it that is, 0 to 1."""

LONGEST = 512
"""Tokens of the longest piece; a model of a shorter context takes its context."""

OWN_TOKENS = 20_000
"""Tokens that the model writes where there is no text of the user's."""

_PROMPTS = "calibration_prompts.jsonl"
_VALIDATION_TOKENS = 1024
_SAMPLE_TOKENS = 256
_PASS_TOKENS = 2048
_WINDOW = 64


@dataclass(frozen=True)
class Piece:
    """Token ids of a text or a part of it; the states of positions start..stop-1 are used."""

    ids: tuple[int, ...]
    start: int
    stop: int
    text: int

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)


class Split(NamedTuple):
    """What is fitted on, what the choices are made on, what is reported on. No piece is in two of them."""

    fit: list[Piece]
    validation: list[Piece]
    held_out: list[Piece]

    def digest(self) -> str:
        """A hash of the token ids that were fitted and validated on."""
        hashed = hashlib.blake2b(digest_size=16)
        for piece in (*self.fit, *self.validation):
            hashed.update(np.array([piece.start, piece.stop, *piece.ids, -1], dtype="<i8").tobytes())
        return hashed.hexdigest()

    def frequent(self, vocab_size: int, most: int) -> list[int]:
        """The most frequent token ids of the text fitted and validated on, most frequent first."""
        counts = np.zeros(vocab_size, np.int64)
        for piece in (*self.fit, *self.validation):
            np.add.at(counts, np.array(piece.ids[1:], dtype=np.int64), 1)
        order = np.argsort(-counts, kind="stable")[:most]
        return [int(token) for token in order if counts[token] > 0]


def size(pieces: Iterable[Piece]) -> int:
    """Positions used."""
    return sum(map(len, pieces))


def encode(model: CausalLM, texts: Iterable[str | Sequence[int]], what: str = "text") -> list[Piece]:
    """The pieces of some texts, in order. A text may also be token ids.

    Raises `ArgumentError` for no text, or one that is empty, and for ids outside the vocabulary.
    """
    if isinstance(texts, str):
        raise ArgumentError(f"the calibration {what} must be a list of strings, got one string; write [text]")
    longest = min(LONGEST, model.decoder.context or LONGEST)
    pieces: list[Piece] = []
    number = -1
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if not text.strip():
                raise ArgumentError(f"calibration {what} {number} is empty; remove it")
            ids = model.text.encode(text, chat=False)
        else:
            ids = tuple(map(int, text))
            if wrong := [t for t in ids if not 0 <= t < model.vocab_size]:
                raise ArgumentError(
                    f"calibration {what} {number} holds token {wrong[0]}; {model.name} has tokens 0 to "
                    f"{model.vocab_size - 1}"
                )
        for begin in range(0, len(ids), longest):
            part = ids[begin : begin + longest]
            pieces.append(Piece(part, 1, len(part), number))
    if number < 0:
        raise ArgumentError(f"there is no calibration {what}; give some, or none at all for the model's own samples")
    return [piece for piece in pieces if len(piece)]


def split(pieces: Sequence[Piece], held_out: Sequence[Piece] | None, tokens: int | None) -> Split:
    """Divide calibration text: a tenth at the end is held out (unless that is given), up to `tokens` are used.

    Of what is used, every n-th piece is for validation, n at least 10 and such that about a thousand tokens are.
    """
    pieces = list(pieces)
    needed = 2 if held_out is not None else 3
    if len(pieces) < needed:
        raise ArgumentError(
            f"calibration needs at least {needed} texts of two tokens or more, to fit, to validate"
            f"{'' if held_out is not None else ' and to report'} on different ones; got {len(pieces)}"
        )
    if held_out is None:
        n = max(1, len(pieces) // 10)
        pieces, held_out = pieces[:-n], pieces[-n:]
    if not held_out:
        raise ArgumentError("the held-out text has no text of two tokens or more")
    if tokens is not None:
        pieces = _upto(pieces, tokens)
    stride = max(min(10, len(pieces)), min(size(pieces) // _VALIDATION_TOKENS, len(pieces)))
    validation = pieces[stride - 1 :: stride]
    fit = [piece for i, piece in enumerate(pieces) if (i + 1) % stride]
    return Split(fit, validation, list(held_out))


def _upto(pieces: Sequence[Piece], tokens: int) -> list[Piece]:
    kept: list[Piece] = []
    for piece in pieces:
        if tokens <= 0 and len(kept) >= 2:
            break
        kept.append(piece)
        tokens -= len(piece)
    return kept


class States(NamedTuple):
    """States of some positions, each (n, width): by depth, and after the final norm."""

    at: dict[int, torch.Tensor]
    normed: torch.Tensor


def stream(
    model: CausalLM, pieces: Sequence[Piece], depths: Collection[int], *, pass_tokens: int = _PASS_TOKENS
) -> Iterator[States]:
    """The states at `depths` of the positions used, batch by batch; no batch outlives the next.

    Plain causal passes over right-padded pieces of similar length: what stands after a position does not reach it.
    Raises `ModelError`, with the layer and the text, where a state is not finite.
    """
    decoder, model_layers = model.decoder, model.decoder.layers
    for batch in _batches(pieces, pass_tokens):
        longest = max(piece.stop for piece in batch)
        ids = torch.tensor([[*p.ids[: p.stop], *[0] * (longest - p.stop)] for p in batch], device=decoder.device)
        span = Span(0, model_layers, wanted=sorted(set(depths)))
        with torch.no_grad():
            normed = decoder.body(span, input_ids=ids, use_cache=False)
        for depth in sorted(span.found):
            for piece, states in zip(batch, span.found[depth], strict=True):
                if not torch.isfinite(states[piece.start : piece.stop]).all():
                    raise ModelError(
                        f"the states of {model.name} after layer {depth} are not finite on calibration text "
                        f"{piece.text} (counted from 0): remove it, or load the model in another dtype"
                    )

        def used(states: torch.Tensor, batch: Sequence[Piece] = batch) -> torch.Tensor:
            return torch.cat([row[p.start : p.stop] for p, row in zip(batch, states, strict=True)])

        yield States({depth: used(states) for depth, states in span.found.items()}, used(normed))


def _batches(pieces: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces of similar length, up to `most` tokens, padding included."""
    for begin in range(0, len(pieces), _WINDOW):
        batch: list[Piece] = []
        for piece in sorted(pieces[begin : begin + _WINDOW], key=lambda p: p.stop):
            if batch and piece.stop * (len(batch) + 1) > most:
                yield batch
                batch = []
            batch.append(piece)
        yield batch


def shipped_prompts() -> list[str]:
    """The prompts that ship with the package."""
    text = resources.files("powermc").joinpath("data", _PROMPTS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def prompts_for(model: CausalLM) -> list[str]:
    """What a model is to go on from: the prompts in its own folder, if there are any, else those of the package."""
    folder = model.decoder.model.config.name_or_path or ""
    own = pathlib.Path(folder) / _PROMPTS
    if not folder or not own.is_file():
        return shipped_prompts()
    return [json.loads(line) for line in own.read_text(encoding="utf-8").splitlines()]


def own_samples(
    model: CausalLM,
    tokens: int,
    *,
    prompts: Sequence[Prompt] | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> list[Piece]:
    """Continuations that the model itself draws at temperature 1, at least `tokens` tokens of them.

    Every prompt is continued once per round, and only whole rounds are taken: to stop in the middle would favour short
    ones. They are up to 256 tokens long.
    """
    ready = [model.prompt(text) for text in prompts_for(model)] if prompts is None else list(prompts)
    longest = max(len(prompt.ids) for prompt in ready)
    context = model.decoder.context
    horizon = _SAMPLE_TOKENS if context is None else min(_SAMPLE_TOKENS, context - longest)
    if horizon < 1:
        raise ArgumentError(
            f"the prompts leave no room to write in a context of {context} tokens; give calibration text"
        )
    space, pieces, number = model.space(horizon), [], 0
    while size(pieces) < tokens:
        programs = [
            (i, _continued(model, space, prompt, Stream(seed, prompt=prompt.key, chain=number)))
            for i, prompt in enumerate(ready)
        ]
        drawn: dict[int, Path] = {}
        for outcome in drive(programs, active=model.max_rows):
            if isinstance(outcome, Failed):
                raise ModelError(f"{model.name} could not write calibration text: {outcome.error}") from outcome.error
            if isinstance(outcome, Finished):
                drawn[outcome.key] = outcome.value  # type: ignore[index]
        for i, prompt in enumerate(ready):
            ids = prompt.ids + drawn[i].tokens
            piece = Piece(ids, max(len(prompt.ids) - 1, 1), len(ids) - drawn[i].finished, number * len(ready) + i)
            pieces += [piece] if len(piece) else []
        number += 1
        if report is not None:
            report("writing text", min(size(pieces) / tokens, 1.0))
        if number == 10 and not pieces:
            raise ModelError(f"{model.name} ends every continuation at once; give calibration text")
    return pieces


def _continued(model: CausalLM, space: Space, prompt: Prompt, choices: Stream) -> Steps[Path]:
    path = yield model.score(Path(prompt, (), finished=False), (1.0,))
    path, _, _ = yield from draft(model, space, path, 0, 1.0, choices)
    return path.detached()
