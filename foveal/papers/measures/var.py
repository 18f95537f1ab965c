"""VAR's claims that one core can check: exact recovery, planted sinks, and whether sinks are idle.

Run ``python -m foveal.papers.measures.var`` to measure them and write their result files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.base_mask import BaseMask
from ...hf.interventions import reweighed
from ...kernels.call import AttentionCall
from ...kernels.dispatch import compute
from ...models.vlm import VLM, Reader
from ...steer import VAR, Knockout, apply
from ...steer.planted import PlantedSinks
from ...steer.sinks import sink_values
from . import toy_vlm as toy
from .command import run_measures
from .results import write_result

SHARES, COUNT, SINKS, ROWS = (0.5, 0.7, 0.9), 400, 3, 200


def measure_inverse(rows: int = ROWS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``exact-inverse``: random rows, sinks that had no weight, any share; VAR with transfer 1 gives the rows back."""
    g = torch.Generator().manual_seed(seed)
    worst, sums, hidden_weight = 0.0, 0.0, 0.0
    for _ in range(rows):
        n = int(torch.randint(12, 60, (1,), generator=g))
        image, hidden, sink = (
            torch.zeros(n, dtype=torch.bool),
            torch.rand(n, generator=g) < 0.1,
            torch.zeros(n, dtype=torch.bool),
        )
        image[3 : n - 2] = True
        hidden[[3, 4, 5]] = False
        able = (image & ~hidden).nonzero()[:, 0]
        sink[able[torch.randperm(len(able), generator=g)[:2]]] = True
        content = image & ~sink
        before = (
            torch.randn(n, generator=g, dtype=torch.float64).exp().masked_fill(sink, 1e-290).masked_fill(hidden, 0.0)
        )
        before /= before.sum()
        share = 0.98 * float(torch.rand(1, generator=g))
        planted = torch.where(content, (1 - share) * before, before)
        planted[sink] += share * before[content].sum() / 2
        base = BaseMask.build(1, n, causal=False, valid=~hidden[None])
        k = planted.clamp(min=1e-300).log()[None, None, :, None]
        call = AttentionCall(
            torch.ones(1, 1, 1, 1, dtype=torch.float64),
            k,
            torch.eye(n, dtype=torch.float64)[None, None],
            None,
            base,
            1.0,
        )
        plain, _ = compute(call)
        steer = VAR(sinks=sink, transfer=1.0, rho=0.0, min_mass=0.0)
        found = reweighed(
            call, [steer.step(image[None], sink[None], torch.ones(1, 1, dtype=torch.bool))], None, "auto", plain
        )[0, 0, 0]
        worst = max(worst, float((found - before).abs().max()))
        sums = max(sums, abs(float(found.sum()) - 1))
        hidden_weight = max(hidden_weight, float(found[hidden].abs().max()) if bool(hidden.any()) else 0.0)
    exact = worst < 1e-6 and sums < 1e-6 and hidden_weight == 0
    numbers = {
        "rows": rows, "largest_error": worst, "largest_row_sum_error": sums, "largest_weight_on_masked_keys": hidden_weight,
        "ours": f"largest error {worst:.1e} over {rows} rows; row sums within {sums:.1e}; masked keys {hidden_weight:g}",
    }  # fmt: skip
    return write_result(
        "var", "exact-inverse", "reproduced" if exact else "not reproduced", numbers, seed=seed, out=out
    )


def _scene_set(reader: Reader, count: int, seed: int) -> tuple[dict[str, Tensor], list[str], Tensor, Tensor]:
    """Requests, answers, planted sinks ``(B, N)`` and as many random other image tokens."""
    asked = toy.held_out(count, seed)
    inputs = toy.requests(reader, [(s, q.text) for s, q in asked])
    g = torch.Generator().manual_seed(seed)
    background = torch.stack([toy.background_tokens(s) for s, _ in asked])
    sinks = toy.some(background, SINKS, g)
    others = toy.some(~sinks, SINKS, g)
    return inputs, [q.answer for _, q in asked], toy.marked(inputs, sinks), toy.marked(inputs, others)


def accuracy(model: VLM, inputs: dict[str, Tensor], answers: list[str], interventions: list[Any]) -> float:
    """Share of right answers under interventions."""
    if not interventions:
        return float(toy.right(model, inputs, answers).float().mean())
    with apply(model, interventions):
        return float(toy.right(model, inputs, answers).float().mean())


def measure_planted(steps: int = 0, seed: int = 0, count: int = COUNT, out: Path | None = None) -> dict[str, Any]:
    """Claim ``planted-recovery``: accuracy with planted sinks, and with VAR on top."""
    model, reader = toy.trained(seed, steps or toy.STEPS)
    inputs, answers, sinks, _ = _scene_set(reader, count, seed)
    layers = range(len(model.decoder.model.layers))
    base = accuracy(model, inputs, answers, [])
    table: dict[str, dict[str, float]] = {}
    for share in SHARES:
        planted = PlantedSinks(sinks, share)
        row = {"degraded": accuracy(model, inputs, answers, [planted])}
        for transfer in (0.6, 1.0):
            steer = VAR(sinks=sinks, transfer=transfer, rho=(1 - share) / 2, layers=layers)
            row[f"transfer {transfer:g}"] = accuracy(model, inputs, answers, [planted, steer])
        table[f"{share:g}"] = {k: round(v, 4) for k, v in row.items()}
    hard = table[f"{SHARES[-1]:g}"]
    lost = base - hard["degraded"]
    part, full = ((hard[k] - hard["degraded"]) / lost if lost > 0 else 0.0 for k in ("transfer 0.6", "transfer 1"))
    enough = lost >= 0.15
    verdict = "reproduced" if enough and part >= 0.6 and full >= 0.9 else "not reproduced"
    if verdict == "not reproduced" and lost > 0 and part > 0 and full > 0:
        verdict = "direction holds"
    numbers = {
        "base": round(base, 4), "by_share": table, "recovered_0.6": round(part, 4), "recovered_1": round(full, 4), "questions": count,
        "largest_phi": round(_largest_phi(model, inputs), 3), "largest_possible_phi": round(float(model.config.text_config.hidden_size) ** 0.5, 3),
        "steps": steps or toy.STEPS,
        "ours": f"base {base:.3f}, planted {hard['degraded']:.3f}, VAR {hard['transfer 0.6']:.3f} (p 0.6), {hard['transfer 1']:.3f} (p 1)",
    }  # fmt: skip
    return write_result("var", "planted-recovery", verdict, numbers, seed=seed, out=out)


@torch.no_grad()
def _largest_phi(model: VLM, inputs: dict[str, Tensor]) -> float:
    """Largest φ of any token over all dimensions in any layer: whether the model has massive activations of its own."""
    states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[:-1]
    return max(float(sink_values(x, range(x.shape[-1])).max()) for x in states)


def measure_idle(
    steps: int = 0, seed: int = 0, count: int = COUNT, share: float = 0.7, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``sinks-are-idle``: knock out attention to planted sinks, and to as many random other image tokens."""
    model, reader = toy.trained(seed, steps or toy.STEPS)
    inputs, answers, sinks, others = _scene_set(reader, count, seed)
    planted = PlantedSinks(sinks, share)
    start = accuracy(model, inputs, answers, [planted])
    drops, image = {}, inputs["input_ids"] == toy.WORDS.IMAGE
    for name, keys in (("sinks", sinks), ("random", others)):
        drops[name] = start - accuracy(model, inputs, answers, [planted, Knockout(keys, spare=image)])
    ratio = drops["sinks"] / drops["random"] if drops["random"] > 0 else None
    verdict = "reproduced" if ratio is not None and ratio <= 0.5 else "direction holds" if drops["sinks"] < drops["random"] else "not reproduced"  # fmt: skip
    numbers = {
        "planted_share": share, "accuracy": round(start, 4), "drop": {k: round(v, 4) for k, v in drops.items()},
        "ratio": None if ratio is None else round(ratio, 4), "questions": count, "steps": steps or toy.STEPS,
        "ours": f"drop {drops['sinks']:+.3f} without planted sinks, {drops['random']:+.3f} without as many random tokens",
    }  # fmt: skip
    return write_result("var", "sinks-are-idle", verdict, numbers, seed=seed, out=out)


def main() -> None:
    """Measure the claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims of VAR.", (measure_inverse, measure_planted, measure_idle), brief=True)


if __name__ == "__main__":
    main()
