"""A stock Hugging Face decoder, driven through its own forward with explicit positions, masks and slots.

No model code is copied and the model is not modified. Three calls are made of it: a span of the body's layers, the
final norm, and the head (normed states to logits, with whatever scaling or soft-capping the architecture applies).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from powermc.errors import ModelError, NotSlotAddressable
from powermc.lm.blocks import Compiled
from powermc.lm.depth import Gated, Span
from powermc.lm.lean import lean
from powermc.lm.rows import Prefix, Rows, Slot, SlotCache

_ATTENTION = ("sdpa", "eager")
_MASKS = ("full_attention", "sliding_attention")
_CHECK_TOKENS = 7
FOREIGN = (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError)
"""What a model that is not driven as it expects raises."""


class Work(NamedTuple):
    """A row to bring forward: `n` positions, from the first that has not come to the pass's last layer on.

    `ids` are all ids of the row from position 0.
    """

    slot: Slot
    ids: Sequence[int]
    n: int


class Decoder:
    """The body and head of a causal language model.

    Raises `NotSlotAddressable` for a model that cannot be driven row by row: layers that are not attention over all
    past tokens or a sliding window (recurrent, chunked), position schemes that do not follow the position ids (ALiBi),
    or anything else whose cached, batched logits differ from its plain forward. Raises `ModelError` for flash
    attention (takes no mask of ours), and for what is no causal language model at all.
    """

    lost: str | None = None
    """What cannot be had of this model, and why; None: nothing."""

    def __init__(self, model: PreTrainedModel, most_rows: int, compiled: bool = True) -> None:
        self.model, self.compiled = model.eval(), compiled
        self.config: Any = model.config.get_text_config(decoder=True)
        self.name = type(model).__name__
        self._plain_body: Any = getattr(model, model.base_model_prefix, None)
        head = model.get_output_embeddings()
        if self._plain_body is None or head is None:
            raise ModelError(f"{self.name} is not a causal language model with a separate decoder and head")
        self.layers: int = self.config.num_hidden_layers
        self.dtype, self.device = model.dtype, model.device
        self.vocab_size: int = head.weight.shape[0]  # type: ignore[assignment]
        self.context = _context(self.config)
        self._open(most_rows)
        self.deviation = self._check()

    def _open(self, most_rows: int) -> None:
        """Gates before the blocks, a cache addressed by slots, and what masks they need."""
        self.body = Gated(self._plain_body, self.layers, self.compiled)
        self.blocks = self.body.blocks
        attention = self.config._attn_implementation
        if attention not in _ATTENTION:
            raise ModelError(
                f"{self.name} uses attention {attention!r}; load it with attn_implementation='sdpa' or 'eager'"
            )
        types = list(getattr(self.config, "layer_types", None) or [])
        unknown = sorted(set(types) - set(_MASKS))
        if unknown:
            raise NotSlotAddressable(
                f"{self.name} has layers of type {', '.join(unknown)}: rows need full or sliding attention in every "
                "layer; choose a model without recurrent, convolutional or chunked layers"
            )
        self.window: int | None = getattr(self.config, "sliding_window", None)
        if getattr(self.config, "use_sliding_window", True) is False:
            self.window = None
        self.mask_types = sorted(set(types))
        self.rows, self.cache = self._attach(most_rows)
        if self.compiled and self.window is None:
            self.body.passes = Compiled(self.body.blocks, self.rows)

    def _attach(self, most_rows: int) -> tuple[Rows, SlotCache]:
        """Learn the shapes of the cache from a plain forward."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        try:
            with torch.no_grad():
                out: Any = self._plain_body(input_ids=ids, use_cache=True)
                self.body(Span(0, self.layers), input_ids=ids, use_cache=False)  # the gates learn what blocks return
        except FOREIGN as error:
            raise ModelError(f"{self.name} does not run on one token: {type(error).__name__}: {error}") from error
        layers = getattr(getattr(out, "past_key_values", None), "layers", None)
        shapes = {
            (tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers or [] if layer.keys is not None
        }
        if layers is None or len(layers) != self.layers or len(shapes) != 1 or any(s.keys is None for s in layers):
            raise NotSlotAddressable(
                f"{self.name} does not keep one key and value per token, head and layer, of one shape, so it has no "
                "rows; choose a decoder that caches those"
            )
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

    @property
    def head_dims(self) -> tuple[int, int]:
        """Sizes of one head's keys and values."""
        return self.rows.dims

    @property
    def compiles(self) -> bool:
        """Whether passes of few rows run in one compiled call."""
        passes = getattr(getattr(self, "body", None), "passes", None)
        return passes is not None and passes.fits

    def _check(self) -> float:
        """max |logit difference| between rows (ragged prefill, then decode) and the plain forward, float32."""
        compiled, self.body.passes = self.body.passes, None
        if compiled is not None:
            self._check()  # block by block first
            self.body.passes = compiled
        try:
            return self._deviation(
                self._ragged,
                "row by row",
                "ALiBi and recurrent models cannot: choose one with rotary positions",
                NotSlotAddressable,
            )
        except NotSlotAddressable:
            if compiled is None:
                raise
            self.body.passes = None  # blocks that only look as if they could be run in one call
            return self._check()

    def _ragged(self, slots: Sequence[Slot], lists: Sequence[list[int]]) -> None:
        """Bring rows forward by different numbers of tokens, then one by one."""
        lengths = (_CHECK_TOKENS - 1, _CHECK_TOKENS - 3)
        work = [Work(s, ids, n) for s, ids, n in zip(slots, lists, lengths, strict=False)]
        self.forward(work, 0, self.layers)
        while going := [w for w in work if w.slot.filled[self.layers] < _CHECK_TOKENS]:
            self.forward([w._replace(n=1) for w in going], 0, self.layers)

    def check_split(self, depth: int) -> float:
        """As `_check` for a model run to `depth` first and from there on later, in other passes and other lengths.

        The states at `depth` must be kept (`Rows.keep`). Raises `ModelError` if the logits differ.
        """

        def drive(slots: Sequence[Slot], lists: Sequence[list[int]]) -> None:
            for lower, upper in (((5, 4), (3, 4)), ((2, 3), (4, 3))):
                for counts, first, last in ((lower, 0, depth), (upper, depth, self.layers)):
                    self.forward([Work(*w) for w in zip(slots, lists, counts, strict=False)], first, last)

        return self._deviation(drive, f"in two parts at layer {depth}", "it is then sampled at full depth only")

    def _deviation(
        self,
        drive: Callable[[Sequence[Slot], Sequence[list[int]]], None],
        how: str,
        hint: str,
        refusal: type[ModelError] = ModelError,
    ) -> float:
        n = min(2, self.rows.most)
        tokens = (torch.arange(n * _CHECK_TOKENS) * 7919 + 11) % self.vocab_size
        ids = tokens.view(n, _CHECK_TOKENS).to(self.device)
        try:
            with torch.no_grad():
                plain = self.model(input_ids=ids, use_cache=False).logits.float()
                slots = [self.rows.acquire(Prefix(), _CHECK_TOKENS) for _ in range(n)]
                drive(slots, ids.tolist())
                hidden = self.rows.hidden[self.layers]
                rows = torch.stack([self.head(hidden[s.index, :_CHECK_TOKENS]) for s in slots]).float()
        except FOREIGN as error:
            raise refusal(f"{self.name} cannot be driven {how}: {type(error).__name__}: {error} ({hint})") from error
        finally:
            for slot in list(self.rows.used):
                self.rows.release(slot)
        deviation = float(torch.where(rows == plain, 0.0, rows - plain).abs().max())  # a banned token is -inf in both
        scale = max(1.0, float(plain[plain.isfinite()].abs().max()))
        allowed = 1e-4 if self.dtype in (torch.float32, torch.float64) else 0.25
        if not deviation <= allowed * scale:
            raise refusal(
                f"{self.name} cannot be driven {how}: its logits differ from its plain forward by "
                f"{deviation:.2g} ({hint})"
            )
        return deviation

    def tokens(self, work: Sequence[Work], last: int) -> int:
        """How many tokens a pass to layer `last` runs for this work, padding not counted."""
        return sum(w.n for w in work)

    def forward(self, work: Sequence[Work], first: int, last: int) -> int:
        """Run layers first..last-1 on the next positions of these rows; keys, values and states kept stay in the rows.

        Rows may bring different numbers of positions; shorter ones are padded, and their padding goes to the bin. With
        first > 0 the positions must have come to depth `first`, and their states there are taken from the rows.
        Returns how many slots the pass attended to.
        """
        rows, q = self.rows, max(w.n for w in work)
        rows.arrange([w.slot for w in work])
        work = sorted(work, key=lambda w: w.slot.index)
        starts = [w.slot.filled[last] for w in work]
        ids = [[*w.ids[at : at + w.n], *[0] * (q - w.n)] for w, at in zip(work, starts, strict=True)]
        positions = [[*range(at, at + w.n), *[at] * (q - w.n)] for w, at in zip(work, starts, strict=True)]
        places = [[*range(at, at + w.n), *[rows.length] * (q - w.n)] for w, at in zip(work, starts, strict=True)]
        ids, positions, places = (torch.tensor(x, device=self.device) for x in (ids, positions, places))
        visible = max(at + w.n for w, at in zip(work, starts, strict=True))
        self.cache.aim(places, visible)
        states = rows.hidden[first][self.cache.batch, places] if first else None
        wanted = [d for d in rows.depths if first < d <= last]
        span = Span(first, last, states, [d for d in wanted if d < self.layers])
        span.found[self.layers] = self.body(
            span,
            input_ids=ids,
            attention_mask=self._mask(positions, visible),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        for depth in wanted:
            rows.hidden[depth][self.cache.batch, places] = span.found[depth]
            for w, at in zip(work, starts, strict=True):
                if w.slot.filled[depth] == at:
                    w.slot.filled[depth] = at + w.n
        return visible

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        """The model's final norm of states (n, width) that stand for those after its last layer."""
        n = len(states)
        positions = torch.zeros(n, 1, dtype=torch.long, device=self.device)
        span = Span(self.layers, self.layers, states[:, None])
        # Nothing is written to the cache: no block runs.
        self.cache.aim(positions, 1)
        return self.body(
            span,
            input_ids=positions,
            attention_mask=self._mask(positions, 1),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )[:, 0]

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

    def head(self, hidden: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (n, V) of normed states (n, width), by the model's own forward with its body stubbed out.

        With `columns` only those of these tokens, (n, len(columns)).
        """
        stub, whole = _HeadOnly(self.model, hidden[:, None]), self.model.get_output_embeddings()
        own: Any = lean(whole, self.compiled)  # type: ignore[arg-type]  # the constructor has checked
        if columns is not None:
            own = torch.nn.Linear(whole.weight.shape[1], len(columns), bias=whole.bias is not None, device="meta")  # type: ignore[union-attr]
            own.weight = torch.nn.Parameter(whole.weight[columns], requires_grad=False)  # type: ignore[union-attr]
            if whole.bias is not None:  # type: ignore[union-attr]
                own.bias = torch.nn.Parameter(whole.bias[columns], requires_grad=False)  # type: ignore[union-attr]
        if (name := next((name for name, m in self.model.named_children() if m is whole), None)) is not None:
            setattr(stub, name, own)
        elif columns is not None:  # all of them, taken for these, would be wrong numbers
            raise ModelError(f"{self.name} keeps its head out of reach: use exit heads on the whole vocabulary")
        return type(self.model).forward(stub, input_ids=None, use_cache=False).logits[:, 0]  # type: ignore[arg-type]


class _HeadOnly:
    """A stand-in for the model whose body answers with given hidden states; everything else is the model's."""

    def __init__(self, model: PreTrainedModel, hidden: torch.Tensor) -> None:
        self._model = model
        setattr(self, model.base_model_prefix, _BodyOnly(hidden))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _BodyOnly:
    """A stand-in for a body, or for the decoder within it (OPT calls that one), that answers with given states."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self._hidden = hidden

    def __call__(self, *args: Any, **kwargs: Any) -> _BodyOutput:
        return _BodyOutput(self._hidden)

    def __getattr__(self, name: str) -> _BodyOnly:
        return self


class _BodyOutput:
    """What a head reads of its body's output: the hidden states; whatever else it passes on is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _context(config: Any) -> int | None:
    """How many positions a path may take. With long rotary factors (Phi 3) no more than before those set in: beyond,
    the whole batch changes with its longest row, and p(. | prefix) would depend on more than the prefix."""
    context: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return original if original is not None and context is not None else context
