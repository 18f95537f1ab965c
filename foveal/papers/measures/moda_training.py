"""MODA's alignment in a small vision-language model trained from scratch on rendered shapes and questions about them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.moda import ModaAttention
from ...models.blocks import Mlp
from ...recipes.fit import fit
from .results import write_result

SIDE, PATCH, IMAGE = 24, 4, 36
COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1.0, -1], [-1, -1, 1.0], [1.0, 1.0, -1]])
SHAPES = 3  # square, disc, cross
WHICH_COLOUR, IS_THERE, FIRST_SHAPE, FIRST_COLOUR, NO, YES, NOTHING = 0, 1, 2, 5, 9, 10, 11
VOCABULARY, QUESTION = 12, 3
DIM, HEADS, DEPTH, STEPS, BATCH, HELD_OUT, SEEDS = 64, 4, 3, 200, 32, 512, 3
VARIANTS: dict[str, dict[str, Any]] = {"vanilla": {"fusion": "none"}, "aligned": {"fusion": "concat"}}
MASKED: dict[str, dict[str, Any]] = {"aligned and masked": {"fusion": "concat", "mask": "fix", "width": 64}}
"""With the pseudo scores too; alignment's claim does not read it."""


def scenes(count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(n, 3, 24, 24)`` with the three shapes in three of four quadrants, questions ``(n, 3)`` and answers ``(n,)``.

    Either "which colour has the …", answered by a colour, or "is there a … in …", answered by yes in half of the cases.
    """
    rows = torch.arange(12)
    far = (rows[:, None] - 5.5).abs(), (rows[None] - 5.5).abs()
    stamps = torch.stack(
        [
            torch.maximum(*far) <= 3.5,
            far[0] ** 2 + far[1] ** 2 <= 18,
            (torch.minimum(*far) <= 1) & (torch.maximum(*far) <= 4.5),
        ]
    )
    image = 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=g)
    colour = torch.randint(len(COLOURS), (count, SHAPES), generator=g)
    place = torch.rand(count, 4, generator=g).argsort(1)[:, :SHAPES]
    for s in range(SHAPES):
        for quadrant in range(4):
            at = (place[:, s] == quadrant)[:, None, None, None] & stamps[s]
            top, left = 12 * (quadrant // 2), 12 * (quadrant % 2)
            part = image[:, :, top : top + 12, left : left + 12]
            part.copy_(torch.where(at, COLOURS[colour[:, s]][:, :, None, None], part))
    asked = torch.randint(SHAPES, (count,), generator=g)
    true = colour.gather(1, asked[:, None])[:, 0]
    other = (true + torch.randint(1, len(COLOURS), (count,), generator=g)) % len(COLOURS)
    yes, presence = torch.rand(2, count, generator=g) < 0.5
    named = torch.where(yes, true, other)
    question = torch.stack(
        [
            torch.where(presence, IS_THERE, WHICH_COLOUR),
            FIRST_SHAPE + asked,
            torch.where(presence, FIRST_COLOUR + named, NOTHING),
        ],
        1,
    )
    return image, question, torch.where(presence, torch.where(yes, YES, NO), FIRST_COLOUR + true)


class Reader(nn.Module):
    """Patches and places, then question tokens; blocks of MODA; the answer at the last token."""

    def __init__(self, variant: str, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same start for all variants: alignment draws no numbers
            self.patch = nn.Linear(3 * PATCH * PATCH, DIM)
            self.place = nn.Parameter(0.1 * torch.randn(IMAGE, DIM))
            self.embed, self.head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, VOCABULARY)
            self.attentions = nn.ModuleList(
                ModaAttention(DIM, HEADS, **{"mask": "inf"} | (VARIANTS | MASKED)[variant]) for _ in range(DEPTH)
            )
            self.mlps = nn.ModuleList(Mlp(DIM) for _ in range(DEPTH))
            self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(2 * DEPTH))

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        patches = F.unfold(image, PATCH, stride=PATCH).mT
        x = torch.cat([self.patch(patches) + self.place, self.embed(question)], 1)
        visual = (torch.arange(x.shape[1]) < IMAGE).expand(len(x), -1)
        given = torch.ones_like(visual)  # the answer is not among the tokens
        for layer in range(DEPTH):
            x = x + self.attentions[layer](self.norms[2 * layer](x), visual, prompt=given)
            x = x + self.mlps[layer](self.norms[2 * layer + 1](x))
        return self.head(x[:, -1])


def reader(variant: str, seed: int) -> Reader:
    """A trained model."""
    model = Reader(variant, seed)

    def loss_of(step: int, g: torch.Generator) -> Tensor:
        image, question, answer = scenes(BATCH, g)
        return F.cross_entropy(model(image, question), answer)

    fit(model, loss_of, STEPS, lr=2e-3, warmup=min(30, STEPS), seed=seed)
    return model


def trained(variant: str, seed: int) -> dict[str, float]:
    """Loss and accuracy on held-out scenes after training."""
    return judged(reader(variant, seed))


def judged(model: Reader) -> dict[str, float]:
    """Loss and accuracy on held-out scenes."""
    image, question, answer = scenes(HELD_OUT, torch.Generator().manual_seed(10_000))
    with torch.no_grad():
        logits = model(image, question)
    right = logits.argmax(-1) == answer
    presence = question[:, 0] == IS_THERE
    return {
        "loss": float(F.cross_entropy(logits, answer)),
        "colour_accuracy": float(right[~presence].double().mean()),
        "yes_no_accuracy": float(right[presence].double().mean()),
    }


def measure_alignment(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``alignment-lowers-loss``: the same starts and batches with and without alignment, in pairs by seed."""
    rows = {variant: [trained(variant, seed) for seed in range(SEEDS)] for variant in VARIANTS}
    mean = {variant: statistics.fmean(r["loss"] for r in found) for variant, found in rows.items()}
    pairs = [a["loss"] - v["loss"] for a, v in zip(rows["aligned"], rows["vanilla"], strict=True)]
    numbers = {
        "ours": f"held-out loss {mean['aligned']:.3f} aligned, {mean['vanilla']:.3f} vanilla; differences by seed "
        + ", ".join(f"{d:+.3f}" for d in pairs),
        "rows": {variant: [{k: round(x, 4) for k, x in r.items()} for r in found] for variant, found in rows.items()},
        "differences": [round(d, 4) for d in pairs],
        "seeds": SEEDS,
        "steps": STEPS,
        "parameters": sum(p.numel() for p in Reader("vanilla", 0).parameters()),
    }
    verdict = "reproduced" if mean["aligned"] <= mean["vanilla"] else "not reproduced"
    return write_result("moda", "alignment-lowers-loss", verdict, numbers, seed=0, out=out)
