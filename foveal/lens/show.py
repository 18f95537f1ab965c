"""A profile for the eye: a table for the terminal, heat maps for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import UnsupportedError
from .labels import LABELS
from .profile import LayerProfile
from .stats import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from .model import ModelProfile


def render_profile(profile: ModelProfile) -> Table:
    """One row per layer: means over its heads, and the range of a head's 95 % interval where the figure was sampled."""
    from rich.table import Table

    first = profile.layers[0]
    table = Table(
        title=f"Attention over {profile.tokens} tokens, {first.rows.drawn} sampled rows per head",
        caption=(
            f"Means over heads. sinks: first {first.sinks} tokens; window: last {first.window} tokens; keys 90 %: keys that hold 90 % of a "
            f"row's mass; overlap: shared top-{profile.top} keys with the layer above, beside the overlap of random sets. "
            "± is half of a head's 95 % interval, averaged over heads."
        ),
    )
    for name in ("layer", "sinks", "window", "rest", "distance", "entropy", "keys 90 %", "overlap", "heads"):
        table.add_column(name, justify="left" if name in ("layer", "heads") else "right")
    for i, layer in enumerate(profile.layers):
        counted = Counter(layer.labels)
        heads = ", ".join(f"{counted[name]} {name}" for name in LABELS if counted[name])
        table.add_row(
            layer.layer_name if layer.layer_index < 0 else str(layer.layer_index),
            _percent(layer.sink_mass + layer.learned_sink_mass), _percent(layer.window_mass), _percent(layer.rest_mass),
            _spread(layer.distance, ".0f"), _spread(layer.entropy, ".2f"), _spread(layer.keys90, ".0f"), _neighbour(profile, i), heads,
        )  # fmt: skip
    return table


def _percent(mass: Tensor) -> str:
    return f"{100 * float(mass.mean()):.1f} %"


def _spread(estimate: Estimate, spec: str) -> str:
    mean, half = float(estimate.mean.mean()), float((estimate.high - estimate.low).mean()) / 2
    if mean != mean:
        return "–"
    return f"{mean:{spec}} ± {half:{spec}}" if half else f"{mean:{spec}}"


def _neighbour(profile: ModelProfile, i: int) -> str:
    from .overlap import chance_overlap

    mean = float(profile.overlap.mean[i, i - 1, 0]) if i else float("nan")
    if mean != mean:
        return "–"
    half = float(profile.overlap.high[i, i - 1, 0]) - mean
    return f"{mean:.2f} ± {half:.2f} ({chance_overlap(profile.layers[i]):.2f})"


def plot(profile: ModelProfile) -> Figure:
    """Heat maps of layer × head (entropy, mass on sinks and window, keys for 90 %, distance) and layer × layer overlap.

    Returns:
        A matplotlib ``Figure`` of its own, outside pyplot's state; save it with ``figure.savefig(path)``.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("plots need matplotlib: pip install 'foveal[report]'.") from error
    first = profile.layers[0]
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    _heat(axes[0], profile, lambda p: p.entropy_normalized.mean, "entropy / log(allowed keys)", (0, 1))
    _heat(
        axes[1],
        profile,
        lambda p: p.sink_mass + p.learned_sink_mass,
        f"mass on sinks (first {first.sinks} tokens)",
        (0, 1),
    )
    _heat(axes[2], profile, lambda p: p.window_mass, f"mass on the window (last {first.window} tokens)", (0, 1))
    _heat(axes[3], profile, lambda p: p.keys90_share.mean, "share of keys that hold 90 % of the mass", (0, None))
    _heat(axes[4], profile, lambda p: p.distance.mean, "mean distance (tokens)", (0, None))
    image = axes[5].imshow(
        profile.overlap.mean[..., 0].numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
    )
    axes[5].set(title=f"overlap of top-{profile.top} keys", xlabel="layer", ylabel="layer")
    figure.colorbar(image, ax=axes[5])
    figure.suptitle(f"Attention over {profile.tokens} tokens")
    return figure


def _heat(
    axes: Axes,
    profile: ModelProfile,
    figure_of: Callable[[LayerProfile], Tensor],
    title: str,
    limits: tuple[float, float | None],
) -> None:
    heads = max(layer.num_heads for layer in profile.layers)
    grid = torch.full((len(profile.layers), heads), torch.nan, dtype=torch.float64)
    for i, layer in enumerate(profile.layers):
        grid[i, : layer.num_heads] = figure_of(layer).double()
    image = axes.imshow(
        grid.numpy(), vmin=limits[0], vmax=limits[1], aspect="auto", cmap="viridis", interpolation="nearest"
    )
    axes.set(title=title, xlabel="head", ylabel="layer")
    axes.figure.colorbar(image, ax=axes)
