"""CLEAR's distillation on a small diffusion transformer: do its two losses bring the student closer to the teacher?

Teacher: 16×16 tokens and 3 caption tokens, 6 layers, trained on coloured shapes. Students: the same model under discs of radius 4,
tuned for equally many steps on shapes that the teacher painted. The distance is the squared difference of the predictions on
fresh shapes, over that of the student without tuning.
"""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ...data.synthetic import CAPTION, CAPTION_TOKENS, shapes
from ...models import DiT
from ...patterns.disc import Disc
from ...recipes.clear import Weights, linearise, self_made
from ...recipes.fit import fit
from .results import summary, write_result

SIDE, RADIUS, DIM, DEPTH, HEADS = 16, 4, 64, 6, 4
TEACHER_STEPS, STEPS, BATCH, LR = 400, 100, 16, 2e-3
STUDENT_LR = 5e-4
PAINTED, FRESH = 256, 64
SEEDS = 2
OF_OWN, OF_UNTUNED = 0.8, 0.5
ARMS = {
    "own loss": Weights(1.0, 0.0, 0.0),
    "own + prediction": Weights(1.0, 0.5, 0.0),
    "own + prediction + attention": Weights(1.0, 0.5, 0.5),
}
DISC = Disc(RADIUS, (SIDE, SIDE), CAPTION)


@functools.lru_cache(maxsize=4)
def teacher_of(seed: int) -> DiT:
    """A teacher trained on shapes."""
    model = DiT(
        (SIDE, SIDE), channels=3, vocab_size=CAPTION_TOKENS, text=CAPTION, dim=DIM, depth=DEPTH, num_heads=HEADS, seed=seed
    )  # fmt: skip

    def loss(step: int, generator: torch.Generator) -> Tensor:
        pictures, caption = shapes(BATCH, SIDE, generator)
        return model.loss(pictures, caption, generator)

    fit(model, loss, TEACHER_STEPS, lr=LR, seed=seed)
    return model


@torch.no_grad()
def distance(student: DiT, teacher: DiT, seed: int) -> float:
    """Mean squared difference of the predictions on fresh shapes, noise and levels."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    pictures, caption = shapes(FRESH, SIDE, generator)
    noisy, t, text, _ = teacher.noised(pictures, caption, generator, drop=0.0)
    return float(mse_loss(student(noisy, t, text, DISC), teacher(noisy, t, text)))


@torch.no_grad()
def own_losses(teacher: DiT, painted: Tensor, captions: Tensor, seed: int) -> dict[str, float]:
    """The teacher's denoising loss on what it painted and on real shapes of the same number."""
    generator = torch.Generator().manual_seed(2_000_003 + seed)
    real, real_captions = shapes(FRESH, SIDE, generator)
    found = {}
    for name, x, text in (("self-made", painted[:FRESH], captions[:FRESH]), ("real", real, real_captions)):
        found[name] = float(teacher.loss(x, text, torch.Generator().manual_seed(seed), drop=0.0))
    return found


def distilled(seed: int) -> dict[str, float]:
    """Distance to the teacher by arm, and the teacher's losses on both kinds of data."""
    teacher = teacher_of(seed)
    generator = torch.Generator().manual_seed(3_000_003 + seed)
    _, captions = shapes(PAINTED, SIDE, generator)
    painted = self_made(teacher, captions, generator)

    def data(step: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        some = torch.randint(PAINTED, (BATCH,), generator=g)
        return painted[some], captions[some]

    out = {"no tuning": distance(teacher, teacher, seed)}
    for name, weights in ARMS.items():
        student = linearise(teacher, DISC, data, STEPS, weights=weights, lr=STUDENT_LR, seed=seed)
        out[name] = distance(student, teacher, seed)
    return out | {f"loss on {name} data": value for name, value in own_losses(teacher, painted, captions, seed).items()}


def measure_losses(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``distillation-losses-help``."""
    runs = [distilled(seed) for seed in range(seeds)]
    full = "own + prediction + attention"
    over_own = [run[full] / run["own loss"] for run in runs]
    over_none = [run[full] / run["no tuning"] for run in runs]
    easier = all(run["loss on self-made data"] < run["loss on real data"] for run in runs)
    numbers = {
        "ours": f"distance to the teacher: full losses {fmean(over_own):.2f} × own loss only, {fmean(over_none):.2f} × no tuning",
        "criterion": f"≤ {OF_OWN} and ≤ {OF_UNTUNED}; the teacher's loss lower on self-made than on real data",
        "full_over_own_loss": summary(over_own),
        "full_over_no_tuning": summary(over_none),
        "runs": [{name: float(f"{value:.4g}") for name, value in run.items()} for run in runs],
        "steps": STEPS,
        "seeds": seeds,
    }
    met = fmean(over_own) <= OF_OWN and fmean(over_none) <= OF_UNTUNED and easier
    right = all(ratio < 1 for ratio in over_own)
    verdict = "reproduced" if met else "direction holds" if right else "not reproduced"
    return write_result("clear", "distillation-losses-help", verdict, numbers, seed=0, out=out)
