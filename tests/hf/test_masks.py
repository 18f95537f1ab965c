"""The mask that foveal reads from transformers is the mask that transformers would have built, in O(N) numbers."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.masking_utils as host
from torch import Tensor

import foveal
from foveal.core.errors import UnsupportedError
from foveal.hf.masks import HostMask, base_from_tensor, build_base, mask_function_for_host
from foveal.hf.structure import read_structure
from foveal.patterns import Dense, SlidingWindow

from ..support import assert_close
from . import models
from .models import DECODERS, FAMILIES, build, output, tokens

TOLERANCE = 5e-5
NEWER = "q_length" in inspect.signature(host.sdpa_mask).parameters  # transformers 5.17 and later


def positions(q_len: int, q_offset: int) -> dict[str, Any]:
    """How this version of transformers is told where the queries are."""
    return {"q_length": q_len, "q_offset": q_offset} if NEWER else {"cache_position": torch.arange(q_len) + q_offset}


def theirs(q_len: int, kv_len: int, q_offset: int, kv_offset: int, fn: Callable[..., Any], padding: Tensor | None, batch: int, scalar: bool) -> Tensor:  # fmt: skip
    """``(B, Nq, Nk)`` bool, built by transformers."""
    mask = host.sdpa_mask(
        batch_size=batch, kv_length=kv_len, kv_offset=kv_offset, mask_function=fn, attention_mask=padding,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=scalar, **positions(q_len, q_offset),
    )  # fmt: skip
    return mask[:, 0].expand(batch, q_len, kv_len)


def documents(*lengths: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def packed(fn: Callable[..., Any], numbers: Tensor) -> Callable[..., Any]:
    """As ``create_causal_mask`` composes it in this version."""
    if not hasattr(host, "packed_sequence_compatibility_function"):
        return host.and_masks(fn, host.packed_sequence_mask_function(numbers))
    firsts = torch.searchsorted(numbers[0].contiguous(), numbers[0].contiguous())
    ids = (torch.arange(numbers.shape[1]) - firsts)[None].expand(numbers.shape[0], -1)
    return host.packed_sequence_compatibility_function(fn, ids, numbers)


def image_block(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= 3) & (q < 7) & (k >= 3) & (k < 7)


TREES: dict[str, tuple[Callable[..., Any], bool]] = {
    "causal": (host.causal_mask_function, False),
    "window": (host.sliding_window_causal_mask_function(5), False),
    "window of one": (host.sliding_window_causal_mask_function(1), False),
    "both directions": (host.bidirectional_mask_function, False),
    "window, both directions": (host.sliding_window_bidirectional_mask_function(3), False),
    "chunks": (host.chunked_causal_mask_function(6, torch.tensor([0, 4])), False),
    "causal or image": (host.or_masks(host.causal_mask_function, image_block), False),
    "causal or image, one by one": (host.or_masks(host.causal_mask_function, image_block), True),
    "causal and not image": (host.and_masks(host.causal_mask_function, lambda b, h, q, k: q - k != 2), False),
    "window and padding": (
        host.and_masks(
            host.sliding_window_causal_mask_function(5),
            host.padding_mask_function(torch.arange(99)[None].repeat(2, 1) > 2),
        ),
        False,
    ),
}
PLACES = [(12, 12, 0, 0), (4, 12, 8, 0), (1, 12, 11, 0), (4, 20, 8, 0), (1, 20, 8, 0), (3, 9, 14, 8), (1, 7, 15, 9)]
"""(q_len, kv_len, q_offset, kv_offset): a prefill, a chunk, a step; static caches; rolling caches."""


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_every_tree_of_mask_functions_is_read_exactly(
    tree: str, place: tuple[int, int, int, int], padding: str
) -> None:
    q_len, kv_len, q_offset, kv_offset = place
    fn, scalar = TREES[tree]
    pads = None
    if padding != "none":
        pads = torch.ones(2, q_offset + q_len, dtype=torch.bool)
        pads[1, : min(4, q_offset + q_len - 1)] = False
        pads = pads if padding == "left" else pads.flip(1)
    expected = theirs(q_len, kv_len, q_offset, kv_offset, fn, pads, 2, scalar)
    base = build_base(q_len, kv_len, q_offset, kv_offset, fn, pads, "cpu", scalar)
    assert torch.equal(base.dense(2), expected)


@pytest.mark.parametrize(
    "fn", [host.causal_mask_function, host.sliding_window_causal_mask_function(3)], ids=["causal", "window"]
)
def test_packed_documents_are_read_exactly(fn: Callable[..., Any]) -> None:
    numbers = torch.cat([documents(5, 1, 6), documents(2, 8, 2)])
    for rows in (numbers[:1], numbers[1:]):
        tree = packed(fn, rows)
        base = build_base(12, 12, 0, 0, tree, None, "cpu")
        assert torch.equal(base.dense(1), theirs(12, 12, 0, 0, tree, None, 1, False))
        assert base.predicate is None, "packing has a closed form"
        assert base.rank[0].tolist() == [i for n in rows.unique() for i in range(int((rows == n).sum()))]


def test_known_trees_need_no_predicate() -> None:
    closed = [name for name, (fn, _) in TREES.items() if not read_structure(fn).opaque]
    assert closed == [
        "causal",
        "window",
        "window of one",
        "both directions",
        "window, both directions",
        "chunks",
        "window and padding",
    ]


def test_an_unknown_function_is_kept_as_it_is() -> None:
    def odd(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q + k) % 2 == 0

    assert torch.equal(build_base(6, 6, 0, 0, odd, None, "cpu").dense(1), theirs(6, 6, 0, 0, odd, None, 1, False))


def test_ranks_count_real_tokens_also_in_a_rolling_cache() -> None:
    pads = torch.ones(3, 12, dtype=torch.bool)
    pads[1, :4] = False
    pads[2, :9] = False
    for kv_offset in (0, 3, 8):
        base = build_base(1, 12 - kv_offset, 11, kv_offset, host.sliding_window_causal_mask_function(9), pads, "cpu")
        for b, left in enumerate((0, 4, 9)):
            expected = [j - left for j in range(kv_offset, 12)]
            real = [j >= left for j in range(kv_offset, 12)]
            assert [r for r, ok in zip(base.rank[b].tolist(), real, strict=True) if ok] == [
                e for e in expected if e >= 0
            ]


# --- the object that stands in for the mask ------------------------------------------------------------------------


def make(kv_len: int = 12, q_len: int = 12, batch: int = 2, **extra: Any) -> HostMask:
    arguments = {
        "batch_size": batch,
        "kv_length": kv_len,
        "mask_function": host.causal_mask_function,
        "dtype": torch.float32,
    }
    return mask_function_for_host(lambda: None)(**arguments, **positions(q_len, kv_len - q_len), **extra)


def test_no_mask_of_n_by_n_is_ever_built() -> None:
    n = 131072
    pads = torch.ones(2, n, dtype=torch.bool)
    pads[1, :7] = False
    mask = make(n, n, attention_mask=pads)
    assert mask.shape == (2, 1, n, n)
    with torch._C.DisableTorchFunctionSubclass():
        assert mask.untyped_storage().nbytes() == 1
    base = mask.base
    stored = sum(t.numel() * t.element_size() for t in (base.lo, base.hi, base.rank, base.valid) if t is not None)
    assert stored < 64 * n
    assert int(base.area()[0]) == n * (n + 1) // 2
    assert int(base.area()[1]) == (n - 7) * (n - 6) // 2


def test_the_host_mask_looks_like_a_tensor_to_generate() -> None:
    mask = make()
    assert isinstance(mask, Tensor)
    assert len(mask.shape) == 4
    assert mask.contiguous() is mask
    assert mask.to("cpu") is mask
    assert mask.detach() is mask
    assert mask.dim() == 4
    assert mask.dtype == torch.bool
    cut = mask[:, :, :, :9]
    assert cut.shape == (2, 1, 12, 9)
    assert torch.equal(cut.base.dense(2), mask.base.dense(2)[:, :, :9])
    assert torch.equal(cut.rebuild("eager")[:, 0] == 0, mask.base.dense(2)[:, :, :9])
    assert cut.rebuild("sdpa") is None, "sdpa relies on is_causal here"
    assert mask[:, :, :, :12] is mask


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m + 1.0,
        lambda m: ~m,
        lambda m: m.float(),
        lambda m: torch.where(m, 0.0, 1.0),
        lambda m: m.mT,
        lambda m: m.data,
        lambda m: m.clone(),
    ],
)
def test_arithmetic_on_the_host_mask_is_refused(use: Callable[[Tensor], Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"an attention that is not foveal's received foveal's mask"):
        use(make())


@pytest.mark.parametrize("index", [0, (slice(None), 0), (slice(None), slice(None), slice(2, 4)), (..., slice(0, 3))])
def test_other_cuts_of_the_host_mask_are_refused(index: Any) -> None:
    with pytest.raises(UnsupportedError, match="indexes its attention mask with"):
        make()[index]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_mask_that_another_implementation_would_have_received(implementation: str) -> None:
    pads = torch.ones(2, 12, dtype=torch.bool)
    pads[1, :3] = False
    mask = make(attention_mask=pads).rebuild(implementation)
    kept = mask == 0 if implementation == "eager" else mask
    assert torch.equal(kept[:, 0], theirs(12, 12, 0, 0, host.causal_mask_function, pads, 2, False))


# --- padding --------------------------------------------------------------------------------------------------------


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """``(ids, attention_mask)`` of rows with these lengths."""
    width = max(lengths)
    ids, mask = tokens(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.long)
    for b, n in enumerate(lengths):
        mask[b, width - n :] = 1
    return (ids, mask) if side == "left" else (ids, mask.flip(1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, "bert", "albert", "modernbert", "bart"])
def test_padding_is_honoured_as_eager_honours_it(name: str, side: str) -> None:
    model = build(name)
    ids, mask = padded([24, 11, 18], side)
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "bart":
        given |= {"decoder_input_ids": tokens(3, 9)}
        real = torch.ones(3, 9, dtype=torch.bool)
    else:
        real = mask.bool()
    with torch.no_grad():
        expected = output(model, **given)
        with foveal.attach(model, Dense()):
            got = output(model, **given)
    assert_close(got[real], expected[real], TOLERANCE, name)
    if side == "left" or FAMILIES[name].kind != "decoder":
        unmasked = output(model, **given | {"attention_mask": torch.ones_like(mask)})
        assert (unmasked[real] - expected[real]).abs().max() > 0.01, "this padding hides nothing"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "bert"])
def test_padded_rows_equal_the_rows_alone_under_a_pattern(name: str, side: str) -> None:
    model, lengths = build(name), [24, 11, 18]
    ids, mask = padded(lengths, side)
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), foveal.attach(model, SlidingWindow(window=3, sinks=2)):
        got = output(model, input_ids=ids, attention_mask=mask, position_ids=where)
        for b in range(3):
            alone = output(model, input_ids=ids[b][mask[b].bool()][None])
            assert_close(got[b][mask[b].bool()], alone[0], TOLERANCE, f"row {b}")


# --- packed documents -------------------------------------------------------------------------------------------------


HONOURING = [n for n in DECODERS if n not in ("opt", "gpt_oss", "llama4")]
"""Families that tell transformers' mask function their position_ids, so that packed documents do not see each other."""
if hasattr(host, "remap_positions_for_packed_sequence"):  # before, chunks did not begin anew with a document
    HONOURING += ["llama4"]


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_are_honoured_exactly_where_eager_honours_them(name: str) -> None:
    model, given = build(name), packed_inputs((9, 1, 14)) | {"use_cache": False}
    with torch.no_grad():
        expected = output(model, **given)
        with foveal.attach(model, Dense()):
            assert_close(output(model, **given), expected, TOLERANCE, name)
        leaks = (output(model, input_ids=given["input_ids"][:, 10:]) - expected[:, 10:]).abs().max() > 0.1
    assert leaks == (name not in HONOURING)


def packed_inputs(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    return {"input_ids": tokens(1, sum(lengths)), "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


@pytest.mark.parametrize("pattern", [Dense(), SlidingWindow(window=3, sinks=2)], ids=str)
@pytest.mark.parametrize("name", HONOURING)
def test_packed_documents_equal_separate_ones_without_a_cache(name: str, pattern: Any) -> None:
    model, lengths = build(name), (9, 1, 14)
    given = packed_inputs(lengths)
    with torch.no_grad(), foveal.attach(model, pattern):
        got = output(model, **given, use_cache=False)[0].split(lengths)
        parts = given["input_ids"][0].split(lengths)
        for n, (logits, ids) in enumerate(zip(got, parts, strict=True)):
            assert_close(logits, output(model, input_ids=ids[None])[0], TOLERANCE, f"document {n}")


@pytest.mark.parametrize("lengths", [(9, 14), (1, 1, 5)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3", "gpt_oss"])
def test_packed_documents_with_a_cache_are_refused_and_the_way_out_is_named(
    name: str, lengths: tuple[int, ...]
) -> None:
    model, given = build(name), packed_inputs(lengths)
    with torch.no_grad(), foveal.attach(model, Dense()), pytest.raises(UnsupportedError, match=r"Pass use_cache=False"):
        model(**given)


# --- the caller's own 4-D mask ----------------------------------------------------------------------------------------


def own_mask(kind: str, length: int = 12) -> Tensor:
    keep = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(3)) < 0.6
    keep |= torch.eye(length, dtype=torch.bool)
    keep = keep.tril()
    if kind == "bool":
        return keep
    low = -torch.inf if kind == "inf" else torch.finfo(torch.float32).min
    return torch.zeros(keep.shape).masked_fill(~keep, low)


@pytest.mark.parametrize("kind", ["bool", "inf", "min"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_a_four_dimensional_mask_of_the_callers_is_honoured(name: str, kind: str) -> None:
    model, ids = build(name), tokens(2, 12)
    with torch.no_grad():
        expected = output(model, input_ids=ids, attention_mask=own_mask("inf"))
        with foveal.attach(model, Dense()):
            got = output(model, input_ids=ids, attention_mask=own_mask(kind))
    assert_close(got, expected, TOLERANCE, kind)


def test_a_four_dimensional_mask_per_head_is_honoured_when_the_heads_agree() -> None:
    model, ids, mask = build("llama"), tokens(2, 12), own_mask("bool").expand(2, models.HEADS, 12, 12).clone()
    with torch.no_grad(), foveal.attach(model, Dense()):
        got = output(model, input_ids=ids, attention_mask=mask)
        assert torch.equal(got, output(model, input_ids=ids, attention_mask=own_mask("bool")))
        mask[0, 1, 5, 2] ^= True
        with pytest.raises(UnsupportedError, match="differs between its 4 heads"):
            model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("number", [-1.0, 3.0, -10000.0, torch.nan])
def test_a_mask_that_adds_other_numbers_is_refused(number: float) -> None:
    mask = own_mask("inf")
    mask[1, 0, 7, 2] = number
    with (
        foveal.attach(build("llama"), Dense()) as handle,
        pytest.raises(UnsupportedError, match="adds numbers other than 0 and"),
    ):
        handle.model(input_ids=tokens(2, 12), attention_mask=mask)


def test_a_four_dimensional_mask_of_the_wrong_shape_is_refused() -> None:
    with (
        foveal.attach(build("llama"), Dense()) as handle,
        pytest.raises(UnsupportedError, match=r"expected \(batch, 1 or heads, 12, 12\)"),
    ):
        handle.model(input_ids=tokens(2, 12), attention_mask=own_mask("bool", 9))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_patterns_know_their_position_under_a_four_dimensional_mask(cache: str) -> None:
    from transformers import DynamicCache, StaticCache

    model, ids = build("llama"), tokens(1, 20)
    width = 32 if cache == "static" else 20
    causal = torch.ones(1, 1, 20, width, dtype=torch.bool).tril()
    with torch.no_grad(), foveal.attach(model, SlidingWindow(window=3, sinks=1)):
        expected = output(model, input_ids=ids)
        past = (
            StaticCache(config=model.config, max_cache_len=width)
            if cache == "static"
            else DynamicCache(config=model.config)
        )
        got = []
        for first, last in itertools.pairwise((0, 12, 17, 18, 19, 20)):
            keys = width if cache == "static" else last
            rows = causal[:, :, first:last, :keys]
            extra = {} if NEWER else {"cache_position": torch.arange(first, last)}
            where = torch.arange(first, last)[None]
            got.append(
                output(
                    model,
                    input_ids=ids[:, first:last],
                    attention_mask=rows,
                    past_key_values=past,
                    position_ids=where,
                    **extra,
                )
            )
    assert_close(torch.cat(got, 1), expected, TOLERANCE, cache)


def test_a_four_dimensional_mask_is_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    import foveal.hf.forward as forward

    reads: list[Any] = []
    monkeypatch.setattr(forward, "base_from_tensor", lambda *a: reads.append(a) or base_from_tensor(*a))
    with torch.no_grad(), foveal.attach(build("llama"), Dense()) as handle:
        output(handle.model, input_ids=tokens(2, 12), attention_mask=own_mask("bool"))
    assert len(reads) == 1


def test_a_four_dimensional_mask_in_inference_mode_and_after_the_forward() -> None:
    model, ids = build("llama"), tokens(2, 12)
    with torch.inference_mode(), foveal.attach(model, Dense()) as handle:
        got = output(model, input_ids=ids, attention_mask=own_mask("bool"))
        assert not handle.live.forward.tensors, "the mask is let go"
    with torch.no_grad(), foveal.attach(model, Dense()):
        assert torch.equal(got.clone(), output(model, input_ids=ids, attention_mask=own_mask("bool")))


def test_a_mask_object_of_another_kind_is_refused() -> None:
    class Plain:
        shape = (1, 1, 12, 12)

    model = build("llama")
    attention = model.model.layers[0].self_attn
    x, turn = torch.zeros(1, 12, models.HIDDEN), (torch.ones(1, 12, 8), torch.zeros(1, 12, 8))
    with (
        foveal.attach(model, Dense()),
        pytest.raises(UnsupportedError, match="attention_mask is a Plain; expected foveal's own mask"),
    ):
        attention(x, turn, Plain())


def test_no_mask_means_causal_only_when_the_module_says_so() -> None:
    model = build("llama")
    attention = model.model.layers[0].self_attn
    make = torch.Generator().manual_seed(0)
    x, turn = torch.randn(1, 12, models.HIDDEN, generator=make), (torch.ones(1, 12, 8), torch.zeros(1, 12, 8))
    with torch.no_grad(), foveal.attach(model, Dense()):
        causal = attention(x, turn, None)[0]
        first = attention(x[:, :5], turn_cut(turn, 5), None)[0]
        assert_close(causal[:, :5], first, TOLERANCE)
        attention.is_causal = False
        both = attention(x, turn, None)[0]
        assert (both[:, :5] - first).abs().max() > 0.01
        assert torch.equal(attention(x, turn, None, is_causal=True)[0], causal)


def turn_cut(turn: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
    return turn[0][:, :n], turn[1][:, :n]
