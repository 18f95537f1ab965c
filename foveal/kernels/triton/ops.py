"""Launching the kernels, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...core.layouts import Groups, KeySelection
from ..call import AttentionCall
from ..group_plan import average, owners
from ..list_plan import row_bounds
from ..row_gradients import upstream_term
from ..rows import LOG2_E
from . import device
from .work import Work, work_of

SPLIT_KEYS = 256
"""Keys of a list that a program keeps at least where lists are split to keep a GPU busy."""


@dataclass(frozen=True, eq=False)
class Seen:
    """The base mask: ``lo`` and ``hi`` ``(B or 1, Nq)``, None where every key is visible; ``valid`` ``(B or 1, Nk)`` bytes."""

    lo: Tensor | None
    hi: Tensor | None
    valid: Tensor | None

    def arguments(self, other: Tensor) -> tuple[Tensor, ...]:
        return tuple(other if x is None else x for x in (self.lo, self.hi, self.valid))

    def strides(self) -> tuple[int, ...]:
        return tuple(0 if x is None or x.shape[0] == 1 else x.shape[1] for x in (self.lo, self.valid))


def seen_of(call: AttentionCall) -> Seen:
    base, layout = call.base, call.layout
    valid = None if base.valid is None else base.valid.contiguous().view(torch.uint8)
    limited = isinstance(layout, KeySelection) and layout.limit is not None
    if base.plain and not base.causal and not limited:
        return Seen(None, None, valid)
    lo, hi = row_bounds(call, layout) if isinstance(layout, KeySelection) else (base.lo, base.hi)
    lo, hi = (x.contiguous() for x in torch.broadcast_tensors(lo, hi))
    return Seen(lo, hi, valid)


def _tiles(work: Work, dtype: torch.dtype, wide: int, backward: bool) -> dict[str, int]:
    """Rows and keys per tile, and warps: what fits the registers of a program (``tests/kernels/compiled.py`` prints what does not),
    and no more rows than a list has.
    """
    exact = dtype == torch.float32  # three products for each
    rows = 64 if wide <= 128 and not exact else 32
    keys = 64 if wide <= 128 and not exact and not backward else 32
    if exact and wide > 128:
        rows = keys = 16
    elif backward and wide > 128:
        rows = 16  # within the shared memory of consumer GPUs
    if work.lists:
        rows = min(rows, max(16, triton.next_power_of_2(work.rows)))
    return {"ROWS": rows, "KEYS": keys, "num_warps": 4 if keys == 64 else 8, "enable_fp_fusion": True}


def options(
    work: Work, seen: Seen, parts: bool, softcap: float | None, q: Tensor, v: Tensor, backward: bool = False
) -> dict[str, Any]:
    """What the kernels are compiled for."""
    wide = [max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v)]
    return {
        "LISTS": work.lists,
        "PER_HEAD": work.per_head,
        "OF_MEMBERS": work.of_members,
        "PARTS": parts,
        "BOUNDED": seen.lo is not None,
        "PADDED": seen.valid is not None,
        "CAPPED": softcap is not None,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "D": q.shape[-1],
        "DV": v.shape[-1],
        "WIDE_D": wide[0],
        "WIDE_DV": wide[1],
    } | _tiles(work, q.dtype, max(wide), backward)


def _splits(work: Work, tiles: int, processors: int) -> int:
    """Into how many parts lists are split: few rows would leave most of a GPU idle, as one new token does."""
    if not work.lists:
        return 1
    return max(1, min(2 * processors // max(tiles * work.layers, 1), -(-work.sizes.width // SPLIT_KEYS)))


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a kernel where its tensors lie; nothing where no program would run."""
    if 0 not in grid:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **settings)


def _steps(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Numbers from one sequence, head and key to the next."""
    return (*k.stride()[:3], *v.stride()[:3])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: Work, seen: Seen, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        factors = (scale * LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2_E)
        repeats = work.order is not None
        settings = options(work, seen, repeats, softcap, q, v)
        piece, first, tiles = work.tiles("q", settings["ROWS"])
        splits = _splits(work, tiles, _processors(q))
        joined = repeats or splits > 1
        out = (q.new_empty if work.lists or joined else q.new_zeros)(q.shape[0], v.shape[-1])  # rows of no group stay 0
        lse = q.new_full(q.shape[:1], -torch.inf, dtype=torch.float32)
        target, target_lse = out, lse
        if joined:
            count = splits * q.shape[0] if work.lists else work.layers * work.sizes.members
            target, target_lse = q.new_empty(count, v.shape[-1], dtype=torch.float32), lse.new_empty(count)
        _launch(
            device.forward, (tiles, work.layers, splits), q, k, v, target, target_lse, *seen.arguments(lse), work.q_index, work.cu_q,
            work.k_index, work.cu_k, piece, first, *work.sizes, *_steps(k, v), *seen.strides(), *factors, splits,
            **settings | {"PARTS": joined},
        )  # fmt: skip
        if joined:
            order, begins = (work.k_index if x is None else x for x in (work.order, work.begins))
            _launch(
                device.join, (q.shape[0],), target, target_lse, out, lse, order, begins, work.sizes.heads, work.sizes.q_len, work.sizes.members, splits,
                LISTS=work.lists, PER_HEAD=work.per_head, DV=v.shape[-1], WIDE_DV=settings["WIDE_DV"], num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.work, ctx.seen, ctx.numbers, ctx.softcap = work, seen, (*factors, scale), softcap
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        work, seen = ctx.work, ctx.seen
        settings = options(work, seen, work.order is not None, ctx.softcap, q, v, backward=True)
        grad_out = grad_out.contiguous()
        term = upstream_term(grad_out, out, grad_lse.to(torch.float32))
        base = lse.masked_fill(lse == -torch.inf, 0.0).mul_(LOG2_E)
        sums = torch.float32 if settings["PARTS"] else q.dtype
        grad_q = torch.zeros(q.shape, dtype=sums, device=q.device)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k, v))
        indices = (work.q_index, work.cu_q, work.k_index, work.cu_k)
        rest = (*work.sizes, *_steps(k, v), *seen.strides(), *ctx.numbers)
        masks = (base, term, *seen.arguments(lse), *indices)
        if ctx.needs_input_grad[0]:
            piece, first, tiles = work.tiles("q", settings["ROWS"])
            grid = (tiles, work.layers)
            _launch(device.grad_queries, grid, q, k, v, grad_out, grad_q, *masks, piece, first, *rest, **settings)
        if any(ctx.needs_input_grad[1:3]):
            piece, first, tiles = work.tiles("k", settings["KEYS"])
            grid = (tiles, work.layers)
            _launch(device.grad_keys, grid, q, k, v, grad_out, grad_k, grad_v, *masks, piece, first, *rest, **settings)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of shapes ``(B, H, Nq, Dv)`` and ``(B, H, Nq)``; a row that sees nothing gives zeros and −inf."""
    work = work_of(call)
    q = call.q.reshape(-1, call.q.shape[-1])
    # a part of a cache is read where it lies
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.k, call.v))
    if work.of_members:
        assert isinstance(call.layout, Groups)
        q = q[owners(call, call.layout)]  # each membership of a query in a group is one row
    out, lse = _Attend.apply(q.contiguous(), k, v, work, seen_of(call), call.scale, call.softcap)
    if work.of_members:
        assert isinstance(call.layout, Groups)
        return average(call, call.layout, out, lse)
    return out.view(*call.q.shape[:3], -1), lse.view(call.q.shape[:3])
