"""EEG-tGAT's layers: GATv2 as loops over edges, attention over time, dropout over time, graphs."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError
from foveal.layers.gatv2 import GATv2, softmax_by
from foveal.layers.graphs import correlation_graph, edges, full_graph, knn_graph
from foveal.layers.tgat import TemporalAttention, TemporalDropout

N, F, D = 9, 6, 5

CASES = {
    "plain": {},
    "heads": {"heads": 3},
    "mean": {"heads": 3, "concat": False},
    "shared": {"heads": 2, "share_weights": True},
    "residual": {"residual": True, "bias": False},
    "no loops": {"add_self_loops": False},
    "slope": {"negative_slope": 0.6},
}
EVERY = pytest.mark.parametrize("case", CASES)


def layer(case: str = "plain", **more: object) -> GATv2:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GATv2(F, D, **{**CASES[case], **more}).double().eval()
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(torch.randn(p.shape, dtype=p.dtype))
    return made


def nodes(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*(shape or (N, F)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_edges(count: int = 30, n: int = N, seed: int = 2) -> Tensor:
    """With duplicates and loops; node 3 hears nobody."""
    found = torch.randint(0, n, (2, count), generator=torch.Generator().manual_seed(seed))
    return found[:, found[1] != 3]


def by_definition(m: GATv2, left: Tensor, right: Tensor, edge_index: Tensor, attr: Tensor | None = None, loops=None) -> Tensor:  # fmt: skip
    """One target after the other, one edge after the other."""
    pairs = [(int(s), int(t), None if attr is None else attr[e]) for e, (s, t) in enumerate(edge_index.T)]
    if m.add_self_loops:
        pairs = [p for p in pairs if p[0] != p[1]]
        pairs += [(i, i, None if attr is None else loops(i, pairs)) for i in range(min(len(left), len(right)))]
    out = []
    for i in range(len(right)):
        heads = []
        for h in range(m.heads):
            rows = slice(h * m.out_channels, (h + 1) * m.out_channels)

            def through(linear, x, rows=rows):
                return linear.weight[rows] @ x + (0 if linear.bias is None else linear.bias[rows])

            scores, values = [], []
            for s, t, e in pairs:
                if t == i:
                    inner = through(m.lin_r, right[i]) + through(m.lin_l, left[s])
                    inner = inner if e is None else inner + m.lin_edge.weight[rows] @ e
                    scores.append(torch.where(inner > 0, inner, m.negative_slope * inner) @ m.att[0, h])
                    values.append(through(m.lin_l, left[s]))
            share = torch.softmax(torch.stack(scores), 0) if scores else []
            heads.append(sum((a * v for a, v in zip(share, values, strict=True)), torch.zeros(m.out_channels).double()))
        joined = torch.cat(heads) if m.concat else torch.stack(heads).mean(0)
        joined = joined if m.res is None else joined + m.res.weight @ right[i]
        out.append(joined if m.bias is None else joined + m.bias)
    return torch.stack(out)


# --- GATv2 ------------------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_equals_its_definition(case):
    m, x, e = layer(case), nodes(), some_edges()
    torch.testing.assert_close(m(x, e), by_definition(m, x, x, e))


@pytest.mark.parametrize("fill", ["mean", "add", "max", 0.5])
@torch.no_grad()
def test_edge_features_and_those_of_added_loops(fill):
    m, x, e = layer("heads", edge_dim=2, fill_value=fill), nodes(), some_edges()
    attr = nodes(e.shape[1], 2)

    def own(i: int, pairs: list) -> Tensor:
        into = [a for _, t, a in pairs if t == i]
        if not isinstance(fill, str):
            return torch.full((2,), fill, dtype=torch.float64)
        if not into:
            return torch.zeros(2, dtype=torch.float64)
        stacked = torch.stack(into)
        return {"mean": stacked.mean(0), "add": stacked.sum(0), "max": stacked.max(0).values}[fill]

    torch.testing.assert_close(m(x, e, attr), by_definition(m, x, x, e, attr, own))


@torch.no_grad()
def test_bipartite_graphs():
    m = GATv2((F, 4), D, heads=2).double()
    left, right = nodes(N, F), nodes(7, 4)
    e = torch.stack([torch.randint(0, N, (20,)), torch.randint(0, 7, (20,))])
    torch.testing.assert_close(m((left, right), e), by_definition(m, left, right, e))


@given(n=st.integers(1, 8), count=st.integers(0, 25), case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 99))
@torch.no_grad()
def test_random_graphs(n, count, case, seed):
    m, x = layer(case), nodes(n, F, seed=seed)
    e = torch.randint(0, n, (2, count), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(m(x, e), by_definition(m, x, x, e))


@torch.no_grad()
def test_identity_5_nodes_may_be_renamed_and_graphs_do_not_leak():
    m, x, e = layer("heads"), nodes(), some_edges()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    place = torch.empty_like(order)
    place[order] = torch.arange(N)
    torch.testing.assert_close(m(x[order], place[e]), m(x, e)[order])
    other = nodes(seed=5)
    both = m(torch.cat([x, other]), torch.cat([e, e + N], 1))
    torch.testing.assert_close(both, torch.cat([m(x, e), m(other, e)]))


@EVERY
@torch.no_grad()
def test_identity_6_the_dense_form_equals_the_sparse_one(case):
    m, x = layer(case), nodes(3, N, F)
    for adjacency in (full_graph(N), torch.rand(N, N, generator=torch.Generator().manual_seed(4)) > 0.7):
        adjacency[3] = False
        out, share = m.dense(x, adjacency)
        torch.testing.assert_close(out.flatten(0, 1), m(x.flatten(0, 1), edges(adjacency, 3)))
        each = torch.stack([adjacency, full_graph(N), adjacency])
        torch.testing.assert_close(m.dense(x, each)[0][1], m.dense(x, full_graph(N))[0][1])
        total = share.sum(-1)
        assert bool(((total - 1).abs() < 1e-12).logical_or(total == 0).all())
    torch.testing.assert_close(m.dense(x)[0], m.dense(x, torch.ones(N, N, dtype=torch.bool))[0])


PYG = pytest.mark.skipif(
    importlib.util.find_spec("torch_geometric") is None,
    reason="parity with PyTorch Geometric: pip install --no-deps torch_geometric xxhash",
)


@PYG
@EVERY
@pytest.mark.parametrize("edge_dim", [None, 3])
def test_identity_6_equals_pytorch_geometric(case, edge_dim):
    from torch_geometric.nn import GATv2Conv

    theirs = GATv2Conv(F, D, edge_dim=edge_dim, **CASES[case]).double()
    mine = GATv2(F, D, edge_dim=edge_dim, **CASES[case]).double()
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    x, e = nodes().requires_grad_(), some_edges()
    attr = None if edge_dim is None else nodes(e.shape[1], edge_dim)
    results = []
    for m in (theirs, mine):
        out, (used, share) = m(x, e, attr, return_attention_weights=True)
        results.append((out, used, share, *torch.autograd.grad(out.square().sum(), (x, *m.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_identity_7_gat_ranks_alike_for_all_and_gatv2_does_not():
    """Keys 0 and 1, queries 2 and 3; a = 1, W = identity: query i prefers the key with which it has a positive sum."""
    x = torch.tensor([[4.0, -4.0], [-4.0, 4.0], [3.0, -3.0], [-3.0, 3.0]], dtype=torch.float64)
    m = GATv2(2, 2, add_self_loops=False).double()
    for linear in (m.lin_l, m.lin_r):
        linear.weight.copy_(torch.eye(2))
        linear.bias.zero_()
    m.att.fill_(1.0)
    e = torch.tensor([[0, 1, 0, 1], [2, 2, 3, 3]])
    _, (_, share) = m(x, e, return_attention_weights=True)
    assert float(share[0]) > float(share[1]) and float(share[3]) > float(share[2])
    for right in (torch.randn(2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(20)):
        left = x @ torch.ones(2, dtype=torch.float64)  # GAT: LeakyReLU(a_r·x_i + a_l·x_j), monotone in j's part alone
        gat = torch.nn.functional.leaky_relu(right.sum() + left[:2] + torch.tensor([0.3, 0.1]), 0.2)
        assert int(gat.argmax()) == 0


@torch.no_grad()
def test_identity_8_nodes_without_edges():
    x, none = nodes(), torch.zeros(2, 0, dtype=torch.int64)
    m = layer()
    torch.testing.assert_close(m(x, none), m.lin_l(x) + m.bias)
    m = layer("no loops")
    torch.testing.assert_close(m(x, none), m.bias.expand(N, -1))
    torch.testing.assert_close(m.dense(x[None], torch.zeros(N, N, dtype=torch.bool))[0][0], m.bias.expand(N, -1))


@torch.no_grad()
def test_identity_10_shares_sum_to_one_for_every_target_and_head():
    _, (used, share) = layer("heads")(nodes(), some_edges(), return_attention_weights=True)
    total = torch.zeros(N, 3, dtype=torch.float64).index_add(0, used[1], share)
    torch.testing.assert_close(total, torch.ones(N, 3, dtype=torch.float64))


@pytest.mark.parametrize("case", ["heads", "residual", "no loops"])
def test_identity_10_gradients(case):
    m = layer(case)
    e = torch.tensor([[0, 1, 2, 2, 3], [1, 0, 3, 2, 0]])
    x = nodes(4, F).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: m(t, e), (x,))
    assert torch.autograd.gradcheck(lambda t: m.dense(t[None], full_graph(4))[0], (x,))


def test_dropout_acts_on_the_shares_in_training_alone():
    m = layer(dropout=0.5)
    x = nodes(1, N, F)
    assert torch.equal(m.dense(x)[0], m.dense(x)[0])
    m.train()
    torch.manual_seed(0)
    draws = torch.stack([m.dense(x)[0] for _ in range(3000)])
    assert float(draws.std(0).mean()) > 0.1
    torch.testing.assert_close(draws.mean(0), layer().dense(x)[0], atol=0.2, rtol=0)


def test_softmax_by_group_does_not_overflow():
    scores, group = torch.tensor([[1e4], [1e4 - 1], [-1e4]]), torch.tensor([0, 0, 2])
    got = softmax_by(scores, group, 3)
    torch.testing.assert_close(got[:, 0], torch.tensor([0.7311, 0.2689, 1.0]), atol=1e-4, rtol=0)


def test_as_a_module():
    m, x = layer("heads").float(), nodes().float()
    twin = GATv2(F, D, heads=3)
    twin.load_state_dict(m.state_dict())
    e = some_edges()
    assert torch.equal(twin.eval()(x, e), m(x, e)) and torch.equal(copy.deepcopy(m)(x, e), m(x, e))
    shared = layer("shared")
    assert copy.deepcopy(shared).lin_l.weight is not shared.lin_l.weight and shared.lin_r is shared.lin_l
    with torch.autocast("cpu", torch.bfloat16):
        assert float((m(x, e) - m(x, e).float()).abs().max()) == 0
        low = m(x, e)
    torch.testing.assert_close(low.float(), m(x, e), atol=0.2, rtol=0.1)
    dense = torch.compile(m.dense, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(dense(x[None])[0], m.dense(x[None])[0])


# --- attention over time ----------------------------------------------------------------------------------------------------


def time_attention(channels: int = 4, **options: int) -> TemporalAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TemporalAttention(channels, **options).double()


@given(length=st.integers(1, 20), chunk=st.sampled_from([1, 3, 7, 64]), seed=st.integers(0, 50))
@torch.no_grad()
def test_identity_3_the_mean_of_attention_is_a_weighted_average(length, chunk, seed):
    m, x = time_attention(chunk=chunk), nodes(2, 4, length, seed=seed)
    q, k, v = (f.weight[..., 0] @ x + f.bias[:, None] for f in (m.query, m.key, m.value))
    a = torch.softmax(q.mT @ k / 2, -1)
    expected = v @ a.mT
    torch.testing.assert_close(m(x), expected)
    mean, curve = m.average(x)
    torch.testing.assert_close(mean, expected.mean(-1))
    torch.testing.assert_close(curve, a.mean(1))
    assert bool((curve >= 0).all())
    torch.testing.assert_close(curve.sum(-1), torch.ones(2, dtype=torch.float64))


@torch.no_grad()
def test_identity_4_time_may_be_shuffled():
    m, x = time_attention(), nodes(2, 4, 11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(m(x[..., order]), m(x)[..., order])
    torch.testing.assert_close(m.average(x[..., order])[0], m.average(x)[0])


def test_gradients_of_attention_over_time():
    m, x = time_attention(chunk=3), nodes(2, 4, 7).requires_grad_()
    assert torch.autograd.gradcheck(m, (x,)) and torch.autograd.gradcheck(lambda t: m.average(t)[0], (x,))


# --- dropout over time ------------------------------------------------------------------------------------------------------


MODES = pytest.mark.parametrize("mode", ["timestep", "segment", "feature_map"])


@MODES
def test_identity_9_nothing_without_p_or_in_eval(mode):
    x = nodes(3, 4, 5, 20)
    assert torch.equal(TemporalDropout(0.0, mode)(x), x) and torch.equal(TemporalDropout(0.5, mode).eval()(x), x)


@MODES
@pytest.mark.parametrize("rescale", ["expected", "kept"])
def test_identity_9_what_is_dropped_together(mode, rescale):
    x = torch.ones(6, 4, 5, 40)
    out = TemporalDropout(0.4, mode, length=4, rescale=rescale)(x, torch.Generator().manual_seed(0))
    kept = out != 0
    axes = (1, 2) if mode != "feature_map" else (2, 3)
    assert bool((kept.all(axes) == kept.any(axes)).all()), "all or nothing along these axes"
    assert bool(kept.any()) and not bool(kept.all())
    assert len({tuple(row.flatten().tolist()) for row in kept}) > 1, "drawn for each window"
    if rescale == "kept":
        torch.testing.assert_close(out.mean((1, 2, 3)), torch.ones(6))
    else:
        assert sorted(out.unique().tolist()) == pytest.approx([0, 1 / 0.6])


@MODES
def test_identity_9_the_expectation_is_the_input(mode):
    x = torch.ones(4000, 3, 10)
    mean = TemporalDropout(0.3, mode, length=3)(x, torch.Generator().manual_seed(1)).mean(0)
    torch.testing.assert_close(mean, torch.ones(3, 10), atol=0.06, rtol=0)


@given(length=st.integers(1, 9), time=st.integers(1, 40), seed=st.integers(0, 99))
def test_identity_9_segments_are_whole_except_at_the_borders(length, time, seed):
    keep = TemporalDropout(0.5, "segment", length=length).mask(
        torch.ones(1, 2, time), torch.Generator().manual_seed(seed)
    )
    runs = [len(list(g)) for g in _runs(keep.flatten().tolist())]
    assert all(run % length == 0 for run in runs[1:-1]) and sum(runs) == time


def _runs(values: list[bool]) -> list[list[bool]]:
    out: list[list[bool]] = []
    for v in values:
        if out and out[-1][-1] == v:
            out[-1].append(v)
        else:
            out.append([v])
    return out


# --- graphs -----------------------------------------------------------------------------------------------------------------


def test_graphs():
    assert int(full_graph(15).sum()) == 210
    line = torch.arange(6.0)[:, None]
    near = knn_graph(line, 2)
    assert (
        bool((near.sum(1) == 2).all())
        and near[0].nonzero()[:, 0].tolist() == [1, 2]
        and not bool(near.diagonal().any())
    )
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 200, generator=g)
    x[:, 3] = -x[:, 1] + 0.1 * torch.randn(5, 200, generator=g)
    best = correlation_graph(x, 1)
    assert best[1].nonzero()[:, 0].tolist() == [3] and best[3].nonzero()[:, 0].tolist() == [1]
    found = edges(near, 2)
    assert found.shape == (2, 24) and int(found[:, 12:].min()) == 6 and bool(near[found[1, :12], found[0, :12]].all())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: GATv2(F, D, heads=0), ConfigError, "heads=0"),
        (lambda: GATv2(F, D, edge_dim=2, fill_value="men"), ConfigError, "Did you mean 'mean'"),
        (lambda: GATv2((F, 4), D, share_weights=True), ConfigError, "share_weights"),
        (lambda: layer()(nodes(N, 4), some_edges()), ShapeError, r"expected \(nodes, 6\)"),
        (lambda: layer()(nodes(), some_edges() + 3), ShapeError, "there are 9 and 9"),
        (lambda: layer()(nodes(), some_edges().float()), ShapeError, "int64"),
        (lambda: layer()(nodes(), some_edges(), nodes(30, 2)), ShapeError, "both or neither"),
        (lambda: layer(edge_dim=2)(nodes(), some_edges()), ShapeError, "both or neither"),
        (lambda: layer(edge_dim=2).dense(nodes(1, N, F)), ConfigError, "no edge features"),
        (lambda: layer().dense(nodes()), ShapeError, r"\(batch, nodes, 6\)"),
        (lambda: layer().dense(nodes(1, N, F), full_graph(4)), ShapeError, "adjacency"),
        (lambda: TemporalAttention(0), ConfigError, "channels=0"),
        (lambda: time_attention()(nodes(2, 3, 5)), ShapeError, r"\(batch, 4, time\)"),
        (lambda: TemporalDropout(1.0), ConfigError, "below 1"),
        (lambda: TemporalDropout(0.1, "timesteps"), ConfigError, "Did you mean 'timestep'"),
        (lambda: TemporalDropout(0.1, "segment", length=0), ConfigError, "length is 0"),
        (lambda: TemporalDropout(0.1)(nodes(2, 3)), ShapeError, "three axes"),
        (lambda: knn_graph(torch.rand(4, 3), 4), ConfigError, "expected 1 to 3"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
