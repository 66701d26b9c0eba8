"""A run as an xarray `DataTree` in ArviZ's schema, and as a netCDF file. Needs xarray, not ArviZ itself.

Groups (dimensions chain, draw, and prompt where there are several):

- posterior: log_p (nats), length (tokens), finished, functionals of the user; float64, NaN where a chain has no draw.
- sample_stats: of the kernel step that made each draw: lp (nats, log density of the target up to a constant),
  acceptance_rate (accepted, as 0 or 1; not a probability), taken (whether there was such a step), and whatever the
  kernel declares: accepted, changed, abandoned, log_ratio, cut, proposal_length, stage1_accepted, gated, ...
- sequences: the tokens of each draw, int32, padded with -1.
- warmup_posterior, warmup_sample_stats: the steps on earlier blocks, whose paths are still growing.
- constant_data: prompt_tokens (padded with -1) and prompt_text.

A draw's coordinate `step` is the kernel step that made it, counted over all blocks. A run of one block has no warm-up
groups.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc._version import __version__
from powermc.diagnostics.convergence import BUILT_IN, check_names
from powermc.diagnostics.guards import as_number, draw_steps, first_step
from powermc.errors import ArgumentError
from powermc.files import write_whole

if TYPE_CHECKING:
    import xarray as xr

    from powermc.results import Run

PADDING = -1

_MOST_ERRORS = 50  # an attribute of HDF5 holds 64 kB

_UNITS = {
    "log_p": "nats",
    "lp": "nats",
    "log_ratio": "nats",
    "log_level": "nats",
    "log_surrogate": "nats",
    "log_stage1": "nats",
    "log_target": "nats",
    "length": "tokens",
    "proposal_length": "tokens",
    "tokens": "tokens",
    "cut": "tokens",
}


def to_datatree(
    run: Run,
    prompt: int | None = None,
    *,
    of_path: Mapping[str, Callable[[Any], Any]] | None = None,
    of_text: Mapping[str, Callable[[str], Any]] | None = None,
) -> xr.DataTree:
    """A run as an `xarray.DataTree`.

    Parameters
    ----------
    run
        The result of `power_sample`.
    prompt
        One prompt, without a dimension of that name. None: all, with the dimension `prompt` if there are several.
    of_path, of_text
        Name to a scalar function of the path, or of its text, for the posterior group.

    Raises `ArgumentError` for a prompt that is not there, a functional that gives no number or has the name of another,
    and without xarray.
    """
    xr = _library("xarray")
    if prompt is not None and not 0 <= prompt < len(run.prompts):
        raise ArgumentError(f"there is no prompt {prompt}; the run has prompts 0 to {len(run.prompts) - 1}")
    which = [prompt] if prompt is not None else list(range(len(run.prompts)))
    several = prompt is None and len(which) > 1
    functionals = _functionals(run, of_path or {}, of_text or {})
    steps = max((draw_steps(run, p, c) for p in which for c in range(len(run.chains[p]))), key=len, default=[])
    warmup = list(range(first_step(run)))

    def dataset(variables: Mapping[str, tuple[np.ndarray, tuple[str, ...]]], at: Sequence[int] | None) -> Any:
        """Of arrays of shape (prompt, ...), the prompt put after chain and draw, or left out."""
        data, coords = {}, {}
        for name, (values, dims) in variables.items():
            moved = np.moveaxis(values, 0, min(2, len(dims))) if several else values[0]
            names = (*dims[:2], "prompt", *dims[2:]) if several else dims
            data[name] = (names, moved, {"units": _UNITS[name]} if name in _UNITS else {})
        if several:
            coords["prompt"] = which
        if at is not None:
            coords |= {"chain": range(len(run.chains[which[0]])), "draw": range(len(at)), "step": ("draw", list(at))}
        return xr.Dataset(data, coords=coords, attrs=attributes)

    attributes = _attributes(run)
    tree = {
        "/": xr.Dataset(attrs=attributes),
        "posterior": dataset(_posterior(run, which, steps, functionals), steps),
        "sample_stats": dataset(_stats(run, which, steps), steps),
        "sequences": dataset({"tokens": (_tokens(run, which, steps), ("chain", "draw", "token"))}, steps),
        "constant_data": _constant(xr, run, which, several, attributes),
    }
    if warmup:
        grown = {n: (_growing(run, which, warmup, n), ("chain", "draw")) for n in ("log_p", "length")}
        tree |= {
            "warmup_posterior": dataset(grown, warmup),
            "warmup_sample_stats": dataset(_stats(run, which, warmup), warmup),
        }
    return xr.DataTree.from_dict(tree)


def to_netcdf(run: Run, path: str | os.PathLike[str], prompt: int | None = None, **functionals: Any) -> None:
    """Write `to_datatree` to a netCDF file (by h5netcdf): whole or not at all; `functionals` are those of it.

    Raises `ArgumentError` without h5netcdf, and `OSError` if the file cannot be written.
    """
    _library("h5netcdf")
    tree = to_datatree(run, prompt, **functionals)
    compressed = {"zlib": True, "complevel": 4}
    encoding = {"/sequences": {"tokens": compressed}} if tree["sequences"]["tokens"].size else {}
    with tempfile.TemporaryDirectory() as folder:
        draft = File(folder) / "run.nc"
        tree.to_netcdf(draft, engine="h5netcdf", encoding=encoding)
        write_whole(path, draft.read_bytes())


def _functionals(
    run: Run, of_path: Mapping[str, Callable[[Any], Any]], of_text: Mapping[str, Callable[[str], Any]]
) -> dict[str, Callable[[int, int, int], float]]:
    """Name to a function of (prompt, chain, draw)."""
    check_names(of_path, of_text)

    def by_path(f: Callable[[Any], Any], name: str) -> Callable[[int, int, int], float]:
        return lambda p, c, i: as_number(f(run.chains[p][c].draws[i]), name)

    def by_text(f: Callable[[str], Any], name: str) -> Callable[[int, int, int], float]:
        def value(p: int, c: int, i: int) -> float:
            text = run.chains[p][c].draw_texts[i]
            if text is None:
                raise ArgumentError(f"{name} is a functional of the text, and the model has no tokenizer")
            return as_number(f(text), name)

        return value

    paths = {name: by_path(f, name) for name, f in {**BUILT_IN, **of_path}.items()}
    return paths | {name: by_text(f, name) for name, f in of_text.items()}


def _posterior(
    run: Run, which: Sequence[int], steps: Sequence[int], functionals: Mapping[str, Callable[[int, int, int], float]]
) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    found = {}
    for name, value in functionals.items():
        values = np.full((len(which), len(run.chains[which[0]]), len(steps)), np.nan)
        for k, p in enumerate(which):
            for c, chain in enumerate(run.chains[p]):
                values[k, c, : len(chain.draws)] = [value(p, c, i) for i in range(len(chain.draws))]
        found[name] = (values, ("chain", "draw"))
    return found


def _stats(run: Run, which: Sequence[int], steps: Sequence[int]) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    infos = [run.infos[p] for p in which]
    names = [name for name in infos[0] if name not in ("log_p", "length", "log_density")]
    found = {name: np.stack([info[name][:, steps] for info in infos]) for name in names}
    taken = found["block"] >= 0
    rate = np.where(taken, found["accepted"].astype(np.float64), np.nan)
    lp = np.stack([info["log_density"][:, steps] for info in infos])
    return {n: (v, ("chain", "draw")) for n, v in {"lp": lp, "acceptance_rate": rate, "taken": taken, **found}.items()}


def _tokens(run: Run, which: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    longest = max((len(x) for p in which for chain in run.chains[p] for x in chain.draws), default=0)
    tokens = np.full((len(which), len(run.chains[which[0]]), len(steps), longest), PADDING, dtype=np.int32)
    for k, p in enumerate(which):
        for c, chain in enumerate(run.chains[p]):
            for i, path in enumerate(chain.draws):
                tokens[k, c, i, : len(path)] = path.tokens
    return tokens


def _growing(run: Run, which: Sequence[int], steps: Sequence[int], name: str) -> np.ndarray:
    infos = [run.infos[p] for p in which]
    return np.stack([np.where(i["block"][:, steps] >= 0, i[name][:, steps].astype(np.float64), np.nan) for i in infos])


def _constant(xr: Any, run: Run, which: Sequence[int], several: bool, attributes: Mapping[str, Any]) -> Any:
    longest = max((len(run.prompts[p].ids) for p in which), default=0)
    tokens = np.full((len(which), longest), PADDING, dtype=np.int32)
    for k, p in enumerate(which):
        tokens[k, : len(run.prompts[p].ids)] = run.prompts[p].ids
    texts = np.array([_storable(run.prompts[p].text) for p in which], dtype=object)
    lead = ("prompt",) if several else ()
    data = {
        "prompt_tokens": ((*lead, "prompt_token"), tokens if several else tokens[0]),
        "prompt_text": (lead, texts if several else texts[0]),
    }
    return xr.Dataset(data, coords={"prompt": which} if several else {}, attrs=attributes)


def _attributes(run: Run) -> dict[str, Any]:
    """Those of ArviZ's schema, and what identifies the run. Strings and numbers only, as netCDF holds no others."""
    arviz = importlib.util.find_spec("arviz") is not None
    errors = [f"prompt {p}, chain {c}: {error}"[:200] for (p, c), error in run.errors.items()]
    return {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "creation_library": "powermc",
        "creation_library_version": __version__,
        "creation_library_language": "Python",
        "inference_library": "powermc",
        "inference_library_version": __version__,
        **({"arviz_version": importlib.metadata.version("arviz")} if arviz else {}),
        "sampling_time": float(run.seconds),
        "tuning_steps": first_step(run),
        "model": _storable(run.model),
        "kernel": str(run.early_exit["kernel"]),
        "settings": json.dumps(dict(run.settings), default=str),
        "interrupted": int(run.interrupted),
        "failed_chains": len(errors),
        "errors": json.dumps(errors[:_MOST_ERRORS]),
    }


def _storable(text: str) -> str:
    """Text as HDF5 can hold it: no NUL, no half of a surrogate pair."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ArgumentError(f"this needs {name}; install it with: pip install 'powermc[netcdf]'") from None
