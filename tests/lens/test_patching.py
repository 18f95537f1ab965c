"""Patching against the model's own modules with plain hooks: whole prompts, two whole runs, float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, UnsupportedError
from foveal.lens.effects import Receivers
from foveal.lens.hooks import Rows
from foveal.lens.patching import attribute_heads, compare, patch_heads, patch_paths

from ..hf import models
from .pairs import toy_pairs

FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "mistral", "phi3"]
HEADS, DIM = models.HEADS, models.HIDDEN // models.HEADS


def tiny(name: str = "llama") -> Any:
    return models.build(name, "eager" if models.eager_only(name) else "sdpa").double()


# --- the slow definition, for Llama: hooks at projections, before rotary positions --------------------------------------


def hooked(
    model: Any, ids: Tensor, before: dict[Any, Callable[[Tensor], Tensor]], after: dict[Any, Callable[[Tensor], Tensor]]
) -> Tensor:
    """Logits with the inputs (``before``) and outputs (``after``) of modules replaced."""
    with ExitStack() as stack, torch.no_grad():
        for module, fn in before.items():
            stack.callback(module.register_forward_pre_hook(lambda m, a, fn=fn: (fn(a[0]),)).remove)
        for module, fn in after.items():
            stack.callback(module.register_forward_hook(lambda m, a, out, fn=fn: fn(out)).remove)
        return model(input_ids=ids, use_cache=False).logits


def outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """Every layer's head outputs, ``(B, N, H·D)``."""
    seen: dict[int, Tensor] = {}
    hooked(
        model,
        ids,
        {
            layer.self_attn.o_proj: lambda x, i=i: seen.setdefault(i, x.clone())
            for i, layer in enumerate(model.model.layers)
        },
        {},
    )
    return [seen[i] for i in range(len(model.model.layers))]


def difference(logits: Tensor, pairs: Any) -> Tensor:
    rows = torch.arange(len(pairs))
    last = logits[rows, pairs.places["end"][:, 0]]
    return last[rows, pairs.correct] - last[rows, pairs.foil]


def slow_path(model: Any, pairs: Any, sender: tuple[int, int], receivers: Receivers, at: str) -> Tensor:
    """Changes of the logit difference by two whole runs: the sender is corrupted at every position, all other heads are frozen there."""
    clean, corrupt = outputs(model, pairs.clean), outputs(model, pairs.corrupt)
    layers = model.model.layers

    def frozen(i: int) -> Callable[[Tensor], Tensor]:
        z = clean[i].clone()
        if i == sender[0]:
            cut = slice(sender[1] * DIM, (sender[1] + 1) * DIM)
            z[..., cut] = corrupt[i][..., cut]
        return lambda x: z

    base = difference(hooked(model, pairs.clean, {}, {}), pairs)
    before = {layer.self_attn.o_proj: frozen(i) for i, layer in enumerate(layers)}
    if receivers.kind == "final":
        return difference(hooked(model, pairs.clean, before, {}), pairs) - base
    names = [f"{kind}_proj" for kind in receivers.kind]
    seen: dict[tuple[int, str], Tensor] = {}
    record = {
        getattr(layers[i].self_attn, n): lambda y, key=(i, n): seen.setdefault(key, y.clone())
        for i, _ in receivers.heads
        for n in names
    }
    hooked(model, pairs.clean, before, record)

    def receive(i: int, name: str) -> Callable[[Tensor], Tensor]:
        group = 1 if name == "q_proj" else models.HEADS // models.KV_HEADS

        def put(y: Tensor) -> Tensor:
            y = y.clone()
            for h in {h // group for layer, h in receivers.heads if layer == i}:
                for b in range(len(pairs)):
                    for p in pairs.place(at)[b].tolist():
                        y[b, p, h * DIM : (h + 1) * DIM] = seen[i, name][b, p, h * DIM : (h + 1) * DIM]
            return y

        return put

    edits = {getattr(layers[i].self_attn, n): receive(i, n) for i, _ in receivers.heads for n in names}
    return difference(hooked(model, pairs.clean, {}, edits), pairs) - base


@pytest.mark.parametrize(
    ("receivers", "at"),
    [
        (Receivers(), "end"),
        (Receivers("q", ((1, 2), (2, 0))), "end"),
        (Receivers("q", ((0, 1), (2, 0))), "end"),
        (Receivers("v", ((2, 3),)), "s2"),
        (Receivers("kv", ((1, 0), (2, 1))), "both"),
    ],
    ids=str,
)
def test_path_patching_is_the_two_run_definition(receivers, at):
    model, pairs = tiny(), toy_pairs()
    fast = patch_paths(compare(model, pairs), receivers, at, rows=7)
    for layer in range(models.LAYERS):
        for head in range(HEADS):
            slow = slow_path(model, pairs, (layer, head), receivers, at)
            torch.testing.assert_close(fast.change[layer, head], slow, rtol=0, atol=1e-10)
    assert fast.change.abs().max() > 1e-4


@pytest.mark.parametrize("at", ["end", "s2", "both", "all"])
def test_activation_patching_is_a_whole_run_with_one_head_replaced(at):
    model, pairs = tiny(), toy_pairs()
    fast = patch_heads(compare(model, pairs), at, rows=5)
    clean, corrupt = outputs(model, pairs.clean), outputs(model, pairs.corrupt)
    base = difference(hooked(model, pairs.clean, {}, {}), pairs)
    for layer, head in [(0, 0), (1, 3), (2, 1)]:

        def put(x: Tensor, layer: int = layer, head: int = head) -> Tensor:
            x, cut = x.clone(), slice(head * DIM, (head + 1) * DIM)
            for b in range(len(pairs)):
                where = pairs.place(at)[b]
                x[b, where, cut] = corrupt[layer][b, where, cut]
            return x

        slow = (
            difference(hooked(model, pairs.clean, {model.model.layers[layer].self_attn.o_proj: put}, {}), pairs) - base
        )
        torch.testing.assert_close(fast.change[layer, head], slow, rtol=0, atol=1e-10)
    assert len(clean) == models.LAYERS


# --- section 6 of the spec sheet ----------------------------------------------------------------------------------------


def test_corrupt_equal_to_clean_changes_nothing_and_has_no_effect():
    pairs = toy_pairs()
    c = compare(tiny(), replace(pairs, corrupt=pairs.clean))
    for effects in (
        patch_heads(c, "both"),
        patch_paths(c),
        patch_paths(c, Receivers("q", ((2, 0),))),
        attribute_heads(c),
    ):
        assert effects.change.abs().max() < 1e-12 and effects.effect.isnan().all()
    assert (attribute_heads(c).change == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_patching_everything_gives_the_corrupted_run(name):
    """All heads, all MLPs and what enters the first block."""
    if name == "opt":
        pytest.skip("OPT has no MLP module")
    pairs = toy_pairs()
    c = compare(tiny(name), pairs)
    entered: list[Tensor] = []
    c.points.record(pairs.corrupt, {"resid": lambda i, x: entered.append(x) or x})
    rows = Rows(torch.arange(len(pairs)), torch.arange(pairs.clean.shape[1]).expand(len(pairs), -1))
    edits = {
        "z": lambda i, z: c.corrupt.z[i], "mlp": lambda i, y: c.corrupt.mlp[i], "resid": lambda i, x: entered[0] if i == 0 else x,
    }  # fmt: skip
    _, logits = c.points.record(pairs.clean, edits)
    torch.testing.assert_close(difference(logits, pairs), c.corrupt_difference, rtol=0, atol=1e-5)
    assert rows.position.shape == pairs.clean.shape


@pytest.mark.parametrize("name", FAMILIES)
def test_in_the_last_layer_path_patching_to_the_final_residual_is_activation_patching(name):
    c = compare(tiny(name), toy_pairs())
    torch.testing.assert_close(patch_paths(c).change[-1], patch_heads(c).change[-1], rtol=0, atol=1e-6)


def test_senders_at_or_after_the_receivers_have_no_effect():
    effects = patch_paths(compare(tiny(), toy_pairs()), Receivers("q", ((1, 0),)))
    assert (effects.change[1:] == 0).all() and (effects.change[0] != 0).all()


def test_with_frozen_mlps_the_direct_effect_is_the_closed_form():
    """Clean final residual + (z_corrupt − z_clean) W_O, then the final norm and the unembedding."""
    model, pairs = tiny(), toy_pairs()
    effects = patch_paths(compare(model, pairs), freeze_mlps=True)
    clean, corrupt = outputs(model, pairs.clean), outputs(model, pairs.corrupt)
    residual: list[Tensor] = []
    hooked(model, pairs.clean, {model.model.norm: lambda x: residual.append(x) or x}, {})
    base = difference(hooked(model, pairs.clean, {}, {}), pairs)
    for layer in range(models.LAYERS):
        for head in range(HEADS):
            cut = slice(head * DIM, (head + 1) * DIM)
            moved = (corrupt[layer] - clean[layer])[..., cut] @ model.model.layers[layer].self_attn.o_proj.weight[
                :, cut
            ].T
            with torch.no_grad():
                logits = model.lm_head(model.model.norm(residual[0] + moved))
            torch.testing.assert_close(
                effects.change[layer, head], difference(logits, pairs) - base, rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_everything_at_its_clean_value_gives_the_clean_logits_bit_for_bit(name):
    pairs = toy_pairs()
    model = tiny(name)
    c = compare(model, pairs)
    _, plain = c.points.record(pairs.clean)
    _, frozen = c.points.record(pairs.clean, {"z": lambda i, z: c.clean.z[i]})
    assert torch.equal(plain, frozen)
    with torch.no_grad():
        torch.testing.assert_close(plain, model(input_ids=pairs.clean, use_cache=False).logits, rtol=0, atol=1e-5)
    rows = Rows(torch.arange(len(pairs)), pairs.places["end"])
    for frozen_heads in (True, False):  # one token per row on top of the record
        with torch.no_grad():
            logits = c.points.run(c.clean, rows, frozen=frozen_heads)
        torch.testing.assert_close(c.difference(logits, rows.prompt), c.clean_difference, rtol=0, atol=1e-9)


def test_a_patch_at_the_end_leaves_earlier_positions_alone():
    pairs = toy_pairs()
    c = compare(tiny(), pairs)
    end = pairs.places["end"]
    every = Rows(torch.arange(len(pairs)), torch.arange(pairs.clean.shape[1]).expand(len(pairs), -1))
    inside = every.at(end)[:, None, :, None]
    patched, _ = c.points.record(pairs.clean, {"z": lambda i, z: torch.where(inside, c.corrupt.z[i], z)})
    before = (every.position < end)[:, None, :, None]
    for now, was in zip([*patched.k, *patched.v], [*c.clean.k, *c.clean.v], strict=True):
        assert torch.equal(now.where(before, 0), was.where(before, 0))
    assert any(not torch.equal(now, was) for now, was in zip(patched.k, c.clean.k, strict=True))


# --- attribution --------------------------------------------------------------------------------------------------------


def test_attribution_is_the_slope_of_activation_patching():
    """Patch a fraction ε of the way: the difference quotient comes ten times closer when ε is ten times smaller."""
    pairs = toy_pairs()
    c = compare(tiny(), pairs)
    slope = attribute_heads(c, "both").change
    errors = []
    for step in (1e-2, 1e-3):
        near = replace(
            c, corrupt=replace(c.corrupt, z=[a + step * (b - a) for a, b in zip(c.clean.z, c.corrupt.z, strict=True)])
        )
        errors.append((patch_heads(near, "both").change / step - slope).abs().max())
    assert errors[0] < 0.1 * slope.abs().max() and errors[1] < 0.2 * errors[0]


def test_attribution_is_patching_where_everything_behind_the_head_is_linear():
    model = tiny()
    model.model.norm = torch.nn.Identity()
    last = model.model.layers[-1].mlp
    last.down_proj.weight.data.zero_()
    c = compare(model, toy_pairs())
    torch.testing.assert_close(attribute_heads(c).change[-1], patch_heads(c).change[-1], rtol=0, atol=1e-12)
    assert c.clean_difference.requires_grad is False


def test_attribution_works_with_frozen_parameters_and_refuses_inference_mode():
    model = tiny().requires_grad_(False)
    c = compare(model, toy_pairs())
    with torch.no_grad():
        assert attribute_heads(c).change.abs().max() > 0
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        attribute_heads(c)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("frozen", [True, False])
def test_blocks_below_the_first_edit_are_skipped_without_a_difference(name, frozen):
    pairs = toy_pairs()
    c = compare(tiny(name), pairs)
    rows = Rows(torch.arange(len(pairs)), pairs.places["both"])
    ran: list[int] = []
    edits = {"z": lambda i, z: ran.append(i) or (c.corrupt.z[2][:, :, -2:] if i == 2 else z)}
    with torch.no_grad():
        whole = c.points.run(c.clean, rows, edits, frozen=frozen)
        short = c.points.run(c.clean, rows, edits, frozen=frozen, first_layer=2)
    assert ran == [0, 1, 2, 2]
    torch.testing.assert_close(whole, short, rtol=0, atol=1e-9)


# --- edges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 11, 1000])
def test_batches_do_not_matter(rows):
    c = compare(tiny(), toy_pairs())
    for run in (
        lambda n: patch_heads(c, "s2", rows=n),
        lambda n: patch_paths(c, Receivers("k", ((2, 0),)), "s2", rows=n),
    ):
        torch.testing.assert_close(run(rows).change, run(36).change, rtol=0, atol=1e-12)


def test_a_single_head_is_patched_when_asked_and_others_stay_nan():
    effects = patch_heads(compare(tiny(), toy_pairs()), heads=[(1, 2)])
    assert (~effects.effect.isnan()).nonzero().tolist() == [[1, 2]]
    assert effects.top(0.5) == [(1, 2)]


def test_intervals_hold_the_effect_and_json_is_plain():
    import json

    effects = patch_heads(compare(tiny(), toy_pairs(batch=16)))
    low, high = effects.interval()
    span = float((effects.corrupt_difference - effects.clean_difference).mean())
    assert span != 0 and (low <= effects.effect).all() and (effects.effect <= high).all()
    assert json.loads(json.dumps(effects.to_json()))["prompts"] == 16


def test_the_model_is_as_before_after_an_exception():
    model, pairs = tiny(), toy_pairs()
    ids = pairs.clean
    with torch.no_grad():
        before = model(input_ids=ids).logits
        c = compare(model, pairs)
        with pytest.raises(RuntimeError, match="on purpose"):
            c.points.record(ids, {"z": lambda i, z: (_ for _ in ()).throw(RuntimeError("on purpose"))})
        assert torch.equal(model(input_ids=ids).logits, before)
        rows = Rows(torch.arange(len(pairs)), pairs.places["end"])
        with pytest.raises(RuntimeError, match="on purpose"):
            c.points.run(
                c.clean, rows, {"z": lambda i, z: (_ for _ in ()).throw(RuntimeError("on purpose"))}, first_layer=1
            )
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: patch_heads(c, "s3"), "no place 's3'"),
        (lambda c: patch_heads(c, heads=[(3, 0)]), r"no head \(3, 0\)"),
        (lambda c: patch_paths(c, at="s2"), "read at the end"),
        (lambda c: Receivers("q"), "at least one"),
        (lambda c: Receivers("x", ((0, 0),)), "kind 'x'"),
        (lambda c: c.points.record(c.pairs.clean, {"zz": lambda i, z: z}), "the point 'zz'"),
    ],
)
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ConfigError, match=says):
        call(compare(tiny(), toy_pairs()))


def test_models_without_these_points_are_refused():
    from foveal import attach
    from foveal.patterns import Dense

    pairs = toy_pairs()
    with pytest.raises(UnsupportedError, match="cross-attention"):
        compare(models.build("bart"), pairs)
    with pytest.raises(ConfigError, match="eval"):
        compare(tiny().train(), pairs)
    model = tiny()
    with attach(model, Dense()), pytest.raises(UnsupportedError, match="policy is attached"):
        compare(model, pairs)
    with pytest.raises(UnsupportedError, match="no MLP module"):
        patch_paths(compare(tiny("opt"), pairs), freeze_mlps=True)
