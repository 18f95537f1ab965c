"""VAR against its definition written as loops, the identities of its spec sheet, and whole models of every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ConfigError, UnsupportedError
from foveal.hf.interventions import reweighed
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute
from foveal.patterns import SlidingWindow
from foveal.steer import VAR, apply, find_sink_dims
from foveal.steer.apply import report
from foveal.steer.keys import Knockout
from foveal.steer.sinks import SINK_DIMS, sink_values
from foveal.steer.var import redistribute
from tests.steer.models import FAMILIES, IMAGE, PLAIN, build, left_padded, prompt
from tests.support import Host, tensors

SETTING = {"rho": 0.5, "transfer": 0.6, "min_mass": 0.2}


def loops(
    alpha: Tensor, image: Tensor, sink: Tensor, rows: Tensor, rho: float, transfer: float, min_mass: float
) -> Tensor:
    """The sheet's definition, one number at a time."""
    out = alpha.clone()
    for b in range(alpha.shape[0]):
        keys = range(alpha.shape[3])
        for h in range(alpha.shape[1]):
            for i in range(alpha.shape[2]):
                a = [float(x) for x in alpha[b, h, i]]
                visual = sum(a[j] for j in keys if image[b, j])
                content = sum(a[j] for j in keys if image[b, j] and not sink[b, j])
                on_sinks = sum(a[j] for j in keys if sink[b, j])
                if not rows[b, i] or visual < min_mass or content < rho * visual or on_sinks == 0 or content == 0:
                    continue
                for j in keys:
                    if sink[b, j]:
                        out[b, h, i, j] = (1 - transfer) * a[j]
                    elif image[b, j]:
                        out[b, h, i, j] = a[j] + transfer * on_sinks * a[j] / content
    return out


def scene(
    host: Host, seed: int, heads: int = 4, kv_heads: int = 2
) -> tuple[AttentionCall, Tensor, Tensor, Tensor, Tensor]:
    """A call whose values are unit vectors, so that its output is the attention matrix; flags of keys and rows."""
    q, k, _ = tensors(host, heads, kv_heads, seed=seed)
    v = torch.eye(host.kv_len, dtype=torch.float64).expand(host.batch, kv_heads, -1, -1)
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(host.batch, host.kv_len, generator=g) < 0.6
    sink = torch.rand(host.batch, host.kv_len, generator=g) < 0.35
    own = torch.arange(host.q_len) + host.first
    call = AttentionCall(q, k, v, None, host.base(), 0.9)
    alpha, _ = attention(call)
    return call, alpha, image, sink, ~image[:, own]


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from foveal.kernels.reference import attend

    return attend(call)


def steered(call: AttentionCall, alpha: Tensor, step: Any, impl: str = "auto") -> Tensor:
    return reweighed(call, [step], None, impl, alpha)


def var(**changes: Any) -> VAR:
    return VAR(dims=(0,), **{**SETTING, **changes})


HOSTS = [Host(12, 12), Host(2, 13), Host(1, 9), Host(9, 9, pads=((4, 0), (0, 0))), Host(12, 12, window=6)]


@settings(max_examples=15)
@given(st.sampled_from(HOSTS), st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_vectorised_result_equals_a_naive_triple_loop_with_gqa(
    host: Host, seed: int, rho: float, transfer: float
) -> None:
    call, alpha, image, sink, rows = scene(host, seed)
    got = steered(call, alpha, var(rho=rho, transfer=transfer).step(image, sink, rows))
    assert torch.allclose(got, loops(alpha, image, sink, rows, rho, transfer, 0.2), atol=1e-12)


@settings(max_examples=15)
@given(st.sampled_from(HOSTS), st.integers(0, 999))
def test_row_sums_stay_one_weights_stay_positive_masked_keys_stay_zero(host: Host, seed: int) -> None:
    call, alpha, image, sink, rows = scene(host, seed)
    got = steered(call, alpha, var(transfer=1.0, min_mass=0.0).step(image, sink, rows))
    assert torch.allclose(got.sum(-1), alpha.sum(-1), atol=1e-12)
    assert float(got.min()) > -1e-12
    hidden = ~torch.from_numpy(host.dense())[:, None].expand_as(got)
    assert bool((got[hidden] == 0).all())


def test_recovery_of_planted_sinks_is_exact() -> None:
    """Mass moved from image content onto image sinks that had (almost) none comes back with transfer 1 and rho ≤ 1 − s."""
    alpha = torch.softmax(torch.randn(2, 3, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), -1)
    image = torch.zeros(2, 10, dtype=torch.bool)
    image[:, 2:8] = True
    sink = torch.zeros_like(image)
    sink[:, 3] = True
    alpha[..., 3] = 1e-300
    alpha /= alpha.sum(-1, keepdim=True)
    moved = alpha.clone()
    content = image & ~sink
    share = 0.7
    moved[..., 3] += share * (alpha * content[:, None, None]).sum(-1)
    moved = torch.where(content[:, None, None], (1 - share) * moved, moved)
    q = torch.zeros(2, 3, 5, 1, dtype=torch.float64)
    found = []
    for b in range(2):  # logits per row: attention of one query over keys with logit log α
        for h in range(3):
            for i in range(5):
                k = torch.log(moved[b, h, i])[None, None, :, None]
                v = torch.eye(10, dtype=torch.float64)[None, None]
                call = AttentionCall(q[:1, :1, :1] + 1, k, v, None, Host(1, 10).base(), 1.0)
                step = var(rho=1 - share - 1e-9, transfer=1.0, min_mass=0.0).step(
                    image[:1], sink[:1], torch.ones(1, 1, dtype=torch.bool)
                )
                found.append(steered(call, attention(call)[0], step)[0, 0, 0])
    assert torch.allclose(torch.stack(found).view_as(alpha), alpha, atol=1e-12)


@settings(max_examples=15)
@given(st.sampled_from(HOSTS), st.integers(0, 999))
def test_ratios_among_content_are_kept_and_the_mass_identity_holds(host: Host, seed: int) -> None:
    call, alpha, image, sink, rows = scene(host, seed)
    got = steered(call, alpha, var().step(image, sink, rows))
    content = (image & ~sink)[:, None, None]
    given_ = ((alpha - got) * sink[:, None, None]).sum(-1)
    received = ((got - alpha) * content).sum(-1)
    assert torch.allclose(given_, received, atol=1e-12)
    mass = (alpha * content).sum(-1)
    scale = 1 + torch.where(mass > 0, given_ / torch.where(mass > 0, mass, 1.0), 0.0)
    assert torch.allclose(got * content, alpha * content * scale[..., None], atol=1e-12)
    rest = ~image & ~sink
    assert torch.allclose(got * rest[:, None, None], alpha * rest[:, None, None], atol=1e-12)


@settings(max_examples=15)
@given(st.sampled_from(HOSTS), st.integers(0, 999))
def test_rows_that_are_not_selected_keep_their_bits(host: Host, seed: int) -> None:
    call, alpha, image, sink, rows = scene(host, seed)
    got = steered(call, alpha, var(min_mass=0.6).step(image, sink, rows))
    wanted = loops(alpha, image, sink, rows, 0.5, 0.6, 0.6)
    still = (wanted == alpha).all(-1)
    assert bool((got == alpha).all(-1)[still].all())


@settings(max_examples=15)
@given(st.sampled_from(HOSTS), st.integers(0, 999))
def test_group_lse_form_equals_the_eager_rewrite_in_float32(host: Host, seed: int) -> None:
    call, alpha, image, sink, rows = scene(host, seed)
    half = call.replace(q=call.q.float(), k=call.k.float(), v=call.v.float())
    got = steered(half, attention(half)[0], var(rho=0.0).step(image, sink, rows))
    wanted = loops(alpha, image, sink, rows, 0.0, 0.6, 0.2)
    visual = (alpha * image[:, None, None]).sum(-1)
    clear = (visual - 0.2).abs() > 1e-4  # rows on the edge of the pre-filter may fall on either side
    assert torch.allclose(got.double()[clear], wanted[clear], atol=1e-5)


def test_empty_groups() -> None:
    host = Host(6, 6)
    call, alpha, _, _, _ = scene(host, 3)
    none, every = torch.zeros(1, 6, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)
    for image, sink in ((none, every), (every, every), (every, none), (none, none)):
        got = steered(call, alpha, var(min_mass=0.0, rho=0.0).step(image, sink, every))
        assert torch.equal(got, alpha), "without sinks, or without content, nothing may move"


@given(st.integers(0, 999), st.floats(0.01, 100))
def test_phi_does_not_know_the_scale_and_is_at_most_root_d(seed: int, factor: float) -> None:
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    phi = sink_values(x, (3, 7))
    assert torch.allclose(sink_values(factor * x, (3, 7)), phi)
    assert float(phi.max()) <= math.sqrt(24) + 1e-12
    one_hot = torch.zeros(24).index_fill(0, torch.tensor(3), 2.0)
    assert float(sink_values(one_hot, (3,))) == pytest.approx(math.sqrt(24))
    others = [d for d in range(24) if d not in (3, 7)]
    mixed = x.clone()
    mixed[:, others] = x[:, list(reversed(others))]
    assert torch.allclose(sink_values(mixed, (3, 7)), phi)


def test_gradients_equal_those_of_the_dense_form() -> None:
    """Which rows are selected is constant; everything else is differentiable."""
    host = Host(10, 10)
    q, k, v = (t.requires_grad_() for t in tensors(host, seed=4))
    g = torch.Generator().manual_seed(4)
    image, sink = (torch.rand(1, 10, generator=g) < share for share in (0.6, 0.35))
    step = var(rho=0.2).step(image, sink, ~image)
    call = AttentionCall(q, k, v, None, host.base(), 0.9)
    got = reweighed(call, [step], None, "gather", compute(call, "gather")[0])
    keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
    alpha = torch.softmax((q @ keys.mT * 0.9).masked_fill(~torch.from_numpy(host.dense()), -torch.inf), -1)
    mass = torch.stack([(alpha * (step.groups == n)[:, None, None]).sum(-1) for n in range(4)])
    factors = torch.where(~image[:, None], redistribute(mass, rho=0.2, transfer=0.6, min_mass=0.2)[0], 1.0)
    scaled = alpha * torch.stack([factors[int(n)] for n in step.groups[0]], -1)
    wanted = scaled @ values
    assert torch.allclose(got, wanted, atol=1e-12) and not torch.allclose(got, alpha @ values)
    weight = torch.randn(got.shape, generator=g, dtype=torch.float64)
    for mine, theirs in zip(
        *(torch.autograd.grad((o * weight).sum(), (q, k, v), retain_graph=True) for o in (got, wanted)), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-10)


# --- whole models ----------------------------------------------------------------------------------------------------


def eager_var(flags: dict[int, Tensor], image: Tensor, setting: dict[str, float]) -> Callable[..., Any]:
    """Dense eager attention with the loops above, as a plain transformers attention function."""

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, dropout: float = 0.0, **kwargs: Any
    ) -> Any:
        k, v = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (k, v))
        logits = q @ k.mT * scaling
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        alpha = torch.softmax(logits.masked_fill(~causal, -torch.inf), -1)
        if module.layer_idx in flags:
            alpha = loops(alpha, image, flags[module.layer_idx], ~image, **setting)
        return (alpha @ v).transpose(1, 2).contiguous(), None

    return attend


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_model_equals_dense_eager_var_in_float64(family: str) -> None:
    model, request = build(family), prompt(family)
    image = request["input_ids"] == IMAGE
    setting = {"rho": 0.3, "transfer": 0.6, "min_mass": 0.05}
    flags: dict[int, Tensor] = {}
    stack = model.model.text_model.layers if hasattr(model.model, "text_model") else model.model.language_model.layers

    def reader(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            phi = x[..., [5, 11]].abs().amax(-1) / x.square().mean(-1).sqrt()
            flags[layer] = phi >= 1.5

        return hook

    hooks = [stack[i].register_forward_pre_hook(reader(i), with_kwargs=True) for i in range(len(stack) - 1)]
    hf.AttentionInterface.register("var_by_loops", eager_var(flags, image, setting))
    hf.AttentionMaskInterface.register("var_by_loops", lambda *a, **k: None)
    before = model.config.get_text_config()._attn_implementation
    with torch.no_grad():
        plain = model(**request).logits
        model.set_attn_implementation({"text_config": "var_by_loops"})
        wanted = model(**request).logits
        model.set_attn_implementation({"text_config": before})
        for hook in hooks:
            hook.remove()
        with apply(model, VAR(dims=(5, 11), tau=1.5, **setting)) as handle:
            got = model(**request).logits
        after = model(**request).logits
    told = report(handle)[0]
    assert told["changed"] > 0 and str(len(stack) - 1) not in told["rows"], "the last layer is left alone"
    assert float((wanted - plain).abs().max()) > 1e-3
    assert torch.allclose(got, wanted, atol=1e-9)
    assert torch.equal(after, plain)


SINKS = torch.zeros(23, dtype=torch.bool).index_fill(0, torch.tensor([0, 3, 7]), True)


@pytest.mark.parametrize("nothing", [{"transfer": 0.0}, {"tau": math.inf}, {"rho": 1.1}])
@pytest.mark.filterwarnings("ignore:foveal. the sink threshold")
def test_nothing_to_move_changes_no_bit(nothing: dict[str, float]) -> None:
    model, request = build("llava"), prompt("llava")
    with torch.no_grad(), apply(model, Knockout(torch.zeros(1, dtype=torch.bool))):
        plain = model(**request).logits
    with torch.no_grad(), apply(model, VAR(dims=(5, 11), **{"tau": 1.5, "min_mass": 0.0, "rho": 0.1, **nothing})):
        assert torch.equal(model(**request).logits, plain)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prefill_and_decode_equal_a_full_recompute(family: str) -> None:
    model, request = build(family), prompt(family)
    steer = VAR(sinks=SINKS[: request["input_ids"].shape[1]], min_mass=0.0, rho=0.05)
    with torch.no_grad(), apply(model, steer) as handle:
        out = model.generate(**request, max_new_tokens=5, **PLAIN, output_logits=True, return_dict_in_generate=True)
        assert report(handle)[0]["changed"] > 0
        new = out.sequences.shape[1] - request["input_ids"].shape[1]
        whole = {**request, "input_ids": out.sequences[:, :-1]}
        if "mm_token_type_ids" in request:
            whole["mm_token_type_ids"] = torch.nn.functional.pad(request["mm_token_type_ids"], (0, new - 1))
        again = model(**whole, use_cache=False).logits[:, -new:]
    assert torch.allclose(torch.stack(out.logits, 1), again.float(), rtol=1e-5, atol=1e-5)  # generate gives float32


def test_generated_tokens_are_never_sinks_unless_tested() -> None:
    model, request = build("llava"), prompt("llava")
    sequences = {}
    with torch.no_grad():
        for generated in ("never", "test"):
            steer = VAR(dims=(5, 11), tau=0.5, min_mass=0.0, rho=0.0, generated=generated)
            with apply(model, steer):
                out = model.generate(
                    **request, max_new_tokens=8, **PLAIN, output_logits=True, return_dict_in_generate=True
                )
            sequences[generated] = torch.stack(out.logits, 1)
    same = sequences["never"] == sequences["test"]
    assert bool(same[:, :1].all()) and not bool(same.all())


def test_beams_share_their_prompts_sinks() -> None:
    model, request = build("llava"), prompt("llava")
    steer = VAR(dims=(5, 11), tau=1.5, min_mass=0.0, rho=0.1)
    with torch.no_grad(), apply(model, steer) as handle:
        found = model.generate(
            **request, max_new_tokens=4, **PLAIN, num_beams=3, output_scores=True, return_dict_in_generate=True
        )
        score = torch.log_softmax(
            model(input_ids=found.sequences[:, :-1], pixel_values=request["pixel_values"]).logits[:, -4:], -1
        )
        assert report(handle)[0]["changed"] > 0
    total = score.gather(-1, found.sequences[:, -4:, None]).sum()
    assert torch.allclose(found.sequences_scores[0].double(), total / 4, atol=1e-6)


def test_batch_of_two_left_padded_prompts_equals_each_alone() -> None:
    model = build("llava")
    requests = [prompt("llava", 1, before=1, after=3), prompt("llava", 2, before=4, after=6)]
    steer = VAR(dims=(5, 11), tau=1.5, min_mass=0.0, rho=0.1)
    with torch.no_grad(), apply(model, steer) as handle:
        both = model(**left_padded(requests)).logits[:, -1]
        alone = torch.cat([model(**r).logits[:, -1] for r in requests])
        assert report(handle)[0]["changed"] > 0
    assert torch.allclose(both, alone, atol=1e-8)


def test_excluded_tokens_and_the_codes_rules() -> None:
    model, request = build("llava"), prompt("llava")
    length = request["input_ids"].shape[1]
    sinks = SINKS[:length]
    with torch.no_grad(), apply(model, VAR(sinks=sinks, exclude=sinks, min_mass=0.0, rho=0.0)) as handle:
        model(**request)
        assert report(handle)[0]["changed"] == 0
    text_only = sinks & (request["input_ids"][0] != IMAGE)
    for needs, changes in ((False, True), (True, False)):
        with (
            torch.no_grad(),
            apply(model, VAR(sinks=text_only, min_mass=0.0, rho=0.0, needs_image_sink=needs)) as handle,
        ):
            model(**request)
            assert (report(handle)[0]["changed"] > 0) == changes


def test_combines_with_a_sparse_policy() -> None:
    """VAR then acts on the attention that the policy computes, and equals the loops over that attention."""
    host = Host(12, 12)
    call, _, image, sink, rows = scene(host, 5)
    layout, _ = SlidingWindow(window=5, sinks=1).select(call.q, call.k, context_of(call), None)
    sparse = call.replace(layout=layout)
    alpha, _ = attention(sparse)
    got = steered(sparse, alpha, var(rho=0.1).step(image, sink, rows))
    assert torch.allclose(got, loops(alpha, image, sink, rows, 0.1, 0.6, 0.2), atol=1e-12)
    model, request = build("llava"), prompt("llava")
    with (
        torch.no_grad(),
        apply(model, VAR(sinks=SINKS, min_mass=0.0, rho=0.05), SlidingWindow(window=4, sinks=1)) as handle,
    ):
        model(**request)
    assert report(handle)[0]["changed"] > 0


def context_of(call: AttentionCall) -> Any:
    from foveal.core.context import SelectContext

    return SelectContext(base=call.base)


def test_sink_dims_are_found_where_they_are_and_nowhere_else() -> None:
    config = hf.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    prompts = [{"input_ids": torch.cat([torch.tensor([[1]]), torch.randint(3, 60, (1, 9))], 1)} for _ in range(3)]
    assert find_sink_dims(model, prompts, tau=6.0) == ()
    with torch.no_grad():
        model.model.embed_tokens.weight[1, 17] = 60.0
        model.model.embed_tokens.weight[1, 40] = -50.0
    assert find_sink_dims(model, prompts, tau=4.0) == (17, 40)
    assert find_sink_dims(model, prompts, tau=0.098, tau_mode="energy", most=1) == (17,)
    with pytest.raises(ConfigError, match="needs prompts"):
        find_sink_dims(model, [])


def test_bad_input() -> None:
    text = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    )
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM has no image tokens.*Visual interventions need"):
        apply(text, VAR(dims=(3,)))
    assert text.config._attn_implementation != "foveal", "a refused intervention leaves the model as it was"
    with pytest.raises(ConfigError, match="needs one of profile"):
        VAR()
    with pytest.raises(ConfigError, match=r"Did you mean 'llava-1.5-7b'"):
        VAR(profile="llava-1.5-7")
    with pytest.raises(ConfigError, match=r"transfer is 1\.5"):
        VAR(dims=(1,), transfer=1.5)
    model = build("llava")
    with pytest.raises(ConfigError, match="sink dimension 1415 does not exist"):
        apply(model, VAR(profile="llava-1.5-7b"))
    with pytest.raises(ConfigError, match="layers names 9"):
        apply(model, VAR(dims=(3,), layers=[9]))
    with pytest.warns(UserWarning, match="no token can be a sink"):
        apply(model, VAR(dims=(3,))).detach()
    with pytest.raises(ConfigError, match="2 × VAR"):
        apply(model, [VAR(dims=(3,)), VAR(dims=(4,))])
    assert all(dims for dims in SINK_DIMS.values())
    request = prompt("llava")
    with torch.no_grad():
        cache = model(**request, use_cache=True).past_key_values
        with apply(model, VAR(dims=(3,), tau=1.5)), pytest.raises(UnsupportedError, match="filled outside this block"):
            model(input_ids=torch.tensor([[4]]), past_key_values=cache)
