"""MODA's two parts that are not attention (arXiv 2507.04635): aligned keys, and the mass of pseudo scores.

Alignment: ``K^{m̄→m} = K^{m̄} ‖G^m‖`` with the Gram matrix ``G^m = K^{mᵀ} K^m`` of the other modality's keys, d × d per key head,
and fusion of a key with its aligned form. Visual keys read the text's Gram matrix, text keys the image's.

Pseudo scores: row i of an n-wide causal row has n − i free cells; the j-th takes the score −(j−1)β, has no value, and only takes
softmax mass. That is one gate per row after any kernel: ``o σ(lse − ln Z)``, ``Z_i = Σ_{j<n−i} exp(−jβ)``.

Reconstructed, because the paper gives no formula: the norm of G (the released code divides rows by their length), β, and the
score of ``"attn"`` masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError, nearest

Fusion = Literal["none", "aligned", "concat", "add", "released"]
GramNorm = Literal["row", "fro", "spectral"]
FUSIONS: tuple[Fusion, ...] = ("none", "aligned", "concat", "add", "released")
NORMS: tuple[GramNorm, ...] = ("row", "fro", "spectral")
CHUNK = 64


@dataclass(frozen=True, eq=False)
class Grams:
    """What alignment knows of both modalities: Gram matrices before the norm ``(B, Hkv, d, d)``, and how many keys they hold
    ``(B,)``."""

    visual: Tensor
    text: Tensor
    visual_count: Tensor
    text_count: Tensor


class DuplexAlignment(nn.Module):
    """Fuses every key with its form in the other modality's key space.

    Args:
        head_dim: d. fusion: ``"concat"`` (the paper's default) ``W [K; K′]`` with W starting as ``[I 0]``, so that nothing
            changes at first; ``"add"`` ``K + K′``; ``"aligned"`` K′ alone; ``"none"``; or ``"released"``, the published code's
            ``W (K_v + r ⊙ K̂_v G)`` with ``G = K̂_tᵀ V_t`` for visual keys alone, r starting at 0 and W as the identity
            (theirs starts random).
        norm: of the Gram matrix: rows of length 1, Frobenius, or spectral.

    Raises:
        ConfigError: an unknown fusion or norm.
    """

    def __init__(self, head_dim: int, fusion: Fusion = "concat", norm: GramNorm = "row") -> None:
        super().__init__()
        for name, value, known in (("fusion", fusion, FUSIONS), ("norm", norm, NORMS)):
            if value not in known:
                raise ConfigError(f"DuplexAlignment.{name} is {value!r}. {nearest(str(value), known)}")
        self.fusion, self.norm = fusion, norm
        eye = torch.eye(head_dim)
        if fusion == "concat":
            both = torch.cat([eye, torch.zeros_like(eye)], 1)
            self.visual, self.text = nn.Parameter(both.clone()), nn.Parameter(both.clone())
        if fusion == "released":
            self.weight, self.ratio = nn.Parameter(eye.clone()), nn.Parameter(torch.zeros(head_dim))

    def grams(self, k: Tensor, v: Tensor, visual: Tensor, basis: Tensor) -> Grams:
        """Gram matrices of ``k`` ``(B, Hkv, N, d)`` over the tokens of ``basis`` ``(B, N)`` bool, in float32 at least."""
        work = torch.promote_types(k.dtype, torch.float32)
        parts = []
        for own in (visual & basis, ~visual & basis):
            rows = k.to(work) * own[:, None, :, None]
            if self.fusion == "released":
                parts.append(_unit(rows).mT @ (v.to(work) * own[:, None, :, None]))
            else:
                parts.append(rows.mT @ rows)
        return Grams(parts[0], parts[1], (visual & basis).sum(-1), (~visual & basis).sum(-1))

    def normalised(self, gram: Tensor) -> Tensor:
        """``‖G‖``; a zero matrix stays zero."""
        tiny = torch.finfo(gram.dtype).tiny
        if self.norm == "row" or self.fusion == "released":
            return gram / gram.norm(dim=-1, keepdim=True).clamp(min=tiny)
        if self.norm == "fro":
            return gram / torch.linalg.matrix_norm(gram)[..., None, None].clamp(min=tiny)
        return gram / torch.linalg.matrix_norm(gram, 2)[..., None, None].clamp(min=tiny)

    def forward(self, k: Tensor, visual: Tensor, grams: Grams) -> Tensor:
        """Fused keys ``(B, Hkv, N, d)``; a key whose other modality is empty stays as it is.

        Args:
            k: ``(B, Hkv, N, d)``. visual: ``(B, N)`` bool. grams: from :meth:`grams`.
        """
        if self.fusion == "none":
            return k
        other = visual[:, None, :, None]
        given = torch.where(visual, grams.text_count[:, None] > 0, grams.visual_count[:, None] > 0)
        work = grams.text.dtype
        source = _unit(k.to(work)) if self.fusion == "released" else k.to(work)
        aligned = torch.where(other, source @ self.normalised(grams.text), source @ self.normalised(grams.visual))
        return self._fuse(k, aligned.to(k.dtype), visual, given)

    def causal(
        self, k: Tensor, v: Tensor, visual: Tensor, valid: Tensor, before: Grams | None = None
    ) -> tuple[Tensor, Grams]:
        """Fused keys where each key reads the Gram matrix of the tokens before it, and the matrices after the last."""
        grams = self.grams(k[:, :, :0], v[:, :, :0], visual[:, :0], valid[:, :0]) if before is None else before
        work, out = grams.text.dtype, []
        for first in range(0, k.shape[2], CHUNK):
            part = slice(first, first + CHUNK)
            keys, values, vis, real = k[:, :, part].to(work), v[:, :, part].to(work), visual[:, part], valid[:, part]
            left = _unit(keys) if self.fusion == "released" else keys
            outer = left[..., :, None] * (values if self.fusion == "released" else keys)[..., None, :]
            running, counts = [], []
            for own, total, count in ((vis, grams.visual, grams.visual_count), (~vis, grams.text, grams.text_count)):
                here = (own & real)[:, None, :, None, None]
                running.append(total[:, :, None] + (outer * here).cumsum(2))
                counts.append(count[:, None] + (own & real).cumsum(-1))
            other = torch.where(vis[:, None, :, None, None], running[1], running[0])
            aligned = (left[..., None, :] @ self.normalised(other))[..., 0, :]
            given = torch.where(vis, counts[1], counts[0]) > 0
            out.append(self._fuse(k[:, :, part], aligned.to(k.dtype), vis, given))
            grams = Grams(running[0][:, :, -1], running[1][:, :, -1], counts[0][:, -1], counts[1][:, -1])
        return (torch.cat(out, 2) if out else k), grams

    def _fuse(self, k: Tensor, aligned: Tensor, visual: Tensor, given: Tensor) -> Tensor:
        other = visual[:, None, :, None]
        if self.fusion == "none":
            return k
        if self.fusion == "aligned":
            fused = aligned
        elif self.fusion == "add":
            fused = k + aligned
        elif self.fusion == "concat":
            both = torch.cat([k, aligned], -1)
            fused = torch.where(other, F.linear(both, self.visual), F.linear(both, self.text))
        else:
            fused = torch.where(other, F.linear(k + self.ratio * aligned, self.weight), k)
        return torch.where(given[:, None, :, None], fused.to(k.dtype), k)


def _unit(k: Tensor) -> Tensor:
    return k / (k.norm(dim=-1, keepdim=True) + 1e-6)


def log_pseudo_mass(place: Tensor, beta: Tensor, width: int | None) -> Tensor:
    """``ln Z_i = ln Σ_{j=0}^{n−i−1} exp(−jβ)``; −inf for the last row, which has no free cell.

    Args:
        place: i from 1, any shape. beta: ≥ 0, broadcastable to it. width: n; None is its limit ``1/(1 − exp(−β))``, which does
            not depend on the row and needs β > 0.
    """
    beta = beta.expand(torch.broadcast_shapes(place.shape, beta.shape))
    some = beta.clamp(min=1e-12)
    limit = -torch.log(-torch.expm1(-some))
    if width is None:
        return limit
    free = (width - place).clamp(min=0).to(beta.dtype).expand_as(beta)
    tiny = free.clamp(min=1)
    inside = torch.where(beta > 1e-9, torch.log(-torch.expm1(-some * tiny)) + limit, torch.log(tiny))
    return torch.where(free > 0, inside, -torch.inf)


def gated(out: Tensor, lse: Tensor, log_mass: Tensor) -> Tensor:
    """Attention ``(B, H, N, D)`` whose rows also gave mass ``exp(log_mass)`` to cells without a value; zeros where nothing is seen."""
    seen = torch.isfinite(lse)
    return out * torch.where(seen, torch.sigmoid(torch.where(seen, lse, 0.0) - log_mass), 0.0)[..., None].to(out.dtype)
