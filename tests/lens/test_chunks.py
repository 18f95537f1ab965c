"""Mass per chunk: conventions of spread and overlap at cases that can be said in words, and against plain loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.kernels.call import AttentionCall
from foveal.lens.chunks import ChunkMass, ChunkSettings, chunk_mass, chunk_overlap, model_chunks, sensitivity, spread
from tests.hf import models
from tests.hf.models import FAMILIES

SETTINGS = ChunkSettings(chunk=4, keep=12, sinks=2, recent=3, steps=6)


def call(length=22, heads=4, kv_heads=2, seed=0, batch=2, causal=True):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, 8, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, length, 8, generator=g, dtype=torch.float64)
    return AttentionCall(q, k, k, None, BaseMask.build(length, length, causal=causal), 8**-0.5)


def of(mass: torch.Tensor) -> ChunkMass:
    every = torch.ones(mass.shape[1:], dtype=torch.bool)
    return ChunkMass(mass.double(), every, ~every)


def test_mass_equals_a_loop_over_steps_and_keys():
    c = call()
    got = chunk_mass(c, SETTINGS)
    assert got.mass.shape == (2, 12, 6)
    for b in range(2):
        for t, row in enumerate(range(16, 22)):
            for h in range(2):
                want = [0.0] * 6
                for g in (2 * h, 2 * h + 1):
                    a = torch.softmax(c.q[b, g, row] @ c.k[b, h, : row + 1].T * c.scale, -1)
                    for j, x in enumerate(a.tolist()):
                        want[j // 4] += x / 2
                assert got.mass[h, b * 6 + t].tolist() == pytest.approx(want, abs=1e-12)
            assert got.open[b * 6 + t].tolist() == [4 * u <= row for u in range(6)]
            forced = {0, *(j // 4 for j in range(row - 2, row + 1))}
            assert got.forced[b * 6 + t].tolist() == [u in forced for u in range(6)]


def test_spread_of_one_hot_and_uniform_attention():
    m = 16
    assert spread(of(torch.eye(m)[None, :1])).item() == 1 / m
    assert abs(spread(of(torch.full((1, 1, m), 1 / m))).item() - 0.9) <= 1 / m
    mass = torch.rand(2, 5, m, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(m, generator=torch.Generator().manual_seed(1))
    assert torch.equal(spread(of(mass)), spread(of(mass[..., order]))), "the order of chunks does not matter"


def test_outliers_over_time_are_clipped():
    m = 20
    mass = torch.eye(m)[:1].repeat(16, 1)[None]
    mass[0, 3] = 1 / m
    assert sensitivity(of(mass)) == pytest.approx(1 / m)
    assert spread(of(mass)).mean() > 1 / m


def test_selection_holds_forced_chunks_and_ties_go_to_the_lower_index():
    got = chunk_mass(call(), SETTINGS)
    for count in (1, 3, 6):
        chosen = got.selected(count)
        assert bool((chosen | ~(got.forced & got.open)).all()) and not bool((chosen & ~got.open).any())
        assert bool((chosen.sum(-1) == torch.maximum(got.forced.sum(-1), got.open.sum(-1).clamp(max=count))).all())
    tied = of(torch.full((1, 1, 5), 0.2)).selected(2)
    assert tied[0, 0].tolist() == [True, True, False, False, False]


def test_more_chunks_never_lower_the_retained_mass():
    got = chunk_mass(call(), SETTINGS)
    kept = [(got.mass * got.selected(count)).sum(-1) for count in range(1, 7)]
    assert all(bool((b >= a).all()) for a, b in pairwise(kept))
    assert torch.allclose(kept[-1], torch.ones_like(kept[-1]))


def test_identical_layers_overlap_fully_and_overlap_is_symmetric_for_sets_of_equal_size():
    a, b = chunk_mass(call(seed=0), SETTINGS), chunk_mass(call(seed=1), SETTINGS)
    shared, caught = chunk_overlap([a, a, b], 4)
    assert torch.equal(shared[:, 0, 1], torch.ones(2, dtype=torch.float64))
    assert torch.equal(caught[:, 0, 1], torch.ones(2, dtype=torch.float64))
    assert bool((shared[:, 0, 2] < 1).all()) and bool((caught[:, 0, 2] < 1).all())
    assert torch.equal(chunk_overlap([b, a], 4)[0][:, 0, 1], shared[:, 0, 2])


def test_overlap_equals_a_loop_over_sets():
    layers = [chunk_mass(call(seed=s), SETTINGS) for s in range(3)]
    shared, caught = chunk_overlap(layers, 3)
    sets = [[[set(t.nonzero()[:, 0].tolist()) for t in h] for h in layer.selected(3)] for layer in layers]
    for h in range(2):
        ratios = [len(a & b) / len(b) for a, b in zip(sets[0][h], sets[2][h], strict=True)]
        assert shared[h, 0, 2].item() == pytest.approx(sum(ratios) / len(ratios))
        free = layers[2].mass[h].masked_fill(layers[2].forced, 0.0)
        parts = []
        for t in range(12):
            own = sum(float(free[t, u]) for u in sets[2][h][t])
            parts.append(sum(float(free[t, u]) for u in sets[0][h][t]) / own if own else 1.0)
        assert caught[h, 0, 2].item() == pytest.approx(sum(parts) / 12)


def test_settings_shrink_with_the_context():
    assert ChunkSettings.at(8192) == ChunkSettings(128, 2048, 128, 512, 128)
    small = ChunkSettings.at(256)
    assert (small.chunk, small.keep, small.sinks, small.recent, small.steps) == (4, 64, 4, 16, 64)


def test_a_model_is_measured_layer_by_layer():
    cls, config = FAMILIES["llama"].build()
    model = models.fill(cls._from_config(config, attn_implementation="eager")).eval()
    ids = torch.randint(models.VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    found = model_chunks(model, ids, SETTINGS, seen.append)
    assert len(found) == config.num_hidden_layers and seen == list(range(1, len(found) + 1))
    for layer in found:
        assert layer.mass.shape == (config.num_key_value_heads, 6, 6)
        assert torch.allclose(layer.mass.sum(-1), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: ChunkSettings(chunk=0), ConfigError, "chunk is 0"),
        (lambda: ChunkSettings(chunk=64, keep=32), ConfigError, "at least one chunk of 64"),
        (lambda: chunk_mass(call(causal=False), SETTINGS), UnsupportedError, "causal"),
        (lambda: chunk_mass(call(length=1), SETTINGS), ShapeError, "1 token"),
        (
            lambda: chunk_overlap([chunk_mass(call(), SETTINGS), chunk_mass(call(kv_heads=4), SETTINGS)], 2),
            UnsupportedError,
            "same heads and keys",
        ),
    ],
)
def test_bad_input(make, error, names):
    with pytest.raises(error, match=names):
        make()
