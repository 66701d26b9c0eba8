"""Hugging Face: `model.generate(**inputs, custom_generate=powermc.hf.power_generate, alpha=4.0)`.

`generate` of transformers prepares inputs and lengths as it always does and then hands them to `power_generate`.
Whatever was given to the call is used or refused, nothing is dropped: also what transformers does not pass on to a
`custom_generate` function (streamers, assistant models, misspelt names); see `powermc.hf_call`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import Signature
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, StopStringCriteria
from transformers.utils.generic import ModelOutput

from powermc.errors import ArgumentError
from powermc.hf_call import PASSED, SIGNATURE, call_of_generate, check_call
from powermc.lm.model import CausalLM
from powermc.lm.text import Text
from powermc.power import power_sample
from powermc.results import Run
from powermc.sequences.path import Path, Prompt

_LOGGER = logging.getLogger(__name__)


@dataclass
class PowerGenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`; R = prompts x num_return_sequences rows.

    Attributes
    ----------
    sequences
        (R, S + n): the inputs as given and the new tokens, padded with `pad_token_id`; chains of a prompt are adjacent.
    scores
        (R, n), nats: log p of each new token under the model's raw softmax, 0 after the end.
    sequences_scores
        (R,), nats: log p of all new tokens together, the end token included.
    lengths
        (R,): how many new tokens, the end token included.
    acceptance, changed
        (R,): the share of kernel steps that were accepted, and that were accepted and changed the path.
    costs
        The ledger of the run (`powermc.Ledger.as_dict`).
    run
        The `powermc.Run`: every draw, its diagnostics and report.
    """

    sequences: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    acceptance: torch.Tensor | None = None
    changed: torch.Tensor | None = None
    costs: dict[str, Any] | None = None
    run: Run | None = None


class PowerGenerate:
    """The `custom_generate` of power sampling; `power_generate` is the one there is.

    `model.generate(**inputs, custom_generate=power_generate, alpha=4.0, ...)` samples each row of the batch, without
    its padding, from p(x)^alpha; `num_return_sequences` are independent chains. Settings of its own are those of
    `power_sample` (`SETTINGS`). `max_new_tokens`, `max_length`, `eos_token_id`, `pad_token_id`, `stop_strings` and
    `return_dict_in_generate` mean what they do in `generate`. Without `seed` one is drawn from torch's global
    generator: `torch.manual_seed` makes a call repeatable, and further calls draw further answers.

    Raises `ArgumentError` for a misspelt name, for what would bend the target (temperature, top_k, ...) if the call
    asks for it, and for what power sampling has no use for; `ModelError` for a model that cannot be driven;
    `ChainError` if a chain failed. What only the checkpoint's generation config asks for is left out, logged once and
    listed in `Run.ignored_warpers`.
    """

    @property
    def __signature__(self) -> Signature:
        """What transformers reads to learn which arguments are ours: the one moment when it has all of the call."""
        call = call_of_generate()
        if call is not None:
            model, given = call
            check_call(model, given)
            _kept(model).checked = True
            if given["tokenizer"] is not None:
                _kept(model).tokenizer = given["tokenizer"]
        return SIGNATURE

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        generation_config: GenerationConfig,
        attention_mask: torch.Tensor | None = None,
        stopping_criteria: Sequence[Any] = (),
        stop_strings: str | Sequence[str] | None = None,
        proposal_temperature: float | None = None,
        num_return_sequences: int | None = None,
        seed: int | None = None,
        **rest: Any,
    ) -> PowerGenerateOutput | torch.Tensor:
        if not _kept(model).checked:
            raise ArgumentError(
                "power_generate is called by model.generate(custom_generate=power_generate) of transformers 5 and no "
                "other way; use powermc.hf.generate(model, ...)"
            )
        _kept(model).checked = False
        config: Any = generation_config
        chains = config.num_return_sequences if num_return_sequences is None else num_return_sequences
        every = max(config.num_beams, config.num_return_sequences)  # transformers has repeated each row
        given, mask = input_ids[::every], None if attention_mask is None else attention_mask[::every]
        lm = attached(model)
        stop = _stop(stop_strings, stopping_criteria)
        settings = {name: rest[name] for name in PASSED if name in rest}
        _prepare_text(lm, model, config, bool(stop) or settings.get("reward") is not None)
        run = power_sample(
            lm,
            _prompts(given, mask),
            temperature=proposal_temperature,
            max_new_tokens=config.max_length - input_ids.shape[1],
            chains=chains,
            stop=stop,
            seed=int(torch.randint(2**63 - 1, ())) if seed is None else seed,
            **settings,
        )
        if run.interrupted:
            raise KeyboardInterrupt
        for error in run.errors.values():
            raise error
        output = _output(run, given.repeat_interleave(chains, dim=0), _pad_id(config))
        return output if config.return_dict_in_generate else output.sequences  # type: ignore[return-value]


power_generate = PowerGenerate()


def generate(
    model: PreTrainedModel, inputs: torch.Tensor | None = None, *, tokenizer: Any = None, **arguments: Any
) -> PowerGenerateOutput | torch.Tensor:
    """`model.generate(inputs, custom_generate=power_generate, ...)`; what a `custom_generate/` folder calls.

    `tokenizer` is kept with the model for stop strings and rewards. Raises what `PowerGenerate` does.
    """
    if tokenizer is not None:
        _kept(model).tokenizer = tokenizer
    call: Any = model.generate
    return call(inputs, custom_generate=power_generate, **arguments)


# The model's wrapper, kept on the model.


class _Kept:
    """What hangs on a model: it is collected with the model, and neither copied nor pickled along with it.

    A weak dictionary could not hold it, as the wrapper refers to its model.
    """

    def __init__(self) -> None:
        self.lm: CausalLM | None = None
        self.tokenizer: Any = None
        self.options: dict[str, Any] = {}
        self.state: tuple[Any, ...] = ()
        self.told: dict[str, Any] = {}
        self.checked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


def _kept(model: PreTrainedModel) -> _Kept:
    return model.__dict__.setdefault("_powermc", _Kept())


def attach(model: PreTrainedModel, tokenizer: Any = None, **options: Any) -> CausalLM:
    """Wrap a live model for all further calls, with options of `CausalLM` (`max_rows`, `memory`, `speculate`, ...).

    `power_generate` does this by itself. Raises `ArgumentError` for a model in training mode, `ModelError` for one that
    cannot be driven.
    """
    if model.training:
        raise ArgumentError(f"{type(model).__name__} is in training mode; call model.eval() before sampling from it")
    kept = _kept(model)
    kept.lm = CausalLM(model, tokenizer, **options)
    kept.tokenizer, kept.options, kept.state = tokenizer, options, _state(model)
    return kept.lm


def attached(model: PreTrainedModel) -> CausalLM:
    """The model's wrapper: made once, and again where dtype, device, attention or parameters were exchanged.

    Weights that were trained meanwhile are noticed by the wrapper itself.
    """
    kept = _kept(model)
    if kept.lm is None or kept.lm.decoder.model is not model or kept.state != _state(model) or model.training:
        return attach(model, kept.tokenizer, **kept.options)
    return kept.lm


def _state(model: PreTrainedModel) -> tuple[Any, ...]:
    attention = getattr(model.config, "_attn_implementation", None)
    return (model.dtype, model.device, attention, *map(id, model.parameters()))


def _prepare_text(lm: CausalLM, model: PreTrainedModel, config: Any, needed: bool) -> None:
    """Stop ids of this call, and the tokenizer: the last one given, else (if `needed`) that of the checkpoint."""
    kept = _kept(model)
    if kept.tokenizer is None and needed:
        try:
            kept.tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path, local_files_only=True)
        except Exception as error:  # whatever a missing or foreign checkpoint raises
            raise ArgumentError(
                "stop strings and rewards need the tokenizer: call powermc.hf.attach(model, tokenizer) once"
            ) from error
    lm.text = Text(model, kept.tokenizer)
    ids = config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else torch.as_tensor(ids).flatten().tolist()
    lm.text.eos = frozenset(i for i in map(int, ids) if i >= 0)  # transformers takes -1 for "never"
    if lm.ignored_warpers and lm.ignored_warpers != kept.told:
        kept.told = lm.ignored_warpers
        asked = ", ".join(f"{name}={value!r}" for name, value in kept.told.items())
        _LOGGER.warning("p is the model's own distribution: %s of the checkpoint's generation config left out", asked)


# From tensors to prompts and back.


def _prompts(ids: torch.Tensor, mask: torch.Tensor | None) -> list[Prompt]:
    """A prompt per row, padding left out on either side."""
    prompts = []
    for r, row in enumerate(ids):
        seen = torch.arange(len(row)) if mask is None else mask[r].nonzero().flatten().cpu()
        if not len(seen):
            raise ArgumentError(f"row {r} of the batch is all padding; give it at least one token")
        if int(seen[-1] - seen[0]) + 1 != len(seen):
            raise ArgumentError(f"row {r} has padding between its tokens; padding belongs on the left or on the right")
        prompts.append(Prompt(tuple(row[seen[0] : seen[-1] + 1].tolist())))
    return prompts


def _pad_id(config: Any) -> int | None:
    """As transformers decides: the pad token, else the first end token."""
    ids = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    return None if ids is None else int(torch.as_tensor(ids).flatten()[0])


def _output(run: Run, given: torch.Tensor, pad: int | None) -> PowerGenerateOutput:
    keys = [(p, c) for p, chains in enumerate(run.chains) for c in range(len(chains))]
    paths: list[Path] = [run.chains[p][c].path for p, c in keys]  # type: ignore[misc]  # no chain failed
    lengths = [len(path) for path in paths]
    if pad is None:
        if len(set(lengths)) > 1:
            raise ArgumentError("answers differ in length and there is no pad token: pass pad_token_id=...")
        pad = 0
    device = given.device
    real = torch.float32 if device.type == "mps" else torch.float64
    new = torch.full((len(paths), max(lengths)), pad, dtype=given.dtype)
    scores = torch.zeros(new.shape, dtype=torch.float64)
    for r, path in enumerate(paths):
        new[r, : len(path)] = torch.tensor(path.tokens, dtype=new.dtype)
        scores[r, : len(path)] = torch.from_numpy(path.log_p)
    taken = torch.tensor([run.acceptance(p, c) for p, c in keys], dtype=real)
    rates = taken[:, 1:] / taken[:, :1].clamp(min=1)
    return PowerGenerateOutput(
        sequences=torch.cat([given, new.to(device)], dim=1),
        scores=scores.to(device, real),
        sequences_scores=scores.sum(1).to(device, real),
        lengths=torch.tensor(lengths, device=device),
        acceptance=rates[:, 0].to(device),
        changed=rates[:, 1].to(device),
        costs=run.cost.as_dict(),
        run=run,
    )


def _stop(strings: str | Sequence[str] | None, criteria: Sequence[Any]) -> tuple[str, ...]:
    """Stop strings of the call, and of every `StopStringCriteria`."""
    found = () if strings is None else (strings,) if isinstance(strings, str) else tuple(strings)
    more = [text for c in criteria if isinstance(c, StopStringCriteria) for text in c.stop_strings]
    return tuple(dict.fromkeys((*found, *more)))
