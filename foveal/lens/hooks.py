"""Stable points inside any decoder that foveal knows, and edits at them, for prompts of up to a few hundred tokens.

==========  ======================  =====================================================================
point       shape                   what it is
==========  ======================  =====================================================================
``resid``   ``(R, T, C)``           what enters the block
``q``       ``(R, H, T, D)``        queries as the softmax uses them (after rotary positions)
``k``       ``(R, Hkv, T, D)``      keys, likewise; not repeated for grouped heads
``v``       ``(R, Hkv, T, Dv)``     values
``weights`` ``(R, H, T, N)``        attention probabilities over all keys of the prompt
``z``       ``(R, H, T, Dv)``       head outputs before the output projection
``mlp``     ``(R, T, C)``           what the MLP (or experts) adds
==========  ======================  =====================================================================

Everything else of the block (norms, gates, parallel or sequential MLP) is the model's own code. Prompts are padded on the right: in a
causal model nothing before the padding can see it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, UnsupportedError, nearest
from ..hf.families import AttentionSite
from ..hf.own import decoder_sites, own_attention
from ..kernels.call import AttentionCall, compute_dtype

POINTS = ("resid", "q", "k", "v", "weights", "z", "mlp")
MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")

Edit = Callable[[int, Tensor], Tensor]
"""``(layer, value) → value`` at one kind of point; returning its argument changes nothing."""


@dataclass(frozen=True, eq=False)
class Record:
    """One full forward: per layer what later runs stand on.

    Attributes:
        ids: ``(B, N)`` tokens. k, v: per layer ``(B, Hkv, N, D)``. z: per layer ``(B, H, N, Dv)``.
        mlp: per layer ``(B, N, C)``; empty where the family has no MLP module. resid: likewise, what entered each block.
        allowed: per layer ``(B or 1, N, N)`` bool, who may see whom.
    """

    ids: Tensor
    k: list[Tensor]
    v: list[Tensor]
    z: list[Tensor]
    mlp: list[Tensor]
    resid: list[Tensor]
    allowed: list[Tensor]

    @property
    def heads(self) -> list[int]:
        """Query heads of every layer."""
        return [z.shape[1] for z in self.z]


@dataclass(frozen=True, eq=False)
class Rows:
    """What a run computes: row ``r`` is prompt ``prompt[r]`` at ``position[r]``.

    Attributes:
        prompt: ``(R,)`` index into the recorded batch. position: ``(R, T)`` positions; the last one gives the logits.
    """

    prompt: Tensor
    position: Tensor

    def at(self, where: Tensor) -> Tensor:
        """``(R, T)`` bool: is this position one of ``where[prompt]`` ``(B, K)``?"""
        return (self.position[:, :, None] == where[self.prompt][:, None, :]).any(-1)

    def take(self, recorded: Tensor) -> Tensor:
        """``(R, H, T, D)`` of a recorded ``(B, H, N, D)``."""
        return recorded[self.prompt[:, None], :, self.position].transpose(1, 2)


class _Stop(Exception):
    """The last layer that matters has been reached."""


class Points:
    """A decoder with its points; the model itself is not changed.

    Args:
        model: a decoder-only transformers model in ``eval`` mode.

    Raises:
        UnsupportedError: a family whose layers cannot be told apart or reached.
        ConfigError: a model in training mode, where dropout would blur every difference.
    """

    def __init__(self, model: nn.Module) -> None:
        if model.training:
            raise ConfigError("the model is in training mode; expected eval mode: call model.eval() first.")
        self.model = model
        self.sites = decoder_sites(model)
        self.blocks = [model.get_submodule(site.name.rpartition(".")[0]) for site in self.sites]
        self.mlps = [next((m for n, m in b.named_children() if n in MLP_NAMES), None) for b in self.blocks]
        self._plain_blocks = False
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def record(
        self, ids: Tensor, edits: Mapping[str, Edit] | None = None, *, weights: Callable[[int, Tensor], None] | None = None
    ) -> tuple[Record, Tensor]:  # fmt: skip
        """One full forward over ``ids`` ``(B, N)``: what happened, and the logits ``(B, N, V)``; ``weights`` is shown every layer's."""
        found = Record(ids, [], [], [], [], [], [])

        def attention(site: AttentionSite, call: AttentionCall, sinks: Tensor | None) -> Tensor:
            q, k, v = (_apply(edits, n, site.index, t) for n, t in (("q", call.q), ("k", call.k), ("v", call.v)))
            if "dense" not in call.base.cache:
                call.base.cache["dense"] = call.base.dense(call.base.batch)
            allowed = call.base.cache["dense"]
            if bool(allowed.triu(1).any()):
                raise UnsupportedError(
                    f"{type(self.model).__name__} sees tokens to the right of its own; expected a causal decoder, where nothing before a patch "
                    "can change."
                )
            p = _apply(edits, "weights", site.index, probabilities(q, k, allowed, call, sinks))
            if weights is not None:
                weights(site.index, p)
            z = _apply(edits, "z", site.index, mix(p, v))
            found.k.append(k)
            found.v.append(v)
            found.z.append(z)
            found.allowed.append(allowed)
            return z

        with self._module_edits(edits, found), own_attention(self.model, attention):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return found, logits

    def run(
        self, record: Record, rows: Rows, edits: Mapping[str, Edit] | None = None, *, frozen: bool = False,
        first_layer: int = 0, last_layer: int | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Run the rows again on top of a record.

        Args:
            record: gives keys and values of all positions that ``rows`` leave out, or, when frozen, every head's output.
            rows: prompts and positions. edits: by point.
            frozen: heads put out what they put out in the record (before an edit of ``z``); then positions do not meet.
            first_layer: nothing is edited below it, so the blocks below are not computed.
            last_layer: end once q, k and v of this layer have been edited.

        Returns:
            ``(R, V)`` logits of each row's last position, or None when the run ended early.
        """

        def attention(site: AttentionSite, call: AttentionCall, sinks: Tensor | None) -> Tensor:
            i = site.index
            q, k, v = (_apply(edits, n, i, t) for n, t in (("q", call.q), ("k", call.k), ("v", call.v)))
            if i == last_layer:
                raise _Stop
            if frozen:
                return _apply(edits, "z", i, rows.take(record.z[i]))
            k, v = (_put(old[i][rows.prompt], new, rows.position) for old, new in ((record.k, k), (record.v, v)))
            mask = record.allowed[i]
            allowed = mask[rows.prompt % mask.shape[0]].gather(
                1, rows.position[..., None].expand(-1, -1, mask.shape[2])
            )
            p = _apply(edits, "weights", i, probabilities(q, k, allowed, call, sinks))
            return _apply(edits, "z", i, mix(p, v))

        extra: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_logits else {}
        ids = record.ids[rows.prompt[:, None], rows.position]
        try:
            with self._module_edits(edits), self._skip(record, rows, first_layer), own_attention(self.model, attention):
                out = self.model(input_ids=ids, position_ids=rows.position, use_cache=False, **extra)
        except _Stop:
            return None
        logits: Tensor = out.logits[:, -1]
        return logits

    @contextmanager
    def _module_edits(self, edits: Mapping[str, Edit] | None, into: Record | None = None) -> Iterator[None]:
        """Hooks at blocks and MLPs, for the points that attention does not see; ``into`` takes what passes there."""
        for name in edits or {}:
            if name not in POINTS:
                raise ConfigError(f"edits name the point {name!r}. {nearest(name, POINTS)}")
        if "mlp" in (edits or {}) and not all(self.mlps):
            raise UnsupportedError(
                f"{type(self.model).__name__} has no MLP module that foveal knows ({', '.join(MLP_NAMES)}); use freeze_mlps=False."
            )
        with ExitStack() as stack:
            for i, (block, mlp) in enumerate(zip(self.blocks, self.mlps, strict=True)):
                if "resid" in (edits or {}) or into is not None:
                    hook: Any = block.register_forward_pre_hook(_resid_hook(edits, into, i), with_kwargs=True)
                    stack.callback(hook.remove)
                if mlp is not None and ("mlp" in (edits or {}) or into is not None):
                    stack.callback(mlp.register_forward_hook(_mlp_hook(edits, into, i)).remove)
            if into is not None:
                stack.callback(self.blocks[0].register_forward_hook(self._look_at_block).remove)
            yield

    def _look_at_block(self, module: nn.Module, args: Any, output: Any) -> None:
        self._plain_blocks = isinstance(output, Tensor)

    @contextmanager
    def _skip(self, record: Record, rows: Rows, first: int) -> Iterator[None]:
        """Let the blocks below ``first`` pass their input on, and give block ``first`` what the record says enters it."""
        if first == 0 or not self._plain_blocks or any("forward" in vars(block) for block in self.blocks):
            yield
            return
        entering = record.resid[first][rows.prompt[:, None], rows.position]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entering})

        hook = self.blocks[first].register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        try:
            for block in self.blocks[:first]:
                vars(block)["forward"] = _pass_on
            yield
        finally:
            hook.remove()
            for block in self.blocks[:first]:
                vars(block).pop("forward", None)


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _apply(edits: Mapping[str, Edit] | None, name: str, layer: int, value: Tensor) -> Tensor:
    return edits[name](layer, value) if edits is not None and name in edits else value


def _resid_hook(edits: Mapping[str, Edit] | None, into: Record | None, layer: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = _apply(edits, "resid", layer, args[0] if args else kwargs["hidden_states"])
        if into is not None:
            into.resid.append(value)
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    return hook


def _mlp_hook(edits: Mapping[str, Edit] | None, into: Record | None, layer: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value = _apply(edits, "mlp", layer, output[0] if isinstance(output, tuple) else output)
        if into is not None:
            into.mlp.append(value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    return hook


def _put(old: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """``old`` ``(R, H, N, D)`` with ``new`` ``(R, H, T, D)`` at each row's positions."""
    return old.scatter(2, position[:, None, :, None].expand(new.shape), new)


def probabilities(q: Tensor, k: Tensor, allowed: Tensor, call: AttentionCall, sinks: Tensor | None) -> Tensor:
    """``(R, H, T, N)`` attention weights by the definition; rows that see nothing are 0.

    Args:
        q: ``(R, H, T, D)``. k: ``(R, Hkv, N, D)``. allowed: ``(R or 1, T, N)`` bool. call: gives scale and softcap.
        sinks: ``(H,)`` learned logits of a key without a value, or None.
    """
    kind = compute_dtype(q.dtype)
    repeat = q.shape[1] // k.shape[1]
    scores = (q.to(kind) @ k.to(kind).repeat_interleave(repeat, 1).transpose(-1, -2)) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(kind)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights if sinks is None else weights[..., :-1]


def mix(weights: Tensor, v: Tensor) -> Tensor:
    """``(R, H, T, Dv)`` values under the weights."""
    return (weights @ v.to(weights.dtype).repeat_interleave(weights.shape[1] // v.shape[1], 1)).to(v.dtype)
