"""`powermc doctor`: what this machine and a model can do."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from powermc._version import __version__
from powermc.cli.sample import load
from powermc.cli.show import console, say
from powermc.errors import ModelError
from powermc.evaluation import dtypes

if TYPE_CHECKING:
    from powermc.lm import CausalLM
    from powermc.lm.decoder import Decoder

PACKAGES = (
    "numpy",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numba",
    "scipy",
    "arviz",
    "gguf",
    "accelerate",
)
DTYPES = ("float32", "float64", "bfloat16", "float16")


def run(model: str | None, options: dict[str, Any]) -> int:
    """Print the report; returns the exit code. Raises `ModelError` for a model that cannot be used."""
    out = console()
    say(out, f"powermc {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    say(out, "\npackages", "bold")
    for package in PACKAGES:
        say(out, f"{package:<14} {_version(package)}", indent=2)
    import numba
    import torch

    say(out, "\nthreads", "bold")
    say(out, f"CPUs for this process  {_cpus()}", indent=2)
    say(out, f"torch                  {torch.get_num_threads()}", indent=2)
    say(out, f"numba                  {numba.get_num_threads()}", indent=2)
    say(out, f"OMP_NUM_THREADS        {os.environ.get('OMP_NUM_THREADS', 'not set')}", indent=2)
    say(out, f"\ndtypes on {options['device']} (a product of 16 rows with a 1024 x 4096 matrix)", "bold")
    for dtype in DTYPES:
        say(out, f"{dtype:<14} {_speed(dtype, options['device'])}", indent=2)
    if model is None:
        say(out, "\nno model checked; name one with --model")
        return 0
    loaded: Any = load(model, options, console(sys.stderr), quiet=False)
    say(out, f"\nmodel {model}", "bold")
    facts = loaded.describe()
    width = max(map(len, facts))
    for name, value in facts.items():
        say(out, f"{name.replace('_', ' '):<{width}}  {_fact(name, value)}", indent=2)
    if hasattr(loaded, "engine"):
        say(out, "\nearly exits", "bold")
        for line in splits(loaded):
            say(out, line, indent=2)
        del loaded  # one copy of the weights at a time
        say(out, f"\ndecode step, ms, by dtype and rows ({', '.join(map(str, dtypes.ROWS))})", "bold")
        for line in steps(model, options):
            say(out, line, indent=2)
    return 0


def steps(name: str, options: dict[str, Any]) -> list[str]:
    """What a decode step takes in each dtype, and which to use: lines of text."""
    from powermc.lm import CausalLM

    found = dtypes.compare(lambda dtype: CausalLM.from_pretrained(name, **{**options, "dtype": dtype}), range(1, 33))
    lines = [
        f"{s.dtype:<14} " + (s.refused or "  ".join(f"{seconds * 1e3:8.1f}" for seconds in s.seconds)) for s in found
    ]
    return [*lines, dtypes.verdict(found)]


def splits(model: CausalLM) -> list[str]:
    """Whether and how a model's layers can be run in two parts: lines of text."""
    decoder = model.decoder
    if decoder.lost is not None:
        return [f"none: {decoder.lost}"]
    if decoder.layers < 2:
        return [f"none: the model has {decoder.layers} layer"]
    lines = [f"blocks  {decoder.layers} in {type(decoder.model).__name__}.{_path(decoder)}"]
    worst, refused = 0.0, []
    for depth in range(1, decoder.layers):
        try:
            worst = max(worst, model.engine.check_split(depth))
        except ModelError as error:
            refused.append((depth, str(error)))
    good = decoder.layers - 1 - len(refused)
    if good:
        lines.append(
            f"split   {worst:.1e} (largest difference of logits, run in two parts after any of {good} of "
            f"{decoder.layers - 1} layers against the model's own forward)"
        )
    if refused:
        depths = ", ".join(str(depth) for depth, _ in refused)
        lines.append(f"refused at layer {depths}: {refused[0][1]}")
    return lines


def _path(decoder: Decoder) -> str:
    return f"{decoder.model.base_model_prefix}.{decoder.body.path}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _speed(dtype: str, device: str) -> str:
    """Milliseconds for one product, or why there is none."""
    import torch

    try:
        weights = torch.ones(1024, 4096, dtype=getattr(torch, dtype), device=device)
        rows = torch.ones(16, 1024, dtype=weights.dtype, device=device)
        best = float("inf")
        for _ in range(10):
            begun = time.perf_counter()
            float((rows @ weights)[0, 0])
            best = min(best, time.perf_counter() - begun)
    except (RuntimeError, AssertionError, TypeError) as error:
        return f"not usable: {str(error).splitlines()[0]}"
    return f"{best * 1e3:.2f} ms"


def _fact(name: str, value: Any) -> str:
    if name == "attach_deviation":
        return f"{value:.1e} (largest difference of logits, driven row by row against the model's own forward)"
    if isinstance(value, dict):
        return ", ".join(f"{key}={entry!r}" for key, entry in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
