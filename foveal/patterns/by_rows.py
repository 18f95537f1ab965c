"""Two layouts made one, each for some rows of the batch: requests that run together under different decisions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.base_mask import FULL, BaseMask
from ..core.errors import UnsupportedError
from ..core.layouts import BlockMask, KeySelection, Layout, block_mask, block_mask_kinds


def by_rows(first: Tensor, one: Layout | None, other: Layout | None, base: BaseMask) -> Layout | None:
    """The layout that keeps what ``one`` keeps in the rows where ``first`` is true, and what ``other`` keeps in the others.

    Args:
        first: ``(B,)`` bool. one, other: layouts over the same queries and keys; None is dense.

    Raises:
        UnsupportedError: two layouts of different kinds or block sizes, or ``Groups``.
    """
    if one is None and other is None:
        return None
    given = [x for x in (one, other) if x is not None]
    if all(isinstance(x, BlockMask) for x in given) and len({tuple(x.BLOCK_SIZE) for x in given}) == 1:  # type: ignore[union-attr]
        return _blocks(first, one, other, base)  # type: ignore[arg-type]
    if all(isinstance(x, KeySelection) for x in given) and len({x.block_size for x in given}) == 1:  # type: ignore[union-attr]
        return _lists(first, one, other, base)  # type: ignore[arg-type]
    kinds = " and ".join("dense" if x is None else type(x).__name__ for x in (one, other))
    raise UnsupportedError(
        f"the rows of this batch were routed differently, and layouts of the kinds {kinds} cannot be joined; expected two of one kind and "
        "block size, or one that is dense. Run one request at a time, or choose other patterns."
    )


def _blocks(first: Tensor, one: BlockMask | None, other: BlockMask | None, base: BaseMask) -> BlockMask:
    some = one if one is not None else other
    assert some is not None
    size = (int(some.BLOCK_SIZE[0]), int(some.BLOCK_SIZE[1]))

    def kinds(mask: BlockMask | None) -> Tensor:
        if mask is not None:
            return block_mask_kinds(mask)
        return torch.full((1, 1, -(-base.q_len // size[0]), -(-base.kv_len // size[1])), FULL, dtype=torch.int8, device=first.device)  # fmt: skip

    def condition(mask: BlockMask | None, *at: Tensor) -> Tensor:
        return torch.ones_like(at[0] * at[2] * at[3], dtype=torch.bool) if mask is None else mask.mask_mod(*at)

    def kept(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(first[b], condition(one, b, h, q, k), condition(other, b, h, q, k))

    joined = torch.where(first[:, None, None, None], kinds(one), kinds(other))
    return block_mask(joined, size, (base.q_len, base.kv_len), kept)


def _lists(first: Tensor, one: KeySelection | None, other: KeySelection | None, base: BaseMask) -> KeySelection:
    some = one if one is not None else other
    assert some is not None
    size = some.block_size

    def lists(found: KeySelection | None) -> Tensor:
        if found is None:
            every = torch.arange(base.kv_len, device=first.device)
            return every.expand(1, 1, -(-base.q_len // size), -1)
        if found.limit is None:
            return found.index
        raise UnsupportedError(
            "the rows of this batch were routed differently, and a list of keys with limits of its own cannot be joined with another layout; "
            "run one request at a time, or choose another pattern."
        )

    a, b = lists(one), lists(other)
    heads = max(a.shape[1], b.shape[1])
    if {a.shape[1], b.shape[1]} - {1, heads}:
        raise UnsupportedError(
            f"the rows of this batch were routed differently, and lists for {a.shape[1]} and {b.shape[1]} heads cannot be joined; "
            "run one request at a time."
        )
    width = max(a.shape[3], b.shape[3])
    a, b = (pad(x, (0, width - x.shape[3]), value=-1).expand(-1, heads, -1, -1) for x in (a, b))
    return KeySelection(torch.where(first[:, None, None, None], a, b), size)
