"""The Mamba block (arXiv 2312.00752) and its use in both directions, as MambAttention (arXiv 2507.00966) has it.

Parameters have the names and shapes of ``mamba-ssm`` and of transformers' ``MambaMixer``, so weights load either way:

    [x, z] = W_in u;  x ← SiLU(depthwise causal conv(x) + b);  [δ, B, C] = W_x x;  Δ = softplus(W_dt δ + b_dt);  A = −exp(A_log)
    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t;  y_t = h_t C_t + D x_t;  out = W_out (y ⊙ SiLU(z))

Padding is neither convolved nor scanned: Δ is 0 there, so real tokens see what they would see without it, on any side of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..kernels.selective_scan import selective_scan


@dataclass(frozen=True, eq=False)
class MambaState:
    """What a block remembers of a sequence.

    Attributes:
        conv: ``(B, D, d_conv − 1)``, the last inputs of the convolution, in time order.
        scan: ``(B, D, N)``, the state of the scan.
    """

    conv: Tensor
    scan: Tensor


class Mamba(nn.Module):
    """One causal Mamba-1 mixer, ``(B, L, dim)`` in and out, without norm and residual.

    Args:
        dim: width. expand: inner width D over ``dim``. d_state: N. d_conv: width of the causal convolution.
        dt_rank: r, width of δ; default ``ceil(dim / 16)``. conv_bias, bias: of the convolution, and of both projections.
        dt_min, dt_max, dt_floor: Δ at initialisation is log-uniform between the first two, at least the third.
        impl: of :func:`foveal.kernels.selective_scan.selective_scan`.

    Raises:
        ConfigError: sizes below 1, or a range of Δ that is empty.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_floor: float = 1e-4,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        for name, value in (
            ("dim", dim),
            ("expand", expand),
            ("d_state", d_state),
            ("d_conv", d_conv),
            ("dt_rank", rank),
        ):
            if value < 1:
                raise ConfigError(f"Mamba.{name} is {value}; expected at least 1.")
        if not 0 < dt_min <= dt_max:
            raise ConfigError(f"Mamba has dt_min={dt_min} and dt_max={dt_max}; expected 0 < dt_min ≤ dt_max.")
        self.dim, self.inner, self.d_state, self.dt_rank, self.impl = dim, expand * dim, d_state, rank, impl
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=bias)
        self.conv1d = nn.Conv1d(self.inner, self.inner, d_conv, groups=self.inner, bias=conv_bias)
        self.x_proj = nn.Linear(self.inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, self.inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(self.inner, 1))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, dim, bias=bias)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            low, high = math.log(dt_min), math.log(dt_max)
            dt = (low + (high - low) * torch.rand(self.inner)).exp().clamp(min=dt_floor)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def initial_state(self, batch: int) -> MambaState:
        """Before the first token."""
        weight = self.conv1d.weight
        work = torch.promote_types(weight.dtype, torch.float32)
        conv = weight.new_zeros(batch, self.inner, weight.shape[-1] - 1)
        return MambaState(conv, weight.new_zeros(batch, self.inner, self.d_state, dtype=work))

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """A whole sequence ``(B, L, dim)``; ``valid`` ``(B, L)`` bool is False on padding, before or after the real tokens.

        Raises:
            ShapeError: shapes that do not fit.
        """
        return self._run(x, None, valid)[0]

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """The next one or more tokens ``(B, n, dim)`` of a sequence, and the state after them; ``state`` is not changed.

        Raises:
            ShapeError: shapes that do not fit, such as a state of another batch.
        """
        expected = (x.shape[0], self.inner, self.conv1d.weight.shape[-1] - 1), (x.shape[0], self.inner, self.d_state)
        if (tuple(state.conv.shape), tuple(state.scan.shape)) != expected:
            raise ShapeError(
                f"the state has shapes {tuple(state.conv.shape)} and {tuple(state.scan.shape)}; expected {expected[0]} and "
                f"{expected[1]}: make it with initial_state({x.shape[0]}) of this layer."
            )
        return self._run(x, state, None)

    def _run(self, u: Tensor, state: MambaState | None, valid: Tensor | None) -> tuple[Tensor, MambaState]:
        if u.dim() != 3 or u.shape[-1] != self.dim:
            raise ShapeError(f"x has shape {tuple(u.shape)}; expected (batch, length, {self.dim}).")
        if valid is not None and tuple(valid.shape) != tuple(u.shape[:2]):
            raise ShapeError(f"valid has shape {tuple(valid.shape)}; expected {tuple(u.shape[:2])}.")
        state = self.initial_state(u.shape[0]) if state is None else state
        x, z = self.in_proj(u).chunk(2, -1)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)
        x = torch.cat([state.conv.to(x.dtype), x.mT], -1)
        conv_state = x[..., x.shape[-1] - state.conv.shape[-1] :]
        x = F.silu(self.conv1d(x)) if u.shape[1] else x[..., :0]
        x = x.mT
        delta, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        work = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(F.linear(delta, self.dt_proj.weight).to(work) + self.dt_proj.bias.to(work))
        if valid is not None:
            dt = dt.masked_fill(~valid[..., None], 0.0)
        a = -torch.exp(self.A_log.to(work))
        y, scan = selective_scan(x.to(work), dt, a, b.to(work), c.to(work), state.scan, impl=self.impl)
        y = (y + x * self.D.to(work)) * F.silu(z)
        return self.out_proj(y.to(x.dtype)), MambaState(conv_state, scan)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, inner={self.inner}, d_state={self.d_state}, dt_rank={self.dt_rank}"


class BidirectionalMamba(nn.Module):
    """Two mixers with weights of their own, one reading backwards: ``W [x + m→(RMS x); flip(x̃ + m←(RMS x̃))]``, x̃ = flip(x).

    The norms and the inner residuals are in MambAttention's code and not in its figure; its parameter count needs them.

    Args:
        dim: width. eps: of the RMS norms. options: of both :class:`Mamba` mixers.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, **options: object) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=eps) for _ in range(2))
        self.mixers = nn.ModuleList(Mamba(dim, **options) for _ in range(2))  # type: ignore[arg-type]
        self.out = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """``(B, L, dim)`` in and out; ``valid`` as in :class:`Mamba`."""
        return self.out(torch.cat(self.branches(x, valid), -1))

    def branches(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both directions before the output map, each ``(B, L, dim)`` in the order of ``x``."""
        turned = None if valid is None else valid.flip(1)
        back = x.flip(1)
        return (
            x + self.mixers[0](self.norms[0](x), valid=valid),
            (back + self.mixers[1](self.norms[1](back), valid=turned)).flip(1),
        )

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Refused: the backward mixer sees the whole sequence."""
        raise UnsupportedError(
            "BidirectionalMamba has no streaming form: its backward mixer sees the whole sequence. Use Mamba."
        )
