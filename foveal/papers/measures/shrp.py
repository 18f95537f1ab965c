"""SHRP's claims: the two percentages of its abstract by arithmetic and by the real modules, and three small experiments.

Run ``foveal reproduce shrp`` to measure all and write their result files.
"""

from __future__ import annotations

import copy
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...bench.timing import interleaved, speedups
from ...data.digits import digits
from ...layers.shrp import ExpertAttention, PrunedExpertLayer
from ...recipes import shrp
from ...recipes.shrp_cost import Shape
from ...recipes.shrp_usage import Usage, routed
from .results import write_result

WIDTHS, TOKENS = (64, 96, 128), (128, 256, 512)
BERT = Shape()


def _host(shape: Shape = BERT) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(shape.dim, shape.num_heads, shape.ffn, activation="gelu", batch_first=True).eval()


def _pruned(shape: Shape, impl: str = "auto") -> PrunedExpertLayer:
    return ExpertAttention(shape.dim, shape.num_heads, expander=shape.expander, impl=impl).pruned(0).eval()


def measure_parameters(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``parameters-48``: 6 of 12 layers converted, from the formula and from the modules' own counts."""
    rows, worst = {}, 0.0
    full = sum(p.numel() for p in _host().parameters())
    for width in WIDTHS:
        shape = Shape(expander=width)
        small = sum(p.numel() for p in _pruned(shape).parameters())
        counted = 6 * (full - small) / (12 * full)
        worst = max(worst, abs(counted - shape.parameters_cut(6)))
        rows[str(width)] = {
            "encoder_percent_cut": round(100 * counted, 2),
            "with_embeddings_percent_cut": round(100 * shape.parameters_cut(6, embeddings=True), 2),
        }
    ours = rows["96"]["encoder_percent_cut"]
    agrees = worst < 1e-12 and all(48.0 <= r["encoder_percent_cut"] <= 48.7 for r in rows.values())
    numbers = {
        "ours": f"{ours:.1f} % of the encoder at expander width 96 ({rows['96']['with_embeddings_percent_cut']:.1f} % with embeddings)",
        "by_expander_width": rows,
        "formula_against_modules": worst,
        "parameters_per_layer": {"full": full, "pruned_96": BERT.pruned_parameters()},
    }
    verdict = "reproduced" if agrees and int(ours) == 48 else "not reproduced"
    return write_result("shrp", "parameters-48", verdict, numbers, seed=0, out=out)


def counted_macs(layer: nn.Module, tokens: int, dim: int) -> float:
    """Multiply-adds per token that the module's matrix products really do, on one sequence of ``tokens``."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(1, tokens, dim))
    return counter.get_total_flops() / 2 / tokens


def measure_flops(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``flops-11-of-12``: from the formula and from the matrix products that the modules run."""
    rows, worst = {}, 0.0
    for tokens in TOKENS:
        host = _host()
        host.train().requires_grad_(True)  # off its fused path, which the counter cannot look into
        host.dropout1.p = host.dropout2.p = host.dropout.p = host.self_attn.dropout = 0.0
        full = counted_macs(_Explicit(host), tokens, BERT.dim)
        for width in WIDTHS:
            shape = Shape(expander=width)
            small = counted_macs(_pruned(shape, impl="reference"), tokens, BERT.dim)
            left = (1 + 11 * small / full) / 12
            worst = max(worst, abs(left - shape.macs_left(11, tokens)))
            rows[f"{tokens} tokens, width {width}"] = round(100 * left, 2)
    ours = rows["256 tokens, width 96"]
    agrees = worst < 1e-9 and all(11.0 <= value <= 12.1 for value in rows.values())
    numbers = {
        "ours": f"{ours:.1f} % at 256 tokens and expander width 96; {min(rows.values()):.1f} to {max(rows.values()):.1f} % over lengths and widths",
        "percent_left": rows,
        "formula_against_modules": worst,
        "percent_left_if_the_ffn_stayed": round(100 * _with_ffn(256), 1),
    }
    verdict = "reproduced" if agrees and round(ours, 1) == 11.5 else "not reproduced"
    return write_result("shrp", "flops-11-of-12", verdict, numbers, seed=0, out=out)


def _with_ffn(tokens: int) -> float:
    kept = (BERT.pruned_macs(tokens) + 2 * BERT.dim * BERT.ffn) / BERT.full_macs(tokens)
    return (1 + 11 * kept) / 12


class _Explicit(nn.Module):
    """torch's encoder layer with its attention as two visible matrix products."""

    def __init__(self, host: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        a = self.host.self_attn
        q, k, v = (
            F.linear(x, a.in_proj_weight, a.in_proj_bias).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        y = torch.softmax(q @ k.mT / a.head_dim**0.5, -1) @ v
        x = self.host.norm1(x + a.out_proj(y.transpose(1, 2).flatten(2)))
        return self.host.norm2(x + self.host.linear2(F.gelu(self.host.linear1(x))))


# --- time -------------------------------------------------------------------------------------------------------------

LEAST_OF_IDEAL = 0.8


def measure_throughput(
    repeats: int = 5,
    batches: tuple[int, ...] = (1, 4),
    shape: Shape = BERT,
    tokens: int = 128,
    *,
    out: Path | None = None,
) -> dict[str, Any]:
    """Claim ``throughput``: seconds of the encoder with 11 and 6 layers pruned beside the full one, one thread, interleaved."""
    torch.manual_seed(0)
    full, small = _host(shape), _pruned(shape)
    models = {
        n: nn.Sequential(*(copy.deepcopy(small if i < n else full) for i in range(shape.layers))) for n in (0, 6, 11)
    }
    threads, rows = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for batch in batches:
            x = torch.randn(batch, tokens, shape.dim)
            with torch.inference_mode():
                seconds = interleaved({str(n): lambda m=m, x=x: m(x) for n, m in models.items()}, repeats)  # type: ignore[misc]
            fast = speedups(seconds, "0")
            rows[str(batch)] = {f"{n} of 12": round(fast[str(n)].median, 2) for n in (6, 11)}
    finally:
        torch.set_num_threads(threads)
    ideal = {f"{n} of 12": round(1 / shape.macs_left(n, tokens), 2) for n in (6, 11)}
    share = min(row["11 of 12"] for row in rows.values()) / ideal["11 of 12"]
    numbers = {
        "ours": " / ".join(f"{row['11 of 12']:.1f}×" for row in rows.values())
        + f" at batch {' / '.join(rows)} with 11 of 12 layers pruned, encoder alone (ideal {ideal['11 of 12']:.1f}×)",
        "times_faster_by_batch": rows,
        "ideal": ideal,
        "worst_share_of_ideal": round(share, 3),
        "criterion": LEAST_OF_IDEAL,
    }
    verdict = (
        "reproduced"
        if share >= LEAST_OF_IDEAL
        else "direction holds"
        if share * ideal["11 of 12"] > 2
        else "not reproduced"
    )
    return write_result("shrp", "throughput", verdict, numbers, seed=0, out=out)


# --- a small encoder that learns --------------------------------------------------------------------------------------

LENGTH, CLASSES, HELD_OUT, SEEDS = 16, 10, 397, 3
SMALL = Shape(layers=4, dim=128, num_heads=4, ffn=512, expander=96)
STEPS, BATCH = 240, 64


@functools.cache
def pictures() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's real digits as ``(n, 16, 4)`` patches of 2 × 2 pixels with their labels: training, then held out."""
    images, labels, others, their_labels = digits(held_out=HELD_OUT)
    patches = [t.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(1, 3) for t in (images, others)]
    return patches[0], labels, patches[1], their_labels


class Classifier(nn.Module):
    """Patches and places, an encoder of torch's layers, the mean, ten classes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.place = nn.Linear(4, SMALL.dim), nn.Parameter(0.5 * torch.randn(LENGTH, SMALL.dim))
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(SMALL.dim, SMALL.num_heads, SMALL.ffn, 0.0, "gelu", batch_first=True)
                for _ in range(SMALL.layers)
            )
            self.head = nn.Linear(SMALL.dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def train(model: nn.Module, steps: int, seed: int, rate: float = 1e-3) -> None:
    """AdamW with warm-up and linear decay on random batches."""
    x, label, _, _ = pictures()
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        at = torch.randint(len(x), (BATCH,), generator=g)
        loss = F.cross_entropy(model(x[at]), label[at])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the held-out digits."""
    _, _, x, label = pictures()
    return float((model(x).argmax(-1) == label).double().mean())


@functools.cache
def trained(seed: int) -> tuple[float, nn.Module, Usage]:
    """Accuracy of the full model, the converted and trained model (3 of 4 layers), and its usage."""
    model = Classifier(seed)
    train(model, STEPS, seed)
    full = accuracy(model)
    shrp.convert(model, last=3, expander=SMALL.expander)
    train(model, STEPS, seed + 100)
    return full, model, shrp.count_usage(model, [pictures()[0]])


def kept_with(model: nn.Module, usage: Usage, heads: dict[int, int]) -> nn.Module:
    """A copy of ``model`` pruned to the usage's heads, but to ``heads`` in some layers."""
    counts = usage.counts.clone()
    for layer, head in heads.items():
        counts[usage.layers.index(layer), head] = counts.sum() + 1
    other = copy.deepcopy(model)
    shrp.prune(other, Usage(usage.layers, counts, usage.gates))
    return other.eval()


def measure_accuracy(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``accuracy-retained``: accuracy pruned over accuracy of the full model, right after pruning and after more steps."""
    rows: list[dict[str, Any]] = []
    for seed in range(SEEDS):
        full, model, usage = trained(seed)
        one = kept_with(model, usage, {})
        at_once = accuracy(one)
        train(one, STEPS // 3, seed + 200)
        rows.append(
            {"full": full, "routed": accuracy(model), "pruned": at_once, "pruned_and_tuned": accuracy(one),
             "concentration": [round(float(c), 3) for c in usage.concentration]}
        )  # fmt: skip
    kept = [row["pruned"] / row["full"] for row in rows]
    left = SMALL.macs_left(3, LENGTH)
    numbers = {
        "ours": f"{100 * statistics.fmean(kept):.0f} % of the accuracy right after pruning (seeds {', '.join(f'{100 * k:.0f}' for k in kept)} %), "
        f"{100 * left:.0f} % of the encoder's FLOPs; real digits",
        "kept_right_after_pruning": [round(k, 4) for k in kept],
        "kept_after_tuning": [round(row["pruned_and_tuned"] / row["full"], 4) for row in rows],
        "macs_left": round(left, 4),
        "criterion": {"kept_at_least": 0.93, "macs_at_most": 0.4},
        "rows": rows,
        "seeds": SEEDS,
        "steps": {"full": STEPS, "converted": STEPS, "tuning": STEPS // 3},
    }
    verdict = "direction holds" if statistics.fmean(kept) >= 0.93 and left <= 0.4 else "not reproduced"
    return write_result("shrp", "accuracy-retained", verdict, numbers, seed=0, out=out)


def measure_choice(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``usage-picks-a-good-head``: against keeping another head in one layer at a time."""
    rows = []
    for seed in range(SEEDS):
        _, model, usage = trained(seed)
        own = accuracy(kept_with(model, usage, {}))
        best = {layer: int(usage.counts[i].argmax()) for i, layer in enumerate(usage.layers)}
        others = [
            accuracy(kept_with(model, usage, {layer: head}))
            for layer, module in routed(model).items()
            for head in range(module.num_heads)
            if head != best[layer]
        ]
        rows.append({"usage": own, "median_of_others": statistics.median(others), "best_of_others": max(others)})
    wins = sum(row["usage"] >= row["median_of_others"] for row in rows)
    numbers = {
        "ours": f"usage's head is at least the median of the others in {wins} of {SEEDS} seeds",
        "rows": [{k: round(v, 4) for k, v in row.items()} for row in rows],
        "seeds": SEEDS,
        "alternatives_per_seed": 3 * (SMALL.num_heads - 1),
    }
    verdict = "reproduced" if wins == SEEDS else "direction holds" if 2 * wins > SEEDS else "not reproduced"
    return write_result("shrp", "usage-picks-a-good-head", verdict, numbers, seed=0, out=out)
