"""The temporal parts of EEG-tGAT (arXiv 2604.10149): attention over time that reports when, and dropout over time.

The mean over time of attention's output V·Aᵀ is V·ā with ā the mean row of A: attention followed by the mean is a learned weighted
average, and ā ≥ 0 with Σā = 1 is the curve of importance over time.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, nearest
from ..kernels.dispatch import attention

Mode = Literal["timestep", "segment", "feature_map"]
_MODES = ("timestep", "segment", "feature_map")


class TemporalAttention(nn.Module):
    """One head of self-attention over time: no residual, no positions; Q, K, V are 1×1 convolutions with biases.

    Args:
        channels: F, features of a time step.
        chunk: rows of the matrix A that :meth:`average` holds at once.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(self, channels: int, *, chunk: int = 512) -> None:
        super().__init__()
        if channels < 1 or chunk < 1:
            raise ConfigError(f"TemporalAttention has channels={channels}, chunk={chunk}; expected at least 1 of each.")
        self.channels, self.chunk = channels, chunk
        self.query, self.key, self.value = (nn.Conv1d(channels, channels, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, F, T)`` → ``(B, F, T)``: Y = V·softmax(QᵀK/√F)ᵀ.

        Raises:
            ShapeError: another shape.
        """
        self._check(x)
        q, k, v = (f(x).mT[:, None] for f in (self.query, self.key, self.value))  # (B, 1, T, F)
        return attention(q, k, v)[:, 0].mT

    def average(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over time of :meth:`forward`, ``(B, F)``, and the curve ā ``(B, T)``; never holds more than ``chunk`` rows of A.

        Raises:
            ShapeError: another shape.
        """
        self._check(x)
        q, k = self.query(x).mT, self.key(x)
        curve: Tensor | None = None
        for rows in q.split(self.chunk, 1):
            part = torch.softmax(rows @ k * self.channels**-0.5, -1).sum(1)
            curve = part if curve is None else curve + part
        assert curve is not None
        curve = curve / x.shape[-1]
        return (self.value(x) @ curve[..., None].to(x.dtype))[..., 0], curve

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[1] != self.channels or x.shape[2] < 1:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, {self.channels}, time) with at least one time step.")  # fmt: skip


class TemporalDropout(nn.Module):
    """Dropout along the last axis, which is time, of ``(B, …, T)``; the identity in eval mode.

    Args:
        p: probability of dropping.
        mode: ``"timestep"`` draws for every window and time step, the same for all other axes; ``"segment"`` for runs of ``length``
            steps on a grid that begins at a random place; ``"feature_map"`` zeroes whole maps of axis 1, which is what the
            authors' code calls temporal dropout and does not touch time.
        length: of a segment.
        rescale: divide what is kept by 1 − p (``"expected"``), or by the share kept in each window (``"kept"``).

    Raises:
        ConfigError: a value out of range, or an unknown mode.
    """

    def __init__(
        self, p: float = 0.1, mode: Mode = "timestep", *, length: int = 8, rescale: Literal["expected", "kept"] = "expected"
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"TemporalDropout.p is {p}; expected 0 to below 1.")
        if mode not in _MODES:
            raise ConfigError(f"TemporalDropout.mode is {mode!r}. {nearest(str(mode), _MODES)}")
        if length < 1:
            raise ConfigError(f"TemporalDropout.length is {length}; expected at least 1.")
        if rescale not in ("expected", "kept"):
            raise ConfigError(f"TemporalDropout.rescale is {rescale!r}. {nearest(str(rescale), ('expected', 'kept'))}")
        self.p, self.mode, self.length, self.rescale = p, mode, length, rescale

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Drop.

        Args:
            x: ``(B, …, T)`` of three axes or more. generator: of the draws, on the device of ``x``; default torch's own.

        Raises:
            ShapeError: fewer than three axes.
        """
        if x.dim() < 3:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, …, time) with three axes or more.")
        if not self.training or self.p == 0:
            return x
        keep = self.mask(x, generator).to(x.dtype)
        if self.rescale == "expected":
            return x * (keep / (1 - self.p))
        share = keep.flatten(1).mean(1).clamp(min=1 / max(x.shape[1], x.shape[-1]))
        return x * (keep / share.view(-1, *(1,) * (x.dim() - 1)))

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw: bool, broadcastable to ``x``, True where it is kept."""
        batch, device = x.shape[0], x.device
        if self.mode == "feature_map":
            keep = torch.rand(batch, x.shape[1], generator=generator, device=device) >= self.p
            return keep.view(batch, -1, *(1,) * (x.dim() - 2))
        time = x.shape[-1]
        if self.mode == "timestep":
            keep = torch.rand(batch, time, generator=generator, device=device) >= self.p
        else:
            count = -(-time // self.length) + 1
            segments = torch.rand(batch, count, generator=generator, device=device) >= self.p
            begin = torch.randint(0, self.length, (batch, 1), generator=generator, device=device)
            keep = segments.gather(1, (torch.arange(time, device=device) + begin) // self.length)
        return keep.view(batch, *(1,) * (x.dim() - 2), time)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}"
