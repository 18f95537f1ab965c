"""The printed table of ``foveal compress``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..tune.table import figure

if TYPE_CHECKING:
    from rich.table import Table

_NAMES = {
    "original": "original",
    "routed": "converted, routing",
    "pruned": "right after pruning",
    "tuned": "pruned and trained on",
}


def table(results: Mapping[str, Any]) -> Table:
    """What the sentence vectors are worth at each stage; size and speed in the caption."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    size, speed = results["parameters"], results["speed"]["ratio"]
    caption = (
        f"{size['layers_converted']} of {size['layers']} layers pruned: {figure(size['encoder_cut'], '.1f', ' %', 100.0)} of the layers' parameters and "
        f"{figure(size['whole_cut'], '.1f', ' %', 100.0)} of all gone, {figure(speed['median'], '.2f')}× the throughput "
        f"(quartiles {figure(speed['low'], '.2f')} to {figure(speed['high'], '.2f')})."
    )
    out = Table(
        title=Text(f"{results['model']}: {results['text']['pairs']} pairs of neighbouring sentences", style="bold"), title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, caption=Text(caption, style="dim"), caption_justify="left",
    )  # fmt: skip
    out.add_column("encoder", no_wrap=True)
    for name in ("neighbour first %", "MRR", "MRR kept %", "Spearman with original", "cosine to original"):
        out.add_column(name, justify="right")
    for name, row in results["quality"].items():
        out.add_row(
            _NAMES[name], figure(row["accuracy"], ".1f", "", 100.0), figure(row["mrr"]), figure(row["mrr_kept"], ".1f", "", 100.0),
            figure(row["spearman"]), figure(row["cosine"]),
        )  # fmt: skip
    return out
