"""MambAttention in small, trained on synthetic voices: can it learn at all, and does sharing the attention help on unseen noise?

Voices and noises are generated (:mod:`foveal.data.voices`): no recorded speech is at hand. Network: 16 channels, one block,
expand 2, state 8, FFT 128.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...data.voices import Noise, mixed, noise, voices
from ...layers.mamba import BidirectionalMamba
from ...layers.time_frequency import Order, Sharing
from ...models.mambattention import MambAttention
from ...models.mambattention.codec import WEIGHTS, Codec, gain, generator_losses, si_sdr
from ...recipes.fit import fit
from .results import sign_test, summary, write_result

CODEC = Codec(n_fft=128, hop=64)
SAMPLES, RATE = 2048, 5e-3
CLIPS, OVERFIT_STEPS, LEAST_GAIN = 4, 300, 8.0
KINDS: tuple[Sharing, ...] = ("none", "shared", "separate")
STEPS, BATCH, SEEDS, HELD_OUT, DRAWS = 150, 3, 3, 24, 2000
SPEAKER, STRANGERS = (120.0, 1.0), ((95.0, 0.9), (210.0, 1.18), (160.0, 1.1))
HEARD: tuple[Noise, ...] = ("white", "hum", "clicks")
UNHEARD: tuple[Noise, ...] = ("rumble", "babble")


def network(attention: Sharing, seed: int, order: Order = "attention first") -> MambAttention:
    """The tiny enhancer; its initial weights depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core = lambda dim: BidirectionalMamba(dim, expand=2, d_state=8)  # noqa: E731
        return MambAttention(16, 1, CODEC.n_fft // 2 + 1, {"attention": attention, "core": core, "order": order})


def loss_on(model: MambAttention, noisy: Tensor, clean: Tensor) -> Tensor:
    """The paper's weighted losses without the metric loss."""
    scale = gain(noisy)
    magnitude, phase = model(*CODEC.encode(noisy * scale))
    found = generator_losses(CODEC, magnitude, phase, clean * scale)
    return torch.stack([WEIGHTS[name] * value for name, value in found.items()]).sum()


@torch.no_grad()
def improvement(model: MambAttention, noisy: Tensor, clean: Tensor) -> Tensor:
    """``(n,)`` gains of SI-SDR in dB."""
    scale = gain(noisy)
    magnitude, phase = model(*CODEC.encode(noisy * scale))
    out = CODEC.decode(magnitude, phase, noisy.shape[1]) / scale
    return si_sdr(out, clean) - si_sdr(noisy, clean)


def clips(
    count: int, g: torch.Generator, kinds: tuple[Noise, ...], speakers: tuple[tuple[float, float], ...] = (SPEAKER,)
) -> tuple[Tensor, Tensor]:
    """``(noisy, clean)``, ``(count, SAMPLES)`` each, noises and speakers in turn, at −5 to 10 dB."""
    clean, disturbance = [], []
    for i in range(count):
        pitch, tract = speakers[i % len(speakers)]
        clean.append(voices(1, SAMPLES, g, pitch=pitch, tract=tract))
        disturbance.append(noise(kinds[i % len(kinds)], 1, SAMPLES, g))
    snr = 15 * torch.rand(count, generator=g) - 5
    whole = torch.cat(clean)
    return mixed(whole, torch.cat(disturbance), snr), whole


def measure_overfit(steps: int = OVERFIT_STEPS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``model-can-learn``: SI-SDR gain on the four clips that the shared variant was trained on."""
    noisy, clean = clips(CLIPS, torch.Generator().manual_seed(seed), HEARD)
    model = network("shared", seed)
    losses = fit(model, lambda step, g: loss_on(model, noisy, clean), steps, lr=RATE, warmup=min(20, steps), seed=seed)
    gains = improvement(model, noisy, clean)
    mean = float(gains.mean())
    numbers = {
        "ours": f"SI-SDR {mean:+.1f} dB on the {CLIPS} clips, from {float(si_sdr(noisy, clean).mean()):.1f} dB",
        "gain_db": [round(g, 3) for g in gains.tolist()],
        "criterion_db": LEAST_GAIN,
        "loss": {"first": round(losses[0], 4), "last": round(losses[-1], 4)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "samples": SAMPLES,
    }
    verdict = "reproduced" if mean >= LEAST_GAIN else "direction holds" if float(gains.min()) > 0 else "not reproduced"
    return write_result("mambattention", "model-can-learn", verdict, numbers, seed=seed, out=out)


def trained(attention: Sharing, seed: int, steps: int, order: Order = "attention first") -> dict[str, Tensor]:
    """Gains on held-out clips, in the training's own domain and outside it."""
    model = network(attention, seed, order)
    fit(
        model, lambda step, g: loss_on(model, *clips(BATCH, g, HEARD)), steps, lr=RATE, warmup=min(20, steps), seed=seed
    )
    g = torch.Generator().manual_seed(1_000_003)  # the same for all
    own, other = clips(HELD_OUT, g, HEARD), clips(HELD_OUT, g, UNHEARD, STRANGERS)
    return {"in": improvement(model, *own), "out": improvement(model, *other)}


def interval(differences: Tensor, seed: int, draws: int = DRAWS) -> list[float]:
    """95 % bootstrap interval of the mean of ``(seeds, clips)`` differences: seeds are drawn, then clips within each."""
    g = torch.Generator().manual_seed(seed)
    seeds, count = differences.shape
    who = torch.randint(seeds, (draws, seeds, 1), generator=g)
    which = torch.randint(count, (draws, seeds, count), generator=g)
    means = differences[who, which].mean((1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(low, 3), round(high, 3)]


def measure_sharing(steps: int = STEPS, seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``sharing-helps``: unseen speakers and noises, in pairs by seed and clip."""
    runs = {kind: [trained(kind, s, steps) for s in range(seed, seed + seeds)] for kind in KINDS}
    out_of = {kind: torch.stack([r["out"] for r in rows]) for kind, rows in runs.items()}
    inside = {kind: torch.stack([r["in"] for r in rows]) for kind, rows in runs.items()}
    pairs: dict[str, tuple[Sharing, Sharing]] = {
        "shared − none": ("shared", "none"),
        "shared − separate": ("shared", "separate"),
    }
    found = {name: out_of[a] - out_of[b] for name, (a, b) in pairs.items()}
    bounds = {name: interval(d, seed) for name, d in found.items()}
    numbers = {
        "ours": "; ".join(
            f"{name} {float(d.mean()):+.2f} dB [{bounds[name][0]:+.2f}, {bounds[name][1]:+.2f}]" for name, d in found.items()
        ),
        "out_of_domain_db": {k: summary(v.mean(1).tolist()) for k, v in out_of.items()},
        "in_domain_db": {k: summary(v.mean(1).tolist()) for k, v in inside.items()},
        "interval_95": bounds,
        "by_seed": {name: [round(x, 3) for x in d.mean(1).tolist()] for name, d in found.items()},
        "sign_test_by_clip": {name: sign_test(d.mean(0).tolist()) for name, d in found.items()},
        "steps": steps,
        "seeds": seeds,
        "clips": HELD_OUT,
    }  # fmt: skip
    low = bounds["shared − none"][0]
    positive = fmean(found["shared − none"].mean(1).tolist()) > 0
    apart = fmean(found["shared − separate"].mean(1).tolist()) > 0
    verdict = "reproduced" if low > 0 and apart else "direction holds" if positive and apart else "not reproduced"
    return write_result("mambattention", "sharing-helps", verdict, numbers, seed=seed, out=out)


def measure_order(steps: int = STEPS, seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``attention-before-mamba``: unseen speakers and noises with both orders, in pairs by seed and clip."""
    orders: tuple[Order, Order] = ("attention first", "mamba first")
    first, last = (
        torch.stack([trained("shared", s, steps, order)["out"] for s in range(seed, seed + seeds)]) for order in orders
    )
    difference = first - last
    low, high = interval(difference, seed)
    mean = float(difference.mean())
    numbers = {
        "ours": f"attention first {float(first.mean()):+.2f} dB, Mamba first {float(last.mean()):+.2f} dB; difference {mean:+.2f} dB "
        f"[{low:+.2f}, {high:+.2f}]",
        "out_of_domain_db": {o: summary(v.mean(1).tolist()) for o, v in zip(orders, (first, last), strict=True)},
        "interval_95": [low, high],
        "by_seed": [round(x, 3) for x in difference.mean(1).tolist()],
        "sign_test_by_clip": sign_test(difference.mean(0).tolist()),
        "steps": steps,
        "seeds": seeds,
        "clips": HELD_OUT,
    }
    verdict = "direction holds" if low > 0 else "not reproduced"
    return write_result("mambattention", "attention-before-mamba", verdict, numbers, seed=seed, out=out)
