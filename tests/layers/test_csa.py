"""CSA: the identities of its spec sheet that concern the module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.layers.csa import CSA, actionness_loss

B, C_IN, C_OUT, T = 2, 5, 4, 7


def made(**options: object) -> CSA:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CSA(C_IN, C_OUT, T, **options).double()


def data(channels: int, seed: int = 0, steps: int = T) -> Tensor:
    return torch.randn(B, channels, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


R, F = data(C_IN, 1), data(C_OUT, 2)
VARIANTS = [
    {},
    {"branches": "channel"},
    {"branches": "temporal"},
    {"source": "F"},
    {"temporal_fc": "conv"},
    {"temporal_fc": "transpose"},
    {"fuse": "add", "relu": True},
    {"hidden": 3, "kernel_size": 1, "circular": True},
]
EVERY = pytest.mark.parametrize("options", VARIANTS)


def convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    out = torch.zeros(conv.out_channels, x.shape[1], dtype=x.dtype)
    k = conv.kernel_size[0]
    for t in range(x.shape[1]):
        for j in range(k):
            at = t + j - k // 2
            if conv.padding_mode == "circular" or 0 <= at < x.shape[1]:
                out[:, t] += conv.weight[:, :, j] @ x[:, at % x.shape[1]]
    return out + conv.bias[:, None]


@EVERY
@torch.no_grad()
def test_equals_its_definition(options):
    m = made(**options)
    for b in range(B):
        x, parts = (R if m.source == "R" else F)[b], []
        if m.branches != "temporal":
            w = (m.channel_fc.weight @ convolve(m.channel_conv, x).relu().mean(1) + m.channel_fc.bias).sigmoid()
            parts.append(w[:, None] * F[b])
        if m.branches != "channel":
            if m.temporal_fc == "transpose":
                w = m.temporal_out(convolve(m.temporal_conv, x.T).relu().mean(1)).sigmoid()
            else:
                pooled = convolve(m.temporal_conv, x).relu().mean(0)
                out = m.temporal_out
                u = out.weight @ pooled + out.bias if m.temporal_fc == "linear" else convolve(out, pooled[None])[0]
                w = u.sigmoid()
            parts.append(w * F[b])
        joined = torch.cat(parts) if m.fuse == "concat" else sum(parts)
        expected = m.proj.weight[..., 0] @ joined + m.proj.bias[:, None]
        torch.testing.assert_close(m(R, F)[b], m.act(expected))


@torch.no_grad()
def test_identity_1_open_gates_and_half_projections_change_nothing():
    m = made()
    for out in (m.channel_fc, m.temporal_out):
        out.weight.zero_()
        out.bias.fill_(60.0)
    m.proj.bias.zero_()
    m.proj.weight[..., 0] = torch.cat([torch.eye(C_OUT), torch.eye(C_OUT)], 1) / 2
    torch.testing.assert_close(m(R, F), F, atol=1e-6, rtol=0)
    m = made()
    m.proj.bias.zero_()
    m.proj.weight[..., 0] = torch.cat([torch.eye(C_OUT), torch.zeros(C_OUT, C_OUT)], 1)
    torch.testing.assert_close(m(R, F), m.channel_gate(R) * F)


@EVERY
def test_identity_2_shapes_and_ranges(options):
    m = made(**options)
    assert m(R, F).shape == (B, C_OUT, T)
    x = R if m.source == "R" else F
    if m.branches != "temporal":
        gate = m.channel_gate(x)
        assert gate.shape == (B, C_OUT, 1) and gate.min().item() > 0 and gate.max().item() < 1
    if m.branches != "channel":
        gate = m.temporal_gate(x)
        assert gate.shape == (B, 1, T) and gate.min().item() > 0 and gate.max().item() < 1


@pytest.mark.parametrize("source", ["R", "F"])
def test_identity_3_gates_see_their_source_alone(source):
    """With F replaced by ones inside the product, the output depends on the gates alone."""
    m, r, f = made(source=source), R.clone().requires_grad_(), F.clone().requires_grad_()
    gates = []
    for part in (m.channel_fc, m.temporal_out):
        part.register_forward_hook(lambda module, args, out: gates.append(out))
    m(r, f)
    grads = torch.autograd.grad(sum(g.square().sum() for g in gates), (r, f), allow_unused=True)
    seen = {"R": grads[0], "F": grads[1]}
    assert float(seen.pop(source).abs().max()) > 0 and next(iter(seen.values())) is None


@torch.no_grad()
def test_identity_4_the_channel_gate_is_blind_to_shifts_on_a_ring():
    m = made(circular=True)
    torch.testing.assert_close(m.channel_gate(R.roll(3, -1)), m.channel_gate(R))
    assert not torch.allclose(made().channel_gate(R.roll(3, -1)), made().channel_gate(R))
    assert not torch.allclose(m.temporal_gate(R.roll(3, -1)), m.temporal_gate(R))


@torch.no_grad()
def test_identity_5_nothing_in_gives_half():
    m = made()
    for part in (m.channel_conv, m.channel_fc, m.temporal_conv, m.temporal_out):
        part.bias.zero_()
    zero = torch.zeros_like(R)
    assert bool((m.channel_gate(zero) == 0.5).all()) and bool((m.temporal_gate(zero) == 0.5).all())
    m.proj.bias.zero_()
    torch.testing.assert_close(m(zero, F), m.proj(torch.cat([F, F], 1)) / 2)


def test_identity_6_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in CSA(400, 256, 100).parameters()) == 822_132


@EVERY
def test_identity_11_gradients(options):
    m = made(**options)
    assert torch.autograd.gradcheck(m, (R.clone().requires_grad_(), F.clone().requires_grad_()))


@pytest.mark.parametrize("options", [v for v in VARIANTS if v.get("temporal_fc") != "transpose"])
@torch.no_grad()
def test_padding_does_not_reach_the_gates(options):
    m = made(**options)
    valid = torch.arange(T)[None] < torch.tensor([[5], [T]])
    noise = [torch.where(valid[:, None], x, 100 * torch.randn_like(x)) for x in (R, F)]
    kept = valid[:, None].expand(-1, C_OUT, -1)
    torch.testing.assert_close(m(*noise, valid)[kept], m(R, F, valid)[kept])
    torch.testing.assert_close(m(R, F, valid)[1], m(R, F)[1])


@torch.no_grad()
def test_the_convolution_takes_any_length():
    m = made(temporal_fc="conv")
    assert m(data(C_IN, steps=19), data(C_OUT, steps=19)).shape == (B, C_OUT, 19)


def test_actionness_loss():
    gate = torch.tensor([[[0.9, 0.2, 0.5]]])
    action = torch.tensor([[1.0, 0.0, 1.0]])
    expected = -(torch.tensor([0.9, 0.8, 0.5]).log())
    torch.testing.assert_close(actionness_loss(gate, action), expected.mean())
    valid = torch.tensor([[True, True, False]])
    torch.testing.assert_close(actionness_loss(gate, action, valid), expected[:2].mean())


@torch.no_grad()
def test_as_a_module():
    m = made().float()
    r, f = R.float(), F.float()
    twin = CSA(C_IN, C_OUT, T)
    twin.load_state_dict(m.state_dict())
    assert torch.equal(twin(r, f), m(r, f)) and torch.equal(copy.deepcopy(m)(r, f), m(r, f))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(m(r, f).float(), copy.deepcopy(m).double()(R, F).float(), atol=0.05, rtol=0.05)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(r, f), m(r, f))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: made(branches="chanel"), ConfigError, "Did you mean 'channel'"),
        (lambda: made(temporal_fc="linar"), ConfigError, "Did you mean 'linear'"),
        (lambda: made(kernel_size=2), ConfigError, "odd kernel"),
        (lambda: made(hidden=0), ConfigError, "hidden=0"),
        (lambda: made()(R[:, :4], F), ShapeError, r"r has shape .* expected \(batch, 5, 7\)"),
        (lambda: made()(R[..., :5], F[..., :5]), ShapeError, "temporal_fc='conv'"),
        (lambda: made(temporal_fc="conv")(R, F[..., :5]), ShapeError, "same batch and steps"),
        (lambda: made()(R, F, torch.ones(B, T)), ShapeError, "expected bool"),
        (
            lambda: made(temporal_fc="transpose")(R, F, torch.ones(B, T, dtype=torch.bool)),
            UnsupportedError,
            "padding",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
