"""VMoBA, Mixture of Block Attention for video (arXiv 2506.23858): blocks that follow the token grid, chosen under competition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, State
from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..core.layouts import Groups, Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from ..kernels.pooling import full_precision
from ..kernels.prefix import smallest_prefix
from .base import LookAhead, Pattern
from .routed import Sequence, block_means, gates, head_spans, joined, own_memberships, routed_memberships, sequences

Scope = Literal["query_head", "block", "head_global", "overall"]


@register("pattern", "vmoba")
@dataclass(frozen=True)
class VMoBA(Pattern):
    """Every query sees its own block of the grid and those blocks whose match with it wins a competition of all queries.

    Attributes:
        blocks: block shapes over the token grid; layer l uses entry ``l mod len(blocks)``; 0 is the whole axis. The default is
            the paper's for 24×36×64 latents: slabs of 3 frames, 6×8 columns over all frames, 8×12×8 boxes. Blocks at the end
            of an axis may be smaller. Shapes of one number cut the sequence itself and need no grid.
        grid: token grid in raster order, e.g. ``(frames, height, width)``; None takes the model's (``ctx.grid``).
        threshold: τ, share of the summed similarity that is kept, own blocks included; 1 is dense. Not used with ``top_k``.
        top_k: instead of a threshold, blocks per query on average, counting its own, one number for each of ``blocks`` (or
            one for all). The paper's without training: ``scope="query_head"``, ``top_k=(2, 6, 18)``.
        scope: who competes: all pairs of a head (``"head_global"``, the paper's), the blocks of one query
            (``"query_head"``, the default of the authors' file), the queries of one block over all heads (``"block"``), or all
            pairs of all heads (``"overall"``).
        strict: keep no further pair when the own blocks already reach the threshold; the authors keep one.
        dense_steps: first denoising steps that stay dense (the paper: a quarter of them).
        literal: as the authors released it: all sequences of a batch compete with each other in the global scopes, full
            attention when no pair but the own blocks is left, and shapes of several axes must divide the grid.

    Similarity is ``q · mean key`` in float32, scaled to 0…1 by the least and the greatest of the competition; own blocks are
    always kept. Both follow the authors' code: the paper's equations have neither, and sums of signed products give no share.
    On causal models the base mask holds inside each block, but later queries compete and means may hold later keys:
    ``look_ahead`` is ``"prefill"``, except for ``top_k`` per query over blocks of consecutive tokens.
    """

    blocks: tuple[tuple[int, ...], ...] = ((3, 0, 0), (0, 6, 8), (8, 12, 8))
    grid: tuple[int, ...] | None = None
    threshold: float = 0.25
    top_k: tuple[int, ...] = ()
    scope: Scope = "head_global"
    strict: bool = False
    dense_steps: int = 0
    literal: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "threshold", low=0.0, high=1.0)
        check_range(self, "dense_steps", low=0)
        if not self.blocks or any(len(s) == 0 or min(s) < 0 or (len(s) == 1 and s[0] == 0) for s in self.blocks):
            raise ConfigError(
                f"VMoBA.blocks is {self.blocks!r}; expected at least one shape of sizes above 0 (0: the whole axis of a grid)."
            )
        if len({len(shape) for shape in self.blocks} - {1}) > 1:
            raise ConfigError(
                f"VMoBA.blocks is {self.blocks!r}; expected shapes of as many axes each, those of the grid, or of one number."
            )
        if self.grid is not None and (not self.grid or min(self.grid) < 1):
            raise ConfigError(f"VMoBA.grid is {self.grid!r}; expected sizes of at least 1, for example (24, 36, 64).")
        if self.grid is not None:
            for shape in self.blocks:
                self._check_shape(shape, self.grid)
        if self.top_k and (len(self.top_k) not in (1, len(self.blocks)) or min(self.top_k) < 1):
            raise ConfigError(
                f"VMoBA.top_k is {self.top_k!r}; expected one number of at least 1, or one for each of the {len(self.blocks)} blocks."
            )
        if self.top_k and self.scope == "block":
            raise ConfigError(
                "VMoBA.scope is 'block' with top_k; expected a threshold there, as in the authors' code, which has no such mode."
            )

    @property
    def look_ahead(self) -> LookAhead:
        alone = self.scope == "query_head" and self.top_k and all(len(shape) == 1 for shape in self.blocks)
        return "none" if alone else "prefill"

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """``Groups``; None where everything is kept."""
        base = ctx.base
        if ctx.role == "cross" or (not base.causal and base.q_len != base.kv_len):
            raise UnsupportedError(
                f"vmoba gives every query its own block of keys, which cross-attention ({base.q_len} queries, {base.kv_len} keys) "
                "does not have; use block_topk there."
            )
        turn = ctx.layer_index % len(self.blocks)
        dense = ctx.step is not None and ctx.step < self.dense_steps
        if dense or base.q_len == 0 or base.kv_len == 0 or (self.threshold == 1.0 and not self.top_k):
            return None, state
        shape = self.blocks[turn]
        grid = self._grid(ctx, shape)
        if grid:
            _check_length(base, grid)
        with full_precision(q):
            found = sequences(base, lambda rank: block_of(rank, shape, grid), ("vmoba", shape, grid))
            count = self.top_k[turn % len(self.top_k)] if self.top_k else 0
            if count and all(part.blocks <= count for parts in found for part in parts):
                return None, state
            return self._groups(q, k, found, count), state

    def _grid(self, ctx: SelectContext, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) == 1:
            return ()
        grid = self.grid or ctx.grid
        if grid is None:
            raise ConfigError(
                f"vmoba needs a token grid for blocks of the shape {shape}: give grid=(frames, height, width), or blocks of one number."
            )
        self._check_shape(shape, grid)
        return tuple(grid)

    def _check_shape(self, shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
        if len(shape) == 1:
            return
        if len(shape) != len(grid):
            raise ConfigError(
                f"VMoBA.blocks has the shape {shape} for the grid {tuple(grid)}; expected {len(grid)} sizes, 0 for a whole axis."
            )
        if any(s > g for s, g in zip(shape, grid, strict=True)):
            raise ConfigError(
                f"VMoBA.blocks has the shape {shape}, larger than the grid {tuple(grid)}; expected sizes within it, 0 for a whole axis."
            )
        several = sum(s > 0 for s in shape) > 1
        if self.literal and several and any(s and g % s for s, g in zip(shape, grid, strict=True)):
            raise ConfigError(
                f"VMoBA.blocks has the shape {shape}, which does not divide the grid {tuple(grid)}, and literal is true; "
                "expected divisors, as the authors' code does. Drop literal to allow smaller blocks at the ends."
            )

    def _groups(self, q: Tensor, k: Tensor, found: list[list[Sequence]], count: int) -> Groups | None:
        heads, sizes = q.shape[1], (q.shape[1], k.shape[1], q.shape[2], k.shape[2])
        items = [(b, part) for b in range(q.shape[0]) for part in found[b if len(found) > 1 else 0]]
        together = self.literal and self.scope in ("head_global", "overall")
        rivals = [items] if together else [[item] for item in items]
        members = [own_memberships(part, b, *sizes) for b, part in items]
        own = len(members)
        for some in rivals:
            means = [block_means(k[b, :, p.first_key : p.first_key + p.block.shape[0]], p) for b, p in some]
            whole = self.scope in ("block", "overall") or together
            spans = [slice(0, heads)] if whole else list(head_spans(heads, k.shape[1], some[0][1]))
            for span in spans:
                gate = [
                    gates(q[b, :, p.first_row : p.first_row + p.rows], mean, span)
                    for (b, p), mean in zip(some, means, strict=True)
                ]
                for (b, part), chosen in zip(some, self._choose(gate, [p for _, p in some], count), strict=True):
                    if bool(chosen.any()):
                        members.append(routed_memberships(part, chosen, b, span.start, *sizes))
        if self.literal and len(members) == own:
            return None
        return joined(members, q.device)

    def _choose(self, gate: list[Tensor], parts: list[Sequence], count: int) -> list[Tensor]:
        """``(h, C, n)`` bool for each sequence: the pairs kept besides own blocks. All of ``gate`` compete together."""
        shapes = [g.shape for g in gate]

        def pools(x: list[Tensor]) -> Tensor:  # (pools, members)
            if self.scope == "query_head":
                return x[0].transpose(1, 2).flatten(0, 1)
            if self.scope == "block":
                return x[0].transpose(0, 1).flatten(1)
            flat = torch.cat([y.flatten(1) for y in x], 1)
            return flat.reshape(1, -1) if self.scope == "overall" else flat

        candidate = pools([p.others().expand(s) for p, s in zip(parts, shapes, strict=True)])
        own = pools([p.owned().expand(s) for p, s in zip(parts, shapes, strict=True)])
        chosen = self._compete(pools(gate), candidate, own, count)
        h, c, n = shapes[0]
        if self.scope == "query_head":
            return [chosen.view(h, n, c).transpose(1, 2)]
        if self.scope == "block":
            return [chosen.view(c, h, n).transpose(0, 1)]
        flat = chosen.view(h, -1)
        lengths = [s[1] * s[2] for s in shapes]
        return [x.unflatten(1, s[1:]) for x, s in zip(flat.split(lengths, 1), shapes, strict=True)]

    def _compete(self, gate: Tensor, candidate: Tensor, own: Tensor, count: int) -> Tensor:
        """In every pool ``(P, M)`` the candidates kept besides ``own``."""
        valid = candidate | own
        low = torch.where(valid, gate, torch.inf).amin(1, keepdim=True)
        span = torch.where(valid, gate, -torch.inf).amax(1, keepdim=True) - low
        span = torch.where(span > 1e-6, span, 1.0)
        share = torch.where(valid, (gate - low) / span, 0.0)
        if count:
            return smallest_prefix(
                share, candidate, (count - 1) * own.sum(1), count=True
            )  # every row has one own block
        total = share.sum(1, dtype=torch.float64)
        need = (self.threshold * total - torch.where(own, share, 0.0).sum(1, dtype=torch.float64)).clamp(min=0)
        return smallest_prefix(share, candidate, need, least=0 if self.strict else 1)


def block_of(rank: Tensor, shape: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Number of the block of each position: blocks in raster order of the grid, or along the sequence for one-number shapes.

    Args:
        rank: int64 positions in raster order.
        shape: sizes per axis, 0 for the whole axis.
        grid: sizes of the grid; not used when ``shape`` has one number.
    """
    if len(shape) == 1:
        return torch.div(rank, shape[0], rounding_mode="floor")
    number = torch.zeros_like(rank)
    behind = math.prod(grid)
    for size, axis in zip(shape, grid, strict=True):
        behind //= axis
        size = size or axis
        at = torch.div(rank, behind, rounding_mode="floor") % axis
        number = number * -(-axis // size) + torch.div(at, size, rounding_mode="floor")
    return number


def _check_length(base: BaseMask, grid: tuple[int, ...]) -> None:
    """Refuse sequences that do not fill the grid (causal ones may still grow)."""
    memo = ("longest sequence",)
    if memo not in base.cache:
        rank = base.rank if base.valid is None else base.rank.where(base.valid, -1)
        base.cache[memo] = int(rank.max()) + 1
    longest, cells = base.cache[memo], math.prod(grid)
    if longest > cells or (longest < cells and not base.causal):
        raise ShapeError(
            f"vmoba has the grid {grid}, {cells} tokens, and the sequence has {longest}; expected the same. "
            "Give the grid of these tokens, or leave it out where the model tells it."
        )
