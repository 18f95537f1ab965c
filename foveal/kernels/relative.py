"""Softmax attention whose bias depends on the query and on the distance: ``((q_i + u)·k_j + q_i·R_r + s_r)·scale``, r = j − i.

``foveal.attention`` takes a table per head and distance; here every query makes its own, so the operator is one of its own. :func:`dense` is the
definition, with every pair's row of R gathered. :func:`relative_attention` makes the products with all distances once, ``(rows, distances)``, and reads them out
shifted by one per row; it goes through the queries in blocks and so holds O(block · Nk) instead of O(Nq · Nk), forward and backward.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.base_mask import BaseMask
from .call import compute_dtype

BLOCK = 256
"""Queries at a time."""


def dense(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, table: Tensor, bias: Tensor, base: BaseMask, *, scale: float
) -> Tensor:
    """The definition, in float64 for tests; arguments as in :func:`relative_attention`. O(Nq·Nk·D) memory."""
    q, k, v, u, table, bias = (t.double() for t in (q, k, v, u, table, bias))
    half = table.shape[0] // 2
    own = torch.arange(q.shape[2], device=q.device) + base.shift
    row = (torch.arange(k.shape[2], device=q.device) - own[:, None]).clamp(-half, half - 1) + half
    logits = (q + u[:, None]) @ k.mT + torch.einsum("bhid,ijhd->bhij", q, table[row]) + bias[row].permute(2, 0, 1)
    return _softmax(logits * scale, base.dense(q.shape[0])[:, None]) @ v


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, table: Tensor, bias: Tensor, base: BaseMask, *, scale: float, block: int = BLOCK
) -> Tensor:  # fmt: skip
    """Attention with query-dependent relative positions.

    Args:
        q: ``(B, H, Nq, D)``; k, v: ``(B, H, Nk, D)``.
        u: ``(H, D)`` added to the queries of the content term.
        table, bias: ``(2P, H, D)`` and ``(2P, H)``; row P + r for offset r = key − query, clamped to −P … P − 1.
        base: which pairs are visible. scale: of the whole sum. block: queries at a time.

    Returns:
        ``(B, H, Nq, D)`` in q's dtype; a row that sees nothing gives zeros.
    """
    dtype = compute_dtype(q.dtype)
    given = tuple(t.to(dtype) for t in (q + u[:, None].to(q.dtype), q, k, v, table, bias))
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in given) and q.shape[2] > block
    outs = []
    for start in range(0, q.shape[2], block):
        rows = slice(start, min(start + block, q.shape[2]))
        part = [given[0][:, :, rows], given[1][:, :, rows], *given[2:]]
        run = partial(_block, base=base, start=rows.start, scale=scale)
        outs.append(checkpoint(run, *part, use_reentrant=False) if needed else run(*part))
    return (torch.cat(outs, 2) if outs else torch.zeros_like(q)).to(q.dtype)


def _block(
    content: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, bias: Tensor, *, base: BaseMask, start: int, scale: float
) -> Tensor:  # fmt: skip
    """Rows ``start`` … of the result."""
    rows, keys, half = q.shape[2], k.shape[2], table.shape[0] // 2
    first = base.shift + start
    # offsets from −(first + rows − 1), of the last row and key 0, to keys − 1 − first, of the first row and the last key
    offset = torch.arange(-(first + rows - 1), keys - first, device=q.device).clamp(-half, half - 1) + half
    far = q @ table[offset].permute(1, 2, 0) + bias[offset].T[:, None]  # (B, H, rows, rows + keys − 1)
    logits = (content @ k.mT + _shifted(far, keys)) * scale
    own, at = torch.arange(start, start + rows, device=q.device), torch.arange(keys, device=q.device)
    zero = torch.zeros(1, dtype=torch.long, device=q.device)
    batch = torch.arange(base.batch, device=q.device)[:, None, None]
    return _softmax(logits, base.allowed(batch, zero, own[:, None], at)[:, None]) @ v


def _shifted(far: Tensor, keys: int) -> Tensor:
    """``(…, rows, keys)``: row i of ``far`` from column rows − 1 − i on, as a view."""
    rows, width = far.shape[-2:]
    far = far.contiguous()
    strides = (*far.stride()[:-2], width - 1, 1)
    return far.as_strided((*far.shape[:-1], keys), strides, far.storage_offset() + rows - 1)


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    weights = torch.softmax(logits.masked_fill(~seen, torch.finfo(logits.dtype).min), -1)
    return torch.where(seen, weights, 0.0)
