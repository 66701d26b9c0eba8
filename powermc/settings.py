"""The settings of `power_sample`: checked as a whole before any model is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np

from powermc.choices import Stream
from powermc.errors import ArgumentError
from powermc.sampling import check_count
from powermc.sequences.growth import BlockwisePower
from powermc.sequences.model import Autoregressive
from powermc.sequences.path import Path, Prompt, Space, Tokens
from powermc.sequences.screening import Screening
from powermc.targets import Tilted
from powermc.tuning import surrogate_name
from powermc.types import Target

KERNELS = ("metropolis", "early-exit", "auto")
"""Plain Metropolis-Hastings; early-exit power sampling; whichever a pilot run finds cheaper."""

_NUMBERS = ("screen", "exit_temperature", "eta", "delta", "gated")
_SCREENING = ("exit", "layer", "proposal", "plain", "aggregate", *_NUMBERS)

Decode = Callable[[Tokens], str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keyword arguments of `power_sample`, which documents them. Raises `ArgumentError` for one out of range.

    `scope` and `stop` are filled in; `temperature` stays None for the default.
    """

    alpha: float = 4.0
    temperature: float | None = None
    max_new_tokens: int = 128
    block_size: int = 32
    steps: int = 10
    chains: int = 4
    scope: str | None = None
    cut: str = "length"
    seed: int = 0
    stop: str | Sequence[str] = ()
    reward: Callable[[str], float] | None = None
    reward_at_most: float | None = None
    early_rejection: bool = True
    chat: bool | None = None
    kernel: str | None = None
    exit: Any = None
    layer: int | None = None
    proposal: str = "exit"
    screen: float | None = None
    exit_temperature: float | None = None
    plain: float = 0.1
    eta: float | None = None
    delta: float | None = None
    gated: float | None = None
    aggregate: str = "max"
    draws: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if self.scope is None:
            object.__setattr__(self, "scope", "block" if self.cut == "block" else "sequence")
        _check_number("alpha", self.alpha)
        if self.temperature is not None:
            _check_number("temperature", self.temperature)
        for name, least in (("max_new_tokens", 1), ("block_size", 1), ("steps", 0), ("chains", 1)):
            check_count(name, getattr(self, name), least=least)
        if self.draws is not None:
            check_count("draws", self.draws, least=0)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ArgumentError(f"stop strings must be strings of at least one character, got {text!r}")
        if self.reward is not None and not callable(self.reward):
            raise ArgumentError(f"reward must be a function of the generated text, got {self.reward!r}")
        if self.reward_at_most is not None:
            _check_number("reward_at_most", self.reward_at_most)
            if self.reward is None:
                raise ArgumentError("reward_at_most bounds a reward, and there is none; give one, or omit it")
            if not math.isfinite(self.reward_at_most):
                raise ArgumentError(f"reward_at_most must be finite, got {self.reward_at_most}; omit it if unknown")
        if not isinstance(self.early_rejection, bool):
            raise ArgumentError(f"early_rejection must be True or False, got {self.early_rejection!r}")
        Stream(self.seed)
        self._check_screening()
        # The rest is checked by the schedule itself, which asks nothing of the model until it runs.
        self.schedule(cast(Autoregressive, None), Space(frozenset(), self.max_new_tokens), str)

    def _check_screening(self) -> None:
        if self.kernel is None:
            object.__setattr__(self, "kernel", "metropolis" if self.exit is None else "early-exit")
        if self.kernel not in KERNELS:
            raise ArgumentError(f"unknown kernel {self.kernel!r}; choose one of {', '.join(KERNELS)}")
        for name in ("plain", *(n for n in _NUMBERS if getattr(self, n) is not None)):
            _check_number(name, getattr(self, name))
        if self.layer is not None:
            check_count("layer", self.layer, least=1)
        given = [n for n in _SCREENING if getattr(self, n) != _default(n) and getattr(self, n) is not None]
        if self.kernel == "metropolis" and given:
            raise ArgumentError(
                f"{given[0]} has no effect with kernel 'metropolis'; use kernel='early-exit', or omit it"
            )
        chosen = [n for n in given if n not in ("exit", "plain")]
        if self.kernel == "auto" and chosen:
            raise ArgumentError(f"kernel 'auto' chooses {chosen[0]} itself; use kernel='early-exit' to set it")
        if self.gated is not None and not 0 < self.gated < 1:
            raise ArgumentError(f"gated is a share of proposed tails, above 0 and below 1, got {self.gated}")
        if self.gated is not None and self.eta is not None:
            raise ArgumentError("gated fits eta, so that only one of the two can be given")
        self.screening(cast(Autoregressive, _AnyVocabulary()), 1.0)
        if isinstance(self.exit, str | os.PathLike) and not os.path.isfile(self.exit):
            raise ArgumentError(f"there is no file {self.exit}; make a lens with: powermc calibrate --out {self.exit}")

    def screening(self, surrogate: Autoregressive, exponent: float) -> Screening:
        """The surrogate's part; `exponent` where `screen` gives none."""
        return Screening(
            surrogate,
            exponent if self.screen is None else self.screen,
            temperature=self.exit_temperature,
            proposal=self.proposal,
            plain=self.plain,
            eta=self.eta,
            delta=self.delta,
            aggregate=self.aggregate,
        )

    def schedule(
        self, model: Autoregressive, space: Space, decode: Decode, screening: Screening | None = None
    ) -> BlockwisePower:
        """The schedule of one chain on `space`; `decode` gives the text that a reward sees."""
        reward, tilt = self.reward, None
        if reward is not None:

            def tilted(power: Target[Path]) -> Target[Path]:
                return Tilted(power, lambda path: reward(decode(path.tokens)), self.reward_at_most)

            tilt = tilted
        return BlockwisePower(
            model,
            space,
            alpha=self.alpha,
            temperature=self.temperature,
            block_size=self.block_size,
            steps=self.steps,
            scope=cast(str, self.scope),
            cut=self.cut,
            tilt=tilt,
            screening=screening,
            early_rejection=self.early_rejection,
            draws=self.draws,
        )

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Raise `ArgumentError` unless these are prompts: at least one, none of them empty text."""
        if not prompts:
            raise ArgumentError("no prompt was given; pass a string or a list of strings")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str | Prompt):
                raise ArgumentError(f"prompt {i} must be a string or a Prompt, got {type(prompt).__name__}")
            if isinstance(prompt, str) and not prompt.strip():
                raise ArgumentError(f"prompt {i} is empty; every prompt needs some text")
        if self.chat is not None and all(isinstance(prompt, Prompt) for prompt in prompts):
            raise ArgumentError("chat has no effect on a Prompt, which is token ids already; leave it out")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; a reward is given by its name."""
        reward = self.reward
        name = None if reward is None else getattr(reward, "__name__", type(reward).__name__)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items()}
        surrogate = None if self.exit is None else str(self.exit)
        if hasattr(self.exit, "branch"):
            surrogate = surrogate_name(self.exit)
        return {**plain, "stop": list(self.stop), "reward": name, "exit": surrogate}


def _default(name: str) -> Any:
    return next(field.default for field in fields(Settings) if field.name == name)


class _AnyVocabulary:
    """Stands for a surrogate not known yet, where settings are checked before anything is loaded."""

    vocab_size = math.inf


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ArgumentError(f"{name} must be a number, got {value!r}")
