"""The EEG comparison's gains beside the noise between seeds: eleven gates in BaseNet on simulated subjects."""

from __future__ import annotations

import statistics
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...core.errors import ConfigError
from ...core.ranks import spearman
from ...data.eeg import lateralised
from ...recipes.classify import accuracy, standardise, train_classifier
from .eeg_channel_attention import net
from .results import summary, write_result

GATES = ("SE", "GSoP", "FCA", "EncNet", "ECA", "GE θ−", "GCT", "SRM", "CBAM", "CAT", "CATLite")
SUBJECTS, SEEDS, EPOCHS, TRAIN, TEST, SAMPLES, RATE, DROP = 2, 4, 9, 192, 384, 192, 3e-3, 0.45
LEAST = 0.5


def scores(subject: int, seed: int, epochs: int) -> dict[str, float]:
    """Accuracy on fresh windows of one simulated subject, of BaseNet plain and with every gate, from one seed."""
    x, y = lateralised(TRAIN + TEST, samples=SAMPLES, drop=DROP, seed=1000 + subject)
    train, test = standardise(x[:TRAIN], x[TRAIN:], per="channel")
    found = {}
    for gate in (None, *GATES):
        model = net(gate, x.shape[1], SAMPLES, 2, seed)
        train_classifier(model, train, y[:TRAIN], epochs=epochs, batch=32, lr=RATE, warmup=1, seed=seed)
        found[gate or "BaseNet"] = accuracy(model, test, y[TRAIN:])
    return found


def measure_noise(
    subjects: int = SUBJECTS, seeds: int = SEEDS, epochs: int = EPOCHS, seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``gains-within-noise``: the deviation between seeds of BaseNet's mean over subjects, over the largest gain of a gate.

    Raises:
        ConfigError: fewer than two seeds, which have no deviation.
    """
    if seeds < 2 or subjects < 1:
        raise ConfigError(f"seeds is {seeds} and subjects {subjects}; expected at least 2 and 1.")
    runs = [[scores(subject, s, epochs) for subject in range(subjects)] for s in range(seed, seed + seeds)]
    by_seed = {name: [fmean(r[name] for r in rows) for rows in runs] for name in ("BaseNet", *GATES)}
    gains = {gate: [a - b for a, b in zip(by_seed[gate], by_seed["BaseNet"], strict=True)] for gate in GATES}
    mean = {gate: fmean(g) for gate, g in gains.items()}
    noise = statistics.stdev(by_seed["BaseNet"])
    best = max(mean, key=lambda gate: mean[gate])
    ratio = noise / mean[best] if mean[best] > 0 else None
    halves = [torch.tensor([fmean(gains[g][part]) for g in GATES]) for part in (slice(0, None, 2), slice(1, None, 2))]
    agreement = spearman(*halves)
    numbers = {
        "ours": f"largest gain {100 * mean[best]:+.1f} points ({best}), deviation between seeds {100 * noise:.1f}; "
        f"rank correlation of the gates between halves of the seeds {agreement:.2f}",
        "deviation_over_largest_gain": None if ratio is None else round(ratio, 3),
        "criterion": LEAST,
        "accuracy": {name: summary(v) for name, v in by_seed.items()},
        "gain": {gate: summary(g) for gate, g in gains.items()},
        "rank_correlation_of_halves": round(agreement, 3),
        "subjects": subjects,
        "seeds": seeds,
        "epochs": epochs,
        "train_windows": TRAIN,
        "test_windows": TEST,
    }
    within = ratio is None or ratio > LEAST
    verdict = "direction holds" if within else "not reproduced"
    return write_result("eeg_channel_attention", "gains-within-noise", verdict, numbers, seed=seed, out=out)
