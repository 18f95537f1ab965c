"""The kernels as ``torch.library`` operators, so that ``torch.compile``, checkpointing and ``opcheck`` know them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import UnsupportedError
from . import TYPES, _native

_LIBRARY = torch.library.Library("foveal", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor? valid, Tensor? kinds, Tensor? slot, "
    "Tensor? table, Tensor? index, Tensor? bias, int[] tile, float scale, float softcap, SymInt shift) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lo, "
    "Tensor hi, Tensor? valid, Tensor? kinds, Tensor? slot, Tensor? table, Tensor? bias, int[] tile, float scale, "
    "float softcap, SymInt shift) -> (Tensor, Tensor, Tensor)"
)
attention = torch.ops.foveal.attention.default
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


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, valid: Tensor | None, kinds: Tensor | None, slot: Tensor | None,
    table: Tensor | None, index: Tensor | None, bias: Tensor | None, tile: list[int], scale: float, softcap: float, shift: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _empty(q, v)
    if out.numel() == 0 or k.shape[2] == 0 or (index is not None and index.numel() == 0):
        return out.zero_(), lse.fill_(-torch.inf)
    _native.forward(
        _sizes(q, k, v), _strided(q), _strided(k), _strided(v), out.data_ptr(), lse.data_ptr(), scale, softcap,
        _bias(bias, shift), *_seen(lo, hi, valid, kinds, slot, table, tile),
        None if index is None else (index.data_ptr(), *index.shape, tile[0]), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lo: Tensor, hi: Tensor,
    valid: Tensor | None, kinds: Tensor | None, slot: Tensor | None, table: Tensor | None, bias: Tensor | None,
    tile: list[int], scale: float, softcap: float, shift: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if out.numel() == 0 or k.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dlse = None if dlse is None else dlse.contiguous()
    _native.backward(
        _sizes(q, k, v), _strided(q), _strided(k), _strided(v), _strided(dout), out.data_ptr(), lse.data_ptr(),
        0 if dlse is None else dlse.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), scale, softcap,
        _bias(bias, shift), *_seen(lo, hi, valid, kinds, slot, table, tile), torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


_LIBRARY.impl("attention", _forward, "CPU")
_LIBRARY.impl("attention_backward", _backward, "CPU")


@torch.library.register_fake("foveal::attention")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return _empty(q, v)


@torch.library.register_fake("foveal::attention_backward")
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *seen, index, bias, tile, scale, softcap, shift = inputs
    if index is not None:
        raise UnsupportedError("impl='native' has no gradient through lists of keys. Use impl='gather'.")
    ctx.save_for_backward(q, k, v, *output, *seen, bias)
    ctx.numbers = tile, scale, softcap, shift
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *rest = ctx.saved_tensors
    nothing = (None,) * (len(rest) + 1 + len(ctx.numbers))
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    dout = out.new_zeros(()).expand(out.shape) if dout is None else dout
    return (*attention_backward(dout, dlse, q, k, v, out, lse, *rest, *ctx.numbers), *nothing)


torch.library.register_autograd("foveal::attention", _differentiate, setup_context=_save, lib=_LIBRARY)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise UnsupportedError("impl='native' has no second derivative. Use impl='reference' where one is needed.")


torch.library.register_autograd("foveal::attention_backward", _no_second_derivative, lib=_LIBRARY)
