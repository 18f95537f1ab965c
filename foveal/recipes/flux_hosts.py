"""Both branches of every layer, full and sparse, mixed by a gate: on foveal's own decoder and on transformers' decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, State
from ..core.errors import ModelError, UnsupportedError
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from ..layers.layer_router import LayerRouters
from ..models.blocks import SelfAttention
from ..models.decoder_lm import DecoderLM
from ..patterns import Operator, Pattern

NAME = "foveal_flux"
GateOf = Callable[[int, Tensor], Tensor]
"""(layer, logits ``(B, 2)``) → weight of full attention ``(B,)``."""


@dataclass(frozen=True, eq=False)
class TwoBranches(Operator):
    """``r·full + (1 − r)·sparse`` in every layer, for one batch; differentiable in the router.

    Attributes:
        routers: of the model. full, sparse: what the branches keep. gate: weight of the full branch.
        spans: ``(B, 2)`` first token of each row's prompt and one after its last. gates: r of each layer, filled as they run.
    """

    routers: LayerRouters
    full: Pattern
    sparse: Pattern
    gate: GateOf
    spans: Tensor
    gates: dict[int, Tensor] = field(default_factory=dict)

    def run(self, q: Tensor, k: Tensor, v: Tensor, ctx: SelectContext, state: State, impl: str) -> tuple[Tensor, Tensor, State]:  # fmt: skip
        call = AttentionCall(q, k, v, None, ctx.base, q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale)
        return self.mix(call, ctx, impl), q.new_zeros(q.shape[:3]), None  # nobody asks a mixture for its lse

    def mix(self, call: AttentionCall, ctx: SelectContext, impl: str = "auto", sinks: Tensor | None = None) -> Tensor:
        """``(B, H, N, Dv)`` mixed output of one layer; notes the layer's gate."""
        if ctx.pre_rope_q is None:
            raise UnsupportedError(
                f"Flux's routers read queries before rotation, which {ctx.layer_name or 'this layer'} does not give; this model cannot be routed."
            )
        with torch.autocast(call.q.device.type, enabled=False):
            logits = self.routers(ctx.layer_index, ctx.pre_rope_q, self.spans)
            r = self.gate(ctx.layer_index, logits)
        self.gates[ctx.layer_index] = r
        with torch.no_grad():
            layouts = [p.select(call.q.detach(), call.k.detach(), ctx)[0] for p in (self.full, self.sparse)]
        call = call.replace(return_lse=False)
        dense = compute(call.replace(layout=layouts[0]), impl, sinks)[0]
        if layouts[0] is None and layouts[1] is None:  # the window holds everything: one branch, no say for the router
            sparse = dense
        else:
            sparse = compute(call.replace(layout=layouts[1]), impl, sinks)[0]
        weight = r.to(dense.dtype)[:, None, None, None]
        return weight * dense + (1 - weight) * sparse


class Host(Protocol):
    """A model whose layers run both branches."""

    layers: int
    head_dim: int

    def forward(self, ids: Tensor, branches: TwoBranches) -> Tensor:
        """``(B, N, vocab)`` logits."""


class DecoderHost:
    """:class:`Host` of a :class:`~foveal.models.decoder_lm.DecoderLM`."""

    def __init__(self, model: DecoderLM) -> None:
        found = [m for m in model.modules() if isinstance(m, SelfAttention)]
        if len(found) != len(model.layers):
            raise UnsupportedError(
                f"{len(found)} of the model's {len(model.layers)} layers are rotary self-attention; Flux routes models of these alone."
            )
        self.layers, self.head_dim = len(model.layers), found[0].head_dim
        self._model = model

    def forward(self, ids: Tensor, branches: TwoBranches) -> Tensor:
        logits: Tensor = self._model(ids, run=self._model.begin(ids, branches))
        return logits


class TransformersHost:
    """:class:`Host` of a transformers decoder; made by :func:`host_of`.

    Batches are padded on the right, so causality alone keeps padding out of what is scored.
    """

    def __init__(self, model: Any) -> None:
        from ..hf.families import depth, sites

        found = [site for site in sites(model) if site.index >= 0]
        self.layers = depth(model, found)
        if self.layers > len(found):
            raise UnsupportedError(f"layers of {type(model).__name__} share a module; Flux needs a router of its own for each layer.")  # fmt: skip
        config = model.config.get_text_config()
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.model = model
        self._sites = {site.module: site for site in found}
        self._queries: dict[nn.Module, Tensor] = {}
        self._bases: dict[tuple[int, int | None], BaseMask] = {}
        self._branches: TwoBranches | None = None

    def forward(self, ids: Tensor, branches: TwoBranches) -> Tensor:
        self._branches = branches
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            self._branches = None
            self._queries.clear()
            self._bases.clear()
        if len(branches.gates) != self.layers:
            raise ModelError(
                f"{len(branches.gates)} of the {self.layers} layers of {type(self.model).__name__} went through transformers' attention interface; "
                "this model cannot be routed."
            )
        return logits

    @contextmanager
    def attached(self) -> Iterator[TransformersHost]:
        """The model with both branches in every layer; its own attention afterwards."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        from ..hf.queries import tap

        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        hooks = [hook for module in self._sites for hook in tap(module, self._queries.__setitem__)]
        before = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation(NAME)
            yield self
        finally:
            self.model.set_attn_implementation(before)
            for hook in hooks:
                hook.remove()

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
        dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        from ..hf.queries import unrotated

        site = self._sites.get(module)
        if self._branches is None or site is None:
            raise UnsupportedError(f"{type(module).__name__} runs Flux's two branches outside their training.")
        if not getattr(module, "is_causal", True) or query.shape[2] != key.shape[2] or dropout:
            raise UnsupportedError(
                f"{site.name} is bidirectional, attends to another sequence, or has attention dropout; Flux routes causal self-attention without dropout."
            )
        if kwargs.get("position_bias") is not None:
            raise UnsupportedError(f"{site.name} adds a position bias to its logits, which Flux's branches do not know.")  # fmt: skip
        length, memo = query.shape[2], (query.shape[2], sliding_window)
        if memo not in self._bases:  # one for all layers, so that a layout of lengths alone is made once
            self._bases[memo] = BaseMask.build(length, length, causal=True, window=sliding_window, device=query.device)
        base = self._bases[memo]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        ctx = SelectContext(
            base=base, layer_index=site.index, layer_name=site.name, num_layers=self.layers, scale=scale,
            pre_rope_q=unrotated(self._queries.pop(module, None), query),
        )  # fmt: skip
        call = AttentionCall(query, key, value, None, base, scale, softcap)
        out = self._branches.mix(call, ctx, sinks=s_aux)
        return out.transpose(1, 2).contiguous(), None


@contextmanager
def host_of(model: Any) -> Iterator[Host]:
    """A model ready to run both branches of its layers.

    Raises:
        UnsupportedError: a model that is neither a :class:`DecoderLM` nor a causal transformers model.
    """
    if isinstance(model, DecoderLM):
        yield DecoderHost(model)
        return
    with TransformersHost(model).attached() as host:
        yield host
