"""The report of ``foveal bench``: what it says, and that it stands in a browser (see ``tests/browser.py``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from foveal.bench.report import render, write_report
from foveal.core.errors import DataError

from ..browser import look, needs_browser
from .lines import header, line, lines

MEASURE = """<script>
function measure(win) {
  const doc = win.document, all = (q) => [...doc.querySelectorAll(q)], seen = (e) => e.getBoundingClientRect().width > 0;
  const rgb = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (text) => { const [r, g, b] = rgb(text).map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = win.getComputedStyle(e).backgroundColor; if (c !== "rgba(0, 0, 0, 0)") return c; } return "rgb(255,255,255)"; };
  const faint = [];
  for (const e of all("h1, h2, h3, p, dt, dd, th, td, small, i, figure text")) {
    if (!seen(e) || !e.textContent.trim()) continue;
    const style = win.getComputedStyle(e), a = light(e.namespaceURI.endsWith("svg") ? style.fill : style.color), b = light(ground(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) faint.push(ratio.toFixed(2) + " " + e.textContent.trim().slice(0, 40));
  }
  const cell = all(".map i[data-tip]")[0], tip = doc.getElementById("tip"), before = tip.hidden;
  cell.dispatchEvent(new win.PointerEvent("pointerover", { bubbles: true }));
  const box = tip.getBoundingClientRect();
  return {
    width: win.innerWidth, scroll: doc.documentElement.scrollWidth, complaints: win.complaints, faint,
    fetched: win.performance.getEntriesByType("resource").map((r) => r.name), headline: doc.querySelector("h1").textContent,
    cells: all(".map i").map((c) => [c.textContent, win.getComputedStyle(c).backgroundColor, c.scrollWidth <= c.clientWidth + 1]),
    plots: all("figure svg").map((s) => ({ width: s.getBoundingClientRect().width, texts: [...s.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect().height]) })),
    regions: all(".scroll, figure").filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => [e.getAttribute("aria-label"), e.tabIndex]),
    tip: [before, tip.hidden, tip.textContent, box.left, box.right], dark: win.matchMedia("(prefers-color-scheme: dark)").matches,
  };
}
addEventListener("load", () => {
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map((f) => measure(f.contentWindow)));
});
</script>"""


def test_what_it_says() -> None:
    page = render(header(), lines())
    assert "native is fastest in 23 of 31 cases, by 1.33× over the next best." in page
    assert page.count("<svg") == 2 and "GFLOP/s of the visible pairs" in page
    for part in (
        "uniform_block_sparse:keep=0.2",
        "has no backward on CPU",
        "wrong: differs from float64",
        "oom: can&#39;t allocate",
    ):
        assert part in page
    assert "http" not in re.sub(r"https?://(www\.w3\.org|purl\.org|creativecommons\.org)", "", page), (
        "something is fetched"
    )
    assert render(header(), lines()) == page, "the same lines give the same page"


def test_few_lines() -> None:
    page = render(header(), [line("full", 512, "sdpa", 0.5)])
    assert "Only sdpa ran: there is nothing to compare." in page and "<svg" not in page
    assert "Nothing ran." in render(header(), [line("full", 512, "sdpa", None)])
    with pytest.raises(DataError, match="has no case yet"):
        render(header(), [])


def test_markup_in_a_reason_stays_text(tmp_path: Path) -> None:
    write_report(header(), [line("full", 512, "sdpa", None, why="<script>alert(1)</script>")], tmp_path / "r.html")
    assert "<script>alert" not in (tmp_path / "r.html").read_text()
    with pytest.raises(DataError, match="cannot be written"):
        write_report(header(), lines(), tmp_path / "no" / "r.html")


@pytest.fixture(scope="module", params=["light", "dark"])
def views(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found = look(render(header(), lines()), tmp_path_factory.mktemp("browser"), request.param == "dark", MEASURE)
    assert all(v["dark"] == (request.param == "dark") for v in found)
    return found


@needs_browser
def test_it_loads_and_nothing_is_cut_off(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert view["complaints"] == [] and view["fetched"] == [] and view["headline"].startswith("native is fastest")
        assert view["scroll"] <= view["width"], "the page scrolls sideways"
        assert all(label and tab == 0 for label, tab in view["regions"]), "a wide part cannot be reached by keyboard"
    assert views[0]["regions"] == [], "the tables do not fit a desktop window"


@needs_browser
def test_winners_are_told_apart_and_fit_their_cells(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert len(view["cells"]) == 32 and all(fits for _, _, fits in view["cells"])
        colours: dict[str, set[str]] = {}
        for text, shown, _ in view["cells"]:
            colours.setdefault(text.split()[0], set()).add(shown)
        assert colours.keys() == {"native", "sdpa"} and all(len(c) == 1 for c in colours.values())
        assert colours["native"] != colours["sdpa"]


@needs_browser
def test_plots_and_hints(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert len(view["plots"]) == 2
        for plot in view["plots"]:
            texts = [t for t, _ in plot["texts"]]
            assert plot["width"] >= 600 and {
                "tokens",
                "GFLOP/s",
                "native",
                "8k",
                *{"causal", "causal_document"},
            } <= set(texts)
            assert min(height for _, height in plot["texts"]) >= 8
        before, after, text, left, right = view["tip"]
        assert before and not after and text.startswith("causal, 1,024 tokens\nsdpa: 450 GFLOP/s\nnative: 400 GFLOP/s")
        assert 0 <= left < right <= view["width"]


@needs_browser
def test_text_stands_out_from_its_ground(views: list[dict[str, Any]]) -> None:
    for view in views:
        assert view["faint"] == []
