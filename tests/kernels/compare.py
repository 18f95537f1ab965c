"""A fast implementation against the reference: outputs, log-sum-exps and gradients of one call, within what rounding allows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import foveal
from foveal.core.base_mask import BaseMask
from foveal.core.layouts import Layout
from foveal.kernels import native
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute

from ..strategies import Call, finite
from ..support import assert_close


def attend(call: Call, impl: str, **changes: Any) -> tuple[Tensor, Tensor]:
    options = {**call.options, **changes}
    return foveal.attention(
        call.q, call.k, call.v, call.layout, causal=call.causal, impl=impl, return_lse=True, **options
    )


def lowered(call: Call, dtype: torch.dtype) -> tuple[Call, Call]:
    """The call in ``dtype``, and in float64 with the same rounded values."""
    low = [t.to(dtype) for t in (call.q, call.k, call.v)]
    options = {n: t.to(dtype) if isinstance(t, Tensor) else t for n, t in call.options.items()}
    exact = {n: t.double() if isinstance(t, Tensor) else t for n, t in options.items()}
    return (
        Call(*low, call.layout, call.causal, options),
        Call(*(t.double() for t in low), call.layout, call.causal, exact),
    )


def random_call(
    seed: int, sizes: tuple[int, ...], layout: Layout | None = None, causal: bool = True, **options: Any
) -> Call:
    """``sizes`` is ``(B, H, Hkv, Nq, Nk, D, Dv)``."""
    batch, heads, kv_heads, q_len, kv_len, dim, dim_v = sizes
    make = torch.Generator().manual_seed(seed)
    shapes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim_v))
    q, k, v = (torch.randn(batch, *shape, generator=make, dtype=torch.float64) for shape in shapes)
    return Call(q, k, v, layout, causal, {"bias": None, "sink_logits": None, **options})


def check(call: Call, dtype: torch.dtype, impl: str = "native") -> None:
    """Out and lse of ``impl`` against the float64 reference on the same rounded tensors."""
    if dtype != torch.float32:
        call.options["sink_logits"] = None  # joining a sink rounds a second time
    low, exact = lowered(call, dtype)
    out, lse = attend(low, impl)
    want, want_lse = attend(exact, "reference")
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_close(lse, want_lse, 2e-5, "lse")
    if dtype == torch.float32:
        assert_close(out, want, 1e-5, "out")
        return
    # one rounding of the result, and mostly one of every weight: at most eps/2 of the mean |v| that the row sees
    exact.v = exact.v.abs()
    weights = attend(exact, "reference")[0] if dtype == torch.bfloat16 or impl != "native" else 0.0
    bound = torch.finfo(dtype).eps / 2 * (want.abs() + weights) + 2e-5
    assert out.isfinite().all()
    worst = ((out.double() - want).abs() / bound).max() if out.numel() else 0.0
    assert worst <= 1.0, f"off by {worst:.2f} of what rounding allows"


def check_under(base: BaseMask, call: Call, impl: str = "native") -> None:
    """As ``check``, in float32, with the demands of ``base`` instead of the call's own."""
    low, exact = lowered(call, torch.float32)
    found = [
        compute(AttentionCall(c.q, c.k, c.v, c.layout, base, 0.2), impl)
        for c, impl in ((low, impl), (exact, "reference"))
    ]
    for name, a, b in zip(("out", "lse"), *found, strict=True):
        assert a is not None and b is not None
        assert_close(a, b, 1e-5, name)


def gradients(call: Call, impl: str) -> dict[str, Tensor]:
    """Gradients of a loss that reads out and lse."""
    leaves = {name: t.clone().requires_grad_() for name, t in call.leaves().items()}
    options = {**call.options, **{name: leaves.get(name) for name in ("sink_logits", "bias")}}
    out, lse = attend(Call(leaves["q"], leaves["k"], leaves["v"], call.layout, call.causal, options), impl)
    make = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=make, dtype=torch.float64).to(call.q.dtype) for t in (out, lse)]
    loss = (out * weights[0]).sum() + (finite(lse) * weights[1]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if x is None else x for (n, t), x in zip(leaves.items(), found, strict=True)}


def check_gradients(call: Call, dtype: torch.dtype, impl: str = "native") -> None:
    """Gradients against the reference's; in half precision by the size of the whole error."""
    if dtype != torch.float32:
        call.options["sink_logits"] = None
    low, exact = lowered(call, dtype)
    got, want = gradients(low, impl), gradients(exact, "reference")
    eps = torch.finfo(dtype).eps
    # what is rounded are terms of the size of dout · v, of which a gradient may be a small difference
    terms = math.sqrt(low.q[..., :1].numel() * low.v.shape[3]) * max(1.0, float(low.v.abs().max()))
    for name, value in want.items():
        if dtype == torch.float32:
            assert_close(got[name], value, 1e-4, f"gradient of {name}")
            continue
        assert got[name].dtype == dtype
        error, size = (got[name].double() - value).norm(), value.norm()
        allowed = 2 * eps * size + eps / 2 * terms
        assert error <= allowed, f"gradient of {name} is off by {error / size:.3g} of its size"


def check_demand(base: BaseMask, call: Call, impl: str = "native") -> None:
    """As ``check_under``, with the call's softcap and bias, and gradients of a loss that reads out and lse."""
    low, exact = lowered(call, torch.float32)
    found = []
    for name, c in ((impl, low), ("reference", exact)):
        leaves = [t.clone().requires_grad_() for t in (c.q, c.k, c.v)]
        options = {"softcap": c.options["softcap"], "bias": c.options["bias"]}
        out, lse = compute(AttentionCall(*leaves, c.layout, base, 0.7, **options), name)
        assert lse is not None
        loss = out.square().sum() + finite(lse).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)  # no group, no use
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        found.append([out.detach(), lse.detach(), *filled])
    for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), *found, strict=True):
        assert_close(a, b, 1e-4, what)


def check_entropy(call: Call, dtype: torch.dtype) -> None:
    """Of ``native``, against Σ −p · log p of weights that the reference gives as outputs for V = identity."""
    call.options["sink_logits"] = None
    low, exact = lowered(call, dtype)
    out, lse, entropy = native.attend_with_entropy(low.prepared())
    assert all(torch.equal(a, b) for a, b in zip((out, lse), attend(low, "native"), strict=True))
    eye = torch.eye(call.k.shape[2], dtype=torch.float64).expand(*call.k.shape[:2], -1, -1)
    weights, _ = attend(Call(exact.q, exact.k, eye, call.layout, call.causal, exact.options), "reference")
    assert_close(entropy, torch.special.entr(weights).sum(-1), 5e-5 if dtype == torch.float32 else 2e-4, "entropy")
