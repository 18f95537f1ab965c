"""EEG-tGAT's two parts alone and together, and what choosing the epoch on the test fold adds, on one set of small runs.

Four models: GATv2 with the released dropout of whole feature maps, temporal dropout or temporal attention alone, both. Two ways to
split: shuffled windows, and whole trials held out. A fifth of the training part is an inner validation set in both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from ...core.errors import ConfigError
from ...data.eeg import planted_slot
from ...data.splits import folds
from ...models.affordance import EEGtGAT
from ...recipes.classify import accuracy, train_classifier
from .results import sign_test, summary, write_result

ELECTRODES, SAMPLES, SLOT, BURST, OFFSET = 6, 32, (12, 20), 4.0, 0.5
TRIALS, WINDOWS, EPOCHS, SEEDS, RATE, BATCH = 60, 6, 14, 6, 5e-3, 16
SHARE = 0.9
ABLATIONS: dict[str, dict[str, Any]] = {
    "GATv2": {"temporal_attention": False, "dropout_mode": "feature_map"},
    "dropout alone": {"temporal_attention": False, "dropout_mode": "timestep"},
    "attention alone": {"temporal_attention": True, "dropout_mode": "feature_map"},
    "both": {"temporal_attention": True, "dropout_mode": "timestep"},
}
SPLITS = {"windows": False, "trials": True}


def network(seed: int, **options: Any) -> EEGtGAT:
    """The per-node model in small; its initial weights depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EEGtGAT(ELECTRODES, SAMPLES, 2, filters=(8, 16, 24), kernels=(16, 8, 4), hidden=16, **options)


def curves(ablation: str, split: str, seed: int, epochs: int) -> dict[str, list[float]]:
    """Accuracy after every epoch on the inner validation windows and on the test fold."""
    x, y, trial = planted_slot(
        TRIALS,
        windows=WINDOWS,
        electrodes=ELECTRODES,
        samples=SAMPLES,
        slot=SLOT,
        burst=BURST,
        offset=OFFSET,
        seed=seed,
    )
    grouped = SPLITS[split]
    rest, test = folds(trial, 5, grouped=grouped, seed=seed)[0]
    inner, validation = folds(trial[rest], 5, grouped=grouped, seed=seed)[0]
    train, held = rest[inner], rest[validation]
    model = network(seed, **ABLATIONS[ablation])
    found: dict[str, list[float]] = {"validation": [], "test": []}

    def follow(epoch: int) -> None:
        for name, rows in (("validation", held), ("test", test)):
            found[name].append(round(accuracy(model, x[rows], y[rows]), 5))

    train_classifier(
        model, x[train], y[train], epochs=epochs, batch=BATCH, lr=RATE, warmup=1, label_smoothing=0.1, weight_decay=1e-3,
        seed=seed, after_epoch=follow,
    )  # fmt: skip
    return found


def chosen(found: dict[str, list[float]]) -> dict[str, float]:
    """Test accuracy at the epoch that is best on the inner validation windows (the first of equals), and at the best on the test."""
    inner = max(range(len(found["test"])), key=lambda e: (found["validation"][e], -e))
    return {"inner": found["test"][inner], "best": max(found["test"]), "last": found["test"][-1]}


@cache
def runs(seeds: int, epochs: int, seed: int) -> dict[tuple[str, str], list[dict[str, float]]]:
    """The chosen accuracies of every ablation and split, seed by seed; both claims read them."""
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; expected at least 1.")
    return {
        (a, s): [chosen(curves(a, s, n, epochs)) for n in range(seed, seed + seeds)] for a in ABLATIONS for s in SPLITS
    }


def _setting(seeds: int, epochs: int) -> dict[str, Any]:
    return {
        "trials": TRIALS, "windows_per_trial": WINDOWS, "electrodes": ELECTRODES, "samples": SAMPLES, "epochs": epochs, "seeds": seeds,
    }  # fmt: skip


def measure_modules(seeds: int = SEEDS, epochs: int = EPOCHS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``single-module-ablation``: gains over GATv2 in pairs by seed, whole trials held out, epoch by inner validation."""
    found = runs(seeds, epochs, seed)
    scores = {a: [r["inner"] for r in found[a, "trials"]] for a in ABLATIONS}
    gains = {a: [b - g for b, g in zip(scores[a], scores["GATv2"], strict=True)] for a in ABLATIONS if a != "GATv2"}
    between = stdev(scores["GATv2"]) if seeds > 1 else 0.0
    numbers = {
        "ours": "; ".join(f"{a} {100 * fmean(g):+.1f} points" for a, g in gains.items())
        + f"; deviation between seeds {100 * between:.1f} points",
        "accuracy": scores,
        "gain": {a: summary(g) for a, g in gains.items()},
        "gain_over_deviation": {a: round(fmean(g) / between, 3) if between else None for a, g in gains.items()},
        "sign_test": {a: sign_test(g) for a, g in gains.items()},
        "gain_with_shuffled_windows": {
            a: summary([b["inner"] - g["inner"] for b, g in zip(found[a, "windows"], found["GATv2", "windows"], strict=True)])
            for a in gains
        },
        **_setting(seeds, epochs),
    }  # fmt: skip
    as_printed = fmean(gains["attention alone"]) > 0 > fmean(gains["dropout alone"])
    return write_result(
        "eeg_tgat", "single-module-ablation", "direction holds" if as_printed else "not reproduced", numbers, seed=seed, out=out
    )  # fmt: skip


def measure_selection(
    seeds: int = SEEDS, epochs: int = EPOCHS, seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``test-fold-selection-inflates``: best epoch on the test fold minus the epoch that inner validation chose."""
    found = runs(seeds, epochs, seed)
    added = {f"{a}, {s}": [r["best"] - r["inner"] for r in rows] for (a, s), rows in found.items()}
    every = [d for rows in added.values() for d in rows]
    share = sum(d > 0 for d in every) / len(every)
    by_seed = [fmean(rows[i] for rows in added.values()) for i in range(seeds)]
    numbers = {
        "ours": f"best epoch on the test fold {100 * fmean(every):+.1f} points over inner validation; above 0 in {sum(d > 0 for d in every)} of {len(every)} runs and {sum(d > 0 for d in by_seed)} of {seeds} seeds",
        "added": {k: summary(v) for k, v in added.items()},
        "share_of_runs": round(share, 4),
        "share_of_seeds": round(sum(d > 0 for d in by_seed) / seeds, 4),
        "mean_by_seed": [round(d, 4) for d in by_seed],
        **_setting(seeds, epochs),
    }
    verdict = "reproduced" if share >= SHARE else "direction holds" if fmean(every) > 0 else "not reproduced"
    return write_result("eeg_tgat", "test-fold-selection-inflates", verdict, numbers, seed=seed, out=out)
