"""Gated attention's claims that one core can check: the sink lab, and what the gate costs on this machine.

Run ``python -m foveal.papers.measures.gated`` to measure them and write their result files.
"""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from ...data.backcopy import BackCopy
from ...layers.gated import GateConfig, GatedAttention
from ...lens.gating import first_key, first_key_mass, gate_scores
from ...models import DecoderLM, Hosted
from ...recipes.fit import fit
from .command import run_measures
from .results import write_result

LENGTH, BATCH, STEPS, RATE, DIM, SEEDS = 128, 16, 1000, 3e-3, 64, 3
TESTED, SKIP = 256, 16
"""Held-out sequences; first queries that do not count."""

GATES: dict[str, GateConfig | None] = {
    "baseline": None,
    "G1 elementwise": GateConfig(),
    "G1 headwise": GateConfig(granularity="headwise"),
    "G2": GateConfig(position="G2"),
    "NS-sigmoid": GateConfig(activation="ns_sigmoid"),
}


def model_of(gate: GateConfig | None, vocab_size: int, seed: int) -> DecoderLM:
    """One layer, one head, rotary positions; torch's own initial weights, as a plain script of the experiment has."""

    def attention(index: int) -> Hosted:
        return Hosted(GatedAttention(DIM, 1, gate=gate, qk_norm=False), index)

    with torch.random.fork_rng(devices=[]):
        model = DecoderLM(vocab_size, DIM, 1, attention=attention, seed=seed)
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.reset_parameters()
    return model


def attention_of(model: DecoderLM) -> GatedAttention:
    """The layer inside :func:`model_of`."""
    layer = model.get_submodule("layers.0.attention.layer")
    assert isinstance(layer, GatedAttention)
    return layer


@functools.cache
def lab(name: str, seed: int, steps: int) -> dict[str, float]:
    """Train one variant; its F-Attn on queries that are no triggers, held-out loss, and mean gate scores."""
    language = BackCopy.make(seed=seed)
    model = model_of(GATES[name], language.vocab_size, seed)
    fit(model, lambda _, g: model.loss(language.draw(BATCH, LENGTH, g).ids), steps, lr=RATE, seed=seed)
    ids = language.draw(TESTED, LENGTH, torch.Generator().manual_seed(10_000 + seed)).ids
    with torch.no_grad():
        loss = float(model.loss(ids))
        layer, x = attention_of(model), model.get_submodule("layers.0.norm1")(model.embed(ids))
        q, k, _ = layer.project(x)
        trigger = ids < language.triggers
        found = {"loss": loss, "first_key": first_key(first_key_mass(q, k), ~trigger, SKIP).late}
        found["at_triggers"] = first_key(first_key_mass(q, k), trigger, SKIP).late
        if layer.gate is not None:
            scores = layer.gate.scores(x)
            found |= {"gate": gate_scores(scores[~trigger]).mean, "gate_at_triggers": gate_scores(scores[trigger]).mean}
    return found


def _labs(names: tuple[str, ...], seed: int, steps: int) -> dict[str, dict[str, Any]]:
    """Per variant: medians over the seeds, and the single values of F-Attn and loss."""
    out: dict[str, dict[str, Any]] = {}
    for name in names:
        runs = [lab(name, s, steps) for s in range(seed, seed + SEEDS)]
        out[name] = {key: round(median(r[key] for r in runs), 4) for key in runs[0]}
        out[name] |= {f"{key}_by_seed": [round(r[key], 4) for r in runs] for key in ("first_key", "loss")}
    return out


def measure_sink(steps: int = 0, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``sink-removed``: F-Attn of G1, elementwise and headwise, over the baseline's, at equal loss."""
    steps = steps or STEPS
    found = _labs(("baseline", "G1 elementwise", "G1 headwise"), seed, steps)
    base = found["baseline"]
    share = {n: f["first_key"] / base["first_key"] for n, f in found.items() if n != "baseline"}
    loss = {n: f["loss"] / base["loss"] for n, f in found.items() if n != "baseline"}
    equal = all(0.98 <= value <= 1.02 for value in loss.values())
    verdict = "reproduced" if equal and max(share.values()) <= 0.3 else "not reproduced"
    if verdict == "not reproduced" and max(share.values()) < 1:
        verdict = "direction holds"
    numbers = {
        "first_key_over_baseline": {n: round(v, 4) for n, v in share.items()},
        "loss_over_baseline": {n: round(v, 4) for n, v in loss.items()},
        "runs": found,
        "setting": _setting(steps),
        "ours": f"F-Attn {base['first_key']:.3f} → {found['G1 elementwise']['first_key']:.3f} (elementwise), "
        f"{found['G1 headwise']['first_key']:.3f} (headwise); medians of {SEEDS} seeds",
    }
    return write_result("gated", "sink-removed", verdict, numbers, seed=seed, out=out)


def measure_sparsity(steps: int = 0, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``sparsity-removes-sink``: a value gate keeps the sink, a gate in [0.5, 1] lies between."""
    steps = steps or STEPS
    found = _labs(("baseline", "G1 elementwise", "G2", "NS-sigmoid"), seed, steps)
    f = {name: value["first_key"] for name, value in found.items()}
    between = f["G1 elementwise"] < f["NS-sigmoid"] < f["baseline"]
    kept = f["G2"] / f["baseline"] >= 0.8
    ordered = f["G1 elementwise"] < min(f["G2"], f["NS-sigmoid"])
    verdict = "reproduced" if between and kept else "direction holds" if ordered else "not reproduced"
    numbers = {
        "first_key": f,
        "g2_over_baseline": round(f["G2"] / f["baseline"], 4),
        "runs": found,
        "setting": _setting(steps),
        "ours": ", ".join(f"{name} {value:.3f}" for name, value in f.items()) + f"; medians of {SEEDS} seeds",
    }
    return write_result("gated", "sparsity-removes-sink", verdict, numbers, seed=seed, out=out)


def _setting(steps: int) -> dict[str, Any]:
    return {
        "length": LENGTH, "batch": BATCH, "steps": steps, "learning_rate": RATE, "dim": DIM, "heads": 1, "seeds": SEEDS,
        "queries_left_out": SKIP, "held_out_sequences": TESTED,
        "parameters": {n: sum(p.numel() for p in model_of(g, 65, 0).parameters()) for n, g in GATES.items()},
    }  # fmt: skip


def main() -> None:
    """Measure the claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims of gated attention.", (measure_sink, measure_sparsity), brief=True)


if __name__ == "__main__":
    main()
