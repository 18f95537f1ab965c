"""The measures of Gated Attention, on maps whose figures are known."""

from __future__ import annotations

import pytest
import torch

from foveal.core.errors import ConfigError, ShapeError
from foveal.layers.gated import GateConfig, GatedAttention
from foveal.lens import gating
from foveal.models import DecoderLM, Hosted

N, D = 40, 16


def harmonic(n: int, start: int = 1) -> float:
    return sum(1 / i for i in range(start, n + 1))


def test_identity_13_uniform_attention_gives_the_harmonic_mean_and_a_one_hot_map_gives_one():
    q, k = torch.zeros(2, 4, N, D), torch.randn(2, 2, N, D, generator=torch.Generator().manual_seed(0))
    found = gating.first_key(gating.first_key_mass(q, k))
    assert found.share == pytest.approx(harmonic(N) / N, rel=1e-6) and found.uniform == pytest.approx(harmonic(N) / N)
    assert (
        found.late == pytest.approx(harmonic(N, 17) / (N - 16), rel=1e-6) == pytest.approx(found.late_uniform, rel=1e-6)
    )
    q, k = torch.ones(1, 1, N, D), torch.zeros(1, 1, N, D)
    k[:, :, 0] = 100.0
    found = gating.first_key(gating.first_key_mass(q, k))
    assert found.share == found.late == 1.0


def test_first_key_mass_is_column_zero_of_the_softmax():
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 4, N, D, generator=g), torch.randn(2, 2, N, D, generator=g)
    logits = 2 * q @ k.repeat_interleave(2, 1).mT / D**0.5
    for causal in (True, False):
        seen = logits.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf) if causal else logits
        got = gating.first_key_mass(q, k, causal=causal, scale=2 / D**0.5)
        torch.testing.assert_close(got, torch.softmax(seen, -1)[..., 0], atol=1e-5, rtol=1e-4)


def test_queries_that_do_not_count_change_nothing():
    mass = torch.rand(2, 3, N, generator=torch.Generator().manual_seed(2))
    keep = torch.rand(2, N, generator=torch.Generator().manual_seed(3)) < 0.5
    found = gating.first_key(mass, keep)
    assert found.share == pytest.approx(float(mass.mean(1)[keep].mean()), rel=1e-5)
    assert found.late == pytest.approx(float(mass.mean(1)[:, 16:][keep[:, 16:]].mean()), rel=1e-5)
    with pytest.raises(ShapeError, match="skip=16"):
        gating.first_key(mass[..., :16])
    with pytest.raises(ShapeError, match=r"\(2, 40\)"):
        gating.first_key(mass, keep[:1])


def test_massive_activations_say_how_large_and_where():
    hidden = [torch.zeros(2, 7, 5), torch.zeros(2, 7, 5)]
    hidden[0][1, 3, 2], hidden[1][0, 6, 0] = -50.0, 7.0
    found = gating.massive_activations(hidden)
    assert (found.largest, found.token, found.mean) == ((50.0, 7.0), (3, 6), 28.5)
    with pytest.raises(ShapeError, match="empty"):
        gating.massive_activations([])


def test_scores_and_sparsity_of_known_tensors():
    scores = gating.gate_scores(torch.tensor([0.05, 0.3, 0.3, 0.9]))
    assert (scores.below_half, scores.below_tenth, scores.mean) == (0.75, 0.25, pytest.approx(0.3875))
    assert scores.histogram[1] == 0.25 and scores.histogram[6] == 0.5 and sum(scores.histogram) == 1.0
    before = torch.tensor([1.0, 0.5, 0.005, 2.0])
    found = gating.hidden_sparsity(before, before * torch.tensor([1.0, 0.001, 0.1, 1.0]), 0.5)
    assert found.before == (0.25, 0.0) and found.after == (0.5, 0.5) and found.control == (0.25, 0.0)


def model(gate: GateConfig | None) -> DecoderLM:
    return DecoderLM(11, 32, 2, attention=lambda i: Hosted(GatedAttention(32, 2, gate=gate), i)).eval()


@torch.no_grad()
def test_a_report_of_every_layer_leaves_the_model_as_it_was():
    one, ids = model(GateConfig()), torch.randint(11, (2, N), generator=torch.Generator().manual_seed(0))
    expected = one(ids)
    report = gating.sink_report(one, ids, blocks=list(one.layers))
    assert torch.equal(one(ids), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())
    assert [layer.name for layer in report.layers] == ["layers.0.attention.layer", "layers.1.attention.layer"]
    x = one.layers[0].norm1(one.embed(ids))
    layer = one.layers[0].attention.layer
    q, k, _ = layer.project(x)
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    weights = torch.softmax((q @ k.mT / 16**0.5).masked_fill(~mask, -torch.inf), -1)
    assert report.layers[0].first_key.share == pytest.approx(float(weights[..., 0].mean()), rel=1e-4)
    assert report.layers[0].scores.mean == pytest.approx(float(layer.gate.scores(x).mean()), rel=1e-5)
    y = (weights @ layer.project(x)[2]).transpose(1, 2)
    assert report.layers[0].sparsity.magnitude[1] == pytest.approx(float(layer.gate(x, y).abs().mean()), rel=1e-4)
    largest = float(one.layers[0](one.embed(ids), one.begin(ids)).abs().max())
    assert report.activations.largest[0] == pytest.approx(largest, rel=1e-5)
    assert report.to_json()["first_key"] == pytest.approx(sum(r.first_key.share for r in report.layers) / 2)


def test_ungated_layers_are_reported_without_scores_and_other_models_are_refused():
    ids = torch.randint(11, (1, N), generator=torch.Generator().manual_seed(0))
    assert gating.sink_report(model(None), ids).layers[0].scores is None
    assert gating.sink_report(model(GateConfig("G2")), ids).layers[0].sparsity is None
    with pytest.raises(ConfigError, match="profile_model"):
        gating.sink_report(DecoderLM(11, 32, 1), ids)
