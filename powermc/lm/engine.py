"""What all depths of one model share: the buffer of rows, the prompts already run, the ledger.

The unit of cost is a position run through a span of layers. `Engine` brings rows to a depth: from the deepest depth
that their positions have come to, whoever ran them that far, so that no position passes a layer twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from powermc.errors import ModelError
from powermc.lm.cost import cost_of
from powermc.lm.decoder import Work
from powermc.lm.guesses import Guesser, Lookup
from powermc.lm.lean import Numbers
from powermc.lm.ledger import Ledger
from powermc.lm.pool import Pool
from powermc.lm.recompute import attach
from powermc.lm.rows import Prefix, Segment, Slot
from powermc.sequences.path import Path, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from powermc.lm.drift import Drift

_AHEAD = 32
_RECENT_PROMPTS = 16
_PASS_TOKENS = 1024
_PASS_ROWS = 16


class Engine:
    """Runs the layers of one decoder for everything that reads its states.

    Attributes
    ----------
    reuse
        Whether states are taken from what has been run of the same tokens before, beyond the prefix that a path keeps:
        the current path while a draft agrees with it, and the `pool`.
    guesser
        What says which tokens to run before they are drawn; None for none.
    ahead
        How many states one call of the head reads where fewer rows draw, if more of them are known.

    None of these changes a draw.
    """

    def __init__(self, model: PreTrainedModel, max_rows: int, *, reuse: bool = True, compiled: bool = True) -> None:
        self.decoder = decoder = attach(model, max_rows, compiled)
        self.rows = decoder.rows
        self.ledger = Ledger(layers=decoder.layers)
        self.cost = cost_of(decoder.blocks, decoder.config, *decoder.head_dims, model.get_output_embeddings())  # type: ignore[arg-type]  # the decoder has checked
        self.watchers: list[Drift] = []
        self.reuse, self.pool = reuse, Pool()
        self.guesser: Guesser | None = None
        self.ahead = _AHEAD
        self._prompts: WeakValueDictionary[Tokens, Segment] = WeakValueDictionary()
        self._recent: deque[Segment] = deque(maxlen=_RECENT_PROMPTS)
        self._parameters = list(model.parameters())
        self._weights: int | None = None
        self._numbers = Numbers([])
        self._splits: set[int] = set()

    @contextmanager
    def guessing(self, tokens: int) -> Iterator[None]:
        """Guess by `Lookup` up to so many tokens meanwhile; 0: none."""
        before, self.guesser = self.guesser, Lookup(tokens) if tokens else None
        try:
            yield
        finally:
            self.guesser = before

    def check_mode(self) -> None:
        """Raise `ModelError` if the model's owner has put it in training mode: dropout is not part of p.

        What was kept of prompts and drafts is forgotten if the owner has trained the model, replaced a block or set a
        number of one.
        """
        if self.decoder.model.training:
            raise ModelError(f"{self.decoder.name} is in training mode; call model.eval() before sampling from it")
        weights = hash((*map(id, self.decoder.blocks), sum(p._version for p in self._parameters)))
        if weights != self._weights or self._numbers.changed():
            self._weights, self._numbers = weights, Numbers(self.decoder.blocks.modules())
            self._prompts.clear()
            self.pool.clear()

    def forget(self) -> None:
        """Forget what has been run, prompts included, but for what somebody's path still holds."""
        self.pool.clear()
        self._recent.clear()
        self._prompts.clear()

    def keep(self, depth: int) -> None:
        """Keep the states at this depth from now on. Raises `ModelError` for a model that cannot be split there."""
        if depth not in self.rows.depths:
            if depth not in self._splits:
                self.check_split(depth)
                self._splits.add(depth)
            self.rows.keep(depth)

    @contextmanager
    def keeping(self, depths: Iterable[int]) -> Iterator[None]:
        """Keep the states at these depths meanwhile."""
        new = [depth for depth in depths if depth not in self.rows.depths]
        for depth in new:
            self.keep(depth)
        try:
            yield
        finally:
            for depth in new:
                self.rows.drop(depth)

    def check_split(self, depth: int) -> float:
        """`Decoder.check_split`, after which no more is kept than before."""
        kept = depth in self.rows.depths
        self.rows.keep(depth)
        try:
            return self.decoder.check_split(depth)
        finally:
            if not kept:
                self.rows.drop(depth)

    def known(self, path: Path, depth: int) -> Prefix:
        """The activations of this path that are still there, with the longest prefix that has come to `depth`."""
        views = [v for v in (path, *path.others) if getattr(v.by, "engine", None) is self and v.cache is not None]
        caches: list[Prefix] = [v.cache for v in views]
        segment = self._prompts.get(path.prompt.ids)
        if segment is not None:
            caches.append(Prefix((segment,), segment.stop))
        if not caches:
            return Prefix()
        deepest = max(caches, key=lambda c: (c.reaches(depth), c.reaches(self.decoder.layers)))
        # Beyond what has come to `depth`: what has come less far, such as a draft at an exit.
        return deepest.upto(deepest.reaches(depth)).continued_by(max(caches, key=lambda c: c.length))

    def met(self, known: Prefix, ids: Tokens, depth: int) -> Prefix:
        """`known`, or the activations of more of these ids that a draft has left in the pool."""
        done = known.reaches(depth)
        found = self.pool.longest(ids, done, depth) if self.reuse and done < len(ids) else None
        return known if found is None else found.continued_by(known)

    def run_prompts(self, paths: Sequence[Path], depth: int) -> None:
        """Run each prompt that no path has brought to `depth` yet, once however many paths share it."""
        missing = {p.prompt.ids: p for p in paths if self.known(p, depth).reaches(depth) < len(p.prompt.ids)}
        work = [(self.known(path, depth), ids) for ids, path in missing.items()]
        for ids, prefix in zip(missing, self.prefixes(work, depth), strict=True):
            if len(prefix.segments) == 1:
                self._prompts[ids] = prefix.segments[0]
                self._recent.append(prefix.segments[0])

    def prefixes(self, work: Sequence[tuple[Prefix, Tokens]], depth: int) -> list[Prefix]:
        """Each prefix extended to cover all of its ids at `depth`."""
        done = [prefix for prefix, _ in work]
        todo = [i for i, (prefix, ids) in enumerate(work) if prefix.reaches(depth) < len(ids)]
        while todo:
            # Drafts may hold every row; the spare one is always there.
            batch, todo = todo[: max(self.rows.free, 1)], todo[max(self.rows.free, 1) :]
            slots = [self.rows.acquire(work[i][0].upto(len(work[i][1])), len(work[i][1])) for i in batch]
            try:
                self.run([(slot, work[i][1]) for slot, i in zip(slots, batch, strict=True)], depth, parallel=True)
                for slot, i in zip(slots, batch, strict=True):
                    prefix, ids = work[i]
                    done[i] = self.extended(prefix, slot, depth)
                    slot.poisoned = not bool(torch.isfinite(done[i].segments[-1].hidden[depth]).all())
                    if self.reuse and not slot.poisoned and prefix.length:
                        self.pool.add(ids, prefix.reaches(depth), done[i])
            finally:
                for slot in slots:
                    self.rows.release(slot)
        return done

    def extended(self, prefix: Prefix, slot: Slot, depth: int) -> Prefix:
        """`prefix` with what its row has brought to `depth` since."""
        start = prefix.reaches(depth)
        if slot.filled[depth] <= start:
            return prefix
        return prefix.upto(start).followed_by(self.rows.segment(slot, start, depth))

    def run(
        self, rows: Sequence[tuple[Slot, Sequence[int]]], depth: int, *, parallel: bool = False, width: int = 1
    ) -> None:
        """Bring every row to `depth` at all of its ids: long stretches in parallel, then one pass for the last ones.

        `width`: rows that lack no more positions than this run in one decode pass; `parallel`: there is none.
        """
        while todo := [(slot, ids) for slot, ids in rows if slot.filled[depth] < len(ids)]:
            spans: dict[tuple[int, int, bool], list[Work]] = {}
            for slot, ids in todo:
                first, last = 0, depth
                while (first := slot.next_depth(last)) and slot.filled[first] < len(ids):
                    last = first
                n = len(ids) - slot.filled[last]
                spans.setdefault((first, last, parallel or n > width), []).append(Work(slot, ids, n))
            for (first, last, together), work in spans.items():
                self._pass(work if not together else _batch(work), first, last, together)

    def _pass(self, work: Sequence[Work], first: int, last: int, parallel: bool) -> None:
        tokens = self.decoder.tokens(work, last)
        slots = self.decoder.forward(work, first, last)
        flops = tokens * self.cost.span(first, last, slots, tokens / len(work))
        self.ledger.ran((first, last), tokens, parallel=parallel, flops=flops)


def _batch(work: Sequence[Work]) -> list[Work]:
    """The shortest stretches, as many as one parallel pass takes."""
    batch = sorted(work, key=lambda w: w.n)[:_PASS_ROWS]
    most = max(1, _PASS_TOKENS // len(batch))
    return [w._replace(n=min(w.n, most)) for w in batch]
