"""RCMHA: the identities of its spec sheet; the operator against its definition."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.base_mask import BaseMask
from foveal.core.errors import ConfigError, ShapeError
from foveal.kernels.relative import dense, relative_attention
from foveal.layers.rcmha import RCMHA, RCMHAMemory

B, N, DIM, H, P = 2, 14, 12, 3, 6
D = DIM // H
FORMS = {"MHA": (False, False), "MDHA": (True, False), "RMHA": (False, True), "RCMHA": (True, True)}
FORM = pytest.mark.parametrize("form", FORMS)


def layer(form: str = "RCMHA", *, seed: int = 0, **changes: object) -> RCMHA:
    """Random parameters everywhere; layers of one seed share what they both have."""
    conv, relative = FORMS[form]
    model = RCMHA(DIM, H, conv=conv, relative=relative, **{"max_rel": P, "qk_bias": False, **changes}).double()
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            g = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.5)
    return model.eval()


def tokens(n: int = N, seed: int = 0, batch: int = B) -> Tensor:
    return torch.randn(batch, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def by_definition(model: RCMHA, x: Tensor) -> Tensor:
    """One head, query and key at a time."""
    parts = []
    for i, p in enumerate((model.q_proj, model.k_proj, model.v_proj)):
        y = p(x).view(*x.shape[:2], H, D)
        if model.convs is not None:
            w, b = model.convs[i].weight[:, 0], model.convs[i].bias
            past = torch.cat([torch.zeros_like(y[:, :2]), y], 1)
            y = sum(past[:, m : m + x.shape[1]] * w[:, m] for m in range(3)) + b
        parts.append(y)
    q, k, v = parts
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(H):
            for i in range(x.shape[1]):
                a = []
                for j in range(i + 1):
                    score = q[b, i, h] @ k[b, j, h]
                    if model.rel_table is not None:
                        r = max(j - i, -P) + P
                        score = (
                            score
                            + model.content_bias[h] @ k[b, j, h]
                            + q[b, i, h] @ model.rel_table[r, h]
                            + model.rel_bias[r, h]
                        )
                    a.append(score / D**0.5)
                out[b, i, h] = torch.softmax(torch.stack(a), 0) @ v[b, : i + 1, h]
    return model.o_proj(out.flatten(2))


@FORM
@torch.no_grad()
def test_equals_the_definition(form):
    close(layer(form)(tokens())[0], by_definition(layer(form), tokens()))


def operands(q_len: int, k_len: int, half: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, q_len, D), (B, H, k_len, D), (B, H, k_len, D), (H, D), (2 * half, H, D), (2 * half, H)]
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 9), st.integers(1, 9), st.integers(1, 13), st.booleans(), st.integers(0, 9))
def test_identity_1_the_shifted_form_equals_the_indexed_form(q_len, before, half, block, causal, seed):
    made = operands(q_len, q_len + before, half, seed)
    base = BaseMask.build(q_len, q_len + before, causal=causal, shift=before)
    close(relative_attention(*made, base, scale=0.7, block=block), dense(*made, base, scale=0.7), 1e-13)


@pytest.mark.parametrize("block", [3, 100])
def test_identity_10_gradients_of_the_tables_are_those_of_the_dense_form(block):
    base, found = BaseMask.build(7, 9, causal=True, shift=2), []
    for run in (lambda *a: relative_attention(*a, base, scale=0.5, block=block), lambda *a: dense(*a, base, scale=0.5)):
        leaves = [t.requires_grad_() for t in operands(7, 9, 4)]
        found.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-11)
    small = [t[:1, :1] if t.dim() == 4 else t for t in operands(3, 4, 2)]
    small[3], small[4], small[5] = small[3][:1], small[4][:, :1], small[5][:, :1]
    narrow = BaseMask.build(3, 4, causal=True, shift=1)
    leaves = tuple(t.detach().requires_grad_() for t in small)
    assert torch.autograd.gradcheck(lambda *a: relative_attention(*a, narrow, scale=0.5, block=2), leaves)


def test_identity_2_parts_that_do_nothing_leave_the_other_modules():
    full = layer()
    with torch.no_grad():
        for conv in full.convs:
            conv.weight.zero_()[:, 0, -1] = 1.0
            conv.bias.zero_()
    close(full(tokens())[0], layer("RMHA")(tokens())[0])
    for p in (full.content_bias, full.rel_table, full.rel_bias):
        torch.nn.init.zeros_(p)
    close(full(tokens())[0], layer("MHA")(tokens())[0])
    full = layer()
    for p in (full.content_bias, full.rel_table, full.rel_bias):
        torch.nn.init.zeros_(p)
    close(full(tokens())[0], layer("MDHA")(tokens())[0])


@FORM
def test_identity_3_the_future_does_not_reach_the_past(form):
    other = tokens()
    other[:, 9] += 1.0
    one, two = layer(form)(tokens())[0], layer(form)(other)[0]
    assert torch.equal(one[:, :9], two[:, :9]) and not torch.allclose(one[:, 9], two[:, 9])


@FORM
def test_identity_4_only_distances_count(form):
    """Behind a context of the convolution's length, and keys cut to the same ones, the place in the stream does not matter."""
    model = layer(form, memory_limit=0)
    x = tokens()
    _, memory = model(tokens(5, seed=3))
    later = RCMHAMemory(memory.keys, torch.zeros_like(memory.tail))
    close(model(x, later)[0], model(x)[0])


@FORM
@pytest.mark.parametrize("cuts", [(1,) * N, (5, 1, 8), (13, 1)])
def test_identity_5_decoding_equals_one_pass(form, cuts):
    model, memory, parts = layer(form), None, []
    for piece in tokens().split(cuts, 1):
        out, memory = model(piece, memory)
        parts.append(out)
    close(torch.cat(parts, 1), model(tokens())[0])
    assert memory.seen == memory.keys.length == N


def test_identity_6_the_authors_queries_differ_at_a_segment_start():
    for compat in (False, True):
        model = layer(paper_compat=compat)
        whole = model(tokens())[0]
        _, memory = model(tokens()[:, :8])
        got = model(tokens()[:, 8:], memory)[0]
        close(got[:, 2:], whole[:, 10:])
        same = [torch.allclose(got[:, i], whole[:, 8 + i], atol=1e-9) for i in (0, 1)]
        assert same == [not compat] * 2


def test_identity_7_a_constant_in_all_distances_changes_nothing():
    model, moved = layer(), layer()
    with torch.no_grad():
        moved.rel_bias += 3.0
    close(moved(tokens())[0], model(tokens())[0])


def test_identity_8_heads_can_be_renamed():
    model, other = layer(), layer()
    order = torch.tensor([2, 0, 1])
    rows = (order[:, None] * D + torch.arange(D)).flatten()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(other, name).weight.copy_(getattr(model, name).weight[rows])
        other.v_proj.bias.copy_(model.v_proj.bias[rows])
        other.o_proj.weight.copy_(model.o_proj.weight[:, rows])
        other.content_bias.copy_(model.content_bias[order])
        other.rel_table.copy_(model.rel_table[:, order])
        other.rel_bias.copy_(model.rel_bias[:, order])
    close(other(tokens())[0], model(tokens())[0])


def test_identity_9_parameters_of_the_released_sizes():
    counts = []
    for conv, relative in FORMS.values():
        with torch.device("meta"):
            model = RCMHA(128, 8, conv=conv, relative=relative, max_rel=4096)
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts == [66_048, 66_240, 1_180_032, 1_180_224]


def test_offsets_beyond_the_table_use_its_last_row():
    model, wide = layer(), layer(max_rel=N)
    with torch.no_grad():
        index = (torch.arange(2 * N) - N).clamp(-P, P - 1) + P
        wide.rel_table.copy_(model.rel_table[index])
        wide.rel_bias.copy_(model.rel_bias[index])
    close(wide(tokens())[0], model(tokens())[0])


@FORM
def test_packed_documents_do_not_see_each_other(form):
    model, x = layer(form), tokens()
    segments = torch.tensor([[0] * 5 + [1] * 9, [3] * 1 + [4] * 13])
    got = model(x, segments=segments)[0]
    for b, cut in ((0, 5), (1, 1)):
        for part in (slice(0, cut), slice(cut, N)):
            close(got[b : b + 1, part], model(x[b : b + 1, part])[0])


@FORM
def test_segment_memory_of_a_limited_length(form):
    model = layer(form, memory_limit=4)
    memory = None
    for piece in tokens().split(7, 1):
        out, memory = model(piece, memory)
    assert memory.keys.length == 4 and memory.seen == N
    free = layer(form)
    _, whole = free(tokens()[:, :7])
    kept = RCMHAMemory(copy.copy(whole.keys), whole.tail)
    kept.keys.keys, kept.keys.values = whole.keys.keys[:, :, 3:], whole.keys.values[:, :, 3:]
    close(out, free(tokens()[:, 7:], kept)[0])
    x = tokens(4).requires_grad_()
    loss = model(tokens(4), model(x)[1].detach())[0].sum()
    assert torch.autograd.grad(loss, x, allow_unused=True)[0] is None


@FORM
def test_state_dict_deepcopy_autocast_and_low_precision(form):
    model, x = layer(form).float(), tokens().float()
    with torch.no_grad():
        expected = model(x)[0]
        assert torch.equal(copy.deepcopy(model)(x)[0], expected)
        other = layer(form, seed=99).float()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x)[0], expected)
        scale = float(expected.abs().max())
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x)[0].float()
        low = copy.deepcopy(model).bfloat16()(x.bfloat16())[0].float()
        for got in (cast, low):
            assert float((got - expected).abs().max()) < 0.05 * scale
    torch.testing.assert_close(model(x.mT.contiguous().mT)[0], model(x)[0])


def test_every_parameter_learns():
    model = layer(max_rel=N)
    model(tokens())[0].square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())


def test_compiles():
    model, x = layer().float(), tokens().float()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x)[0], model(x)[0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: RCMHA(12, 5), ConfigError, "num_heads=5"),
        (lambda: RCMHA(12, 3, kernel=0), ConfigError, "kernel is 0"),
        (lambda: RCMHA(12, 3, max_rel=0), ConfigError, "max_rel is 0"),
        (lambda: RCMHA(12, 3, memory_limit=-1), ConfigError, "memory_limit is -1"),
        (lambda: layer()(tokens()[..., :5]), ShapeError, r"\(batch, length, 12\)"),
        (lambda: layer()(tokens(), layer().init_memory(3)), ShapeError, "init_memory"),
        (lambda: layer()(tokens(), segments=torch.zeros(2, 3, dtype=torch.long)), ShapeError, "segments"),
        (
            lambda: layer()(tokens(), layer().init_memory(B), segments=torch.zeros(B, N, dtype=torch.long)),
            ShapeError,
            "no memory",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
