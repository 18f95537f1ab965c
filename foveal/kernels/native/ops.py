"""The kernels as ``torch.library`` operators, so that ``torch.compile``, checkpointing and ``opcheck`` know them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import UnsupportedError
from . import TYPES, _native
from .plan import APART, EVERY, ONE

_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor? valid, Tensor? kinds, Tensor? slot, Tensor? table, "
    "Tensor? index, Tensor? members, Tensor? bias, int[] tile, SymInt[] counts, float scale, float softcap, SymInt shift)"
)
_LIBRARY = torch.library.Library("foveal", "DEF")
_LIBRARY.define(f"attention{_ARGUMENTS} -> (Tensor, Tensor)")
_LIBRARY.define(f"attention_entropy{_ARGUMENTS} -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lo, "
    "Tensor hi, Tensor? valid, Tensor? kinds, Tensor? slot, Tensor? table, Tensor? index, Tensor? members, Tensor? bias, "
    "int[] tile, SymInt[] counts, float scale, float softcap, SymInt shift, bool of_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)
attention = torch.ops.foveal.attention.default
attention_entropy = torch.ops.foveal.attention_entropy.default
attention_backward = torch.ops.foveal.attention_backward.default


def _strided(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()


def _seen(
    lo: Tensor, hi: Tensor, valid: Tensor | None, kinds: Tensor | None, slot: Tensor | None, table: Tensor | None, tile: list[int]
) -> tuple[tuple[int, int, int], tuple[int, int] | None, tuple[int, ...] | None, tuple[int, ...] | None]:  # fmt: skip
    """What is visible, as the compiled part takes it."""
    return (
        (lo.data_ptr(), hi.data_ptr(), lo.shape[0]),
        None if valid is None else (valid.data_ptr(), valid.shape[0]),
        None if kinds is None else (kinds.data_ptr(), *kinds.shape, *tile),
        None
        if slot is None or table is None
        else (slot.data_ptr(), *slot.shape[:2], table.data_ptr(), table.shape[0], table.shape[2]),
    )


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    batch, heads, q_len, dim = q.shape
    return TYPES.index(q.dtype), batch, heads, k.shape[1], q_len, k.shape[2], dim, v.shape[3]


def _bias(bias: Tensor | None, shift: int) -> tuple[int, int, int] | None:
    return None if bias is None else (bias.data_ptr(), (bias.shape[1] - 1) // 2, shift)


def _lists(index: Tensor | None, tile: list[int]) -> tuple[int, ...] | None:
    return None if index is None else (index.data_ptr(), *index.shape, tile[0])


def _groups(members: Tensor | None, counts: list[int]) -> tuple[int, ...] | None:
    """Where the parts of ``members`` lie; see :class:`~foveal.kernels.native.plan.Visible`."""
    if members is None:
        return None
    groups, rows, keys, per_head, combine = counts
    at, parts = members.data_ptr(), []
    for length in (rows, groups + 1, keys, groups + 1, groups, groups):
        parts.append(at)
        at += 8 * length
    return (*parts, groups, rows, keys, bool(per_head), ONE if combine == EVERY else combine)


def _nothing(out: Tensor, k: Tensor, index: Tensor | None, members: Tensor | None, counts: list[int]) -> bool:
    """Whether no pair can be visible, so that nothing has to run."""
    empty = (index is not None and index.numel() == 0) or (members is not None and counts[0] == 0)
    return empty or out.numel() == 0 or k.shape[2] == 0


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, lse = _empty(q, v, rest[-4])
    return _run(out, lse, None, q, k, v, *rest)[:2]


def _forward_entropy(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _empty(q, v, rest[-4])
    return _run(out, lse, torch.zeros_like(lse), q, k, v, *rest)


def _run(
    out: Tensor, lse: Tensor, entropy: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, valid: Tensor | None,
    kinds: Tensor | None, slot: Tensor | None, table: Tensor | None, index: Tensor | None, members: Tensor | None,
    bias: Tensor | None, tile: list[int], counts: list[int], scale: float, softcap: float, shift: int,
) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    if _nothing(out, k, index, members, counts):
        return out.zero_(), lse.fill_(-torch.inf), entropy
    if members is not None and counts[4] in (ONE, APART):  # rows that no group holds are not visited
        out.zero_(), lse.fill_(-torch.inf)
    _native.forward(
        _sizes(q, k, v), _strided(q), _strided(k), _strided(v), out.data_ptr(), lse.data_ptr(),
        0 if entropy is None else entropy.data_ptr(), scale, softcap, _bias(bias, shift),
        *_seen(lo, hi, valid, kinds, slot, table, tile), _lists(index, tile), _groups(members, counts), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse, entropy


def _empty(q: Tensor, v: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    rows = q.shape[:3]
    dtype = q.dtype
    if counts and counts[4] == APART:  # one row for each member of each group, to be averaged
        rows, dtype = torch.Size([1, 1 if counts[3] else q.shape[1], counts[1]]), torch.float32
    return q.new_empty(*rows, v.shape[3], dtype=dtype), q.new_empty(rows, dtype=torch.float32)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lo: Tensor, hi: Tensor,
    valid: Tensor | None, kinds: Tensor | None, slot: Tensor | None, table: Tensor | None, index: Tensor | None,
    members: Tensor | None, bias: Tensor | None, tile: list[int], counts: list[int], scale: float, softcap: float, shift: int,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _gradients(q, k, v, bias, of_bias)
    if _nothing(out, k, index, members, counts):
        for x in grads:
            x.zero_()
        return grads
    dq, dk, dv, dbias = grads
    dlse = None if dlse is None else dlse.contiguous()
    if members is not None:
        dout = dout.to(q.dtype).contiguous()
    _native.backward(
        _sizes(q, k, v), _strided(q), _strided(k), _strided(v), _strided(dout), out.data_ptr(), lse.data_ptr(),
        0 if dlse is None else dlse.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), dbias.data_ptr() if of_bias else 0,
        scale, softcap, _bias(bias, shift), *_seen(lo, hi, valid, kinds, slot, table, tile), _lists(index, tile),
        _groups(members, counts), torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty gradients of q, k, v and the bias table; the last one has no elements where it is not wanted."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if bias is None or not of_bias else torch.empty_like(bias)


_LIBRARY.impl("attention", _forward, "CPU")
_LIBRARY.impl("attention_entropy", _forward_entropy, "CPU")
_LIBRARY.impl("attention_backward", _backward, "CPU")


@torch.library.register_fake("foveal::attention")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(q, v, rest[-4])


@torch.library.register_fake("foveal::attention_entropy")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _empty(q, v, rest[-4])
    return out, lse, torch.empty_like(lse)


@torch.library.register_fake("foveal::attention_backward")
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients(q, k, v, rest[-7], rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *seen, tile, counts, scale, softcap, shift = inputs
    ctx.save_for_backward(q, k, v, *output, *seen)
    ctx.numbers = tile, counts, scale, softcap, shift
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *seen = ctx.saved_tensors
    before_bias, numbers = (None,) * (len(seen) - 1), (None,) * len(ctx.numbers)
    if dout is None and dlse is None:
        return (None, None, None, *before_bias, None, *numbers)
    of_bias = ctx.needs_input_grad[2 + len(seen)]
    dout = out.new_zeros(()).expand(out.shape) if dout is None else dout
    dq, dk, dv, dbias = attention_backward(dout, dlse, q, k, v, out, lse, *seen, *ctx.numbers, of_bias)
    return (dq, dk, dv, *before_bias, dbias if of_bias else None, *numbers)


torch.library.register_autograd("foveal::attention", _differentiate, setup_context=_save, lib=_LIBRARY)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise UnsupportedError("impl='native' has no second derivative. Use impl='reference' where one is needed.")


torch.library.register_autograd("foveal::attention_backward", _no_second_derivative, lib=_LIBRARY)
