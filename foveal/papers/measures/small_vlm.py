"""VAR, VHR and CARVE end to end on the small real vision-language model, before and after; needs its trained adapter.

Run ``python -m foveal.papers.measures.small_vlm`` to measure them and write their result files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.scenes import BACKGROUND, Question, Scene, cell_mask, hallucinated, render
from ...models.small_vlm import load_small_vlm
from ...models.vlm import VLM, Reader
from ...recipes.vlm import DESCRIBE, PIXELS, answers, scene_examples
from ...steer import VAR, VHR, apply, carve, find_sink_dims
from ...steer.apply import report
from ...steer.picture import refined_picture
from ...steer.sinks import ENERGY
from .command import run_measures
from .results import sign_test, write_result

COUNT, KINDS = 100, ("colour", "presence", "count", "place")


@functools.cache
def model_and_reader() -> tuple[VLM, Reader]:
    """The shipped model."""
    model, reader, _ = load_small_vlm()
    return model, reader


def asked(count: int, seed: int, kinds: Sequence[str] = KINDS) -> list[tuple[Scene, Question]]:
    """Scenes that training did not see, with one question each, from few shapes to many."""
    found = []
    for most in (2, 5, 8):
        scenes, examples = scene_examples(-(-count // 3), 8_000_003 + 100 * seed + most, most=most)
        for s, e in zip(scenes, examples, strict=True):
            fitting = [q for q in e.asked if q.kind in kinds]
            if fitting and s.word is None:
                found.append((s, fitting[0]))
    return found


def marks(model: VLM, reader: Reader, pairs: Sequence[tuple[Scene, Question]]) -> list[bool]:
    """Which answers are right."""
    said = answers(model, reader, [render(s, PIXELS) for s, _ in pairs], [q.text for _, q in pairs])
    return [a == q.answer for a, (_, q) in zip(said, pairs, strict=True)]


def by_clutter(right: Sequence[bool], pairs: Sequence[tuple[Scene, Question]]) -> dict[str, float]:
    """Accuracy over all questions and by number of shapes."""
    out: dict[str, list[bool]] = {"all": list(right)}
    for good, (s, _) in zip(right, pairs, strict=True):
        size = "1-2 shapes" if len(s.things) < 3 else "3-5 shapes" if len(s.things) < 6 else "6-8 shapes"
        out.setdefault(size, []).append(good)
    return {k: round(sum(v) / len(v), 4) for k, v in sorted(out.items())}


def verdict_of(before: Sequence[bool], after: Sequence[bool]) -> tuple[str, dict[str, Any]]:
    """Better by a sign test at 5 %, only better, or not better."""
    test = sign_test([float(a) - float(b) for a, b in zip(after, before, strict=True)])
    gain = sum(after) - sum(before)
    return (
        "reproduced" if gain > 0 and test["p"] < 0.05 else "direction holds" if gain > 0 else "not reproduced"
    ), test


def measure_var(seed: int = 0, count: int = COUNT, out: Path | None = None) -> dict[str, Any]:
    """Claim ``small-vlm`` of VAR: accuracy before and after, and whether the model has sinks at all."""
    model, reader = model_and_reader()
    pairs = asked(count, seed)
    prompts = [reader.prepare([render(s, PIXELS)], q.text) for s, q in pairs[:5]]
    dims = find_sink_dims(model, prompts, tau=ENERGY, tau_mode="energy")
    before = marks(model, reader, pairs)
    after, changed = before, 0
    if dims:
        with apply(model, VAR(dims=dims, tau=ENERGY, tau_mode="energy", rho=0.5)) as handle:
            after = marks(model, reader, pairs)
            changed = report(handle)[0]["changed"]
    verdict, test = verdict_of(before, after)
    base, steered = by_clutter(before, pairs), by_clutter(after, pairs)
    numbers = {
        "sink_dims": list(dims), "rows_changed": changed, "before": base, "after": steered, "sign_test": test, "questions": len(pairs),
        "ours": f"accuracy {base['all']:.2f} → {steered['all']:.2f}; {changed} (head, row) pairs changed, sink dims {list(dims)}",
    }  # fmt: skip
    return write_result("var", "small-vlm", verdict, numbers, seed=seed, out=out)


def measure_vhr(seed: int = 0, count: int = COUNT, out: Path | None = None) -> dict[str, Any]:
    """Claim ``small-vlm`` of VHR: hallucinated objects in descriptions, before and after, with a paired bootstrap interval."""
    model, reader = model_and_reader()
    scenes = [s for s, _ in asked(count, seed)]
    pictures = [render(s, PIXELS) for s in scenes]
    table, wrong = {}, {}
    for alpha in (1.0, 2.0, 3.0):
        with apply(model, VHR(alpha=alpha)):
            said = answers(model, reader, pictures, [DESCRIBE] * len(scenes), max_new_tokens=48)
        found = hallucinated(list(zip(said, scenes, strict=True)))
        table[f"{alpha:g}"] = {k: round(v, 4) for k, v in found.items()}
        wrong[alpha] = np.array([hallucinated([(a, s)])["chair_s"] for a, s in zip(said, scenes, strict=True)])
    rng = np.random.default_rng(seed)
    change = wrong[2.0] - wrong[1.0]
    drawn = np.sort([change[rng.integers(0, len(change), len(change))].mean() for _ in range(2000)])
    low, high = float(drawn[50]), float(drawn[1949])
    kept = table["2"]["recall"] >= 0.95 * table["1"]["recall"]
    verdict = "reproduced" if high < 0 and kept else "direction holds" if change.mean() < 0 else "not reproduced"
    numbers = {
        "by_alpha": table, "change_of_chair_s": {"mean": round(float(change.mean()), 4), "low": round(low, 4), "high": round(high, 4)},
        "pictures": len(scenes),
        "ours": f"CHAIR_S {table['1']['chair_s']:.2f} → {table['2']['chair_s']:.2f} (α 2), {table['3']['chair_s']:.2f} (α 3); "
        f"recall {table['1']['recall']:.2f} → {table['2']['recall']:.2f}",
    }  # fmt: skip
    return write_result("vhr", "small-vlm", verdict, numbers, seed=seed, out=out)


def measure_carve(seed: int = 0, count: int = COUNT, out: Path | None = None) -> dict[str, Any]:
    """Claim ``small-vlm`` of CARVE: colour questions; base, contrast, raw attention, and an oracle that keeps the right cell."""
    model, reader = model_and_reader()
    pairs = asked(count, seed, ("colour",))
    right: dict[str, list[bool]] = {name: [] for name in ("base", "contrast", "raw", "oracle")}
    for s, q in pairs:
        picture = render(s, PIXELS)
        options: dict[str, Any] = {"general": DESCRIBE, "fill": BACKGROUND, "crop": False, "max_new_tokens": 8}
        found = carve(model, reader, picture, q.text, **options)
        raw = carve(model, reader, picture, q.text, raw=True, **options | {"general": found.general})
        shown, _ = refined_picture(picture, torch.from_numpy(cell_mask(q.about, PIXELS)), fill=BACKGROUND, crop=False)
        oracle = answers(model, reader, [shown], [q.text])[0]
        for name, said in (("base", found.base), ("contrast", found.refined), ("raw", raw.refined), ("oracle", oracle)):
            right[name].append(said == q.answer)
    verdict, test = verdict_of(right["base"], right["contrast"])
    table = {name: by_clutter(marks_, pairs) for name, marks_ in right.items()}
    numbers = {
        "accuracy": table, "contrast_against_base": test, "contrast_against_raw": verdict_of(right["raw"], right["contrast"])[1], "questions": len(pairs),
        "ours": ", ".join(f"{name} {t['all']:.2f}" for name, t in table.items()),
    }  # fmt: skip
    return write_result("carve", "small-vlm", verdict, numbers, seed=seed, out=out)


def main() -> None:
    """Measure the claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures(
        "Measure VAR, VHR and CARVE on the small model.", (measure_var, measure_vhr, measure_carve), brief=True
    )


if __name__ == "__main__":
    main()
