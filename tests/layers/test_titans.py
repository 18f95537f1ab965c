"""Titans: the identities of its spec sheet for the memory layer and the four ways to use it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.layers.neural_memory import LayerState, NeuralMemory
from foveal.layers.rotary import rotary, rotate
from foveal.layers.titans import LMM, MAC, MAG, MAL
from foveal.models import DecoderLM, Memory, Recurrent

B, N, DIM, H, SEGMENT, WINDOW, FIXED = 2, 23, 12, 2, 6, 5, 3


def memory(**changes: object) -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(DIM, **{"num_heads": 2, "chunk": 4, "expand": 2.0, **changes}).double()


def build(kind: str, **changes: object) -> nn.Module:
    held = changes.pop("memory", None) or memory()
    torch.manual_seed(1)
    fields = {"persistent": FIXED, "memory": held, **changes}
    if kind == "LMM":
        model: nn.Module = LMM(DIM, **fields)
    elif kind == "MAC":
        model = MAC(DIM, H, **{"segment": SEGMENT, **fields})
    else:
        model = {"MAG": MAG, "MAL": MAL}[kind](DIM, H, **{"window": WINDOW, **fields})
    with torch.no_grad():
        model.persistent.copy_(torch.randn(model.persistent.shape))
    return model.double().eval()


KINDS = pytest.mark.parametrize("kind", ["LMM", "MAC", "MAG", "MAL"])


def tokens(n: int = N, seed: int = 0, batch: int = B) -> Tensor:
    return torch.randn(batch, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["LMM", "MAG"])
def test_float32_is_the_same_layer_as_float64_when_the_memory_has_faded(kind: str) -> None:
    """After 250 tokens an untrained memory reads values near 1e-4; the norm after it must not depend on the dtype's own epsilon."""
    model = build(kind)
    x = tokens(250)
    with torch.no_grad():
        exact, low = model(x)[0], model.float()(x.float())[0]
    assert (low - exact).abs().max() < 1e-3 * exact.abs().max()


class Unit(nn.Module):
    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return y


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """``(B, H, N, D)`` under a boolean mask, from scratch."""
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return torch.softmax(logits, -1) @ v


# --- the memory layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_layer_is_its_parts(depth):
    """Projection, convolution, norms and gates written out, then the rule token by token with plain matrices."""
    model, x = memory(depth=depth, num_heads=1), tokens(9, batch=1)
    got, _, _ = model(x)
    y = nn.functional.pad(x @ model.qkv.weight.T, (0, 0, 3, 0))
    w = model.conv.weight[:, 0]
    y = torch.stack([(y[0, t : t + 4].T * w).sum(1) + model.conv.bias for t in range(9)])
    y = y * torch.sigmoid(y)
    q, k, v = y.split(DIM, 1)
    q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    alpha, eta, theta = torch.sigmoid(x[0] @ model.gates.weight.T + model.gate_offset).T
    theta = theta / 8
    now = [p[0].detach().clone() for p in model.initial]
    s = [torch.zeros_like(p) for p in now]

    def run(ws, z):
        for i, p in enumerate(ws):
            z = p @ z
            z = nn.functional.gelu(z) if i < len(ws) - 1 else z
        return z

    for t in range(9):
        if t % 4 == 0:
            ref = [p.detach().clone().requires_grad_() for p in now]
        grads = torch.autograd.grad((run(ref, k[t].detach()) - v[t].detach()).square().sum(), ref)
        s = [eta[t] * a - theta[t] * g for a, g in zip(s, grads, strict=True)]
        now = [(1 - alpha[t]) * a + b for a, b in zip(now, s, strict=True)]
        close(got[0, t], run(now, q[t]))


def test_surprise_is_large_for_what_is_new():
    model = memory(chunk=1, decay=False, momentum=False, conv=1)
    x = tokens(1, batch=1).repeat(1, 40, 1)
    _, _, surprise = model(x)
    assert bool((surprise[..., -1] < 0.1 * surprise[..., 0]).all())
    _, _, both = model(torch.cat([x, tokens(1, seed=3, batch=1)], 1))
    assert bool((both[..., -1] > 3 * both[..., -2]).all())


@pytest.mark.parametrize("changes", [{}, {"momentum": False}, {"decay": False}, {"clip": 0.5}, {"conv": 1}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_two_forms_agree_with_gradients(changes, recompute):
    model, x, found = memory(recompute=recompute, **changes), tokens(), []
    for impl in ("sequential", "chunked"):
        model.zero_grad()
        out, state, _ = model(x, impl=impl)
        (out.square().sum() + sum(w.sum() for w in state.memory.weights)).backward()
        found.append([out, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert all(float(g.abs().max()) > 0 for g in found[0][1:]), "M_0 and every gate learn"


def test_padding_on_the_right_leaves_the_memory_alone():
    model, x = memory(), tokens(10)
    padded = torch.cat([x, tokens(4, seed=5)], 1)
    valid = (torch.arange(14) < 10).expand(B, 14)
    out, state, _ = model(padded, valid=valid)
    short, expected, _ = model(x)
    close(out[:, :10], short)
    for a, b in zip(state.memory.weights, expected.memory.weights, strict=True):
        close(a, b)


# --- all four -------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("cuts", [(1,) * N, (6, 6, 6, 5), (2, 11, 1, 9), (22, 1)], ids=str)
def test_identity_2_a_stream_in_pieces_equals_one_call(kind, cuts):
    model = build(kind)
    whole, last = model(tokens())
    state, parts = None, []
    for piece in tokens().split(cuts, 1):
        out, state = model(piece, state)
        parts.append(out)
    close(torch.cat(parts, 1), whole)
    for a, b in zip(state.memory.memory.weights, last.memory.memory.weights, strict=True):
        close(a, b)
    assert state.position == last.position


@KINDS
def test_identity_6_the_future_does_not_reach_the_past_inside_a_segment_either(kind):
    model = build(kind)
    for at in (0, 1, 8, 11, 12, N - 1):
        other = tokens()
        other[:, at] = tokens(1, seed=9)[:, 0]
        one, two = model(tokens())[0], model(other)[0]
        torch.testing.assert_close(one[:, :at], two[:, :at], atol=1e-13, rtol=0)
        assert not torch.allclose(one[:, at], two[:, at])


def test_identity_6_the_literal_mask_leaks_inside_a_segment_and_only_there():
    model, other = build("MAC", literal=True), tokens()
    other[:, 10] = tokens(1, seed=9)[:, 0]  # the segments are 0–5, 6–11, …
    change = (model(tokens())[0] - model(other)[0]).abs().amax((0, 2))
    assert bool((change[6:10] > 1e-6).all()) and bool((change[:6] == 0).all())


def test_identity_7_mac_without_memory_is_segment_wise_causal_attention():
    model = build("MAC", persistent=0)
    model.combine = Unit()
    with torch.no_grad():
        model.memory.initial[-1].zero_()
        model.memory.gate_offset[-2:] = -1e9  # θ = 0: reads are zero, and stay so
    x = tokens()
    q, k, v = model._heads(model.qkv(x))
    segment = torch.arange(N) // SEGMENT
    turn = rotary((torch.arange(N) % SEGMENT)[:, None], DIM // H)
    q, k = rotate(q, turn), rotate(k, turn)
    seen = (segment[:, None] == segment) & torch.ones(N, N, dtype=torch.bool).tril()
    logits = (q @ k.mT / (DIM // H) ** 0.5).masked_fill(~seen, -torch.inf)
    # a read of zero is still a key with logit 0 and value 0, one for every token seen
    silent = torch.log(seen.sum(-1).double())[:, None]
    weights = torch.softmax(torch.cat([logits, silent.expand(B, H, N, 1)], -1), -1)[..., :-1]
    close(model(x)[0], model.out((weights @ v).transpose(1, 2).flatten(2)))


def test_mac_by_definition():
    """Segment by segment: reads at or before the row, tokens at or before it, persistent tokens always; the per-token memory."""
    model, x = build("MAC"), tokens()
    got, _ = model(x)
    state: LayerState = model.memory.init_state(B)
    tail, expected = None, []
    p = model.persistent.expand(B, -1, -1)
    for s in x.split(SEGMENT, 1):
        n = s.shape[1]
        h, tail = model.memory.read(s, state.memory.weights, tail)
        (q, k, v), (_, kh, vh), (_, kp, vp) = (model._heads(model.qkv(t)) for t in (s, h, p))
        own, fixed = (rotary(torch.arange(*r)[:, None], DIM // H) for r in ((FIXED, FIXED + n), (0, FIXED)))
        keys = torch.cat([rotate(kp, fixed), rotate(kh, own), rotate(k, own)], 2)
        tril = torch.ones(n, n, dtype=torch.bool).tril()
        seen = torch.cat([torch.ones(n, FIXED, dtype=torch.bool), tril, tril], 1)
        y = softmax_rows(rotate(q, own), keys, torch.cat([vp, vh, v], 2), seen)
        y = model.out(y.transpose(1, 2).flatten(2))
        m, state, _ = model.memory(y, state, impl="sequential")
        expected.append(model.combine(y, m))
    close(got, torch.cat(expected, 1))


@pytest.mark.parametrize("window", [WINDOW, N + FIXED])
def test_identity_7_mag_with_a_unit_gate_is_windowed_attention_with_a_prefix(window):
    model, x = build("MAG", window=window), tokens()
    model.combine = Unit()
    y = torch.cat([model.persistent.expand(B, -1, -1), x], 1)
    at = torch.arange(N + FIXED)
    near = (at[:, None] - at < window) | (at < FIXED)
    q, k, v = model.attention.project(y)
    out = softmax_rows(q, k, v, near & (at[:, None] >= at))
    close(model(x)[0], model.attention.o_proj(out.transpose(1, 2).flatten(2))[:, FIXED:])


def test_mag_and_mal_are_what_they_say():
    x = tokens()
    mag, mal = build("MAG"), build("MAL")
    y = torch.cat([mag.persistent.expand(B, -1, -1), x], 1)
    m = mag.memory(y)[0]
    norm = lambda t, w: t / (t.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * w  # noqa: E731
    a = mag.attention(y, pattern=mag.pattern)
    outer, inner = mag.combine.outer.weight, mag.combine.inner.weight
    close(mag(x)[0], (norm(a, outer) * torch.sigmoid(norm(m, inner)))[:, FIXED:])
    m = mal.memory(torch.cat([mal.persistent.expand(B, -1, -1), x], 1))[0]
    close(mal(x)[0], mal.attention(m, pattern=mal.pattern)[:, FIXED:])


@KINDS
@pytest.mark.parametrize("side", ["right", "left", "inside"])
def test_padded_rows_equal_unpadded_ones(kind, side):
    model, x = build(kind), tokens(batch=3)
    valid = torch.ones(3, N, dtype=torch.bool)
    valid[0, {"right": slice(9, N), "left": slice(0, 14), "inside": slice(4, 18)}[side]] = False
    valid[2] = False
    out = model.padded(torch.where(valid[..., None], x, torch.nan), valid)
    for row in range(2):
        kept = valid[row]
        close(out[row : row + 1, kept], model(x[row : row + 1, kept])[0])
    assert bool((out[~valid] == 0).all())
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model.padded(x, valid)[0].sum(), x)
    (alone,) = torch.autograd.grad(model(x[:1, valid[0]])[0].sum(), x)
    close(grad[0, valid[0]], alone[0, valid[0]])
    assert bool((grad[~valid] == 0).all())


def test_padding_is_refused_where_tokens_see_later_ones():
    with pytest.raises(UnsupportedError, match="literal=True"):
        build("MAC", literal=True).padded(tokens(), torch.ones(B, N, dtype=torch.bool))
    with pytest.raises(ShapeError, match="valid has shape"):
        build("MAG").padded(tokens(), torch.ones(B, N + 1, dtype=torch.bool))


@KINDS
def test_identity_9_rows_are_independent_and_a_new_stream_remembers_nothing(kind):
    model, x = build(kind), tokens()
    both = model(x)[0]
    for b in range(B):
        close(model(x[b : b + 1])[0], both[b : b + 1])
    model(tokens(seed=4))
    assert torch.equal(model(x)[0], both)


@KINDS
def test_the_state_of_a_stream_stays_small_and_is_never_changed_in_place(kind):
    model, state, sizes = build(kind), None, []
    for i in range(40):
        before = state
        out, state = model(tokens(1, seed=i), before)
        again, _ = model(tokens(1, seed=i), before) if before is not None else (out, None)
        assert torch.equal(out, again)
        sizes.append(0 if state.keys is None else state.keys.length)
    assert max(sizes) <= max(2 * SEGMENT, WINDOW - 1 + FIXED)


@KINDS
def test_training_stops_where_the_state_is_detached(kind):
    model = build(kind)
    x = tokens(8).requires_grad_()
    _, state = model(x)
    out, _ = model(tokens(8, seed=2), state)
    assert torch.autograd.grad(out.sum(), x, retain_graph=True, allow_unused=True)[0] is not None
    out, _ = model(tokens(8, seed=2), state.detach())
    assert torch.autograd.grad(out.sum(), x, allow_unused=True)[0] is None


@KINDS
def test_every_parameter_learns(kind):
    model = build(kind)
    model(tokens())[0].square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0] == []


@KINDS
def test_state_dict_deepcopy_autocast_and_low_precision(kind):
    model, x = build(kind).float(), tokens().float()
    with torch.no_grad():
        expected = model(x)[0]
        assert torch.equal(copy.deepcopy(model)(x)[0], expected)
        other = build(kind, memory=memory(momentum=True)).float()
        for p in other.parameters():
            p.add_(1.0)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x)[0], expected)
        scale = float(expected.abs().max())
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x)[0].float()
        low, state = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert state.memory.memory.weights[0].dtype == torch.float32
        for got in (cast, low.float()):
            assert float((got - expected).abs().mean()) < 0.03 * scale


@KINDS
def test_the_backbone_takes_them_with_a_memory(kind):
    model = DecoderLM(11, DIM, 2, attention=lambda i: Recurrent(build(kind), i)).double().eval()
    ids = torch.randint(11, (2, 15), generator=torch.Generator().manual_seed(0))
    kept, parts = Memory(), []
    for piece in ids.split((4, 1, 7, 3), 1):
        parts.append(model(piece, memory=kept))
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-10, rtol=1e-10)


def test_compiles():
    model, x = memory(depth=1, conv=2).float(), tokens(4).float()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x)[0], model(x)[0])


def test_another_chunk_or_segment_is_refused():
    state = build("MAC")(tokens(3))[1]
    with pytest.raises(ShapeError, match="segment 6 and the layer has 5"):
        build("MAC", segment=5)(tokens(3), state)
    with pytest.raises(ShapeError, match="chunk 4 and the layer has 8"):
        build("LMM", memory=memory(chunk=8))(tokens(3), build("LMM")(tokens(3))[1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: memory(activation="relu"), ConfigError, "activation is 'relu'"),
        (lambda: memory(num_heads=5), ConfigError, "num_heads=5"),
        (lambda: memory(depth=0), ConfigError, "depth is 0"),
        (lambda: memory(theta_max=-0.1), ConfigError, "theta_max is -0.1"),
        (lambda: memory()(tokens()[..., :5]), ShapeError, r"\(batch, length, 12\)"),
        (lambda: memory()(tokens(), memory().init_state(3)), ShapeError, "batch 3"),
        (lambda: LMM(DIM, persistent=-1), ConfigError, "persistent is -1"),
        (lambda: LMM(2 * DIM, memory=memory()), ConfigError, "dim=24"),
        (lambda: MAC(DIM, 5), ConfigError, "num_heads=5"),
        (lambda: MAG(DIM, 2, window=0), ConfigError, "window"),
        (lambda: build("MAL")(tokens()[..., :5]), ShapeError, r"\(batch, length, 12\)"),
        (
            lambda: build("MAC", literal=True)(tokens(3), build("MAC", literal=True)(tokens(3))[1]),
            UnsupportedError,
            "whole segments",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
