"""The model `powermc` in lm-evaluation-harness: answers, likelihoods, and a local task from end to end."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from powermc import ArgumentError, Prompt, power_sample
from powermc.lm import CausalLM
from tests.lm.families import tiny_model
from tests.lm.test_loading import tokenizer

with warnings.catch_warnings():  # what the harness imports warns of its own matters
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval: pip install 'powermc[lm-eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from powermc.integrations.lm_eval import PowerLM

SMALL = {"alpha": 3.0, "block_size": 4, "steps": 2, "seed": 6}


@pytest.fixture(scope="module")
def causal():
    return CausalLM(tiny_model("llama").double(), tokenizer())


@pytest.fixture
def model(causal):
    return PowerLM(causal, max_gen_toks=8, **SMALL)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_it_is_registered_beside_the_others():
    assert get_model("powermc") is PowerLM
    assert get_model("hf") is not None


def test_answers_are_those_of_power_sample(model, causal):
    """In the order asked for, cut before their first stop string; a request repeated gets a chain of its own."""
    asked = requests(
        "generate_until",
        ("w1 w2 w7", {"until": [], "max_gen_toks": 6}),
        ("w4 w6", {"until": ["w16"]}),
        ("w1 w2 w7", {"until": [], "max_gen_toks": 6}),
    )
    first, stopped, again = model.generate_until(asked, disable_tqdm=True)
    ids = Prompt((1, 2, 7), "w1 w2 w7")
    run = power_sample(causal, [ids, ids], max_new_tokens=6, chains=1, **SMALL)
    assert [first, again] == [text for (text,) in run.texts]
    run = power_sample(causal, Prompt((4, 6)), max_new_tokens=8, chains=1, stop=["w16"], **SMALL)
    assert stopped == run.texts[0][0].split("w16")[0]


def test_stop_strings_are_absorbing(model, causal):
    """Nothing is drawn after one, and a special token among them ends paths though no text shows it."""
    seen = []
    model.settings["callbacks"] = [lambda p, c, step, state, info: seen.append(state.value.tokens)]
    model.generate_until(requests("generate_until", ("w1 w2", {"until": ["w16", "w0"]})), disable_tqdm=True)
    assert seen
    assert all(not {16, 0} & set(tokens[:-1]) for tokens in seen)
    assert causal.text.eos == {3, 5, 8}, "as before"


def test_decoding_of_the_task_is_replaced_and_said_once(model, caplog):
    greedy = ("w1", {"until": ["w9"], "do_sample": False, "temperature": 0.0})
    model.generate_until(requests("generate_until", greedy, greedy), disable_tqdm=True)
    said = [r.message for r in caplog.records if "replaced by power sampling" in r.message]
    assert len(said) == 2
    with pytest.raises(ArgumentError, match="generation_kwargs repetition_penalty cannot be used"):
        model.generate_until(requests("generate_until", ("w1", {"repetition_penalty": 2.0})), disable_tqdm=True)


def test_likelihoods_are_those_of_the_plain_model(model, causal):
    asked = [("w1 w2 w7", " w9 w4"), ("w1 w2 w7", " w9"), ("", "w5 w6"), ("w1 " * 80, " w2")]
    found = model.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    for (context, tail), (log_p, greedy) in zip(asked, found, strict=True):
        before = [int(w[1:]) for w in context.split()] or [3]
        after = [int(w[1:]) for w in tail.split()]
        ids = torch.tensor([(before + after)[-65:]])
        with torch.no_grad():
            logits = causal.decoder.model(input_ids=ids[:, :-1]).logits[0, -len(after) :].log_softmax(-1)
        assert log_p == pytest.approx(sum(logits[i, t].item() for i, t in enumerate(after)), abs=1e-9)
        assert greedy == (logits.argmax(-1).tolist() == after)
    best = int(
        np.argmax([model.loglikelihood(requests("l", ("w1", f" w{v}")), disable_tqdm=True)[0][0] for v in range(37)])
    )
    assert model.loglikelihood(requests("l", ("w1", f" w{best}")), disable_tqdm=True)[0][1]


def test_rolling_likelihoods_score_each_token_once(model, causal):
    """A text within the context is one pass; of a longer one each window sees as much as fits."""
    short, long = list(range(9, 29)), [9 + i * 7 % 20 for i in range(150)]
    text = [" ".join(f"w{v}" for v in ids) for ids in (short, long)]
    found = model.loglikelihood_rolling(requests("loglikelihood_rolling", *[(t,) for t in text]), disable_tqdm=True)

    def log_p(ids, n):
        with torch.no_grad():
            logits = causal.decoder.model(input_ids=torch.tensor([ids[:-1]])).logits[0, -n:].log_softmax(-1)
        return sum(logits[i, t].item() for i, t in enumerate(ids[-n:]))

    assert found[0] == pytest.approx(log_p([3, *short], 20), abs=1e-9)
    expected = log_p([3, *long[:64]], 64) + log_p(long[63:128], 64) + log_p(long[85:150], 22)
    assert found[1] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alhpa": 2}, "there is no model argument 'alhpa'; did you mean alpha"),
        ({"chains": 2}, "there is no model argument 'chains'"),
        ({"pretrained": "smollm2", "batch_size": "many"}, "batch_size must be a whole number >= 1 or 'auto'"),
    ],
)
def test_bad_arguments(causal, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        PowerLM(**{"pretrained": causal, **arguments})


def test_no_room_for_a_prompt(model):
    with pytest.raises(ArgumentError, match="max_gen_toks 64 leaves no room for a prompt in a context of 64"):
        model.generate_until(requests("generate_until", ("w1", {"max_gen_toks": 64})), disable_tqdm=True)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Two tasks on a local JSON file: answers by exact match, and a choice of two."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w{i + 2}", "label": i % 2} for i in range(9, 13)]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'data.json'}}}\ntest_split: test\n"
    (tmp_path / "words.yaml").write_text(
        f"task: words\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{answer}}'\ngeneration_kwargs: {until: ['w16', '</s>'], do_sample: false, max_gen_toks: 6}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: choice\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: label\n"
        "doc_to_choice: ['w20', 'w21']\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_runs(tasks, model):
    """The harness's own evaluation, with nothing fetched."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model, tasks=["words", "choice"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    assert found is not None
    samples = found["samples"]["words"]
    assert len(samples) == 4
    asked = [(f"w{i} w{i + 1}", {"until": ["w16", "</s>"], "max_gen_toks": 6}) for i in range(9, 13)]
    expected = model.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert [s["resps"][0][0] for s in samples] == expected
    assert 0 <= found["results"]["choice"]["acc,none"] <= 1
    assert model.costs["flops"] > 0
