"""Attention mass per chunk of keys over decode steps: how spread a layer is, and how far layers choose the same chunks (HyLRA).

HyLRA's profile (arXiv 2602.00777, by the authors' tool): for KV head ``h`` and step ``t`` the mass of chunk ``u`` is the sum over
its keys of the softmax weights, averaged over the query heads of ``h``. A teacher-forced row is a decode step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..core.serial import check_range, check_types
from ..kernels.call import AttentionCall
from .scores import budget, logits

if TYPE_CHECKING:
    from ..hf import AttentionEvent

SHARE = 0.9
"""Share of the mass that the spread counts chunks for."""
_SLACK = 1e-6
"""Rounding allowed when a sum of weights is compared with ``SHARE``."""


@dataclass(frozen=True)
class ChunkSettings:
    """How a profile is made.

    Attributes:
        chunk: keys per chunk (the authors: 128 under grouped heads, 64 under MLA).
        keep: keys that a selection holds, counting forced ones; a whole number of chunks.
        sinks: first keys whose chunks are always selected. recent: keys before the row, counting its own, likewise.
        steps: last rows of the text that are measured. Clipping of outliers needs at least 8 to do anything.
    """

    chunk: int = 128
    keep: int = 2048
    sinks: int = 128
    recent: int = 512
    steps: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        for name, low in (("chunk", 1), ("sinks", 0), ("recent", 1), ("steps", 1)):
            check_range(self, name, low=low)
        if self.keep < self.chunk:
            raise ConfigError(f"ChunkSettings.keep is {self.keep}; expected at least one chunk of {self.chunk} keys.")

    @classmethod
    def at(cls, context: int, share: float = 0.25) -> ChunkSettings:
        """Settings that make sense at a context length: the authors' from 8192 tokens on, smaller in proportion below."""
        chunk = max(1, min(128, context // 64))
        keep = max(chunk, round(share * context))
        return cls(
            chunk, keep, sinks=chunk, recent=max(1, min(512, context // 16)), steps=max(1, min(128, context // 4))
        )


@dataclass(frozen=True, eq=False)
class ChunkMass:
    """One layer's mass per chunk.

    Attributes:
        mass: ``(Hkv, T, M)`` float64, over all steps of all sequences. open: ``(T, M)`` bool, chunks with a key that the step may see.
        forced: ``(T, M)`` bool, chunks of sinks and recent keys.
    """

    mass: Tensor
    open: Tensor
    forced: Tensor

    def selected(self, count: int) -> Tensor:
        """``(Hkv, T, M)`` bool: forced chunks, then the largest masses, ``count`` in all (more only where more are forced); ties go to
        the lower index."""
        rank = self.mass.masked_fill(self.forced, torch.inf).masked_fill(~self.open, -torch.inf)
        first = torch.sort(rank, dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(self.mass, dtype=torch.bool).scatter_(-1, first, True) & self.open | (
            self.forced & self.open
        )


@torch.no_grad()
def chunk_mass(call: AttentionCall, settings: ChunkSettings) -> ChunkMass:
    """Measure the last rows of one layer's call.

    Raises:
        UnsupportedError: a call without a causal mask has no decode steps. ShapeError: fewer rows than two.
    """
    base = call.base
    if not base.causal:
        raise UnsupportedError("a profile of chunks needs causal attention: its rows stand for decode steps.")
    if base.q_len < 2:
        raise ShapeError(f"the text has {base.q_len} token; expected at least 2, and better a few thousand.")
    kv_heads, kv_len = call.k.shape[1:3]
    size, device = settings.chunk, call.q.device
    rows = torch.arange(max(0, base.q_len - settings.steps), base.q_len, device=device)
    per = max(1, budget(device) // (call.q.shape[1] * kv_len))
    key = torch.arange(kv_len, device=device)[None]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for b in range(call.q.shape[0]):
        for part in rows.split(per):
            at = torch.full((len(part), 1), b, device=device)
            seen = base.allowed(at, torch.zeros_like(at), part[:, None], key)
            weights = torch.softmax(logits(call, b, part, slice(0, kv_len), seen).double(), -1)
            grouped = weights.unflatten(0, (kv_heads, -1)).mean(1)
            rank = base.rank[b % base.rank.shape[0]][None]
            near = key > part[:, None] + base.shift - settings.recent
            held = ((rank < settings.sinks) | near) & seen
            parts.append((_chunked(grouped, size).sum(-1), _chunked(seen, size).any(-1), _chunked(held, size).any(-1)))
    return ChunkMass(
        torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
    )


def _chunked(x: Tensor, size: int) -> Tensor:
    return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def spread(layer: ChunkMass) -> Tensor:
    """``(Hkv, T)``: fewest chunks that hold 90 % of the mass over the chunks that the step sees.

    The chunk that crosses 90 % counts: one-hot attention gives 1/M (the authors' tool stops before it and gives 0).
    """
    falling = layer.mass.sort(-1, descending=True).values
    before = falling.cumsum(-1) - falling
    return (before < SHARE * falling.sum(-1, keepdim=True) - _SLACK).sum(-1) / layer.open.sum(-1)


def sensitivity(layer: ChunkMass) -> float:
    """The mean of :func:`spread` over steps and heads, each head's steps clipped to the quartiles ± 1.5 interquartile ranges."""
    ratio = spread(layer).double()
    first, third = torch.quantile(ratio, torch.tensor([0.25, 0.75], dtype=ratio.dtype, device=ratio.device), dim=1)
    reach = 1.5 * (third - first)
    return float(ratio.clamp((first - reach)[:, None], (third + reach)[:, None]).mean(1).mean())


def chunk_overlap(layers: Sequence[ChunkMass], count: int) -> tuple[Tensor, Tensor]:
    """``(Hkv, L, L)`` twice, for ``i ≤ j`` (0 below): ``mean_t |T_i ∩ T_j| / |T_j|``, and the free mass of ``j`` inside ``T_i`` over that inside ``T_j``.

    Forced chunks are in every set and raise the first at short contexts; the second leaves them out.

    Raises:
        UnsupportedError: layers whose heads or chunks differ cannot share a selection.
    """
    shapes = sorted({tuple(layer.mass.shape) for layer in layers})
    if len(shapes) != 1:
        raise UnsupportedError(
            f"layers measured (heads, steps, chunks) {' and '.join(map(str, shapes))}; expected the same in all layers, "
            "since a selection is shared only by layers with the same heads and keys."
        )
    sets = [layer.selected(count) for layer in layers]
    shared = torch.zeros(shapes[0][0], len(layers), len(layers), dtype=torch.float64)
    caught = shared.clone()
    for j, (own, layer) in enumerate(zip(sets, layers, strict=True)):
        free = layer.mass.masked_fill(layer.forced, 0.0)
        full = (free * own).sum(-1)
        for i in range(j + 1):
            shared[:, i, j] = ((sets[i] & own).sum(-1).double() / own.sum(-1)).mean(-1).cpu()
            ratio = torch.where(full > 0, (free * sets[i]).sum(-1) / full.clamp(min=1e-300), 1.0)
            caught[:, i, j] = ratio.mean(-1).cpu()
    return shared, caught


@torch.no_grad()
def model_chunks(
    model: nn.Module, ids: Tensor, settings: ChunkSettings, progress: Callable[[int], None] | None = None
) -> list[ChunkMass]:
    """Every self-attention layer of a causal transformers model, in one dense forward over ``ids`` ``(B, N)`` without padding.

    Args:
        progress: called with the number of layers done.
    """
    from ..hf import attach
    from ..patterns import Dense

    found: list[ChunkMass] = []

    def measure(event: AttentionEvent) -> None:
        if event.role == "self":
            found.append(chunk_mass(event.call, settings))
            if progress is not None:
                progress(len(found))

    body = getattr(model, "base_model", model)
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    with attach(model, Dense(), probes=[measure]):
        body(input_ids=ids.to(next(model.parameters()).device), **kwargs)
    if not found:
        raise UnsupportedError(f"no self-attention layer of {type(model).__name__} ran; expected a decoder.")
    return found
