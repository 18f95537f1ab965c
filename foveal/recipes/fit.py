"""Train a small model: AdamW, warm-up and cosine, clipped gradients; resumable, and the same from the same seed."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, DataError

LossOf = Callable[[int, torch.Generator], Tensor]
"""``(step, generator) → loss``; the generator depends on seed and step alone."""


def stage_at(step: int, lengths: Sequence[int]) -> int:
    """Which part of a curriculum ``step`` belongs to, of parts with so many steps each; the last one has no end."""
    return min(bisect_right(list(accumulate(lengths)), step), len(lengths) - 1)


def fit(
    model: nn.Module,
    loss_of: LossOf,
    steps: int,
    *,
    lr: float = 1e-3,
    warmup: int = 50,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 200,
    told: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train ``model`` in place and leave it in eval mode.

    Args:
        model: its parameters that require gradients are trained.
        loss_of: makes the batch of a step and returns its loss.
        steps: optimiser steps. lr: the highest learning rate, after ``warmup`` steps; the cosine ends at a tenth of it.
        weight_decay: on matrices alone. clip: largest norm of the gradient.
        seed: of the generators given to ``loss_of``.
        checkpoint: safetensors file written every so many steps; when it is there, training goes on from it.
        told: what else makes the loss, as JSON values: a checkpoint made with something else is refused.
        progress: called with ``(step, steps, loss)``.

    Returns:
        The loss of every step.

    Raises:
        ConfigError: a checkpoint of other settings or another model.
        DataError: the loss is not finite.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))
    setting: dict[str, Any] = {
        "steps": steps, "lr": lr, "warmup": warmup, "weight_decay": weight_decay, "clip": clip, "seed": seed, **(told or {})
    }  # fmt: skip
    losses = [] if checkpoint is None else resume_training(Path(checkpoint), named, optimizer, setting)
    model.train()
    for step in range(len(losses), steps):
        rate = min(1.0, (step + 1) / max(warmup, 1))
        rate *= 0.1 + 0.45 * (1 + math.cos(math.pi * step / max(steps, 1)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(step, step_generator(seed, step))
        if not bool(torch.isfinite(loss)):
            raise DataError(
                f"the loss is {float(loss.detach())} at step {step}; expected a finite number. Try a smaller lr than {lr}."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for _, p in named], clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, steps, losses[-1])
        if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == steps):
            save_training(Path(checkpoint), named, optimizer, setting, losses)
    model.eval()
    return losses


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for one step."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def save_training(
    path: Path, named: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, setting: dict[str, Any], losses: list[Any]
) -> None:  # fmt: skip
    """Write parameters, optimiser and what every step said (JSON values) into a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"model/{name}": p.detach().cpu().contiguous() for name, p in named}
    for name, p in named:
        tensors |= {f"{key}/{name}": value.detach().cpu().contiguous() for key, value in optimizer.state[p].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"fit": json.dumps({"setting": setting, "losses": losses})})
    part.replace(path)


def resume_training(
    path: Path, named: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, setting: dict[str, Any]
) -> list[Any]:
    """Read what :func:`save_training` wrote into parameters and optimiser; what the steps said, [] where there is no file.

    Raises:
        ConfigError: a checkpoint of other settings or another model, or one that cannot be read.
    """
    if not path.is_file():
        return []
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            made = json.loads((file.metadata() or {}).get("fit", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"checkpoint {path} cannot be read: {error}. Delete it to start again.") from None
    shapes = {name.removeprefix("model/"): tuple(t.shape) for name, t in tensors.items() if name.startswith("model/")}
    if made.get("setting") != setting or shapes != {name: tuple(p.shape) for name, p in named}:
        raise ConfigError(
            f"checkpoint {path} was made with {made.get('setting')} or for another model; expected {setting}. "
            "Use another file, or delete it to start again."
        )
    with torch.no_grad():
        for name, p in named:
            p.copy_(tensors[f"model/{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
            optimizer.state[p] = {
                key: tensors[f"{key}/{name}"].to("cpu" if key == "step" else p.device) for key in keys
            }
    losses: list[Any] = made["losses"]
    return losses
