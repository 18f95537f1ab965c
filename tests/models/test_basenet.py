"""BaseNet: counts to the digit, the reordered stem, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError
from foveal.models.basenet import SETTINGS, BaseNet, paper_options


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def windows(batch: int = 3, electrodes: int = 6, samples: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(batch, electrodes, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def busy(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=g) + 0.5)
            elif value.is_floating_point():
                value.copy_(0.3 * torch.randn(value.shape, generator=g))
    return model.double().eval()


@pytest.mark.parametrize(
    ("sizes", "parameters", "lengths"),
    [
        ((22, 1000, 4), 3692, [62, 7]),
        ((3, 1000, 2), 2706, [62, 7]),
        ((44, 1000, 4), 4572, [62, 7]),
        ((3, 350, 2), 2546, [19, 2]),
    ],
)
def test_identity_1_sizes_without_attention(sizes, parameters, lengths):
    model = BaseNet(*sizes)
    assert count(model) == parameters and model.lengths == lengths


TABLE = {
    "se": (3820, {}),
    "gsop": (4120, {}),
    "fca": (4812, {}),
    "encnet": (4040, {}),
    "ge": (3692, {}),
    "ge θ": (4716, {"learned": True}),
    "ge θ+": (4844, {"learned": True, "mlp": True}),
    "gct": (3740, {}),
    "srm": (3756, {}),
    "srm cross": (4108, {"mlp": True}),
    "cbam": (3787, {}),
    "cat": (4601, {}),
    "catlite": (3848, {}),
}


@pytest.mark.parametrize("row", TABLE)
def test_identity_1_sizes_with_attention(row):
    """The paper also counts fixed filters: the cosines of FCA (C·T) and the five taps of CAT's blur."""
    name = row.split()[0]
    model = BaseNet(22, 1000, 4, name, **paper_options("2a", name, **TABLE[row][1]))
    slot = model.channel_attention_block.attention_block
    fixed = sum(b.numel() for key, b in slot.named_buffers() if key in ("weight", "gauss_filter.weight"))
    assert count(model) + fixed == TABLE[row][0]


def test_eca_counts_its_kernel():
    assert count(BaseNet(22, 1000, 4, "eca", kernel_size=3)) == 3695
    assert count(BaseNet(22, 1000, 4, "eca", **paper_options("2a", "eca"))) == 3701


@pytest.mark.parametrize("expansion", [1, 3])
def test_identity_9_the_reordered_stem_is_exact(expansion):
    model = busy(BaseNet(6, 256, 2, spatial_expansion=expansion))
    x, stem = windows(), model.input_block
    torch.testing.assert_close(stem.reordered(x), stem.convolve(x), atol=1e-10, rtol=1e-10)
    low = copy.deepcopy(stem).float()
    torch.testing.assert_close(low.reordered(x.float()), low.convolve(x.float()), atol=1e-4, rtol=1e-4)
    assert bool((stem.convolve(x) - stem.convolve(x * 0)).abs().max() > 1), "the input matters"


@pytest.mark.parametrize("length", [25, 10])
def test_the_reordered_stem_trains_like_the_written_one(length):
    """Output, gradients and running statistics, over two steps; an even kernel makes windows longer by one."""
    fast = BaseNet(6, 256, 2, "eca", kernel_size=3, drop_prob=0.0, temp_filter_length_inp=length).double().train()
    busy(fast).train()
    slow = copy.deepcopy(fast)
    slow.input_block.fast = False
    for seed in (0, 1):
        outs = [model(windows(seed=seed) + 0.5) for model in (fast, slow)]
        torch.testing.assert_close(*outs, atol=1e-8, rtol=1e-8)
        for out in outs:
            out.square().sum().backward()
    for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-7, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_reach_everything_in_both_orders():
    model = BaseNet(6, 256, 2, "eca", kernel_size=3, drop_prob=0.0).double()
    for training in (True, False):
        model.zero_grad()
        model.train(training)(windows()).square().sum().backward()
        assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())


def test_a_module_can_sit_in_the_slot():
    class Halve(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1:] == (16, 13)
            return x / 2

    plain, halved = busy(BaseNet(6, 256, 2)), busy(BaseNet(6, 256, 2, Halve()))
    last = plain.final_layer[1]
    torch.testing.assert_close(halved(windows()) - last.bias, (plain(windows()) - last.bias) / 2)


def test_gates_are_those_of_the_slot():
    model = busy(BaseNet(6, 256, 2, "ge"))
    gates = model.gates(windows())
    assert gates.shape == (3, 16, 1)
    seen = []
    model.channel_attention_block.attention_block.register_forward_hook(lambda m, args, out: seen.append(out / args[0]))
    model(windows())
    torch.testing.assert_close(seen[0], gates.expand_as(seen[0]))
    with pytest.raises(ConfigError, match="no channel attention"):
        BaseNet(6, 256, 2).gates(windows().float())


def test_short_windows():
    with pytest.raises(ConfigError, match=r"at least 180 samples.*shrink=True"):
        BaseNet(28, 50, 2)
    model = BaseNet(28, 50, 2, "fca", shrink=True)
    assert model.lengths[1] >= 1 and model(torch.randn(2, 28, 50)).shape == (2, 2)
    assert BaseNet(3, 180, 2).lengths == [8, 1]


def test_paper_options():
    assert paper_options("2a", "cbam") == {"reduction": 8, "kernel_size": 15}
    assert paper_options("hgd", "catlite") == {"reduction": 4}
    assert paper_options("iva", "encnet") == {"codewords": 2} and paper_options("2b", "gct") == {}
    assert set(SETTINGS) == {"2a", "2b", "hgd", "iva"}
    with pytest.raises(ConfigError, match="Did you mean 'hgd'"):
        paper_options("hdg", "se")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: BaseNet(6, 256, 2)(torch.zeros(2, 5, 256)), ShapeError, "6 electrodes, 256 samples"),
        (lambda: BaseNet(6, 256, 2, "ecca"), ConfigError, "Did you mean 'eca'"),
        (lambda: BaseNet(6, 256, 2, reduction=3), ConfigError, "without the name"),
        (lambda: BaseNet(6, 256, 2, "se", reduction=99), ConfigError, "expected at most 16"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
