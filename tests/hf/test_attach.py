"""``foveal.attach``: same numbers while dense, the asked-for pattern otherwise, and the model as it was afterwards."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveal
from foveal.core.errors import ConfigError, UnsupportedError
from foveal.patterns import Dense, Pattern, SlidingWindow

from ..support import assert_close
from . import models
from .models import DECODERS, FAMILIES, build, inputs, output, tokens
from .patterns import reading

families = pytest.mark.parametrize("name", FAMILIES)
decoders = pytest.mark.parametrize("name", DECODERS)
TOLERANCE = 5e-5  # of the larger of 1 and the value; the models' logits are of size 1 to 20


def run(model: Any, pattern: Any, impl: str = "auto", **arguments: Any) -> Tensor:
    """Output under a pattern."""
    with torch.no_grad(), foveal.attach(model, pattern, impl=impl):
        return output(model, **arguments)


# --- dense is dense ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "gather", "reference"])
@families
def test_dense_reproduces_the_eager_logits(name: str, impl: str) -> None:
    model, given = build(name), inputs(name)
    with torch.no_grad():
        expected = output(model, **given)
    assert_close(run(model, Dense(), impl, **given), expected, TOLERANCE, name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "vit", "dinov2", "bart"])
def test_dense_through_torchs_own_kernel_reproduces_the_eager_logits(name: str) -> None:
    model, given = build(name), inputs(name)
    with torch.no_grad():
        expected = output(model, **given)
    assert_close(run(model, Dense(), "sdpa", **given), expected, TOLERANCE, name)


@pytest.mark.parametrize(("name", "why"), [("gemma2", "softcap"), ("gpt_oss", "window"), ("mistral", "window")])
def test_an_explicit_impl_never_falls_back(name: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        run(build(name), Dense(), "sdpa", **inputs(name))


def test_dense_over_several_tiles_reproduces_the_eager_logits() -> None:
    for name in ("llama", "gemma3", "gpt_oss"):
        model, given = build(name), inputs(name, length=290)
        with torch.no_grad():
            expected = output(model, **given)
        assert_close(run(model, Dense(), "gather", **given), expected, TOLERANCE, name)


@families
def test_all_self_attention_layers_are_counted_and_reached(name: str) -> None:
    seen: list[tuple[int, str]] = []
    model = build(name)
    with (
        foveal.attach(model, Dense(), probes=[lambda e: seen.append((e.layer_index, e.role))]) as handle,
        torch.no_grad(),
    ):
        assert handle.num_layers == FAMILIES[name].layers
        output(model, **inputs(name))
    assert [i for i, role in seen if role == "self"] == list(range(FAMILIES[name].layers))
    cross = [i for i, role in seen if role == "cross"]
    assert cross == ([-1] * models.LAYERS if FAMILIES[name].kind == "encoder-decoder" else [])


def test_layers_that_share_modules_are_counted_as_they_run() -> None:
    import transformers as hf

    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "embedding_size": 16,
        "intermediate_size": 48,
        "num_attention_heads": 4,
    }
    for groups, inner in ((1, 1), (1, 2), (2, 2), (4, 1)):
        config = hf.AlbertConfig(**sizes, num_hidden_layers=4, num_hidden_groups=groups, inner_group_num=inner)
        model = models.fill(hf.AlbertModel(config).eval())
        seen: list[int] = []
        with (
            foveal.attach(model, Dense(), probes=[lambda e, seen=seen: seen.append(e.layer_index)]) as handle,
            torch.no_grad(),
        ):
            for _ in range(2):
                model(input_ids=tokens(1, 8))
        assert handle.num_layers == 4 * inner
        assert seen == [*range(4 * inner)] * 2


# --- a pattern does what it says --------------------------------------------------------------------------------------


def test_a_window_on_llama_is_mistral() -> None:
    import transformers as hf

    llama = build("llama")
    same = hf.MistralConfig(
        **{**llama.config.to_dict(), "model_type": "mistral", "sliding_window": 7, "head_dim": None}
    )
    mistral = hf.MistralForCausalLM._from_config(same, attn_implementation="eager").eval()
    mistral.load_state_dict(llama.state_dict())
    for length in (5, 7, 8, 40, 150):
        given = inputs("llama", length=length)
        with torch.no_grad():
            expected = mistral(**given).logits
        assert_close(run(llama, SlidingWindow(window=7), **given), expected, TOLERANCE, f"length {length}")
    assert (run(llama, SlidingWindow(window=6), **given) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["bert", "bart", "vit"])
def test_a_window_on_an_encoder_opens_to_both_sides(name: str) -> None:
    model, given = build(name), inputs(name)
    expected_model = build(name)
    band = (torch.arange(64)[:, None] - torch.arange(64)[None, :]).abs() < 3

    def banded(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        cross = q.shape[2] != k.shape[2]
        if not cross:
            keep &= band[: q.shape[2], : q.shape[2]]
        if getattr(module, "is_causal", False) and not cross:
            keep = keep.tril()
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=kwargs["scaling"])
        return out.transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("test_banded", banded)
    expected_model.set_attn_implementation("test_banded")
    with torch.no_grad():
        expected = output(expected_model, **given)
    assert_close(run(model, SlidingWindow(window=3), **given), expected, TOLERANCE, name)


@decoders
def test_gather_equals_the_reference_under_a_window_with_sinks(name: str) -> None:
    model, given = build(name), inputs(name, length=40)
    pattern = SlidingWindow(window=3, sinks=2)
    got = run(model, pattern, "gather", **given)
    assert_close(got, run(model, pattern, "reference", **given), TOLERANCE, name)
    assert (got - run(model, Dense(), **given)).abs().max() > 0.01, "the pattern changed nothing"


# --- the future ---------------------------------------------------------------------------------------------------


def moved(model: Any, pattern: Pattern, length: int, changed: int) -> Tensor:
    """``(length,)`` bool: which rows of logits move when one token changes."""
    ids = tokens(1, length)
    other = ids.clone()
    other[0, changed] = (other[0, changed] - 9) % 50 + 10
    before, after = run(model, pattern, input_ids=ids), run(model, pattern, input_ids=other)
    return (before != after).any(-1)[0]


@pytest.mark.parametrize("pattern", [Dense(), SlidingWindow(window=5, sinks=2)], ids=str)
@decoders
def test_a_future_token_never_moves_a_past_logit(name: str, pattern: Pattern) -> None:
    rows = moved(build(name), pattern, 40, 25)
    assert not rows[:25].any()
    assert rows[25]


@pytest.mark.parametrize(("look_ahead", "first"), [("none", 200), ("block", 128), ("prefill", 0)])
def test_a_pattern_that_declares_its_look_ahead_reads_exactly_that_far(look_ahead: str, first: int) -> None:
    rows = moved(build("llama"), reading(look_ahead), 290, 200)
    assert not rows[:first].any()
    assert rows[first : first + 128].any()


# --- leaving ------------------------------------------------------------------------------------------------------


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything of a model that foveal touches."""
    hooks = {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()}
    configs = {
        n: (m.config._attn_implementation, vars(m.config).copy())
        for n, m in model.named_modules()
        if hasattr(m, "config")
    }
    return {"hooks": hooks, "configs": configs, "modules": [(n, type(m)) for n, m in model.named_modules()]}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@families
def test_leaving_gives_back_the_same_model(name: str, implementation: str) -> None:
    model, given = build(name, "eager" if models.eager_only(name) else implementation), inputs(name)
    with torch.no_grad():
        expected = output(model, **given)
        before = fingerprint(model)
        with foveal.attach(model, SlidingWindow(window=2)) as handle:
            assert not torch.equal(output(model, **given), expected)
            assert handle.active
        assert not handle.active
        assert torch.equal(output(model, **given), expected)
    assert fingerprint(model) == before


def test_leaving_after_an_exception_inside_the_forward() -> None:
    model, given = build("llama"), inputs("llama")
    before, expected = fingerprint(model), model(**given).logits

    def explode(event: Any) -> None:
        if event.layer_index == 1:
            raise RuntimeError("from a probe")

    with (
        pytest.raises(RuntimeError, match="from a probe"),
        foveal.attach(model, SlidingWindow(window=2), probes=[explode]),
    ):
        model(**given)
    assert fingerprint(model) == before
    assert torch.equal(model(**given).logits, expected)
    with pytest.raises(RuntimeError, match="from a probe"), foveal.attach(model, Dense(), probes=[explode]) as handle:
        try:
            model(**given)
        finally:
            handle.probes.clear()
            assert_close(model(**given).logits, expected, TOLERANCE, "the handle works on after an exception")


def test_nested_the_innermost_policy_runs_and_the_outer_comes_back() -> None:
    model, given = build("llama"), inputs("llama")
    before = fingerprint(model)
    with torch.no_grad():
        dense = output(model, **given)
        two, five = run(model, SlidingWindow(window=2), **given), run(model, SlidingWindow(window=5), **given)
        with foveal.attach(model, SlidingWindow(window=2)):
            assert torch.equal(output(model, **given), two)
            with foveal.attach(model, SlidingWindow(window=5)):
                assert torch.equal(output(model, **given), five)
            assert torch.equal(output(model, **given), two)
            with pytest.raises(ZeroDivisionError), foveal.attach(model, SlidingWindow(window=5)):
                raise ZeroDivisionError
            assert torch.equal(output(model, **given), two)
        assert torch.equal(output(model, **given), dense)
    assert fingerprint(model) == before


def test_detaching_in_any_order() -> None:
    model, given = build("llama"), inputs("llama")
    before = fingerprint(model)
    with torch.no_grad():
        dense, five = output(model, **given), run(model, SlidingWindow(window=5), **given)
        outer, inner = foveal.attach(model, SlidingWindow(window=2)), foveal.attach(model, SlidingWindow(window=5))
        outer.detach()
        assert torch.equal(output(model, **given), five)
        inner.detach()
        inner.detach()
        outer.detach()
        assert torch.equal(output(model, **given), dense)
    assert fingerprint(model) == before


def test_the_same_policy_twice_and_detached_handles() -> None:
    model, given = build("llama"), inputs("llama")
    with torch.no_grad():
        dense, two = output(model, **given), run(model, SlidingWindow(window=2), **given)
        first, second = (foveal.attach(model, SlidingWindow(window=2)) for _ in range(2))
        assert torch.equal(output(model, **given), two)
        second.detach()
        assert torch.equal(output(model, **given), two)
        first.detach()
        assert torch.equal(output(model, **given), dense)
    with pytest.raises(ConfigError, match=r"detached; call foveal\.attach"), first:
        pass


def test_detaching_in_the_middle_of_a_forward_leaves_nothing_behind() -> None:
    model, given = build("llama"), inputs("llama")
    handle = foveal.attach(model, Dense())
    handle.probes.append(lambda event: handle.detach())
    with pytest.raises(UnsupportedError):
        model(**given)
    with torch.no_grad():
        assert torch.equal(output(model, **given), output(build("llama"), **given))
        run(model, SlidingWindow(window=2), **given)


def test_a_forgotten_handle_keeps_no_model_alive() -> None:
    model = build("llama")
    foveal.attach(model, Dense())
    model(**inputs("llama"))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_saving_while_attached_writes_the_ordinary_config(tmp_path: Any) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "before")
    with foveal.attach(model, SlidingWindow(window=2)):
        model.save_pretrained(tmp_path / "inside")
    before, inside = ((tmp_path / d / "config.json").read_text() for d in ("before", "inside"))
    assert json.loads(before) == json.loads(inside)
    assert "foveal" not in inside


def test_a_copy_made_while_attached_says_what_is_wrong() -> None:
    model, given = build("llama"), inputs("llama")
    with torch.no_grad(), foveal.attach(model, SlidingWindow(window=2)):
        expected = output(model, **given)
        with pytest.raises(
            UnsupportedError, match=r"LlamaAttention runs foveal's attention but .* Copy a model before"
        ):
            copy.deepcopy(model)(**given)
        assert torch.equal(output(model, **given), expected)


# --- two models, one config -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert", "vit", "bart"])
def test_another_model_that_shares_the_config_runs_its_original_attention(name: str, implementation: str) -> None:
    mine, given = build(name, implementation), inputs(name)
    other = models.fill(type(mine)(mine.config).eval(), seed=1)
    assert other.config is mine.config
    if FAMILIES[name].kind in ("encoder", "decoder"):
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, :5] = 0
    with torch.no_grad():
        theirs, ours = output(other, **given), output(mine, **given)
        with foveal.attach(mine, SlidingWindow(window=2)):
            assert torch.equal(output(other, **given), theirs)
            assert not torch.equal(output(mine, **given), ours)
            both = run(other, SlidingWindow(window=2), **given)
            assert torch.equal(output(other, **given), theirs)
        assert torch.equal(run(other, SlidingWindow(window=2), **given), both)
        assert torch.equal(output(mine, **given), ours)


def test_two_attached_models_that_share_a_config_keep_their_own_policies() -> None:
    mine, given = build("llama"), inputs("llama")
    other = models.fill(type(mine)(mine.config).eval(), seed=1)
    with torch.no_grad():
        a, b = run(mine, SlidingWindow(window=2), **given), run(other, SlidingWindow(window=5), **given)
        first = foveal.attach(mine, SlidingWindow(window=2))
        with foveal.attach(other, SlidingWindow(window=5)):
            assert torch.equal(output(mine, **given), a)
            assert torch.equal(output(other, **given), b)
            first.detach()
            assert torch.equal(output(other, **given), b)
            assert torch.equal(output(mine, **given), output(build("llama"), **given))
    assert mine.config._attn_implementation == "eager"


def test_a_model_run_from_inside_another_ones_forward() -> None:
    mine, given = build("llama"), inputs("llama")
    other = models.fill(type(mine)(mine.config).eval(), seed=1)
    with torch.no_grad():
        expected, results = output(other, **given), []
        with foveal.attach(mine, SlidingWindow(window=2), probes=[lambda e: results.append(output(other, **given))]):
            output(mine, **given)
    assert len(results) == models.LAYERS
    assert all(torch.equal(r, expected) for r in results)


# --- vision-language --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["clip", "gemma3_vision"])
def test_only_the_text_stack_of_a_vision_language_model_switches(name: str, implementation: str) -> None:
    model, given = build(name, implementation), inputs(name)
    tower = model.vision_model if name == "clip" else model.model.vision_tower
    pixels = tower(pixel_values=given["pixel_values"]).last_hidden_state
    with torch.no_grad(), foveal.attach(model, SlidingWindow(window=2)) as handle:
        assert all("vision" not in site.name for site in handle.sites.values())
        assert tower.config._attn_implementation == implementation
        assert model.config.get_text_config()._attn_implementation == "foveal"
        assert torch.equal(tower(pixel_values=given["pixel_values"]).last_hidden_state, pixels)
        output(model, **given)


def test_image_tokens_see_each_other_both_ways() -> None:
    model, given = build("gemma3_vision"), inputs("gemma3_vision")
    seen: list[Tensor] = []
    with torch.no_grad(), foveal.attach(model, Dense(), probes=[lambda e: seen.append(e.call.base.dense(2))]):
        output(model, **given)
    full = seen[1][0]
    image = given["token_type_ids"][0].bool()
    assert full[image][:, image].all()
    text = full[~image]
    assert torch.equal(text, torch.ones_like(full).tril()[~image])


# --- how it is called -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "bert", "vit", "bart"])
def test_inference_mode(name: str) -> None:
    model, given = build(name), inputs(name)
    with torch.inference_mode(), foveal.attach(model, SlidingWindow(window=3, sinks=1)):
        got = output(model, **given)
    assert torch.equal(got.clone(), run(model, SlidingWindow(window=3, sinks=1), **given))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in ("llama", "gpt_oss", "gemma2") for d in (torch.bfloat16, torch.float16)]
    + [("llama", torch.float64)],
)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    given = inputs(name)
    expected = run(build(name), SlidingWindow(window=3, sinks=1), **given)
    got = run(build(name, dtype=dtype), SlidingWindow(window=3, sinks=1), **given)
    assert got.dtype == dtype
    error = (got.float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-5}[dtype]


def test_autocast() -> None:
    model, given = build("llama"), inputs("llama")
    expected = run(model, SlidingWindow(window=3), **given)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(model, SlidingWindow(window=3), **given)
    assert (got.float() - expected).norm() / expected.norm() < 0.1


def test_a_compiled_model_runs_through_graph_breaks() -> None:
    model, given = build("llama"), inputs("llama")
    expected = run(model, SlidingWindow(window=3, sinks=1), **given)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = compiled(**given).logits
        with foveal.attach(model, SlidingWindow(window=3, sinks=1)):
            assert_close(compiled(**given).logits, expected, TOLERANCE, "attached after compiling")
        assert_close(compiled(**given).logits, dense, 1e-6, "after leaving")


def test_attaching_to_the_backbone_reaches_the_whole_model() -> None:
    model, given = build("llama"), inputs("llama")
    expected = run(model, SlidingWindow(window=2), **given)
    with torch.no_grad(), foveal.attach(model.model, SlidingWindow(window=2)):
        assert torch.equal(output(model, **given), expected)


@pytest.mark.parametrize(
    ("policy", "impl", "why"),
    [
        ("sliding_window", "auto", "policy is a str; expected a foveal.Policy or a Pattern"),
        (Dense(), "fast", "impl='fast' is unknown; expected 'auto' or one of reference"),
    ],
)
def test_wrong_arguments_are_named(policy: Any, impl: str, why: str) -> None:
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=why):
        foveal.attach(model, policy, impl=impl)
    assert fingerprint(model) == before


def test_importing_foveal_patches_nothing() -> None:
    script = """
import json
import transformers, transformers.masking_utils as masks, transformers.modeling_utils as m
def state():
    names = [sorted(m.ALL_ATTENTION_FUNCTIONS.keys()), sorted(masks.ALL_MASK_ATTENTION_FUNCTIONS.keys())]
    names += [[id(m.ALL_ATTENTION_FUNCTIONS[n]) for n in names[0]], id(transformers.PreTrainedModel.forward)]
    return names + [sorted((k, id(v)) for k, v in vars(masks).items()), sorted((k, id(v)) for k, v in vars(m).items())]
before = state()
import foveal, foveal.hf, foveal.hf.handle, foveal.patterns
assert foveal.attach
assert state() == before, "importing foveal changed transformers"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
