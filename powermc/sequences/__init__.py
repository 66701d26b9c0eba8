"""Paths of tokens, and moves on them, written against one autoregressive protocol."""

from powermc.sequences.cuts import CUT_LAWS, CutLaw, Entropy, Horizon, Length, cut_law
from powermc.sequences.growth import SCOPES, BlockwisePower, Committed, Grown
from powermc.sequences.model import Autoregressive, SequenceProbability, Token
from powermc.sequences.path import Path, Prompt, Space
from powermc.sequences.suffix import Suffix, default_temperature, draft

__all__ = [
    "CUT_LAWS",
    "SCOPES",
    "Autoregressive",
    "BlockwisePower",
    "Committed",
    "CutLaw",
    "Entropy",
    "Grown",
    "Horizon",
    "Length",
    "Path",
    "Prompt",
    "SequenceProbability",
    "Space",
    "Suffix",
    "Token",
    "cut_law",
    "default_temperature",
    "draft",
]
