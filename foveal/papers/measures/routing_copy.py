"""Routing's claim on copies from far away: routing beside local heads against local heads alone, in a small language model.

Text: a Markov chain of 256 tokens; 8 pairs ``k v`` stand in its first part and again in its last, at least 96 tokens later. Local heads see 16
to 31 tokens back. Every layer's input is shifted by a token (``models.shift``), so that a value knows its key; what is left to
learn is to find it. All models are trained alike, with a curriculum that adds pairs and length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data.synthetic import FIRST, Mixed, distant_values, transitions
from ...layers.routing import Routed, RoutingAttention
from ...models import DecoderLM, Pass, SelfAttention, Shifted
from ...patterns import Pattern
from ...patterns.sliding_window import SlidingWindow
from ...recipes.fit import fit, stage_at
from .results import summary, write_result

DIM, DEPTH, HEADS, LOCAL_HEADS = 64, 2, 4, 2
LOCAL_BLOCK, CLUSTERS, WINDOW = 16, 4, 64
CHAIN, KEYS, VALUES = 32, 16, 16
STAGES = ((150, 56, 2, 40, 2240), (60, 128, 4, 64, 2560), (120, 256, 8, 96, 3072))
"""Curriculum: (steps, length, pairs, gap, tokens per batch)."""
LR, ROWS, SEEDS = 4e-3, 64, 3
ALIKE = 0.01
VOCABULARY = FIRST + CHAIN + KEYS + VALUES


class Routing(nn.Module):
    """A routing layer for the backbones; its centroids and the last result travel in the pass's states."""

    def __init__(self, index: int, seed: int) -> None:
        super().__init__()
        self.index, self.seed = index, seed
        self.layer = RoutingAttention(
            DIM, HEADS, LOCAL_HEADS, clusters=CLUSTERS, window=WINDOW, local_block=LOCAL_BLOCK, decay=0.99, rotary=False
        )

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """``(B, N, DIM)`` in and out; the first call finds centroids by k-means."""
        last = run.states.get(self.index)
        state = last.state if isinstance(last, Routed) else self.layer.fit_state(x, seed=self.seed)
        run.states[self.index] = found = self.layer(x, state)
        return found.out


def hybrid(seed: int) -> DecoderLM:
    """Two routing and two local heads per layer."""
    return DecoderLM(
        VOCABULARY, DIM, DEPTH, HEADS, attention=lambda i: Shifted(DIM, Routing(i, seed), i), seed=seed
    )  # fmt: skip


def plain(seed: int) -> DecoderLM:
    """Four heads per layer under whatever pattern is asked for; slightly more parameters than :func:`hybrid`, which shares keys."""
    return DecoderLM(
        VOCABULARY, DIM, DEPTH, HEADS, attention=lambda i: Shifted(DIM, SelfAttention(DIM, HEADS, i), i), seed=seed
    )  # fmt: skip


def text(step: int, generator: torch.Generator) -> Mixed:
    """The batch of a training step."""
    table = transitions(CHAIN, 4, seed=0)
    _, length, pairs, gap, tokens = STAGES[stage_at(step, [stage[0] for stage in STAGES])]
    return distant_values(tokens // length, length, pairs, gap, generator, table=table, keys=KEYS, values=VALUES)


def losses(
    model: DecoderLM, task: Mixed, pattern: Pattern | None, states: dict[int, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss of copied values and of the chain's tokens, and the clustering loss of the routing layers."""
    ids = task.ids[:, :-1]
    run = model.begin(ids, pattern, states=states)
    each = cross_entropy(model(ids, run=run).transpose(1, 2), task.ids[:, 1:], reduction="none")
    clustering = sum((r.loss for r in states.values() if isinstance(r, Routed)), each.new_zeros(()))
    return each[task.answer[:, 1:]].mean(), each[task.near[:, 1:]].mean(), clustering


def trained(seed: int, method: str) -> dict[str, float]:
    """Losses on fresh text of a model trained as ``"hybrid"`` or ``"local"``."""
    model = hybrid(seed) if method == "hybrid" else plain(seed)
    pattern = SlidingWindow(2 * LOCAL_BLOCK, block=LOCAL_BLOCK) if method == "local" else None
    states: dict[int, Any] = {}

    def loss(step: int, generator: torch.Generator) -> Tensor:
        for index, last in states.items():
            if isinstance(last, Routed):  # the graph of the last step is gone
                states[index] = Routed(last.out.detach(), last.state, last.loss.detach(), last.coverage)
        copied, near, clustering = losses(model, text(step, generator), pattern, states)
        return copied + near + clustering

    fit(model, loss, sum(stage[0] for stage in STAGES), lr=LR, seed=seed)
    _, length, pairs, gap, _ = STAGES[-1]
    table = transitions(CHAIN, 4, seed=0)
    fresh = distant_values(
        ROWS, length, pairs, gap, torch.Generator().manual_seed(1_000_003 + seed), table=table, keys=KEYS, values=VALUES
    )
    with torch.no_grad():
        copied, near, _ = losses(model, fresh, pattern, states)
    return {"copied": float(copied), "other": float(near)}


def measure_copy(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``distant-copy``."""
    runs = {name: [trained(seed, name) for seed in range(seeds)] for name in ("hybrid", "local")}
    rows = {
        name: {kind: summary([run[kind] for run in some]) for kind in ("copied", "other")}
        for name, some in runs.items()
    }
    spread = max(rows["hybrid"]["copied"]["spread"], rows["local"]["copied"]["spread"])
    gain = rows["local"]["copied"]["mean"] - rows["hybrid"]["copied"]["mean"]
    other = rows["hybrid"]["other"]["mean"] / rows["local"]["other"]["mean"] - 1
    numbers = {
        "ours": f"copied tokens {rows['hybrid']['copied']['mean']:.2f} nats hybrid, {rows['local']['copied']['mean']:.2f} local; "
        f"other tokens {100 * other:+.2f} %",
        "loss": rows,
        "other_relative": round(other, 5),
        "parameters": {"hybrid": count(hybrid(0)), "local": count(plain(0))},
        "criterion": f"copied: local − hybrid > spread over seeds; other tokens within {ALIKE}",
        "steps": sum(stage[0] for stage in STAGES),
        "seeds": seeds,
    }
    better, alike = gain > spread, abs(other) <= ALIKE
    verdict = "reproduced" if better and alike else "direction holds" if better else "not reproduced"
    return write_result("routing", "distant-copy", verdict, numbers, seed=0, out=out)


def count(model: nn.Module) -> int:
    """Trained numbers."""
    return sum(p.numel() for p in model.parameters())
