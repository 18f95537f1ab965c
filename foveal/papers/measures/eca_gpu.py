"""ECA-Net's claim about throughput: ResNet-50 without gates, with ECA and with squeeze-and-excitation, on one GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.channel import insert_channel_attention
from ...models.resnet import ResNet
from . import gpu
from .eca import RELEASED, count
from .results import write_result

SHARE = 0.93
GATES: dict[str, tuple[str, dict[str, Any]]] = {
    "ECA": ("eca", {"kernel_size": RELEASED[50]}),
    "SE": ("se", {"reduction": 16}),
}


def networks(
    device: str, dtype: torch.dtype, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64
) -> dict[str, ResNet]:
    """The plain network, and the same weights with each kind of gate; channels last."""
    found = {}
    for name in ("plain", *GATES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = ResNet(blocks, bottleneck=True, width=width)
        if name in GATES:
            kind, options = GATES[name]
            insert_channel_attention(net, kind, **options)
        found[name] = net.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return found


def measure_throughput(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    batch: int = 256,
    side: int = 224,
    blocks: tuple[int, ...] = (3, 4, 6, 3),
    width: int = 64,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``throughput``: pictures per second over the plain network's; inference is judged, training is reported.

    Args:
        side: of the pictures, in pixels. blocks: of each stage. width: of the first stage.
    """
    nets = networks(device, dtype, blocks, width)
    make = torch.Generator().manual_seed(0)
    pictures = torch.randn(batch, 3, side, side, generator=make).to(device, dtype, memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), generator=make).to(device)
    added = {name: count(net) - count(nets["plain"]) for name, net in nets.items() if name in GATES}
    inference = gpu.timed(
        {n: partial(net.eval(), pictures) for n, net in nets.items()}, repeats, device, baseline="plain"
    )
    steps = {n: partial(_step, net.train(), pictures, labels) for n, net in nets.items()}
    training = gpu.timed(steps, repeats, device, baseline="plain", backward=True)
    share = {
        phase: {name: round(1 / row["ratio"][name], 4) for name in GATES}
        for phase, row in (("inference", inference), ("training", training))
    }
    judged = share["inference"]
    numbers = {
        "ours": "; ".join(f"{phase}: ECA {s['ECA']:.3f}, SE {s['SE']:.3f} of plain" for phase, s in share.items()),
        "criterion": {"ECA over plain": SHARE, "order": "ECA ≥ SE"},
        "frames_per_second_over_plain": share,
        "frames_per_second": {
            phase: {name: round(1e3 * batch / ms, 1) for name, ms in row["ms"].items()}
            for phase, row in (("inference", inference), ("training", training))
        },
        "added_parameters": added,
        "batch": batch,
        "side": side,
    }
    ahead = judged["ECA"] >= judged["SE"]
    decided = gpu.verdict(ahead and judged["ECA"] >= SHARE, ahead)
    return write_result("eca", "throughput", decided, numbers, seed=0, out=out)


def _step(net: nn.Module, pictures: Tensor, labels: Tensor) -> Any:
    """Forward and backward of one training step."""
    loss = nn.functional.cross_entropy(net(pictures).float(), labels)
    return torch.autograd.grad(loss, list(net.parameters()))
