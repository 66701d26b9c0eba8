"""R-hat, effective sample size and Monte Carlo error of scalar functionals of a run; a missing figure has a reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from powermc.diagnostics import mixing
from powermc.diagnostics.guards import LEAST_CHAINS, Guard, Kept, blocks, kept_draws
from powermc.errors import ArgumentError
from powermc.sequences.path import Path

if TYPE_CHECKING:
    from powermc.results import Run

RHAT_LIMIT = 1.01
"""Over this chains are said to disagree (Vehtari et al. 2021)."""

ESS_PER_CHAIN = 100
"""Below this much bulk ESS per chain, R-hat and ESS themselves are too noisy to trust (Vehtari et al. 2021)."""

FIGURES: tuple[str, ...] = ("rhat", "ess_bulk", "ess_tail", "mcse", "tau", "nested_rhat")

BUILT_IN: Mapping[str, Callable[[Path], float]] = {
    "log_p": lambda path: path.log_prob,
    "length": len,
    "finished": lambda path: float(path.finished),
}
"""The functionals that every run has: log p(x) in nats, tokens, and whether the path ended by itself."""


@dataclass(frozen=True)
class Convergence:
    """What the draws of one prompt say of one scalar functional f. A figure that cannot be had is NaN, for a reason.

    Attributes
    ----------
    prompt, functional
        Which.
    chains
        The chains used.
    draws
        Draws of each.
    mean, sd
        Of f over these draws, in the unit of f.
    mcse
        Monte Carlo standard error of the mean, sd / sqrt(ESS of the mean).
    rhat
        Rank-normalised split R-hat; 1 for chains that agree, over `RHAT_LIMIT` they do not.
    ess_bulk, ess_tail
        Effective sample sizes of the bulk and of the 5% and 95% quantiles, draws of all chains together.
    tau
        Integrated autocorrelation time, in kernel steps.
    nested_rhat
        Nested R-hat, where superchains were given.
    reasons
        Name of a figure that is NaN to why.
    guards
        What was seen in these values.
    """

    prompt: int
    functional: str
    chains: tuple[int, ...]
    draws: int
    mean: float
    sd: float
    mcse: float
    rhat: float
    ess_bulk: float
    ess_tail: float
    tau: float
    nested_rhat: float
    reasons: Mapping[str, str] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, NaN as None."""
        numbers = ("mean", "sd", *FIGURES)
        return {
            "prompt": self.prompt,
            "functional": self.functional,
            "chains": list(self.chains),
            "draws": self.draws,
            **{name: finite(getattr(self, name)) for name in numbers},
            "reasons": dict(self.reasons),
            "guards": [guard.to_dict() for guard in self.guards],
        }


def measure(
    values: np.ndarray,
    *,
    functional: str = "f",
    prompt: int = 0,
    chains: Sequence[int] | None = None,
    superchains: Sequence[Any] | str | None = None,
    thin: int = 1,
) -> Convergence:
    """All figures of `Convergence` for values of shape (chain, draw), with guards; never raises for bad values.

    Parameters
    ----------
    values
        Of the functional, float64, NaN and infinities allowed: they are named.
    functional, prompt, chains
        For names: of the functional, the prompt, and the chains that the rows are (0, 1, ... if None).
    superchains
        Of each row, for `nested_rhat`; None: none is computed; a string: none, and why.
    thin
        Kernel steps from one draw to the next; `tau` is given in steps.
    """
    values = np.asarray(values, dtype=np.float64)
    names = tuple(range(len(values))) if chains is None else tuple(chains)
    guards = _seen(values, names, functional, prompt)
    found: dict[str, float] = dict.fromkeys(FIGURES, math.nan)
    reasons: dict[str, str] = {}
    todo: dict[str, Callable[[], float]] = {
        "rhat": lambda: mixing.rhat(values),
        "ess_bulk": lambda: mixing.ess_bulk(values),
        "ess_tail": lambda: mixing.ess_tail(values),
        "mcse": lambda: mixing.mcse_mean(values),
        "tau": lambda: thin * mixing.autocorrelation_time(values),
        "nested_rhat": lambda: _nested(values, superchains),
    }
    for name, figure in todo.items():
        try:
            found[name] = figure()
        except ArgumentError as error:
            reasons[name] = _named(str(error), names)
        else:
            if not math.isfinite(found[name]):
                found[name], reasons[name] = math.nan, "the values vary too little to tell"
    if found["rhat"] > RHAT_LIMIT:
        why = f"R-hat is {found['rhat']:.2f}, over {RHAT_LIMIT}: the chains have not mixed"
        how = "take more draws, or lower alpha"
        guards.append(Guard("disagree", why, how, prompt, None, functional, weight=found["rhat"]))
    if found["ess_bulk"] < ESS_PER_CHAIN * len(names):
        why = f"{found['ess_bulk']:.0f} effective draws, under {ESS_PER_CHAIN} per chain"
        how = "R-hat, errors and intervals are rough; take more draws"
        guards.append(Guard("few-effective", why, how, prompt, None, functional, weight=-found["ess_bulk"]))
    sane = bool(values.size) and bool(np.isfinite(values).all())
    return Convergence(
        prompt,
        functional,
        names,
        values.shape[1] if values.size else 0,
        float(values.mean()) if sane else math.nan,
        float(values.std(ddof=1)) if sane and values.size > 1 else math.nan,
        **found,
        reasons=reasons,
        guards=tuple(guards),
    )


def convergence(
    run: Run,
    *,
    of_path: Mapping[str, Callable[[Path], Any]] | None = None,
    of_text: Mapping[str, Callable[[str], Any]] | None = None,
    prompts: Sequence[int] | None = None,
    superchains: Sequence[Any] | None = None,
) -> tuple[tuple[Convergence, ...], tuple[Guard, ...]]:
    """`Convergence` of every functional for every prompt, and the guards of all draws, those of the figures included.

    Parameters
    ----------
    of_path, of_text
        Name to a scalar function of the path, or of the text (as in `Chain.draw_texts`); beside log_p, length and
        finished.
    prompts
        Which; None for all.
    superchains
        superchains[chain]: chains of one superchain started at one path (`Chain.starts`; where they did not, nested
        R-hat would make the bias look smaller than it is, and is refused). None: no nested R-hat.

    Raises `ArgumentError` for a functional that gives something else than a number, or has the name of another.
    """
    of_path, of_text = dict(of_path or {}), dict(of_text or {})
    check_names(of_path, of_text)
    found: list[Convergence] = []
    guards: list[Guard] = []
    for p in range(len(run.prompts)) if prompts is None else prompts:
        kept = kept_draws(run, p)
        guards += kept.guards
        values = {name: kept.values(f, name) for name, f in {**BUILT_IN, **of_path}.items()}
        values |= {name: kept.text_values(f, name) for name, f in of_text.items()}
        groups = None if superchains is None else _groups(run, kept, superchains)
        rows = [_measured(run, kept, name, v, groups) for name, v in values.items()]
        few = _few(kept)
        guards += [g for g in (few, _scope(run, p)) if g is not None]
        found += rows
        stuck = {guard.chain for guard in kept.guards if guard.kind == "stuck"}  # said once, not by functional
        guards += (g for row in rows for g in row.guards if g.kind != "constant-chain" or g.chain not in stuck)
    return tuple(found), tuple(guards)


def check_names(of_path: Iterable[str], of_text: Iterable[str]) -> None:
    """Raise `ArgumentError` if two functionals have one name, those that every run has included."""
    seen = set(BUILT_IN)
    for name in (*of_path, *of_text):
        if name in seen:
            raise ArgumentError(f"there is a functional {name!r} already; choose another name")
        seen.add(name)


def finite(x: float) -> float | None:
    """The number, or None for NaN and infinities, which JSON cannot hold."""
    return x if math.isfinite(x) else None


def _measured(run: Run, kept: Kept, name: str, values: np.ndarray, groups: Sequence[Any] | str | None) -> Convergence:
    if run.settings["scope"] == "block" and blocks(run) > 1:
        why = "scope 'block': each chain draws from a law of its own, that of its frozen prefix"
        mean, nothing = float(values.mean()) if values.size else math.nan, dict.fromkeys(("sd", *FIGURES), math.nan)
        reasons = dict.fromkeys(nothing, why)
        return Convergence(kept.prompt, name, kept.chains, kept.draws, mean, **nothing, reasons=reasons, guards=())
    return measure(values, functional=name, prompt=kept.prompt, chains=kept.chains, superchains=groups, thin=kept.thin)


def _scope(run: Run, prompt: int) -> Guard | None:
    if run.settings["scope"] != "block" or blocks(run) == 1:
        return None
    why = "scope 'block' freezes earlier blocks: every chain draws from a law of its own, which no figure can compare"
    return Guard("block-scope", why, "use scope 'sequence' to sample p^alpha of whole paths", prompt)


def _few(kept: Kept) -> Guard | None:
    n = len(kept.chains)
    if n >= LEAST_CHAINS or not n:
        return None
    why = f"{n} chain{'' if n == 1 else 's'}: too few to notice that chains are stuck in different places"
    return Guard("few-chains", why, f"run at least {LEAST_CHAINS} chains", kept.prompt)


def _groups(run: Run, kept: Kept, superchains: Sequence[Any]) -> list[Any] | str:
    """The superchain of each chain used, or why there are none."""
    chains = run.chains[kept.prompt]
    if len(superchains) != len(chains):
        raise ArgumentError(f"superchains has {len(superchains)} entries for {len(chains)} chains")
    first: dict[Any, int] = {}
    for c in kept.chains:
        b = first.setdefault(superchains[c], c)
        if chains[b].starts.get(0) != chains[c].starts.get(0):
            return f"chains {b} and {c} of superchain {superchains[c]!r} started at different paths"
    return [superchains[c] for c in kept.chains]


def _nested(values: np.ndarray, superchains: Sequence[Any] | str | None) -> float:
    if superchains is None:
        raise ArgumentError("no superchains were given")
    if isinstance(superchains, str):
        raise ArgumentError(superchains)
    return mixing.nested_rhat(values, superchains)


def _seen(values: np.ndarray, names: Sequence[int], functional: str, prompt: int) -> list[Guard]:
    """What is wrong with the values themselves."""
    chains, draws = values.shape if values.size else (len(names), 0)
    found: list[Guard] = []

    def guard(kind: str, message: str, advice: str, chain: int | None = None) -> None:
        found.append(Guard(kind, message, advice, prompt, chain, functional))

    if draws < mixing.LEAST_DRAWS_ESS and chains:
        what = "R-hat and effective sample size" if draws < mixing.LEAST_DRAWS else "the effective sample size"
        guard("short", f"{draws} draws per chain are too few for {what}", f"take at least {mixing.LEAST_DRAWS_ESS}")
    for c, row in zip(names, values, strict=True):
        bad = np.flatnonzero(~np.isfinite(row))
        if len(bad):
            where = f"{row[bad[0]]} at draw {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
            guard("non-finite", f"not finite: {where}", "make the functional finite, such as by a floor", c)
    if any(g.kind == "non-finite" for g in found) or draws < 2:
        return found
    if (values == values[0, 0]).all():
        why = f"every draw of every chain is {values[0, 0]:.6g}, so that neither mixing nor error can be judged"
        guard("constant", why, "it may be the answer or a stuck run: start more chains")
    else:
        still = [c for c, row in zip(names, values, strict=True) if (row == row[0]).all()]
        for c in still:
            guard("constant-chain", "all draws of the chain have one value", "it may be stuck; take more draws", c)
    return found


def _named(reason: str, names: Sequence[int]) -> str:
    """Rows of an array are chains of the run by other numbers where chains were left out."""
    head, sep, tail = reason.partition(" of chain ")
    if not sep:
        return reason
    row, _, rest = tail.partition(" ")
    return f"{head}{sep}{names[int(row)]}" + (f" {rest}" if rest else "")
