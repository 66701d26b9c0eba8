"""Fitting exit heads: the algebra, the choices made on validation text, the report, what is refused, the cache."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
import torch

from powermc.errors import ArgumentError, ModelError
from powermc.lm import CausalLM, Lens, cached_lens, calibrate, calibration, corpus, fitting
from powermc.lm.calibration import Comparison, cache_path
from powermc.lm.fitting import Chunk, NormalEquations, Refinement, log_probabilities, search_temperature
from powermc.lm.heads import ExitHead
from powermc.sequences import Prompt
from tests.lm.families import VOCAB, tiny_model
from tests.lm.test_loading import tokenizer


def texts(n: int = 60, length: int = 20, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Token ids of several lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, size=length - i % 5).tolist() for i in range(n)]


@cache
def tiny(family: str = "llama") -> CausalLM:
    return CausalLM(tiny_model(family), tokenizer())


def quiet_top(first: int = 2) -> CausalLM:
    """A model whose layers from `first` on hardly change the state."""
    model = tiny_model("llama")
    with torch.no_grad():
        for block in model.model.layers[first:]:  # type: ignore[union-attr,index]
            block.self_attn.o_proj.weight.mul_(1e-3)  # type: ignore[union-attr]
            block.mlp.down_proj.weight.mul_(1e-3)  # type: ignore[union-attr]
    return CausalLM(model)


# The algebra.


def pairs(n: int = 500, width: int = 6, noise: float = 0.0) -> tuple[torch.Tensor, ...]:
    """States h with features of very different sizes and one that never varies; y affine in them, up to noise."""
    g = torch.Generator().manual_seed(1)
    h = torch.randn(n, width, generator=g, dtype=torch.float64) * torch.logspace(-2, 3, width) + 5.0
    h[:, 2] = 7.0
    weight, bias = torch.randn(width, width, generator=g).double(), torch.randn(width, generator=g).double()
    y = h @ weight.T + bias
    return h, y + noise * torch.randn(y.shape, generator=g).double(), weight, bias


def summed(h: torch.Tensor, y: torch.Tensor, batch: int) -> NormalEquations:
    sums = NormalEquations(h.shape[1])
    for a, b in zip(h.split(batch), y.split(batch), strict=True):
        sums.add(a, b)
    return sums


def test_an_affine_relation_is_recovered() -> None:
    h, y, *_ = pairs()
    weight, bias = summed(h, y, 50).solve().affine(0.0)
    assert float((h @ weight.T + bias - y).abs().max()) < 1e-6 * float(y.abs().max())
    assert float(weight[:, 2].abs().max()) < 1e-9  # what does not vary tells nothing


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("batch", [1, 37, 500])
def test_the_stream_is_ridge_regression_on_standardised_features(strength: float, batch: int) -> None:
    h, y, *_ = pairs(noise=3.0)
    weight, bias = summed(h, y, batch).solve().affine(strength)
    scale = h.std(0, correction=0)
    scale[2] = 1.0
    x = (h - h.mean(0)) / scale
    rows = torch.cat([x, np.sqrt(strength * len(x)) * torch.eye(6).double()])
    goal = torch.cat([y - y.mean(0), torch.zeros(6, 6).double()])
    plain = torch.linalg.lstsq(rows, goal).solution.T / scale
    torch.testing.assert_close(weight, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(bias, y.mean(0) - plain @ h.mean(0), rtol=1e-6, atol=1e-6)


def test_as_many_tokens_as_features_are_too_few() -> None:
    h, y, *_ = pairs(6)
    with pytest.raises(ArgumentError, match="of 6 features needs at least 7 tokens, got 6"):
        summed(h, y, 3).solve()


# The choices.


def chunks_of(h: torch.Tensor, log_p: torch.Tensor) -> fitting.Chunks:
    def go() -> Iterator[Chunk]:
        for a, b in zip(h.split(7), log_p.split(7), strict=True):
            yield Chunk(a, b)

    return go


def kl(log_p: torch.Tensor, logits: torch.Tensor) -> float:
    """KL(p || softmax(logits)), written independently."""
    return float(torch.nn.functional.kl_div(torch.log_softmax(logits, -1), log_p, log_target=True, reduction="sum")) / (
        len(log_p)
    )


@cache
def states(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """States of the tiny model at layer 2, and its log probabilities."""
    model = tiny()
    pieces = corpus.encode(model, texts(8))
    batches = list(corpus.stream(model, pieces, [2]))
    h = torch.cat([b.at[2] for b in batches])[:n]
    normed = torch.cat([b.normed for b in batches])[:n]
    with torch.no_grad():
        return h, log_probabilities(model.decoder.head(normed))


def test_the_stream_gives_the_states_of_the_plain_forward() -> None:
    """Ragged texts in padded batches; the first position left out; every text once."""
    for family in ("llama", "gpt2", "gemma2"):
        model = tiny(family)
        given = texts(7, 12)
        pieces = corpus.encode(model, given)
        got = {4: [], 1: []}
        for batch in corpus.stream(model, pieces, [1, 4], pass_tokens=30):
            for depth, found in got.items():
                found.append(batch.at[depth])
        raw: list[torch.Tensor] = []
        hook = model.decoder.blocks[-1].register_forward_hook(
            lambda block, args, out, raw=raw: raw.append(out[0] if isinstance(out, tuple) else out)
        )
        plain = {1: [], 4: []}
        with torch.no_grad():
            for ids in sorted(given, key=len):
                out = model.decoder.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
                plain[1].append(out.hidden_states[1][0, 1:])
                plain[4].append(raw[-1][0, 1:])
        hook.remove()
        for depth, found in got.items():
            torch.testing.assert_close(torch.cat(found), torch.cat(plain[depth]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 6.0])
def test_the_temperature_is_found(temperature: float) -> None:
    """p~ is p at another temperature: the minimum is there, and 0."""
    _, log_p = states()

    class Sharpened(ExitHead):
        def logits(self, decoder: object, states: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
            return states * temperature + 3.0

    model = tiny()
    head, value = fitting.with_temperature(model.decoder, Sharpened(2), chunks_of(log_p, log_p))
    assert head.temperature == pytest.approx(temperature, rel=2e-3)
    assert value == pytest.approx(0.0, abs=1e-4)


def test_the_temperature_search_against_a_fine_grid() -> None:
    h, log_p = states()
    model = tiny()
    head, value = fitting.with_temperature(model.decoder, ExitHead(2), chunks_of(h, log_p))
    with torch.no_grad():
        z = ExitHead(2).logits(model.decoder, h, np.full(len(h), -1))
    direct = {t: kl(log_p, z / t) for t in np.geomspace(0.3, 10, 400)}
    assert kl(log_p, z / head.temperature) <= min(direct.values()) + 1e-5
    assert value == pytest.approx(kl(log_p, z / head.temperature), abs=1e-4)


def test_derivatives_and_ends_of_the_search() -> None:
    h, log_p = states()
    values, slopes = fitting.curve(tiny().decoder, [ExitHead(2)], chunks_of(h, log_p), [0.6 - 1e-3, 0.6, 0.6 + 1e-3])
    assert slopes[0, 1] == pytest.approx((values[0, 2] - values[0, 0]) / 2e-3, rel=1e-3)

    def rising(betas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        return np.array(betas) * 2.0, np.full(len(betas), 2.0)

    def falling(betas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        return -np.array(betas), np.full(len(betas), -1.0)

    assert search_temperature(rising) == (16.0, 2 / 16)
    assert search_temperature(falling) == (0.25, -4.0)


def test_validation_chooses_the_strength() -> None:
    """The strength of least KL, which neither end of the grid is where noise and signal compete."""
    model = tiny()
    parts = corpus.split(corpus.encode(model, texts(20)), None, None)
    validation = calibration.Validation(model, parts.validation, [2])
    sums = NormalEquations(32)
    for batch in corpus.stream(model, parts.fit, [2, 4]):
        sums.add(batch.at[2], batch.at[4])
    solution, chunks = sums.solve(), validation.chunks(2)
    grid = (1e-8, 1e-2, 1e-1, 1.0, 1e3)
    head, strength, value = fitting.ridge(model.decoder, 2, solution, chunks, grid)
    alone = {s: fitting.ridge(model.decoder, 2, solution, chunks, (s,))[2] for s in grid}
    assert value == alone[strength]
    assert value <= min(alone.values()) + 2e-3  # strengths are compared on a grid of temperatures
    assert max(alone.values()) > value + 0.02
    weight, _ = solution.affine(strength)
    torch.testing.assert_close(head.weight, weight.float())


def test_refinement_never_worsens_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(calibration, "_REFINEMENT_STEPS", 50)
    data = texts(200)
    plain, better = (calibrate(model, data, layers=[2], head=head) for head in ("ridge", "kl"))
    parts = corpus.split(corpus.encode(model, data), None, None)
    chunks = calibration.Validation(model, parts.validation, [2]).chunks(2)
    values = [
        fitting.curve(model.decoder, [lens.head(2)], chunks, [1 / lens.head(2).temperature])[0][0, 0]
        for lens in (plain, better)
    ]
    assert values[1] < values[0] - 1e-3
    assert better.head(2).kind == "kl"
    assert better.report[0].kl < plain.report[0].kl
    assert all(p.grad is None for p in model.decoder.model.parameters())


def test_refinement_keeps_what_was_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that lead astray are not taken over."""
    model = tiny()
    h, log_p = states()
    sums = NormalEquations(32)
    for batch in corpus.stream(model, corpus.encode(model, texts(30)), [2, 4]):
        sums.add(batch.at[2], batch.at[4])
    solution, chunks = sums.solve(), chunks_of(h, log_p)
    head, _, _ = fitting.ridge(model.decoder, 2, solution, chunks)
    monkeypatch.setattr(fitting, "_LEARNING_RATE", 1e3)
    refinement = Refinement(model.decoder, head, solution, chunks, 10)
    first = refinement.kl
    for _ in range(3):
        refinement.step(h, log_p)
    refinement.check()
    assert refinement.kl == first
    assert refinement.best.weight is head.weight


# The whole.


def test_an_exit_below_quiet_layers_is_almost_the_model() -> None:
    model = quiet_top()
    lens = calibrate(model, texts(200), layers=[1, 2])
    below, above = lens.report
    assert above.kl < 1e-3
    assert above.top1 > 0.98
    assert above.overlap > 0.98
    assert below.kl > 0.05


def test_the_report_is_what_torch_computes_directly() -> None:
    model, alpha = tiny(), 3.0
    held_out = texts(9, seed=5)
    lens = calibrate(model, texts(), layers=[2], held_out=held_out, alpha=alpha)
    head, rows = lens.head(2), []
    assert head.weight is not None
    assert head.bias is not None
    network = model.decoder.model
    with torch.no_grad():
        for ids in held_out:
            out = network(input_ids=torch.tensor([ids]), output_hidden_states=True)
            h = out.hidden_states[2][0, 1:]
            z = network.lm_head(network.model.norm(h @ head.weight.T + head.bias)) / head.temperature  # type: ignore
            p, q = torch.softmax(out.logits[0, 1:].double(), -1), torch.softmax(z.double(), -1)
            sharp = [d**alpha / (d**alpha).sum(-1, keepdim=True) for d in (p, q)]
            rows.append(
                torch.stack(
                    [
                        (p * (p / q).log()).sum(-1),
                        (q * (q / p).log()).sum(-1),
                        (p.argmax(-1) == q.argmax(-1)).double(),
                        1 - (sharp[0] - sharp[1]).abs().sum(-1) / 2,
                        -(p * p.log()).sum(-1),
                        -(q * q.log()).sum(-1),
                    ],
                    -1,
                )
            )
    row, direct = lens.report[0], torch.cat(rows)
    found = [row.kl, row.reverse_kl, row.top1, row.overlap, row.entropy, row.exit_entropy]
    np.testing.assert_allclose(found, direct.mean(0).numpy(), atol=2e-5)
    assert row.tokens == len(direct) == sum(len(ids) - 1 for ids in held_out)
    assert (row.layer, row.kind, row.temperature) == (2, "ridge", head.temperature)
    assert row.strength in fitting.STRENGTHS


def test_tokens_that_cannot_occur_count_nothing() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    log_q = torch.tensor([[0.25, 0.75, 0.0]]).log()
    found = Comparison(log_p, 1.0).to(log_q)
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert found[3] == pytest.approx(0.75)
    assert Comparison(log_p, 1.0).to(torch.tensor([[1.0, 0.0, 0.0]]).log())[0] == np.inf


def test_every_kind_of_head() -> None:
    model = tiny()
    rows = {head: calibrate(model, texts(100), layers=[3], head=head) for head in ("lens", "temperature", "ridge")}
    assert [lens.head(3).kind for lens in rows.values()] == list(rows)
    assert rows["lens"].head(3).temperature == 1.0
    assert rows["lens"].head(3).weight is None
    assert rows["lens"].report[0].kl > rows["temperature"].report[0].kl > rows["ridge"].report[0].kl


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere"])
def test_other_families(family: str) -> None:
    lens = calibrate(tiny(family), texts(100), layers=[3])
    assert np.isfinite(lens.report[0].kl)
    assert lens.report[0].kl < calibrate(tiny(family), texts(100), layers=[3], head="lens").report[0].kl


def test_what_is_fitted_validated_and_reported_on_is_disjoint() -> None:
    pieces = corpus.encode(tiny(), texts(500))
    parts = corpus.split(pieces, None, None)
    ids = [[p.text for p in part] for part in parts]
    assert sorted(i for part in ids for i in part) == list(range(500))
    assert ids[2] == list(range(450, 500))
    assert 0 < corpus.size(parts.validation) <= 1100
    parts = corpus.split(pieces, pieces[:3], 1000)
    assert 1000 <= corpus.size(parts.fit) + corpus.size(parts.validation) < 1020
    assert [p.text for p in parts.held_out] == [0, 1, 2]
    few = corpus.split(pieces[:3], None, None)
    assert [len(part) for part in few] == [1, 1, 1]


def test_long_texts_are_cut() -> None:
    pieces = corpus.encode(tiny(), [list(range(30)) * 5])
    assert [len(p.ids) for p in pieces] == [64, 64, 22]  # the model's context
    assert {p.text for p in pieces} == {0}
    assert [len(p) for p in pieces] == [63, 63, 21]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the text is fitted, tensors of states that are alive do not grow in number or size with the text."""
    model, sizes = tiny(), []
    add = NormalEquations.add

    def watched(self: NormalEquations, h: torch.Tensor, y: torch.Tensor) -> None:
        add(self, h, y)
        if self.n == len(h):
            sizes.append([])
        alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[-1:] == (32,)]
        sizes[-1].append(sum(o.numel() for o in alive))

    monkeypatch.setattr(NormalEquations, "add", watched)
    monkeypatch.setattr(corpus.stream, "__kwdefaults__", {"pass_tokens": 100})
    parts = [corpus.split(corpus.encode(model, texts(n)), None, None) for n in (40, 200)]
    for part in parts:
        calibration._fit(model, part._replace(validation=parts[0].validation), [2], "ridge", lambda what, share: None)
    short, long = sizes
    assert len(long) > 4 * len(short)
    assert max(long) <= 1.2 * max(short)


# Without text.


def test_own_samples() -> None:
    model = tiny()
    prompts = [Prompt((0, 1, 2), "a", 7), Prompt((4, 6), "b", 9)]
    pieces = corpus.own_samples(model, 200, prompts=prompts)
    assert corpus.size(pieces) >= 200
    for i, piece in enumerate(pieces):
        prompt = prompts[piece.text % 2]
        assert piece.ids[: len(prompt.ids)] == prompt.ids
        assert piece.start == len(prompt.ids) - 1
        ended = piece.ids[-1] in model.text.eos
        assert piece.stop == len(piece.ids) - ended
        assert ended or len(piece.ids) == len(prompt.ids) + 64 - 3
        assert piece.text == i  # whole rounds
    assert len(pieces) % 2 == 0
    assert pieces == corpus.own_samples(model, 200, prompts=prompts)
    assert pieces != corpus.own_samples(model, 200, prompts=prompts, seed=1)


def test_shipped_prompts() -> None:
    prompts = corpus.shipped_prompts()
    assert len(set(prompts)) == len(prompts) >= 40
    assert all(prompt.strip() == prompt for prompt in prompts)


def test_the_cache_knows_the_model_by_its_weights(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(corpus, "OWN_TOKENS", 400)
    made: list[Sequence[int] | None] = []

    def counted(model: CausalLM, **options):
        made.append(options["layers"])
        return calibrate(model, **options)

    monkeypatch.setattr(calibration, "calibrate", counted)
    model = CausalLM(tiny_model("llama"), tokenizer())
    first = cached_lens(model, [2])
    assert made == [[2]]
    assert cache_path(model).parent == tmp_path / "powermc" / "lenses"
    assert cached_lens(model, [2]).head(2).temperature == first.head(2).temperature
    same = CausalLM(tiny_model("llama"), tokenizer())
    cached_lens(same, [2])
    assert made == [[2]]
    assert cached_lens(model, [3]).layers == (2, 3)  # what was there is kept
    cached_lens(model, [2])
    assert made == [[2], [2, 3]]
    with torch.no_grad():
        next(same.decoder.model.parameters())[0, 0] += 1e-3
    cached_lens(same, [2])
    assert made == [[2], [2, 3], [2]]
    cache_path(model).write_bytes(b"cut short")
    cached_lens(model, [2])
    assert made[3:] == [[2]]
    assert isinstance(Lens.load(cache_path(model)), Lens)


# What is refused.

BAD = [
    ({"texts": []}, "there is no calibration text; give some, or none at all"),
    ({"texts": ["w1 w2", "  "]}, "calibration text 1 is empty"),
    ({"texts": "w1 w2"}, "must be a list of strings, got one string"),
    ({"texts": [[1, 37]]}, "calibration text 0 holds token 37; LlamaForCausalLM has tokens 0 to 36"),
    (
        {"texts": texts(2)},
        "calibration needs at least 3 texts of two tokens or more, to fit, to validate and to report",
    ),
    ({"texts": [[1]] * 9}, "at least 3 texts of two tokens or more.*got 0"),
    ({"texts": texts(4, 10)}, "needs at least 33 tokens to fit its 32 features.*got 1"),
    ({"tokens": 20}, "needs at least 33 tokens to fit its 32 features"),
    ({"tokens": 0}, "tokens must be at least 1, got 0"),
    ({"held_out": []}, "there is no calibration held-out text"),
    ({"held_out": [[1]]}, "the held-out text has no text of two tokens or more"),
    ({"layers": []}, "no exit layer was given; choose some of 1 to 3"),
    ({"layers": [2, 0]}, "exit layer 0 is out of range: LlamaForCausalLM has 4 layers, choose 1 to 3"),
    ({"layers": [4]}, "exit layer 4 is out of range"),
    ({"layers": [-1]}, "exit layer -1 is out of range"),
    ({"layers": [1.5]}, "exit layer 1.5 is out of range"),
    ({"head": "tuned"}, "unknown head 'tuned'; choose one of lens, temperature, ridge, kl"),
    ({"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0"),
    ({"alpha": float("nan")}, "alpha must be a finite number > 0, got nan"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(options, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        calibrate(tiny(), **{"texts": texts(), **options})
    assert "\n" not in str(caught.value)


def test_states_that_are_not_finite() -> None:
    model = CausalLM(copy.deepcopy(tiny_model("llama")))
    data = texts(30, vocab=36)
    data[7][5] = 36

    def broken(block, args, output):
        return torch.where(marked[0][..., None], torch.nan, output)

    marked: list[torch.Tensor] = []
    model.decoder.model.model.embed_tokens.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, output: marked.__setitem__(slice(None), [args[0] == 36])
    )
    model.decoder.blocks[1].register_forward_hook(broken)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM after layer 2 are not finite on calibration text 7 "):
        calibrate(model, data, layers=[1, 2])


def test_a_model_in_training_mode() -> None:
    model = CausalLM(tiny_model("llama"))
    model.decoder.model.train()
    with pytest.raises(ModelError, match="is in training mode"):
        calibrate(model, texts())


def test_nothing_is_left_behind_in_the_engine() -> None:
    """Calibration checks that the model can be split; sampling does not pay for it."""
    model = CausalLM(tiny_model("llama"))
    calibrate(model, texts(), layers=[1, 2, 3])
    assert model.engine.rows.depths == (4,)
