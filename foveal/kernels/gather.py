"""Block-sparse, list-sparse and ragged attention in plain PyTorch, with exact gradients and no compiler.

Only kept blocks, keys or groups are gathered; everything else costs nothing. Each layout becomes a plan
(``block_plan``, ``list_plan``, ``group_plan``) for ``kernels.ragged``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.layouts import BlockMask, Groups, KeySelection
from .block_plan import block_plan
from .call import AttentionCall, compute_dtype
from .group_plan import average, direct_plan, group_plan, member_plan, owners
from .list_plan import list_plan, one_row
from .merged import attend_merged
from .ragged import attend_rows
from .reach import unshifted_rows
from .rows import Plan, Scores

CPU_SCORES = 1 << 19
"""Score elements per batch on CPU: a float32 buffer of this size fits the second-level caches of two cores."""
GPU_SCORES = 1 << 26


def _budget(device: torch.device) -> int:
    return CPU_SCORES if device.type == "cpu" else GPU_SCORES


def refusals(call: AttentionCall) -> list[str]:
    """Reasons why this implementation cannot run the call (none: it runs everything)."""
    return []


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` of shapes ``(B, H, Nq, Dv)`` and ``(B, H, Nq)``; lse may be None when it was not asked for."""
    layout = call.layout
    if 0 in (call.q.shape[0], call.base.q_len, call.base.kv_len):
        return _nothing(call)
    if layout is None or isinstance(layout, BlockMask):
        return _blocks(call, layout)
    if isinstance(layout, KeySelection):
        return one_row(call, layout) or _lists(call, layout)
    return _groups(call, layout)


def _nothing(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """No batch, no rows or no keys: zeros and −inf, still connected to the inputs."""
    zero = sum(t[..., :0].sum() for t in (call.q, call.k, call.v))
    out = call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1]) + zero
    return out, out.new_full(out.shape[:3], -torch.inf, dtype=compute_dtype(out.dtype)) + zero


def _pad(x: Tensor, multiple: int) -> Tensor:
    extra = -x.shape[2] % multiple
    return torch.nn.functional.pad(x, (0, 0, 0, extra)) if extra else x


def _scores(call: AttentionCall) -> Scores:
    return Scores(call.scale, call.softcap)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _planned(call: AttentionCall, plan: Plan, owner: Tensor | None = None, spare: int = 0) -> Plan:
    """The plan, told which of its rows need no maximum: those of q padded to whole units, or the rows ``owner`` of q; and spare ones."""
    rows = unshifted_rows(call, plan)
    if isinstance(rows, Tensor):
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[2] % plan.q_unit)).flatten()
        rows = torch.nn.functional.pad(rows if owner is None else rows[owner], (0, spare))
    return replace(plan, plain=rows)


def _blocks(call: AttentionCall, mask: BlockMask | None) -> tuple[Tensor, Tensor]:
    batch, heads, q_len = call.q.shape[:3]
    plan = _planned(call, block_plan(call, mask, _budget(call.q.device)))
    q, k, v = _pad(call.q, plan.q_unit), _pad(call.k, plan.k_unit), _pad(call.v, plan.k_unit)
    out, lse = attend_rows(_flat(q), _flat(k), _flat(v), plan, _scores(call), call.bias)
    return out.view(batch, heads, q.shape[2], -1)[:, :, :q_len], lse.view(batch, heads, q.shape[2])[:, :, :q_len]


def _lists(call: AttentionCall, layout: KeySelection) -> tuple[Tensor, Tensor]:
    batch, heads, q_len = call.q.shape[:3]
    plan = _planned(call, list_plan(call, layout, _budget(call.q.device)))
    q = _pad(call.q, plan.q_unit)
    out, lse = attend_rows(_flat(q), _flat(call.k), _flat(call.v), plan, _scores(call), call.bias)
    return out.view(batch, heads, q.shape[2], -1)[:, :, :q_len], lse.view(batch, heads, q.shape[2])[:, :, :q_len]


def _groups(call: AttentionCall, layout: Groups) -> tuple[Tensor, Tensor]:
    """One softmax over all groups of a query, or the mean of one softmax for each."""
    batch, heads, q_len = call.q.shape[:3]
    direct = direct_plan(call, layout, _budget(call.q.device))
    if direct is not None:
        q, k, v = (_flat(x) for x in (call.q, call.k, call.v))
        out, lse = attend_rows(q, k, v, _planned(call, direct), _scores(call), call.bias)
        return out.view(batch, heads, q_len, -1), lse.view(batch, heads, q_len)
    spare = call.q.new_zeros(1, call.q.shape[3])  # pads a bucket: its logits are 0, and nobody reads its output
    k, v = _flat(call.k), _flat(call.v)
    if layout.combine == "softmax":
        plan = _planned(call, group_plan(call, layout, _budget(call.q.device)), spare=1)
        out, lse = attend_merged(torch.cat([_flat(call.q), spare]), k, v, plan, _scores(call), call.bias)
        return out[:-1].view(batch, heads, q_len, -1), lse[:-1].view(batch, heads, q_len)
    owner = owners(call, layout)
    plan = _planned(call, member_plan(call, layout, _budget(call.q.device)), owner, spare=1)
    q = torch.cat([_flat(call.q)[owner], spare])  # each membership of a query in a group is one row
    out, lse = attend_rows(q, k, v, plan, _scores(call), call.bias)
    return average(call, layout, out[:-1], lse[:-1])
