"""What a call of `model.generate` asks of `powermc.hf.power_generate`: read as it was given, and checked by name."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from types import FrameType
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StopStringCriteria

from powermc.errors import ArgumentError
from powermc.power import power_sample

# What `generate` has names of its own for: the model, prompts, lengths, chains and stop strings.
_OURS = {"model", "prompts", "temperature", "max_new_tokens", "chains", "stop", "chat"}
PASSED = tuple(name for name in inspect.signature(power_sample).parameters if name not in _OURS)
SETTINGS = (*PASSED, "proposal_temperature", "stop_strings")
"""Settings of `power_generate` beside those of `generate`: what `power_sample` documents; `proposal_temperature` is its
`temperature`."""

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_HONOURED = {"max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "bos_token_id", "num_return_sequences"}
_HONOURED |= {"return_dict_in_generate", "stopping_criteria", "generation_config", "tokenizer", "trust_remote_code"}
_HONOURED |= {"inputs", "transformers_version"}
# Where something falsy has an effect, or something else has none.
_NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}
_NEUTRAL |= {"encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "length_penalty": 1.0, "num_beams": 1}
_NEUTRAL |= {"num_beam_groups": 1, "use_cache": True, "do_sample": True}

_TRUNCATE = "the power distribution needs no truncation: leave it out"
_PREFER = "to prefer some texts to others use reward=..., which is part of the target"
_INSTEAD = {
    "temperature": "alpha sharpens whole answers where a temperature sharpens each token; for that of the proposals "
    "use proposal_temperature",
    **dict.fromkeys(("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), _TRUNCATE),
    **dict.fromkeys(
        ("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
        _PREFER,
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "min_length", "min_new_tokens"), _PREFER),
    **dict.fromkeys(("exponential_decay_length_penalty", "logits_processor", "prefix_allowed_tokens_fn"), _PREFER),
    "num_beams": "chains are num_return_sequences",
    "do_sample": "power sampling draws at random: leave it out",
    "max_time": "bound the work by max_new_tokens and steps",
    "streamer": "tokens of a chain change until its last step: use progress=True or callbacks=...",
    "assistant_model": "proposals come from exit=... (a powermc.Lens or a powermc.CausalLM with the same tokenizer)",
    "output_scores": "log p per token is in `scores` of what return_dict_in_generate=True returns",
    "output_logits": "log p per token is in `scores` of what return_dict_in_generate=True returns",
}
_ALIASES = {"chains": "num_return_sequences", "stop": "stop_strings", "prompts": "input_ids", "chat": "input_ids"}


def check_call(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Raise `ArgumentError` for the first argument of `generate` that power sampling does not honour."""
    if model.config.is_encoder_decoder:
        raise ArgumentError(f"{type(model).__name__} is an encoder-decoder; power sampling needs a decoder-only model")
    forward = set(inspect.signature(model.forward).parameters)
    config = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    valid = {*SETTINGS, *_HONOURED, *_INSTEAD, *_INPUTS, *_GENERATE, *config}
    for name in given:
        if name not in valid | forward:
            near = _ALIASES.get(name) or next(iter(difflib.get_close_matches(name, sorted(valid), 1)), None)
            hint = f"did you mean {near}?" if near else f"those of power_generate are {', '.join(SETTINGS)}"
            raise ArgumentError(f"there is no argument {name!r}; {hint}")
    _check_inputs(given)
    for name, value in given.items():
        if name in forward and name not in valid and not _empty(value):
            raise ArgumentError(f"power_generate cannot use {name}: it takes input_ids and attention_mask only")
        if name not in SETTINGS and name not in _INPUTS:
            _check_option(name, value)
    _check_config(given.get("generation_config"), model.generation_config)


def _check_config(config: Any, own: Any) -> None:
    """What a configuration object asks for; where it says what the checkpoint's says, that is the checkpoint's."""
    for name, value in {} if config is None else vars(config).items():
        if name == "stop_strings" and value:
            raise ArgumentError("pass stop_strings to generate itself, with the tokenizer, not in generation_config")
        if not name.startswith("_") and value != getattr(own, name, None):
            _check_option(name, value)


def _check_option(name: str, value: Any) -> None:
    if name in _HONOURED:
        if name == "stopping_criteria":
            _check_criteria(value or ())
        return
    neutral = value is None or (value == _NEUTRAL[name] if name in _NEUTRAL else _empty(value))
    if not neutral:
        shown = f"{name}={value!r}" if isinstance(value, bool | int | float | str | list) else name
        raise ArgumentError(f"power_generate cannot use {shown}: {_INSTEAD.get(name, 'leave it out')}")


def _check_criteria(criteria: Sequence[Any]) -> None:
    for criterion in criteria:
        if not isinstance(criterion, StopStringCriteria):
            raise ArgumentError(
                f"power_generate cannot use the stopping criterion {type(criterion).__name__}: "
                "use max_new_tokens, eos_token_id or stop_strings"
            )


def _check_inputs(given: Mapping[str, Any]) -> None:
    ids = given.get("inputs") if given.get("input_ids") is None else given["input_ids"]
    if ids is not None and (ids.ndim != 2 or ids.is_floating_point()):
        raise ArgumentError(f"input_ids must be whole numbers of shape (prompts, tokens), got shape {tuple(ids.shape)}")
    mask, types = given.get("attention_mask"), given.get("token_type_ids")
    if mask is not None and ids is not None and mask.shape != ids.shape:
        raise ArgumentError(f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}")
    if types is not None and bool(torch.as_tensor(types).any()):
        raise ArgumentError("token_type_ids other than 0 cannot be used: leave them out")


def _empty(value: Any) -> bool:
    """Whether an argument is as good as not given."""
    return value is None or (not torch.is_tensor(value) and not value)


_MIXIN: Any = GenerationMixin
_GENERATE = tuple(
    name
    for name, parameter in inspect.signature(_MIXIN.generate).parameters.items()
    if name not in ("self", "custom_generate") and parameter.kind is not Parameter.VAR_KEYWORD
)


def _signature() -> Signature:
    """Model and inputs as transformers passes them, and a keyword for each setting: those it then passes on."""
    ours = (*SETTINGS, "num_return_sequences")  # the latter, as transformers refuses it without do_sample
    settings = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in ours]
    first = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("model", "input_ids")]
    return Signature([*first, *settings, Parameter("rest", Parameter.VAR_KEYWORD)])


SIGNATURE = _signature()


def _frame_of(function: Callable[..., Any]) -> FrameType | None:
    """The frame of the innermost call of `function` that is under way."""
    plain: Any = inspect.unwrap(function)
    code, frame = plain.__code__, inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def call_of_generate() -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """Model and arguments of the call of `generate` that is being taken apart; None at any other time.

    transformers hands a `custom_generate` function neither streamer nor assistant model nor tokenizer, and not the
    names it does not know; unread, they would be ignored without a word, or refused without the name that was meant.
    """
    taking = _frame_of(_MIXIN._extract_generation_mode_kwargs)
    calling = None if taking is None else _frame_of(_MIXIN.generate)
    if taking is None or calling is None:
        return None
    found = calling.f_locals
    tokenizer = taking.f_locals.get("generation_mode_kwargs", {}).get("tokenizer")
    custom, bound = found.get("custom_generate"), {}
    while isinstance(custom, functools.partial):
        custom, bound = custom.func, {**custom.keywords, **bound}
    given = {**{name: found.get(name) for name in _GENERATE}, **bound, **found["kwargs"], "tokenizer": tokenizer}
    return found["self"], given
