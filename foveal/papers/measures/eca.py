"""ECA-Net's claims that a CPU can check: counts of the published networks, the ablation on digits, the cost of a step, and
equality with timm's modules.

Run ``python -m foveal.papers.measures.eca`` to measure all and write their result files.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...bench.timing import interleaved
from ...data.digits import digits
from ...layers.channel import build_channel_attention, insert_channel_attention, remove_channel_attention
from ...models.resnet import MobileNetV2, ResNet
from ...recipes.classify import accuracy, train_classifier
from .borrowed import borrowed, installed_version
from .command import run_measures
from .results import write_result

PRINTED = {
    "ResNet-18": (11.148, 11.231),
    "ResNet-34": (20.788, 20.938),
    "ResNet-50": (24.37, 26.77),
    "ResNet-101": (42.49, 47.01),
    "ResNet-152": (57.40, 63.68),
    "MobileNetV2": (3.34, 3.40),
}
"""The paper's parameters in binary millions: plain (and, to two digits, ECA), SE."""
RELEASED = {18: [3, 5, 7, 7], 34: [3, 3, 5, 7], 50: [3, 5, 5, 7], 101: [3, 3, 5, 7], 152: [3, 3, 5, 7]}
"""Kernels of the released weights, one per stage."""
WIDTHS = (32, 64, 128)
VARIANTS: dict[str, Any] = {
    "plain": None,
    "SE": lambda c: build_channel_attention("se", c),
    "Var1": lambda c: build_channel_attention("se_var1", c),
    "Var2": lambda c: build_channel_attention("se_var2", c),
    "Var3": lambda c: build_channel_attention("se_var3", c),
    "GC1": lambda c: build_channel_attention("se_gc", c, groups=16),
    "GC2": lambda c: build_channel_attention("se_gc", c, groups=c // 16),
    "GC3": lambda c: build_channel_attention("se_gc", c, groups=c // 8),
    "ECA-NS": lambda c: build_channel_attention("eca_ns", c),
    "ECA": lambda c: build_channel_attention("eca", c),
}
EPOCHS, SEEDS = 12, 5


def count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def measure_parameters(seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``parameters-resnet50``: exact counts on models without storage, beside the printed ones."""
    found: dict[str, Any] = {}
    fits = True
    with torch.device("meta"):
        nets = {f"ResNet-{d}": ResNet.of_depth(d) for d in RELEASED} | {"MobileNetV2": MobileNetV2()}
        for name, net in nets.items():
            row: dict[str, Any] = {"plain": count(net)}
            depth = int(name.split("-")[1]) if "-" in name else 0
            for key, kind, options in (
                ("eca_formula", "eca", {}),
                ("eca_released", "eca", {"kernel_size": RELEASED.get(depth, "adaptive")}),
                ("se_16", "se", {"reduction": 16}),
                ("se_8", "se", {"reduction": 8}),
            ):
                row[key] = sum(i.parameters for i in insert_channel_attention(net, kind, **options))
                remove_channel_attention(net)
            plain, with_se = PRINTED[name]
            digits_ = 3 if name in ("ResNet-18", "ResNet-34") else 2
            row["binary_millions"] = {
                "plain": round(row["plain"] / 2**20, digits_),
                "eca": round((row["plain"] + row["eca_released"]) / 2**20, digits_),
                "se": round((row["plain"] + row["se_16"]) / 2**20, digits_),
                "se_with_reduction_8": round((row["plain"] + row["se_8"]) / 2**20, digits_),
                "printed": [plain, with_se],
            }
            if name == "MobileNetV2":  # its printed SE fits a reduction of 8 alone
                del row["eca_released"]
                fits = fits and row["binary_millions"]["se_with_reduction_8"] == with_se
            else:
                fits = fits and row["binary_millions"]["se"] == with_se
            fits = fits and row["binary_millions"]["plain"] == row["binary_millions"]["eca"] == plain
            found[name] = row
        net = nets["ResNet-50"]
        inserted = insert_channel_attention(net, "eca", kernel_size=RELEASED[50])
    sizes = {"layer1": 56, "layer2": 28, "layer3": 14, "layer4": 7}
    convolutions = sum(i.channels * i.parameters for i in inserted)
    products = sum(i.channels * sizes[i.stage] ** 2 for i in inserted)
    fifty = found["ResNet-50"]
    exact = fifty["eca_released"] == 80 and fifty["eca_formula"] == 86
    numbers = {
        "ours": f"{fifty['eca_released']} with kernels 3, 5, 5, 7; {fifty['eca_formula']} with the printed formula; tables match, MobileNetV2 with SE only at reduction 8",
        "networks": found,
        "resnet50_convolution_multiply_adds": convolutions,
        "resnet50_gate_products": products,
        "printed_gflops": 4.7e-4,
        "gflops_re_derived": False,
    }
    verdict = "reproduced" if fits and exact else "not reproduced"
    return write_result("eca", "parameters-resnet50", verdict, numbers, seed=seed, out=out)


class DigitNet(nn.Module):
    """Three 3×3 convolutions of 32, 64 and 128 channels on 8×8 digits, each with normalisation, gate, ReLU and pooling."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        make, inputs = VARIANTS[variant], 1
        for width in WIDTHS:
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [] if make is None else [make(width)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            inputs = width
        self.body, self.head = nn.Sequential(*layers), nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def seeded(variant: str, seed: int) -> DigitNet:
    """The variant, with initial weights that depend on the seed alone; convolutions are alike in all variants."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = DigitNet("plain")
        net = DigitNet(variant)
    shared = [m for m in net.body if isinstance(m, nn.Conv2d)]
    for mine, theirs in zip(shared, [m for m in plain.body if isinstance(m, nn.Conv2d)], strict=True):
        mine.load_state_dict(theirs.state_dict())
    net.head.load_state_dict(plain.head.state_dict())
    return net


def measure_local_window(
    seeds: int = SEEDS, epochs: int = EPOCHS, seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``local-window-suffices``: held-out accuracy of ten variants on packaged digits."""
    images, labels, rest, truth = digits(seed=seed)
    scores: dict[str, list[float]] = {name: [] for name in VARIANTS}
    begin = time.perf_counter()
    for s in range(seed, seed + seeds):
        for name in VARIANTS:
            net = seeded(name, s)
            train_classifier(net, images, labels, epochs=epochs, batch=128, lr=3e-3, warmup=2, seed=s)
            scores[name].append(accuracy(net, rest, truth))
    seconds = time.perf_counter() - begin
    means = {k: fmean(v) for k, v in scores.items()}
    spread = {k: statistics.stdev(v) if len(v) > 1 else 0.0 for k, v in scores.items()}
    pooled = ((spread["ECA"] ** 2 + spread["Var3"] ** 2) / 2) ** 0.5
    gap = abs(means["ECA"] - means["Var3"])
    numbers = {
        "ours": "; ".join(f"{k} {100 * means[k]:.2f} ± {100 * spread[k]:.2f}" for k in VARIANTS),
        "accuracy": {k: [round(a, 4) for a in v] for k, v in scores.items()},
        "gap_eca_var3": round(gap, 5),
        "pooled_deviation": round(pooled, 5),
        "gain_over_plain": round(means["ECA"] - means["plain"], 5),
        "parameters": {k: count(seeded(k, seed)) for k in VARIANTS},
        "train_images": len(images),
        "held_out_images": len(rest),
        "epochs": epochs,
        "seeds": seeds,
        "seconds": round(seconds, 1),
    }
    verdict = "reproduced" if gap <= pooled else "not reproduced"
    return write_result("eca", "local-window-suffices", verdict, numbers, seed=seed, out=out)


def measure_step_time(repeats: int = 60, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``step-time-cpu``: a training step of the digit network with ECA against SE, and the share of added parameters."""
    images, labels, _, _ = digits(seed=seed)
    x, y = images[:128], labels[:128]
    nets = {name: seeded(name, seed).train() for name in ("plain", "SE", "ECA")}

    def step(net: nn.Module) -> None:
        net.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(x), y).backward()

    turns = interleaved({k: partial(step, net) for k, net in nets.items()}, repeats, warmup=5)
    seconds = {k: statistics.median(v) for k, v in turns.items()}
    ratio = statistics.median(a / b for a, b in zip(turns["ECA"], turns["SE"], strict=True))
    share = (count(nets["ECA"]) - count(nets["plain"])) / count(nets["ECA"])
    numbers = {
        "eca_to_se": round(ratio, 3),
        "eca_to_plain": round(statistics.median(a / b for a, b in zip(turns["ECA"], turns["plain"], strict=True)), 3),
        "added_share": share,
        "added_parameters": {k: count(nets[k]) - count(nets["plain"]) for k in ("SE", "ECA")},
        "seconds": {k: round(v, 5) for k, v in seconds.items()},
        "batch": len(x),
        "repeats": repeats,
    }
    cheap = share < 1e-3
    verdict = "reproduced" if cheap and ratio <= 1.05 else "direction holds" if cheap else "not reproduced"
    return write_result("eca", "step-time-cpu", verdict, numbers, seed=seed, out=out)


def measure_timm(seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``equals-timm``: largest difference of outputs and input gradients from timm's modules with the same weights.

    Raises:
        DataError: timm is not installed.
    """
    g = torch.Generator().manual_seed(seed)
    differences: dict[str, float] = {}
    with borrowed("timm.layers.eca", "timm.layers.squeeze_excite", "timm.layers.gather_excite") as (eca, se, ge):
        pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
        for c in (8, 64, 256, 2048):
            pairs[f"eca {c}"] = (eca.EcaModule(c), build_channel_attention("eca", c))
        pairs["ceca 64"] = (eca.CecaModule(64), build_channel_attention("eca", 64, circular=True))
        pairs["se 64"] = (se.SEModule(64, rd_channels=4), build_channel_attention("se", 64, bias=True))
        hard = build_channel_attention("se", 64, bias=True, reduction=8, gate="hardsigmoid")
        pairs["se hard 64"] = (se.SEModule(64, rd_channels=8, gate_layer="hard_sigmoid"), hard)
        pairs["ge 16"] = (ge.GatherExcite(16, use_mlp=False), build_channel_attention("ge", 16))
        for name, (theirs, mine) in pairs.items():
            with torch.no_grad():
                for p in theirs.parameters():
                    p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
            mine.load_state_dict(theirs.state_dict())
            channels = int(name.split()[-1])
            inputs = torch.randn(3, channels, 7, 5, generator=g)
            weight = torch.randn(inputs.shape, generator=g)
            differences[name] = difference(theirs, mine, inputs, weight)
        version = installed_version("timm")
    worst = max(differences.values())
    numbers = {
        "ours": f"largest difference {worst:.1e}",
        "differences": differences,
        "criterion": 1e-5,
        "timm": version,
    }
    return write_result("eca", "equals-timm", "reproduced" if worst < 1e-5 else "not reproduced", numbers, seed=seed, out=out)  # fmt: skip


def difference(theirs: nn.Module, mine: nn.Module, x: Tensor, weight: Tensor) -> float:
    """Largest difference of two modules' outputs and input gradients; both are left as they are."""
    results = []
    for module in (theirs, mine):
        given = x.clone().requires_grad_()
        out = module(given)
        (grad,) = torch.autograd.grad((out * weight).sum(), given)
        results.append((out.detach(), grad))
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def main() -> None:
    """Measure all claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures(
        "Measure claims of ECA-Net.", (measure_parameters, measure_step_time, measure_timm, measure_local_window)
    )


if __name__ == "__main__":
    main()
