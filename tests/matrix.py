"""The one table of what is tested: patterns (rows) and hosts (situations a model can put them in).

To test a new pattern, add a row to ``PATTERNS``; every promise in ``tests/patterns/test_matrix.py`` then applies to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from foveal.core.budget import Budget
from foveal.core.context import Selection
from foveal.patterns import (
    DHSA,
    Anchor,
    BlockTopK,
    Dense,
    Disc,
    FrameBand,
    MoBA,
    Neighborhood,
    Pattern,
    Reuse,
    SlidingWindow,
    SparseD,
    TokenTopK,
    Triangle,
    VMoBA,
    XAttention,
)

from .support import Host, context

Keeps = Callable[[Host, int, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One pattern under test.

    Attributes:
        pattern: an instance small enough to drop something at 100 to 300 tokens.
        full: the same pattern with a budget that covers everything; must equal dense attention.
        keeps: ``(host, b, i, j)``: whether the pattern keeps pairs that the host allows, written down a second time from its
            definition; None where the choice depends on the tensors.
        block: rows that are selected together; pieces of a prompt end on multiples of it.
        wrong: values out of range, ``(field, value)``.
        refuses: hosts that the pattern refuses with ``UnsupportedError``.
        per_group: chooses once for the query heads of a key head, so that repeating keys gives each head a choice of its own.
        extra: further fields of ``SelectContext``, made from q, k and the host.
    """

    pattern: Pattern
    full: Pattern
    keeps: Keeps | None = None
    block: int = 1
    wrong: tuple[tuple[str, Any], ...] = ()
    refuses: frozenset[str] = frozenset()
    extra: Callable[..., dict[str, Any]] | None = None
    per_group: bool = False


def near(host: Host, b: int, i: np.ndarray, j: np.ndarray, window: int, sinks: int) -> np.ndarray:
    """The definition of a window with sinks."""
    own = host.first + i
    ahead = host.kv_len if host.causal else window
    return ((own - window < j) & (j < own + ahead)) | (host.rank(b, j) < sinks)


def near_blocks(host: Host, b: int, i: np.ndarray, j: np.ndarray, window: int, sinks: int, block: int) -> np.ndarray:
    """The definition of a window of whole blocks of positions: the own block and those before it (and after it)."""
    own = host.rank(b, host.first + i)
    away = own.clip(0) // block - np.floor_divide(host.rank(b, j) + own * 0, block)
    ahead = host.kv_len if host.causal else window // block
    return ((away < window // block) & (away > -ahead)) | (host.rank(b, j) < sinks)


def triangle(host: Host, b: int, i: np.ndarray, j: np.ndarray, window: int, sinks: int, rows: int) -> np.ndarray:
    """The definition of a triangle: as ``near``, but the last rows of the call see everything."""
    return (i >= host.q_len - rows) | near(host, b, i, j, window, sinks)


def disc(host: Host, b: int, i: np.ndarray, j: np.ndarray, radius: int, width: int, text: int) -> np.ndarray:
    """The definition of a disc on a row-major image after ``text`` tokens."""
    own = host.first + i
    (yq, xq), (yk, xk) = (np.divmod(p - text, width) for p in (own, j))
    return (own < text) | (j < text) | ((yq - yk) ** 2 + (xq - xk) ** 2 < radius**2)


def band(host: Host, b: int, i: np.ndarray, j: np.ndarray, keep: float, text: int) -> np.ndarray:
    """The definition of a band in one frame that ends with the last query's key (causal hosts) or the last key."""
    own, length = host.first + i, host.first + host.q_len if host.causal else host.kv_len
    half = int(keep * (length - text)) // 2
    return (own < text) | (j < text) | (abs(own - j) <= half)


def neighbors(host: Host, b: int, i: np.ndarray, j: np.ndarray, window: int, stride: int, causal: bool) -> np.ndarray:
    """The definition of a neighborhood on one axis that ends with the last query's key (causal hosts) or the last key."""
    own, length = host.first + i, host.first + host.q_len if host.causal else host.kv_len
    window = min(window, length)
    stride = min(stride, window)
    leader = own // stride * stride + (stride - 1 if causal else stride // 2)
    leader = np.minimum(leader, length - 1)
    if causal:
        return (leader - window < j) & (j <= own)
    start = np.clip(leader - window // 2, 0, length - window)
    return (start <= j) & (j < start + window)


def dhsa(variant: Any, budget: Budget = Budget(tokens=60), refuses: frozenset[str] = frozenset(), **fields: Any) -> Row:
    """A row of the DHSA family in small blocks."""
    few = DHSA(budget=budget, variant=variant, q_block=16, kv_block=8, **fields)
    return Row(few, replace(few, budget=Budget(tokens=1 << 20)), block=16, refuses=refuses, wrong=DHSA_WRONG)


DHSA_WRONG = (
    ("q_block", 0),
    ("kv_block", 0),
    ("local", -1),
    ("sinks", -1),
    ("instruction", -1),
    ("chunk", 0),
    ("gap", -1),
)
NOT_CAUSAL = frozenset({"bidirectional", "encoder, padding", "cross"})

CROSS = frozenset({"cross"})


def grid_of(host: Host) -> tuple[int, int, int]:
    """Frames of 5×2 tokens for the longest sequence; where it is causal the last frame may be cut short."""
    longest = max((n for row in host.documents for n in row), default=0)
    longest = longest or max(host.kv_len - left - right for left, right in host.pads or ((0, 0),))
    return -(-longest // 10), 5, 2


def vmoba(refuses: frozenset[str] = CROSS, **fields: Any) -> Row:
    """A row of VMoBA over a grid that fits the host; the middle entry of ``blocks`` is used, so that the cycle is too."""
    few = VMoBA(**{"blocks": ((99,), (8,), (99,))} | fields)
    wrong = (
        ("threshold", -0.1),
        ("threshold", 1.5),
        ("dense_steps", -1),
        ("blocks", ()),
        ("top_k", (0,)),
        ("grid", (0, 2)),
    )
    full = replace(few, threshold=1.0, top_k=(1 << 20,) if few.top_k else ())
    return Row(
        few, full, extra=lambda q, k, host: {"grid": grid_of(host), "layer_index": 4}, wrong=wrong, refuses=refuses
    )


def first_blocks(host: Host, b: int, i: np.ndarray, j: np.ndarray, block: int) -> np.ndarray:
    """The definition of MoBA with ``top_k = 1``: the query's own block, counted inside its sequence.

    Rows of padding after a sequence belong to its last token.
    """
    last = host.kv_len - 1 - (host.pads[b][1] if host.pads else 0)
    own = np.clip(host.first + i, 0, last)
    return host.rank(b, own) // block == host.rank(b, j) // block


CHOOSES = BlockTopK(Budget(tokens=60), q_block=16, kv_block=8, sinks=2)


def after_choices(q: Tensor, k: Tensor, host: Host) -> dict[str, Any]:
    """A third layer: layer 0 chose, layer 1 was dense."""
    layout, state = CHOOSES.select(q, k, context(host))
    return {"layer_index": 2, "earlier": {0: Selection(layout, state), 1: Selection(None, None)}}


PATTERNS: dict[str, Row] = {
    "dense": Row(Dense(), Dense(), lambda host, b, i, j: i + j >= 0),
    "sliding_window": Row(
        SlidingWindow(window=37, sinks=3),
        SlidingWindow(window=1 << 20),
        lambda host, b, i, j: near(host, b, i, j, 37, 3),
        wrong=(("window", 0), ("window", -1), ("sinks", -1)),
    ),
    "sliding_window-1": Row(
        SlidingWindow(window=1), SlidingWindow(window=1, sinks=1 << 20), lambda host, b, i, j: near(host, b, i, j, 1, 0)
    ),
    "sliding_window-130": Row(  # the window and the sinks both reach past a tile
        SlidingWindow(window=130, sinks=129),
        SlidingWindow(window=1 << 20, sinks=1 << 20),
        lambda host, b, i, j: near(host, b, i, j, 130, 129),
    ),
    "sliding_window-blocks": Row(
        SlidingWindow(window=32, sinks=3, block=8),
        SlidingWindow(window=1 << 20, block=1 << 5),
        lambda host, b, i, j: near_blocks(host, b, i, j, 32, 3, 8),
        wrong=(("block", 0), ("block", 7)),
    ),
    "triangle-blocks": Row(
        Triangle(window=24, sinks=5, dense_rows=16, block=12), Triangle(window=1, sinks=0, dense_rows=1 << 20)
    ),
    "triangle": Row(
        Triangle(window=24, sinks=5, dense_rows=16),
        Triangle(window=1, sinks=0, dense_rows=1 << 20),
        lambda host, b, i, j: triangle(host, b, i, j, 24, 5, 16),
        wrong=(("window", 0), ("sinks", -1), ("dense_rows", -1)),
    ),
    "disc": Row(
        Disc(radius=4, grid=(-1, 12), text=5),
        Disc(radius=1 << 20, grid=(-1, 12)),
        lambda host, b, i, j: disc(host, b, i, j, 4, 12, 5),
        refuses=frozenset({"cross"}),
        wrong=(("radius", 0), ("radius", -1), ("text", -1), ("grid", (0, 4)), ("grid", (4, 0)), ("tile", (0, 1))),
    ),
    "disc-1": Row(
        Disc(radius=1, grid=(-1, 200)),
        Disc(radius=1, grid=(-1, 3), text=1 << 20),
        lambda host, b, i, j: disc(host, b, i, j, 1, 200, 0),
        refuses=frozenset({"cross"}),
    ),
    "frame_band": Row(
        FrameBand(keep=0.3),
        FrameBand(keep=2.0),
        lambda host, b, i, j: band(host, b, i, j, 0.3, 0),
        refuses=frozenset({"cross"}),
        wrong=(("keep", 0.0), ("keep", 2.5), ("frames", 0), ("text", -1)),
    ),
    "sparsed": Row(
        SparseD(keep=0.3, generated=40, block=16),
        SparseD(keep=1.0, generated=40, block=16),
        block=16,
        wrong=(("keep", -0.1), ("keep", 1.1), ("skip", 1.5), ("steps", 0), ("block", 0), ("generated", -1)),
    ),
    "sparsed-code": Row(
        SparseD(keep=0.2, generated=40, block=8, selection="code", literal=True),
        SparseD(keep=1.0, generated=40, block=8, selection="code", literal=True),
        block=8,
    ),
    "neighborhood": Row(
        Neighborhood((-1,), window=20),
        Neighborhood((-1,), window=1 << 20),
        lambda host, b, i, j: neighbors(host, b, i, j, 20, 1, False),
        refuses=frozenset({"cross"}),
        wrong=(
            ("window", 0),
            ("stride", 0),
            ("stride", 21),
            ("dilation", 0),
            ("extra", -1),
            ("grid", (0,)),
            ("q_tile", (0,)),
            ("kv_tile", (8,)),
        ),
    ),
    "neighborhood-strided": Row(
        Neighborhood((-1,), window=33, stride=12),
        Neighborhood((-1,), window=1 << 20, stride=12),
        lambda host, b, i, j: neighbors(host, b, i, j, 33, 12, False),
        refuses=frozenset({"cross"}),
    ),
    "neighborhood-causal": Row(
        Neighborhood((-1,), window=20, causal=True),
        Neighborhood((-1,), window=1 << 20),
        lambda host, b, i, j: neighbors(host, b, i, j, 20, 1, True),
        refuses=frozenset({"cross"}),
    ),
    "block_topk-tokens": Row(
        BlockTopK(Budget(tokens=80), q_block=16, kv_block=16, sinks=3, local=5),
        BlockTopK(Budget(tokens=1 << 20), q_block=16, kv_block=16),
        block=16,
        wrong=(("q_block", 0), ("kv_block", 0), ("sinks", -1), ("local", -1)),
    ),
    "block_topk-density": Row(
        BlockTopK(Budget(density=0.4), q_block=32, kv_block=16, sinks=0, per_head=False),
        BlockTopK(Budget(density=1.0), q_block=32, kv_block=16),
        block=32,
    ),
    "block_topk-mass": Row(
        BlockTopK(Budget(mass=0.6), q_block=16, kv_block=8, sinks=2, local=3),
        BlockTopK(Budget(mass=1.0), q_block=16, kv_block=8),
        block=16,
    ),
    "block_topk-rows": Row(  # every row chooses for itself, so decoding must choose the same (sinks are blocks only in prefill)
        BlockTopK(Budget(tokens=40), q_block=1, kv_block=8, sinks=0, local=4),
        BlockTopK(Budget(tokens=1 << 20), q_block=1, kv_block=8),
    ),
    "dhsa-a": dhsa("a"),
    "dhsa-topk": dhsa("topk"),
    "dhsa-vs": dhsa("vs", refuses=NOT_CAUSAL),
    "dhsa-vsb": dhsa("vsb", refuses=NOT_CAUSAL),
    "dhsa-vsb-density": dhsa("vsb", Budget(density=0.4), refuses=NOT_CAUSAL),
    "dhsa-chunk": dhsa("chunk", refuses=NOT_CAUSAL, local=10, sinks=4, instruction=6, chunk=7),
    "dhsa-chunk-reconstructed": dhsa(
        "chunk",
        Budget(density=0.4),
        NOT_CAUSAL,
        local=10,
        sinks=4,
        instruction=0,
        chunk=7,
        per_head=True,
        decode="reconstructed",
    ),
    "moba": Row(
        MoBA(block=16, top_k=3), MoBA(block=16, top_k=1 << 20), refuses=CROSS, wrong=(("block", 0), ("top_k", 0))
    ),
    "moba-1": Row(
        MoBA(block=13, top_k=1),
        MoBA(block=1 << 20, top_k=1),
        lambda host, b, i, j: first_blocks(host, b, i, j, 13),
        refuses=CROSS,
    ),
    "moba-short": Row(MoBA(block=5, top_k=6), MoBA(block=5, top_k=1 << 20), refuses=CROSS),
    "vmoba": vmoba(blocks=((99,), (1, 2, 0), (99,))),
    "vmoba-box-topk": vmoba(blocks=((99,), (0, 2, 1), (99,)), top_k=(99, 2, 99)),
    "vmoba-query": vmoba(scope="query_head", threshold=0.4),
    "vmoba-query-topk": vmoba(scope="query_head", top_k=(3,)),
    "vmoba-block": vmoba(scope="block", threshold=0.3, strict=True),
    "vmoba-overall": vmoba(scope="overall"),
    "token_topk": Row(
        TokenTopK(Budget(tokens=20), sinks=2, local=3),
        TokenTopK(Budget(tokens=1 << 20)),
        per_group=True,
        wrong=(("q_block", 0), ("sinks", -1), ("local", -1)),
    ),
    "token_topk-density": Row(
        TokenTopK(Budget(density=0.3), q_block=16, sinks=0, per_head=True),
        TokenTopK(Budget(density=1.0), q_block=16),
        block=16,
    ),
    "token_topk-mass": Row(TokenTopK(Budget(mass=0.7), sinks=1, local=2), TokenTopK(Budget(mass=1.0)), per_group=True),
    "xattention": Row(
        XAttention(Budget(mass=0.5), stride=4, block=16),
        XAttention(Budget(mass=1.0)),
        block=16,
        wrong=(("stride", 0), ("block", 0), ("stride", 24)),
    ),
    "reuse": Row(Reuse(0), Reuse(1), extra=after_choices, block=16, wrong=(("layer", -1),)),
    "reuse-nearest": Row(Reuse(), Reuse(1), extra=after_choices, block=16),
    "anchor": Row(Anchor(CHOOSES), Anchor(CHOOSES), lambda host, b, i, j: i + j >= 0),
}

HOSTS: dict[str, Host] = {
    **{f"causal-{n}": Host(n, n) for n in (1, 2, 63, 64, 65, 127, 128, 129, 257)},
    "bidirectional": Host(130, 130, causal=False),
    "second chunk": Host(30, 160, shift=130, after=130),
    "decode": Host(1, 150, after=149),
    "decode from a static cache": Host(1, 160, shift=139, after=139),
    "static cache": Host(20, 160, shift=100, after=100),
    "left padding": Host(133, 133, pads=((0, 0), (70, 0))),
    "right padding": Host(70, 70, pads=((0, 20), (0, 0))),
    "decode, left padding": Host(1, 140, pads=((50, 0), (0, 0), (139, 0)), after=139),
    "encoder, padding": Host(70, 70, causal=False, pads=((0, 9), (0, 0))),
    "documents": Host(135, 135, documents=((70, 65), (1, 64, 70))),
    "host window": Host(140, 140, window=30),
    "host window, decode": Host(1, 140, window=30, after=139),
    "host chunk": Host(100, 100, chunk=48, pads=((0, 0), (20, 0))),
    "cross": Host(70, 50, causal=False),
}
"""Situations: lengths around the edges of blocks, and everything that a model itself may demand."""


def names_with_rows() -> set[str]:
    """Registered names that have at least one row."""
    return {row.pattern.registered_name for row in PATTERNS.values()}
