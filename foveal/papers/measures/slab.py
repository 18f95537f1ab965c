"""SLAB's claims that two cores can check: the fold's exactness and speed, PRepBN beside its baselines, SLA's crossover with softmax.

Run ``python -m foveal.papers.measures.slab`` to measure all four and write their result files.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...bench.timing import Clock, Spread, interleaved, speedups
from ...core.errors import DataError
from ...data.digits import digits
from ...data.text import load_text
from ...layers.norm_fold import fold_norms, folded
from ...layers.prepbn import Kind, RepBN, Start, convert_norms, refresh_statistics, set_progress
from ...layers.slab import SimplifiedLinearAttention
from ...models.slab import prepbn_lm, slab_vit
from ...models.vit import ViT
from ...recipes.fit import fit
from .command import run_measures
from .results import write_result


def _trained_looks(model: nn.Module, g: torch.Generator) -> None:
    """Random statistics, weights and η in every RepBN, as no fresh norm has them."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, RepBN):
                assert m.bn.running_mean is not None and m.bn.running_var is not None
                m.bn.running_mean.normal_(generator=g)
                m.bn.running_var.uniform_(0.1, 1.1, generator=g)
                m.bn.weight.normal_(generator=g)
                m.bn.bias.normal_(generator=g)
                if m.eta is not None:
                    m.eta.normal_(generator=g)


def _call_model(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _call(x: Tensor, model: nn.Module) -> Tensor:
    return model(x)


def _worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


TRAINED_SEEDS, FOLD_DIM = 2, 64


def _trained(seed: int, steps: int) -> dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    """Models whose PRepBN went through its whole schedule, and how to run each on held-out data."""
    images, labels, held, _ = digits(seed=seed)
    text = load_text()[:50_000]
    symbols = sorted(set(text))
    ids = torch.tensor([symbols.index(ch) for ch in text])
    vits = {
        f"vision transformer, {n}": slab_vit(10, (4, 4), steps, patch=2, dim=FOLD_DIM, linear=n == "SLA", seed=seed)
        for n in ("softmax", "SLA")
    }
    lm = prepbn_lm(len(symbols), steps, dim=FOLD_DIM, seed=seed)

    def picture_loss(model: ViT, step: int, g: torch.Generator) -> Tensor:
        set_progress(model, step)
        at = torch.randint(len(images), (BATCH,), generator=g)
        return nn.functional.cross_entropy(model(images[at]), labels[at])

    def text_loss(step: int, g: torch.Generator) -> Tensor:
        set_progress(lm, step)
        return lm.loss(ids[torch.randint(40_000, (8, 1), generator=g) + torch.arange(48)])

    for model in vits.values():
        fit(model, partial(picture_loss, model), steps + steps // 4, lr=1e-3, seed=seed)
    fit(lm, text_loss, steps + steps // 4, lr=1e-3, seed=seed)
    for each in (*vits.values(), lm):
        set_progress(each, steps)
    last = ids[-480:].view(10, 48)
    return {
        **{n: (m, partial(_call, held[:64])) for n, m in vits.items()},
        "language model": (lm, partial(_call, last)),
    }


def measure_fold(seeds: int = 5, seed: int = 0, steps: int = 60, out: Path | None = None) -> dict[str, Any]:
    """Claim ``fold-identity``: RepBN with random statistics against its affine form, its one-batch-norm form and the folded layer; whole
    models, trained through the schedule, before and after. A softmax ViT with random statistics is reported beside them."""
    errors: dict[str, float] = {}
    models: dict[str, float] = {}
    for s in range(seed, seed + seeds):
        g = torch.Generator().manual_seed(s)
        for dtype in (torch.float32, torch.float64):
            norm, linear = RepBN(96).to(dtype).eval(), nn.Linear(96, 64, bias=False).to(dtype)
            _trained_looks(norm, g)
            with torch.no_grad():
                linear.weight.normal_(generator=g)
            x = torch.randn(8, 50, 96, generator=g, dtype=dtype)
            exact, (a, b) = norm(x), norm.affine()
            w, c = folded(linear, "following", a, b)
            found = (
                _worst(a.to(dtype) * x + b.to(dtype), exact),
                _worst(norm.as_batch_norm()(x.flatten(0, 1)).view_as(x), exact),
                _worst(x @ w.mT + c, linear(exact)),
            )
            name = str(dtype)[6:]
            errors[name] = max(errors.get(name, 0.0), *found)
    for s in range(seed, seed + TRAINED_SEEDS):
        for name, (model, run) in _trained(s, steps).items():
            models[name] = max(models.get(name, 0.0), fold_norms(model, run, seed=s).error)
    wild: dict[str, float] = {}
    for s in range(seed, seed + seeds):
        for dtype in (torch.float32, torch.float64):
            vit = slab_vit(10, (8, 8), 1, depth=4, linear=False, seed=s).to(dtype)
            set_progress(vit, 1)
            _trained_looks(vit, torch.Generator().manual_seed(s))
            image = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(s)).to(dtype)
            name = str(dtype)[6:]
            wild[name] = max(wild.get(name, 0.0), fold_norms(vit, partial(_call, image), tolerance=1.0, seed=s).error)
    inside = errors["float32"] <= 1e-6 and errors["float64"] <= 1e-12
    whole = max(models.values()) <= 1e-4
    verdict = "reproduced" if inside and whole else "direction holds" if whole else "not reproduced"
    numbers = {
        "largest_relative_error": {k: float(f"{v:.2g}") for k, v in errors.items()},
        "whole_models_largest_relative_error": {k: float(f"{v:.2g}") for k, v in models.items()},
        "vision_transformer_with_random_statistics": {k: float(f"{v:.2g}") for k, v in wild.items()},
        "criterion": {"float32": 1e-6, "float64": 1e-12, "whole_models": 1e-4},
        "seeds": seeds,
        "trained_steps": steps + steps // 4,
    }
    return write_result("slab", "fold-identity", verdict, numbers, seed=seed, out=out)


SIDE, PATCH, SPEED_DIM, SPEED_DEPTH, SPEED_HEADS = 224, 16, 192, 12, 3


def with_layer_norm(model: ViT) -> ViT:
    """The same transformer with LayerNorms."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.RMSNorm):
            model.set_submodule(name, nn.LayerNorm(module.normalized_shape))
    return model


def measure_speed(
    repeats: int = 9, seed: int = 0, clock: Clock = time.perf_counter, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``fold-speed``: one picture through a DeiT-Tiny-shaped transformer, LayerNorm against folded, in turns."""

    def vit() -> ViT:
        return with_layer_norm(ViT(1000, 3, PATCH, SPEED_DIM, SPEED_DEPTH, SPEED_HEADS, seed=seed)).eval()

    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    plain, fast = vit(), vit()
    convert_norms(fast, 1, start="zero")
    set_progress(fast, 1)
    for (
        m
    ) in fast.modules():  # plain batch norms with the statistics of these pictures: speed does not depend on the values
        if isinstance(m, RepBN):
            nn.init.ones_(m.bn.weight)
    refresh_statistics(fast, _call_model, [image] * 20)
    report = fold_norms(fast, lambda m: m(image))
    with torch.inference_mode():
        seconds = interleaved(
            {"layer norm": partial(plain, image), "folded": partial(fast, image)}, repeats, warmup=2, clock=clock
        )
    ratio = Spread.of([1 / x for x in _ratios(seconds)])
    verdict = "reproduced" if ratio.median <= 1 else "not reproduced"
    numbers = {
        "folded_over_layer_norm": {k: round(v, 4) for k, v in ratio.json().items()},
        "milliseconds": {name: round(1e3 * statistics.median(v), 2) for name, v in seconds.items()},
        "folds": {how: sum(f.how == how for f in report.folds) for how in ("following", "preceding", "affine")},
        "criterion": {"at_most": 1.0},
        "tokens": (SIDE // PATCH) ** 2,
        "clock": clock.__name__,
    }
    return write_result("slab", "fold-speed", verdict, numbers, seed=seed, out=out)


def _ratios(seconds: dict[str, list[float]]) -> list[float]:
    return [a / b for a, b in zip(seconds["layer norm"], seconds["folded"], strict=True)]


STEPS, BATCH, DEPTH, DIM, HEADS = 200, 32, 6, 128, 4
SHARE = 0.6
"""Of the steps over which γ falls."""


def deit_shaped(seed: int) -> ViT:
    """Our ViT with DeiT's LayerNorms and its MLP, GELU between two layers of four times the width."""
    model = with_layer_norm(ViT(10, 1, 2, DIM, DEPTH, HEADS, seed=seed))
    g = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        up, down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        for part, scale in ((up, 1.0), (down, (2 * DEPTH) ** -0.5)):
            nn.init.normal_(part.weight, std=scale * part.in_features**-0.5, generator=g)
            nn.init.zeros_(part.bias)
        layer.set_submodule("mlp", nn.Sequential(up, nn.GELU(), down))
    return model


def train_digits(
    kind: Kind | None, seed: int, steps: int, *, gated: bool = False, start: Start = "auto"
) -> float | None:
    """Held-out accuracy of a small ViT on the digits; None for LayerNorm; None returned when the loss stops being finite.

    Statistics are refreshed after training, as the authors do. ``gated`` keeps our ViT's gated MLP.
    """
    images, labels, held, wanted = digits(seed=seed)
    model = with_layer_norm(ViT(10, 1, 2, DIM, DEPTH, HEADS, seed=seed)) if gated else deit_shaped(seed)
    if kind is not None:
        convert_norms(model, max(1, round(SHARE * steps)), kind=kind, start=start)

    def loss(step: int, g: torch.Generator) -> Tensor:
        set_progress(model, step)
        at = torch.randint(len(images), (BATCH,), generator=g)
        return nn.functional.cross_entropy(model(images[at]), labels[at])

    try:
        fit(model, loss, steps, lr=1e-3, seed=seed)
    except DataError:
        return None
    refresh_statistics(model, lambda m, x: m(x), [x for _ in range(10) for x in images.split(500)])
    with torch.inference_mode():
        return float((model(held).argmax(-1) == wanted).double().mean())


def measure_training(seeds: int = 3, seed: int = 0, steps: int = STEPS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``deit-prepbn``: LayerNorm, batch norm alone and PRepBN in the same ViT (depth 6, width 128) on scikit-learn's digits."""
    kinds: dict[str, Kind | None] = {"layer norm": None, "batch norm": "batchnorm", "prepbn": "prepbn"}
    found = {name: [train_digits(kind, s, steps) for s in range(seed, seed + seeds)] for name, kind in kinds.items()}
    starts: tuple[Start, ...] = ("one", "zero")
    gated = {start: train_digits("prepbn", seed, steps, gated=True, start=start) for start in starts}
    diverged = {name: sum(x is None for x in values) for name, values in found.items()}
    mean = {name: fmean(0.1 if x is None else x for x in values) for name, values in found.items()}
    above, near = mean["prepbn"] >= mean["batch norm"], mean["prepbn"] >= mean["layer norm"] - 0.01
    verdict = "reproduced" if above and near else "direction holds" if above or near else "not reproduced"
    numbers = {
        "mean_accuracy": {k: round(v, 4) for k, v in mean.items()},
        "accuracy_per_seed": {k: [None if x is None else round(x, 4) for x in v] for k, v in found.items()},
        "diverged": diverged,
        "prepbn_with_a_gated_mlp_by_start_one_seed": {k: None if x is None else round(x, 4) for k, x in gated.items()},
        "criterion": "prepbn at least batch norm, and at least layer norm less 0.01",
        "steps": steps,
        "batch": BATCH,
        "seeds": seeds,
    }
    return write_result("slab", "deit-prepbn", verdict, numbers, seed=seed, out=out)


SIDES, WIDTH, LAYER_HEADS = (14, 20, 28, 40, 56), 192, 3


class Softmax(nn.Module):
    """What SLA replaces: projections and torch's SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (LAYER_HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def measure_crossover(
    repeats: int = 5, seed: int = 0, clock: Clock = time.perf_counter, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``sla-crossover``: one layer, SLA beside softmax attention, 196 to 3136 tokens, in turns."""
    g = torch.Generator().manual_seed(seed)
    softmax, ratios = Softmax().eval(), {}
    with torch.inference_mode():
        for side in SIDES:
            x = torch.randn(1, side * side, WIDTH, generator=g)
            layer = SimplifiedLinearAttention(WIDTH, LAYER_HEADS, (side, side)).eval()
            seconds = interleaved({"softmax": partial(softmax, x), "sla": partial(layer, x)}, repeats, clock=clock)
            ratios[side * side] = 1 / speedups(seconds, "softmax")["sla"].median
    values = list(ratios.values())
    crossed, falls = values[-1] < 1, values[-1] < values[0]
    verdict = "reproduced" if crossed and falls else "direction holds" if falls else "not reproduced"
    numbers = {
        "sla_over_softmax_by_tokens": {str(n): round(r, 3) for n, r in ratios.items()},
        "first_faster": next((n for n, r in ratios.items() if r < 1), None),
        "width": WIDTH,
        "heads": LAYER_HEADS,
        "clock": clock.__name__,
        "repeats": repeats,
    }
    return write_result("slab", "sla-crossover", verdict, numbers, seed=seed, out=out)


def main() -> None:
    """Measure all claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims of SLAB.", (measure_fold, measure_speed, measure_training, measure_crossover))


if __name__ == "__main__":
    main()
