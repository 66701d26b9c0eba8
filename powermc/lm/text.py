"""Between text and token ids: prompts, stop ids, stop strings, and what a checkpoint's generation config asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from powermc.errors import ArgumentError
from powermc.sequences.path import StopRule, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings of a generation config that change the next-token distribution, and the values at which they do nothing.
_WARPERS: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 1.0),
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "sequence_bias": (None, {}),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "renormalize_logits": (None, False),
}


class Text:
    """The tokenizer of a model, and its stop ids: all of the generation config, else of the config, else its own."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        config = getattr(model, "generation_config", None)
        for ids in (
            getattr(config, "eos_token_id", None),
            getattr(model.config, "eos_token_id", None),
            getattr(tokenizer, "eos_token_id", None),
        ):
            if ids is not None:
                break
        self.eos = frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else map(int, ids))
        self.warpers = {
            name: value for name, idle in _WARPERS.items() if (value := getattr(config, name, None)) not in idle
        }

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def _need_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise ArgumentError("this model was given no tokenizer: pass prompts as powermc.Prompt(ids=...)")
        return self._tokenizer

    def encode(self, text: str, chat: bool | None) -> Tokens:
        """Token ids of a prompt; see `CausalLM.prompt`."""
        tokenizer = self._need_tokenizer()
        if not isinstance(text, str) or not text.strip():
            raise ArgumentError(f"the prompt is empty: {text!r}; give it some text")
        if chat and not self.has_chat_template:
            raise ArgumentError("chat=True needs a tokenizer with a chat template; this one has none: use chat=False")
        if self.has_chat_template if chat is None else chat:
            message = [{"role": "user", "content": text}]
            encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        else:
            encoded = tokenizer(text)
        ids = tuple(map(int, encoded["input_ids"]))
        if not ids:
            raise ArgumentError(f"the prompt {text!r} has no tokens")
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        tokenizer = self._need_tokenizer()
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str | None:
        """Text of one token, special ones by name; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def stop_rule(self, stop: Sequence[str]) -> StopRule | None:
        """True of the prefixes whose text contains one of the strings; None if there are none."""
        if isinstance(stop, str):
            raise ArgumentError(f"stop must be a list of strings, got the string {stop!r}; write [{stop!r}]")
        if not all(stop):
            raise ArgumentError("a stop string must not be empty")
        if not stop:
            return None
        strings, decode = tuple(stop), self.decode
        self._need_tokenizer()
        return lambda tokens: any(s in text for text in (decode(tokens),) for s in strings)
