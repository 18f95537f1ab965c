"""Channel attention inside networks of torchvision's and of timm's shape, none of which is imported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ModelError
from foveal.layers.channel import (
    ChannelAttention,
    build_channel_attention,
    channel_gates,
    insert_channel_attention,
    remove_channel_attention,
)
from foveal.models.resnet import MobileNetV2, ResNet


class TimmBlock(nn.Module):
    """A bottleneck as timm writes it: an empty ``se`` slot that its own forward calls."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(width), nn.ReLU()
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.se: nn.Module | None = None
        self.act3 = nn.ReLU()
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        return self.act3(x + shortcut)


class TimmResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.maxpool = nn.Identity()
        self.layer1 = nn.Sequential(TimmBlock(8, 8, 1), TimmBlock(32, 8, 1))
        self.layer2 = nn.Sequential(TimmBlock(32, 16, 2))
        self.global_pool, self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        return self.fc(self.global_pool(self.layer2(self.layer1(x))))


def ours() -> ResNet:
    """The same network in torchvision's shape."""
    return ResNet((2, 1), bottleneck=True, classes=5, width=8, small=True)


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def busy(model: nn.Module, seed: int = 0) -> nn.Module:
    """Eval mode, with statistics and weights that are nowhere special."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=g) + 0.5)
            elif value.is_floating_point():
                value.copy_(0.2 * torch.randn(value.shape, generator=g))
    return model.eval()


SHAPES = pytest.mark.parametrize("network", [ours, TimmResNet])


@SHAPES
@pytest.mark.parametrize("kind", ["eca", "se", "gct", "srm"])
def test_the_gate_comes_before_the_shortcut(network, kind):
    """Every block computes relu(gate ⊙ bn(…) + shortcut), written down again here."""
    model = network()
    options = {"reduction": 4} if kind == "se" else {}
    found = insert_channel_attention(model, kind, **options)
    busy(model)
    assert [(i.block, i.stage, i.channels) for i in found] == [
        ("layer1.0", "layer1", 32), ("layer1.1", "layer1", 32), ("layer2.0", "layer2", 64)
    ]  # fmt: skip
    for item in found:
        block = model.get_submodule(item.block)
        x = torch.randn(2, block.conv1.in_channels, 6, 6, generator=torch.Generator().manual_seed(1))
        out = block.conv1(x)
        out = block.conv2(nn.functional.relu(_norm(block.bn1, out)))
        out = _norm(block.bn3, block.conv3(nn.functional.relu(_norm(block.bn2, out))))
        gated = item.module(out)
        short = x if block.downsample is None else _norm(block.downsample[1], block.downsample[0](x))
        assert not torch.allclose(gated, out)
        torch.testing.assert_close(block(x), nn.functional.relu(gated + short))


def _norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


def test_both_shapes_have_the_same_weights_and_the_same_output():
    theirs, mine = TimmResNet(), ours()
    for model in (theirs, mine):
        insert_channel_attention(model, "eca")
    busy(theirs)
    mine.load_state_dict(theirs.state_dict())
    assert "layer1.0.se.conv.weight" in mine.state_dict()
    torch.testing.assert_close(mine.eval()(pictures()), theirs(pictures()))


@SHAPES
def test_old_checkpoints_load_and_removal_leaves_nothing(network):
    model = busy(network())
    before, weights = model(pictures()), {k: v.clone() for k, v in model.state_dict().items()}
    insert_channel_attention(model, "eca")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(".se." in key for key in missing) and len(missing) == 3
    assert not torch.allclose(model(pictures()), before)
    assert remove_channel_attention(model) == 3
    assert torch.equal(model(pictures()), before) and list(model.state_dict()) == list(weights)
    assert not any(m._forward_hooks for m in model.modules())
    assert remove_channel_attention(model) == 0


@SHAPES
def test_copies_train_and_compile_by_themselves(network):
    model = network()
    insert_channel_attention(model, "eca")
    busy(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.layer1[0].se.conv.weight)
    assert not torch.allclose(twin(pictures()), model(pictures()))
    model.train()(pictures()).sum().backward()
    assert all(float(b.se.conv.weight.grad.abs().sum()) > 0 for b in model.layer1)
    assert all(b.se.conv.weight.grad is None for b in twin.layer1)
    compiled = torch.compile(twin, backend="aot_eager")
    torch.testing.assert_close(compiled(pictures()), twin(pictures()))


def test_one_value_per_stage():
    model = ours()
    found = insert_channel_attention(model, "eca", kernel_size=[3, 7])
    assert [i.module.kernel_size for i in found] == [3, 3, 7] and [i.parameters for i in found] == [3, 3, 7]
    remove_channel_attention(model)
    with pytest.raises(ConfigError, match="lists 3 values and the network has 2 stages"):
        insert_channel_attention(model, "eca", kernel_size=[3, 5, 7])
    assert not any(isinstance(m, ChannelAttention) for m in model.modules())


def test_where_chooses_blocks():
    model = ours()
    found = insert_channel_attention(model, "se", where=lambda name, block: name.startswith("layer2"), reduction=8)
    assert [i.block for i in found] == ["layer2.0"]


def test_mobile_networks_of_both_shapes():
    model = MobileNetV2(classes=5)
    found = insert_channel_attention(model, "eca")
    assert len(found) == 17 and [i.channels for i in found][:3] == [16, 24, 24] and found[-1].channels == 320

    class Inverted(nn.Module):
        """timm's: its own ``se`` slot sits in the middle, on other channels, and stays empty."""

        def __init__(self) -> None:
            super().__init__()
            self.conv_pw, self.bn1 = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
            self.conv_dw, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
            self.se, self.conv_pwl, self.bn3 = nn.Identity(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.se(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x)))))
            return x + self.bn3(self.conv_pwl(y))

    block = busy(Inverted())
    net = nn.Sequential(block)
    x = torch.randn(2, 4, 5, 5)
    plain = net(x) - x
    (item,) = insert_channel_attention(net, "eca", kernel_size=3)
    torch.testing.assert_close(net(x), x + item.module(plain))
    assert isinstance(block.se, nn.Identity) and remove_channel_attention(net) == 1


def test_gates_of_one_run():
    model = ours()
    insert_channel_attention(model, "eca")
    busy(model)
    gates = channel_gates(model, pictures())
    assert {k: tuple(v.shape) for k, v in gates.items()} == {
        "layer1.0.se": (2, 32, 1, 1), "layer1.1.se": (2, 32, 1, 1), "layer2.0.se": (2, 64, 1, 1)
    }  # fmt: skip
    model.train()
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    again = channel_gates(model, pictures())
    assert model.training and not model.layer1.training and model.layer2.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(again[k], gates[k]) for k in gates)
    assert all(float(v.min()) > 0 and float(v.max()) < 1 for v in gates.values())
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, ChannelAttention))


def test_dtype_and_mode_follow_the_network():
    model = busy(ours()).double()
    item = insert_channel_attention(model, "srm")[0]
    assert item.module.bn.weight.dtype == torch.float64 and not item.module.training
    assert model(pictures().double()).dtype == torch.float64


def test_what_cannot_be_done_is_said():
    with pytest.raises(ModelError, match="no residual block"):
        insert_channel_attention(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "eca")
    for network in (ours, TimmResNet):
        model = network()
        insert_channel_attention(model, "eca")
        with pytest.raises(ModelError, match="already"):
            insert_channel_attention(model, "se")
    with pytest.raises(ConfigError, match="Did you mean 'eca'"):
        insert_channel_attention(ours(), "ecca")
    with pytest.raises(ConfigError, match="ResNet depth is 20"):
        ResNet.of_depth(20)


def test_published_sizes():
    """Parameters of the published networks, exactly; ECA's 80 need the kernels of the released weights."""
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    with torch.device("meta"):
        found = {depth: count(ResNet.of_depth(depth)) for depth in (18, 34, 50, 101, 152)}
        assert found == {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
        assert count(MobileNetV2()) == 3_504_872

        def added(depth: int, kind: str, **options: object) -> int:
            return sum(i.parameters for i in insert_channel_attention(ResNet.of_depth(depth), kind, **options))

        assert added(50, "eca", kernel_size=[3, 5, 5, 7]) == 80
        assert added(50, "eca") == 86
        assert added(101, "eca", kernel_size=[3, 3, 5, 7]) == 157
        assert added(50, "se") == 2_514_944
        assert build_channel_attention("se", 64).fc1.weight.shape == (4, 64)
