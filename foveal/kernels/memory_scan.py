"""The neural-memory scan of Titans (arXiv 2501.00663): a small network that takes one gradient step per token, read after each.

A memory is ``M(x) = W_L·act(…act(W_1·x))``; its loss at token t is the plain square ``‖M(k_t) − v_t‖²`` (so a linear memory's
gradient has a factor 2). With data-dependent scalars per token, α forgetting, η momentum, θ step:

    S_t = η_t·S_{t−1} − θ_t·∇ℓ(M_ref; k_t, v_t)        M_t = (1 − α_t)·M_{t−1} + S_t        y_t = M_t(q_t)

``M_ref`` is the memory before the first token of the chunk that holds t (chunk 1: the memory before t). :func:`sequential` is this rule,
token by token. :func:`chunked` is the same function by matrix products: every gradient is of rank one in every layer, so nothing of size
(chunk × memory) is stored. The chunk is part of the model, not of the speed: another one gives other outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.errors import ConfigError, ShapeError, nearest
from .call import compute_dtype

Weights = tuple[Tensor, ...]
"""``(B, H, out, in)`` of every layer of the memory."""

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, lambda x: 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327),
    "silu": (F.silu, lambda x: torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x).square()),
}
"""Name → function and derivative; all twice differentiable, as the outer gradient needs."""


@dataclass(frozen=True, eq=False)
class MemoryState:
    """A memory between two calls.

    Attributes:
        weights, momentum: Θ and S now. reference: Θ at the start of the current chunk.
        position: tokens of the current chunk already taken, below ``chunk``.
        chunk: tokens per chunk; part of the model.
    """

    weights: Weights
    momentum: Weights
    reference: Weights
    position: int
    chunk: int

    @classmethod
    def start(cls, weights: Weights, chunk: int) -> MemoryState:
        """An untouched memory: S = 0."""
        return cls(weights, tuple(torch.zeros_like(w) for w in weights), weights, 0, chunk)

    def detach(self) -> MemoryState:
        """Without its graph: later calls do not backpropagate into earlier ones."""
        weights, momentum, reference = (
            tuple(t.detach() for t in ts) for ts in (self.weights, self.momentum, self.reference)
        )
        return MemoryState(weights, momentum, reference, self.position, self.chunk)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, for ``torch.save`` or safetensors."""
        out = {"position": torch.tensor(self.position), "chunk": torch.tensor(self.chunk)}
        for name in ("weights", "momentum", "reference"):
            out |= {f"{name}.{i}": t for i, t in enumerate(getattr(self, name))}
        return out

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> MemoryState:
        """The inverse of :meth:`state_dict`."""
        depth = sum(name.startswith("weights.") for name in state)
        weights, momentum, reference = (
            tuple(state[f"{name}.{i}"] for i in range(depth)) for name in ("weights", "momentum", "reference")
        )
        return cls(weights, momentum, reference, int(state["position"]), int(state["chunk"]))


class Scanned(NamedTuple):
    """Result: ``out`` ``(B, H, N, dv)``, the new state, and ``surprise`` ``(B, H, N)``, the norm of each token's gradient."""

    out: Tensor
    state: MemoryState
    surprise: Tensor


class _Tokens(NamedTuple):
    """Tokens ``(B, H, n, ·)`` and gates ``(B, H, n)``; ``keep`` is 0 on padding."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor
    keep: Tensor

    def part(self, start: int, stop: int) -> _Tokens:
        return _Tokens(*(t[:, :, start:stop] for t in self))


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    state: MemoryState,
    *,
    activation: str = "gelu",
    clip: float | None = None,
    valid: Tensor | None = None,
    impl: str = "chunked",
    recompute: bool = False,
) -> Scanned:
    """Update a memory with every token and read it after each.

    Args:
        q, k: ``(B, H, N, d)``; v: ``(B, H, N, dv)``. For stability keys have norm 1 and 2·θ stays below 2.
        alpha, eta, theta: ``(B, H, N)``, forgetting and momentum in [0, 1], steps of at least 0.
        state: of :meth:`MemoryState.start` or the previous call; pieces of a sequence give what one call gives, wherever it is cut.
        activation: between the layers of the memory. clip: largest norm of one token's gradient, over all layers.
        valid: ``(B, N)`` bool; a token that is False neither moves the memory nor its momentum, but counts in its chunk.
        impl: ``"chunked"``, or ``"sequential"``, the definition. recompute: chunks are computed again in the backward pass instead of being
            stored (``chunked`` alone).

    Returns:
        Outputs in q's dtype; states are float32, or float64 with float64 inputs.

    Raises:
        ShapeError: tensors that do not fit each other or the state. ConfigError: an unknown name, or a clip or chunk out of range.
    """
    _check(q, k, v, (alpha, eta, theta), state, valid)
    for name, value, known in (("activation", activation, ACTIVATIONS), ("impl", impl, ("chunked", "sequential"))):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}. {nearest(value, known)}")
    if clip is not None and not clip > 0:
        raise ConfigError(f"clip is {clip!r}; expected a number above 0, or None.")
    dtype = compute_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        keep = torch.ones_like(alpha) if valid is None else valid[:, None].expand_as(alpha)
        tokens = _Tokens(*(t.to(dtype) for t in (q, k, v, alpha, eta, theta, keep)))
        if valid is not None:  # a step without forgetting, with full momentum and no gradient changes S not at all
            tokens = tokens._replace(
                alpha=tokens.alpha * tokens.keep, eta=torch.where(keep.bool(), tokens.eta, 1.0), theta=tokens.theta * tokens.keep
            )  # fmt: skip
        outs, surprises = [], []
        step = 1 if impl == "sequential" else state.chunk
        start = 0
        while start < q.shape[2]:
            stop = min(start + min(step, state.chunk - state.position), q.shape[2])
            piece = tokens.part(start, stop)
            if impl == "sequential":
                out, surprise, weights, momentum = _one(piece, state, activation, clip)
            elif recompute and torch.is_grad_enabled():
                out, surprise, weights, momentum = checkpoint(
                    _chunk, piece, state, activation, clip, use_reentrant=False
                )
            else:
                out, surprise, weights, momentum = _chunk(piece, state, activation, clip)
            position = (state.position + stop - start) % state.chunk
            state = MemoryState(weights, momentum, weights if position == 0 else state.reference, position, state.chunk)
            outs.append(out)
            surprises.append(surprise * piece.keep)
            start = stop
        out = torch.cat(outs, 2) if outs else torch.zeros_like(v)
        return Scanned(out.to(q.dtype), state, torch.cat(surprises, 2) if outs else torch.zeros_like(alpha))


def read(q: Tensor, weights: Weights, activation: str = "gelu") -> Tensor:
    """``M(q)`` of one memory for all queries ``(B, H, N, d)`` → ``(B, H, N, dv)``, without an update."""
    act, _ = ACTIVATIONS[activation]
    x = q.to(weights[0].dtype)
    for i, w in enumerate(weights):
        x = x @ w.mT
        x = act(x) if i < len(weights) - 1 else x
    return x.to(q.dtype)


def gradients(k: Tensor, v: Tensor, weights: Weights, activation: str) -> tuple[list[Tensor], list[Tensor]]:
    """``errors`` E and ``inputs`` X of every layer, ``(B, H, n, ·)``: the gradient of token j in layer l is ``E_j·X_jᵀ``."""
    act, slope = ACTIVATIONS[activation]
    inputs, before = [k], []
    for i, w in enumerate(weights):
        z = inputs[-1] @ w.mT
        before.append(z)
        if i < len(weights) - 1:
            inputs.append(act(z))
    errors = [2 * (before[-1] - v)]
    for i in range(len(weights) - 1, 0, -1):
        errors.append((errors[-1] @ weights[i]) * slope(before[i - 1]))
    return errors[::-1], inputs


def _surprise(errors: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """Norm of every token's gradient, ``(B, H, n)``."""
    total = sum(e.square().sum(-1) * x.square().sum(-1) for e, x in zip(errors, inputs, strict=True))
    return torch.as_tensor(total).sqrt()


def _clipped(theta: Tensor, surprise: Tensor, clip: float | None) -> Tensor:
    return theta if clip is None else theta * (clip / surprise.clamp(min=1e-30)).clamp(max=1.0)


Step = tuple[Tensor, Tensor, Weights, Weights]
"""``(out, surprise, weights, momentum)``."""


def _one(t: _Tokens, state: MemoryState, activation: str, clip: float | None) -> Step:
    """The rule for one token."""
    errors, inputs = gradients(t.k, t.v, state.reference, activation)
    surprise = _surprise(errors, inputs)
    theta = _clipped(t.theta, surprise, clip)[..., None]
    keep, alpha, eta = t.keep[..., None], t.alpha[..., None], t.eta[..., None]
    momentum = tuple(eta * s - theta * (e.mT @ x) for s, e, x in zip(state.momentum, errors, inputs, strict=True))
    weights = tuple((1 - alpha) * w + keep * s for w, s in zip(state.weights, momentum, strict=True))
    return read(t.q, weights, activation), surprise, weights, momentum


def _chunk(t: _Tokens, state: MemoryState, activation: str, clip: float | None) -> Step:
    """The rule for up to a chunk of tokens at once."""
    act, _ = ACTIVATIONS[activation]
    errors, inputs = gradients(t.k, t.v, state.reference, activation)
    surprise = _surprise(errors, inputs)
    theta = _clipped(t.theta, surprise, clip)
    decay, carry = _products(1 - t.alpha), _products(t.eta)  # (B, H, n, n + 1): column 0 is what was there before
    kept = decay[..., 1:] * t.keep[..., None, :]
    mixed = kept @ carry  # M_t = Σ_i decay[t, i]·S_i and S_i = Σ_j carry[i, j]·(−θ_j·g_j)
    a, c, w = decay[..., :1], mixed[..., :1], -mixed[..., 1:] * theta[..., None, :]
    z = t.q
    for i, (m, s, e, x) in enumerate(zip(state.weights, state.momentum, errors, inputs, strict=True)):
        z = _add(_add(a * (z @ m.mT), c * z, s.mT), w * (z @ x.mT), e)
        z = act(z) if i < len(errors) - 1 else z
    a, c, w = a[..., -1:, :], c[..., -1:, :], w[..., -1, :, None]
    h, left = carry[..., -1:, :1], -(carry[..., -1, 1:] * theta)[..., None]
    weights, momentum = [], []
    for m, s, e, x in zip(state.weights, state.momentum, errors, inputs, strict=True):
        weights.append(_add(torch.addcmul(a * m, c, s), (w * e).mT, x))
        momentum.append(_add(h * s, (left * e).mT, x))
    return z, surprise, tuple(weights), tuple(momentum)


def _add(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x + a @ b`` in one product, ``(B, H, ·, ·)`` each."""
    return torch.baddbmm(x.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1)).view(x.shape)


def _products(factor: Tensor) -> Tensor:
    """``(…, n, n + 1)``: entry ``[t, 1 + i]`` is the product of the factors after i up to t, 1 for i = t, 0 for i > t; column 0 that of
    all factors up to t. Products, not differences of logarithms: factors of exactly 0 are as good as others."""
    n = factor.shape[-1]
    ones = torch.ones(n, n + 1, dtype=torch.bool, device=factor.device)
    later = ones.tril()  # [t, 1 + i]: t > i, and column 0 always
    table = torch.where(later, factor[..., :, None], 1.0).cumprod(-2)
    return torch.where(ones.tril(1), table, 0.0)


def _check(
    q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor, Tensor], state: MemoryState, valid: Tensor | None
) -> None:
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ShapeError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; expected (B, H, N, d) twice and (B, H, N, dv)."
        )
    for name, gate in zip(("alpha", "eta", "theta"), gates, strict=True):
        if gate.shape != q.shape[:3]:
            raise ShapeError(
                f"{name} has shape {tuple(gate.shape)}; expected {tuple(q.shape[:3])}, one value per token and head."
            )
    if valid is not None and tuple(valid.shape) != (q.shape[0], q.shape[2]):
        raise ShapeError(f"valid has shape {tuple(valid.shape)}; expected {(q.shape[0], q.shape[2])}.")
    if state.chunk < 1:
        raise ConfigError(f"the state's chunk is {state.chunk}; expected at least 1 token.")
    shapes = [tuple(w.shape) for w in state.weights]
    fits = bool(shapes) and all(s[:2] == tuple(q.shape[:2]) for s in shapes)
    fits = fits and shapes[0][3] == q.shape[3] and shapes[-1][2] == v.shape[3]
    if not fits or any(a[2] != b[3] for a, b in pairwise(shapes)):
        raise ShapeError(
            f"the memory's weights have shapes {shapes}; expected (B={q.shape[0]}, H={q.shape[1]}, out, in) from {q.shape[3]} to {v.shape[3]} channels."
        )
    if state.weights[0].dtype != compute_dtype(q.dtype):
        raise ShapeError(
            f"the memory's weights are {state.weights[0].dtype} for inputs of {q.dtype}; expected {compute_dtype(q.dtype)}."
        )
