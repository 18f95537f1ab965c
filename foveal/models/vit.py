"""A small vision transformer: patches, rotary positions on both axes, mean over tokens, one linear classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ShapeError
from ..core.serial import check_sizes
from .blocks import AttentionFactory, Block, Method, Pass, chosen, factory, initialise


def coordinates(grid: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """``(N, A)`` coordinates of the tokens of a grid, the last axis fastest."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid)).view(-1, len(grid))


class ViT(nn.Module):
    """Image classifier.

    Args:
        classes: outputs. channels, patch: of the images. dim, depth, num_heads: sizes.
        attention: layer index → attention module; default rotary self-attention under a policy, told the token grid.
        seed: of the initial weights.

    Raises:
        ConfigError: sizes below 1, or that do not divide each other.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 1,
        patch: int = 1,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        *,
        attention: AttentionFactory | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(self, classes=classes, channels=channels, patch=patch, dim=dim, depth=depth, num_heads=num_heads)
        attention = attention or factory(dim, num_heads)
        self.channels, self.patch = channels, patch
        self.project = nn.Linear(channels * patch * patch, dim)
        self.layers = nn.ModuleList(Block(dim, attention(i)) for i in range(depth))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, classes)
        initialise(self, depth, seed)

    def begin(
        self, grid: tuple[int, int], policy: Method | None = None, *, impl: str = "auto", measuring: bool = False
    ) -> Pass:  # fmt: skip
        """The pass over one image of ``grid`` patches."""
        n, device = grid[0] * grid[1], self.head.weight.device
        base = BaseMask.build(n, n, causal=False, device=device)
        return Pass(
            chosen(policy), base, coordinates(grid, device), len(self.layers), grid=grid,
            impl=impl, measuring=measuring,
        )  # fmt: skip

    def forward(self, images: Tensor, policy: Method | None = None, *, run: Pass | None = None) -> Tensor:
        """``(B, classes)`` logits of images ``(B, C, height, width)``.

        Raises:
            ShapeError: other channels, or sides that the patch does not divide.
        """
        if (
            images.dim() != 4
            or images.shape[1] != self.channels
            or images.shape[2] % self.patch
            or images.shape[3] % self.patch
        ):
            raise ShapeError(
                f"images has shape {tuple(images.shape)}; expected (batch, {self.channels}, height, width) with sides that {self.patch} divides."
            )
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        run = self.begin(grid, policy) if run is None else run
        patches = nn.functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        x = self.project(patches)
        for layer in self.layers:
            x = layer(x, run)
        return self.head(self.norm(x).mean(1))
