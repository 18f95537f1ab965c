"""What profiling a model costs: time beside one dense prefill, and memory as the context grows.

Usage: python benchmarks/profile_cost.py [--model smollm2] [--context 4096] [--repeats 5] [--out benchmarks/results/profile_cost.json]

Time: the model's dense prefill by transformers' own sdpa (no language-model head, no cache) and ``profile_model`` on the same
tokens, in turns; the ratio of each pair is taken and the median reported. The dense prefill is part of both.
Memory: in a fresh process per length, the peak that profiling one attention layer of the model's shape adds, beside the size
of its q and k; and in two more the peaks that a whole prefill and a whole profile add to the loaded model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.bench.memory import PeakMemory
from foveal.core.provenance import provenance
from foveal.data import text
from foveal.hf.load import LoadedModel, load_model
from foveal.lens import profile_attention, profile_model

TARGET = 2.0
LAYER_LENGTHS = (4096, 8192, 16384)


def loaded(name: str, context: int) -> tuple[LoadedModel, Tensor]:
    model = load_model(name, device="cpu")
    ids = text.tokens(model.tokenizer, text.load_text()).flatten()
    text.need(ids, context)
    return model, ids[None, :context]


def prefill(model: LoadedModel, ids: Tensor) -> Callable[[], Any]:
    body = model.model.base_model
    assert model.model.config._attn_implementation == "sdpa"

    def run() -> Any:
        with torch.no_grad():
            return body(input_ids=ids, use_cache=False)

    return run


def measure_time(model: LoadedModel, ids: Tensor, repeats: int) -> dict[str, Any]:
    """Dense and profiled runs in turns, after one small warm-up of each."""
    dense = prefill(model, ids)
    jobs = {"dense": dense, "profile": lambda: profile_model(model.model, ids)}
    prefill(model, ids[:, :256])()
    profile_model(model.model, ids[:, :256])
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats):
        for name in list(jobs)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - start)
            print(f"{turn + 1}/{repeats} {name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    ratios = [p / d for p, d in zip(seconds["profile"], seconds["dense"], strict=True)]
    return {
        "dense_prefill_s": seconds["dense"],
        "profile_s": seconds["profile"],
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "target": TARGET,
        "met": statistics.median(ratios) <= TARGET,
    }


def child(args: argparse.Namespace) -> dict[str, float]:
    """One memory measurement, alone in its process."""
    if args.child == "layer":
        heads, kv_heads, dim = args.shape
        generator = torch.Generator().manual_seed(0)
        small = [torch.randn(1, h, 256, dim, generator=generator) for h in (heads, kv_heads)]
        profile_attention(*small)  # loads what it needs
        q, k = (torch.randn(1, h, args.context, dim, generator=generator) for h in (heads, kv_heads))
        with PeakMemory() as peak:
            profile_attention(q, k)
        inputs = (q.numel() + k.numel()) * q.element_size() / 2**20
        added = peak.extra_mb
        scores = heads * args.context**2 * q.element_size() / 2**20
        return {
            "context": args.context,
            "q_and_k_mb": inputs,
            "added_mb": added,
            "times_q_and_k": added / inputs,
            "full_scores_mb": scores,
        }
    model, ids = loaded(args.model, args.context)
    profile_model(model.model, ids[:, :256])
    with PeakMemory() as peak:
        if args.child == "dense":
            prefill(model, ids)()
        else:
            profile_model(model.model, ids)
    return {"context": args.context, "added_mb": peak.extra_mb}


def alone(kind: str, model: str, context: int, shape: tuple[int, int, int]) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--child",
        kind,
        "--model",
        model,
        "--context",
        str(context),
        "--shape",
        *map(str, shape),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "profile_cost.json")
    parser.add_argument("--child", choices=("layer", "dense", "profile"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=3, default=(9, 3, 64), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return
    model, ids = loaded(args.model, args.context)
    config = model.model.config
    heads = config.num_attention_heads
    shape = (
        heads,
        getattr(config, "num_key_value_heads", heads),
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    result = {
        "what": "cost of foveal.lens.profile_model beside one dense prefill by transformers' sdpa",
        "model": {"name": model.name, "source": model.source, "fingerprint": model.fingerprint, "dtype": model.dtype},
        "text": text.text_name(),
        "context": args.context,
        "settings": {"rows": 256, "window": 128, "sinks": 4, "top": 64},
        "load_average_before": os.getloadavg()[0],  # other work on the machine slows the two unequally
        "time": measure_time(model, ids, args.repeats),
    }
    del model
    result["memory"] = {
        "layer": [alone("layer", args.model, n, shape) for n in LAYER_LENGTHS],
        "dense_prefill": alone("dense", args.model, args.context, shape),
        "profile": alone("profile", args.model, args.context, shape),
    }
    result["provenance"] = provenance()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    time_, layers = result["time"], result["memory"]["layer"]
    print(f"profile / dense prefill: {time_['ratio']:.2f} (target at most {TARGET})")
    for layer in layers:
        print(
            f"{layer['context']:6d} tokens: {layer['added_mb']:.0f} MiB beside q and k of {layer['q_and_k_mb']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
