"""lm-evaluation-harness: the model `powermc`, whose answers are drawn from p(x)^alpha (extra `lm-eval`).

`python -m powermc.integrations.lm_eval --model powermc --model_args pretrained=smollm2,alpha=4 --tasks ...` is
`lm_eval` with this model; importing the module registers it. It knows nothing of tasks or grading.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lm_eval.models  # first: lm_eval fills its registry only while it is empty  # noqa: F401
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from powermc.errors import ArgumentError
from powermc.lm.model import CausalLM
from powermc.power import distinct, power_sample
from powermc.sequences.path import Path, Prompt

_LOGGER = logging.getLogger(__name__)

_OURS = {"model", "prompts", "max_new_tokens", "chains", "stop", "chat", "store", "resume", "keep_proposals"}
SETTINGS = tuple(name for name in inspect.signature(power_sample).parameters if name not in _OURS)
"""Those of `power_sample` that the model takes."""

_DECODING = ("do_sample", "temperature", "top_p", "top_k")
_AT_ONCE = 64
_Encoded = tuple[tuple[str, str], list[int], list[int]]


@register_model("powermc")
class PowerLM(TemplateLM):
    """Answers by power sampling, likelihoods by the model itself.

    `generate_until` returns the last text of one chain per request, cut before its first stop string; stop strings
    end a path, they are part of its target. A task that repeats its requests gets independent chains. Likelihoods are
    log p, in nats: p^alpha has no tractable normaliser, and alpha does not enter them.

    Parameters
    ----------
    pretrained
        A name for `CausalLM.from_pretrained`, or a `CausalLM`.
    batch_size
        The most rows that decode side by side; "auto" for 64.
    max_gen_toks
        Horizon of requests that name none, in tokens.
    dtype, device, gguf_file, memory
        Of `CausalLM.from_pretrained`; a CUDA device where there is none is the CPU.
    settings
        Of `power_sample` (`SETTINGS`): alpha, steps, block_size, temperature (of the proposals), seed, kernel, ...

    What a task's `generation_kwargs` say of decoding (do_sample, temperature, top_p, top_k) is replaced by power
    sampling, and logged once; anything else but `until` and the horizon is refused (`ArgumentError`).
    """

    def __init__(
        self,
        pretrained: str | CausalLM = "smollm2",
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        dtype: str = "float32",
        device: str | None = None,
        gguf_file: str | None = None,
        memory: int | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        for name in settings:
            if name not in SETTINGS:
                near = next(iter(difflib.get_close_matches(name, SETTINGS, 1)), None)
                hint = f"did you mean {near}?" if near else f"choose of {', '.join(SETTINGS)}"
                raise ArgumentError(f"there is no model argument {name!r}; {hint}")
        self.settings, self.max_gen_toks = settings, int(max_gen_toks)
        if isinstance(pretrained, CausalLM):
            self.lm = pretrained
        else:
            rows = _rows(batch_size, max_batch_size)
            options: dict[str, Any] = {"dtype": dtype, "device": _device(device), "memory": memory, "max_rows": rows}
            self.lm = CausalLM.from_pretrained(pretrained, gguf_file=gguf_file, **options)
        self.tokenizer = self.lm.text._need_tokenizer()
        self._told: set[str] = set()

    # What the harness asks about.

    @property
    def eot_token_id(self) -> int:
        ids = self.lm.text.eos
        own = self.tokenizer.eos_token_id
        if own is None and not ids:
            raise ArgumentError(f"{self.lm.name} has no end token, which likelihoods without a context begin with")
        return int(own if own is not None else min(ids))

    @property
    def prefix_token_id(self) -> int:
        """What a likelihood without a context is conditioned on: the first token of texts, else the end token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens of context, 2048 for a model that names no bound."""
        return self.lm.decoder.context or 2048

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path or self.lm.name).replace("/", "__")

    @property
    def costs(self) -> dict[str, Any]:
        """The model's ledger so far."""
        return self.lm.ledger.as_dict()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; `add_special_tokens=None` adds them unless the text begins with one (a chat template's)."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs))

    # Answers.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One answer per request, in their order: those with the same stop strings and horizon are drawn together."""
        asked = [self._asked(cast("Any", request.args)[1]) for request in requests]
        encoded = [self._prompt(str(r.args[0]), horizon) for r, (_, horizon) in zip(requests, asked, strict=True)]
        prompts = distinct(encoded)  # before they are parted: a repeated request has a stream of its own
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, key in enumerate(asked):
            groups.setdefault(key, []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Power sampling") as bar:
            for (until, horizon), members in groups.items():
                for begin in range(0, len(members), _AT_ONCE):
                    part = members[begin : begin + _AT_ONCE]
                    for i, text in zip(part, self._draw([prompts[i] for i in part], until, horizon), strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(part))
        return answers

    def _asked(self, given: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
        """Stop strings and horizon."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        until, horizon = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        for name in _DECODING:
            kwargs.pop(name, None)
            if name in given and name not in self._told:
                self._told.add(name)
                _LOGGER.warning(f"powermc: {name}={given[name]!r} of the task is replaced by power sampling")
        if kwargs:
            raise ArgumentError(f"generation_kwargs {', '.join(kwargs)} cannot be used by powermc; leave them out")
        return tuple(dict.fromkeys(text for text in until if text)), horizon

    def _prompt(self, context: str, horizon: int) -> Prompt:
        """The prompt's last tokens that leave room for the horizon, as the harness's own models do."""
        ids, most = self.tok_encode(context) or [self.prefix_token_id], self.max_length - horizon
        if most < 1:
            raise ArgumentError(f"max_gen_toks {horizon} leaves no room for a prompt in a context of {self.max_length}")
        if len(ids) > most:
            _LOGGER.warning(f"powermc: a prompt of {len(ids)} tokens was cut on the left to {most}")
        return Prompt(tuple(ids[-most:]), context)

    def _draw(self, prompts: Sequence[Prompt], until: Sequence[str], horizon: int) -> Iterator[str]:
        special = {text: i for text in until if (i := self._special(text)) is not None}
        stop = [text for text in until if text not in special]
        with _also_ending(self.lm, special.values()):
            run = power_sample(self.lm, prompts, max_new_tokens=horizon, chains=1, stop=stop, **self.settings)
        if run.interrupted:
            raise KeyboardInterrupt
        for error in run.errors.values():
            raise error
        for (text,) in run.texts:
            ends = [at for s in stop if (at := cast(str, text).find(s)) >= 0]
            yield cast(str, text)[: min(ends, default=None)]

    def _special(self, text: str) -> int | None:
        """The id of a stop string that is a special token: an end token then, as it is in no decoded text."""
        found = self.tokenizer.convert_tokens_to_ids(text)
        return found if found in self.tokenizer.all_special_ids and text in self.tokenizer.all_special_tokens else None

    # Likelihoods.

    def _loglikelihood_tokens(
        self, requests: list[_Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Likelihoods") as bar:
            for begin in range(0, len(requests), _AT_ONCE):
                part = requests[begin : begin + _AT_ONCE]
                found = self._score([(context, tail) for _, context, tail in part])
                for (key, _, _), answer in zip(part, found, strict=True):
                    self.cache_hook.add_partial("loglikelihood", key, answer)
                answers += found
                bar.update(len(part))
        self.lm.forget()
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, nats, in windows as long as the context; each token is scored once."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Rolling likelihoods"):
            (text,) = request.args
            ids = self.tok_encode(str(text), add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            answer = sum(log_p for log_p, _ in self._score([make_disjoint_window(window) for window in windows]))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
            answers.append(float(answer))
        self.lm.forget()
        return answers

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log p of the tail, whether greedy decoding gives it) for each (context, tail)."""
        lm, whole = self.lm, [(context + tail, len(tail)) for context, tail in pairs]
        kept = [(ids[-(self.max_length + 1) :], n) for ids, n in whole]
        for ids, n in kept:
            if n >= len(ids):
                raise ArgumentError(f"a tail of {n} tokens has no room for its context of {self.max_length} tokens")
        paths = [Path(Prompt(tuple(ids[: len(ids) - n])), tuple(ids[len(ids) - n :]), False) for ids, n in kept]
        answers = []
        for path in lm.answer([lm.score(path, ()) for path in paths]):  # type: ignore[misc]  # requests of its own
            if isinstance(path, Exception):
                raise path
            first = len(path.prompt.ids) - 1
            likeliest = lm.logits(path.cache.hidden(lm.depth, first, first + len(path)), path.tokens).argmax(-1)
            answers.append((path.log_prob, likeliest.tolist() == list(path.tokens)))
        return answers


def _rows(batch_size: int | str | None, most: int | None) -> int:
    if batch_size is None or str(batch_size).startswith("auto"):
        return 64 if most is None else int(most)
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ArgumentError(f"batch_size must be a whole number >= 1 or 'auto', got {batch_size!r}")
    return int(batch_size)


def _device(name: str | None) -> str:
    """The harness names cuda:0 where its user named nothing; without CUDA that is the CPU, as in its own models."""
    if name is None or (name.startswith("cuda") and not torch.cuda.is_available()):
        return "cpu"
    return name


@contextmanager
def _also_ending(lm: CausalLM, ids: Any) -> Iterator[None]:
    """Let these tokens end paths too, for a while."""
    own = lm.text.eos
    lm.text.eos = own | frozenset(ids)
    try:
        yield
    finally:
        lm.text.eos = own


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
