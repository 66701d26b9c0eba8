"""What a method is: a way to answer questions with a language model, charged by the model's ledger; and the registry.

A method is a frozen dataclass whose fields are its options. A *spec* names it with its options, as a user writes it:
`power`, `power:steps=4`, `early-exit:layer=24:plain=0.1`. Needs no torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from powermc.errors import ArgumentError
from powermc.lm.ledger import Ledger
from powermc.sampling import check_count
from powermc.sequences.path import Prompt, Tokens

if TYPE_CHECKING:
    from powermc.lm import CausalLM

COUNTS = {
    "drawn": "tokens drawn, those of abandoned, rejected and outvoted drafts included",
    "steps": "kernel steps",
    "accepted": "steps that accepted a proposal",
    "changed": "accepted steps after which the path is another",
    "screened": "proposals that met the first stage",
    "passed": "proposals that passed it",
    "completed": "proposals completed to full depth after a surrogate drew or screened them (stage-2 calls)",
    "kl": "sum over `kl_tokens` of KL(p || surrogate), nats",
    "kl_tokens": "tokens at which that was measured",
    "draft_tokens": "tokens guessed by a self-speculative method",
    "draft_accepted": "guessed tokens that were kept",
    "unfinished": "answers cut off by the horizon",
}
"""What a method may count, beside the ledger: sums, so that those of several calls add up."""


@dataclass(frozen=True)
class Terms:
    """What every method of a comparison is given alike.

    Attributes
    ----------
    max_new_tokens
        The horizon T >= 1: an answer ends at its first end token, at a stop string, or here.
    stop
        Strings that end an answer where they first appear, as in `power_sample`.
    alpha
        Power of the target of the methods that have one, > 0; their proposals, and low temperature, use 1/alpha.
    seed
        Every number drawn is a function of (seed, method's purpose, the prompt's tokens, sample).

    Raises `ArgumentError` for values out of range.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    alpha: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, least=1)
        check_count("seed", self.seed, least=0)
        if not 0 < self.alpha < math.inf:
            raise ArgumentError(f"alpha must be a finite number > 0, got {self.alpha}")


class Question(NamedTuple):
    """One prompt; `read` gives the answer that a text states, in one spelling, or None: for methods that vote."""

    id: str
    prompt: Prompt
    read: Callable[[str], str | None]


class Answer(NamedTuple):
    """One answer to a question: a path (end token included), its text up to the first stop string, which is left out,
    and log p of the path (nats; NaN: not known)."""

    tokens: Tokens
    text: str
    log_p: float = math.nan


@dataclass(frozen=True)
class Answers:
    """What a call gave: for each question the answers of the samples asked for, in order; what it cost.

    spent: what the ledgers of the model, and of a surrogate that is a model of its own, were charged meanwhile.
    counts: some of `COUNTS`.
    """

    answers: list[list[Answer]]
    spent: Ledger
    counts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.counts) - set(COUNTS)):
            raise ValueError(f"unknown counts {unknown}; a method counts {', '.join(COUNTS)}")


@dataclass(frozen=True)
class Method(ABC):
    """A way to answer questions. Fields are options with defaults: int, float, str, bool, or one of these or None.

    Laws that the tests hold every method to:

    - `answer` is a function of (method, model, terms, the prompt's tokens, sample): not of which other questions or
      samples are asked in the same call, up to counted near-ties in float32;
    - all that runs through the model's layers and heads is in `Answers.spent`;
    - every answer is a path of `model.space(terms.max_new_tokens, terms.stop)`.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    """One line, with its source."""
    deterministic: ClassVar[bool] = False
    """Whether all samples of a question are the same answer, so that one is enough."""

    def prepare(self, model: CausalLM, prompts: Sequence[Prompt], terms: Terms) -> Method:
        """The method with everything fitted that must be the same in all calls: called once, before the first answer.

        What it returns is again a method of plain options, and says the same in every process.
        """
        del model, prompts, terms
        return self

    @abstractmethod
    def answer(self, model: CausalLM, questions: Sequence[Question], terms: Terms, samples: range) -> Answers:
        """Answer each question once per sample number.

        Raises the first `ChainError` of a question that cannot be answered, and `ArgumentError` for options that the
        model does not allow.
        """

    @property
    def spec(self) -> str:
        """Its name and the options that differ from their defaults; `parse` of it gives the method back."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return ":".join([self.name, *(f"{name}={_written(value)}" for name, value in given)])

    def options(self) -> dict[str, Any]:
        """All options, JSON-able."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Prepared(NamedTuple):
    """What `Method.prepare` returned, and what the model was charged meanwhile: the price of the warm-up."""

    method: Method
    spent: Ledger


def prepared(method: Method, model: CausalLM, prompts: Sequence[Prompt], terms: Terms) -> Prepared:
    """`method.prepare`, with what it cost. A lens that is in the user's cache already costs nothing."""
    before = model.ledger.copy()
    return Prepared(method.prepare(model, prompts, terms), model.ledger.since(before))


_methods: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Make a class of methods known by its `name`; a decorator. Raises `ArgumentError` if another has that name."""
    if method.name in _methods:
        raise ArgumentError(f"there is a method {method.name!r} already")
    if any(sign in method.name for sign in ":,="):
        raise ArgumentError(f"a method's name may hold none of : , = (they end it in a spec), got {method.name!r}")
    _methods[method.name] = method
    return method


def names() -> list[str]:
    """All methods."""
    return sorted(_methods)


def get(name: str) -> type[Method]:
    """The class of this name. Raises `ArgumentError`, which lists all, for an unknown one."""
    if name not in _methods:
        raise ArgumentError(f"no method {name!r}; there are {', '.join(names())}")
    return _methods[name]


def parse(spec: str) -> Method:
    """The method of a spec such as `power:steps=4`. Raises `ArgumentError` for an unknown name, option or value."""
    name, *parts = spec.strip().split(":")
    found = get(name)()
    pairs = [part.partition("=") for part in parts]
    return with_options(found, [(option, text) for option, _, text in pairs])


def with_options(method: Method, options: Sequence[tuple[str, str]]) -> Method:
    """A method with some options set from text. Raises `ArgumentError` for an unknown option or a value of no use."""
    kinds = get_type_hints(type(method))
    known = [f.name for f in fields(method)]
    values: dict[str, Any] = {}
    for name, text in options:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ArgumentError(f"method {method.name!r} has no option {name!r}; it has {listed}")
        if name in values:
            raise ArgumentError(f"option {name!r} of method {method.name!r} is given twice")
        values[name] = _value(f"{method.name}:{name}", text.strip(), kinds[name])
    return replace(method, **values)


def _value(name: str, text: str, kind: Any) -> Any:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in kinds and text == "none":
        return None
    for kind in (int, float, bool, str):
        if kind in kinds and (value := _read(text, kind)) is not None:
            return value
    wanted = ", ".join("none" if k is type(None) else k.__name__ for k in kinds)
    raise ArgumentError(f"{name} must be {wanted}, got {text!r}")


def _read(text: str, kind: type) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    try:
        return kind(text) if text else None
    except ValueError:
        return None


def _written(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
