"""LongCA-bench's context parallelism, measured on two and four local ranks: balance and bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ...bench.rank_launch import launch
from ...core.errors import DataError
from .results import write_result

COUNTS, SEED, TIMEOUT = (2, 4), 0, 300.0


def measured(quick: bool = False) -> dict[int, dict[str, Any]]:
    """The results of ``foveal bench --ranks`` by number of ranks.

    Raises:
        DataError: when ranks ended without a result; they have said why.
    """
    found = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            words = [f"--ranks={count}", f"--timeout={TIMEOUT}", f"--seed={SEED}", f"--out={part}"]
            launch(count, ["bench", *words, *(["--quick"] if quick else [])], TIMEOUT)
            if not part.is_file():
                raise DataError(f"{count} ranks ended without a result; see their messages.")
            found[count] = json.loads(part.read_text())
    return found


def measure_balance(*, out: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Claim ``zigzag-balances``: CPU time of each rank; zig-zag ≤ 1.1 max/mean, contiguous ≥ 0.9·(2P−1)/P."""
    found = {count: result["balance"] for count, result in measured(quick).items()}
    even = all(rows["zigzag"]["max_over_mean"] <= 1.1 for rows in found.values())
    uneven = all(rows["contiguous"]["max_over_mean"] >= 0.9 * (2 * p - 1) / p for p, rows in found.items())
    exact = all(len(set(rows["zigzag"]["pairs"])) == 1 for rows in found.values())
    better = all(rows["zigzag"]["max_over_mean"] < rows["contiguous"]["max_over_mean"] for rows in found.values())
    verdict = "reproduced" if even and uneven and exact else "direction holds" if better else "not reproduced"
    said = "; ".join(
        f"{p} ranks: zig-zag {rows['zigzag']['max_over_mean']:.2f}, contiguous {rows['contiguous']['max_over_mean']:.2f} max/mean"
        for p, rows in found.items()
    )
    numbers = {"ours": said, "ranks": {str(p): rows for p, rows in found.items()}, "pairs_even": exact}
    return write_result("longca_bench", "zigzag-balances", verdict, numbers, seed=SEED, out=out)


def measure_volumes(*, out: Path | None = None, quick: bool = True) -> dict[str, Any]:
    """Claim ``communication-volumes``: bytes counted in the collectives against the formulas, and errors against one process."""
    found = {count: result["exact"] for count, result in measured(quick).items()}
    equal = all(row["equal"] for rows in found.values() for row in rows.values())
    worst = max(row["error"] for rows in found.values() for row in rows.values())
    numbers = {
        "ours": f"counted bytes {'equal' if equal else 'differ from'} the formulas for five methods on 2 and 4 ranks; largest error {worst:.1e}",
        "ranks": {str(p): rows for p, rows in found.items()},
    }
    return write_result(
        "longca_bench",
        "communication-volumes",
        "reproduced" if equal else "not reproduced",
        numbers,
        seed=SEED,
        out=out,
    )
