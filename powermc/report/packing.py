"""Small forms of what a report holds of a run: tokens as base64 of short integers, numbers with few digits."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from powermc.visible import visible

UNKNOWN = 65535
"""The score of a token whose log p is not known."""

_MILLINATS = 1000


@dataclass(frozen=True)
class Alphabet:
    """The tokens that occur in a run, numbered from 0: `ids`, sorted; `pieces`, their texts, control codes visible."""

    ids: np.ndarray
    pieces: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes per packed token."""
        return 2 if len(self.ids) <= 1 << 16 else 4

    def pack(self, tokens: np.ndarray) -> str:
        """Tokens of the alphabet as base64 of little-endian unsigned integers."""
        return _base64(np.searchsorted(self.ids, tokens).astype(f"<u{self.bytes}"))


def alphabet(ids: Iterable[int], pieces: Mapping[int, str]) -> Alphabet:
    """The alphabet of these token ids; one without a text is shown by its number."""
    known = sorted(set(ids))
    return Alphabet(np.array(known, dtype=np.int64), tuple(visible(pieces.get(i, f"#{i} ")) for i in known))


def pack_scores(log_p: np.ndarray) -> str:
    """-log p in millinats, 2 bytes each; `UNKNOWN` for NaN. More than 65 nats are shown as 65."""
    scores = np.clip(np.rint(-log_p * _MILLINATS), 0, UNKNOWN - 1)
    return _base64(np.where(np.isnan(log_p), UNKNOWN, scores).astype("<u2"))


def numbers(values: np.ndarray, digits: int = 3) -> list[Any]:
    """A column for JSON: None for NaN, "inf" and "-inf" as such, few digits."""
    return [short(v, digits) for v in np.asarray(values).tolist()]


def short(value: Any, digits: int = 3) -> Any:
    """One number for JSON, as `numbers` has it."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return round(value, digits) if isinstance(value, float) else value


def join(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    """The arrays one after the other; an empty one for none."""
    return np.concatenate(arrays) if len(arrays) else np.zeros(0, dtype=dtype)


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
