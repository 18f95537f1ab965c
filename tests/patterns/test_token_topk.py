"""Token top-k: the choice against sorting, Kinetics' identities by name, budgets."""

import itertools

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.kernels.call import AttentionCall
from foveal.kernels.reference import visible_pairs
from foveal.patterns import BlockTopK, TokenTopK
from foveal.patterns import token_topk as module


def tensors(batch=1, heads=4, kv_heads=2, length=60, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, length, dim, generator=g, dtype=torch.float64)
    return q, k


def pairs(pattern, q, k, base=None):
    base = BaseMask.build(q.shape[2], k.shape[2], causal=True) if base is None else base
    layout, _ = pattern.select(q, k, SelectContext(base), None)
    return visible_pairs(AttentionCall(q, k, k, layout, base, 1.0))


def looped(q, k, tokens, sinks, local, per_head):
    """The definition: sinks, local keys, and the largest of the (mean) logits up to ``tokens`` keys per row."""
    batch, heads, n, _ = q.shape
    group = heads // k.shape[1]
    kept = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    for b, h, i in itertools.product(range(batch), range(heads), range(n)):
        logits = q[b, :, i] @ k[b, h // group].T
        line = logits[h] if per_head else logits[h // group * group : (h // group + 1) * group].mean(0)
        forced = [j for j in range(i + 1) if j < sinks or i - j < local]
        free = sorted((j for j in range(i + 1) if j not in forced), key=lambda j: (-float(line[j]), j))
        kept[b, h, i, forced + free[: max(0, tokens - len(forced))]] = True
    return kept


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("tokens", "sinks", "local"), [(12, 4, 1), (12, 0, 0), (3, 4, 3), (1, 0, 0), (20, 2, 9)])
def test_choice_equals_a_loop(tokens, sinks, local, per_head):
    q, k = tensors(batch=2)
    pattern = TokenTopK(Budget(tokens=tokens), sinks=sinks, local=local, per_head=per_head)
    assert torch.equal(pairs(pattern, q, k), looped(q, k, tokens, sinks, local, per_head))


def test_all_heads_of_a_kv_group_select_the_same_set_and_the_count_is_exact():
    q, k = tensors()
    kept = pairs(TokenTopK(Budget(tokens=15), sinks=4, local=3), q, k)
    assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 2], kept[:, 3])
    assert not torch.equal(kept[:, 0], kept[:, 2])
    assert torch.equal(kept.sum(-1), torch.arange(1, 61).clamp(max=15).expand(1, 4, -1))
    assert kept[..., :4].logical_or(~torch.ones(60, 60, dtype=torch.bool).tril()[:, :4]).all(), "sinks are kept"
    assert kept.diagonal(0, -2, -1).all() and kept.diagonal(-2, -2, -1).all(), "local keys are kept"


def test_blocks_of_one_token_are_token_top_k():
    q, k = tensors(length=50)
    q, k = q[:, :, 49:], k
    base = BaseMask.build(1, 50, causal=True)
    tokens = pairs(TokenTopK(Budget(tokens=12), sinks=0, local=2, per_head=True), q, k, base)
    blocks = pairs(BlockTopK(Budget(tokens=12), q_block=1, kv_block=1, sinks=0, local=2), q, k, base)
    assert torch.equal(tokens, blocks)


def test_group_mean_of_logits_is_the_logit_of_the_mean_query():
    q, k = tensors()
    mean = q.unflatten(1, (2, 2)).mean(2)
    assert torch.equal(
        pairs(TokenTopK(Budget(tokens=9)), q, k)[:, ::2], pairs(TokenTopK(Budget(tokens=9), per_head=True), mean, k)
    )


@pytest.mark.parametrize("mass", [0.4, 0.8, 0.99])
def test_mass_keeps_the_fewest_keys_and_bounds_the_error(mass):
    q, k = tensors()
    q = q * 2
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = pairs(TokenTopK(Budget(mass=mass), sinks=0, local=1, per_head=True), q, k)
    logits = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    share = logits.masked_fill(~torch.ones(60, 60, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    held = (share * kept).sum(-1)
    assert (held >= mass - 1e-9).all()
    free = (share.masked_fill(~kept, 2.0) + torch.eye(60)).amin(-1)
    more = kept.sum(-1) > 1
    assert (held - free < mass)[more].all(), "one key less would not do"
    values = v.repeat_interleave(2, 1)
    sparse = (share * kept / held[..., None]) @ values
    error = (sparse - share @ values).norm(dim=-1)
    bound = 2 * (1 - held) * values.norm(dim=-1).amax(-1, keepdim=True)
    assert (error <= bound + 1e-12).all(), "‖Δo‖ ≤ 2(1 − mass)·max‖v‖"


def test_density_counts_keys_of_each_row():
    q, k = tensors()
    kept = pairs(TokenTopK(Budget(density=0.3), sinks=0, local=0), q, k)
    want = (0.3 * torch.arange(1, 61, dtype=torch.float64)).round().clamp(min=1).long()
    assert torch.equal(kept.sum(-1), want.expand(1, 4, -1))


def test_a_block_of_rows_shares_the_union():
    q, k = tensors()
    single = pairs(TokenTopK(Budget(tokens=8)), q, k)
    union = single.unflatten(2, (-1, 10)).any(3).repeat_interleave(10, 2) & torch.ones(60, 60, dtype=torch.bool).tril()
    assert torch.equal(pairs(TokenTopK(Budget(tokens=8), q_block=10), q, k), union)


def test_ties_go_to_the_lower_index_and_lists_rise(monkeypatch):
    q, k = tensors(length=40)
    q[:], k[:] = 1.0, 1.0  # whole numbers: every logit is exactly the same
    layout, _ = TokenTopK(Budget(tokens=6), sinks=0, local=1).select(
        q, k, SelectContext(BaseMask.build(40, 40, causal=True)), None
    )
    assert layout.index[0, 0, 39].tolist() == [0, 1, 2, 3, 4, 39]
    monkeypatch.setattr(module, "SCORES", 1)  # row by row
    again, _ = TokenTopK(Budget(tokens=6), sinks=0, local=1).select(
        q, k, SelectContext(BaseMask.build(40, 40, causal=True)), None
    )
    assert torch.equal(again.index, layout.index)
