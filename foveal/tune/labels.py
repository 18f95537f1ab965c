"""Names beside the marks of a scatter plot, placed so that nothing covers anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; y grows downwards."""

FONT = 13.0
_GLYPH = 0.6  # mean width of a character over the font size, on the wide side for most fonts
_RANK = {"chosen": 0, "baseline": 1, "allowed": 2}


@dataclass(frozen=True)
class Mark:
    """One measured point: place, class, hover text, and the ends of its error bars (None without)."""

    x: float
    y: float
    kind: str
    name: str
    tip: str
    x_bar: tuple[float, float] | None
    y_bar: tuple[float, float] | None


@dataclass(frozen=True)
class Label:
    """A name beside its mark; ``x`` is the left end, ``y`` the baseline; the leader runs from the mark to the text."""

    text: str
    x: float
    y: float
    kind: str
    leader: Box | None


def text_width(text: str) -> float:
    """Estimated width in pixels, on the wide side."""
    return _GLYPH * FONT * len(text)


def place_labels(
    marks: Sequence[Mark], frame: Box, taken: Sequence[Label], lines: Sequence[Box], reach: float
) -> tuple[list[Label], list[str]]:
    """Put each name where it covers no mark, no other name and no leader, near its mark and on few lines.

    Names that find no place within ``reach`` pixels are returned instead of drawn. Marks are served best first.

    Args:
        marks: the points. frame: where names may stand. taken: text that is already there.
        lines: ``(x0, y0, x1, y1)`` that are better not written over; error bars are added to them.
    """
    blocked: list[Box] = [(m.x - r, m.y - r, m.x + r, m.y + r) for m in marks for r in [_radius(m)]]
    blocked += [(t.x, t.y - FONT, t.x + text_width(t.text), t.y + 3) for t in taken]
    leaders: list[Box] = []
    bars = [(m.x_bar[0], m.y, m.x_bar[1], m.y) for m in marks if m.x_bar]
    bars += [(m.x, m.y_bar[0], m.x, m.y_bar[1]) for m in marks if m.y_bar]
    labels, dropped = [], []
    for mark in sorted(marks, key=lambda m: _RANK.get(m.kind, 3)):
        wide = text_width(mark.name)
        best: tuple[float, Box, Box | None] | None = None
        for away, box, leader in _spots(mark, wide, reach):
            inside = (
                box[0] >= frame[0] + 3 and box[2] <= frame[2] - 3 and box[1] >= frame[1] + 2 and box[3] <= frame[3] - 2
            )
            if not inside or any(_overlap(box, b) for b in blocked) or any(_crosses(ln, box) for ln in leaders):
                continue
            others = [b for b in blocked if not (b[0] <= mark.x <= b[2] and b[1] <= mark.y <= b[3])]
            if leader is not None and any(_crosses(leader, b) for b in others):
                continue
            cost = away + 30 * sum(_crosses(ln, box) for ln in lines) + 8 * sum(_crosses(ln, box) for ln in bars)
            if best is None or cost < best[0]:
                best = cost, box, leader
        if best is None:
            dropped.append(mark.name)
            continue
        _, box, leader = best
        blocked.append((box[0] - 6, box[1], box[2] + 6, box[3]))
        if leader is not None:
            leaders.append(leader)
        labels.append(Label(mark.name, box[0], box[3] - 4, mark.kind, leader))
    return labels, dropped


def clear_spot(width: float, y: float, lefts: Sequence[float], marks: Sequence[Mark]) -> float:
    """The left end, of those given, where text of this width covers the fewest marks and error bars."""

    def covered(left: float) -> int:
        box = (left, y - FONT, left + width, y + 3)
        bars = [(m.x_bar[0], m.y, m.x_bar[1], m.y) for m in marks if m.x_bar]
        bars += [(m.x, m.y_bar[0], m.x, m.y_bar[1]) for m in marks if m.y_bar]
        on = sum(_overlap(box, (m.x - r, m.y - r, m.x + r, m.y + r)) for m in marks for r in [_radius(m)])
        return 3 * on + sum(_crosses(bar, box) for bar in bars)

    return min(lefts, key=covered)


def _radius(mark: Mark) -> float:
    """Free space around the middle of a mark."""
    return 11.0 if mark.kind == "chosen" else 7.0


def _spots(mark: Mark, wide: float, reach: float) -> Iterator[tuple[float, Box, Box | None]]:
    """Distance and place of labels around a mark, near ones first, with the leader line that the far ones need."""
    radius, tall = _radius(mark), FONT + 4
    near = radius + 4
    away = near
    while away <= reach:
        for angle in (0, 180, -90, 90, -35, 35, -145, 145, -65, 65, -115, 115):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            x, y = mark.x + away * dx, mark.y + away * dy
            left = x if dx > 0.2 else x - wide if dx < -0.2 else x - wide / 2
            top = y - tall / 2 + tall / 2 * dy
            far = away > near
            end = (mark.x + radius * dx, mark.y + radius * dy, x - 2 * dx, y - 2 * dy)
            yield away, (left, top, left + wide, top + tall), end if far else None
        away += 9


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(line: Box, box: Box) -> bool:
    """True when the segment ``(x0, y0, x1, y1)`` passes through the box."""
    for i in range(65):
        t = i / 64
        x, y = line[0] + t * (line[2] - line[0]), line[1] + t * (line[3] - line[1])
        if box[0] < x < box[2] and box[1] < y < box[3]:
            return True
    return False
