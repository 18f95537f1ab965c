"""States of requests: another model's is refused by name; what a cache did to its own is worked out anew (see each pattern's tests)."""

from __future__ import annotations

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.core.errors import ShapeError
from foveal.patterns import DHSA, BlockTopK, MoBA, Pattern

PATTERNS = [
    MoBA(8, 2),
    BlockTopK(Budget(tokens=20), 16, 8),
    DHSA(Budget(tokens=20), variant="chunk", chunk=8, per_head=True, decode="reconstructed"),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.registered_name)
@pytest.mark.parametrize("heads, channels", [(1, 8), (2, 4)])
def test_a_state_of_another_model_is_refused(pattern: Pattern, heads: int, channels: int) -> None:
    """Sums of one model's keys say nothing of another one's, however many keys they hold."""
    make = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 40, 8, generator=make) for n in (4, 2))
    state = pattern.select(q[:, :, :39], k[:, :, :39], SelectContext(BaseMask.build(39, 39, causal=True)), None)[1]
    ctx = SelectContext(BaseMask.build(1, 40, causal=True), q_offset=39)
    pattern.select(q[:, :, 39:], k, ctx, state)
    expected = rf"state is of keys with 2 heads of 8 channels; expected {heads} heads of {channels}.*or None"
    with pytest.raises(ShapeError, match=expected):
        pattern.select(q[:, :, 39:, :channels], k[:, :heads, :, :channels], ctx, state)
