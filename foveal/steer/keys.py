"""Knock out attention to chosen keys."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError
from ..hf.interventions import Act, Moment, Reweigh

if TYPE_CHECKING:
    from ..hf import Handle


@dataclass(frozen=True, eq=False)
class Knockout:
    """Multiply the attention weights on chosen keys after the softmax.

    Attributes:
        keys: ``(N,)`` or ``(B, N)`` bool over the first N positions of the request; later positions are never among them.
        factor: 0 knocks them out. layers: default all.
        spare: ``(N,)`` or ``(B, N)`` bool, rows that keep their attention, such as those of image tokens; later rows are never among them.
        renormalise: give the mass back to the other keys in proportion, as if the keys had been masked before the softmax; a row
            that sees only such keys is left alone.

    Raises:
        ShapeError: keys of another shape or dtype. ConfigError: a factor below 0.
    """

    keys: Tensor
    factor: float = 0.0
    layers: Collection[int] | None = None
    spare: Tensor | None = None
    renormalise: bool = False

    def __post_init__(self) -> None:
        for name, flags in (("keys", self.keys), ("spare", self.spare)):
            if flags is not None and (flags.dim() not in (1, 2) or flags.dtype != torch.bool):
                raise ShapeError(
                    f"{name} has shape {tuple(flags.shape)} and dtype {flags.dtype}; expected bool (N,) or (B, N)."
                )
        if self.factor < 0:
            raise ConfigError(f"factor is {self.factor}; expected 0 or more.")

    names_positions = True

    def on(self, handle: Handle) -> Act:
        """Check the layers, and start."""
        check_layers(self.layers, handle)
        return _Knocking(self)


class _Knocking(Act):
    def __init__(self, what: Knockout) -> None:
        self.what, self.calls = what, 0
        self.rows, self.mass = 0, 0.0

    def reweigh(self, moment: Moment) -> Reweigh | None:
        what = self.what
        if what.layers is not None and moment.ctx.layer_index not in what.layers:
            return None
        self.calls += 1
        keys = over_keys(what.keys, moment)
        rows = torch.ones(1, moment.call.q.shape[2], dtype=torch.bool, device=keys.device)
        if what.spare is not None:
            rows = ~over_rows(over_keys(what.spare, moment), moment)

        def factors(mass: Tensor) -> Tensor:
            met = mass[1][mass[1] > 0]
            self.rows += met.numel()
            self.mass += float(met.detach().double().sum())
            out = torch.ones_like(mass)
            out[1] = what.factor
            if what.renormalise:
                other, gone = mass[0], mass[1] * (1 - what.factor)
                keep = other > 0
                out[0] = torch.where(keep, (other + gone) / torch.where(keep, other, 1.0), 1.0)
                out[1] = torch.where(keep, out[1], 1.0)
            return out

        return Reweigh(keys.long(), 2, rows, factors, rest=what.renormalise)

    def report(self) -> dict[str, Any]:
        """``mass``: mean weight on the keys before, over ``rows``, the (head, row) pairs that see one of them."""
        return {
            "intervention": "Knockout", "fired": self.rows > 0, "factor": self.what.factor, "calls": self.calls,
            "rows": self.rows, "mass": self.mass / self.rows if self.rows else None,
        }  # fmt: skip


def over_keys(positions: Tensor, moment: Moment) -> Tensor:
    """A ``(N,)`` or ``(B, N)`` bool over a request's first positions as ``(B, Nk)`` over the keys of a call; what follows is False.

    Caches that keep a window of the last keys are met at their end.

    Raises:
        ShapeError: another batch size.
    """
    batch, kv_len = moment.call.k.shape[0], moment.call.k.shape[2]
    at = positions[None] if positions.dim() == 1 else positions
    if at.shape[0] not in (1, batch):
        if batch % at.shape[0]:
            raise ShapeError(f"positions are given for {at.shape[0]} sequences and the model runs {batch}.")
        at = at.repeat_interleave(batch // at.shape[0], 0)  # beams of the same prompt
    seen = moment.ctx.q_offset + moment.call.q.shape[2]
    at = torch.nn.functional.pad(at[:, :seen].to(moment.call.k.device), (0, max(0, seen - at.shape[1])))
    return at[:, max(0, seen - kv_len) :].expand(batch, -1)


def over_rows(keys: Tensor, moment: Moment) -> Tensor:
    """The rows' part of ``(B, Nk)`` flags over keys: ``(B, Nq)``."""
    return keys[:, keys.shape[1] - moment.call.q.shape[2] :]


def check_layers(layers: Collection[int] | None, handle: Handle) -> None:
    """Raise :class:`ConfigError` for layers that the model lacks."""
    for layer in layers or ():
        if not 0 <= layer < handle.num_layers:
            raise ConfigError(
                f"layers names {layer}; {type(handle.model).__name__} has layers 0 to {handle.num_layers - 1}."
            )
