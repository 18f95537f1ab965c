"""Head scaling and knock-out of keys against the weights and the masks that they stand for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as hf

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.steer import VAR, VHR, HeadScale, Knockout, apply
from foveal.steer.apply import report
from tests.hf.models import FAMILIES as TEXT
from tests.steer.models import PLAIN, build, prompt


def llama() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    cls, config = TEXT["llama"].build()
    return cls(config).double().eval()


IDS = torch.arange(3, 15)[None]


def test_scaled_heads_equal_scaled_columns_of_the_output_projection() -> None:
    model, other = llama(), llama()
    with torch.no_grad():
        for layer, heads in {0: [1, 2], 2: [0]}.items():
            weight = other.model.layers[layer].self_attn.o_proj.weight
            for h in heads:
                weight[:, h * 8 : (h + 1) * 8] *= 1.7
        with apply(model, HeadScale({0: [1, 2], 2: [0]}, 1.7)) as handle:
            got = model(IDS).logits
            cached = model.generate(IDS, max_new_tokens=4, **PLAIN)
        assert torch.allclose(got, other(IDS).logits, atol=1e-9)
        assert torch.equal(cached, other.generate(IDS, max_new_tokens=4, **PLAIN))
        assert report(handle)[0]["calls"] > 0
        plain = model(IDS).logits
        with apply(model, HeadScale({0: [1]}, 1.0)):
            assert torch.equal(model(IDS).logits, plain)
        with apply(model, HeadScale({0: [1]})):
            assert not torch.allclose(model(IDS).logits, plain)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "phi3"])
def test_heads_of_other_families_are_named(family: str) -> None:
    cls, config = TEXT[family].build()
    model = cls(config).eval()
    with torch.no_grad(), apply(model, HeadScale({1: [3]})) as handle:
        model(IDS)
    assert report(handle)[0]["calls"] == 1
    with pytest.raises(ConfigError, match="head 4 of layer 1, which has heads 0 to 3"):
        apply(model, HeadScale({1: [4]}))


def test_renormalised_knockout_equals_a_mask() -> None:
    model = llama()
    hidden = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor([3, 4, 7]), True)
    seen = torch.ones(12, 12, dtype=torch.bool).tril() & ~hidden
    with torch.no_grad():
        model.set_attn_implementation("eager")
        wanted = model(IDS, attention_mask=torch.where(seen, 0.0, -1e30).double()[None, None]).logits
        model.set_attn_implementation("sdpa")
        with apply(model, Knockout(hidden, renormalise=True)):
            got = model(IDS).logits
    assert torch.allclose(got, wanted, atol=1e-5)  # transformers' eager attention takes its softmax in float32


def test_knockout_after_the_softmax_scales_values() -> None:
    """Without renormalising, one layer's knock-out is the attention with the keys' values set to zero."""
    from foveal.hf.interventions import reweighed
    from foveal.kernels.call import AttentionCall
    from foveal.kernels.reference import attend
    from tests.support import Host, tensors

    host = Host(9, 9)
    q, k, v = tensors(host)
    call = AttentionCall(q, k, v, None, host.base(), 0.5)
    keys = torch.arange(9)[None] % 3 == 1
    from foveal.hf.interventions import Reweigh

    rows = ~keys
    step = Reweigh(
        keys.long(), 2, rows, lambda mass: torch.stack([torch.ones_like(mass[0]), torch.zeros_like(mass[1])])
    )
    got = reweighed(call, [step], None, "auto", attend(call)[0])
    wanted = attend(call.replace(v=v * ~keys[:, None, :, None]))[0]
    assert torch.allclose(got[:, :, rows[0]], wanted[:, :, rows[0]], atol=1e-12)
    assert torch.equal(got[:, :, keys[0]], attend(call)[0][:, :, keys[0]])


def test_two_reweighings_act_on_each_others_result() -> None:
    """Halving twice, on overlapping keys, multiplies; then what VAR sees is what the knock-out left."""
    model, request = build("llava"), prompt("llava")
    length = request["input_ids"].shape[1]
    some, others = torch.arange(length) % 2 == 0, torch.arange(length) % 3 == 0
    with torch.no_grad():
        with apply(model, [Knockout(some, 0.5), Knockout(others, 0.25)]):
            both = model(**request).logits
        with apply(
            model, [Knockout(some & others, 0.125), Knockout(some & ~others, 0.5), Knockout(others & ~some, 0.25)]
        ):
            wanted = model(**request).logits
        assert torch.allclose(both, wanted, atol=1e-9)
        sinks = torch.arange(length) == 4
        with apply(model, [Knockout(sinks), VAR(sinks=sinks, min_mass=0.0, rho=0.0)]) as handle:
            model(**request)
        assert report(handle)[1]["changed"] == 0, "nothing is left on the sinks"
        with apply(model, [VAR(sinks=sinks, min_mass=0.0, rho=0.0), Knockout(sinks)]) as handle:
            model(**request)
        assert report(handle)[0]["changed"] > 0


def test_var_and_vhr_together_choose_under_var() -> None:
    """The heads are those that VHR chooses when VAR is on in both of its streams; in either order."""
    model, request = build("llava"), prompt("llava")
    var, vhr = VAR(dims=(5, 11), tau=1.5, min_mass=0.0, rho=0.1), VHR(alpha=1.5)
    with torch.no_grad():
        found = []
        for steer in ([var, vhr], [vhr, var]):
            with apply(model, steer) as handle:
                found.append((model(**request).logits, [r for r in report(handle) if r["intervention"] == "VHR"]))
        with apply(model, [var, VHR(alpha=1.5, lock_step=False)]):
            wanted = model(**request).logits
        with apply(model, vhr):
            assert not torch.allclose(model(**request).logits, wanted, atol=1e-3)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert torch.allclose(found[0][0], wanted, atol=1e-9)


def test_threads_do_not_mix_their_requests() -> None:
    model = build("llava")
    requests = [prompt("llava", seed, before=seed % 3 + 1, after=4) for seed in range(6)]
    steer = [VAR(dims=(5, 11), tau=1.5, min_mass=0.0, rho=0.1), VHR(alpha=1.5)]

    def run(request: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return model.generate(
                **request, max_new_tokens=3, **PLAIN, output_logits=True, return_dict_in_generate=True
            ).logits[-1]

    with apply(model, steer):
        alone = [run(r) for r in requests]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(run, requests))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_nested_blocks_and_errors_give_the_model_back() -> None:
    model = llama()
    with torch.no_grad():
        plain = model(IDS).logits
        with apply(model, HeadScale({0: [0]})):
            outer = model(IDS).logits
            with pytest.raises(ZeroDivisionError), apply(model, HeadScale({1: [0]})):
                _ = 1 / 0
            assert torch.equal(model(IDS).logits, outer)
        assert torch.equal(model(IDS).logits, plain)


def test_bad_input() -> None:
    model = llama()
    with pytest.raises(ConfigError, match="interventions is empty"):
        apply(model, [])
    with pytest.raises(UnsupportedError, match="CARVE changes the picture"):
        from foveal.steer import carve

        apply(model, carve)
    llava, sinks = build("llava"), torch.zeros(5, dtype=torch.bool)
    for named in (Knockout(sinks), VAR(sinks=sinks)):
        with pytest.raises(
            ConfigError, match="names positions of the prompt, and VHR also runs the prompt without its image"
        ):
            apply(llava, [VHR(), named])
        apply(llava, [VHR(fixed_heads={}), named]).detach()
    with pytest.raises(ConfigError, match="expected a mapping"):
        HeadScale([1])
    with pytest.raises(ConfigError, match="layer 7; LlamaForCausalLM has layers 0 to 2"):
        apply(model, HeadScale({7: [0]}))
    with pytest.raises(ShapeError, match="expected bool"):
        Knockout(torch.ones(3))
    with (
        pytest.raises(ShapeError, match="given for 2 sequences"),
        torch.no_grad(),
        apply(model, Knockout(torch.ones(2, 3, dtype=torch.bool))),
    ):
        model(IDS.expand(3, -1))
    from foveal.patterns import Dense, SlidingWindow
    from foveal.policies.policy import Policy, Rule

    by_head = Policy(default=Rule(Dense(), heads=((0, 1, Rule(SlidingWindow(window=4))),)))
    with (
        torch.no_grad(),
        apply(model, Knockout(torch.ones(3, dtype=torch.bool)), by_head),
        pytest.raises(UnsupportedError, match="rules for single heads"),
    ):
        model(IDS)
    with torch.no_grad(), apply(model, HeadScale({0: [0]}), by_head):
        model(IDS)  # head outputs can be scaled under any policy
