"""Other packages' kernels for CUDA, each with what it can express: flash-attn, natten and flashinfer, where they are installed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .documents import starts
from .implementations import Implementation, Prepared, size_of
from .masks_blocks import Blocks
from .workload import BACKWARD, Work

_HALF = (torch.float16, torch.bfloat16)


class Package(Implementation):
    """A kernel of a package that may be absent."""

    package: str

    def unavailable(self, device: torch.device) -> str | None:
        if find_spec(self.package) is None:
            return f"the package {self.name} is not installed"
        return None if device.type == "cuda" else "runs on CUDA only"

    def refusal(self, work: Work) -> str | None:
        if work.q.dtype not in _HALF:
            return "computes in float16 and bfloat16 only"
        return self.cannot(work)

    def cannot(self, work: Work) -> str | None:
        """Why it cannot express this case, or None."""
        return None

    def module(self) -> Any:
        """The package."""
        return importlib.import_module(self.package)


class FlashAttn(Package):
    """FlashAttention-2: full, causal, windows and packed documents."""

    name, package = "flash-attn", "flash_attn"
    what = "the package flash-attn (FlashAttention-2)"

    def cannot(self, work: Work) -> str | None:
        if work.mask.plain() is None:
            return "takes no mask except causal, windows and packed documents"
        return "takes head dimensions up to 256" if work.q.shape[-1] > 256 else None

    def prepare(self, work: Work) -> Prepared:
        package, plain = self.module(), work.mask.plain()
        assert plain is not None
        options = {"causal": plain.causal, "window_size": plain.window}
        if not plain.documents:

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                return package.flash_attn_func(q, k, v, **options).transpose(1, 2)

            return Prepared(run, heads_last=True)
        ends = starts(plain.documents).to(work.q.device, torch.int32)
        longest = max(plain.documents)

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
            out = package.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, **options)
            return out.transpose(0, 1)[None]

        return Prepared(packed, size_of(ends), heads_last=True)


class Natten(Package):
    """Neighborhood attention: the causal window only, because its two-sided window keeps its size at the ends of the sequence."""

    name, package = "natten", "natten"
    what = "the package natten, one-dimensional causal windows"

    def cannot(self, work: Work) -> str | None:
        plain = work.mask.plain()
        if plain is None or not plain.causal or plain.window[0] < 1:
            return "has one-dimensional windows only, and of these only the causal one is this benchmark's"
        return "needs as many key heads as query heads" if work.groups > 1 else None

    def prepare(self, work: Work) -> Prepared:
        package, plain = self.module(), work.mask.plain()
        assert plain is not None
        width = min(plain.window[0] + 1, work.mask.length)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return package.na1d(q, k, v, kernel_size=width, is_causal=True).transpose(1, 2)

        return Prepared(run, heads_last=True)


class FlashInfer(Package):
    """FlashInfer, forward only: full, causal and causal windows; its block-sparse kernel; every other mask as packed bits."""

    name = package = "flashinfer"
    what = "the package flashinfer, forward only"

    def cannot(self, work: Work) -> str | None:
        return "has no backward pass" if work.direction == BACKWARD else None

    def prepare(self, work: Work) -> Prepared:
        package, mask = self.module(), work.mask
        if isinstance(mask, Blocks):
            return self._blocks(package, mask, work)
        plain = mask.plain()
        options: dict[str, Any]
        if plain is not None and not plain.documents and plain.window[1] <= 0 and (plain.causal or plain.window[0] < 0):
            options, bits = {"causal": plain.causal, "window_left": plain.window[0]}, None
        else:
            seen = mask.pairs(torch.arange(mask.length, device=work.q.device))[0]
            bits = package.packbits(seen.reshape(-1), bitorder="little")
            options = {"packed_custom_mask": bits}

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
            return package.single_prefill_with_kv_cache(q, k, v, **options).transpose(0, 1)[None]

        return Prepared(run, size_of(bits), "with a dense mask of bits" if bits is not None else "", heads_last=True)

    @staticmethod
    def _blocks(package: Any, mask: Blocks, work: Work) -> Prepared:
        device, kv_heads = work.q.device, work.k.shape[1]
        space = torch.empty(128 << 20, dtype=torch.uint8, device=device)
        wrapper = package.VariableBlockSparseAttentionWrapper(space)
        rows, cols = (
            s.to(device, torch.int32).expand(kv_heads, -1).contiguous() for s in (mask.row_sizes, mask.col_sizes)
        )
        kept = mask.kept.expand(kv_heads, -1, -1).to(device)
        wrapper.plan(
            block_mask_map=kept, block_row_sz=rows, block_col_sz=cols, num_qo_heads=work.q.shape[1], num_kv_heads=kv_heads,
            head_dim=work.q.shape[-1], q_data_type=work.q.dtype,
        )  # fmt: skip

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return wrapper.run(q[0], k[0], v[0])[None]

        return Prepared(run, size_of(space, rows, cols, kept), "planned once")
