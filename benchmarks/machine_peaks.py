"""What this machine can do at most: matrix products in float32 and bfloat16, and memory copies.

Usage: python benchmarks/machine_peaks.py [--repeats 15] [--size N] [--out benchmarks/results/machine_peaks.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from foveal.bench.peaks import machine_peaks
from foveal.bench.results import load_average, rounded, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--size", type=int, help="edge of the square matrices")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "machine_peaks.json")
    args = parser.parse_args()
    load = load_average()
    result = {
        "what": "best rates of torch's own operations",
        "load_before": load,
        "cpu": machine_peaks(size=args.size, repeats=args.repeats),
    }
    if torch.cuda.is_available():
        result["cuda"] = machine_peaks("cuda", size=args.size, repeats=args.repeats)
    write_result(args.out, rounded(result))
    for device in ("cpu", "cuda"):
        if isinstance(peaks := result.get(device), dict):
            print(device, ", ".join(f"{name} {value:.0f}" for name, value in peaks.items() if isinstance(value, float)))


if __name__ == "__main__":
    main()
