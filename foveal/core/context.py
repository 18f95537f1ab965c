"""What a pattern is told besides its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from .base_mask import BaseMask

if TYPE_CHECKING:
    from .layouts import Layout

State = Any
"""What a pattern remembers between calls for one request; None at the start. Goes in and comes out of ``select``."""


@dataclass(frozen=True, eq=False)
class Selection:
    """What an earlier layer decided in this same forward pass.

    Attributes:
        layout, state: what its pattern returned.
        sizes: ``(B, H, Hkv, Nq, Nk)`` of the call for which it chose, where that is known.
    """

    layout: Layout | None
    state: State
    sizes: tuple[int, int, int, int, int] | None = None

    @classmethod
    def of(cls, layout: Layout | None, state: State, q: Tensor, k: Tensor) -> Selection:
        """Chosen for queries ``(B, H, Nq, D)`` and keys ``(B, Hkv, Nk, D)``."""
        return cls(layout, state, (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]))


@dataclass(frozen=True, eq=False)
class SelectContext:
    """The call's surroundings.

    Attributes:
        base: the mask that the model itself demands, over exactly these queries and keys.
        layer_index, layer_name, num_layers: where in the model.
        role: "self" or "cross".
        q_offset: tokens of this request processed before row 0 (0 in the first prefill chunk).
        scale: factor of q·k before the softmax; None means ``1/sqrt(D)``.
        positions: ``(B or 1, Nq)`` position ids, where the host gave them.
        hidden_states: ``(B, Nq, C)`` input of the attention module, only for patterns that declare the need.
        pre_rope_q: ``(B, H, Nq, D)`` queries before rotation, only for patterns that declare the need.
        grid: token grid, e.g. ``(height, width)``, for vision and video.
        step: denoising step, for diffusion models.
        request_ids: one name per batch row, where the host knows them.
        earlier: what earlier layers of this forward selected, by layer index.
    """

    base: BaseMask
    layer_index: int = 0
    layer_name: str = ""
    num_layers: int = 1
    role: Literal["self", "cross"] = "self"
    q_offset: int = 0
    scale: float | None = None
    positions: Tensor | None = None
    hidden_states: Tensor | None = None
    pre_rope_q: Tensor | None = None
    grid: tuple[int, ...] | None = None
    step: int | None = None
    request_ids: tuple[Any, ...] | None = None
    earlier: Mapping[int, Selection] = field(default_factory=dict)

    @property
    def decoding(self) -> bool:
        """One new query against a cache."""
        return self.base.q_len == 1 and self.base.kv_len > 1
