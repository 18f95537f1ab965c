"""Draw what a pattern keeps: characters for the terminal, a PNG, or one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from rich.console import Group
    from torch import Tensor

    from ..patterns import Pattern
    from ..patterns.picture import Picture

SHADES = " ░▒▓█"
DENSE_VIEW = 64
"""Tokens that the terminal still shows one by one."""
WIDE, HIGH = 64, 32
FIGURE_CELLS = 512


def read_settings(settings: list[str]) -> dict[str, Any]:
    """``["window=64", "budget={\\"density\\": 0.1}", "budget.density=0.1"]`` as JSON fields; raises ``ConfigError``."""
    fields: dict[str, Any] = {}
    for item in settings:
        name, sign, text = item.partition("=")
        if not sign or not name:
            raise ConfigError(f"--set {item!r}; expected FIELD=VALUE, for example --set window=64.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        outer, dot, inner = name.partition(".")
        if dot:
            fields.setdefault(outer, {})[inner] = value
        else:
            fields[name] = value
    return fields


def terminal(pattern: Pattern, picture: Picture, tokens: int, grid: tuple[int, ...] | None) -> Group:
    """Heads one below the other; two rows of tokens share a line, or a shade says how much of a block is kept."""
    from rich.console import Group
    from rich.text import Text

    parts = [Text(str(pattern), style="bold"), Text(facts(picture, tokens))]
    for h, shares in enumerate(picture.shares):
        if len(picture.shares) > 1:
            parts += [Text(), Text(f"head {h}", style="dim")]
        lines = _halves(shares > 0.5) if shares.shape[0] == tokens else _shades(shares)
        parts += [Text(f"│{line}│") for line in lines]
    if picture.query is not None and grid is not None:
        parts += [Text(), Text("keys of the chosen query, on the token grid:", style="dim")]
        for name, layer in slices(picture.query[0], grid):
            parts += [Text(name, style="dim")] if name else []
            parts += [Text("".join("█" if x else "·" for x in row)) for row in layer.tolist()]
    return Group(*parts)


def facts(picture: Picture, tokens: int) -> str:
    """Density in words."""
    density = picture.density
    return f"{tokens:,} tokens, density {density.density:.3f}, tile density {density.tile_density:.3f}"


def slices(kept: Tensor, grid: tuple[int, ...]) -> list[tuple[str, Tensor]]:
    """The keys of one query as named 2-D slices of the token grid; keys beyond the grid (text) are left out."""
    size = math.prod(grid)
    on = kept[:size].view(grid if len(grid) > 1 else (1, *grid))
    if on.dim() == 2:
        return [("", on)]
    flat = on.reshape(-1, *on.shape[-2:])
    return [(f"slice {i}", layer) for i, layer in enumerate(flat) if bool(layer.any())]


def write(path: Path, pattern: Pattern, picture: Picture, tokens: int, grid: tuple[int, ...] | None) -> None:
    """A ``.png`` or a self-contained ``.html``, by the file's ending.

    Raises:
        ConfigError: another ending. UnsupportedError: matplotlib is missing.
    """
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"--out {path} ends in {path.suffix!r}; expected .png or .html.")
    image = png(pattern, picture, tokens, grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(image)
        return
    title, data = html.escape(str(pattern)), base64.b64encode(image).decode()
    body = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        "<style>body{font:16px system-ui;margin:2rem auto;max-width:70rem;padding:0 1rem}img{max-width:100%}"
        "pre{overflow:auto}</style>"
        f"<h1>{title}</h1><p>{html.escape(facts(picture, tokens))}</p>"
        f'<img alt="What {title} keeps, queries down and keys across" src="data:image/png;base64,{data}">'
        f"<pre>{html.escape(json.dumps(pattern.to_json(), indent=2))}</pre></html>\n"
    )
    path.write_text(body, encoding="utf-8")


def png(pattern: Pattern, picture: Picture, tokens: int, grid: tuple[int, ...] | None) -> bytes:
    """The figure: one panel a head, and one a grid slice of the chosen query."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "pictures need matplotlib, which is not installed: pip install 'foveal[report]'."
        ) from None
    panels: list[tuple[str, Tensor, bool]] = [
        (f"head {h}" if len(picture.shares) > 1 else "", shares, True) for h, shares in enumerate(picture.shares)
    ]
    if picture.query is not None and grid is not None:
        panels += [
            (f"chosen query {name}".strip(), layer.double(), False) for name, layer in slices(picture.query[0], grid)
        ]
    across = min(len(panels), 4)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(0.8 + 4.2 * across, 0.9 + 4.2 * down), layout="constrained")
    for i, (name, values, tokens_axes) in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1)
        extent = (0, tokens, tokens, 0) if tokens_axes else None
        axes.imshow(
            values.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=extent, aspect="equal"
        )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("key" if tokens_axes else "")
        axes.set_ylabel("query" if tokens_axes else "")
    figure.suptitle(f"{pattern}\n{facts(picture, tokens)}", fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _halves(kept: Tensor) -> list[str]:
    rows = kept.tolist()
    rows += [[False] * len(rows[0])] * (len(rows) % 2)
    return [
        "".join(" ▄▀█"[2 * a + b] for a, b in zip(*pair, strict=True))
        for pair in zip(rows[::2], rows[1::2], strict=True)
    ]


def _shades(shares: Tensor) -> list[str]:
    level = (shares * (len(SHADES) - 1)).ceil().long().clamp(0, len(SHADES) - 1)
    return ["".join(SHADES[x] for x in row) for row in level.tolist()]
