"""PyTorch's compiled FlexAttention as a column of a benchmark: the same mask, by what a user would pick instead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.layouts import BlockMask, Layout, narrow
from ..kernels import flex


def flex_job(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, base: BaseMask
) -> tuple[Callable[[], Tensor] | None, str]:
    """A forward call of compiled FlexAttention over the pairs that ``layout`` and ``base`` keep, and what it is; None and why not.

    The mask is joined beforehand, so that the call is the kernel alone. The first call compiles.

    Args:
        q: ``(B, H, Nq, D)``. k: ``(B, Hkv, Nk, D)``. v: ``(B, Hkv, Nk, Dv)``.
    """
    reason = flex.unavailable()
    if reason is not None:
        return None, reason
    if layout is not None and not isinstance(layout, BlockMask):
        return None, f"FlexAttention takes a BlockMask; this layout is {type(layout).__name__}"
    joint = narrow(layout, base, transpose=False)
    many = q.shape[1] != k.shape[1]
    return lambda: flex.compiled(q, k, v, block_mask=joint, enable_gqa=many), f"compiled by torch {torch.__version__}"
