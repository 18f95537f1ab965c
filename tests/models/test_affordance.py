"""EEG-tGAT: counts, the no-op of the released form, and that edge lists give what dense graphs give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.layers.graphs import edges, full_graph, knn_graph
from foveal.models.affordance import EEGtGAT

SMALL = {"filters": (4, 6), "kernels": (8, 4), "hidden": 5}


def windows(batch: int = 3, electrodes: int = 6, samples: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, electrodes, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(**options: object) -> EEGtGAT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EEGtGAT(6, 32, 2, **{**SMALL, **options}).double().eval()


def test_identity_1_parameters_and_the_longer_window():
    with torch.device("meta"):
        model = EEGtGAT(15, 256, 2, fusion="collapsed")
        assert sum(p.numel() for p in model.parameters()) == 363_347
        assert sum(p.numel() for p in model.convs.parameters()) == 292_020
        assert sum(p.numel() for p in model.graph1.parameters()) == 23_552
        assert model.eval().look(torch.empty(2, 15, 256)).curves.shape == (2, 259)


def test_identity_2_the_collapsed_graph_does_nothing():
    model, x = small(fusion="collapsed"), windows()
    seen = model.look(x)
    seen.logits.square().sum().backward()
    for share in seen.edges:
        torch.testing.assert_close(share, torch.full_like(share, 1 / 6))
    for idle in (model.graph1.att, model.graph1.lin_r.weight):
        assert float(idle.grad.abs().max()) < 1e-12
    assert float(model.graph1.lin_l.weight.grad.abs().max()) > 1e-4
    nodes, _ = model._nodes(x[:, None])
    torch.testing.assert_close(model.graph1.dense(nodes)[0], model.graph1.lin_l(nodes) + model.graph1.bias)
    for other in (torch.eye(6, dtype=torch.bool), torch.rand(6, 6) > 0.5):
        model.adjacency = other
        torch.testing.assert_close(model(x), seen.logits)


def test_per_node_the_graph_matters_and_learns():
    model, x = small(), windows()
    seen = model.look(x)
    seen.logits.square().sum().backward()
    assert seen.curves.shape == (3, 6, 34) and float((seen.edges[0] - 1 / 6).abs().max()) > 1e-5
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters())
    model.adjacency = torch.zeros(6, 6, dtype=torch.bool)
    assert not torch.allclose(model(x), seen.logits)


def test_identity_5_electrodes_may_be_renamed_per_node():
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(small()(windows()[:, order]), small()(windows()))
    assert not torch.allclose(small(fusion="collapsed")(windows()[:, order]), small(fusion="collapsed")(windows()))


@pytest.mark.parametrize("adjacency", [full_graph(6), knn_graph(torch.arange(6.0)[:, None], 2)])
def test_edge_lists_give_the_same(adjacency):
    model, x = small(adjacency=adjacency), windows()
    batch = torch.arange(3).repeat_interleave(6)
    got = model.forward_graph(x.flatten(0, 1), edges(adjacency, 3), batch, 3)
    torch.testing.assert_close(got, model(x))
    more = model.forward_graph(x.flatten(0, 1), edges(adjacency, 3), batch, 4)
    torch.testing.assert_close(more[:3], got)
    assert bool(more[3].isfinite().all()), "an empty last graph is not lost"
    part = model.forward_graph(x[0, :4], edges(full_graph(4)), torch.zeros(4, dtype=torch.long), 1)
    assert part.shape == (1, 2), "graphs of any size"


def test_without_attention_time_is_averaged():
    model = small(temporal_attention=False)
    assert model.look(windows()).curves is None
    assert sum(p.numel() for p in small().parameters()) - sum(p.numel() for p in model.parameters()) == 3 * (36 + 6)


def test_copies_and_weights():
    model, x = small(adjacency=full_graph(6)), windows()
    twin = small(adjacency=full_graph(6))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        low = copy.deepcopy(model).float()(x.float())
    torch.testing.assert_close(low.double(), model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: small(fusion="colapsed"), ConfigError, "Did you mean 'collapsed'"),
        (lambda: small(kernels=(8,)), ConfigError, "2 filters and 1 kernels"),
        (lambda: small(dropout_mode="time"), ConfigError, "mode is 'time'"),
        (lambda: small()(windows(electrodes=5)), ShapeError, "6 electrodes, 32 samples"),
        (
            lambda: small(fusion="collapsed").forward_graph(windows()[0], edges(full_graph(6)), torch.zeros(6), 1),
            UnsupportedError,
            "per_node",
        ),
        (
            lambda: small().forward_graph(windows()[0], edges(full_graph(6)), torch.zeros(5), 1),
            ShapeError,
            r"\(nodes, 32\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
