"""VMoBA's arithmetic: the FLOP formula behind its tables, and how a threshold on similarity becomes a share of pairs kept.

Run ``python -m foveal.papers.measures.vmoba`` to measure both claims and write their result files.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from ...core.base_mask import BaseMask
from ...core.context import SelectContext
from ...core.density import measure
from ...patterns.vmoba import VMoBA
from .results import write_result

DIM, FEED_FORWARD, LAYERS, TEXT = 1536, 8960, 30, 300
"""Wan 2.1 1.3B: width, width of the feed-forward part, layers, text tokens."""
SETTINGS = {
    "33k": ((21, 30, 52), (7, 24, 72)),
    "55k": ((24, 36, 64), (8, 48, 72)),
    "56k": ((36, 30, 52), (12, 24, 36)),
    "76k": ((21, 45, 80), (7, 40, 36)),
}
"""Token grid, and numbers of blocks of the three partitions."""
PRINTED = {
    "full 55k": 705.02,
    "full 56k": 724.97,
    "full 76k": 1246.79,
    "vmoba 55k .19": 248.68,
    "vmoba 56k .18": 248.39,
}
"""The paper's tables, in TFLOPs."""
TAUS = {0.15: 0.13, 0.25: 0.19, 0.35: 0.27, 0.50: 0.39}
BLOCKS, PER_BLOCK, HEAD_DIM, MARGIN, SEEDS = 72, 32, 128, 0.03, 5


def layer_flops(tokens: int, kept: float = 1.0, blocks: int = 0, dim: int = DIM, hidden: int = FEED_FORWARD, text: int = TEXT) -> float:  # fmt: skip
    """FLOPs of one transformer layer forward.

    Args:
        tokens: S, video tokens.
        kept: p, share of the query–key pairs that self-attention computes.
        blocks: C, blocks that every query is scored against; 0 for full attention.
        dim, hidden, text: width, width of the feed-forward part, text tokens of cross-attention.
    """
    own = 8 * tokens * dim**2 + 2 * tokens * dim * blocks + 4 * tokens * dim * kept * tokens
    cross = 4 * tokens * dim**2 + 4 * text * dim**2 + 4 * tokens * text * dim
    return own + cross + 4 * tokens * dim * hidden


def model_teraflops(setting: str, kept: float | None = None) -> float:
    """All layers of one of :data:`SETTINGS`; ``kept`` None is full attention."""
    grid, blocks = SETTINGS[setting]
    tokens = math.prod(grid)
    if kept is None:
        return LAYERS * layer_flops(tokens) / 1e12
    return sum(layer_flops(tokens, kept, blocks[layer % 3]) for layer in range(LAYERS)) / 1e12


def measure_flops(seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``flops-55k``: the formula against the printed rows; full attention to the last digit, VMoBA to its rounded share."""
    found = {name: model_teraflops(name.split()[1]) for name in PRINTED if name.startswith("full")}
    found |= {name: model_teraflops(name.split()[1], float(name.split()[2])) for name in PRINTED if "vmoba" in name}
    exact = all(round(found[name], 2) == value for name, value in PRINTED.items() if name.startswith("full"))
    near = all(round(found[n], 1) == round(PRINTED[n], 1) for n in PRINTED if "vmoba" in n)
    numbers = {
        "ours": f"{found['full 55k']:.2f} and {found['vmoba 55k .19']:.2f} TFLOPs at 55k tokens",
        "teraflops": {name: round(value, 2) for name, value in found.items()},
        "printed": PRINTED,
        "times_fewer_at_55k": round(found["full 55k"] / found["vmoba 55k .19"], 3),
        "full_33k": round(model_teraflops("33k"), 2),
    }
    verdict = "reproduced" if exact and near else "direction holds" if found["vmoba 55k .19"] < found["full 55k"] else "not reproduced"  # fmt: skip
    return write_result("vmoba", "flops-55k", verdict, numbers, seed=seed, out=out)


def kept_share(threshold: float, seed: int) -> float:
    """Share of all pairs kept when queries and block means are Gaussian."""
    g = torch.Generator().manual_seed(seed)
    tokens = BLOCKS * PER_BLOCK
    q = torch.randn(1, 1, tokens, HEAD_DIM, generator=g)
    k = torch.randn(1, 1, BLOCKS, HEAD_DIM, generator=g).repeat_interleave(PER_BLOCK, 2)
    base = BaseMask.build(tokens, tokens, causal=False)
    layout, _ = VMoBA(blocks=((PER_BLOCK,),), threshold=threshold).select(q, k, SelectContext(base))
    return measure(layout, base, 1, 1).density


def measure_threshold(seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``threshold-density``: kept share by threshold. Gaussian gates stand in for a trained model's, so at best the
    direction holds."""
    kept = {tau: sum(kept_share(tau, s) for s in range(seed, seed + seeds)) / seeds for tau in TAUS}
    rising = list(kept.values()) == sorted(kept.values())
    near = all(abs(kept[tau] - paper) <= MARGIN for tau, paper in TAUS.items())
    below = all(share < tau + 1 / BLOCKS for tau, share in kept.items())
    numbers = {
        "ours": "kept " + ", ".join(f"{share:.3f} (τ = {tau})" for tau, share in kept.items()),
        "kept": {str(tau): round(share, 4) for tau, share in kept.items()},
        "paper": {str(tau): share for tau, share in TAUS.items()},
        "monotone": rising,
        "within_margin": near,
        "below_tau_plus_one_block": below,
        "margin": MARGIN,
        "seeds": seeds,
    }
    verdict = "direction holds" if rising and near and below else "not reproduced"
    return write_result("vmoba", "threshold-density", verdict, numbers, seed=seed, out=out)


def main() -> None:
    """Measure both claims; ``--out`` is the folder of result files, by default the source checkout's."""
    parser = argparse.ArgumentParser(description="Measure VMoBA's arithmetic.")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    for result in (measure_flops(out=args.out), measure_threshold(out=args.out)):
        print(f"{result['claim']}: {result['verdict']}  {result['measured']}")


if __name__ == "__main__":
    main()
