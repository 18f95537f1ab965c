"""CARVE's claims that one core can check: the decomposition, masks on a tiny model, and the cost formulas against counted layers.

Run ``python -m foveal.papers.measures.carve`` to measure them and write their result files.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core import ranks
from ...data.scenes import BACKGROUND, GRID, cell_mask, render, scene
from ...hf.picture_tokens import painted
from ...steer import carve
from ...steer.carve import score_map
from ...steer.contrast import contrast, map_entropy, saved
from ...steer.maps import capture
from ...steer.picture import refined_picture, regions, top_pixels
from . import toy_vlm as toy
from .command import run_measures
from .results import sign_test, write_result

DRAWS, KEPT, COUNT, LAYER = 50, 29, 221, 2
FORMS: dict[str, dict[str, Any]] = {
    "lam 1e-8": {"lam": 1e-8}, "lam 1/N": {}, "lam 0.3": {"lam_rel": 0.3 * 36}, "raw": {"raw": True},
}  # fmt: skip


def measure_decomposition(draws: int = DRAWS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``decomposition-recovers-the-signal``: planted noise times a planted blob on 24 × 24."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    found: dict[str, list[float]] = {"contrast": [], "raw": [], "noisy": []}
    bound = True
    for _ in range(draws):
        middle = 4 + 16 * torch.rand(2, generator=g)
        signal = (1 + 9 * torch.exp(-((y - middle[0]) ** 2 + (x - middle[1]) ** 2) / 8)).double().flatten()
        noise = torch.randn(576, generator=g, dtype=torch.float64).exp()
        delta = 0.1
        general = noise * (1 + delta * (2 * torch.rand(576, generator=g, dtype=torch.float64) - 1))
        lam = 1e-3 * float(noise.min())
        blob = set(signal.topk(KEPT).indices.tolist())
        maps = {
            "contrast": contrast(noise * signal, noise, lam),
            "raw": noise * signal,
            "noisy": contrast(noise * signal, general, lam),
        }
        for name, values in maps.items():
            mine = set(values.topk(KEPT).indices.tolist())
            found[name].append(len(mine & blob) / len(mine | blob))
        limit = delta / (1 - delta) * float(signal.max())
        bound = bound and float((contrast(noise * signal, general, 0.0) - signal).abs().max()) <= limit
    mean = {name: sum(v) / len(v) for name, v in found.items()}
    good = mean["contrast"] >= 0.99 and mean["raw"] <= 0.5 and mean["noisy"] >= 0.8 and bound
    numbers = {
        "iou": {k: round(v, 4) for k, v in mean.items()}, "largest_raw_iou": round(max(found["raw"]), 4), "error_bound_holds": bound, "draws": draws,
        "ours": f"IoU {mean['contrast']:.2f} contrast, {mean['raw']:.2f} raw, {mean['noisy']:.2f} with ±10 % noise",
    }  # fmt: skip
    verdict = "reproduced" if good else "direction holds" if mean["contrast"] > mean["raw"] else "not reproduced"
    return write_result("carve", "decomposition-recovers-the-signal", verdict, numbers, seed=seed, out=out)


def measure_beside_raw(steps: int = 0, seed: int = 0, count: int = COUNT, out: Path | None = None) -> dict[str, Any]:
    """Claim ``contrast-beside-raw-attention``: colour questions on cluttered scenes; masks by λ, by raw attention, by an oracle."""
    model, reader = toy.trained(seed, steps or toy.STEPS)
    asked = toy.held_out(count, seed + 7, ("colour",), most=8, clutter=8)
    answers = [q.answer for _, q in asked]
    pictures = [render(s, toy.SIDE) for s, _ in asked]
    edge = toy.SIDE // toy.PATCH
    hits = dict.fromkeys(FORMS, 0)
    masks: dict[str, list[Tensor]] = {name: [] for name in FORMS}
    entropy = []
    for picture, (_, q) in zip(pictures, asked, strict=True):
        ask, general = reader.prepare([picture], q.text), reader.prepare([picture], toy.DESCRIBE)
        a, b = (capture(model, inputs, [LAYER], generate=False) for inputs in (ask, general))
        mine, other = a.maps[..., a.image], b.maps[..., b.image]
        entropy.append(float(map_entropy(mine)[0, 0]))
        for name, form in FORMS.items():
            scores = score_map(mine, other, mode="start", **form)
            best = int(scores.argmax())
            hits[name] += (best // edge * GRID // edge, best % edge * GRID // edge) in q.about
            picture_map = painted(scores.view(edge, edge), (0, 0, toy.SIDE, toy.SIDE), toy.SIDE, toy.SIDE)
            masks[name].append(regions(top_pixels(picture_map, 0.4), picture_map, 2))
    masks["oracle"] = [torch.from_numpy(cell_mask(q.about, toy.SIDE)) for _, q in asked]
    questions = torch.tensor([reader.prompt(q.text) for _, q in asked])
    right = {"base": toy.right(model, {"input_ids": questions, "pixel_values": reader.pixels(pictures)}, answers)}
    for name, kept in masks.items():
        for fill in (BACKGROUND, (0, 0, 0)) if name == "oracle" else (BACKGROUND,):
            shown = [refined_picture(p, m, fill=fill, crop=False)[0] for p, m in zip(pictures, kept, strict=True)]
            key = name + (" black" if fill != BACKGROUND else "")
            right[key] = toy.right(model, {"input_ids": questions, "pixel_values": reader.pixels(shown)}, answers)
    share = {k: round(float(v.float().mean()), 4) for k, v in right.items()}
    wins = sign_test((right["lam 1/N"].float() - right["raw"].float()).tolist())
    fine = share["lam 1/N"] >= share["base"] - 0.05 and share["lam 0.3"] >= share["base"] - 0.05
    numbers = {
        "accuracy": share, "argmax_in_cell": {k: round(v / count, 4) for k, v in hits.items()}, "chance": round(1 / GRID**2, 4),
        "contrast_against_raw": wins, "layer": LAYER, "questions": count, "steps": steps or toy.STEPS,
        "entropy_against_things": spearman([float(len(s.things)) for s, _ in asked], entropy, seed),
        "oracle_helps": share["oracle"] > share["base"],
        "ours": f"base {share['base']:.2f}, contrast {share['lam 1/N']:.2f} (λ 1/N), {share['lam 1e-8']:.2f} (λ 1e-8), "
        f"raw {share['raw']:.2f}, oracle {share['oracle']:.2f}, oracle in black {share['oracle black']:.2f}",
    }  # fmt: skip
    return write_result(
        "carve",
        "contrast-beside-raw-attention",
        "reproduced" if fine else "not reproduced",
        numbers,
        seed=seed,
        out=out,
    )


def spearman(a: list[float], b: list[float], seed: int, draws: int = 1000) -> dict[str, float]:
    """Rank correlation with a 95 % bootstrap interval over pairs; ties get their mean rank."""
    rng = np.random.default_rng(seed)

    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)

    def rho(i: np.ndarray) -> float:
        found = ranks.spearman(x[i], y[i])
        return 0.0 if math.isnan(found) else found

    n = len(a)
    drawn = sorted(rho(rng.integers(0, n, n)) for _ in range(draws))
    low, high = drawn[int(0.025 * draws)], drawn[int(0.975 * draws)]
    return {"rho": round(rho(np.arange(n)), 4), "low": round(low, 4), "high": round(high, 4)}


def measure_cost(seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``cost-of-early-stop``: the two formulas against counted layers of prompts, on untrained models of several depths."""
    rows = []
    for depth, last in ((4, 1), (6, 3), (9, 7), (28, 24)):
        model, reader = toy.tiny_vlm(toy.WORDS, side=24, dim=24, layers=depth, heads=2, seed=seed)
        model.eval()
        picture = render(scene(torch.Generator().manual_seed(seed), 3), 24)
        options: dict[str, Any] = {"layers": [last], "mode": "start", "max_new_tokens": 1}
        first = carve(model, reader, picture, "is there a red circle ?", general=toy.DESCRIBE, **options)
        again = carve(model, reader, picture, "is there a blue circle ?", general=first.general, **options)
        alpha = (last + 1) / depth
        share, times = saved(alpha)
        rows.append({
            "depth": depth, "alpha": round(alpha, 4), "saved": round(1 - first.layer_passes / (3 * depth), 4), "saved_by_formula": round(share, 4),
            "with_cache": round(3 * depth / again.layer_passes, 4), "with_cache_by_formula": round(times, 4),
        })  # fmt: skip
    exact = all(
        math.isclose(r["saved"], r["saved_by_formula"], abs_tol=2e-4)
        and math.isclose(r["with_cache"], r["with_cache_by_formula"], abs_tol=2e-4)
        for r in rows
    )
    numbers = {
        "runs": rows,
        "ours": "; ".join(f"α {r['alpha']:.2f}: saves {r['saved']:.1%}, cached {r['with_cache']:.2f} ×" for r in rows),
    }
    return write_result(
        "carve", "cost-of-early-stop", "reproduced" if exact else "not reproduced", numbers, seed=seed, out=out
    )


def main() -> None:
    """Measure the claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims of CARVE.", (measure_decomposition, measure_beside_raw, measure_cost), brief=True)


if __name__ == "__main__":
    main()
