"""Queries before rotation, which transformers gives to nobody: read where the projection (or its norm) puts them out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError


def query_output(attention: nn.Module) -> nn.Module | None:
    """The module inside an attention module whose output is its queries before rotation: the q-norm, else the projection.

    None where queries, keys and values come from one projection.
    """
    for name in ("q_norm", "q_proj"):
        found = getattr(attention, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def unrotated(raw: Tensor | None, rotated: Tensor) -> Tensor | None:
    """``(B, H, N, D)`` queries before rotation from what the module put out; None where its shape is not understood.

    Args:
        raw: ``(B, N, H·D)``, ``(B, N, H, D)`` or ``(B, H, N, D)``. rotated: ``(B, H, N, D)``, as the softmax uses them.

    Raises:
        UnsupportedError: something besides a rotation (and one factor for all) happens between the two.
    """
    batch, heads, length, dim = rotated.shape
    if raw is None or raw.numel() != rotated.numel():
        return None
    made = []
    if raw.dim() != 4 or raw.shape[1:3] == (length, heads):
        made.append(raw.reshape(batch, length, heads, dim).transpose(1, 2))
    if raw.shape == rotated.shape:  # some families turn heads before lengths first
        made.append(raw)
    if not made:
        return None
    for q in made:
        if _same_lengths(q, rotated):
            return q
    raise UnsupportedError(
        "the queries of this model change their length between projection and softmax, so what its projection puts out are not the queries "
        "before rotation; use a pattern that does not need pre_rope_q."
    )


def _same_lengths(before: Tensor, after: Tensor) -> bool:
    """Whether the vectors of the first and last tokens keep their length, up to one factor for all, as under a rotation."""
    ends = [0, before.shape[2] - 1]
    a, b = (x[:, :, ends].detach().float().norm(dim=-1) for x in (before, after))
    ratio = (b + 1e-6) / (a + 1e-6)
    middle = ratio.median()
    return bool((ratio - middle).abs().max() <= 0.05 * middle.abs())


def tap(attention: nn.Module, keep: Callable[[nn.Module, Tensor], None]) -> list[torch.utils.hooks.RemovableHandle]:
    """Call ``keep(attention, output)`` whenever ``attention`` has made its queries; no hook where one projection makes everything."""
    source = query_output(attention)
    if source is None:
        return []
    return [source.register_forward_hook(lambda module, args, out: keep(attention, out))]
