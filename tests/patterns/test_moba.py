"""MoBA and VMoBA: the choice against loops, the sheet's identities by name, state, partitions, bad input."""

import itertools

import pytest
import torch

import foveal
from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.core.layouts import Groups, KeySelection
from foveal.kernels import prefix
from foveal.kernels.call import AttentionCall
from foveal.kernels.prefix import smallest_prefix
from foveal.kernels.reference import visible_pairs
from foveal.patterns import MoBA, Pattern, VMoBA
from foveal.patterns import routed as routed_blocks
from foveal.patterns.vmoba import block_of


def tensors(batch=1, heads=4, kv_heads=2, length=64, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, length, dim, generator=g, dtype=torch.float64)
    return q, k


def pairs(pattern, q, k, base=None, state=None, **ctx):
    """``(B, H, Nq, Nk)`` visible pairs of one call."""
    base = BaseMask.build(q.shape[2], k.shape[2], causal=isinstance(pattern, MoBA)) if base is None else base
    layout, _ = pattern.select(q, k, SelectContext(base, q_offset=max(base.shift, 0), **ctx), state)
    return visible_pairs(AttentionCall(q, k, k, layout, base, 1.0))


def moba_loop(q, k, block, top_k):
    """MoBA's definition, one query of one head at a time."""
    batch, heads, n, _ = q.shape
    kept = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    for b, h, i in itertools.product(range(batch), range(heads), range(n)):
        keys = k[b, h // (heads // k.shape[1])]
        own = i // block
        score = {c: float(q[b, h, i] @ keys[c * block : (c + 1) * block].mean(0)) for c in range(own)}
        chosen = sorted(score, key=lambda c: (-score[c], c))[: top_k - 1]
        for c in (*chosen, own):
            kept[b, h, i, c * block : (c + 1) * block] = True
        kept[b, h, i, i + 1 :] = False
    return kept


def vmoba_loop(q, k, blocks, threshold, scope, strict=False, top_k=0):
    """VMoBA's selection, written from the sheet with whole sorts; ``blocks`` ``(N,)`` names every token's block."""
    batch, heads, n, _ = q.shape
    count = int(blocks.max()) + 1
    kept = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    for b in range(batch):
        gate = torch.empty(count, heads, n, dtype=q.dtype)
        for c, h in itertools.product(range(count), range(heads)):
            gate[c, h] = q[b, h] @ k[b, h // (heads // k.shape[1])][blocks == c].mean(0)
        own = (blocks == torch.arange(count)[:, None])[:, None].expand_as(gate)
        mask = own.clone()
        every = [(slice(None),) * 3]
        pools = {
            "query_head": [(slice(None), h, i) for h in range(heads) for i in range(n)],
            "block": [(c,) for c in range(count)],
            "head_global": [(slice(None), h) for h in range(heads)],
            "overall": every,
        }[scope]
        for pool in pools:
            g, mine = gate[pool].reshape(-1), own[pool].reshape(-1)
            share = (g - g.min()) / (g.max() - g.min() if g.max() - g.min() > 1e-6 else 1.0)
            order = sorted((i for i in range(len(g)) if not mine[i]), key=lambda i: (-float(share[i]), i))
            if top_k:
                taken = order[: (top_k - 1) * int(mine.sum())]
            else:
                need = max(threshold - float(share[mine].sum() / share.sum()), 0.0)
                taken, held = [], 0.0
                for i in order:
                    if (held >= need) and (taken or strict):
                        break
                    taken.append(i)
                    held += float(share[i] / share.sum())
            flat = mask[pool].reshape(-1)
            flat[taken] = True
            mask[pool] = flat.view(mask[pool].shape)
        kept[b] = mask[blocks].permute(1, 2, 0)  # (H, query, key): the block of each key
    return kept


# --- MoBA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "top_k", "length"), [(16, 3, 100), (7, 2, 50), (16, 4, 64), (1, 3, 20), (40, 2, 41)])
def test_moba_choice_equals_a_loop(block, top_k, length):
    q, k = tensors(batch=2, length=length)
    assert torch.equal(pairs(MoBA(block, top_k), q, k), moba_loop(q, k, block, top_k))


def test_moba_ties_go_to_the_lower_block():
    q, k = tensors(length=48)
    k[:, :, :32] = k[:, :, :1]
    kept = pairs(MoBA(8, 2), q, k)[0, :, 40:, :]
    for c in range(1, 4):
        assert not kept[..., 8 * c : 8 * c + 8].any(), "blocks 0 to 3 are alike, so none but the first is taken"


def test_c_at_most_k_is_full_causal_attention():
    q, k = tensors(length=64)
    layout, _ = MoBA(16, 4).select(q, k, SelectContext(BaseMask.build(64, 64, causal=True)), None)
    assert layout is None
    assert MoBA(16, 3).select(q, k, SelectContext(BaseMask.build(64, 64, causal=True)), None)[0] is not None


def test_k_1_is_block_diagonal_causal_attention():
    q, k = tensors(length=50)
    at = torch.arange(50)
    want = (at[:, None] >= at) & (at[:, None] // 8 == at // 8)
    assert torch.equal(pairs(MoBA(8, 1), q, k), want.expand(1, 4, -1, -1))


def test_moba_causality_also_through_block_means():
    q, k = tensors(length=96)
    before = pairs(MoBA(16, 3), q, k)
    k2 = k.clone()
    k2[:, :, 50:] += 30.0  # inside block 3: its mean changes for the rows of block 3
    assert torch.equal(before[:, :, :50], pairs(MoBA(16, 3), q, k2)[:, :, :50])


def test_decode_carries_sums_and_equals_prefill():
    pattern, n = MoBA(8, 3), 61
    q, k = tensors(batch=2, length=n)
    whole, state = pairs(pattern, q, k), None
    for end in [20, *range(21, n + 1)]:
        first = 0 if end == 20 else end - 1
        base = BaseMask.build(end - first, end, causal=True)
        layout, state = pattern.select(q[:, :, first:end], k[:, :, :end], SelectContext(base, q_offset=first), state)
        seen = visible_pairs(AttentionCall(q[:, :, first:end], k[:, :, :end], k[:, :, :end], layout, base, 1.0))
        assert torch.equal(seen, whole[:, :, first:end, :end])
        assert state.absorbed == end
    assert isinstance(layout, KeySelection) and layout.index.shape[-1] <= 3 * 8


def test_decode_reads_only_the_new_keys_of_the_sums():
    pattern = MoBA(8, 2)
    q, k = tensors(length=41)
    _, state = pattern.select(q[:, :, :40], k[:, :, :40], SelectContext(BaseMask.build(40, 40, causal=True)), None)
    forgotten = k.clone()
    forgotten[:, :, :40] = torch.nan  # the sums already hold these
    base = BaseMask.build(1, 41, causal=True)
    layout, _ = pattern.select(q[:, :, 40:], forgotten, SelectContext(base, q_offset=40), state)
    assert torch.equal(layout.index, pattern.select(q[:, :, 40:], k, SelectContext(base, q_offset=40), None)[0].index)


@pytest.mark.parametrize("scores", [1, 1 << 22])
def test_heads_in_pieces_choose_alike(monkeypatch, scores):
    q, k = tensors(heads=6, kv_heads=2, length=80)
    want = moba_loop(q, k, 16, 3)
    monkeypatch.setattr(routed_blocks, "GATES", scores)
    assert torch.equal(pairs(MoBA(16, 3), q, k), want)


# --- VMoBA ----------------------------------------------------------------------------------------------------------

GRID = (4, 6, 4)
SHAPES = [(1, 0, 0), (0, 3, 2), (2, 3, 4), (3, 4, 3)]


def test_three_patterns_round_trip_and_boxes_are_boxes():
    rank = torch.arange(96)
    where = torch.stack([rank // 24, rank // 4 % 6, rank % 4])
    for shape in SHAPES:
        number = block_of(rank, shape, GRID)
        order = number.argsort(stable=True)
        assert torch.equal(order[order.argsort()].sort().values, rank) and torch.equal(
            number[order], number.sort().values
        )
        sizes = [s or g for s, g in zip(shape, GRID, strict=True)]
        assert int(number.max()) + 1 == torch.tensor([-(-g // s) for g, s in zip(GRID, sizes, strict=True)]).prod()
        for c in number.unique():
            cells = where[:, number == c]
            low, high = cells.amin(1), cells.amax(1)
            for axis in range(3):
                assert int(low[axis]) % sizes[axis] == 0
                assert int(high[axis] - low[axis]) + 1 == min(sizes[axis], GRID[axis] - int(low[axis]))
            assert cells.shape[1] == int((high - low + 1).prod()), "a block is the whole box"


def test_layer_schedule_cycles_over_the_patterns():
    q, k = tensors(length=96)
    cycle = VMoBA(blocks=tuple(SHAPES[:3]), grid=GRID, threshold=0.4)
    for layer in range(30):
        one = VMoBA(blocks=(SHAPES[layer % 3],), grid=GRID, threshold=0.4)
        assert torch.equal(pairs(cycle, q, k, layer_index=layer), pairs(one, q, k))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", ["query_head", "block", "head_global", "overall"])
@pytest.mark.parametrize(("threshold", "strict"), [(0.25, False), (0.5, False), (0.05, True), (0.0, False)])
def test_vmoba_choice_equals_a_loop(shape, scope, threshold, strict):
    q, k = tensors(batch=2, length=96)
    blocks = block_of(torch.arange(96), shape, GRID)
    pattern = VMoBA((shape,), GRID, threshold, scope=scope, strict=strict)
    assert torch.equal(pairs(pattern, q, k), vmoba_loop(q, k, blocks, threshold, scope, strict))


@pytest.mark.parametrize("scope", ["query_head", "head_global", "overall"])
def test_vmoba_top_k_equals_a_loop(scope):
    q, k = tensors(length=96)
    blocks = block_of(torch.arange(96), (2, 3, 2), GRID)
    pattern = VMoBA(((2, 3, 2),), GRID, top_k=(3,), scope=scope)
    kept = pairs(pattern, q, k)
    assert torch.equal(kept, vmoba_loop(q, k, blocks, 0.0, scope, top_k=3))
    assert int(kept.sum()) == 3 * 12 * 96 * 4, "three blocks of twelve keys per query on average"


def test_large_pools_choose_as_small_ones(monkeypatch):
    q, k = tensors(length=96)
    every = [(s, t) for s in ("head_global", "overall") for t in ((), (2,))]
    patterns = [VMoBA(((2, 3, 2),), GRID, threshold=0.3, top_k=t, scope=s) for s, t in every]
    want = [pairs(p, q, k) for p in patterns]
    monkeypatch.setattr(prefix, "SORTED", 8)
    assert all(torch.equal(pairs(p, q, k), w) for p, w in zip(patterns, want, strict=True))


@pytest.mark.parametrize("count", [False, True])
def test_smallest_prefix_by_histogram_equals_sorting(monkeypatch, count):
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        values = (
            (torch.rand(3, 200, generator=g) * 7).round() / 7
            if torch.rand(1, generator=g) < 0.5
            else torch.rand(3, 200, generator=g)
        )
        candidate = torch.rand(3, 200, generator=g) < torch.rand(1, generator=g)
        need = torch.rand(3, generator=g) * 120 * (torch.rand(3, generator=g) < 0.8)
        need = need.long() if count else need
        for least in (0, 1):
            monkeypatch.setattr(prefix, "SORTED", 1 << 15)
            want = smallest_prefix(values, candidate, need, count=count, least=least)
            monkeypatch.setattr(prefix, "SORTED", 1)
            assert torch.equal(smallest_prefix(values, candidate, need, count=count, least=least), want)
            for p in range(3):
                order = sorted(candidate[p].nonzero()[:, 0].tolist(), key=lambda i: (-float(values[p, i]), i))
                held, taken = 0.0, set()
                for i in order:
                    if held >= float(need[p]) and len(taken) >= least:
                        break
                    taken.add(i)
                    held += 1.0 if count else float(values[p, i].double())
                assert set(want[p].nonzero()[:, 0].tolist()) == taken


def test_own_block_always_and_kept_mass_reaches_tau_with_a_minimal_prefix():
    q, k = tensors(length=96)
    blocks = block_of(torch.arange(96), (2, 3, 2), GRID)
    for tau in (0.05, 0.25, 0.6):
        kept = pairs(VMoBA(((2, 3, 2),), GRID, tau), q, k)
        first = torch.stack([(blocks == c).nonzero()[0, 0] for c in range(8)])
        mask = kept[0][:, :, first]  # (H, n, C)
        own = blocks[:, None] == torch.arange(8)
        assert mask[:, own].all()
        for h in range(4):
            means = torch.stack([k[0, h // 2][blocks == c].mean(0) for c in range(8)])
            gate = q[0, h] @ means.T
            share = (gate - gate.min()) / (gate.max() - gate.min())
            share = share / share.sum()
            held, others = float(share[mask[h]].sum()), share[mask[h] & ~own]
            assert held >= tau - 1e-6
            assert others.numel() == 1 or held - float(others.min()) < tau, "one pair less would not do"


def test_threshold_is_invariant_to_scale_and_shift_of_the_gates():
    q, k = tensors(length=96)
    pattern = VMoBA(((2, 3, 2),), GRID)
    want = pairs(pattern, q, k)
    assert torch.equal(pairs(pattern, q * 3.0, k), want)
    q2 = torch.cat([q, torch.ones_like(q[..., :1])], -1)
    k2 = torch.cat([k, torch.full_like(k[..., :1], 5.0)], -1)  # adds 5 to every gate
    assert torch.equal(pairs(pattern, q2, k2), want)


def test_head_global_is_each_head_alone_and_overall_differs():
    q, k = tensors(heads=3, kv_heads=3, length=96)
    q[:, 1] *= 4
    pattern = VMoBA(((2, 3, 2),), GRID)
    kept = pairs(pattern, q, k)
    for h in range(3):
        assert torch.equal(pairs(pattern, q[:, h : h + 1], k[:, h : h + 1])[:, 0], kept[:, h])
    assert not torch.equal(pairs(VMoBA(((2, 3, 2),), GRID, scope="overall"), q, k), kept)


@pytest.mark.parametrize("scope", ["query_head", "block", "head_global", "overall"])
def test_packed_batch_equals_separate_calls(scope):
    lengths, pattern = (32, 32, 32), VMoBA(((1, 0, 2),), (2, 4, 4), threshold=0.5, scope=scope)
    q, k = tensors(length=96)
    segments = torch.repeat_interleave(torch.arange(3), 32)[None]
    base = BaseMask.build(96, 96, causal=False, segments=segments)
    packed = pairs(pattern, q, k, base)
    for s in range(3):
        part = slice(32 * s, 32 * s + 32)
        assert torch.equal(packed[:, :, part, part], pairs(pattern, q[:, :, part], k[:, :, part]))
    assert int(packed.sum()) == sum(
        int(packed[:, :, 32 * s : 32 * s + n, 32 * s : 32 * s + n].sum()) for s, n in enumerate(lengths)
    )


def test_literal_sequences_of_a_batch_compete_with_each_other():
    q, k = tensors(batch=2, length=96)
    q[1] *= 5.0
    fields = {"blocks": ((2, 3, 2),), "grid": GRID, "threshold": 0.4}
    alone = pairs(VMoBA(**fields), q, k)
    jointly = pairs(VMoBA(**fields, literal=True), q, k)
    assert not torch.equal(alone, jointly)
    assert int(jointly[1].sum()) > int(alone[1].sum()), "the louder sequence takes from the other"
    assert torch.equal(pairs(VMoBA(**fields, literal=True), q[:1], k[:1]), alone[:1])


def test_literal_without_a_routed_pair_is_dense():
    q, k = tensors(length=96)
    fields = {"blocks": ((2, 3, 2),), "grid": GRID, "threshold": 0.0, "strict": True}
    blocks = block_of(torch.arange(96), (2, 3, 2), GRID)
    assert torch.equal(pairs(VMoBA(**fields), q, k)[0, 0], blocks[:, None] == blocks)
    assert bool(pairs(VMoBA(**fields, literal=True), q, k).all())


def test_tau_1_and_k_c_are_dense_and_one_block_is_full_attention():
    q, k = tensors(length=96)
    base = BaseMask.build(96, 96, causal=False)
    for pattern in (VMoBA(((2, 3, 2),), GRID, 1.0), VMoBA(((2, 3, 2),), GRID, top_k=(8,)), VMoBA(((0, 0, 0),), GRID)):
        assert bool(pairs(pattern, q, k, base).all())


def test_combined_output_and_gradients_equal_masked_dense_attention():
    q, k = tensors(batch=2, length=96)
    v = torch.randn_like(k)
    base = BaseMask.build(96, 96, causal=False)
    layout, _ = VMoBA(((2, 3, 2),), GRID, 0.4).select(q, k, SelectContext(base), None)
    assert isinstance(layout, Groups)
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    theirs = [t.clone().requires_grad_() for t in (q, k, v)]
    seen = visible_pairs(AttentionCall(q, k, v, layout, base, 1.0))
    out = foveal.attention(*ours, layout, impl="gather")
    keys, values = (t.repeat_interleave(2, 1) for t in theirs[1:])
    want = torch.nn.functional.scaled_dot_product_attention(theirs[0], keys, values, attn_mask=seen)
    assert torch.allclose(out, want, atol=1e-12)
    weight = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * weight).sum(), ours), torch.autograd.grad((want * weight).sum(), theirs), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-11)


def test_first_steps_stay_dense():
    q, k = tensors(length=96)
    pattern = VMoBA(((2, 3, 2),), GRID, dense_steps=2)
    assert bool(pairs(pattern, q, k, step=1).all()) and not bool(pairs(pattern, q, k, step=2).all())


def test_selection_is_linear_in_queries_times_blocks():
    """One number per query and chosen block, and one per head and key: nothing has N×N entries."""
    q, k = tensors(heads=2, kv_heads=1, length=1024)
    layout, _ = MoBA(32, 4).select(q, k, SelectContext(BaseMask.build(1024, 1024, causal=True)), None)
    assert layout.q_index.numel() <= 2 * 1024 * 4
    assert layout.k_index.numel() <= 2 * 1024 * 2


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"blocks": ((3, 8, 0),), "grid": (4, 6, 4)}, r"blocks.*\(3, 8, 0\).*larger than the grid \(4, 6, 4\)"),
        ({"blocks": ((3, 0),), "grid": (4, 6, 4)}, r"blocks.*\(3, 0\).*expected 3 sizes"),
        ({"blocks": ((2, 4, 0),), "grid": (4, 6, 4), "literal": True}, r"does not divide the grid.*Drop literal"),
        ({"top_k": (1, 2)}, r"top_k.*\(1, 2\).*one for each of the 3"),
        ({"top_k": (2,), "scope": "block"}, r"scope.*expected a threshold"),
        ({"blocks": ((0,),)}, r"blocks.*expected at least one shape"),
        ({"blocks": ((3, 0, 0), (0, 6))}, r"blocks.*shapes of as many axes each"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, names):
    with pytest.raises(ConfigError, match=names):
        VMoBA(**fields)


def test_grids_that_do_not_match_are_refused():
    q, k = tensors(length=95)
    with pytest.raises(ShapeError, match=r"grid \(4, 6, 4\), 96 tokens, and the sequence has 95"):
        pairs(VMoBA(((2, 3, 2),), GRID), q, k)
    with pytest.raises(ConfigError, match="needs a token grid"):
        pairs(VMoBA(((2, 3, 2),)), q, k)
    with pytest.raises(ConfigError, match=r"larger than the grid \(1, 95, 1\)"):
        pairs(VMoBA(((2, 3, 2),)), q, k, grid=(1, 95, 1))


@pytest.mark.parametrize("pattern", [MoBA(8, 2), VMoBA(((8,),))])
def test_cross_attention_is_refused(pattern):
    q, k = tensors(length=32)
    with pytest.raises(UnsupportedError, match="own block of keys"):
        pairs(pattern, q, k, BaseMask.build(32, 32, causal=False), role="cross")


def test_state_of_another_pattern_or_shape_is_rebuilt():
    q, k = tensors(length=40)
    base = BaseMask.build(1, 40, causal=True)
    ctx = SelectContext(base, q_offset=39)
    want, state = MoBA(8, 2).select(q[:, :, 39:], k, ctx, None)
    for other in ("foreign", MoBA(4, 2).select(q[:, :, 39:], k, ctx, None)[1], state):
        assert torch.equal(MoBA(8, 2).select(q[:, :, 39:], k, ctx, other)[0].index, want.index)


def test_a_policy_says_that_decoding_is_dense():
    from foveal.patterns import Dense
    from foveal.policies.policy import Rule

    rule = Rule(MoBA(8, 2), Dense())
    assert isinstance(rule.pattern(True), Dense) and isinstance(rule.pattern(False), MoBA)
    assert isinstance(Pattern.from_json(MoBA(8, 2).to_json()), MoBA)


def test_rows_of_an_own_block_are_one_group_where_they_see_the_same_keys() -> None:
    for causal, sizes, seen in ((False, [300], [300]), (True, [128, 128, 44], [128, 256, 300])):
        base = BaseMask.build(600, 600, causal=causal)
        (part,) = routed_blocks.sequences(base, lambda rank: rank // 300, ("blocks", causal))[0]
        own = routed_blocks.own_memberships(part, 0, 2, 1, 600, 600)
        assert torch.equal(own.q_index, torch.arange(1200))
        assert own.q_sizes.tolist() == sizes * 4
        assert own.k_sizes.tolist() == seen * 4
