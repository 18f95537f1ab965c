"""CLEAR (arXiv 2412.16112): turn a trained diffusion transformer's attention into discs by distillation.

The student begins as a copy of the teacher and runs under a sparse pattern; only its attention projections are tuned.
``L = L_own + α·L_pred + β·L_attn``: the model's own denoising loss; the squared difference of the predictions; and that of the attention
outputs before the output projection (heads side by side, text and image tokens), averaged over some layers.

Deviations: the authors' models predict a velocity (flow matching), this backbone the noise; they train with Prodigy at rate 1,
``fit`` with AdamW and a cosine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ..core.errors import ConfigError, UnsupportedError
from ..core.serial import check_range, check_types
from ..models import DiT, SelfAttention
from ..patterns import Pattern
from ..policies.policy import Policy
from .fit import fit

Data = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]
"""``(step, generator) → (clean samples, text)``."""


@dataclass(frozen=True)
class Weights:
    """Of the losses.

    Attributes:
        own: the model's own denoising loss. prediction: α. attention: β.
        every: layers whose number is a multiple of this enter the attention loss.
    """

    own: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5
    every: int = 4

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("own", "prediction", "attention"):
            check_range(self, name, low=0.0)
        check_range(self, "every", low=1)
        if not self.own + self.prediction + self.attention:
            raise ConfigError("Weights are all 0; expected at least one loss, for example Weights().")


@contextmanager
def attention_outputs(model: DiT, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the attention of some layers gives before its output projection, ``(B, N, dim)`` by layer, of the last forward.

    Raises:
        UnsupportedError: a layer whose attention has no output projection ``out``.
    """
    found: dict[int, Tensor] = {}
    handles = []
    try:
        for number in layers:
            attention = model.layers[number].attention
            if not isinstance(attention, SelfAttention):
                raise UnsupportedError(
                    f"layer {number} has a {type(attention).__name__}; expected SelfAttention, whose output is compared before its projection."
                )

            def note(module: nn.Module, given: tuple[Tensor, ...], number: int = number) -> None:
                found[number] = given[0]

            handles.append(attention.out.register_forward_pre_hook(note))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def losses(
    student: DiT,
    teacher: DiT,
    pattern: Pattern | Policy,
    x: Tensor,
    text: Tensor | None,
    generator: torch.Generator,
    weights: Weights,
    drop: float = 0.1,
) -> dict[str, Tensor]:
    """``own``, ``prediction`` and ``attention`` on one batch, unweighted; the two models see the same noise.

    Args:
        pattern: what the student's attention keeps. x: ``(B, *shape)`` clean samples. text: ``(B, text)`` or None.
        generator: draws noise, levels and dropped texts. drop: probability that a text is dropped.
    """
    noisy, t, text, noise = student.noised(x, text, generator, drop)
    layers = range(0, len(student.layers), weights.every)
    with attention_outputs(teacher, layers) as theirs, torch.no_grad():
        target = teacher(noisy, t, text)
    with attention_outputs(student, layers) as ours:
        predicted = student(noisy, t, text, pattern)
    attention = torch.stack([mse_loss(ours[i], theirs[i]) for i in layers]).mean()
    return {
        "own": mse_loss(predicted, noise),
        "prediction": mse_loss(predicted, target),
        "attention": attention,
    }


def student_of(teacher: DiT) -> DiT:
    """A copy of which only the attention projections are trained."""
    student = copy.deepcopy(teacher)
    for name, p in student.named_parameters():
        p.requires_grad_(".attention." in name)
    return student


def linearise(
    teacher: DiT,
    pattern: Pattern | Policy,
    data: Data,
    steps: int,
    *,
    weights: Weights | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 200,
    progress: Callable[[int, int, float], None] | None = None,
) -> DiT:
    """Distil ``teacher`` into a model that attends under ``pattern``; the teacher stays as it is.

    Args:
        pattern: for the student, such as ``Disc(radius=16, text=512)``, or a policy of several.
        data: clean samples and their texts; the authors use what the teacher itself made (:func:`self_made`).
        steps: optimiser steps. weights: of the losses; default CLEAR's. lr, seed, checkpoint, every, progress: see ``fit``.

    Returns:
        The student, to be called with ``policy=pattern``.

    Raises:
        ConfigError: a checkpoint of other settings, pattern or weights.
        UnsupportedError: attention layers of another kind.
    """
    weights = weights or Weights()
    student = student_of(teacher)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x, text = data(step, generator)
        found = losses(student, teacher, pattern, x, text, generator, weights)
        return sum((getattr(weights, name) * value for name, value in found.items()), torch.zeros(()).to(x))

    told = {"pattern": pattern.to_json(), "weights": asdict(weights)}
    fit(
        student, loss, steps, lr=lr, warmup=min(50, steps // 10), seed=seed, checkpoint=checkpoint, every=every, told=told,
        progress=progress,
    )  # fmt: skip
    return student


def self_made(
    teacher: DiT, text: Tensor, generator: torch.Generator, *, steps: int = 20, guidance: float = 1.0, batch: int = 64
) -> Tensor:
    """``(n, *shape)`` samples that the teacher paints for ``text`` ``(n, text)``: the data that CLEAR distils on."""
    parts = []
    for some in text.split(batch):
        noise = torch.randn(len(some), *teacher.shape, generator=generator).to(text.device)
        parts.append(teacher.sample(noise, steps, some, guidance=guidance, clip=1.0))
    return torch.cat(parts)
