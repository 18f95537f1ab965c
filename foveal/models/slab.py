"""The backbones in SLAB's shapes: a vision transformer with SLA and PRepBN, a language model with PRepBN."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.prepbn import Kind, convert_norms
from ..layers.slab import SimplifiedLinearAttention
from .blocks import Pass
from .decoder_lm import DecoderLM
from .vit import ViT


class SlabAttention(nn.Module):
    """SLA where the backbones expect an attention layer; the grid comes with the pass."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.sla = SimplifiedLinearAttention(dim, num_heads, grid)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        grid = run.grid
        return self.sla(x, None if grid is None else (grid[0], grid[1]))


def slab_vit(
    classes: int,
    grid: tuple[int, int],
    total_steps: int,
    *,
    channels: int = 1,
    patch: int = 1,
    dim: int = 64,
    depth: int = 4,
    num_heads: int = 4,
    linear: bool = True,
    kind: Kind = "prepbn",
    seed: int = 0,
) -> ViT:
    """DeiT-shaped: no class token, mean over tokens after the last norm.

    Args:
        grid: rows and columns of patches. total_steps: of PRepBN's schedule.
        linear: SLA in every block; False keeps softmax attention. kind: of the norms.
        classes, channels, patch, dim, depth, num_heads, seed: of :class:`~foveal.models.ViT`.
    """
    attention = (lambda _: SlabAttention(dim, num_heads, grid)) if linear else None
    model = ViT(classes, channels, patch, dim, depth, num_heads, attention=attention, seed=seed)
    for module in model.modules():
        if isinstance(module, SimplifiedLinearAttention):
            module.reset_special()
    convert_norms(model, total_steps, start="one", kind=kind)
    return model


def prepbn_lm(vocab_size: int, total_steps: int, *, warmup: int = 0, dim: int = 128, depth: int = 4, num_heads: int = 4, seed: int = 0) -> DecoderLM:  # fmt: skip
    """LLaMA-shaped: a :class:`~foveal.models.DecoderLM` with softmax attention whose RMSNorms are PRepBN, beginning at zero."""
    model = DecoderLM(vocab_size, dim, depth, num_heads, seed=seed)
    convert_norms(model, total_steps, warmup=warmup)
    return model
