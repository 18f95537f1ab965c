"""Masks of the kernel benchmark: every form says the same, areas are exact, and the families fall together where they must.

The numbers of the tests follow section 6 of the paper's spec sheet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.bench.masks import Mask, MaskSpec, families, parse_mask, parse_masks
from foveal.bench.masks_blocks import Blocks, UniformBlocks, VariableBlocks
from foveal.bench.masks_documents import (
    BlockCausalDocument,
    CausalBlockwise,
    CausalDocument,
    FullDocument,
    PrefixDocument,
    ShareQuestion,
)
from foveal.bench.masks_static import Causal, CausalSliding, Full, FullSliding, GlobalSliding, PrefixCausal, Static
from foveal.core.errors import ConfigError
from foveal.core.layouts import narrow
from foveal.kernels.call import AttentionCall
from foveal.kernels.reference import visible_pairs

STATIC = parse_masks("static")
SPARSE = parse_masks("sparse")


def predicate(mask: Mask) -> Tensor:
    """``(heads, T, T)`` bool from the definition alone."""
    i, j = torch.arange(mask.length)[:, None], torch.arange(mask.length)[None]
    if isinstance(mask, Blocks):
        return torch.stack([mask.allow(torch.tensor(h), i, j) for h in range(mask.heads)])
    assert isinstance(mask, Static)
    return mask.allow(i, j).expand(mask.length, mask.length)[None]


def of_layout(mask: Mask, heads: int) -> Tensor:
    """``(heads, T, T)`` bool as the reference implementation reads layout and base."""
    layout, base = mask.layout(heads)
    q = torch.zeros(1, heads, mask.length, 1)
    return visible_pairs(AttentionCall(q, q, q, layout, base, 1.0))[0]


def of_flex(mask: Mask, heads: int) -> Tensor:
    """The same by FlexAttention's rule: whole tiles unasked, partial ones by ``mask_mod``."""
    found = narrow(*mask.layout(heads))
    t = mask.length
    h, i, j = torch.arange(heads)[:, None, None], torch.arange(t)[:, None], torch.arange(t)[None]
    whole, partial = torch.zeros(heads, t, t, dtype=torch.bool), torch.zeros(heads, t, t, dtype=torch.bool)
    rows, cols = found.BLOCK_SIZE
    for counts, index, into in (
        (found.kv_num_blocks, found.kv_indices, partial),
        (found.full_kv_num_blocks, found.full_kv_indices, whole),
    ):
        for head in range(heads):
            own = min(head, counts.shape[1] - 1)
            for u in range(counts.shape[2]):
                for c in index[0, own, u, : int(counts[0, own, u])].tolist():
                    into[head, u * rows : (u + 1) * rows, c * cols : (c + 1) * cols] = True
    return whole | (partial & found.mask_mod(torch.zeros_like(h), h, i, j))


def check_all_forms(mask: Mask, heads: int) -> None:
    right = predicate(mask)
    each = right.repeat_interleave(heads // mask.heads, 0)
    assert torch.equal(mask.dense(), right), "rows"
    assert mask.area() == int(right.sum()), "closed form"
    assert mask.total_area(heads) == int(each.sum())
    for slices, one in zip(mask.slices(), right, strict=True):
        covered = torch.zeros(one.shape, dtype=torch.int64)
        for piece in slices:
            covered += piece.pairs(mask.length)
        assert torch.equal(covered, one.long()), "slices are not disjoint, or not the mask"
    assert torch.equal(of_layout(mask, heads), each), "layout"
    assert torch.equal(of_flex(mask, heads), each), "FlexAttention"


@settings(max_examples=40)
@given(st.sampled_from(STATIC), st.integers(1, 300), st.integers(0, 50), st.integers(1, 200))
def test_6_all_forms_agree_for_the_twelve_static_masks(spec: MaskSpec, length: int, seed: int, window: int) -> None:
    own = parse_mask(spec.name, {"window": window, "block": next(b for b in (32, 7, 1) if length % b == 0)})
    check_all_forms(own.draw(length, 2, seed), 2)


@settings(max_examples=25)
@given(
    st.sampled_from(SPARSE), st.integers(1, 420), st.integers(0, 50), st.floats(0, 1), st.sampled_from([(1, 2), (2, 2), (2, 4)])
)  # fmt: skip
def test_6_all_forms_agree_for_block_sparse_masks(
    spec: MaskSpec, length: int, seed: int, keep: float, heads: tuple[int, int]
) -> None:
    own = parse_mask(spec.name, {"block": 64, "mean_block": 140, "keep": keep})
    check_all_forms(own.draw(max(length, 128), heads[0], seed), heads[1])


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("name", ["global_sliding:window=31", "share_question", "causal_sliding:window=128"])
def test_lengths_at_tile_edges(name: str, length: int) -> None:
    check_all_forms(parse_mask(name).draw(length), 1)


SENTENCES: dict[str, Callable[[int, int, dict[str, Any]], bool]] = {
    "full": lambda i, j, m: True,
    "causal": lambda i, j, m: j <= i,
    "full_sliding": lambda i, j, m: abs(i - j) <= m["w"],
    "causal_sliding": lambda i, j, m: 0 <= i - j <= m["w"],
    "full_document": lambda i, j, m: m["doc"][i] == m["doc"][j],
    "causal_document": lambda i, j, m: m["doc"][i] == m["doc"][j] and j <= i,
    "share_question": lambda i, j, m: (m["doc"][i] == m["doc"][j] and j <= i) or (m["doc"][j] == 0 and m["doc"][i] > 0),
    "causal_blockwise": lambda i, j, m: (
        (m["doc"][i] == m["doc"][j] and j <= i) or (m["doc"][i] == m["doc"][-1] and m["doc"][j] < m["doc"][-1])
    ),
    "prefix_lm_causal": lambda i, j, m: j <= i or j < m["p"],
    "prefix_lm_document": lambda i, j, m: m["doc"][i] == m["doc"][j] and (j <= i or j - m["start"][j] < m["p"]),
    "global_sliding": lambda i, j, m: abs(i - j) <= m["w"] or i < m["w"] or j < m["w"],
    "block_causal_document": lambda i, j, m: m["doc"][i] == m["doc"][j] and j < (i // m["b"] + 1) * m["b"],
}
"""The sheet's table in plain Python."""


@pytest.mark.parametrize("spec", STATIC, ids=str)
def test_areas_by_brute_force_over_the_sheets_table(spec: MaskSpec) -> None:
    for length in (1, 5, 24, 48):
        for seed in range(3):
            own = parse_mask(spec.name, {"window": 5, "block": 1 if length % 8 else 8})
            mask = own.draw(length, 1, seed)
            docs = getattr(mask, "docs", (length,))
            doc = [n for n, size in enumerate(docs) for _ in range(size)]
            start = [doc.index(d) for d in doc]
            words = {"w": getattr(mask, "window", 0), "p": getattr(mask, "prefix", 0), "b": getattr(mask, "block", 1)}
            says = SENTENCES[spec.name]
            count = sum(says(i, j, {**words, "doc": doc, "start": start}) for i in range(length) for j in range(length))
            assert mask.area() == count


def same(a: Mask, b: Mask) -> bool:
    return torch.equal(a.dense(), b.dense()) and a.area() == b.area()


@given(st.integers(1, 90), st.integers(0, 40), st.integers(0, 9))
def test_7_degenerate_equalities(length: int, more: int, seed: int) -> None:
    one = (length,)
    assert same(FullSliding(length, length - 1 + more), Full(length))
    assert same(CausalSliding(length, length - 1 + more), Causal(length))
    assert same(FullDocument(length, one), Full(length))
    for family in (CausalDocument, ShareQuestion, CausalBlockwise):
        assert same(family(length, one), Causal(length))
    assert same(PrefixCausal(length, 1), Causal(length))
    assert same(PrefixCausal(length, length), Full(length))
    packed = parse_mask("full_document").draw(length, 1, seed)
    assert isinstance(packed, FullDocument)
    assert same(PrefixDocument(length, packed.docs, max(packed.docs) + more), packed)
    assert same(BlockCausalDocument(length, packed.docs, 1), CausalDocument(length, packed.docs))
    assert same(GlobalSliding(length, length + more), Full(length))
    for spec in ("uniform_block_sparse:block=16:keep=1.0", "variable_block_sparse:keep=1.0"):
        mask = parse_mask(spec).draw(length + 128, 1, seed)
        assert same(mask, Full(length + 128))


def test_windows_do_not_count_the_query() -> None:
    """w + 1 keys, where foveal's own window of w counts the query."""
    seen = CausalSliding(50, 7).dense()[0]
    assert int(seen[49].sum()) == 8 and int(FullSliding(50, 7).dense()[0, 25].sum()) == 15
    assert int(GlobalSliding(60, 4).dense()[0, 40].sum()) == 9 + 4


def test_published_defaults() -> None:
    masks = {spec.name: spec.draw(8192) for spec in STATIC}
    assert masks["full_sliding"].facts() == masks["causal_sliding"].facts() == {"window": 1024}
    blocks = masks["block_causal_document"]
    assert isinstance(blocks, BlockCausalDocument) and blocks.block == 1024
    assert all(n % 1024 == 0 and 1 <= n // 1024 <= 8 for n in blocks.docs)
    for seed in range(20):
        wide = parse_mask("global_sliding").draw(3000, 1, seed)
        assert isinstance(wide, GlobalSliding) and 1 <= wide.window <= 999
        prefixed = parse_mask("prefix_lm_document").draw(3000, 1, seed)
        assert isinstance(prefixed, PrefixDocument) and 1 <= prefixed.prefix <= prefixed.docs[0]


def test_block_sparse_ratio_is_what_is_kept_and_every_key_head_has_its_own() -> None:
    mask = parse_mask("uniform_block_sparse:keep=0.2").draw(2048, 3)
    assert isinstance(mask, UniformBlocks)
    assert mask.kept.shape == (3, 16, 16) and set(mask.kept.sum(-1).flatten().tolist()) == {3}, "top-k floors the ratio"
    assert not torch.equal(mask.kept[0], mask.kept[1])
    assert mask.total_area(6) == 6 * 16 * 3 * 128**2
    with_variable = parse_mask("variable_block_sparse:mean_block=512").draw(4096, 1)
    assert isinstance(with_variable, VariableBlocks)
    assert int(with_variable.row_sizes.sum()) == int(with_variable.col_sizes.sum()) == 4096
    assert int(with_variable.row_sizes.min()) >= 128 and with_variable.row_sizes.numel() == 8
    assert not torch.equal(with_variable.row_sizes, with_variable.col_sizes)


def test_a_draw_is_reproducible_and_draws_differ() -> None:
    for spec in parse_masks("all", {"block": 128}):
        first, again, other = (spec.draw(2048, 2, 42, number) for number in (0, 0, 1))
        assert torch.equal(first.dense(), again.dense())
        assert torch.equal(first.dense(), other.dense()) == (not spec.random), str(spec)


def test_there_are_twelve_static_and_two_sparse_families() -> None:
    assert list(families())[:2] == ["full", "causal"] and len(STATIC) == 12 and len(SPARSE) == 2
    assert parse_masks("all") == STATIC + SPARSE
    assert [families()[s.name].letters for s in STATIC] == [
        "F",
        "C",
        "FSW",
        "CSW",
        "FD",
        "CD",
        "SQ",
        "CB",
        "PLC",
        "PLD",
        "GS",
        "BCD",
    ]


def test_names_options_and_letters() -> None:
    assert str(parse_mask("CSW:window=256")) == "causal_sliding:window=256"
    assert str(parse_mask("causal_sliding:window=1024")) == "causal_sliding", "defaults are left out"
    assert parse_masks("causal, causal,F") == [MaskSpec("causal"), MaskSpec("full")]
    assert str(parse_mask("causal_sliding:window=9", {"window": 64})) == "causal_sliding:window=9"
    assert parse_mask("full", {"window": 64}) == MaskSpec("full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("causal_slidng", "Did you mean 'causal_sliding'"),
        ("fulldocument", "Did you mean 'full_document'"),
        ("causal:window=3", "sets 'window=3'; it has no options"),
        ("full_sliding:windo=3", "expected window=…"),
        ("full_sliding:window=three", "window is 'three'; expected a whole number"),
        ("full_sliding:window=-1", "expected a number of at least 0"),
        ("uniform_block_sparse:keep=1.5", "expected a number from 0.0 to 1.0"),
        ("uniform_block_sparse:keep=nan", "expected a number from 0.0 to 1.0"),
        ("full_document:documents=pil", "Did you mean 'pile'"),
        (" , ", "no mask is named"),
    ],
)
def test_bad_masks_give_one_message(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_masks(text)
    assert message in str(error.value)


def test_lengths_that_a_family_does_not_have() -> None:
    with pytest.raises(ConfigError, match="blocks of 1024 tokens and the length is 1000"):
        parse_mask("block_causal_document").draw(1000)
    with pytest.raises(ConfigError, match="at least 128"):
        parse_mask("variable_block_sparse").draw(100)
    with pytest.raises(ConfigError, match="at least 1 token"):
        parse_mask("full").draw(0)
