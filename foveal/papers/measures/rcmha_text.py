"""RCMHA and its three relatives as character language models on packaged prose: which predicts the next character best?"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ...layers.rcmha import RCMHA
from ...models import DecoderLM, Recurrent
from .characters import characters, taught
from .rcmha import FORMS, Positioned
from .results import sign_test, summary, write_result

DIM, HEADS, DEPTH, LENGTH, BATCH, STEPS, RATE, SEEDS = 64, 4, 2, 128, 8, 250, 5e-3, 3
SLACK = 0.002


def model_of(form: str, seed: int) -> DecoderLM:
    """One of the four modules in every layer; MHA and MDHA with learned absolute positions."""
    conv, relative = FORMS[form]

    def attention(index: int) -> Recurrent:
        return Recurrent(RCMHA(DIM, HEADS, conv=conv, relative=relative, max_rel=LENGTH), index)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DecoderLM(characters()[2], DIM, DEPTH, attention=attention, seed=seed)
        if not relative:
            positioned = Positioned(model.embed, LENGTH)
            nn.init.normal_(positioned.positions.weight, std=0.02)
            model.embed = positioned  # type: ignore[assignment]
    return model


def trained(form: str, seed: int, steps: int) -> dict[str, float]:
    """Loss and accuracy on held-out text."""
    return taught(model_of(form, seed), LENGTH, batch=BATCH, steps=steps, rate=RATE, seed=seed)


def measure_accuracy(steps: int = STEPS, seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``best-accuracy``: the same batches for all four, in pairs by seed."""
    rows = {form: [trained(form, s, steps) for s in range(seed, seed + seeds)] for form in FORMS}
    mean = {form: fmean(r["accuracy"] for r in found) for form, found in rows.items()}
    over = {
        form: [a["accuracy"] - b["accuracy"] for a, b in zip(rows["RCMHA"], rows[form], strict=True)]
        for form in FORMS
        if form != "RCMHA"
    }
    numbers = {
        "ours": ", ".join(f"{form} {value:.4f}" for form, value in mean.items()),
        "accuracy": {form: summary([r["accuracy"] for r in found]) for form, found in rows.items()},
        "loss": {form: summary([r["loss"] for r in found]) for form, found in rows.items()},
        "rcmha_over": {form: summary(d) for form, d in over.items()},
        "sign_test": {form: sign_test(d) for form, d in over.items()},
        "parameters": {form: sum(p.numel() for p in model_of(form, 0).parameters()) for form in FORMS},
        "length": LENGTH,
        "depth": DEPTH,
        "steps": steps,
        "seeds": seeds,
    }
    best = mean["RCMHA"] >= max(mean["RMHA"], mean["MDHA"]) - SLACK and mean["RCMHA"] > mean["MHA"]
    return write_result(
        "rcmha", "best-accuracy", "direction holds" if best else "not reproduced", numbers, seed=seed, out=out
    )
