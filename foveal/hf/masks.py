"""The mask that transformers asks for under foveal's name: O(N) numbers that look like a 4-D tensor.

transformers describes every mask as a tree of small known functions (causal, sliding window, chunks, packed documents,
padding). The tree is read exactly; what is not known is kept as an elementwise predicate, so no mask is ever guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.context import Selection
from ..core.errors import UnsupportedError
from .structure import as_predicate, read_structure

NAME = "foveal"
"""Name under which attention and mask function are registered in transformers."""

Rebuild = Callable[[str], Any]


class HostMask(torch.Tensor):
    """A ``(B, 1, q_len, kv_len)`` bool tensor of one stored element that carries the real mask as ``base``.

    transformers only looks at its shape, moves it, slices its keys, or makes it contiguous; any arithmetic on it means
    that an attention other than foveal's got hold of it, and raises.

    Attributes:
        base: the mask, over exactly these queries and keys.
        q_offset: tokens of the request before row 0.
        owner: the handle whose model was running when it was made, or None.
        selections: what the layers of that forward select, by layer index; a checkpointed backward finds it here again.
        rebuild: makes the mask that another implementation (by name) would have received.
    """

    base: BaseMask
    q_offset: int
    owner: Any
    selections: dict[int, Selection]
    rebuild: Rebuild

    @staticmethod
    def make(
        base: BaseMask, batch: int, q_offset: int, owner: Any, selections: dict[int, Selection], rebuild: Rebuild
    ) -> HostMask:
        """Wrap a base mask."""
        flat = torch.zeros((), dtype=torch.bool, device=base.device).expand(batch, 1, base.q_len, base.kv_len)
        mask = flat.as_subclass(HostMask)
        mask.base, mask.q_offset, mask.owner, mask.selections, mask.rebuild = base, q_offset, owner, selections, rebuild
        return mask

    def contiguous(self, *args: Any, **kwargs: Any) -> HostMask:  # type: ignore[override]
        """Itself: there is nothing to lay out."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> HostMask:  # type: ignore[override]
        """Itself: it follows the tensors it meets."""
        return self

    def detach(self) -> HostMask:
        """Itself: reentrant checkpointing detaches what it hands to the recomputation."""
        return self

    def __getitem__(self, index: Any) -> HostMask:
        """Only a cut of the last keys, ``[:, :, :, :n]``, which some models make."""
        everything = slice(None)
        if isinstance(index, tuple) and len(index) == 4 and all(i == everything for i in index[:3]):
            cut = index[3]
            if isinstance(cut, slice) and cut.start in (None, 0) and cut.step in (None, 1):
                n = self.base.kv_len if cut.stop is None else min(cut.stop, self.base.kv_len)
                if n == self.base.kv_len:
                    return self
                rebuild = self.rebuild

                def cut_rebuild(name: str) -> Any:
                    whole = rebuild(name)
                    return None if whole is None else whole[..., :n]

                return HostMask.make(
                    self.base.crop_keys(n), self.shape[0], self.q_offset, self.owner, self.selections, cut_rebuild
                )
        raise UnsupportedError(
            f"the model indexes its attention mask with {index!r}, which foveal cannot follow; this model family is not supported."
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        tracing = torch._guards.TracingContext.try_get() is not None  # torch.compile looks at everything
        if name in _LOOKS or tracing:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            if tracing or result is args[0] or not isinstance(result, Tensor):
                return result
        raise UnsupportedError(
            f"an attention that is not foveal's received foveal's mask (in {name}). Most often a checkpointed forward is recomputed by "
            "backward() after its `with foveal.attach(...)` block has ended, which would give wrong gradients: call backward() inside the block."
        )


_LOOKS = {
    "__get__", "__set__", "dim", "size", "stride", "numel", "ndimension", "__repr__", "__len__", "__hash__", "is_floating_point",
    "is_complex", "data_ptr", "requires_grad_",
}  # fmt: skip
"""Functions that look at a tensor without giving another one."""


def build_base(
    q_len: int, kv_len: int, q_offset: int, kv_offset: int, mask_function: Callable[..., Tensor],
    padding: Tensor | None, device: torch.device | str, scalar: bool = False,
) -> BaseMask:  # fmt: skip
    """The base mask of one transformers mask request.

    Args:
        q_len, kv_len, q_offset, kv_offset: lengths and absolute positions of row 0 and key 0.
        mask_function: transformers' ``(b, h, q, k) -> bool`` over absolute positions.
        padding: ``(B, ≥ seen tokens)`` bool, True on real tokens, or None.
        scalar: the function is written for scalars (vmap) rather than index tensors.
    """
    found = read_structure(mask_function)
    valid = _keys(padding, kv_len, kv_offset, device)
    if found.valid is not None:
        own = _keys(found.valid, kv_len, kv_offset, device)
        valid = own if valid is None or own is None else valid & own
    opaque = [as_predicate(fn, q_offset, kv_offset, scalar) for fn in found.opaque]

    def every(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ok = opaque[0](b, h, q, k)
        for other in opaque[1:]:
            ok = ok & other(b, h, q, k)
        return ok

    base = BaseMask.build(
        q_len, kv_len, causal=found.causal, shift=q_offset - kv_offset, window=found.window, chunk=found.chunk,
        chunk_start=found.chunk_start, valid=valid, segments=found.segments, kv_offset=kv_offset,
        predicate=every if opaque else None, device=device,
    )  # fmt: skip
    if (
        kv_offset and padding is not None and found.segments is None
    ):  # padding that has rolled out of the cache counts too
        base.rank = _keys(padding, kv_len + kv_offset, 0, device).long().cumsum(-1)[:, kv_offset:] - 1  # type: ignore[union-attr]
    return base


def _keys(padding: Tensor | None, kv_len: int, kv_offset: int, device: torch.device | str) -> Tensor | None:
    """Padding of exactly the keys at hand; positions that the host has not described yet count as padding."""
    if padding is None:
        return None
    padding = padding.to(device=device, dtype=torch.bool)
    missing = kv_len + kv_offset - padding.shape[-1]
    if missing > 0:
        padding = torch.nn.functional.pad(padding, (0, missing))
    return padding[:, kv_offset : kv_offset + kv_len]


def mask_function_for_host(running: Callable[[], Any]) -> Callable[..., HostMask]:
    """foveal's entry in transformers' mask interface; ``running()`` names the handle whose model is in its forward."""

    @torch.compiler.disable
    def foveal_mask(
        batch_size: int, kv_length: int, mask_function: Callable[..., Tensor], q_length: int | None = None, q_offset: Any = 0,
        kv_offset: int = 0, attention_mask: Tensor | None = None, cache_position: Tensor | None = None,
        device: torch.device | str | None = None, **kwargs: Any,
    ) -> HostMask:  # fmt: skip
        offset = int(q_offset)  # a static cache counts up its own tensor in place
        given = {"batch_size": batch_size, "kv_length": kv_length, "mask_function": mask_function, "kv_offset": kv_offset, "attention_mask": attention_mask, **kwargs}  # fmt: skip
        if cache_position is not None:  # transformers before 5.17
            given["cache_position"] = cache_position
            q_length, offset, device = cache_position.shape[0], int(cache_position[0]), cache_position.device
        else:
            given |= {"q_length": q_length, "q_offset": offset, "device": device}
        if q_length is None:
            raise UnsupportedError(
                "transformers asked for a mask without a query length; this version of transformers is not supported."
            )

        def rebuild(implementation: str) -> Any:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

            return (
                ALL_MASK_ATTENTION_FUNCTIONS[implementation](**given)
                if implementation in ALL_MASK_ATTENTION_FUNCTIONS
                else None
            )

        scalar = bool(kwargs.get("use_vmap", False))
        base = build_base(
            q_length, kv_length, offset, kv_offset, mask_function, attention_mask, device or "cpu", scalar
        )
        base.cache["predicate_batch"] = batch_size
        owner = running()
        selections = {} if owner is None else owner.live.forward.selections
        return HostMask.make(base, batch_size, offset, owner, selections, rebuild)

    return foveal_mask


def base_from_tensor(mask: Tensor, q_len: int, kv_len: int, shift: int, cross: bool = False) -> BaseMask:
    """A user's own 4-D mask, bool or additive with only 0 and −inf (or the dtype's minimum), as a base mask.

    Args:
        mask: ``(B or 1, 1 or H, ≥ q_len, ≥ kv_len)``.
        q_len, kv_len: numbers of query rows and keys.
        shift: key index of row 0.
        cross: rows and keys are different sequences, so that there is no future.

    Raises:
        UnsupportedError: when it adds other numbers to the logits, or its shape does not fit.
    """
    if mask.dim() != 4 or mask.shape[-2] < q_len or mask.shape[-1] < kv_len:
        raise UnsupportedError(
            f"attention_mask has shape {tuple(mask.shape)}; expected (batch, 1 or heads, {q_len}, {kv_len}), or a 2-D padding mask."
        )
    mask = mask[..., :q_len, :kv_len]
    if mask.dtype != torch.bool:
        keep = mask == 0
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((keep | hidden).all()):
            raise UnsupportedError(
                "the 4-D attention_mask adds numbers other than 0 and −inf to the logits; foveal cannot express that as a mask. "
                "Pass a boolean mask, or run this model without foveal."
            )
        mask = keep
    if mask.shape[1] != 1:
        if not bool((mask == mask[:, :1]).all()):
            raise UnsupportedError(
                f"the 4-D attention_mask differs between its {mask.shape[1]} heads; expected one mask for all heads."
            )
        mask = mask[:, :1]

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[b if mask.shape[0] > 1 else torch.zeros_like(b), 0, q, k]

    base = BaseMask.build(q_len, kv_len, causal=False, predicate=predicate, shift=shift, device=mask.device)
    base.cache["predicate_batch"] = mask.shape[0]
    # a triangular mask keeps its meaning for patterns that need to know where the future begins
    own = torch.arange(q_len, device=mask.device)[:, None] + shift
    future = torch.arange(kv_len, device=mask.device)[None, :] > own
    base.causal = not cross and not bool((mask[:, 0] & future).any())
    return base
