"""The commands that draw, and their options: `sample` and `resume`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from powermc import config
from powermc.cli.command import Command
from powermc.cli.options import (
    DTYPES,
    EXIT,
    MODEL,
    STORE,
    TARGET,
    Guessing,
    Json,
    Lens,
    Loading,
    Reusing,
    Rows,
    StoreFile,
    Written,
)


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """The arguments of `power_sample`. None: not given; `powermc.settings` has the defaults, and checks the rest."""

    alpha: Annotated[
        float | None, typer.Option(help="Power of the target p(x)^alpha; default 4.", rich_help_panel=TARGET)
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the proposals, not of the target; default min(1, 1/alpha).", rich_help_panel=TARGET),
    ] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens; default 128.", rich_help_panel=TARGET)
    ] = None
    block_size: Annotated[
        int | None, typer.Option(help="Tokens an answer grows by; default 32.", rich_help_panel=TARGET)
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Kernel steps after each block; default 10.", rich_help_panel=TARGET)
    ] = None
    draws: Annotated[
        int | None,
        typer.Option(help="Kernel steps after the last block; default: as after the others.", rich_help_panel=TARGET),
    ] = None
    chains: Annotated[
        int | None, typer.Option(help="Independent chains per prompt; default 4.", rich_help_panel=TARGET)
    ] = None
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="sequence|block", rich_help_panel=TARGET,
            help="'sequence' (default) cuts anywhere; 'block' freezes earlier blocks: each block is then exact given "
            "its prefix, which is not p(x)^alpha of the whole answer.",
        ),
    ] = None  # fmt: skip
    cut: Annotated[
        str | None,
        typer.Option(
            metavar="length|horizon|block|entropy", rich_help_panel=TARGET,
            help="Where steps cut: uniformly over the answer (length, the default), the horizon or the last block "
            "(which implies --scope block), or where the model is uncertain (entropy).",
        ),
    ] = None  # fmt: skip
    seed: Annotated[
        int | None, typer.Option(help="The same seed draws the same answers; default 0.", rich_help_panel=TARGET)
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STR", help="End an answer where this text appears; may be repeated.", rich_help_panel=TARGET
        ),
    ] = None
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Apply the chat template; default: if there is one.", rich_help_panel=TARGET
        ),
    ] = None
    early_rejection: Annotated[
        bool | None,
        typer.Option(
            "--early-rejection/--no-early-rejection", rich_help_panel=TARGET,
            help="Abandon drafts that are sure to be rejected: the same draws for fewer tokens; default: on.",
        ),
    ] = None  # fmt: skip
    kernel: Annotated[
        str | None,
        typer.Option(
            metavar="metropolis|early-exit|auto", rich_help_panel=EXIT,
            help="Plain Metropolis-Hastings; proposals drawn and screened by an early exit; or what a pilot finds "
            "cheaper. All sample the same target. Default: early-exit if --exit is given.",
        ),
    ] = None  # fmt: skip
    exit: Lens = None
    layer: Annotated[
        int | None, typer.Option(help="Which exit of the lens; default: its deepest.", rich_help_panel=EXIT)
    ] = None
    proposal: Annotated[
        str | None,
        typer.Option(
            metavar="exit|substitution|full", rich_help_panel=EXIT,
            help="Tails drawn by the exit (default); a few tokens redrawn by it; or tails drawn at full depth and "
            "screened all the same, for comparison.",
        ),
    ] = None  # fmt: skip
    screen: Annotated[
        float | None,
        typer.Option(
            help="Exponent of the exit in the first stage; default: alpha, or fitted.", rich_help_panel=EXIT
        ),
    ] = None  # fmt: skip
    exit_temperature: Annotated[
        float | None,
        typer.Option(help="Of what the exit draws; default: that of the proposals.", rich_help_panel=EXIT),
    ] = None
    plain: Annotated[
        float | None,
        typer.Option(help="Share of plain full-depth steps mixed in; default 0.1.", rich_help_panel=EXIT),
    ] = None
    eta: Annotated[
        float | None,
        typer.Option(help="Gate: tails with an entropy over this (nats) skip the screen.", rich_help_panel=EXIT),
    ] = None
    delta: Annotated[
        float | None,
        typer.Option(help="Gate: tails with a top-two margin under this skip the screen.", rich_help_panel=EXIT),
    ] = None
    gated: Annotated[
        float | None,
        typer.Option(
            help="Gate: fit --eta so that about this share of tails skips the screen.", rich_help_panel=EXIT
        ),
    ] = None  # fmt: skip
    aggregate: Annotated[
        str | None,
        typer.Option(
            metavar="max|mean", help="Gate on a tail's worst token (default) or its mean.", rich_help_panel=EXIT
        ),
    ] = None  # fmt: skip

    @staticmethod
    def names() -> list[str]:
        """Of the arguments."""
        return list(Settings.__annotations__)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that were given."""
        values = {name: getattr(self, name) for name in self.names()}
        return {name: value for name, value in values.items() if value not in (None, [], ())}


@dataclass(frozen=True, kw_only=True)
class Sample(Settings, Loading, Rows, Guessing, Reusing, Written):
    """Sample answers to a question from p(x)^alpha.

    Give a QUESTION, --prompt, --file or --demo. Ctrl-C ends the run and prints what has been drawn (exit code 130). An
    error is one line on standard error (exit code 2); where single chains fail, the others are kept and printed.
    """

    question: Annotated[str | None, typer.Argument(help="The prompt.", show_default=False)] = None
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="STR", help="A prompt; may be repeated to give several.")
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts from a JSONL file: each line a string, or an object with 'prompt' or 'question'."),
    ] = None
    demo: Annotated[
        bool, typer.Option("--demo", help="A few questions for the model at hand, small settings, explained.")
    ] = False
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="run.db",
            help="Write the run to this file as it is drawn; it survives a kill.",
            rich_help_panel=STORE,
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --store, if there is one.", rich_help_panel=STORE),
    ] = False
    thin: Annotated[
        int,
        typer.Option(help="Keep the answer after every so manyth step on the last block.", rich_help_panel=STORE),
    ] = 1
    keep_proposals: Annotated[
        bool,
        typer.Option(
            "--keep-proposals/--no-keep-proposals", rich_help_panel=STORE,
            help="Whether --store holds the tokens of rejected proposals too.",
        ),
    ] = True  # fmt: skip

    first_chain: Annotated[
        int,
        typer.Option(
            help="Number of the first chain, where workers share a prompt's chains; 'merge' joins.",
            rich_help_panel=STORE,
        ),
    ] = 0

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("question", "prompt", "file", "demo")

    def effective(self) -> tuple[dict[str, Any], list[str]]:
        from powermc.cli.sample import prompts_of, settings

        rest, _ = super().effective()
        sources = {name: rest.pop(name) or None for name in self.ALTERNATIVES}
        if any(sources.values()):  # none will do here: a file of settings for whatever question
            prompts_of(self)
        values, notes = config.repeatable(settings(self).as_dict())
        return {**sources, **{name: rest[name] for name in rest if name not in Settings.names()}, **values}, notes

    def run(self) -> int:
        from powermc.cli.sample import run

        return run(self)


@dataclass(frozen=True, kw_only=True)
class Resume(Rows, Guessing, Reusing, Json):
    """Go on with a run in a store, from where it stopped.

    Settings and prompts are the run's own; chains and draws may be more. No step is taken again. What has been drawn
    is printed as 'sample' prints it; Ctrl-C ends it again (exit code 130).
    """

    file: StoreFile
    draws: Annotated[
        int | None, typer.Option(help="Kernel steps after the last block; default: the run's.", rich_help_panel=TARGET)
    ] = None
    chains: Annotated[
        int | None, typer.Option(help="Chains per prompt; default: the run's.", rich_help_panel=TARGET)
    ] = None
    exit: Annotated[
        Path | None,
        typer.Option(help="The lens of an early-exit run; default: the one it was given.", rich_help_panel=EXIT),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(help="The model that drew it, where it has another name now.", rich_help_panel=MODEL),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(metavar=DTYPES, help="Of the model's weights; default: the run's.", rich_help_panel=MODEL),
    ] = None

    def run(self) -> int:
        from powermc.cli.store import resume

        return resume(
            self.file,
            model=self.model,
            draws=self.draws,
            chains=self.chains,
            options={**self.loader, "dtype": self.dtype},
            quiet=self.quiet,
            as_json=self.json,
            exit=self.exit,
        )
