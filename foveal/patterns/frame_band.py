"""A band around each token's place in an image, the same in every frame of a video (Re-ttention, arXiv 2505.22918)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, State
from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..core.layouts import Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from .base import LookAhead, Pattern
from .near import Places, near_layout, rows_of


@register("pattern", "frame_band")
@dataclass(frozen=True)
class FrameBand(Pattern):
    """Each image token sees, in every frame, the tokens near its own row-major place; text is visible both ways.

    Attributes:
        keep: share of a frame that the band covers: half-width ``⌊⌊keep·n⌋/2⌋`` for frames of ``n`` tokens, so ``2·half + 1`` tokens,
            cut at the ends of the frame. The density of the whole mask is higher where text rows and columns are dense.
        frames: frames of equal size after the text; 1 is an image.
        text: tokens before the image; they see everything and everything sees them.
        order: "frames" for one frame after the other, "places" for equal places of all frames side by side, which makes the band
            one run of keys.

    Source: Re-ttention, section on masks; bands and rounding as in the authors' code, whose attribute ``sparsity`` is ``keep``.
    """

    keep: float = 1 / 32
    frames: int = 1
    text: int = 0
    order: Literal["frames", "places"] = "frames"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "frames", low=1)
        check_range(self, "text", low=0)
        if not 0 < self.keep <= 2:
            raise ConfigError(
                f"FrameBand.keep is {self.keep!r}; expected a share above 0 and at most 1 (up to 2: every place sees the whole frame)."
            )

    @property
    def static(self) -> bool:
        return True

    @property
    def look_ahead(self) -> LookAhead:
        """The width follows from the length of the whole sequence."""
        return "prefill"

    def half(self, tokens: int) -> int:
        """Half-width of the band in a frame of so many tokens."""
        return int(self.keep * tokens) // 2

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``BlockMask``, made once per base mask; None when the band covers a frame.

        Raises:
            ShapeError: the length is not text plus whole frames.
            UnsupportedError: cross-attention.
        """
        base = ctx.base
        size = self._frame(base)
        half = self.half(size)
        if half >= size - 1:
            return None, state
        memo = ("frame_band", self)
        if memo not in base.cache:
            slot = (torch.arange(base.kv_len, device=base.device) - self.text).clamp(min=0)
            x = slot % size if self.order == "frames" else torch.div(slot, self.frames, rounding_mode="floor")
            text = torch.arange(base.kv_len, device=base.device) < self.text
            places = Places(torch.zeros_like(x).int(), x.int(), text)
            base.cache[memo] = near_layout(rows_of(places, base), places, half**2 + 1)
        return base.cache[memo], state

    def _frame(self, base: BaseMask) -> int:
        if not base.causal and base.q_len != base.kv_len:
            raise UnsupportedError(
                f"frame_band: {base.q_len} queries and {base.kv_len} keys; expected as many of both, because queries have places in "
                "the image. Cross-attention has no band."
            )
        total = base.shift + base.q_len if base.causal else base.kv_len
        size, rest = divmod(total - self.text, self.frames)
        if size < 1 or rest:
            raise ShapeError(
                f"frame_band: frames is {self.frames} and the sequence has {total} tokens with text = {self.text}; expected text, "
                "then frames of equal size."
            )
        return size
