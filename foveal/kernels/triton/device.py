"""The kernels: attention of pieces, forward and backward, and the joining of what rows in several pieces received.

A *piece* is a set of query rows and a set of keys that they see: a list of a ``KeySelection`` with the rows of its block, of all
heads that share it; or a group of ``Groups``. A program runs a tile of a piece's rows (or, for the gradients of keys, a tile of
its keys) and walks the other side. Logits are in base 2. The arguments that all kernels share are those of
:class:`~foveal.kernels.triton.work.Work` and :class:`~foveal.kernels.triton.work.Sizes`. ``size`` is not specialised: where a list has one row, the loop over rows would be unrolled,
and ptxas then left kilobytes of the float32 gradients outside the registers. What grows with a cache is not either, so that decoding
does not compile anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
TWICE_LOG2_E = tl.constexpr(2.8853900817779268)


@triton.jit
def _tile(tile_piece, tile_first, count, TILE: tl.constexpr, LISTS: tl.constexpr):
    """Which piece this program works on and its first row or key; pieces of lists all have ``count`` of them."""
    at = tl.program_id(0)
    if LISTS:
        per = tl.cdiv(count, TILE)
        piece = (at // per).to(tl.int64)
        first = (at % per) * TILE
    else:
        piece = tl.load(tile_piece + at)
        first = tl.load(tile_first + at).to(tl.int32)
    return piece, first


@triton.jit
def _place(
    piece, layer, q_index, cu_q, heads, kv_heads, q_len, row_heads, LISTS: tl.constexpr, PER_HEAD: tl.constexpr
):  # fmt: skip
    """The sequence and the key head that a piece belongs to."""
    if LISTS:
        batch = layer // row_heads
        head = layer % row_heads * kv_heads // row_heads
    else:
        begin, end = tl.load(cu_q + piece), tl.load(cu_q + piece + 1)
        batch = tl.load(q_index + begin, mask=begin < end, other=0) // q_len
        head = layer * kv_heads // heads
        if PER_HEAD:
            head = batch % heads * kv_heads // heads
            batch = batch // heads
    return batch.to(tl.int64), head.to(tl.int64)


@triton.jit
def _rows(
    piece, layer, batch, slot, q_index, cu_q, heads, q_len, members, row_heads, per_row, size,
    LISTS: tl.constexpr, PER_HEAD: tl.constexpr, OF_MEMBERS: tl.constexpr,
):  # fmt: skip
    """Rows of a piece: where they lie in q, the number of the membership, the query index, and whether there is one."""
    if LISTS:
        i = piece * size + slot % size
        real = (slot < per_row * size) & (i < q_len)
        row = (batch * heads + (layer % row_heads) * per_row + slot // size) * q_len + i
        member = row
    else:
        at = tl.load(cu_q + piece) + slot
        real = at < tl.load(cu_q + piece + 1)
        entry = tl.load(q_index + at, mask=real, other=0)
        i = entry % q_len
        if PER_HEAD:
            row = entry
            member = at
        else:
            row = (batch * heads + layer) * q_len + i
            member = layer.to(tl.int64) * members + at
        if OF_MEMBERS:
            row = member
    return row, member, i, real


@triton.jit
def _keys(
    piece, layer, batch, slot, k_index, cu_k, kv_len, row_heads, width, index_batch, index_head, LISTS: tl.constexpr
):  # fmt: skip
    """Keys of a piece: which of the sequence's keys, and whether there is one."""
    if LISTS:
        at = batch * index_batch + (layer % row_heads).to(tl.int64) * index_head + piece * width + slot
        j = tl.load(k_index + at, mask=slot < width, other=-1)
        real = j >= 0
    else:
        at = tl.load(cu_k + piece) + slot
        real = at < tl.load(cu_k + piece + 1)
        j = tl.load(k_index + at, mask=real, other=0) % kv_len
    return j, real


@triton.jit
def _bounds(lo, hi, batch, bounds_batch, i, real, BOUNDED: tl.constexpr):
    """The interval of keys that each row may see; rows that are none see nothing."""
    if BOUNDED:
        first = tl.load(lo + batch * bounds_batch + i, mask=real, other=0)
        after = tl.load(hi + batch * bounds_batch + i, mask=real, other=0)
    else:
        first = i * 0
        after = i * 0
    return first, after


@triton.jit
def _tokens(valid, batch, valid_batch, j, real, PADDED: tl.constexpr):
    """``real`` without the keys that are padding."""
    if PADDED:
        real = real & (tl.load(valid + batch * valid_batch + j, mask=real, other=0) != 0)
    return real


@triton.jit
def _load(x, row, step, real, C: tl.constexpr, WIDE: tl.constexpr):
    """``(rows, WIDE)``: rows of ``x``, ``step`` apart, of C numbers; 0 beyond C and where there is none."""
    c = tl.arange(0, WIDE)
    return tl.load(x + row[:, None] * step + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _logits(a, b, factor, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Base-2 logits ``a·bᵀ``, and their tanh under a softcap."""
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION) * factor
    tanh = s
    if CAPPED:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(s * TWICE_LOG2_E))
        s = tanh * cap
    return s, tanh


@triton.jit(do_not_specialize=["size", "kv_len", "members", "valid_batch", "splits"])
def forward(
    q, k, v, out, lse, lo, hi, valid, q_index, cu_q, k_index, cu_k, tile_piece, tile_first,
    heads, kv_heads, q_len, kv_len, members, row_heads, per_row, size, width, index_batch, index_head,
    k_batch, k_head, k_row, v_batch, v_head, v_row, bounds_batch, valid_batch, factor, cap, splits,
    LISTS: tl.constexpr, PER_HEAD: tl.constexpr, OF_MEMBERS: tl.constexpr, PARTS: tl.constexpr, BOUNDED: tl.constexpr,
    PADDED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDE_D: tl.constexpr, WIDE_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of rows; with ``PARTS`` one of each per membership, or per split of a list."""
    piece, first = _tile(tile_piece, tile_first, per_row * size, ROWS, LISTS)
    layer, split = tl.program_id(1), tl.program_id(2)
    batch, head = _place(piece, layer, q_index, cu_q, heads, kv_heads, q_len, row_heads, LISTS, PER_HEAD)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    row, member, i, there = _rows(
        piece, layer, batch, first + tl.arange(0, ROWS), q_index, cu_q, heads, q_len, members, row_heads, per_row, size,
        LISTS, PER_HEAD, OF_MEMBERS,
    )  # fmt: skip
    low, high = _bounds(lo, hi, batch, bounds_batch, i, there, BOUNDED)
    queries = _load(q, row, D, there, D, WIDE_D)
    if LISTS:
        per = tl.cdiv(tl.cdiv(width, splits), KEYS) * KEYS
        begin = split * per
        end = tl.minimum(begin + per, width)
    else:
        begin = 0
        end = (tl.load(cu_k + piece + 1) - tl.load(cu_k + piece)).to(tl.int32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDE_DV), tl.float32)
    for start in range(begin, end, KEYS):
        j, real = _keys(
            piece, layer, batch, start + tl.arange(0, KEYS), k_index, cu_k, kv_len, row_heads, width, index_batch, index_head, LISTS,
        )  # fmt: skip
        s, _ = _logits(queries, _load(k, j, k_row, real, D, WIDE_D), factor, cap, CAPPED, PRECISION)
        seen = _tokens(valid, batch, valid_batch, j, real, PADDED)[None, :]
        if BOUNDED:
            seen = seen & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        s = tl.where(seen, s, float("-inf"))
        now = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        values = _load(v, j, v_row, real, DV, WIDE_DV)
        total = tl.dot(p.to(values.dtype), values, total * shrink[:, None], input_precision=PRECISION)
        norm = norm * shrink + tl.sum(p, 1)
        top = now
    full = tl.where(norm > 0, norm, 1.0)
    found = tl.where(norm > 0, (top + tl.log2(full)) * LN_2, float("-inf"))
    target = row
    if PARTS:
        target = member * splits + split
    c = tl.arange(0, WIDE_DV)
    place = out + target[:, None] * DV + c[None, :]
    tl.store(place, (total / full[:, None]).to(out.dtype.element_ty), mask=there[:, None] & (c < DV)[None, :])
    tl.store(lse + target, found, mask=there)


@triton.jit(do_not_specialize=["members", "splits"])
def join(
    parts, part_lse, out, lse, order, begins, heads, q_len, members, splits,
    LISTS: tl.constexpr, PER_HEAD: tl.constexpr, DV: tl.constexpr, WIDE_DV: tl.constexpr,
):  # fmt: skip
    """One row's output and log-sum-exp from those of its parts."""
    row = tl.program_id(0).to(tl.int64)
    shift = row * 0
    if LISTS:
        begin = row * splits
        end = begin + splits
    else:
        owner = row
        if not PER_HEAD:
            owner = row // q_len // heads * q_len + row % q_len
            shift = row // q_len % heads * members
        begin = tl.load(begins + owner)
        end = tl.load(begins + owner + 1)
    c = tl.arange(0, WIDE_DV)
    top = tl.full((), float("-inf"), tl.float32)
    norm = tl.full((), 0.0, tl.float32)
    total = tl.zeros((WIDE_DV,), tl.float32)
    for at in range(begin, end):
        part = shift + at
        if not LISTS:
            part = shift + tl.load(order + at)
        here = tl.load(part_lse + part) * LOG2_E
        now = tl.maximum(top, here)
        safe = tl.where(now == float("-inf"), 0.0, now)
        weight, shrink = tl.exp2(here - safe), tl.exp2(top - safe)
        total = total * shrink + weight * tl.load(parts + part * DV + c, mask=c < DV, other=0.0)
        norm = norm * shrink + weight
        top = now
    full = tl.where(norm > 0, norm, 1.0)
    tl.store(out + row * DV + c, (total / full).to(out.dtype.element_ty), mask=c < DV)
    tl.store(lse + row, tl.where(norm > 0, (top + tl.log2(full)) * LN_2, float("-inf")))


@triton.jit(do_not_specialize=["size", "kv_len", "members", "valid_batch"])
def grad_queries(
    q, k, v, grad_out, grad_q, base, term, lo, hi, valid, q_index, cu_q, k_index, cu_k, tile_piece, tile_first,
    heads, kv_heads, q_len, kv_len, members, row_heads, per_row, size, width, index_batch, index_head,
    k_batch, k_head, k_row, v_batch, v_head, v_row, bounds_batch, valid_batch, factor, cap, scale,
    LISTS: tl.constexpr, PER_HEAD: tl.constexpr, OF_MEMBERS: tl.constexpr, PARTS: tl.constexpr, BOUNDED: tl.constexpr,
    PADDED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDE_D: tl.constexpr, WIDE_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of rows, added up over the pieces of a row with ``PARTS``.

    ``base``: log-sum-exps in base 2, 0 for rows that see nothing. ``term``: ``d lse − d out·out`` of every row.
    """
    piece, first = _tile(tile_piece, tile_first, per_row * size, ROWS, LISTS)
    layer = tl.program_id(1)
    batch, head = _place(piece, layer, q_index, cu_q, heads, kv_heads, q_len, row_heads, LISTS, PER_HEAD)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    row, _, i, there = _rows(
        piece, layer, batch, first + tl.arange(0, ROWS), q_index, cu_q, heads, q_len, members, row_heads, per_row, size,
        LISTS, PER_HEAD, OF_MEMBERS,
    )  # fmt: skip
    low, high = _bounds(lo, hi, batch, bounds_batch, i, there, BOUNDED)
    queries, upstream = _load(q, row, D, there, D, WIDE_D), _load(grad_out, row, DV, there, DV, WIDE_DV)
    minus, plus = tl.load(base + row, mask=there, other=0.0), tl.load(term + row, mask=there, other=0.0)
    end = width
    if not LISTS:
        end = (tl.load(cu_k + piece + 1) - tl.load(cu_k + piece)).to(tl.int32)
    total = tl.zeros((ROWS, WIDE_D), tl.float32)
    for start in range(0, end, KEYS):
        j, real = _keys(
            piece, layer, batch, start + tl.arange(0, KEYS), k_index, cu_k, kv_len, row_heads, width, index_batch, index_head, LISTS,
        )  # fmt: skip
        keys, values = _load(k, j, k_row, real, D, WIDE_D), _load(v, j, v_row, real, DV, WIDE_DV)
        s, tanh = _logits(queries, keys, factor, cap, CAPPED, PRECISION)
        seen = _tokens(valid, batch, valid_batch, j, real, PADDED)[None, :]
        if BOUNDED:
            seen = seen & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        p = tl.exp2(tl.where(seen, s - minus[:, None], float("-inf")))
        ds = p * (tl.dot(upstream, tl.trans(values), input_precision=PRECISION) + plus[:, None])
        if CAPPED:
            ds = ds * (1.0 - tanh * tanh)
        total = tl.dot(ds.to(keys.dtype), keys, total, input_precision=PRECISION)
    c = tl.arange(0, WIDE_D)
    place, mask = grad_q + row[:, None] * D + c[None, :], there[:, None] & (c < D)[None, :]
    if PARTS:
        tl.atomic_add(place, total * scale, mask=mask, sem="relaxed")
    else:
        tl.store(place, (total * scale).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size", "kv_len", "members", "valid_batch"])
def grad_keys(
    q, k, v, grad_out, grad_k, grad_v, base, term, lo, hi, valid, q_index, cu_q, k_index, cu_k, tile_piece, tile_first,
    heads, kv_heads, q_len, kv_len, members, row_heads, per_row, size, width, index_batch, index_head,
    k_batch, k_head, k_row, v_batch, v_head, v_row, bounds_batch, valid_batch, factor, cap, scale,
    LISTS: tl.constexpr, PER_HEAD: tl.constexpr, OF_MEMBERS: tl.constexpr, PARTS: tl.constexpr, BOUNDED: tl.constexpr,
    PADDED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDE_D: tl.constexpr, WIDE_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values from one piece, added to float32 sums over all pieces."""
    piece, first = _tile(tile_piece, tile_first, width, KEYS, LISTS)
    layer = tl.program_id(1)
    batch, head = _place(piece, layer, q_index, cu_q, heads, kv_heads, q_len, row_heads, LISTS, PER_HEAD)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    j, real = _keys(
        piece, layer, batch, first + tl.arange(0, KEYS), k_index, cu_k, kv_len, row_heads, width, index_batch, index_head, LISTS,
    )  # fmt: skip
    keys, values = _load(k, j, k_row, real, D, WIDE_D), _load(v, j, v_row, real, DV, WIDE_DV)
    tokens = _tokens(valid, batch, valid_batch, j, real, PADDED)
    end = per_row * size
    if not LISTS:
        end = (tl.load(cu_q + piece + 1) - tl.load(cu_q + piece)).to(tl.int32)
    of_keys = tl.zeros((KEYS, WIDE_D), tl.float32)
    of_values = tl.zeros((KEYS, WIDE_DV), tl.float32)
    for start in range(0, end, ROWS):
        row, _, i, there = _rows(
            piece, layer, batch, start + tl.arange(0, ROWS), q_index, cu_q, heads, q_len, members, row_heads, per_row,
            size, LISTS, PER_HEAD, OF_MEMBERS,
        )  # fmt: skip
        low, high = _bounds(lo, hi, batch, bounds_batch, i, there, BOUNDED)
        queries, upstream = _load(q, row, D, there, D, WIDE_D), _load(grad_out, row, DV, there, DV, WIDE_DV)
        minus, plus = tl.load(base + row, mask=there, other=0.0), tl.load(term + row, mask=there, other=0.0)
        s, tanh = _logits(keys, queries, factor, cap, CAPPED, PRECISION)
        seen = tokens[:, None]  # rows that are none are zeros, and so is what they give
        if BOUNDED:
            seen = seen & (j[:, None] >= low[None, :]) & (j[:, None] < high[None, :])
        p = tl.exp2(tl.where(seen, s - minus[None, :], float("-inf")))
        of_values = tl.dot(p.to(upstream.dtype), upstream, of_values, input_precision=PRECISION)
        ds = p * (tl.dot(values, tl.trans(upstream), input_precision=PRECISION) + plus[None, :])
        if CAPPED:
            ds = ds * (1.0 - tanh * tanh)
        of_keys = tl.dot(ds.to(queries.dtype), queries, of_keys, input_precision=PRECISION)
    where = (batch * kv_heads + head) * kv_len + j
    c = tl.arange(0, WIDE_D)
    place, mask = grad_k + where[:, None] * D + c[None, :], real[:, None] & (c < D)[None, :]
    tl.atomic_add(place, of_keys * scale, mask=mask, sem="relaxed")
    c = tl.arange(0, WIDE_DV)
    place, mask = grad_v + where[:, None] * DV + c[None, :], real[:, None] & (c < DV)[None, :]
    tl.atomic_add(place, of_values, mask=mask, sem="relaxed")
