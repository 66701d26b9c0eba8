"""Paths of tokens, and moves on them, written against one autoregressive protocol."""

from powermc.sequences.cuts import CUT_LAWS, CutLaw, Entropy, Horizon, Length, cut_law
from powermc.sequences.gates import AGGREGATES, UncertainTail
from powermc.sequences.growth import SCOPES, BlockwisePower, Committed, Grown
from powermc.sequences.model import Autoregressive, Exponent, SequenceProbability, Token, Without, scored
from powermc.sequences.path import Cut, Path, Prompt, Space
from powermc.sequences.routing import ByCut, Models
from powermc.sequences.screening import PROPOSALS, Screening
from powermc.sequences.substitution import Substitution
from powermc.sequences.suffix import Suffix, default_temperature, draft

__all__ = [
    "AGGREGATES",
    "CUT_LAWS",
    "PROPOSALS",
    "SCOPES",
    "Autoregressive",
    "BlockwisePower",
    "ByCut",
    "Committed",
    "Cut",
    "CutLaw",
    "Entropy",
    "Exponent",
    "Grown",
    "Horizon",
    "Length",
    "Models",
    "Path",
    "Prompt",
    "Screening",
    "SequenceProbability",
    "Space",
    "Substitution",
    "Suffix",
    "Token",
    "UncertainTail",
    "Without",
    "cut_law",
    "default_temperature",
    "draft",
    "scored",
]
