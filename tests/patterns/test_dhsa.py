"""DHSA: the identities of the paper, the choice against loops, chunks that follow the cache, the authors' literal behaviour."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

import foveal
from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext, Selection
from foveal.core.density import measure
from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.kernels.call import AttentionCall
from foveal.kernels.pooling import mean_rows
from foveal.kernels.reference import visible_pairs
from foveal.layers.boundary import BoundaryPredictor
from foveal.patterns import DHSA, Pattern
from foveal.patterns.boundaries import boundary_logits, find_file, load_predictor, pick_boundaries, read_predictor
from foveal.patterns.dhsa_blocks import by_distance
from foveal.patterns.dhsa_chunks import (
    NONE,
    Chunks,
    Spans,
    chunk_index,
    chunk_lengths,
    chunk_vectors,
    pool_chunks,
    select_chunks,
    spans,
)

BLOCKS = ("a", "vs", "vsb", "topk")
SMALL = {"q_block": 16, "kv_block": 8}


def tensors(batch=2, heads=4, kv_heads=2, length=150, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, length, dim, generator=g, dtype=torch.float64)
    return q, k


def pairs(pattern, q, k, base=None, state=None, **ctx):
    """``(B, H, Nq, Nk)`` visible pairs of one call, and the state it returns."""
    base = BaseMask.build(q.shape[2], k.shape[2], causal=True) if base is None else base
    layout, state = pattern.select(q, k, SelectContext(base, q_offset=max(base.shift, 0), **ctx), state)
    return visible_pairs(AttentionCall(q, k, k, layout, base, 1.0)), state


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def tiles(kept, q_block=16, kv_block=8):
    """``(B, H, nqb, nkb)``: tiles in which some pair is visible."""
    rows, keys = -kept.shape[2] % q_block, -kept.shape[3] % kv_block
    return (
        nn.functional.pad(kept, (0, keys, 0, rows))
        .unflatten(3, (-1, kv_block))
        .unflatten(2, (-1, q_block))
        .any(-1)
        .any(-2)
    )


def predictor(key_dim, window=4, heads=4, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BoundaryPredictor(key_dim, window, heads, **options)


# --- the identities of the specification --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["chunk", *BLOCKS])
@pytest.mark.parametrize("budget", [Budget(tokens=150), Budget(density=1.0)])
def test_identity_1_full_budget_is_dense(variant, budget):
    q, k = tensors()
    v = torch.randn(2, 2, 150, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pattern = DHSA(budget=budget, variant=variant, local=1, sinks=0, instruction=0, **SMALL)
    dense = nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(foveal.attention(q, k, v, pattern, causal=True), dense, atol=1e-12, rtol=1e-12)


def test_identity_1_full_budget_without_the_short_cut():
    """The lists themselves hold everything, not only the short cut for budgets that cover the sequence."""
    q, k = tensors(length=61)
    base = BaseMask.build(61, 61, causal=True)
    chunks = random_chunks(k, base)
    span = spans(base, 16, 1, 0, 0, 61, share=False)
    layout = select_chunks(q, chunks, base, 16, "avgpool_norm", span)
    assert torch.equal(visible_pairs(AttentionCall(q, k, k, layout, base, 1.0)), causal(61).expand(2, 4, -1, -1))


def random_chunks(k, base, seed=0, per_head=True, pooling="avgpool_norm"):
    n = k.shape[2]
    starts = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.15
    starts[0] = True
    first = starts.nonzero()[:, 0][None]
    pooled = pool_chunks(k if per_head else k.mean(1, keepdim=True), first, base, pooling)
    return Chunks(first, pooled, n, (0,), ())


def test_identity_2_scores_are_scaled_sums_of_products():
    q, k = tensors(heads=2, kv_heads=2, length=90)
    base = BaseMask.build(90, 90, causal=True)
    chunks = random_chunks(k, base)
    length = chunk_lengths(chunks.first, torch.tensor([90]))
    vectors = chunk_vectors(chunks, length, "avgpool_norm")
    means = mean_rows(q, 16, torch.ones(1, 90, dtype=torch.bool))
    edges = [*chunks.first[0].tolist(), 90]
    for u, c in itertools.product(range(6), range(len(edges) - 1)):
        rows, keys = slice(u * 16, min(u * 16 + 16, 90)), slice(edges[c], edges[c + 1])
        n_u, n_c = rows.stop - rows.start, keys.stop - keys.start
        score = math.sqrt(n_u) * (means[:, :, u] * vectors[:, :, c]).sum(-1)
        exact = (q[:, :, rows] @ k[:, :, keys].transpose(-1, -2)).sum((-1, -2)) / math.sqrt(n_u * n_c)
        torch.testing.assert_close(score, exact, atol=1e-10, rtol=1e-10)


def test_identity_3_equal_lengths_make_normalisation_moot():
    q, k = tensors(length=144)
    fields = {"variant": "chunk", "budget": Budget(tokens=60), "chunk": 8, "local": 8, "sinks": 4, **SMALL}
    norm, _ = pairs(DHSA(pooling="avgpool_norm", **fields), q, k)
    assert torch.equal(norm, pairs(DHSA(pooling="avgpool", **fields), q, k)[0])
    base = BaseMask.build(144, 144, causal=True)
    varied = random_chunks(k, base)
    span = spans(base, 16, 8, 4, 0, 60, share=False)
    by_norm, plain = (select_chunks(q, varied, base, 16, p, span).index for p in ("avgpool_norm", "avgpool"))
    assert not torch.equal(by_norm, plain), "with varying lengths the two differ"


def test_identity_3_chunks_of_one_token_give_token_scores():
    _, k = tensors(length=40)
    base = BaseMask.build(40, 40, causal=True)
    chunks = Chunks(torch.arange(40)[None], pool_chunks(k, torch.arange(40)[None], base, "avgpool_norm"), 40, (0,), ())
    for pooling in ("avgpool", "avgpool_norm", "maxpool"):
        torch.testing.assert_close(chunk_vectors(chunks, torch.ones(1, 40, dtype=torch.long), pooling), k)


def test_identity_4_a_boundary_token_belongs_to_the_chunk_it_starts():
    base = BaseMask.build(12, 12, causal=True)
    first = torch.tensor([[0, 3, 4, 9, NONE]])
    assert chunk_index(first, base).tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3]]
    assert chunk_lengths(first, torch.tensor([12])).tolist() == [[3, 1, 5, 3, 0]]


@pytest.mark.parametrize("limit", [None, 5])
def test_identity_4_boundaries_are_ascending_and_apart(limit):
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 2
    picked = pick_boundaries(logits, 1.1, 8, limit)
    assert picked == sorted(set(picked)) and all(b - a > 8 for a, b in itertools.pairwise(picked))
    best = sorted((i for i in range(400) if logits[i] > 1.1), key=lambda i: -float(logits[i]))
    kept = []
    for i in best:
        if all(abs(i - j) > 8 for j in kept) and (limit is None or len(kept) < limit):
            kept.append(i)
    assert picked == sorted(kept) and len(picked) >= 5


# identity 5 (integral ratios) belongs to training: tests/recipes/test_dhsa.py


@pytest.mark.parametrize("variant", ["chunk", *BLOCKS])
def test_identity_6_no_leak_with_frozen_masks(variant):
    q, k = tensors(length=96)
    v = k.flip(-1)
    pattern = DHSA(budget=Budget(tokens=40), variant=variant, local=8, sinks=4, instruction=0, chunk=9, **SMALL)
    base = BaseMask.build(96, 96, causal=True)
    layout, _ = pattern.select(q, k, SelectContext(base))
    kept = visible_pairs(AttentionCall(q, k, v, layout, base, 1.0))
    assert not (kept & ~causal(96)).any() and bool(kept.any(-1).all())
    at = torch.arange(96)
    assert bool(kept[..., at, at].all()), "every row sees itself"
    out = foveal.attention(q, k, v, layout, causal=True)
    k2, v2, q2 = (x.clone() for x in (k, v, q))
    for x in (k2, v2, q2):
        x[:, :, 50] += 3
    assert torch.equal(foveal.attention(q2, k2, v2, layout, causal=True)[:, :, :50], out[:, :, :50])


@pytest.mark.parametrize("per_head", [True, False])
def test_identity_7_lists_are_unique_ascending_with_tail_and_sinks(per_head):
    q, k = tensors(length=200)
    pattern = DHSA(
        budget=Budget(tokens=70),
        variant="chunk",
        q_block=32,
        local=40,
        sinks=6,
        instruction=20,
        chunk=11,
        per_head=per_head,
    )
    layout, _ = pattern.select(q, k, SelectContext(BaseMask.build(200, 200, causal=True)))
    assert layout.index.shape[:3] == (2, 4 if per_head else 1, 7)
    for b, h, u in itertools.product(range(2), range(layout.index.shape[1]), range(7)):
        listed = [j for j in layout.index[b, h, u].tolist() if j >= 0]
        end = min(32 * (u + 1), 200)
        assert all(a < b for a, b in itertools.pairwise(listed)) and listed[-1] == end - 1
        assert set(range(max(0, end - 40), end)) <= set(listed) and set(range(6)) <= set(listed)
        assert len(listed) == (min(70, end) if end <= 180 else end), (
            "N_b keys, and everything for the instruction's rows"
        )


@pytest.mark.parametrize("budget", [Budget(tokens=48), Budget(density=0.3)])
@pytest.mark.parametrize("variant", BLOCKS)
def test_identity_8_diagonal_band_row_counts_and_last_block(variant, budget):
    q, k = tensors(length=330)
    kept = tiles(pairs(DHSA(budget=budget, variant=variant, **SMALL), q, k)[0])
    blocks = 6 if budget.tokens else None
    counts = kept.sum(-1)
    for u in range(kept.shape[2]):
        reach = -(-min(16 * (u + 1), 330) // 8)
        assert bool(kept[:, :, u, 2 * u : reach].all()), "all overlapping key blocks"
        if variant != "topk":
            assert bool(kept[:, :, u, 0].all())
        last = variant in ("vs", "vsb") and u == kept.shape[2] - 1
        if last:
            assert bool((counts[:, :, u] == reach).all())
        elif blocks:
            assert bool((counts[:, :, u] == min(blocks, reach)).all())
    if budget.density:
        base = BaseMask.build(330, 330, causal=True)
        layout, _ = DHSA(budget=budget, variant=variant, **SMALL).select(q, k, SelectContext(base))
        assert measure(layout, base, 2, 4).density == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("budget", [9, 25])
def test_identity_9_single_rows_and_tokens_are_exact_top_n(budget):
    q, k = tensors(length=60)
    fields = {"variant": "chunk", "q_block": 1, "chunk": 1, "local": 1, "sinks": 0, "instruction": 0, "per_head": True}
    kept, _ = pairs(DHSA(budget=Budget(tokens=budget), **fields), q, k)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    for i in range(60):
        own = logits[:, :, i, :i]
        expected = torch.zeros(2, 4, 60, dtype=torch.bool)
        expected[..., i] = True
        expected[..., :i].scatter_(-1, own.topk(min(budget - 1, i), dim=-1).indices, True)
        assert torch.equal(kept[:, :, i], expected)


def test_identity_10_repeated_keys_average_like_kv_heads():
    q, k = tensors(length=100)
    pattern = DHSA(budget=Budget(tokens=30), variant="chunk", local=8, sinks=4, chunk=6, **SMALL)
    assert torch.equal(pairs(pattern, q, k)[0], pairs(pattern, q, k.repeat_interleave(2, 1))[0])


def test_identity_11_predictor_is_translation_equivariant():
    module = predictor(16)
    k = torch.randn(1, 2, 80, 8, generator=torch.Generator().manual_seed(0))
    logits = module(k)
    shifted = module(torch.roll(k, 5, 2))
    torch.testing.assert_close(shifted[:, 5 + 4 : 76], logits[:, 4:71])


@pytest.mark.parametrize("width", [32, 192])
def test_identity_11_parameter_count(width):
    count = sum(p.numel() for p in predictor(width).parameters())
    assert count == (4 * width**2 + 4 * width) + 2 * width + (4 * width + 1) * 256 + 256 + 257
    assert sum(p.numel() for p in predictor(width, gated=True).parameters()) == count + width + 1


# --- the predictor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "window", "gated"), [(4, 4, False), (2, 3, False), (4, 2, True)])
def test_predictor_equals_the_definition_position_by_position(heads, window, gated):
    module = predictor(16, window, heads, gated=gated)
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1))
    logits = boundary_logits(x, dict(module.named_parameters()), window, heads, rows=7)
    for i in range(20):
        at = torch.arange(i - window + 1, i + window + 1)
        tokens = torch.where(((at >= 0) & (at < 20))[:, None], x[:, at.clamp(0, 19)], 0.0)
        mixed = module.norm(module.attention(tokens, tokens, tokens, need_weights=False)[0])
        halves = []
        for half in (mixed[:, :window], mixed[:, window:]):
            weights = torch.softmax(module.gate(half), 1) if gated else torch.full((1, window, 1), 1 / window)
            halves.append((weights * half).sum(1))
        left, right = halves
        cos = nn.functional.cosine_similarity(left, right)[:, None]
        f = torch.cat([left, right, (left - right).abs(), left * right, cos], -1)
        torch.testing.assert_close(logits[:, i], module.score(torch.relu(module.hidden(f)))[:, 0], atol=1e-5, rtol=1e-4)


def test_the_predictor_that_ships_fits_smollm2():
    """3 key heads of 64; named without a folder; its digest is in the pattern's JSON, and its training in its metadata."""
    pattern = DHSA.with_predictor("smollm2-135m.safetensors", budget=Budget(tokens=100), threshold=-0.5, q_block=32)
    assert Pattern.from_json(pattern.to_json()) == pattern
    assert load_predictor(pattern.predictor, pattern.predictor_sha256).key_dim == 3 * 64
    _, meta = read_predictor(find_file("smollm2-135m.safetensors"))
    assert meta["model"] == "smollm2" and meta["epochs"] == "2"
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 9, 200, 64, generator=g), torch.randn(1, 3, 200, 64, generator=g)
    layout, state = pattern.select(q, k, SelectContext(base=BaseMask.build(200, 200, causal=True)), None)
    assert layout.index.shape[2] == 7 and int(state.first[0, 0]) == 0


def test_predictor_round_trip_and_refusals(tmp_path):
    module = predictor(16)
    path = tmp_path / "p.safetensors"
    module.save(path, note="tiny")
    again = BoundaryPredictor.load(path)
    k = torch.randn(1, 2, 30, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(k), module(k)) and again.heads == 4 and again.window == 4
    pattern = DHSA.with_predictor(path, budget=Budget(tokens=30))
    assert Pattern.from_json(json.loads(json.dumps(pattern.to_json()))) == pattern and hash(pattern)
    assert load_predictor(str(path), pattern.predictor_sha256).key_dim == 16
    predictor(16, seed=1).save(path)
    changed = DHSA(variant="chunk", predictor=str(path), predictor_sha256="0" * 64, budget=Budget(tokens=30))
    q, k = tensors(dim=8)
    with pytest.raises(ConfigError, match=r"SHA-256 .*expected 0000"):
        changed.select(q, k, SelectContext(BaseMask.build(150, 150, causal=True)))
    fresh = DHSA.with_predictor(path, budget=Budget(tokens=30))
    with pytest.raises(ShapeError, match=r"8 features .* made for 16"):
        fresh.select(q[:, :, :, :4], k[:, :, :, :4], SelectContext(BaseMask.build(150, 150, causal=True)))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read"):
        BoundaryPredictor.load(tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError, match="train_boundaries"):
        DHSA.with_predictor(tmp_path / "absent.safetensors")
    with pytest.raises(ConfigError, match="divisor of key_dim"):
        BoundaryPredictor(10, heads=4)


# --- the chunk form -----------------------------------------------------------------------------------------------


def looped_chunks(q, k, firsts, q_block, local, sinks, keys, valid=None, window=None, heads=True):
    """Score, copy down to tokens, take the best: one query block at a time, from the definition. Real tokens only."""
    n = q.shape[1]
    kept = torch.zeros(q.shape[0], n, n, dtype=torch.bool)
    real = [j for j in range(n) if valid is None or valid[j]]
    place = {j: r for r, j in enumerate(real)}
    bounds = [*firsts, len(real)]
    vectors = []
    for a, b in itertools.pairwise(bounds):
        vectors.append(k[:, [real[r] for r in range(a, b)]].sum(1) / math.sqrt(b - a))
    for u in range(0, n, q_block):
        rows = [i for i in range(u, min(u + q_block, n)) if i in place]
        if not rows:
            continue
        low = 0 if window is None else max(0, u - window + 1)
        seen = [j for j in real if low <= j <= rows[-1]]
        tail = seen[-max(local, len(rows)) :]
        early = [j for j in seen if j not in tail][:sinks]
        free = [j for j in seen if j not in tail and j not in early]
        for h in range(q.shape[0]):
            mean = q[h, rows].mean(0)
            of = [max(c for c, a in enumerate(firsts) if a <= place[j]) for j in free]
            score = {j: float(mean @ vectors[c][h * k.shape[0] // q.shape[0]]) for j, c in zip(free, of, strict=True)}
            room = max(0, keys(len(seen)) - len(tail) - len(early))
            best = sorted(free, key=lambda j: (-score[j], j))[:room]
            for i in rows:
                kept[h, i, [*tail, *early, *best]] = True
    low = torch.arange(n)[:, None] - (n if window is None else window)
    return kept & causal(n) & (torch.arange(n)[None] > low) & torch.tensor([j in place for j in range(n)])


@pytest.mark.parametrize("budget", [Budget(tokens=40), Budget(density=0.5)])
@pytest.mark.parametrize(("chunk", "local", "sinks"), [(7, 4, 5), (16, 20, 0), (3, 16, 30)])
def test_chunk_form_equals_a_loop(budget, chunk, local, sinks):
    q, k = tensors(length=110)
    keys = (lambda n: budget.tokens) if budget.tokens else (lambda n: math.floor(n * 0.5 + 1e-9))
    for per_head in (True, False):
        pattern = DHSA(
            budget=budget,
            variant="chunk",
            q_block=16,
            local=local,
            sinks=sinks,
            instruction=0,
            chunk=chunk,
            per_head=per_head,
        )
        kept, _ = pairs(pattern, q, k)
        for b in range(2):
            args = (q[b], k[b]) if per_head else (q[b].mean(0, keepdim=True), k[b].mean(0, keepdim=True))
            expected = looped_chunks(*args, range(0, 110, chunk), 16, local, sinks, keys)
            assert torch.equal(kept[b], expected.expand(4, -1, -1))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_chunk_form_ignores_padding(padding):
    q, k = tensors(length=90, batch=1)
    valid = torch.ones(1, 90, dtype=torch.bool)
    valid[:, slice(0, 13) if padding == "left" else slice(77, 90)] = False
    k = torch.where(valid[:, None, :, None], k, torch.nan)
    pattern = DHSA(
        budget=Budget(tokens=30), variant="chunk", q_block=16, local=4, sinks=5, instruction=0, chunk=7, per_head=True
    )
    base = BaseMask.build(90, 90, causal=True, valid=valid)
    kept, _ = pairs(pattern, q, k, base)
    clean = torch.nan_to_num(k)
    expected = looped_chunks(q[0], clean[0], range(0, 77, 7), 16, 4, 5, lambda n: 30, valid[0])
    assert torch.equal(kept[0][:, valid[0]], expected[:, valid[0]])


def test_chunk_form_keeps_the_start_of_the_models_window():
    q, k = tensors(length=120, batch=1)
    pattern = DHSA(
        budget=Budget(tokens=36), variant="chunk", q_block=16, local=4, sinks=5, instruction=0, chunk=7, per_head=True
    )
    kept, _ = pairs(pattern, q, k, BaseMask.build(120, 120, causal=True, window=50))
    assert torch.equal(kept[0], looped_chunks(q[0], k[0], range(0, 120, 7), 16, 4, 5, lambda n: 36, window=50))


def test_predicted_boundaries_drive_the_chunks(tmp_path):
    """Prefill: picks of the predictor, the question's start, nothing after it; the same boundaries in later layers."""
    path = tmp_path / "p.safetensors"
    predictor(16, seed=3).save(path)
    q, k = tensors(length=150)
    pattern = DHSA.with_predictor(
        path, budget=Budget(tokens=50), q_block=16, local=8, sinks=4, instruction=30, threshold=-0.1, gap=4
    )
    kept, state = pairs(pattern, q, k)
    logits = BoundaryPredictor.load(path).double()(k)
    for b in range(2):
        usable = logits[b].clone()
        usable[119:] = -torch.inf
        picks = pick_boundaries(usable, -0.1, 4, 150 // 16 * 8)
        assert len(picks) > 3
        firsts = [0, *(i + 1 for i in picks), 120]
        assert [x for x in state.first[b].tolist() if x < NONE] == firsts
        expected = looped_chunks(q[b].mean(0, keepdim=True), k[b].mean(0, keepdim=True), firsts, 16, 8, 4, lambda n: 50)
        assert torch.equal(kept[b, :, :112], expected.expand(4, -1, -1)[:, :112])
        assert torch.equal(kept[b, :, 112:], causal(150)[112:].expand(4, -1, -1)), (
            "blocks with instruction rows are dense"
        )
    other_q, other_k = tensors(length=150, seed=5)
    _, follower = pairs(
        pattern, other_q, other_k, layer_index=3, earlier={0: Selection(None, state), 1: Selection(None, "foreign")}
    )
    assert torch.equal(follower.first, state.first)
    assert not torch.equal(pairs(pattern, other_q, other_k)[1].first, state.first)


def sums_from_definition(k, first, b):
    edges = [x for x in first[b if first.shape[0] > 1 else 0].tolist() if x < NONE] + [k.shape[2]]
    return torch.stack([k[b, :, s:e].sum(1) for s, e in itertools.pairwise(edges)], 1)


@pytest.mark.parametrize("pooling", ["avgpool_norm", "maxpool"])
@pytest.mark.parametrize("source", ["fixed", "predicted"])
def test_decoding_follows_the_cache(source, pooling, tmp_path):
    """Carried chunk sums equal sums from the keys; fixed chunks also equal a rebuilt state; a follower shares boundaries."""
    fields = {
        "budget": Budget(tokens=30), "q_block": 16, "local": 6, "sinks": 3, "decode": "reconstructed", "per_head": True,
        "pooling": pooling, "instruction": 0,
    }  # fmt: skip
    if source == "fixed":
        pattern = DHSA(variant="chunk", chunk=7, **fields)
    else:
        predictor(16, seed=3).save(tmp_path / "p.safetensors")
        pattern = DHSA.with_predictor(tmp_path / "p.safetensors", threshold=0.0, gap=3, max_chunk=12, **fields)
    q, k = tensors(length=130)
    _, k_next = tensors(length=130, seed=8)
    _, state = pairs(pattern, q[:, :, :60], k[:, :, :60])
    _, follower = pairs(pattern, q[:, :, :60], k_next[:, :, :60], layer_index=1, earlier={0: Selection(None, state)})
    closed = 0
    for n in range(61, 131):
        base = BaseMask.build(1, n, causal=True)
        before, used = state, state.first.shape[1]
        frozen = state.pooled.clone()
        kept, state = pairs(pattern, q[:, :, n - 1 : n], k[:, :, :n], base, state)
        assert torch.equal(before.pooled, frozen), "a state that was handed in must not change"
        closed += state.first.shape[1] > used
        _, follower = pairs(
            pattern,
            q[:, :, n - 1 : n],
            k_next[:, :, :n],
            base,
            follower,
            layer_index=1,
            earlier={0: Selection(None, state)},
        )
        for b in range(2):
            for mine, keys in ((state, k[:, :, :n]), (follower, k_next[:, :, :n])):
                firsts = mine.first[b if mine.first.shape[0] > 1 else 0]
                edges = [x for x in firsts.tolist() if x < NONE] + [n]
                assert all(s < e for s, e in itertools.pairwise(edges))
                reduce = (lambda t: t.amax(1)) if pooling == "maxpool" else (lambda t: t.sum(1))
                exact = torch.stack([reduce(keys[b, :, s:e]) for s, e in itertools.pairwise(edges)], 1)
                torch.testing.assert_close(mine.pooled[b, :, : exact.shape[1]], exact, atol=1e-10, rtol=1e-10)
        if source == "predicted":
            assert torch.equal(follower.first, state.first)
            edges = torch.cat([state.first, torch.full_like(state.first[:, :1], NONE)], 1).clamp(max=n)
            late = edges[:, 1:] > 60
            assert int(edges.diff()[late].max()) <= 12 + 60, "open chunks close at max_chunk"
        else:
            fresh, rebuilt = pairs(pattern, q[:, :, n - 1 : n], k[:, :, :n], base)
            assert torch.equal(rebuilt.first, state.first) and torch.equal(fresh, kept)
        assert int(kept.sum(-1).max()) == 30 and bool(kept[..., n - 6 :].all()) and bool(kept[..., :3].all())
    assert closed >= 5


def test_predicted_boundary_in_decoding_needs_the_window(tmp_path):
    """A boundary after i is decided when key i + w arrives, from exactly the 2w keys around it."""
    predictor(16, seed=3).save(tmp_path / "p.safetensors")
    pattern = DHSA.with_predictor(
        tmp_path / "p.safetensors",
        budget=Budget(tokens=30),
        threshold=0.0,
        gap=3,
        max_chunk=1000,
        instruction=0,
        decode="reconstructed",
    )
    q, k = tensors(length=120, batch=1)
    logits = BoundaryPredictor.load(tmp_path / "p.safetensors").double()(k)[0]
    _, state = pairs(pattern, q[:, :, :60], k[:, :, :60])
    firsts = state.first[0].tolist()
    for n in range(61, 121):
        _, state = pairs(pattern, q[:, :, n - 1 : n], k[:, :, :n], BaseMask.build(1, n, causal=True), state)
        i = n - 1 - 4
        if logits[i] > 0 and i + 1 - firsts[-1] > 3:
            firsts.append(i + 1)
        assert state.first[0].tolist() == firsts
    assert len([x for x in firsts if x > 60]) > 3


def test_decoding_is_dense_by_default():
    q, k = tensors(length=90)
    base = BaseMask.build(1, 90, causal=True)
    for variant in ("chunk", *BLOCKS):
        assert (
            DHSA(budget=Budget(tokens=10), variant=variant).select(q[:, :, -1:], k, SelectContext(base, q_offset=89))[0]
            is None
        )


@pytest.mark.parametrize("variant", ["chunk", *BLOCKS])
def test_packed_documents_do_not_sway_each_other(variant):
    lengths = (21, 6, 55, 14)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    q, k = tensors(length=96)
    base = BaseMask.build(96, 96, causal=True, segments=segments)
    pattern = DHSA(budget=Budget(tokens=24), variant=variant, local=4, sinks=3, instruction=5, chunk=6, **SMALL)
    before, _ = pairs(pattern, q, k, base)
    assert not (before & (segments[0][:, None] != segments[0][None])).any() and bool(before.any(-1).all())
    for document in range(4):
        mine = segments[0] == document
        other_q, other_k = tensors(length=96, seed=5)
        swapped = torch.where(mine[:, None], q, other_q), torch.where(mine[:, None], k, 9 * other_k)
        assert torch.equal(pairs(pattern, *swapped, base)[0][:, :, mine], before[:, :, mine])


# --- the block variants -------------------------------------------------------------------------------------------


def vertical_slash_scores(q, k, blocks, q_block, kv_block):
    """``vs`` of one head by loops over tokens: q, k ``(N, D)``."""
    n = len(q)
    rows = range(n - q_block, n)
    weight = torch.softmax((q[rows] @ k.T / math.sqrt(q.shape[1])).masked_fill(~causal(n)[rows], -torch.inf), -1)
    vertical, slash = weight.sum(0), torch.zeros(n, dtype=q.dtype)
    for r, i in enumerate(rows):
        for j in range(i + 1):
            slash[i - j] += weight[r, j]
    tokens = blocks * kv_block
    columns = vertical.topk(tokens // 2).indices.tolist()
    distances = slash.topk(tokens - tokens // 2).indices.tolist()
    scores = torch.zeros(-(-n // q_block), -(-n // kv_block), dtype=q.dtype)
    for u in range(scores.shape[0]):
        for j in columns:
            scores[u, j // kv_block] += vertical[j]
        for d in distances:
            touched = {(i - d) // kv_block for i in range(u * q_block, min(u * q_block + q_block, n)) if i >= d}
            for c in touched:
                scores[u, c] += slash[d]
    return scores


def block_scores(variant, q, k, blocks, q_block, kv_block):
    mean_q = torch.stack([x.mean(0) for x in q.split(q_block)])
    mean_k = torch.stack([x.mean(0) for x in k.split(kv_block)])
    if variant in ("a", "topk"):
        return mean_q @ mean_k.T
    if variant == "vs":
        return vertical_slash_scores(q, k, blocks, q_block, kv_block)
    weight = torch.softmax(mean_q[-1] @ mean_k.T / math.sqrt(q.shape[1]), -1)
    scores = torch.zeros(len(mean_q), len(mean_k), dtype=q.dtype)
    scores[:, weight.topk(blocks // 2).indices] += weight.topk(blocks // 2).values
    for c in weight.topk(blocks - blocks // 2).indices.tolist():
        for u in range(len(mean_q)):
            for step in range(q_block // kv_block):
                at = u * q_block // kv_block + step - (len(mean_k) - 1 - c)
                if at >= 0:
                    scores[u, at] += weight[c]
    return scores


@pytest.mark.parametrize("variant", BLOCKS)
def test_block_variants_equal_loops(variant):
    q, k = tensors(length=240, batch=1)
    q = 2 * q
    kept = tiles(pairs(DHSA(budget=Budget(tokens=56), variant=variant, **SMALL), q, k)[0])
    for h in range(4):
        scores = block_scores(variant, q[0, h], k[0, h // 2], 7, 16, 8)
        for u in range(15):
            reach = range(2 * u + 2)
            dense = len(reach) <= 7 or (variant in ("vs", "vsb") and (u == 14 or u < 4))
            forced = {2 * u, 2 * u + 1} | ({0} if variant != "topk" else set())
            free = sorted(set(reach) - forced, key=lambda c: (-float(scores[u, c]), c))
            expected = set(reach) if dense else forced | set(free[: 7 - len(forced)])
            assert set(kept[0, h, u].nonzero()[:, 0].tolist()) == expected, (h, u)


def test_by_distance_sums_diagonals():
    g = torch.Generator().manual_seed(0)
    for n, rows, first in ((10, 3, 7), (7, 7, 0), (5, 1, 4), (10, 4, -2), (12, 3, 5)):
        own = first + torch.arange(rows)
        weights = torch.rand(2, rows, n, generator=g) * (torch.arange(n) <= own[:, None])
        expected = torch.zeros(2, n)
        for r, j in itertools.product(range(rows), range(n)):
            if j <= own[r]:
                expected[:, own[r] - j] += weights[:, r, j]
        torch.testing.assert_close(by_distance(weights, first), expected)


def test_block_variants_need_causality_for_distances():
    q, k = tensors(length=80)
    base = BaseMask.build(80, 80, causal=False)
    for variant in ("vs", "vsb", "chunk"):
        with pytest.raises(UnsupportedError, match="bidirectional"):
            DHSA(budget=Budget(tokens=24), variant=variant, **SMALL).select(q, k, SelectContext(base))
    kept, _ = pairs(DHSA(budget=Budget(tokens=24), variant="a", **SMALL), q, k, base)
    assert bool(kept.triu(1).any())


# --- the authors' literal behaviour -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["a", "vs"])
def test_literal_forces_only_the_last_key_block(variant):
    q, k = tensors(length=320, heads=8, kv_heads=8)
    q, k = q.abs(), -k.abs()
    k[:, :, : 320 // 2] *= 0.01  # early blocks score best
    kept, _ = pairs(DHSA(budget=Budget(density=0.1), variant=variant, literal=True, **SMALL), q, k)
    blocks = tiles(kept)
    assert bool(blocks[:, :, 10, 21].all()) and bool(blocks[:, :, 10, 0].all())
    assert not blocks[:, :, 10:18, :].diagonal(0, -2, -1).all() and not bool(kept.diagonal(0, -2, -1).all()), (
        "rows that miss themselves"
    )
    fixed, _ = pairs(DHSA(budget=Budget(density=0.1), variant=variant, **SMALL), q, k)
    assert bool(fixed.diagonal(0, -2, -1).all())


def test_literal_topk_reads_the_future_and_leaves_rows_blind():
    q, k = tensors(length=160)
    q, k = q.abs(), k.abs() * torch.linspace(0.1, 3, 160)[:, None]  # later keys score higher
    pattern = DHSA(budget=Budget(density=0.2), variant="topk", literal=True, **SMALL)
    kept, _ = pairs(pattern, q, k)
    assert not kept.any(-1).all() and not kept[:, :, :64].any()
    assert pattern.look_ahead == "prefill"
    v = k.clone()
    out = foveal.attention(q, k, v, pattern, causal=True)
    assert bool((out[:, :, :64] == 0).all()), "a row without a key gives zeros, not NaN"


def test_literal_density_is_a_share_of_all_keys_and_counts_zero_rows():
    q, k = tensors(length=250)
    kept = tiles(pairs(DHSA(budget=Budget(density=0.25), variant="topk", literal=True, **SMALL), q, k)[0])
    base = tiles(causal(250)[None, None])
    assert int((kept & base).sum(-1).max()) <= int(0.25 * 256) // 8
    # the last block holds 2 of 8 keys: the authors divide by 8, so it scores a quarter of its mean
    q, k = q.abs(), k.abs() * 0.1
    k[:, :, 248:] = 0.35
    fields = {"budget": Budget(tokens=8), "variant": "topk", "q_block": 250, "kv_block": 8}
    literal = tiles(pairs(DHSA(literal=True, **fields), q, k)[0], 250)
    scored = (
        q.mean(2, keepdim=True)
        @ nn.functional.pad(k, (0, 0, 0, 6)).unflatten(2, (-1, 8)).sum(3).repeat_interleave(2, 1).mT
        / 8
    )[:, :, 0]
    assert torch.equal(literal[:, :, 0].nonzero()[:, 2], scored.argmax(-1).flatten())


def test_literal_vsb_ranks_negative_logits_below_nothing():
    q, k = tensors(length=320)
    q, k = q.abs(), -k.abs()
    k[:, :, 40:48] *= 0.1  # key block 5 is the best by far, with a negative logit
    fields = {"budget": Budget(tokens=64), "variant": "vsb", **SMALL}
    fixed, literal = (tiles(pairs(DHSA(literal=x, **fields), q, k)[0])[:, :, 8:-1, 5] for x in (False, True))
    assert bool(fixed.all()) and not literal.any()


# --- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "chunk", "literal": True}, "unique positions"),
        ({"variant": "vsb", "decode": "reconstructed"}, "variant 'chunk'"),
        ({"variant": "vsb", "predictor": "p", "predictor_sha256": "0"}, "only variant 'chunk'"),
        ({"variant": "chunk", "predictor": "p"}, "come together"),
        ({"budget": {"mass": 0.5}}, "block_topk"),
        ({"variant": "vsbb"}, "expected one of"),
        ({"q_block": 0}, "q_block"),
        ({"thresold": 1.0}, "threshold"),
    ],
)
def test_refusals_teach(fields, message):
    with pytest.raises(ConfigError, match=message):
        Pattern.from_json({"pattern": "dhsa", **fields})


def test_spans_of_an_empty_call():
    base = BaseMask.build(0, 5, causal=True)
    assert isinstance(spans(base, 16, 4, 2, 0, 3, share=False), Spans)
