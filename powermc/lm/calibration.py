"""Calibration: exit heads fitted to a model, on text or on its own samples, in one pass and bounded memory.

The states of every layer asked for are read off one forward pass over the text to fit, batch by batch, into sums; those
of about a thousand validation tokens are kept, to choose the ridge strength and the temperature on; a third part of the
text, on which nothing was fitted or chosen, is reported on. Memory beyond the model: 4 width^2 float64 per layer
while it is solved, the validation states, and the activations and logits of one batch.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from powermc.errors import ArgumentError
from powermc.lm import corpus, fitting
from powermc.lm.corpus import Piece, Report, Split
from powermc.lm.fitting import Chunk, NormalEquations, Refinement, expected, log_probabilities
from powermc.lm.heads import KINDS, ExitHead
from powermc.lm.lens import ExitReport, Lens, Origin, fingerprint
from powermc.lm.model import CausalLM

FREQUENT = 4096
"""Most frequent tokens kept for screening heads."""

_REFINEMENT_STEPS = 100
_REFINEMENT_TOKENS = 512
_SHARES = (0.5, 0.65, 0.8, 0.87)


def calibrate(
    model: CausalLM,
    texts: Sequence[str | Sequence[int]] | None = None,
    *,
    layers: Sequence[int] | None = None,
    head: str = "ridge",
    held_out: Sequence[str | Sequence[int]] | None = None,
    tokens: int | None = None,
    alpha: float = 4.0,
    seed: int = 0,
    progress: Report | None = None,
) -> Lens:
    """Fit exit heads at `layers`, and report on held-out text how close they come to the full model.

    Parameters
    ----------
    model
        The model; its weights are not changed.
    texts
        Plain texts, or token ids. None: about 20,000 tokens that the model writes itself on prompts that ship with
        the package.
    layers
        Numbers of layers after which to exit, 1 to L - 1; None for four in the upper half.
    head
        "lens" (final norm and head as they are), "temperature" (the same with a temperature), "ridge" (an affine map
        before them), or "kl" (the same refined by a hundred gradient steps on KL(p || p~)).
    held_out
        Texts to report on; None: the last tenth of `texts`, which is then not fitted on.
    tokens
        Use no more than about this many tokens of `texts`, from the first on.
    alpha
        `ExitReport.overlap` is measured at temperature 1/alpha.
    seed
        Of the model's own samples.
    progress
        Called as progress(what, share done).

    Raises `ArgumentError` for empty text, fewer tokens than features, a layer or a number out of range and an unknown
    head; `ModelError` for states that are not finite and a model that cannot be split.
    """
    begun, before = time.perf_counter(), peak_bytes()
    decoder, width = model.decoder, model.engine.cost.width
    chosen = check_layers(model, layers)
    check_settings(head, tokens, alpha)
    model.engine.check_mode()
    model.engine.check_split(chosen[len(chosen) // 2])
    report = progress or (lambda what, share: None)
    pieces = _pieces(model, texts, tokens, width, seed, report)
    other = None if held_out is None else corpus.encode(model, held_out, "held-out text")
    parts = corpus.split(pieces, other, tokens)
    _check_enough(model, head, parts, width)
    fitted = _fit(model, parts, chosen, head, report)
    rows = evaluate(model, [h for h, _ in fitted], parts.held_out, alpha, report)
    peak = peak_bytes()
    origin = Origin(
        model.name,
        fingerprint(model),
        decoder.layers,
        width,
        str(decoder.dtype).removeprefix("torch."),
        parts.digest(),
        corpus.size(parts.fit),
        corpus.size(parts.validation),
        float(alpha),
        time.perf_counter() - begun,
        peak,
        None if peak is None or before is None else max(peak - before, 0),
    )
    return Lens(
        {h.layer: h for h, _ in fitted},
        tuple(_row(row, h, strength) for row, (h, strength) in zip(rows, fitted, strict=True)),
        tuple(parts.frequent(decoder.vocab_size, FREQUENT)),
        origin,
    )


def cached_lens(
    model: CausalLM, layers: Sequence[int] | None = None, *, head: str = "ridge", progress: Report | None = None
) -> Lens:
    """The lens of this very model from the user's cache, fitted on its own samples and put there if there is none.

    Kept by fingerprint and head: whoever has trained the model on gets another one. A lens that lacks some of the
    layers is made again with all of them.
    """
    chosen = check_layers(model, layers)
    check_settings(head, None, 1.0)
    path = cache_path(model, head)
    try:
        lens = Lens.load(path)
        lens.check(model)
        known = lens.layers
    except ArgumentError:  # none yet, or damaged
        lens, known = None, ()
    if lens is None or not set(chosen) <= set(known):
        lens = calibrate(model, layers=sorted({*chosen, *known}), head=head, progress=progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        lens.save(path)
    return lens


def cache_path(model: CausalLM, head: str = "ridge") -> Path:
    """Where the lens of this model is cached: $XDG_CACHE_HOME or ~/.cache, then powermc/lenses."""
    home = os.environ.get("XDG_CACHE_HOME")
    root = Path(home) if home else Path.home() / ".cache"
    return root / "powermc" / "lenses" / f"{fingerprint(model)}-{head}.safetensors"


def check_layers(model: CausalLM, layers: Sequence[int] | None) -> list[int]:
    """The layers in order, the default filled in. Raises `ArgumentError` for one that is no exit."""
    depth = model.decoder.layers
    if depth < 2:
        raise ArgumentError(f"{model.name} has {depth} layer: there is nothing to exit from")
    if layers is None:
        return sorted({min(max(round(share * depth), 1), depth - 1) for share in _SHARES})
    if not layers:
        raise ArgumentError(f"no exit layer was given; choose some of 1 to {depth - 1}")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 0 < layer < depth:
            raise ArgumentError(
                f"exit layer {layer!r} is out of range: {model.name} has {depth} layers, choose 1 to {depth - 1}"
            )
    return sorted({int(layer) for layer in layers})


def check_settings(head: str, tokens: int | None, alpha: float) -> None:
    """Raise `ArgumentError` for a setting that no calibration can be made with."""
    if head not in KINDS:
        raise ArgumentError(f"unknown head {head!r}; choose one of {', '.join(KINDS)}")
    if tokens is not None and tokens < 1:
        raise ArgumentError(f"tokens must be at least 1, got {tokens}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ArgumentError(f"alpha must be a finite number > 0, got {alpha}")


def _pieces(
    model: CausalLM, texts: Sequence[Any] | None, tokens: int | None, width: int, seed: int, report: Report
) -> list[Piece]:
    if texts is None:
        least = max(corpus.OWN_TOKENS, 10 * width) if tokens is None else tokens
        return corpus.own_samples(model, least, seed=seed, report=report)
    return corpus.encode(model, texts)


def _check_enough(model: CausalLM, head: str, parts: Split, width: int) -> None:
    least = width + 1 if head in ("ridge", "kl") else 1
    if (n := corpus.size(parts.fit)) < least:
        raise ArgumentError(
            f"calibration of {model.name} needs at least {least} tokens to fit its {width} features, beyond the first "
            f"of each text, what is validated and what is held out; got {n}: give more text, ten times as much is good"
        )


def _fit(
    model: CausalLM, parts: Split, layers: Sequence[int], kind: str, report: Report
) -> list[tuple[ExitHead, float | None]]:
    """A head per layer with its ridge strength, None where it has none."""
    if kind == "lens":
        return [(ExitHead(layer, kind), None) for layer in layers]
    decoder, top = model.decoder, model.decoder.layers
    validation = Validation(model, parts.validation, layers)
    if kind == "temperature":
        plain = [ExitHead(layer, kind) for layer in layers]
        return [(fitting.with_temperature(decoder, h, validation.chunks(h.layer))[0], None) for h in plain]
    sums = {layer: NormalEquations(model.engine.cost.width, decoder.device) for layer in layers}
    done, total = 0, corpus.size(parts.fit)
    for states in corpus.stream(model, parts.fit, [*layers, top]):
        for layer in layers:
            sums[layer].add(states.at[layer], states.at[top])
        done += len(states.normed)
        report("fitting", done / total)
    fitted: list[tuple[ExitHead, float | None]] = []
    refinements: dict[int, Refinement] = {}
    for i, layer in enumerate(layers):
        solution = sums.pop(layer).solve()
        head, strength, _ = fitting.ridge(decoder, layer, solution, validation.chunks(layer))
        fitted.append((head, strength))
        if kind == "kl":
            refinements[layer] = Refinement(decoder, head, solution, validation.chunks(layer), _REFINEMENT_STEPS)
        report("choosing", (i + 1) / len(layers))
    if not refinements:
        return fitted
    _refine(model, parts.fit, refinements, report)
    strengths = dict(zip(layers, (strength for _, strength in fitted), strict=True))
    return [(refined(decoder, r, validation.chunks(n)), strengths[n]) for n, r in refinements.items()]


def _refine(model: CausalLM, pieces: Sequence[Piece], refinements: dict[int, Refinement], report: Report) -> None:
    """The second pass: a step of every layer's refinement per batch, over and over until all steps are taken."""
    step = 0
    while step < _REFINEMENT_STEPS:
        for states in corpus.stream(model, pieces, list(refinements), pass_tokens=_REFINEMENT_TOKENS):
            for layer, refinement in refinements.items():
                h, normed = fitting.thinned(states.at[layer], states.normed)
                with torch.no_grad():
                    log_p = log_probabilities(model.decoder.head(normed))
                refinement.step(h, log_p)
            step += 1
            report("refining", step / _REFINEMENT_STEPS)
            if step == _REFINEMENT_STEPS:
                break


def refined(decoder: Any, refinement: Refinement, chunks: fitting.Chunks) -> ExitHead:
    """The best head that the refinement saw, its temperature fitted anew."""
    refinement.check()
    head, kl = fitting.with_temperature(decoder, refinement.best, chunks)
    return head if kl < refinement.kl else refinement.best


class Validation:
    """The states of the validation text, which stay; their logits are made anew, a few positions at a time."""

    def __init__(self, model: CausalLM, pieces: Sequence[Piece], layers: Sequence[int]) -> None:
        self._decoder = model.decoder
        batches = list(corpus.stream(model, pieces, layers))
        self._normed = torch.cat([states.normed for states in batches])
        self._at = {layer: torch.cat([states.at[layer] for states in batches]) for layer in layers}

    def chunks(self, layer: int) -> Callable[[], Iterator[Chunk]]:
        """Goes through the states at one layer."""

        def go() -> Iterator[Chunk]:
            pairs = zip(self._at[layer].split(fitting.HEAD_ROWS), self._normed.split(fitting.HEAD_ROWS), strict=True)
            for h, normed in pairs:
                yield Chunk(h, log_probabilities(self._decoder.head(normed)))

        return go


_COLUMNS = ("kl", "reverse_kl", "top1", "overlap", "entropy", "exit_entropy")


def evaluate(
    model: CausalLM, heads: Sequence[ExitHead], pieces: Sequence[Piece], alpha: float, report: Report
) -> list[dict[str, float]]:
    """Means over all positions of these pieces, per head: the columns of `ExitReport`, and `tokens`."""
    totals, done, total = np.zeros((len(heads), len(_COLUMNS))), 0, corpus.size(pieces)
    for states in corpus.stream(model, pieces, [head.layer for head in heads]):
        for begin in range(0, len(states.normed), fitting.HEAD_ROWS):
            few = slice(begin, begin + fitting.HEAD_ROWS)
            with torch.no_grad():
                compared = Comparison(log_probabilities(model.decoder.head(states.normed[few])), alpha)
                for i, head in enumerate(heads):
                    h = states.at[head.layer][few]
                    totals[i] += compared.to(log_probabilities(head.logits(model.decoder, h, np.full(len(h), -1))))
        done += len(states.normed)
        report("reporting", done / total)
    return [{**dict(zip(_COLUMNS, (row / total).tolist(), strict=True)), "tokens": total} for row in totals]


class Comparison:
    """Next-token distributions p, log p of shape (n, V), that others are compared to at exponents 1 and alpha."""

    def __init__(self, log_p: torch.Tensor, alpha: float) -> None:
        self.alpha, self.log_p, self.p = alpha, log_p, log_p.exp()
        self._own, self._top = expected(self.p, log_p), log_p.argmax(-1)
        self._sharp = torch.softmax(alpha * log_p, -1)

    def to(self, log_q: torch.Tensor) -> np.ndarray:
        """Sums over the n positions: KL(p||q), KL(q||p), top-1 agreement, 1 - TV at alpha, H(p), H(q)."""
        q = log_q.exp()
        other = expected(q, log_q)
        columns = (
            self._own - expected(self.p, log_q),
            other - expected(q, self.log_p),
            log_q.argmax(-1) == self._top,
            torch.minimum(self._sharp, torch.softmax(self.alpha * log_q, -1)).sum(-1),
            -self._own,
            -other,
        )
        return np.array([float(column.double().sum()) for column in columns])


def _row(means: dict[str, float], head: ExitHead, strength: float | None) -> ExitReport:
    return ExitReport(layer=head.layer, kind=head.kind, temperature=head.temperature, strength=strength, **means)  # type: ignore[arg-type]


def peak_bytes() -> int | None:
    """The most memory that this process has had so far, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
