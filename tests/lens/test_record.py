"""Recordings of whole models: beside their own kernels, with caches, under policies, in batches, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import foveal
from foveal.core.errors import ConfigError, DataError, UnsupportedError
from foveal.lens import load, record
from foveal.lens.probes import ChosenRows, Influence, Lost, Mass, TopEdges
from foveal.patterns import Dense, SlidingWindow
from foveal.policies import Policy, Rule

from .models import FAMILIES, N, eager_weights, tiny, tokens, transformers

ALL = [
    "entropy", "mass", "received", "sink_score", "influence", "lookback", "windowed_distance", "edges", "rows", "atlas",
]  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_output_does_not_change_by_a_bit_and_weights_are_those_of_eager(family: str, implementation: str) -> None:
    if implementation == "sdpa" and family in ("GptOss", "Gemma2"):
        pytest.skip("transformers has no sdpa for learned sinks and softcaps")
    model = tiny(family)
    model.set_attn_implementation(implementation)
    ids = tokens(2)
    want = model(ids).logits
    with record(model, ALL) as rec:
        got = model(ids).logits
    assert torch.equal(got, want)
    weights = eager_weights(model, input_ids=ids)
    torch.testing.assert_close(rec["received"].values.double(), weights.sum(-2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rec["mass"].values[..., 0].double(), weights[..., 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rec["rows"].values[..., 0, :].double(), weights[..., 0, :], rtol=1e-3, atol=1e-4)
    assert rec["entropy"].dims == ("sequence", "layer", "head", "token") and torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_other_families() -> None:
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    ).eval()
    bert = transformers.BertModel(
        transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ).eval()  # fmt: skip
    for model in (gpt2, bert):
        with record(model, ["received", "lookback"]) as rec:
            model(tokens())
        weights = eager_weights(model, input_ids=tokens())[0]
        away = (torch.arange(N)[:, None] - torch.arange(N)).abs()
        torch.testing.assert_close(rec["received"].values.double(), weights.sum(-2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rec["lookback"].values.double(), (weights * away).sum(-1), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_stacks_of_different_lengths_are_recorded_one_at_a_time() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens()[:, :40]}
    with pytest.raises(UnsupportedError, match="layers=range"), record(model, "entropy"):
        model(**inputs)
    with record(model, "entropy", layers=[1, 2]) as rec:
        model(**inputs)
    assert rec["entropy"].shape == (2, 4, 40) and rec["entropy"].labels("layer") == (1, 2)


@torch.no_grad()
def test_left_padding_is_no_token() -> None:
    model, ids = tiny(), tokens(2)
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, :35] = 0
    with record(model, [Mass({"first": [0]}), "received", "edges"]) as rec:
        model(ids, attention_mask=mask)
    weights = eager_weights(model, input_ids=ids, attention_mask=mask)
    assert rec["mass"].values[1, ..., :35, :].isnan().all() and rec["received"].values[1, ..., :35].isnan().all()
    torch.testing.assert_close(
        rec["mass"].values[1, ..., 35:, 0].double(), weights[1, ..., 35:, 35], rtol=1e-3, atol=1e-4
    )
    got, want = rec["received"].values[1, ..., 35:].double(), weights[1, ..., 35:, 35:].sum(-2)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (rec["edges.key"].values[1] > 35).all(), "the first real token is the sink that edges leave out"


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_chunked_prefill_and_decode_through_a_cache(family: str, static: bool) -> None:
    model, ids = tiny(family), tokens()
    probes = ["entropy", "received", "windowed_distance", "edges", ChosenRows((3, 60)), "sink_score"]
    with record(model, probes) as whole:
        model(ids, use_cache=False)
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=N + 7)
    else:
        cache = transformers.DynamicCache(config=model.config)
    with record(model, probes) as rec:
        for a, b in ((0, 40), (40, 47), *((i, i + 1) for i in range(47, N))):
            model(ids[:, a:b], past_key_values=cache)
    assert rec.tokens == N
    for name in whole:
        if name not in ("edges.query", "edges.key"):
            torch.testing.assert_close(rec[name].values, whole[name].values, rtol=1e-3, atol=1e-3, equal_nan=True)


@torch.no_grad()
def test_a_recording_may_begin_in_the_middle_of_a_request() -> None:
    model, ids = tiny(), tokens()
    with record(model, ["entropy", "received"]) as whole:
        model(ids)
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :60], past_key_values=cache)
    with record(model, ["entropy", "received", "rows"]) as rec:
        model(ids[:, 60:], past_key_values=cache)
        with pytest.raises(ConfigError, match="before the recording began at 60"):
            rec.arrays()
        del rec.probes["rows"]
    torch.testing.assert_close(rec["entropy"].values[..., 60:], whole["entropy"].values[..., 60:], rtol=1e-3, atol=1e-4)
    assert rec["entropy"].values[..., :60].isnan().all()
    weights = eager_weights(model, input_ids=ids)[0]
    torch.testing.assert_close(rec["received"].values.double(), weights[..., 60:, :].sum(-2), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_a_policy_keeps_and_drops() -> None:
    model, ids = tiny(), tokens()
    policy = Policy(
        Rule(Dense()),
        ((1, Rule(SlidingWindow(window=9, sinks=1))), (2, Rule(heads=((1, 1, Rule(SlidingWindow(window=5))),)))),
    )
    own, key = torch.arange(N)[:, None], torch.arange(N)
    with foveal.attach(model, policy):
        want = model(ids).logits
        with record(model, [Lost(5), "received"]) as rec:
            assert torch.equal(model(ids).logits, want)
        with record(model, ["received", "entropy"], weights="kept") as kept:
            model(ids)
    lost = rec["lost.mass"]
    assert lost.select(layer=0).values.abs().max() == 0 and lost.select(layer=2, head=0).values.max() == 0
    first = eager_weights(model, input_ids=ids)[0, 0]
    with foveal.attach(model, policy), record(model, [ChosenRows(tuple(range(N)))]) as rows:
        model(ids)
    dense = rows["rows"].select(layer=1).values
    outside = (own - key >= 9) & (key >= 1)
    torch.testing.assert_close(lost.select(layer=1).values, (dense * outside).sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rec["lost.weight"].select(layer=1).values, (dense * outside).flatten(-2).topk(5).values)
    inside = dense * ~outside
    inside = inside / inside.sum(-1, keepdim=True)
    torch.testing.assert_close(kept["received"].select(layer=1).values, inside.sum(-2), rtol=1e-4, atol=1e-4)
    entropy = -torch.special.xlogy(inside, inside).sum(-1)
    torch.testing.assert_close(kept["entropy"].select(layer=1).values, entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rec["received"].select(layer=0).values.double(), first.sum(-2), rtol=1e-3, atol=1e-3)
    only = rows["rows"].select(layer=2, head=1).values
    torch.testing.assert_close(
        lost.select(layer=2, head=1).values, (only * (own - key >= 5)).sum(-1), rtol=1e-4, atol=1e-6
    )


def test_head_importance_is_the_derivative_by_a_head_scale() -> None:
    model, ids = tiny(), tokens(2, 20)
    model = model.double()

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    with record(model, ["importance", "entropy"]) as rec:
        loss().backward()
    want = rec["importance"].values  # (B, L, H, N)
    assert want.shape == (2, 3, 4, 20) and not want.isnan().any()
    at_most = want[0].abs().argmax()
    layer, head, at = (int(i) for i in torch.unravel_index(at_most, want[0].shape))
    step = 0.02  # transformers' norms round to float32
    losses = []
    for factor in (1 - step, 1 + step):

        def scale(module: Any, args: tuple[Tensor], factor: float = factor) -> tuple[Tensor]:
            x = args[0].clone()
            x[0, at, head * 8 : (head + 1) * 8] *= factor
            return (x,)

        hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(scale)
        with torch.no_grad():
            losses.append(float(loss()))
        hook.remove()
    slope = (losses[1] - losses[0]) / (2 * step)
    assert slope == pytest.approx(float(want[0, layer, head, at]), rel=1e-2)


def test_gradients_that_are_not_there() -> None:
    model = tiny()

    def run(context: Any) -> None:
        with context, record(model, ["entropy", "importance"]):
            model(tokens())

    for context, name in ((torch.inference_mode(), "inference_mode"), (torch.no_grad(), "no_grad")):
        with pytest.raises(
            UnsupportedError, match=f"'importance' needs gradients, and .* runs under torch.{name}"
        ) as e:
            run(context)
        assert "loss.backward() inside" in str(e.value)
    with torch.inference_mode(), record(model, ["entropy"]) as rec:
        model(tokens())
    with torch.no_grad():
        want = model(tokens()).logits
    assert not rec["entropy"].values.is_inference() and want.isfinite().all()


@torch.no_grad()
def test_bad_input() -> None:
    model, ids = tiny(), tokens()
    with pytest.raises(ConfigError, match=r"unknown probe 'entropi'. Did you mean 'entropy'"), record(model, "entropi"):
        pass
    with pytest.raises(ConfigError, match="probes holds a int"), record(model, [3]):  # type: ignore[list-item]
        pass
    with pytest.raises(ConfigError, match="probes is empty"), record(model, []):
        pass
    with (
        pytest.raises(ConfigError, match=r"position 90, but the text has 90 tokens \(0 to 89\)"),
        record(model, ChosenRows((90,))),
    ):
        model(ids)
    with pytest.raises(ConfigError, match="position 200"), record(model, Mass({"far": [200]})):
        model(ids)
    with pytest.raises(ConfigError, match=r"layers is .* layers 0 to 2"), record(model, "entropy", layers=[7]):
        pass
    with pytest.raises(ConfigError, match="none is attached"), record(model, "lost"):
        pass
    with (
        pytest.raises(ConfigError, match="weights='dense'"),
        foveal.attach(model, Dense()),
        record(model, "lost", weights="kept"),
    ):
        pass
    with pytest.raises(UnsupportedError, match="another text"), record(model, "entropy"):
        model(ids)
        model(ids)
    with record(model, "entropy") as rec:
        with pytest.raises(ConfigError, match="nothing was recorded"):
            rec.arrays()
        model(ids)
    with pytest.raises(ConfigError, match=r"no 'entropi'. Did you mean 'entropy'"):
        rec["entropi"]
    for wrong in (
        lambda: Influence(10, 5),
        lambda: Influence(-1),
        lambda: TopEdges(0),
        lambda: ChosenRows((-1,)),
        lambda: Mass({}),
    ):
        with pytest.raises(ConfigError, match="expected"):
            wrong()


@torch.no_grad()
def test_names_of_two_probes_of_a_kind() -> None:
    with record(tiny(), {"near": Influence(1, 5), "far": "influence"}) as rec:
        model_out = rec
    assert list(model_out.probes) == ["near", "far"]
    with record(tiny(), [Influence(1, 5), "influence"]) as rec:
        assert list(rec.probes) == ["influence", "influence_2"]


@torch.no_grad()
def test_selecting_saving_and_tables(tmp_path: Path) -> None:
    model = tiny()
    with record(model, ["entropy", "edges"]) as rec:
        model(tokens())
    one = rec["entropy"].select(layer=1, head=2)
    assert one.dims == ("token",) and torch.equal(one.values, rec["entropy"].values[1, 2])
    assert np.array_equal(np.asarray(one), one.values.numpy())
    with pytest.raises(ConfigError, match="layer is 9; expected one of 0 to 2"):
        one_more = rec["entropy"]
        one_more.select(layer=9)
    with pytest.raises(ConfigError, match=r"no axis is called 'heads'. Did you mean 'head'"):
        rec["entropy"].select(heads=1)
    rec.save(tmp_path / "r.safetensors", {"model": "tiny"})
    back = load(tmp_path / "r.safetensors")
    assert set(back) == set(rec) and back["entropy"].coords == rec["entropy"].coords
    for name in rec:
        torch.testing.assert_close(back[name].values, rec[name].values, equal_nan=True, rtol=0, atol=0)
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "bad")
    pytest.importorskip("pandas")
    table = rec["entropy"].pandas("entropy")
    assert table.index.names == ["layer", "head", "token"] and table[1, 2, 5] == float(one.values[5])


def test_gradient_checkpointing_records_every_layer_once() -> None:
    model, ids = tiny().train(), tokens(1, 20)
    with record(model, ["importance", "received"]) as plain:
        model(ids, labels=ids).loss.backward()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    with record(model, ["importance", "received"]) as rec:
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name in plain:
        torch.testing.assert_close(rec[name].values, plain[name].values)


@torch.no_grad()
def test_a_recording_inside_another_has_no_policy() -> None:
    model = tiny()
    with record(model, "entropy") as outer, record(model, "received") as inner:
        model(tokens())
    assert list(outer) == ["entropy"] and list(inner) == ["received"]
    with record(model, "entropy"), pytest.raises(ConfigError, match="none is attached"), record(model, "lost"):
        pass
