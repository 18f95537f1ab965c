"""Caches: whatever ``generate`` does to them, the result is that of one pass over the same tokens."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import transformers as hf
import transformers.masking_utils as host
from torch import Tensor

import foveal
from foveal.patterns import Dense, Pattern, SlidingWindow

from ..support import assert_close
from . import models
from .models import DECODERS, build, inputs, output, tokens
from .patterns import BlockSums
from .test_masks import NEWER

TOLERANCE = 5e-5
WINDOW = SlidingWindow(window=3, sinks=2)
patterns = pytest.mark.parametrize("pattern", [Dense(), WINDOW, BlockSums()], ids=str)
caches = pytest.mark.parametrize("kind", ["dynamic", "static"])
GENERATING = [(name, kind) for name in DECODERS for kind in ("dynamic", "static")]
if NEWER and "block_sequence_ids" not in inspect.signature(host.create_chunked_causal_mask).parameters:
    GENERATING.remove(("llama4", "static"))  # transformers 5.17 itself fails here, with any attention
generating = pytest.mark.parametrize(("name", "kind"), GENERATING)


def new_cache(kind: str, model: Any, length: int = 32) -> Any:
    config = model.config.get_text_config()
    return hf.StaticCache(config=config, max_cache_len=length) if kind == "static" else hf.DynamicCache(config=config)


def feed(model: Any, ids: Tensor, cache: Any, start: int = 0, **extra: Any) -> Tensor:
    """Logits of the next tokens of a request; ``start`` counts the tokens before."""
    if not NEWER:
        extra["cache_position"] = torch.arange(start, start + ids.shape[1])
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **extra).logits


def greedy(model: Any, ids: Tensor, steps: int = 9, **options: Any) -> Any:
    """Greedy tokens and the logits that chose them, of exactly ``steps`` steps."""
    options = {"do_sample": False, "num_beams": 1, "eos_token_id": None} | options
    return model.generate(ids, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True, **options)


def left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5], mask[2, :9] = 0, 0
    return ids, mask


# --- one pass, in pieces ----------------------------------------------------------------------------------------------


@caches
@patterns
@pytest.mark.parametrize("name", DECODERS)
def test_chunked_prefill_and_steps_equal_one_pass(name: str, pattern: Pattern, kind: str) -> None:
    if isinstance(pattern, BlockSums) and name in models.HYBRIDS:
        pattern = SlidingWindow(window=5)  # sums over a rolling cache are other sums
    model, ids = build(name), tokens(2, 26)
    with torch.no_grad(), foveal.attach(model, pattern):
        expected = model(input_ids=ids).logits
        cache = new_cache(kind, model)
        pieces = [feed(model, ids[:, a:b], cache, a) for a, b in itertools.pairwise((0, 3, 4, 9, 18, 24, 25, 26))]
    assert_close(torch.cat(pieces, 1), expected, TOLERANCE, f"{name}, {kind}")


def test_long_chunks_over_several_tiles_equal_one_pass() -> None:
    ids = tokens(1, 300)
    for name, kind in (("llama", "static"), ("gemma3", "dynamic"), ("gpt_oss", "static")):
        model = build(name)
        with torch.no_grad(), foveal.attach(model, SlidingWindow(window=40, sinks=3)):
            expected = model(input_ids=ids).logits
            cache = new_cache(kind, model, 310)
            pieces = [feed(model, ids[:, a:b], cache, a) for a, b in itertools.pairwise((0, 130, 140, 299, 300))]
        assert_close(torch.cat(pieces, 1), expected, TOLERANCE, name)


# --- generate ---------------------------------------------------------------------------------------------------------


@generating
def test_greedy_generation_with_dense_equals_eager(name: str, kind: str) -> None:
    model = build(name)
    ids, mask = left_padded()
    expected = greedy(model, ids, attention_mask=mask, cache_implementation=kind)
    with foveal.attach(model, Dense()):
        got = greedy(model, ids, attention_mask=mask, cache_implementation=kind)
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.logits), torch.stack(expected.logits), TOLERANCE, name)


@pytest.mark.parametrize("pattern", [WINDOW, BlockSums()], ids=str)
@generating
def test_left_padded_batches_generate_what_each_row_generates_alone(name: str, pattern: Pattern, kind: str) -> None:
    if isinstance(pattern, BlockSums):  # its blocks count padding, so compare with a run without a cache
        if name in models.HYBRIDS:
            pattern = SlidingWindow(window=4, sinks=1)
        else:
            return same_without_a_cache(name, pattern, kind)
    model = build(name)
    ids, mask = left_padded()
    with foveal.attach(model, pattern):
        got = greedy(model, ids, attention_mask=mask, cache_implementation=kind)
        for b in range(3):
            alone = greedy(model, ids[b : b + 1, int((mask[b] == 0).sum()) :], use_cache=False)
            assert torch.equal(got.sequences[b, 12:], alone.sequences[0, -9:]), f"row {b}"
            assert_close(torch.stack(got.logits)[:, b], torch.stack(alone.logits)[:, 0], TOLERANCE, f"row {b}")
    return None


def same_without_a_cache(name: str, pattern: Pattern, kind: str) -> None:
    model = build(name)
    ids, mask = left_padded()
    with foveal.attach(model, pattern):
        got = greedy(model, ids, attention_mask=mask, cache_implementation=kind)
        other = greedy(model, ids, attention_mask=mask, use_cache=False)
    assert torch.equal(got.sequences, other.sequences)
    assert_close(torch.stack(got.logits), torch.stack(other.logits), TOLERANCE, name)


@pytest.mark.parametrize("name", ["bart", "whisper", "gemma3_vision"])
def test_other_kinds_of_models_generate_what_eager_generates(name: str) -> None:
    model, given = build(name), inputs(name)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "num_beams": 1}
    expected = model.generate(**given, **options)
    with foveal.attach(model, Dense()):
        assert torch.equal(model.generate(**given, **options), expected)


def test_a_compiled_decoding_step_runs_through_graph_breaks() -> None:
    config = hf.CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    model, ids = build("llama"), tokens(2, 9)
    with foveal.attach(model, WINDOW):
        expected = greedy(model, ids, 4, cache_implementation="static", disable_compile=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        got = greedy(model, ids, 4, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    torch._dynamo.reset()
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.logits), torch.stack(expected.logits), TOLERANCE)


# --- state, and what happens to caches ------------------------------------------------------------------------------


@pytest.fixture
def log() -> list[str]:
    BlockSums.log.clear()
    return BlockSums.log


@caches
def test_state_is_carried_from_step_to_step(log: list[str], kind: str) -> None:
    model = build("llama")
    with foveal.attach(model, BlockSums()):
        greedy(model, tokens(2, 9), 6, cache_implementation=kind)
    assert log == ["rebuilt"] * models.LAYERS + ["continued"] * (5 * models.LAYERS)


@caches
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_beam_search_rebuilds_the_state_of_reordered_caches(log: list[str], name: str, kind: str) -> None:
    model, given = build(name), inputs(name, length=9)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "num_beams": 4,
        "num_return_sequences": 4,
        "cache_implementation": kind,
    }
    if name == "bart":
        given.pop("decoder_input_ids")
    with foveal.attach(model, BlockSums(remember=False)):
        expected = model.generate(**given, **options, return_dict_in_generate=True, output_scores=True)
    log.clear()
    with foveal.attach(model, BlockSums()):
        got = model.generate(**given, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.allclose(got.sequences_scores, expected.sequences_scores, atol=1e-5)
    assert "rebuilt" in log[models.LAYERS * 2 :]


@pytest.mark.parametrize("name", ["llama", "gemma3", "bart"])
def test_beam_search_with_dense_equals_eager(name: str) -> None:
    model, given = build(name), inputs(name, length=9)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 4}
    expected = model.generate(**given, **options)
    with foveal.attach(model, Dense()):
        assert torch.equal(model.generate(**given, **options), expected)


@patterns
def test_a_cropped_cache_goes_on_from_where_it_was_cropped(log: list[str], pattern: Pattern) -> None:
    model, ids = build("llama"), tokens(2, 20)
    with torch.no_grad(), foveal.attach(model, pattern):
        cache = new_cache("dynamic", model)
        feed(model, ids[:, :12], cache)
        wrong = tokens(2, 4, seed=9)
        for i in range(4):
            feed(model, wrong[:, i : i + 1], cache, 12 + i)
        cache.crop(-4)
        log.clear()
        got = torch.cat([feed(model, ids[:, i : i + 1], cache, i) for i in range(12, 20)], 1)
        assert_close(got, model(input_ids=ids).logits[:, 12:], TOLERANCE)
    if isinstance(pattern, BlockSums):
        assert log[: 2 * models.LAYERS] == ["rebuilt"] * models.LAYERS + ["continued"] * models.LAYERS


@patterns
def test_a_cache_cropped_back_to_an_earlier_length_that_state_was_kept_for(pattern: Pattern) -> None:
    model, ids = build("llama"), tokens(1, 14)
    with torch.no_grad(), foveal.attach(model, pattern):
        expected = model(input_ids=ids).logits[:, 13:]
        cache = new_cache("dynamic", model)
        feed(model, torch.cat([ids[:, :12], tokens(1, 1, seed=4)], 1), cache)  # 13 tokens, the last one wrong
        cache.crop(-1)
        feed(model, ids[:, 12:13], cache, 12)  # 13 tokens again
        assert_close(feed(model, ids[:, 13:], cache, 13), expected, TOLERANCE)


@patterns
def test_a_reset_static_cache_starts_anew(pattern: Pattern) -> None:
    model, ids = build("llama"), tokens(2, 12)
    with torch.no_grad(), foveal.attach(model, pattern):
        expected = model(input_ids=ids).logits
        cache = new_cache("static", model)
        feed(model, tokens(2, 12, seed=5), cache)
        cache.reset()
        got = [
            feed(model, ids[:, :10], cache),
            feed(model, ids[:, 10:11], cache, 10),
            feed(model, ids[:, 11:], cache, 11),
        ]
        assert_close(torch.cat(got, 1), expected, TOLERANCE)


@patterns
def test_repeated_and_selected_rows_of_a_cache(pattern: Pattern) -> None:
    model, ids = build("llama"), tokens(2, 14)
    with torch.no_grad(), foveal.attach(model, pattern):
        expected = model(input_ids=ids).logits
        cache = new_cache("dynamic", model)
        feed(model, ids[:, :11], cache)
        cache.batch_repeat_interleave(2)
        got = feed(model, ids[[0, 0, 1, 1], 11:12], cache, 11)
        assert_close(got, expected[[0, 0, 1, 1], 11:12], TOLERANCE)
        cache.batch_select_indices(torch.tensor([3, 0]))
        got = feed(model, ids[[1, 0], 12:13], cache, 12)
        assert_close(got, expected[[1, 0], 12:13], TOLERANCE)


@patterns
def test_two_requests_that_take_turns_keep_their_own_state(pattern: Pattern) -> None:
    model = build("llama")
    both = [tokens(1, 16, seed=s) for s in (1, 2)]
    with torch.no_grad(), foveal.attach(model, pattern):
        held = [new_cache("dynamic", model) for _ in both]
        got = [[feed(model, ids[:, :10], cache)] for ids, cache in zip(both, held, strict=True)]
        for i in range(10, 16):
            for ids, cache, out in zip(both, held, got, strict=True):
                out.append(feed(model, ids[:, i : i + 1], cache, i))
        for ids, out in zip(both, got, strict=True):
            assert_close(torch.cat(out, 1), model(input_ids=ids).logits, TOLERANCE)


@patterns
def test_a_prompt_processed_under_another_attention_continues(pattern: Pattern) -> None:
    model, ids = build("llama"), tokens(1, 16)
    with torch.no_grad():
        cache = new_cache("dynamic", model)
        feed(model, ids[:, :12], cache)
        stateless = new_cache("dynamic", model)
        feed(model, ids[:, :12], stateless)
        with foveal.attach(model, pattern):
            got = [feed(model, ids[:, i : i + 1], cache, i) for i in range(12, 16)]
        other = BlockSums(remember=False) if isinstance(pattern, BlockSums) else pattern
        with foveal.attach(model, other, impl="reference"):
            expected = [feed(model, ids[:, i : i + 1], stateless, i) for i in range(12, 16)]
    assert_close(torch.cat(got, 1), torch.cat(expected, 1), TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@patterns
def test_assisted_decoding_equals_greedy_decoding(name: str, pattern: Pattern) -> None:
    model, ids = build(name), tokens(1, 10).repeat(1, 2)
    assistant = models.fill(type(model)(model.config).eval(), seed=0)
    with torch.no_grad():  # an assistant that is sometimes right
        for p in assistant.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    options = {"max_new_tokens": 12, "do_sample": False}
    with foveal.attach(model, pattern):
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)
        looked_up = model.generate(ids, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(looked_up[:, : expected.shape[1]], expected)  # transformers 5.2 may add a token too many


def test_generation_under_nested_policies_returns_to_the_outer_one() -> None:
    model, ids = build("llama"), tokens(2, 9)
    with foveal.attach(model, WINDOW):
        expected = greedy(model, ids).sequences
        with foveal.attach(model, Dense()):
            dense = greedy(model, ids).sequences
        assert torch.equal(greedy(model, ids).sequences, expected)
    assert torch.equal(greedy(model, ids).sequences, dense)
    assert torch.equal(output(model, input_ids=ids), output(build("llama"), input_ids=ids))
