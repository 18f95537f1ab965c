"""transformers describes a mask as a tree of small functions; here the tree is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.base_mask import Predicate


@dataclass
class Structure:
    """What a tree of mask functions says."""

    causal: bool = False
    window: int | None = None
    both_sides: bool = False
    chunk: int | None = None
    chunk_start: Tensor | None = None
    segments: Tensor | None = None
    valid: Tensor | None = None
    opaque: list[Callable[..., Tensor]] = field(default_factory=list)


def read_structure(mask_function: Callable[..., Tensor]) -> Structure:
    """Read the tree; functions that are not transformers' own, or combinations without a closed form, become opaque.

    What is found beside an opaque function holds as well: the tree is a conjunction wherever it is descended.
    """
    found = Structure()
    if not _walk(mask_function, found, False):
        found.opaque = [mask_function]
    if found.window is not None and not found.causal and not found.both_sides:  # open to the right only
        found.window, found.opaque = None, [mask_function]
    return found


def _walk(fn: Callable[..., Tensor], out: Structure, remapped: bool) -> bool:
    name = getattr(fn, "__qualname__", "")
    inside = (
        dict(zip(fn.__code__.co_freevars, (c.cell_contents for c in fn.__closure__ or ()), strict=True))
        if hasattr(fn, "__code__")
        else {}
    )
    if getattr(fn, "__module__", "") != "transformers.masking_utils":
        out.opaque.append(fn)
        return not remapped
    if name == "causal_mask_function":
        out.causal = True
    elif name == "bidirectional_mask_function":
        pass
    elif name == "and_masks.<locals>.and_mask":
        return all([_walk(part, out, remapped) for part in inside["mask_functions"]])  # noqa: C419 (visits every part)
    elif name == "sliding_window_overlay.<locals>.inner_mask" and out.window is None:
        out.window = int(inside["sliding_window"])
    elif name == "sliding_window_bidirectional_overlay.<locals>.inner_mask" and out.window is None:
        out.window, out.both_sides = int(inside["sliding_window"]) + 1, True  # transformers' distance is inclusive
    elif name == "chunked_overlay.<locals>.inner_mask" and out.chunk is None and not remapped:
        out.chunk, out.chunk_start = int(inside["chunk_size"]), inside["left_padding"]
    elif name == "packed_sequence_mask_function.<locals>.inner_mask" and out.segments is None and not remapped:
        out.segments = inside["packed_sequence_mask"]
    elif name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        # positions rise by one inside a document, so causality and windows mean the same in either numbering
        return _walk(inside["mask_function"], out, True)
    elif name == "padding_mask_function.<locals>.inner_mask" and not remapped:
        out.valid = inside["padding_mask"] if out.valid is None else out.valid & inside["padding_mask"]
    else:
        out.opaque.append(fn)
        return not remapped
    return True


def as_predicate(fn: Callable[..., Tensor], q_offset: int, kv_offset: int, scalar: bool) -> Predicate:
    """A host mask function over absolute positions as a predicate over row and key indices."""

    def elementwise(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return fn(b, h, q + q_offset, k + kv_offset)

    if not scalar:
        return elementwise

    def one_by_one(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        full = torch.broadcast_tensors(b, h, q, k)
        with TransformGetItemToIndex():
            return torch.vmap(elementwise)(*(t.reshape(-1) for t in full)).view(full[0].shape)

    return one_by_one
