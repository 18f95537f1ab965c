"""Steer a model towards the user's text: keys outside it count α times as much (arXiv 2411.02688, after PASTA).

In a row with user mass p the new mass is ``p / (p + α(1 − p))``; ratios inside and outside the user's text stay as they are. It equals adding
``log α`` to the scores of the other keys. Within a row that scales two groups of keys by one number each, so no N×N mask is made, on any kernel,
in prefill and decoding alike.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError
from ..hf.interventions import Act, Moment, Reweigh
from .keys import check_layers, over_keys

if TYPE_CHECKING:
    from ..hf import Handle

GENERATED = ("keep", "scale")
OUTSIDE, INSIDE = 0, 1


def steered_mass(p: float, alpha: float) -> float:
    """User mass after steering, from the mass before."""
    return p / (p + alpha * (1 - p)) if p or alpha else 0.0


def context_factors(mass: Tensor, alpha: float) -> Tensor:
    """Factors of the keys outside and inside, from their masses ``(2, ...)``: ``α T / (p + α q)`` and ``T / (p + α q)``.

    T = p + q is the row's sum, which stays. Rows that see keys of one kind only keep their weights.
    """
    outside, inside = mass[OUTSIDE], mass[INSIDE]
    both = (outside > 0) & (inside > 0)
    scale = (outside + inside) / torch.where(both, inside + alpha * outside, 1.0)
    return torch.where(both, torch.stack([alpha * scale, scale]), 1.0)


@dataclass(frozen=True, eq=False)
class ContextSteering:
    """Weigh the keys outside the user's text by ``alpha`` in every head.

    Attributes:
        user: ``(N,)`` or ``(B, N)`` bool over the prompt's tokens, padding included and False there, see
            :func:`foveal.data.chat.read_chat`; several spans make one mask.
        alpha: above 0, at most 1; 0.95 in the paper's table; 1 changes no bit.
        generated: ``"keep"`` leaves the weight of keys after the prompt at 1 (the authors' code), ``"scale"`` counts them as outside
            (the paper's text). layers: default all.

    Raises:
        ConfigError: alpha or generated out of range, or a sequence without a user token. ShapeError: user of another shape or dtype.
    """

    user: Tensor
    alpha: float = 0.95
    generated: Literal["keep", "scale"] = "keep"
    layers: Collection[int] | None = None
    alone = True
    names_positions = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}; expected a number above 0 and at most 1, such as 0.95.")
        if self.generated not in GENERATED:
            raise ConfigError(f"generated is {self.generated!r}; expected 'keep' or 'scale'.")
        if self.user.dim() not in (1, 2) or self.user.dtype != torch.bool:
            raise ShapeError(
                f"user has shape {tuple(self.user.shape)} and dtype {self.user.dtype}; expected bool (N,) or (B, N)."
            )
        if not bool(self.user.any(-1).all()):
            raise ConfigError("user marks no token in some sequence; there is nothing to steer towards.")

    def on(self, handle: Handle) -> Act:
        """Check the layers, and start."""
        check_layers(self.layers, handle)
        return _Steering(self)


class _Steering(Act):
    """Adds up the user mass of all rows that see keys of both kinds."""

    def __init__(self, what: ContextSteering) -> None:
        self.what = what
        self.rows, self.before, self.after = 0, 0.0, 0.0

    def reweigh(self, moment: Moment) -> Reweigh | None:
        what = self.what
        if what.alpha == 1 or (what.layers is not None and moment.ctx.layer_index not in what.layers):
            return None
        inside = over_keys(what.user, moment) if what.generated == "scale" else ~over_keys(~what.user, moment)
        rows = torch.ones(1, moment.call.q.shape[2], dtype=torch.bool, device=inside.device)

        def factors(mass: Tensor) -> Tensor:
            found = context_factors(mass, what.alpha)
            total = mass[OUTSIDE] + mass[INSIDE]
            both = (mass > 0).all(0)
            share = mass[INSIDE][both] / total[both]
            self.rows += share.numel()
            self.before += float(share.detach().double().sum())
            self.after += float((share * found[INSIDE][both]).detach().double().sum())
            return found

        return Reweigh(inside.long(), 2, rows, factors, rest=True)

    def report(self) -> dict[str, Any]:
        """``before``, ``after``: mean user mass over ``rows``, the (head, row) pairs that see keys inside and outside."""
        mean = {
            name: total / self.rows if self.rows else None
            for name, total in (("before", self.before), ("after", self.after))
        }
        return {
            "intervention": "ContextSteering", "fired": self.rows > 0, "alpha": self.what.alpha, "rows": self.rows, **mean
        }  # fmt: skip
