"""A name for a set of weights: short, fast, and the same however the checkpoint was loaded."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ..core.errors import ModelError

SAMPLES = 256
"""Values read per parameter, evenly spaced, the first and the last among them."""

FLUSH = 2.0**-16
"""Magnitudes below this count as zero: float16 cannot hold them with bfloat16's precision."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256, in hex, over the model's parameters in the order of their names.

    For each parameter the name, the shape and :data:`SAMPLES` evenly spaced values are hashed. Values are rounded to
    bfloat16 and magnitudes below :data:`FLUSH` count as zero, so that a checkpoint has one fingerprint whether it is
    loaded in float32 or in bfloat16, on any device; one that was stored in bfloat16 or float16 has it in float16 too.
    (A float32 checkpoint loaded in float16 is rounded twice: other weights, another fingerprint.) Parameters of
    integer type are hashed exactly. Tied parameters count once; buffers and the prefix that ``torch.compile`` puts
    before names do not count.

    It tells models apart and notices an exchanged or retrained layer; a change to a few values may escape it.

    Raises:
        ModelError: the model has no parameters, or they hold no values (meta device).
    """
    named = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters()}
    if not named:
        raise ModelError(f"{type(model).__name__} has no parameters; expected a model with weights.")
    digest = hashlib.sha256()
    for name in sorted(named):
        p = named[name].detach()
        if p.is_meta:
            raise ModelError(f"parameter {name} is on the meta device and holds no values; load the weights first.")
        digest.update(f"{name}:{tuple(p.shape)}:".encode())
        digest.update(_sample(p))
    return digest.hexdigest()


def _sample(p: Tensor) -> bytes:
    flat = p.reshape(-1)
    if flat.numel() > SAMPLES:
        steps = [i * (flat.numel() - 1) // (SAMPLES - 1) for i in range(SAMPLES)]
        flat = flat[torch.tensor(steps, device=flat.device)]
    if not flat.is_floating_point():
        return flat.cpu().to(torch.int64).numpy().astype("<i8").tobytes()
    values = flat.to(torch.bfloat16).float()
    values = torch.where(values.abs() < FLUSH, torch.zeros_like(values), values)
    return values.cpu().numpy().astype("<f4").tobytes()
