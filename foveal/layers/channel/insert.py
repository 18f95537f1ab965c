"""Putting channel attention into a user's network: recognised by structure, never by class name or library.

Residual blocks with ``conv1, bn1, conv2, bn2[, conv3, bn3]`` and ``downsample`` (ResNets of torchvision's and timm's shape), inverted
residuals with ``use_res_connect`` and a ``conv`` that ends in a normalisation (torchvision's MobileNetV2), and those with
``conv_pw … conv_pwl`` and a last ``bn3`` (timm's). The gate comes after the block's last normalisation, before the shortcut is
added (ECA-Net, section 4). A block that has an empty ``se`` slot gets its gate there; elsewhere a hook on the normalisation calls
it. Either way it is a submodule of the block, so ``state_dict``, ``.to()``, deepcopy and optimisers see it, under the same name
``….se.…`` in both shapes, and all old names stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, ModelError
from .base import ChannelAttention
from .build import build_channel_attention


@dataclass(frozen=True)
class Inserted:
    """One gate: the ``block`` it sits in, the block's ``stage``, ``channels``, and the ``parameters`` it adds."""

    block: str
    stage: str
    channels: int
    parameters: int
    module: ChannelAttention


class _Apply:
    """Forward hook of a normalisation: multiply its output by the gate that the block holds under ``name``."""

    def __init__(self, block: nn.Module, name: str) -> None:
        self.block, self.name = block, name

    def __call__(self, norm: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        gated: Tensor = getattr(self.block, self.name)(out)
        return gated


def _width(norm: object) -> int | None:
    """Channels of a normalisation, or None for another module."""
    found = getattr(norm, "num_features", None) or getattr(norm, "num_channels", None)
    return found if isinstance(norm, nn.Module) and isinstance(found, int) else None


def last_norm(block: nn.Module) -> nn.Module | None:
    """The last normalisation of a residual block, or None if the module does not look like one."""

    def holds(*names: str) -> bool:
        return all(isinstance(getattr(block, n, None), nn.Module) for n in names)

    candidate: Any = None
    if hasattr(block, "downsample"):
        if holds("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"):
            candidate = block.bn3
        elif holds("conv1", "bn1", "conv2", "bn2") and not hasattr(block, "conv3"):
            candidate = block.bn2
    elif hasattr(block, "use_res_connect") and isinstance(getattr(block, "conv", None), nn.Sequential):
        inner = block.conv
        candidate = inner[-1] if isinstance(inner, nn.Sequential) and len(inner) else None
    elif holds("conv_pw", "conv_dw", "conv_pwl", "bn3"):
        candidate = block.bn3
    return candidate if _width(candidate) is not None else None


def residual_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Every residual block: its name, itself, and its last normalisation."""
    for name, block in model.named_modules():
        norm = last_norm(block)
        if norm is not None:
            yield name, block, norm


def insert_channel_attention(
    model: nn.Module, kind: str = "eca", *, where: Callable[[str, nn.Module], bool] | None = None, **options: Any
) -> list[Inserted]:
    """Put a gate into every residual block, in place.

    Args:
        model: any network with residual blocks as described in this module.
        kind: a name of :func:`~foveal.layers.channel.channel_attention_names`.
        where: ``(name, block)`` → whether the block gets one; default all.
        options: of the mechanism. A list gives one value per stage (the containers of the blocks, in order), such as
            ``kernel_size=[3, 5, 5, 7]`` for the published ResNet-50 weights of ECA.

    Returns:
        What was inserted, in the order of the network. New modules have the device and dtype of their normalisation and the
        model's training mode.

    Raises:
        ModelError: no residual block was found, or one has channel attention already.
        ConfigError: unknown mechanism or option; a list whose length is not the number of stages.
    """
    found = [b for b in residual_blocks(model) if where is None or where(b[0], b[1])]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no residual block that was recognised and wanted; expected modules with conv1, bn1, conv2, bn2 "
            "and downsample, or inverted residuals. For another network, put build_channel_attention(...) into its blocks yourself."
        )
    stages = list(dict.fromkeys(name.rpartition(".")[0] for name, _, _ in found))
    for word, value in options.items():
        if isinstance(value, list) and len(value) != len(stages):
            raise ConfigError(
                f"{word} lists {len(value)} values and the network has {len(stages)} stages ({', '.join(stages)}); expected one value per stage."
            )
    plan: list[tuple[nn.Module, nn.Module, str, bool, Inserted]] = []
    for name, block, norm in found:
        slot, inner = _slot(block)
        if any(isinstance(m, ChannelAttention) for m in block.children()) or (inner and block.se is not None):
            raise ModelError(
                f"block {name!r} has channel attention already. Take it out first; remove_channel_attention(model) does so for foveal's."
            )
        stage = name.rpartition(".")[0]
        own = {k: v[stages.index(stage)] if isinstance(v, list) else v for k, v in options.items()}
        width = _width(norm)
        assert width is not None
        gate = build_channel_attention(kind, width, **own)
        like = next((p for p in norm.parameters()), None)
        if like is not None:
            gate = gate.to(device=like.device, dtype=like.dtype)
        gate.train(model.training)
        added = sum(p.numel() for p in gate.parameters())
        plan.append((block, norm, slot, inner, Inserted(name, stage, width, added, gate)))
    for block, norm, slot, inner, item in plan:  # nothing is changed before all of it is known to fit
        setattr(block, slot, item.module)
        if not inner:
            norm.register_forward_hook(_Apply(block, slot))
    return [item for *_, item in plan]


def _slot(block: nn.Module) -> tuple[str, bool]:
    """The attribute that takes the gate, and whether the block itself calls it there."""
    if hasattr(block, "se"):
        return ("channel_attention", False) if hasattr(block, "conv_pwl") else ("se", True)
    return "se", False


def remove_channel_attention(model: nn.Module) -> int:
    """Take out what :func:`insert_channel_attention` put in; returns how many gates there were."""
    count = 0
    for _, block, norm in list(residual_blocks(model)):
        hooks = [(key, hook) for key, hook in norm._forward_hooks.items() if isinstance(hook, _Apply)]
        for key, hook in hooks:
            del norm._forward_hooks[key]
            delattr(block, hook.name)
            count += 1
        if not hooks and isinstance(getattr(block, "se", None), ChannelAttention):
            block.se = None  # type: ignore[assignment]
            count += 1
    return count


@torch.no_grad()
def channel_gates(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The gates of all channel attention while the model runs once on the given arguments: module name → ``(B, C, …)``.

    The model runs in eval mode and gets its modes back.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: ChannelAttention, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            found[name] = module.gate(*inputs)

        return hook

    modes = {m: m.training for m in model.modules()}
    model.eval()
    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, ChannelAttention)]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found
