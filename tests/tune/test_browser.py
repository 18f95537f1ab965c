"""The report in a real browser: nothing fetched, no errors, nothing cut off, readable in both themes and on a phone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from foveal.tune.report import render

from ..browser import look, needs_browser

pytestmark = needs_browser

MEASURE = """<script>
function measure(win) {
  const doc = win.document, all = (q) => [...doc.querySelectorAll(q)], seen = (e) => e.getBoundingClientRect().width > 0;
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const rgb = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (text) => { const [r, g, b] = rgb(text).map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = win.getComputedStyle(e).backgroundColor; if (c.startsWith("color(")) return null; if (c !== "rgba(0, 0, 0, 0)") return c; } return "rgb(255,255,255)"; };
  const faint = [];
  for (const e of all("h1, h2, h3, p, dt, dd, th, td, small, summary, figcaption span, .label, .tick, .axis, .name")) {
    if (!seen(e) || !e.textContent.trim()) continue;
    const style = win.getComputedStyle(e), under = ground(e); if (under === null) continue;
    const a = light(e.namespaceURI.endsWith("svg") ? style.fill : style.color), b = light(under);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) faint.push(ratio.toFixed(2) + " " + e.textContent.trim().slice(0, 40));
  }
  const plots = all("svg.plot").filter(seen).map((svg) => ({
    box: box(svg), names: [...svg.querySelectorAll(".name")].map((t) => ({ text: t.textContent, box: box(t), size: parseFloat(win.getComputedStyle(t).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width })),
    dots: [...svg.querySelectorAll(".mark")].map((m) => box(m.lastElementChild)),
  }));
  const mark = all("svg.plot .mark.chosen").filter(seen)[0], tip = doc.getElementById("tip"), before = tip.hidden;
  mark.dispatchEvent(new win.PointerEvent("pointerover", { bubbles: true }));
  return {
    width: win.innerWidth, scroll: doc.documentElement.scrollWidth, title: doc.title, headline: doc.querySelector("h1").textContent,
    complaints: win.complaints, fetched: win.performance.getEntriesByType("resource").map((r) => r.name), page: win.getComputedStyle(doc.body).backgroundColor,
    images: all("img").map((i) => i.naturalWidth), plots, faint,
    cells: all(".row i[data-tip]").map((c) => [c.getBoundingClientRect().width, c.getBoundingClientRect().height]),
    colors: [...new Set(all(".row i[data-tip]:not(.none)").map((c) => win.getComputedStyle(c).backgroundColor))],
    tip: [before, tip.hidden, tip.textContent, box(tip)],
    regions: all(".scroll").filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => [e.getAttribute("aria-label"), e.tabIndex]),
    dark: win.matchMedia("(prefers-color-scheme: dark)").matches,
  };
}
addEventListener("load", () => {
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map((f) => measure(f.contentWindow)));
});
</script>"""
"""Runs in the page that holds the report in frames of several widths."""


@pytest.fixture(scope="module", params=["light", "dark"])
def views(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    results = json.loads(Path(__file__).with_name("example_results.json").read_text(encoding="utf-8"))
    found = look(render(results), tmp_path_factory.mktemp("browser"), request.param == "dark", MEASURE)
    assert all(v["dark"] == (request.param == "dark") for v in found)
    return found


def test_page_loads_without_a_complaint(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert view["complaints"] == [] and view["fetched"] == []
        assert "fabricated-example" in view["title"] and view["headline"].startswith("Use the per-layer policy")
        assert all(width > 0 for width in view["images"])


def test_nothing_is_cut_off(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert view["scroll"] <= view["width"], "the page scrolls sideways"
        assert all(label and tab == 0 for label, tab in view["regions"]), "a wide table cannot be reached by keyboard"
    assert views[0]["regions"] == [], "the tables do not fit a desktop window"


def test_plots_fill_the_page_and_names_stay_apart(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert len(view["plots"]) == 2
        for plot in view["plots"]:
            left, top, right, bottom = plot["box"]
            assert right - left > 0.7 * min(view["width"], 1150) and bottom - top > 250
            names = plot["names"]
            for i, a in enumerate(names):
                assert a["size"] >= 10, f"{a['text']!r} is {a['size']:.1f} px high"
                assert left <= a["box"][0] and a["box"][2] <= right and top <= a["box"][1] and a["box"][3] <= bottom
                for b in names[i + 1 :]:
                    assert not overlap(a["box"], b["box"]), f"{a['text']!r} covers {b['text']!r} at {view['width']}"
                for x0, y0, x1, y1 in plot["dots"]:
                    middle = ((x0 + x1) / 2, (y0 + y1) / 2) * 2
                    assert not overlap(a["box"], middle), f"{a['text']!r} covers a mark at {view['width']}"


def overlap(a: Any, b: Any) -> bool:
    """True when two boxes share more than a pixel (text boxes include some air)."""
    return a[0] + 1 < b[2] and b[0] + 1 < a[2] and a[1] + 2 < b[3] and b[1] + 2 < a[3]


def test_heat_maps_are_coloured_and_large_enough(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert len(view["colors"]) >= 12
        assert min(w for w, _ in view["cells"]) >= 4 and min(h for _, h in view["cells"]) >= 12


def test_pointing_at_a_mark_tells_its_figures(views: list[dict[str, Any]]) -> None:
    for view in views:
        before, after, text, (left, top, right, bottom) = view["tip"]
        assert before and not after and text.startswith("per layer, 0.01: 1.62× prefill, perplexity +0.68 %")
        assert 0 <= left < right <= view["width"] and top < bottom


def test_text_stands_out_from_its_ground(views: list[dict[str, Any]]) -> None:
    """Contrast of 4.5 to 1, the AA level of the Web Content Accessibility Guidelines 2.2, criterion 1.4.3."""
    red, green, blue = map(int, re.findall(r"\d+", views[0]["page"]))
    assert (red + green + blue < 150) == views[0]["dark"]
    for view in views:
        assert view["faint"] == []


def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    """The checks above can fail: a page with an error, a missing image and a wide block is reported as such."""
    results = json.loads(Path(__file__).with_name("example_results.json").read_text(encoding="utf-8"))
    page = render(results).replace(
        "</main>",
        '<img src="file:///no/such.png"><div style="width:3000px;height:9px"></div><script>nowhere()</script></main>',
    )
    for view in look(page, tmp_path, False, MEASURE):
        assert len(view["complaints"]) == 2 and view["scroll"] > view["width"] and view["images"] == [0]
