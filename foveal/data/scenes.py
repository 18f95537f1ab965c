"""Rendered scenes with exact answers: coloured shapes on a grid, their places and numbers, short printed words, clutter. Seeded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from ..core.errors import ConfigError, DataError

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 200, 40), "purple": (150, 60, 190), "black": (25, 25, 25)}  # fmt: skip
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PRINTED = ("cat", "dog", "sun", "map", "key", "tea", "box", "pen", "hat", "bee", "ice", "owl")
BACKGROUND = (235, 235, 235)
GRID = 3


@dataclass(frozen=True)
class Thing:
    """One shape in a cell of the grid; its middle is at ``(row, column)`` of the grid plus ``shift``, in cells."""

    shape: str
    colour: str
    row: int
    column: int
    size: float = 0.7
    shift: tuple[float, float] = (0.0, 0.0)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        things: in raster order. word: printed in a free cell, with that cell, or None. clutter: thin lines and dots of no meaning,
            each ``(x0, y0, x1, y1, grey)`` in shares of the side.
    """

    things: tuple[Thing, ...]
    word: tuple[str, int, int] | None = None
    clutter: tuple[tuple[float, float, float, float, int], ...] = ()

    def caption(self) -> str:
        """``a red circle , a blue square`` in raster order, then ``and the word sun``."""
        text = " , ".join(f"a {t.name}" for t in self.things)
        return text if self.word is None else f"{text} and the word {self.word[0]}"


@dataclass(frozen=True)
class Question:
    """A question with its exact answer; ``about`` are the cells that hold the answer, ``kind`` its family."""

    text: str
    answer: str
    kind: str
    about: tuple[tuple[int, int], ...] = ()


def scene(g: Generator, things: int, *, clutter: int = 0, word: bool = False) -> Scene:
    """Draw a scene.

    Args:
        g: CPU generator. things: shapes, 1 to 9, one fewer with a word. clutter: lines of no meaning.

    Raises:
        ConfigError: more than the grid holds.
    """
    most = GRID * GRID - word
    if not 1 <= things <= most:
        raise ConfigError(f"things is {things}; expected 1 to {most}, the grid's free cells.")
    cells = torch.randperm(GRID * GRID, generator=g).tolist()
    found = []
    for cell in sorted(cells[:things]):
        shape = SHAPES[_below(len(SHAPES), g)]
        colour = tuple(COLOURS)[_below(len(COLOURS), g)]
        size = 0.6 + 0.3 * _share(g)
        shift = ((_share(g) - 0.5) * (1 - size), (_share(g) - 0.5) * (1 - size))
        found.append(Thing(shape, colour, cell // GRID, cell % GRID, size, shift))
    printed = (PRINTED[_below(len(PRINTED), g)], cells[things] // GRID, cells[things] % GRID) if word else None
    lines = []
    for _ in range(clutter):
        x, y, dx, dy = (_share(g) for _ in range(4))
        lines.append((x, y, x + (dx - 0.5) * 0.4, y + (dy - 0.5) * 0.4, 120 + _below(90, g)))
    return Scene(tuple(found), printed, tuple(lines))


def questions(of: Scene, g: Generator) -> list[Question]:
    """Every kind of question that has one right answer here, in random order."""
    out = []
    names = [t.name for t in of.things]
    shapes = [t.shape for t in of.things]
    for t in of.things:
        if shapes.count(t.shape) == 1:
            out.append(Question(f"what colour is the {t.shape} ?", t.colour, "colour", ((t.row, t.column),)))
        if names.count(t.name) == 1:
            where = f"{ROWS[t.row]} {COLUMNS[t.column]}"
            out.append(Question(f"where is the {t.name} ?", where, "place", ((t.row, t.column),)))
    shape = SHAPES[_below(len(SHAPES), g)]
    cells = tuple((t.row, t.column) for t in of.things if t.shape == shape)
    out.append(Question(f"how many {shape} shapes are there ?", NUMBERS[shapes.count(shape)], "count", cells))
    there = of.things[_below(len(of.things), g)]
    out.append(Question(f"is there a {there.name} ?", "yes", "presence", ((there.row, there.column),)))
    absent = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in names]
    out.append(Question(f"is there a {absent[_below(len(absent), g)]} ?", "no", "presence"))
    if of.word is not None:
        out.append(Question("what word is written ?", of.word[0], "word", (of.word[1:],)))
    order = torch.randperm(len(out), generator=g).tolist()
    return [out[i] for i in order]


def render(of: Scene, side: int = 48) -> NDArray[np.uint8]:
    """The picture ``(side, side, 3)``; four samples per pixel.

    Raises:
        DataError: the scene has a word and Pillow is not installed.
    """
    fine = 2 * side
    out = np.empty((fine, fine, 3), dtype=np.float32)
    out[:] = BACKGROUND
    at = (np.arange(fine) + 0.5) / fine

    def part(low: float, high: float) -> slice:  # the samples between two shares of the side
        return slice(int(np.searchsorted(at, low)), int(np.searchsorted(at, high)))

    for x0, y0, x1, y1, grey in of.clutter:
        rows, columns = part(min(y0, y1) - 0.01, max(y0, y1) + 0.01), part(min(x0, x1) - 0.01, max(x0, x1) + 0.01)
        y, x = at[rows, None], at[None, columns]
        length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9)
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length, 0, 1)
        out[rows, columns][np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)) < 0.008] = grey
    for t in of.things:
        rows, columns = part(t.row / GRID, (t.row + 1) / GRID), part(t.column / GRID, (t.column + 1) / GRID)
        u = (at[None, columns] * GRID - t.column - 0.5 - t.shift[0]) * 2 / t.size
        v = (at[rows, None] * GRID - t.row - 0.5 - t.shift[1]) * 2 / t.size
        out[rows, columns][_inside(t.shape, u, v)] = COLOURS[t.colour]
    picture = out.reshape(side, 2, side, 2, 3).mean((1, 3)).round().astype(np.uint8)
    return picture if of.word is None else _print(picture, *of.word)


def mentions(text: str) -> list[str]:
    """``colour shape`` pairs that a description names, in order."""
    words = text.replace(",", " ").split()
    return [f"{a} {b}" for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPES]


def hallucinated(said: Sequence[tuple[str, Scene]]) -> dict[str, float]:
    """Descriptions against their scenes.

    Returns:
        ``chair_s``, the share of descriptions that name something that is not there; ``chair_i``, the share of such mentions;
        ``recall``, the share of what is drawn that is named.
    """
    wrong = sentences = named = found = drawn = 0
    for text, s in said:
        mine, there = mentions(text), {t.name for t in s.things}
        bad = sum(m not in there for m in mine)
        wrong, sentences, named = wrong + bad, sentences + (bad > 0), named + len(mine)
        found, drawn = found + len(there & set(mine)), drawn + len(there)
    return {"chair_s": sentences / len(said), "chair_i": wrong / max(named, 1), "recall": found / drawn}


def cell_mask(cells: tuple[tuple[int, int], ...], side: int) -> NDArray[np.bool_]:
    """``(side, side)``, True in these cells of the grid."""
    out = np.zeros((side, side), dtype=bool)
    edges = [round(i * side / GRID) for i in range(GRID + 1)]
    for row, column in cells:
        out[edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = True
    return out


def _inside(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    if shape == "circle":
        return u**2 + v**2 < 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.85
    if shape == "triangle":
        return (v < 0.85) & (abs(u) < (v + 1) / 1.85)
    return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1)


def _print(picture: NDArray[np.uint8], word: str, row: int, column: int) -> NDArray[np.uint8]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise DataError(
            "printing a word into a scene needs Pillow, which is not installed: pip install pillow."
        ) from None
    image, cell = Image.fromarray(picture), picture.shape[0] / GRID
    font = ImageFont.load_default(size=max(8.0, cell * 0.42))
    middle = ((column + 0.5) * cell, (row + 0.5) * cell)
    ImageDraw.Draw(image).text(middle, word, fill=(0, 0, 0), font=font, anchor="mm")
    return np.asarray(image)


def _below(n: int, g: Generator) -> int:
    return int(torch.randint(n, (1,), generator=g))


def _share(g: Generator) -> float:
    return float(torch.rand(1, generator=g))
