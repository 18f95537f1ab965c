"""Layers on CUDA in float32 against the same layers in float64 on the CPU: outputs and gradients of inputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveal.kernels.toeplitz import toeplitz_matmul
from foveal.layers.care import CareLayer, Conditions
from foveal.layers.channel import build_channel_attention, channel_attention_names
from foveal.layers.csa import CSA
from foveal.layers.gated import GatedAttention
from foveal.layers.gatv2 import GATv2
from foveal.layers.mamba import BidirectionalMamba
from foveal.layers.moda import ModaAttention
from foveal.layers.nprf import NPRFAttention
from foveal.layers.prepbn import RepBN
from foveal.layers.rcmha import RCMHA
from foveal.layers.scatter import ScatterStage
from foveal.layers.shrp import ExpertAttention
from foveal.layers.slab import SimplifiedLinearAttention
from foveal.layers.time_frequency import SharedTimeFrequencyAttention
from foveal.layers.titans import LMM, MAG, MAL
from foveal.layers.titans_mac import MAC

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
]
TOLERANCE = 2e-3
"""Of the largest value; convolutions and products may run in TF32."""
Case = tuple[nn.Module, tuple[Any, ...]]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)), dtype=torch.float64)


def voxels() -> Tensor:
    flat = torch.randperm(2 * 3 * 11 * 13, generator=torch.Generator().manual_seed(0))[:200]
    return torch.stack(torch.unravel_index(flat, (2, 3, 11, 13)), 1)


class Care(nn.Module):
    """CARE's layer with everything that it can be given, as a function of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CareLayer(32)

    def forward(self, h: Tensor, task: Tensor, time: Tensor, text: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        given = Conditions(text=text, base=h, ref=h, latent=latent, mask=mask)
        out: Tensor = self.layer(h, (4, 6), task, time, given).out
        return out


class Moda(nn.Module):
    """MODA's attention with the prompt as a plain argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ModaAttention(64, 4, num_kv_heads=2)

    def forward(self, x: Tensor, visual: Tensor, prompt: Tensor) -> Tensor:
        out: Tensor = self.layer(x, visual, prompt=prompt)
        return out


OPTIONS: dict[str, dict[str, Any]] = {"cat": {"ndim": 2}, "cbam": {"ndim": 2}, "fca": {"seq_len": (9, 11)}}
"""Of mechanisms that must be told about maps."""


def gate(name: str) -> Case:
    return build_channel_attention(name, 16, **OPTIONS.get(name, {})), (drawn(3, 16, 9, 11),)


CASES: dict[str, Callable[[], Case]] = {
    "SLA": lambda: (SimplifiedLinearAttention(32, 4, (6, 8)), (drawn(2, 48, 32),)),
    "RepBN": lambda: (RepBN(32), (drawn(4, 20, 32),)),
    "NPRF": lambda: (NPRFAttention(32, 4, 16, max_distance=40), (drawn(2, 100, 32),)),
    "NPRF causal": lambda: (NPRFAttention(32, 4, 16, max_distance=40, causal=True), (drawn(2, 100, 32),)),
    "gated": lambda: (GatedAttention(64, 4, 2), (drawn(2, 100, 64),)),
    "RCMHA": lambda: (RCMHA(64, 4, max_rel=50), (drawn(2, 100, 64),)),
    "MODA": lambda: (Moda(), (drawn(2, 60, 64), torch.arange(60).expand(2, -1) < 20, torch.arange(60).expand(2, -1) < 40)),
    "CSA": lambda: (CSA(20, 32, 16), (drawn(2, 20, 16), drawn(2, 32, 16))),
    "CARE": lambda: (
        Care(),
        (drawn(2, 24, 32), torch.tensor([0, 2]), torch.tensor([0.2, 0.8], dtype=torch.float64), drawn(2, 5, 32), drawn(2, 32, 4, 6), drawn(2, 1, 8, 12).sigmoid()),
    ),
    "expert attention": lambda: (ExpertAttention(64, 4, expander=32), (drawn(2, 50, 64),)),
    "Mamba": lambda: (BidirectionalMamba(32, d_state=8), (drawn(2, 100, 32),)),
    "time and frequency": lambda: (SharedTimeFrequencyAttention(32, 4), (drawn(2, 32, 10, 12),)),
    "GATv2": lambda: (GATv2(16, 8, heads=2), (drawn(12, 16), torch.tensor([[0, 3, 5, 7, 9, 2], [1, 1, 2, 8, 4, 11]]))),
    "LMM": lambda: (LMM(32), (drawn(2, 130, 32),)),
    "MAC": lambda: (MAC(32, 2, segment=32), (drawn(2, 130, 32),)),
    "MAG": lambda: (MAG(32, 2, window=32), (drawn(2, 130, 32),)),
    "MAL": lambda: (MAL(32, 2, window=32), (drawn(2, 130, 32),)),
    "ScatterFormer": lambda: (ScatterStage(24, 2, 4, 2), (drawn(200, 24), voxels())),
    **{f"channels: {name}": partial(gate, name) for name in channel_attention_names()},
}  # fmt: skip


def results(module: nn.Module, inputs: tuple[Any, ...], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    module = deepcopy(module).to(device, dtype).eval()
    moved = [x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in inputs]
    leaves = {"input": moved[0].requires_grad_(), **{n: p for n, p in module.named_parameters() if p.requires_grad}}
    out = module(*moved)
    out = out[0] if isinstance(out, tuple) else out
    assert out.device.type == torch.device(device).type
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(device, dtype).view_as(out)
    found = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    grads = {f"gradient of {n}": g.double().cpu() for n, g in zip(leaves, found, strict=True) if g is not None}
    return {"out": out.detach().double().cpu(), **grads}


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    largest = max(float(x.abs().max()) for n, x in expected.items() if n != "out")
    for name, want in expected.items():
        size = float(want.abs().max()) if name == "out" else max(float(want.abs().max()), 1e-2 * largest)
        error = float((got[name] - want).abs().max()) / max(size, 1e-12)
        assert error < TOLERANCE, f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("name", CASES)
def test_a_layer_equals_itself_in_float64_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    module, inputs = CASES[name]()
    close(results(module, inputs, DEVICE, torch.float32), results(module, inputs, "cpu", torch.float64))


@pytest.mark.parametrize("name", ["SLA", "NPRF", "gated", "Mamba", "expert attention"])
def test_a_layer_runs_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    module, inputs = CASES[name]()
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results(module, inputs, DEVICE, torch.float32)
    assert all(bool(x.isfinite().all()) for x in got.values())


@pytest.mark.parametrize("causal", [False, True])
def test_toeplitz_products(causal: bool) -> None:
    c, a = drawn(4, 199), drawn(2, 4, 100, 16)
    got = toeplitz_matmul(c.to(DEVICE, torch.float32), a.to(DEVICE, torch.float32), causal=causal)
    want = toeplitz_matmul(c, a, causal=causal)
    assert float((got.double().cpu() - want).abs().max()) < TOLERANCE * float(want.abs().max())
