"""CapImagine's own check: does the mediation audit tell latents that carry the answer from latents that can be bypassed?

Three small decoders on symbol grids with K fed-back latents, trained through the latents and alike but for one thing. In the *open* one the
answer may attend the picture. In the *bottleneck* one everything after the prompt is blind to it, so that the vectors Z are the one way: a
planted effect. The *bypass* one may attend the picture and is trained with the latents of other grids: a planted absence of effect.
Whether the open one uses its latents is found, not planted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.grids import GridTask
from ...lens.chain import Chain
from ...lens.latents import AddNoise, Hook, MatchedNoise, Share, Zero, moments
from ...lens.mediation import CRITERIA, Audit, Effects, Instrument, audit, instrument, latent_effects, probe
from ...recipes.fit import fit
from .command import run_measures
from .results import summary, write_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK = GridTask(cells=6, symbols=8)
DIM, DEPTH, HEADS, STEPS = 64, 2, 4, 4
BATCH, TRAINING, LR, HELD_OUT, SEEDS = 64, 300, 3e-3, 256, 5
MODELS = ("open", "bottleneck", "bypass")


def decoder(seed: int) -> PreTrainedModel:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TASK.vocab_size, hidden_size=DIM, intermediate_size=2 * DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, max_position_embeddings=64,
        )
    )  # fmt: skip


def trained(seed: int, kind: str) -> Chain:
    """A chain whose decoder has learned the task; ``kind`` is one of :data:`MODELS`."""
    model = decoder(seed)
    prompt = TASK.cells + 1
    chain = Chain(model, STEPS, (TASK.ask,), (0, prompt) if kind == "bottleneck" else None, blind="latents")

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = TASK.draw(BATCH, generator)
        z = chain.think(batch.ids)
        return cross_entropy(chain.answer(batch.ids, z.roll(1, 0) if kind == "bypass" else z), batch.answer)

    fit(model, loss, TRAINING, lr=LR, seed=seed)
    return chain


def audited(chain: Chain, seed: int) -> tuple[Audit, Effects, dict[str, float]]:
    """The whole audit on fresh grids, with a probe of the answer from the latents."""
    grids = TASK.draw(HELD_OUT, torch.Generator().manual_seed(1_000_003 + seed))
    with torch.no_grad():
        z = chain.think(grids.ids)
    corruptions: dict[str, Hook] = {
        "matched noise": MatchedNoise(*moments(z), seed=seed), "added noise": AddNoise(float(z.std()), seed), "share": Share(z[0, 0]),
        "zero": Zero(),
    }  # fmt: skip
    report = audit(chain, grids.ids, grids.answer, corruptions, seed=seed)
    other = grids.ids.roll(1, 0)
    read = probe(z.flatten(1), grids.answer, seed=seed)
    told = {"accuracy": read.accuracy, "majority": read.majority, "shuffled": read.shuffled}
    return report, latent_effects(chain, grids.ids, other, grids.answer), told


def one(seed: int) -> tuple[dict[str, Instrument], dict[str, Any]]:
    """All models of a seed: the check of the bottleneck against the open and against the bypass one, and the figures."""
    found = {kind: audited(trained(seed, kind), seed) for kind in MODELS}
    checks = {kind: instrument(found[kind][:2], found["bottleneck"][:2]) for kind in ("open", "bypass")}
    told = {
        kind: {
            "accuracy": report.clean, "probe": read, "effects": effects.to_json(),
            "corruptions": {n: {"change": c.change, "low": c.low, "high": c.high, "changed": c.changed, "fired": c.fired, "verdict": c.verdict} for n, c in report.corruptions.items()},
            "inter": float(report.raw.inter.mean()), "effective_rank": report.raw.rank,
        }
        for kind, (report, effects, read) in found.items()
    }  # fmt: skip
    return checks, told


def measure_instrument(*, seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``instrument-separates-open-from-bottleneck``; several minutes."""
    runs = [one(seed + i) for i in range(seeds)]
    drop = {
        kind: summary([-told[kind]["corruptions"]["matched noise"]["change"] for _, told in runs]) for kind in MODELS
    }
    share = {kind: [told[kind]["effects"]["proportion_mediated"] for _, told in runs] for kind in MODELS}
    mediated = {
        kind: summary([value for value in values if value is not None] or [0.0]) for kind, values in share.items()
    }
    met = {
        kind: {name: sum(checks[kind].criteria[name] for checks, _ in runs) for name in CRITERIA}
        for kind in ("open", "bypass")
    }
    numbers = {
        "ours": "matched noise costs " + ", ".join(f"{100 * drop[kind]['mean']:.0f} points ({kind})" for kind in MODELS)
        + "; mediated " + ", ".join(f"{mediated[kind]['mean']:.2f}" for kind in MODELS),
        "drop": drop, "proportion_mediated": mediated, "criteria_met": met, "seeds": seeds,
        "learned": sum(all(told[kind]["accuracy"] > 0.9 for kind in MODELS) for _, told in runs),
        "steps": TRAINING, "instances": HELD_OUT, "per_seed": [told for _, told in runs],
    }  # fmt: skip
    planted = all(met["bypass"][name] == seeds for name in CRITERIA[:2])
    verdict = (
        "reproduced"
        if all(count == seeds for count in met["open"].values())
        else "direction holds"
        if planted
        else "not reproduced"
    )
    return write_result("capimagine", "instrument-separates-open-from-bottleneck", verdict, numbers, seed=seed, out=out)


if __name__ == "__main__":
    run_measures(__doc__, [measure_instrument], brief=True)
