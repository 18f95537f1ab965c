"""Titans' claims that one core can check: the exact chunk form, linear time, and ablations of the memory on recall and overwriting.

Run ``python -m foveal.papers.measures.titans`` to measure them and write their result files.
"""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from ...bench.timing import interleaved, speedups
from ...data.synthetic import FIRST, SEPARATOR, Task, key_values, key_values_vocabulary
from ...kernels.memory_scan import MemoryState, memory_scan
from ...layers.titans import LMM, NeuralMemory
from ...models import DecoderLM, Recurrent
from ...recipes.fit import fit
from .command import run_measures
from .results import write_result

DIM, CHUNK, BATCH, STEPS, RATE, SEEDS = 32, 4, 32, 400, 5e-3, 3
PAIRS, KEYS, VALUES, TESTED = 4, 16, 16, 512
"""Pairs of a recall sequence, sizes of the vocabularies, held-out sequences."""

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "linear memory": {"depth": 1},
    "no convolution": {"conv": 1},
    "no momentum": {"momentum": False},
    "no decay": {"decay": False},
}


def model_of(vocab_size: int, seed: int, **memory: Any) -> DecoderLM:
    """One layer: an LMM of one head and an MLP; torch's own initial weights."""

    def attention(index: int) -> Recurrent:
        fields = {"chunk": CHUNK, "expand": 2.0, **memory}
        return Recurrent(LMM(DIM, persistent=0, memory=NeuralMemory(DIM, **fields)), index)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DecoderLM(vocab_size, DIM, 1, attention=attention, seed=seed)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
                module.reset_parameters()
    return model


def overwriting(batch: int, generator: torch.Generator, keys: int = 4, writes: int = 8) -> Task:
    """``k v k v … ␟ k v k v``: few keys, bound again and again; the last value of each is the answer. Keys come in whole rounds."""
    rounds = writes // keys
    order = torch.rand(batch, rounds + 1, keys, generator=generator).argsort(-1)
    value = torch.randint(VALUES, (batch, rounds, keys), generator=generator)
    ids = torch.full((batch, 2 * (writes + keys) + 1), SEPARATOR)
    ids[:, 0 : 2 * writes : 2] = order[:, :rounds].flatten(1) + FIRST
    ids[:, 1 : 2 * writes : 2] = value.flatten(1) + FIRST + KEYS
    last = torch.zeros_like(value[:, 0]).scatter(1, order[:, -2], value[:, -1])
    ids[:, 2 * writes + 1 :: 2] = order[:, -1] + FIRST
    ids[:, 2 * writes + 2 :: 2] = last.gather(1, order[:, -1]) + FIRST + KEYS
    answer = torch.zeros(ids.shape, dtype=torch.bool)
    answer[:, 2 * writes + 2 :: 2] = True
    return Task(ids, answer)


def recall(batch: int, generator: torch.Generator) -> Task:
    """Every pair is asked for once."""
    return key_values(batch, PAIRS, PAIRS, generator, keys=KEYS, values=VALUES)


@functools.cache
def trained(task: str, variant: str, seed: int, steps: int) -> float:
    """Held-out accuracy of one variant after ``steps`` steps on ``"recall"`` or ``"overwrite"``."""
    draw = {"recall": recall, "overwrite": overwriting}[task]
    model = model_of(key_values_vocabulary(KEYS, VALUES), seed, **VARIANTS[variant])

    def loss(_: int, g: torch.Generator) -> Tensor:
        made = draw(BATCH, g)
        return model.loss(made.ids, made.answer)

    fit(model, loss, steps, lr=RATE, seed=seed)
    made = draw(TESTED, torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        guess = model(made.ids[:, :-1]).argmax(-1)
    return float((guess == made.ids[:, 1:])[made.answer[:, 1:]].float().mean())


def measure_ablation(steps: int = 0, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``ablation``: recall of the full memory against each ablation, and errors after overwriting with and without forgetting."""
    steps = steps or STEPS
    seeds = range(seed, seed + SEEDS)
    accuracy = {name: [trained("recall", name, s, steps) for s in seeds] for name in VARIANTS}
    errors = {name: [1 - trained("overwrite", name, s, steps) for s in seeds] for name in ("full", "no decay")}
    spread = {name: max(values) - min(values) for name, values in accuracy.items()}
    full = mean(accuracy["full"])
    holds = {n: full >= mean(v) - max(spread["full"], spread[n]) for n, v in accuracy.items() if n != "full"}
    gains = {n: full - mean(v) > max(spread["full"], spread[n]) for n, v in accuracy.items() if n != "full"}
    without = mean(errors["no decay"])
    ratio = mean(errors["full"]) / without if without else 1.0
    if all(holds.values()) and all(gains.values()) and ratio <= 0.8:
        verdict = "reproduced"
    else:
        verdict = (
            "direction holds" if all(holds.values()) and (ratio <= 0.8 or any(gains.values())) else "not reproduced"
        )
    numbers = {
        "recall_accuracy": {n: [round(x, 4) for x in v] for n, v in accuracy.items()},
        "full_at_least_ablation_minus_spread": holds,
        "full_better_by_more_than_spread": gains,
        "overwrite_error": {n: [round(x, 4) for x in v] for n, v in errors.items()},
        "overwrite_error_ratio": round(ratio, 4),
        "setting": {
            "dim": DIM, "chunk": CHUNK, "batch": BATCH, "steps": steps, "learning_rate": RATE, "pairs": PAIRS, "keys": KEYS,
            "values": VALUES, "seeds": SEEDS, "layers": 1,
        },
        "ours": "recall "
        + ", ".join(f"{n} {mean(v):.3f}" for n, v in accuracy.items())
        + f"; overwrite error with/without decay {ratio:.2f}; means of {SEEDS} seeds",
    }  # fmt: skip
    return write_result("titans", "ablation", verdict, numbers, seed=seed, out=out)


SHORT, LONG, WARM = 256, 4096, 40


def memory_norms(decay: bool, seed: int, steps: int) -> dict[int, float]:
    """Norm of the memory after SHORT and LONG tokens, trained at SHORT to predict a stream of pairs."""
    model = model_of(key_values_vocabulary(KEYS, VALUES), seed, decay=decay, chunk=16)

    def stream(length: int, g: torch.Generator, batch: int) -> Tensor:
        parts = [recall(batch, g).ids for _ in range(length // (4 * PAIRS) + 1)]
        return torch.cat(parts, 1)[:, :length]

    fit(model, lambda _, g: model.loss(stream(SHORT, g, 4)), steps, lr=RATE, seed=seed)
    ids = stream(LONG, torch.Generator().manual_seed(seed), 1)
    norms = {}
    layer, norm = model.get_submodule("layers.0.attention.layer"), model.get_submodule("layers.0.norm1")
    with torch.no_grad():
        for n in (SHORT, LONG):
            _, state = layer(norm(model.embed(ids[:, :n])))
            norms[n] = float(sum(w.square().sum() for w in state.memory.memory.weights) ** 0.5)
    return norms


def measure_time(repeats: int = 5, steps: int = 0, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``linear-time``: time per token at 16 times the length, and the memory's norm far beyond the training length."""
    steps = steps or WARM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = LMM(64, memory=NeuralMemory(64, 1, chunk=16)).eval()
    x = torch.randn(1, LONG, 64, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        seconds = interleaved({"short": lambda: layer(x[:, :SHORT]), "long": lambda: layer(x)}, repeats)
    ratio = median(b / a for a, b in zip(seconds["short"], seconds["long"], strict=True)) * SHORT / LONG
    norms = {name: memory_norms(decay, seed, steps) for name, decay in (("learned", True), ("none", False))}
    growth = {name: v[LONG] / v[SHORT] for name, v in norms.items()}
    steady = 0.8 <= ratio <= 1.25
    verdict = (
        "reproduced" if steady and growth["learned"] <= 2 else "direction holds" if ratio <= 1.25 else "not reproduced"
    )
    numbers = {
        "time_per_token_long_over_short": round(ratio, 4),
        "lengths": [SHORT, LONG],
        "norm_long_over_short": {n: round(v, 4) for n, v in growth.items()},
        "norms": {n: {str(k): round(x, 4) for k, x in v.items()} for n, v in norms.items()},
        "training_steps": steps,
        "chunk": 16,
        "repeats": repeats,
        "ours": f"time per token × {ratio:.2f} from {SHORT} to {LONG} tokens; norm × {growth['learned']:.2f} with forgetting, × {growth['none']:.2f} without",
    }
    return write_result("titans", "linear-time", verdict, numbers, seed=seed, out=out)


TOLERANCE = 1e-12


def measure_dual(repeats: int = 3, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``dual-form``: largest difference to the sequential rule in float64, and the speed of both at chunk 64."""
    g = torch.Generator().manual_seed(seed)
    tokens, width = 67, 16
    q, k, v = (
        torch.nn.functional.normalize(torch.randn(2, 2, tokens, width, generator=g).double(), dim=-1) for _ in range(3)
    )
    alpha, eta, theta = (scale * torch.rand(2, 2, tokens, generator=g).double() for scale in (0.3, 0.9, 0.1))
    worst = {}
    for name, sizes in (("linear", [(width, width)]), ("two layers", [(2 * width, width), (width, 2 * width)])):
        weights = tuple(torch.randn(2, 2, o, i, generator=g).double() / i**0.5 for o, i in sizes)
        found = 0.0
        for chunk in (1, 3, 4, 5, tokens):
            start = MemoryState.start(weights, chunk)
            a, b = (memory_scan(q, k, v, alpha, eta, theta, start, impl=i) for i in ("chunked", "sequential"))
            pairs = [
                (a.out, b.out),
                *zip(a.state.weights + a.state.momentum, b.state.weights + b.state.momentum, strict=True),
            ]
            found = max(found, *(float((x - y).abs().max()) for x, y in pairs))
        worst[name] = found
    jobs = {impl: partial(_train_step, impl, seed) for impl in ("sequential", "chunked")}
    speed = speedups(interleaved(jobs, repeats), "sequential")["chunked"]
    verdict = "reproduced" if max(worst.values()) <= TOLERANCE else "not reproduced"
    numbers = {
        "largest_difference": worst,
        "tolerance": TOLERANCE,
        "chunk_64_forward_backward_speedup": speed.json(),
        "ours": f"largest difference {max(worst.values()):.1e}; {speed.median:.1f} × faster at chunk 64, forward and backward, on CPU",
    }
    return write_result("titans", "dual-form", verdict, numbers, seed=seed, out=out)


def _train_step(impl: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = (1, 4, 256)
    tokens = [torch.nn.functional.normalize(torch.randn(*shape, 64, generator=g), dim=-1) for _ in range(3)]
    tokens += [scale * torch.rand(shape, generator=g) for scale in (0.1, 0.9, 0.01)]
    weights = [torch.randn(1, 4, o, i, generator=g) / i**0.5 for o, i in ((256, 64), (64, 256))]
    leaves = [t.requires_grad_() for t in (*tokens, *weights)]
    q, k, v, alpha, eta, theta, *start = leaves
    state = MemoryState.start(tuple(start), 64)
    memory_scan(q, k, v, alpha, eta, theta, state, impl=impl).out.sum().backward()  # type: ignore[no-untyped-call]


def main() -> None:
    """Measure the claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims of Titans.", (measure_dual, measure_time, measure_ablation), brief=True)


if __name__ == "__main__":
    main()
