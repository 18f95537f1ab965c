"""Low-rank adapters (LoRA, arXiv 2106.09685) on a model's linear layers: add them, take them out, load them, fold them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError


class LoRALinear(nn.Module):
    """``base(x) + (alpha / rank) · x Aᵀ Bᵀ`` with a frozen base; B starts at 0, so nothing changes at first.

    Attributes:
        base: the original layer. down ``(rank, in)``, up ``(out, rank)``: the adapter.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        start = torch.randn(rank, base.in_features, generator=generator) * base.in_features**-0.5
        self.down = nn.Parameter(start.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.down.to(x.dtype))
        return self.base(x) + self.scale * nn.functional.linear(low, self.up.to(x.dtype))

    def folded(self) -> nn.Linear:
        """One linear layer that does the same."""
        with torch.no_grad():
            self.base.weight += (self.scale * (self.up.float() @ self.down.float())).to(self.base.weight.dtype)
        return self.base


def add_lora(model: nn.Module, names: Sequence[str], *, rank: int = 8, alpha: float = 16.0, seed: int = 0) -> int:
    """Wrap every linear layer whose last name is one of ``names``; the number of layers wrapped.

    Raises:
        ConfigError: a name that no linear layer has, or a rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"rank is {rank}; expected at least 1.")
    g = torch.Generator().manual_seed(seed)
    found = [
        (path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.rsplit(".", 1)[-1] in names
    ]
    missing = set(names) - {path.rsplit(".", 1)[-1] for path, _ in found}
    if missing:
        raise ConfigError(f"no linear layer of {type(model).__name__} is called {sorted(missing)[0]!r}.")
    for path, layer in found:
        _replace(model, path, LoRALinear(layer, rank, alpha, g))
    return len(found)


def fold_lora(model: nn.Module) -> int:
    """Fold every adapter into its layer; the number of layers folded. The model is then as plain as before :func:`add_lora`."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]
    for path, layer in found:
        _replace(model, path, layer.folded())
    return len(found)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
