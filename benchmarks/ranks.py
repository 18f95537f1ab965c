"""Context parallelism over 2 and 4 local ranks: errors, bytes, balance, memory, and a prediction for 96 GPUs.

Usage: python benchmarks/ranks.py [--quick] [--out benchmarks/results/ranks.json]

Every rank computes with one thread. ``memory_4_over_2`` is the peak of a rank among 4 over that among 2 at the same length:
0.5 where memory falls as 1/P.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from foveal.bench.rank_launch import launch
from foveal.bench.results import load_average, rounded, write_result

COUNTS = (2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ranks.json"))
    options = parser.parse_args()
    before, found = load_average(), {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            words = [
                "bench",
                f"--ranks={count}",
                "--timeout=300",
                f"--out={part}",
                *(["--quick"] if options.quick else []),
            ]
            code = launch(count, words, 300)
            if not part.is_file():
                raise SystemExit(code)
            found[str(count)] = json.loads(part.read_text())
            found[str(count)].pop("provenance")
    prediction = found["2"].pop("prediction")
    found["4"].pop("prediction")
    few, many = (found[str(count)]["memory"] for count in COUNTS)
    falls = {name: many[name]["peak_mib"] / few[name]["peak_mib"] for name in few}
    write_result(
        options.out,
        rounded({"load_before": before, "ranks": found, "memory_4_over_2": falls, "prediction": prediction}),
    )


if __name__ == "__main__":
    main()
