"""EEG-tGAT's claims that a CPU can check: counts and the no-op of the released form, the planted slot, what the ablations gain, what a
split by windows leaks, the dictionary look-up that separates GATv2 from GAT, and equality with PyTorch Geometric.

Run ``python -m foveal.papers.measures.eeg_tgat`` to measure all and write their result files.
"""

from __future__ import annotations

import statistics
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import DataError
from ...data.eeg import planted_slot
from ...data.splits import folds
from ...layers.gatv2 import GATv2
from ...layers.graphs import edges, full_graph
from ...models.affordance import EEGtGAT, Fusion
from ...recipes.classify import accuracy, train_classifier
from .command import run_measures
from .results import write_result

SLOT, SAMPLES, ELECTRODES = (24, 36), 64, 8
TRAIN_TRIALS, TEST_TRIALS, EPOCHS, SEEDS, RATE = 150, 75, 8, 2, 3e-3
LEAK_TRIALS, LEAK_EPOCHS = 50, 10
KEYS, LOOKUP_STEPS = (4, 8, 16), 800


def net(seed: int, fusion: Fusion = "per_node", **options: Any) -> EEGtGAT:
    """The small network of the experiments; initial weights depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EEGtGAT(
            ELECTRODES, SAMPLES, 2, fusion=fusion, filters=(8, 16, 24), kernels=(32, 16, 8), hidden=24, **options
        )


def slot_mass(model: EEGtGAT, x: Tensor) -> float:
    """Share of the importance curve on the planted slot, over its share of the time, on the two electrodes that carry the class.

    Each of the three even kernels makes the curve longer by one, so the slot covers three more places.
    """
    with torch.inference_mode():
        curves = model.look(x).curves
    assert curves is not None
    carrying = curves[:, [2, 5]].mean((0, 1)) if curves.dim() == 3 else curves.mean(0)
    begin, end = SLOT[0], SLOT[1] + 3
    return float(carrying[begin:end].sum()) / ((end - begin) / len(carrying))


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"dropout_mode": "timestep"},
    "GATv2 alone": {"temporal_attention": False, "dropout_mode": "feature_map"},
    "collapsed": {"fusion": "collapsed", "dropout_mode": "timestep"},
}


@cache
def _ablation(
    train_trials: int, test_trials: int, seeds: int, epochs: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Held-out accuracy and slot mass of the variants, seed by seed; two claims read the same runs."""
    scores: dict[str, list[float]] = {k: [] for k in VARIANTS}
    mass: dict[str, list[float]] = {"full": [], "collapsed": [], "full untrained": []}
    for s in range(seed, seed + seeds):
        x, y, trial = planted_slot(train_trials + test_trials, slot=SLOT, samples=SAMPLES, seed=s)
        train = trial < train_trials
        mass["full untrained"].append(slot_mass(net(s).eval(), x[~train][:200]))
        for name, options in VARIANTS.items():
            model = net(s, **options)
            train_classifier(
                model, x[train], y[train], epochs=epochs, lr=RATE, warmup=1, label_smoothing=0.1, weight_decay=1e-3, seed=s
            )  # fmt: skip
            scores[name].append(round(accuracy(model, x[~train], y[~train]), 4))
            if name in mass:
                mass[name].append(slot_mass(model, x[~train]))
    return scores, mass


def _setting(seeds: int, epochs: int) -> dict[str, int]:
    return {
        "train_trials": TRAIN_TRIALS, "test_trials": TEST_TRIALS, "windows_per_trial": 6, "epochs": epochs, "seeds": seeds
    }  # fmt: skip


def measure_gain(seeds: int = SEEDS, epochs: int = EPOCHS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``gain-over-gatv2``: held-out accuracy of the per-node model, of GATv2 alone and of the collapsed model."""
    scores, _ = _ablation(TRAIN_TRIALS, TEST_TRIALS, seeds, epochs, seed)
    means = {k: fmean(v) for k, v in scores.items()}
    spread = {k: statistics.stdev(v) if len(v) > 1 else 0.0 for k, v in scores.items()}
    beats = means["full"] >= means["GATv2 alone"] - spread["full"]
    numbers = {
        "ours": "; ".join(f"{k} {100 * means[k]:.1f} ± {100 * spread[k]:.1f} %" for k in VARIANTS),
        "accuracy": scores,
        "gain_over_gatv2": round(means["full"] - means["GATv2 alone"], 4),
        **_setting(seeds, epochs),
    }
    both = beats and means["full"] >= means["collapsed"]
    verdict = "reproduced" if both else "direction holds" if beats else "not reproduced"
    return write_result("eeg_tgat", "gain-over-gatv2", verdict, numbers, seed=seed, out=out)


def measure_slot(seeds: int = SEEDS, epochs: int = EPOCHS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``time-attention-finds-slot``: share of the importance curve on the slot, over its share of the time."""
    _, mass = _ablation(TRAIN_TRIALS, TEST_TRIALS, seeds, epochs, seed)
    ratio = fmean(mass["full"])
    numbers = {
        "ours": f"per node {ratio:.2f} × uniform, collapsed {fmean(mass['collapsed']):.2f} ×, per node before training {fmean(mass['full untrained']):.2f} ×",
        "mass_over_uniform": {k: [round(a, 3) for a in v] for k, v in mass.items()},
        **_setting(seeds, epochs),
    }
    verdict = "reproduced" if ratio >= 2 else "direction holds" if ratio > 1.1 else "not reproduced"
    return write_result("eeg_tgat", "time-attention-finds-slot", verdict, numbers, seed=seed, out=out)


def measure_leak(
    seeds: int = SEEDS, epochs: int = LEAK_EPOCHS, seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``window-split-leaks``: accuracy with shuffled windows minus that with whole trials held out, with and without offsets."""
    gaps: dict[str, list[float]] = {"with offset": [], "without offset": []}
    scores: dict[str, dict[str, list[float]]] = {k: {"windows": [], "trials": []} for k in gaps}
    for s in range(seed, seed + seeds):
        for name, offset in (("with offset", 2.0), ("without offset", 0.0)):
            x, y, trial = planted_slot(LEAK_TRIALS, slot=SLOT, samples=SAMPLES, offset=offset, burst=2.0, seed=100 + s)
            for kind, grouped in (("windows", False), ("trials", True)):
                train, test = folds(trial, 5, grouped=grouped, seed=s)[0]
                model = net(s)
                train_classifier(model, x[train], y[train], epochs=epochs, batch=32, lr=RATE, warmup=1, seed=s)
                scores[name][kind].append(round(accuracy(model, x[test], y[test]), 4))
            gaps[name].append(scores[name]["windows"][-1] - scores[name]["trials"][-1])
    means = {k: fmean(v) for k, v in gaps.items()}
    error = {k: statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for k, v in gaps.items()}
    numbers = {
        "ours": "; ".join(f"{k} {100 * means[k]:+.1f} ± {100 * error[k]:.1f} points" for k in gaps),
        "gap": {k: [round(a, 4) for a in v] for k, v in gaps.items()},
        "accuracy": scores,
        "trials": LEAK_TRIALS,
        "epochs": epochs,
        "seeds": seeds,
    }
    fires = means["with offset"] > 2 * error["with offset"]
    silent = abs(means["without offset"]) <= 2 * max(error["without offset"], 0.02)
    verdict = "reproduced" if fires and silent else "direction holds" if means["with offset"] > means["without offset"] else "not reproduced"  # fmt: skip
    return write_result("eeg_tgat", "window-split-leaks", verdict, numbers, seed=seed, out=out)


class LookUp(nn.Module):
    """One head over a complete bipartite graph: queries ``(B, K)`` ask keys ``(B, K)``, each with a value, for theirs."""

    def __init__(self, keys: int, kind: Literal["GATv2", "GAT"], width: int = 64) -> None:
        super().__init__()
        self.kind = kind
        self.key, self.value = nn.Embedding(keys, width), nn.Embedding(keys, width)
        self.query = nn.Embedding(keys, width)
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.att, self.att_right = (nn.Parameter(torch.randn(width) / width**0.5) for _ in range(2))
        self.head = nn.Linear(width, keys)

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        left = self.left(self.key(keys) + self.value(values))
        right = self.right(self.query(queries))
        if self.kind == "GATv2":
            scores = nn.functional.leaky_relu(right[:, :, None] + left[:, None], 0.2) @ self.att
        else:  # the two halves are scored apart: every query ranks the keys alike
            scores = nn.functional.leaky_relu((right @ self.att_right)[:, :, None] + (left @ self.att)[:, None], 0.2)
        return self.head(torch.softmax(scores, -1) @ left)


def measure_lookup(steps: int = LOOKUP_STEPS, seeds: int = 2, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``gatv2-dictionary-lookup``: share of queries answered, GATv2 and GAT with one head each."""
    scores: dict[str, list[float]] = {}
    for keys in KEYS:
        for kind in ("GATv2", "GAT"):
            found = scores.setdefault(f"{kind} K={keys}", [])
            for s in range(seed, seed + seeds):
                g = torch.Generator().manual_seed(s)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(s)
                    model = LookUp(keys, kind)  # type: ignore[arg-type]
                optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
                names = torch.arange(keys).expand(64, -1)
                for step in range(steps):
                    optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
                    values = torch.rand(64, keys, generator=g).argsort(1)
                    loss = nn.functional.cross_entropy(model(names, values, names).flatten(0, 1), values.flatten())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                with torch.inference_mode():
                    values = torch.rand(64, keys, generator=g).argsort(1)
                    hit = model(names, values, names).argmax(-1) == values
                found.append(round(float(hit.double().mean()), 4))
    means = {k: fmean(v) for k, v in scores.items()}
    numbers = {
        "ours": "; ".join(f"{k} {100 * v:.1f} %" for k, v in means.items()),
        "answered": scores,
        "steps": steps,
        "seeds": seeds,
    }
    fits = all(means[f"GATv2 K={k}"] > 0.999 for k in KEYS)
    fails = means[f"GAT K={KEYS[-1]}"] < 0.5 and means[f"GAT K={KEYS[-1]}"] < means[f"GAT K={KEYS[0]}"]
    verdict = "reproduced" if fits and fails else "direction holds" if fails else "not reproduced"
    return write_result("eeg_tgat", "gatv2-dictionary-lookup", verdict, numbers, seed=seed, out=out)


def measure_noop(seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``collapsed-graph-is-a-no-op``: weights, gradients and the effect of the graph in the released form at full size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EEGtGAT(15, 256, 2, fusion="collapsed").eval()
    x = torch.randn(4, 15, 256, generator=torch.Generator().manual_seed(seed))
    seen = model.look(x)
    seen.logits.square().sum().backward()
    grads = {
        name: float(p.grad.abs().max())
        for name, p in (
            ("att", model.graph1.att), ("W_r", model.graph1.lin_r.weight), ("W_l", model.graph1.lin_l.weight)
        )
        if p.grad is not None
    }  # fmt: skip
    uneven = float((seen.edges[0] - 1 / 15).abs().max().detach())
    model.adjacency = torch.rand(15, 15, generator=torch.Generator().manual_seed(seed)) > 0.8
    change = float((model(x) - seen.logits).abs().max().detach())
    numbers = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "largest_deviation_from_1/15": uneven,
        "largest_gradient": grads,
        "change_with_another_graph": change,
    }
    nothing = uneven < 1e-6 and grads["att"] < 1e-6 and grads["W_r"] < 1e-6 < grads["W_l"] and change < 1e-5
    verdict = "reproduced" if nothing and numbers["parameters"] == 363_347 else "not reproduced"
    return write_result("eeg_tgat", "collapsed-graph-is-a-no-op", verdict, numbers, seed=seed, out=out)


def measure_geometric(seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``equals-pyg``: largest difference from PyTorch Geometric's ``GATv2Conv`` with the same weights.

    Raises:
        DataError: torch_geometric is not installed.
    """
    try:
        from torch_geometric import __version__
        from torch_geometric.nn import GATv2Conv
    except ImportError as error:
        raise DataError(f"the comparison needs torch_geometric: {error}. pip install --no-deps torch_geometric xxhash") from error  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    differences: dict[str, float] = {}
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "two heads": {"heads": 2},
        "mean of heads": {"heads": 3, "concat": False},
        "shared": {"share_weights": True},
        "residual, no bias": {"residual": True, "bias": False},
        "no loops": {"add_self_loops": False},
        "edges, mean": {"edge_dim": 3},
        "edges, max": {"edge_dim": 3, "fill_value": "max", "heads": 2},
        "edges, number": {"edge_dim": 3, "fill_value": 0.5},
    }
    edge_index = torch.randint(0, 20, (2, 90), generator=g)
    edge_index = edge_index[:, edge_index[1] != 7]  # a node that hears nobody
    for name, options in settings.items():
        theirs, mine = GATv2Conv(6, 5, **options).double(), GATv2(6, 5, **options).double()
        mine.load_state_dict(theirs.state_dict())
        attr = torch.randn(edge_index.shape[1], 3, generator=g, dtype=torch.float64) if "edge_dim" in options else None
        x, results = torch.randn(20, 6, generator=g, dtype=torch.float64), []
        for layer in (theirs, mine):
            given = x.clone().requires_grad_()
            out_, (_, share) = layer(given, edge_index, attr, return_attention_weights=True)
            results.append((out_.detach(), share.detach(), torch.autograd.grad(out_.square().sum(), given)[0]))
        differences[name] = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    theirs, mine = GATv2Conv((6, 4), 5).double(), GATv2((6, 4), 5).double()
    mine.load_state_dict(theirs.state_dict())
    pair = tuple(torch.randn(9, c, generator=g, dtype=torch.float64) for c in (6, 4))
    bipartite = torch.randint(0, 9, (2, 30), generator=g)
    differences["bipartite"] = float((theirs(pair, bipartite) - mine(pair, bipartite)).detach().abs().max())
    theirs, mine = GATv2Conv(6, 5, heads=2).double(), GATv2(6, 5, heads=2).double()
    mine.load_state_dict(theirs.state_dict())
    nodes = torch.randn(3, 8, 6, generator=g, dtype=torch.float64)
    sparse = theirs(nodes.flatten(0, 1), edges(full_graph(8), 3))
    differences["dense form"] = float((mine.dense(nodes)[0].flatten(0, 1) - sparse).detach().abs().max())
    worst = max(differences.values())
    numbers = {"ours": f"largest difference {worst:.1e}", "differences": differences, "criterion": 1e-10, "torch_geometric": __version__}  # fmt: skip
    return write_result("eeg_tgat", "equals-pyg", "reproduced" if worst < 1e-10 else "not reproduced", numbers, seed=seed, out=out)  # fmt: skip


def main() -> None:
    """Measure all claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures(
        "Measure claims of EEG-tGAT.",
        (measure_noop, measure_geometric, measure_lookup, measure_gain, measure_slot, measure_leak),
    )


if __name__ == "__main__":
    main()
