"""What one does with a store: load it, ask about it, go on with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from powermc.errors import StoreError
from powermc.results import Run
from powermc.settings import Settings
from powermc.store.file import SAMPLES, explained, kind_of
from powermc.store.header import Header, is_alive
from powermc.store.reading import Reader, connected, opened
from powermc.store.samples import load_samples, reading

if TYPE_CHECKING:
    from powermc.power import LanguageModel
    from powermc.recording import Callback


@dataclass(frozen=True)
class Facts:
    """A store at a glance, read without its paths.

    Attributes
    ----------
    header
        Model, settings, sessions: see `Header`.
    prompts, chains
        How many prompts, and chains per prompt.
    steps, planned
        Kernel steps taken by all chains together, and of how many.
    accepted
        Of the steps taken, how many accepted their proposal.
    draws
        Steps on the last block, of which every `header.thin`-th path is there.
    done
        Whether every chain is at its end, or has failed.
    failed
        How many chains ended with an error.
    written
        Whether the process that writes it may still be at it.
    bytes
        Size of the file, and of its log.
    seconds, tokens
        Spent so far; tokens evaluated by the model.
    """

    header: Header
    prompts: int
    chains: int
    steps: int
    planned: int
    accepted: int
    draws: int
    done: bool
    failed: int
    written: bool
    bytes: int
    seconds: float
    tokens: int

    @property
    def bytes_per_draw(self) -> float:
        """Bytes of the file per kernel step, the header and all else spread over them; NaN before the first."""
        return self.bytes / self.steps if self.steps else float("nan")


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[Reader]:
    connection, reader = opened(File(path))
    try:
        with explained(reader.path):
            yield reader
    finally:
        connection.close()


def load(path: str | os.PathLike[str], *, decode: Callable[[Any], Any] | None = None) -> Run | Any:
    """What a store holds, finished or not, as of now; it may be written meanwhile. No model and no kernel is needed.

    The `Run` that `power_sample` writes, or the `Samples` that `sample` does (`Run.load` and `Samples.load` take their
    own kind only); `decode` undoes the `encode` that was given to `sample`. Raises `StoreError` for a file that is
    missing, damaged, newer, or something else.
    """
    if kind(path) == SAMPLES:
        return load_samples(path, decode=decode)
    if decode is not None:
        raise StoreError(f"{path}: it holds a run of power_sample, which decode has no effect on; leave it out")
    return load_run(path)


def load_run(path: str | os.PathLike[str]) -> Run:
    """The run in a store. `Run.interrupted` says whether something is left to be drawn. Raises as `load` does."""
    with _reading(path) as reader:
        return reader.run()


def kind(path: str | os.PathLike[str]) -> str:
    """What a store holds: `file.RUN` or `file.SAMPLES`. Raises as `load` does."""
    file = File(path)
    with closing(connected(file)) as connection:
        return kind_of(connection, file)


def digest(path: str | os.PathLike[str]) -> str:
    """A hash of everything that was drawn, step by step: the same for two stores of the same run.

    Not of times, costs, versions or settings. Raises as `load` does.
    """
    with reading(path) if kind(path) == SAMPLES else _reading(path) as reader:
        return reader.digest()


def header_of(path: str | os.PathLike[str]) -> Header:
    """The header of a store. Raises as `load` does."""
    with _reading(path) as reader:
        return reader.header


def about(path: str | os.PathLike[str]) -> Facts:
    """Facts of a store, in a moment however many draws it has. Raises as `load` does."""
    with _reading(path) as reader:
        header, prompts = reader.header, reader.prompts
        places = reader.places(prompts)
        chains = header.settings["chains"]
        ended = sum(reader.done(place) or place.error is not None for place in places.values())
        seconds, ledger, _ = reader.totals()
        infos = [info for (info,) in reader.connection.execute("SELECT info FROM steps")]
        size = sum(os.path.getsize(f"{path}{end}") for end in ("", "-wal") if os.path.exists(f"{path}{end}"))
        return Facts(
            header=header,
            prompts=len(prompts),
            chains=chains,
            steps=len(infos),
            planned=len(prompts) * chains * reader.total,
            accepted=int(reader.layout.unpack(infos)["accepted"].sum()) if infos else 0,
            draws=sum(max(place.steps - reader.first, 0) for place in places.values()),
            done=ended == len(prompts) * chains,
            failed=sum(place.error is not None for place in places.values()),
            written=is_alive(header.writer),
            bytes=size,
            seconds=seconds,
            tokens=sum(n for (first, _), n in ledger.spans.items() if first == 0),
        )


def resume(
    path: str | os.PathLike[str],
    model: LanguageModel | str | os.PathLike[str] | None = None,
    *,
    draws: int | None = None,
    chains: int | None = None,
    exit: Any = None,
    reward: Callable[[str], float] | None = None,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Go on with the run in a store: the settings and the prompts are its own.

    Parameters
    ----------
    model
        The model that drew it; None to load it by the name that it had then.
    draws, chains
        More of them, if given: all chains go on to so many draws, and there are so many chains per prompt.
    exit
        The surrogate of an early-exit run; None: the lens file that it was given, or the model's cached lens.
    reward
        The function of a run that had one; it cannot be stored, and must have the same name.
    progress, callbacks
        As in `power_sample`.

    Raises `StoreError` and all that `power_sample` raises.
    """
    from powermc.power import power_sample

    with _reading(path) as reader:
        header, prompts = reader.header, reader.prompts
    settings = settings_of(header, File(path), reward=reward, exit=exit)
    given: dict[str, Any] = {f.name: getattr(settings, f.name) for f in fields(settings)}
    given |= {name: n for name, n in (("draws", draws), ("chains", chains)) if n is not None}
    return power_sample(
        _load(header) if model is None else model,
        prompts,
        **given,
        store=path,
        resume=True,
        thin=header.thin,
        keep_proposals=header.keep_proposals,
        first_chain=header.first_chain,
        progress=progress,
        callbacks=callbacks,
    )


def settings_of(
    header: Header, path: File, *, reward: Callable[[str], float] | None = None, exit: Any = None
) -> Settings:
    """The settings of a store's run. Raises `StoreError` where only Python can give one of them, and did not."""
    values = {f.name: header.settings[f.name] for f in fields(Settings)}
    name = values["reward"]
    if name is not None and reward is None:
        raise StoreError(
            f"{path}: it was drawn with the reward {name}, a Python function; give it: powermc.resume(..., reward=...)"
        )
    values |= {"reward": reward, "chat": None, "exit": None}
    if values["kernel"] != "metropolis":
        values["exit"] = header.exit if exit is None else exit
        if exit is None and header.exit is None and header.settings["exit"] is not None:
            raise StoreError(
                f"{path}: it was drawn with exit = {header.settings['exit']}, given in Python; give it: exit=..."
            )
    return Settings(**values)


def _load(header: Header) -> Any:
    from powermc.lm import CausalLM

    return CausalLM.from_pretrained(header.model, dtype=header.dtype or "float32")
