"""The one attention function that foveal registers in transformers: record → intervene → select → compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, Selection
from ..core.density import Density, measure
from ..core.errors import ShapeError, UnsupportedError
from ..core.layouts import Layout
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from ..patterns import Pattern
from ..policies.policy import Rule
from .interventions import Moment, intervene
from .masks import HostMask, base_from_tensor
from .queries import unrotated
from .recompute import Forgotten, in_backward
from .requests import cache_keys

if TYPE_CHECKING:
    from .handle import Handle

HARMLESS = {
    "position_ids", "cache_position", "use_cache", "sliding_window", "output_hidden_states", "return_dict", "num_items_in_batch",
    "logits_to_keep", "labels", "shift_labels", "target_dtype", "layer_idx", "deterministic", "token_type_ids", "mm_token_type_ids", "inputs_embeds",
    "is_causal", "output_router_logits", "causal_mask", "position_embeddings", "interpolate_pos_encoding", "bool_masked_pos",
    "past_key_values", "encoder_attention_mask", "encoder_hidden_states", "input_ids", "softcap", "s_aux",
}  # fmt: skip
"""Keyword arguments of attention functions that are honoured, or that say nothing beyond what mask and tensors already say
(sliding windows are in the mask); anything else that is set is refused by name."""

OUTPUT_ATTENTIONS = "output_attentions=True asks for N×N weights, which foveal never builds. Use foveal.lens, or attn_implementation='eager'."


@dataclass(frozen=True, eq=False)
class AttentionEvent:
    """One attention call, as probes see it.

    Attributes:
        layer_index, layer_name, role: where; index −1 for cross-attention.
        call: tensors (after RoPE, GQA not repeated), base mask, scale, softcap, bias.
        sink_logits: ``(H,)`` learned sink logits, or None.
        ctx: what the pattern was told.
        layout: what the pattern kept (None: everything, or rules of their own for some heads).
        out: ``(B, H, Nq, Dv)`` result, after interventions.
        parts: query heads that share a layout, and that layout (None: everything), in which heads are numbered from 0.
    """

    layer_index: int
    layer_name: str
    role: str
    call: AttentionCall
    sink_logits: Tensor | None
    ctx: SelectContext
    layout: Layout | None
    out: Tensor
    parts: tuple[tuple[tuple[int, ...], Layout | None], ...] = ()


@dataclass
class Surroundings:
    """What the pre-hook of an attention module saw of its call."""

    cache: Any = None
    cache_layer: int | None = None
    keys_before: tuple[Tensor, int] | None = None
    hidden_states: Tensor | None = None
    position_ids: Tensor | None = None
    cross: bool = False


@dataclass
class Forward:
    """One forward of the attached model.

    Attributes:
        selections: what layers decided so far. calls: attention calls so far, where layers share a module.
        positions: position ids that the innermost model was given.
        checkpointed: whether backward will run the layers again.
        tensors: the caller's own 4-D masks, read once for all layers.
    """

    selections: dict[int, Selection] = field(default_factory=dict)
    calls: int = 0
    positions: Tensor | None = None
    checkpointed: bool = False
    tensors: dict[tuple[int, ...], tuple[Tensor, BaseMask]] = field(default_factory=dict)

    def read_tensor(self, mask: Tensor, q_len: int, kv_len: int, shift: int, cross: bool) -> BaseMask:
        """The base mask of a 4-D tensor."""
        version = -1 if mask.is_inference() else mask._version
        key = (id(mask), version, q_len, kv_len, shift, cross)
        if key not in self.tensors:  # the tensor is held as well, so that its id stays taken
            self.tensors[key] = (mask, base_from_tensor(mask, q_len, kv_len, shift, cross))
        return self.tensors[key][1]


def refuse_unhonoured(module: nn.Module, dropout: float, kwargs: Mapping[str, Any]) -> None:
    """Raise :class:`UnsupportedError` naming the first option that foveal would otherwise ignore."""
    name = type(module).__name__
    if dropout:
        raise UnsupportedError(
            f"{name} asks for attention dropout {dropout:g}; foveal has none. Set the config's attention dropout to 0, or call model.eval()."
        )
    if kwargs.get("output_attentions"):
        raise UnsupportedError(OUTPUT_ATTENTIONS)
    for key in ("head_mask", "cross_attn_head_mask"):
        if kwargs.get(key) is not None:
            raise UnsupportedError(
                f"{name} passes {key!r} to its attention, which foveal does not honour. Leave it out, or run without foveal."
            )
    for key, item in kwargs.items():
        if item is not None and item is not False and key not in HARMLESS:
            raise UnsupportedError(
                f"{name} passes the keyword argument {key!r} to its attention, which foveal does not know. "
                "Leave it out, or run this model without foveal."
            )


def base_mask(
    handle: Handle,
    module: nn.Module,
    mask: Any,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    around: Surroundings,
) -> tuple[BaseMask, int]:
    """The base mask of a call and the tokens before row 0."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if isinstance(mask, HostMask):
        if mask.owner is not None and mask.owner is not handle:
            raise UnsupportedError(
                "this forward began under another foveal.attach(...) than the one active now; most often backward() recomputes a checkpointed "
                "forward outside its `with` block. Call backward() inside the block that ran the forward."
            )
        base = mask.base
        if base.q_len != q_len or base.kv_len != kv_len:
            raise UnsupportedError(
                f"{type(module).__name__} has {q_len} queries and {kv_len} keys, but its mask was made for {base.q_len} and {base.kv_len}; "
                "this model family is not supported."
            )
        return base, mask.q_offset
    if isinstance(mask, Tensor):
        before = kv_len - q_len
        if around.cache is not None and around.cache_layer is not None:
            before = int(around.cache.get_seq_length(around.cache_layer)) - q_len
        cross = around.cross or handle.sites[module].index < 0
        base = handle.live.forward.read_tensor(mask, q_len, kv_len, 0 if cross else min(before, kv_len - q_len), cross)
        return base, 0 if cross else before
    if mask is not None:
        raise UnsupportedError(
            f"attention_mask is a {type(mask).__name__}; expected foveal's own mask, a 4-D tensor, or None."
        )
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    base = BaseMask.build(q_len, kv_len, causal=causal, device=query.device)
    return base, base.shift if causal else 0


def attend(
    handle: Handle, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any,
    dropout: float, scaling: float | None, is_causal: bool | None, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Attention of one module under a handle; ``(B, Nq, H, Dv)`` as transformers expects it."""
    refuse_unhonoured(module, dropout, kwargs)
    site, around = handle.sites[module], handle.live.surroundings.get(module) or Surroundings()
    handle.watch_recompute(module)
    if handle.across is not None:
        scale = _scale(module, query.shape[-1]) if scaling is None else scaling
        out = handle.across(module, query, key, value, mask, float(scale), kwargs)
        handle.live.reached.add(module)
        return out.transpose(1, 2).contiguous()
    base, q_offset = base_mask(handle, module, mask, query, key, is_causal, around)
    base = base.to(query.device)
    _refuse_resets(base, around)
    given = key, value
    if base.causal and base.kv_len > base.shift + base.q_len:
        end = base.shift + base.q_len  # a static cache is longer than what has been written
        memo = ("written", end)
        base = base.cache.setdefault(memo, base.crop_keys(end))
        key, value = key[:, :, :end], value[:, :, :end]
    cross = site.index < 0 or around.cross
    index = -1 if cross else handle.next_index(site)
    scale = _scale(module, query.shape[-1]) if scaling is None else scaling
    call = AttentionCall(query, key, value, None, base, float(scale), kwargs.get("softcap"), None, return_lse=False)
    _check(call, site.name)
    sinks = kwargs.get("s_aux")
    context = SelectContext(
        base=base, layer_index=index, layer_name=site.name, num_layers=handle.num_layers, role="cross" if cross else "self",
        q_offset=q_offset, scale=float(scale), positions=around.position_ids, hidden_states=around.hidden_states,
        pre_rope_q=unrotated(handle.live.queries.pop(module, None), query), earlier=_earlier(handle, mask, index),
    )  # fmt: skip
    rule = Rule() if cross else handle.policy.rule(index)
    parts: Parts
    if handle.host is not None:
        own = {"dropout": dropout, "scaling": scaling, **kwargs} | (
            {} if is_causal is None else {"is_causal": is_causal}
        )
        out, parts = handle.host(module, query, *given, mask, own).transpose(1, 2), _whole(call, None)
    else:
        out, parts = _by_heads(handle, call, rule, context, around, sinks)
    layout = parts[0][1] if len(parts) == 1 else None
    if handle.acts:
        moment = Moment(call.replace(layout=layout), context, around.cache, bool(rule.heads))
        out = intervene(handle.acts, moment, sinks, handle.impl, out)
    handle.live.reached.add(module)
    for probe in handle.probes:
        probe(AttentionEvent(index, site.name, context.role, call, sinks, context, layout, out, parts))
    return out.transpose(1, 2).contiguous()


def _scale(module: nn.Module, dim: int) -> float:
    """Scale of a module that passes none: GPT-2's eager attention reads it from the module in older transformers."""
    scale = dim**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    if getattr(module, "scale_attn_by_inverse_layer_idx", False):
        scale /= float(getattr(module, "layer_idx", 0)) + 1
    return scale


def _earlier(handle: Handle, mask: Any, index: int) -> Mapping[int, Selection]:
    """What the layers before this one selected in the forward that runs, or that a checkpointed backward runs again."""
    if not in_backward():
        return handle.live.forward.selections
    if not isinstance(mask, HostMask) or handle.shared:
        return Forgotten()
    return {layer: chosen for layer, chosen in mask.selections.items() if layer < index}


def _check_needs(pattern: Pattern, ctx: SelectContext) -> None:
    """Refuse patterns that need what transformers does not tell an attention function."""
    for need in sorted(pattern.needs):
        if getattr(ctx, need, None) is None:
            raise UnsupportedError(
                f"the pattern {pattern.registered_name!r} needs {need}, which transformers does not give to {ctx.layer_name}; "
                "use another pattern in this layer."
            )


def _check(call: AttentionCall, name: str) -> None:
    if call.q.shape[1] % call.k.shape[1]:
        raise ShapeError(
            f"{name} has {call.q.shape[1]} query heads and {call.k.shape[1]} key heads; num_heads must be a multiple of num_kv_heads."
        )


def _refuse_resets(base: BaseMask, around: Surroundings) -> None:
    """Packed documents meet a cache: the host then leaks across documents, so refuse rather than honour half of it."""
    positions = around.position_ids
    if around.cache is None or positions is None or base.q_len < 2 or positions.dim() != 2 or not base.causal:
        return
    memo = "resets"
    if memo not in base.cache:
        falls = positions[:, 1:] <= positions[:, :-1]
        if base.valid is not None:  # the host numbers padding anyhow
            real = base.valid[:, base.shift : base.shift + base.q_len]
            falls = falls & real[:, 1:] & real[:, :-1]
        base.cache[memo] = bool(falls.any())
    if base.cache[memo]:
        raise UnsupportedError(
            "position_ids reset inside a row (packed documents) while a cache is in use; transformers then lets documents see each other. "
            "Pass use_cache=False, so that packing is honoured."
        )


Parts = tuple[tuple[tuple[int, ...], Layout | None], ...]
"""As in :class:`AttentionEvent`."""


def _whole(call: AttentionCall, layout: Layout | None) -> Parts:
    return ((tuple(range(call.q.shape[1])), layout),)


def _by_heads(handle: Handle, call: AttentionCall, rule: Rule, ctx: SelectContext, around: Surroundings, sinks: Tensor | None) -> tuple[Tensor, Parts]:  # fmt: skip
    if not rule.heads:
        out, layout = _select_and_compute(handle, call, rule, ctx, around, sinks, 0)
        return out, _whole(call, layout)
    heads, group = call.q.shape[1], call.groups
    spans: list[tuple[list[int], Rule]] = []
    taken: set[int] = set()
    for first, last, own in rule.heads:
        if last >= heads:
            raise ShapeError(
                f"the policy names head {last} of layer {ctx.layer_index}, which has {heads} heads (0 to {heads - 1})."
            )
        spans.append((list(range(first, last + 1)), own))
        taken |= set(range(first, last + 1))
    rest = [h for h in range(heads) if h not in taken]
    if rest:
        spans.append((rest, Rule(rule.prefill, rule.decode)))
    out = call.v.new_empty(*call.q.shape[:3], call.v.shape[-1])
    parts = []
    for members, own in spans:
        chosen = torch.tensor(members, device=call.q.device)
        whole = (
            members == list(range(members[0], members[0] + len(members)))
            and members[0] % group == 0
            and len(members) % group == 0
        )
        kv = (
            torch.arange(members[0] // group, (members[-1] + 1) // group, device=call.q.device)
            if whole
            else chosen // group
        )
        part = call.replace(q=call.q[:, chosen], k=call.k[:, kv], v=call.v[:, kv])
        got, layout = _select_and_compute(
            handle, part, own, ctx, around, None if sinks is None else sinks[chosen], 1 + members[0]
        )
        out = out.index_copy(1, chosen, got)
        parts.append((tuple(members), layout))
    return out, tuple(parts)


def _select_and_compute(
    handle: Handle,
    call: AttentionCall,
    rule: Rule,
    ctx: SelectContext,
    around: Surroundings,
    sinks: Tensor | None,
    span: int,
) -> tuple[Tensor, Layout | None]:
    pattern = rule.pattern(ctx.decoding)
    _check_needs(pattern, ctx)
    slot = (ctx.layer_index, span)
    state = handle.requests.get(around.cache, slot, ctx.q_offset, around.keys_before, pattern.after_move)
    with torch.no_grad():
        layout, state = pattern.select(call.q.detach(), call.k.detach(), ctx, state)
    seen = ctx.q_offset + call.base.q_len
    handle.requests.put(around.cache, slot, state, seen, cache_keys(around.cache, around.cache_layer))
    if span == 0 and not in_backward():
        handle.live.forward.selections[ctx.layer_index] = Selection.of(layout, state, call.q, call.k)
    if handle.measuring and ctx.layer_index >= 0:
        got = measure(layout, call.base, call.q.shape[0], call.q.shape[1], call.k.shape[1])
        phase = handle.measured.setdefault("decode" if ctx.decoding else "prefill", {})
        phase[ctx.layer_index] = phase.get(ctx.layer_index, Density(0, 0, 0.0, 0.0)) + got
    out, _ = compute(call.replace(layout=layout), handle.impl, sinks)
    return out, layout
