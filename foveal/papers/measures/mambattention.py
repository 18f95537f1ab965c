"""MambAttention's claim that arithmetic can check: what the shared attention costs in parameters.

Run ``python -m foveal.papers.measures.mambattention`` to count and write the result file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...models.mambattention import MambAttention
from .results import write_result

COUNTS = {"shared": 2_325_841, "separate": 2_392_913, "none": 2_258_769}
"""By arithmetic from the definition of the network's parts, per kind of attention."""
TABLE = {"shared": 2.33, "none": 2.25}
"""Millions, as Table I prints them."""


def measure_parameters(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``parameter-count``: count the real modules; reproduced when all three counts are exact."""
    found = {}
    for kind in COUNTS:
        with torch.device("meta"):
            model = MambAttention(block={"attention": kind})
        found[kind] = sum(p.numel() for p in model.parameters())
    exact = found == COUNTS
    adds = found["shared"] - found["none"]
    numbers = {
        "ours": f"{found['shared']:,} with shared attention, {found['separate']:,} with separate, {found['none']:,} without",
        "counts": found,
        "derived": COUNTS,
        "attention_share": round(adds / found["shared"], 4),
        "table_millions": TABLE,
        "rounds_to_table": {kind: round(found[kind] / 1e6, 2) == value for kind, value in TABLE.items()},
    }
    verdict = "reproduced" if exact else "direction holds" if 0 < adds < 0.05 * found["shared"] else "not reproduced"
    return write_result("mambattention", "parameter-count", verdict, numbers, seed=0, out=out)


if __name__ == "__main__":
    print(measure_parameters()["measured"]["ours"])
