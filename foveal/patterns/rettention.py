"""Re-ttention (arXiv 2505.22918): sparse attention over denoising steps, corrected by what a dense step measured.

At a *refresh* step both the dense and the sparse attention run, and two things are remembered: the ratio
``ρ = Z_sparse / Z_dense = exp(lse_sparse − lse_dense)`` of the softmax sums, and the residual ``R = O_dense − ρ·O_sparse``, exactly
what the dropped keys contributed. The sparse steps after it return ``ρ·O_sparse + R``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.context import SelectContext, State
from ..core.errors import ConfigError, ShapeError
from ..core.registry import register
from ..core.serial import check_range, check_types
from .base import Pattern
from .dense import Dense
from .operator import Operator, attend, dense_impl
from .step_state import StepState, check_state, step_of

Kind = Literal["full", "refresh", "sparse"]


@register("operator", "rettention")
@dataclass(frozen=True)
class Rettention(Operator):
    """Dense warm-up, a refresh now and then, and corrected sparse attention in between.

    Attributes:
        pattern: the sparse mask; it must not change from step to step.
        warmup: first steps, dense.
        period: a refresh at every multiple of it after the warm-up; the first step after the warm-up is one in any case.
        mode: what a sparse step returns. "reshape" ``ρ·O + R``; "ratio" ``ρ·O``; "residual" ``O + (O_dense − O)`` of the refresh;
            "plain" ``O``; "post_mask" the dense softmax with the mask put on afterwards: ``ρ`` of this very step, nothing saved.
        ramp: λ, added to ρ after every sparse step; "auto" is the mean change of ρ per step between the last two refreshes, for
            each head and batch row (0 until there were two).
        clamp: keep the ramped ρ inside [0, 1]. The authors do not: with λ > 0 rows may sum to more than 1.

    The paper's settings: PixArt ``warmup=5``, Hunyuan-DiT 10, CogVideoX 15, ``period=5``, ``ramp=0.04``. ``ctx.step`` names the step; the
    state belongs to one layer and one generation. A sparse step changes nothing in it, so a sampler may call the model several
    times in a step. A missing state makes the step a refresh.
    """

    pattern: Pattern
    warmup: int = 5
    period: int = 5
    mode: Literal["reshape", "ratio", "residual", "plain", "post_mask"] = "reshape"
    ramp: float | Literal["auto"] = 0.04
    clamp: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "warmup", low=0)
        check_range(self, "period", low=1)
        if not self.pattern.static:
            raise ConfigError(
                f"Rettention.pattern is {self.pattern}, whose mask depends on what it reads; expected one that stays from step to step, such as Disc."
            )
        if not isinstance(self.ramp, str) and not abs(self.ramp) <= 1:
            raise ConfigError(f"Rettention.ramp is {self.ramp!r}; expected a number from −1 to 1, or 'auto'.")

    def kind(self, step: int) -> Kind:
        """What happens at a step whose state is at hand."""
        if step < self.warmup:
            return "full"
        return "refresh" if step == self.warmup or step % self.period == 0 else "sparse"

    def schedule(self, steps: int) -> list[Kind]:
        """The kinds of all steps of a generation."""
        return [self.kind(step) for step in range(steps)]

    def run_cost(self, steps: int, sparse_cost: float) -> float:
        """Attention time of a generation over that of a dense one, when a sparse step costs ``sparse_cost`` of a dense one."""
        if steps < 1:
            raise ConfigError(f"rettention: steps is {steps}; expected at least 1.")
        kinds = self.schedule(steps)
        sparse, refresh = kinds.count("sparse"), kinds.count("refresh")
        return (steps - sparse + (sparse + refresh) * sparse_cost) / steps

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: SelectContext, state: State, impl: str
    ) -> tuple[Tensor, Tensor, State]:
        """Attention of this step. The lse is that of the dense attention, estimated by ``lse_sparse − log ρ`` where ρ is used.

        Raises:
            ConfigError: ``ctx.step`` is missing, or the state is of a later step or another configuration.
            ShapeError: the state is of another shape, grid, dtype or layer.
        """
        step = step_of(ctx, "rettention")
        last = check_state(state, StepState, "rettention", self, ctx, step, (*q.shape[:3], v.shape[-1]))
        if last is not None and last.residual is not None and last.residual.dtype != v.dtype:
            raise ShapeError(
                f"rettention: state is of {last.residual.dtype}; expected {v.dtype}, the dtype of this call, or None for a new generation."
            )
        if self.kind(step) == "full":
            out, lse, _ = attend(Dense(), q, k, v, ctx, impl=dense_impl(impl))
            return out, lse, StepState(self, ctx.layer_index, step, tuple(out.shape), grid=ctx.grid)
        if last is None or last.ratio is None or (self.kind(step) == "refresh" and last.refreshed != step):
            return self._refresh(q, k, v, ctx, last, step, impl)
        if last.refreshed == step:  # a sampler's second call in a refresh step
            out, lse, _ = attend(Dense(), q, k, v, ctx, impl=dense_impl(impl))
            return out, lse, last
        out, lse, _ = attend(self.pattern, q, k, v, ctx, impl=impl)
        if self.mode == "post_mask":
            _, full, _ = attend(Dense(), q, k, v, ctx, impl=dense_impl(impl))
            return _scaled(out, ratio_of(lse, full)), full, last.at(step)
        ratio = self.ratio_at(last, step)
        if self.mode in ("reshape", "ratio"):
            out, lse = _scaled(out, ratio), lse - torch.log(ratio.clamp(min=torch.finfo(ratio.dtype).tiny))
        if self.mode in ("reshape", "residual"):
            assert last.residual is not None
            out = out + last.residual.to(out.dtype)
        return out, lse, last.at(step)

    def ratio_at(self, state: StepState, step: int) -> Tensor:
        """``(B, H, N)`` ρ that a sparse step uses: the refresh's, plus λ for every sparse step since."""
        assert state.ratio is not None and state.refreshed is not None
        ramp = state.drift[..., None] if self.ramp == "auto" else float(self.ramp)  # type: ignore[index]
        ratio = state.ratio + ramp * (step - state.refreshed - 1)
        return ratio.clamp(0.0, 1.0) if self.clamp else ratio

    def _refresh(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: SelectContext, last: StepState | None, step: int, impl: str
    ) -> tuple[Tensor, Tensor, State]:
        full, full_lse, _ = attend(Dense(), q, k, v, ctx, impl=dense_impl(impl))
        with torch.no_grad():
            out, lse, _ = attend(self.pattern, q, k, v, ctx, impl=impl)
            ratio = ratio_of(lse, full_lse)
            kept = out if self.mode == "residual" else _scaled(out, ratio)
            drift = torch.zeros_like(ratio[..., 0])
            if last is not None and last.ratio is not None and last.refreshed is not None:
                drift = (ratio - last.ratio).mean(-1) / (step - last.refreshed)
            shape = tuple(full.shape)
            rest = (full - kept).detach()
            new = StepState(self, ctx.layer_index, step, shape, step, ratio, rest, drift, grid=ctx.grid)
        return full, full_lse, new


def ratio_of(sparse_lse: Tensor, full_lse: Tensor) -> Tensor:
    """``Z_sparse / Z_dense`` of every row, in at least float32; 1 for a row that may see nothing at all."""
    ratio = torch.exp(sparse_lse.detach() - full_lse.detach())
    return torch.where(full_lse.detach() == -torch.inf, torch.ones_like(ratio), ratio)


def _scaled(out: Tensor, ratio: Tensor) -> Tensor:
    return (out * ratio[..., None].to(torch.promote_types(out.dtype, torch.float32))).to(out.dtype)
