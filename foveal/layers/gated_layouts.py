"""Published weights of gated attention: query and gate share one ``q_proj``, in one of two row orders.

``"per_group"`` (the authors' code): inside every key-value group the rows of its queries, then the rows of its gates.
``"per_head"`` (Qwen3-Next and Qwen3.5 in transformers): inside every head its query rows, then its gate rows.
With as many key-value heads as heads the two are the same; otherwise nothing in the shapes tells them apart, so the layout is always named.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError, UnsupportedError, nearest
from .gated import GatedAttention

LAYOUTS = ("per_group", "per_head")


def split_fused(
    fused: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, layout: str, granularity: str = "elementwise"
) -> tuple[Tensor, Tensor]:
    """Query rows ``(H·D, …)`` and gate rows ``(H·D or H, …)`` of a fused weight or bias.

    Args:
        fused: ``(H·D + gate rows, …)``. layout: ``"per_group"`` or ``"per_head"``. granularity: of the gate.

    Raises:
        ConfigError: an unknown layout or granularity. ShapeError: another number of rows.
    """
    groups, queries, gates = _rows(num_heads, num_kv_heads, head_dim, layout, granularity)
    if fused.shape[0] != groups * (queries + gates):
        raise ShapeError(
            f"the fused q_proj has {fused.shape[0]} rows; expected {groups * (queries + gates)} for {num_heads} heads of {head_dim} "
            f"with an {granularity} gate."
        )
    q, gate = fused.unflatten(0, (groups, -1)).split([queries, gates], 1)
    return q.flatten(0, 1), gate.flatten(0, 1)


def join_fused(
    query: Tensor, gate: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, layout: str, granularity: str = "elementwise"
) -> Tensor:  # fmt: skip
    """The inverse of :func:`split_fused`."""
    groups, queries, gates = _rows(num_heads, num_kv_heads, head_dim, layout, granularity)
    if query.shape[0] != groups * queries or gate.shape[0] != groups * gates:
        raise ShapeError(
            f"query and gate have {query.shape[0]} and {gate.shape[0]} rows; expected {groups * queries} and {groups * gates}."
        )
    return torch.cat([query.unflatten(0, (groups, queries)), gate.unflatten(0, (groups, gates))], 1).flatten(0, 1)


def _rows(num_heads: int, num_kv_heads: int, head_dim: int, layout: str, granularity: str) -> tuple[int, int, int]:
    """Groups of rows, and query and gate rows of each."""
    for name, value, known in (("layout", layout, LAYOUTS), ("granularity", granularity, ("elementwise", "headwise"))):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}. {nearest(value, known)}")
    groups = num_kv_heads if layout == "per_group" else num_heads
    heads = num_heads // groups
    return groups, heads * head_dim, heads * (head_dim if granularity == "elementwise" else 1)


def load_published(layer: GatedAttention, state: Mapping[str, Tensor], layout: str) -> None:
    """Copy the weights of a published attention module into ``layer``.

    Args:
        layer: gated at G1 by the input, head-specific; with ``norm_offset=1`` for ``"per_head"``.
        state: ``q_proj`` (fused), ``k_proj``, ``v_proj``, ``o_proj``, ``q_norm`` and ``k_norm``, with ``.weight`` or ``.bias``.
        layout: ``"per_group"`` for the authors' checkpoints; ``"per_head"`` for Qwen3-Next.

    Raises:
        ConfigError: an unknown layout. ShapeError: weights of other sizes, missing or left over.
        UnsupportedError: the layer has no gate of that kind.
    """
    granularity, gate_bias = _published_kind(layer)
    given = dict(state)
    for part in ("weight", "bias"):
        if f"q_proj.{part}" in given:
            heads = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
            query, gate = split_fused(given.pop(f"q_proj.{part}"), *heads, layout, granularity)
            given[f"q_proj.{part}"] = query
            if part == "weight":
                given["gate.proj.weight"] = gate
            elif gate_bias:
                given["gate.proj.bias"] = gate
            elif bool(gate.any()):
                raise UnsupportedError(
                    "the published gate has a bias; make the layer with GateConfig(init='identity')."
                )
    _check_norms(layer, layout)
    own = {name: tuple(p.shape) for name, p in layer.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in given.items()}
    if own != theirs:
        wrong = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        told = "; ".join(f"{n}: layer {own.get(n, 'has none')}, checkpoint {theirs.get(n, 'has none')}" for n in wrong)
        raise ShapeError(f"the checkpoint does not fit the layer: {told}.")
    layer.load_state_dict(given)


def published_state(layer: GatedAttention, layout: str) -> dict[str, Tensor]:
    """The inverse of :func:`load_published`."""
    granularity, _ = _published_kind(layer)
    state = dict(layer.state_dict())
    heads = (layer.num_heads, layer.num_kv_heads, layer.head_dim)
    gate = state.pop("gate.proj.weight")
    state["q_proj.weight"] = join_fused(state["q_proj.weight"], gate, *heads, layout, granularity)
    gate_bias = state.pop("gate.proj.bias", None)
    if "q_proj.bias" in state:
        rows = gate.new_zeros(gate.shape[0]) if gate_bias is None else gate_bias
        state["q_proj.bias"] = join_fused(state["q_proj.bias"], rows, *heads, layout, granularity)
    elif gate_bias is not None:
        raise UnsupportedError("the gate has a bias and q_proj has none; a fused q_proj cannot hold that.")
    _check_norms(layer, layout)
    return state


def _check_norms(layer: GatedAttention, layout: str) -> None:
    offset = 1.0 if layout == "per_head" else 0.0
    if layer.q_norm is not None and layer.q_norm.offset != offset:
        raise UnsupportedError(
            f"layout {layout!r} stores the weights of its norms minus {offset:g}; make the layer with norm_offset={offset:g} "
            f"(now {layer.q_norm.offset:g})."
        )


def _published_kind(layer: GatedAttention) -> tuple[str, bool]:
    """Granularity of the gate, and whether it has a bias."""
    config = None if layer.gate is None else layer.gate.config
    if (
        layer.gate is None
        or config is None
        or (config.position, config.kind, config.sharing) != ("G1", "input", "specific")
    ):
        raise UnsupportedError(
            f"published layouts hold a head-specific gate of the input at G1; this layer has {config}."
        )
    return config.granularity, layer.gate.proj.bias is not None
