"""What methods of denoising models remember from step to step, and the checks before it is used again."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from ..core.context import SelectContext
from ..core.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False)
class Remembered:
    """State of one layer in one generation; never changed in place.

    Attributes:
        method: the configuration that made it.
        layer: index of the layer.
        step: the last step seen.
        shape: sizes that later calls must repeat; the first is the batch.
        grid: token grid of the context, or None.
    """

    method: Any
    layer: int
    step: int
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None = field(default=None, kw_only=True)

    def at(self, step: int) -> Self:
        """The same state, last seen at ``step``."""
        return replace(self, step=step)

    def to(self, device: torch.device | str) -> Self:
        """The same state with its tensors on ``device``."""
        return self._each(lambda t: t.to(device))

    def rows(self, index: slice | Tensor) -> Self:
        """The state of some batch rows, for example one half of a classifier-free-guidance batch."""
        found = self._each(lambda t: t[index])
        batch = next((getattr(found, f.name).shape[0] for f in fields(found) if _is_tensor(found, f.name)), None)
        batch = len(torch.arange(self.shape[0])[index]) if batch is None else batch
        return replace(found, shape=(batch, *self.shape[1:]))

    def _each(self, change: Any) -> Self:
        return replace(
            self, **{f.name: change(getattr(self, f.name)) for f in fields(self) if _is_tensor(self, f.name)}
        )


@dataclass(frozen=True, eq=False)
class StepState(Remembered):
    """What Re-ttention remembers; ``shape`` is ``(B, H, N, Dv)``.

    Attributes:
        refreshed: step of the last refresh, or None.
        ratio: ``(B, H, N)`` ρ of that refresh, at least float32.
        residual: ``(B, H, N, Dv)`` what the dropped keys contributed, in the output's dtype.
        drift: ``(B, H)`` mean change of ρ per step since the refresh before; 0 where there was none.
    """

    refreshed: int | None = None
    ratio: Tensor | None = None
    residual: Tensor | None = None
    drift: Tensor | None = None


S = TypeVar("S", bound=Remembered)


def step_of(ctx: SelectContext, name: str) -> int:
    """The denoising step.

    Raises:
        ConfigError: the context has none.
    """
    if ctx.step is None or ctx.step < 0:
        raise ConfigError(f"{name}: ctx.step is {ctx.step!r}; expected the number of the denoising step, from 0.")
    return ctx.step


def check_state(
    state: Any, kind: type[S], name: str, method: Any, ctx: SelectContext, step: int, shape: tuple[int, ...]
) -> S | None:
    """The state if it may be used here, None for a fresh generation (no state, or step 0 after a later step).

    Raises:
        ShapeError: it is of another class, layer or shape.
        ConfigError: it was made by another configuration or at a later step.
    """
    if state is None:
        return None
    if not isinstance(state, kind):
        raise ShapeError(
            f"{name}: state is a {type(state).__name__}; expected a {kind.__name__} that {name} returned, or None."
        )
    if step == 0 and state.step > 0:
        return None
    if state.layer != ctx.layer_index:
        raise ShapeError(
            f"{name}: state is of layer {state.layer}; expected that of layer {ctx.layer_index}, or None. Keep one state per layer."
        )
    if tuple(state.shape) != tuple(shape):
        raise ShapeError(
            f"{name}: state is of shape {tuple(state.shape)}; expected {tuple(shape)}, the shape of this call, or None. A batch or "
            "resolution that changes needs a new state; for a part of a batch use state.rows(index)."
        )
    if state.grid != ctx.grid:
        raise ShapeError(
            f"{name}: state is of the grid {state.grid}; expected {ctx.grid}, the grid of this call, or None for a new generation."
        )
    if state.method != method:
        raise ConfigError(f"{name}: state was made by {state.method}; expected {method}, or None.")
    if state.step > step:
        raise ConfigError(
            f"{name}: state is of step {state.step} and ctx.step is {step}; expected a step of at least {state.step}, or 0 or None "
            "for a new generation."
        )
    return state


def _is_tensor(state: Any, name: str) -> bool:
    return isinstance(getattr(state, name), Tensor)
