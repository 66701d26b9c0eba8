"""`model.generate(custom_generate=power_generate)`: what it returns, what it honours, what it refuses."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import logging
import pickle
import shutil
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

import powermc.hf as hf
from powermc import ArgumentError, ChainError, ModelError, Prompt, Run, power_sample
from powermc.lm import CausalLM
from tests.lm.families import tiny_model
from tests.lm.test_loading import tokenizer

FOLDER = Path(__file__).parents[1] / "examples" / "custom_generate"
PROMPTS = [[1, 2, 7], [4, 6, 9, 2, 1]]
SMALL = {"alpha": 3.0, "block_size": 4, "steps": 2}
CALL = {"custom_generate": hf.power_generate, "max_new_tokens": 8, **SMALL}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").double()


def batch(side="left", prompts=PROMPTS):
    """Padded ids and their attention mask; 0 is the pad token."""
    width = max(map(len, prompts))
    pads = [[0] * (width - len(p)) for p in prompts]
    rows = [pad + p if side == "left" else p + pad for p, pad in zip(prompts, pads, strict=True)]
    ones = [[1] * len(p) for p in prompts]
    masks = [pad + m if side == "left" else m + pad for m, pad in zip(ones, pads, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def test_is_power_sample_on_the_unpadded_rows(model):
    """The same draws as `power_sample`, whichever side the padding is on, and generate's own layout around them."""
    lm = CausalLM(model)
    run = power_sample(lm, [Prompt(tuple(p)) for p in PROMPTS], max_new_tokens=8, chains=2, seed=5, **SMALL)
    for side in ("left", "right"):
        inputs = batch(side)
        out = model.generate(**inputs, **CALL, num_return_sequences=2, seed=5, return_dict_in_generate=True)
        tensor = model.generate(**inputs, **CALL, num_return_sequences=2, seed=5)
        assert torch.equal(tensor, out.sequences)
        paths = [run.chains[p][c].path for p in range(2) for c in range(2)]
        longest = max(map(len, paths))
        assert out.sequences.shape == (4, 5 + longest)
        for r, path in enumerate(paths):
            assert out.sequences[r, :5].tolist() == inputs["input_ids"][r // 2].tolist()
            assert tuple(out.sequences[r, 5:].tolist()) == path.tokens + (0,) * (longest - len(path))
            assert out.lengths[r] == len(path)
            assert out.scores[r, : len(path)].tolist() == path.log_p.tolist()
            assert not out.scores[r, len(path) :].any()
            assert out.sequences_scores[r].item() == pytest.approx(path.log_prob, abs=1e-12)
        rates = [run.acceptance(r // 2, r % 2) for r in range(4)]
        assert out.acceptance.tolist() == [a / n for n, a, _ in rates]
        assert out.changed.tolist() == [c / n for n, _, c in rates]
        assert out.costs == out.run.cost.as_dict()
        assert out.costs["flops"] > 0
        assert isinstance(out.run, Run)
        assert out.run.settings["seed"] == 5


def test_scores_are_log_p_of_the_plain_model(model):
    out = model.generate(**batch(), **CALL, seed=1, return_dict_in_generate=True)
    for r, prompt in enumerate(PROMPTS):
        tail = out.sequences[r, 5 : 5 + out.lengths[r]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([torch.tensor(prompt), tail])[None]).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tail[:, None])[:, 0]
        assert torch.allclose(out.scores[r, : len(tail)], expected, atol=1e-9)


def test_without_a_mask_transformers_finds_the_padding(model):
    """It takes every pad token for padding; one between tokens is then an error, not another prompt."""
    out = model.generate(torch.tensor([[4, 6, 9], [0, 6, 9]]), **CALL, seed=2, return_dict_in_generate=True)
    assert [prompt.ids for prompt in out.run.prompts] == [(4, 6, 9), (6, 9)]
    with pytest.raises(ArgumentError, match="row 0 has padding between its tokens"):
        model.generate(torch.tensor([[4, 0, 9]]), **CALL)


def test_torch_seed_repeats_a_call_and_moves_on(model):
    def draw():
        return model.generate(**batch(), **CALL, return_dict_in_generate=True)

    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    again = draw()
    assert torch.equal(first.sequences, again.sequences)
    assert first.run.settings["seed"] == again.run.settings["seed"] != second.run.settings["seed"]


def test_lengths(model):
    """`max_length` counts the padded prompt as in `generate`; no end token, no end."""
    ids = batch()
    call = {k: v for k, v in CALL.items() if k != "max_new_tokens"}
    out = model.generate(**ids, **call, max_length=9, seed=1, return_dict_in_generate=True)
    assert out.run.settings["max_new_tokens"] == 4
    out = model.generate(**ids, **CALL, eos_token_id=-1, pad_token_id=0, seed=1, return_dict_in_generate=True)
    assert out.lengths.tolist() == [8, 8]
    end = out.sequences[0, 6].item()  # the second token drawn is an end token from here on
    out = model.generate(**ids, **CALL, eos_token_id=[end], pad_token_id=0, seed=1, return_dict_in_generate=True)
    for r in range(2):
        tail = out.sequences[r, 5 : 5 + out.lengths[r]].tolist()
        assert end not in tail[:-1]
        assert tail[-1] == end or len(tail) == 8
    config = GenerationConfig(max_new_tokens=3, num_return_sequences=2, do_sample=True, return_dict_in_generate=True)
    out = model.generate(**ids, custom_generate=hf.power_generate, generation_config=config, **SMALL)
    assert out.sequences.shape[0] == 4
    assert out.run.settings["max_new_tokens"] == 3


def test_a_checkpoint_that_asks_for_beams_does_not_repeat_rows(model):
    model = copy.deepcopy(model)
    model.generation_config.update(num_beams=3)
    assert model.generate(**batch(), **CALL).shape[0] == 2


def test_pad_token(model):
    model = copy.deepcopy(model)
    model.generation_config.update(pad_token_id=None, eos_token_id=None)
    model.config.pad_token_id = model.config.eos_token_id = None
    torch.manual_seed(0)
    words = {"stop_strings": ["w16"], "tokenizer": tokenizer(), "num_return_sequences": 4}
    with pytest.raises(ArgumentError, match=r"there is no pad token: pass pad_token_id"):
        model.generate(**batch(), **CALL, **words)
    assert (model.generate(**batch(), **CALL, **words, pad_token_id=36)[:, -1] == 36).any()


def test_stop_strings_end_paths(model):
    """With the tokenizer of the call, though transformers does not hand it on; and as a stopping criterion."""
    plain = model.generate(**batch(), **CALL, seed=3, num_return_sequences=4)
    word = f"w{plain[0, 6].item()}"
    call = {**CALL, "seed": 3, "num_return_sequences": 4, "return_dict_in_generate": True}
    out = model.generate(**batch(), **call, stop_strings=word, tokenizer=tokenizer())
    tails = [out.sequences[r, 5 : 5 + out.lengths[r]].tolist() for r in range(8)]
    assert all(int(word[1:]) not in tail[:-1] for tail in tails)
    assert any(tail[-1] == int(word[1:]) for tail in tails)
    criterion = StopStringCriteria.__new__(StopStringCriteria)  # its own tables need a tokenizer of subwords
    criterion.stop_strings = (word,)
    criteria = StoppingCriteriaList([criterion])
    same = model.generate(**batch(), **call, stopping_criteria=criteria)
    assert torch.equal(out.sequences, same.sequences)
    assert out.run.texts[0][0] is not None


def test_the_tokenizer_may_be_attached_or_the_checkpoint_s(model, tmp_path):
    bare = copy.deepcopy(model)
    with pytest.raises(ArgumentError, match=r"need the tokenizer: call powermc.hf.attach\(model, tokenizer\) once"):
        bare.generate(**batch(), **CALL, reward=len)
    hf.attach(bare, tokenizer(), max_rows=2)
    assert bare.generate(**batch(), **CALL, reward=lambda text: -len(text)).shape[0] == 2
    bare.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generate(**batch(), **CALL, stop_strings=["w7"]).shape[0] == 2


def test_settings_bound_by_partial(model):
    bound = functools.partial(hf.power_generate, **SMALL, seed=4)
    assert torch.equal(
        model.generate(**batch(), custom_generate=bound, max_new_tokens=8), model.generate(**batch(), **CALL, seed=4)
    )
    with pytest.raises(ArgumentError, match="did you mean steps"):
        model.generate(**batch(), custom_generate=functools.partial(hf.power_generate, step=1))


def test_settings_of_power_sample_pass(model, tmp_path):
    seen = []
    out = model.generate(
        **batch(), **CALL, seed=1, cut="block", proposal_temperature=0.5, draws=3, store=str(tmp_path / "run.db"),
        callbacks=[lambda *event: seen.append(event)], return_dict_in_generate=True,
    )  # fmt: skip
    assert out.run.settings["temperature"] == 0.5
    assert out.run.settings["scope"] == "block"
    assert len(out.run.draws[0][0]) == 3
    assert seen
    assert Run.load(tmp_path / "run.db").texts == out.run.texts


REFUSED = [
    ({"alhpa": 2.0}, "there is no argument 'alhpa'; did you mean alpha?"),
    ({"blocksize": 2}, "did you mean block_size?"),
    ({"max_new_token": 2}, "did you mean max_new_tokens?"),
    ({"chains": 2}, "did you mean num_return_sequences?"),
    ({"stop": "x"}, "did you mean stop_strings?"),
    ({"temperature": 0.7}, "cannot use temperature=0.7: alpha sharpens .* use proposal_temperature"),
    ({"top_k": 50}, "cannot use top_k=50: the power distribution needs no truncation"),
    ({"top_p": 0.9}, "cannot use top_p=0.9"),
    ({"repetition_penalty": 1.2}, "cannot use repetition_penalty=1.2: to prefer .* reward"),
    ({"min_new_tokens": 3}, "cannot use min_new_tokens=3"),
    ({"do_sample": False}, "cannot use do_sample=False"),
    ({"num_beams": 2}, "cannot use num_beams=2: chains are num_return_sequences"),
    ({"use_cache": False}, "cannot use use_cache=False"),
    ({"output_scores": True}, "log p per token is in `scores`"),
    ({"max_time": 1.0}, "cannot use max_time=1.0"),
    ({"streamer": object()}, "cannot use streamer: tokens of a chain change"),
    ({"assistant_model": object()}, "cannot use assistant_model: proposals come from exit"),
    ({"prefix_allowed_tokens_fn": print}, "cannot use prefix_allowed_tokens_fn"),
    ({"logits_processor": [print]}, "cannot use logits_processor"),
    ({"stopping_criteria": [print]}, "cannot use the stopping criterion builtin_function_or_method"),
    ({"inputs_embeds": torch.zeros(2, 5, 32)}, "cannot use inputs_embeds: it takes input_ids and attention_mask only"),
    ({"position_ids": torch.zeros(2, 5)}, "cannot use position_ids"),
    ({"token_type_ids": torch.ones(2, 5)}, "token_type_ids other than 0"),
    ({"generation_config": GenerationConfig(top_p=0.5)}, "cannot use top_p=0.5"),
    ({"generation_config": GenerationConfig(stop_strings=["x"])}, "pass stop_strings to generate itself"),
    ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\) and input_ids \(2, 5\)"),
    ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "row 1 of the batch is all padding"),
    ({"attention_mask": torch.tensor([[1] * 5, [1, 0, 1, 1, 1]])}, "row 1 has padding between its tokens"),
    ({"input_ids": torch.zeros(5)}, r"of shape \(prompts, tokens\), got shape \(5,\)"),
    ({"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
    ({"seed": -1}, "seed"),
]


@pytest.mark.filterwarnings("ignore:The following generation flags")
@pytest.mark.parametrize(("extra", "message"), REFUSED, ids=[next(iter(extra)) for extra, _ in REFUSED])
def test_refused(model, extra, message):
    with pytest.raises(ArgumentError, match=message):
        model.generate(**{**batch(), **CALL, **extra})


def test_what_says_nothing_passes(model):
    quiet = {"temperature": 1.0, "top_k": 0, "do_sample": True, "num_beams": 1, "use_cache": True, "streamer": None}
    quiet |= {"token_type_ids": None, "output_scores": False}
    assert torch.equal(model.generate(**batch(), **CALL, **quiet, seed=1), model.generate(**batch(), **CALL, seed=1))


def test_warpers_of_the_checkpoint_are_left_out_and_said_once(model, caplog):
    own = copy.deepcopy(model)
    own.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    with caplog.at_level(logging.WARNING, "powermc.hf"):
        out = own.generate(**batch(), **CALL, seed=1, return_dict_in_generate=True)
        own.generate(**batch(), **CALL, seed=1, generation_config=copy.deepcopy(own.generation_config))
    said = [record.message for record in caplog.records if record.name == "powermc.hf"]
    assert len(said) == 1
    assert "temperature=0.6, top_p=0.9" in said[0]
    assert out.run.ignored_warpers == {"temperature": 0.6, "top_p": 0.9}
    assert torch.equal(out.sequences, model.generate(**batch(), **CALL, seed=1))


def test_encoder_decoder_and_training_mode_are_refused(model):
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"vocab_size": 37, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    both = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).eval()
    with pytest.raises(ArgumentError, match="is an encoder-decoder"):
        both.generate(**batch(), **CALL)
    trained = copy.deepcopy(model).train()
    with pytest.raises(ArgumentError, match=r"training mode; call model.eval\(\)"):
        trained.generate(**batch(), **CALL)
    assert trained.training, "the owner's mode is the owner's"


def test_power_generate_by_itself_says_how_to_call_it(model):
    with pytest.raises(ArgumentError, match=r"use powermc.hf.generate\(model"):
        hf.power_generate(copy.deepcopy(model), torch.tensor([[1, 2]]), generation_config=model.generation_config)


def test_the_wrapper_is_made_once_and_goes_with_its_model(model, monkeypatch):
    made = []
    monkeypatch.setattr(hf, "CausalLM", lambda *a, **k: made.append(a[0]) or CausalLM(*a, **k))
    own = copy.deepcopy(model)
    assert "_powermc" not in own.__dict__ or own.__dict__["_powermc"].lm is None, "not copied along"
    for _ in range(2):
        own.generate(**batch(), **CALL, seed=1)
    assert len(made) == 1
    before = own.generate(**batch(), **CALL, seed=1, return_dict_in_generate=True)
    with torch.no_grad():
        own.get_output_embeddings().weight.mul_(0.5)
    after = own.generate(**batch(), **CALL, seed=1, return_dict_in_generate=True)
    assert len(made) == 1, "trained weights need no new wrapper"
    assert not torch.equal(before.scores, after.scores)
    own.float()
    own.generate(**batch(), **CALL, seed=1)
    assert len(made) == 2
    assert pickle.loads(pickle.dumps(own)).generate(**batch(), **CALL, seed=1).shape[0] == 2
    made.clear()
    gone = weakref.ref(own)
    del own, before, after
    gc.collect()
    assert gone() is None


def test_a_failed_chain_is_raised(model):
    def forbid(text):
        return float("-inf")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(ChainError):
            model.generate(**batch(), **CALL, reward=forbid, tokenizer=tokenizer())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The example, its code cached by transformers in a directory of the test's own."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(FOLDER, tmp_path / "power")
    return str(tmp_path / "power")


def test_the_folder_does_the_same(model, folder):
    call = {k: v for k, v in CALL.items() if k != "custom_generate"}
    remote = {"custom_generate": folder, "trust_remote_code": True}
    expected = model.generate(**batch(), **CALL, seed=1, num_return_sequences=2)
    assert torch.equal(model.generate(**batch(), **call, **remote, seed=1, num_return_sequences=2), expected)
    out = model.generate(
        **batch(), **call, **remote, seed=1, stop_strings=["w7"], tokenizer=tokenizer(), return_dict_in_generate=True
    )
    assert out.run.settings["stop"] == ["w7"]
    with pytest.raises(ArgumentError, match=r"'alpah'; did you mean alpha\?"):
        model.generate(**batch(), **call, **remote, alpah=2.0)
    with pytest.raises(ArgumentError, match="cannot use streamer"):
        model.generate(**batch(), **call, **remote, streamer=object())


def test_an_undrivable_model_is_a_model_error(model):
    own = copy.deepcopy(model)
    own.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="flash_attention_2"):
        own.generate(**batch(), **CALL)


def test_the_code_of_the_page_runs(model, folder, monkeypatch, capsys):
    """docs/integrations.md, with a tiny model in place of the one it names."""
    import re

    import transformers

    def loaded(name, **options):
        own = tokenizer()
        own.pad_token, own.padding_side = "w0", options.get("padding_side", "right")
        return own

    page = (FOLDER.parents[1] / "docs" / "integrations.md").read_text(encoding="utf-8")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: copy.deepcopy(model))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", loaded)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        if "integrations.vllm" in code:  # run by tests/test_vllm.py
            continue
        if "lm_eval" in code and importlib.util.find_spec("lm_eval") is None:
            continue
        exec(code.replace('"examples/custom_generate"', repr(folder)), names)
    assert names["out"].sequences.shape[0] == 4
    assert "prompt" in capsys.readouterr().out
