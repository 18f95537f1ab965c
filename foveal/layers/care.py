"""CARE-Edit's layer (arXiv 2603.08589): between blocks of a frozen diffusion transformer, tokens pick condition experts.

    h″ = h + Σ_e w_e (f_e(h) − h)                                (eq. 8; equal to Σ_e w_e f_e, because the weights sum to 1)
    γ = σ(W_γ [GAP(f_base) ‖ ψ(t)]),  h_mix = (1 − γ) h″ + γ f_base

The user's coarse mask is refined on the way and goes on to the next layer and step. A new layer changes nothing: every expert
starts by adding exactly zero. Values that the paper does not give are arguments with the defaults named here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, nearest
from .care_experts import CrossExpert, MaskExpert, MaskRepaint, ReferenceExpert, Residual, needed
from .care_router import EXPERTS, Routed, Router, timestep_features


@dataclass(frozen=True, eq=False)
class Conditions:
    """What an edit is given; None where it is not.

    Attributes:
        text: ``(B, M, dim)`` and text_valid ``(B, M)`` bool. base, ref: ``(B, M, dim)`` image tokens.
        latent: ``(B, dim, h, w)`` of the mask. mask: ``(B, 1, H, W)`` from 0 to 1, the user's at the first step, then the refined.
        ref_grid: height and width of ``ref``, for the mask refiner; None leaves it without the reference.
        present: ``(B, 4)`` bool, for batches where some samples lack a condition; order text, base, ref, mask.
    """

    text: Tensor | None = None
    base: Tensor | None = None
    ref: Tensor | None = None
    latent: Tensor | None = None
    mask: Tensor | None = None
    text_valid: Tensor | None = None
    ref_grid: tuple[int, int] | None = None
    present: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Edited:
    """``out`` ``(B, N, dim)``, the refined ``mask`` ``(B, 1, *grid)`` or None, the ``routing``, the gate ``gamma`` ``(B, 1, dim)``
    or None, and ``work``, how many token·expert pairs of the two attending experts were computed."""

    out: Tensor
    mask: Tensor | None
    routing: Routed
    gamma: Tensor | None
    work: int


class CareLayer(nn.Module):
    """Routes the target image's tokens through four condition experts.

    Args:
        dim: width. num_heads: of the cross-attentions. tasks: number of task labels (removal, replacement, text edit, style).
        top_k, share, smoothing: of :class:`Router`.
        task_to_experts: experts read the task too; the printed equations let it reach the router alone.
        time_to_router: the router's query holds the timestep, as the abstract says and the equations do not.
        output: ``"mixture"`` with the gate γ, ``"sum"`` without (eq. 8).
        dispatch: ``"dense"`` runs every expert on all tokens; ``"sparse"`` runs the attending experts where they have weight.
        residual: of :class:`MaskRepaint`. outer_norm: norm and linear map after ``h + A(…)``, the literal reading, which gives up
            the residual identity and the start from nothing. impl: of the attention.

    Raises:
        ConfigError: an unknown name, or numbers out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        tasks: int = 4,
        top_k: int = 3,
        share: float = 0.1,
        smoothing: float = 0.9,
        task_to_experts: bool = True,
        time_to_router: bool = True,
        output: Literal["mixture", "sum"] = "mixture",
        dispatch: Literal["dense", "sparse"] = "dense",
        residual: Residual = "signed",
        outer_norm: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        for name, value, known in (("output", output, ("mixture", "sum")), ("dispatch", dispatch, ("dense", "sparse"))):
            if value not in known:
                raise ConfigError(f"CareLayer.{name} is {value!r}. {nearest(str(value), known)}")
        self.dim, self.output, self.dispatch = dim, output, dispatch
        self.task_to_experts, self.time_to_router = task_to_experts, time_to_router
        self.task = nn.Embedding(tasks, dim)
        self.time = nn.Linear(dim, dim) if time_to_router else None
        self.router = Router(dim, dim, top_k=top_k, share=share, smoothing=smoothing)
        self.text, self.base = (CrossExpert(dim, num_heads, impl) for _ in range(2))
        self.ref, self.mask = ReferenceExpert(dim), MaskExpert(dim)
        self.repaint = MaskRepaint(dim, residual)
        self.gate = nn.Linear(2 * dim, dim) if output == "mixture" else None
        self.outer = (
            nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) for _ in EXPERTS)
            if outer_norm
            else None
        )

    def forward(
        self,
        h: Tensor,
        grid: tuple[int, int],
        task: Tensor,
        time: Tensor,
        conditions: Conditions,
        *,
        temperature: float = 1.0,
        means: Tensor | None = None,
    ) -> Edited:
        """Edit tokens.

        Args:
            h: ``(B, H·W, dim)`` tokens of the target image. grid: (H, W). task: ``(B,)`` int64. time: ``(B,)`` from 0 to 1.
            temperature, means: of the router; means come from the training step before.

        Raises:
            ShapeError: tensors that do not fit. ConfigError: no condition at all.
        """
        present = self._present(h, grid, task, conditions)
        task_vector = self.task(task)
        psi = timestep_features(time, self.dim).to(h.dtype)
        query = task_vector if self.time is None else task_vector + self.time(psi)
        routing = self.router(h, query, present, temperature=temperature, means=means)
        mask = conditions.mask
        if mask is not None:
            at = conditions.ref_grid
            reference = None if conditions.ref is None or at is None else conditions.ref.mT.unflatten(-1, at)
            if reference is not None:
                reference = reference * present[:, EXPERTS.index("ref"), None, None, None]
            mask = self.repaint(h, grid, reference, mask)
        added, work = self._experts(h, grid, task_vector, conditions, mask, routing)
        weights = routing.weights.to(h.dtype)
        total = sum(weights[..., EXPERTS.index(name), None] * part for name, part in added.items())
        assert isinstance(total, Tensor)
        if self.gate is None:
            return Edited(h + total, mask, routing, None, work)
        base = added.get("base", torch.zeros_like(h)) * present[:, EXPERTS.index("base"), None, None]
        gamma = torch.sigmoid(self.gate(torch.cat([(h + base).mean(1), psi], -1)))[:, None]
        return Edited(h + (1 - gamma) * total + gamma * base, mask, routing, gamma, work)

    def _experts(
        self, h: Tensor, grid: tuple[int, int], task: Tensor, given: Conditions, mask: Tensor | None, routing: Routed
    ) -> tuple[dict[str, Tensor], int]:
        """What each present expert adds to ``h``, and the pairs that the attending ones computed."""
        x = h + task[:, None] if self.task_to_experts else h
        added, work = {}, 0
        for name, condition, valid in (("text", given.text, given.text_valid), ("base", given.base, None)):
            if condition is None:
                continue
            expert = self.text if name == "text" else self.base
            everywhere = self.dispatch == "dense" or (
                name == "base" and self.gate is not None
            )  # γ reads the base's mean
            rows = None if everywhere else needed(routing.weights[..., EXPERTS.index(name)] > 0, grid)
            added[name] = expert(x, grid, condition, valid, rows)
            work += h.shape[0] * (h.shape[1] if rows is None else rows.shape[1])
        if given.ref is not None:
            added["ref"] = self.ref(x, grid, given.ref)
        if given.latent is not None and mask is not None:
            added["mask"] = self.mask(x, grid, given.latent, mask)
        if self.outer is not None:
            added = {name: self.outer[EXPERTS.index(name)](h + part) - h for name, part in added.items()}
        return added, work

    def _present(self, h: Tensor, grid: tuple[int, int], task: Tensor, given: Conditions) -> Tensor:
        if h.dim() != 3 or h.shape[-1] != self.dim or h.shape[1] != grid[0] * grid[1]:
            raise ShapeError(
                f"h has shape {tuple(h.shape)}; expected (batch, {grid[0]}·{grid[1]}, {self.dim}) for grid {grid}."
            )
        if tuple(task.shape) != (h.shape[0],):
            raise ShapeError(f"task has shape {tuple(task.shape)}; expected ({h.shape[0]},), one label per sample.")
        for name in ("text", "base", "ref"):
            condition = getattr(given, name)
            if condition is not None and (
                condition.dim() != 3 or condition.shape[0] != h.shape[0] or condition.shape[2] != self.dim
            ):
                raise ShapeError(
                    f"{name} has shape {tuple(condition.shape)}; expected ({h.shape[0]}, tokens, {self.dim})."
                )
        if (given.latent is None) != (given.mask is None):
            raise ConfigError("the mask expert needs both latent and mask; one of them is None.")
        for name, tensor, channels in (("latent", given.latent, self.dim), ("mask", given.mask, 1)):
            if tensor is not None and (tensor.dim() != 4 or tensor.shape[1] != channels):
                raise ShapeError(
                    f"{name} has shape {tuple(tensor.shape)}; expected ({h.shape[0]}, {channels}, height, width)."
                )
        here = [given.text, given.base, given.ref, given.latent]
        present = torch.tensor([c is not None for c in here], device=h.device).expand(h.shape[0], -1)
        return present if given.present is None else present & given.present
