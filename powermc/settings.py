"""The settings of `power_sample`: checked as a whole before any model is loaded."""

from __future__ import annotations

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
from powermc.targets import Power, Tilted

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
    chat: bool | None = None

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
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ArgumentError(f"stop strings must be strings of at least one character, got {text!r}")
        if self.reward is not None and not callable(self.reward):
            raise ArgumentError(f"reward must be a function of the generated text, got {self.reward!r}")
        Stream(self.seed)
        # The rest is checked by the schedule itself, which asks nothing of the model until it runs.
        self.schedule(cast(Autoregressive, None), Space(frozenset(), self.max_new_tokens), str)

    def schedule(self, model: Autoregressive, space: Space, decode: Decode) -> BlockwisePower:
        """The schedule of one chain on `space`; `decode` gives the text that a reward sees."""
        alpha, reward, target = self.alpha, self.reward, None
        if reward is not None:

            def tilted(p: Any) -> Tilted[Path]:
                return Tilted(Power(p, alpha), lambda path: reward(decode(path.tokens)))

            target = tilted
        return BlockwisePower(
            model,
            space,
            alpha=alpha,
            temperature=self.temperature,
            block_size=self.block_size,
            steps=self.steps,
            scope=cast(str, self.scope),
            cut=self.cut,
            target=target,
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
        return {**plain, "stop": list(self.stop), "reward": name}


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ArgumentError(f"{name} must be a number, got {value!r}")
