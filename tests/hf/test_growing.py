"""The cache that grows in place gives what transformers' own gives, whatever happens to it in between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import foveal
from foveal.hf.growing import LEAST, GrowingLayer, growing_cache
from foveal.patterns import Dense, SlidingWindow

from .models import FAMILIES, fill


def build(name: str = "llama"):
    cls, config = FAMILIES[name].build()
    return fill(cls._from_config(config, attn_implementation="eager")).eval()


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


def feed(model, x: Tensor, cache, cuts: tuple[int, ...]) -> Tensor:
    with torch.inference_mode():
        return torch.cat(
            [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in x.split(cuts, 1)], 1
        )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("cuts", [(9, 1, 1, 1, 5), (1,) * 17])
def test_logits_equal_the_dynamic_caches(name, cuts):
    model, x = build(name), ids(2, 17)
    expected = feed(model, x, DynamicCache(config=model.config), cuts)
    assert torch.equal(feed(model, x, growing_cache(model), cuts), expected)


def test_new_tokens_are_written_in_place_until_the_buffer_is_full():
    model, cache = build(), None
    cache = growing_cache(model)
    feed(model, ids(1, 10), cache, (10,))
    place = cache.layers[0].keys.data_ptr()
    feed(model, ids(1, LEAST), cache, (1,) * LEAST)
    assert cache.layers[0].keys.data_ptr() == place and cache.get_seq_length() == 10 + LEAST
    feed(model, ids(1, 1), cache, (1,))
    assert cache.layers[0].keys.data_ptr() != place and cache.get_seq_length() == 11 + LEAST


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "copy", "reset"])
def test_what_changes_a_cache_changes_this_one_alike(change):
    model, x = build(), ids(3, 12)
    after = ids(3, 6, seed=1)
    logits = []
    for cache in (growing_cache(model), DynamicCache(config=model.config)):
        feed(model, x, cache, (10, 1, 1))
        kept, rows = cache, after
        if change == "crop":
            cache.crop(-4)
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([2, 0, 0]))
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            rows = after.repeat_interleave(2, 0)
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1]))
            rows = after[:1]
        elif change == "copy":
            kept = copy.deepcopy(cache)
            feed(model, ids(3, 2, seed=5), cache, (1, 1))  # the copy must not see this
        else:
            cache.reset()
        logits.append(feed(model, rows, kept, (1, 4, 1)))
    assert torch.equal(*logits)


def test_rows_that_a_copy_appends_do_not_reach_the_original():
    model, cache = build(), growing_cache(build())
    feed(model, ids(1, 8), cache, (8,))
    other = copy.deepcopy(cache)
    feed(model, ids(1, 1, seed=3), other, (1,))
    before = cache.layers[0].keys.clone()
    feed(model, ids(1, 1, seed=4), other, (1,))
    assert torch.equal(cache.layers[0].keys, before) and cache.get_seq_length() == 8


def test_gradients_through_the_cache_are_the_dynamic_caches():
    model, x = build().double(), ids(1, 9)
    found = []
    for cache in (growing_cache(model), DynamicCache(config=model.config)):
        first = model(input_ids=x[:, :6], past_key_values=cache, use_cache=True).logits
        second = model(input_ids=x[:, 6:], past_key_values=cache, use_cache=True).logits
        (first.sum() + second.square().sum()).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pattern", [None, Dense(), SlidingWindow(5, 1)], ids=str)
def test_generate(beams, pattern):
    model, x = build(), ids(2, 7)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    context = foveal.attach(model, pattern) if pattern is not None else torch.no_grad()
    with context:
        got = model.generate(x, past_key_values=growing_cache(model), **options)
        assert torch.equal(got, model.generate(x, **options))


def test_patterns_keep_their_state_over_the_steps():
    from .patterns import BlockSums

    model, x = build(), ids(1, 14)
    BlockSums.log.clear()
    with foveal.attach(model, BlockSums()):
        got = feed(model, x, growing_cache(model), (9, 1, 1, 1, 1, 1))
    assert BlockSums.log == ["rebuilt"] * 3 + ["continued"] * 15
    with foveal.attach(model, BlockSums()), torch.inference_mode():
        torch.testing.assert_close(got, model(input_ids=x).logits, atol=1e-5, rtol=1e-5)


def test_only_whole_layers_are_replaced():
    kinds = {type(layer) for layer in growing_cache(build("gemma3")).layers}
    assert GrowingLayer in kinds and len(kinds) == 2
