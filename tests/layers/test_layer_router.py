"""Flux's routers: size and start, pooling, gates; the identities 3, 4, 6 and 8 of the spec sheet."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import ConfigError, ShapeError
from foveal.layers.layer_router import LayerRouter, LayerRouters, gate, gumbel
from foveal.patterns.flux_router import FORMAT, load_routers, pooled_queries, read_routers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("d", [1, 8, 64, 128])
def test_identity_3_parameters_and_start(d: int) -> None:
    router = LayerRouter(d, seed=3)
    assert sum(p.numel() for p in router.parameters()) == 36 * d * d + 17 * d + 2
    logits = router(10 * torch.randn(7, d, generator=generator()))
    assert (logits[:, 1] > logits[:, 0]).all(), "every layer starts with full attention"
    assert torch.allclose(torch.softmax(logits, -1)[:, 1], torch.tensor(0.98901), atol=1e-5)
    for name in ("V1", "V2"):
        weight = router.get_parameter(f"{name}.weight")
        bound = 1 / math.sqrt(weight.shape[1])  # Kaiming uniform with a = √5
        assert weight.abs().max() <= bound and (d < 8 or weight.abs().max() > 0.9 * bound)
        assert not router.get_parameter(f"{name}.bias").any()
    assert not torch.equal(router.get_parameter("V1.weight"), LayerRouter(d, seed=4).get_parameter("V1.weight"))


def test_the_seed_of_a_router_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    LayerRouters(2, 8)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
def test_identity_4_gumbel_max_draws_the_softmax_at_any_temperature(tau: float) -> None:
    draws = 20_000
    logits = torch.tensor([0.0, 4.5]).expand(draws, 2)
    noise = gumbel((draws, 2), generator())
    assert float(gate(logits, tau, "st", noise).mean()) == pytest.approx(0.98901, abs=0.003)
    even = torch.tensor([0.3, -0.2]).expand(draws, 2)
    want = float(torch.softmax(even[0], -1)[1])
    assert float(gate(even, tau, "st", noise).mean()) == pytest.approx(want, abs=0.015)


def test_identity_6_straight_through_takes_one_branch_and_the_soft_gradient() -> None:
    g = generator()
    full, sparse = (torch.randn(16, 5, generator=g) for _ in range(2))
    noise = gumbel((16, 2), g)
    logits = torch.randn(16, 2, generator=g, requires_grad=True)
    r = gate(logits, 1.3, "st", noise)[:, None]
    out = r * full + (1 - r) * sparse
    hard = (logits + noise)[:, 1] > (logits + noise)[:, 0]
    assert torch.equal(out, torch.where(hard[:, None], full, sparse)), "exactly one branch"
    assert hard.any() and not hard.all()
    upstream = torch.randn(16, 5, generator=g)
    (got,) = torch.autograd.grad((out * upstream).sum(), logits)
    soft = torch.softmax((logits + noise.float()) / 1.3, -1)[:, 1]
    (want,) = torch.autograd.grad((soft[:, None] * (full - sparse) * upstream).sum(), logits)
    assert torch.allclose(got, want, atol=1e-6) and got.abs().max() > 1e-3


def test_the_soft_gate_is_the_softmax() -> None:
    logits = torch.randn(9, 2, generator=generator())
    assert torch.allclose(gate(logits, 2.0), torch.softmax(logits / 2.0, -1)[:, 1])


def test_identity_8_what_the_router_reads() -> None:
    """Heads in any order, and any tokens between the first p and the last p, change nothing."""
    g = generator()
    routers = LayerRouters(1, 6, pool=4)
    with torch.no_grad():
        routers.layers[0].get_parameter("V3.weight").normal_(generator=g)
    q = torch.randn(2, 5, 20, 6, generator=g)
    spans = torch.tensor([[0, 20], [3, 18]])
    logits = routers(0, q, spans)
    assert torch.allclose(routers(0, q[:, [3, 1, 4, 0, 2]], spans), logits, atol=1e-6)
    changed = q.clone()
    changed[0, :, 4:16], changed[1, :, 7:14] = 9.0, -9.0
    changed[1, :, :3], changed[1, :, 18:] = 7.0, 7.0
    assert torch.equal(routers(0, changed, spans), logits)
    for b, at in ((0, 3), (0, 16), (1, 3), (1, 17)):
        touched = q.clone()
        touched[b, :, at] += 1.0
        assert not torch.allclose(routers(0, touched, spans)[b], logits[b], atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_pooling_is_the_mean_of_first_and_last(length: int, pool: int, before: int, after: int) -> None:
    q = torch.randn(1, 3, before + length + after, 4, generator=generator(length * 31 + pool), dtype=torch.float64)
    inside = q[:, :, before : before + length].mean(1)[0]
    both = torch.cat(
        [inside[: min(pool, length)], inside[max(length - pool, 0) :]]
    )  # short prompts: clamped, counted twice
    got = pooled_queries(q, pool, torch.tensor([[before, before + length]]))
    assert torch.allclose(got[0].double(), both.mean(0), atol=1e-6)


def test_low_precision_queries_are_pooled_in_float32() -> None:
    q = torch.randn(1, 2, 300, 4, generator=generator()).bfloat16()
    want = pooled_queries(q.double(), 100, torch.tensor([[0, 300]]))
    got = pooled_queries(q, 100, torch.tensor([[0, 300]]))
    assert got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("span", [[0, 0], [-1, 3], [2, 9], [5, 4]])
def test_empty_and_outside_spans_are_refused(span: list[int]) -> None:
    with pytest.raises(ShapeError, match="a prompt has at least one token"):
        pooled_queries(torch.zeros(1, 1, 8, 2), 3, torch.tensor([span]))


def test_save_and_load(tmp_path) -> None:
    routers = LayerRouters(3, 8, pool=5, seed=2)
    file = tmp_path / "sub" / "routers.safetensors"
    routers.save(file, model="abc", architecture="Some", note="hello")
    loaded = LayerRouters.load(file)
    assert loaded.pool == 5
    for a, b in zip(routers.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    found = read_routers(file)
    assert (found.layers, found.head_dim, found.pool, found.model, found.architecture) == (3, 8, 5, "abc", "Some")
    u = torch.randn(4, 8, generator=generator())
    assert torch.equal(found.logits(2, u), routers.layers[2](u))
    with pytest.raises(ConfigError, match="layer 3 asks for one; expected 0 to 2"):
        found.logits(3, u)
    with pytest.raises(ShapeError, match="head_dim=8"):
        found.logits(0, torch.zeros(1, 9))


def test_files_that_are_no_routers(tmp_path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ConfigError, match="is no file"):
        load_routers(str(tmp_path / "none"), "")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_routers(tmp_path / "junk")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ConfigError, match=FORMAT):
        read_routers(tmp_path / "other")
    LayerRouters(1, 4).save(tmp_path / "good")
    with pytest.raises(ConfigError, match="Give router_sha256"):
        load_routers(str(tmp_path / "good"), "0" * 64)


@pytest.mark.parametrize(("layers", "dim", "pool"), [(0, 4, 1), (1, 0, 1), (1, 4, 0)])
def test_sizes_out_of_range(layers: int, dim: int, pool: int) -> None:
    with pytest.raises(ConfigError, match="expected a value at least 1"):
        LayerRouters(layers, dim, pool)
