"""CARE-Edit's layer in a small frozen pixel transformer: routed, with static weights that know the task, and without a layer.

Scenes of 24×24 pixels hold two objects; one is erased, replaced by what the text says, or recoloured after a reference picture. The
backbone (a DiT of four blocks on 36 patches) is trained on pictures alone and frozen; layers stand after its second and fourth block.
Judged is the clean picture that an arm predicts from noised targets: pictures sampled from pure noise by a backbone trained for
minutes are far from the scenes with any layer, and are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.care import CareLayer, Conditions
from ...layers.care_router import load_loss
from ...models import DiT
from ...models.dit import signal
from ...recipes.fit import fit
from .results import summary, write_result

SIDE, PATCH, DIM, DEPTH, HEADS = 24, 4, 64, 4, 4
GRID = (SIDE // PATCH, SIDE // PATCH)
BACKBONE_STEPS, STEPS, BATCH, RATE, SEEDS = 400, 500, 24, 2e-3, 2
TESTED, LEVELS = 192, (0.5, 0.6, 0.7, 0.8, 0.9)
TASKS, COLOURS, SHAPES = 3, 6, 2  # erase, replace, recolour
Arm = Literal["routed", "static"]


@dataclass(frozen=True, eq=False)
class Edits:
    """``base``, ``target`` and ``ref`` ``(n, 3, 24, 24)`` from −1 to 1, ``mask`` and ``coarse`` ``(n, 1, 24, 24)``, ``text``
    ``(n, 2)``: the new colour and shape; ``task`` ``(n,)``."""

    base: Tensor
    target: Tensor
    ref: Tensor
    mask: Tensor
    coarse: Tensor
    text: Tensor
    task: Tensor


def edits(count: int, g: torch.Generator) -> Edits:
    """Random scenes and what is asked of them; mask is where base or target show the object, coarse its box grown by 2 pixels."""
    palette = torch.tensor(
        [[1.0, -1, -1], [-1, 1.0, -1], [-1, -1, 1.0], [1.0, 1.0, -1], [-1, 1.0, 1.0], [1.0, -1, 1.0]]
    )
    rows = torch.arange(SIDE).float()
    back = 0.4 * torch.rand(count, 3, 1, 1, generator=g) - 0.7
    colour = torch.randint(COLOURS, (count, 3), generator=g)  # edited object, other object, new
    shape = torch.randint(SHAPES, (count, 3), generator=g)
    task = torch.randint(TASKS, (count,), generator=g)
    first = torch.rand(count, generator=g) < 0.5
    masks = []
    for k in range(2):
        x = torch.where(first == (k == 0), 6.0, 17.0) + torch.randint(-1, 2, (count,), generator=g)
        y = torch.randint(6, SIDE - 6, (count,), generator=g).float()
        far = (rows[None, :, None] - y[:, None, None]).abs(), (rows[None, None] - x[:, None, None]).abs()
        masks.append(torch.stack([torch.maximum(*far) <= 3.5, far[0] ** 2 + far[1] ** 2 <= 20], 1))

    def painted(on: Tensor, where: Tensor, which: Tensor) -> Tensor:
        return torch.where(where[:, None], palette[which][:, :, None, None], on)

    each = torch.arange(count)
    own, other = masks[0][each, shape[:, 0]], masks[1][each, shape[:, 1]]
    scene = painted(back.expand(-1, -1, SIDE, SIDE), other, colour[:, 1])
    base = painted(scene, own, colour[:, 0])
    new = torch.where((task == 1)[:, None, None], masks[0][each, shape[:, 2]], own)
    edited = painted(scene, new, colour[:, 2])
    target = torch.where((task == 0)[:, None, None, None], scene, edited)
    ref = painted(back.expand(-1, -1, SIDE, SIDE), masks[0][:, 1].roll(6, 2), colour[:, 2])
    mask = (own | (new & (task == 1)[:, None, None]))[:, None].float()
    box = mask.amax(-1, keepdim=True) * mask.amax(-2, keepdim=True)
    said = torch.stack([colour[:, 2], COLOURS + shape[:, 2]], 1)
    text = torch.where((task == 1)[:, None], said, COLOURS + SHAPES)  # other tasks have no text
    return Edits(base, target, ref, mask, F.max_pool2d(box, 5, 1, 2), text, task)


class Editor(nn.Module):
    """The frozen backbone with two layers hooked in; conditions are embedded here."""

    def __init__(self, backbone: DiT, arm: Arm, seed: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            static = arm == "static"
            self.care = nn.ModuleList(
                CareLayer(DIM, tasks=TASKS, top_k=4 if static else 3, share=0.0 if static else 0.1) for _ in range(2)
            )
            self.patches = nn.Conv2d(3, DIM, PATCH, stride=PATCH)
            self.place = nn.Parameter(0.1 * torch.randn(GRID[0] * GRID[1], DIM))
            self.words = nn.Embedding(COLOURS + SHAPES + 1, DIM)
            self.latent = nn.Conv2d(1, DIM, PATCH, stride=PATCH)
        if static:
            for layer in self.care:
                assert isinstance(layer, CareLayer)
                for p in layer.router.parameters():
                    p.requires_grad_(False).zero_()

    def forward(self, x: Tensor, t: Tensor, edit: Edits) -> tuple[Tensor, Tensor]:
        """Predicted noise and the load loss."""
        tokens = [self.patches(p).flatten(2).mT + self.place for p in (edit.base, edit.ref)]
        mask = edit.coarse
        loads: list[Tensor] = []

        def routed(layer: nn.Module, out: Tensor) -> Tensor:
            nonlocal mask
            given = Conditions(
                text=self.words(edit.text), base=tokens[0], ref=tokens[1], latent=self.latent(edit.coarse), mask=mask
            )
            done = layer(out, GRID, edit.task, t, given)
            mask = done.mask
            loads.append(load_loss(done.routing.probabilities))
            return done.out

        handles: list[Any] = []
        for layer, at in zip(self.care, (1, 3), strict=True):
            handles.append(
                self.backbone.layers[at].register_forward_hook(lambda m, a, out, layer=layer: routed(layer, out))
            )
        try:
            y = self.backbone(x, t)
        finally:
            for handle in handles:
                handle.remove()
        return y, torch.stack(loads).mean()


def backbone_of(seed: int) -> DiT:
    """Trained on pictures without any condition."""
    model = DiT(GRID, channels=3, patch=PATCH, dim=DIM, depth=DEPTH, num_heads=HEADS, seed=seed)
    fit(
        model, lambda _, g: model.loss(edits(BATCH, g).target, None, g), BACKBONE_STEPS, lr=RATE, seed=seed,
        warmup=min(30, BACKBONE_STEPS),
    )  # fmt: skip
    return model


@torch.no_grad()
def errors(predict: Callable[[Tensor, Tensor], Tensor], edit: Edits, noise: Tensor) -> dict[str, float]:
    """Mean absolute error of the predicted clean picture inside and outside the mask, over :data:`LEVELS` of noise."""
    inside, outside = [], []
    for level in LEVELS:
        t = torch.full((len(noise),), level)
        share = signal(t).view(-1, 1, 1, 1)
        noisy = share.sqrt() * edit.target + (1 - share).sqrt() * noise
        clean = (noisy - (1 - share).sqrt() * predict(noisy, t)) / share.sqrt()
        off = (clean.clamp(-1, 1) - edit.target).abs().mean(1, keepdim=True)
        inside.append(float((off * edit.mask).sum() / edit.mask.sum()))
        outside.append(float((off * (1 - edit.mask)).sum() / (1 - edit.mask).sum()))
    return {"inside": fmean(inside), "outside": fmean(outside)}


def edited(seed: int) -> dict[str, dict[str, float]]:
    """Errors of all arms on one backbone, from the same noise."""
    backbone = backbone_of(seed)
    g = torch.Generator().manual_seed(1_000_003)
    test, noise = edits(TESTED, g), torch.randn(TESTED, 3, SIDE, SIDE, generator=g)
    found = {"no layer": errors(backbone, test, noise)}
    arms: tuple[Arm, ...] = ("routed", "static")
    for arm in arms:
        model = Editor(backbone, arm, seed)

        def loss(_: int, g: torch.Generator, model: Editor = model) -> Tensor:
            edit = edits(BATCH, g)
            noisy, t, _text, noise = backbone.noised(edit.target, None, g)
            predicted, load = model(noisy, t, edit)
            return F.mse_loss(predicted, noise) + 0.01 * load

        fit(model, loss, STEPS, lr=RATE, seed=seed, warmup=min(30, STEPS))

        def predict(x: Tensor, t: Tensor, model: Editor = model) -> Tensor:
            return model(x, t, test)[0]

        found[arm] = errors(predict, test, noise)
    return found


def measure_layer(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``layer-beats-no-layer``; the gain of routing is reported and asserts nothing."""
    runs = [edited(seed) for seed in range(seeds)]
    inside = {arm: [r[arm]["inside"] for r in runs] for arm in runs[0]}
    numbers = {
        "ours": "error of the predicted picture inside the mask "
        + ", ".join(f"{arm} {fmean(v):.3f}" for arm, v in inside.items()),
        "inside": {arm: summary(v) for arm, v in inside.items()},
        "outside": {arm: summary([r[arm]["outside"] for r in runs]) for arm in runs[0]},
        "routed_minus_static": [round(a - b, 4) for a, b in zip(inside["routed"], inside["static"], strict=True)],
        "runs": [{arm: {k: round(v, 4) for k, v in row.items()} for arm, row in r.items()} for r in runs],
        "levels": list(LEVELS),
        "steps": STEPS,
        "seeds": seeds,
    }
    better = {
        arm: [v < n for v, n in zip(inside[arm], inside["no layer"], strict=True)] for arm in ("routed", "static")
    }
    verdict = (
        "reproduced"
        if all(map(all, better.values()))
        else "direction holds"
        if all(better["routed"])
        else "not reproduced"
    )
    return write_result("care_edit", "layer-beats-no-layer", verdict, numbers, seed=0, out=out)
