"""The Mamba block: equal to transformers' mixer with copied weights, streaming equal to the whole, both directions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.layers.mamba import BidirectionalMamba, Mamba

DIM = 12


def block(**changes: object) -> Mamba:
    torch.manual_seed(0)
    return Mamba(DIM, **{"expand": 2, "d_state": 5, "dt_rank": 3, **changes}).double()


def tokens(length: int, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("length", [1, 3, 64, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_mixer_of_transformers_with_copied_weights(length, bias):
    """The mixer scans in float32, so it is compared in float32; outputs and every weight's gradient."""
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(
        hidden_size=DIM, state_size=5, conv_kernel=4, expand=2, time_step_rank=3, use_bias=bias, num_hidden_layers=1
    )
    theirs = mamba.MambaMixer(config, layer_idx=0)
    ours = Mamba(DIM, expand=2, d_state=5, dt_rank=3, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x = tokens(length, dtype=torch.float32)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, : length // 3] = False
    torch.testing.assert_close(ours(x), theirs.eval()(x), atol=2e-5, rtol=2e-5)
    if not bias:  # theirs masks before the projection, so its bias is convolved into the first real tokens
        padded = theirs(x, attention_mask=valid.long())
        torch.testing.assert_close(ours(x, valid=valid)[valid], padded[valid], atol=2e-5, rtol=2e-5)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    expected_grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads[name].grad, atol=1e-4, rtol=1e-4)


def test_initialisation_is_mambas():
    model = Mamba(64, expand=4, d_state=16)
    torch.testing.assert_close(model.A_log.exp(), torch.arange(1.0, 17).expand(256, 16))
    assert bool((model.D == 1).all()) and model.dt_rank == 4
    dt = torch.nn.functional.softplus(model.dt_proj.bias.detach())
    assert 1e-3 * 0.999 <= float(dt.min()) <= float(dt.max()) <= 1e-1 * 1.001
    assert float(model.dt_proj.weight.detach().abs().max()) <= 0.5


@pytest.mark.parametrize("cuts", [(1,) * 12, (5, 1, 1, 70), (66, 2)])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_identity_5_stepping_equals_the_whole_sequence_and_ends_in_its_state(cuts, d_conv):
    model, x = block(d_conv=d_conv), tokens(sum(cuts))
    state, parts = model.initial_state(2), []
    for piece in x.split(cuts, 1):
        out, state = model.step(piece, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-11, rtol=1e-11)
    whole = model.step(x, model.initial_state(2))[1]
    torch.testing.assert_close(state.scan, whole.scan, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(state.conv, whole.conv)


def test_identity_6_forward_is_causal_and_backward_is_the_flipped_forward():
    torch.manual_seed(0)
    model = BidirectionalMamba(DIM, d_state=5).double()
    x = tokens(70)
    other = x.clone()
    other[:, 40:] += 1
    ahead, back = model.branches(x)
    changed = model.branches(other)
    assert torch.equal(ahead[:, :40], changed[0][:, :40]) and not torch.equal(back[:, :40], changed[1][:, :40])
    past = x.clone()
    past[:, :30] += 1
    assert torch.equal(model.branches(past)[1][:, 30:], back[:, 30:])
    model.norms[1].load_state_dict(model.norms[0].state_dict())
    model.mixers[1].load_state_dict(model.mixers[0].state_dict())
    ahead, back = model.branches(x.flip(1))[0], model.branches(x)[1]
    assert torch.equal(ahead.flip(1), back)


def test_the_bidirectional_branches_have_their_own_residuals():
    model = BidirectionalMamba(DIM).double()
    for mixer in model.mixers:
        torch.nn.init.zeros_(mixer.out_proj.weight)
    ahead, back = model.branches(tokens(9))
    assert torch.equal(ahead, tokens(9)) and torch.equal(back, tokens(9))


@pytest.mark.parametrize("make", [block, lambda: BidirectionalMamba(DIM, d_state=5).double()])
def test_padding_on_either_side_changes_no_real_token(make):
    model, x = make(), tokens(20)
    valid = torch.zeros(2, 20, dtype=torch.bool)
    valid[0, :13] = valid[1, 9:] = True
    noise = torch.where(valid[..., None], x, 100 * tokens(20, seed=5))
    got = model(noise, valid=valid)
    for row, real in enumerate((slice(0, 13), slice(9, 20))):
        torch.testing.assert_close(got[row, real], model(x[row : row + 1, real])[0], atol=1e-11, rtol=1e-11)


def test_chunked_and_reference_give_the_same_gradients():
    grads = []
    for impl in ("chunked", "reference"):
        model, x = block(impl=impl), tokens(70).requires_grad_()
        model(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)


def test_round_trips_autocast_compile_and_empty_sequences():
    model, x = block().float(), tokens(40, dtype=torch.float32)
    twin = block(dt_min=0.05).float()
    twin.load_state_dict(model.state_dict())
    expected = model(x)
    assert torch.equal(twin(x), expected) and torch.equal(copy.deepcopy(model)(x), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.05)
    assert model(x[:, :0]).shape == (2, 0, DIM)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Mamba(0), ConfigError, "dim is 0"),
        (lambda: Mamba(8, dt_min=0.2), ConfigError, "dt_min=0.2"),
        (lambda: Mamba(8, impl="chunkd")(torch.zeros(1, 2, 8)), ConfigError, "'chunked'"),
        (lambda: block()(tokens(3)[..., :5]), ShapeError, "12"),
        (lambda: block()(tokens(3), valid=torch.ones(2, 4, dtype=torch.bool)), ShapeError, "valid"),
        (lambda: block().step(tokens(3), block().initial_state(1)), ShapeError, r"initial_state\(2\)"),
        (lambda: BidirectionalMamba(8).step(torch.zeros(1, 1, 8), Mamba(8).initial_state(1)), UnsupportedError, "streaming"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
