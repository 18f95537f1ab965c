"""Kinetics: the cost of decoding against published figures, sums term by term, and the identities of the law."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveal.core.errors import ConfigError, ModelError
from foveal.policies.kinetics import (
    DENSE,
    HARDWARE,
    MODELS,
    Hardware,
    Method,
    ModelShape,
    block_methods,
    crossover,
    decode_cost,
    exact_visits,
    token_methods,
    visits,
)  # fmt: skip
from foveal.policies.kinetics_config import hardware_of, shape_of

SMALL = ModelShape("small", 1e6, 3, 8, 2, 16)
TOP, BLOCK = Method("topk", budget=1024), Method("block_topk", block=16, blocks=64)
SIZES = st.integers(0, 300)


def total(model: str, method: Method = DENSE, trials: int = 1, prompt: int = 256, output: int = 16384) -> float:
    return decode_cost(MODELS[f"qwen3-{model}"], method, prompt=prompt, output=output, trials=trials).total / 1e12


@pytest.mark.parametrize(
    ("model", "method", "trials", "teflops"),
    [
        ("8b", DENSE, 1, 11830.46), ("8b", TOP, 1, 1645.20), ("8b", BLOCK, 1, 2006.51), ("0.6b", DENSE, 1, 8985.63),
        ("32b", DENSE, 1, 21773.44), ("14b", DENSE, 8, 104121.56), ("14b", BLOCK, 8, 19264.76),
    ],
)  # fmt: skip
def test_golden_totals(model, method, trials, teflops):
    assert total(model, method, trials) == pytest.approx(teflops, rel=1e-4)


def test_golden_terms_and_ratios():
    cost = decode_cost(MODELS["qwen3-8b"], prompt=256, output=16384)
    assert cost.linear / 1e12 == pytest.approx(268.37, rel=1e-4)
    assert cost.attention / 1e12 == pytest.approx(81.64, rel=1e-4)
    assert cost.memory / 1e12 == pytest.approx(11480.45, rel=1e-4)
    assert total("8b") / total("8b", BLOCK) == pytest.approx(5.90, abs=0.005)
    for model, ratio, tokens in (("0.6b", "182", 47), ("8b", "21.5", 395), ("32b", "9.6", 889)):
        shape = MODELS[f"qwen3-{model}"]
        short = decode_cost(shape, prompt=128, output=8192)
        assert f"{(short.total - short.linear) / short.linear:.{len(ratio.partition('.')[2])}f}" == ratio
        assert round(crossover(shape)) == tokens


@given(SIZES, SIZES, st.integers(1, 700))
def test_visits_is_the_sum_up_to_half_the_overhang(prompt, output, budget):
    exact = exact_visits(budget, prompt, output)
    clamped = min(budget, prompt + output)
    assert exact - visits(budget, prompt, output) == pytest.approx(max(0, clamped - prompt) / 2)


def test_visits_of_the_erratum_take_the_minus():
    assert visits(700, 256, 1000) == 601432 and exact_visits(700, 256, 1000) == 601654
    assert visits(1256, 256, 1000) == visits(9999, 256, 1000) == 256 * 1000 + 1000**2 / 2


@given(SIZES, st.integers(1, 300))
def test_visits_are_monotone_and_concave_in_the_budget(prompt, output):
    values = [visits(b, prompt, output) for b in range(1, prompt + output + 2)]
    rises = [b - a for a, b in itertools.pairwise(values)]
    assert all(r >= 0 for r in rises) and all(b <= a for a, b in itertools.pairwise(rises))


@given(SIZES, st.integers(1, 300), SIZES)
def test_a_full_budget_costs_what_dense_costs(prompt, output, more):
    full = Method("topk", budget=prompt + output + more)
    where = {"prompt": prompt, "output": output}
    assert decode_cost(SMALL, full, **where).total == pytest.approx(decode_cost(SMALL, **where).total)


@pytest.mark.parametrize("method", [DENSE, TOP, BLOCK], ids=str)
def test_zero_intensity_is_the_compute_only_law(method):
    cost = decode_cost(SMALL, method, prompt=128, output=4096, trials=3, intensity=0)
    assert cost.total == cost.compute and cost.memory == 0 and cost.kv > 0
    assert crossover(SMALL, intensity=0) == math.inf


@given(st.integers(1, 16), st.integers(1, 3000))
def test_cost_is_linear_in_trials_but_for_the_shared_prompt(trials, output):
    def dense(n: int, **more):
        return decode_cost(SMALL, output=output, trials=n, **more)

    one, many = dense(1, prompt=512), dense(trials, prompt=512)
    saved = (trials - 1) * 2 * SMALL.kv_elements * 512 * output * one.intensity
    assert many.total == pytest.approx(trials * one.total - saved)
    assert dense(trials, prompt=0).total == pytest.approx(trials * dense(1, prompt=0).total)
    apart = dense(trials, prompt=512, share_prompt=False)
    assert apart.total == pytest.approx(trials * one.total)
    for n in (1, trials):
        assert decode_cost(SMALL, TOP, prompt=512, output=output, trials=n).total == pytest.approx(
            n * decode_cost(SMALL, TOP, prompt=512, output=output).total
        )


def test_doubling_kv_heads_doubles_the_cache_alone():
    wide = dataclasses.replace(SMALL, num_kv_heads=4)
    for method in (DENSE, TOP, BLOCK):
        a, b = (decode_cost(s, method, prompt=100, output=5000) for s in (SMALL, wide))
        assert b.kv == 2 * a.kv and b.search_reads == 2 * a.search_reads
        assert b.compute == a.compute


def test_sparse_cost_grows_by_a_constant_per_token():
    costs = [decode_cost(SMALL, TOP, prompt=2048, output=n).total for n in (1000, 2000, 3000)]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0])


def test_both_unit_conventions():
    assert HARDWARE["b200"].intensity == 562.5 and HARDWARE["b200-bf16"].intensity == 281.25
    one, half = (
        decode_cost(SMALL, prompt=9, output=99, intensity=HARDWARE[n].intensity) for n in ("b200", "b200-bf16")
    )
    assert half.memory == one.memory / 2 and half.compute == one.compute
    assert decode_cost(SMALL, prompt=9, output=99, kv_bytes=1).kv == one.kv / 2
    assert one.seconds(HARDWARE["b200"]) == one.total / 4.5e15
    bytes_read = one.kv
    assert half.memory / HARDWARE["b200-bf16"].flops == pytest.approx(bytes_read / 8e12), (
        "seconds of memory do not depend on the peak"
    )


def test_max_is_the_roofline():
    where = {"prompt": 100, "output": 1000}
    both = decode_cost(SMALL, **where)
    assert decode_cost(SMALL, combine="max", **where).total == max(both.compute, both.memory)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 40), st.integers(1, 4))
def test_exact_search_counts_whole_blocks_at_every_step(prompt, output, block, trials):
    method = Method("block_topk", block=block, blocks=1)
    cost = decode_cost(SMALL, method, prompt=prompt, output=output, trials=trials, search="exact")
    own = shared = 0
    for t in range(1, output + 1):
        seen, ready = (prompt + t) // block, prompt // block
        own += trials * seen
        shared += ready + trials * (seen - ready)
    assert cost.search == pytest.approx(own * 2 * SMALL.num_heads * SMALL.head_dim * SMALL.layers)
    assert cost.search_reads == pytest.approx(shared * 2 * SMALL.num_kv_heads * SMALL.head_dim * SMALL.layers)


def test_published_search_is_a_step_function_that_begins_at_zero():
    method = Method("block_topk", block=128, blocks=1)
    assert (
        decode_cost(SMALL, method, prompt=40, output=47).search
        == 0
        < decode_cost(SMALL, method, prompt=40, output=48).search
    )
    long = {"prompt": 512, "output": 16384}
    floor, exact = (decode_cost(SMALL, BLOCK, search=s, **long).search for s in ("floor", "exact"))
    assert floor == pytest.approx(exact, rel=0.01)


def test_the_grids_of_the_experiments():
    assert [m.keys for m in token_methods()] == [m.keys for m in block_methods()] == [128, 256, 512, 1024, 2048]
    assert [(m.block, m.blocks) for m in block_methods()] == [(128, 1), (64, 4), (32, 16), (16, 64), (8, 256)]


def test_a_config_file_gives_the_shape(tmp_path):
    config = (
        '{"num_hidden_layers":30,"num_attention_heads":9,"num_key_value_heads":3,"hidden_size":576,'
        '"intermediate_size":1536,"vocab_size":49152,"tie_word_embeddings":true}'
    )
    (tmp_path / "config.json").write_text(config)
    shape = shape_of(tmp_path)
    assert dataclasses.replace(shape, name="smollm2-135m") == MODELS["smollm2-135m"]
    assert shape_of(tmp_path / "config.json", 5e6).parameters == 5e6
    (tmp_path / "config.json").write_text(config.replace("}", ',"num_experts":8}'))
    with pytest.raises(ModelError, match=r"mixture of experts.*Give --parameters"):
        shape_of(tmp_path)
    assert shape_of(tmp_path, 7e6).layers == 30
    for bad, message in (
        (config.replace("30", '"x"'), "num_hidden_layers is 'x'"),
        ("[1]", "expected a JSON object"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(ModelError, match=message):
            shape_of(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ModelShape("x", 1e6, 1, 9, 4, 8), "num_heads is 9 and num_kv_heads 4"),
        (lambda: ModelShape("x", math.nan, 1, 4, 4, 8), "parameters is nan"),
        (lambda: Hardware("x", 1e12, 0), "bandwidth of hardware 'x' is 0"),
        (lambda: Method("topk"), "budget is 0"),
        (lambda: Method("block_topk", block=16), "blocks is 0"),
        (lambda: Method("blocktopk"), "Did you mean 'block_topk'"),
        (lambda: decode_cost(SMALL, prompt=-1, output=1), "prompt is -1"),
        (lambda: decode_cost(SMALL, prompt=1, output=math.inf), "output is inf"),
        (lambda: decode_cost(SMALL, prompt=1, output=1, trials=0), "trials is 0"),
        (lambda: decode_cost(SMALL, prompt=1, output=1, kv_bytes=0), "kv_bytes is 0"),
        (lambda: decode_cost(SMALL, prompt=1, output=1, combine="add"), "combine is 'add'"),
        (lambda: decode_cost(SMALL, prompt=1, output=1, search="none"), "search is 'none'"),
        (lambda: shape_of("qwen3-8"), "Did you mean 'qwen3-8b'"),
        (lambda: hardware_of("b20"), "Did you mean 'b200'"),
        (lambda: hardware_of("1:x"), "expected TFLOP/s and GB/s"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
