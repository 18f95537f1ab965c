"""Line scenes: what is drawn is what is said, and blur and events follow from the motion."""

from __future__ import annotations

import pytest
import torch

from foveal.core.errors import ConfigError
from foveal.data.line_scenes import (
    APART,
    MARGIN,
    SHORTEST,
    camera_path,
    distance,
    draw_segments,
    exposure,
    line_scenes,
    warp,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_identity_10_without_motion_blur_is_sharp_and_nothing_happens():
    made = line_scenes(6, gen(), most=0.0, noise=0.0)
    torch.testing.assert_close(made.blurred, made.sharp, atol=1e-6, rtol=0)
    assert float(made.events.abs().max()) == 0 and float(made.displacement.max()) < 1e-3


def film_of(seed: int, pixels: float, frames: int = 9):
    g = gen(seed)
    segments = [draw_segments(64, g) for _ in range(3)]
    path = camera_path(segments, torch.full((3,), pixels), 64, frames, g)
    return segments, path, exposure(segments, path, 64, g)


def test_identity_10_the_blurred_frame_is_the_mean_of_the_exposure_and_the_sharp_one_its_middle():
    made = line_scenes(3, gen(4), most=6.0, frames=9, noise=0.0)
    g = gen(4)
    segments = [draw_segments(64, g) for _ in range(3)]
    path = camera_path(segments, 6.0 * torch.rand(3, generator=g), 64, 9, g)
    film = exposure(segments, path, 64, g)
    torch.testing.assert_close(made.blurred[:, 0], film.mean(1))
    torch.testing.assert_close(made.sharp[:, 0], film[:, 4])
    assert float(film.min()) > 0 and float(film.max()) <= 1.001


def test_the_middle_of_the_path_is_the_identity_and_its_length_is_as_wanted():
    segments, path, _ = film_of(1, 5.0)
    torch.testing.assert_close(path[:, 4], torch.eye(3).expand(3, 3, 3))
    for one, p in zip(segments, path, strict=True):
        a, b = warp(one.flatten(0, 1), p[[0, -1]], 64)
        assert float((b - a).norm(dim=-1).mean()) == pytest.approx(5.0, rel=0.05)


def test_segments_are_drawn_where_they_are_said_to_be_in_every_frame():
    segments, path, film = film_of(2, 6.0)
    pixel = torch.arange(64) + 0.5
    grid = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), -1)
    for i, one in enumerate(segments):
        ends = warp(one.flatten(0, 1), path[i], 64).unflatten(1, (-1, 2))
        last = ends[:, -1]  # on top of the others
        on = distance(grid, last) < 0.1
        assert int(on.sum()) > 20
        for s in range(len(path[i])):
            values = film[i, s][on[s]]
            assert float(values.max() - values.min()) < 0.02, "one brightness along the line"
        away = torch.stack([distance(grid, ends[:, k]) for k in range(len(one))]).amin(0) > 2
        spread = film[i][away]
        assert float(spread.max() - spread.min()) < 0.4, "only the texture is left beside the lines"


def test_segments_are_long_inside_and_apart():
    for seed in range(30):
        one = draw_segments(64, gen(seed))
        assert 2 <= len(one) <= 6 and float(one.min()) >= MARGIN and float(one.max()) <= 64 - MARGIN
        assert float((one[:, 0] - one[:, 1]).norm(dim=-1).min()) >= SHORTEST
        middles = torch.cdist(one.mean(1), one.mean(1)) + 99 * torch.eye(len(one))
        assert float(middles.min()) >= APART
        ends = one.flatten(0, 1).unique(dim=0)
        assert float((torch.cdist(ends, ends) + 99 * torch.eye(len(ends))).min()) >= APART


def test_distances_are_those_to_the_nearest_point_of_the_segment():
    points = torch.tensor([[[0.0, 3.0], [4.0, 0.0], [13.0, 4.0]]])
    found = distance(points, torch.tensor([[[0.0, 0.0], [10.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]]))
    torch.testing.assert_close(found[:, 0], torch.tensor([[3.0, 0.0, 5.0], [5**0.5, 8**0.5, 125**0.5]]))


def test_blur_runs_from_none_to_the_most_and_scenes_follow_from_the_seed():
    made, again = (line_scenes(24, gen(3), most=8.0, noise=0.0) for _ in range(2))
    assert float(made.displacement.min()) < 1.5 and 7 < float(made.displacement.max()) < 9
    assert torch.equal(made.blurred, again.blurred) and torch.equal(made.events, again.events)
    order = made.displacement.argsort()
    few, many = made.rows(order[:6]), made.rows(order[-6:])
    loss = [float((s.sharp - s.blurred).abs().mean()) for s in (few, many)]
    assert loss[0] < loss[1] / 1.5


def test_mirrored_scenes_show_mirrored_lines():
    made = line_scenes(2, gen(5), most=4.0)  # a seed whose levels meet thresholds exactly
    for axis in (0, 1):
        turned = made.flipped(axis)
        assert torch.equal(turned.sharp, made.sharp.flip(3 - axis)) and torch.equal(
            turned.events, made.events.flip(3 - axis)
        )
        torch.testing.assert_close(
            turned.segments[0][..., axis] + made.segments[0][..., axis],
            torch.full_like(made.segments[0][..., axis], 64.0),
        )
        assert torch.equal(turned.segments[1][..., 1 - axis], made.segments[1][..., 1 - axis])


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="frames=4"):
        line_scenes(1, gen(), frames=4)
