"""The public door: arguments are checked once and errors teach; ``explain`` says what runs; an explicit impl never falls back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveal
from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.core.layouts import Groups, KeySelection, block_mask
from foveal.kernels import IMPLEMENTATIONS
from foveal.patterns import SlidingWindow


def qkv(heads: int = 4, kv_heads: int = 2, q_len: int = 6, kv_len: int = 6, dim: int = 8) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, *size, generator=make)
        for size in ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim))
    ]


def lists(*size: int, block: int = 1, fill: int = 0) -> KeySelection:
    return KeySelection(torch.full(size, fill), block)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q is 3-D": (
        {"q": torch.zeros(4, 6, 8)},
        ShapeError,
        r"q is \(4, 6, 8\); expected a 4-D tensor \(batch, heads, length, head_dim\)",
    ),
    "k is a list": ({"k": [1.0]}, ShapeError, "k is list; expected a 4-D tensor"),
    "integers": (
        {"v": torch.zeros(2, 2, 6, 8, dtype=torch.long)},
        ShapeError,
        "v has dtype torch.int64; expected a floating-point",
    ),
    "mixed dtypes": (
        {"k": torch.zeros(2, 2, 6, 8).double()},
        ShapeError,
        "k is torch.float64 .* q is torch.float32.*same dtype",
    ),
    "mixed devices": (
        {"k": torch.zeros(2, 2, 6, 8, device="meta")},
        ShapeError,
        "k is .* on meta .*expected the same dtype and device",
    ),
    "batch": ({"q": torch.zeros(3, 4, 6, 8)}, ShapeError, "batch sizes 3, 2 and 2; expected the same"),
    "k against v": ({"v": torch.zeros(2, 2, 5, 8)}, ShapeError, r"k has shape \(2, 2, 6, 8\) and v \(2, 2, 5, 8\)"),
    "heads": (
        {"q": torch.zeros(2, 9, 6, 8)},
        ShapeError,
        "q has 9 heads and k has 2; num_heads must be a multiple of num_kv_heads",
    ),
    "head_dim": ({"q": torch.zeros(2, 4, 6, 7)}, ShapeError, "q has head_dim 7 and k has 8; expected the same"),
    "no channels": ({"v": torch.zeros(2, 2, 6, 0)}, ShapeError, "v has head_dim 0; expected at least 1"),
    "scale": ({"scale": float("nan")}, ConfigError, "scale is nan; expected a finite number or None"),
    "softcap type": ({"softcap": "30"}, ConfigError, "softcap is '30'; expected a finite number"),
    "softcap range": ({"softcap": 0.0}, ConfigError, r"softcap is 0.0; expected a number above 0, or None"),
    "sinks": (
        {"sink_logits": torch.zeros(2)},
        ShapeError,
        r"sink_logits has shape \(2,\); expected \(4,\), one logit per query head",
    ),
    "bias N×N": ({"bias": torch.zeros(4, 6, 6)}, ShapeError, r"bias has shape \(4, 6, 6\); expected \(H=4, 2R\+1\)"),
    "bias even": ({"bias": torch.zeros(4, 6)}, ShapeError, "an odd number of relative distances"),
    "impl": ({"impl": "gathre"}, ConfigError, "impl='gathre' is unknown. Did you mean 'gather'?"),
    "boolean mask": (
        {"mask": torch.ones(6, 6, dtype=torch.bool)},
        ShapeError,
        "mask is a Tensor; expected a Pattern, BlockMask, KeySelection",
    ),
    "list blocks": (
        {"mask": lists(1, 1, 5, 2)},
        ShapeError,
        r"index has shape \(1, 1, 5, 2\).*6 queries in blocks of 1 make 6 blocks",
    ),
    "list heads": ({"mask": lists(1, 3, 6, 2)}, ShapeError, "expected .* 1, 2 or 4 heads"),
    "list range": ({"mask": lists(1, 1, 6, 1, fill=6)}, ShapeError, "names key 6; expected indices below kv_len=6"),
    "list twice": ({"mask": lists(1, 1, 6, 2)}, ShapeError, r"repeats a key .* \(0, 0, 0\).*unique"),
    "list block size": ({"mask": lists(1, 1, 6, 1, block=0)}, ShapeError, "block_size is 0; expected at least 1"),
    "list dtype": (
        {"mask": KeySelection(torch.zeros(1, 1, 6, 1), 1)},
        ShapeError,
        "index has dtype torch.float32; expected torch.int64",
    ),
    "limit": (
        {"mask": KeySelection(torch.zeros(1, 1, 6, 1).long(), 1, ids(3, 3))},
        ShapeError,
        r"limit has shape \(2,\); expected .*q_len=6",
    ),
    "group starts": (
        {"mask": Groups(ids(0), ids(0, 2), ids(0), ids(0, 1))},
        ShapeError,
        "cu_q must rise from 0 to 1, the length of q_index",
    ),
    "group sizes": (
        {"mask": Groups(ids(0), ids(0, 1), ids(0), ids(0, 1, 1))},
        ShapeError,
        r"cu_q has shape \(2,\) and cu_k \(3,\)",
    ),
    "group range": (
        {"mask": Groups(ids(0), ids(0, 1), ids(12), ids(0, 1))},
        ShapeError,
        "k_index spans 12…12; expected 0…11",
    ),
    "group twice": (
        {"mask": Groups(ids(3, 3), ids(0, 2), ids(0), ids(0, 1))},
        ShapeError,
        "q_index repeats a row inside one group",
    ),
    "group of strangers": (
        {"mask": Groups(ids(0), ids(0, 1), ids(6), ids(0, 1))},
        ShapeError,
        "group 0 joins .* different batch rows",
    ),
    "block lengths": (
        {"mask": block_mask(torch.ones(1, 1, 1, 1, dtype=torch.int8), (8, 8), (7, 6))},
        ShapeError,
        r"made for \(q_len, kv_len\) = \(7, 6\); expected \(6, 6\)",
    ),
    "block heads": (
        {"mask": block_mask(torch.ones(1, 3, 1, 1, dtype=torch.int8), (8, 8), (6, 6))},
        ShapeError,
        r"BlockMask has batch 1 and 3 heads; expected 1 or 2, and 1 or 4",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_argument_value_and_expectation(case: str) -> None:
    changes, kind, message = WRONG[case]
    arguments = dict(zip("qkv", qkv(), strict=True)) | changes
    with pytest.raises(kind, match=message):
        foveal.attention(**arguments)


def test_a_layout_is_checked_once_for_each_size() -> None:
    q, k, v = qkv()
    layout = Groups(ids(0, 1), ids(0, 2), ids(5), ids(0, 1))
    calls = []
    check = Groups.validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Groups, "validate", lambda self, *sizes: (calls.append(sizes), check(self, *sizes))[1])
        for _ in range(2):
            foveal.attention(q, k, v, layout)
        assert len(calls) == 1
        for _ in range(2):  # what is wrong stays wrong
            with pytest.raises(ShapeError, match="k_index spans 5…5"):
                foveal.attention(q[:1, :, :2], k[:1, :, :2], v[:1, :, :2], layout)
        assert len(calls) == 3


def test_errors_are_also_the_builtin_kind() -> None:
    assert issubclass(ShapeError, ValueError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(UnsupportedError, NotImplementedError)


def refuse(impl: str, reason: str, *args: Any, **options: Any) -> None:
    """An explicit impl raises, names every reason, and computes nothing else instead."""
    with pytest.raises(UnsupportedError, match=reason) as error:
        foveal.attention(*args, impl=impl, **options)
    assert f"impl={impl!r}" in str(error.value)
    assert "explain" in str(error.value)


def test_explicit_impl_never_falls_back() -> None:
    q, k, v = qkv()
    refuse("sdpa", "sparse layout", q, k, v, SlidingWindow(2), causal=True)
    refuse("sdpa", "softcap.*bias", q, k, v, softcap=3.0, bias=torch.zeros(4, 3))
    refuse("sdpa", "N×N", q, k[:, :, :5], v[:, :, :5], causal=True)
    refuse("sdpa", "D equals Dv", q, k, v[..., :3], return_lse=True)
    refuse("sdpa", "no gradient through the log-sum-exp", q.requires_grad_(), k, v, return_lse=True)
    refuse("flex", "no backward on CPU", q, k, v)
    q = q.detach()
    refuse("sdpa", "scale of 0 or below", q, k, v, causal=True, scale=-1.0)
    refuse("flex", "BlockMask layouts only.*KeySelection", q, k, v, lists(1, 1, 6, 1))
    refuse("flex", "float32 or lower", q.double(), k.double(), v.double())
    refuse("flex", "log-sum-exp on CPU", q, k, v, return_lse=True)
    refuse("triton", "not available here|the call is dense", q, k, v)
    refuse("native", "in float32 or lower|needs its C", q.double(), k.double(), v.double())


def test_explain_names_what_runs_and_why_not_the_others() -> None:
    q, k, v = qkv()
    for mask, options in (
        (None, {}),
        (SlidingWindow(2), {"causal": True}),
        (None, {"softcap": 2.0}),
        (None, {"causal": True, "scale": -1.0}),
    ):
        said = foveal.explain(q, k, v, mask, **options)
        assert set(said.refused) | {said.impl} == set(IMPLEMENTATIONS)
        assert all(reasons for reasons in said.refused.values())
        assert str(said).startswith(f"{said.impl}: ")
        assert all(f"not {name}: " in str(said) for name in said.refused)
        chosen = foveal.attention(q, k, v, mask, impl=said.impl, **options)
        assert torch.equal(chosen, foveal.attention(q, k, v, mask, **options)), "auto runs what explain says"


def test_auto_takes_the_dense_kernel_for_dense_calls_and_skips_for_sparse_ones() -> None:
    q, k, v = qkv()
    said = foveal.explain(q, k, v, causal=True)
    assert said.impl in ("native", "sdpa")
    assert foveal.explain(q, k, v, SlidingWindow(2), causal=True).impl in ("native", "gather")
    q.requires_grad_()
    assert foveal.explain(q, k, v, return_lse=True).impl != "sdpa", "torch's kernel has no gradient through the lse"
    assert foveal.explain(q, k, v, sink_logits=torch.zeros(4)).impl != "sdpa", "sinks read the lse"


def test_gradients_through_sinks_and_auto() -> None:
    q, k, v = (t.double().requires_grad_() for t in qkv())
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    got, expected = (
        torch.autograd.grad(
            foveal.attention(q, k, v, causal=True, sink_logits=sinks, impl=impl).square().sum(), (q, k, v, sinks)
        )
        for impl in ("auto", "reference")
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_bottom_right_alignment() -> None:
    q, k, v = qkv(q_len=2)
    out = foveal.attention(q, k, v, causal=True)
    last = foveal.attention(q[:, :, 1:], k, v)
    assert torch.allclose(out[:, :, 1:], last, atol=1e-6), "the last query sees every key"
    first = foveal.attention(q[:, :, :1], k[:, :, :5], v[:, :, :5])
    assert torch.allclose(out[:, :, :1], first, atol=1e-6)


def test_default_scale_is_one_over_root_d() -> None:
    q, k, v = qkv()
    assert torch.equal(
        foveal.attention(q, k, v, impl="gather"), foveal.attention(q, k, v, impl="gather", scale=8**-0.5)
    )
    mean = foveal.attention(q, k, v, scale=0.0)
    assert torch.allclose(mean, v.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(mean), atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "gather"])
def test_bias_is_a_table_over_clipped_relative_distance(impl: str) -> None:
    q, k, v = (t.double() for t in qkv(q_len=3))
    table = torch.arange(4 * 5, dtype=torch.float64).view(4, 5) / 7
    distance = (torch.arange(6)[None] - torch.arange(3, 6)[:, None]).clamp(
        -2, 2
    ) + 2  # causal: rows sit at keys 3, 4, 5
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5 + table[:, distance]
    scores = scores.masked_fill(torch.arange(6)[None] > torch.arange(3, 6)[:, None], -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    assert torch.allclose(foveal.attention(q, k, v, causal=True, bias=table, impl=impl), expected, atol=1e-10)


def test_inputs_are_left_alone() -> None:
    tensors = qkv()
    before = [t.clone() for t in tensors]
    foveal.attention(*tensors, SlidingWindow(2), causal=True, softcap=2.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
