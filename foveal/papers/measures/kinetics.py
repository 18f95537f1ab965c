"""Kinetics' claims that need no generation traces: the cost law's figures, and whether decode time follows FLOPs plus bytes.

Run ``python -m foveal.papers.measures.kinetics`` to measure all and write their result files; ``--smollm2`` prints the fit to
SmolLM2's decode times instead.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bench.timing import interleaved
from ...kernels.dispatch import attention
from ...layers.rotary import rotate
from ...models.blocks import Memory, Pass, SelfAttention
from ...models.decoder_lm import DecoderLM
from ...policies.kinetics import DENSE, MODELS, Method, ModelShape, decode_cost
from ...policies.kinetics_fit import Step, error, fit_times, r_squared, step_work
from .results import write_result

TOP, BLOCK = Method("topk", budget=1024), Method("block_topk", block=16, blocks=64)
GOLDEN: tuple[tuple[str, Method, int, float], ...] = (
    ("8b", DENSE, 1, 11830.46), ("8b", TOP, 1, 1645.20), ("8b", BLOCK, 1, 2006.51), ("0.6b", DENSE, 1, 8985.63),
    ("32b", DENSE, 1, 21773.44), ("14b", DENSE, 8, 104121.56), ("14b", BLOCK, 8, 19264.76),
)  # fmt: skip
"""Qwen3 model, method, trials, TeFLOPs for a prompt of 256 and 16384 tokens, recomputed from the authors' formulas."""
RATIOS = {"0.6b": "182", "8b": "21.5", "32b": "9.6"}
"""(attention + cache) / linear at 8K tokens after a prompt of 128."""


def measure_golden(out: Path | None = None) -> dict[str, Any]:
    """Claim ``cost-model-golden-values``: seven totals and the gain of block top-k."""
    found, worst = {}, 0.0
    for model, method, trials, figure in GOLDEN:
        total = decode_cost(MODELS[f"qwen3-{model}"], method, prompt=256, output=16384, trials=trials).total / 1e12
        found[f"{model}, {method}, n={trials}"] = round(total, 2)
        worst = max(worst, abs(total / figure - 1))
    gain = found["8b, dense, n=1"] / found["8b, block top-k 16×64, n=1"]
    fits = worst <= 1e-4 and round(gain, 2) == 5.90
    numbers = {
        "ours": f"largest relative difference {worst:.1e}; block top-k {gain:.2f}× cheaper than dense",
        "teflops": found,
        "largest_relative_difference": worst,
    }
    return write_result(
        "kinetics", "cost-model-golden-values", "reproduced" if fits else "not reproduced", numbers, seed=0, out=out
    )


def measure_ratios(out: Path | None = None) -> dict[str, Any]:
    """Claim ``kv-dominates``: what attention and cache cost over the parameters, at 8K tokens and as far as 32K."""
    found: dict[str, dict[str, float]] = {}
    for model in ("0.6b", "1.7b", "4b", "8b", "14b", "32b"):
        found[model] = {}
        for tokens in (8192, 16384, 32768):
            cost = decode_cost(MODELS[f"qwen3-{model}"], prompt=128, output=tokens)
            found[model][str(tokens)] = round((cost.total - cost.linear) / cost.linear, 3)
    printed = {m: f"{found[m]['8192']:.{len(figure.partition('.')[2])}f}" for m, figure in RATIOS.items()}
    above = all(f["8192"] > 1 for f in found.values())
    verdict = "reproduced" if printed == RATIOS else "direction holds" if above else "not reproduced"
    numbers = {
        "ours": ", ".join(f"{m} {value}×" for m, value in printed.items()) + " at 8192 tokens",
        "attention_over_linear": found,
    }
    return write_result("kinetics", "kv-dominates", verdict, numbers, seed=0, out=out)


BATCH = 8
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
SIZES = ((128, 2, 4, 4), (256, 4, 4, 2), (256, 4, 8, 8), (512, 4, 8, 2), (512, 8, 8, 4))
"""Of the timed models: dim, depth, query heads, key-value heads."""
R2, ERROR_RATIO, VOCAB = 0.95, 0.5, 512


class InPlace(SelfAttention):
    """One new token that is written into the last place of a full-sized cache. The backbone's own memory is copied at every step:
    bytes that the law does not count."""

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        assert run.memory is not None
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split(sizes, -1))
        turn = run.turn(self.head_dim, self.rope_base)
        keys, values = run.memory.keys[self.layer_index], run.memory.values[self.layer_index]
        keys[:, :, -1:], values[:, :, -1:] = rotate(k, turn), v
        out = attention(rotate(q, turn), keys, values)
        return self.out(out.transpose(1, 2).flatten(2))


def backbone(dim: int, depth: int, heads: int, kv_heads: int, seed: int = 0) -> tuple[DecoderLM, ModelShape]:
    """A decoder of random weights and its shape; parameters without the embedding table, which is looked up and not read."""
    model = DecoderLM(VOCAB, dim, depth, attention=lambda i: InPlace(dim, heads, i, kv_heads), seed=seed).eval()
    parameters = sum(p.numel() for p in model.parameters()) - model.embed.weight.numel()
    return model, ModelShape(
        f"{dim}×{depth}, {heads}/{kv_heads} heads", parameters, depth, heads, kv_heads, dim // heads
    )


def decoder(model: DecoderLM, shape: ModelShape, batch: int, context: int, seed: int = 0) -> Callable[[], Tensor]:
    """One decode step of ``batch`` sequences that see ``context`` keys, the new one included; every call starts from the same cache."""
    g = torch.Generator().manual_seed(seed)
    size = (batch, shape.num_kv_heads, context, shape.head_dim)
    keys, values = ({i: torch.randn(size, generator=g) for i in range(shape.layers)} for _ in range(2))
    ids = torch.randint(VOCAB, (batch, 1), generator=g)
    return partial(decode, model, ids, Memory(keys, values))


def decode(model: DecoderLM, ids: Tensor, cache: Memory) -> Tensor:
    """Logits of the token ``ids`` ``(B, 1)``, whose keys and values take the last place of ``cache``."""
    run = model.begin(ids, memory=Memory({0: cache.keys[0][:, :, :-1]}))
    run.memory = cache
    return model(ids, run=run)


def timed_steps(
    sizes: Sequence[tuple[int, int, int, int]], contexts: Sequence[int], batch: int, repeats: int, seed: int
) -> dict[str, list[Step]]:
    """Model → one step per context, with its median time; bytes are those of the cache and of the weights, float32."""
    out: dict[str, list[Step]] = {}
    for size in sizes:
        model, shape = backbone(*size, seed=seed)
        jobs = {str(c): decoder(model, shape, batch, c, seed) for c in contexts}
        with torch.inference_mode():
            seconds = interleaved(jobs, repeats)
        out[shape.name] = [
            Step(*step_work(shape, batch=batch, context=c, kv_bytes=4, weight_bytes=4), statistics.median(seconds[str(c)]))
            for c in contexts
        ]  # fmt: skip
    return out


def judge(steps: dict[str, list[Step]]) -> tuple[str, dict[str, Any]]:
    """The verdict and its figures: R² of the fit to all, and, model by model, the error on a model that the fit has not seen.

    The single-term fits stand beside it, because FLOPs and bytes of one model are nearly proportional at long contexts.
    """
    every = [s for rows in steps.values() for s in rows]
    fit = fit_times(every)
    held: dict[str, list[float]] = {"both": [], "flops": [], "bytes": []}
    for name, rows in steps.items():
        others = [s for other, seen in steps.items() if other != name for s in seen]
        for kind, terms in (("both", ("flops", "bytes")), ("flops", ("flops",)), ("bytes", ("bytes",))):
            held[kind].append(error(fit_times(others, terms), rows))
    mean = {kind: statistics.fmean(values) for kind, values in held.items()}
    fits, better = fit.r2 >= R2, mean["both"] <= ERROR_RATIO * mean["flops"]
    verdict = (
        "reproduced" if fits and better else "direction holds" if mean["both"] < mean["flops"] else "not reproduced"
    )
    numbers = {
        "ours": f"R² {fit.r2:.3f}; error on a model held out {mean['both']:.2f}, of FLOPs alone {mean['flops']:.2f}",
        "r2": round(fit.r2, 4),
        "gflop_per_s": round(1e-9 / fit.alpha, 2) if fit.alpha else None,
        "gb_per_s": round(1e-9 / fit.beta, 2) if fit.beta else None,
        "r2_flops_only": round(fit_times(every, ("flops",)).r2, 4),
        "r2_bytes_only": round(fit_times(every, ("bytes",)).r2, 4),
        "r2_per_model": {name: round(r_squared(fit, rows), 4) for name, rows in steps.items()},
        "held_out_relative_error": {kind: round(value, 4) for kind, value in mean.items()},
        "criterion": {"r2_at_least": R2, "error_over_flops_only_at_most": ERROR_RATIO},
        "steps": {n: [[s.flops, s.bytes, round(s.seconds, 7)] for s in rows] for n, rows in steps.items()},
    }
    return verdict, numbers


def measure_times(repeats: int = 7, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``bytes-matter-for-time``: decode steps of random-weight models at batch 8, contexts 128 to 8192, float32."""
    verdict, numbers = judge(timed_steps(SIZES, CONTEXTS, BATCH, repeats, seed))
    numbers |= {"batch": BATCH, "contexts": list(CONTEXTS), "repeats": repeats, "threads": torch.get_num_threads()}
    return write_result("kinetics", "bytes-matter-for-time", verdict, numbers, seed=seed, out=out)


def smollm2_steps(contexts: Sequence[int] = (128, 512, 2048), batches: Sequence[int] = (1, 4, 8), repeats: int = 5) -> list[Step]:  # fmt: skip
    """Decode steps of SmolLM2 (float32) over caches of random keys and values, per batch and context; decides no claim."""
    from ...hf.growing import growing_cache
    from ...hf.load import load_model

    model, shape = load_model("smollm2", dtype="float32", device="cpu").model, MODELS["smollm2-135m"]
    g = torch.Generator().manual_seed(0)

    def step(ids: Tensor, cache: Any) -> Tensor:
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)  # the next call starts from the same cache
        return logits

    jobs: dict[str, Callable[[], Tensor]] = {}
    work = {}
    with torch.inference_mode():
        for batch in batches:
            for context in contexts:
                cache = growing_cache(model)
                assert cache is not None  # SmolLM2 takes a dynamic cache
                size = (batch, shape.num_kv_heads, context - 1, shape.head_dim)
                for layer in range(shape.layers):
                    cache.update(torch.randn(size, generator=g), torch.randn(size, generator=g), layer)
                name = f"{batch} × {context}"
                jobs[name] = partial(step, torch.full((batch, 1), 9), cache)
                work[name] = step_work(shape, batch=batch, context=context, kv_bytes=4, weight_bytes=4)
        seconds = interleaved(jobs, repeats)
    return [Step(*work[name], statistics.median(values)) for name, values in seconds.items()]


def main() -> None:
    """Measure all claims; ``--out`` is the folder of result files, by default the source checkout's."""
    parser = argparse.ArgumentParser(description="Measure claims of Kinetics.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smollm2", action="store_true", help="fit SmolLM2's decode times and write nothing")
    args = parser.parse_args()
    if args.smollm2:
        steps = smollm2_steps()
        print(fit_times(steps), *steps, sep="\n")
        return
    for measure in (measure_golden, measure_ratios, partial(measure_times, seed=args.seed)):
        result = measure(out=args.out)
        print(f"{result['claim']}: {result['verdict']}  {result['measured']['ours']}")


if __name__ == "__main__":
    main()
