"""CLEAR's discs beside shifted windows (Swin) at equal work: which student stays closer to the teacher after the same tuning?

A smaller teacher than that of :mod:`clear_distilled`: 14×14 tokens, 4 layers. Windows of seven tokens lie on the grid, shifted by three
in every second layer; both students see all caption tokens. A window cut by the border is smaller, as a cut disc is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ...core.context import SelectContext, State
from ...core.layouts import Layout
from ...data.synthetic import CAPTION, CAPTION_TOKENS, shapes
from ...models import DiT
from ...patterns import Pattern
from ...patterns.disc import Disc
from ...patterns.near import Places, near_layout
from ...policies.policy import Policy, Rule
from ...recipes.clear import attention_outputs, linearise, self_made
from ...recipes.fit import fit
from .results import sign_test, summary, write_result

SIDE, RADIUS, WINDOW, SHIFT = 14, 4, 7, 3
DIM, DEPTH, HEADS, TEACHER_STEPS, BATCH, LR = 48, 4, 4, 250, 8, 3e-3
STEPS, STUDENT_LR, PAINTED, FRESH, SEEDS = 60, 5e-4, 128, 64, 3
DISC = Disc(RADIUS, (SIDE, SIDE), CAPTION)


@dataclass(frozen=True)
class Windows(Pattern):
    """Image tokens see their own window of a square grid, and the text; text sees everything."""

    window: int
    shift: int
    side: int
    text: int

    @property
    def static(self) -> bool:
        return True

    def number(self) -> Tensor:
        """``(side,)`` which window a row or a column lies in."""
        return torch.div(torch.arange(self.side) + self.window - self.shift, self.window, rounding_mode="floor")

    def pairs(self) -> int:
        """Visible pairs of one head, text included."""
        along = int((self.number()[:, None] == self.number()).sum())
        return along**2 + self.text * (2 * self.side**2 + self.text)

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``BlockMask``: tokens stand at the place of their window, and see what is less than 1 away."""
        base = ctx.base
        memo = ("windows", self)
        if memo not in base.cache:
            image = torch.cartesian_prod(self.number(), self.number()).int()
            place = torch.cat([image.new_zeros(self.text, 2), image])
            places = Places(place[:, 0], place[:, 1], torch.arange(len(place)) < self.text).to(base.device)
            base.cache[memo] = near_layout(places, places, 1)
        return base.cache[memo], state


@functools.lru_cache(maxsize=4)
def teacher_of(seed: int) -> DiT:
    """A teacher trained on shapes."""
    model = DiT(
        (SIDE, SIDE), channels=3, vocab_size=CAPTION_TOKENS, text=CAPTION, dim=DIM, depth=DEPTH, num_heads=HEADS, seed=seed
    )  # fmt: skip
    fit(model, lambda step, g: model.loss(*shapes(BATCH, SIDE, g), g), TEACHER_STEPS, lr=LR, seed=seed)
    return model


def swin() -> Policy:
    """Plain and shifted windows in turn."""
    plain, shifted = (Rule(Windows(WINDOW, shift, SIDE, CAPTION)) for shift in (0, SHIFT))
    return Policy(plain, layers=tuple((i, shifted) for i in range(1, DEPTH, 2)), name="shifted windows")


def pairs_of(policy: Policy) -> float:
    """Visible pairs per layer and head, mean over the layers."""
    patterns = [policy.rule(i).prefill for i in range(DEPTH)]
    return fmean(p.pairs() for p in patterns if isinstance(p, Windows))


@torch.no_grad()
def distances(student: DiT, teacher: DiT, method: Pattern | Policy, seed: int) -> dict[str, float]:
    """Squared differences from the teacher on fresh shapes: of the predictions, and of all attention outputs over their size."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    pictures, caption = shapes(FRESH, SIDE, generator)
    noisy, t, text, _ = teacher.noised(pictures, caption, generator, drop=0.0)
    with attention_outputs(teacher, range(DEPTH)) as theirs:
        target = teacher(noisy, t, text)
    with attention_outputs(student, range(DEPTH)) as ours:
        predicted = student(noisy, t, text, method)
    features = fmean(float(mse_loss(ours[i], theirs[i]) / theirs[i].square().mean()) for i in range(DEPTH))
    return {"prediction": float(mse_loss(predicted, target)), "features": features}


def compared(seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Both students of one teacher, before and after tuning."""
    teacher = teacher_of(seed)
    generator = torch.Generator().manual_seed(3_000_003 + seed)
    captions = shapes(PAINTED, SIDE, generator)[1]
    painted = self_made(teacher, captions, generator)

    def data(step: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        some = torch.randint(PAINTED, (BATCH,), generator=g)
        return painted[some], captions[some]

    found = {}
    for name, method in (("disc", DISC), ("windows", swin())):
        student = linearise(teacher, method, data, steps, lr=STUDENT_LR, seed=seed)
        found[name] = distances(student, teacher, method, seed)
        found[f"{name}, untuned"] = distances(teacher, teacher, method, seed)
    return found


def measure_windows(*, seeds: int = SEEDS, steps: int = STEPS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``disc-beats-swin``."""
    work = {"disc": float(DISC.pairs()), "windows": pairs_of(swin())}
    runs = [compared(seed, steps) for seed in range(seeds)]
    ratios = {part: [r["disc"][part] / r["windows"][part] for r in runs] for part in ("prediction", "features")}
    numbers = {
        "ours": f"distance to the teacher, disc over windows: {fmean(ratios['features']):.2f} of the features, "
        f"{fmean(ratios['prediction']):.2f} of the predictions, at {work['disc'] / work['windows']:.2f} × the work",
        "disc_over_windows": {part: summary(v) for part, v in ratios.items()},
        "sign_test": {part: sign_test([v - 1 for v in values]) for part, values in ratios.items()},
        "runs": [{k: {p: float(f"{x:.4g}") for p, x in v.items()} for k, v in run.items()} for run in runs],
        "pairs_per_head": work,
        "radius": DISC.radius,
        "window": WINDOW,
        "steps": steps,
        "seeds": seeds,
    }
    closer = work["disc"] <= work["windows"] and all(v < 1 for v in ratios["features"])
    verdict = "direction holds" if closer and fmean(ratios["prediction"]) < 1 else "not reproduced"
    return write_result("clear", "disc-beats-swin", verdict, numbers, seed=0, out=out)
