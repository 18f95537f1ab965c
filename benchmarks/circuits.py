"""Patching every head of a model on IOI prompts: seconds, and beside TransformerLens where it is installed.

Usage: python benchmarks/circuits.py [--model smollm2] [--prompts 64] [--peer-heads 12] [--repeats 3] [--out benchmarks/results/circuits.json]

Path patching to the final residual, path patching to the queries of the six strongest movers, activation patching at the end, and
attribution patching, all heads each, float32. TransformerLens (its bridge over the same model, hooks at ``hook_z``) runs the same path patching, one
forward over the whole prompts per head with every other head frozen, for a sample of heads spread over the layers; seconds per head
are compared, and its changes of the logit difference must equal ours. It comes with
``pip install --no-deps transformer_lens`` and the packages that this asks for; without it the result says so.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.bench.results import load_average, rounded, write_result
from foveal.data.pairs import END
from foveal.hf.load import LoadedModel, load_model
from foveal.lens.circuits import build_pairs, names
from foveal.lens.effects import Head, Receivers
from foveal.lens.patching import Comparison, attribute_heads, compare, patch_heads, patch_paths

TARGET_SECONDS = 300.0


def seconds(job: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = job()
    return time.perf_counter() - start, value


def peer(loaded: LoadedModel) -> tuple[Any, str]:
    """TransformerLens over a copy of the model, and its version; or None and why not."""
    try:
        import importlib.metadata

        from transformer_lens import TransformerBridge
    except ImportError as error:
        return (
            None,
            f"TransformerLens cannot be imported ({error}): pip install --no-deps transformer_lens, and what it asks for",
        )
    bridge = TransformerBridge.boot_transformers(
        loaded.name, hf_model=copy.deepcopy(loaded.model), tokenizer=loaded.tokenizer, device="cpu", dtype=torch.float32
    )
    return bridge.eval(), importlib.metadata.version("transformer_lens")


@torch.no_grad()
def peer_records(bridge: Any, c: Comparison) -> list[dict[str, Tensor]]:
    """Head outputs of the clean and the corrupted run by hook name."""
    keep = {hook_name(layer) for layer in range(len(c.clean.z))}
    sides = (c.pairs.clean, c.pairs.corrupt)
    return [dict(bridge.run_with_cache(ids, names_filter=lambda name: name in keep)[1].items()) for ids in sides]


def hook_name(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


@torch.no_grad()
def peer_paths(bridge: Any, c: Comparison, records: list[dict[str, Tensor]], heads: list[Head]) -> Tensor:
    """``(heads, B)`` changes of the logit difference by whole forwards with hooks."""
    clean, corrupt = records
    every, end = torch.arange(len(c.pairs)), c.pairs.place(END)[:, 0]
    out = []
    for layer, head in heads:

        def freeze(z: Tensor, hook: Any, name: str, sender: str = hook_name(layer), head: int = head) -> Tensor:
            kept = clean[name].clone()
            if name == sender:
                kept[every, end, head] = corrupt[name][every, end, head]
            return kept

        logits = bridge.run_with_hooks(c.pairs.clean, fwd_hooks=[(name, partial(freeze, name=name)) for name in clean])[
            every, end
        ]
        out.append(c.difference(logits, every) - c.clean_difference)
    return torch.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--peer-heads", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "circuits.json")
    args = parser.parse_args()
    load = load_average()
    loaded = load_model(args.model, device="cpu", dtype="float32")
    pairs = build_pairs("ioi", loaded.tokenizer, args.prompts)
    first, c = seconds(lambda: compare(loaded.model, pairs))
    bridge, told = peer(loaded)
    records = [] if bridge is None else peer_records(bridge, c)
    sample = c.heads[:: max(1, len(c.heads) // args.peer_heads)][: args.peer_heads]
    patch_paths(c, heads=sample[:1])  # warm-up
    times: dict[str, list[float]] = {}
    movers: list[Head] = []
    theirs = None
    effects = patch_paths(c, heads=sample)
    for turn in range(args.repeats):
        took, effects = seconds(lambda: patch_paths(c))
        times.setdefault("paths to the final residual", []).append(took)
        movers = effects.top(0.02)
        receivers = Receivers("q", tuple(movers))
        jobs: dict[str, Callable[[], Any]] = {
            "paths to the queries of the movers": partial(patch_paths, c, receivers),
            "activation patching at the end": partial(patch_heads, c),
            "attribution patching at the end": partial(attribute_heads, c),
        }
        for name, job in jobs.items():
            times.setdefault(name, []).append(seconds(job)[0])
        if bridge is not None:
            took, theirs = seconds(lambda: peer_paths(bridge, c, records, sample))
            times.setdefault("TransformerLens, sample of heads", []).append(took)
        print(f"{turn + 1}/{args.repeats}", {name: round(values[-1], 1) for name, values in times.items()}, flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    final = median["paths to the final residual"]
    result: dict[str, Any] = {
        "what": "patching of all heads on IOI, float32, medians", "model": loaded.name, "heads": len(c.heads), "prompts": args.prompts,
        "tokens": int(pairs.clean.shape[1]), "two_recorded_runs_seconds": first, "seconds": times, "median_seconds": median,
        "target_seconds": TARGET_SECONDS, "met": final <= TARGET_SECONDS, "movers": names(movers), "transformer_lens": told, "load_before": load,
    }  # fmt: skip
    if theirs is not None:
        ours = torch.stack([effects.change[head] for head in sample])
        each = median["TransformerLens, sample of heads"] / len(sample)
        result["beside_transformer_lens"] = {
            "heads": names(sample), "seconds_per_head": {"foveal": final / len(c.heads), "TransformerLens": each},
            "ratio": each / (final / len(c.heads)), "largest_difference_of_changes": float((ours - theirs.double()).abs().max()),
        }  # fmt: skip
    print(f"wrote {write_result(args.out, rounded(result, 5))}")


if __name__ == "__main__":
    main()
