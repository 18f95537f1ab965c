"""The report of a text of 8192 tokens in a real browser: no complaint, nothing fetched, hover and choice work, readable in both themes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveal.lens.report import pack, render_report, shades

from ..browser import look, needs_browser

pytest.importorskip("jinja2", reason="needs jinja2: pip install 'foveal[report]'")
pytestmark = needs_browser

WIDTHS = (1280, 360)
TOKENS, LAYERS, HEADS, CELLS, EDGES = 8192, 30, 9, 32, 12

MEASURE = """<script>
function point(win, e, type, x, y) { e.dispatchEvent(new win.PointerEvent(type, { bubbles: true, clientX: x, clientY: y })); return win.document.getElementById("tip").hidden ? "" : win.document.getElementById("tip").textContent; }
function measure(win) {
  const doc = win.document, $ = (id) => doc.getElementById(id), found = {};
  found.complaints = win.complaints; found.fetched = win.performance.getEntriesByType("resource").map((r) => r.name);
  found.width = win.innerWidth; found.scroll = doc.documentElement.scrollWidth; found.title = doc.title;
  found.dark = win.matchMedia("(prefers-color-scheme: dark)").matches; found.page = win.getComputedStyle(doc.body).backgroundColor;
  const spans = [...doc.querySelectorAll("#text span")]; found.tokens = spans.length; found.text = spans.slice(0, 3).map((s) => s.textContent);
  found.marks = [doc.querySelectorAll("#text .p").length, doc.querySelectorAll("#text .a").length];
  found.colors = new Set(spans.map((s) => s.style.background)).size; const before = spans[70].style.background;
  found.tip = point(win, spans[5], "pointerover", 1, 1);
  const select = $("figure"); select.selectedIndex = 1; select.dispatchEvent(new win.Event("change")); found.repainted = spans[70].style.background !== before;
  const atlas = $("atlas"), r = atlas.getBoundingClientRect(); found.atlas = [atlas.width, atlas.height];
  const step = (atlas.width - 26) / 9, inked = (l, h) => atlas.getContext("2d").getImageData(26 + (h + .45) * step, (l + .45) * step, 1, 1).data[3];
  found.inked = [inked(3, 2), inked(2, 3), inked(3, 3)];
  found.head = point(win, atlas, "pointermove", r.left + 26 + 2.5 * step, r.top + 3.5 * step);
  atlas.dispatchEvent(new win.MouseEvent("click", { bubbles: true, clientX: r.left + 26 + 2.5 * step, clientY: r.top + 3.5 * step }));
  found.name = $("name").textContent; found.edges = $("edges").rows.length;
  const one = $("one").getBoundingClientRect(); found.cell = point(win, $("one"), "pointermove", one.left + 4, one.top + 250);
  const wave = $("wave").getBoundingClientRect(); found.wave = point(win, $("wave"), "pointermove", wave.left + wave.width / 2, wave.top + 9);
  found.bars = doc.querySelectorAll("#first i").length; found.bar = point(win, doc.querySelectorAll("#first i")[4], "pointerover", 1, 1);
  const grid = $("grid").getBoundingClientRect(); found.grid = point(win, $("grid"), "pointermove", grid.left + 2, grid.top + 2);
  const maps = [...doc.querySelectorAll("canvas[data-map]")]; found.maps = maps.map((c) => [c.width, c.height]);
  const box = maps[1].getBoundingClientRect(), at = (l, h) => maps[1].getContext("2d").getImageData(26 + h * 12 + 5, l * 12 + 5, 1, 1).data;
  found.effect = point(win, maps[1], "pointermove", box.left + 26 + 2.5 * 12, box.top + 3.5 * 12); found.absent = point(win, maps[1], "pointermove", box.left + 26 + 8.5 * 12, box.top + 29.5 * 12);
  found.effects = [at(3, 2)[3], at(4, 2)[0] > at(4, 2)[1], at(3, 2)[0] > at(3, 2)[1], at(29, 8)[3]];
  found.outside = point(win, maps[1], "pointermove", box.left + 3, box.top + 3);
  found.regions = [...doc.querySelectorAll(".card")].filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => [e.getAttribute("aria-label"), e.tabIndex]);
  return found;
}
addEventListener("load", () => { document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map((f) => measure(f.contentWindow))); });
</script>"""


def made_up() -> dict[str, Any]:
    """A report on nothing, as large as SmolLM2 at 8192 tokens."""
    rng = np.random.default_rng(0)
    figures = {name: pack(rng.random(TOKENS)) for name in ("WAAD", "FAI", "entropy")}
    heads = {
        name: np.round(rng.random((LAYERS, HEADS)), 3).tolist()
        for name in ("mass on the first token", "mass lost to the policy")
    }
    query = rng.integers(9, TOKENS, (LAYERS, HEADS, EDGES))
    one_map = np.zeros((LAYERS, HEADS, CELLS, CELLS))
    one_map[3, 2] = 1
    words = ["the", " <b>&amp;", "\n", " tree", "ü", "�"]
    return {
        "about": {"model": "made-up", "text": "random words", "policy": "a window"}, "layers": list(range(LAYERS)), "heads": HEADS,
        "labels": [["local"] * HEADS] * LAYERS, "tokens": [words[i % 6] for i in range(TOKENS)], "figures": figures,
        "head_figures": heads, "preplan": list(range(10, TOKENS, 40)), "anchors": list(range(11, TOKENS, 80)),
        "local": [[0, 1]], "global": [[3, 2]],
        "atlas": {"cells": CELLS, "size": 256, "values": _base64(shades(one_map))},
        "edges": {"weight": pack(rng.random((LAYERS, HEADS, EDGES))), "query": pack(query, "<i4"), "key": pack(query - 3, "<i4"), "count": EDGES},
        "sinks": {
            "primary": {"position": 0, "on": 2, "off": 28, "norm": 9e3, "median_norm": 20.0},
            "found": [{"position": 44, "birth": 9, "lifetime": 5, "label": "secondary", "norm": 120.0, "score": None, "sign": 1, "contiguous": True, "cosine": 0.95}],
            "first_key": [0.4] * LAYERS, "uniform": 0.001, "largest": [1000.0] * LAYERS, "token": [0] * LAYERS,
        },
        "lost": {"edges": [[1, 2, 500, 3, 0.25]], "by_layer": [0.1] * LAYERS, "mean": 0.1},
        "circuits": _circuits(),
    }  # fmt: skip


def _circuits() -> dict[str, Any]:
    """Head 3.2 carries the answer, head 4.2 works against it, and head 29.8 does not exist."""
    effect: list[list[float | None]] = [[0.01] * HEADS for _ in range(LAYERS)]
    effect[3][2], effect[4][2], effect[29][8] = 0.5, -0.25, None
    maps = [
        {
            "name": name,
            "what": "<paths>",
            "kept": kept,
            "stage": bool(kept),
            "effect": effect,
            "low": effect,
            "high": effect,
        }
        for name, kept in (("screen", []), ("movers", [[3, 2], [4, 2]]))
    ]
    row = {
        "share": 0.02,
        "sizes": [9, 8],
        "shared": ["3.2"],
        "jaccard": 0.2,
        "chance_mean": 0.03,
        "chance_q95": 0.1,
        "p": 0.01,
    }
    example = {"clean": "Then <b> met", "corrupt": "Then <i> met", "correct": " A", "foil": " B"}
    task = {
        "task": "ioi", "pairs": 16, "accuracy": 0.9, "chance": 0.5, "difference": [3.0, -3.0], "circuit": ["3.2", "4.2"],
        "agreement": row, "example": example, "maps": maps,
    }  # fmt: skip
    return {"tasks": [task], "overlaps": [{"tasks": ["ioi", "colored_objects"], "at": [row]}]}


def _base64(values: np.ndarray) -> str:
    return pack(values, "u1")


@pytest.fixture(scope="module", params=["light", "dark"])
def views(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found = look(render_report(made_up()), tmp_path_factory.mktemp("browser"), request.param == "dark", MEASURE, WIDTHS)
    assert all(v["dark"] == (request.param == "dark") for v in found)
    return found


def test_page_loads_without_a_complaint_and_fits(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert view["complaints"] == [] and view["fetched"] == []
        assert view["title"] == "foveal inspect: made-up, 8192 tokens"
        assert view["scroll"] <= view["width"], "the page scrolls sideways"
        assert all(label and tab == 0 for label, tab in view["regions"]), "a wide part cannot be reached by keyboard"
        red, green, blue = map(int, re.findall(r"\d+", view["page"]))
        assert (red + green + blue < 150) == view["dark"]


def test_every_token_is_there_coloured_and_tells_its_values(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert view["tokens"] == TOKENS and view["text"] == ["the", " <b>&amp;", "⏎\n"]
        assert view["marks"] == [205, 103] and view["colors"] > 100 and view["repainted"]
        assert re.fullmatch(r'token 5 "�"\nWAAD: [\d.e-]+\nFAI: [\d.e-]+\nentropy: [\d.e-]+', view["tip"])
        assert view["wave"].startswith("token 4096 ")


def test_the_atlas_is_drawn_and_its_heads_can_be_chosen(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert view["inked"] == [255, 0, 0] and view["atlas"][0] > 200 and view["atlas"][1] > 600
        assert view["head"].startswith("layer 3, head 2: local\nmass on the first token: ")
        assert view["name"] == "layer 3, head 2: local" and view["edges"] == EDGES
        assert re.fullmatch(r"tokens 7936–8191 put 1 on 0–255", view["cell"])


def test_bars_and_losses_tell_their_figures(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert view["bars"] == LAYERS and view["bar"] == "layer 4: 0.4"
        assert re.fullmatch(r"layer 0, head 0: 0?[\d.]+ lost", view["grid"])


def test_circuits_are_drawn_and_tell_their_effects(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert view["maps"] == [[26 + HEADS * 12, LAYERS * 12]] * 2
        assert view["effect"] == "movers, head 3.2, kept\neffect: 0.5\n95 %: 0.5 to 0.5"
        assert view["effects"] == [255, True, False, 0], (
            "a strong head is solid, one against the answer orange, none is empty"
        )
        assert "head 29.8\neffect: –" in view["absent"] and view["outside"] == ""


def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    """The checks above can fail: a page with an error, a missing image and a wide block is reported as such."""
    page = render_report(made_up()).replace(
        "</main>",
        '<img src="file:///no/such.png"><div style="width:3000px;height:9px"></div><script>nowhere()</script></main>',
    )
    for view in look(page, tmp_path, False, MEASURE, (1280,)):
        assert len(view["complaints"]) == 2 and view["scroll"] > view["width"]
