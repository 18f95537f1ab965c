"""Train the boundary predictor that ships for SmolLM2-135M, and see what it is worth on text that it did not see.

Usage: python benchmarks/train_dhsa_predictor.py [--epochs 3] [--work out/dhsa_predictor] [--weights FILE] [--out FILE]

The packaged text is cut into pieces of 1,024 tokens: most of them train (a checkpoint per epoch in --work; run again to go on),
the rest are held out. Then, per held-out piece of 2,048 tokens and per layer, the same selection at the same density with three
sets of boundaries: predicted, as many chunks of equal length, and equal chunks of 64. Reported is the share of the dense
attention mass that the kept keys hold, exp(lse of the kept − lse of all), averaged over heads and the second half of the rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.bench.results import rounded, write_result
from foveal.core.budget import Budget
from foveal.core.context import SelectContext, Selection
from foveal.data import text
from foveal.hf.load import load_model
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute
from foveal.patterns import DHSA
from foveal.patterns.boundaries import PACKAGED
from foveal.recipes.dhsa import train_boundaries
from foveal.recipes.dhsa_record import Recorded, record_layers

TRAIN, LONG = 1024, 2048
HELD_OUT = 8
"""Held-out pieces of ``LONG`` tokens."""
FIXED = 64
THRESHOLDS = (1.1, -0.5)
"""Logits above which a boundary is set: the authors' value, and a lower one for a model that they did not train on."""


def pieces(ids: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Disjoint training pieces ``(1, TRAIN)`` and held-out pieces ``(1, LONG)``, dealt in an order that depends on the seed."""
    whole = ids[: len(ids) // LONG * LONG].view(-1, 1, LONG)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    train = [half for i in order[HELD_OUT:] for half in whole[i].split(TRAIN, dim=1)]
    return train, [whole[i] for i in order[:HELD_OUT]]


def recall(layer: Recorded, pattern: DHSA, earlier: dict[int, Any], index: int) -> tuple[float, Any]:
    """Mass recall of one layer, and the pattern's state."""
    ctx = SelectContext(base=layer.base, layer_index=index, scale=layer.scale, earlier=earlier)
    layout, state = pattern.select(layer.q, layer.k, ctx, None)
    v = layer.k[..., :1]
    call = AttentionCall(layer.q, layer.k, v, None, layer.base, layer.scale, None, None, True)
    dense, kept = compute(call)[1], compute(call.replace(layout=layout))[1]
    assert dense is not None and kept is not None
    half = layer.base.q_len // 2
    return float((kept - dense)[:, :, half:].exp().mean()), state


def compare(model: Any, held_out: list[Tensor], pattern: DHSA) -> dict[str, Any]:
    """Per kind of boundaries the mean recall, and the paired differences by piece and layer."""
    by_kind: dict[str, list[float]] = {"predicted": [], "equal count": [], f"equal {FIXED}": []}
    bare = replace(pattern, predictor="", predictor_sha256="")
    chunks = []
    for ids in held_out:
        leader: dict[int, Selection] = {}
        for index, layer in enumerate(record_layers(model, ids)):
            got, state = recall(layer, pattern, leader, index)
            leader = leader or {0: Selection(None, state)}
            count = int((state.first < ids.shape[1]).sum())
            by_kind["predicted"].append(got)
            if index == 0:
                chunks.append(count)
            for name, length in (("equal count", max(1, round(ids.shape[1] / count))), (f"equal {FIXED}", FIXED)):
                by_kind[name].append(recall(layer, replace(bare, chunk=length), {}, index)[0])
    gains = [a - b for a, b in zip(by_kind["predicted"], by_kind["equal count"], strict=True)]
    return {
        "recall": {name: statistics.fmean(values) for name, values in by_kind.items()},
        "gain_over_equal_count": statistics.fmean(gains),
        "wins": sum(g > 0 for g in gains),
        "of": len(gains),
        "chunks_per_piece": chunks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--density", type=float, default=0.125)
    parser.add_argument("--judged", type=int, default=HELD_OUT, help="held-out pieces that are judged")
    parser.add_argument("--work", type=Path, default=Path("out/dhsa_predictor"))
    parser.add_argument("--weights", type=Path, default=PACKAGED / "smollm2-135m.safetensors")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dhsa_predictor.json"))
    args = parser.parse_args()
    loaded = load_model("smollm2", dtype="float32", device="cpu")
    train, held_out = pieces(text.tokens(loaded.tokenizer, text.load_text()), args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def progress(step: int, steps: int, loss: float) -> None:
        print(f"step {step} of {steps}: loss {loss:.4f}, {time.perf_counter() - start:.0f} s", flush=True)

    trained = train_boundaries(
        loaded.model, train, epochs=args.epochs, lr=args.lr, seed=args.seed, checkpoint=args.work / "predictor.safetensors",
        progress=progress,
    )  # fmt: skip
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    trained.predictor.save(
        args.weights,
        model=loaded.name,
        text=text.text_name(),
        epochs=str(args.epochs),
        seed=str(args.seed),
        lr=str(args.lr),
    )
    pattern = DHSA.with_predictor(
        args.weights, budget=Budget(density=args.density), q_block=64, local=64, sinks=4, instruction=0
    )
    per_epoch = [trained.losses[i : i + len(train)] for i in range(0, len(trained.losses), len(train))]
    result = {
        "model": loaded.name,
        "text": text.text_name(),
        "settings": {"epochs": args.epochs, "seed": args.seed, "lr": args.lr, "density": args.density, "gap": pattern.gap},
        "train": {"pieces": len(train), "tokens": TRAIN, "loss_by_epoch": [statistics.fmean(x) for x in per_epoch], "positives": trained.positives},
        "held_out": {
            "pieces": args.judged, "tokens": LONG,
            "by_threshold": {str(t): compare(loaded.model, held_out[: args.judged], replace(pattern, threshold=t)) for t in THRESHOLDS},
        },
        "weights_sha256": pattern.predictor_sha256,
    }  # fmt: skip
    print(f"wrote {write_result(args.out, rounded(result))}")


if __name__ == "__main__":
    main()
