"""ScatterFormer: the identities of its spec sheet, against loops over windows and dense convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError
from foveal.kernels.linear_ragged import linear_attention_packed
from foveal.kernels.sparse_conv import Neighbors, box, depthwise
from foveal.layers.scatter import (
    CrossWindowInteraction,
    ScatterBlock,
    ScatteredLinearAttention,
    ScatterStage,
    Windows,
)

DIM, HEADS, S = 8, 2, 4


def make(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def voxels(count: int = 60, seed: int = 0, scenes: int = 2, extent: tuple[int, int, int] = (3, 11, 13)) -> Tensor:
    """Distinct (batch, z, y, x) in random order."""
    z, y, x = extent
    flat = torch.randperm(scenes * z * y * x, generator=make(seed))[:count]
    return torch.stack(torch.unravel_index(flat, (scenes, z, y, x)), 1)


def features(count: int = 60, seed: int = 1) -> Tensor:
    return torch.randn(count, DIM, generator=make(seed), dtype=torch.float64)


def attention(seed: int = 0) -> ScatteredLinearAttention:
    torch.manual_seed(seed)
    return ScatteredLinearAttention(DIM, HEADS).double().eval()


def stage(**options: object) -> ScatterStage:
    torch.manual_seed(0)
    made = ScatterStage(DIM, HEADS, S, 2, **options).double()  # type: ignore[arg-type]
    for m in made.modules():
        if isinstance(m, nn.BatchNorm1d):
            nn.init.normal_(m.weight)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return made.eval()


def by_windows(layer: ScatteredLinearAttention, x: Tensor, coords: Tensor, size: int) -> Tensor:
    """One window after the other, one head after the other."""
    out = torch.zeros_like(x)
    q, k, v = layer.qkv(x).chunk(3, -1)
    keys = [(int(b), int(yy) // size, int(xx) // size) for b, _, yy, xx in coords]
    for key in set(keys):
        rows = [i for i, other in enumerate(keys) if other == key]
        for h in range(HEADS):
            own = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
            pairs = q[rows][:, own].relu() @ k[rows][:, own].relu().T
            out[rows, own] = pairs @ v[rows][:, own] / (pairs.sum(-1, keepdim=True) + 1e-6)
    return layer.out(out)


def test_identity_1_equals_the_loop_over_windows() -> None:
    layer, coords, x = attention().requires_grad_(False), voxels(), features()
    exact = by_windows(layer, x, coords, S)
    got = layer(x, Windows.from_coords(coords, S))
    assert float((got - exact).abs().max() / exact.abs().max()) <= 1e-12
    single = copy.deepcopy(layer).float()(x.float(), Windows.from_coords(coords, S))
    assert float((single - exact).abs().max() / exact.abs().max()) <= 1e-5
    ids = (coords[:, 0] * 100 + coords[:, 2] // S) * 100 + coords[:, 3] // S
    assert torch.equal(layer(x, ids), got)


def test_identity_2_one_window_is_global_and_windows_of_one_give_the_value() -> None:
    layer, x = attention(), features(20)
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in layer.qkv(x).chunk(3, -1))
    q, k = q.relu(), k.relu()
    one, _ = linear_attention_packed(q, k, v, torch.tensor([0, 20]), eps=1e-6)
    pairs = torch.einsum("ihd,jhd->hij", q, k)
    torch.testing.assert_close(one, torch.einsum("hij,jhd->ihd", pairs / (pairs.sum(-1, keepdim=True) + 1e-6), v))
    alone, _ = linear_attention_packed(q, k, v, torch.arange(21), eps=1e-6)
    r = (q * k).sum(-1, keepdim=True)
    torch.testing.assert_close(alone, v * r / (r + 1e-6))
    assert bool((alone[(r == 0).expand_as(alone)] == 0).all())


def test_identity_3_windows_are_isolated_bit_for_bit() -> None:
    layer, coords, x = attention().float(), voxels(), features().float()
    windows = Windows.from_coords(coords, S)
    out = layer(x, windows)
    keys = torch.stack([coords[:, 0], coords[:, 2] // S, coords[:, 3] // S], 1)
    inside = (keys == keys[7]).all(1)
    other = layer(torch.where(inside[:, None], x * 3 + 1, x), windows)
    assert torch.equal(other[~inside], out[~inside]) and not torch.equal(other[inside], out[inside])


def test_identity_4_permutation_and_translation() -> None:
    model, coords, x = stage(), voxels(), features()
    out, order = model(x, coords), torch.randperm(60, generator=make(5))
    torch.testing.assert_close(model(x[order], coords[order]), out[order])
    torch.testing.assert_close(model(x, coords + torch.tensor([0, 5, 3 * S, -2 * S])), out)
    moved = model(x, coords + torch.tensor([0, 0, 1, 0]))
    assert not torch.allclose(moved, out), "other windows"


@pytest.mark.parametrize("chunk", [1, 8, 16, 32, 1000])
def test_identity_5_chunk_size_changes_nothing(chunk: int) -> None:
    layer, coords, x = attention(), voxels(), features()
    exact = layer(x, Windows.from_coords(coords, S))
    layer.chunk = chunk
    torch.testing.assert_close(layer(x, Windows.from_coords(coords, S)), exact, rtol=1e-10, atol=1e-10)


def test_identity_6_gradients() -> None:
    layer, coords, x = attention(), voxels(), features().requires_grad_()
    fast = torch.autograd.grad(layer(x, Windows.from_coords(coords, S)).square().sum(), (x, *layer.parameters()))
    slow = torch.autograd.grad(by_windows(layer, x, coords, S).square().sum(), (x, *layer.parameters()))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)
    q, k, v = (torch.rand(7, 1, 2, dtype=torch.float64, generator=make(i)).requires_grad_() for i in range(3))
    cu = torch.tensor([0, 3, 3, 7])
    torch.autograd.gradcheck(lambda *t: linear_attention_packed(*t, cu, eps=1e-6, chunk=2)[0], (q, k, v))


def test_identity_7_scenes_do_not_meet() -> None:
    model, coords, x = stage(), voxels(), features()
    out = model(x, coords)
    for scene in (0, 1):
        own = coords[:, 0] == scene
        torch.testing.assert_close(model(x[own], coords[own]), out[own])


def test_identity_8_reach_of_the_interaction() -> None:
    layer = CrossWindowInteraction(DIM, S).double()
    grid = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), *(torch.arange(n) for n in (5, 15, 15)))
    x = torch.zeros(len(grid), DIM, dtype=torch.float64)
    centre = int(((grid == torch.tensor([0, 2, 7, 7])).all(1)).nonzero())
    x[centre] = 1.0
    out = layer(x, layer.neighbors(grid))
    touched = [grid[(out[:, i * 2 : i * 2 + 2] != 0).any(1)] - grid[centre] for i in range(4)]
    assert len(touched[0]) == 27 and int(touched[0].abs().max()) == 1
    assert sorted(touched[1][:, 3].tolist()) == list(range(-S // 2, S // 2 + 1)) and not bool(touched[1][:, :3].any())
    assert sorted(touched[2][:, 2].tolist()) == list(range(-S // 2, S // 2 + 1)) and not bool(
        touched[2][:, [0, 1, 3]].any()
    )
    assert len(touched[3]) == 1 and torch.equal(out[centre, 6:], x[centre, 6:])
    windows = {(int(yy) // S, int(xx) // S) for _, _, yy, xx in grid[(out != 0).any(1)]}
    assert len(windows) > 1, "neighbouring windows are connected"


@given(
    sizes=st.sampled_from([(3, 3, 3), (1, 1, 5), (1, 5, 1), (3, 1, 5)]), count=st.integers(1, 120), seed=st.integers(0, 50)
)  # fmt: skip
def test_identity_8_equals_a_dense_convolution_at_active_sites(
    sizes: tuple[int, int, int], count: int, seed: int
) -> None:
    coords = voxels(count, seed)
    x = torch.randn(count, 3, generator=make(seed), dtype=torch.float64, requires_grad=True)
    taps = box(sizes)
    weight = torch.randn(len(taps), 3, generator=make(seed + 1), dtype=torch.float64, requires_grad=True)
    volume = x.new_zeros(2, 3, 11, 13, 3).index_put(tuple(coords.T), x).movedim(-1, 1)
    kernel = weight.T.reshape(3, 1, *sizes)
    dense = nn.functional.conv3d(volume, kernel, padding=[n // 2 for n in sizes], groups=3)
    exact = dense.movedim(1, -1)[tuple(coords.T)]
    got = depthwise(x, weight, Neighbors.find(coords, taps))
    torch.testing.assert_close(got, exact)
    upstream = torch.randn(got.shape, generator=make(3), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight), upstream), torch.autograd.grad(exact, (x, weight), upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_windows_follow_floor_division_with_negative_places() -> None:
    coords = torch.tensor([[0, 0, -1, 0], [0, 0, 0, 0], [0, 9, 0, 3], [0, 0, -4, 3], [1, 0, 0, 0]])
    windows = Windows.from_coords(coords, 4)
    assert windows.cu_seqlens.tolist() == [0, 2, 4, 5]
    assert windows.order is not None and windows.order.tolist() == [0, 3, 1, 2, 4]
    x = torch.arange(5.0)[:, None]
    assert torch.equal(windows.restored(windows.sorted(x)), x)


def test_the_block_is_its_four_lines() -> None:
    torch.manual_seed(0)
    block = ScatterBlock(DIM, HEADS, S).double().eval()
    coords, x = voxels(), features()
    windows = Windows.from_coords(coords, S)
    assert block.attention is not None and block.interaction is not None
    near = block.interaction.neighbors(coords)
    y = x + block.attention(block.norm1(x), windows)
    y = block.norm2(y)
    y = y + block.interaction(y, near)
    y = y + block.ffn(block.norm3(y))
    assert torch.equal(block(x, windows, near), y)
    assert [m.eps for m in (block.norm1, block.norm2, block.norm3)] == [1e-3] * 3


def test_ablations_leave_a_part_out() -> None:
    coords, x = voxels(), features()
    model = stage(interaction=False)
    out = model(x, coords)
    keys = torch.stack([coords[:, 0], coords[:, 2] // S, coords[:, 3] // S], 1)
    inside = (keys == keys[7]).all(1)
    moved = model(torch.where(inside[:, None], -x, x), coords)
    torch.testing.assert_close(moved[~inside], out[~inside])
    assert not any("attention" in name for name, _ in stage(attention=False).named_parameters())


def test_autocast_bfloat16_state_dict_and_compile() -> None:
    model, coords, x = stage().float(), voxels(), features().float()
    exact = model(x, coords).detach()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, coords)
    assert float((low.float() - exact).detach().abs().max() / exact.abs().max()) < 0.05
    twin = ScatterStage(DIM, HEADS, S, 2).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(copy.deepcopy(twin)(x, coords), exact)
    block, windows = model.blocks[0], Windows.from_coords(coords, S)
    near = block.interaction.neighbors(coords)
    torch.testing.assert_close(torch.compile(block, backend="eager")(x, windows, near), block(x, windows, near))


def test_gradients_reach_every_parameter() -> None:
    model = stage().train()
    model(features(), voxels()).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())


def test_no_voxels_give_no_output() -> None:
    assert stage()(features(0), voxels(0)).shape == (0, DIM)


def test_bad_inputs_are_told() -> None:
    coords, x = voxels(), features()
    with pytest.raises(ConfigError, match="an even window"):
        ScatterBlock(DIM, HEADS, 5)
    with pytest.raises(ConfigError, match="divisor of dim"):
        ScatteredLinearAttention(DIM, 3)
    with pytest.raises(ShapeError, match=r"coords has shape \(60, 3\)"):
        stage()(x, coords[:, :3])
    with pytest.raises(ShapeError, match="coords has 59 voxels"):
        stage()(x, coords[:59])
    twice = coords.clone()
    twice[9] = twice[4]
    with pytest.raises(ShapeError, match=r"\(batch, z, y, x\) more than once"):
        stage()(x, twice)
    with pytest.raises(ShapeError, match="x has shape"):
        attention()(x[:, :4], Windows.from_coords(coords, S))
    with pytest.raises(ShapeError, match="expected 0 to 60"):
        attention()(x, Windows(torch.tensor([0, 59])))
    with pytest.raises(ConfigError, match="three odd numbers"):
        box((3, 2, 3))
