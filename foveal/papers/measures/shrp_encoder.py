"""SHRP on a real sentence encoder: what ``foveal compress minilm`` keeps; about six minutes on two cores.

Training can be interrupted; the next call goes on from the checkpoints in foveal's cache folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...compress import CompressOptions, run_compress
from ...core.cache import cache_dir
from .command import run_measures
from .results import write_result

MODEL, LEAST_KEPT = "minilm", 0.93
"""The encoder, and the share of its mean reciprocal rank that must be left."""


def measure_real_encoder(
    *, seed: int = 0, out: Path | None = None, work: Path | None = None, **changes: Any
) -> dict[str, Any]:
    """Claim ``real-encoder``.

    Args:
        seed: of the run. out: folder of result files. work: folder of the run; default one in foveal's cache.
        changes: options of :class:`foveal.compress.CompressOptions`.
    """
    folder = cache_dir() / f"compress-minilm-{seed}" if work is None else work
    got = run_compress(CompressOptions(**{"model": MODEL, "seed": seed, "out": str(folder), **changes}))
    tuned, at_once, original = (got["quality"][name] for name in ("tuned", "pruned", "original"))
    size, ratio = got["parameters"], got["speed"]["ratio"]
    kept = tuned["mrr_kept"]
    numbers = {
        "ours": f"{100 * kept:.0f} % of the mean reciprocal rank ({tuned['mrr']:.3f} of {original['mrr']:.3f}; right after pruning {at_once['mrr']:.3f}), "
        f"Spearman {tuned['spearman']:.2f} with the original, {100 * size['encoder_cut']:.0f} % fewer parameters in the layers "
        f"({100 * size['whole_cut']:.0f} % of all), {ratio['median']:.2f}× the throughput",
        "criterion": {"mrr_kept_at_least": LEAST_KEPT},
        **{name: got[name] for name in ("quality", "parameters", "macs_left", "speed", "layers", "settings", "text")},
        "model": got["model_info"]["source"],
    }  # fmt: skip
    verdict = "direction holds" if kept >= LEAST_KEPT else "not reproduced"
    return write_result("shrp", "real-encoder", verdict, numbers, seed=seed, out=out)


if __name__ == "__main__":
    run_measures("Measure SHRP on a real encoder.", (measure_real_encoder,), brief=True)
