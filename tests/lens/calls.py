"""Attention calls as the dispatcher hands them to a recording, and their full matrix of weights in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.layouts import Layout
from foveal.hf import AttentionEvent
from foveal.kernels.call import AttentionCall
from foveal.lens.record import Probes, Recording, named

from .brute import Brute, brute_force


@dataclass(frozen=True)
class Host:
    """Shapes and mask of a call.

    Attributes:
        mask: arguments of ``BaseMask.build``. batch, heads, kv_heads, rows, keys, dim: shapes.
        extra: softcap, bias and sink logits of the layer, by name.
    """

    mask: dict[str, Any] = field(default_factory=lambda: {"causal": True})
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    rows: int = 37
    dim: int = 8
    softcap: float | None = None
    bias: bool = False
    sink: bool = False

    def base(self) -> BaseMask:
        return BaseMask.build(self.rows, self.rows, **self.mask)


def pads(*lengths: tuple[int, int], total: int = 37) -> Tensor:
    """``(B, total)`` bool with that much padding left and right."""
    at = torch.arange(total)
    return torch.stack([(at >= left) & (at < total - right) for left, right in lengths])


HOSTS = {
    "causal": Host(),
    "one head, one row": Host(heads=1, kv_heads=1, rows=1),
    "many heads": Host(heads=6, kv_heads=6, rows=33),
    "bidirectional": Host({"causal": False}),
    "window": Host({"causal": True, "window": 7}),
    "window both sides": Host({"causal": False, "window": 5}),
    "left padding": Host({"causal": True, "valid": pads((0, 0), (9, 0))}, batch=2),
    "right padding": Host({"causal": True, "valid": pads((0, 4), (0, 0))}, batch=2),
    "packed": Host({"causal": True, "segments": torch.tensor([[0] * 12 + [1] * 20 + [2] * 5])}),
    "predicate": Host({"causal": True, "predicate": lambda b, h, q, k: (q + k) % 3 != 1}),
    "softcap, bias, learned sink": Host(softcap=3.0, bias=True, sink=True),
}  # fmt: skip


def tensors(host: Host, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """q and k, and bias and learned sink logits where the host has them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    out = {
        "q": 2 * normal(host.batch, host.heads, host.rows, host.dim),
        "k": normal(host.batch, host.kv_heads, host.rows, host.dim),
    }
    if host.bias:
        out["bias"] = normal(host.heads, 9)
    if host.sink:
        out["sink_logits"] = normal(host.heads)
    return out


def event(
    host: Host, given: dict[str, Tensor], rows: slice = slice(None), parts: list[tuple[tuple[int, ...], Layout | None]] | None = None
) -> AttentionEvent:  # fmt: skip
    """The call of some consecutive rows, against the keys up to their last."""
    start, stop, _ = rows.indices(host.rows)
    q, k = given["q"][:, :, start:stop], given["k"]
    if (start, stop) == (0, host.rows):
        base = host.base()
    else:
        k = k[:, :, :stop]
        mask = dict(host.mask)
        if "valid" in mask:
            mask["valid"] = mask["valid"][:, :stop]
        base = BaseMask.build(stop - start, stop, **mask)
    call = AttentionCall(q, k, k, None, base, host.dim**-0.5, host.softcap, given.get("bias"))
    ctx = SelectContext(base=base, q_offset=start)
    parts = [(tuple(range(host.heads)), None)] if parts is None else parts
    return AttentionEvent(0, "layer", "self", call, given.get("sink_logits"), ctx, None, q, tuple(parts))


def recorded(probes: Probes, *events: AttentionEvent, weights: str = "dense") -> Recording:
    """What the probes find in these calls."""
    rec = Recording(named(probes), weights, None)
    for e in events:
        rec(e)
    return rec


def dense(host: Host, given: dict[str, Tensor]) -> Brute:
    """Everything in float64, from the full matrix."""
    return brute_force(
        given["q"], given["k"], host.base(), scale=host.dim**-0.5, softcap=host.softcap, bias=given.get("bias"),
        sink_logits=given.get("sink_logits"),
    )  # fmt: skip


def array(rec: Recording, name: str) -> Tensor:
    """``(B, H, …)`` of the one layer."""
    found = rec[name]
    values = found.values if "sequence" in found.dims else found.values[None]
    return values[:, 0]
