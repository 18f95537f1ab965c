"""Block top-k: the choice against a loop, budgets, state, padding, documents, look-ahead."""

import itertools
import json
import math

import pytest
import torch

import foveal
from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.core.errors import ConfigError
from foveal.kernels.call import AttentionCall
from foveal.kernels.pooling import BlockSums, absorb, tile_area
from foveal.kernels.reference import visible_pairs
from foveal.patterns import BlockTopK, Pattern


def tensors(batch=2, heads=4, kv_heads=2, length=150, dim=8, seed=0, q_len=None):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_len or length, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, length, dim, generator=g, dtype=torch.float64)
    return q, k


def pairs(pattern, q, k, base=None, state=None, **ctx):
    """``(B, H, Nq, Nk)`` visible pairs of one call, and the state it returns."""
    base = BaseMask.build(q.shape[2], k.shape[2], causal=True) if base is None else base
    layout, state = pattern.select(q, k, SelectContext(base, q_offset=max(base.shift, 0), **ctx), state)
    return visible_pairs(AttentionCall(q, k, k, layout, base, 1.0)), state


def looped(pattern, q, k, causal=True):
    """The same choice for tokens and density budgets, one query block of one head at a time, from the definition."""
    batch, heads, n, _ = q.shape
    group = heads // k.shape[1]
    kept = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    for b, h, first in itertools.product(range(batch), range(heads), range(0, n, pattern.q_block)):
        rows = range(first, min(first + pattern.q_block, n))
        mean_q = q[b, h, rows].mean(0)
        if not pattern.per_head:
            mean_q = torch.stack([q[b, h // group * group + i, rows].mean(0) for i in range(group)]).mean(0)
        blocks = [range(s, min(s + pattern.kv_block, n)) for s in range(0, n, pattern.kv_block)]
        seen = [sum(j <= i for i in rows for j in block) for block in blocks]
        forced = {
            c
            for c, block in enumerate(blocks)
            if seen[c] and (block[0] < pattern.sinks or (block[-1] > first - pattern.local and block[0] <= rows[-1]))
        }
        total = sum(seen)
        room = (
            total * pattern.budget.density if pattern.budget.density else min(total, pattern.budget.tokens * len(rows))
        )
        room -= sum(seen[c] for c in forced)
        ranked = sorted(
            (c for c in range(len(blocks)) if seen[c] and c not in forced),
            key=lambda c: -float(mean_q @ k[b, h // group, blocks[c]].mean(0)),
        )
        slack = 0.5 if pattern.budget.density else 0.0
        for c in ranked:
            if seen[c] * (1 - slack) > room + 1e-9:
                break
            room -= seen[c]
            forced.add(c)
        for c in forced:
            kept[b, h, rows[0] : rows[-1] + 1, blocks[c][0] : blocks[c][-1] + 1] = True
    return kept & torch.ones(n, n, dtype=torch.bool).tril() if causal else kept


@pytest.mark.parametrize("budget", [Budget(tokens=40), Budget(density=0.35)])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(
    ("q_block", "kv_block", "sinks", "local"), [(32, 16, 4, 1), (16, 16, 0, 24), (16, 32, 20, 0), (1, 8, 1, 1)]
)
def test_choice_equals_a_loop(budget, per_head, q_block, kv_block, sinks, local):
    pattern = BlockTopK(budget, q_block, kv_block, sinks, local, per_head)
    q, k = tensors(length=101 if q_block > 1 else 40)
    assert torch.equal(pairs(pattern, q, k)[0], looped(pattern, q, k))


@pytest.mark.parametrize("budget", [Budget(tokens=150), Budget(tokens=10_000), Budget(density=1.0), Budget(mass=1.0)])
def test_full_budget_is_dense(budget):
    q, k = tensors()
    assert torch.equal(
        pairs(BlockTopK(budget, 32, 16), q, k)[0],
        BaseMask.build(150, 150, causal=True).dense(2)[:, None].expand(-1, 4, -1, -1),
    )


@pytest.mark.parametrize("mass", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(("q_block", "kv_block"), [(32, 16), (16, 32), (24, 16)])
def test_mass_budget_is_the_smallest_set(mass, q_block, kv_block):
    pattern = BlockTopK(Budget(mass=mass), q_block, kv_block, sinks=0)
    q, k = tensors(batch=1, heads=2, kv_heads=1, length=130)
    q = q * 60
    kept, _ = pairs(pattern, q, k)
    chosen = 0
    for h, first in itertools.product(range(2), range(0, 130, q_block)):
        rows = torch.arange(first, min(first + q_block, 130))
        end = int(rows[-1]) + 1
        starts = range(0, end, kv_block)
        weight, forced = [], []
        for s in starts:
            keys = torch.arange(s, min(s + kv_block, end))  # keys after the query block take no part
            seen = (keys[None] <= rows[:, None]).sum() / len(rows)
            weight.append(q[0, h, rows].mean(0) @ k[0, 0, keys].mean(0) / math.sqrt(8) + torch.log(seen))
            forced.append(bool(s + kv_block > first))
        share = torch.softmax(torch.stack(weight), 0)
        here = [bool(kept[0, h, rows[-1], s]) for s in starts]
        assert all(h_ for h_, f in zip(here, forced, strict=True) if f)
        held = sum(float(p) for p, keep in zip(share, here, strict=True) if keep)
        assert held >= mass - 1e-9
        free = [float(p) for p, keep, f in zip(share, here, forced, strict=True) if keep and not f]
        dropped = [float(p) for p, keep in zip(share, here, strict=True) if not keep]
        if free:
            assert held - min(free) < mass, "one block less would not do"
            assert min(free) >= max(dropped, default=0.0), "the heaviest blocks are taken"
        chosen += len(free)
    assert chosen or mass < 0.9


def test_density_counts_forced_blocks_and_is_met():
    q, k = tensors(batch=1, length=2048)
    base = BaseMask.build(2048, 2048, causal=True)
    layout, _ = BlockTopK(Budget(density=0.4), 64, 32).select(q, k, SelectContext(base))
    assert measure(layout, base, 1, 4).density == pytest.approx(0.4, abs=0.02)


def test_every_row_sees_itself_and_the_sinks():
    q, k = tensors(length=200)
    kept, _ = pairs(BlockTopK(Budget(tokens=1), 48, 16, sinks=3), q, k)
    at = torch.arange(200)
    assert bool(kept[..., at, at].all())
    assert bool(kept[..., 3:, :3].all())


@pytest.mark.parametrize("budget", [Budget(tokens=64), Budget(density=0.5), Budget(mass=0.5)])
@pytest.mark.parametrize(("q_block", "kv_block"), [(32, 16), (16, 32), (24, 16), (1, 16)])
def test_looks_no_further_than_its_query_block(budget, q_block, kv_block):
    pattern = BlockTopK(budget, q_block, kv_block, sinks=0)
    assert pattern.look_ahead == ("block" if q_block > 1 else "none")
    q, k = tensors(length=160)
    q = 40 * q
    before, _ = pairs(pattern, q, k)
    for cut in (q_block * 2, q_block * 3):
        q2, k2 = q.clone(), k.clone()
        other_q, other_k = tensors(length=160, seed=9)
        q2[:, :, cut:], k2[:, :, cut:] = other_q[:, :, cut:], 5 * other_k[:, :, cut:]
        assert torch.equal(pairs(pattern, q2, k2)[0][:, :, :cut], before[:, :, :cut])
    q2 = q.clone()
    q2[:, :, 80:] = -q2[:, :, 80:]
    assert not torch.equal(pairs(pattern, q2, k)[0], before), "the choice does depend on the queries"


# --- decoding and state --------------------------------------------------------------------------------------------


def decode_loop(pattern, q, k, b, h):
    """Keys kept by the one query of ``q`` under a tokens or density budget, from the definition."""
    n, group, size = k.shape[2], q.shape[1] // k.shape[1], pattern.kv_block
    one = q[b, h, 0] if pattern.per_head else q[b, h // group * group : (h // group + 1) * group, 0].mean(0)
    tail = max(0, min((n - 1) // size * size, n - pattern.local)) // size * size
    kept = set(range(min(pattern.sinks, tail))) | set(range(tail, n))
    target = pattern.budget.density * n if pattern.budget.density else min(pattern.budget.tokens, n)
    slack = 0.5 if pattern.budget.density else 0.0
    ranked = sorted(
        range(tail // size), key=lambda c: -float(one @ k[b, h // group, c * size : (c + 1) * size].mean(0))
    )
    room = target - len(kept)
    for c in ranked:
        new = set(range(c * size, (c + 1) * size)) - kept  # a sink inside a block is not paid for twice
        if len(new) * (1 - slack) > room + 1e-9:
            break
        room -= len(new)
        kept |= new
    return kept


@pytest.mark.parametrize("budget", [Budget(tokens=50), Budget(density=0.4), Budget(tokens=3), Budget(tokens=40)])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(
    ("sinks", "local", "length"), [(4, 1, 100), (0, 20, 97), (12, 0, 96), (4, 1, 7), (0, 1, 96), (16, 1, 100)]
)
def test_decode_equals_a_loop(budget, per_head, sinks, local, length):
    pattern = BlockTopK(budget, 32, 8, sinks, local, per_head)
    q, k = tensors(length=length, q_len=1)
    kept, _ = pairs(pattern, q, k)
    for b, h in itertools.product(range(2), range(4)):
        assert set(kept[b, h, 0].nonzero()[:, 0].tolist()) == decode_loop(pattern, q, k, b, h)


def test_block_mean_of_logits_is_the_logit_of_the_mean_key():
    """Kinetics' evaluation engine averages logits over the group and the block; a cached mean key per block chooses the same."""
    q, k = tensors(length=96, q_len=1)
    kept, _ = pairs(BlockTopK(Budget(tokens=32), 32, 8, 0, 1, per_head=False), q, k)
    logits = (q.unflatten(1, (2, 2)).squeeze(3) @ k.transpose(2, 3)).mean(2)
    best = logits.unflatten(-1, (12, 8)).mean(-1)[..., :11].topk(3).indices  # block 11 is kept anyway
    for b, h in itertools.product(range(2), range(4)):
        chosen = {8 * int(c) + i for c in best[b, h // 2] for i in range(8)} | set(range(88, 96))
        assert set(kept[b, h, 0].nonzero()[:, 0].tolist()) == chosen


def test_decode_mass_reaches_its_share():
    q, k = tensors(length=100, q_len=1, batch=1)
    counts = [int(pairs(BlockTopK(Budget(mass=m), 32, 8), 4 * q, k)[0].sum()) for m in (0.2, 0.5, 0.8, 0.99)]
    assert counts == sorted(counts) and counts[0] < counts[-1] < 4 * 100


def test_a_block_of_sinks_is_not_paid_for_twice():
    """Blocks 0 and 1 are sinks and the best match: the budget still buys two more blocks."""
    q, k = tensors(length=65, q_len=1, batch=1, heads=1, kv_heads=1)
    k[:, :, :16] = q / q.norm()
    budget = Budget(tokens=16 + 1 + 16)
    kept, _ = pairs(BlockTopK(budget, 32, 8, sinks=16), q, k)
    assert int(kept.sum()) == 33 and bool(kept[..., :16].all())


@pytest.mark.parametrize("sinks", [0, 5, 8, 16])
def test_decode_mass_counts_every_key_once(sinks):
    """With keys equal inside each block, the estimated masses are the true ones: the kept share reaches what was asked, with one
    block less it would not."""
    q, k = tensors(length=81, q_len=1, batch=1, heads=1, kv_heads=1)
    k[:, :, :80] = k[:, :, :80:8].repeat_interleave(8, 2)
    q, size = 2 * q, 8
    weight = torch.softmax((q @ k.transpose(-1, -2))[0, 0, 0] / k.shape[-1] ** 0.5, -1)
    for mass in (0.3, 0.6, 0.9):
        kept, _ = pairs(BlockTopK(Budget(mass=mass), 32, size, sinks=sinks), q, k)
        seen = kept[0, 0, 0]
        assert float(weight[seen].sum()) >= mass - 1e-9
        extra = [
            float(weight[c * size : (c + 1) * size][torch.arange(c * size, (c + 1) * size) >= sinks].sum())
            for c in range(10)
            if bool(seen[c * size : (c + 1) * size].all()) and (c + 1) * size > sinks
        ]
        if extra:
            assert float(weight[seen].sum()) - min(extra) < mass + 1e-9


@pytest.mark.parametrize("budget", [Budget(tokens=40), Budget(density=0.5), Budget(mass=0.7)])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_carried_state_equals_rebuilt_state(budget, padding):
    """A prompt, a chunk of 5, and single steps, each compared with the choice made without a state."""
    pattern = BlockTopK(budget, 16, 8)
    q, k = tensors(length=90)
    state, at = None, 0
    for step in (37, 5, *[1] * 40):
        at += step
        valid = torch.ones(2, at, dtype=torch.bool)
        if padding == "left":
            valid[1, :11] = False
        if padding == "right":
            valid[1, 30:37] = False
        base = BaseMask.build(step, at, causal=True, valid=None if padding is None else valid)
        now = q[:, :, at - step : at], k[:, :, :at]
        old = state
        frozen = None if old is None else old.sums.clone()
        kept, state = pairs(pattern, *now, base, state)
        fresh, rebuilt = pairs(pattern, *now, base)
        assert torch.equal(kept, fresh)
        assert isinstance(state, BlockSums) and state.absorbed == at
        torch.testing.assert_close(state.means, rebuilt.means, rtol=1e-12, atol=1e-12)
        assert old is None or torch.equal(old.sums, frozen), "a state that was handed in must not change"


def test_state_is_updated_from_new_keys_only():
    _, k = tensors(length=64)
    state = absorb(None, k[:, :, :63], BaseMask.build(63, 63, causal=True), 8)
    poisoned = k.clone()
    poisoned[:, :, :63] = torch.nan
    after = absorb(state, poisoned, BaseMask.build(1, 64, causal=True), 8)
    torch.testing.assert_close(after.means, absorb(None, k, BaseMask.build(64, 64, causal=True), 8).means)


def test_lost_or_foreign_state_is_rebuilt():
    q, k = tensors(length=64, q_len=1)
    pattern = BlockTopK(Budget(tokens=20), 16, 8)
    base = BaseMask.build(1, 64, causal=True)
    right, _ = pairs(pattern, q, k, base)
    shorter = absorb(None, -k[:, :, :40], BaseMask.build(40, 40, causal=True), 8)
    other_block = absorb(None, -k[:, :, :63], BaseMask.build(63, 63, causal=True), 16)
    rolled = absorb(None, -k[:, :, :63], BaseMask.build(63, 63, causal=True, kv_offset=3), 8)
    for state in (None, shorter, other_block, rolled, object()):
        assert torch.equal(pairs(pattern, q, k, base, state)[0], right)


def test_unwritten_keys_of_a_static_cache_take_no_part():
    q, k = tensors(length=50)
    pattern = BlockTopK(Budget(tokens=24), 16, 8)
    longer = torch.cat([k, torch.full_like(k, torch.nan)], 2)
    for rows in (50, 1):
        base = BaseMask.build(rows, 100, causal=True, shift=50 - rows)
        kept, _ = pairs(pattern, q[:, :, -rows:], longer, base)
        assert torch.equal(kept[..., :50], pairs(pattern, q[:, :, -rows:], k)[0]) and not kept[..., 50:].any()


def test_chunks_of_whole_query_blocks_equal_one_pass():
    q, k = tensors(length=120)
    pattern = BlockTopK(Budget(density=0.4), 16, 8)
    once, _ = pairs(pattern, q, k)
    state, at = None, 0
    for step in (32, 48, 16, 24):
        at += step
        part, state = pairs(pattern, q[:, :, at - step : at], k[:, :, :at], state=state)
        assert torch.equal(part, once[:, :, at - step : at, :at])


# --- padding, documents, windows, bidirectional --------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(tokens=40), Budget(density=0.5), Budget(mass=0.7)])
def test_padding_changes_nothing_for_real_rows(budget):
    pattern = BlockTopK(budget, 16, 8)
    q, k = tensors(batch=1, length=80)
    alone, _ = pairs(pattern, q, k)
    for front, back in ((32, 0), (0, 21)):
        noise_q, noise_k = tensors(batch=1, length=front + back, seed=4)
        put = [torch.cat([n[:, :, :front], x, n[:, :, front:]], 2) for x, n in ((q, noise_q), (k, 9 * noise_k))]
        valid = torch.ones(1, 80 + front + back, dtype=torch.bool)
        valid[:, :front] = False
        valid[:, front + 80 :] = False
        base = BaseMask.build(valid.shape[1], valid.shape[1], causal=True, valid=valid)
        kept, _ = pairs(pattern, *put, base)
        real = slice(front, front + 80)
        assert torch.equal(kept[:, :, real, real], alone)
        assert not kept[:, :, real, :front].any() and not kept[:, :, real, front + 80 :].any()


def test_each_row_of_a_batch_chooses_alone():
    pattern = BlockTopK(Budget(density=0.4), 16, 8)
    q, k = tensors(batch=3, length=70)
    valid = torch.ones(3, 70, dtype=torch.bool)
    valid[1, :13] = False
    together, _ = pairs(pattern, q, k, BaseMask.build(70, 70, causal=True, valid=valid))
    for b in range(3):
        alone = BaseMask.build(70, 70, causal=True, valid=valid[b : b + 1])
        assert torch.equal(pairs(pattern, q[b : b + 1], k[b : b + 1], alone)[0][0], together[b])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("budget", [Budget(tokens=24), Budget(density=0.5), Budget(mass=0.6)])
def test_packed_documents_do_not_see_or_sway_each_other(causal, budget):
    pattern = BlockTopK(budget, 16, 8, sinks=0)
    lengths = (21, 6, 55, 14)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    q, k = tensors(length=96)
    q = 40 * q
    base = BaseMask.build(96, 96, causal=causal, segments=segments)
    before, _ = pairs(pattern, q, k, base)
    same = segments[0][:, None] == segments[0][None]
    assert not (before & ~same).any()
    for document in range(4):
        mine = segments[0] == document
        other_q, other_k = tensors(length=96, seed=5)
        q2 = torch.where(mine[:, None], q, 40 * other_q)
        k2 = torch.where(mine[:, None], k, 9 * other_k)
        assert torch.equal(pairs(pattern, q2, k2, base)[0][:, :, mine], before[:, :, mine])


def test_sliding_window_of_the_model_bounds_the_choice():
    q, k = tensors(length=120)
    base = BaseMask.build(120, 120, causal=True, window=50)
    kept, _ = pairs(BlockTopK(Budget(density=0.5), 16, 8), q, k, base)
    assert not (kept & ~base.dense(2)[:, None]).any()
    share = kept.sum() / (base.area().sum() * 8)
    assert 0.4 < share < 0.75


def test_bidirectional_and_cross_attention():
    q, k = tensors(length=90)
    base = BaseMask.build(90, 90, causal=False)
    kept, _ = pairs(BlockTopK(Budget(density=0.4), 16, 8), q, k, base)
    at = torch.arange(90)
    assert bool(kept[..., at, at].all()) and bool(kept.triu(1).any())
    short, _ = tensors(length=33)
    cross = BaseMask.build(33, 90, causal=False)
    kept, _ = pairs(BlockTopK(Budget(tokens=1), 16, 8, sinks=0), short, k, cross, role="cross")
    assert bool(kept.any(-1).all()) and int(kept.sum(-1).max()) <= 8, "no row is left blind: the best block stays"


def test_tile_area_counts_pairs():
    valid = torch.rand(2, 53, generator=torch.Generator().manual_seed(1)) < 0.8
    for base in (
        BaseMask.build(53, 53, causal=True),
        BaseMask.build(20, 53, causal=True, valid=valid),
        BaseMask.build(53, 53, causal=False, window=9),
        BaseMask.build(53, 53, causal=True, predicate=lambda b, h, q, k: (q + k) % 3 > 0),
    ):
        area = tile_area(base, 16, 8)
        dense = base.dense(area.shape[0]).long()
        padded = torch.nn.functional.pad(dense, (0, area.shape[2] * 8 - 53, 0, area.shape[1] * 16 - base.q_len))
        assert torch.equal(area, padded.unflatten(2, (-1, 8)).unflatten(1, (-1, 16)).sum((2, 4)))


@pytest.mark.parametrize("budget", [Budget(tokens=40), Budget(mass=0.6)])
def test_gather_equals_reference(budget):
    q, k = tensors(length=130)
    pattern = BlockTopK(budget, 32, 16)
    for rows in (130, 1):
        args = q[:, :, -rows:], k, k.flip(-1), pattern
        torch.testing.assert_close(
            foveal.attention(*args, causal=True, impl="gather"), foveal.attention(*args, causal=True, impl="reference")
        )


def test_json_and_messages():
    pattern = BlockTopK(Budget(mass=0.9), q_block=64, per_head=False)
    assert Pattern.from_json(json.loads(json.dumps(pattern.to_json()))) == pattern and hash(pattern)
    for field, value in (
        ("q_block", 0),
        ("sinks", -1),
        ("per_head", "yes"),
        ("Budget", {"tokens": 1, "mass": 0.5}),
        ("kv_blok", 3),
    ):
        with pytest.raises(ConfigError, match=field):
            Pattern.from_json({"pattern": "block_topk", "budget": {"tokens": 8}, field.lower(): value})
