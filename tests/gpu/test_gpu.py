"""Implementations on CUDA against the float64 reference: outputs, log-sum-exps and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveal
from foveal.core.base_mask import FULL, PARTIAL
from foveal.core.layouts import Groups, KeySelection, Layout, block_mask
from foveal.patterns import SlidingWindow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
]

TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Of the largest value; float32 products may run in TF32 inside FlexAttention."""
LENGTH, HEADS, KV_HEADS, DIM = 640, 4, 2, 64


def tensors(dtype: torch.dtype) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(2, h, LENGTH, DIM, generator=make).to("cuda", dtype).requires_grad_() for h in shapes]


def layouts() -> dict[str, Layout | SlidingWindow | None]:
    make = torch.Generator().manual_seed(1)
    kinds = torch.randint(0, 3, (2, HEADS, 5, 5), generator=make).to(torch.int8)
    kinds[..., range(5), range(5)] = PARTIAL
    index = torch.stack([torch.randperm(LENGTH, generator=make)[:48] for _ in range(2 * HEADS * 10)]).view(
        2, HEADS, 10, 48
    )
    members, bounds = torch.randperm(LENGTH, generator=make), torch.tensor([0, 100, 300, LENGTH])
    return {
        "dense": None,
        "window": SlidingWindow(200, sinks=3),
        "blocks": block_mask(
            torch.full((1, HEADS, 5, 5), FULL, dtype=torch.int8).tril().cuda(), (128, 128), (LENGTH, LENGTH)
        ),
        "cut_blocks": block_mask(kinds.cuda(), (128, 128), (LENGTH, LENGTH), lambda b, h, q, k: (q + k + h) % 3 > 0),
        "lists": KeySelection(index.cuda(), 64),
        "row_lists": KeySelection(index[:, :1, :1].expand(-1, -1, LENGTH, -1).cuda(), 1),
        "groups": Groups(members.cuda(), bounds.cuda(), members.cuda(), bounds.cuda()),
        "joint_groups": Groups(
            torch.cat([members[:400], members[200:600]]).cuda(),
            torch.tensor([0, 400, 800]).cuda(),
            torch.cat([members, members[:300]]).cuda(),
            torch.tensor([0, LENGTH, LENGTH + 300]).cuda(),
        ),
    }


def results(mask: Layout | SlidingWindow | None, impl: str, dtype: torch.dtype) -> list[Tensor]:
    q, k, v = tensors(dtype)
    out = foveal.attention(q, k, v, mask, causal=True, impl=impl)
    upstream = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(dtype)
    return [t.double() for t in (out, *torch.autograd.grad(out, (q, k, v), upstream))]


def close(received: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "grad q", "grad k", "grad v"), received, expected, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error < TOLERANCE[dtype], f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense", "window", "blocks", "cut_blocks", "lists", "groups"])
def test_gather_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    mask = layouts()[name]
    close(results(mask, "gather", dtype), results(mask, "reference", dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense", "window", "blocks", "cut_blocks"])
def test_flex_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    mask = layouts()[name]
    close(results(mask, "flex", dtype), results(mask, "reference", dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lists", "groups", "row_lists", "joint_groups"])
def test_triton_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    mask = layouts()[name]
    close(results(mask, "triton", dtype), results(mask, "reference", dtype), dtype)
    assert foveal.explain(*tensors(dtype), mask, causal=True).impl == "triton"


@pytest.mark.parametrize("dim", [16, 33, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_takes_any_head_dimension(dim: int, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 130, dim, generator=make).to("cuda", dtype).requires_grad_() for _ in range(3))
    index = torch.arange(130, device="cuda").view(1, 1, 1, -1).expand(1, 1, 3, -1)
    found = []
    for impl in ("triton", "reference"):
        out = foveal.attention(q, k, v, KeySelection(index, 48), causal=True, softcap=20.0, impl=impl)
        found.append([t.double() for t in (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))])
    close(*found, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_matches_the_reference(dtype: torch.dtype) -> None:
    close(results(None, "sdpa", dtype), results(None, "reference", dtype), dtype)


@pytest.mark.parametrize("impl", ["gather", "flex"])
def test_log_sum_exp(impl: str) -> None:
    q, k, v = tensors(torch.float32)
    mask = layouts()["blocks"]
    _, lse = foveal.attention(q, k, v, mask, causal=True, impl=impl, return_lse=True)
    _, expected = foveal.attention(q, k, v, mask, causal=True, impl="reference", return_lse=True)
    torch.testing.assert_close(lse, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", ["lists", "shared_lists"])
@pytest.mark.parametrize("impl", ["gather", "triton"])
def test_one_new_token(name: str, impl: str) -> None:
    q, k, v = (t.detach() for t in tensors(torch.float32))
    index = layouts()["lists"].index[:, :, -1:]  # type: ignore[union-attr]
    mask = KeySelection(index if name == "lists" else index[:1, :1], 1)
    with torch.no_grad():
        out = foveal.attention(q[:, :, -1:], k, v, mask, causal=True, impl=impl)
        expected = foveal.attention(q[:, :, -1:], k, v, mask, causal=True, impl="reference")
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("impl", ["gather", "triton"])
def test_a_slice_of_a_static_cache_is_read_in_place(impl: str) -> None:
    """One step over the filled part of a longer cache equals the step over its copy."""
    q, k, v = (t.detach() for t in tensors(torch.float32))
    mask = KeySelection(torch.arange(0, 400, 50, device="cuda").view(1, 1, 1, 8), 1)
    with torch.no_grad():
        part = foveal.attention(q[:, :, -1:], k[:, :, :400], v[:, :, :400], mask, causal=True, impl=impl)
        copy = foveal.attention(
            q[:, :, -1:], k[:, :, :400].clone(), v[:, :, :400].clone(), mask, causal=True, impl=impl
        )
    torch.testing.assert_close(part, copy)
