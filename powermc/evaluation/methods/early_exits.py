"""Methods with an early exit: early-exit power sampling, self-speculative drawing; and what is fitted before them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

from powermc.errors import ArgumentError
from powermc.evaluation.methods.base import Answers, Method, Question, Terms, register
from powermc.evaluation.methods.call import Call, Key, temperature_of
from powermc.evaluation.methods.checks import check_counts, check_temperature
from powermc.evaluation.methods.plain import TEMPERATURE
from powermc.evaluation.methods.power import Power, chains
from powermc.sequences.path import Path, Prompt
from powermc.settings import Settings
from powermc.types import Steps

if TYPE_CHECKING:
    from powermc.lm import CausalLM, Lens

HEADS = ("lens", "temperature", "ridge", "kl")
"""Kinds of heads, as in `powermc.lm.heads`: none fitted, a temperature, an affine map, the same refined on KL."""

_FITTED = "ridge"


@dataclass(frozen=True)
class _WithExit(Method):
    """layer: the exit; none for the lens's deepest. head: one of `HEADS`, ridge where one is fitted.

    lens: the file of a lens; none: `prepare` takes the model's cached lens, fitted on its own samples if there is
    none, and keeps the one head it needs in a file of its own, which is the option of what it returns.
    """

    layer: int | None = None
    head: str | None = None
    lens: str | None = None

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_counts(self, layer=1)
        if self.head is not None and self.head not in HEADS:
            raise ArgumentError(f"{self.name}:head must be one of {', '.join(HEADS)}, got {self.head!r}")
        _check_file(self)

    def prepare(self, model: CausalLM, prompts: Sequence[Prompt], terms: Terms) -> Self:
        if self.lens is None:
            lens, layer = _own_lens(model, self.layer, self.head or _FITTED)
            return replace(self, lens=kept(model, lens, layer), layer=layer)
        lens = loaded(self.lens)
        lens.check(model)
        layer = lens.layers[-1] if self.layer is None else self.layer
        if self.head not in (None, lens.head(layer).kind):
            raise ArgumentError(f"{self.lens} has a {lens.head(layer).kind} head at layer {layer}, not {self.head!r}")
        return replace(self, lens=os.path.abspath(self.lens), layer=layer)

    def exit_of(self, model: CausalLM) -> tuple[Lens, int]:
        """The lens and the layer. Raises `ArgumentError` for a method that has not been prepared."""
        if self.lens is None or self.layer is None:
            raise ArgumentError(f"method {self.name!r} has no lens or no layer yet: call `prepare` first")
        lens = loaded(self.lens)
        lens.check(model)
        return lens, self.layer


@register
@dataclass(frozen=True)
class EarlyExit(_WithExit):
    """`power_sample` with kernel "early-exit"; the answer is the last draw of a chain, a sample's number its chain's.

    Options are those of `power_sample`, but for the `head`. `prepare` fits what is to be fitted: the lens; `screen`
    where the exit does not draw the proposals; `eta` from `gated`.
    """

    name: ClassVar[str] = "early-exit"
    about: ClassVar[str] = "p(x)^alpha of whole answers, proposals drawn and screened by a middle layer, still exact"

    temperature: float | None = None
    block_size: int = 32
    steps: int = 10
    draws: int | None = None
    scope: str | None = None
    cut: str = "length"
    early_rejection: bool = True
    proposal: str = "exit"
    screen: float | None = None
    exit_temperature: float | None = None
    plain: float = 0.1
    eta: float | None = None
    delta: float | None = None
    gated: float | None = None
    aggregate: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        Settings(kernel="early-exit", exit=self.lens, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.options().items() if name not in ("head", "lens")}

    @property
    def _unfitted(self) -> list[str]:
        """Options that are still to be fitted on prompts."""
        screen = self.proposal != "exit" and self.screen is None
        return ["screen"] * screen + ["eta"] * (self.gated is not None)

    def prepare(self, model: CausalLM, prompts: Sequence[Prompt], terms: Terms) -> Self:
        from powermc.early_exit import prepare

        own = super().prepare(model, prompts, terms)
        if not self._unfitted:
            return own
        call = Call(model, [Question("", p, str) for p in prompts], terms, range(0))
        lens, _ = own.exit_of(model)
        settings = _of(terms, own._settings(), kernel="early-exit", exit=lens)
        facts = prepare(model, settings, call.prompts, call.space).facts
        screen = facts["exponent"] if "screen" in self._unfitted else own.screen
        return replace(own, screen=screen, eta=facts["eta"], gated=None)

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        lens, _ = self.exit_of(model)
        if self._unfitted:
            raise ArgumentError(f"method {self.name!r} has no {' or '.join(self._unfitted)} yet: call `prepare` first")
        call = Call(model, questions, terms, samples)
        found, counts = chains(call, kernel="early-exit", exit=lens, **self._settings())
        return call.answers(found, call.first, counts)


@register
@dataclass(frozen=True)
class PowerAuto(Method):
    """Whichever of `power` and `early-exit` a short pilot on the first prompts finds clearly cheaper: `prepare` returns
    that one. Seconds are part of what the pilot measures, so that it may find otherwise another time.

    lens: the file of a lens, whose exits are tried; none: the model's cached one. Others: of `power_sample`.
    """

    name: ClassVar[str] = "power-auto"
    about: ClassVar[str] = "`power` or `early-exit`, whichever a pilot run finds cheaper"

    lens: str | None = None
    temperature: float | None = None
    block_size: int = 32
    steps: int = 10
    draws: int | None = None
    scope: str | None = None
    cut: str = "length"
    early_rejection: bool = True
    plain: float = 0.1

    def __post_init__(self) -> None:
        _check_file(self)
        Settings(kernel="auto", exit=self.lens, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.options().items() if name != "lens"}

    def prepare(self, model: CausalLM, prompts: Sequence[Prompt], terms: Terms) -> Method:
        from powermc.early_exit import prepare
        from powermc.lm import cached_lens

        call = Call(model, [Question("", p, str) for p in prompts], terms, range(0))
        lens = cached_lens(model) if self.lens is None else loaded(self.lens)
        facts = prepare(model, _of(terms, self._settings(), kernel="auto", exit=lens), call.prompts, call.space).facts
        own = self._settings()
        if facts["kernel"] == "metropolis":
            del own["plain"]
            return Power(**own, speculate=facts.get("speculate", 0))
        chosen = {"proposal": facts["proposal"], "screen": facts["exponent"], "exit_temperature": facts["temperature"]}
        file = kept(model, lens, facts["layer"]) if self.lens is None else os.path.abspath(self.lens)
        return EarlyExit(facts["layer"], None, file, **own, **chosen)

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        raise ArgumentError(f"method {self.name!r} has no kernel yet: call `prepare` first")


@register
@dataclass(frozen=True)
class SelfSpeculative(_WithExit):
    """`temperature`, token for token, its next tokens guessed by an early exit of the same model and run in one pass.

    LayerSkip's decoding (Elhoushi et al. 2024) without its training: layers up to the exit say `tokens` likeliest
    tokens one by one, the layers above then run all of them at once, and each token is drawn from the full model with
    its own number; as long as it is the one that was guessed, its states are there. A guess changes the cost only.

    tokens: guessed per pass, >= 1. temperature: > 0; none for 1/alpha of the terms.
    """

    name: ClassVar[str] = "self-speculative"
    about: ClassVar[str] = (
        "`temperature`, its tokens guessed by a middle layer (LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710)"
    )

    temperature: float | None = 1.0
    tokens: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self)
        check_counts(self, tokens=1)

    def answer(self, model: Any, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        from powermc.lm.drift import Drift
        from powermc.lm.guesses import Counted, LikeliestAtExit

        lens, layer = self.exit_of(model)
        exit = lens.exit(model, layer)
        drift = Drift(exit, window=2**62)
        call = Call(model, questions, terms, samples)
        guesser = Counted(LikeliestAtExit(exit, self.tokens), model.max_rows)

        def program(key: Key) -> Steps[Path]:
            path = yield from call.written(key, TEMPERATURE, temperature_of(self.temperature, terms))
            first = len(path.prompt.ids) - 1
            drift.completed(path.cache, first, first + len(path))
            return path.detached()

        with _guessing(model.engine, guesser):
            drawn = call.run(program)
        guessed, right = guesser.counts()
        counts: dict[str, float] = {
            "drawn": sum(map(len, drawn.values())), "draft_tokens": guessed, "draft_accepted": right,
        }  # fmt: skip
        if drift.seen:
            counts |= {"kl": drift.kl * drift.seen, "kl_tokens": drift.seen}
        return call.answers(drawn, call.first, counts)


def _check_file(method: Any) -> None:
    """Raise `ArgumentError` for a name of a lens that a spec cannot hold."""
    if method.lens is not None and ":" in method.lens:
        raise ArgumentError(f"{method.name}:lens may hold no colon, which ends it in a spec, got {method.lens!r}")


def _of(terms: Terms, options: dict[str, Any], **more: Any) -> Settings:
    """Settings of `power_sample`."""
    given = {"alpha": terms.alpha, "max_new_tokens": terms.max_new_tokens, "stop": terms.stop, "seed": terms.seed}
    return Settings(**given, **options, **more)  # type: ignore[arg-type]


@contextmanager
def _guessing(engine: Any, guesser: Any) -> Iterator[None]:
    before, engine.guesser = engine.guesser, guesser
    try:
        yield
    finally:
        engine.guesser = before


def _own_lens(model: CausalLM, layer: int | None, head: str) -> tuple[Lens, int]:
    """The model's cached lens, with a head of this kind at this layer."""
    from powermc.lm import cached_lens

    lens = cached_lens(model, None if layer is None else [layer], head=head)
    return lens, lens.layers[-1] if layer is None else layer


def kept(model: CausalLM, lens: Lens, layer: int) -> str:
    """A file with this one head of the lens, named by its numbers: the method stays what it is if the cache changes."""
    from powermc.early_exit import surrogate_identity
    from powermc.lm import Lens
    from powermc.lm.calibration import cache_path

    head = lens.head(layer)
    name = f"{lens.fingerprint}-{head.kind}-{layer}-{surrogate_identity(lens.exit(model, layer))}.safetensors"
    path = cache_path(model, head.kind).with_name(name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        report = tuple(row for row in lens.report if row.layer == layer)
        Lens({layer: head}, report, lens.frequent, lens.origin).save(path)
    return str(path)


def loaded(path: str) -> Lens:
    """The lens in a file, read once as long as the file does not change."""
    from powermc.lm import Lens

    return _read(path, os.stat(path).st_mtime_ns) if os.path.isfile(path) else Lens.load(path)


@lru_cache(maxsize=8)
def _read(path: str, changed: int) -> Lens:
    from powermc.lm import Lens

    return Lens.load(path)
