"""What is remembered per request, which rule runs where, and what is counted and shown on the way."""

from __future__ import annotations

import gc
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal
from foveal.core.density import Density
from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.hf import AttentionEvent
from foveal.hf.requests import RequestStates, cache_keys
from foveal.patterns import BlockTopK, Dense, Pattern, SlidingWindow, Triangle
from foveal.policies.policy import ModelStamp, Policy, Rule

from ..support import assert_close
from . import models
from .models import FAMILIES, build, inputs, output, tokens
from .test_generate import feed, greedy, new_cache

TOLERANCE = 5e-5


# --- the store --------------------------------------------------------------------------------------------------------


class Cache:
    """Stands in for a transformers cache of one layer."""

    def __init__(self, keys: Any) -> None:
        self.layers = [type("Layer", (), {"keys": keys})()]


def test_state_comes_back_while_keys_and_length_are_the_same() -> None:
    store, cache = RequestStates(), Cache(torch.zeros(1, 1, 4, 2))
    store.put(cache, (0, 0), "state", 4, cache_keys(cache, 0))
    assert store.get(cache, (0, 0), 4, cache_keys(cache, 0)) == "state"
    assert store.get(cache, (1, 0), 4, cache_keys(cache, 0)) is None, "another layer"
    assert store.get(cache, (0, 1), 4, cache_keys(cache, 0)) is None, "other heads"
    assert store.get(cache, (0, 0), 3, cache_keys(cache, 0)) is None, "another length"
    assert store.get(Cache(cache.layers[0].keys), (0, 0), 4, cache_keys(cache, 0)) is None, "another request"
    assert store.get(None, (0, 0), 4, None) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "keys", layer.keys.index_select(0, torch.tensor([0]))),
        lambda layer: setattr(layer, "keys", layer.keys[:, :, :4]),
        lambda layer: layer.keys.zero_(),
        lambda layer: layer.keys.copy_(layer.keys.flip(0)),
    ],
    ids=["reordered", "cut", "zeroed", "written"],
)
def test_state_is_gone_when_the_keys_changed_hands(change: Any) -> None:
    store, cache = RequestStates(), Cache(torch.zeros(2, 1, 4, 2))
    store.put(cache, (0, 0), "state", 4, cache_keys(cache, 0))
    change(cache.layers[0])
    assert store.get(cache, (0, 0), 4, cache_keys(cache, 0)) is None


def test_nothing_is_remembered_for_caches_that_do_not_show_their_keys() -> None:
    class Opaque:
        pass

    store, cache = RequestStates(), Opaque()
    store.put(cache, (0, 0), "state", 4, cache_keys(cache, 0))
    assert store.get(cache, (0, 0), 4, cache_keys(cache, 0)) is None
    assert cache_keys(Cache(None), 0) is None
    assert cache_keys(Cache(torch.zeros(1)), 5) is None
    assert cache_keys(Cache(torch.zeros(1)), None) is None
    assert cache_keys(None, 0) is None


def test_state_goes_with_its_cache() -> None:
    store, cache = RequestStates(), Cache(torch.zeros(1, 1, 4, 2))
    store.put(cache, (0, 0), "state", 4, cache_keys(cache, 0))
    del cache
    gc.collect()
    assert len(store._store) == 0


def test_state_goes_with_its_cache_in_a_model_too() -> None:
    from .patterns import BlockSums

    model = build("llama")
    with torch.no_grad(), foveal.attach(model, BlockSums()) as handle:
        greedy(model, tokens(1, 6), 3)
        cache = new_cache("dynamic", model)
        feed(model, tokens(1, 6), cache)
        gc.collect()
        assert len(handle.requests._store) == 1
        del cache
        gc.collect()
        assert len(handle.requests._store) == 0


# --- which rule runs where ------------------------------------------------------------------------------------------


def events(model: Any, policy: Any, given: dict[str, Any] | None = None, **options: Any) -> list[AttentionEvent]:
    seen: list[AttentionEvent] = []
    with torch.no_grad(), foveal.attach(model, policy, probes=[seen.append], **options):
        output(model, **(given or {"input_ids": tokens(2, 12)}))
    return seen


def kept(event: AttentionEvent) -> int:
    """Keys that the last row keeps."""
    if event.layout is None:
        return event.call.base.kv_len
    return foveal.core.density.measure(event.layout, event.call.base, 1, 1).pairs


def test_every_layer_follows_its_own_rule() -> None:
    policy = Policy(layers=((0, Rule(SlidingWindow(window=2))), (2, Rule(SlidingWindow(window=5)))))
    seen = events(build("llama"), policy)
    assert [e.layout is None for e in seen] == [False, True, False]
    assert [kept(e) for e in seen] == [2 * 12 - 1, 12, 5 * 12 - 10]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "bert", "gpt2"])
@pytest.mark.parametrize("span", [(0, 0), (1, 2), (2, 3), (0, 3)], ids=str)
def test_heads_of_a_layer_follow_their_own_rules(name: str, span: tuple[int, int]) -> None:
    model, given = build(name), inputs(name, length=12)
    window = SlidingWindow(window=2, sinks=1)
    every = next(e.out for e in events(model, Policy(layers=((0, Rule(window)),)), given))
    none = next(e.out for e in events(model, Policy(), given))
    mixed = next(e.out for e in events(model, Policy(layers=((0, Rule(heads=((*span, Rule(window)),))),)), given))
    for head in range(models.HEADS):
        inside = span[0] <= head <= span[1]
        assert_close(mixed[:, head], (every if inside else none)[:, head], TOLERANCE, f"head {head}")
        assert (every - none)[:, head].abs().max() > 1e-3


def test_prefill_and_decode_have_their_own_patterns() -> None:
    model, ids, widths = build("llama"), tokens(1, 12), []
    policy = Policy.uniform(SlidingWindow(window=6), decode=SlidingWindow(window=2))
    with (
        torch.no_grad(),
        foveal.attach(model, policy, probes=[lambda e: widths.append(kept(e) if e.call.base.q_len == 1 else -kept(e))]),
    ):
        cache = new_cache("dynamic", model)
        feed(model, ids[:, :10], cache)
        feed(model, ids[:, 10:11], cache, 10)
        feed(model, ids[:, 11:], cache, 11)
    assert widths == [-45] * 3 + [2] * 6


def test_the_single_token_of_a_prompt_is_prefill() -> None:
    model = build("llama")
    seen = events(model, Policy.uniform(Dense(), decode=SlidingWindow(window=1)), {"input_ids": tokens(1, 1)})
    assert all(e.layout is None for e in seen)


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_cross_attention_stays_dense(name: str) -> None:
    seen = events(build(name), SlidingWindow(window=2), inputs(name))
    assert all((e.layout is None) == (e.role == "cross") for e in seen)
    assert {e.layer_index for e in seen if e.role == "cross"} == {-1}


def test_patterns_see_what_the_context_promises() -> None:
    told: list[Any] = []

    class Spy(Dense):
        def select(self, q: Tensor, k: Tensor, ctx: Any, state: Any = None) -> Any:
            told.append((ctx, q.shape, k.shape, torch.is_grad_enabled()))
            return super().select(q, k, ctx, state)

    model, ids = build("llama"), tokens(2, 12)
    with foveal.attach(model, Spy()):
        cache = new_cache("static", model)
        feed(model, ids[:, :8], cache)
        feed(model, ids[:, 8:], cache, 8)
    ctx, q, k, grad = told[4]
    assert (ctx.layer_index, ctx.layer_name, ctx.num_layers, ctx.role) == (1, "model.layers.1.self_attn", 3, "self")
    assert (ctx.q_offset, ctx.base.shift, ctx.base.q_len, ctx.base.kv_len) == (8, 8, 4, 12)
    assert (q, k) == ((2, 4, 4, 8), (2, 2, 12, 8)), "the unwritten end of a static cache is cut off"
    assert ctx.hidden_states.shape == (2, 4, models.HIDDEN)
    assert ctx.positions.tolist()[0] == [8, 9, 10, 11]
    assert ctx.scale == pytest.approx(8**-0.5)
    assert list(ctx.earlier) == [0, 1, 2]
    assert not grad


def test_later_layers_see_what_earlier_ones_selected_in_this_forward_only() -> None:
    known: list[list[int]] = []

    class Spy(SlidingWindow):
        def select(self, q: Tensor, k: Tensor, ctx: Any, state: Any = None) -> Any:
            known.append(list(ctx.earlier))
            assert all(s.layout is not None for s in ctx.earlier.values())
            return super().select(q, k, ctx, state)

    model = build("llama")
    with torch.no_grad(), foveal.attach(model, Spy(window=2)):
        for _ in range(2):
            output(model, input_ids=tokens(1, 12))
    assert known == [[], [0], [0, 1]] * 2


def test_a_pattern_that_needs_what_the_host_does_not_say_is_refused() -> None:
    class Wants(Dense):
        registered_name = "test_wants"
        needs = frozenset({"pre_rope_q"})

    with (
        foveal.attach(build("gpt2"), Wants()) as handle,  # one projection for queries, keys and values
        pytest.raises(UnsupportedError, match="'test_wants' needs pre_rope_q"),
    ):
        handle.model(**inputs("gpt2"))

    class Hidden(Wants):
        needs = frozenset({"hidden_states"})

    with foveal.attach(build("llama"), Hidden()) as handle:
        handle.model(**inputs("llama"))


def test_two_threads_in_one_model_do_not_see_each_other() -> None:
    """One thread stops in the middle of its forward while the other runs a whole one."""
    model, turns = build("llama"), [threading.Event(), threading.Event()]
    known: dict[str, list[list[int]]] = {"stops": [], "runs": []}

    class Spy(SlidingWindow):
        def select(self, q: Tensor, k: Tensor, ctx: Any, state: Any = None) -> Any:
            name = threading.current_thread().name
            known[name].append(list(ctx.earlier))
            if name == "stops" and ctx.layer_index == 1:
                turns[0].set()
                turns[1].wait()
            return super().select(q, k, ctx, state)

    ids = {"stops": tokens(1, 12), "runs": tokens(2, 7, seed=1)}
    with torch.no_grad(), foveal.attach(model, SlidingWindow(window=2)):
        expected = {name: output(model, input_ids=x) for name, x in ids.items()}
    got: dict[str, Tensor] = {}

    def work(name: str) -> None:
        try:
            with torch.no_grad():
                if name == "runs":
                    turns[0].wait()
                got[name] = output(model, input_ids=ids[name])
        finally:
            for turn in turns[name == "runs" :]:
                turn.set()

    with foveal.attach(model, Spy(window=2)):
        threads = [threading.Thread(target=work, args=(name,), name=name) for name in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in ids:
        assert torch.equal(got[name], expected[name])
        assert known[name] == [[], [0], [0, 1]]


# --- policies that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Policy(layers=((3, Rule()),)), r"names layer 3, but the model has 3 self-attention layers \(0 to 2\)"),
        (Policy(model=ModelStamp(layers=30)), "made for 30 layers and this model has 3"),
        (
            Policy(model=ModelStamp(architecture="Qwen2ForCausalLM")),
            "made for Qwen2ForCausalLM and this model is LlamaForCausalLM",
        ),
    ],
)
def test_a_policy_for_another_model_is_refused(policy: Policy, why: str) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match=why):
        foveal.attach(model, policy)
    assert model.config._attn_implementation == "eager"


def test_a_policy_for_heads_that_are_not_there_is_refused() -> None:
    policy = Policy(layers=((1, Rule(heads=((2, 4, Rule()),))),))
    model = build("llama")
    with (
        foveal.attach(model, policy),
        pytest.raises(ShapeError, match=r"names head 4 of layer 1, which has 4 heads \(0 to 3\)"),
    ):
        model(**inputs("llama"))


def test_a_policy_measured_in_another_dtype_warns() -> None:
    model = build("llama")
    with pytest.warns(UserWarning, match=r"measured in bfloat16 and the model runs in float32"):
        foveal.attach(model, Policy(dtype="bfloat16")).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foveal.attach(model, Policy(dtype="float32", model=ModelStamp("LlamaForCausalLM", 3))).detach()


# --- what is counted and shown ----------------------------------------------------------------------------------------

MEASURED: list[Pattern] = [Dense(), SlidingWindow(window=3, sinks=1), Triangle(window=2, sinks=1, dense_rows=4)]


@pytest.mark.parametrize("pattern", MEASURED, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "bart", "albert"])
def test_measured_densities_equal_counted_ones(name: str, pattern: Pattern) -> None:
    model, given = build(name), inputs(name, length=20)
    counted: dict[int, list[int]] = {}

    def count(event: AttentionEvent) -> None:
        if event.role != "self":
            return
        base, kind = event.call.base, event.layout
        batch, heads = event.call.q.shape[:2]
        allowed = base.dense(batch)
        rows, keys = torch.arange(base.q_len)[:, None], torch.arange(base.kv_len)[None, :]
        seen = allowed
        if kind is not None:
            seen = allowed & torch.stack(
                [kind.mask_mod(torch.tensor(b), torch.tensor(0), rows, keys) for b in range(batch)]
            )
        had = counted.setdefault(event.layer_index, [0, 0])
        had[0] += int(seen.sum()) * heads
        had[1] += int(allowed.sum()) * heads

    with torch.no_grad(), foveal.attach(model, pattern, measure=True, probes=[count]) as handle:
        output(model, **given)
        output(model, **given)
    got = handle.densities()
    assert {i: [d.pairs, d.allowed] for i, d in got.items()} == counted
    assert sorted(got) == list(range(FAMILIES[name].layers))
    assert handle.density().density == pytest.approx(
        sum(p for p, _ in counted.values()) / sum(a for _, a in counted.values())
    )
    assert (handle.density().density == 1.0) == isinstance(pattern, Dense)


def test_prefill_and_decode_are_counted_apart_and_head_spans_together() -> None:
    model = build("llama")
    policy = Policy(Rule(Dense(), heads=((0, 1, Rule(SlidingWindow(window=1))),)))
    with torch.no_grad(), foveal.attach(model, policy, measure=True) as handle:
        greedy(model, tokens(2, 10), 3)
    prefill, decode = handle.density("prefill"), handle.density("decode")
    assert (prefill.pairs, prefill.allowed) == (3 * 2 * (2 * 10 + 2 * 55), 3 * 2 * 4 * 55)
    assert (decode.pairs, decode.allowed) == (3 * 2 * (2 * 2 + 2 * (11 + 12)), 3 * 2 * 4 * (11 + 12))


def test_densities_are_there_only_when_asked_for() -> None:
    with foveal.attach(build("llama"), Dense()) as handle, pytest.raises(ConfigError, match="measure=True"):
        handle.densities()
    with foveal.attach(build("llama"), Dense(), measure=True) as handle:
        assert handle.densities() == {}
        assert handle.density() == Density(0, 0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "bert", "vit"])
def test_probes_see_the_tensors_that_make_the_output(name: str) -> None:
    for event in events(build(name), Dense(), inputs(name)):
        q, k, v = event.call.q.double(), event.call.k.double(), event.call.v.double()
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        logits = q @ k.mT * event.call.scale
        if event.call.softcap:
            logits = torch.tanh(logits / event.call.softcap) * event.call.softcap
        logits = logits.masked_fill(~event.call.base.dense(q.shape[0])[:, None], -torch.inf)
        if event.sink_logits is not None:
            sink = event.sink_logits.double()[None, :, None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], -1)
        weights = logits.softmax(-1)[..., : k.shape[2]]
        assert_close(event.out.double(), weights @ v, TOLERANCE, name)


def test_a_probe_for_one_block_of_code() -> None:
    model, seen = build("llama"), []
    with torch.no_grad(), foveal.attach(model, SlidingWindow(window=2)) as handle:
        with handle.probing(seen.append):
            output(model, **inputs("llama"))
        output(model, **inputs("llama"))
    assert len(seen) == 3
    assert isinstance(seen[0], AttentionEvent)
    assert (seen[1].layer_index, seen[1].layer_name, seen[1].role) == (1, "model.layers.1.self_attn", "self")


def test_a_selection_that_depends_on_the_tensors_runs_in_prefill_and_decode() -> None:
    from foveal.core.budget import Budget

    pattern = BlockTopK(Budget(tokens=16), q_block=8, kv_block=8)
    model, ids = build("llama"), tokens(2, 40)
    with torch.no_grad(), foveal.attach(model, pattern, measure=True) as handle:
        got = greedy(model, ids, 4, attention_mask=torch.ones_like(ids))
        assert 0.2 < handle.density("prefill").density < 0.9
        assert 0.2 < handle.density("decode").density < 0.9
    with torch.no_grad(), foveal.attach(model, pattern, impl="reference"):
        expected = greedy(model, ids, 4, attention_mask=torch.ones_like(ids))
    assert torch.equal(got.sequences, expected.sequences)
