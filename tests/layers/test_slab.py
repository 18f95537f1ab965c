"""SLAB: the identities of its spec sheet for RepBN, the schedule, folds of whole models, and simplified linear attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ModelError, ShapeError
from foveal.layers.norm_fold import Affine, FoldedNorm, fold_norms, folded
from foveal.layers.prepbn import (
    PRepBN,
    RepBN,
    convert_norms,
    progressive,
    refresh_statistics,
    set_progress,
    valid_tokens,
)
from foveal.layers.slab import (
    CausalMemory,
    CausalSimplifiedLinearAttention,
    SimplifiedLinearAttention,
    cheaper_order,
    simplified,
)
from foveal.models import DecoderLM
from foveal.models.slab import prepbn_lm, slab_vit

C = 6


def make(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, weights and η as after a training."""
    g = make(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, RepBN):
                assert m.bn.running_mean is not None and m.bn.running_var is not None
                m.bn.running_mean.copy_(torch.randn(m.bn.num_features, generator=g))
                m.bn.running_var.copy_(0.1 + torch.rand(m.bn.num_features, generator=g))
                m.bn.weight.copy_(torch.randn(m.bn.num_features, generator=g))
                m.bn.bias.copy_(torch.randn(m.bn.num_features, generator=g))
                if m.eta is not None:
                    m.eta.fill_(0.7)
    return module


def rep(seed: int = 0, variance: float | None = None) -> RepBN:
    made = RepBN(C).double()
    randomise(made, seed)
    if variance is not None:
        assert made.bn.running_var is not None
        made.bn.running_var.fill_(variance)
    return made.eval()


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=make(seed), dtype=torch.float64).to(dtype)


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_identity_1_three_forms_and_the_fold_are_equal(dtype: torch.dtype, bound: float) -> None:
    norm, linear = rep().to(dtype), nn.Linear(C, 9, bias=False).to(dtype)
    x = tokens(3, 5, C, dtype=dtype)
    exact = norm(x)
    a, b = norm.affine()
    assert worst(a.to(dtype) * x + b.to(dtype), exact) <= bound
    assert worst(norm.as_batch_norm()(x.flatten(0, 1)).view_as(x), exact) <= bound
    w, c = folded(linear, "following", a, b)
    assert worst(x @ w.mT + c, linear(exact)) <= bound


def test_identity_2_leaving_eps_out_of_the_deviation_fails() -> None:
    norm = rep(variance=1e-6)
    x = tokens(20, C)
    assert worst(norm.as_batch_norm()(x), norm(x)) <= 1e-12
    short = norm.as_batch_norm()
    assert norm.eta is not None and short.running_var is not None
    with torch.no_grad():
        short.weight.copy_(norm.bn.weight + norm.eta * short.running_var.sqrt())
    assert worst(short(x), norm(x)) > 1e-4


def test_identity_3_the_fold_into_a_preceding_convolution_needs_the_skip_of_its_bias() -> None:
    norm, conv = rep(), nn.Conv2d(2, C, 3, padding=1).double()
    image = tokens(2, 2, 5, 5)
    exact = norm(conv(image).movedim(1, -1)).movedim(-1, 1)
    a, b = norm.affine()
    w, c = folded(conv, "preceding", a, b)
    assert worst(nn.functional.conv2d(image, w, c, padding=1), exact) <= 1e-12
    assert norm.eta is not None and conv.bias is not None
    without = c - norm.eta * conv.bias
    assert worst(nn.functional.conv2d(image, w, without, padding=1), exact) > 1e-3


@pytest.mark.parametrize("every", [None, 1, 3])
def test_identity_4_the_schedule(every: int | None) -> None:
    norm = nn.LayerNorm(C).double()
    module = PRepBN(norm, C, 4, every=every).double()
    x = tokens(7, C)
    assert float(module.gamma) == 1.0 and torch.equal(module(x), norm(x))
    gammas = []
    for step in range(1, 4 * (every or 1)):
        if every is None:
            module.set_progress(step)
        module(x)
        gammas.append(float(module.gamma))
    if every == 3:
        assert gammas[:2] == [1.0, 0.75] and gammas[4] == 0.5, "once per three forwards"
    if every is None:
        assert gammas == [0.75, 0.5, 0.25]
        module.set_progress(4)
    assert float(module.gamma) == 0.0 and module.phase == "done"
    twin = copy.deepcopy(module.rep)
    assert torch.equal(module(x), twin(x))
    module.eval()
    rest = module(x)
    module.set_progress(1)
    assert torch.equal(module(x), rest), "eval mode does not look at the counter"
    module.mixed_eval = True
    assert not torch.equal(module(x), rest)


def test_warm_up_does_not_touch_the_statistics_and_zero_start_gives_zero() -> None:
    module = PRepBN(nn.RMSNorm(C), C, 4, warmup=2, start="zero")
    x = tokens(9, C, dtype=torch.float32)
    for step in (0, 1):
        module.set_progress(step)
        assert torch.equal(module(x), module.norm(x))
    assert module.rep.bn.running_mean is not None
    assert bool((module.rep.bn.running_mean == 0).all()) and bool((module.rep(x) == 0).all())
    module.set_progress(2)
    module(x)
    assert bool((module.rep.bn.running_mean != 0).any())


def test_the_schedule_travels_in_the_state_dict() -> None:
    module = PRepBN(nn.LayerNorm(C), C, 4)
    module.set_progress(3)
    other = PRepBN(nn.LayerNorm(C), C, 4)
    other.load_state_dict(module.state_dict())
    assert (other.step, other.phase, float(other.gamma)) == (3, "blend", 0.25)
    assert float(copy.deepcopy(other).gamma) == 0.25


def test_padding_stays_out_of_the_statistics() -> None:
    module = PRepBN(nn.LayerNorm(C), C, 1).double()
    module.set_progress(1)
    x = tokens(2, 5, C)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    twin = copy.deepcopy(module)
    wanted = twin(x[valid])
    noisy = torch.where(valid[..., None], x, 1e6)
    with valid_tokens(module, valid):
        got = module(noisy)
    torch.testing.assert_close(got[valid], wanted)
    torch.testing.assert_close(module.rep.bn.running_var, twin.rep.bn.running_var)
    assert module.valid is None


def test_refreshing_moves_running_statistics_alone() -> None:
    model = nn.Sequential(PRepBN(nn.LayerNorm(C), C, 1), nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict())
    refresh_statistics(model, lambda m, x: m(x), [tokens(50, C, dtype=torch.float32) + 3 for _ in range(3)])
    changed = {k for k, v in model.state_dict().items() if isinstance(v, Tensor) and not torch.equal(v, before[k])}
    assert changed == {f"0.rep.bn.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert model.training and model[1].training


def test_autocast_keeps_statistics_in_full_precision() -> None:
    module = RepBN(C)
    x = 1000 + tokens(64, C, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    torch.testing.assert_close(out, RepBN(C)(x))
    half = module(x.bfloat16())
    assert half.dtype == torch.bfloat16


# --- folds of whole models --------------------------------------------------------------------------------------------


def ready(model: nn.Module, total: int = 4) -> nn.Module:
    if not progressive(model):
        convert_norms(model, total)
    set_progress(model, 10_000)
    return randomise(model).eval()


class Swin(nn.Module):
    """The parts of a Swin transformer that matter here: a patch embedding with a norm, blocks, a patch merging whose norm is four times as wide
    and followed by a layer without bias, a last norm before the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.embed_norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.merge_norm, self.merge = nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
        self.norm3, self.mlp3 = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.roll((-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        x = x.view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(b, h, w, c)
        return x.roll((1, 1), (1, 2))

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed_norm(self.embed(image).movedim(1, -1))
        x = x + self.windows(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        x = self.merge_norm(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1))
        x = self.merge(x)
        x = x + self.mlp3(self.norm3(x))
        return self.head(self.norm(x).flatten(1, 2).mean(1))


def test_identity_7_swin_like() -> None:
    torch.manual_seed(0)
    model = ready(Swin())
    image = tokens(3, 3, 8, 8, dtype=torch.float32)
    before = model(image)
    report = fold_norms(model, lambda m: m(image))
    assert worst(model(image), before) <= 1e-4 and report.error <= 1e-4
    where = {f.norm: (f.how, f.into) for f in report.folds}
    assert where == {
        "embed_norm": ("preceding", ("embed",)),
        "norm1": ("following", ("qkv",)),
        "norm2": ("following", ("mlp.0",)),
        "merge_norm": ("following", ("merge",)),
        "norm3": ("following", ("mlp3.0",)),
        "norm": ("following", ("head",)),
    }
    assert report.gained_bias == ["merge"] and not progressive(model)


@pytest.mark.parametrize("linear", [False, True])
def test_identity_7_vit(linear: bool) -> None:
    model = ready(slab_vit(4, (4, 4), 3, dim=16, depth=2, num_heads=2, linear=linear))
    image = tokens(3, 1, 4, 4, dtype=torch.float32)
    before = model(image)
    report = fold_norms(model, lambda m: m(image))
    assert worst(model(image), before) <= 1e-4
    assert len(report.folds) == 5 and all(f.how == "following" for f in report.folds)


def test_identity_7_and_8_language_model() -> None:
    model = ready(prepbn_lm(11, 3, dim=16, depth=2, num_heads=2))
    ids = torch.randint(11, (2, 9), generator=make(0))
    before = model(ids)
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    assert torch.equal(model(other)[:, :5], before[:, :5]), "in eval mode no token sees a later one"
    model.train()
    assert not torch.allclose(model(other)[:, :5], model(ids)[:, :5]), "in training mode statistics do"
    ready(model)
    before = model(ids)
    report = fold_norms(model, lambda m: m(ids))
    assert worst(model(ids), before) <= 1e-4 and all(f.how == "following" for f in report.folds)
    assert "head" in report.gained_bias
    generated = model.generate(ids, 3)  # type: ignore[operator]
    assert generated.shape == (2, 3)


@pytest.mark.parametrize("tied", [False, True])
def test_identity_7_hugging_face_llama(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = ready(LlamaForCausalLM(config))
    ids = torch.randint(13, (2, 7), generator=make(0))
    before = model(ids).logits
    report = fold_norms(model, lambda m: m(ids).logits)
    assert worst(model(ids).logits, before) <= 1e-4
    assert [f.into for f in report.folds if f.norm == "model.layers.0.input_layernorm"] == [
        tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv")
    ]
    assert report.folds[-1].into == ("lm_head",) and report.untied == (["lm_head"] if tied else [])


def test_identity_7_hugging_face_vit_and_pvt() -> None:
    from transformers import PvtConfig, PvtForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    image = tokens(2, 3, 32, 32, dtype=torch.float32)
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8)
    )  # fmt: skip
    pvt = PvtForImageClassification(
        PvtConfig(
            image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
            mlp_ratios=[2, 2, 2, 2], sequence_reduction_ratios=[4, 2, 1, 1],
        )
    )  # fmt: skip
    for model in (vit, pvt):
        ready(model)
        before = model(image).logits
        report = fold_norms(model, lambda m: m(image).logits)
        assert worst(model(image).logits, before) <= 1e-4
        assert sum(f.how != "affine" for f in report.folds) >= 0.9 * len(report.folds), report.folds


def test_pytorch_encoder_layer_leaves_its_fused_path() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True).eval()
    ready(model)
    x = tokens(2, 5, 8, dtype=torch.float32)
    with torch.no_grad():
        before = model(x)
    assert worst(model(x), before) <= 1e-6
    report = fold_norms(model, lambda m: m(x))
    assert [f.into for f in report.folds] == [("self_attn",), ("linear1",)]
    assert worst(model(x), before) <= 1e-4


def test_a_norm_in_the_residual_stream_stays_an_affine_map() -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(torch.sin(x))
            return x + self.linear(x)

    model = ready(Post())
    x = tokens(4, C, dtype=torch.float32)
    before = model(x)
    kept = copy.deepcopy(model.linear)
    report = fold_norms(model, lambda m: m(x))
    assert report.folds[0].how == "affine" and isinstance(model.norm, Affine)
    assert worst(model(x), before) <= 1e-5 and torch.equal(model.linear.weight, kept.weight)


def test_folding_is_refused_before_the_schedule_ends() -> None:
    model = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C))
    convert_norms(model, 10)
    set_progress(model, 9)
    with pytest.raises(ConfigError, match=r"has γ = 0\.1; expected 0"):
        fold_norms(model, lambda m: m(tokens(2, C, dtype=torch.float32)))
    with pytest.raises(ConfigError, match="found no PRepBN"):
        fold_norms(nn.Linear(2, 2), lambda m: m(torch.ones(1, 2)))
    ready(model)
    with pytest.raises(ModelError, match="never reaches 0"):
        fold_norms(model, lambda m: torch.ones(1))


def test_converting_finds_norms_once_and_leaves_others() -> None:
    model = DecoderLM(7, 16, 2, 2)
    names = convert_norms(model, 5, where=lambda name, _: name != "norm")
    assert len(names) == 4 and not isinstance(model.norm, PRepBN)
    assert all(float(m.rep.bn.weight.detach()[0]) == 0.0 for m in progressive(model))
    assert convert_norms(model, 5) == ["norm"], "norms inside PRepBN are not converted again"
    with pytest.raises(ConfigError, match="found no LayerNorm"):
        convert_norms(nn.Linear(2, 2), 5)
    with pytest.raises(ConfigError, match="Did you mean 'prepbn'"):
        convert_norms(model, 5, kind="prepbm")  # type: ignore[arg-type]


def test_a_folded_model_saves_and_loads() -> None:
    model = ready(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 3)))
    x = tokens(4, C, dtype=torch.float32)
    fold_norms(model, lambda m: m(x))
    assert isinstance(model[0], FoldedNorm)
    twin = nn.Sequential(nn.Identity(), nn.Linear(C, 3))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


# --- simplified linear attention --------------------------------------------------------------------------------------

GRID = (3, 4)


def sla(seed: int = 0, **options: object) -> SimplifiedLinearAttention:
    torch.manual_seed(seed)
    made = SimplifiedLinearAttention(8, 2, GRID, **options).double().eval()  # type: ignore[arg-type]
    nn.init.normal_(made.position, std=0.5)
    return made


def quiet(module: SimplifiedLinearAttention) -> SimplifiedLinearAttention:
    """DWC zero."""
    with torch.no_grad():
        module.dwc.weight.zero_()
        assert module.dwc.bias is not None
        module.dwc.bias.zero_()
    return module


def test_identity_5_both_orders_agree() -> None:
    x = tokens(2, 12, 8)
    torch.testing.assert_close(sla(order="kv")(x), sla(order="qk")(x), rtol=1e-6, atol=1e-6)
    assert cheaper_order(196, 196, 64) == "kv" and cheaper_order(12, 12, 64) == "qk"


def test_sla_equals_its_equation() -> None:
    module, x = sla(), tokens(2, 12, 8)
    q, k, v = module.qkv(x).chunk(3, -1)
    k = k + module.position
    out = torch.zeros(2, 12, 8, dtype=torch.float64)
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        phi_q, phi_k, vh = q[..., own].relu(), k[..., own].relu(), v[..., own]
        for i in range(12):
            weights = (phi_q[:, i : i + 1] * phi_k).sum(-1)
            out[:, i, own] = (weights[..., None] * vh).sum(1) / (weights.sum(1, keepdim=True) + 1e-6)
        padded = nn.functional.pad(vh.view(2, 3, 4, 4), (0, 0, 2, 2, 2, 2))
        for i in range(3):
            for j in range(4):
                patch = padded[:, i : i + 5, j : j + 5]  # (B, 5, 5, d)
                out[:, 4 * i + j, own] += (patch * module.dwc.weight[:, 0].permute(1, 2, 0)).sum(
                    (1, 2)
                ) + module.dwc.bias
    torch.testing.assert_close(module(x), module.out(out))


def test_identity_5_weights_sum_to_one_and_dark_queries_give_the_convolution() -> None:
    g = make(0)
    q, k = (torch.randn(1, 1, 12, 6, generator=g, dtype=torch.float64) for _ in range(2))
    q[:, :, 3] = -1.0
    for order in ("kv", "qk"):
        sums = simplified(q, k, torch.ones(1, 1, 12, 1, dtype=torch.float64), order)  # type: ignore[arg-type]
        mass = (q.relu() @ k.relu().mT).sum(-1)
        torch.testing.assert_close(sums[..., 0][mass > 0.1], torch.ones_like(mass[mass > 0.1]), rtol=0, atol=1e-4)
        assert bool((sums[:, :, 3] == 0).all())


def test_identity_6_permutation() -> None:
    x, order = tokens(2, 12, 8), torch.randperm(12, generator=make(1))
    module = quiet(sla())
    nn.init.zeros_(module.position)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    with_convolution = sla()
    nn.init.zeros_(with_convolution.position)
    assert not torch.allclose(with_convolution(x[:, order]), with_convolution(x)[:, order])


def test_other_grids_interpolate_the_table() -> None:
    module = sla()
    assert module(tokens(1, 30, 8), grid=(5, 6)).shape == (1, 30, 8)
    with pytest.raises(ShapeError, match=r"grid of 3 × 4 tokens\. Pass grid"):
        module(tokens(1, 30, 8))


def test_sla_under_autocast_bfloat16_and_compile() -> None:
    module, x = sla().float(), tokens(2, 12, 8, dtype=torch.float32)
    exact = module(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert worst(module(x).float(), exact) < 0.05
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager")
    torch.testing.assert_close(compiled(x), exact)
    twin = SimplifiedLinearAttention(8, 2, GRID)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.eval()(x), exact)
    assert worst(module.bfloat16()(x.bfloat16()).float(), exact) < 0.05


def test_gradients_reach_every_parameter() -> None:
    module = sla().float().train()
    module(tokens(2, 12, 8, dtype=torch.float32)).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())


def test_the_causal_extension_decodes_as_it_trains() -> None:
    torch.manual_seed(0)
    module = CausalSimplifiedLinearAttention(8, 2).double()
    x = tokens(2, 20, 8)
    whole, memory = module(x), CausalMemory()
    parts = [module(x[:, :13], memory), *(module(x[:, i : i + 1], memory) for i in range(13, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    other = x.clone()
    other[:, 11:] = 5
    assert torch.equal(module(other)[:, :11], whole[:, :11])


@pytest.mark.parametrize("options", [{"num_heads": 3}, {"kernel_size": 4}, {"order": "vk"}])
def test_bad_options_are_told(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="SimplifiedLinearAttention has"):
        SimplifiedLinearAttention(8, **{"num_heads": 2, "grid": GRID, **options})  # type: ignore[arg-type]
