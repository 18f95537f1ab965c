"""MambAttention's block: one attention for both axes, along the intended axis, and the identities of its spec sheet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError
from foveal.layers.mamba import BidirectionalMamba
from foveal.layers.time_frequency import (
    MambAttentionBlock,
    ResidualAttention,
    SharedTimeFrequencyAttention,
    along,
)

K, T, F = 16, 7, 5


def block(**changes: object) -> MambAttentionBlock:
    torch.manual_seed(0)
    core = lambda dim: BidirectionalMamba(dim, expand=2, d_state=4)  # noqa: E731
    return MambAttentionBlock(K, 4, **{"core": core, **changes}).double()


def grid(seed: int = 0) -> Tensor:
    return torch.randn(2, K, T, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_residual_attention_is_torchs_multihead_attention_after_a_layer_norm():
    torch.manual_seed(0)
    ours, theirs = ResidualAttention(K, 4).double(), nn.MultiheadAttention(K, 4, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = grid().flatten(2).mT
    h = ours.norm(x)
    torch.testing.assert_close(ours(x), x + theirs(h, h, h, need_weights=False)[0], atol=1e-12, rtol=1e-12)


def test_identity_2_shared_is_one_object_and_stays_equal_over_a_step():
    model = block()
    assert len(model.attentions) == 1
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model(grid()).square().mean().backward()
    optimizer.step()
    twin = block(attention="separate")
    weights = model.state_dict()
    weights |= {
        k.replace("attentions.0", "attentions.1"): v for k, v in weights.items() if k.startswith("attentions.0")
    }
    twin.load_state_dict(weights)
    assert torch.equal(twin(grid()), model(grid()))
    with torch.no_grad():
        twin.attentions[1].qkv.weight.mul_(2)
    assert not torch.equal(twin(grid()), model(grid())), "the second module is really used"


def test_identity_3_with_everything_zero_the_block_is_the_identity():
    model = block()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(grid()), grid())


def test_identity_4_attention_of_one_token_and_of_equal_tokens():
    torch.manual_seed(0)
    layer = ResidualAttention(K, 4).double()
    x = grid()[:, :, 0, :1].mT
    v = layer.qkv(layer.norm(x))[..., 2 * K :]
    torch.testing.assert_close(layer(x), x + layer.out(v), atol=1e-12, rtol=1e-12)
    same = layer(x.expand(-1, 6, -1))
    torch.testing.assert_close(same, layer(x).expand(-1, 6, -1), atol=1e-12, rtol=1e-12)


def test_identity_11_attention_is_permutation_equivariant_along_its_axis_alone():
    """The released ancestor mixed the wrong axis: rows of the other axis must not see each other."""
    torch.manual_seed(0)
    layer, order = ResidualAttention(K, 4).double(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    x = grid()
    time = along(layer, x, 2)
    torch.testing.assert_close(along(layer, x[:, :, order], 2), time[:, :, order], atol=1e-12, rtol=1e-12)
    other = x.clone()
    other[..., 1] += 1
    rest = [0, 2, 3, 4]
    assert torch.equal(along(layer, other, 2)[..., rest], time[..., rest])
    frequency = along(layer, x, 3)
    other = x.clone()
    other[:, :, 2] += 1
    rest = [0, 1, 3, 4, 5, 6]
    assert torch.equal(along(layer, other, 3)[:, :, rest], frequency[:, :, rest])


def test_the_block_is_the_printed_sequence_of_steps():
    model, x = block(), grid()
    a = x.permute(0, 3, 2, 1).reshape(2 * F, T, K)
    a = model.attentions[0](a)
    a = a + model.cores[0](a)
    b = a.reshape(2, F, T, K).permute(0, 2, 1, 3).reshape(2 * T, F, K)
    b = model.attentions[0](b)
    b = b + model.cores[1](b)
    torch.testing.assert_close(model(x), b.reshape(2, T, F, K).permute(0, 3, 1, 2), atol=1e-12, rtol=1e-12)


def test_the_drop_in_attends_over_time_and_then_over_frequency_with_the_same_weights():
    torch.manual_seed(0)
    layer = SharedTimeFrequencyAttention(K, 4).double()
    rows = ResidualAttention(K, 4).double()
    rows.load_state_dict(layer.state_dict())
    assert torch.equal(layer(grid()), along(rows, along(rows, grid(), 2), 3))


def test_variants_differ_as_they_say():
    x = grid()
    weights = block().state_dict()
    found = {}
    for name, changes in {
        "paper": {},
        "order": {"order": "mamba first"},
        "time": {"axes": "time"},
        "none": {"attention": "none"},
    }.items():
        model = block(**changes)
        model.load_state_dict({k: v for k, v in weights.items() if k in model.state_dict()})
        found[name] = model(x)
    outs = list(found.values())
    assert not any(torch.allclose(a, b) for i, a in enumerate(outs) for b in outs[:i])
    other = x.clone()
    other[..., 1] += 1
    model = block(axes="time")
    assert torch.equal(model(other)[..., 2:], model(x)[..., 2:]), "time alone never crosses bins"
    lstm = block(core=lambda dim: Recurrent(dim))
    assert lstm(x).shape == x.shape


class Recurrent(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: block(attention="share"), ConfigError, "Did you mean 'shared'"),
        (lambda: block(order="attention frist"), ConfigError, "Did you mean 'attention first'"),
        (lambda: block(axes="freq"), ConfigError, "frequency"),
        (lambda: ResidualAttention(16, 3), ConfigError, "divisor of dim 16"),
        (lambda: block()(grid()[:, :3]), ShapeError, r"\(batch, 16, frames, bins\)"),
        (lambda: SharedTimeFrequencyAttention(K, 4)(grid()[0]), ShapeError, "frames"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
