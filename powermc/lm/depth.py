"""Running a span of a decoder's blocks through the decoder's own forward.

`Gated` is a shadow of the body: a shallow copy in which every block, a shadow too, stands behind a gate. All parameters
are the owner's; the owner's model is not touched, so whatever its owner does with it meanwhile (generate, save, capture
hidden states, in any thread) is unaffected, and there is nothing to undo.

Every pass goes through the body's whole forward: embedding, positions, masks, the loop over the blocks, final norm. A
gate outside the span hands its input on; the gate before the span replaces it by the states given. Slicing the list of
blocks instead would renumber them, which Gemma 2 and 3, GPT-2 and windowed Qwen2 do not survive. Where a stretch of
blocks can be run in one compiled call (`powermc.lm.blocks`), its first gate makes it, and the others hand on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from powermc.errors import NotSlotAddressable
from powermc.lm.blocks import Compiled
from powermc.lm.lean import Shadowed, shallow


@dataclass
class Span:
    """What one pass is to do: run layers first..last-1, from `states` if first > 0, and keep the states at `wanted`."""

    first: int
    last: int
    states: torch.Tensor | None = None
    wanted: Collection[int] = ()
    found: dict[int, torch.Tensor] = field(default_factory=dict)
    compiled: bool = False
    done: int = 0
    """Whether whole stretches are run by a compiled pass, and up to which layer that has been done."""


class Gated:
    """The body of a causal language model, span by span. One pass at a time.

    Raises `NotSlotAddressable` where the blocks cannot be found: a body without exactly one list of `layers` modules.
    """

    def __init__(self, body: nn.Module, layers: int, compiled: bool = True) -> None:
        where = [name for name, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers and name]
        where = [name for name in where if not any(name.startswith(f"{other}.") for other in where)]
        if len(where) != 1:
            raise NotSlotAddressable(
                f"{type(body).__name__} has {len(where)} lists of {layers} blocks, not one: it cannot be run in part"
            )
        self.path = where[0]
        self.blocks: nn.ModuleList = body.get_submodule(self.path)  # type: ignore[assignment]
        self.lean = Shadowed(self.blocks, compiled)
        self.passes: Compiled | None = None
        self._span: Span | None = None
        self._body = self._shadow(body)

    def _shadow(self, body: nn.Module) -> nn.Module:
        """Copies of the modules on the way to the list of blocks, and gates in its place."""
        *way, name = self.path.split(".")
        top = module = shallow(body)
        for step in way:
            module._modules[step] = shallow(module._modules[step])
            module = module._modules[step]
        blocks: Any = module._modules[name]
        module._modules[name] = nn.ModuleList(_Gate(self, blocks, i) for i in range(len(blocks)))
        return top

    @property
    def span(self) -> Span:
        assert self._span is not None, "gates are used inside a pass only"
        return self._span

    def __call__(self, span: Span, **inputs: Any) -> torch.Tensor:
        """Run the span; return the final norm of the last block's output. `span.found` holds the states wanted."""
        span.compiled = self.passes is not None and self.passes.usable(inputs.get("past_key_values"))
        if not span.compiled:
            self.lean.refresh()
        self._span = span
        try:
            return self._body(**inputs).last_hidden_state
        finally:
            self._span = None


class _Gate(nn.Module):
    """Stands where block `index` stood, and looks like it. The block stays in the owner's list."""

    def __init__(self, gated: Gated, blocks: nn.ModuleList, index: int) -> None:
        super().__init__()
        # Not as attributes of a module: the blocks must not become children of the gate.
        self.__dict__.update(gated=gated, blocks=blocks, index=index, tuple_length=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["blocks"][self.__dict__["index"]], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        span, after = self.gated.span, self.index + 1
        if span.first < after <= span.last and not span.compiled:
            output = self.gated.lean[self.index](*args, **kwargs)
            state = output[0] if isinstance(output, tuple) else output
            self.__dict__["tuple_length"] = len(output) if isinstance(output, tuple) else 0
        else:
            given = args[0] if args else kwargs["hidden_states"]
            state = span.states if after == span.first else given
            if span.first < after <= span.last and self.index >= span.done:
                span.done = min((d for d in span.wanted if d >= after), default=span.last)
                angles, cache = kwargs["position_embeddings"], kwargs["past_key_values"]
                state = self.gated.passes(self.index, span.done, given, angles, cache)
            n = self.tuple_length
            output = (state, *[None] * (n - 1)) if n else state
        if after in span.wanted:
            span.found[after] = state
        return output
