"""SHRP's recipe: conversion, counting, pruning and the arithmetic, on torch's and on transformers' encoder layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, DataError, ModelError, UnsupportedError
from foveal.layers.shrp import ExpertAttention, PrunedExpertLayer
from foveal.recipes import shrp
from foveal.recipes.shrp_cost import Shape
from foveal.recipes.shrp_hosts import padding, places
from foveal.recipes.shrp_usage import Usage, routed

LAYERS, DIM, HEADS = 3, 16, 4


class Encoder(nn.Module):
    def __init__(self, layers: int = LAYERS, dim: int = DIM, heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 32, dropout=0.1, batch_first=True) for _ in range(layers)
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=None if valid is None else ~valid)
        return x


def model() -> Encoder:
    return Encoder().double().eval()


def batch(rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(9) < torch.randint(3, 10, (rows, 1), generator=g)
    return torch.randn(rows, 9, DIM, generator=g, dtype=torch.float64), valid


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=32, max_position_embeddings=32
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


def test_identity_6_usage_counts_real_tokens_whatever_the_batches():
    one = model()
    shrp.convert(one, [0, 2], expander=8)
    x, valid = batch()
    one.train()
    whole = shrp.count_usage(one, [(x, valid)])
    assert one.training, "the mode is as it was"
    assert whole.layers == (0, 2) and bool((whole.counts.sum(-1) == int(valid.sum())).all())
    parts = [(x[i : i + 2], valid[i : i + 2]) for i in (4, 0, 2)]
    assert torch.equal(shrp.count_usage(one, parts).counts, whole.counts)
    assert torch.equal(shrp.count_usage(one, [(x, valid)]).counts, whole.counts), "dropout is off"
    choices = routed(one)[0].route(x, valid).choice[valid]
    assert torch.equal(whole.counts[0], torch.stack([(choices == h).sum() for h in range(HEADS)]).double())
    torch.testing.assert_close(whole.entropy, -(whole.share * whole.share.clamp(min=1e-300).log()).sum(-1))
    torch.testing.assert_close(whole.concentration, whole.counts.amax(-1) / valid.sum())


def test_identity_7_pruning_is_deterministic_idempotent_and_ties_go_to_the_lowest_head():
    one = model()
    shrp.convert(one, last=2, expander=8)
    usage = Usage((1, 2), torch.tensor([[3.0, 7, 7, 1], [0, 0, 0, 5]]).double(), torch.ones(2, 4))
    kept = shrp.prune(one, usage)
    assert [(k.layer, k.head, k.share) for k in kept] == [(1, 1, 7 / 18), (2, 3, 1.0)]
    expected = one(*batch())
    assert shrp.prune(one, usage) == [] and torch.equal(one(*batch()), expected)
    assert routed(one) == {}


def test_identity_1_pruning_a_model_whose_tokens_agree_leaves_its_output():
    one = model()
    shrp.convert(one, first=LAYERS, expander=8)
    for layer in routed(one).values():
        nn.init.constant_(layer.router.bias, -1e4)
        layer.router.bias.data[2] = 1e4
    before = one(*batch())
    kept = shrp.prune(one, shrp.count_usage(one, [batch()]))
    assert {(k.head, k.share) for k in kept} == {(2, 1.0)}
    torch.testing.assert_close(one(*batch()), before, atol=1e-12, rtol=0)


def test_identity_8_no_layer_is_the_original_and_all_layers_work():
    one, x = model(), batch()
    expected = one(*x)
    assert shrp.convert(one, first=0) == [] and torch.equal(one(*x), expected)
    assert shrp.convert(one, last=LAYERS, expander=8) == [0, 1, 2]
    assert one(*x).shape == expected.shape and len(routed(one)) == LAYERS


def test_conversion_copies_heads_and_the_last_norm():
    one, host = model(), model().layers[1]
    nn.init.normal_(host.norm2.weight)
    one.layers[1].load_state_dict(host.state_dict())
    shrp.convert(one, [1], expander=8)
    layer = one.layers[1].layer
    x, valid = batch()
    got = host.self_attn.out_proj(layer.experts(x, valid).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, host.self_attn(x, x, x, ~valid, need_weights=False)[0], atol=1e-12, rtol=1e-12)
    assert torch.equal(layer.norm.weight, host.norm2.weight) and layer.dropout.p == 0.1


def test_identity_9_parameter_counts_of_modules_and_of_the_formula():
    layer = ExpertAttention(768, 12, expander=96).pruned(3)
    assert sum(p.numel() for p in layer.parameters()) == Shape().pruned_parameters() == 229_920
    host = nn.TransformerEncoderLayer(768, 12, 3072)
    assert sum(p.numel() for p in host.parameters()) == Shape().full_parameters() == 7_087_872
    linear = ExpertAttention(768, 12, expander=0).pruned(0)
    assert sum(p.numel() for p in linear.parameters()) == Shape(expander=0).pruned_parameters()


@pytest.mark.parametrize(
    ("width", "flops", "cut6", "cut11"),
    [
        (0, (11.02, 11.15, 11.39), 48.6, 89.1),
        (64, (11.07, 11.20, 11.44), 48.6, 89.0),
        (96, (11.40, 11.52, 11.75), 48.4, 88.7),
        (128, (11.74, 11.85, 12.06), 48.2, 88.3),
        (256, (13.08, 13.16, 13.30), 47.4, 87.0),
    ],
)
def test_the_accounting_table(width, flops, cut6, cut11):
    shape = Shape(expander=width)
    assert [round(100 * shape.macs_left(11, n), 2) for n in (128, 256, 512)] == list(flops)
    assert round(100 * shape.parameters_cut(6), 1) == cut6
    assert 100 * shape.parameters_cut(11) == pytest.approx(cut11, abs=0.06)
    assert 0.37 < shape.parameters_cut(6, embeddings=True) < 0.38
    assert shape.macs_left(0, 128) == 1.0


def test_the_conversion_of_bert_runs_in_bert_with_its_masks():
    one = bert()
    ids = torch.arange(14).view(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = one(**inputs).last_hidden_state
    shrp.convert(one, first=0)
    assert torch.equal(one(**inputs).last_hidden_state, expected)
    shrp.convert(one, last=2, expander=8)
    for attention in ("sdpa", "eager"):
        one.set_attn_implementation(attention)
        out = one(**inputs).last_hidden_state
        other = ids.clone()
        other[0, 5:] = 3
        again = one(input_ids=other, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(again[mask.bool()], out[mask.bool()], atol=1e-5, rtol=1e-5)
    usage = shrp.count_usage(one, [inputs])
    assert bool((usage.counts.sum(-1) == 12).all()) and usage.layers == (1, 2)
    shrp.prune(one, usage)
    saved = one.state_dict()
    assert any(k.endswith("layer.2.layer.q.weight") for k in saved) and not any("router" in k for k in saved)
    assert one(**inputs).last_hidden_state.shape == out.shape


@pytest.mark.parametrize("make", [model, bert])
def test_svd_initialisation_is_the_least_squares_fit_of_the_original_layer(make):
    inputs = (
        batch(12)
        if make is model
        else {"input_ids": torch.randint(50, (12, 9), generator=torch.Generator().manual_seed(0))}
    )
    errors = {}
    for init in ("scratch", "svd"):
        one, host = make(), make()
        target = run_of(host, inputs)
        shrp.convert(one, last=1, expander=40, init=init, calibration=inputs, form="average")
        errors[init] = float((run_of(one, inputs) - target).square().mean())
    assert errors["svd"] < 0.5 * errors["scratch"]


def run_of(one: nn.Module, inputs: object) -> Tensor:
    with torch.no_grad():
        if isinstance(inputs, dict):
            return one(**inputs).last_hidden_state
        return one(*inputs)[inputs[1]]


def test_one_expander_for_the_model_and_a_kept_feed_forward_part():
    one = model()
    shrp.convert(one, last=2, expander=8, share_expander="model")
    assert routed(one)[1].expander is routed(one)[2].expander
    other = model()
    host = copy.deepcopy(other.layers[0])
    shrp.convert(other, [0], expander=8, keep_ffn=True)
    layer = other.layers[0].layer
    x = batch()[0]
    before = layer.norm(
        x
        + layer.expander(layer.experts(x).gather(1, layer.route(x).choice[:, None, :, None].expand(-1, 1, -1, 4))[:, 0])
    )
    expected = host.norm2(before + host.linear2(torch.relu(host.linear1(before))))
    torch.testing.assert_close(layer(x), expected)


def test_watch_gives_moving_averages_and_a_differentiable_entropy():
    one = model()
    shrp.convert(one, [0], expander=8)
    with shrp.Watch(one, decay=0.9) as watch:
        one(*batch(seed=1))
        first = watch.counts[0].clone()
        one(*batch(seed=2))
    second = shrp.count_usage(one, [batch(seed=2)]).counts[0]
    torch.testing.assert_close(watch.counts[0], 0.9 * first + 0.1 * second)
    watch.entropy().backward()
    assert float(routed(one)[0].router.weight.grad.abs().max()) > 0
    one(*batch(seed=3))
    torch.testing.assert_close(watch.counts[0], 0.9 * first + 0.1 * second)


def test_the_most_concentrated_layers_are_named_in_order():
    usage = Usage((1, 4, 7), torch.tensor([[5.0, 5], [1, 9], [2, 8]]), torch.ones(3, 2))
    assert usage.most_concentrated(2) == [4, 7] and usage.most_concentrated(1) == [4]


def test_training_concentrates_and_the_pruned_model_is_a_plain_module():
    one = model().float()
    shrp.convert(one, [0, 1, 2], expander=8)
    x = batch()[0].float()
    optimizer = torch.optim.AdamW(one.parameters(), 1e-2)
    with shrp.Watch(one) as watch:
        entropies = []
        for _ in range(30):
            one(x)
            loss = watch.entropy()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            entropies.append(float(loss.detach()))
    assert entropies[-1] < 0.5 * entropies[0]
    shrp.prune(one, shrp.count_usage(one, [x]))
    assert all(isinstance(layer.layer, PrunedExpertLayer) for _, _, layer in places(one))


def test_masks_that_are_more_than_padding_are_refused():
    x = torch.zeros(2, 3, 4)
    seen = torch.tensor([[True, True, False], [True, True, True]])
    assert torch.equal(padding(seen[:, None, None], x), seen)
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
    assert torch.equal(padding(additive, x), seen) and padding(None, x) is None
    with pytest.raises(UnsupportedError, match="more than padding"):
        padding(torch.ones(2, 1, 3, 3, dtype=torch.bool).tril(), x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: shrp.convert(model()), ConfigError, "exactly one"),
        (lambda: shrp.convert(model(), [3]), ConfigError, "0 to 2"),
        (lambda: shrp.convert(model(), first=4), ConfigError, "0 to 3"),
        (lambda: shrp.convert(model(), first=1, init="svg"), ConfigError, "Did you mean 'svd'"),
        (lambda: shrp.convert(model(), first=1, init="svd"), ConfigError, "calibration"),
        (lambda: shrp.convert(nn.Linear(2, 2), first=1), ModelError, "no encoder layer"),
        (lambda: shrp.count_usage(model(), [batch()]), DataError, "converted model"),
        (lambda: shrp.Watch(model()).entropy(), DataError, "no batch"),
        (lambda: shrp.Watch(model(), decay=1.0), ConfigError, "decay is 1.0"),
        (lambda: Shape(num_heads=7), ConfigError, "num_heads=7"),
        (lambda: Shape().macs_left(13, 128), ConfigError, "0 to 12"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_layer_is_converted_once_and_pre_norm_layers_are_refused():
    one = model()
    shrp.convert(one, [0])
    with pytest.raises(ConfigError, match="layer 0 is converted already"):
        shrp.convert(one, [0])
    one.layers[1] = nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True, norm_first=True)
    with pytest.raises(UnsupportedError, match="post-norm"):
        shrp.convert(one, [1])
    with pytest.raises(UnsupportedError, match="src_mask"):
        one.layers[0](batch()[0], src_mask=torch.zeros(9, 9))


def test_init_from_every_head_starts_nearer_the_original_than_the_mean_head():
    def off(init: str) -> float:
        one, wanted = model(), model()(*batch())
        torch.manual_seed(1)
        shrp.convert(one, last=2, expander=8, init=init, calibration=batch())
        return float((one(*batch()) - wanted)[batch()[1]].square().mean().detach())

    assert off("heads") < off("svd") and off("heads") < off("scratch")
    with pytest.raises(ConfigError, match="init='heads' needs a calibration batch"):
        shrp.convert(model(), last=1, init="heads")
