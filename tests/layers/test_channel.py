"""Channel attention: every mechanism against loops written here, and the identities of the two spec sheets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.layers.channel import ChannelAttention, build_channel_attention, channel_attention_names
from foveal.layers.channel.build import options_of
from foveal.layers.channel.cat import Blur, entropy, to_unit
from foveal.layers.channel.eca import SMALL, adaptive_kernel
from foveal.layers.channel.fca import cosine

C, T = 8, 12

CASES: dict[str, tuple[str, dict]] = {
    "se": ("se", {"reduction": 4}),
    "se bias": ("se", {"reduction": 2, "bias": True, "gate": "hardsigmoid"}),
    "se l2": ("se", {"reduction": 4, "squeeze": "l2"}),
    "se_var1": ("se_var1", {}),
    "se_var2": ("se_var2", {}),
    "se_var3": ("se_var3", {}),
    "se_gc": ("se_gc", {"groups": 4}),
    "eca": ("eca", {}),
    "eca circular": ("eca", {"kernel_size": 5, "circular": True}),
    "eca_ns": ("eca_ns", {"kernel_size": 5}),
    "eca_ns circular": ("eca_ns", {"kernel_size": 3, "circular": True}),
    "gsop": ("gsop", {"reduction": 2}),
    "gsop released": ("gsop", {"reduction": 2, "gate": "none"}),
    "fca": ("fca", {"seq_len": T, "reduction": 4}),
    "fca f3": ("fca", {"seq_len": T, "reduction": 4, "freq": 3}),
    "encnet": ("encnet", {"codewords": 3}),
    "ge": ("ge", {}),
    "ge learned": ("ge", {"learned": True, "seq_len": T}),
    "ge learned mlp": ("ge", {"learned": True, "mlp": True, "seq_len": T}),
    "gct": ("gct", {}),
    "gct gap": ("gct", {"squeeze": "mean"}),
    "srm": ("srm", {}),
    "srm cross": ("srm", {"mlp": True}),
    "cbam": ("cbam", {"reduction": 2, "kernel_size": 3}),
    "cbam norm": ("cbam", {"reduction": 2, "kernel_size": 5, "norm": True}),
    "cat": ("cat", {"reduction": 2, "kernel_size": 3}),
    "cat bias": ("cat", {"reduction": 2, "kernel_size": 5, "bias": True}),
    "catlite": ("catlite", {"reduction": 2}),
}
EVERY = pytest.mark.parametrize("case", CASES)


def made(case: str, channels: int = C, seed: int = 0, **changes: object) -> ChannelAttention:
    """In eval mode, float64, with weights and statistics that are nowhere special."""
    name, options = CASES[case]
    module = build_channel_attention(name, channels, **{**options, **changes}).double().eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
        for key, b in module.named_buffers():
            if key.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=g, dtype=b.dtype))
            elif key.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=g, dtype=b.dtype) + 0.5)
    return module


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the definitions, one window (C, T) at a time -----------------------------------------------------------------------


def sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-float(u)))


def norm(bn: nn.Module, channel: int, value: Tensor) -> Tensor:
    return (value - bn.running_mean[channel]) / (bn.running_var[channel] + bn.eps).sqrt() * bn.weight[channel] + bn.bias[channel]  # fmt: skip


def two_layers(first: nn.Linear, second: nn.Linear, y: Tensor) -> Tensor:
    hidden = first.weight @ y + (0 if first.bias is None else first.bias)
    return second.weight @ hidden.clamp(min=0) + (0 if second.bias is None else second.bias)


def se(m, x):
    y = x.mean(1) if m.squeeze == "mean" else (x.square().sum(1) + 1e-5).sqrt()
    u = two_layers(m.fc1, m.fc2, y)
    return u.sigmoid() if m.gate_function == "sigmoid" else ((u + 3) / 6).clamp(0, 1)


def se_gc(m, x):
    y, out = x.mean(1), torch.zeros(len(x), dtype=x.dtype)
    width = m.weight.shape[1]
    for i in range(len(x)):
        g = i // width
        out[i] = sigmoid(sum(m.weight[g, i % width, j] * y[g * width + j] for j in range(width)))
    return out


def eca(m, x):
    y, k, c = x.mean(1), m.kernel_size, len(x)
    out = torch.zeros(c, dtype=x.dtype)
    for i in range(c):
        total = 0.0
        for j in range(k):
            at = i + j - k // 2
            if m.circular or 0 <= at < c:
                row = m.weight[i] if hasattr(m, "weight") else m.conv.weight[0, 0]
                total += float(row[j] * y[at % c])
        out[i] = sigmoid(total)
    return out


def gsop(m, x):
    z = m.pw_conv1.weight[..., 0] @ x + m.pw_conv1.bias[:, None]
    z = z - z.mean(1, keepdim=True)
    cov = z @ z.T / (x.shape[1] - 1)
    c = len(cov)
    rows = torch.stack([norm(m.bn, i, cov[i]) for i in range(c)])
    four = torch.stack([m.rw_conv.weight[i, 0] @ rows[i // 4] + m.rw_conv.bias[i] for i in range(4 * c)])
    u = m.pw_conv2.weight @ four + m.pw_conv2.bias
    return u if m.gate_function == "none" else u.sigmoid()


def fca(m, x):
    f, t = (3 if m.weight[0, 0] != m.weight[0, 1] else 0), torch.arange(T, dtype=x.dtype)
    d = torch.cos(math.pi * f * (t + 0.5) / T) / math.sqrt(T) * (math.sqrt(2) if f else 1)
    return two_layers(m.fc[0], m.fc[2], (x * d).sum(1)).sigmoid()


def encnet(m, x):
    k, parts = len(m.codewords), []
    for t in range(x.shape[1]):
        away = x[:, t] - m.codewords
        parts.append(torch.softmax(m.smoothing * away.square().sum(1), 0)[:, None] * away)
    e = torch.stack(parts).sum(0)
    return (m.fc(torch.stack([norm(m.bn, i, e[i]) for i in range(k)]).clamp(min=0).mean(0))).sigmoid()


def ge(m, x):
    y = x.mean(1)
    if m.gather is not None:
        y = torch.stack([norm(m.gather[1], i, m.gather[0].weight[i, 0] @ x[i]) for i in range(len(x))])
    if isinstance(m.mlp, nn.Sequential):
        y = two_layers(m.mlp[0], m.mlp[2], y)
    return y.sigmoid()


def gct(m, x):
    s = m.alpha * ((x.square().sum(1) + 1e-5).sqrt() if m.squeeze == "l2" else x.mean(1))
    return 1 + torch.tanh(m.gamma * s / (s.square().mean() + 1e-5).sqrt() + m.beta)


def srm(m, x):
    mu, std = x.mean(1), x.std(1)
    if isinstance(m.style_integration, nn.Sequential):
        z = two_layers(m.style_integration[1], m.style_integration[3], torch.stack([mu, std], 1).flatten())
    else:
        z = m.style_integration.weight[:, 0, 0] * mu + m.style_integration.weight[:, 0, 1] * std
    return torch.stack([norm(m.bn, i, z[i]) for i in range(len(x))]).sigmoid()


def convolve(weight: Tensor, x: Tensor) -> Tensor:
    """``(O, T)`` from ``(O, I, k)`` and ``(I, T)``, zeros outside."""
    k, t = weight.shape[2], x.shape[1]
    out = torch.zeros(len(weight), t, dtype=x.dtype)
    for at in range(t):
        for j in range(k):
            if 0 <= at + j - k // 2 < t:
                out[:, at] += weight[:, :, j] @ x[:, at + j - k // 2]
    return out


def cbam(m, x):
    first = (two_layers(m.fc[0], m.fc[2], x.mean(1)) + two_layers(m.fc[0], m.fc[2], x.max(1).values)).sigmoid()
    gated = x * first[:, None]
    u = convolve(m.conv.weight, torch.stack([gated.mean(0), gated.max(0).values]))[0]
    u = norm(m.bn, 0, u) if isinstance(m.bn, nn.BatchNorm1d) else u + m.conv.bias
    return first[:, None] * u.sigmoid()


def channel_half(m, x):
    taps = torch.tensor([math.exp(-0.5 * d * d) for d in (-2, -1, 0, 1, 2)], dtype=x.dtype)
    blurred = torch.cat([convolve((taps / taps.sum()).view(1, 1, 5), row[None]) for row in x])
    p = torch.softmax(x, 1)
    disorder = -(p * p.log()).sum(1)
    disorder = (disorder - disorder.min()) / (disorder.max() - disorder.min())
    parts = [two_layers(m.mlp[0], m.mlp[2], v) for v in (x.mean(1), blurred.max(1).values, disorder)]
    return (m.c_alpha * parts[0] + m.c_beta * parts[1] + m.c_gamma * parts[2]).sigmoid(), blurred


def cat(m, x):
    channel, blurred = channel_half(m, x)
    p = torch.softmax(x, 0)
    disorder = -(p * p.log()).sum(0)
    disorder = (disorder - disorder.min()) / (disorder.max() - disorder.min())
    mixed = -m.s_alpha * x.mean(0) + m.s_beta * blurred.max(1).values[:, None] + m.s_gamma * disorder
    u = convolve(m.conv.weight, mixed) + (0 if m.conv.bias is None else m.conv.bias[:, None])
    a, b = m.c_w.exp(), m.s_w.exp()
    return a / (a + b) * channel[:, None] + b / (a + b) * u.sigmoid()


DEFINITIONS: dict[str, Callable] = {
    "se": se,
    "se_var1": lambda m, x: x.mean(1).sigmoid(),
    "se_var2": lambda m, x: (m.weight * x.mean(1)).sigmoid(),
    "se_var3": lambda m, x: (m.fc.weight @ x.mean(1)).sigmoid(),
    "se_gc": se_gc,
    "eca": eca,
    "eca_ns": eca,
    "gsop": gsop,
    "fca": fca,
    "encnet": encnet,
    "ge": ge,
    "gct": gct,
    "srm": srm,
    "cbam": cbam,
    "cat": cat,
    "catlite": lambda m, x: channel_half(m, x)[0],
}


def test_every_mechanism_has_a_case_and_a_definition():
    names = set(channel_attention_names())
    assert names == {name for name, _ in CASES.values()} == set(DEFINITIONS)


@EVERY
@torch.no_grad()
def test_equals_its_definition(case):
    module, x = made(case), data(3, C, T)
    gates = torch.stack([DEFINITIONS[CASES[case][0]](module, one) for one in x])
    gates = gates[..., None] if gates.dim() == 2 else gates
    torch.testing.assert_close(module.gate(x), gates, atol=1e-6, rtol=1e-6)  # the blur's taps are float32
    torch.testing.assert_close(module(x), x * gates, atol=1e-6, rtol=1e-6)


@given(
    case=st.sampled_from(sorted(c for c in CASES if "learned" not in c and "fca" not in c)),
    length=st.integers(2, 9),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_equals_its_definition_at_random_lengths(case, length, batch, seed):
    module, x = made(case, seed=seed), data(batch, C, length, seed=seed)
    gates = torch.stack([DEFINITIONS[CASES[case][0]](module, one) for one in x])
    got = module.gate(x)
    torch.testing.assert_close(got, gates.view(got.shape), atol=1e-6, rtol=1e-6)


# --- ECA's sheet ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["eca", "eca circular", "eca_ns", "eca_ns circular"])
def test_eca_identity_1_is_a_full_matrix_with_a_band(case):
    module, full = made(case), made("se_var3")
    with torch.no_grad():
        full.fc.weight.copy_(module.matrix())
    x = data(2, C, T)
    torch.testing.assert_close(module(x), full(x), atol=1e-10, rtol=0)
    i = torch.arange(C)
    gap = (i[:, None] - i).abs()
    gap = torch.minimum(gap, C - gap) if module.circular else gap
    assert bool((module.matrix()[gap > module.kernel_size // 2] == 0).all())
    if case == "eca":
        own = made("eca_ns", kernel_size=module.kernel_size)
        with torch.no_grad():
            own.weight.copy_(module.conv.weight[0].expand(C, -1))
        torch.testing.assert_close(own(x), module(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("batch", [2, 400])
@pytest.mark.parametrize("circular", [False, True])
def test_eca_is_a_convolution_at_every_size(batch, circular):
    """Both ways to compute it, below and above the size where they change, with gradients."""
    module = made("eca", channels=64, kernel_size=5, circular=circular)
    assert (batch * 68 > SMALL) == (batch == 400)
    x = data(batch, 64, 3).requires_grad_()
    u = module.conv(nn.functional.pad(x.mean(-1)[:, None], (2, 2), mode="circular" if circular else "constant"))[:, 0]
    weight = data(batch, 64)
    expected = torch.autograd.grad((u.sigmoid() * weight).sum(), (x, module.conv.weight))
    got = torch.autograd.grad((module.gate(x)[..., 0] * weight).sum(), (x, module.conv.weight))
    torch.testing.assert_close(module.gate(x)[..., 0], u.sigmoid())
    torch.testing.assert_close(got, expected)


def test_eca_identity_2_one_tap_sees_one_channel():
    x = data(1, C, T)
    module = made("eca", kernel_size=1)
    jacobian = torch.autograd.functional.jacobian(lambda y: module.gate(y[None])[0, :, 0], x[0]).mean(-1)
    assert bool((jacobian[~torch.eye(C, dtype=torch.bool)] == 0).all()) and bool((jacobian.diagonal() != 0).all())
    with torch.no_grad():
        module.conv.weight.fill_(1.0)
    torch.testing.assert_close(module(x), made("se_var1")(x))
    own, second = made("eca_ns", kernel_size=1), made("se_var2")
    with torch.no_grad():
        second.weight.copy_(own.weight[:, 0])
    torch.testing.assert_close(own(x), second(x))


def test_eca_identity_3_a_kernel_over_everything_is_any_matrix():
    full, own = made("se_var3"), made("eca_ns", kernel_size=2 * C - 1)
    with torch.no_grad():
        for i in range(C):
            for j in range(C):
                own.weight[i, j - i + C - 1] = full.fc.weight[i, j]
    torch.testing.assert_close(own(data(2, C, T)), full(data(2, C, T)), atol=1e-10, rtol=0)


def test_eca_identity_4_groups_of_everything_and_of_one():
    x, full, second = data(2, C, T), made("se_var3"), made("se_var2")
    one, all_ = made("se_gc", groups=1), made("se_gc", groups=C)
    with torch.no_grad():
        one.weight[0].copy_(full.fc.weight)
        all_.weight[:, 0, 0].copy_(second.weight)
    torch.testing.assert_close(one(x), full(x))
    torch.testing.assert_close(all_(x), second(x))


def test_eca_identity_5_the_table_of_kernels():
    table = {1: 1, 2: 1, 4: 1, 8: 3, 16: 3, 24: 3, 32: 3, 64: 3, 96: 3, 128: 5, 160: 5, 256: 5, 320: 5, 512: 5, 1024: 5, 2048: 7, 4096: 7}  # fmt: skip
    assert {c: adaptive_kernel(c) for c in table} == table
    assert build_channel_attention("eca", 2048).conv.weight.shape == (1, 1, 7)


@pytest.mark.parametrize("case", ["eca", "eca_ns", "se", "se_var3", "se_gc"])
def test_eca_identity_6_places_may_be_shuffled(case):
    x, module = data(2, C, 3, 4), made(case)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module.gate(mixed), module.gate(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(module(x.flip(-1)), module(x).flip(-1), atol=1e-12, rtol=0)


@torch.no_grad()
def test_eca_identity_7_channels_reversed_and_rolled():
    x, module = data(2, C, T), made("eca", kernel_size=5)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.conv.weight.copy_(module.conv.weight.flip(-1))
    torch.testing.assert_close(other.gate(x.flip(1)), module.gate(x).flip(1))
    ring = made("eca circular")
    torch.testing.assert_close(ring.gate(x.roll(3, 1)), ring.gate(x).roll(3, 1))
    moved = (module.gate(x.roll(1, 1)) - module.gate(x).roll(1, 1)).abs().amax((0, 2))
    assert float(moved[2 + 1 : C - 2].max()) < 1e-12 and float(moved.max()) > 1e-3


@pytest.mark.parametrize("size", [1, 3, 5])
def test_eca_identity_8_a_channel_reads_its_neighbours_alone(size):
    module = made("eca", kernel_size=size)
    jacobian = torch.autograd.functional.jacobian(lambda y: module.gate(y[None])[0, :, 0], data(C, T)).abs().sum(-1)
    i = torch.arange(C)
    near = (i[:, None] - i).abs() <= size // 2
    assert bool((jacobian[~near] == 0).all()) and bool((jacobian[near] > 0).all())


def test_eca_identity_9_a_kernel_of_zeros_halves():
    module = build_channel_attention("eca", C)
    nn.init.zeros_(module.conv.weight)
    x = data(2, C, T).float()
    assert torch.equal(module(x), x / 2)


@EVERY
def test_gradients_in_float64(case):
    module, x = made(case), data(2, C, T).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))
    names = [n for n, _ in module.named_parameters()]
    if names:
        weights = tuple(p.detach().clone().requires_grad_() for p in module.parameters())

        def run(*given: Tensor) -> Tensor:
            return torch.func.functional_call(module, dict(zip(names, given, strict=True)), (x.detach(),))

        assert torch.autograd.gradcheck(run, weights)


@EVERY
def test_eca_identity_10_shapes_and_layouts(case):
    flat = CASES[case][0] not in ("cbam", "cat")
    module = made(case)
    x = data(2, C, T)
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(module(x.mT.contiguous().mT), expected)
        torch.testing.assert_close(module(data(2, C, 2 * T)[..., ::2].copy_(x)), expected)
        torch.testing.assert_close(module(x[:1]), expected[:1], atol=1e-10, rtol=1e-10)
        if flat and "catlite" not in case:
            torch.testing.assert_close(module(x.view(2, C, 3, 4)).flatten(2), expected)
            torch.testing.assert_close(module(x.view(2, C, 3, 2, 2)).flatten(2), expected)
            picture = x.view(2, C, 3, 4).contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(module(picture).flatten(2), expected)


def test_one_place_is_enough_where_nothing_spreads():
    for case in ("se", "eca", "ge", "gct", "encnet", "cbam", "catlite"):
        assert bool(made(case)(data(2, C, 1)).isfinite().all())
    for case, word in (("srm", "deviation"), ("gsop", "covariance")):
        with pytest.raises(ShapeError, match=word):
            made(case)(data(2, C, 1))


# --- the EEG sheet ----------------------------------------------------------------------------------------------------------


def test_eeg_identity_2_what_gates_are_at_first():
    x = data(4, C, T).float()
    assert torch.equal(build_channel_attention("gct", C)(x), x)
    for name in ("cat", "catlite"):
        torch.testing.assert_close(build_channel_attention(name, C, reduction=4)(x), 0.5 * x, atol=1e-7, rtol=0)


def test_eeg_identity_3_frequency_zero_is_the_mean_and_rows_are_orthonormal():
    x, module = data(2, C, T), made("fca")
    torch.testing.assert_close((x * module.weight).sum(-1), math.sqrt(T) * x.mean(-1), atol=1e-6, rtol=0)
    rows = torch.stack([cosine(T, f) for f in range(T)])
    torch.testing.assert_close(rows @ rows.T, torch.eye(T, dtype=torch.float64), atol=1e-12, rtol=0)


def test_frequencies_of_two_axes_are_products():
    module = build_channel_attention("fca", 4, seq_len=(3, 5), freq=(1, 2), reduction=2)
    expected = torch.outer(cosine(3, 1), cosine(5, 2)).flatten().float()
    assert all(torch.equal(row, expected) for row in module.weight)


def test_eeg_identity_4_gathers_that_are_means():
    x = data(3, C, T)
    learned = build_channel_attention("ge", C, learned=True, seq_len=T).double().eval()
    nn.init.constant_(learned.gather[0].weight, 1 / T)
    torch.testing.assert_close(learned(x), made("ge")(x), atol=1e-5, rtol=0)
    identity = made("se", reduction=1)
    with torch.no_grad():
        identity.fc1.weight.copy_(torch.eye(C))
        identity.fc2.weight.copy_(torch.eye(C))
    positive = x.abs()  # where the ReLU is the identity
    torch.testing.assert_close(identity(positive), made("ge")(positive))


def test_eeg_identity_5_one_tap_of_one_is_gather_excite():
    module = made("eca", kernel_size=1)
    nn.init.ones_(module.conv.weight)
    torch.testing.assert_close(module(data(2, C, T)), made("ge")(data(2, C, T)))


ORDERLESS = {"se", "se bias", "se l2", "se_var1", "se_var2", "se_var3", "se_gc", "eca", "eca circular", "eca_ns", "eca_ns circular"} | {
    "ge", "gct", "gct gap", "srm", "srm cross", "encnet", "gsop", "gsop released", "fca"
}  # fmt: skip


@EVERY
@torch.no_grad()
def test_eeg_identity_6_time_may_be_shuffled_or_must_not(case):
    module, x = made(case), data(3, C, T)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    difference = float((module(x[..., order]) - module(x)[..., order]).abs().max())
    assert difference < 1e-10 if case in ORDERLESS else difference > 1e-4


@torch.no_grad()
def test_eeg_identity_7_channels_may_be_shuffled_with_their_weights():
    x, order = data(2, C, T), torch.randperm(C, generator=torch.Generator().manual_seed(3))
    for case in ("ge", "gct", "srm", "se"):
        module = made(case)
        other = copy.deepcopy(module)
        for key, value in other.state_dict().items():
            if case == "se":
                value.copy_(value[:, order] if key == "fc1.weight" else value[order])
            elif value.dim() and value.shape[0] == C:
                value.copy_(value[order])
        torch.testing.assert_close(other(x[:, order]), module(x)[:, order], atol=1e-12, rtol=0)
    module = made("eca")
    assert float((module(x[:, order]) - module(x)[:, order]).abs().max()) > 1e-3, "neighbours count"


@EVERY
@torch.no_grad()
def test_eeg_identity_8_the_range_of_gates(case):
    gate = made(case).gate(100 * data(4, C, T) if case == "gsop released" else data(4, C, T))
    if case == "gsop released":
        assert float(gate.abs().max()) > 2
    else:
        assert float(gate.min()) >= 0 and float(gate.max()) <= (2 if "gct" in case else 1)
        assert float(gate.std()) > 1e-3


# --- padding --------------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_padding_is_not_pooled(case):
    module = made(case)
    x, noise = data(2, C, T), 50 * data(2, C, 5, seed=9)
    longer = torch.cat([x, noise], -1)
    valid = (torch.arange(T + 5) < T).expand(2, -1)
    if module.masks and module.registered_name != "ge":
        torch.testing.assert_close(module(longer, valid)[..., :T], module(x), atol=1e-10, rtol=1e-10)
        uneven = valid.clone()
        uneven[1, 4:] = False
        torch.testing.assert_close(module(longer, uneven)[1, :, :4], module(x[1:, :, :4])[0], atol=1e-9, rtol=1e-9)
        nothing = torch.zeros_like(valid)
        assert bool(module(longer, nothing).isfinite().all())
    elif case == "ge":
        torch.testing.assert_close(module(longer, valid)[..., :T], module(x), atol=1e-10, rtol=1e-10)
    else:
        with pytest.raises(UnsupportedError, match="padding"):
            module(x, torch.ones(2, T, dtype=torch.bool))


# --- numbers that go wrong elsewhere --------------------------------------------------------------------------------------


def test_equal_entropies_and_underflow_stay_finite():
    for name in ("cat", "catlite"):
        module = build_channel_attention(name, C, reduction=2)
        for p in module.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
        for x in (torch.ones(2, C, T), torch.zeros(2, C, T), 500 * data(2, C, T).float()):
            x = x.clone().requires_grad_()
            module(x).sum().backward()
            assert bool(module(x).isfinite().all()) and bool(x.grad.isfinite().all())
    assert bool((to_unit(torch.full((3, 4), 0.7), 1) == 0).all())
    assert float(entropy(torch.zeros(1, 5), 1)) == pytest.approx(math.log(5))


def test_a_constant_channel_has_a_finite_gradient():
    x = torch.ones(2, C, T, requires_grad=True)
    made("srm").float()(x).sum().backward()
    assert bool(x.grad.isfinite().all())


def test_the_blur_keeps_a_constant_away_from_the_borders():
    blur = Blur()
    out = blur(torch.ones(1, 2, 7, 9))
    torch.testing.assert_close(out[:, :, 2:-2, 2:-2], torch.ones(1, 2, 3, 5))
    assert float(out[0, 0, 0, 0]) < 0.6


# --- as a module ----------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_low_precision_autocast_and_copies(case):
    module = made(case).float()
    x = data(4, C, T).float()
    exact = module(x)
    size = exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert float((module(x).float() - exact).abs().max() / size) < 0.05
    low = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16 and float((low.float() - exact).abs().max() / size) < 0.08
    name, options = CASES[case]
    again = build_channel_attention(name, C, **options).eval()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), exact) and torch.equal(copy.deepcopy(module)(x), exact)
    assert not any(p.is_meta for p in module.parameters())
    with torch.device("meta"):
        assert build_channel_attention(name, C, **options)(torch.empty(2, C, T)).shape == (2, C, T)


def test_half_precision_pools_in_float32():
    """A sum that float16 cannot hold."""
    x = torch.full((1, 4, 100_000), 4.0, dtype=torch.float16)
    assert float(build_channel_attention("ge", 4).gate(x)[0, 0, 0]) == pytest.approx(sigmoid(4.0), abs=1e-3)
    assert bool(build_channel_attention("srm", 4).eval().half()(x).isfinite().all())


@pytest.mark.parametrize("case", ["eca", "se", "cbam", "cat", "encnet", "gsop", "srm"])
def test_compiles_to_the_same(case):
    module, x = made(case).float(), data(2, C, T).float()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("name", ["cbam", "cat"])
def test_pictures_need_two_axes(name):
    module = build_channel_attention(name, C, reduction=2, ndim=2).double().eval()
    x = data(2, C, 5, 6)
    assert module(x.transpose(2, 3)).shape == (2, C, 6, 5)
    assert module.gate(x).shape == x.shape
    with pytest.raises(ShapeError, match="ndim=1"):
        module(data(2, C, 5))
    with pytest.raises(ShapeError, match="ndim=2"):
        build_channel_attention(name, C, reduction=2)(x)


# --- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: build_channel_attention("eac", 8), ConfigError, "Did you mean 'eca'"),
        (lambda: build_channel_attention("eca", 8, kernelsize=3), ConfigError, "Did you mean 'kernel_size'"),
        (lambda: build_channel_attention("se_var1", 8, reduction=2), ConfigError, "takes no options"),
        (lambda: build_channel_attention("eca", 8, kernel_size=4), ConfigError, "odd number such as 5"),
        (lambda: build_channel_attention("eca", 8, gate="sigmod"), ConfigError, "Did you mean 'sigmoid'"),
        (lambda: build_channel_attention("se", 8, reduction=16), ConfigError, "0 units; expected at most 8"),
        (lambda: build_channel_attention("gsop", 8, reduction=16), ConfigError, "expected at most 8"),
        (lambda: build_channel_attention("se", 8, reduction=2, squeeze="max"), ConfigError, "squeeze is 'max'"),
        (lambda: build_channel_attention("se_gc", 8, groups=3), ConfigError, "divisor of the 8 channels"),
        (lambda: build_channel_attention("eca", 2, kernel_size=7, circular=True), ConfigError, "at most 5"),
        (lambda: build_channel_attention("fca", 8), ConfigError, "seq_len is missing"),
        (lambda: build_channel_attention("fca", 8, seq_len=4, freq=4), ConfigError, "below the places"),
        (lambda: build_channel_attention("ge", 8, learned=True), ConfigError, "seq_len is missing"),
        (lambda: build_channel_attention("cbam", 8, reduction=2, ndim=3), ConfigError, r"\(B, C, H, W\)"),
        (lambda: build_channel_attention("eca", 0), ConfigError, "at least 1"),
        (lambda: made("eca")(data(2, 7, T)), ShapeError, r"\(batch, 8, …\)"),
        (lambda: made("eca")(data(2, C)), ShapeError, "trailing axes"),
        (lambda: made("eca")(torch.zeros(2, C, 0)), ShapeError, "not empty"),
        (lambda: made("fca")(data(2, C, 5)), ShapeError, "seq_len=5"),
        (lambda: made("ge learned")(data(2, C, 5)), ShapeError, "seq_len=5"),
        (lambda: made("eca")(data(2, C, T), torch.ones(2, T)), ShapeError, "expected bool"),
        (lambda: adaptive_kernel(0), ConfigError, "at least 1"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_one_vocabulary():
    """Options of one name have one meaning; a new word must be written into the table of the base module first."""
    from foveal.layers.channel import base

    words = {w for name in channel_attention_names() for w in options_of(name)}
    own = {"gamma", "beta", "circular", "learned", "epsilon", "norm"}  # of one mechanism alone
    assert all(f"``{w}``" in base.__doc__ for w in words - own)
