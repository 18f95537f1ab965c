"""Overlap of selected keys between layers, against sets made from full matrices; and what a profile looks like."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from foveal.core.base_mask import BaseMask
from foveal.lens import (
    LABELS,
    LayerProfile,
    ModelProfile,
    chance_overlap,
    overlap,
    plot,
    profile_attention,
    render_profile,
)

from .brute import brute_force

N, TOP = 120, 10


def tensors(seed: int, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, N, 16, generator=g) * 2, torch.randn(2, kv_heads, N, 16, generator=g)


def layer(seed: int, rows: int = 2 * N, kv_heads: int = 2, index: int = 0) -> LayerProfile:
    return profile_attention(
        *tensors(seed, kv_heads), rows=rows, top=TOP, window=16, layer_index=index, layer_name=f"layer.{index}"
    )


def sets(seed: int) -> Tensor:
    """(B, 3, N, N) bool: top keys of the mean of all heads, and of both key heads."""
    q, k = tensors(seed)
    weights = brute_force(q, k, BaseMask.build(N, N, causal=True)).weights
    per_kv = weights.view(2, 2, 2, N, N).mean(2)
    both = torch.cat([per_kv.mean(1, keepdim=True), per_kv], 1)
    return torch.zeros_like(both, dtype=torch.bool).scatter_(-1, both.topk(TOP).indices, True)


def test_matrix_against_full_sets() -> None:
    found = overlap([layer(1), layer(2), layer(1)])
    a, b = sets(1), sets(2)
    want = ((a & b).sum(-1) / TOP)[:, :, TOP:].double().mean((0, 2))  # rows 0 … TOP−1 see at most TOP keys
    torch.testing.assert_close(found.mean[0, 1], want)
    torch.testing.assert_close(found.mean[1, 0], want)
    torch.testing.assert_close(found.mean[0, 2], torch.ones(3, dtype=torch.float64))
    assert torch.equal(found.low, found.mean)  # every row was drawn


def test_intervals_and_chance() -> None:
    whole = overlap([layer(1), layer(2)]).mean[0, 1]
    covered = 0
    for seed in range(20):
        a, b = (profile_attention(*tensors(s), rows=60, top=TOP, window=16, seed=seed) for s in (1, 2))
        found = overlap([a, b])
        covered += int(((found.low[0, 1] <= whole) & (whole <= found.high[0, 1])).sum())
        assert bool((found.high[0, 1] > found.low[0, 1]).all())
    assert covered / 60 >= 0.9
    expected = sum(TOP / (i + 1) for i in range(TOP, N)) / (N - TOP)
    assert chance_overlap(layer(1)) == pytest.approx(expected)


def test_layers_that_cannot_be_compared_are_nan() -> None:
    other_heads, shorter = (
        layer(3, kv_heads=4),
        profile_attention(*(t[:, :, :50] for t in tensors(4)), rows=40, top=TOP),
    )
    found = overlap([layer(1), other_heads, shorter])
    assert bool(found.mean[0, 1:].isnan().all()) and bool(found.mean[1, 2].isnan().all())
    assert not bool(found.mean[0, 0, :3].isnan().any())


def model_profile() -> ModelProfile:
    layers = [layer(s, rows=40, index=s) for s in range(3)]
    return ModelProfile(layers, overlap(layers), N, 40, 0, TOP)


def test_json_is_plain_and_complete() -> None:
    profile = model_profile()
    data = json.loads(json.dumps(profile.to_json(), allow_nan=False))
    assert data["tokens"] == N and data["rows"] == 40 and len(data["layers"]) == 3
    first = data["layers"][0]
    assert first["sampled_rows"] == 40 and first["real_rows"] == 2 * N
    assert set(first["labels"]) <= set(LABELS)
    for head in range(4):
        assert first["keys90"]["low"][head] < first["keys90"]["mean"][head] < first["keys90"]["high"][head]
        assert first["entropy"]["low"][head] <= first["entropy"]["mean"][head] <= first["entropy"]["high"][head]
        total = sum(first[name][head] for name in ("sink_mass", "window_mass", "rest_mass", "learned_sink_mass"))
        assert total == pytest.approx(1, abs=1e-4)
    assert data["overlap"]["mean"][0][1][0] == pytest.approx(float(profile.overlap.mean[0, 1, 0]), rel=1e-5)
    assert len(data["chance_overlap"]) == 3


def test_table_shows_every_layer() -> None:
    from rich.console import Console

    profile = model_profile()
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_profile(profile))
    text = console.export_text()
    assert profile.render().row_count == 3
    second = profile.layers[1]
    row = next(line for line in text.splitlines() if line.startswith("│ 1 "))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1:4] == [
        f"{100 * float(mass.mean()):.1f} %" for mass in (second.sink_mass, second.window_mass, second.rest_mass)
    ]
    assert cells[4] == f"{float(second.distance.mean.mean()):.0f}"
    assert cells[5].startswith(f"{float(second.entropy.mean.mean()):.2f}")
    assert cells[6].startswith(f"{float(second.keys90.mean.mean()):.0f} ± ")
    assert cells[7].startswith(f"{float(profile.overlap.mean[1, 0, 0]):.2f} ±") and cells[7].endswith(
        f"({chance_overlap(second):.2f})"
    )
    assert all(f"{second.labels.count(name)} {name}" in cells[8] for name in second.labels)


def test_plot_is_a_figure_of_its_own() -> None:
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as pyplot

    profile = model_profile()
    figure = plot(profile)
    assert pyplot.get_fignums() == []
    shown = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.get_title()}
    assert len(shown) == 6
    sinks = next(value for title, value in shown.items() if "sinks" in title)
    assert sinks.shape == (3, 4)
    assert sinks[2, 1] == pytest.approx(float(profile.layers[2].sink_mass[1]))
    figure.canvas.draw()
