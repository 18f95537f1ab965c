"""FE-LSD's fusion blocks: the identities of its spec sheet that concern them, and parameter counts to the unit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError
from foveal.layers.fusion import (
    Bottleneck,
    ChannelGate,
    DecoderFusion,
    InvertedResidualFFN,
    LightAttention,
    PixelNorm,
    ShallowFusion,
)

B, C, H, W = 2, 16, 8, 12


def maps(seed: int = 0, channels: int = C, size: tuple[int, int] = (H, W)) -> Tensor:
    return torch.randn(B, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(module: nn.Module) -> nn.Module:
    """In float64, with batch norms that do something in eval mode."""
    g = torch.Generator().manual_seed(5)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(torch.randn(part.num_features, generator=g))
            part.running_var.copy_(torch.rand(part.num_features, generator=g) + 0.5)
    return module.double().eval()


def shallow() -> ShallowFusion:
    torch.manual_seed(0)
    return made(ShallowFusion(C))


def test_identity_3_swapping_streams_and_parameters_swaps_outputs():
    model = shallow()
    other = copy.deepcopy(model)
    other.gate_a, other.gate_b, other.res_a, other.res_b = model.gate_b, model.gate_a, model.res_b, model.res_a
    with torch.no_grad():
        other.mix.weight.copy_(model.mix.weight.roll(C, 1))
    a, b = model(maps(1), maps(2))
    swapped = other(maps(2), maps(1))
    torch.testing.assert_close((swapped[1], swapped[0]), (a, b), atol=1e-12, rtol=1e-12)


def test_identity_3_without_the_last_convolution_a_enters_twice():
    model, a, b = shallow(), maps(1), maps(2)
    for res in (model.res_a, model.res_b):
        nn.init.zeros_(res.body[-1].weight)
        nn.init.zeros_(res.body[-1].bias)
    f = model.mix(torch.cat([a, b], 1))
    left, right = model(a, b)
    torch.testing.assert_close(left, 2 * a + b * model.gate_b(f), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(right, 2 * b + a * model.gate_a(f), atol=1e-12, rtol=1e-12)


def test_the_channel_gate_is_its_equation():
    torch.manual_seed(0)
    gate, x = ChannelGate(C, 4).double(), maps()
    first, second = gate.mlp[0].weight[..., 0, 0], gate.mlp[2].weight[..., 0, 0]
    total = sum(torch.relu(p @ first.T) @ second.T for p in (x.mean((2, 3)), x.flatten(2).amax(-1)))
    torch.testing.assert_close(gate(x)[..., 0, 0], torch.sigmoid(total), atol=1e-12, rtol=1e-12)


def test_identity_4_grouped_maps_keep_the_streams_apart():
    torch.manual_seed(0)
    model = made(nn.Sequential(Bottleneck(2 * C, 4 * C, groups=2), nn.MaxPool2d(2), Bottleneck(4 * C, groups=2)))
    x = maps(channels=2 * C).requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[:, : 2 * C].square().sum(), x)
    assert bool((grad[:, C:] == 0).all()) and bool((grad[:, :C] != 0).any())
    mixed = made(Bottleneck(2 * C))
    (grad,) = torch.autograd.grad(mixed(x)[:, :C].square().sum(), x)
    assert bool((grad[:, C:] != 0).any()), "without groups they mix"


def test_identity_5_without_reduction_and_positions_it_is_attention_over_pixels():
    torch.manual_seed(0)
    model = LightAttention(C, 1, (H, W), 4).double()
    nn.init.zeros_(model.rows)
    nn.init.zeros_(model.columns)
    x = maps()
    q, k, v = (f(x).flatten(2).mT.unflatten(-1, (4, -1)).transpose(1, 2) for f in (model.q, model.k, model.v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mT.unflatten(-1, (H, W))
    torch.testing.assert_close(model(x), model.out(y), atol=1e-12, rtol=1e-12)


def test_light_attention_with_reduction_and_positions_pixel_by_pixel():
    torch.manual_seed(0)
    model, x = LightAttention(C, 4, (H, W), 2).double(), maps()
    less = F.conv2d(x, model.reduce.weight, model.reduce.bias, stride=4)
    less = (less - less.mean(1, keepdim=True)) / (less.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    q, k, v = model.q(x), model.k(less), model.v(less)
    expected = torch.zeros_like(x)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        for i in range(H):
            for j in range(W):
                logits = []
                for m in range(2):
                    for n in range(3):
                        key = k[:, part, m, n] + model.rows[head, :, m, 0] + model.columns[head, :, 0, n]
                        logits.append((q[:, part, i, j] * key).sum(-1) / 8**0.5)
                weights = torch.softmax(torch.stack(logits, -1), -1)
                expected[:, part, i, j] = (weights[:, None] * v[:, part].flatten(2)).sum(-1)
    torch.testing.assert_close(model(x), model.out(expected), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("level", range(5))
def test_identity_5_keys_lie_on_an_8_by_8_grid_at_every_level(level):
    size, reduction = 128 >> level, 16 >> level
    model = LightAttention(8, reduction, (size, size), 2)
    assert model.rows.shape[2] == model.columns.shape[3] == 8
    seen = []
    model.k.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape[-2:])))
    with torch.no_grad():
        assert model(torch.zeros(1, 8, size, size)).shape == (1, 8, size, size)
    assert seen == [(8, 8)]


def test_other_sizes_interpolate_the_position_tables():
    torch.manual_seed(0)
    model = LightAttention(C, 2, (8, 8), 4).double()
    twice = model._places(8, 6)
    assert twice.shape == (4, 4, 8, 6)
    torch.testing.assert_close(
        twice[..., 0] - twice[..., 5],
        model._places(4, 6)[..., 0, :1].expand(-1, -1, 8) - model._places(4, 6)[..., 0, 5:].expand(-1, -1, 8),
    )
    assert model(maps(size=(16, 12))).shape == (B, C, 16, 12)
    nn.init.constant_(model.rows, 3.0)
    torch.testing.assert_close(
        model._places(9, 4)[:, :, :, 0] - model.columns[:, :, :, 0], torch.full((4, 4, 9), 3.0).double()
    )


def test_the_feed_forward_part_and_the_block_are_their_sequences():
    torch.manual_seed(0)
    ffn, x = made(InvertedResidualFFN(C)), maps()
    h = ffn.up[2](F.gelu(F.conv2d(x, ffn.up[0].weight, ffn.up[0].bias)))
    h = h + ffn.depth[2](F.gelu(F.conv2d(h, ffn.depth[0].weight, ffn.depth[0].bias, padding=1, groups=4 * C)))
    expected = ffn.down[1](F.conv2d(h, ffn.down[0].weight, ffn.down[0].bias))
    torch.testing.assert_close(ffn(x), expected, atol=1e-12, rtol=1e-12)
    model, a, b = made(DecoderFusion(C, 4, (H, W), 4)), maps(1), maps(2)
    y = model.norms[0](model.mix(torch.cat([a, b], 1)))
    y = y + model.attention(model.norms[1](y))
    y = y + model.ffn(model.norms[2](y))
    torch.testing.assert_close(model(a, b), model.norms[3](y), atol=1e-12, rtol=1e-12)
    normal = PixelNorm(C).double()(x)
    torch.testing.assert_close(normal.mean(1), torch.zeros(B, H, W, dtype=torch.float64), atol=1e-12, rtol=0)


def test_gradients_reach_everything():
    torch.manual_seed(0)
    both, one = ShallowFusion(C).double(), DecoderFusion(C, 4, (H, W), 4).double()
    one(*both(maps(1), maps(2))).square().sum().backward()
    for model in (both, one):
        for name, p in model.named_parameters():
            assert p.grad is not None and bool(p.grad.isfinite().all()), name


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


def test_identity_6_backbones_made_of_these_blocks_have_the_published_counts():
    """FE-ULSD's 62,269,440 and FE-HAWP's 63,748,370: stems, two shallow fusions, two stacks; HAWP adds heads and their feedback."""
    with torch.device("meta"):
        stems = count(nn.Conv2d(3, 64, 7), nn.Conv2d(10, 64, 7), nn.BatchNorm2d(64), nn.BatchNorm2d(64))
        early = count(Bottleneck(128, 256, 2), Bottleneck(256, 512, 2), Bottleneck(512, 512, 2))
        fusions = count(ShallowFusion(64), ShallowFusion(256))
        levels = count(*(DecoderFusion(256, s, (8 * s, 8 * s)) for s in (16, 8, 4, 2, 1)))
        encoder = 5 * count(Bottleneck(512, groups=2))
        decoder = 5 * count(Bottleneck(256)) + count(nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256))
        again = count(nn.Conv2d(256, 256, 1))
        maps_out = (3, 1, 1, 2, 2)
        heads = sum(count(nn.Conv2d(256, 64, 3), nn.Conv2d(64, n, 1)) for n in maps_out)
        scores = count(nn.Conv2d(sum(maps_out), 256, 1))
    ulsd = stems + early + fusions + 2 * (levels + encoder + decoder) + again
    assert ulsd == 62_269_440
    assert ulsd + 2 * heads + scores == 63_748_370


def test_round_trips_autocast_and_compile():
    torch.manual_seed(0)
    model, a, b = made(DecoderFusion(C, 4, (H, W), 4)).float(), maps(1).float(), maps(2).float()
    expected = model(a, b)
    twin = made(DecoderFusion(C, 4, (H, W), 4)).float()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(a, b), expected) and torch.equal(copy.deepcopy(model)(a, b), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager")(a, b), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(a, b).float(), expected, atol=0.2, rtol=0.2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LightAttention(C, 1, (8, 8), 3), ConfigError, "num_heads=3"),
        (lambda: LightAttention(C, 3, (8, 8), 4), ConfigError, "reduction=3"),
        (lambda: Bottleneck(6, groups=4), ConfigError, "groups=4"),
        (lambda: LightAttention(C, 4, (8, 8), 4)(torch.zeros(1, C, 8, 10)), ShapeError, "multiples of the reduction 4"),
        (lambda: ShallowFusion(C)(torch.zeros(1, C, 4, 4), torch.zeros(1, C, 4, 5)), ShapeError, r"\(1, 16, 4, 5\)"),
        (lambda: DecoderFusion(C, 1, (4, 4))(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)), ShapeError, "16"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
