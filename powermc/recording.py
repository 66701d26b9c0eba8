"""What a run of `power_sample` does while it runs: drive the chains, write down what they commit, tell who listens.

Where it is written down is a `Journal`: `Memory` here, or a file (`powermc.store`). Which kernel runs, and what is in a
path, this module does not know.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from powermc.choices import Stream
from powermc.early_exit import Prepared
from powermc.errors import ArgumentError, ChainError
from powermc.results import Chain, Run
from powermc.sampling import Records, without_cache
from powermc.scheduling import Event, Failed, drive
from powermc.sequences.growth import BlockwisePower, Committed, Grown, Point
from powermc.sequences.path import Path, Prompt, Tokens
from powermc.settings import Settings
from powermc.types import Field, Fields, Info, State

if TYPE_CHECKING:
    from powermc.progress import Progress

_log = logging.getLogger(__name__)

Key = tuple[int, int]
"""(prompt, chain), both counted from 0."""

Callback = Callable[[int, int, int, State[Path], Info], None]
"""Called as (prompt, chain, step, state, info) after every committed step; steps count over all blocks."""


class Keeping(NamedTuple):
    """What of a run is kept, and which of its chains it is: the arguments of these names of `power_sample`."""

    thin: int = 1
    keep_proposals: bool = True
    first_chain: int = 0


class Journal(Protocol):
    """Where a run is written down as it happens. Paths come without activations, infos without what was proposed."""

    def start(self, recorder: Recorder) -> None:
        """The chains are about to run; the recorder knows costs and times."""
        ...

    def grow(self, key: Key, event: Grown) -> None:
        """A path was extended by a block."""
        ...

    def commit(self, key: Key, event: Committed, proposed: Tokens | None) -> None:
        """A step was taken; `proposed`: the tokens it drew, None for a step that drew none."""
        ...

    def fail(self, key: Key, error: ChainError, steps: int) -> None:
        """A chain ended early, after so many steps."""
        ...

    def finish(self, recorder: Recorder) -> Run:
        """The result, whether the run got to its end or not."""
        ...


def fields_of(plan: BlockwisePower) -> Fields:
    """What is written down of every step: what the kernel declares, without the tokens, and how the path is then."""
    kernel = {name: field for name, field in plan.stage(0).kernel.fields.items() if name != "proposed"}
    return {
        **kernel,
        "block": Field("int32", -1),
        "log_p": Field("float64", math.nan),
        "log_density": Field("float64", math.nan),
        "length": Field("int32", 0),
    }


class Recorder:
    """Runs the chains and writes down what they commit.

    `points`: where each chain goes on, None for its beginning; chains that are not named have nothing left to do.
    `first_chain` numbers the stream of chain 0. `notes` and `rows` go into the result; `cost` and `seconds` count from
    the start of this run.
    """

    def __init__(
        self,
        model: Any,
        plan: BlockwisePower,
        prompts: Sequence[Prompt],
        settings: Settings,
        prepared: Prepared,
        journal: Journal,
        points: Mapping[Key, Point | None],
        *,
        rows: int,
        notes: Sequence[str] = (),
        first_chain: int = 0,
    ) -> None:
        self.model, self.plan, self.prompts, self.settings = model, plan, tuple(prompts), settings
        self.prepared, self.journal, self.points, self.rows, self.notes = prepared, journal, points, rows, tuple(notes)
        self.first_chain = first_chain
        self.errors: dict[Key, ChainError] = {}
        self.interrupted = False
        self._taken = {key: _taken(plan, point) for key, point in points.items()}
        self._before, self._begun = model.ledger.copy(), time.monotonic()

    @property
    def cost(self) -> Any:
        """The model's ledger since the start."""
        return self.model.ledger.since(self._before)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the start."""
        return time.monotonic() - self._begun

    def run(self, callbacks: Sequence[Callback], progress: bool) -> Run:
        """Take all steps that are left. Ctrl-C ends the run and returns what there is."""
        if (reserve := getattr(self.model, "reserve", None)) is not None and self.points:
            reserve(self.rows, max(len(p.ids) for p in self.prompts) + self.plan.space.horizon)
        if (forget := getattr(self.model, "forget", None)) is not None:
            forget()
        self._before, self._begun = self.model.ledger.copy(), time.monotonic()
        self.journal.start(self)
        _log.info("%d chains, %d of them under way at once", len(self.points), self.rows)
        with ExitStack() as stack:
            display = _Display(self.plan, self.points, stack, self.model) if progress else None
            stack.enter_context(self.prepared.running(self.model))
            outcomes = stack.enter_context(closing(drive(self._programs(), active=self.rows)))  # type: ignore[type-var]
            try:
                for outcome in outcomes:
                    key = cast("Key", outcome.key)
                    event = outcome.value if isinstance(outcome, Event) else None
                    if isinstance(outcome, Failed):
                        self.errors[key] = outcome.error
                        self.journal.fail(key, outcome.error, self._taken[key])
                    elif isinstance(event, Grown):
                        _log.debug(
                            "prompt %d, chain %d: block %d of %d begins", *key, event.block + 1, self.plan.blocks
                        )
                        self.journal.grow(key, event._replace(path=without_cache(event.path)))
                    elif isinstance(event, Committed):
                        self._commit(key, event)
                        self.prepared.check_drift()
                        for callback in callbacks:
                            callback(*key, event.step, event.state, event.info)
                    if display is not None:
                        display.show(key, event)
            except KeyboardInterrupt:
                self.interrupted = True
        return self.journal.finish(self)

    def _programs(self) -> Iterable[tuple[Hashable, Any]]:
        for (p, c), point in self.points.items():
            stream = Stream(self.settings.seed, prompt=self.prompts[p].key, chain=self.first_chain + c)
            yield (p, c), self.plan.program(stream.step, self.prompts[p], point)

    def _commit(self, key: Key, event: Committed) -> None:
        path = without_cache(event.state.value)
        own = {
            "block": event.block,
            "log_p": path.log_prob,
            "log_density": event.state.log_density,
            "length": len(path),
        }
        info = {**event.info, **own}
        proposed = info.pop("proposed", None)
        self.journal.commit(key, Committed(event.step, event.block, State(path, own["log_density"]), info), proposed)
        self._taken[key] = event.step + 1


class Memory:
    """A run that lives as long as the process. `thin`: every so manyth path of the last block is kept."""

    def __init__(
        self, plan: BlockwisePower, prompts: Sequence[Prompt], chains: int, decode: Decoder, thin: int
    ) -> None:
        self.plan, self.thin, self.decode = plan, thin, decode
        keys = [(p, c) for p in range(len(prompts)) for c in range(chains)]
        self.records = [Records(fields_of(plan), (chains, plan.total)) for _ in prompts]
        self.last: dict[Key, Path] = {}
        self.starts: dict[Key, dict[int, Path]] = {key: {} for key in keys}
        self.history: dict[Key, list[Path | None]] = {key: [] for key in keys}
        self.proposals: dict[Key, list[np.ndarray | None]] = {key: [None] * plan.total for key in keys}
        self.grown, self.ties = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)

    def start(self, recorder: Recorder) -> None:
        pass

    def grow(self, key: Key, event: Grown) -> None:
        before = len(self.last[key]) if key in self.last else 0
        self.last[key] = self.starts[key][event.block] = event.path
        self.grown[key] += len(event.path) - before
        self.ties[key] += event.near_ties
        self.decode.saw(event.path.tokens)

    def commit(self, key: Key, event: Committed, proposed: Tokens | None) -> None:
        path, last = event.state.value, self.last.get(key)
        if last is not None and last.tokens == path.tokens:
            path = last  # one object however long a chain stays
        self.records[key[0]].write((key[1], event.step), event.info)
        self.last[key] = path
        self.history[key].append(path if kept(self.plan, event.step, self.thin) else None)
        if proposed is not None:
            self.proposals[key][event.step] = np.array(proposed, dtype=np.int32)
            self.decode.saw(proposed)
        self.decode.saw(path.tokens)

    def fail(self, key: Key, error: ChainError, steps: int) -> None:
        pass  # the recorder knows

    def finish(self, recorder: Recorder) -> Run:
        infos = tuple(records.arrays for records in self.records)
        keys = [[(p, c) for c in range(len(records.arrays["block"]))] for p, records in enumerate(self.records)]
        return Run(
            **about(
                recorder.model,
                recorder.plan,
                recorder.prompts,
                recorder.settings,
                recorder.rows,
                recorder.notes,
            ),
            chains=tuple(tuple(self._chain(key, recorder.errors.get(key)) for key in row) for row in keys),
            infos=infos,
            early_exit=recorder.prepared.result(recorder.model, infos, recorder.prompts, recorder.cost),
            cost=recorder.cost,
            seconds=recorder.seconds,
            interrupted=recorder.interrupted,
            proposals=tuple(tuple(tuple(self.proposals[key]) for key in row) for row in keys),
            pieces=self.decode.pieces(),
        )

    def _chain(self, key: Key, error: ChainError | None) -> Chain:
        path, history = self.last.get(key), tuple(self.history[key])
        draws = tuple(x for x in history[(self.plan.blocks - 1) * self.plan.steps :] if x is not None)
        return Chain(
            path,
            None if path is None else self.decode(path.tokens),
            draws,
            tuple(self.decode(x.tokens) for x in draws),
            len(history),
            self.grown[key],
            self.ties[key],
            error,
            history,
            self.starts[key],
        )


class Decoder:
    """Texts of paths, remembered when called, and of the tokens that occur; nothing without a tokenizer."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._texts: dict[Tokens, str | None] = {}
        self._seen: set[int] = set()

    def __call__(self, tokens: Tokens) -> str | None:
        if tokens not in self._texts:
            self._texts[tokens] = self.text(tokens)
        return self._texts[tokens]

    def saw(self, tokens: Tokens) -> None:
        """Remember that these tokens occur."""
        self._seen.update(tokens)

    def pieces(self) -> dict[int, str]:
        """The text of every token that has occurred, by itself."""
        return {token: text for token in sorted(self._seen) if (text := self.piece(token)) is not None}

    def piece(self, token: int) -> str | None:
        """The text of one token: `model.piece(token)` if there is that, which names special ones too."""
        name = getattr(self._model, "piece", None)
        return name(token) if name is not None else self.text((token,))

    def text(self, tokens: Tokens) -> str | None:
        """The text of these tokens, not remembered."""
        try:
            return self._model.decode(tokens)
        except ArgumentError:  # a model without a tokenizer
            return None


def about(
    model: Any, plan: BlockwisePower, prompts: Sequence[Prompt], settings: Settings, rows: int, notes: Sequence[str]
) -> dict[str, Any]:
    """What a `Run` says of its model and settings."""
    filled = {"temperature": plan.q_temperature, "draws": plan.steps_on(plan.blocks - 1), "rows": rows}
    return {
        "model": model.name,
        "settings": {**settings.as_dict(), **filled},
        "prompts": tuple(prompts),
        "resolution": model.resolution,
        "ignored_warpers": dict(getattr(model, "ignored_warpers", {})),
        "notes": tuple(notes),
    }


def kept(plan: BlockwisePower, step: int, thin: int) -> bool:
    """Whether the path after a step is kept: always before the last block, every `thin`-th time on it."""
    return (step - (plan.blocks - 1) * plan.steps + 1) % thin == 0 or step < (plan.blocks - 1) * plan.steps


def work(plan: BlockwisePower) -> list[list[float]]:
    """Tokens a chain is expected to have drawn after the growth of each block, and after each step on it.

    For the time left only: as if no path ended early.
    """
    total, milestones = 0.0, []
    for block in range(plan.blocks):
        start = block * plan.block_size
        end = min(start + plan.block_size, plan.space.horizon)
        span = end - start if plan.scope == "block" else end
        milestones.append([total + end - start + i * (span + 1) / 2 for i in range(plan.steps_on(block) + 1)])
        total = milestones[-1][-1]
    return milestones


def _taken(plan: BlockwisePower, point: Point | None) -> int:
    return 0 if point is None else point.block * plan.steps + point.done


class _Display:
    """The progress display of a run: what is left to do, and how much of it each event was."""

    def __init__(self, plan: BlockwisePower, points: Mapping[Key, Point | None], stack: ExitStack, model: Any) -> None:
        from powermc.progress import Progress

        self.plan, self.milestones = plan, work(plan)
        self.reached = {k: 0.0 if x is None else self.milestones[x.block][x.done] for k, x in points.items()}
        self.progress: Progress = stack.enter_context(
            Progress(
                steps=sum(plan.total - _taken(plan, point) for point in points.values()),
                work=sum(self.milestones[-1][-1] - at for at in self.reached.values()),
                tokens=lambda: model.ledger.decoded + model.ledger.prefilled,
                decode=model.decode,
                horizon=plan.space.horizon,
            )
        )

    def show(self, key: Key, event: Any) -> None:
        at = self.milestones[-1][-1]  # nothing is left of a chain that has finished or failed
        if isinstance(event, Grown):
            at = self.milestones[event.block][0]
        elif isinstance(event, Committed):
            at = self.milestones[event.block][1 + event.step - event.block * self.plan.steps]
        work = at - self.reached[key]
        if isinstance(event, Committed):
            self.progress.step(event.info, work, path=event.state.value, prompt=key[0])
        else:
            self.progress.add(work)
        self.reached[key] = at
