"""Tiny randomly initialised models of many architectures, scaled so that their distributions are peaked."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 37
EOS = (3, 5, 8)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": list(EOS),
}
_GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}

# Class name stem, and what the family adds to the common shape. Windows are shorter than the paths.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen2-sliding": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 7}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"sliding_window": 4}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 3.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.5}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    ),
}


def tiny_model(family: str = "llama", *, logit_scale: float = 2.0, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of this family whose logits have a standard deviation of about `logit_scale` nats."""
    model_name, config_name, own = FAMILIES[family]
    shape = {k: v for k, v in _SHAPE.items() if k.endswith("token_id")} if family in ("gpt2", "mpt") else _SHAPE
    config = getattr(transformers, config_name)(**{**shape, **own, **changes})
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, model_name)(config).eval()
    ids = torch.arange(24)[None] % config.vocab_size
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
        # Tied heads would change the input too; the final norm scales logits alone.
        norm = [m for name, m in model.named_modules() if name.split(".")[-1] in _FINAL_NORMS][-1]
        spread = float(model(input_ids=ids).logits.std())
        if isinstance(norm, torch.nn.Module) and not hasattr(config, "final_logit_softcapping"):
            _scale(norm, config, logit_scale / spread)
    return model


_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "norm_f")


def _scale(norm: torch.nn.Module, config: Any, factor: float) -> None:
    for name, parameter in norm.named_parameters():
        if "gemma" in config.model_type and name == "weight":
            parameter.add_(1).mul_(factor).sub_(1)  # these norms multiply by 1 + weight
        else:
            parameter.mul_(factor)
