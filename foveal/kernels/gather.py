"""Block-sparse, list-sparse and ragged attention in plain PyTorch, with exact gradients and no compiler.

Only kept blocks, keys or groups are gathered; everything else costs nothing. Each layout becomes a plan for
``kernels.ragged``. Tiles that both the mask and the model allow whole are never masked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.base_mask import PARTIAL
from ..core.layouts import BlockMask, Groups, KeySelection, block_mask_kinds, narrow
from .call import AttentionCall, relative_index
from .ragged import Batch, Plan, Scores, attend_rows, split_rows

CPU_SCORES = 1 << 20
"""Score elements per batch on CPU: two float32 buffers of this size stay near the second-level cache."""
GPU_SCORES = 1 << 26
DENSE_BLOCK = 128


def _budget(device: torch.device) -> int:
    return CPU_SCORES if device.type == "cpu" else GPU_SCORES


def refusals(call: AttentionCall) -> list[str]:
    """Reasons why this implementation cannot run the call (none: it runs everything)."""
    return []


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of shapes ``(B, H, Nq, Dv)`` and ``(B, H, Nq)``."""
    layout = call.layout
    if 0 in (call.q.shape[0], call.base.q_len, call.base.kv_len):
        return _nothing(call)
    if layout is None or isinstance(layout, BlockMask):
        return _blocks(call, layout)
    if isinstance(layout, KeySelection):
        return _lists(call, layout)
    return _groups(call, layout)


def _nothing(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """No batch, no rows or no keys: zeros and −inf, still connected to the inputs."""
    out, lse = attend_rows(*(t.flatten(0, 2) for t in (call.q, call.k, call.v)), Plan(lambda: iter(())), _scores(call), call.bias)
    return out.view(*call.q.shape[:3], call.v.shape[-1]), lse.view(call.q.shape[:3])


def _pad(x: Tensor, multiple: int) -> Tensor:
    extra = -x.shape[2] % multiple
    return torch.nn.functional.pad(x, (0, 0, 0, extra)) if extra else x


def _scores(call: AttentionCall) -> Scores:
    return Scores(call.scale, call.softcap)


# --- BlockMask -----------------------------------------------------------------------------------------------------


def _blocks(call: AttentionCall, mask: BlockMask | None) -> tuple[Tensor, Tensor]:
    base = call.base
    if mask is None and base.q_len < DENSE_BLOCK:
        block = (1 << max(base.q_len - 1, 0).bit_length(), DENSE_BLOCK) if base.q_len > 1 else (1, DENSE_BLOCK)
        joint = narrow(None, base, block, transpose=False)
    else:
        joint = narrow(mask, base, transpose=False)
    q_block, kv_block = joint.BLOCK_SIZE
    kinds = block_mask_kinds(joint)
    nqb = kinds.shape[2]
    batch, heads = call.q.shape[:2]
    if base.kv_len % kv_block:
        kinds = kinds.clone()
        kinds[..., -1].clamp_(max=PARTIAL)  # keys past the end live in the last tile
    q, k, v = _pad(call.q, q_block), _pad(call.k, kv_block), _pad(call.v, kv_block)
    plan = Plan(lambda: _block_batches(call, joint, kinds), q_block, kv_block)
    q, k, v = (t.reshape(-1, t.shape[-1]) for t in (q, k, v))
    out, lse = attend_rows(q, k, v, plan, _scores(call), call.bias)
    rows = nqb * q_block
    return out.view(batch, heads, rows, -1)[:, :, : base.q_len], lse.view(batch, heads, rows)[:, :, : base.q_len]


def _block_batches(call: AttentionCall, mask: BlockMask, kinds: Tensor) -> Iterator[Batch]:
    """Attentions grouped by (whole tiles, cut tiles), so that no row is padded to another's length."""
    base = call.base
    device = call.q.device
    q_block, kv_block = mask.BLOCK_SIZE
    batch, heads, kv_heads, group = call.q.shape[0], call.q.shape[1], call.k.shape[1], call.groups
    nqb, nkb = kinds.shape[2:]
    shared = kinds.shape[1] == 1 and group > 1  # all heads agree: gather a tile once for all query heads of a key head
    rows_h = kv_heads if shared else heads
    per_row = group if shared else 1
    kinds = kinds.expand(batch, rows_h, nqb, nkb).reshape(-1, nkb)
    order = torch.argsort(kinds, dim=-1, descending=True, stable=True)  # whole tiles first, then cut ones
    whole, cut = (kinds == 2).sum(-1), (kinds == 1).sum(-1)
    code = whole * (nkb + 1) + cut
    by_code = torch.argsort(code, stable=True)
    values, counts = torch.unique_consecutive(code[by_code], return_counts=True)
    in_group = torch.arange(per_row, device=device)
    q_in, k_in = torch.arange(q_block, device=device), torch.arange(kv_block, device=device)
    start = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        members = by_code[start : start + count]
        start += count
        n_whole, n_cut = divmod(value, nkb + 1)
        tiles = n_whole + n_cut
        if tiles == 0:
            continue
        for part in split_rows(count, per_row * q_block * tiles * kv_block, _budget(device)):
            rows = members[part]
            u = rows % nqb
            bh = rows // nqb
            b, h = bh // rows_h, bh % rows_h
            first_head = h * per_row if shared else h
            kv_head = h if shared else h // group
            index = order[rows, :tiles]
            q_rows = ((b * heads + first_head)[:, None] + in_group) * nqb + u[:, None]
            k_rows = (b * kv_heads + kv_head)[:, None] * nkb + index
            hide = bias = None
            q_pos = (u[:, None] * q_block + q_in)[:, None, :, None, None]  # (R, 1, rows, 1, 1)
            head = (first_head[:, None] + in_group)[:, :, None, None, None]
            if n_cut:
                k_pos = (index[:, n_whole:, None] * kv_block + k_in)[:, None, None]  # (R, 1, 1, tiles, keys)
                inside = (q_pos < base.q_len) & (k_pos < base.kv_len)
                args = q_pos.clamp(max=base.q_len - 1), k_pos.clamp(max=base.kv_len - 1)
                kept = mask.mask_mod(b[:, None, None, None, None], head, *args) & inside
                kept = kept.expand(-1, per_row, q_block, n_cut, kv_block)
                hide = (n_whole * kv_block, ~kept)
            if call.bias is not None:
                k_all = (index[:, :, None] * kv_block + k_in)[:, None, None]
                column = relative_index(call, q_pos, k_all) + head * call.bias.shape[1]
                bias = column.expand(-1, per_row, q_block, tiles, kv_block).reshape(len(rows), per_row * q_block, -1)
            yield Batch(q_rows, k_rows, hide, bias)


# --- KeySelection --------------------------------------------------------------------------------------------------


def _lists(call: AttentionCall, layout: KeySelection) -> tuple[Tensor, Tensor]:
    base = call.base
    batch, heads = call.q.shape[:2]
    q = _pad(call.q, layout.block_size)
    plan = Plan(lambda: _list_batches(call, layout), layout.block_size, 1)
    k, v = call.k.reshape(-1, call.k.shape[-1]), call.v.reshape(-1, call.v.shape[-1])
    out, lse = attend_rows(q.reshape(-1, q.shape[-1]), k, v, plan, _scores(call), call.bias)
    out = out.view(batch, heads, q.shape[2], -1)[:, :, : base.q_len]
    return out, lse.view(batch, heads, q.shape[2])[:, :, : base.q_len]


def _list_batches(call: AttentionCall, layout: KeySelection) -> Iterator[Batch]:
    base = call.base
    device = call.q.device
    batch, heads, kv_heads, group = call.q.shape[0], call.q.shape[1], call.k.shape[1], call.groups
    listed = layout.index.shape[1]
    rows_h, per_row = (heads, 1) if listed == heads and group > 1 else (kv_heads, group)
    blocks, width = layout.index.shape[2:]
    in_group = torch.arange(per_row, device=device)
    b, h = torch.arange(batch, device=device)[:, None], torch.arange(rows_h, device=device)[None, :]
    if width == 0:
        return
    step = max(1, _budget(device) // (batch * rows_h * per_row * layout.block_size * width))
    for first in range(0, blocks, step):
        u = torch.arange(first, min(first + step, blocks), device=device)
        index = layout.index[:, :, u].expand(batch, layout.index.shape[1], -1, -1)  # (B, listed, blocks, K)
        used = int((index >= 0).any(0).any(0).any(0).sum())
        index = index[..., :used] if bool((index[..., used:] < 0).all()) else index
        if index.shape[-1] == 0:
            continue
        rows = u[:, None] * layout.block_size + torch.arange(layout.block_size, device=device)  # (blocks, rows)
        keys = index[:, :, :, None, :]
        zero_h = torch.zeros_like(b)[:, :, None, None, None]
        seen = (keys >= 0) & base.allowed(b[:, :, None, None, None], zero_h, rows[None, None, :, :, None], keys)
        if layout.limit is not None:
            limit = torch.nn.functional.pad(layout.limit, (0, -layout.limit.shape[1] % layout.block_size))
            seen = seen & (keys < limit[:, None, rows, None])
        head_of = h // group if rows_h == heads and group > 1 else h
        keys_row = (b * kv_heads + head_of)[:, :, None, None] * base.kv_len + index.clamp(min=0)
        first_head = h if per_row == 1 else h * group
        q_rows = ((b * heads + first_head)[:, :, None, None] + in_group) * blocks + u[:, None]
        count = batch * rows_h * u.numel()
        hide = None
        if not bool(seen.all()):
            spread = seen.expand(batch, rows_h, -1, -1, -1)[:, :, :, None].expand(-1, -1, -1, per_row, -1, -1)
            hide = (0, ~spread.reshape(count, per_row, layout.block_size, -1))
        bias = None
        if call.bias is not None:
            head = ((first_head[:, :, None] + in_group).expand(batch, -1, -1))[:, :, None, :, None, None]
            column = relative_index(call, rows[None, None, :, None, :, None], index[:, :, :, None, None, :].clamp(min=0))
            column = (column + head * call.bias.shape[1]).expand(batch, rows_h, -1, per_row, -1, -1)
            bias = column.reshape(count, per_row * layout.block_size, -1)
        keys_row = keys_row.expand(batch, rows_h, -1, -1).reshape(count, -1)
        yield Batch(q_rows.expand(batch, -1, -1, -1).reshape(count, -1), keys_row, hide, bias)


# --- Groups --------------------------------------------------------------------------------------------------------


def _groups(call: AttentionCall, layout: Groups) -> tuple[Tensor, Tensor]:
    """Each membership of a query in a group is one row; memberships of one query are then merged or averaged."""
    base = call.base
    batch, heads, q_len = call.q.shape[:3]
    q_flat, k_flat, v_flat = (t.reshape(-1, t.shape[-1]) for t in (call.q, call.k, call.v))
    owner, plan = _group_plan(call, layout)
    spare = q_flat.new_zeros(1, q_flat.shape[1])  # takes the rows that pad a bucket
    out, lse = attend_rows(torch.cat([q_flat[owner], spare]), k_flat, v_flat, plan, _scores(call), call.bias)
    out, lse = out[:-1], lse[:-1]
    total = batch * heads * q_len
    lse_all = torch.full((total,), -torch.inf, dtype=lse.dtype, device=lse.device)
    top = lse_all.scatter_reduce(0, owner, lse.detach(), "amax")
    safe = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weight = torch.exp(lse - safe[owner])
    norm = torch.zeros_like(safe).index_add(0, owner, weight)
    seen = norm > 0
    merged_lse = torch.where(seen, torch.log(torch.where(seen, norm, torch.ones_like(norm))) + safe, -torch.inf)
    if layout.combine == "mean":
        share = torch.zeros_like(safe).index_add(0, owner, torch.ones_like(lse)).clamp(min=1)
        weight = 1.0 / share[owner]
    else:
        weight = weight / torch.where(seen, norm, torch.ones_like(norm))[owner]
    merged = torch.zeros(total, out.shape[-1], dtype=lse.dtype, device=out.device)
    merged = merged.index_add(0, owner, out.to(lse.dtype) * weight[:, None])
    return merged.to(call.q.dtype).view(batch, heads, q_len, -1), merged_lse.view(batch, heads, base.q_len)


def _group_plan(call: AttentionCall, layout: Groups) -> tuple[Tensor, Plan]:
    """``owner``: flattened query row of every membership; and the plan over memberships, bucketed by size."""
    base = call.base
    device = call.q.device
    batch, heads, kv_heads, group = call.q.shape[0], call.q.shape[1], call.k.shape[1], call.groups
    q_len, kv_len = base.q_len, base.kv_len
    if layout.per_head:
        owner, copies = layout.q_index, 1
    else:
        b, i = layout.q_index // q_len, layout.q_index % q_len
        h = torch.arange(heads, device=device)
        owner, copies = ((b * heads)[None] + h[:, None]).mul(q_len).add(i).reshape(-1), heads
    members = layout.q_index.numel()
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()

    def up(n: Tensor) -> Tensor:  # round sizes up to an eighth of their power of two: few shapes, under 15 % padding
        unit = (2 ** (torch.log2(n.clamp(min=1).double()).floor() - 3)).clamp(min=1).long()
        return (n + unit - 1) // unit * unit

    live = ((n_q > 0) & (n_k > 0)).nonzero(as_tuple=True)[0]
    width_q, width_k = up(n_q[live]), up(n_k[live])

    def batches() -> Iterator[Batch]:
        code = width_q * (int(width_k.max()) + 1 if live.numel() else 1) + width_k
        order = torch.argsort(code, stable=True)
        _, counts = torch.unique_consecutive(code[order], return_counts=True)
        start = 0
        for count in counts.tolist():
            chosen = order[start : start + count]
            start += count
            m, w = int(width_q[chosen[0]]), int(width_k[chosen[0]])
            for part in split_rows(count, m * w, _budget(device)):
                g = live[chosen[part]]
                slot_q, slot_k = torch.arange(m, device=device), torch.arange(w, device=device)
                ok_q, ok_k = slot_q < n_q[g, None], slot_k < n_k[g, None]
                at_q = (layout.cu_q[g, None] + slot_q).where(ok_q, members)  # one spare row takes the padding
                at_k = layout.k_index[(layout.cu_k[g, None] + slot_k).where(ok_k, 0)]
                ids = layout.q_index[at_q.clamp(max=members - 1)]
                i, j = ids % q_len, at_k % kv_len
                b = ids // (q_len * (heads if layout.per_head else 1))
                seen = ok_q[:, :, None] & ok_k[:, None, :]
                seen = seen & base.allowed(b[:, :, None], torch.zeros_like(b)[:, :, None], i[:, :, None], j[:, None, :])
                for h in range(copies):
                    rows_q = (at_q + h * members).where(ok_q, copies * members)
                    rows_k = at_k if layout.per_head else ((at_k // kv_len) * kv_heads + h // group) * kv_len + j
                    bias = None
                    if call.bias is not None:
                        head = (ids // q_len) % heads if layout.per_head else torch.full_like(ids, h)
                        bias = relative_index(call, i[:, :, None], j[:, None, :]) + head[:, :, None] * call.bias.shape[1]
                    yield Batch(rows_q, rows_k, None if bool(seen.all()) else (0, ~seen[:, None]), bias)

    return owner, Plan(batches)

