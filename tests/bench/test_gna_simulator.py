"""The GNA simulator: the paper's published figures, closed forms against tiles of the mask, and the authors' shortcut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.bench.gna_picture import ALL, SOME, VISITED, draw, query_tile_map, terminal
from foveal.bench.gna_simulator import (
    USE_CASES,
    Problem,
    block_sparse,
    block_sparse_shortcut,
    end_to_end,
    simulate,
    sweep,
    tile_visits,
)
from foveal.core.errors import ConfigError
from foveal.core.grid import Axis
from foveal.core.tiles import Tiling

from ..neighbors import axes, mask

ROWS = [(name, stride, paper) for name, case in USE_CASES.items() for stride, paper in case.rows.items()]


@pytest.mark.parametrize(("name", "stride", "paper"), ROWS)
def test_published_end_to_end_rows(name: str, stride: tuple[int, ...], paper: float) -> None:
    case = USE_CASES[name]
    assert abs(end_to_end(simulate(case.problem(stride)).bound, case.share) - paper) <= 0.02


@pytest.mark.parametrize(
    ("name", "stride", "bound"),
    [
        ("hunyuan-91", (1, 1, 1), 3.3),
        ("hunyuan-91", (1, 8, 8), 9.1),
        ("hunyuan-91", (16, 8, 8), 11.1),
        ("hunyuan-91", (18, 24, 24), 6.7),
        ("flux-4k", (1, 1), 6.1),
        ("flux-4k", (16, 1), 8.5),
        ("flux-4k", (16, 16), 10.2),
    ],
)
def test_published_operation_bounds(name: str, stride: tuple[int, ...], bound: float) -> None:
    assert round(simulate(USE_CASES[name].problem(stride)).bound, 1) == bound


@pytest.mark.parametrize(("name", "stride", "paper"), [("cosmos-56", (1, 8, 16), 1.26), ("hunyuan-91", (16, 8, 8), 1.63), ("flux-4k", (16, 16), 1.45)])  # fmt: skip
def test_published_rows_with_dense_first_steps(name: str, stride: tuple[int, ...], paper: float) -> None:
    case = USE_CASES[name]
    dense, total = case.dense_steps
    assert abs(end_to_end(simulate(case.problem(stride)).bound, case.share, 1 - dense / total) - paper) <= 0.02


def line(stride: int) -> Problem:
    return Problem.of((32768,), 2048, stride, q_tile=(128,), kv_tile=(128,))


def test_one_axis_reaches_its_bound_first_at_stride_256() -> None:
    for stride in (1, 128):
        assert simulate(line(stride)).bound == pytest.approx(15.06, abs=0.005)
    assert simulate(line(256)).bound == simulate(line(256)).flop_bound == 16
    axes = [Axis(32768, 2048, stride) for stride in range(1, 257)]
    assert [axis.stride for axis in axes if block_sparse(axis, 128, 128)] == [256]


def test_the_published_alternatives_differ_as_stated() -> None:
    case = USE_CASES["hunyuan-91"]
    static, dynamic = (
        simulate(Problem.of(case.grid, case.window, 1, q_tile=case.q_tile, kv_tile=case.kv_tile, kv_tiling=how))
        for how in ("static", "dynamic")
    )
    assert (round(static.bound, 2), round(static.mean_bound, 2)) == (3.27, 5.24)
    assert round(dynamic.bound, 2) == 5.11
    blocked = simulate(Problem.of((30, 48, 80), (30, 40, 40), (30, 40, 40), q_tile=(4, 8, 8), kv_tile=(2, 8, 8)))
    assert round(end_to_end(blocked.bound, case.share), 2) == 1.55  # the paper prints 1.44


def test_the_shortcut_is_sound_and_misses_264_of_102897_settings() -> None:
    settings = wrong = missed = 0
    for n in range(4, 41):
        for w in range(2, n + 1):
            for s in range(1, w + 1):
                axis = Axis(n, w, s)
                for q in (2, 4, 8):
                    for k in (2, 4, 8):
                        claimed = block_sparse_shortcut(axis, q, k)
                        settings += 1
                        truth = block_sparse(axis, q, k)
                        wrong += claimed and not truth
                        missed += truth and not claimed
    assert (settings, wrong) == (102897, 0)
    assert missed == 264


@given(axes(rank=1, causal=True), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3, 4, 8]))
def test_visits_and_block_sparsity_equal_tiles_of_the_mask(one: Any, q_tile: int, kv_tile: int) -> None:
    (axis,) = one
    orders = [Tiling((axis.length,), (t,), (axis.dilation,)) for t in (q_tile, kv_tile)]
    q_at, k_at = (o.permute(torch.arange(1, axis.length + 1)[:, None])[:, 0].view(-1, o.tile[0]) - 1 for o in orders)
    seen, counts, sparse = mask(one), [], True
    for rows in q_at:
        rows = rows[rows >= 0]
        if not rows.numel():
            continue
        parts = [seen[rows][:, columns[columns >= 0]] for columns in k_at]
        touched = [part for part in parts if part.any()]
        counts.append(len(touched))
        sparse &= all(bool(part.all()) for part in touched)
    assert tile_visits(axis, q_tile, kv_tile).tolist() == counts
    assert block_sparse(axis, q_tile, kv_tile) == sparse
    assert not block_sparse_shortcut(axis, q_tile, kv_tile) or sparse


@given(axes(causal=True), st.data())
def test_a_simulation_equals_the_mask_cut_into_tiles(one: Any, data: st.DataObject) -> None:
    one = tuple(Axis(a.length, a.window, a.stride, 1, a.causal) for a in one)
    tile = st.lists(st.integers(1, 4), min_size=len(one), max_size=len(one)).map(tuple)
    for tiling in ("multi-dim", "1-D"):
        problem = Problem(one, data.draw(tile), data.draw(tile), "static", tiling)  # type: ignore[arg-type]
        found, seen, n = simulate(problem), mask(one), math.prod(problem.grid)
        sizes = (math.prod(problem.q_tile), math.prod(problem.kv_tile))
        at = []
        for size, shape in zip(sizes, (problem.q_tile, problem.kv_tile), strict=True):
            order = Tiling(problem.grid, shape, (1,) * len(one))
            numbers = torch.arange(1, n + 1)
            slots = order.permute(numbers[:, None])[:, 0] if tiling == "multi-dim" else torch.nn.functional.pad(numbers, (0, -n % size))  # fmt: skip
            at.append(slots.view(-1, size) - 1)
        visits = [sum(bool(seen[r[r >= 0]][:, c[c >= 0]].any()) for c in at[1]) for r in at[0]]
        assert found.worst == max(visits)
        assert found.mean == pytest.approx(sum(visits) / len(visits))
        assert found.kv_tiles == len(at[1])
        assert found.pairs == int(seen.sum())
        assert found.computed == sum(visits) * sizes[0] * sizes[1]
        assert 0 <= found.wasted < 1 and found.bound <= len(at[1])


def test_a_block_sparse_setting_reaches_the_flop_bound_and_wastes_nothing() -> None:
    found = simulate(USE_CASES["flux-4k"].problem((16, 16)))
    assert found.block_sparse and found.shortcut
    assert found.bound == pytest.approx(found.flop_bound) and found.wasted == pytest.approx(0)


def test_runs_of_row_major_tokens_touch_more_than_boxes() -> None:
    boxes = USE_CASES["hunyuan-91"].problem(1)
    runs = Problem(boxes.axes, boxes.q_tile, boxes.kv_tile, "static", "1-D")
    assert simulate(runs).mean > 1.5 * simulate(boxes).mean


def test_a_sweep_keeps_strides_that_no_smaller_one_equals() -> None:
    problem = Problem.of((24, 32), (8, 12), q_tile=(4, 4), kv_tile=(2, 4))
    kept = sweep(problem)
    bounds = {tuple(a.stride for a in s.problem.axes): s.bound for s in kept}
    every = {
        (i, j): simulate(Problem.of((24, 32), (8, 12), (i, j), q_tile=(4, 4), kv_tile=(2, 4))).bound
        for i in range(1, 9)
        for j in range(1, 13)
    }
    worth = {
        s: b for s, b in every.items() if not any(o != s and o[0] <= s[0] and o[1] <= s[1] and every[o] >= b for o in every)
    }  # fmt: skip
    assert bounds == worth
    assert [s.bound for s in kept] == sorted(s.bound for s in kept)


def test_end_to_end_is_amdahl() -> None:
    assert end_to_end(1, 0.6) == 1 and end_to_end(2, 1) == 2
    assert end_to_end(4, 0.5, 0.5) == pytest.approx(1 / (0.75 + 0.25 / 4))
    for arguments, name in (((0, 0.5), "bound"), ((2, 1.5), "share"), ((2, 0.5, -0.1), "steps")):
        with pytest.raises(ConfigError, match=f"{name} is"):
            end_to_end(*arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 9}, "window is 9; expected 1 to 8"),
        ({"q_tile": (4,)}, r"q_tile is \(4,\); expected 2 numbers"),
        ({"kv_tile": (4, 0)}, r"kv_tile is \(4, 0\)"),
        ({"tiling": "1-D", "kv_tiling": "dynamic"}, "kv_tiling is 'dynamic'"),
    ],
)
def test_bad_problems_are_named(fields: dict[str, Any], message: str) -> None:
    good = {"shape": (8, 8), "window": 4, "q_tile": (4, 4), "kv_tile": (4, 4)}
    with pytest.raises(ConfigError, match=message):
        Problem.of(**{**good, **fields})  # type: ignore[arg-type]


def test_the_picture_shows_what_is_counted(tmp_path: Path) -> None:
    problem = Problem.of((20, 30), (7, 9), q_tile=(4, 5), kv_tile=(4, 5))
    view = query_tile_map(problem)
    assert int((view.keys >= VISITED).sum()) == simulate(problem).worst * 20
    rows = [i * 30 + j for i in range(*view.query[0]) for j in range(*view.query[1])]
    seen = mask(problem.axes)[rows].view(-1, 20, 30)
    assert torch.equal(view.keys >= SOME, seen.any(0)) and torch.equal(view.keys == ALL, seen.all(0))
    text = terminal(problem)
    assert text.count("Q") - 1 == 20 + text.splitlines()[-1].count("Q") - 1
    for one in (problem, Problem.of((40,), 9, q_tile=(8,), kv_tile=(8,)), Problem.of((4, 8, 8), 4, q_tile=(2, 4, 4), kv_tile=(2, 4, 4))):  # fmt: skip
        draw(one, tmp_path / "one.png")
        assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
        assert "Q" in terminal(one)
    with pytest.raises(ConfigError, match="tile is"):
        query_tile_map(problem, (9, 0))
