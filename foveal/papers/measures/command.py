"""``python -m foveal.papers.measures.NAME``: measure all claims of one paper."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run_measures(description: str, measures: Sequence[Callable[..., dict[str, Any]]], *, brief: bool = False) -> None:
    """Run the measures with ``--seed`` and ``--out`` and print each verdict.

    Args:
        description: of the command. measures: each is called as ``measure(seed=…, out=…)`` and writes its result file into
            ``out``, by default the source checkout's folder.
        brief: print the one-line figure instead of everything measured.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    for measure in measures:
        result = measure(seed=args.seed, out=args.out)
        measured = result["measured"]
        print(f"{result['claim']}: {result['verdict']}  {measured['ours'] if brief else measured}", flush=True)
