"""CapImagine's own check: does the mediation audit tell latents that carry the answer from latents that can be bypassed?

Two small decoders on symbol grids with K fed-back latents, alike but for one thing: in the *open* one the answer may attend the picture, in
the *bottleneck* one everything after the prompt is blind to it, so that the vectors Z are the one way. Trained alike, through the latents.
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
from ...lens.mediation import Audit, Effects, Instrument, audit, instrument, latent_effects, probe
from ...recipes.fit import fit
from .command import run_measures
from .results import summary, write_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK = GridTask(cells=6, symbols=8)
DIM, DEPTH, HEADS, STEPS = 64, 2, 4, 4
BATCH, TRAINING, LR, HELD_OUT, SEEDS = 128, 1500, 3e-3, 256, 5


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


def trained(seed: int, bottleneck: bool) -> Chain:
    """A chain whose decoder has learned the task."""
    model = decoder(seed)
    prompt = TASK.cells + 1
    chain = Chain(model, STEPS, (TASK.ask,), (0, prompt) if bottleneck else None, blind="latents")

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = TASK.draw(BATCH, generator)
        return cross_entropy(chain.answer(batch.ids, chain.think(batch.ids)), batch.answer)

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


def one(seed: int) -> tuple[Instrument, dict[str, Any]]:
    """Both models of a seed."""
    found = {name: audited(trained(seed, name == "bottleneck"), seed) for name in ("open", "bottleneck")}
    check = instrument(found["open"][:2], found["bottleneck"][:2])
    told = {
        name: {
            "accuracy": report.clean, "probe": read, "effects": effects.to_json(),
            "corruptions": {n: {"change": c.change, "low": c.low, "high": c.high, "changed": c.changed, "fired": c.fired, "verdict": c.verdict} for n, c in report.corruptions.items()},
            "inter_centered": float(report.centered.inter.mean()), "inter_raw": float(report.raw.inter.mean()),
            "effective_rank": report.raw.rank,
        }
        for name, (report, effects, read) in found.items()
    }  # fmt: skip
    return check, told


def measure_instrument(*, seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``instrument-separates-open-from-bottleneck``; several minutes."""
    runs = [one(seed + i) for i in range(seeds)]
    fields = ("drop_open", "drop_bottleneck", "mediated_open", "mediated_bottleneck", "inter_open", "inter_bottleneck")
    figures = {name: summary([getattr(check, name) for check, _ in runs]) for name in fields}
    met = {name: sum(check.criteria[name] for check, _ in runs) for name in runs[0][0].criteria}
    learned = sum(min(told[m]["accuracy"] for m in told) > 0.9 for _, told in runs)
    numbers = {
        "ours": f"matched noise costs {100 * figures['drop_bottleneck']['mean']:.0f} points in the bottleneck and {100 * figures['drop_open']['mean']:.0f} "
        f"in the open model; mediated {figures['mediated_bottleneck']['mean']:.2f} and {figures['mediated_open']['mean']:.2f}",
        **figures, "criteria_met": met, "both_learned": learned, "seeds": seeds, "steps": TRAINING, "instances": HELD_OUT,
        "per_seed": [told for _, told in runs],
    }  # fmt: skip
    every = all(count == seeds for count in met.values())
    main = (
        met["noise hurts the bottleneck 5 times as much"] >= seeds - 1
        and figures["mediated_bottleneck"]["mean"] > figures["mediated_open"]["mean"]
    )
    verdict = "reproduced" if every else "direction holds" if main else "not reproduced"
    return write_result("capimagine", "instrument-separates-open-from-bottleneck", verdict, numbers, seed=seed, out=out)


if __name__ == "__main__":
    run_measures(__doc__, [measure_instrument], brief=True)
