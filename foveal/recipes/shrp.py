"""SHRP's recipe (arXiv 2512.20635): convert layers, train, count which head the tokens use, keep that one.

    shrp.convert(model, last=6)           # in place; then train as before, router and expander with a larger learning rate
    usage = shrp.count_usage(model, batches)
    kept = shrp.prune(model, usage)       # plain modules: no router, no data-dependent flow

Works on torch's ``nn.TransformerEncoderLayer`` and on BERT, RoBERTa and XLM-R of transformers. Collapse onto one head is the
goal, so there is no balancing loss; :class:`Watch` gives the entropy of usage to look at, or to add to the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..core.errors import ConfigError, DataError, nearest
from ..layers.shrp import Expander, ExpertAttention, PrunedExpertLayer
from .shrp_hosts import Converted, ConvertedBert, ConvertedTorch, parts_of, places, tokens_of
from .shrp_usage import Evaluating, Run, Usage, Watch, call, count_usage

__all__ = ["Kept", "Usage", "Watch", "convert", "count_usage", "prune"]


@dataclass(frozen=True)
class Kept:
    """What pruning kept of a layer: its index, the head, and the share of tokens that had chosen it."""

    layer: int
    head: int
    share: float


def chosen(total: int, layers: Iterable[int] | None, first: int | None, last: int | None) -> list[int]:
    """Indices of the layers that ``layers``, ``first`` or ``last`` name; exactly one of them is given.

    Raises:
        ConfigError: none or several are given, or one is out of range.
    """
    if sum(x is not None for x in (layers, first, last)) != 1:
        raise ConfigError("convert takes exactly one of layers=[…], first=k, last=k.")
    count = first if last is None else last
    if layers is None:
        assert count is not None
        if not 0 <= count <= total:
            raise ConfigError(f"first or last is {count}; expected 0 to {total} layers.")
        return list(range(count)) if last is None else list(range(total - count, total))
    found = sorted(set(layers))
    if found and not 0 <= found[0] <= found[-1] < total:
        raise ConfigError(f"layers is {found}; expected indices from 0 to {total - 1}.")
    return found


def convert(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    *,
    first: int | None = None,
    last: int | None = None,
    expander: int = 96,
    share_expander: Literal["layer", "model"] = "layer",
    init: Literal["scratch", "svd", "heads"] = "scratch",
    calibration: Any = None,
    run: Run = call,
    keep_ffn: bool = False,
    **options: Any,
) -> list[int]:
    """Replace encoder layers by :class:`ExpertAttention`, in place, with the heads' own projections and the last norm.

    Args:
        model: with torch's or BERT's encoder layers. layers, first, last: which; exactly one.
        expander: hidden width. share_expander: one per layer, or one for the ``"model"``.
        init: ``"svd"`` fits the expander's last map to what the original layer added on ``calibration``, a batch for ``run``, from
            the mean of its heads, by least squares; ``"heads"`` from each head alone, as routing will use them; layers are fitted from
            the first to the last.
        keep_ffn: keep the wide feed-forward part, an ablation. options: of :class:`ExpertAttention`.

    Returns:
        The indices of the converted layers.

    Raises:
        ModelError, UnsupportedError: layers of another kind. ConfigError: options that do not go together, or a layer twice.
    """
    for name, value, known in (
        ("share_expander", share_expander, ("layer", "model")),
        ("init", init, ("scratch", "svd", "heads")),
    ):
        if value not in known:
            raise ConfigError(f"convert: {name} is {value!r}. {nearest(str(value), known)}")
    if init != "scratch" and (calibration is None or share_expander == "model"):
        raise ConfigError(f"convert: init={init!r} needs a calibration batch and share_expander='layer'.")
    where = places(model)
    shared: Expander | None = None
    indices = chosen(len(where), layers, first, last)
    for index in indices:
        parent, name, host = where[index]
        if isinstance(host, Converted):
            raise ConfigError(f"convert: layer {index} is converted already.")
        parts = parts_of(host)
        dim = parts.weights[0].shape[1]
        if share_expander == "model" and shared is None:
            shared = Expander(parts.head_dim, dim, expander)
        layer = ExpertAttention(
            dim, parts.num_heads, head_dim=parts.head_dim, expander=shared or expander, dropout=parts.dropout,
            eps=parts.norm.eps, ffn=parts.ffn if keep_ffn else None, **options,
        ).to(parts.weights[0])  # fmt: skip
        with torch.no_grad():
            for target, weight, bias in zip((layer.q, layer.k, layer.v), parts.weights, parts.biases, strict=True):
                target.weight.copy_(weight)
                target.bias.copy_(bias)
        layer.norm.load_state_dict(parts.norm.state_dict())
        if init != "scratch":
            _fit(model, host, layer, parts.norm, calibration, run, init == "svd")
        stand_in = ConvertedTorch if isinstance(host, nn.TransformerEncoderLayer) else ConvertedBert
        setattr(parent, name, stand_in(layer.train(host.training)))
    return indices


def _fit(
    model: nn.Module, host: nn.Module, layer: ExpertAttention, norm: nn.Module, batch: Any, run: Run, mean: bool
) -> None:
    """Least squares of the expander's last map: from the mean head, or from every head, to what ``host`` adds to its input before
    its last norm."""
    seen: dict[str, Any] = {}
    hooks = [  # hooks also keep torch's layer off its fused path, which would pass by the norm
        host.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(tokens=tokens_of(args, kwargs)), with_kwargs=True
        ),
        norm.register_forward_pre_hook(lambda _, args: seen.update(sum=args[0])),
    ]
    try:
        with torch.no_grad(), Evaluating(model):
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if "sum" not in seen:
        raise DataError(
            "convert: init='svd' or 'heads' ran the calibration batch, and it did not pass the layers to convert."
        )
    with torch.no_grad():
        x, valid = seen["tokens"]
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
        heads = layer.experts(x, valid)
        heads = heads.mean(1, keepdim=True) if mean else heads
        features = layer.expander.features(heads).transpose(1, 2)[real].flatten(0, 1).double()
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
        wanted = (seen["sum"] - x)[real].double().repeat_interleave(heads.shape[1], 0)
        solution = torch.linalg.lstsq(features, wanted, driver="gelsd").solution
        layer.expander.outer.weight.copy_(solution[:-1].T)
        layer.expander.outer.bias.copy_(solution[-1])


def prune(model: nn.Module, usage: Usage, layers: Iterable[int] | None = None) -> list[Kept]:
    """Keep the most used head of each routed layer, in place; ties go to the lowest index, pruned layers stay as they are.

    A ``"prob"`` gate is folded into the expander by its mean over the tokens that chose the kept head.

    Args:
        usage: of this model. layers: which; default all that ``usage`` counted.

    Raises:
        ConfigError: ``usage`` does not count a layer that is to be pruned.
    """
    where, kept = places(model), []
    for index in usage.layers if layers is None else sorted(set(layers)):
        if index not in usage.layers:
            raise ConfigError(f"prune: layer {index} was not counted; expected some of {list(usage.layers)}.")
        converted = where[index][2]
        if not isinstance(converted, Converted) or isinstance(converted.layer, PrunedExpertLayer):
            continue
        row = usage.layers.index(index)
        counts = usage.counts[row].tolist()
        head = max(range(len(counts)), key=lambda h: (counts[h], -h))
        scale = float(usage.gates[row, head]) if converted.layer.gate == "prob" else 1.0
        converted.layer = converted.layer.pruned(head, scale)
        kept.append(Kept(index, head, float(usage.share[row, head])))
    return kept
