"""The selective scan of Mamba: ``h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t``, ``y_t = h_t · C_t``, per channel and state.

Two implementations. ``reference`` is the definition, one step after the other in float64. ``chunked`` cuts the sequence into
chunks of at most ``CHUNK`` steps and works on many at once: as many rows of the batch as keep a step in the cache, and, where
one row is small, several chunks of it: each is scanned from zero for its end, the ends are joined one after the other with the
chunks' whole decays ``exp(A ΣΔ)``, and each is scanned again from its true start. Only decays of products of steps appear, all
at most 1 for A ≤ 0 ≤ Δ, never their inverses. Nothing of size L·D·N is kept for the backward pass: it keeps one state per
chunk and computes the others again, chunk after chunk from the end.

Mamba-1 (arXiv 2312.00752, algorithm 2), as in MambAttention (arXiv 2507.00966).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError, nearest

CHUNK = 64
"""Most steps between two kept states."""
IMPLEMENTATIONS = ("auto", "chunked", "reference")


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Scan a sequence and return its outputs and its last state.

    Args:
        x: ``(B, L, D)`` inputs. dt: ``(B, L, D)`` step sizes Δ, after softplus; 0 leaves the state as it is.
        A: ``(D, N)``, negative. B, C: ``(B, L, N)``. state: ``(B, D, N)`` before the first step; default zeros.
        impl: ``"chunked"``, ``"reference"``, or ``"auto"``, which is ``"chunked"``.

    Returns:
        ``y`` ``(B, L, D)`` in x's dtype and the state ``(B, D, N)`` after the last step, in float32, or float64 for float64
        inputs. Computed in that dtype whatever the inputs' and autocast's are: ``exp(ΔA)`` underflows in half precision.

    Raises:
        ShapeError: tensors that do not fit each other. ConfigError: an unknown ``impl``.
    """
    if impl not in IMPLEMENTATIONS:
        raise ConfigError(f"selective_scan: impl={impl!r} is unknown. {nearest(impl, IMPLEMENTATIONS)}")
    _check(x, dt, A, B, C, state)
    if impl == "reference":
        return reference(x, dt, A, B, C, state)
    work = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        state = x.new_zeros(x.shape[0], *A.shape, dtype=work)
    with torch.autocast(x.device.type, enabled=False):
        y, last, _ = _scan(*(t.to(work) for t in (x, dt, A, B, C, state)))
    return y.to(x.dtype), last


def reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: one step after the other in float64, differentiable by plain autograd; see :func:`selective_scan`."""
    out, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    h = x.new_zeros(x.shape[0], *A.shape) if state is None else state.double()
    y = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))
    return (torch.stack(y, 1) if y else x).to(out), h.to(work)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ShapeError(f"x is {tuple(x.shape)} {x.dtype}; expected floating-point (batch, length, channels).")
    batch, length, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ShapeError(f"A has shape {tuple(A.shape)}; expected (channels={channels}, states).")
    states = A.shape[1]
    expected = {
        "dt": (dt, (batch, length, channels)),
        "B": (B, (batch, length, states)),
        "C": (C, (batch, length, states)),
    }
    if state is not None:
        expected["state"] = (state, (batch, channels, states))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} for x {tuple(x.shape)}.")
    for name, tensor in (("A", A), *((n, t) for n, (t, _) in expected.items())):
        if tensor.device != x.device or not tensor.is_floating_point():
            raise ShapeError(f"{name} is {tensor.dtype} on {tensor.device}; expected floating point on {x.device}.")


# --- chunked ----------------------------------------------------------------------------------------------------------
# Inside, states lie as (…, N, D): the inner axis is the long one, and the sum over N is a small matrix product.


def _tile(device: torch.device) -> int:
    """State elements that one step works on: what stays in a core's cache, or what fills a GPU."""
    return 1 << 22 if device.type == "cuda" else 1 << 16


def _chunks(length: int) -> int:
    return max(1, -(-length // CHUNK))


class _Plan:
    """How a ``(batch, length)`` problem is cut: ``chunks`` of ``steps``, ``rows`` of the batch and ``ahead`` chunks at once."""

    def __init__(self, x: Tensor, A: Tensor) -> None:
        batch, length, _ = x.shape
        self.chunks = _chunks(length)
        self.steps = -(-length // self.chunks)
        lanes = max(1, _tile(x.device) // max(A.numel(), 1))
        self.rows = max(1, min(batch, lanes))
        ahead = min(lanes // self.rows, self.chunks)
        self.ahead = ahead if ahead >= 3 else 1  # two passes over few lanes cost more than they save
        self.length = length

    def blocks(self, batch: int) -> list[tuple[slice, list[slice]]]:
        """Rows of the batch, and for each the runs of chunks that are worked on together, in order."""
        runs = [slice(k, min(k + self.ahead, self.chunks)) for k in range(0, self.chunks, self.ahead)]
        return [(slice(r, min(r + self.rows, batch)), runs) for r in range(0, batch, self.rows)]

    def buffer(self, a: Tensor, steps: int) -> Tensor:
        """Room for the states of so many steps of one block; taken once, because fresh memory costs more than arithmetic."""
        return a.new_empty(steps * self.rows * self.ahead * a.numel())

    def cut(self, t: Tensor) -> Tensor:
        """``(B, L, W)`` → ``(chunks, steps, B, W)``, padded with zeros, which change no state."""
        t = torch.nn.functional.pad(t, (0, 0, 0, self.chunks * self.steps - self.length))
        return t.unflatten(1, (self.chunks, self.steps)).permute(1, 2, 0, 3)

    def join(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`cut`."""
        return t.permute(2, 0, 1, 3).flatten(1, 2)[:, : self.length]


def _lanes(t: Tensor, rows: slice, run: slice) -> Tensor:
    """``(chunks, steps, B, W)`` → ``(steps, lanes, W)`` of some rows and chunks; lanes are chunk-major."""
    return t[run, :, rows].transpose(0, 1).flatten(1, 2).contiguous()


def _put(target: Tensor, rows: slice, run: slice, lanes: Tensor) -> None:
    """Write what :func:`_lanes` read."""
    here = target[run, :, rows]
    here.copy_(lanes.unflatten(1, (here.shape[0], here.shape[2])).transpose(0, 1))


def _decays(step: Tensor, a: Tensor, buffer: Tensor) -> Tensor:
    """``exp(Δ A)`` of every step and lane, ``(steps, lanes, N, D)``, in ``buffer``."""
    return torch.mul(step[:, :, None], a, out=_shaped(buffer, *step.shape[:2], *a.shape)).exp_()


def _shaped(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _through(carry: Tensor, local: Tensor, total: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """Join chunks: what enters each of them ``(P, G, N, D)``, and what leaves the last."""
    entering = torch.empty_like(local)
    for p in reversed(range(len(local))) if backwards else range(len(local)):
        entering[p] = carry
        carry = total[p] * carry + local[p]
    return entering, carry


@torch.library.custom_op("foveal::selective_scan", mutates_args=())
def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, last state, states at the starts of chunks (chunks, B, N, D))``."""
    plan, a = _Plan(x, A), A.mT.contiguous()
    cut = [plan.cut(t) for t in (dt, dt * x, B, C)]
    y = torch.empty_like(cut[0], memory_format=torch.contiguous_format)
    starts = x.new_empty(plan.chunks, x.shape[0], *a.shape)
    last = state.mT.contiguous().clone()
    buffer = plan.buffer(a, plan.steps if plan.ahead > 1 else 1)
    for rows, runs in plan.blocks(x.shape[0]):
        h = last[rows]
        for run in runs:
            step, u, b, c = (_lanes(t, rows, run) for t in cut)
            u, b, c = u[:, :, None], b[..., None], c[:, :, None]
            entering = h[None]
            if plan.ahead > 1:
                decay = _decays(step, a, buffer)
                local = torch.zeros_like(decay[0])
                for t in range(plan.steps):
                    local.mul_(decay[t]).addcmul_(b[t], u[t])
                total = torch.exp(step.sum(0)[:, None] * a)
                local, total = (s.unflatten(0, (-1, len(h))) for s in (local, total))
                entering, h = _through(h, local, total)
            starts[run, rows] = entering
            now = entering.flatten(0, 1).clone()
            out = torch.empty_like(u)
            for t in range(plan.steps):
                one = decay[t] if plan.ahead > 1 else _decays(step[t : t + 1], a, buffer)[0]
                now.mul_(one).addcmul_(b[t], u[t])
                torch.bmm(c[t], now, out=out[t])
            h = now if plan.ahead == 1 else h
            _put(y, rows, run, out[:, :, 0])
        last[rows] = h
    return plan.join(y).contiguous(), last.mT.contiguous(), starts


@torch.library.custom_op("foveal::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the first state; states are computed again from ``starts``."""
    plan, a = _Plan(x, A), A.mT.contiguous()
    cut = [plan.cut(t) for t in (dt, dt * x, B, C, dy)]
    du, dstep, db, dc = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in cut[:4])
    da = torch.zeros_like(a)
    dstate = dlast.mT.contiguous().clone()
    buffers = [plan.buffer(a, plan.steps + extra) for extra in (0, 1, 0)]
    for rows, runs in plan.blocks(x.shape[0]):
        carry = dstate[rows]
        for run in reversed(runs):
            step, u, b, c, g = (_lanes(t, rows, run) for t in cut)
            decay = _decays(step, a, buffers[0])
            states = _shaped(buffers[1], plan.steps + 1, *decay.shape[1:])
            states[0] = starts[run, rows].flatten(0, 1)
            for t in range(plan.steps):
                torch.mul(states[t], decay[t], out=states[t + 1]).addcmul_(b[t, ..., None], u[t, :, None])
            now = carry
            if plan.ahead > 1:
                local = torch.zeros_like(decay[0])
                for t in reversed(range(plan.steps)):
                    local.addcmul_(c[t, ..., None], g[t, :, None]).mul_(decay[t])
                total = torch.exp(step.sum(0)[:, None] * a)
                local, total = (s.unflatten(0, (-1, len(carry))) for s in (local, total))
                entering, carry = _through(carry, local, total, backwards=True)
                now = entering.flatten(0, 1)
            adjoint = _shaped(buffers[2], *decay.shape)  # of the state after each step
            for t in reversed(range(plan.steps)):
                torch.addcmul(now, c[t, ..., None], g[t, :, None], out=adjoint[t])
                now = adjoint[t] * decay[t]
            carry = now if plan.ahead == 1 else carry
            _put(dc, rows, run, (states[1:] @ g[..., None])[..., 0])
            _put(db, rows, run, (adjoint @ u[..., None])[..., 0])
            _put(du, rows, run, (b[:, :, None] @ adjoint)[:, :, 0])
            adjoint.mul_(decay).mul_(states[:-1])  # of Δ·A
            da += (adjoint * step[:, :, None]).sum((0, 1))
            _put(dstep, rows, run, adjoint.mul_(a).sum(2))
        dstate[rows] = carry
    du, ddt = plan.join(du), plan.join(dstep)
    return (
        du * dt, ddt + du * x, da.mT.contiguous(), plan.join(db).contiguous(), plan.join(dc).contiguous(),
        dstate.mT.contiguous(),
    )  # fmt: skip


@_scan.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    starts = x.new_empty(_chunks(x.shape[1]), x.shape[0], A.shape[1], A.shape[0])
    return x.new_empty(x.shape), x.new_empty(state.shape), starts


@_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (*inputs[:5], dlast))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, starts = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dlast = x.new_zeros(x.shape[0], *A.shape) if dlast is None else dlast
    with torch.autocast(x.device.type, enabled=False):
        return _scan_backward(dy, dlast, x, dt, A, B, C, starts)


_scan.register_autograd(_differentiate, setup_context=_save)
