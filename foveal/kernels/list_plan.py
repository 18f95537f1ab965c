"""Which keys ``gather`` computes for a ``KeySelection``, as a plan for ``kernels.ragged``; and one new token without a plan."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.layouts import KeySelection
from .call import AttentionCall, compute_dtype, relative_index
from .rows import LOG2_E, Batch, Plan, consecutive_rows, scratch, split_keys, split_rows


def list_plan(call: AttentionCall, layout: KeySelection, budget: int) -> Plan:
    """The plan over q padded to whole blocks of rows, and k and v, flattened to rows; ``budget`` in score elements per batch."""
    blocks, width = layout.index.shape[2:]
    row_heads, _ = sharing(call, layout)
    reads = call.q.shape[0] * row_heads * blocks * width
    known = width > 0 and layout.index.device.type == "cpu"  # asking another device makes this one wait
    whole = known and _whole(call, layout)
    covers = whole or (known and bool((layout.index[..., 0] >= 0).all()))
    straight = whole and row_heads == call.q.shape[1] and call.bias is None
    unit = consecutive_rows(layout.index, (width,), call.base.kv_len) if straight else 1

    def batches() -> Iterator[Batch]:
        return _whole_batches(call, layout, budget, unit) if straight else _batches(call, layout, budget, whole)

    return Plan(batches, layout.block_size, unit, key_reads=reads, covers=covers)


def _whole(call: AttentionCall, layout: KeySelection) -> bool:
    """Whether every row sees its whole list, and no list has pads."""
    base = call.base
    if base.predicate is not None or base.valid is not None:
        return False
    first, last = layout.index.aminmax()
    lo, hi = row_bounds(call, layout)  # lo is never below 0, a pad is
    return bool((first >= lo.max()) & (last < hi.min()))


def sharing(call: AttentionCall, layout: KeySelection) -> tuple[int, int]:
    """Lists that are gathered per sequence and block, and query heads that share each."""
    own = layout.index.shape[1] == call.q.shape[1] and call.groups > 1
    return (call.q.shape[1], 1) if own else (call.k.shape[1], call.groups)


def row_bounds(call: AttentionCall, layout: KeySelection) -> tuple[Tensor, Tensor]:
    """``(B or 1, Nq)`` each: row ``i`` sees only listed keys ``lo[i] <= k < hi[i]``; padding (−1) is always below."""
    lo, hi = call.base.lo.clamp(min=0), call.base.hi
    return (lo, hi) if layout.limit is None else (lo, torch.minimum(hi, layout.limit))


def _whole_batches(call: AttentionCall, layout: KeySelection, budget: int, unit: int) -> Iterator[Batch]:
    """One list after the other in the order of the rows: what comes out is in place, and neighbors read the same keys.

    ``unit``: keys that are read at once.
    """
    (batch, heads), kv_len = call.q.shape[:2], call.base.kv_len
    of_batch, of_heads, blocks, width = layout.index.shape
    b, h = torch.arange(batch, device=call.q.device)[:, None], torch.arange(heads, device=call.q.device)
    source = (b * of_heads if of_batch > 1 else 0) + torch.div(h * of_heads, heads, rounding_mode="floor")
    first = (b * call.k.shape[1] + torch.div(h, call.groups, rounding_mode="floor")) * (kv_len // unit)
    source, first = source.expand(batch, heads).reshape(-1), first.view(-1, 1, 1)
    lists = torch.div(layout.index.reshape(-1, blocks, width)[..., ::unit], unit, rounding_mode="floor")
    rows = torch.arange(batch * heads * blocks, device=call.q.device)[:, None]
    for lines in split_rows(batch * heads, blocks * layout.block_size * width, budget):
        k_rows = (lists[source[lines]] + first[lines]).flatten(0, 1)
        start = lines.start * blocks
        columns = split_keys(k_rows.shape[1], unit, k_rows.device)
        for part in split_rows(k_rows.shape[0], layout.block_size * columns[0].stop * unit, budget):
            run = slice(start + part.start, start + part.stop)
            for some in columns:
                end = some.stop == k_rows.shape[1]
                yield Batch(rows[run], k_rows[part, some], run=run, first=some.start == 0, last=end)


def _batches(call: AttentionCall, layout: KeySelection, budget: int, whole: bool) -> Iterator[Batch]:
    base, device, size = call.base, call.q.device, layout.block_size
    batch, heads, kv_heads, group = call.q.shape[0], call.q.shape[1], call.k.shape[1], call.groups
    row_heads, per_row = sharing(call, layout)
    blocks, width = layout.index.shape[2:]
    in_group = torch.arange(per_row, device=device)
    b, h = torch.arange(batch, device=device)[:, None], torch.arange(row_heads, device=device)[None, :]
    kv_first = (b * kv_heads + (h // group if per_row < group else h)) * base.kv_len  # (B, row heads)
    q_first = ((b * heads + h * per_row)[:, :, None] + in_group) * blocks  # (B, row heads, G)
    lo, hi = (_by_block(x, blocks, size) for x in row_bounds(call, layout))
    for part in split_rows(blocks, batch * row_heads * per_row * size * width, budget):
        index = layout.index[:, :, part]
        if not whole:
            listed = (index >= 0).flatten(0, 2).any(0).nonzero()
            if listed.numel() == 0:
                continue
            index = index[..., : int(listed[-1]) + 1]
        u = torch.arange(part.start, part.stop, device=device)
        count = batch * row_heads * u.shape[0]
        first, hidden = (0, None) if whole else _hidden(call, index, u, lo[:, part], hi[:, part], size)
        alike = hidden is not None and hidden.shape[:3] == (1, 1, 1)
        if hidden is not None and alike:
            hidden = torch.zeros(hidden.shape[1:], device=device).masked_fill_(hidden[0], -torch.inf)
        elif hidden is not None:
            hidden = hidden.expand(batch, row_heads, -1, -1, -1).reshape(count, 1, size, -1)
        seen = index if whole else index.clamp(min=0)
        bias = None
        if call.bias is not None:
            rows = u[:, None] * size + torch.arange(size, device=device)
            head = ((h * per_row)[:, :, None] + in_group)[:, :, None, :, None, None]
            column = (
                relative_index(call, rows[None, None, :, None, :, None], seen[:, :, :, None, None, :])
                + head * call.bias.shape[1]
            )
            bias = column.expand(batch, row_heads, -1, per_row, -1, -1).reshape(count, per_row * size, -1)
        k_rows = (kv_first[:, :, None, None] + seen).view(count, -1)
        q_rows = (q_first[:, :, None] + u[:, None]).view(count, -1)
        columns = split_keys(k_rows.shape[1], 1, device)
        for some in split_rows(count, per_row * size * columns[0].stop, budget):
            mask = hidden if hidden is None or alike else hidden[some]
            for c in columns:
                hide = None
                if mask is not None and c.stop > first:
                    hide = max(first - c.start, 0), mask[..., max(c.start - first, 0) : c.stop - first]
                yield Batch(
                    q_rows[some],
                    k_rows[some, c],
                    hide,
                    None if bias is None else bias[some, :, c],
                    first=c.start == 0,
                    last=c.stop == k_rows.shape[1],
                )


def _by_block(x: Tensor, blocks: int, size: int) -> Tensor:
    """``(B or 1, Nq)`` as ``(B or 1, blocks, size)``; the rows that pad the last block repeat its last row."""
    extra = blocks * size - x.shape[1]
    x = torch.cat([x, x[:, -1:].expand(-1, extra)], 1) if extra else x
    return x.view(x.shape[0], blocks, size)


def _hidden(
    call: AttentionCall, index: Tensor, u: Tensor, lo: Tensor, hi: Tensor, size: int
) -> tuple[int, Tensor | None]:
    """``(B or 1, listed heads, blocks, size, K − first)`` bool, True hides, and ``first``; None when every row of these blocks sees its whole list.

    Every row sees the first ``first`` keys of its list: those of a causal model are mostly cut at the end.

    Args:
        index: ``(B or 1, listed heads, blocks, K)``. u: ``(blocks,)`` their numbers. lo, hi: ``(B or 1, blocks, size)``.
    """
    base = call.base
    bad = None
    if base.valid is not None:
        b = torch.arange(base.valid.shape[0], device=index.device)[:, None, None, None]
        bad = ~base.valid[b, index.clamp(min=0)]
    top, low = hi.amin(-1)[:, None, :, None], lo.amax(-1)[:, None, :, None]
    some = (index >= top) | (index < low)  # hidden from at least one row of the block
    some = some if bad is None else some | bad
    first = 0
    if base.predicate is None and index.device.type == "cpu":
        cut = some.flatten(0, 2).any(0).nonzero()
        if cut.numel() == 0:
            return 0, None
        first = int(cut[0])
        index, some, bad = index[..., first:], some[..., first:], None if bad is None else bad[..., first:]
    if size == 1:
        hidden = some[..., None, :]
    else:
        keys = index[:, :, :, None, :]
        hidden = (keys >= hi[:, None, ..., None]) | (keys < lo[:, None, ..., None])
        hidden = hidden if bad is None else hidden | bad[:, :, :, None]
    if base.predicate is None:
        return first, hidden
    rows = (u[:, None] * size + torch.arange(size, device=index.device)).clamp(max=base.q_len - 1)
    b = torch.arange(call.q.shape[0], device=index.device)[:, None, None, None, None]
    return 0, hidden | ~base.predicate(
        b, torch.zeros_like(b), rows[None, None, :, :, None], index.clamp(min=0)[:, :, :, None, :]
    )


# --- one new token -------------------------------------------------------------------------------------------------


def one_row(call: AttentionCall, layout: KeySelection) -> tuple[Tensor, Tensor | None] | None:
    """``(out, lse or None)`` of a single query row, for inference; None when the call needs the general path.

    The cache is read in place, whatever its strides: only the listed keys are copied.
    """
    base, width = call.base, layout.index.shape[3]
    if base.q_len != 1 or width == 0 or call.needs_grad or call.bias is not None or base.predicate is not None:
        return None
    index = layout.index[:, :, 0]  # (B or 1, listed heads, K)
    batch, kv_heads = call.q.shape[0], call.k.shape[1]
    row_heads, per_row = sharing(call, layout)
    count, dtype = batch * row_heads, compute_dtype(call.q.dtype)
    lo, hi = row_bounds(call, layout)
    hidden = (index >= hi[:, :1, None]) | (index < lo[:, :1, None])
    index = index.clamp(min=0)
    if base.valid is not None:
        rows = torch.arange(base.valid.shape[0], device=index.device)[:, None, None]
        hidden = hidden | ~base.valid[rows, index]
    blind = hidden.device.type != "cpu" or bool(hidden.any())
    index = index.view(index.shape[0], -1, row_heads // kv_heads if index.shape[1] == row_heads else 1, width)
    k, v = _whole_rows(call.k), _whole_rows(call.v)
    k_rows = _listed_rows(k, index)
    v_rows = k_rows if v.shape == k.shape and v.stride() == k.stride() else _listed_rows(v, index)
    with scratch(call.q.device) as buffers:
        kg = buffers.take("k", _memory_rows(k), k_rows.view(count, width), dtype, call.k.shape[3])
        vg = buffers.take("v", _memory_rows(v), v_rows.view(count, width), dtype, call.v.shape[3])
        s = buffers.get("scores", (count, per_row, width), dtype)
        alpha = call.scale * LOG2_E if call.softcap is None else call.scale / call.softcap
        torch.baddbmm(s, call.q.reshape(count, per_row, -1).to(dtype), kg.transpose(1, 2), beta=0, alpha=alpha, out=s)
        if call.softcap is not None:
            s.tanh_().mul_(call.softcap * LOG2_E)
        if blind:
            s.view(batch, row_heads, per_row, width).masked_fill_(hidden[:, :, None], -torch.inf)
        top = s.amax(-1, keepdim=True)
        s.sub_(top.masked_fill(top == -torch.inf, 0.0) if blind else top).exp2_()
        norm = s.sum(-1, keepdim=True).clamp_(min=1.0)  # at least 1 in every row that sees a key
        out = torch.bmm(s, vg).div_(norm).view(*call.q.shape[:3], -1).to(call.q.dtype)
    return out, norm.log2_().add_(top).mul_(1 / LOG2_E).view(call.q.shape[:3]) if call.return_lse else None


def _whole_rows(x: Tensor) -> Tensor:
    """``x`` ``(B, H, N, C)``, copied only if its steps are not whole rows of C numbers."""
    fits = x.stride(3) == 1 and all(
        n == 1 or step % x.shape[3] == 0 for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)
    )
    return x if fits else x.contiguous()


def _memory_rows(x: Tensor) -> Tensor:
    """``(rows, C)`` view of all memory that ``x`` spans."""
    last = sum((n - 1) * (step // x.shape[3]) for n, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    return x.as_strided((last + 1, x.shape[3]), (x.shape[3], 1))


def _listed_rows(x: Tensor, index: Tensor) -> Tensor:
    """Where the listed keys lie in ``_memory_rows(x)``, ``(B, Hkv, lists per key head, K)``.

    ``index``: ``(B or 1, Hkv or 1, lists per key head, K)``.
    """
    batch, heads = x.shape[:2]
    per_b, per_h, per_n = (step // x.shape[3] for step in x.stride()[:3])
    first = torch.arange(heads, device=x.device).mul_(per_h).view(heads, 1, 1)
    if batch > 1:
        first = first + torch.arange(batch, device=x.device).mul_(per_b).view(batch, 1, 1, 1)
    return (index if per_n == 1 else index * per_n) + first
