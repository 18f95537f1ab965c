"""One case of the benchmark of kernels: a mask with tensors, the work in it, and what is right, in float64 on some of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import Mask

FORWARD, BACKWARD = "forward", "backward"
FLOPS_PER_PAIR = {FORWARD: 4.0, BACKWARD: 10.0}
"""Times the head dimension: two matrix products forward, five backward (one of them recomputes the scores)."""

SAMPLED_ROWS = 64
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
TF32 = 2e-3
"""Largest error of a result that counts as right: outputs in units of their largest value, and gradients likewise."""


def tolerance(tensor: Tensor) -> float:
    """For this dtype and device; float32 products may run in TF32 on CUDA."""
    return TF32 if tensor.dtype == torch.float32 and tensor.device.type == "cuda" else TOLERANCE[tensor.dtype]


@dataclass(frozen=True)
class Heads:
    """A head layout: query heads, key heads, and the dimension of each."""

    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.heads}:{self.kv_heads}×{self.dim}"


@dataclass(frozen=True, eq=False)
class Work:
    """A mask and the tensors to run it on.

    Attributes:
        mask: of one length T. direction: ``forward`` or ``backward``.
        q: ``(1, H, T, D)``; k, v: ``(1, Hkv, T, D)``. upstream: ``(1, H, T, D)``, gradient of the output.
    """

    mask: Mask
    direction: str
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor

    @classmethod
    def make(
        cls,
        mask: Mask,
        heads: Heads,
        dtype: torch.dtype,
        direction: str,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Work:
        """Normal random tensors; the same on every device. They require gradients when the direction is backward."""
        make = torch.Generator().manual_seed(seed)
        shapes = ((heads.heads,), (heads.kv_heads,), (heads.kv_heads,), (heads.heads,))
        drawn = [torch.randn(1, *n, mask.length, heads.dim, generator=make).to(device, dtype) for n in shapes]
        leaves = [t.requires_grad_(direction == BACKWARD) for t in drawn[:3]]
        return cls(mask, direction, leaves[0], leaves[1], leaves[2], drawn[3])

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def area(self) -> int:
        """Visible pairs over all query heads."""
        return self.mask.total_area(self.q.shape[1])

    @property
    def flops(self) -> float:
        """Operations of exactly these pairs in this direction."""
        return flops(self.area, self.q.shape[-1], self.direction)

    def heads_last(self) -> Work:
        """The same numbers with memory ordered ``(1, T, H, D)``, for kernels that want it so."""
        moved = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (self.q, self.k, self.v)]
        leaves = [t.requires_grad_(self.direction == BACKWARD) for t in moved]
        return Work(self.mask, self.direction, leaves[0], leaves[1], leaves[2], self.upstream)


def flops(area: int, dim: int, direction: str = FORWARD) -> float:
    """``4·area·D`` forward, ``10·area·D`` backward (paper, metrics): 2.5 times the forward pass."""
    return FLOPS_PER_PAIR[direction] * area * dim


def sampled_rows(length: int, seed: int = 0, count: int = SAMPLED_ROWS) -> Tensor:
    """Rows to check, sorted: all of a short sequence, else the first and last, the edges of the first tile, and random ones."""
    if length <= count:
        return torch.arange(length)
    fixed = [r for r in (0, 1, 63, 64, 127, 128, length - 2, length - 1) if r < length]
    rest = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor(sorted(list(dict.fromkeys([*fixed, *rest]))[:count]))


@dataclass(frozen=True, eq=False)
class Truth:
    """What is right on some rows, in float64.

    Attributes:
        rows: their numbers. out: ``(1, H, R, D)``.
        upstream: ``(1, H, T, D)``, zero outside the rows; grads: of q ``(1, H, R, D)`` (rows), k and v (all keys) under it, or None.
    """

    rows: Tensor
    out: Tensor
    upstream: Tensor | None
    grads: tuple[Tensor, Tensor, Tensor] | None

    def error(self, out: Tensor) -> float:
        """Largest difference of these rows of an output, over the largest value that is right."""
        return _largest(out.detach()[:, :, self.rows.to(out.device)], self.out)

    def grad_error(self, grads: tuple[Tensor, ...]) -> float:
        """The same of gradients under ``upstream``: of the rows' queries and of all keys and values; the worst of the three."""
        assert self.grads is not None
        dq = grads[0][:, :, self.rows.to(grads[0].device)]
        return max(_largest(got, right) for got, right in zip((dq, *grads[1:]), self.grads, strict=True))


def truth(work: Work, seed: int = 0) -> Truth:
    """Softmax attention of a few rows in float64, key head by key head: O(rows · T) memory.

    With gradients where the direction is backward: the upstream gradient is zero outside these rows, so that the gradients of *all*
    keys and values follow from them.
    """
    rows = sampled_rows(work.mask.length, seed).to(work.q.device)
    seen = work.mask.pairs(rows)
    backward = work.direction == BACKWARD
    scale = 1.0 / math.sqrt(work.q.shape[-1])
    outs, grads = [], []
    for g in range(work.k.shape[1]):
        mine = slice(g * work.groups, (g + 1) * work.groups)
        q = work.q[0, mine][:, rows].detach().double().requires_grad_(backward)
        k, v = (t[0, g].detach().double().requires_grad_(backward) for t in (work.k, work.v))
        visible = seen[g if seen.shape[0] > 1 else 0]
        weights = torch.softmax((q @ k.T * scale).masked_fill(~visible, -torch.inf), -1)
        out = torch.where(visible.any(-1, keepdim=True), weights, 0.0) @ v
        outs.append(out.detach())
        if backward:
            grads.append(torch.autograd.grad(out, (q, k, v), work.upstream[0, mine][:, rows].double()))
    upstream = None
    if backward:
        upstream = torch.zeros_like(work.upstream)
        upstream[:, :, rows] = work.upstream[:, :, rows]
    joined = None
    if backward:
        dq = torch.cat([g[0] for g in grads])[None]
        joined = (dq, torch.stack([g[1] for g in grads])[None], torch.stack([g[2] for g in grads])[None])
    return Truth(rows, torch.cat(outs)[None], upstream, joined)


def _largest(got: Tensor, right: Tensor) -> float:
    """Infinity where anything is not finite."""
    worst = (got.detach().double() - right).abs().max() / right.abs().max().clamp(min=1e-30)
    return float(worst) if bool(torch.isfinite(worst)) else math.inf
