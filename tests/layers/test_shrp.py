"""SHRP's expert attention: the identities of its spec sheet that concern one layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError
from foveal.layers.shrp import Expander, ExpertAttention, PrunedExpertLayer

B, N, DIM, HEADS = 3, 11, 24, 4
FORMS = pytest.mark.parametrize("form", ["dense", "sparse"])


def layer(**changes: object) -> ExpertAttention:
    torch.manual_seed(0)
    return ExpertAttention(DIM, HEADS, **{"expander": 10, **changes}).double()


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(B, N, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded() -> Tensor:
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[0, 7:] = valid[1, :3] = False
    return valid


def force(model: ExpertAttention, head: int) -> ExpertAttention:
    with torch.no_grad():
        model.router.bias.fill_(-1e4)[head] = 1e4
    return model


def by_loops(model: ExpertAttention, x: Tensor, valid: Tensor) -> Tensor:
    """One token after the other, its own head alone."""
    out = torch.zeros_like(x)
    d = model.head_dim
    for b in range(B):
        for i in range(N):
            logits = model.router(x[b, i])
            head = int(logits.argmax())
            kv = head * model.num_kv_heads // model.num_heads
            q = (model.q.weight @ x[b, i] + model.q.bias)[head * d : head * d + d]
            seen = [j for j in range(N) if valid[b, j]]
            k, v = (f(x[b, seen])[:, kv * d : kv * d + d] for f in (model.k, model.v))
            y = torch.softmax(k @ q / d**0.5, 0) @ v
            if model.gate == "prob":
                y = y * torch.softmax(logits / model.temperature, 0)[head]
            hidden = nn.functional.gelu(model.expander.inner(y))
            out[b, i] = model.norm(x[b, i] + model.expander.outer(hidden))
    return out


@FORMS
@pytest.mark.parametrize("gate", ["straight_through", "prob"])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_the_layer_is_its_equations(form, gate, kv):
    model, valid = layer(form=form, gate=gate, num_kv_heads=kv, temperature=0.7), padded()
    got = model(tokens(), valid)
    torch.testing.assert_close(got[valid], by_loops(model, tokens(), valid)[valid], atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(
        model(tokens()), by_loops(model, tokens(), torch.ones_like(valid)), atol=1e-11, rtol=1e-11
    )


@pytest.mark.parametrize("head", range(HEADS))
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("level", ["token", "mean", "cls"])
def test_identities_1_and_2_where_all_tokens_choose_a_head_pruning_changes_nothing(head, kv, level):
    model = force(layer(num_kv_heads=kv, route_level=level), head)
    assert bool((model.route(tokens(), padded()).choice == head).all())
    torch.testing.assert_close(model(tokens(), padded()), model.pruned(head)(tokens(), padded()), atol=1e-12, rtol=0)
    other = (head + 1) % HEADS
    assert not torch.allclose(model(tokens()), model.pruned(other)(tokens()))


def test_the_probability_gate_is_folded_by_its_value():
    """All gates equal: folding is exact for the part before the activation."""
    model = layer(gate="prob", expander=0)
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    gate = float(model.route(tokens()).gate.detach()[0, 0])
    assert 0.25 < gate < 0.6
    torch.testing.assert_close(model(tokens()), model.pruned(1, gate)(tokens()), atol=1e-12, rtol=0)
    assert not torch.allclose(model(tokens()), model.pruned(1)(tokens()))


def test_identity_3_sliced_experts_are_the_heads_of_multi_head_attention():
    torch.manual_seed(0)
    host, model = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double(), layer()
    with torch.no_grad():
        for part, w, b in zip(
            (model.q, model.k, model.v), host.in_proj_weight.chunk(3), host.in_proj_bias.chunk(3), strict=True
        ):
            part.weight.copy_(w)
            part.bias.copy_(b)
    got = host.out_proj(model.experts(tokens(), padded()).transpose(1, 2).flatten(2))
    expected = host(tokens(), tokens(), tokens(), key_padding_mask=~padded(), need_weights=False)[0]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("gate", ["straight_through", "prob"])
@pytest.mark.parametrize("kv", [4, 2])
def test_identity_4_dense_equals_sparse_forward_and_gradients(gate, kv):
    found = []
    for form in ("dense", "sparse"):
        model, x = layer(form=form, gate=gate, num_kv_heads=kv), tokens().requires_grad_()
        out = model(x, padded())
        out[padded()].square().sum().backward()
        found.append([out.detach()[padded()], x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, atol=1e-11, rtol=1e-11)


@FORMS
@pytest.mark.parametrize("gate", ["straight_through", "prob"])
def test_identity_5_gradients_reach_the_router_and_no_unselected_query(form, gate):
    model = layer(form=form, gate=gate)
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([9.0, 9.0, -9.0, -9.0]))
    assert set(model.route(tokens()).choice.unique().tolist()) == {0, 1}
    model(tokens()).square().sum().backward()
    d = model.head_dim
    for grad in (model.q.weight.grad, model.k.weight.grad, model.v.weight.grad):
        used = grad.unflatten(0, (HEADS, d)).abs().amax((1, 2))
        assert bool((used[:2] > 0).all()) and bool((used[2:] == 0).all())
    assert float(model.router.weight.grad.abs().max()) > 0


@FORMS
def test_identity_10_padding_changes_no_real_token(form):
    model, valid = layer(form=form), padded()
    noise = torch.where(valid[..., None], tokens(), 50 * tokens(5))
    assert torch.equal(model(noise, valid)[valid], model(tokens(), valid)[valid])
    alone = model(tokens()[1:2, 3:])
    torch.testing.assert_close(model(tokens(), valid)[1:2, 3:], alone, atol=1e-12, rtol=1e-12)
    mean = layer(form=form, route_level="mean")
    assert torch.equal(mean.route(noise, valid).choice[:, 5], mean.route(tokens(), valid).choice[:, 5])


@FORMS
def test_identity_11_experts_and_router_permuted_together_leave_the_output(form):
    model, order = layer(form=form), torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            for kind in ("weight", "bias"):
                rows = getattr(getattr(model, name), kind).unflatten(0, (HEADS, -1))
                getattr(getattr(other, name), kind).copy_(rows[order].flatten(0, 1))
        other.router.weight.copy_(model.router.weight[order])
        other.router.bias.copy_(model.router.bias[order])
    torch.testing.assert_close(other(tokens()), model(tokens()), atol=1e-12, rtol=1e-12)


def test_sequence_routing_sends_all_tokens_one_way_and_average_takes_the_mean():
    for level in ("mean", "cls"):
        choice = layer(route_level=level).route(tokens(), padded()).choice
        assert bool((choice == choice[:, :1]).all())
    model = layer(form="average")
    expected = model.norm(tokens() + model.expander(model.experts(tokens()).mean(1)))
    torch.testing.assert_close(model(tokens()), expected)


def test_a_row_of_padding_alone_is_finite():
    valid = padded()
    valid[2] = False
    for form in ("dense", "sparse"):
        for level in ("token", "mean"):
            assert bool(layer(form=form, route_level=level)(tokens(), valid).isfinite().all())


def test_round_trips_autocast_and_compile():
    model, x = layer().float(), tokens().float()
    expected = model(x)
    twin = layer().float()
    nn.init.normal_(twin.q.weight)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected) and torch.equal(copy.deepcopy(model)(x), expected)
    compiled = torch.compile(model.pruned(1), backend="eager")
    torch.testing.assert_close(compiled(x), model.pruned(1)(x))
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.route(x).probabilities.dtype == torch.float32, "top-1 in half precision may flip"
        torch.testing.assert_close(model(x).float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: layer(gate="straight"), ConfigError, "Did you mean 'straight_through'"),
        (lambda: layer(route_level="tokens"), ConfigError, "Did you mean 'token'"),
        (lambda: layer(form="spars"), ConfigError, "Did you mean 'sparse'"),
        (lambda: layer(num_kv_heads=3), ConfigError, "num_kv_heads=3"),
        (lambda: layer(temperature=0.0), ConfigError, "temperature=0.0"),
        (lambda: layer(expander=-1), ConfigError, "expander=-1"),
        (lambda: layer().pruned(4), ConfigError, "0 to 3"),
        (lambda: layer()(tokens()[..., :5]), ShapeError, "24"),
        (lambda: layer()(tokens(), padded()[:, :4]), ShapeError, "valid"),
        (lambda: PrunedExpertLayer(8, 2, Expander(2, 8, 4))(torch.zeros(2, 8)), ShapeError, "length, 8"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
