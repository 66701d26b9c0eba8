"""Train `tiny-reasoner`: a Llama of 1.3 million parameters that does sums in a row, with written steps or without.

    python examples/train_tiny_reasoner.py --out runs/tiny-reasoner

The model that ships with powermc was made by this script; the log beside its weights has the command. Problems come
from `powermc.evaluation.tasks.arithmetic` and are never held-out ones.

The corpus has two kinds of writers. Some write a line for every step; the others write the result at once. All of them
are always right. The longer a problem, the fewer write steps (`STEPS_WRITTEN`). A model of 8 layers learns each step
easily and cannot do five of them at once: after "####" without steps its next tokens are a guess, spread over many
numbers. That is all there is to it: no answer of the corpus is wrong, and neither grader nor sampler knows of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from powermc.choices import Stream
from powermc.evaluation.tasks.arithmetic import LENGTHS, Problem, draw, training_problems

STEPS_WRITTEN = {2: 0.6, 3: 0.5, 4: 0.45, 5: 0.4}
"""By the number of steps: the share of writers who write them."""

END, PAD, UNKNOWN = "<end>", "<pad>", "<unk>"
PIECES = [
    "Start with ",
    ". Add ",
    ". Subtract ",
    ". Multiply by ",
    ".",
    "\n",
    "#### ",
    "+",
    "-",
    "*",
    "=",
    *"0123456789",
]

VOCABULARY = [PAD, UNKNOWN, END, *PIECES]

LAYERS, WIDTH, HEADS, INNER, CONTEXT = 8, 128, 4, 256, 128
ROW, ROWS = 128, 4
"""Tokens of a packed row; rows of a batch."""
STEPS, RATE, WARMUP, DECAY = 3600, 1e-3, 100, 0.1
REPORT = 100
"""Steps between two lines of the log."""
PROMPTS = 128
"""On which the model writes text of its own, to calibrate its exits on (`powermc calibrate`)."""
IGNORED = -100
"""The label of what is not learnt: questions, which are drawn at random, and padding."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word level tokenizer: every digit is a token, and so is each phrase of a question."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    phrases = [piece.replace(".", r"\.") for piece in sorted(PIECES, key=len, reverse=True) if len(piece) > 1]
    pattern = Regex("|".join([*phrases, r"\n", "."]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=END, model_max_length=CONTEXT
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """Fresh weights by the seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(END),
        pad_token_id=VOCABULARY.index(PAD),
    )
    return LlamaForCausalLM(config)


def written(problem: Problem, choices: Stream) -> str:
    """What one writer answers: the steps and the result, or the result alone."""
    careful = choices.uniform() < STEPS_WRITTEN[len(problem.steps)]
    return problem.solution if careful else problem.result


def examples(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of one problem after another, for ever; problems of each length equally often."""
    stream = Stream(seed)
    i = 0
    while True:
        choices = stream.at("corpus", i)
        problem = draw(choices, LENGTHS[i % len(LENGTHS)], held_out=False)
        question = tokenizer.encode(problem.question)
        answer = [*tokenizer.encode("\n" + written(problem, choices)), tokenizer.eos_token_id]
        yield question + answer, [IGNORED] * len(question) + answer
        i += 1


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows packed with whole examples. Positions begin anew with each: transformers keeps them apart by that."""
    source = examples(tokenizer, seed)
    waiting = next(source)
    while True:
        shape = (ROWS, ROW)
        ids, labels = np.full(shape, tokenizer.pad_token_id), np.full(shape, IGNORED)
        positions = np.zeros(shape, dtype=np.int64)
        for row in range(ROWS):
            at = 0
            while at + len(waiting[0]) <= ROW:
                n = len(waiting[0])
                ids[row, at : at + n], labels[row, at : at + n] = waiting
                positions[row, at : at + n] = np.arange(n)
                labels[row, at] = IGNORED  # no example is to be foretold from the one before
                at += n
                waiting = next(source)
            positions[row, at:] = np.arange(ROW - at)
        found = {"input_ids": ids, "labels": labels, "position_ids": positions}
        yield {name: torch.from_numpy(array) for name, array in found.items()}


def rate(progress: float, step: int) -> float:
    """Learning rate: a linear rise, then a cosine down to nothing."""
    return RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    minutes: float | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """AdamW on the answers' tokens: so many steps, or, if `minutes` are given, so many as fit into them.

    With steps the weights are a function of the seed, on the same machine and number of threads; with minutes they
    depend on the machine's speed too.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    begun, cpu = time.perf_counter(), time.process_time()
    losses: list[float] = []
    tokens = 0
    model.train()
    for step, batch in enumerate(batches(tokenizer, seed)):
        spent = (time.perf_counter() - begun) / 60
        progress = step / steps if minutes is None else spent / minutes
        if step % REPORT == 0 or progress >= 1:
            loss = f"  loss {sum(losses) / len(losses):.4f}" if losses else ""
            cpu_spent = (time.process_time() - cpu) / 60
            say(
                f"step {step:5d}  {tokens / 1e6:.2f} M tokens learnt{loss}  {spent:.1f} min, {cpu_spent:.1f} min of CPU"
            )
            losses.clear()
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(progress, step)
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        tokens += int((batch["labels"] != IGNORED).sum())
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Write configuration, tokenizer, weights, and prompts to calibrate exits on; returns how many bytes."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is made readable to its owner only
    tokenizer.save_pretrained(folder)
    prompts = [f"{problem.question}\n" for problem in training_problems(PROMPTS, seed=0)]
    lines = "".join(f"{json.dumps(prompt)}\n" for prompt in prompts)
    (folder / "calibration_prompts.jsonl").write_text(lines, encoding="utf-8")
    return sum(file.stat().st_size for file in folder.iterdir())


def run(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/tiny-reasoner"), help="folder (default runs/tiny-reasoner)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps (default {STEPS})")
    parser.add_argument("--minutes", type=float, help="train so long instead; the weights then depend on the machine")
    parser.add_argument("--seed", type=int, default=0, help="of first weights and corpus (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    options = parser.parse_args(arguments)
    for name in ("steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        log = (options.out / "training.log").open("w", encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"error: cannot write into {options.out}: {error.strerror}") from None

    def say(line: str) -> None:
        for file in (sys.stdout, log):
            print(line, file=file, flush=True)

    torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer()
    model = make_model(options.seed)
    with log:
        given = sys.argv[1:] if arguments is None else arguments
        say(" ".join(["python examples/train_tiny_reasoner.py", *map(str, given)]))
        count = sum(p.numel() for p in model.parameters())
        say(f"{count:,} parameters, {LAYERS} layers, {len(tokenizer)} tokens, {ROWS} rows of {ROW} tokens a step")
        say(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads")
        train(model, tokenizer, steps=options.steps, minutes=options.minutes, seed=options.seed, say=say)
        say(f"{save(model, tokenizer, options.out) / 1e6:.1f} MB in {options.out}")


if __name__ == "__main__":
    try:
        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
