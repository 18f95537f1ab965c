"""NPRF attention: the identities of its spec sheet, against the dense form with the same random directions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.kernels import toeplitz_attention as kernel
from foveal.kernels.linear import linear_attention
from foveal.kernels.toeplitz_attention import toeplitz_attention, toeplitz_attention_reference
from foveal.layers.nprf import NPRFAttention, NPRFMemory, RelativeBias
from foveal.layers.nprf_convert import conversion_drop, convert, from_multihead, to_random_features, weight_error
from foveal.layers.random_features import draw_directions, positive_features, trigonometric_features

DIM, HEADS = 12, 3
CAUSAL = pytest.mark.parametrize("causal", [False, True])


def make(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mapped(n: int, m: int = 4, width: int = 5, seed: int = 0, spread: float = 0.5) -> tuple[Tensor, ...]:
    """φ(q), φ(k), v and a table e^b."""
    g = make(seed)
    q, k = (torch.rand(2, HEADS, n, m, generator=g, dtype=torch.float64) + 0.1 for _ in range(2))
    v = torch.randn(2, HEADS, n, width, generator=g, dtype=torch.float64)
    return q, k, v, (spread * torch.randn(HEADS, 2 * n - 1, generator=g, dtype=torch.float64)).exp()


def layer(seed: int = 0, bias: float = 0.5, **options: object) -> NPRFAttention:
    torch.manual_seed(seed)
    made = NPRFAttention(DIM, HEADS, 6, **{"max_distance": 9, **options}).double().eval()  # type: ignore[arg-type]
    if made.bias is not None:
        made.bias.table.data.normal_(0, bias, generator=make(seed + 1))
    return made


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randn(2, n, DIM, generator=make(seed), dtype=torch.float64)


def dense(model: NPRFAttention, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The layer by its equations, with whole matrices; shares only the projections with it."""
    q, k, v = model.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
    if model.normalised:
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    else:
        q, k = q / (DIM // HEADS) ** 0.25, k / (DIM // HEADS) ** 0.25
    w, n = model.directions, x.shape[1]

    def phi(y: Tensor) -> Tensor:
        return torch.exp(torch.einsum("bhnd,hmd->bhnm", y, w) - y.square().sum(-1, keepdim=True) / 2)

    pairs = phi(q) @ phi(k).mT if model.kernel == "prf" else torch.exp(q @ k.mT)
    if model.bias is not None:
        reach = model.bias.max_distance
        delta = (torch.arange(n)[None] - torch.arange(n)[:, None]).clamp(-reach, reach)
        pairs = pairs * model.bias.table[:, delta + reach].exp()
    if model.causal:
        pairs = pairs.tril()
    if valid is not None:
        pairs = pairs * valid[:, None, None]
    out = pairs / pairs.sum(-1, keepdim=True) @ v
    return model.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
@CAUSAL
def test_identity_1_fft_equals_the_dense_reference(n: int, causal: bool) -> None:
    q, k, v, c = mapped(n)
    exact = toeplitz_attention_reference(q, k, v, c, causal=causal)
    got = toeplitz_attention(q, k, v, c, causal=causal, precision="float64")
    assert float((got - exact).abs().max()) <= (1e-13 if not causal else 1e-10)
    if not causal:
        single = toeplitz_attention(q.float(), k.float(), v.float(), c.float(), precision="float32")
        exact = toeplitz_attention_reference(q.float(), k.float(), v.float(), c.float())
        assert float((single - exact).abs().max()) <= 2e-6


@given(
    n=st.sampled_from([1, 2, 7, 63, 64, 65, 100]),
    causal=st.booleans(),
    precision=st.sampled_from(["auto", "float64", "dense"]),
    one_table=st.booleans(),
    seed=st.integers(0, 50),
)
def test_the_kernel_and_its_gradients_equal_the_reference(
    n: int, causal: bool, precision: str, one_table: bool, seed: int
) -> None:
    leaves = list(mapped(n, seed=seed))
    leaves[3] = leaves[3][:1] if one_table else leaves[3]
    for x in leaves:
        x.requires_grad_()
    got = toeplitz_attention(*leaves, causal=causal, precision=precision)  # type: ignore[arg-type]
    exact = toeplitz_attention_reference(*leaves, causal=causal)
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    upstream = torch.randn(exact.shape, generator=make(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(exact, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_blocks_of_features_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mapped(80)
    whole = [toeplitz_attention(*case, precision=p) for p in ("float64", "dense")]
    monkeypatch.setattr(kernel, "BUFFER", 1)
    monkeypatch.setattr(kernel, "DENSE_BUFFER", 1)
    for before, p in zip(whole, ("float64", "dense"), strict=True):
        torch.testing.assert_close(toeplitz_attention(*case, precision=p), before)


@CAUSAL
@pytest.mark.parametrize("shape", ["zero", "constant"])
def test_identity_2_a_flat_bias_is_plain_kernelized_attention(causal: bool, shape: str) -> None:
    q, k, v, c = mapped(90)
    flat = torch.ones_like(c) if shape == "zero" else torch.full_like(c, math.exp(3.0))
    plain, _ = linear_attention(q, k, v, causal=causal)
    torch.testing.assert_close(toeplitz_attention(q, k, v, flat, causal=causal, precision="float64"), plain)
    biased = toeplitz_attention(q, k, v, c, causal=causal)
    torch.testing.assert_close(toeplitz_attention(q, k, v, c * math.exp(-2), causal=causal), biased)


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.filterwarnings("ignore:the Toeplitz table spans")
def test_rows_of_little_weight_keep_their_values(n: int) -> None:
    model, x = layer(causal=True), tokens(n)
    with torch.no_grad():
        model.bias.table[:, 9] = -40.0  # b_0: the first token sees nothing else
    torch.testing.assert_close(model(x), dense(model, x), rtol=1e-9, atol=1e-9)


def test_rows_without_weight_give_zeros_and_finite_gradients() -> None:
    q, k, v, c = (x.requires_grad_() for x in mapped(8))
    hidden = torch.zeros(8, dtype=torch.bool)
    hidden[:3] = True
    out = toeplitz_attention(q, k.masked_fill(hidden[:, None], 0.0), v, c, causal=True)
    assert bool((out[:, :, :3] == 0).all())
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(out.sum(), (q, k, v, c)))


@pytest.mark.parametrize("n", [20, 100])
def test_identity_4_the_future_reaches_the_past_by_rounding_only(n: int) -> None:
    model, x = layer(causal=True), tokens(n)
    other = x.clone()
    other[:, n // 2 :] = 3 * tokens(n, 9)[:, n // 2 :]
    change = (model(x) - model(other)).detach()[:, : n // 2].abs().max()
    assert float(change) <= 1e-10
    torch.testing.assert_close(model(x), dense(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["prf", "softmax", "trf"])
@pytest.mark.parametrize("max_distance", [0, 9])
def test_identity_5_decoding_equals_prefill(kernel: str, max_distance: int) -> None:
    model, x = layer(causal=True, kernel=kernel, max_distance=max_distance), tokens(80)
    whole, memory = model(x), NPRFMemory()
    parts = [model(x[:, :70], memory=memory)] + [model(x[:, i : i + 1], memory=memory) for i in range(70, 80)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_identity_6_mean_and_variance_of_the_features() -> None:
    g = make(0)
    x, y = (nn.functional.normalize(torch.randn(8, generator=g, dtype=torch.float64), dim=0) for _ in range(2))
    w = draw_directions(40_000, 4, 8, "gaussian", generator=g).double()
    product = (positive_features(x[None, None, None], w) * positive_features(y[None, None, None], w)).sum(-1).flatten()
    exact = float(torch.exp(x @ y))
    variance = (math.exp(float((x + y).square().sum())) - 1) * exact**2 / 4
    assert float(product.mean()) == pytest.approx(exact, abs=4 * (variance / 40_000) ** 0.5)
    assert float(product.var()) == pytest.approx(variance, rel=0.1)
    trf = (trigonometric_features(x[None, None, None], w) * trigonometric_features(y[None, None, None], w)).sum(-1)
    assert float(trf.mean()) == pytest.approx(exact, rel=0.02)


def test_identity_7_more_features_come_closer_to_softmax() -> None:
    model, x = layer(kernel="softmax"), tokens(24)
    exact = model.requires_grad_(False)(x)
    torch.testing.assert_close(exact, dense(model, x))

    def error(m: int) -> float:
        return (
            sum(float((to_random_features(model, m, seed=s)(x) - exact).detach().square().mean()) for s in range(6))
            ** 0.5
        )

    slope = math.log(error(4096) / error(64)) / math.log(64)
    assert -0.65 < slope < -0.35, "about m^-1/2"


@CAUSAL
def test_identity_8_scaling_queries_or_keys_changes_nothing(causal: bool) -> None:
    model, x = layer(causal=causal), tokens(30)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for part, factor in ((slice(0, DIM), 7.0), (slice(DIM, 2 * DIM), 0.2)):
            other.qkv.weight[part] *= factor
            other.qkv.bias[part] *= factor
    torch.testing.assert_close(other(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("precision", ["float64", "dense"])
def test_identity_8_gradcheck(precision: str) -> None:
    leaves = [x.requires_grad_() for x in mapped(4, m=2, width=2)]
    torch.autograd.gradcheck(lambda *t: toeplitz_attention(*t, causal=True, precision=precision), leaves)  # type: ignore[arg-type]


@CAUSAL
@pytest.mark.parametrize("kernel", ["prf", "softmax"])
@pytest.mark.parametrize("max_distance", [0, 9])
def test_identity_9_batches_and_padding_are_independent(causal: bool, kernel: str, max_distance: int) -> None:
    model, x = layer(causal=causal, kernel=kernel, max_distance=max_distance), tokens(70)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[1, 61:] = False
    got = model(torch.where(valid[..., None], x, 1e3), valid=valid)
    torch.testing.assert_close(got[:1], model(x[:1]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1:, :61], model(x[1:, :61]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1:, :61], dense(model, x, valid)[1:, :61], rtol=1e-9, atol=1e-9)


def test_unnormalised_equals_its_equations() -> None:
    model, x = layer(normalised=False), tokens(20)
    torch.testing.assert_close(model(x), dense(model, x), rtol=1e-9, atol=1e-9)


def test_orthogonal_directions() -> None:
    w = draw_directions(2, 11, 4, generator=make(0))
    assert w.shape == (2, 11, 4)
    for first in (0, 4, 8):
        block = nn.functional.normalize(w[:, first : first + 4], dim=-1)
        torch.testing.assert_close(block @ block.mT, torch.eye(block.shape[1]).expand(2, -1, -1), atol=1e-5, rtol=0)
    many = draw_directions(500, 4, 4, generator=make(1)).flatten(0, 1)
    assert float(many.mean().abs()) < 0.05 and float(many.var()) == pytest.approx(1.0, abs=0.08)
    norms = draw_directions(1, 9, 4, "sphere", generator=make(2)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 2.0))


def test_redraw_is_seeded_and_travels_in_the_state_dict() -> None:
    a, b = layer(0), layer(0)
    b.redraw(5)
    assert not torch.equal(a.directions, b.directions)
    b.load_state_dict(a.state_dict())
    assert torch.equal(copy.deepcopy(b)(tokens(9)), a(tokens(9)))


def test_a_shared_bias_learns_from_all_layers() -> None:
    bias = RelativeBias(HEADS, 5)
    both = nn.Sequential(*(NPRFAttention(DIM, HEADS, 4, bias=bias) for _ in range(2)))
    both(tokens(7).float()).square().sum().backward()
    assert bias.table.grad is not None and bool((bias.table.grad != 0).any())
    assert sum(p.numel() for name, p in both.named_parameters() if "bias.table" in name) == HEADS * 11


@pytest.mark.parametrize("n", [30, 200])
def test_autocast_bfloat16_and_zero_rows(n: int) -> None:
    model = layer().float()
    x = tokens(n).float()
    x[:, 3] = 0
    with torch.no_grad():
        model.qkv.bias.zero_()
    exact = model.requires_grad_(False)(x)
    assert bool(torch.isfinite(exact).all())
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert float((low.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert float((model.bfloat16()(x.bfloat16()).float() - exact).abs().max()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("n", [20, 90])
def test_torch_compile(n: int) -> None:
    model = layer(precision="float64")
    compiled = torch.compile(model, backend="aot_eager")
    x = tokens(n).requires_grad_()
    other = x.detach().clone().requires_grad_()
    torch.testing.assert_close(compiled(x), model(other))
    compiled(x).sum().backward()
    model(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


# --- conversion -------------------------------------------------------------------------------------------------------


def test_from_multihead_softmax_is_the_same_function() -> None:
    torch.manual_seed(0)
    host = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double().eval()
    nn.init.normal_(host.in_proj_bias)
    x = tokens(15)
    wanted, _ = host(x, x, x)
    torch.testing.assert_close(from_multihead(host, 8, kernel="softmax")(x), wanted)
    errors = [float((from_multihead(host, m, seed=1)(x) - wanted).detach().abs().mean()) for m in (8, 2048)]
    assert errors[1] < 0.4 * errors[0]
    with pytest.raises(UnsupportedError, match="dropout"):
        from_multihead(nn.MultiheadAttention(DIM, HEADS, dropout=0.1), 8)


def test_conversion_keeps_weights_shared_tables_and_reports_the_drop() -> None:
    bias = RelativeBias(HEADS, 5)
    model = nn.Sequential(*(NPRFAttention(DIM, HEADS, 4, bias=bias, kernel="softmax") for _ in range(2))).double()
    made = convert(model, 16)
    assert made[0].bias is made[1].bias and made[0].kernel == "prf" and model[0].kernel == "softmax"
    assert not torch.equal(made[0].directions, made[1].directions)
    assert torch.equal(made[1].qkv.weight, model[1].qkv.weight)
    x = tokens(12)
    wanted = model(x).detach()
    few, many = (
        conversion_drop(model, lambda m: float((m(x) - wanted).abs().mean()), n, seeds=(0, 1)) for n in (4, 1024)
    )
    assert few.before == 0.0 and len(few.after) == 2 and 0 < many.drop < few.drop
    assert model.training
    with pytest.raises(ConfigError, match="found no NPRFAttention"):
        convert(nn.Linear(2, 2), 4)


def test_weight_error_is_zero_for_exact_weights_and_two_at_most() -> None:
    q = torch.eye(3, dtype=torch.float64)
    assert weight_error(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 1), torch.ones(3, 1)) == pytest.approx(0)
    assert weight_error(100 * q, q, q, q.roll(1, 0)) == pytest.approx(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "pfr"}, "Did you mean 'prf'"),
        ({"features": "orthogonl"}, "Did you mean 'orthogonal'"),
        ({"num_heads": 5}, "divisor of dim"),
        ({"bias": RelativeBias(2, 3)}, "bias has 2 heads"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_bad_options_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NPRFAttention(DIM, **{"num_heads": HEADS, **options})  # type: ignore[arg-type]


def test_bad_inputs_are_told() -> None:
    with pytest.raises(ShapeError, match="x has shape"):
        layer()(tokens(4)[..., :5])
    with pytest.raises(ShapeError, match="valid has shape"):
        layer()(tokens(4), valid=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="causal=True"):
        layer()(tokens(4), memory=NPRFMemory())
