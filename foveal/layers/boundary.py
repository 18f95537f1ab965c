"""The boundary predictor of DHSA (arXiv 2510.24606, v1): does one chunk of keys end after this token?"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..patterns.boundaries import FORMAT, boundary_logits, key_features, read_predictor


class BoundaryPredictor(nn.Module):
    """One small module for all layers of a model; 4C² + 4C + 2C + (4C+1)·256 + 256 + 257 parameters.

    Args:
        key_dim: C = num_kv_heads · head_dim of the model.
        window: w, tokens read on either side of the boundary.
        heads: attention heads over the 2w tokens. The authors train with 4 and infer with 8, which computes something
            else from the same weights; here the number is stored with them.
        gated: pool either half by a learned softmax gate (C + 1 more parameters) instead of the mean.
        hidden: width of the last hidden layer.
    """

    def __init__(self, key_dim: int, window: int = 4, heads: int = 4, gated: bool = False, hidden: int = 256) -> None:
        super().__init__()
        for name, value in (("key_dim", key_dim), ("window", window), ("heads", heads), ("hidden", hidden)):
            if value < 1:
                raise ConfigError(f"BoundaryPredictor.{name} is {value}; expected a value at least 1.")
        if key_dim % heads:
            raise ConfigError(f"BoundaryPredictor.heads is {heads}; expected a divisor of key_dim = {key_dim}.")
        self.window, self.heads = window, heads
        self.attention = nn.MultiheadAttention(key_dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(key_dim)
        self.hidden = nn.Linear(4 * key_dim + 1, hidden)
        self.score = nn.Linear(hidden, 1)
        if gated:
            self.gate = nn.Linear(key_dim, 1)

    @property
    def key_dim(self) -> int:
        return self.norm.weight.numel()

    def forward(self, k: Tensor, valid: Tensor | None = None) -> Tensor:
        """``(B, N)`` logits from keys ``(B, Hkv, N, D)``; ``valid`` ``(B or 1, N)`` is False on padding."""
        return boundary_logits(key_features(k, valid), dict(self.named_parameters()), self.window, self.heads)

    def save(self, path: str | Path, **metadata: str) -> None:
        """Write a safetensors file with all that :meth:`load` needs; the file appears whole or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        fixed = {"format": FORMAT, "version": "1", "window": str(self.window), "heads": str(self.heads)}
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata={**metadata, **fixed})
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises :class:`ConfigError` when the file is no boundary predictor."""
        tensors, meta = read_predictor(path)
        key_dim, hidden = tensors["norm.weight"].numel(), tensors["hidden.weight"].shape[0]
        module = cls(key_dim, int(meta["window"]), int(meta["heads"]), "gate.weight" in tensors, hidden)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(tensors[name])
        return module
