"""A small diffusion transformer for images and short videos, with text tokens, guidance and DDIM.

Tokens: the text's first, then the grid's patches; one attention over both. Every block is modulated by the noise level and
the mean text embedding (adaLN-zero, arXiv 2212.09748). The network predicts the noise ε; ᾱ follows the cosine schedule of
arXiv 2102.09672; sampling is DDIM (arXiv 2010.02502) with classifier-free guidance ε = ε∅ + g·(ε_text − ε∅).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.context import State
from ..core.errors import ConfigError, ShapeError
from ..core.serial import check_sizes
from .blocks import AttentionFactory, Method, Mlp, Pass, check_ids, chosen, factory, initialise
from .vit import coordinates

OFFSET = 0.008
"""s of the cosine schedule."""
LEAST = 1e-4
"""Smallest ᾱ: at t = 1 the schedule's own is 0, from which no image can be predicted."""


def signal(t: Tensor) -> Tensor:
    """ᾱ(t), the share of signal in the variance at noise level ``t`` from 0 (clean) to 1; never below ``LEAST``."""
    angle = (t + OFFSET) / (1 + OFFSET) * math.pi / 2
    return (angle.cos() ** 2 / math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2).clamp(LEAST, 1.0)


class ModulatedBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the gates begin at zero."""

    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attention, self.mlp = attention, Mlp(dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor, run: Pass) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, run)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Diffusion transformer.

    Args:
        grid: patches per axis: (height, width) of images or (frames, height, width) of videos.
        channels, patch: of the data; a patch covers ``patch`` pixels on each side and one frame.
        vocab_size, text: tokens of the text's vocabulary and per text; 0 for none.
        dim, depth, num_heads: sizes.
        attention: layer index → attention module; default rotary self-attention under a policy, told grid and step.
        seed: of the initial weights.

    Raises:
        ConfigError: sizes that are too small or do not divide each other, or text without a vocabulary.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        channels: int = 1,
        patch: int = 1,
        vocab_size: int = 0,
        text: int = 0,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        *,
        attention: AttentionFactory | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(grid) not in (2, 3) or min(grid) < 1:
            raise ConfigError(f"DiT.grid is {grid}; expected (height, width) or (frames, height, width) in patches.")
        check_sizes(self, channels=channels, patch=patch, dim=dim, depth=depth, num_heads=num_heads)
        check_sizes(self, 0, vocab_size=vocab_size, text=text)
        if text and not vocab_size:
            raise ConfigError(f"DiT.vocab_size is 0 with text={text}; expected at least 1, or text=0.")
        attention = attention or factory(dim, num_heads)
        self.grid, self.channels, self.patch, self.vocab_size, self.text = grid, channels, patch, vocab_size, text
        self.dim = dim
        self.project = nn.Linear(channels * patch**2, dim)
        self.embed = nn.Embedding(vocab_size + 1, dim)  # the last one stands for "no text"
        self.noise = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.layers = nn.ModuleList(ModulatedBlock(dim, attention(i)) for i in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, elementwise_affine=False), nn.Linear(dim, channels * patch**2)
        initialise(self, depth, seed)
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, ModulatedBlock)
                layer.modulation.weight.zero_()
            self.head.weight.zero_()

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels and sides of one sample: ``(C, height, width)`` or ``(C, frames, height, width)``."""
        return (self.channels, *self.grid[:-2], self.grid[-2] * self.patch, self.grid[-1] * self.patch)

    def begin(
        self, policy: Method | None = None, *, states: dict[int, State] | None = None, step: int | None = None,
        impl: str = "auto", measuring: bool = False,
    ) -> Pass:  # fmt: skip
        """The pass over one batch; text tokens sit at coordinate 0 of every axis."""
        device = self.head.weight.device
        n = self.text + math.prod(self.grid)
        places = coordinates(self.grid, device)
        positions = torch.cat([places.new_zeros(self.text, places.shape[1]), places])
        return Pass(
            chosen(policy), BaseMask.build(n, n, causal=False, device=device), positions,
            len(self.layers), states={} if states is None else states, grid=self.grid, step=step, impl=impl, measuring=measuring,
        )  # fmt: skip

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor | None = None, policy: Method | None = None, *, run: Pass | None = None
    ) -> Tensor:  # fmt: skip
        """Predicted noise, of ``x``'s shape.

        Args:
            x: ``(B, *shape)`` noisy samples. t: ``(B,)`` noise levels.
            text: ``(B, text)`` tokens; None for no text.

        Raises:
            ShapeError: shapes that do not fit the grid.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, {', '.join(map(str, self.shape))}).")
        if t.shape != x.shape[:1]:
            raise ShapeError(f"t has shape {tuple(t.shape)}; expected ({x.shape[0]},), a level for every sample of x.")
        run = self.begin(policy) if run is None else run
        tokens = self.project(self._patches(x))
        ids = x.new_full((x.shape[0], self.text), self.vocab_size, dtype=torch.int64) if text is None else text
        if tuple(ids.shape) != (x.shape[0], self.text):
            raise ShapeError(f"text has shape {tuple(ids.shape)}; expected (batch={x.shape[0]}, {self.text}).")
        check_ids(ids, self.vocab_size + 1)
        words = self.embed(ids)
        condition = self.noise(self._level(t))
        if self.text:
            condition = condition + words.mean(1)
            tokens = torch.cat([words, tokens], 1)
        condition = nn.functional.silu(condition)
        for layer in self.layers:
            tokens = layer(tokens, condition, run)
        return self._image(self.head(self.norm(tokens[:, self.text :])))

    def _level(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / half)
        angle = 1000 * t[:, None].float() * frequency
        wave = torch.cat([angle.cos(), angle.sin()], -1)
        return nn.functional.pad(wave, (0, self.dim % 2)).to(self.head.weight.dtype)

    def _patches(self, x: Tensor) -> Tensor:
        p, (height, width) = self.patch, self.grid[-2:]
        frames = x if len(self.grid) == 3 else x[:, :, None]
        cut = frames.reshape(x.shape[0], self.channels, -1, height, p, width, p)
        return cut.permute(0, 2, 3, 5, 1, 4, 6).reshape(x.shape[0], math.prod(self.grid), -1)

    def _image(self, tokens: Tensor) -> Tensor:
        p, (height, width) = self.patch, self.grid[-2:]
        cut = tokens.reshape(tokens.shape[0], -1, height, width, self.channels, p, p).permute(0, 4, 1, 2, 5, 3, 6)
        return cut.reshape(tokens.shape[0], *self.shape)

    def noised(
        self, x: Tensor, text: Tensor | None, generator: torch.Generator, drop: float = 0.1
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """``(noisy x, levels (B,), text, noise)`` at uniform noise levels; texts are dropped with probability ``drop``."""
        t = torch.rand(x.shape[0], generator=generator).to(x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        if text is not None:
            dropped = torch.rand(x.shape[0], 1, generator=generator).to(x.device) < drop
            text = torch.where(dropped, self.vocab_size, text)
        share = signal(t).view(-1, *[1] * (x.dim() - 1))
        return share.sqrt() * x + (1 - share).sqrt() * noise, t, text, noise

    def loss(
        self, x: Tensor, text: Tensor | None, generator: torch.Generator, drop: float = 0.1, policy: Method | None = None
    ) -> Tensor:  # fmt: skip
        """Mean squared error of the predicted noise over :meth:`noised` samples."""
        noisy, t, text, noise = self.noised(x, text, generator, drop)
        return nn.functional.mse_loss(self(noisy, t, text, policy), noise)

    @torch.inference_mode()
    def sample(
        self,
        noise: Tensor,
        steps: int,
        text: Tensor | None = None,
        *,
        guidance: float = 1.0,
        policy: Method | None = None,
        clip: float | None = None,
        watch: Callable[[Pass], None] | None = None,
    ) -> Tensor:
        """DDIM without noise of its own, from ``noise`` ``(B, *shape)`` to samples of the same shape.

        Args:
            steps: network calls; patterns keep their state over them and know the step's number.
            text: ``(B, text)`` tokens. guidance: g; 1 asks the network once, any other value twice: the batch is then the halves
                with and without text.
            clip: predicted samples are kept inside ±clip.
            watch: called with every finished pass.

        Raises:
            ConfigError: no steps, or guidance without text.
        """
        if steps < 1:
            raise ConfigError(f"steps is {steps}; expected at least 1.")
        guided = guidance != 1.0
        if guided and text is None:
            raise ConfigError(f"guidance is {guidance} without text; expected text tokens, or guidance=1.")
        levels = torch.linspace(1, 0, steps + 1, device=noise.device)
        states: dict[int, State] = {}
        x = noise
        for step in range(steps):
            run = self.begin(policy, states=states, step=step)
            t = levels[step].expand(x.shape[0])
            if guided and text is not None:
                none = torch.full_like(text, self.vocab_size)
                with_text, without = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, none]), run=run).chunk(
                    2
                )
                predicted = without + guidance * (with_text - without)
            else:
                predicted = self(x, t, text, run=run)
            if watch is not None:
                watch(run)
            now, then = signal(levels[step]), signal(levels[step + 1])
            clean = (x - (1 - now).sqrt() * predicted) / now.sqrt()
            if clip is not None:
                clean = clean.clamp(-clip, clip)
                predicted = (x - now.sqrt() * clean) / (1 - now).sqrt()
            x = then.sqrt() * clean + (1 - then).sqrt() * predicted
        return x
