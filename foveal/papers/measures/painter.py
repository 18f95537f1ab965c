"""A small diffusion transformer that paints handwritten digits on demand, trained in minutes; shared by measures that need one.

Pictures: scikit-learn's 8×8 digits, enlarged to 16×16 pixels, one token each, after one text token that names the digit.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...data.digits import digits
from ...models import DiT
from ...recipes.fit import fit

SIDE, TEXT, DIM, DEPTH, HEADS = 16, 1, 64, 6, 4
TRAINING_STEPS, BATCH, LR = 400, 16, 2e-3


def pictures() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out digits as ``(n, 1, 16, 16)`` from −1 to 1, each with labels ``(n, 1)``."""
    train, label, rest, rest_label = digits()
    large = [interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False) for x in (train, rest)]
    return large[0], label[:, None], large[1], rest_label[:, None]


@functools.lru_cache(maxsize=4)
def digit_model(seed: int) -> DiT:
    """Trained by the model's own loss, texts dropped with probability 0.1 for guidance."""
    images, labels, _, _ = pictures()
    model = DiT((SIDE, SIDE), vocab_size=10, text=TEXT, dim=DIM, depth=DEPTH, num_heads=HEADS, seed=seed)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        some = torch.randint(len(labels), (BATCH,), generator=generator)
        return model.loss(images[some], labels[some], generator)

    fit(model, loss, TRAINING_STEPS, lr=LR, seed=seed)
    return model


@torch.no_grad()
def denoising_error(model: DiT, seed: int = 0) -> float:
    """Mean squared error of the predicted noise on held-out digits; 1 is what predicting nothing gives."""
    _, _, images, labels = pictures()
    return float(model.loss(images, labels, torch.Generator().manual_seed(seed), drop=0.0))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """``(B,)`` peak signal-to-noise ratio in dB of pictures from −1 to 1."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1).clamp(min=1e-12))
