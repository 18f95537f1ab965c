"""Reuse of another layer's choice (HyLRA, arXiv 2602.00777): attend to the keys that an earlier layer selected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.budget import Budget
from ..core.context import SelectContext, Selection, State
from ..core.errors import ConfigError, ShapeError
from ..core.layouts import BlockMask, Groups, KeySelection, Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from .base import LookAhead, Pattern
from .topk import BlockTopK

DEFAULT_CHOICE = BlockTopK(Budget(tokens=2048))


@dataclass(frozen=True, eq=False)
class Offered:
    """What a layer hands on without using it: a selection, and the state of the pattern that made it."""

    layout: Layout | None
    state: State


@register("pattern", "reuse")
@dataclass(frozen=True)
class Reuse(Pattern):
    """A layer attends to what an earlier layer of the same forward selected, with its own queries, keys and values.

    Attributes:
        layer: whose choice, by layer index; None takes the nearest earlier layer that left something out or handed something on
            (and is dense where no layer did).

    Nothing is scored and nothing remembered: in prefill and in every decode step the earlier layer chooses first, so the list is
    as long as the cache. Reads ahead as far as the earlier layer's pattern, at most ``"prefill"``. A layer with rules for single
    heads has no selection to share.
    """

    layer: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "layer", low=0)

    @property
    def look_ahead(self) -> LookAhead:
        return "prefill"

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """The earlier layer's layout as it is."""
        if self.layer is not None and self.layer >= ctx.layer_index:
            allowed = f"at most {ctx.layer_index - 1}" if ctx.layer_index else "of which layer 0 has none"
            raise ConfigError(
                f"reuse: layer {ctx.layer_index} is to take the choice of layer {self.layer}; expected an earlier layer, {allowed}."
            )
        found = self._found(ctx)
        if found is None:
            return None, state
        layout = _shared(found)
        if layout is not None:
            _check_fit(layout, found.sizes, q, k, self._whose())
        return layout, state

    def _found(self, ctx: SelectContext) -> Selection | None:
        if self.layer is not None:
            if self.layer not in ctx.earlier:
                raise ConfigError(
                    f"reuse: layer {ctx.layer_index} is to take the choice of layer {self.layer}, which made none that can be shared; "
                    f"expected one of {sorted(ctx.earlier)}. Layers with rules for single heads share nothing."
                )
            return ctx.earlier[self.layer]
        if ctx.layer_index == 0 or not len(ctx.earlier):
            raise ConfigError(
                f"reuse: layer {ctx.layer_index} has no earlier layer to take a choice from; expected a pattern that chooses, such as block_topk."
            )
        for layer in sorted((i for i in ctx.earlier if i < ctx.layer_index), reverse=True):
            if _shared(ctx.earlier[layer]) is not None:
                return ctx.earlier[layer]
        return None

    def _whose(self) -> str:
        return "the nearest earlier layer that chose" if self.layer is None else f"layer {self.layer}"


@register("pattern", "anchor")
@dataclass(frozen=True)
class Anchor(Pattern):
    """A dense layer that hands on what another pattern would choose here; later layers take it with ``reuse``.

    HyLRA's two-class mode: layers whose attention is spread stay dense and still name the keys that matter to the layers after them.

    Attributes:
        choose: the pattern that chooses.
    """

    choose: Pattern = DEFAULT_CHOICE

    def __post_init__(self) -> None:
        check_types(self)

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """None (dense); the selection lies in the state, an ``Offered``."""
        inner = state.state if isinstance(state, Offered) else None
        return None, Offered(*self.choose.select(q, k, ctx, inner))

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "choose": self.choose.to_json()}


def _shared(selection: Selection) -> Layout | None:
    return selection.state.layout if isinstance(selection.state, Offered) else selection.layout


def _check_fit(layout: Layout, sizes: tuple[int, ...] | None, q: Tensor, k: Tensor, whose: str) -> None:
    """Refuse a layout that was made for another batch, other lengths or other heads (layers with caches of their own length)."""
    batch, heads, q_len = q.shape[:3]
    kv_heads, kv_len = k.shape[1:3]
    if isinstance(layout, BlockMask):
        rows, of_heads = layout.kv_num_blocks.shape[:2]
        made = (rows, of_heads, int(layout.seq_lengths[0]), int(layout.seq_lengths[1]))
        fits = made[2:] == (q_len, kv_len) and rows in (1, batch) and of_heads in (1, heads)
    elif isinstance(layout, KeySelection):
        index = layout.index
        top = int(index.max()) if index.numel() else -1
        rows, of_heads, blocks = index.shape[:3]
        made = (rows, of_heads, blocks * layout.block_size, top + 1)
        fits = rows in (1, batch) and of_heads in (1, kv_heads, heads) and top < kv_len
        fits = fits and blocks == -(-q_len // layout.block_size)
    else:
        assert isinstance(layout, Groups)
        per_q, per_k = (heads, kv_heads) if layout.per_head else (1, 1)
        top_q, top_k = (int(x.max()) if x.numel() else -1 for x in (layout.q_index, layout.k_index))
        made = (1, 1, top_q + 1, top_k + 1)
        fits = top_q < batch * per_q * q_len and top_k < batch * per_k * kv_len
        fits = fits and (top_q < 0 or top_q >= (batch * per_q - 1) * q_len)  # some row of the last head, too
        if sizes is not None:  # rows are counted through the batch, and through heads that have groups of their own
            fits = sizes[0] == batch and sizes[3:] == (q_len, kv_len)
            fits = fits and (not layout.per_head or sizes[1:3] == (heads, kv_heads))
    if sizes is not None:
        made = (sizes[0], sizes[1], sizes[3], sizes[4])
    if not fits:
        raise ShapeError(
            f"reuse: the choice of {whose} was made for {made[2]} queries and {made[3]} keys of {made[1]} heads in a batch of {made[0]}; "
            f"this layer has {heads} heads, {q_len} queries and {kv_len} keys in a batch of {batch}. "
            "Expected layers with the same heads and cache length; let this layer choose for itself."
        )
