"""Small generated scenes of line segments seen by a moving camera: the sharp frame, the blurred one, the events of the exposure.

The blurred frame is the mean of sub-frames in linear intensity along a smooth homography path. Segments are labelled where they
stand in the middle of the exposure, when the sharp frame is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .events import Events, events_between, events_to_est

MARGIN, SHORTEST, APART = 4.0, 14.0, 9.0  # a detector on cells of 4 pixels can tell all ends apart
THRESHOLDS = (0.1, 0.3)
SPEED = (1.0, 1.0, 0.15, 0.15, 0.05, 0.05)
"""Deviations of the camera's motion: two of shift, turn, growth, two of perspective; in half sides and radians."""


@dataclass(frozen=True)
class LineScenes:
    """A set of scenes.

    Attributes:
        sharp, blurred: ``(n, 1, H, W)`` intensities. events: ``(n, 10, H, W)``, of :func:`events_to_est`.
        segments: per scene ``(k, 2, 2)`` ends ``(x, y)`` in pixels; a pixel's middle is at ½.
        displacement: ``(n,)``, how far ends move during the exposure, in pixels, mean over ends.
    """

    sharp: Tensor
    blurred: Tensor
    events: Tensor
    segments: list[Tensor]
    displacement: Tensor

    def rows(self, index: Tensor) -> LineScenes:
        """The scenes at ``index (m,)``."""
        parts = (self.sharp, self.blurred, self.events)
        sharp, blurred, events = (part[index] for part in parts)
        return LineScenes(sharp, blurred, events, [self.segments[i] for i in index.tolist()], self.displacement[index])

    def flipped(self, axis: int) -> LineScenes:
        """Mirrored left to right (``axis=0``) or top to bottom (``axis=1``)."""
        side = self.sharp.shape[-1 - axis]
        segments = []
        for one in self.segments:
            other = one.clone()
            other[..., axis] = side - one[..., axis]
            segments.append(other)
        sharp, blurred, events = (x.flip(-1 - axis) for x in (self.sharp, self.blurred, self.events))
        return replace(self, sharp=sharp, blurred=blurred, events=events, segments=segments)


def line_scenes(
    count: int,
    generator: torch.Generator,
    *,
    side: int = 64,
    most: float = 8.0,
    frames: int = 17,
    noise: float = 0.02,
    chunk: int = 32,
) -> LineScenes:
    """Draw scenes.

    Args:
        count: how many. generator: on the CPU. side: pixels, of height and width.
        most: largest mean displacement in pixels; a scene's is uniform below it.
        frames: sub-frames of the exposure, odd, so that one is in the middle. noise: deviation on both frames.

    Raises:
        ConfigError: sizes that make no scene.
    """
    if count < 1 or side < 32 or frames < 3 or frames % 2 == 0 or most < 0 or chunk < 1:
        raise ConfigError(
            f"line_scenes has count={count}, side={side}, most={most}, frames={frames}; expected at least one scene of 32 pixels or "
            "more, an odd number of frames from 3 on, and a displacement from 0 on."
        )
    parts = []
    for start in range(0, count, chunk):
        parts.append(_chunk(min(chunk, count - start), generator, side, most, frames, noise))
    sharp, blurred, events, displacement = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("sharp", "blurred", "events", "displacement")
    )
    return LineScenes(sharp, blurred, events, [s for part in parts for s in part.segments], displacement)


def _chunk(count: int, g: torch.Generator, side: int, most: float, frames: int, noise: float) -> LineScenes:
    segments = [draw_segments(side, g) for _ in range(count)]
    path = camera_path(segments, most * torch.rand(count, generator=g), side, frames, g)
    film = exposure(segments, path, side, g)
    ends = [warp(one.flatten(0, 1), path[i][[0, -1]], side) for i, one in enumerate(segments)]  # (2, 2k, 2)
    displacement = torch.stack([(b - a).norm(dim=-1).mean() for a, b in ends])
    low, high = THRESHOLDS
    events: Events = events_between(film, low + (high - low) * torch.rand(count, generator=g))
    tensor = events_to_est(*events[:4], (side, side), image=events.image, images=count)
    grain = noise * torch.randn(2, count, side, side, generator=g)
    sharp, blurred = film[:, frames // 2] + grain[0], film.mean(1) + grain[1]
    return LineScenes(sharp[:, None], blurred[:, None], tensor, segments, displacement)


def draw_segments(side: int, g: torch.Generator) -> Tensor:
    """Three to six segments ``(k, 2, 2)``; some begin where another ends, other ends and all middles stand apart."""
    wanted = int(torch.randint(3, 7, (), generator=g))
    found: list[Tensor] = []
    for _ in range(200):
        if len(found) == wanted:
            break
        pair = MARGIN + (side - 2 * MARGIN) * torch.rand(2, 2, generator=g)
        joined = bool(found) and float(torch.rand((), generator=g)) < 0.4
        if joined:
            old = torch.cat(found)
            pair[0] = old[int(torch.randint(len(old), (), generator=g))]
        if float((pair[0] - pair[1]).norm()) < SHORTEST:
            continue
        if found:
            new = pair[1:] if joined else pair
            middles = torch.stack(found).mean(1)
            near = torch.cdist(new, torch.cat(found)).min(), torch.cdist(pair.mean(0)[None], middles).min()
            if float(min(near)) < APART:
                continue
        found.append(pair)
    return torch.stack(found)


def camera_path(segments: list[Tensor], displacement: Tensor, side: int, frames: int, g: torch.Generator) -> Tensor:
    """Homographies ``(B, frames, 3, 3)`` in half sides from the middle, the identity in the middle of the exposure.

    The motion is a random direction plus a little acceleration, scaled so that the ends move about ``displacement (B,)`` pixels.
    """
    count = len(segments)
    deviation = torch.tensor(SPEED)
    velocity = deviation * torch.randn(count, 1, 6, generator=g)
    bend = 0.5 * deviation * torch.randn(count, 1, 6, generator=g)
    t = torch.linspace(-0.5, 0.5, frames)[:, None]
    motion = velocity * t + bend * t**2
    scale = torch.full((count, 1, 1), 0.05)
    for _ in range(3):  # the displacement is nearly linear in the motion
        path = _homography(scale * motion)
        ends = [warp(s.flatten(0, 1), path[i][[0, -1]], side) for i, s in enumerate(segments)]
        now = torch.stack([(b - a).norm(dim=-1).mean() for a, b in ends])
        scale = scale * (displacement / now.clamp(min=1e-6)).view(-1, 1, 1)
    return _homography(scale * motion)


def _homography(motion: Tensor) -> Tensor:
    """``(…, 3, 3)`` from shift, turn, growth and perspective ``(…, 6)``."""
    across, down, turn, growth, px, py = motion.unbind(-1)
    size = growth.exp()
    cosine, sine = size * turn.cos(), size * turn.sin()
    rows = (cosine, -sine, across, sine, cosine, down, px, py, torch.ones_like(px))
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def warp(points: Tensor, path: Tensor, side: int) -> Tensor:
    """Where points ``(k, 2)`` in pixels stand under each of the homographies ``(S, 3, 3)``: ``(S, k, 2)``."""
    half = side / 2
    flat = torch.cat([points / half - 1, torch.ones_like(points[:, :1])], 1)
    moved = flat @ path.mT
    return (moved[..., :2] / moved[..., 2:] + 1) * half


def exposure(segments: list[Tensor], path: Tensor, side: int, g: torch.Generator) -> Tensor:
    """Sub-frames ``(B, S, side, side)`` of linear intensity: lines of own brightness and width over a faint texture that moves along."""
    count, frames = path.shape[:2]
    pixel = torch.arange(side) + 0.5
    grid = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), -1)  # (side, side, 2): x, y
    base = 0.3 + 0.4 * torch.rand(count, 1, 1, 1, generator=g)
    wave = 6 * torch.randn(count, 2, 2, generator=g)
    phase = 6.3 * torch.rand(count, 2, generator=g)
    film = torch.empty(count, frames, side, side)
    back = torch.linalg.inv(path)
    for i in range(count):
        still = warp(grid.flatten(0, 1), back[i], side) / (side / 2) - 1  # where each pixel comes from
        film[i] = base[i] + 0.06 * torch.sin(still @ wave[i].mT + phase[i]).sum(-1).unflatten(1, (side, side))
        number = len(segments[i])
        sign = torch.where(torch.rand(number, generator=g) < 0.5, -1.0, 1.0)
        colour = (base[i].flatten() + sign * (0.2 + 0.25 * torch.rand(number, generator=g))).clamp(0.03, 1)
        width = 1.2 + torch.rand(number, generator=g)
        ends = warp(segments[i].flatten(0, 1), path[i], side).unflatten(1, (number, 2))
        for k in range(number):
            cover = (width[k] / 2 + 0.5 - distance(grid, ends[:, k])).clamp(0, 1)
            film[i] += cover * (colour[k] - film[i])
    return film


def distance(grid: Tensor, ends: Tensor) -> Tensor:
    """Distances ``(S, H, W)`` of points ``(H, W, 2)`` from the segments between ``ends (S, 2, 2)``."""
    a, along = ends[:, 0], ends[:, 1] - ends[:, 0]
    away = grid - a[:, None, None]
    share = (away * along[:, None, None]).sum(-1) / along.square().sum(-1).clamp(min=1e-12)[:, None, None]
    nearest = away - share.clamp(0, 1)[..., None] * along[:, None, None]
    return nearest.norm(dim=-1)
