"""Train Flux's routers on SmolLM2-135M and see what routing is worth on text that training did not see.

Usage: python benchmarks/train_flux_smollm2.py [--tokens 1024] [--steps 120] [--work out/flux_smollm2] [--out FILE]

The routers alone are trained, with `foveal train flux`'s own run (a checkpoint every 20 steps in --work; run again to go on). Then,
on the part of the packaged text that training never saw: invented facts at random depths asked for (answered exactly, greedily, token
by token given the right ones before), and the loss of the last tokens of plain pieces. Judged are dense attention, the sparse pattern
in every layer, the trained routers, and the best fixed assignments of as many sparse layers as routing takes on average: among
--tries random ones, and the layers that the routers made sparse most often.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import foveal
from foveal.bench.results import rounded, write_result
from foveal.data import text
from foveal.hf.load import load_model
from foveal.patterns import Dense, Pattern
from foveal.patterns.flux_router import read_routers
from foveal.policies import Policy, Rule
from foveal.recipes.flux import FluxTraining, RoutedTask
from foveal.recipes.flux_run import HELD_OUT, FluxRun, run_flux, sparse_option
from foveal.recipes.flux_tasks import LOCAL, RETRIEVAL, text_tasks


@torch.inference_mode()
def judge(model: Any, policy: Policy, tasks: list[RoutedTask], samples: int, seed: int) -> dict[str, Any]:
    """Share of facts found, loss of plain text, and by task the share of sparse layers and how often each layer was sparse.

    Each prompt is prefilled by itself, where routers decide; the answer follows through the cache.
    """
    out: dict[str, Any] = {"sparse": {}, "by_layer": {}}
    with foveal.attach(model, policy) as handle:
        static = [not isinstance(policy.rule(i).prefill, Dense) for i in range(handle.num_layers)]
        for task in tasks:
            generator = torch.Generator().manual_seed(7919 + seed)
            hits, losses, layers = [], [], []
            for _ in range(samples):
                batch = task.draw(1, generator)
                prompt, ids = int(batch.prompt[0]), batch.ids.to(model.device)
                first = model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)
                made = handle.decisions()
                layers.append(static if made is None else (~made.full[:, 0]).tolist())
                rest = model(input_ids=ids[:, prompt:], past_key_values=first.past_key_values, use_cache=True)
                logits = torch.cat([first.logits[0], rest.logits[0, :-1]]).float()
                target = ids[0, prompt:]
                hits.append(bool((logits.argmax(-1) == target).all()))
                losses.append(float(torch.nn.functional.cross_entropy(logits, target)))
            out["found" if task.name == RETRIEVAL else "loss"] = statistics.fmean(
                hits if task.name == RETRIEVAL else losses
            )
            if task.name == RETRIEVAL:
                out["answer_loss"] = statistics.fmean(losses)
            often = torch.tensor(layers, dtype=torch.float64).mean(0)
            out["sparse"][task.name], out["by_layer"][task.name] = float(often.mean()), often.tolist()
    return out


def fixed(layers: int, sparse_layers: list[int], sparse: Pattern) -> Policy:
    """These layers sparse, the others dense."""
    return Policy(layers=tuple((i, Rule(sparse if i in sparse_layers else Dense())) for i in range(layers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--pool", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--multiplier-lr", type=float, default=3e-2)
    parser.add_argument("--mode", choices=("soft", "st"), default="st")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=24, help="held-out samples per task")
    parser.add_argument(
        "--tries", type=int, default=4, help="random fixed assignments beside the routers' own favourite"
    )
    parser.add_argument("--work", type=Path, default=Path("out/flux_smollm2"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/flux_smollm2.json"))
    args = parser.parse_args()
    sparse = sparse_option("", args.tokens)
    how = FluxTraining(
        steps=args.steps, chunk=1, pool=args.pool, sparse=sparse, mode=args.mode, lr=args.lr, multiplier_lr=args.multiplier_lr, seed=args.seed
    )  # fmt: skip
    options = FluxRun(args.model, out=str(args.work), tokens=args.tokens, dtype="float32", device="cpu", how=how)
    start = time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        if done % 10 == 0:
            print(f"step {done} of {total}: {what}, {time.perf_counter() - start:.0f} s", flush=True)

    trained = run_flux(options, progress)
    loaded = load_model(args.model, dtype="float32", device="cpu")
    ids = text.tokens(loaded.tokenizer, text.load_text())
    tasks = text_tasks(
        loaded.tokenizer, ids[int(len(ids) * (1 - HELD_OUT)) :], args.tokens, options.targets, options.tail
    )
    layers = read_routers(args.work / "router.safetensors").layers
    rows = {
        "dense": judge(loaded.model, Policy.uniform(Dense()), tasks, args.samples, args.seed),
        "sparse": judge(loaded.model, Policy.uniform(sparse), tasks, args.samples, args.seed),
        "routed": judge(loaded.model, Policy.load(args.work / "policy.json"), tasks, args.samples, args.seed),
    }
    routed = rows["routed"]
    count = round(statistics.fmean(routed["sparse"].values()) * layers)
    often = [statistics.fmean(x) for x in zip(*routed["by_layer"].values(), strict=True)]
    choices = {"favourite": sorted(range(layers), key=lambda i: -often[i])[:count]}
    drawn = random.Random(args.seed)
    choices |= {f"random {n + 1}": sorted(drawn.sample(range(layers), count)) for n in range(args.tries)}
    for name, chosen in choices.items():
        rows[name] = judge(loaded.model, fixed(layers, chosen, sparse), tasks, args.samples, args.seed)
        print(f"{name}: found {rows[name]['found']:.2f}, loss {rows[name]['loss']:.4f}", flush=True)
    result = {
        "model": loaded.name, "text": text.text_name(), "tokens": args.tokens, "samples": args.samples, "training": trained["training"],
        "reached": trained["reached"], "sparse": sparse.to_json(), "sparse_layers_of_fixed": count, "fixed": choices,
        "separation": routed["sparse"][LOCAL] - routed["sparse"][RETRIEVAL],
        "found_over_dense": routed["found"] / rows["dense"]["found"] if rows["dense"]["found"] else None,
        "rows": rows, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    print(f"wrote {write_result(args.out, rounded(result))}")


if __name__ == "__main__":
    main()
