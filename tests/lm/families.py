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
_SEP: dict[str, Any] = {"cls_token_id": 1, "sep_token_id": 2}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}

# Class names, and what the family adds to the common shape. Windows are shorter than the paths.
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
"""Those that every law of the oracle is checked on."""

MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "apertus": ("ApertusForCausalLM", "ApertusConfig", {}),
    "arcee": ("ArceeForCausalLM", "ArceeConfig", {}),
    "bitnet": ("BitNetForCausalLM", "BitNetConfig", {}),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", {"rotary_dim": 4}),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {"sliding_window": 4}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**_MOE, **_LATENT}),
    "diffllama": ("DiffLlamaForCausalLM", "DiffLlamaConfig", {}),
    "dots1": ("Dots1ForCausalLM", "Dots1Config", {**_MOE, "head_dim": 8}),
    "ernie4.5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", {"head_dim": 8}),
    "exaone4": ("Exaone4ForCausalLM", "Exaone4Config", {"sliding_window": 4, "sliding_window_pattern": 2}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {}),
    "glm": ("GlmForCausalLM", "GlmConfig", {"head_dim": 8}),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {"head_dim": 8}),
    "glm4-moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**_MOE, "head_dim": 8}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {}),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {"rotary_dim": 4}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**_MOE, "head_dim": 8, "sliding_window": 4}),
    "helium": ("HeliumForCausalLM", "HeliumConfig", {"head_dim": 8}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", {"head_dim": 8}),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", {"num_local_experts": 4, "kv_channels": 8}),
    "minicpm3": ("MiniCPM3ForCausalLM", "MiniCPM3Config", _LATENT),
    "ministral": ("MinistralForCausalLM", "MinistralConfig", {"head_dim": 8, "sliding_window": 4}),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", "ModernBertDecoderConfig", {"local_attention": 8, **_SEP}),
    "nanochat": ("NanoChatForCausalLM", "NanoChatConfig", {}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", {}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", {}),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", {"sliding_window": 4}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", _MOE),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", {}),
    "phi": ("PhiForCausalLM", "PhiConfig", {}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", _MOE),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_MOE, "decoder_sparse_step": 2}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_MOE, "head_dim": 8}),
    "seed-oss": ("SeedOssForCausalLM", "SeedOssConfig", {"head_dim": 8}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {"sliding_window": 4}),
    "vaultgemma": ("VaultGemmaForCausalLM", "VaultGemmaConfig", {"head_dim": 8, "sliding_window": 4}),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", {"ffn_dim": 64}),
}
"""Further ones, checked for what depends on the architecture: splitting, resuming, scoring."""

ALL = {**FAMILIES, **MORE}

_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
UNCACHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom (ALiBi)": ("BloomForCausalLM", "BloomConfig", {}),
    "falcon with ALiBi": ("FalconForCausalLM", "FalconConfig", {"alibi": True}),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"attention_types": [[["global", "local"], 2]], "window_size": 4, "num_layers": 4},
    ),
    "gpt (the first)": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", {}),
    "jamba": ("JambaForCausalLM", "JambaConfig", {"attn_layer_offset": 1, "attn_layer_period": 2}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {"full_attn_idxs": [1, 3]}),
    "longcat-flash": ("LongcatFlashForCausalLM", "LongcatFlashConfig", {**_MOE, **_LATENT, "head_dim": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {}),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "mimo-v2-flash": ("MiMoV2FlashForCausalLM", "MiMoV2FlashConfig", {**_MOE, "head_dim": 8}),
    "qwen3-next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {**_MOE, **_LINEAR, "head_dim": 8}),
    "recurrent-gemma": ("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", {}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {}),
}
"""Those that cannot be driven row by row, and are sampled without a cache."""


def untouched_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of this family, also one of `UNCACHED`, as its class initialises it."""
    model_name, config_name, own = {**ALL, **UNCACHED}[family]
    shape = {k: v for k, v in _SHAPE.items() if k.endswith("token_id")} if family in ("gpt2", "mpt") else _SHAPE
    config = getattr(transformers, config_name)(**{**shape, **own, **changes})
    torch.manual_seed(seed)
    return getattr(transformers, model_name)(config).eval()


def tiny_model(family: str = "llama", *, logit_scale: float = 2.0, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of this family whose logits have a standard deviation of about `logit_scale` nats."""
    model = untouched_model(family, seed=seed, **changes)
    config = model.config
    ids = torch.arange(24)[None] % config.vocab_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("A_log"):  # the logarithm of decay rates
                parameter.mul_(8)
        spread = float(model(input_ids=ids).logits.std())
        if not hasattr(config, "final_logit_softcapping") and family != "nanochat":  # these cap their logits
            _scale(model, logit_scale / spread)
    return model


_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "final_norm", "layer_norm", "ln_f", "norm_f")


def _scale(model: PreTrainedModel, factor: float) -> None:
    """Multiply the logits: by the final norm, as a tied head would change the input too; or else by the head."""
    norms = [(name.count("."), m) for name, m in model.named_modules() if name.split(".")[-1] in _FINAL_NORMS]
    norm = [m for depth, m in norms if depth == min(d for d, _ in norms)][-1:]
    head: Any = model.get_output_embeddings()
    # OLMo's norm has no parameters, the first GPT no norm.
    parameters = [p for m in norm for p in m.named_parameters()] or [("head", head.weight)]
    for name, parameter in parameters:
        if name == "weight" and float(parameter.abs().max()) == 0:  # Gemma's norms and Nemotron's multiply by 1 + it
            parameter.add_(1).mul_(factor).sub_(1)
        else:
            parameter.mul_(factor)
