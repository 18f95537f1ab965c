"""MambAttention's network: parameter counts to the unit, its parts' counts, masks, gradients and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveal.core.errors import ConfigError, ShapeError
from foveal.models.mambattention import MambAttention
from foveal.models.mambattention.network import DilatedDense


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("attention", "total"), [("shared", 2_325_841), ("separate", 2_392_913), ("none", 2_258_769)])
def test_identity_1_parameter_counts(attention, total):
    assert count(MambAttention(block={"attention": attention})) == total


def test_identity_1_parameter_counts_of_the_parts():
    model = MambAttention()
    block = model.blocks[0]
    assert count(block) == 294_656
    assert count(block.attentions) == 16_768
    core = block.cores[0]
    assert count(core.norms[0]) + count(core.mixers[0]) == 65_344 and count(core.out) == 8_256
    assert count(model.encoder) == 382_592
    assert count(model.magnitude) + count(model.mask) == 382_287
    assert count(model.phase) + count(model.parts) == 382_338


def small() -> MambAttention:
    torch.manual_seed(0)
    return MambAttention(8, 1, 33, {"num_heads": 2})


def test_identity_10_masks_lie_between_0_and_2_and_phases_on_the_circle():
    model = small()
    magnitude, phase = torch.rand(2, 6, 33), torch.randn(2, 6, 33)
    mask, angle = model.decode(torch.stack([magnitude, phase], 1))
    assert float(mask.detach().min()) > 0 and float(mask.detach().max()) < 2
    assert float(angle.detach().abs().max()) <= torch.pi
    estimate, again = model(magnitude, phase)
    torch.testing.assert_close(estimate, mask * magnitude)
    assert torch.equal(again, angle)


def test_every_parameter_gets_a_gradient():
    model = small()
    magnitude, angle = model(torch.rand(1, 6, 33), torch.randn(1, 6, 33))
    (magnitude.sum() + angle.sin().sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_dense_block_puts_new_outputs_in_front_and_dilates_time():
    torch.manual_seed(0)
    dense = DilatedDense(4, depth=3)
    x = torch.randn(1, 4, 9, 5)
    one = dense.layers[0](x)
    two = dense.layers[1](torch.cat([one, x], 1))
    torch.testing.assert_close(dense(x), dense.layers[2](torch.cat([two, one, x], 1)))
    assert [layer[0].dilation for layer in dense.layers] == [(1, 1), (2, 1), (4, 1)]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MambAttention(8, 1, 32), ConfigError, "bins is 32"),
        (lambda: small()(torch.rand(1, 6, 31), torch.rand(1, 6, 31)), ShapeError, "33"),
        (lambda: small()(torch.rand(1, 6, 33), torch.rand(1, 5, 33)), ShapeError, "phase"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
