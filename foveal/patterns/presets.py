"""Named settings of papers, where a paper's option is an existing pattern with certain numbers."""

from __future__ import annotations

from ..core.budget import Budget
from .base import Pattern
from .sliding_window import SlidingWindow
from .triangle import Triangle
from .xattention import XAttention

BLOCK, SINK_BLOCKS, LOCAL_BLOCKS = 128, 1, 16

FLUX: dict[str, Pattern] = {
    "streaming": SlidingWindow(LOCAL_BLOCKS * BLOCK, SINK_BLOCKS * BLOCK, block=BLOCK),
    "triangle": Triangle(LOCAL_BLOCKS * BLOCK, SINK_BLOCKS * BLOCK, dense_rows=BLOCK, block=BLOCK),
    "xattention": XAttention(Budget(mass=0.9), stride=16, block=BLOCK),
    "local": SlidingWindow((SINK_BLOCKS + LOCAL_BLOCKS) * BLOCK),
}
"""The sparse options of Flux Attention (arXiv 2604.07394) as its script sets them: one sink block and 16 local blocks of 128."""
