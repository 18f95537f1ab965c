"""What a probe is: a statistic of attention weights that can be had from blocks of rows, in O(N) memory.

A probe is one file in ``foveal/lens/probes``, found by its ``@register("probe", name)``. Most are of two kinds: a figure per row
(:class:`RowProbe`: what a token looks at) or per key (:class:`KeyProbe`: who looks at a token), and only say what one block gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .blocks import Block

if TYPE_CHECKING:
    from ..hf import AttentionEvent


@dataclass
class Site:
    """One layer while it is recorded; a request may come in several calls (chunks, decode steps).

    Attributes:
        index, heads, batch: which layer, its query heads, sequences. dtype, device: of the statistics.
        first: tokens that were cached before the recording began. seen: tokens before this call. start: position of this call's row 0; first_key: position of its key 0 (rolling caches).
        end: tokens of the request after this call.
        real: ``(B, tokens)`` bool so far, False on padding.
    """

    index: int
    heads: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    first: int = 0
    seen: int = 0
    start: int = 0
    first_key: int = 0
    end: int = 0
    real: list[Tensor] = field(default_factory=list)

    def is_real(self) -> Tensor:
        """``(B, tokens)`` bool."""
        return torch.cat(self.real, 1)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """``(B, H, *shape)`` zeros."""
        return torch.zeros(self.batch, self.heads, *shape, dtype=dtype or self.dtype, device=self.device)


@dataclass(frozen=True)
class Result:
    """One array of one layer: ``(B, H, …)``, and the names of the axes after the heads."""

    values: Tensor
    dims: tuple[str, ...] = ("token",)
    coords: dict[str, tuple[Any, ...]] = field(default_factory=dict)


class Probe(ABC):
    """A statistic of every recorded layer.

    Class attributes:
        registered_name: set by ``register``.
        needs_blocks: whether it looks at blocks of weights at all.
        needs_gradients: whether it waits for a backward pass.
        needs_policy: whether it asks what a policy keeps.
    """

    registered_name: ClassVar[str]
    needs_blocks: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    needs_policy: ClassVar[bool] = False

    def start(self, site: Site) -> Any:
        """What is remembered about a layer; called before its first block."""
        return None

    def call(self, event: AttentionEvent, site: Site, state: Any) -> Any:
        """Called once for every call of the layer before its blocks; returns the state to go on with."""
        return state

    def see(self, block: Block, site: Site, state: Any) -> None:  # noqa: B027 (probes of gradients see no blocks)
        """Take what is wanted from a block."""

    @abstractmethod
    def finish(self, site: Site, state: Any) -> dict[str, Result]:
        """The layer's arrays by name; ``""`` is the probe's own name, others are appended after a dot.

        Raises:
            ConfigError: what was asked for is not in the text.
        """


class RowProbe(Probe):
    """A figure per row, ``(B, H, tokens)``; NaN in rows of padding."""

    @abstractmethod
    def measure(self, block: Block, site: Site) -> Tensor:
        """``(G, R)``."""

    def start(self, site: Site) -> list[Tensor]:
        return []

    def call(self, event: AttentionEvent, site: Site, state: list[Tensor]) -> list[Tensor]:
        state.append(site.zeros(event.call.q.shape[2]))
        return state

    def see(self, block: Block, site: Site, state: list[Tensor]) -> None:
        state[-1][block.b, block.heads, block.rows] = self.measure(block, site)

    def finish(self, site: Site, state: list[Tensor]) -> dict[str, Result]:
        values = torch.cat([site.zeros(site.first), *state], -1)
        values[..., : site.first] = torch.nan
        return {"": Result(values.masked_fill(~site.is_real()[:, None], torch.nan))}


@dataclass
class Sums:
    """Sums per key, ``(B, H, ≥ tokens)``, with room to grow."""

    values: Tensor

    def reach(self, end: int) -> None:
        """Make room for ``end`` keys."""
        have = self.values.shape[-1]
        if end > have:
            more = max(end, 2 * have) if have else end
            self.values = torch.nn.functional.pad(self.values, (0, more - have))


class KeyProbe(Probe):
    """A figure per key, summed over rows: ``(B, H, tokens)``; NaN on keys of padding."""

    @abstractmethod
    def measure(self, block: Block, site: Site) -> tuple[Tensor, int]:
        """``(G, K′)`` sums over the block's rows for keys of the block, and which of its keys is the first of them."""

    def start(self, site: Site) -> Sums:
        return Sums(site.zeros(0))

    def call(self, event: AttentionEvent, site: Site, state: Sums) -> Sums:
        state.reach(site.end)
        return state

    def see(self, block: Block, site: Site, state: Sums) -> None:
        sums, skip = self.measure(block, site)
        first = site.first_key + block.keys.start + skip
        state.values[block.b, block.heads, first : first + sums.shape[-1]] += sums

    def scale(self, site: Site) -> Tensor | float:
        """What the sums are multiplied with in the end; ``(B, 1, tokens)``."""
        return 1.0

    def finish(self, site: Site, state: Sums) -> dict[str, Result]:
        values = state.values[..., : site.end] * self.scale(site)
        return {"": Result(values.masked_fill(~site.is_real()[:, None], torch.nan))}


def whole(name: str, value: Any, least: int) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number, at least {least}.")


def inside(name: str, positions: tuple[int, ...], tokens: int) -> None:
    """Raise :class:`ConfigError` naming the first position that the text does not have."""
    for at in positions:
        if at >= tokens:
            raise ConfigError(
                f"{name} asks for position {at}, but the text has {tokens} tokens (0 to {tokens - 1}). "
                "Choose a position inside it, or record a longer text."
            )
