"""What an operator is: attention that is more than one softmax over chosen pairs, ``(q, k, v, ctx, state) → (out, lse, state)``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from ..core import registry, serial
from ..core.context import SelectContext, State
from ..core.errors import ConfigError, ShapeError
from ..kernels.call import AttentionCall
from ..kernels.dispatch import check_tensors, compute
from .base import Pattern


@dataclass(frozen=True)
class Operator:
    """Base class of all operators.

    A subclass is a frozen dataclass decorated with ``@register("operator", "its_name")``; its fields are its
    hyper-parameters, and patterns may be among them. It implements :meth:`run`.
    """

    registered_name: ClassVar[str] = ""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: SelectContext, state: State, impl: str
    ) -> tuple[Tensor, Tensor, State]:
        """What :func:`attend` promises, for arguments that it has checked."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; fields at their default are left out."""
        return {"operator": self.registered_name, **serial.to_json(self)}

    @classmethod
    def from_json(cls, data: Any, where: str = "operator") -> Self:
        """Build the operator that ``data["operator"]`` names; raises :class:`ConfigError` naming field, value and fix."""
        if not isinstance(data, Mapping) or not isinstance(data.get("operator"), str):
            raise ConfigError(f'{where} is {data!r}; expected an object such as {{"operator": "rettention", …}}.')
        found = registry.lookup("operator", data["operator"], where)
        fields = {k: v for k, v in data.items() if k != "operator"}
        return serial.from_json(found, fields, f"{where} ({data['operator']})")


def attend(
    method: Pattern | Operator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: SelectContext,
    state: State = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, State]:
    """Attention by a pattern (over what it selects) or by an operator.

    Args:
        method: who attends to whom, or how.
        q: ``(B, H, Nq, D)``; k: ``(B, Hkv, Nk, D)``; v: ``(B, Hkv, Nk, Dv)``.
        ctx: the call's surroundings; ``ctx.base`` must have these lengths.
        state: what the previous call for this request and layer returned, or None.
        impl: a name in ``foveal.kernels.IMPLEMENTATIONS``.

    Returns:
        ``(out, lse, state)``: ``(B, H, Nq, Dv)``, ``(B, H, Nq)``, and what the next call needs.

    Raises:
        ShapeError: tensors that do not fit each other or ``ctx.base``, or a state made for other shapes.
    """
    check_tensors(q, k, v)
    if (ctx.base.q_len, ctx.base.kv_len) != (q.shape[2], k.shape[2]):
        raise ShapeError(
            f"ctx.base is made for {ctx.base.q_len} queries and {ctx.base.kv_len} keys; expected {q.shape[2]} and {k.shape[2]}, "
            "the lengths of q and k."
        )
    if isinstance(method, Operator):
        return method.run(q, k, v, ctx, state, impl)
    layout, state = method.select(q, k, ctx, state)
    scale = 1.0 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale
    out, lse = compute(AttentionCall(q, k, v, layout, ctx.base, scale), impl)
    assert lse is not None
    return out, lse, state


def dense_impl(impl: str) -> str:
    """What runs the dense part of an operator: an implementation of block masks may not give its log-sum-exp."""
    return impl if impl in ("reference", "gather") else "auto"
