"""SmolLM2-135M at a long context, end to end: transformers' own attention, foveal's, and llama.cpp, in turns in one run.

Usage: python benchmarks/smollm2_long.py [--context 8192] [--dtype bfloat16] [--policy policy.json] [--llama PYTHON] [--out FILE]

Prefill: one call over the whole context with a cache, logits of the last token only. Decode: tokens one by one behind a cache that
holds all but ``--decode`` of them, foveal's through the cache of ``foveal run``; the median step. Perplexity: teacher-forced over the last quarter of the context.
llama.cpp runs the same GGUF (4-bit weights) with flash attention and as many threads, in the interpreter that --llama names
(one with ``llama-cpp-python``; default this one); without it its rows are left out and the result says why.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveal
from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import Spread, interleaved, speedups
from foveal.data import text
from foveal.hf.growing import growing_cache
from foveal.hf.load import LoadedModel, load_model, packaged
from foveal.patterns import Dense

TARGETS = {
    "prefill_over_transformers": 2.3,
    "prefill_over_llama_cpp": 2.5,
    "policy_prefill_over_transformers": 3.2,
    "policy_prefill_over_llama_cpp": 3.5,
    "decode_over_transformers": 2.5,
}

LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = Llama(path, n_ctx=context + 8, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    model.reset()
    start = time.perf_counter()
    model.eval(task["prefill"])
    seconds, steps = time.perf_counter() - start, []
    for token in task["decode"]:
        start = time.perf_counter()
        model.eval([token])
        steps.append(time.perf_counter() - start)
    print(json.dumps({"prefill": seconds, "steps": steps}), flush=True)
"""


class LlamaCpp:
    """llama.cpp in an interpreter of its own, so that its library and torch's do not meet."""

    def __init__(self, python: str, context: int, threads: int) -> None:
        path, _ = packaged("smollm2")
        self.process = subprocess.Popen(
            [python, "-c", LLAMA, str(path), str(context), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp ended before it answered")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, prefill: list[int], decode: list[int]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prefill": prefill, "decode": decode}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def llama(python: str, context: int) -> tuple[LlamaCpp | None, str]:
    """The peer and its version, or None and why not."""
    asked = subprocess.run(
        [python, "-c", "import llama_cpp; print(llama_cpp.__version__)"], capture_output=True, text=True
    )
    if asked.returncode:
        return (
            None,
            "llama-cpp-python is not installed: pip install llama-cpp-python, or name an interpreter with --llama",
        )
    return LlamaCpp(python, context, torch.get_num_threads()), asked.stdout.strip()


def under(loaded: LoadedModel, policy: Any) -> Any:
    return foveal.attach(loaded.model, policy) if policy is not None else torch.no_grad()


def prefill(loaded: LoadedModel, ids: Tensor, policy: Any) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode(), under(loaded, policy):
            return loaded.model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def decode(loaded: LoadedModel, ids: Tensor, count: int, policy: Any) -> list[float]:
    """Seconds of every step."""
    steps = []
    with torch.inference_mode(), under(loaded, policy):
        held = None if policy is None else growing_cache(loaded.model)
        cache = loaded.model(
            input_ids=ids[:, :-count], past_key_values=held, use_cache=True, logits_to_keep=1
        ).past_key_values
        for at in range(ids.shape[1] - count, ids.shape[1]):
            start = time.perf_counter()
            loaded.model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            steps.append(time.perf_counter() - start)
    return steps


def perplexity(loaded: LoadedModel, ids: Tensor, policy: Any) -> float:
    count = ids.shape[1] // 4
    with torch.inference_mode(), under(loaded, policy):
        logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
        parts = zip(logits.split(256), ids[0, -count:].split(256), strict=True)
        losses = [torch.nn.functional.cross_entropy(a.float(), b, reduction="sum") for a, b in parts]
    return math.exp(float(torch.stack(losses).sum()) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--decode", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--llama", default=sys.executable)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "smollm2_long.json")
    args = parser.parse_args()
    load = load_average()
    loaded = load_model("smollm2", dtype=args.dtype, device="cpu")
    ids = text.tokens(loaded.tokenizer, text.load_text())[: args.context][None]
    policies: dict[str, Any] = {"transformers": None, "foveal dense": Dense()}
    if args.policy is not None:
        policies["foveal policy"] = foveal.Policy.load(args.policy)
    peer, told = llama(args.llama, args.context)
    tokens = ids[0].tolist()
    jobs: dict[str, Callable[[], Any]] = {name: prefill(loaded, ids, policy) for name, policy in policies.items()}
    if peer is not None:
        jobs["llama.cpp"] = lambda: peer.run(tokens, [])
    for policy in policies.values():  # short warm-up instead of a whole one
        prefill(loaded, ids[:, :512], policy)()
    seconds = interleaved(jobs, args.repeats, warmup=0)
    steps = {name: decode(loaded, ids, args.decode, policy) for name, policy in policies.items()}
    if peer is not None:
        steps["llama.cpp"] = peer.run(tokens[: -args.decode], tokens[-args.decode :])["steps"]
        peer.close()
    losses = {name: perplexity(loaded, ids, policy) for name, policy in policies.items()}
    ratio = {base: speedups(seconds, base) for base in ("transformers", "llama.cpp") if base in seconds}
    step = {name: statistics.median(values) for name, values in steps.items()}
    reached = {
        "prefill_over_transformers": ratio["transformers"]["foveal dense"].median,
        "decode_over_transformers": step["transformers"] / step["foveal dense"],
    }
    if peer is not None:
        reached["prefill_over_llama_cpp"] = ratio["llama.cpp"]["foveal dense"].median
    if args.policy is not None:
        reached["policy_prefill_over_transformers"] = ratio["transformers"]["foveal policy"].median
        if peer is not None:
            reached["policy_prefill_over_llama_cpp"] = ratio["llama.cpp"]["foveal policy"].median
    result = {
        "what": "SmolLM2-135M end to end, medians of runs in turns",
        "context": args.context,
        "dtype": loaded.dtype,
        "llama_cpp": told,
        "prefill_seconds": {name: Spread.of(values).json() for name, values in seconds.items()},
        "prefill_speedup": {base: {n: s.json() for n, s in by.items()} for base, by in ratio.items()},
        "decode_tokens_per_second": {name: 1 / value for name, value in step.items()},
        "perplexity": losses,
        "policy": None if args.policy is None else json.loads(args.policy.read_text()),
        "targets": {
            name: {"target": TARGETS[name], "reached": value, "met": value >= TARGETS[name]}
            for name, value in reached.items()
        },
        "load_before": load,
    }
    for name, values in seconds.items():
        print(
            f"{name:14s} prefill {statistics.median(values):6.1f} s, decode {1 / step[name]:5.1f} tokens/s, ppl {losses.get(name, math.nan):.4f}"
        )
    print(f"wrote {write_result(args.out, rounded(result, 6))}")


if __name__ == "__main__":
    main()
