"""What the implementations say of themselves, and that each computes the mask that it accepts."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveal.bench import implementations
from foveal.bench.implementations import Flex, Implementation, choose, size_of
from foveal.bench.implementations_cuda import FlashAttn, FlashInfer, Natten
from foveal.bench.masks import parse_mask, parse_masks
from foveal.bench.workload import BACKWARD, FORWARD, Heads, Work, truth
from foveal.core.errors import ConfigError
from foveal.kernels import flex
from foveal.kernels.dispatch import missing

KNOWN = implementations.implementations()
MASKS = parse_masks("all", {"window": 40, "block": 64, "mean_block": 150})


def make(mask: str, direction: str = FORWARD, dtype: torch.dtype = torch.float32, heads: Heads | None = None) -> Work:
    heads = heads or Heads(4, 2, 16)
    return Work.make(parse_mask(mask).draw(320, heads.kv_heads), heads, dtype, direction)


def errors(one: Implementation, own: Work) -> list[float]:
    prepared = one.prepare(own)
    right = truth(own)
    moved = own.heads_last() if prepared.heads_last else own
    out = prepared.run(moved.q, moved.k, moved.v)
    found = [right.error(out)]
    if own.direction == BACKWARD:
        found.append(right.grad_error(torch.autograd.grad(out, (moved.q, moved.k, moved.v), right.upstream)))
    return found


@pytest.mark.parametrize("spec", MASKS, ids=str)
@pytest.mark.parametrize("name", ["native", "gather", "sdpa", "sdpa-math", "sdpa-flash"])
def test_every_mask_on_cpu(name: str, spec: Any) -> None:
    if name == "native" and missing("native"):
        pytest.skip("the C++ kernels are not built")
    own = make(str(spec), BACKWARD)
    assert KNOWN[name].refusal(own) is None
    assert max(errors(KNOWN[name], own)) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(flex.unavailable() is not None, reason="torch.compile needs a C++ compiler")
def test_flex_on_cpu() -> None:
    own = make("share_question", heads=Heads(2, 1, 32))
    assert Flex().refusal(own) is None
    assert max(errors(Flex(), own)) < 1e-5
    assert "no backward on CPU" in (Flex().refusal(make("causal", BACKWARD)) or "")


def test_a_dense_mask_is_said_and_counted() -> None:
    sdpa = KNOWN["sdpa"]
    assert sdpa.prepare(make("causal")).metadata == 0 and sdpa.prepare(make("causal")).note == ""
    found = sdpa.prepare(make("causal_document"))
    assert found.metadata == 320**2 and found.note == "with a dense mask"
    assert sdpa.prepare(make("uniform_block_sparse")).metadata == 4 * 320**2
    assert KNOWN["native"].prepare(make("causal_document")).metadata < 320 * 32


def test_a_mask_too_large_for_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "free_memory", lambda device: 600_000.0)
    assert "its dense mask would take about" in (KNOWN["sdpa"].refusal(make("causal_document")) or "")
    assert KNOWN["sdpa"].refusal(make("causal")) is None
    assert "its scores would take about" in (KNOWN["sdpa-math"].refusal(make("causal")) or "")


def test_choosing_names() -> None:
    chosen, absent = choose(["auto"], "cpu")
    assert [one.name for one in chosen][-2:] == ["gather", "sdpa"]
    assert "sdpa-math" not in absent and "flex" not in {one.name for one in chosen}
    chosen, absent = choose(["all"], "cpu")
    assert {"sdpa-math", "sdpa-flash"} <= {one.name for one in chosen}
    assert absent["sdpa-cudnn"] == "runs on CUDA only"
    with pytest.raises(ConfigError, match="Did you mean 'gather'"):
        choose(["gathr"], "cpu")
    with pytest.raises(ConfigError, match=r"no implementation runs on cpu: sdpa-cudnn runs on CUDA only"):
        choose(["sdpa-cudnn"], "cpu")


class Fakes:
    """Packages that compute by SDPA what their documented arguments mean, and remember the arguments."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
        assert all(t.is_contiguous() and t.dim() == 4 for t in (q, k, v))
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
        left, right = (n if n >= 0 else 10**9 for n in window_size)
        seen = (i - j <= left) & (j - i <= (0 if causal else right))
        return self.attend(*(t.transpose(1, 2) for t in (q, k, v)), seen).transpose(1, 2)

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, causal: bool, window_size: Any
    ) -> Tensor:  # fmt: skip
        assert q.dim() == 3 and cu_q.dtype == torch.int32 and int(cu_q.diff().max()) == max_q
        parts = [
            self.flash_attn_func(
                *(t[a:b][None].contiguous() for t in (q, k, v)), causal=causal, window_size=window_size
            )[0]
            for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False)
        ]
        return torch.cat(parts)

    def na1d(self, q: Tensor, k: Tensor, v: Tensor, *, kernel_size: int, is_causal: bool) -> Tensor:
        assert is_causal
        return self.flash_attn_func(q, k, v, causal=True, window_size=(kernel_size - 1, 0))

    def packbits(self, seen: Tensor, *, bitorder: str) -> Tensor:
        assert bitorder == "little" and seen.dim() == 1
        return seen

    def single_prefill_with_kv_cache(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window_left: int = -1, packed_custom_mask: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        if packed_custom_mask is not None:
            seen = packed_custom_mask.view(q.shape[0], -1)
            return self.attend(*(t.transpose(0, 1)[None] for t in (q, k, v)), seen)[0].transpose(0, 1)
        return self.flash_attn_func(q[None], k[None], v[None], causal=causal, window_size=(window_left, -1))[0]

    def VariableBlockSparseAttentionWrapper(self, space: Tensor) -> SimpleNamespace:
        held: dict[str, Any] = {}

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert (
                held["num_qo_heads"] == q.shape[0]
                and held["num_kv_heads"] == k.shape[0]
                and q.shape[2] == held["head_dim"]
            )
            seen = []
            for kept, rows, cols in zip(
                held["block_mask_map"], held["block_row_sz"], held["block_col_sz"], strict=True
            ):
                assert rows.dtype == torch.int32
                seen.append(kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1))
            each = torch.stack(seen).repeat_interleave(q.shape[0] // k.shape[0], 0)
            return self.attend(q[None], k[None], v[None], each)[0]

        return SimpleNamespace(plan=lambda **options: held.update(options), run=run)


@pytest.mark.parametrize(
    ("one", "package"), [(FlashAttn(), "flash_attn"), (Natten(), "natten"), (FlashInfer(), "flashinfer")]
)
@pytest.mark.parametrize("spec", MASKS, ids=str)
def test_packages_get_the_mask_that_they_accept(
    one: Any, package: str, spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in that follows the package's documentation; the packages themselves need a CUDA GPU."""
    monkeypatch.setitem(sys.modules, package, Fakes())
    heads = Heads(2, 2, 16) if package == "natten" else Heads(4, 2, 16)
    own = make(str(spec), FORWARD, torch.bfloat16, heads)
    takes = {
        "flash_attn": {"full", "causal", "full_sliding", "causal_sliding", "full_document", "causal_document"},
        "natten": {"causal_sliding"},
        "flashinfer": {s.name for s in MASKS},
    }[package]
    why = one.refusal(own)
    assert (why is None) == (spec.name in takes), why
    if why is None:
        assert max(errors(one, own)) < 2e-2


def test_packages_refuse_what_they_cannot() -> None:
    assert "float16 and bfloat16 only" in (FlashAttn().refusal(make("causal")) or "")
    assert FlashInfer().refusal(make("causal", BACKWARD, torch.bfloat16)) == "has no backward pass"
    assert "as many key heads" in (Natten().refusal(make("causal_sliding:window=9", FORWARD, torch.float16)) or "")
    for one in (FlashAttn(), Natten(), FlashInfer()):
        assert one.unavailable(torch.device("cpu"))


def test_size_of() -> None:
    call = implementations.attention_call(make("uniform_block_sparse"))
    assert size_of(torch.zeros(3, dtype=torch.int64), None) == 24
    assert size_of(call.layout) > 0 and size_of(call.base) == 2 * 8 * 320
