"""FNA's claim about whole models, on one GPU: a small NAT-like classifier whose attention is computed in three forms.

Pictures of 64×64 pixels become 32×32 tokens; every block is neighborhood attention and an MLP, each after a normalisation, as in
NAT's stages. Tokens are averaged and classified in float32.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.neighborhood import Form, NeighborhoodAttention2d
from . import gpu
from .results import write_result

FORMS: tuple[Form, ...] = ("naive", "gemm", "fused")
EQUAL = 1e-3


class NatLike(nn.Module):
    """Classifier of pictures ``(B, 3, 2·side, 2·side)`` on ``side × side`` tokens."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, dim, 2, 2)
            self.attentions = nn.ModuleList(NeighborhoodAttention2d(dim, heads, window) for _ in range(depth))
            self.mlps = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))
                for _ in range(depth)
            )
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
            self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor, form: Form) -> Tensor:
        """``(B, classes)`` float32 logits."""
        x = self.stem(x).permute(0, 2, 3, 1)
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            attention.form = form  # type: ignore[assignment]
            x = x + attention(norm(x))
            x = x + mlp(x)
        pooled = x.float().mean((1, 2))
        return nn.functional.linear(pooled, self.head.weight.float(), self.head.bias.float())


def measure_throughput(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    batch: int = 64,
    side: int = 32,
    dim: int = 128,
    depth: int = 6,
    heads: int = 4,
    window: int = 7,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``model-level-throughput``: pictures per second at inference with each form, and the largest difference of logits.

    Args:
        side: tokens along each axis.
    """
    model = NatLike(dim, depth, heads, window).to(device, dtype).eval()
    pictures = torch.randn(batch, 3, 2 * side, 2 * side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        logits = {form: model(pictures, form) for form in FORMS}
    row = gpu.timed({form: partial(model, pictures, form) for form in FORMS}, repeats, device, baseline="naive")
    difference = max(float((logits[form] - logits["naive"]).abs().max()) for form in FORMS)
    rate = {form: round(1e3 * batch / ms, 1) for form, ms in row["ms"].items()}
    equal, gemm = difference <= EQUAL, rate["naive"] < rate["gemm"]
    numbers = {
        "ours": "; ".join(f"{form} {value:.0f} pictures/s" for form, value in rate.items())
        + f"; logits within {difference:.1e}",
        "criterion": {"difference": EQUAL, "order": "naive < gemm ≤ fused"},
        "pictures_per_second": rate,
        "difference": float(f"{difference:.3g}"),
        "size_of_logits": round(float(logits["naive"].abs().max()), 4),
        **row,
    }
    good = equal and gemm and rate["gemm"] <= rate["fused"]
    decided = gpu.verdict(good, equal and rate["naive"] < rate["fused"])
    return write_result("fna", "model-level-throughput", decided, numbers, seed=0, out=out)
