"""XAttention: antidiagonal sums against a loop, the smallest set of blocks, Flux's options, bad input."""

import math

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.core.errors import ConfigError
from foveal.kernels.call import AttentionCall
from foveal.kernels.reference import visible_pairs
from foveal.patterns import XAttention
from foveal.patterns import xattention as module
from foveal.patterns.presets import FLUX


def tensors(length, heads=2, kv_heads=1, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(1, heads, length, dim, generator=g, dtype=torch.float64)
    return q, 2 * torch.randn(1, kv_heads, length, dim, generator=g, dtype=torch.float64)


def pairs(pattern, q, k, causal=True):
    base = BaseMask.build(q.shape[2], k.shape[2], causal=causal)
    layout, _ = pattern.select(q, k, SelectContext(base), None)
    return visible_pairs(AttentionCall(q, k, k, layout, base, 1.0))


def mass_loop(q, k, stride, block, causal):
    """Share of each query block's mass on each key block, logit by logit."""
    n = q.shape[0]
    logits = q @ k.T / math.sqrt(q.shape[1])
    groups, blocks = -(-n // stride), -(-n // block)
    score = torch.full((groups, groups), -torch.inf, dtype=q.dtype)
    for g in range(groups):
        for c in range(g + 1 if causal else groups):
            score[g, c] = 0.0
            for r in range(stride):
                i, j = g * stride + stride - 1 - r, c * stride + r
                if i < n and j < n:
                    score[g, c] += logits[i, j] / stride
    weight = score.softmax(-1)
    out = torch.zeros(blocks, blocks, dtype=q.dtype)
    for g in range(groups):
        for c in range(groups):
            out[g * stride // block, c * stride // block] += weight[g, c]
    return out / out.sum(-1, keepdim=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "stride", "block"), [(64, 4, 16), (61, 4, 16), (50, 8, 8), (40, 1, 8)])
def test_fewest_blocks_that_reach_the_mass_of_a_loop(length, stride, block, causal):
    q, k = tensors(length)
    for mass in (0.3, 0.7, 0.95):
        kept = pairs(XAttention(Budget(mass=mass), stride, block), q, k, causal)
        for h in range(2):
            share = mass_loop(q[0, h], k[0, 0], stride, block, causal)
            for u in range(share.shape[0]):
                row = min((u + 1) * block, length) - 1
                here = kept[0, h, row, ::block]
                forced = {0, u} if causal else set()
                order = sorted(
                    (c for c in range(u + 1 if causal else len(share)) if c not in forced),
                    key=lambda c: -float(share[u, c]),
                )
                want, held = set(forced), sum(float(share[u, c]) for c in forced)
                for c in order:
                    if held >= mass:
                        break
                    want.add(c)
                    held += float(share[u, c])
                assert set(here.nonzero()[:, 0].tolist()) == want


def test_stride_1_ranks_by_the_exact_block_mass():
    q, k = tensors(64, heads=1)
    share = mass_loop(q[0, 0], k[0, 0], 1, 16, True)
    exact = (
        (q[0, 0] @ k[0, 0].T / math.sqrt(8))
        .masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -torch.inf)
        .softmax(-1)
    )
    assert torch.allclose(share, exact.unflatten(1, (4, 16)).sum(2).unflatten(0, (4, 16)).mean(1))


def test_heads_in_pieces_choose_alike(monkeypatch):
    q, k = tensors(64, heads=6, kv_heads=3)
    want = pairs(XAttention(Budget(mass=0.6), 4, 16), q, k)
    monkeypatch.setattr(module, "SCORES", 1)
    assert torch.equal(pairs(XAttention(Budget(mass=0.6), 4, 16), q, k), want)


def test_decoding_is_dense():
    q, k = tensors(40)
    layout, _ = XAttention(stride=4, block=8).select(
        q[:, :, -1:], k, SelectContext(BaseMask.build(1, 40, causal=True), q_offset=39)
    )
    assert layout is None


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"budget": Budget(tokens=64)}, "budget.*64 tokens.*expected a mass"),
        ({"stride": 24}, "stride is 24 and block 128.*divides"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, names):
    with pytest.raises(ConfigError, match=names):
        XAttention(**fields)


def test_flux_options_are_what_its_script_sets():
    n = 2688  # 21 blocks: more than one sink block and 16 local ones
    at = torch.arange(n)
    block = at // 128
    q = k = torch.zeros(1, 1, n, 4)
    causal = at[:, None] >= at
    streaming = causal & ((block[:, None] - block < 16) | (block == 0))
    assert torch.equal(pairs(FLUX["streaming"], q, k)[0, 0], streaming)
    assert torch.equal(pairs(FLUX["triangle"], q, k)[0, 0], streaming | (causal & (at[:, None] >= n - 128)))
    assert torch.equal(pairs(FLUX["local"], q, k)[0, 0], causal & (at[:, None] - at < 17 * 128))
    assert FLUX["xattention"] == XAttention(Budget(mass=0.9), 16, 128)


def test_streaming_decodes_as_it_prefills():
    """Prefill of S + n equals prefill of S and n steps: blocks are counted by position, not from the end."""
    pattern = FLUX["streaming"]
    n = 2600
    q = k = torch.zeros(1, 1, n, 4)
    whole = pairs(pattern, q, k)
    for own in (2175, 2176, 2177, 2303, 2304, n - 1):
        base = BaseMask.build(1, own + 1, causal=True)
        layout, _ = pattern.select(q[:, :, :1], k[:, :, : own + 1], SelectContext(base, q_offset=own))
        seen = visible_pairs(AttentionCall(q[:, :, :1], k[:, :, : own + 1], k[:, :, : own + 1], layout, base, 1.0))
        assert torch.equal(seen[0, 0, 0], whole[0, 0, own, : own + 1])
