"""FE-LSD's backbone: two stems, shallow fusion twice, and stacked hourglasses that fuse the streams at every scale.

Both streams lie side by side in one tensor and grouped convolutions keep them apart. Other ways to use the streams are configurations
of the same network: one stream alone, or sums in place of the fusion blocks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, ShapeError, nearest
from ...layers.fusion import Bottleneck, DecoderFusion, ShallowFusion

Fusion = Literal["full", "add", "frame", "events"]
FUSIONS: tuple[Fusion, ...] = ("full", "add", "frame", "events")


class Merged(nn.Module):
    """One map of the streams without attention: a residual block on their sum; of one stream, on the stream."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res = Bottleneck(channels)

    def forward(self, *streams: Tensor) -> Tensor:
        return self.res(torch.stack(streams).sum(0))


class Hourglass(nn.Module):
    """Streams ``(B, streams · C, H, W)`` go down by pooling; at every scale they become one map, and the maps go up again.

    Args:
        channels: C. depth: times that the sides are halved. size: H and W. fusion: ``"full"`` merges by decoder fusion whose keys
            lie on the coarsest grid; others by :class:`Merged`.
    """

    def __init__(self, channels: int, depth: int, size: tuple[int, int], fusion: Fusion, num_heads: int) -> None:
        super().__init__()
        self.streams = streams_of(fusion)
        both = self.streams * channels
        self.merge = nn.ModuleList(
            DecoderFusion(channels, 2 ** (depth - i), (size[0] >> i, size[1] >> i), num_heads)
            if fusion == "full"
            else Merged(channels)
            for i in range(depth + 1)
        )
        self.down = nn.ModuleList(Bottleneck(both, groups=self.streams) for _ in range(depth + 1))
        self.up = nn.ModuleList(Bottleneck(channels) for _ in range(depth))
        self.out = nn.Sequential(
            Bottleneck(channels), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        depth, skips = len(self.up), []
        for i in range(depth):
            skips.append(self.merge[i](*x.chunk(self.streams, 1)))
            x = self.down[i](nn.functional.max_pool2d(x, 2))
        y = self.merge[depth](*self.down[depth](x).chunk(self.streams, 1))
        for i in reversed(range(depth)):
            y = nn.functional.interpolate(self.up[i](y), scale_factor=2) + skips[i]
        return self.out(y)


class FusionBackbone(nn.Module):
    """A map per stack, ``(B, features, H / 4, W / 4)``.

    Args:
        channels: of the frame and of the event tensor. inplanes: of the stems. features: per stream and of the maps.
        depth, stacks: of the hourglasses. size: height and width of the input.
        fusion: ``"full"`` (FE-LSD), ``"add"`` (streams that never meet before each scale's sum), ``"frame"`` or ``"events"`` alone.
        num_heads: of the attention in decoder fusion.

    Raises:
        ConfigError: an unknown fusion, or sides that 4 · 2^depth does not divide.
    """

    def __init__(
        self,
        channels: tuple[int, int] = (3, 10),
        *,
        inplanes: int = 64,
        features: int = 256,
        depth: int = 4,
        stacks: int = 2,
        size: tuple[int, int] = (512, 512),
        fusion: Fusion = "full",
        num_heads: int = 8,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise ConfigError(f"FusionBackbone.fusion is {fusion!r}. {nearest(str(fusion), FUSIONS)}")
        if min(depth, stacks) < 1 or size[0] % (4 << depth) or size[1] % (4 << depth):
            raise ConfigError(
                f"FusionBackbone has size={size}, depth={depth}, stacks={stacks}; expected at least one of each and sides that "
                f"{4 << max(depth, 0)} divides."
            )
        self.channels, self.features, self.fusion, self.streams = channels, features, fusion, streams_of(fusion)
        read = {"frame": channels[:1], "events": channels[1:]}.get(fusion, channels)
        n, full, coarse = self.streams, fusion == "full", (size[0] // 4, size[1] // 4)
        self.stems = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, inplanes, 7, 2, 3), nn.BatchNorm2d(inplanes), nn.ReLU()) for c in read
        )
        self.early = ShallowFusion(inplanes) if full else None
        self.body = nn.Sequential(
            Bottleneck(n * inplanes, 2 * n * inplanes, n), nn.MaxPool2d(2),
            Bottleneck(2 * n * inplanes, n * features, n), Bottleneck(n * features, groups=n),
        )  # fmt: skip
        self.late = ShallowFusion(features) if full else None
        self.stacks = nn.ModuleList(Hourglass(features, depth, coarse, fusion, num_heads) for _ in range(stacks))
        self.back = nn.ModuleList(nn.Conv2d(features, features, 1) for _ in range(stacks - 1))

    def forward(self, frame: Tensor, events: Tensor) -> list[Tensor]:
        """Maps from ``frame (B, C, H, W)`` and ``events (B, E, H, W)``; a stream that the fusion leaves out is not read.

        Raises:
            ShapeError: other channels, or streams of different sizes.
        """
        if (frame.shape[1], events.shape[1]) != self.channels or frame.shape[2:] != events.shape[2:]:
            raise ShapeError(
                f"frame has shape {tuple(frame.shape)} and events {tuple(events.shape)}; expected {self.channels} channels and equal sides."
            )
        read = {"frame": (frame,), "events": (events,)}.get(self.fusion, (frame, events))
        streams = tuple(stem(x) for stem, x in zip(self.stems, read, strict=True))
        x = self.body(torch.cat(streams if self.early is None else self.early(*streams), 1))
        if self.late is not None:
            x = torch.cat(self.late(*x.chunk(2, 1)), 1)
        maps = []
        for i, stack in enumerate(self.stacks):
            maps.append(stack(x))
            if i < len(self.back):
                x = x + self.back[i](maps[-1]).repeat(1, self.streams, 1, 1)
        return maps


def streams_of(fusion: Fusion) -> int:
    return 1 if fusion in ("frame", "events") else 2
