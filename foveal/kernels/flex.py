"""Compiled FlexAttention: PyTorch's own block-sparse kernel, for ``BlockMask`` layouts."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ..core.layouts import BlockMask, narrow
from .call import AttentionCall

WRONG_UP_TO = 16
"""Head dimension: with 8 and 16, torch 2.13's compiled kernel read beyond the keys on AVX2 when their number was 8 modulo 16."""


SMALLEST_TILE = 16
"""Of the Triton kernels, in rows and in keys."""
COMPILATIONS = 256
"""Shapes and masks compiled at most. Beyond the limit, 8 by default, torch runs the uncompiled form, which stores all scores and
asks ``mask_mod`` alone: which blocks are kept it does not know."""


@functools.cache
def unavailable() -> str | None:
    """Why FlexAttention cannot run on this machine, or None."""
    if torch.cuda.is_available():
        return None
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler on CPU; install g++ or clang"
    return None


def refusals(call: AttentionCall) -> list[str]:
    """Reasons why FlexAttention cannot run the call."""
    reasons = []
    why = unavailable()
    if why:
        reasons.append(why)
    if call.layout is not None and not isinstance(call.layout, BlockMask):
        reasons.append(f"takes BlockMask layouts only; the call has a {type(call.layout).__name__}")
    if call.q.device.type == "cpu" and call.needs_grad:
        reasons.append("has no backward on CPU; use impl='gather'")
    if call.q.device.type == "cpu" and call.return_lse:
        reasons.append("does not return the log-sum-exp on CPU")
    if call.q.dtype == torch.float64:
        reasons.append("computes in float32 or lower")
    if (
        call.q.device.type == "cpu"
        and call.q.shape[-1] <= WRONG_UP_TO
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    ):
        reasons.append(
            f"gives wrong values for head dimensions up to {WRONG_UP_TO} on CPUs with AVX2 and no AVX-512; use impl='gather'"
        )
    if call.q.device.type == "cuda":
        if call.q.shape[-1] < 16 or call.v.shape[-1] < 16:
            reasons.append("needs head dimensions of at least 16 on CUDA")
        if isinstance(call.layout, BlockMask):
            reasons += tile_refusals(call.layout.BLOCK_SIZE, call.needs_grad)
    return reasons


def tile_refusals(block_size: tuple[int, int], needs_grad: bool) -> list[str]:
    """Reasons why the CUDA kernels cannot run a mask with these blocks."""
    if any(size % SMALLEST_TILE for size in block_size):
        return [f"needs blocks of a multiple of {SMALLEST_TILE} on CUDA; the mask has {block_size[0]}×{block_size[1]}"]
    if needs_grad and any(size % 128 for size in block_size):
        return [f"has gradients for blocks of a multiple of 128 on CUDA; the mask has {block_size[0]}×{block_size[1]}"]
    return []


def kernel_options(q_len: int, block_size: tuple[int, int], head_dim: int, dtype: torch.dtype) -> dict[str, Any] | None:
    """Tiles of the forward CUDA kernel that divide the mask's blocks; None where torch's own choice does.

    Torch takes tiles of up to 128×128 by device and head dimension and fails where they do not divide the blocks. Fewer than 128
    rows would go to its decoding kernel, whose tile holds all rows of a key head and need not divide the blocks either.
    """
    if q_len >= 128 and not any(size % 128 for size in block_size):
        return None
    wide, large = dtype == torch.float32, head_dim > 128
    most = (32 if wide else 64, (16 if large else 32) if wide else (32 if large else 64))
    rows, keys = (min(top, size & -size) for top, size in zip(most, block_size, strict=True))
    return {"BLOCK_M": rows, "BLOCK_N": keys, "FORCE_USE_FLEX_ATTENTION": True}


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex.flex_attention, dynamic=False)


def compiled(*args: Any, **kwargs: Any) -> Any:
    """``flex_attention``, compiled for up to ``COMPILATIONS`` shapes and masks."""
    if torch.compiler.is_compiling():  # inside a model that is compiled as a whole
        return _compiled()(*args, **kwargs)
    from torch._dynamo import config as dynamo  # slow to import, and loaded by torch.compile in any case

    with dynamo.patch(recompile_limit=COMPILATIONS, accumulated_recompile_limit=4 * COMPILATIONS):
        return _compiled()(*args, **kwargs)


def _call(call: AttentionCall, score_mod: Any, mask: BlockMask) -> tuple[Tensor, Tensor | None]:
    kwargs = {"score_mod": score_mod, "block_mask": mask, "scale": call.scale, "enable_gqa": call.groups > 1}
    if call.q.device.type == "cuda":
        head_dim = max(call.q.shape[-1], call.v.shape[-1])
        kwargs["kernel_options"] = kernel_options(call.base.q_len, mask.BLOCK_SIZE, head_dim, call.q.dtype)
    if not call.return_lse:
        return compiled(call.q, call.k, call.v, **kwargs), None
    if hasattr(flex, "AuxRequest"):
        out, aux = compiled(call.q, call.k, call.v, return_aux=flex.AuxRequest(lse=True), **kwargs)
        return out, aux.lse
    return compiled(call.q, call.k, call.v, return_lse=True, **kwargs)


def score_mod(call: AttentionCall) -> Any:
    """Softcap and relative-position bias as a FlexAttention ``score_mod``, or None."""
    softcap, bias, shift = call.softcap, call.bias, call.base.shift
    if softcap is None and bias is None:
        return None
    reach = 0 if bias is None else (bias.shape[1] - 1) // 2

    def modify(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[h, torch.clamp(k - (q + shift), -reach, reach) + reach]
        return score

    return modify


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)``, lse only when asked for; rows that see nothing give zeros and −inf."""
    block = (128, 128)
    if call.layout is None and call.base.q_len < 128 and not call.needs_grad:
        block = (max(16, 1 << (call.base.q_len - 1).bit_length()), 128)
    mask = narrow(call.layout, call.base, block, transpose=call.needs_grad)  # type: ignore[arg-type]
    return _call(call, score_mod(call), mask)
