"""Names beside the marks of a scatter plot, placed so that nothing covers anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; y grows downwards."""

FONT = 13.0
_GLYPH = 0.6  # mean width of a character over the font size, on the wide side for most fonts
_RADIUS = 7.0  # free space around the middle of a mark
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
    marks: Sequence[Mark], frame: Box, taken: Sequence[Label], reach: float
) -> tuple[list[Label], list[str]]:
    """Put each name where it covers no mark, no other name and no leader, as near to its mark as possible.

    Names that find no place within ``reach`` pixels are returned instead of drawn. Marks are served best first.
    """
    blocked: list[Box] = [(m.x - _RADIUS, m.y - _RADIUS, m.x + _RADIUS, m.y + _RADIUS) for m in marks]
    blocked += [(t.x, t.y - FONT, t.x + text_width(t.text), t.y + 3) for t in taken]
    leaders: list[Box] = []
    labels, dropped = [], []
    for mark in sorted(marks, key=lambda m: _RANK.get(m.kind, 3)):
        wide = text_width(mark.name)
        for box, leader in _spots(mark, wide, reach):
            inside = (
                box[0] >= frame[0] + 3 and box[2] <= frame[2] - 3 and box[1] >= frame[1] + 2 and box[3] <= frame[3] - 2
            )
            if not inside or any(_overlap(box, b) for b in blocked) or any(_crosses(ln, box) for ln in leaders):
                continue
            others = [b for b in blocked if not (b[0] <= mark.x <= b[2] and b[1] <= mark.y <= b[3])]
            if leader is not None and any(_crosses(leader, b) for b in others):
                continue
            blocked.append(box)
            if leader is not None:
                leaders.append(leader)
            labels.append(Label(mark.name, box[0], box[3] - 4, mark.kind, leader))
            break
        else:
            dropped.append(mark.name)
    return labels, dropped


def _spots(mark: Mark, wide: float, reach: float) -> Iterator[tuple[Box, Box | None]]:
    """Places for a label around a mark, near ones first, with the leader line that the far ones need."""
    tall, near = FONT + 4, _RADIUS + 4
    away = near
    while away <= reach:
        for angle in (0, 180, -90, 90, -35, 35, -145, 145, -65, 65, -115, 115):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            x, y = mark.x + away * dx, mark.y + away * dy
            left = x if dx > 0.2 else x - wide if dx < -0.2 else x - wide / 2
            top = y - tall / 2 + tall / 2 * dy
            far = away > 2 * near
            end = (mark.x + _RADIUS * dx, mark.y + _RADIUS * dy, x - 2 * dx, y - 2 * dy)
            yield (left, top, left + wide, top + tall), end if far else None
        away += 9


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(line: Box, box: Box) -> bool:
    """True when the segment ``(x0, y0, x1, y1)`` passes through the box."""
    for i in range(17):
        t = i / 16
        x, y = line[0] + t * (line[2] - line[0]), line[1] + t * (line[3] - line[1])
        if box[0] < x < box[2] and box[1] < y < box[3]:
            return True
    return False
