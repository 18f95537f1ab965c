"""MODA: the identities of its spec sheet, against loops over tokens written here."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveal import merge
from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.layers.moda import ModaAttention, ModaMemory, disparity, self_and_cross
from foveal.layers.moda_align import DuplexAlignment, gated, log_pseudo_mass
from foveal.layers.rotary import rotary, rotate

B, N, DIM, HEADS, KV = 2, 13, 24, 4, 2
D = DIM // HEADS
SCOPES = pytest.mark.parametrize("scope", ["prompt", "causal", "all"])


def layer(**changes: object) -> ModaAttention:
    """With fusion weights away from their start, so that alignment is seen."""
    torch.manual_seed(0)
    model = ModaAttention(DIM, HEADS, **{"num_kv_heads": KV, **changes}).double()
    with torch.no_grad():
        for p in model.align.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    return model


def tokens(seed: int = 0, length: int = N) -> Tensor:
    return torch.randn(B, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def modality() -> Tensor:
    visual = torch.zeros(B, N, dtype=torch.bool)
    visual[0, 1:6] = visual[1, 3:9] = True
    return visual


def prompt() -> Tensor:
    return (torch.arange(N) < 11).expand(B, N).clone()


def projected(model: ModaAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t.unflatten(-1, (-1, D)).transpose(1, 2) for t in model.qkv(x).split([HEADS * D, KV * D, KV * D], -1))
    turn = rotary(torch.arange(x.shape[1])[:, None], D)
    return rotate(q, turn), rotate(k, turn), v


def by_loops(model: ModaAttention, x: Tensor, visual: Tensor, basis: Tensor, valid: Tensor) -> Tensor:
    """Heads' outputs joined: one row after the other with every pseudo cell written out."""
    q, k, v = projected(model, x)
    out = torch.zeros(x.shape[0], x.shape[1], DIM, dtype=x.dtype)
    for b in range(x.shape[0]):
        for h in range(HEADS):
            g = h * KV // HEADS
            fused, grams = [], {}
            for m in (True, False):
                rows = [k[b, g, j] for j in range(x.shape[1]) if basis[b, j] and bool(visual[b, j]) == m]
                gram = sum(torch.outer(r, r) for r in rows) if rows else None
                grams[m] = None if gram is None else gram / gram.norm(dim=-1, keepdim=True)
            for j in range(x.shape[1]):
                key, other = k[b, g, j], grams[not bool(visual[b, j])]
                if other is not None:
                    weight = model.align.visual if visual[b, j] else model.align.text
                    key = weight @ torch.cat([key, key @ other])
                fused.append(key)
            rank = 0
            for i in range(x.shape[1]):
                rank += int(valid[b, i])
                seen = [j for j in range(i + 1) if valid[b, j]]
                if not seen:
                    continue
                logits = torch.stack([q[b, h, i] @ fused[j] for j in seen]) / D**0.5
                values = torch.stack([v[b, g, j] for j in seen])
                pseudo = torch.zeros(0, dtype=x.dtype)
                if model.mask != "inf":
                    beta = model.beta[0] if visual[b, i] else model.beta[1]
                    free = max(0, model.width - rank)
                    pseudo = -beta * torch.arange(free, dtype=x.dtype)
                weights = torch.softmax(torch.cat([logits, pseudo]), 0)[: len(seen)]
                out[b, i, h * D : h * D + D] = weights @ values
    return out @ model.out.weight.T


@pytest.mark.parametrize(("mask", "width"), [("inf", None), ("fix", N), ("fix", 20), ("fix", 5)])
def test_the_layer_is_its_equations(mask, width):
    model = layer(mask=mask, width=width, beta=(0.2, 0.05))
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[1, :2] = False
    expected = by_loops(model, tokens(), modality(), prompt() & valid, valid)
    got = model(tokens(), modality(), valid=valid, prompt=prompt())
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("fusion", ["concat", "released", "none"])
@SCOPES
def test_identity_1_at_its_start_with_a_plain_mask_it_is_causal_attention(fusion, scope):
    torch.manual_seed(0)
    model = ModaAttention(DIM, HEADS, num_kv_heads=KV, fusion=fusion, mask="inf", scope=scope).double()
    q, k, v = projected(model, tokens())
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got = model(tokens(), modality(), prompt=prompt())
    torch.testing.assert_close(got, model.out(expected.transpose(1, 2).flatten(2)), atol=1e-13, rtol=1e-13)


def test_identity_2_closed_form_of_the_pseudo_mass():
    n = 9
    place = torch.arange(1, n + 1)
    for beta in (0.0, 0.1, 1.7):
        cells = torch.tensor(
            [sum(math.exp(-j * beta) for j in range(n - i)) for i in range(1, n + 1)], dtype=torch.float64
        )
        got = log_pseudo_mass(place, torch.tensor(beta, dtype=torch.float64), n).exp()
        torch.testing.assert_close(got, cells, atol=1e-12, rtol=1e-12)
    strong = log_pseudo_mass(place, torch.tensor(200.0, dtype=torch.float64), n).exp()
    assert torch.equal(strong, (place < n).double()), "softmax plus one"
    limit = log_pseudo_mass(place, torch.tensor(0.1, dtype=torch.float64), None).exp()
    torch.testing.assert_close(limit, torch.full((n,), 1 / (1 - math.exp(-0.1)), dtype=torch.float64))
    out = torch.randn(1, 1, 2, 3)
    lse = torch.tensor([[[0.5, -torch.inf]]])
    assert torch.equal(gated(out, lse, torch.tensor(-torch.inf))[0, 0, 0], out[0, 0, 0])
    assert torch.equal(gated(out, lse, torch.tensor(0.0))[0, 0, 1], torch.zeros(3))


def test_identity_3_self_and_cross_merge_to_the_joint_softmax():
    q, k, v = (
        torch.randn(B, h, N, D, generator=torch.Generator().manual_seed(h), dtype=torch.float64) for h in (4, 2, 2)
    )
    (own, own_lse), (cross, cross_lse) = self_and_cross(q, k, v, modality())
    joint = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(merge([own, cross], [own_lse, cross_lse])[0], joint, atol=1e-13, rtol=1e-13)
    weight = torch.sigmoid(own_lse - cross_lse)[..., None]
    torch.testing.assert_close(weight * own + (1 - weight) * cross, joint, atol=1e-13, rtol=1e-13)
    assert bool(torch.isinf(cross_lse).any()), "rows with an empty part are among them"
    model = layer(combine="sum", mask="inf", fusion="none")
    q, k, v = projected(model, tokens())
    (own, own_lse), (cross, cross_lse) = self_and_cross(q, k, v, modality())
    parts = torch.isfinite(own_lse).double() + torch.isfinite(cross_lse).double()
    expected = model.out(((own + cross) / parts[..., None]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(model(tokens(), modality(), prompt=prompt()), expected, atol=1e-12, rtol=1e-12)


@SCOPES
@pytest.mark.parametrize("mask", ["fix", "attn"])
def test_identity_4_answers_leak_into_earlier_rows_only_with_scope_all(scope, mask):
    model = layer(scope=scope, mask=mask if scope == "prompt" else "fix")
    other = tokens()
    other[:, -1] += 1
    before, after = (model(x, modality(), prompt=prompt())[:, :-1] for x in (tokens(), other))
    assert torch.equal(before, after) == (scope != "all")


def test_the_declared_leak_of_the_prompt_scope_and_none_in_the_causal_one():
    """Visual keys read the question that follows them."""
    other = tokens()
    other[:, 10] += 1
    changed = {}
    for scope in ("prompt", "causal"):
        model = layer(scope=scope)
        rows = [model(x, modality(), prompt=prompt())[:, :10] for x in (tokens(), other)]
        changed[scope] = not torch.equal(*rows)
    assert changed == {"prompt": True, "causal": False}


@SCOPES
@pytest.mark.parametrize("fusion", ["concat", "add", "aligned", "released"])
def test_identity_5_without_image_or_without_text_nothing_changes(scope, fusion):
    model, plain = layer(scope=scope, fusion=fusion), layer(scope=scope, fusion="none")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("align")})
    for visual in (torch.zeros(B, N, dtype=torch.bool), torch.ones(B, N, dtype=torch.bool)):
        assert torch.equal(model(tokens(), visual, prompt=prompt()), plain(tokens(), visual, prompt=prompt()))
    mixed = modality()
    assert not torch.allclose(model(tokens(), mixed, prompt=prompt()), plain(tokens(), mixed, prompt=prompt()))


def test_identity_5_the_gram_matrix_is_symmetric_psd_and_blind_to_order():
    align = DuplexAlignment(D).double()
    k = torch.randn(B, KV, N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, order = prompt(), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    grams = align.grams(k, k, modality(), basis)
    again = align.grams(k[:, :, order], k, modality()[:, order], basis[:, order])
    for one, other in ((grams.visual, again.visual), (grams.text, again.text)):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(one, one.mT)
        assert float(torch.linalg.eigvalsh(one).min()) > -1e-10
    for norm, size in (("row", 1.0), ("fro", 1.0), ("spectral", 1.0)):
        g = DuplexAlignment(D, norm=norm).normalised(grams.text)
        found = {"row": g.norm(dim=-1), "fro": torch.linalg.matrix_norm(g), "spectral": torch.linalg.matrix_norm(g, 2)}[
            norm
        ]
        torch.testing.assert_close(found, torch.full_like(found, size))


@pytest.mark.parametrize("cuts", [(11, 1, 1), (11, 2)])
@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize(
    ("scope", "mask", "width"),
    [("prompt", "fix", None), ("prompt", "fix", 40), ("prompt", "attn", None), ("causal", "fix", None)],
)
def test_identity_6_prefill_and_decode_equal_the_whole(cuts, pre_rope, scope, mask, width):
    model, memory, parts, at = layer(scope=scope, mask=mask, width=width, pre_rope=pre_rope), ModaMemory(), [], 0
    for n in cuts:
        piece = slice(at, at + n)
        parts.append(model(tokens()[:, piece], modality()[:, piece], memory=memory))
        at += n
    whole = model(tokens(), modality(), prompt=prompt())
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-11, rtol=1e-11)


def test_the_causal_scope_is_the_prompt_scope_of_every_prefix_and_crosses_chunks():
    align = DuplexAlignment(D, "aligned").double()
    n = 150
    g = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, n, D, generator=g, dtype=torch.float64)
    visual, valid = torch.rand(1, n, generator=g) < 0.4, torch.rand(1, n, generator=g) < 0.9
    fused, grams = align.causal(k, k, visual, valid)
    for i in (0, 1, 63, 64, 65, 149):
        upto = valid & (torch.arange(n) <= i)
        expected = align(k, visual, align.grams(k, k, visual, upto))
        torch.testing.assert_close(fused[:, :, i], expected[:, :, i], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grams.text, align.grams(k, k, visual, valid).text)


@SCOPES
def test_identity_7_padding_never_enters(scope):
    model, valid = layer(scope=scope), torch.ones(B, N, dtype=torch.bool)
    valid[0, 12:] = valid[1, :2] = False
    noise = torch.where(valid[..., None], tokens(), 30 * tokens(7))
    got, expected = (model(x, modality(), valid=valid, prompt=prompt()) for x in (noise, tokens()))
    assert torch.equal(got[valid], expected[valid])
    short = model(tokens()[:1, :12], modality()[:1, :12], prompt=prompt()[:1, :12])
    torch.testing.assert_close(expected[:1, :12], short, atol=1e-12, rtol=1e-12)


def test_identity_8_grouped_heads_equal_repeated_heads():
    model = layer()
    full = layer(num_kv_heads=HEADS)
    parts = model.qkv.weight.split([HEADS * D, KV * D, KV * D])
    with torch.no_grad():
        repeated = [p.unflatten(0, (KV, D)).repeat_interleave(HEADS // KV, 0).flatten(0, 1) for p in parts[1:]]
        full.qkv.weight.copy_(torch.cat([parts[0], *repeated]))
        full.out.load_state_dict(model.out.state_dict())
        full.align.load_state_dict(model.align.state_dict())
    got = full(tokens(), modality(), prompt=prompt())
    torch.testing.assert_close(got, model(tokens(), modality(), prompt=prompt()), atol=1e-12, rtol=1e-12)


def test_identity_9_the_released_form_step_by_step():
    model = layer(fusion="released", mask="inf", scope="all")
    q, k, v = projected(model, tokens())
    for b in range(B):
        for g in range(KV):
            unit = k[b, g] / (k[b, g].norm(dim=-1, keepdim=True) + 1e-6)
            gram = torch.zeros(D, D, dtype=k.dtype)
            for j in range(N):
                if not modality()[b, j]:
                    gram += torch.outer(unit[j], v[b, g, j])
            gram = gram / gram.norm(dim=-1, keepdim=True)
            for j in range(N):
                if modality()[b, j]:
                    k[b, g, j] = model.align.weight @ (k[b, g, j] + model.align.ratio * (unit[j] @ gram))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got = model(tokens(), modality())
    torch.testing.assert_close(got, model.out(expected.transpose(1, 2).flatten(2)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("scope", "mask"), [("prompt", "fix"), ("causal", "fix"), ("prompt", "attn")])
def test_identity_10_gradients(scope, mask):
    model = layer(scope=scope, mask=mask, beta=(0.3, 0.2))
    names = [n for n, _ in model.align.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        values = dict(zip([f"align.{n}" for n in names], weights, strict=True))
        return torch.func.functional_call(model, values, (x, modality()[:1]), {"prompt": prompt()[:1]})

    inputs = [tokens()[:1].requires_grad_(), *(p.detach().clone().requires_grad_() for p in model.align.parameters())]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_disparity_is_that_of_the_weights():
    q, k = (torch.randn(B, 2, N, D, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    visual = modality()
    logits = (q @ k.mT / D**0.5).masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf)
    weights = torch.softmax(logits, -1)
    expected = {}
    for name, own in (("visual", visual), ("text", ~visual)):
        ours, theirs = [], []
        for b in range(B):
            for i in range(N):
                a, c = own[b, : i + 1], ~own[b, : i + 1]
                if own[b, i] and a.any() and c.any():
                    ours += (weights[b, :, i, : i + 1][:, a].sum(-1) / a.sum()).tolist()
                    theirs += (weights[b, :, i, : i + 1][:, c].sum(-1) / c.sum()).tolist()
        s, c = sum(ours) / len(ours), sum(theirs) / len(theirs)
        expected[name] = abs(s - c) / max(s, c)
    assert disparity(q, k, visual) == pytest.approx(expected)


def test_round_trips_autocast_and_compile():
    model, x = layer().float(), tokens().float()
    expected = model(x, modality(), prompt=prompt())
    twin = ModaAttention(DIM, HEADS, num_kv_heads=KV)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x, modality(), prompt=prompt()), expected)
    assert torch.equal(copy.deepcopy(model)(x, modality(), prompt=prompt()), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x, modality(), prompt=prompt()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x, modality(), prompt=prompt()).float(), expected, atol=0.05, rtol=0.1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: layer(fusion="concatenate"), ConfigError, "Did you mean 'concat'"),
        (lambda: layer(mask="fixed"), ConfigError, "Did you mean 'fix'"),
        (lambda: layer(scope="promt"), ConfigError, "Did you mean 'prompt'"),
        (lambda: layer(norm="frob"), ConfigError, "Did you mean 'fro'"),
        (lambda: layer(num_kv_heads=3), ConfigError, "num_kv_heads=3"),
        (lambda: layer(beta=(0.0, 0.1)), ConfigError, "with a width"),
        (lambda: layer(combine="sum"), ConfigError, "mask='inf'"),
        (lambda: layer()(tokens(), modality()), ConfigError, "labels == -100"),
        (lambda: layer()(tokens(), modality()[:, :3], prompt=prompt()), ShapeError, "visual"),
        (lambda: layer()(tokens(), modality().long(), prompt=prompt()), ShapeError, "torch.int64"),
        (lambda: layer()(tokens()[..., :3], modality(), prompt=prompt()), ShapeError, "24"),
        (lambda: layer(scope="all")(tokens(), modality(), memory=ModaMemory()), UnsupportedError, "no decoding"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
