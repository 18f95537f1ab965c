"""HyLRA: budgets, roles, the plan of a profile, and policies that run in models while the cache grows."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal
from foveal.core.budget import Budget
from foveal.core.errors import ConfigError
from foveal.core.layouts import KeySelection
from foveal.hf.forward import AttentionEvent
from foveal.kernels.reference import attend
from foveal.lens.chunks import ChunkSettings
from foveal.models import DecoderLM, Memory
from foveal.patterns import Anchor, BlockTopK, Dense, Reuse, TokenTopK
from foveal.policies import Policy
from foveal.policies.hylra import HyLRA, Plan, ReuseProfile, budgets, cleared, profile, uniform_plan
from tests.hf import models
from tests.hf.models import FAMILIES
from tests.support import assert_close

CHOOSE = BlockTopK(Budget(tokens=8), q_block=4, kv_block=2, sinks=1, per_head=False)
ORACLE = TokenTopK(Budget(tokens=6), sinks=1)
PLAN = Plan(reuse=(-1, -1, 1, 1, -1, 4), dense=(0, 3))


def random_profile(layers: int, seed: int = 0) -> ReuseProfile:
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(layers, layers, generator=g, dtype=torch.float64).triu(1) + torch.eye(layers, dtype=torch.float64)
    return ReuseProfile(torch.rand(layers, generator=g, dtype=torch.float64), a, a.sqrt())


def build(layers: int = 6) -> Any:
    cls, config = FAMILIES["llama"].build()
    config.num_hidden_layers = layers
    return models.fill(cls._from_config(config, attn_implementation="sdpa")).double().eval()


def prompt(length: int = 14) -> Tensor:
    return torch.randint(models.VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


# --- plans -------------------------------------------------------------------------------------------------------------


def test_budgets_of_the_published_example():
    assert budgets(64, 0.9, 0.3) == (7, 25)
    assert budgets(20, 0.85, 0.0)[0] == 3, "rounding errors do not add a layer"
    plan = HyLRA().plan(random_profile(64))
    assert len(plan.dense) == 7 and len(plan.anchors) <= 26 and set(plan.dense) <= set(plan.anchors)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3])
def test_the_most_spread_layers_are_dense(classes, seed):
    found = random_profile(12, seed)
    plan = HyLRA(sparsity=0.75, recompute=0.4, classes=classes).plan(found)
    assert set(plan.dense) == set(found.sensitivity.topk(3).indices.tolist())
    assert all(plan.role(j) == "full" for j in plan.dense)
    a = cleared(found.overlap, plan.dense, rows=classes == 3)
    values = [float(a[max(0, s) if s >= 0 else j, j]) for j, s in enumerate(plan.reuse)]
    assert (min(values), sum(values)) == pytest.approx((plan.bottleneck, plan.total))
    if classes == 3 and plan.bottleneck > 0:
        assert not {s for s in plan.reuse if s >= 0} & set(plan.dense)


def test_a_bottleneck_of_zero_is_said():
    """Two anchors for three layers of which the middle one is dense: it ends the first run, and nobody is left for the last layer."""
    found = ReuseProfile(torch.tensor([0.1, 0.9, 0.2]), torch.ones(3, 3).double(), torch.ones(3, 3).double())
    with pytest.warns(UserWarning, match="value 0"):
        assert HyLRA(sparsity=2 / 3, recompute=0.0).plan(found).bottleneck == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HyLRA(sparsity=2 / 3, recompute=0.0, classes=2).plan(found).bottleneck == 1


def test_a_dense_layer_hands_on_where_nobody_else_chose():
    plan = Plan(reuse=(-1, 0, -1), dense=(0,))
    assert [plan.policy(CHOOSE).rule(j).prefill for j in range(3)] == [Anchor(CHOOSE), Reuse(0), CHOOSE]


def test_a_layer_behind_a_dense_anchor_takes_the_latest_choice():
    plan = Plan(reuse=(-1, -1, 1), dense=(1,))
    assert [plan.role(j) for j in range(3)] == ["compute", "full", "reuse"]
    assert [plan.policy(CHOOSE).rule(j).prefill for j in range(3)] == [CHOOSE, Dense(), Reuse(0)]
    two = Plan(reuse=(-1, -1, 1), dense=(1,), classes=2)
    assert [two.policy(CHOOSE).rule(j).prefill for j in range(3)] == [Dense(), Anchor(CHOOSE), Reuse(1)]


def test_even_spacing_has_the_same_density():
    plan = HyLRA().plan(random_profile(30))
    roles = [plan.role(j) for j in range(30)]
    even = uniform_plan(30, roles.count("full"), roles.count("compute"))
    assert even.attended(0.25) == plan.attended(0.25) == pytest.approx((3 + 27 * 0.25) / 30)
    assert even.attended(0.25) <= 0.35
    assert even.dense == (0, 10, 20)
    anchors = [j for j in even.anchors if j not in even.dense]
    assert len(anchors) == roles.count("compute") and max(b - a for a, b in pairwise(anchors)) <= 4


def test_plans_and_policies_go_through_json(tmp_path):
    plan = HyLRA().plan(random_profile(10))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    plan.policy(CHOOSE).save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == plan.policy(CHOOSE)
    found = random_profile(4)
    again = ReuseProfile.from_json(json.loads(json.dumps(found.to_json())))
    assert all(torch.equal(getattr(again, n), getattr(found, n)) for n in ("sensitivity", "overlap", "mass_overlap"))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Plan((0, -1)), "begin with -1"),
        (lambda: Plan(()), "begin with -1"),
        (lambda: Plan((-1, 0, 1)), r"reuse\[2\] is 1"),
        (lambda: Plan((-1, 2, -1)), r"reuse\[1\] is 2"),
        (lambda: Plan((-1,), dense=(1,)), "layer numbers from 0 to 0"),
        (lambda: Plan((-1,), classes=4), "classes is 4"),
        (lambda: HyLRA(sparsity=1.5), "sparsity is 1.5"),
        (lambda: HyLRA(recompute=-0.1), "recompute is -0.1"),
        (lambda: HyLRA(objective="summ"), "objective"),
        (lambda: uniform_plan(4, 3, 2), "at most the 4 layers"),
        (lambda: uniform_plan(4, 1, 0), "compute is 0"),
        (lambda: uniform_plan(4, 0, 0, classes=2), "compute is 0"),
        (lambda: Plan.from_json({"reuse": [-1], "dens": []}), "Did you mean 'dense'"),
    ],
)
def test_bad_input(make, names):
    with pytest.raises(ConfigError, match=names):
        make()


# --- in models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("choose", [CHOOSE, ORACLE], ids=str)
@pytest.mark.parametrize("dense_prefill", [False, True])
def test_layers_reuse_in_prefill_and_decode_while_the_cache_grows(choose, classes, dense_prefill):
    plan = Plan(PLAN.reuse, PLAN.dense, classes)
    events: list[AttentionEvent] = []
    policy = plan.policy(choose, dense_prefill=dense_prefill)
    with torch.no_grad(), foveal.attach(build(), policy, probes=[events.append]) as handle:
        handle.model.generate(prompt(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert [e.call.base.kv_len for e in events[::6]] == list(range(14, 20)), "one prefill and five steps"
    for first in range(0, len(events), 6):
        step = events[first : first + 6]
        for j, event in enumerate(step):
            layout, length = event.layout, event.call.base.kv_len
            if (dense_prefill and first == 0) or plan.role(j) == "full":
                assert layout is None
            else:
                assert layout is not None
                if plan.role(j) == "reuse" and plan.role(plan.reuse[j]) == "compute":
                    assert layout is step[plan.reuse[j]].layout
                if first and isinstance(layout, KeySelection):
                    for line in layout.index[0, :, 0].tolist():
                        listed = [x for x in line if x >= 0]
                        assert len(set(listed)) == len(listed), "each key once"
                        assert listed == sorted(listed), "ascending"
                        assert {0, length - 1} <= set(listed) and max(listed) == length - 1, "sink, own key, none ahead"
            assert_close(event.out, attend(event.call.replace(layout=layout))[0], what=f"layer {j} of {length} keys")


@pytest.mark.parametrize("classes", [2, 3])
def test_decoding_equals_one_prefill_in_hf_and_in_decoder_lm(classes):
    """With one list per row, prefilling everything and decoding through the cache attend to the same keys."""
    policy = Plan(PLAN.reuse, PLAN.dense, classes).policy(ORACLE)
    ids = prompt(20)
    with torch.no_grad(), foveal.attach(build(), policy) as handle:
        whole = handle.model(ids).logits
        out = handle.model(ids[:, :12], use_cache=True)
        rows, cache = [out.logits], out.past_key_values
        for t in range(12, 20):
            rows.append(handle.model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(rows, 1), whole, what="transformers")
    model = DecoderLM(models.VOCAB, dim=32, depth=6, num_heads=4, num_kv_heads=2).double().eval()
    memory = Memory()
    with torch.no_grad():
        whole, dense = model(ids, policy), model(ids)
        rows = [model(ids[:, :12], policy, memory), *(model(ids[:, t : t + 1], policy, memory) for t in range(12, 20))]
    assert_close(torch.cat(rows, 1), whole, what="DecoderLM")
    assert not torch.allclose(whole, dense), "the policy leaves keys out"


@pytest.mark.parametrize("plan", [PLAN, Plan(PLAN.reuse, PLAN.dense, 2)], ids=["three", "two"])
def test_a_budget_of_everything_is_dense(plan):
    model, ids = build(), prompt()
    with torch.no_grad():
        dense = model(ids).logits
        with foveal.attach(model, plan.policy(BlockTopK(Budget(tokens=64)))):
            assert_close(model(ids).logits, dense, what="budget of everything")


def test_all_layers_dense_is_the_unpatched_model():
    model, ids = build(), prompt()
    plan = HyLRA(sparsity=0.0).plan(random_profile(6))
    assert plan.dense == tuple(range(6)) and all(plan.role(j) == "full" for j in range(6))
    with torch.no_grad():
        dense = model(ids).logits
        with foveal.attach(model, plan.policy(CHOOSE)):
            assert_close(model(ids).logits, dense, what="all dense")


def test_all_layers_compute_is_every_layer_choosing_for_itself():
    plan = HyLRA(sparsity=1.0, recompute=1.0).plan(random_profile(6))
    assert plan.reuse == (-1,) * 6 and (plan.bottleneck, plan.total) == (1.0, 6.0)
    model, ids = build(), prompt()
    with torch.no_grad():
        with foveal.attach(model, plan.policy(ORACLE)):
            got = model(ids).logits
        with foveal.attach(model, ORACLE):
            assert torch.equal(got, model(ids).logits)


def test_sparse_attention_differs_by_at_most_twice_the_lost_mass():
    events: list[AttentionEvent] = []
    with torch.no_grad(), foveal.attach(build(), PLAN.policy(ORACLE), probes=[events.append]) as handle:
        handle.model(prompt())
    for event in events:
        if event.layout is None:
            continue
        call = event.call
        dense, lse = attend(call.replace(layout=None))
        kept, kept_lse = attend(call.replace(layout=event.layout))
        mass = torch.exp(kept_lse - lse)
        assert bool((mass < 1 - 1e-6).any())
        error = (kept - dense).norm(dim=-1)
        largest = call.v.norm(dim=-1).amax(-1).repeat_interleave(call.groups, 1)[..., None]
        assert bool((error <= 2 * (1 - mass) * largest + 1e-9).all())


def test_a_tiny_model_is_profiled_planned_and_run():
    model, ids = build(), prompt(64)
    found = profile(model, ids, ChunkSettings(chunk=4, keep=16, sinks=4, recent=4, steps=16))
    assert found.sensitivity.shape == (6,) and found.overlap.shape == (6, 6)
    assert torch.equal(found.overlap.diagonal(), torch.ones(6, dtype=torch.float64))
    plan = HyLRA(sparsity=0.8).plan(found)
    events: list[AttentionEvent] = []
    with torch.no_grad(), foveal.attach(model, plan.policy(CHOOSE), probes=[events.append]):
        model(ids)
    assert [e.layout is None for e in events] == [plan.role(j) == "full" for j in range(6)]
