"""Gated attention: the identities of its spec sheet, the published layouts, and Qwen3-Next's own module with the same weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.layers.gate import ACTIVATIONS, CHOICES, Gate
from foveal.layers.gated import GateConfig, GatedAttention, KeyValues
from foveal.layers.gated_layouts import LAYOUTS, join_fused, load_published, published_state, split_fused
from foveal.layers.rotary import rotary, rotate, rotate_halves
from foveal.models import DecoderLM, Hosted, Memory, SelfAttention
from foveal.patterns import SlidingWindow

B, N, DIM, H, K, D = 2, 19, 24, 6, 3, 4
POSITIONS = CHOICES["position"]
VARIANTS = [
    *(GateConfig(p) for p in POSITIONS),
    *(GateConfig(p, granularity="headwise") for p in POSITIONS[:4]),
    *(GateConfig(p, sharing="shared", mode="additive", activation="silu") for p in POSITIONS[:4]),
    GateConfig(kind="constant"),
    GateConfig(kind="rmsnorm"),
    GateConfig(kind="silu"),
    GateConfig(sharing="shared", mean="scores"),
    GateConfig(activation="ns_sigmoid"),
]
EACH = pytest.mark.parametrize("config", VARIANTS, ids=lambda c: "-".join(str(v) for v in vars(c).values()))


def layer(gate: GateConfig | None = None, *, seed: int = 0, **changes: object) -> GatedAttention:
    """In float64 with random parameters everywhere; layers of one seed share all weights that both have."""
    model = GatedAttention(DIM, H, K, **{"gate": gate, **changes}).double()
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            g = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.5)
    return model.eval()


def tokens(length: int = N, batch: int = B, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(model: GatedAttention, x: Tensor) -> Tensor:
    """One head and one query at a time."""
    config = model.gate.config if model.gate is not None else None

    def gated(position: str, name_heads: int, size: int, y: Tensor) -> Tensor:
        """``y`` is ``(B, N, heads, size)``."""
        if config is None or config.position != position:
            return y
        if config.kind == "rmsnorm":
            return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.gate.norm.weight
        if config.kind == "silu":
            return y * torch.sigmoid(y)
        act = ACTIVATIONS[config.activation]
        out = torch.empty_like(y)
        for b, i in product(range(y.shape[0]), range(y.shape[1])):
            z = model.gate.theta if config.kind == "constant" else x[b, i] @ model.gate.proj.weight.T
            z = z.view(name_heads, -1)
            score = act(z)
            if config.sharing == "shared":
                score = act(z.mean(0)) if config.mean == "logits" else score.mean(0)
                score = score.expand(name_heads, -1)
            for h in range(name_heads):
                s = score[h].expand(size)
                out[b, i, h] = y[b, i, h] * s if config.mode == "multiplicative" else y[b, i, h] + s
        return out

    q = gated("G4", H, D, model.q_proj(x).view(*x.shape[:2], H, D))
    k = gated("G3", K, D, model.k_proj(x).view(*x.shape[:2], K, D))
    v = gated("G2", K, D, model.v_proj(x).view(*x.shape[:2], K, D))
    rms = lambda t, w: t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    q, k = rms(q, model.q_norm.weight), rms(k, model.k_norm.weight)
    turn = rotary(torch.arange(x.shape[1])[:, None], D)
    q, k = (rotate(t.transpose(1, 2), turn).transpose(1, 2) for t in (q, k))
    y = torch.zeros(*x.shape[:2], H, D, dtype=x.dtype)
    for b, i, h in product(range(x.shape[0]), range(x.shape[1]), range(H)):
        keys, values = k[b, : i + 1, h // (H // K)], v[b, : i + 1, h // (H // K)]
        y[b, i, h] = torch.softmax(keys @ q[b, i, h] / D**0.5, 0) @ values
    y = gated("G1", H, D, y).flatten(2)
    return gated("G5", 1, DIM, (y @ model.o_proj.weight.T)[:, :, None])[:, :, 0]


@EACH
@torch.no_grad()
def test_equals_the_definition(config):
    model, x = layer(config), tokens()
    torch.testing.assert_close(model(x), by_definition(model, x), atol=1e-11, rtol=1e-11)


def zeroed(config: GateConfig) -> GatedAttention:
    model = layer(config)
    torch.nn.init.zeros_(model.gate.proj.weight)
    return model


@pytest.mark.parametrize("position", ["G1", "G2", "G5"])
def test_identity_1_a_closed_sigmoid_halves_the_output(position):
    torch.testing.assert_close(zeroed(GateConfig(position))(tokens()), 0.5 * layer()(tokens()), atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize(("position", "activation"), list(product(POSITIONS, ["silu", "identity"])))
def test_identity_2_adding_nothing_changes_no_bit(position, activation):
    model = zeroed(GateConfig(position, mode="additive", activation=activation))
    assert torch.equal(model(tokens()), layer()(tokens()))


@pytest.mark.parametrize("position", POSITIONS[:4])
def test_identity_3_headwise_is_elementwise_with_repeated_columns(position):
    head, element = layer(GateConfig(position, granularity="headwise")), layer(GateConfig(position))
    with torch.no_grad():
        element.gate.proj.weight.copy_(head.gate.proj.weight.repeat_interleave(D, 0))
    torch.testing.assert_close(head(tokens()), element(tokens()), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize(("position", "mean"), list(product(POSITIONS[:4], CHOICES["mean"])))
def test_identity_4_shared_is_specific_when_heads_agree(position, mean):
    one = layer(GateConfig(position))
    shared = layer(GateConfig(position, sharing="shared", mean=mean))
    with torch.no_grad():
        rows = one.gate.proj.weight[:D].repeat(one.gate.heads, 1)
        one.gate.proj.weight.copy_(rows)
        shared.gate.proj.weight.copy_(rows)
    torch.testing.assert_close(shared(tokens()), one(tokens()), atol=1e-13, rtol=1e-13)


def test_identity_5_a_gate_constant_over_tokens_is_the_same_before_and_after_attention():
    outer, inner = layer(GateConfig("G1", kind="constant")), layer(GateConfig("G2", kind="constant"))
    with torch.no_grad():
        per_kv = inner.gate.theta.view(K, 1, D)
        outer.gate.theta.copy_(per_kv.expand(K, H // K, D).flatten())
    torch.testing.assert_close(outer(tokens()), inner(tokens()), atol=1e-13, rtol=1e-13)
    with torch.no_grad():
        outer.gate.theta[:D] += 1.0  # no longer equal inside the group
    assert not torch.allclose(outer(tokens()), inner(tokens()))


@pytest.mark.parametrize(
    ("layout", "granularity", "bias"), list(product(LAYOUTS, CHOICES["granularity"], [False, True]))
)
def test_identity_6_fused_layouts_round_trip_exactly(layout, granularity, bias):
    config = GateConfig(granularity=granularity, init="identity" if bias else "linear")
    offset = 1.0 if layout == "per_head" else 0.0
    model, other = (layer(config, seed=s, bias=bias, norm_offset=offset) for s in (0, 1000))
    state = published_state(model, layout)
    rows = H * (2 * D if granularity == "elementwise" else D + 1)
    assert state["q_proj.weight"].shape == (rows, DIM) and not any("gate" in name for name in state)
    load_published(other, state, layout)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(model(tokens()), other(tokens()))


@pytest.mark.parametrize("granularity", CHOICES["granularity"])
def test_identity_6_row_orders_are_the_documented_ones(granularity):
    """Rows written by name: (head, channel) of queries, and the same plus 1000 of gates."""
    width = D if granularity == "elementwise" else 1
    query = [100 * h + c for h in range(H) for c in range(D)]
    gate = [1000 + 100 * h + c for h in range(H) for c in range(width)]
    per_head = [
        r for h in range(H) for r in [100 * h + c for c in range(D)] + [1000 + 100 * h + c for c in range(width)]
    ]
    pairs = [(2 * g, 2 * g + 1) for g in range(K)]
    per_group = [
        r
        for pair in pairs
        for r in [100 * h + c for h in pair for c in range(D)]
        + [1000 + 100 * h + c for h in pair for c in range(width)]
    ]
    for layout, rows in (("per_head", per_head), ("per_group", per_group)):
        q, g = split_fused(torch.tensor(rows), H, K, D, layout, granularity)
        assert (q.tolist(), g.tolist()) == (query, gate), layout
        assert join_fused(q, g, H, K, D, layout, granularity).tolist() == rows
    same = [split_fused(torch.arange(2 * H * D), H, H, D, layout)[0].tolist() for layout in LAYOUTS]
    assert same[0] == same[1], "with a key head for every head there is one layout"


def test_a_checkpoint_read_in_the_wrong_layout_is_another_model_and_norms_say_which_it_is():
    model = layer(GateConfig())
    state = published_state(model, "per_group")
    with pytest.raises(UnsupportedError, match="norm_offset=1"):
        load_published(layer(GateConfig()), state, "per_head")
    q, _ = split_fused(state["q_proj.weight"], H, K, D, "per_head")
    assert not torch.equal(q, model.q_proj.weight)


@pytest.mark.parametrize("heads", [(4, 2), (6, 1)], ids=str)
def test_parity_with_the_gate_of_qwen3_next(heads):
    """The module of transformers, its weights loaded here: the same output, whole and step by step."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

    config = Qwen3NextConfig(
        hidden_size=32,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=16,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = Qwen3NextAttention(config, 0).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    turn = Qwen3NextRotaryEmbedding(config)
    ours = GatedAttention(
        32, *heads, 16, gate=GateConfig(), norm_offset=1, rope_halves=True, rope_dim=2 * turn.inv_freq.numel(),
        rope_base=config.rope_parameters["rope_theta"],
    )  # fmt: skip
    ours = ours.double().eval()
    load_published(ours, theirs.state_dict(), "per_head")
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    mask = torch.full((11, 11), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    positions = torch.arange(11)[None]
    expected, _ = theirs(x, turn(x.float(), positions), mask)
    got = ours(x)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)  # their angles and norms are float32
    memory = KeyValues()
    steps = torch.cat([ours(part, memory=memory) for part in x.split((5, 1, 1, 4), 1)], 1)
    torch.testing.assert_close(steps, got, atol=1e-12, rtol=1e-12)
    wrong = GatedAttention(32, *heads, 16, gate=GateConfig(), norm_offset=1, rope_halves=True, rope_dim=4).double()
    q, gate = split_fused(theirs.q_proj.weight, *heads, 16, "per_group")
    wrong.load_state_dict({**ours.state_dict(), "q_proj.weight": q, "gate.proj.weight": gate})
    assert not torch.allclose(wrong(x), expected, atol=0.01), "the other layout loads and is garbage"


def test_halves_and_pairs_turn_alike_up_to_the_order_of_channels():
    x = tokens()[:, None, :, :8]
    turn = rotary(torch.arange(N)[:, None], 8)
    order = torch.arange(8).view(4, 2).T.flatten()
    torch.testing.assert_close(rotate_halves(x[..., order], turn), rotate(x, turn)[..., order])


@EACH
@pytest.mark.parametrize("cuts", [(1,) * N, (12, 1, 6)])
def test_identity_7_decoding_equals_one_pass(config, cuts):
    model, memory = layer(config), KeyValues()
    parts = [model(part, memory=memory) for part in tokens().split(cuts, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens()), atol=1e-12, rtol=1e-12)
    assert memory.length == N


def test_identity_8_parameters_of_the_papers_model():
    """15A2B: 24 layers, width 2048, 32 heads of 128, 4 key heads."""

    def millions(config: GateConfig) -> float:
        with torch.device("meta"):
            gate = GatedAttention(2048, 32, 4, 128, gate=config).gate
        return round(24 * sum(p.numel() for p in gate.parameters()) / 1e6, 2)

    head = "headwise"
    assert [millions(GateConfig(p)) for p in POSITIONS] == [201.33, 25.17, 25.17, 201.33, 100.66]
    assert [millions(GateConfig(p, granularity=head)) for p in POSITIONS[:4]] == [1.57, 0.20, 0.20, 1.57]
    assert millions(GateConfig(sharing="shared")) == 201.33


@pytest.mark.parametrize("position", POSITIONS)
def test_identity_9_only_gates_of_queries_and_keys_change_probabilities(position):
    plain, gated = layer().project(tokens()), layer(GateConfig(position)).project(tokens())
    same = all(torch.equal(a, b) for a, b in zip(plain[:2], gated[:2], strict=True))
    assert same == (position in ("G1", "G2", "G5"))


@pytest.mark.parametrize("position", ["G3", "G4"])
def test_identity_10_a_scale_per_head_before_a_norm_does_nothing(position):
    gated, plain = layer(GateConfig(position, granularity="headwise")), layer()
    for model in (gated, plain):
        model.q_norm.eps = model.k_norm.eps = 0.0
    torch.testing.assert_close(gated(tokens()), plain(tokens()), atol=1e-12, rtol=1e-12)
    free = {"qk_norm": False}
    assert not torch.allclose(layer(gated.gate.config, **free)(tokens()), layer(**free)(tokens()))


def test_identity_10_nor_does_a_headwise_gate_before_a_norm_of_each_head():
    gate = layer(GateConfig(granularity="headwise")).gate
    y = torch.randn(B, N, H, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norm = lambda t: torch.nn.functional.rms_norm(t, (D,), eps=0.0)  # noqa: E731
    torch.testing.assert_close(norm(gate(tokens(), y)), norm(y), atol=1e-12, rtol=1e-12)


@EACH
def test_identity_11_the_future_does_not_reach_the_past(config):
    model, other = layer(config), tokens()
    other[:, 11] += 5.0
    got, moved = model(tokens()), model(other)
    assert torch.equal(got[:, :11], moved[:, :11]) and not torch.equal(got[:, 11], moved[:, 11])


@pytest.mark.parametrize("granularity", CHOICES["granularity"])
@pytest.mark.parametrize("mode", CHOICES["mode"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_identity_12_gradients(activation, mode, granularity):
    torch.manual_seed(0)
    gate = Gate(GateConfig(activation=activation, mode=mode, granularity=granularity), 5, 2, 3).double()
    x, y = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 3, 5), (1, 3, 2, 3)))
    weight = gate.proj.weight.detach().clone().requires_grad_()
    run = lambda x, y, w: torch.func.functional_call(gate, {"proj.weight": w}, (x, y))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, y, weight))


@settings(max_examples=30, deadline=None)
@given(st.floats(-1e4, 1e4))
def test_identity_12_ns_sigmoid_stays_in_its_range(x):
    value = float(ACTIVATIONS["ns_sigmoid"](torch.tensor(x, dtype=torch.float64)))
    assert 0.5 <= value <= 1.0


@EACH
def test_gradients_of_the_layer_are_those_of_the_definition(config):
    model, found = layer(config), []
    weight = tokens(7, seed=5)
    for run in (model, lambda x: by_definition(model, x)):
        x = tokens(7).requires_grad_()
        found.append(torch.autograd.grad((run(x) * weight).sum(), (x, model.o_proj.weight, model.v_proj.weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_left_padding_windows_and_both_sides():
    model, x = layer(GateConfig()), tokens(12, 1)
    padded = torch.cat([tokens(5, 1, seed=8), x], 1)
    valid = torch.arange(17)[None] >= 5
    got = model(padded, positions=torch.arange(-5, 12), valid=valid)[:, 5:]
    torch.testing.assert_close(got, model(x), atol=1e-12, rtol=1e-12)
    near = model(x, pattern=SlidingWindow(1))  # itself alone: attention gives the value
    v = model.v_proj(x).unflatten(-1, (K, 1, D)).expand(-1, -1, -1, H // K, -1).flatten(2, 3)
    torch.testing.assert_close(near, model.o_proj(model.gate(x, v).flatten(2)), atol=1e-12, rtol=1e-12)
    memory, parts = KeyValues(), []
    for part in x.split((7, 1, 4), 1):
        parts.append(model(part, pattern=SlidingWindow(3), memory=memory))
    torch.testing.assert_close(torch.cat(parts, 1), model(x, pattern=SlidingWindow(3)), atol=1e-12, rtol=1e-12)
    both = layer(GateConfig(), causal=False, rope_base=None)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(both(x[:, order]), both(x)[:, order], atol=1e-12, rtol=1e-12)


def test_identity_start_is_close_to_the_ungated_layer():
    for config in (GateConfig(init="identity"), GateConfig(init="identity", mode="additive", activation="silu")):
        torch.manual_seed(0)
        model = GatedAttention(DIM, H, K, gate=config)
        plain = GatedAttention(DIM, H, K, gate=None)
        plain.load_state_dict(model.state_dict(), strict=False)
        x = tokens().float()
        scale = torch.sigmoid(torch.tensor(4.0)) if config.mode == "multiplicative" else 1.0
        torch.testing.assert_close(model(x), scale * plain(x))


def test_the_backbone_takes_it_with_policies_and_a_memory():
    def gated(index: int) -> Hosted:
        return Hosted(GatedAttention(32, 4, 2, gate=GateConfig()), index)

    model = DecoderLM(23, 32, 2, attention=gated).double().eval()
    ids = torch.randint(23, (2, 20), generator=torch.Generator().manual_seed(0))
    for pattern in (None, SlidingWindow(4)):
        memory = Memory()
        parts = [model(part, pattern, memory) for part in ids.split((9, 1, 10), 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids, pattern), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(model(ids), model(ids, SlidingWindow(4)))


def test_without_a_gate_it_is_the_backbones_own_attention():
    ours = GatedAttention(32, 4, 2, gate=None, qk_norm=False)
    own = SelfAttention(32, 4, 0, 2)
    one = DecoderLM(5, 32, 1, attention=lambda i: own)  # draws the weights anew
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    own.qkv.load_state_dict({"weight": torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)])})
    own.out.load_state_dict(ours.o_proj.state_dict())
    torch.testing.assert_close(own(x, one.begin(torch.zeros(2, 9, dtype=torch.long))), ours(x))


@EACH
def test_state_dict_deepcopy_autocast_and_low_precision(config):
    model = layer(config).float()
    x = tokens().float()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        other = GatedAttention(DIM, H, K, gate=config)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.eval()(x), expected)
        scale = float(expected.abs().max())
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x)
        assert cast.dtype == torch.bfloat16
        assert float((cast.float() - expected).abs().max()) < 0.05 * scale
        low = copy.deepcopy(model).bfloat16()(x.bfloat16()).float()
        assert float((low - expected).abs().max()) < 0.05 * scale
    assert torch.equal(model(x[:, ::2].contiguous()), model(x[:, ::2])), "views are fine"


def test_compiles():
    model, x = layer(GateConfig()).float(), tokens().float()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: GateConfig("G6"), ConfigError, "Did you mean 'G"),
        (lambda: GateConfig(activation="sigmiod"), ConfigError, "Did you mean 'sigmoid'"),
        (lambda: GateConfig(granularity="head"), ConfigError, "Did you mean 'headwise'"),
        (lambda: GateConfig("G5", granularity="headwise"), ConfigError, "no heads"),
        (lambda: GateConfig("G2", kind="rmsnorm"), ConfigError, "G1"),
        (lambda: GateConfig(init="identity", activation="silu"), ConfigError, "identity"),
        (lambda: GateConfig(position=3), ConfigError, "position"),
        (lambda: GatedAttention(24, 5), ConfigError, "num_heads=5"),
        (lambda: GatedAttention(24, 6, 4), ConfigError, "num_kv_heads=4"),
        (lambda: GatedAttention(18, 6), ConfigError, "rope_dim is 3"),
        (lambda: layer()(tokens()[..., :5]), ShapeError, r"\(batch, length, 24\)"),
        (lambda: layer()(tokens(), positions=torch.arange(3)), ShapeError, "positions"),
        (lambda: layer()(tokens(), valid=torch.ones(2, 3, dtype=torch.bool)), ShapeError, "valid"),
        (lambda: layer(causal=False)(tokens(), memory=KeyValues()), UnsupportedError, "causal=True"),
        (lambda: split_fused(torch.zeros(48, 2), H, K, D, "per_haed"), ConfigError, "Did you mean 'per_head'"),
        (lambda: split_fused(torch.zeros(47, 2), H, K, D, "per_head"), ShapeError, "47 rows; expected 48"),
        (lambda: published_state(layer(GateConfig("G2")), "per_head"), UnsupportedError, "G1"),
        (lambda: load_published(layer(GateConfig()), {}, "per_group"), ShapeError, "checkpoint has none"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_configs_round_trip_through_json():
    from foveal.core.serial import from_json, to_json

    config = replace(GateConfig("G2"), granularity="headwise", activation="ns_sigmoid")
    assert from_json(GateConfig, to_json(config)) == config
