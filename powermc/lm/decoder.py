"""A stock Hugging Face decoder, driven through its own forward with explicit positions, masks and slots.

No model code is copied and the model is not modified. Two calls are made of it: the body (embedding to final norm)
and the head (hidden states to logits, with whatever scaling or soft-capping the architecture applies).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from powermc.errors import ModelError
from powermc.lm.rows import Prefix, Rows, Slot, SlotCache

_ATTENTION = ("sdpa", "eager")
_MASKS = ("full_attention", "sliding_attention")
_CHECK_TOKENS = 7


class Decoder:
    """The body and head of a causal language model.

    Raises `ModelError` for a model that cannot be driven row by row: flash attention (takes no mask of ours), layers
    that are not attention over all past tokens or a sliding window (recurrent, chunked), position schemes that do not
    follow the position ids (ALiBi), or anything else whose cached, batched logits differ from its plain forward.
    """

    def __init__(self, model: PreTrainedModel, most_rows: int) -> None:
        self.model = model.eval()
        self.config: Any = model.config.get_text_config(decoder=True)
        self.name = type(model).__name__
        body, head = getattr(model, model.base_model_prefix, None), model.get_output_embeddings()
        if body is None or head is None:
            raise ModelError(f"{self.name} is not a causal language model with a separate decoder and head")
        self.body: Any = body
        attention = self.config._attn_implementation
        if attention not in _ATTENTION:
            raise ModelError(
                f"{self.name} uses attention {attention!r}; load it with attn_implementation='sdpa' or 'eager'"
            )
        types = list(getattr(self.config, "layer_types", None) or [])
        unknown = sorted(set(types) - set(_MASKS))
        if unknown:
            raise ModelError(
                f"{self.name} has layers of type {', '.join(unknown)}: rows need full or sliding attention"
            )
        self.window: int | None = getattr(self.config, "sliding_window", None)
        if getattr(self.config, "use_sliding_window", True) is False:
            self.window = None
        self.mask_types = sorted(set(types))
        self.dtype, self.device = model.dtype, model.device
        self.layers: int = self.config.num_hidden_layers
        self.vocab_size: int = head.weight.shape[0]  # type: ignore[assignment]
        self.context: int | None = getattr(self.config, "max_position_embeddings", None)
        self.rows, self.cache = self._attach(most_rows)
        self.deviation = self._check()

    def _attach(self, most_rows: int) -> tuple[Rows, SlotCache]:
        """Learn the shapes of the cache from a plain forward."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        try:
            with torch.no_grad():
                out = self.body(input_ids=ids, use_cache=True)
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ModelError(f"{self.name} does not run on one token: {type(error).__name__}: {error}") from error
        layers = getattr(out.past_key_values, "layers", None)
        shapes = {
            (tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers or [] if layer.keys is not None
        }
        if layers is None or len(layers) != self.layers or len(shapes) != 1 or any(s.keys is None for s in layers):
            raise ModelError(f"{self.name} does not keep one key and value per token, head and layer; it has no rows")
        (key, value) = shapes.pop()
        rows = Rows(
            self.layers,
            (key[1], key[3]),
            (value[1], value[3]),
            out.last_hidden_state.shape[-1],
            most=most_rows,
            dtype=self.dtype,
            device=self.device,
        )
        return rows, SlotCache(rows, self.layers)

    def _check(self) -> float:
        """max |logit difference| between rows (ragged prefill, then decode) and the plain forward, float32."""
        n = min(2, self.rows.most)
        tokens = (torch.arange(n * _CHECK_TOKENS) * 7919 + 11) % self.vocab_size
        ids = tokens.view(n, _CHECK_TOKENS).to(self.device)
        try:
            with torch.no_grad():
                plain = self.model(input_ids=ids).logits.float()
                slots = [self.rows.acquire(Prefix(), _CHECK_TOKENS) for _ in range(n)]
                lists = ids.tolist()
                lengths = (_CHECK_TOKENS - 1, _CHECK_TOKENS - 3)[:n]
                self.forward(slots, [row[:n] for row, n in zip(lists, lengths, strict=True)])
                while going := [(s, row) for s, row in zip(slots, lists, strict=True) if s.filled < _CHECK_TOKENS]:
                    self.forward([s for s, _ in going], [[row[s.filled]] for s, row in going])
                rows = torch.stack([self.head(self.rows.hidden[s.index, :_CHECK_TOKENS]) for s in slots]).float()
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ModelError(f"{self.name} cannot be driven row by row: {type(error).__name__}: {error}") from error
        finally:
            for slot in list(self.rows.used):
                self.rows.release(slot)
        deviation = float(torch.where(rows == plain, 0.0, rows - plain).abs().max())  # a banned token is -inf in both
        scale = max(1.0, float(plain[plain.isfinite()].abs().max()))
        allowed = 1e-4 if self.dtype in (torch.float32, torch.float64) else 0.25
        if not deviation <= allowed * scale:
            raise ModelError(
                f"{self.name} cannot be driven row by row: its cached logits differ from its plain forward by "
                f"{deviation:.2g} (ALiBi and recurrent models do)"
            )
        return deviation

    def forward(self, slots: Sequence[Slot], tokens: Sequence[Sequence[int]]) -> None:
        """Run the tokens that follow each row's filled slots through all layers; keys, values and hidden states stay.

        Rows may bring different numbers of tokens; shorter ones are padded, and their padding goes to the bin.
        """
        rows, n, q = self.rows, len(slots), max(map(len, tokens))
        rows.arrange(slots)
        order = sorted(range(n), key=lambda i: slots[i].index)
        slots, tokens = [slots[i] for i in order], [tokens[i] for i in order]
        padding = [q - len(new) for new in tokens]
        starts = [(slot.filled, len(new)) for slot, new in zip(slots, tokens, strict=True)]
        ids = [[*new, *[0] * pad] for new, pad in zip(tokens, padding, strict=True)]
        positions = [[*range(at, at + k), *[at] * pad] for (at, k), pad in zip(starts, padding, strict=True)]
        places = [[*range(at, at + k), *[rows.length] * pad] for (at, k), pad in zip(starts, padding, strict=True)]
        ids, positions, places = (torch.tensor(x, device=self.device) for x in (ids, positions, places))
        visible = max(slot.filled + len(new) for slot, new in zip(slots, tokens, strict=True))
        self.cache.aim(places, visible)
        hidden = self.body(
            input_ids=ids,
            attention_mask=self._mask(positions, visible),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        rows.hidden[self.cache.batch, places] = hidden
        for slot, new in zip(slots, tokens, strict=True):
            slot.filled += len(new)

    def _mask(self, positions: torch.Tensor, visible: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks (A, 1, Q, visible): slot s is seen from position t if s <= t (and s > t - window)."""
        slot = torch.arange(visible, device=positions.device)
        at = positions[:, None, :, None]
        seen = slot <= at

        def additive(allowed: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
            return mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)

        full = additive(seen)
        near = additive(seen & (slot > at - self.window)) if self.window is not None else full
        if len(self.mask_types) > 1:
            return {"full_attention": full, "sliding_attention": near}
        return full if self.mask_types == ["full_attention"] else near

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of final hidden states (n, width), by the model's own forward with its body stubbed out."""
        stub = _HeadOnly(self.model, hidden[:, None])
        return type(self.model).forward(stub, input_ids=None, use_cache=False).logits[:, 0]  # type: ignore[arg-type]


class _HeadOnly:
    """A stand-in for the model whose body answers with given hidden states; everything else is the model's."""

    def __init__(self, model: PreTrainedModel, hidden: torch.Tensor) -> None:
        self._model = model
        setattr(self, model.base_model_prefix, lambda *a, **k: _BodyOutput(hidden))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _BodyOutput:
    """What a head reads of its body's output: the hidden states; whatever else it passes on is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None
