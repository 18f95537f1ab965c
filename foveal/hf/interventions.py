"""What may change an attention on its way through the dispatcher: reweighing of keys, then rewriting of head outputs.

An intervention is a frozen description; :meth:`Intervention.on` makes the :class:`Act` that lives as long as one
``foveal.attach``. In every self-attention the reweighings of all acts run first, in order and on each other's result, then
the rewritings. Both work on the attention that the policy computed, so they combine with any policy and kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..core.context import SelectContext
from ..core.errors import UnsupportedError
from ..kernels.call import AttentionCall
from ..kernels.key_groups import partial, positions
from ..kernels.merge import shares

if TYPE_CHECKING:
    from .handle import Handle


@dataclass(frozen=True, eq=False)
class Moment:
    """One self-attention call, as acts see it.

    Attributes:
        call: tensors (after RoPE, GQA not repeated), what the policy kept, base mask, scale.
        ctx: layer, offsets, positions. cache: the request's cache or None. by_head: whether the policy has rules for single heads.
    """

    call: AttentionCall
    ctx: SelectContext
    cache: Any
    by_head: bool = False


@dataclass(frozen=True, eq=False)
class Reweigh:
    """Scale the attention weights of groups of keys, per head and row.

    Attributes:
        groups: ``(B, Nk)`` int64 group of each key; 0 is the rest, and a learned sink belongs to it. count: number of groups, the rest included.
        rows: ``(B, Nq)`` bool, rows that may change.
        factors: masses ``(count, B, H, R)`` of the chosen rows (float32 or float64) → factors of the same shape.
        rest: whether group 0 may be scaled too; it costs one more partial attention over these rows.
    """

    groups: Tensor
    count: int
    rows: Tensor
    factors: Callable[[Tensor], Tensor]
    rest: bool = False


class Act:
    """A running intervention; does nothing unless a method is overridden. Its record goes into :meth:`report`."""

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward begins: the place to run forwards of one's own, in which all acts take part."""

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the model begins; ``module`` is the outermost transformers model that runs."""

    def reweigh(self, moment: Moment) -> Reweigh | None:
        """What to do to the attention weights of this call."""
        return None

    def rewrite(self, moment: Moment, out: Tensor) -> Tensor:
        """Head outputs ``(B, H, Nq, Dv)`` before the output projection → the same, changed."""
        return out

    def close(self) -> None:
        """The block ends; remove hooks."""

    def report(self) -> dict[str, Any]:
        """What was done, as JSON values."""
        return {}


class Intervention(Protocol):
    """A description of a change, such as ``foveal.steer.VAR``."""

    def on(self, handle: Handle) -> Act:
        """Check that the change fits the model, and start.

        Raises:
            ConfigError, ShapeError, UnsupportedError: it does not fit, and why.
        """
        ...


def intervene(acts: Sequence[Act], moment: Moment, sinks: Tensor | None, impl: str, out: Tensor) -> Tensor:
    """Run all acts on one attention's result ``(B, H, Nq, Dv)``."""
    if moment.ctx.role == "cross":
        return out
    steps = [step for act in acts if (step := act.reweigh(moment)) is not None]
    if steps:
        if moment.by_head:
            raise UnsupportedError(
                "an intervention on attention weights cannot run in a layer where the policy has rules for single heads; "
                "use one rule for all heads of the layer, or leave the intervention out there."
            )
        out = reweighed(moment.call, steps, sinks, impl, out)
    for act in acts:
        out = act.rewrite(moment, out)
    return out


def reweighed(call: AttentionCall, steps: Sequence[Reweigh], sinks: Tensor | None, impl: str, out: Tensor) -> Tensor:
    """``out`` after the steps, exactly: ``out + Σ_c (f_c − 1) w_c out_c`` over the cells c in which all steps' groups are constant.

    Rows in which no factor differs from 1 keep their bits.
    """
    batch, heads = call.q.shape[:2]
    any_row = torch.stack([s.rows.expand(batch, -1) for s in steps]).any(0)
    rows, real = positions(any_row)
    if rows.shape[1] == 0:
        return out
    cell = torch.zeros(batch, call.k.shape[2], dtype=torch.long, device=call.q.device)
    for step in steps:
        cell = cell * step.count + step.groups
    rest = any(step.rest for step in steps)
    present = [c for c in torch.unique(cell).tolist() if c or rest]
    if not present:
        return out
    parts = [partial(call, rows, real, cell == c, impl) for c in present]
    lses = torch.stack([part_lse for _, part_lse in parts])  # (cells, B, H, R)
    if rest:  # every key is in some cell
        learned = [] if sinks is None else [(sinks.to(lses.dtype)[:, None]).expand_as(lses[0])[None]]
        mass = shares(torch.cat([lses, *learned]))[0] * real[:, None]
        left = mass[-1] if learned else torch.zeros_like(mass[0])
        mass = mass[: len(present)]
    else:
        _, lse = partial(call, rows, real, None, impl, sinks)
        mass = torch.exp(lses - torch.where(torch.isinf(lse), torch.zeros_like(lse), lse))
        left = (1 - mass.sum(0)).clamp(min=0)
    factor = torch.ones_like(mass)
    for i, step in enumerate(steps):
        below = 1
        for later in steps[i + 1 :]:
            below *= later.count
        group = [c // below % step.count for c in present]
        now = mass * factor
        masses = torch.stack([
            sum((now[n] for n, g in enumerate(group) if g == index), left if index == 0 else torch.zeros_like(left))
            for index in range(step.count)
        ])  # fmt: skip
        mine = step.rows.expand(batch, -1).gather(1, rows)[:, None] & real[:, None]
        wanted = torch.where(mine, step.factors(masses), 1.0).to(factor.dtype)
        factor = factor * wanted[group]
        left = left * wanted[0]
    change = sum(((f - 1) * m)[..., None] * o.to(m.dtype) for f, m, (o, _) in zip(factor, mass, parts, strict=True))
    assert isinstance(change, Tensor)
    moved = torch.zeros(out.shape, dtype=change.dtype, device=out.device)
    where = rows[:, None, :, None].expand(batch, heads, -1, out.shape[-1])
    moved = moved.scatter_add(2, where, change * real[:, None, :, None])
    return torch.where(moved != 0, (out.to(moved.dtype) + moved).to(out.dtype), out)
