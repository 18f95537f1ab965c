"""MODA: modular duplex attention for multimodal decoders (arXiv 2507.04635).

Keys of each modality are aligned with the other's key space, and rows give some of their softmax mass to pseudo scores; both
parts are in ``moda_align``. The softmax over self and cross keys is one (``combine="joint"``); the printed sum of two softmaxes
is an option and doubles the scale, so it is divided by the number of parts that see something.

Which tokens the Gram matrices read is ``scope``: ``"prompt"``, never answer tokens; ``"causal"``, the tokens before a key;
``"all"``, as the released code, which lets answer tokens reach earlier rows in teacher forcing and has no decoding.

The released code is ``fusion="released", mask="inf", scope="all"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError, UnsupportedError, nearest
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from .moda_align import DuplexAlignment, Fusion, GramNorm, Grams, gated, log_pseudo_mass
from .rotary import check_rotary_heads, rotary, rotate

Mask = Literal["inf", "fix", "attn"]
Scope = Literal["prompt", "causal", "all"]
Combine = Literal["joint", "sum"]


@dataclass
class ModaMemory:
    """What a layer remembers of a request; grows in place. Keys are fused already, the Gram matrices those of the prompt
    (``scope="prompt"``) or of all tokens so far (``"causal"``)."""

    keys: Tensor | None = None
    values: Tensor | None = None
    visual: Tensor | None = None
    valid: Tensor | None = None
    grams: Grams | None = None


class ModaAttention(nn.Module):
    """Causal self-attention over visual and text tokens, ``(B, N, dim)`` in and out.

    Args:
        dim: width. num_heads, num_kv_heads: heads of ``dim / num_heads``; the second divides the first.
        fusion, norm: of :class:`DuplexAlignment`. pre_rope: align keys before the rotary positions instead of after them.
        mask: ``"inf"`` plain causal; ``"fix"`` pseudo scores −(j−1)β; ``"attn"`` these times the cosine of a row's query with
            ``‖G‖ q`` of its own modality, at least 0 (a reconstruction, experimental).
        beta: β of visual and of text rows. width: n of the pseudo scores; None is its limit, with which decoding is exact.
        scope, combine: see the module's docstring. rope_base: of the rotary positions. impl: of the attention.

    Raises:
        ConfigError: sizes or names that do not go together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        fusion: Fusion = "concat",
        norm: GramNorm = "row",
        pre_rope: bool = False,
        mask: Mask = "fix",
        beta: tuple[float, float] = (0.1, 0.1),
        width: int | None = None,
        scope: Scope = "prompt",
        combine: Combine = "joint",
        rope_base: float = 10_000.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_rotary_heads("ModaAttention", dim, num_heads, kv_heads)
        for name, value, known in (
            ("mask", mask, ("inf", "fix", "attn")),
            ("scope", scope, ("prompt", "causal", "all")),
            ("combine", combine, ("joint", "sum")),
        ):
            if value not in known:
                raise ConfigError(f"ModaAttention.{name} is {value!r}. {nearest(str(value), known)}")
        if min(beta) < 0 or (mask != "inf" and width is None and not min(beta) > 0):
            raise ConfigError(f"ModaAttention.beta is {beta}; expected numbers above 0, or 0 with a width.")
        if combine == "sum" and mask != "inf":
            raise ConfigError(
                "ModaAttention: combine='sum' has no single softmax to gate; expected mask='inf' with it."
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, dim // num_heads
        self.pre_rope, self.mask, self.beta, self.width = pre_rope, mask, beta, width
        self.scope, self.combine, self.rope_base, self.impl = scope, combine, rope_base, impl
        self.qkv = nn.Linear(dim, (num_heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.align = DuplexAlignment(self.head_dim, fusion, norm)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        visual: Tensor,
        *,
        valid: Tensor | None = None,
        prompt: Tensor | None = None,
        memory: ModaMemory | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: ``(B, N, dim)``. visual: ``(B, N)`` bool, True on image tokens. valid: ``(B, N)`` bool, False on padding.
            prompt: ``(B, N)`` bool, tokens that are given and not predicted; ``scope="prompt"`` needs it, except with a new
                memory, whose first call is the prompt.
            memory: of earlier tokens of a request.

        Raises:
            ShapeError: shapes that do not fit. ConfigError: no ``prompt``. UnsupportedError: a memory with ``scope="all"``.
        """
        self._check(x, visual, valid, prompt, memory)
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split(sizes, -1))
        real = torch.ones_like(visual) if valid is None else valid
        memory = ModaMemory() if memory is None else memory
        before = 0 if memory.keys is None else memory.keys.shape[2]
        turn = rotary(
            torch.arange(before, before + x.shape[1], device=x.device)[:, None], self.head_dim, self.rope_base
        )
        q, k = rotate(q, turn), k if self.pre_rope else rotate(k, turn)
        fused, grams = self._fuse(k, v, visual, real, prompt, memory)
        fused = rotate(fused, turn) if self.pre_rope else fused
        new = {"keys": (fused, 2), "values": (v, 2), "visual": (visual, 1), "valid": (real, 1)}
        for name, (tensor, axis) in new.items():
            old = getattr(memory, name)
            setattr(memory, name, tensor if old is None else torch.cat([old, tensor], axis))
        memory.grams = grams
        y = self._attend(q, memory, visual, grams)
        return self.out(y.transpose(1, 2).flatten(2))

    def _fuse(
        self, k: Tensor, v: Tensor, visual: Tensor, real: Tensor, prompt: Tensor | None, memory: ModaMemory
    ) -> tuple[Tensor, Grams]:
        if self.scope == "causal":
            return self.align.causal(k, v, visual, real, memory.grams)
        grams = memory.grams
        if grams is None:
            grams = self.align.grams(k, v, visual, real if prompt is None or self.scope == "all" else real & prompt)
        return self.align(k, visual, grams), grams

    def _attend(self, q: Tensor, memory: ModaMemory, visual: Tensor, grams: Grams) -> Tensor:
        keys, values, valid = memory.keys, memory.values, memory.valid
        assert keys is not None and values is not None and valid is not None and memory.visual is not None

        def over(seen: Tensor) -> tuple[Tensor, Tensor]:
            base = BaseMask.build(q.shape[2], keys.shape[2], causal=True, valid=seen, device=q.device)
            out, lse = compute(AttentionCall(q, keys, values, None, base, self.head_dim**-0.5), self.impl)
            assert lse is not None
            return out, lse

        if self.combine == "sum":
            parts = [over(valid & memory.visual), over(valid & ~memory.visual)]
            number = sum(torch.isfinite(lse).to(q.dtype) for _, lse in parts)
            assert isinstance(number, Tensor)
            return (parts[0][0] + parts[1][0]) / number.clamp(min=1)[..., None]
        out, lse = over(valid)
        if self.mask == "inf":
            return out
        place = valid.cumsum(-1)[:, None, valid.shape[1] - q.shape[2] :].expand(-1, q.shape[1], -1)
        own = visual[:, None]
        beta = lse.new_tensor(self.beta[::-1])[own.long()]  # in lse's own dtype
        if self.mask == "attn":
            beta = beta * self._agreement(q, own, grams).to(lse.dtype)
        return gated(out, lse, log_pseudo_mass(place, beta, self.width))

    def _agreement(self, q: Tensor, own: Tensor, grams: Grams) -> Tensor:
        """Cosine of each query with ``‖G^m‖ q`` of its own modality, ``(B, H, N)``, at least a small positive number; 1 without
        any key of it."""
        rows = q.to(grams.text.dtype)
        some = []
        for gram, count in ((grams.visual, grams.visual_count), (grams.text, grams.text_count)):
            turned = rows @ self.align.normalised(gram).mT.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
            cosine = torch.cosine_similarity(rows, turned, dim=-1).clamp(min=1e-3)
            some.append(torch.where(count[:, None, None] > 0, cosine, 1.0))
        return torch.where(own, some[0], some[1])

    def _check(
        self, x: Tensor, visual: Tensor, valid: Tensor | None, prompt: Tensor | None, memory: ModaMemory | None
    ) -> None:
        if x.dim() != 3 or x.shape[-1] != self.out.in_features:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, length, {self.out.in_features}).")
        for name, mask in (("visual", visual), ("valid", valid), ("prompt", prompt)):
            if mask is not None and (tuple(mask.shape) != tuple(x.shape[:2]) or mask.dtype != torch.bool):
                raise ShapeError(
                    f"{name} is {tuple(mask.shape)} {mask.dtype}; expected {tuple(x.shape[:2])} torch.bool."
                )
        if memory is not None and self.scope == "all":
            raise UnsupportedError(
                "scope='all' reads tokens that come later, so it has no decoding. Use 'prompt' or 'causal'."
            )
        if self.scope == "prompt" and prompt is None and memory is None:
            raise ConfigError(
                "scope='prompt' needs prompt, True on the tokens that are given and not predicted (labels == -100), so that answers "
                "do not reach earlier rows; for generation, pass a memory."
            )


def self_and_cross(
    q: Tensor, k: Tensor, v: Tensor, visual: Tensor, *, scale: float | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Causal attention of every row over the keys of its own and of the other modality: ``((out, lse), (out, lse))``.

    ``foveal.merge`` of both is the joint softmax. ``q`` ``(B, H, N, D)``, ``k`` and ``v`` ``(B, Hkv, N, D)``, ``visual``
    ``(B, N)`` bool.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for seen in (visual, ~visual):
        base = BaseMask.build(q.shape[2], k.shape[2], causal=True, valid=seen, device=q.device)
        parts.append(compute(AttentionCall(q, k, v, None, base, scale)))
    (out_v, lse_v), (out_t, lse_t) = parts
    assert lse_v is not None and lse_t is not None
    own, wide = visual[:, None], visual[:, None, :, None]
    return (
        (torch.where(wide, out_v, out_t), torch.where(own, lse_v, lse_t)),
        (torch.where(wide, out_t, out_v), torch.where(own, lse_t, lse_v)),
    )


def disparity(q: Tensor, k: Tensor, visual: Tensor) -> dict[str, float]:
    """How unevenly rows attend to both modalities: ``|self − cross| / max(self, cross)`` of the mean attention per visible key,
    for ``"visual"`` and ``"text"`` rows that see both. A reconstruction; the paper prints the figures without a formula."""
    (_, own_lse), (_, cross_lse) = self_and_cross(q, k, k, visual)
    counts = torch.stack([visual.cumsum(-1), (~visual).cumsum(-1)])[:, :, None]
    own_count, cross_count = torch.where(visual[:, None], counts, counts.flip(0))
    both = (torch.isfinite(own_lse) & torch.isfinite(cross_lse)).expand_as(own_lse)
    share = torch.sigmoid(own_lse - cross_lse)
    found = {}
    for name, rows in (("visual", visual), ("text", ~visual)):
        at = both & rows[:, None]
        own, cross = (share / own_count)[at].mean(), ((1 - share) / cross_count)[at].mean()
        found[name] = float((own - cross).abs() / torch.maximum(own, cross)) if bool(at.any()) else 0.0
    return found
