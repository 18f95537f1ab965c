"""SmolLM2-135M with the C++ kernels through ``foveal.attach``, against transformers' own ``sdpa``: prefill, perplexity, decoding.

Usage: python benchmarks/native_model.py [--length 8192] [--dtype bfloat16] [--repeats 2] [--tokens 16] [--out benchmarks/results/native_model.json]

Both run the same weights on the same text in turns. Perplexity is that of the text's tokens; decoding starts from the whole
prompt's cache and feeds the text's own next tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import foveal
from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import Spread
from foveal.data.text import load_text, need, tokens
from foveal.hf.load import load_model
from foveal.patterns import Dense

TARGETS = {"prefill": 2.3, "decode": 2.5}


def once(model: Any, ids: Tensor, new: Tensor, attached: bool) -> tuple[float, float, float]:
    """Seconds of the prefill, perplexity, and seconds per new token."""
    with foveal.attach(model, Dense(), impl="auto") if attached else contextlib.nullcontext():
        start = time.perf_counter()
        out = model(ids[None], use_cache=True)
        prefill = time.perf_counter() - start
        total = sum(
            float(F.cross_entropy(part.float(), wanted, reduction="sum"))
            for part, wanted in zip(out.logits[0, :-1].split(512), ids[1:].split(512), strict=True)
        )
        cache = out.past_key_values
        start = time.perf_counter()
        for token in new:
            model(token.view(1, 1), past_key_values=cache, use_cache=True)
        step = (time.perf_counter() - start) / max(1, new.numel())
    return prefill, math.exp(total / (ids.numel() - 1)), step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens that are decoded after the prompt")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "native_model.json")
    args = parser.parse_args()
    load = load_average()
    loaded = load_model("smollm2", dtype=args.dtype)
    ids = tokens(loaded.tokenizer, load_text()).view(-1)
    need(ids, args.length + args.tokens)
    prompt, new = ids[: args.length], ids[args.length : args.length + args.tokens]
    found: dict[str, list[tuple[float, float, float]]] = {"sdpa": [], "foveal": []}
    with torch.inference_mode():
        once(loaded.model, prompt[:256], new[:1], True)
        for turn in range(args.repeats):
            for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
                found[name].append(once(loaded.model, prompt, new, name == "foveal"))
    ratios = {
        what: Spread.of([a[at] / b[at] for a, b in zip(found["sdpa"], found["foveal"], strict=True)])
        for what, at in (("prefill", 0), ("decode", 2))
    }
    result = {
        "what": "SmolLM2-135M-Instruct, one prompt: transformers' sdpa and foveal's Dense in turns",
        "length": args.length,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "targets": {
            what: {"target": TARGETS[what], "reached": ratio.median, "met": ratio.median >= TARGETS[what]}
            for what, ratio in ratios.items()
        },
        "times_faster_than_sdpa": {what: ratio.json() for what, ratio in ratios.items()},
        "cases": {
            name: {
                "prefill_seconds": Spread.of([r[0] for r in runs]).json(),
                "perplexity": runs[0][1],
                "decode_tokens_per_second": Spread.of([1 / r[2] for r in runs]).json(),
            }
            for name, runs in found.items()
        },
        "load_before": load,
        "source": loaded.source,
    }
    write_result(args.out, rounded(result, 5))
    for what, ratio in ratios.items():
        print(f"{what}: {ratio.median:.2f}× transformers' sdpa, target {TARGETS[what]}")
    print("perplexity", {name: round(runs[0][1], 4) for name, runs in found.items()})


if __name__ == "__main__":
    main()
