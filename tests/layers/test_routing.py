"""Routing attention: the identities of its spec sheet, against loops over clusters written here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.layers.kmeans import Centroids, assign, clustering_loss, nearest_tokens, normalise, update
from foveal.layers.rotary import rotary, rotate
from foveal.layers.routing import RoutingAttention, RoutingMemory

B, N, DIM, HEADS = 2, 40, 32, 4
D = DIM // HEADS
MODES = pytest.mark.parametrize(("mode", "causal"), [("strict", True), ("paper", True), ("paper", False)])


def layer(**changes: object) -> RoutingAttention:
    torch.manual_seed(0)
    fields = {"num_heads": HEADS, "clusters": 5, "window": 9, "rotary": False, "local_block": 8, **changes}
    return RoutingAttention(DIM, **fields).double().eval()


def tokens(length: int = N, seed: int = 0, batch: int = B) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(model: RoutingAttention) -> Centroids:
    return model.initial_state(seed=3, dtype=torch.float64)


def heads_of(model: RoutingAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised q, k and v of the routing heads, ``(B, R, N, D)``."""
    r = model.routing_heads
    q, k, v = model._project(x)
    q = normalise(q[:, :r])
    return q, q if model.causal else normalise(k[:, :r]), v[:, :r]


@torch.no_grad()
def by_definition(model: RoutingAttention, x: Tensor, state: Centroids, valid: Tensor | None = None) -> Tensor:
    """Routing heads ``(B, R, N, D)``: one token after the other, one cluster after the other."""
    q, k, v = heads_of(model, x)
    out = torch.zeros_like(q)
    n = x.shape[1]
    for b in range(x.shape[0]):
        real = [i for i in range(n) if valid is None or valid[b, i]]
        for h in range(model.routing_heads):
            score_q, score_k = q[b, h] @ state.centres[h].T, k[b, h] @ state.centres[h].T
            for i in real:
                parts = []
                if model.mode == "strict":
                    own = score_q.argmax(-1)
                    earlier = [j for j in real if j <= i and own[j] == own[i]]
                    sets = [earlier[-model.window :]]
                else:
                    sets = []
                    for c in range(model.clusters):
                        best_q = sorted(real, key=lambda j: -float(score_q[j, c]))[: model.window]
                        best_k = sorted(real, key=lambda j: -float(score_k[j, c]))[: model.window]
                        if i in best_q:
                            sets.append([j for j in best_k if j <= i or not model.causal])
                for members in sets:
                    members = [j for j in members if j != i or not model.mask_self]
                    if not members:
                        parts.append(torch.zeros(D, dtype=q.dtype))
                        continue
                    keys, values = k[b, h, members], v[b, h, members]
                    if model.rotary:
                        turn = [rotary(torch.tensor(p)[:, None], D) for p in ([i], members)]
                        own_q, keys = (
                            rotate(q[b : b + 1, h : h + 1, i : i + 1], turn[0])[0, 0],
                            rotate(keys[None, None], turn[1])[0, 0],
                        )
                    else:
                        own_q = q[b, h, i : i + 1]
                    parts.append(torch.softmax(own_q @ keys.T * model.scale, -1)[0] @ values)
                if parts:
                    out[b, h, i] = torch.stack(parts).sum(0) / (len(parts) + model.count_offset)
    return out


def routed(model: RoutingAttention, x: Tensor, state: Centroids, valid: Tensor | None = None) -> Tensor:
    """The layer's routing heads before the output projection."""
    eye = replace_projection(model)
    return eye(x, state, valid=valid).out.unflatten(-1, (HEADS, D)).transpose(1, 2)[:, : model.routing_heads]


def replace_projection(model: RoutingAttention) -> RoutingAttention:
    with torch.no_grad():
        model.out.weight.copy_(torch.eye(DIM))
    return model


@MODES
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("mask_self", [False, True])
def test_identity_2_equals_dense_attention_inside_every_cluster(mode, causal, rotary, mask_self):
    model = layer(mode=mode, causal=causal, rotary=rotary, mask_self=mask_self)
    state = state_of(model)
    torch.testing.assert_close(
        routed(model, tokens(), state), by_definition(model, tokens(), state), atol=1e-9, rtol=1e-9
    )


@MODES
def test_padding_is_never_a_member(mode, causal):
    model, x = layer(mode=mode, causal=causal), tokens()
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[0, 31:] = valid[1, :5] = False
    state = state_of(model)
    got = routed(model, x, state, valid)
    torch.testing.assert_close(got, by_definition(model, x, state, valid), atol=1e-9, rtol=1e-9)
    noise = torch.where(
        valid[..., None], x, 100 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9))
    )
    kept = valid[:, None, :, None].expand_as(got)
    assert torch.equal(routed(model, noise, state, valid)[kept], got[kept])


@pytest.mark.parametrize("mode", ["strict", "paper"])
def test_route_is_what_the_routing_heads_do(mode):
    model, x = layer(mode=mode, mask_self=True), tokens()
    q, _, v = heads_of(model, x)
    out, coverage = model.route(q, v, state_of(model))
    torch.testing.assert_close(out, by_definition(model, x, state_of(model)))
    assert coverage == model(x, state_of(model)).coverage
    with pytest.raises(UnsupportedError, match="causal"):
        layer(mode="paper", causal=False).route(q, v, state_of(model))


@pytest.mark.parametrize("causal", [True, False])
def test_identity_1_one_cluster_of_everything_is_full_attention(causal):
    model = layer(mode="paper", causal=causal, clusters=1, window=N)
    q, k, v = heads_of(model, tokens())
    logits = q @ k.mT * model.scale
    if causal:
        logits = logits.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf)
    got = routed(model, tokens(), state_of(model))
    torch.testing.assert_close(got, torch.softmax(logits, -1) @ v, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("window", [1, 9, N, 3 * N])
def test_identity_3_members_are_distinct_sorted_and_counted(window):
    model = layer(mode="paper", window=window)
    q, _, _ = heads_of(model, tokens())
    index, real = nearest_tokens(q, state_of(model).centres, window)
    width = min(window, N)
    assert index.shape == (B, HEADS, 5, width) and bool(real.all())
    assert bool((index.diff(dim=-1) > 0).all())
    counts = torch.nn.functional.one_hot(index, N).sum((2, 3))
    assert bool((counts.sum(-1) == 5 * width).all())
    model.count_offset = 0.0
    out = routed(model, tokens(), state_of(model))
    assert bool((out[counts == 0] == 0).all())
    assert model(tokens(), state_of(model)).coverage == pytest.approx(float((counts > 0).double().mean()))


def test_the_released_average_shrinks_outputs():
    model = layer(mode="paper", window=N, clusters=1)
    exact = routed(model, tokens(), state_of(model))
    model.count_offset = 0.01
    torch.testing.assert_close(routed(model, tokens(), state_of(model)), exact / 1.01)


def test_identity_4_permutations():
    model, x = layer(mode="paper", causal=False), tokens()
    state = state_of(model)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x[:, order], state).out, model(x, state).out[:, order], atol=1e-10, rtol=1e-10)
    names = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    other = Centroids(*(t[:, names] for t in (state.centres, state.sums, state.counts)))
    for mode in ("paper", "strict"):
        model = layer(mode=mode)
        torch.testing.assert_close(model(x, other).out, model(x, state).out, atol=1e-10, rtol=1e-10)


def test_identity_5_the_future_reaches_the_past_in_paper_mode_only():
    """Strict outputs stay to the last digits, not bit by bit: a token's place in the order by cluster, and with it the order
    of its sums, depends on how many tokens of smaller clusters come later."""
    x = tokens(256)
    other = x.clone()
    other[:, 224:] = tokens(32, seed=7)
    strict, paper = (layer(mode=mode, clusters=16, window=16, local_heads=1) for mode in ("strict", "paper"))
    state = strict.initial_state(dtype=torch.float64)
    torch.testing.assert_close(strict(x, state).out[:, :224], strict(other, state).out[:, :224], atol=1e-12, rtol=0)
    changed = (paper(x, state).out[:, :224] != paper(other, state).out[:, :224]).any(-1)
    assert bool(changed.any()) and not bool(changed.all()), "the declared leak: selection, in some rows"


def test_identity_6_moving_averages():
    g = torch.Generator().manual_seed(0)
    x = normalise(torch.randn(4, 2, 30, D, generator=g, dtype=torch.float64))
    centres = normalise(torch.randn(2, 3, D, generator=g, dtype=torch.float64))
    state = Centroids(centres, centres, torch.zeros(2, 3, dtype=torch.float64))
    exact = update(state, x, 0.0, epsilon=0.0)
    own = assign(x, centres)
    for h in range(2):
        for c in range(3):
            torch.testing.assert_close(exact.centres[h, c], x[:, h][own[:, h] == c].mean(0))
    halves = [update(state, part, 0.0, epsilon=0.0) for part in x.split(2)]
    joined = sum(p.sums for p in halves), sum(p.counts for p in halves)
    torch.testing.assert_close(joined[0] / joined[1][..., None], exact.centres)
    slow = update(exact, x, 0.9)
    torch.testing.assert_close(
        slow.counts, 0.9 * exact.counts + 0.1 * torch.nn.functional.one_hot(assign(x, exact.centres), 3).sum((0, 2))
    )
    far = replace(
        exact,
        centres=torch.cat([exact.centres[:, :2], -1000 * x.mean((0, 2))[:, None]], 1),
        counts=torch.tensor([[1.0, 1, 0]] * 2).double(),
    )
    assert torch.equal(update(far, x[:, :, :0], 0.9).centres[:, 2], far.centres[:, 2]), "an empty cluster stays"


def test_centroids_move_in_training_alone_and_the_state_is_never_changed():
    model, x = layer(), tokens()
    state = state_of(model)
    before = state.centres.clone()
    assert model(x, state).state is state
    model.train()
    moved = model(x, state).state
    assert not torch.equal(moved.centres, before) and torch.equal(state.centres, before)


def test_fitted_centroids_find_planted_clusters():
    model = layer(clusters=4)
    g = torch.Generator().manual_seed(0)
    centres, label = 3 * torch.randn(4, DIM, generator=g, dtype=torch.float64), torch.arange(N) % 4
    x = centres[label] + 0.05 * torch.randn(B, N, DIM, generator=g, dtype=torch.float64)
    state = model.fit_state(x)
    own = assign(heads_of(model, x)[0], state.centres)
    for h in range(HEADS):
        found = [own[:, h][:, label == c].unique() for c in range(4)]
        assert all(len(f) == 1 for f in found)
    assert torch.allclose(state.centres.norm(dim=-1), torch.full((HEADS, 4), D**0.5, dtype=torch.float64), atol=1e-3)


@MODES
def test_identity_7_gradients_are_those_of_the_definition(mode, causal):
    model = layer(mode=mode, causal=causal)
    state, weight = (
        state_of(model),
        torch.randn(B, HEADS, N, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
    )
    found = []
    for function in (routed, by_definition_with_gradients):
        x = tokens().requires_grad_()
        (grad,) = torch.autograd.grad((function(model, x, state) * weight).sum(), x)
        found.append(grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-8, rtol=1e-8)


def by_definition_with_gradients(model: RoutingAttention, x: Tensor, state: Centroids) -> Tensor:
    """Dense attention under the membership as a mask."""
    q, k, v = heads_of(model, x)
    logits = q @ k.mT * model.scale
    future = ~torch.ones(N, N, dtype=torch.bool).tril() if model.causal else torch.zeros(N, N, dtype=torch.bool)
    if model.mode == "strict":
        own = assign(q.detach(), state.centres)
        seen = (own[..., :, None] == own[..., None, :]) & ~future
        recent = seen.flip(-1).cumsum(-1).flip(-1) <= model.window
        return torch.softmax(logits.masked_fill(~(seen & recent), -torch.inf), -1) @ v
    total, count = 0, 0
    for c in range(model.clusters):
        member = [(t.detach() @ state.centres[:, c, :, None])[..., 0] for t in (q, k)]
        in_q, in_k = (
            torch.zeros_like(m, dtype=torch.bool).scatter_(-1, m.topk(model.window).indices, True) for m in member
        )
        seen = in_k[..., None, :] & ~future & in_q[..., None]
        weights = torch.softmax(logits.masked_fill(~seen, -1e30), -1).masked_fill(~seen, 0.0)
        total, count = total + weights @ v, count + in_q
    return total / count.clamp(min=1)[..., None]


def test_the_clustering_loss_moves_tokens_but_not_centroids():
    model, state = layer(beta=0.5), state_of(layer())
    centres = state.centres.clone().requires_grad_()
    x = tokens().requires_grad_()
    loss = model(x, replace(state, centres=centres)).loss
    grads = torch.autograd.grad(loss, (x, centres), allow_unused=True)
    assert grads[0] is not None and float(grads[0].abs().max()) > 0 and grads[1] is None
    q = heads_of(model, x)[0].detach()
    own = state.centres[torch.arange(HEADS)[None, :, None], assign(q, state.centres)]
    assert float(loss.detach()) == pytest.approx(2 * 0.5 * float((q - own).square().mean()))
    assert float(clustering_loss(state.centres[None], state.centres)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("cuts", [(1,) * N, (N - 3, 1, 1, 1), (17, 1, 22)])
@pytest.mark.parametrize("rotary", [False, True])
def test_identity_8_strict_decoding_equals_the_parallel_forward(cuts, rotary):
    model, x = layer(local_heads=1, rotary=rotary, mix_heads=True), tokens()
    state, memory, parts = state_of(model), RoutingMemory(), []
    for part in x.split(cuts, 1):
        parts.append(model(part, state, memory=memory).out)
    torch.testing.assert_close(torch.cat(parts, 1), model(x, state).out, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("cuts", [(1,) * 20, (15, 1, 4)])
def test_paper_decoding_equals_the_last_row_of_every_prefix(cuts):
    model, x = layer(mode="paper", local_heads=1), tokens(20)
    state, memory, parts = state_of(model), RoutingMemory(), []
    for part in x.split(cuts, 1):
        parts.append(model(part, state, memory=memory).out)
    first = cuts[0]
    expected = [model(x[:, :first], state).out] + [model(x[:, : n + 1], state).out[:, n:] for n in range(first, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), torch.cat(expected, 1), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_local_heads_see_their_block_and_its_neighbours(causal):
    model = replace_projection(layer(local_heads=2, mode="paper", causal=causal))
    x = tokens(43)
    got = model(x, state_of(model)).out.unflatten(-1, (HEADS, D)).transpose(1, 2)[:, 2:]
    q, k, v = model._project(x)
    local_q, local_k, local_v = q[:, 2:], k[:, 0 if causal else 2 :], v[:, 2:]
    block = torch.arange(43) // 8
    distance = block[:, None] - block
    seen = (
        (distance.abs() <= 1)
        if not causal
        else ((distance >= 0) & (distance <= 1) & torch.ones(43, 43, dtype=torch.bool).tril())
    )
    expected = torch.softmax((local_q @ local_k.mT * model.scale).masked_fill(~seen, -torch.inf), -1) @ local_v
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_strict_routing_crosses_tiles():
    """Clusters and windows that end inside, at and beyond tiles of 128."""
    for window, clusters in ((128, 2), (129, 1), (40, 3)):
        model = layer(window=window, clusters=clusters)
        x, state = tokens(300, batch=1), model.initial_state(dtype=torch.float64)
        torch.testing.assert_close(routed(model, x, state), by_definition(model, x, state), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: layer(mode="strikt"), ConfigError, "Did you mean 'strict'"),
        (lambda: layer(causal=False), ConfigError, "mode='paper'"),
        (lambda: layer(num_heads=5), ConfigError, "num_heads=5"),
        (lambda: layer(local_heads=4), ConfigError, "local_heads=4"),
        (lambda: layer(window=0), ConfigError, "window is 0"),
        (lambda: RoutingAttention(0), ConfigError, "dim is 0"),
        (lambda: layer(num_heads=0), ConfigError, "num_heads is 0"),
        (lambda: layer(local_heads=-1), ConfigError, "local_heads is -1"),
        (lambda: layer(clusters="4"), ConfigError, "clusters is '4'"),
        (lambda: layer(window=2.5), ConfigError, "window is 2.5"),
        (lambda: layer(count_offset=-1), ConfigError, "count_offset is -1"),
        (lambda: layer(beta=-1), ConfigError, "beta is -1"),
        (lambda: layer(beta="1"), ConfigError, "beta is '1'"),
        (lambda: layer(scale=float("nan")), ConfigError, "scale is nan; expected a finite number[.]"),
        (lambda: layer(scale=-float("inf")), ConfigError, "scale is -inf"),
        (lambda: layer(decay=1.0), ConfigError, "decay is 1.0"),
        (lambda: layer()(tokens(), layer(clusters=3).initial_state()), ShapeError, r"\(4, 5, 8\)"),
        (lambda: layer()(tokens()[..., :7], layer().initial_state()), ShapeError, "32"),
        (lambda: layer()(tokens(), layer().initial_state(), valid=torch.ones(2, 3)), ShapeError, "valid"),
        (
            lambda: layer(mode="paper", causal=False)(tokens(), layer().initial_state(), memory=RoutingMemory()),
            UnsupportedError,
            "causal=True",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def filled(batch: int = B, **changes: object) -> RoutingMemory:
    """The memory of another layer after five tokens."""
    model, memory = layer(**changes), RoutingMemory()
    model(tokens(5, batch=batch), state_of(model), memory=memory)
    return memory


@pytest.mark.parametrize(
    "memory",
    [
        lambda: filled(batch=3),
        lambda: filled(num_heads=2),
        lambda: filled(local_heads=1),
        lambda: replace(filled(), keys=None),
        lambda: replace(filled(), routed=filled().routed[:, :, 1:]),
        lambda: RoutingMemory(*[torch.zeros(3)] * 3),
        lambda: torch.zeros(3),
    ],
)
@pytest.mark.parametrize("mode", ["strict", "paper"])
def test_a_memory_of_another_request_or_layer_is_refused(memory, mode):
    model = layer(mode=mode)
    with pytest.raises(ShapeError, match=r"^memory "):
        model(tokens(2), state_of(model), memory=memory())


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "state is a NoneType"),
        (torch.zeros(HEADS, 5, D), "state is a Tensor"),
        (Centroids(torch.zeros(HEADS, 5, D), torch.zeros(HEADS, 3, D), torch.zeros(HEADS, 5)), "state.sums has shape"),
        (Centroids(*[torch.zeros(HEADS, 5, D)] * 3), "state.counts has shape"),
    ],
)
def test_another_state_is_refused_in_every_call(state, words):
    model, q = layer().train(), torch.zeros(B, HEADS, 6, D, dtype=torch.float64)
    for call in (lambda: model(tokens(), state), lambda: model.route(q, q, state)):
        with pytest.raises(ShapeError, match=words):
            call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, q: m.route(q[:, 1:], q, state_of(m)), "q has shape"),
        (lambda m, q: m.route(q[..., 1:], q, state_of(m)), "q has shape"),
        (lambda m, q: m.route(q[0], q, state_of(m)), "q has shape"),
        (lambda m, q: m.route(q, q[:, :, 1:], state_of(m)), "v has shape"),
        (lambda m, _: m.fit_state(tokens()[0]), "x has shape"),
        (lambda m, _: m.fit_state(tokens()[..., 1:]), "x has shape"),
        (lambda m, _: m.fit_state(tokens(), valid=torch.ones(B, 3, dtype=torch.bool)), "valid has shape"),
    ],
)
def test_fitting_and_routing_check_their_shapes(call, words):
    with pytest.raises(ShapeError, match=words):
        call(layer(), torch.zeros(B, HEADS, 6, D, dtype=torch.float64))
