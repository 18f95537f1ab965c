"""Tasks made from a generator: what they ask for is known exactly, and small models learn them in minutes.

Tokens: 0 pads and fills, 1 separates, the others are the task's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError

FILL, SEPARATOR, FIRST = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Task:
    """A batch.

    Attributes:
        ids: ``(B, N)`` int64 tokens.
        answer: ``(B, N)`` bool, tokens that the task determines; these are scored.
    """

    ids: Tensor
    answer: Tensor


def key_values(
    batch: int,
    pairs: int,
    asked: int,
    generator: torch.Generator,
    *,
    keys: int = 64,
    values: int = 64,
    length: int | None = None,
    listed: bool = False,
) -> Task:
    """Retrieval: ``k v k v … ␟ k v k v``; the values after the separator are the answer.

    Args:
        batch: rows. pairs: key–value pairs, their keys distinct. asked: how many of them are asked for again.
        generator: draws everything.
        keys, values: sizes of the two vocabularies (tokens 2 … keys+1, then the values).
        length: tokens in all; pairs are spread in order among fill tokens to reach it.
        listed: ask with all keys first and then all values, ``… ␟ k k k v v v``: a prompt and an answer in one piece.

    Raises:
        ConfigError: more pairs than keys, more asked than there are, or a length that is too short.
    """
    needed = 2 * pairs + 1 + 2 * asked
    length = needed if length is None else length
    if not 1 <= asked <= pairs <= keys or length < needed:
        raise ConfigError(
            f"key_values has pairs={pairs}, asked={asked}, keys={keys}, length={length}; expected asked ≤ pairs ≤ keys and a "
            f"length of at least {needed}."
        )
    key = torch.rand(batch, keys, generator=generator).argsort(1)[:, :pairs] + FIRST
    value = torch.randint(values, (batch, pairs), generator=generator) + FIRST + keys
    which = torch.rand(batch, pairs, generator=generator).argsort(1)[:, :asked]
    room = length - 1 - 2 * asked
    slot = torch.rand(batch, room - pairs, generator=generator).argsort(1)[:, :pairs].sort(1).values
    place = slot + torch.arange(pairs)  # every pair takes two tokens, so later ones move by one each
    ids = torch.full((batch, length), FILL)
    ids.scatter_(1, place, key).scatter_(1, place + 1, value)
    ids[:, room] = SEPARATOR
    answer = torch.zeros(batch, length, dtype=torch.bool)
    ask, reply = key.gather(1, which), value.gather(1, which)
    if listed:
        ids[:, room + 1 : room + 1 + asked], ids[:, room + 1 + asked :] = ask, reply
        answer[:, room + 1 + asked :] = True
    else:
        ids[:, room + 1 :: 2], ids[:, room + 2 :: 2] = ask, reply
        answer[:, room + 2 :: 2] = True
    return Task(ids, answer)


def key_values_vocabulary(keys: int = 64, values: int = 64) -> int:
    """Tokens that :func:`key_values` uses."""
    return FIRST + keys + values


def markov(batch: int, length: int, generator: torch.Generator, *, table: Tensor) -> Task:
    """A local task: a Markov chain over ``table`` ``(V, V)`` of transition probabilities; every token but the first is scored.

    Tokens are shifted by 2; a window of two tokens is all that can help.

    Raises:
        ConfigError: no tokens. ShapeError: a table that is not square.
    """
    _check_table(table)
    if length < 1:
        raise ConfigError(f"markov has length={length}; expected at least 1.")
    state = torch.randint(table.shape[0], (batch,), generator=generator)
    out = [state]
    for _ in range(length - 1):
        state = torch.multinomial(table[state], 1, generator=generator)[:, 0]
        out.append(state)
    answer = torch.ones(batch, length, dtype=torch.bool)
    answer[:, 0] = False
    return Task(torch.stack(out, 1) + FIRST, answer)


def _check_table(table: Tensor) -> None:
    if table.dim() != 2 or table.shape[0] != table.shape[1] or not len(table):
        raise ShapeError(f"table has shape {tuple(table.shape)}; expected (V, V) with V of at least 1.")


@dataclass(frozen=True, eq=False)
class Mixed(Task):
    """A batch of :func:`distant_values`.

    Attributes:
        near: ``(B, N)`` bool, tokens of the chain whose predecessor is its predecessor in the chain.
    """

    near: Tensor


def distant_values(
    batch: int, length: int, pairs: int, gap: int, generator: torch.Generator, *, table: Tensor, keys: int = 32, values: int = 32
) -> Mixed:  # fmt: skip
    """A local task with something to remember: a Markov chain in whose first part pairs ``k v`` stand, and again in the last part.

    The second ``v`` of each pair is the answer; all that helps is the first one, at least ``gap`` tokens before.

    Args:
        length: tokens; both parts get half of what ``gap`` leaves. pairs: with distinct keys, each told once and asked once.
        table: ``(V, V)`` of the chain, whose tokens are 2 … V+1; then come the keys, then the values.

    Raises:
        ConfigError: more pairs than keys, or parts too short for the pairs. ShapeError: a table that is not square.
    """
    _check_table(table)
    part, chain = (length - gap) // 2, table.shape[0]
    if not 1 <= pairs <= keys or part < 2 * pairs:
        raise ConfigError(
            f"distant_values has length={length}, gap={gap}, pairs={pairs}, keys={keys}; expected pairs ≤ keys and a length of at least "
            f"gap + 4·pairs = {gap + 4 * pairs}."
        )
    ids = markov(batch, length, generator, table=table).ids
    key = torch.rand(batch, keys, generator=generator).argsort(1)[:, :pairs] + FIRST + chain
    value = torch.randint(values, (batch, pairs), generator=generator) + FIRST + chain + keys
    answer, near = torch.zeros(batch, length, dtype=torch.bool), torch.ones(batch, length, dtype=torch.bool)
    near[:, 0] = False
    for first, last in ((0, False), (length - part, True)):
        slot = torch.rand(batch, part - pairs, generator=generator).argsort(1)[:, :pairs].sort(1).values
        place = first + slot + torch.arange(pairs)
        which = torch.rand(batch, pairs, generator=generator).argsort(1)
        ids.scatter_(1, place, key.gather(1, which)).scatter_(1, place + 1, value.gather(1, which))
        for step in range(3):
            near.scatter_(1, (place + step).clamp(max=length - 1), False)
        if last:
            answer.scatter_(1, place + 1, True)
    return Mixed(ids, answer, near)


def transitions(size: int, likely: int, seed: int) -> Tensor:
    """``(size, size)`` transition probabilities in which every token has ``likely`` equally probable successors.

    Raises:
        ConfigError: likely not from 1 to ``size``.
    """
    if not 1 <= likely <= size:
        raise ConfigError(f"transitions has size={size}, likely={likely}; expected 1 ≤ likely ≤ size.")
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(size, size, generator=g).argsort(1)[:, :likely]
    return torch.zeros(size, size).scatter_(1, chosen, 1.0 / likely)


SHAPES = ("square", "disc", "cross")
COLOURS = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))
CAPTION = 3
"""Tokens of a caption: shape, colour, quadrant."""
CAPTION_TOKENS = len(SHAPES) + len(COLOURS) + 4


def shapes(batch: int, size: int, generator: torch.Generator, frames: int = 0) -> tuple[Tensor, Tensor]:
    """Coloured shapes on black with captions that say exactly what is there.

    Args:
        batch: pictures. size: pixels on a side, at least 8. frames: 0 for pictures, else the length of clips in which the
            shape moves one pixel a frame to the right, around the edge.

    Returns:
        ``(B, 3, size, size)`` or ``(B, 3, frames, size, size)`` values from −1 to 1, and ``(B, 3)`` caption tokens: shape,
        colour, quadrant of the centre in the first frame.

    Raises:
        ConfigError: fewer than 8 pixels, or a negative number of frames.
    """
    if size < 8:
        raise ConfigError(f"shapes has size={size}; expected at least 8 pixels.")
    if frames < 0:
        raise ConfigError(f"shapes has frames={frames}; expected 0 for pictures, or the length of clips.")
    shape = torch.randint(len(SHAPES), (batch,), generator=generator)
    colour = torch.randint(len(COLOURS), (batch,), generator=generator)
    radius = size // 8 + 1
    centre = torch.randint(radius, size - radius, (batch, 2), generator=generator)
    quadrant = (centre[:, 0] >= size // 2) * 2 + (centre[:, 1] >= size // 2)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    moved = torch.arange(max(frames, 1))
    dx = (x - centre[:, 1, None, None, None] - moved[:, None, None]) % size
    dx = torch.minimum(dx, size - dx)  # (B, F, size, size)
    dy = (y - centre[:, 0, None, None, None]).abs().expand_as(dx)
    inside = torch.stack([
        (dx < radius) & (dy < radius),
        dx**2 + dy**2 <= 0.8 * (radius - 0.5) ** 2,
        ((dx == 0) & (dy < radius + 1)) | ((dy == 0) & (dx < radius + 1)),
    ])[shape, torch.arange(batch)]  # fmt: skip
    paint = torch.tensor(COLOURS)[colour][:, :, None, None, None]
    pictures = torch.where(inside[:, None], paint, -1.0)
    caption = torch.stack([shape, len(SHAPES) + colour, len(SHAPES) + len(COLOURS) + quadrant], 1)
    return (pictures if frames else pictures[:, :, 0]), caption
