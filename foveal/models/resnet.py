"""Residual networks (arXiv 1512.03385) and MobileNetV2 (arXiv 1801.04381), with the module names of torchvision's.

They are hosts for channel attention: published sizes for exact counts, and small ones that a CPU trains.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.errors import ConfigError

DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
"""Depth → (blocks of each stage, whether they are bottlenecks)."""

MOBILE_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""MobileNetV2: (expansion, channels, blocks, stride) of every stage."""


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut; the stride is in the 3×3 one."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x)))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Image classifier.

    Args:
        blocks: of each stage. bottleneck: kind of block. classes: outputs. channels: of the images.
        width: of the first stage; it doubles from stage to stage.
        small: for small images: a 3×3 stem without stride or pooling in place of 7×7, stride 2, and max pooling.

    Raises:
        ConfigError: no stage, or a stage without blocks.
    """

    def __init__(
        self,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        *,
        bottleneck: bool = False,
        classes: int = 1000,
        channels: int = 3,
        width: int = 64,
        small: bool = False,
    ) -> None:
        super().__init__()
        if not blocks or min(blocks) < 1:
            raise ConfigError(f"ResNet.blocks is {blocks}; expected at least one stage, each of at least one block.")
        self.conv1 = _conv(channels, width, 3) if small else _conv(channels, width, 7, 2)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        kind = Bottleneck if bottleneck else BasicBlock
        inputs, self.stages = width, len(blocks)
        for stage, count in enumerate(blocks):
            own = width << stage
            layers = []
            for i in range(count):
                layers.append(kind(inputs, own, 2 if stage and not i else 1))
                inputs = own * kind.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, classes)

    @classmethod
    def of_depth(cls, depth: int, **options: int) -> ResNet:
        """ResNet-18, 34, 50, 101 or 152.

        Raises:
            ConfigError: another depth.
        """
        if depth not in DEPTHS:
            raise ConfigError(f"ResNet depth is {depth}; expected one of {', '.join(map(str, DEPTHS))}.")
        blocks, bottleneck = DEPTHS[depth]
        return cls(blocks, bottleneck=bottleneck, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, classes)`` logits of images ``(B, C, height, width)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection; a shortcut where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.use_res_connect = stride == 1 and inputs == outputs
        expand = [nn.Sequential(_conv(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6())] if expansion != 1 else []
        depthwise = nn.Sequential(_conv(hidden, hidden, 3, stride, hidden), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.conv = nn.Sequential(*expand, depthwise, _conv(hidden, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """Image classifier of width 1.0.

    Args:
        classes: outputs. channels: of the images.
    """

    def __init__(self, classes: int = 1000, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(_conv(channels, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6())]
        inputs = 32
        for expansion, outputs, count, stride in MOBILE_STAGES:
            for i in range(count):
                layers.append(InvertedResidual(inputs, outputs, 1 if i else stride, expansion))
                inputs = outputs
        layers.append(nn.Sequential(_conv(inputs, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, classes)`` logits of images ``(B, C, height, width)``."""
        return self.classifier(self.features(x).mean((2, 3)))
