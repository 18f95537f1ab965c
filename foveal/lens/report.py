"""The report of ``foveal inspect``: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..core.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from .survey import Survey

MOST_LOST = 40


def report_data(
    found: Survey, tokens: Sequence[str], about: Mapping[str, Any], circuits: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that the page draws, as JSON values; long arrays as base64.

    Args:
        tokens: the text of every token. about: ``model``, ``text`` and other facts for the head of the page and its foot; may hold
            ``labels``, one word per layer and head, and ``policy``, the name of what was compared.
        circuits: from :func:`foveal.lens.circuit_survey.page_data`, where they were asked for.
    """
    from .survey import head_figures, token_figures

    rec, rhythm = found.recording, found.rhythm
    atlas = rec["atlas"]
    edges = {part: rec[f"edges.{part}"].values for part in ("weight", "query", "key")}
    data: dict[str, Any] = {
        "about": {k: v for k, v in about.items() if k != "labels"},
        "layers": rec.layers,
        "heads": atlas.shape[1],
        "labels": about.get("labels"),
        "tokens": list(tokens),
        "figures": {name: pack(values) for name, values in token_figures(found).items()},
        "head_figures": {name: _rows(values) for name, values in head_figures(found).items()},
        "preplan": rhythm.preplan.tolist(),
        "anchors": rhythm.anchors.tolist(),
        "local": [list(h) for h in rhythm.heads.local],
        "global": [list(h) for h in rhythm.heads.far],
        "atlas": {
            "cells": atlas.shape[-1],
            "size": (atlas.labels("key_cell")[1] if atlas.shape[-1] > 1 else len(tokens)),
            "values": base64.b64encode(shades(atlas.values.double().nan_to_num(0.0).numpy()).tobytes()).decode(),
        },
        "edges": {
            "weight": pack(edges["weight"].nan_to_num(0.0).numpy()),
            "query": pack(edges["query"].numpy(), "<i4"),
            "key": pack(edges["key"].numpy(), "<i4"),
            "count": edges["weight"].shape[-1],
        },
        "sinks": {
            "primary": None if found.sinks.primary is None else _plain(found.sinks.primary),
            "found": [_plain(s) for s in sorted(found.sinks.found, key=lambda s: (s.label != "secondary", -s.lifetime))[:50]],
            "first_key": [_number(f.share) for f in found.attention],
            "uniform": _number(found.attention[0].uniform),
            "largest": [_number(v) for v in found.activations.largest],
            "token": list(found.activations.token),
        },
        "lost": None,
        "circuits": circuits,
    }  # fmt: skip
    if found.compared is not None:
        data["lost"] = _lost(found)
    return data


def _lost(found: Survey) -> dict[str, Any]:
    assert found.compared is not None
    weight, query, key = (found.compared[f"lost.{part}"].values for part in ("weight", "query", "key"))
    flat = weight.nan_to_num(-1.0).flatten()
    best = flat.topk(min(MOST_LOST, flat.numel()))
    heads, count = weight.shape[1:]
    rows = []
    for w, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if w > 0:
            layer, head = found.compared.layers[i // (heads * count)], i // count % heads
            rows.append([layer, head, int(query.flatten()[i]), int(key.flatten()[i]), _number(w)])
    mass = found.compared["lost.mass"].values.nanmean(-1)
    return {
        "edges": rows,
        "by_layer": [_number(v) for v in mass.nanmean(-1).tolist()],
        "mean": _number(float(mass.nanmean())),
    }


def shades(values: np.ndarray) -> np.ndarray:
    """Weights in [0, 1] as bytes; the square root keeps small ones apart: ``weight ≈ (byte / 255)²``."""
    return np.round(255 * np.sqrt(np.clip(values, 0, 1))).astype(np.uint8)


def pack(values: np.ndarray, kind: str = "<f4") -> str:
    """Base64 of little-endian numbers, row by row."""
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _plain(item: Any) -> dict[str, Any]:
    """A dataclass's fields, numbers that are not finite as None."""
    return {k: _number(v) if isinstance(v, float) else v for k, v in vars(item).items()}


def _rows(values: np.ndarray) -> list[list[float | None]]:
    return [[_number(v) for v in row] for row in values]


def render_report(data: Mapping[str, Any]) -> str:
    """The page for :func:`report_data`.

    Raises:
        UnsupportedError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UnsupportedError("reports need jinja2: pip install 'foveal[report]'.") from error
    environment = Environment(
        loader=PackageLoader("foveal.lens"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return environment.get_template("inspect.html.j2").render(d=data, data=text, headline=headline(data))


def headline(data: Mapping[str, Any]) -> str:
    """The page's first sentence."""
    primary, lost = data["sinks"]["primary"], data["lost"]
    if lost is not None:
        return f"The policy drops {100 * (lost['mean'] or 0):.1f} % of the dense attention."
    share = [v for v in data["sinks"]["first_key"] if v is not None]
    mean = 100 * sum(share) / len(share)
    if primary is None:
        return f"{mean:.0f} % of the attention goes to the first token; no token's residual stream is massive."
    end = primary["off"] - 1
    return f"{mean:.0f} % of the attention goes to the first token; token {primary['position']} is massive from layer {primary['on']} to {end}."


def write_report(data: Mapping[str, Any], path: str | Path) -> None:
    """Write the page; the file appears whole or not at all.

    Raises:
        DataError: it cannot be written. UnsupportedError: jinja2 is not installed.
    """
    path = Path(path)
    page = render_report(data)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"the report {path} cannot be written: {error}. Choose another place with --report.") from None


def token_texts(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    """The text of every token, ``(N,)`` ids; pieces of a character that no token holds alone show as �."""
    return [tokenizer.decode([i]) for i in ids.tolist()]
