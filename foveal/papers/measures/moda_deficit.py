"""MODA's attention deficit in the small reader of :mod:`moda_training`: how unevenly question tokens attend to image and text.

Image tokens stand first and see no text, so only question rows can be uneven here.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

import torch
from torch import Tensor

from ...layers.moda import ModaAttention, ModaMemory, disparity, self_and_cross
from ...layers.rotary import rotary, rotate
from .moda_training import HELD_OUT, IMAGE, MASKED, SEEDS, STEPS, VARIANTS, Reader, judged, reader, scenes
from .results import sign_test, summary, write_result

NAMES = (*VARIANTS, *MASKED)


@torch.no_grad()
def queries_and_keys(model: Reader, image: Tensor, question: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer the turned queries, the keys as they are attended (aligned or not), and which tokens are image tokens."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(module: ModaAttention, args: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
        found_memory = ModaMemory()
        memories.append((module, args[0], args[1], found_memory))
        return kwargs | {"memory": found_memory}

    memories: list[tuple[ModaAttention, Tensor, Tensor, ModaMemory]] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, a, k: (a, note(m, a, k)), with_kwargs=True)
        for layer in model.attentions
    ]
    try:
        model(image, question)
    finally:
        for handle in handles:
            handle.remove()
    for module, x, visual, memory in memories:
        width = module.num_heads * module.head_dim
        q = module.qkv(x)[..., :width].unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        turn = rotary(torch.arange(x.shape[1])[:, None], module.head_dim, module.rope_base)
        assert memory.keys is not None
        found.append((rotate(q, turn), memory.keys, visual))
    return found


def deficit(model: Reader) -> dict[str, float]:
    """On held-out scenes: disparity of question rows, mean over layers; the mass that the last row gives to the image; and γ, the
    factor by which attention per image token changes from layer to layer."""
    image, question, _ = scenes(HELD_OUT, torch.Generator().manual_seed(10_000))
    uneven, mass, cross = [], [], []
    for q, k, visual in queries_and_keys(model, image, question):
        uneven.append(disparity(q, k, visual)["text"])
        (_, own), (_, other) = self_and_cross(q, k, k, visual)
        share = torch.sigmoid(other - own)[:, :, IMAGE:]  # of question rows, given to the image
        mass.append(float(share[:, :, -1].mean()))
        cross.append(math.log(float(share.mean()) / IMAGE))
    slope, _ = linear_regression(range(len(cross)), cross)
    return {"disparity": fmean(uneven), "last_row_image_mass": fmean(mass), "gamma": math.exp(slope)}


def measure_disparity(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``disparity-falls``: three variants from the same starts, on the same batches."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for name in NAMES:
        for seed in range(seeds):
            model = reader(name, seed)
            rows[name].append(deficit(model) | judged(model))
    mean = {name: fmean(r["disparity"] for r in found) for name, found in rows.items()}
    falls = {
        name: [b["disparity"] - a["disparity"] for a, b in zip(rows["vanilla"], rows[name], strict=True)]
        for name in NAMES[1:]
    }
    numbers = {
        "ours": "disparity of question rows " + "; ".join(f"{100 * v:.1f} % {name}" for name, v in mean.items()),
        "disparity": {name: summary([r["disparity"] for r in found]) for name, found in rows.items()},
        "change": {name: summary(d) for name, d in falls.items()},
        "sign_test": {name: sign_test(d) for name, d in falls.items()},
        "rows": {name: [{k: round(x, 4) for k, x in r.items()} for r in found] for name, found in rows.items()},
        "seeds": seeds,
        "steps": STEPS,
    }
    fell = all(d < 0 for d in falls["aligned and masked"])
    verdict = "direction holds" if fell else "not reproduced"
    return write_result("moda", "disparity-falls", verdict, numbers, seed=0, out=out)
