"""The report, its plots and the printed table, from a small results file whose figures are made up."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.core.errors import DataError
from foveal.lens.model import ModelProfile
from foveal.lens.overlap import overlap
from foveal.lens.profile import profile_attention
from foveal.policies.policy import Policy
from foveal.tune.heat import DARK, LEVELS, LIGHT, profile_heats, ramp, search_heats
from foveal.tune.labels import text_width
from foveal.tune.plots import Plot, pareto, pareto_png
from foveal.tune.report import headline, pattern_text, policy_rows, render, write_report
from foveal.tune.table import decode_gap, figure, needle, ordered, percent, small, table

EXAMPLE = Path(__file__).with_name("example_results.json")
FIGURES = (
    "density", "tile_density", "decode_density", "prefill_speedup", "decode_speedup", "peak_ratio", "ppl", "ppl_increase",
    "decode_ppl", "decode_ppl_increase", "kl", "needle",
)  # fmt: skip
INTERVALS = ("prefill_speedup_range", "ppl_increase_interval", "decode_ppl_increase_interval")
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@pytest.fixture
def results() -> dict[str, Any]:
    return json.loads(EXAMPLE.read_text(encoding="utf-8"))


class Reader(HTMLParser):
    """Collects tags, text and references, and checks that elements are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def of(self, cls: str) -> list[dict[str, str]]:
        return [attrs for _, attrs in self.tags if cls in attrs.get("class", "").split()]


# --- the HTML file -----------------------------------------------------------------------------------------------------


def test_report_needs_nothing_else(results: dict[str, Any], tmp_path: Path) -> None:
    write_report(results, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    for tag, attrs in Reader(html).tags:
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            assert attrs.get(name, "data:").startswith(("data:", "#")), (tag, attrs)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", html)


def test_report_names_every_candidate_and_figure(results: dict[str, Any]) -> None:
    page = Reader(render(results))
    assert results["model"] in page.text and results["why"] in page.text and headline(results) in page.text
    for candidate in results["candidates"]:
        for part in (candidate["name"], candidate["verdict"], candidate["why"], percent(candidate["ppl_increase"], "")):
            assert part in page.text
    for key, value in (("cpu", "fabricated machine"), ("packages: transformers", "5.23.0"), ("sha256", "0" * 64)):
        assert key in page.text and value in page.text


def test_report_describes_its_pictures(results: dict[str, Any]) -> None:
    page = Reader(render(results))
    pictures = [attrs for tag, attrs in page.tags if attrs.get("role") == "img" or tag == "img"]
    assert len(pictures) == 2 * 2 + 2 + 4  # two plots in two widths, two maps of the search, four of the profile
    assert all(len(p["aria-label"]) > 40 for p in pictures)


def test_report_escapes_everything(results: dict[str, Any]) -> None:
    evil = "<script>alert('x')</script>\"'&"
    for candidate in results["candidates"]:
        candidate["why"] = evil
    results["candidates"][1]["name"] += evil
    results["model"] = results["why"] = results["dtype"] = results["baseline"]["name"] = evil
    results["text"]["name"] = results["provenance"][evil] = results["candidates"][-1]["policy"]["name"] = evil
    results["search"]["options"][0] = results["profile"]["layers"][0]["labels"][0] = evil
    results["candidates"][-1]["policy"]["layers"]["0"]["prefill"]["pattern"] = evil
    html = render(results)
    assert html.count("<script") == 1 == html.count("</script")
    page = Reader(html)
    assert evil in page.text
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith(("on", "alert"))]


@pytest.mark.parametrize("how", ["none", "absent"])
def test_missing_sections_are_absent(results: dict[str, Any], how: str) -> None:
    whole = Reader(render(results)).text
    for name in ("profile", "search", "machine", "provenance", "settings", "text"):
        if how == "none":
            results[name] = None
        else:
            del results[name]
    page = Reader(render(results))
    for heading in ("The search, layer by layer", "What the dense model attends to", "Machine", "Software"):
        assert heading in whole and heading not in page.text
    for heading in ("Speed against loss", "The chosen policy", "All candidates", "How it was measured", "Provenance"):
        assert heading in page.text
    assert not page.of("heatmap")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "uninformative"])
def test_odd_figures_do_no_harm(results: dict[str, Any], value: Any, tmp_path: Path) -> None:
    for candidate in results["candidates"][1:4]:
        candidate.update(dict.fromkeys(FIGURES, value), **{k: [value, 0.5] for k in INTERVALS})
    chosen = results["candidates"][-1]
    chosen["prefill_speedup"] = chosen["kl"] = value
    results["baseline"].update(prefill_s=value, decode_tok_s=value, ppl=value, prefill_samples=[value])
    for trial in results["search"]["layers"][0]["tried"]:
        trial["error"] = trial["kl"] = trial["seconds"] = value
    results["profile"]["layers"][0]["sink_mass"][0] = results["profile"]["layers"][1]["entropy"]["mean"][0] = value
    page = Reader(render(results))
    for _, attrs in page.tags:
        for name in ("d", "x", "y", "transform", "style", "viewbox", "class"):
            assert not re.search(r"nan|inf\b|None", attrs.get(name, "")), attrs
    assert "Not drawn, for want of a finite figure" in page.text and results["candidates"][1]["name"] in page.text
    pareto_png(results, tmp_path / "plot.png")
    printed(results)


def test_report_without_any_plot(results: dict[str, Any], tmp_path: Path) -> None:
    for candidate in results["candidates"]:
        candidate["prefill_speedup"] = candidate["decode_ppl_increase"] = None
    assert pareto(results, "prefill") is None and pareto(results, "decode") is None
    assert "Speed against loss" not in Reader(render(results)).text
    with pytest.raises(DataError, match="nothing to draw"):
        pareto_png(results, tmp_path / "plot.png")


def test_bad_results_are_refused(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.chosen is 'nobody'.*dense"):
        render({**results, "chosen": "nobody"})
    with pytest.raises(DataError, match="lacks the field 'baseline'"):
        render({k: v for k, v in results.items() if k != "baseline"})
    with pytest.raises(DataError, match="foveal_results is 7; this foveal reads version 1"):
        render({**results, "foveal_results": 7})
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match=r"taken cannot be written.*--out"):
        write_report(results, tmp_path / "taken")
    with pytest.raises(DataError, match=r"report\.html cannot be written"):
        write_report(results, tmp_path / "nowhere" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_headline(results: dict[str, Any]) -> None:
    assert headline(results) == "Use the per-layer policy: 1.62× faster prefill at 4096 tokens, perplexity +0.68 %."
    results["chosen"] = "window 2048"
    assert headline(results) == "Use window 2048: 1.13× faster prefill at 4096 tokens, perplexity +0.42 %."
    results["chosen"] = "dense"
    assert (
        headline(results) == "Keep dense attention: no candidate was faster within +1.00 % perplexity at 4096 tokens."
    )
    results["chosen"] = "dhsa vsb 25 %"
    assert "0.92× the prefill speed of dense" in headline(results)


# --- the policy --------------------------------------------------------------------------------------------------------


def test_policy_rows_say_what_the_policy_does(results: dict[str, Any]) -> None:
    data, layers = results["candidates"][-1]["policy"], results["model_info"]["layers"]
    rows, policy = policy_rows(data, layers), Policy.from_json(data)
    told = {}
    for spans, heads, prefill, decode in rows:
        assert heads == "all"
        for span in spans.split(", "):
            first, _, last = span.partition("–")
            for layer in range(int(first), int(last or first) + 1):
                assert layer not in told
                told[layer] = prefill, decode
    assert sorted(told) == list(range(layers))
    for layer, (prefill, decode) in told.items():
        rule = policy.rule(layer)
        assert prefill == pattern_text(rule.prefill.to_json())
        assert decode == ("as prefill" if rule.decode is None else pattern_text(rule.decode.to_json()))
    assert len(rows) == len({(p, d) for p, d in told.values()})


def test_policy_rows_of_spans_heads_and_default() -> None:
    window = {"pattern": "sliding_window", "window": 8}
    heads = {
        "prefill": window,
        "heads": {"0-1": {"pattern": "dense"}, "3": {"prefill": {"pattern": "dense"}, "decode": window}},
    }
    policy = {"default": {"prefill": {"pattern": "dense"}}, "layers": {"1-2": heads, "4": heads}}
    assert policy_rows(policy, 6) == [
        ("1–2, 4", "all other", "sliding_window(window=8)", "as prefill"),
        ("1–2, 4", "0–1", "dense", "as prefill"),
        ("1–2, 4", "3", "dense", "sliding_window(window=8)"),
        ("0, 3, 5", "all", "dense", "as prefill"),
    ]
    assert policy_rows(policy, None)[-1][0] == "all other"
    assert policy_rows({"default": window}, 6) == [("all", "all", "sliding_window(window=8)", "as prefill")]
    assert policy_rows({}, 6) == []


def test_pattern_text() -> None:
    assert pattern_text({"pattern": "dense"}) == "dense"
    assert (
        pattern_text({"pattern": "block_topk", "budget": {"density": 0.25}, "sinks": 4})
        == "block_topk(budget=density 0.25, sinks=4)"
    )


# --- the plots ---------------------------------------------------------------------------------------------------------


def crowd(results: dict[str, Any], seed: int, count: int = 24) -> dict[str, Any]:
    """The example with many candidates at random places, some of them on top of each other."""
    g = random.Random(seed)
    out = copy.deepcopy(results)
    for i in range(count):
        candidate = copy.deepcopy(g.choice(results["candidates"][:-1]))
        speed, loss = (
            2 ** g.uniform(-2, 3),
            g.choice([-0.002, 0.001, 0.01, 0.02, 0.3, 6.0, 300.0]) * g.uniform(0.9, 1.1),
        )
        candidate |= {"name": f"candidate {i} {'x' * g.randrange(14)}", "prefill_speedup": speed, "ppl_increase": loss}
        candidate |= {
            "prefill_speedup_range": [0.9 * speed, 1.2 * speed],
            "ppl_increase_interval": [0.8 * loss, 1.3 * loss],
        }
        out["candidates"].append(candidate)
    return out


def boxes(plot: Plot) -> list[tuple[float, float, float, float]]:
    """Where the names and the fixed texts stand."""
    texts = [*plot.labels, plot.limit_label, plot.corner, plot.y_title]
    return [(t.x, t.y - 13, t.x + text_width(t.text), t.y + 3) for t in texts]


@pytest.mark.parametrize("width", [960, 400])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_labels_cover_nothing(results: dict[str, Any], seed: int | None, width: int) -> None:
    given = results if seed is None else crowd(results, seed)
    plot = pareto(given, width=width)
    assert plot is not None
    placed = boxes(plot)[: len(plot.labels)]
    for i, a in enumerate(placed):
        assert plot.frame[0] < a[0] and a[2] < plot.frame[2] and plot.frame[1] < a[1] and a[3] < plot.frame[3]
        for b in boxes(plot)[i + 1 :]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
        for mark in plot.marks:
            assert not (a[0] < mark.x < a[2] and a[1] < mark.y < a[3])
    names = [c["name"] for c in given["candidates"]] + [given["baseline"]["name"]]
    assert sorted([t.text for t in plot.labels] + plot.unlabelled) == sorted(names)
    assert given["chosen"] not in plot.unlabelled
    if seed is None and width == 960:
        assert not plot.unlabelled


@pytest.mark.parametrize("seed", [0, 1])
def test_plot_tells_the_truth(results: dict[str, Any], seed: int) -> None:
    given = crowd(results, seed)
    plot = pareto(given)
    assert plot is not None and plot.bent
    at = {m.name: m for m in plot.marks}
    pairs = {c["name"]: (c["prefill_speedup"], c["ppl_increase"]) for c in given["candidates"]} | {"sdpa": (1.0, 0.0)}
    assert at.keys() == pairs.keys()
    left, top, right, bottom = plot.frame
    for name, mark in at.items():
        assert left <= mark.x <= right and top <= mark.y <= bottom
        for other, there in at.items():
            assert (mark.x < there.x) == (pairs[name][0] < pairs[other][0])
            assert (mark.y > there.y) == (pairs[name][1] < pairs[other][1])
        assert (mark.y < plot.limit) == (pairs[name][1] > given["max_ppl_increase"])
        if mark.x_bar and mark.y_bar:
            assert mark.x_bar[0] <= mark.x <= mark.x_bar[1] and mark.y_bar[0] <= mark.y <= mark.y_bar[1]
    assert at["sdpa"].x == plot.one and at["sdpa"].kind == "baseline" and at[given["chosen"]].kind == "chosen"
    unbeaten = {
        n for n, (s, q) in pairs.items() if not any(t >= s and r <= q and (t, r) != (s, q) for t, r in pairs.values())
    }
    assert {(m.x, m.y) for n, m in at.items() if n in unbeaten} == {
        p for p in plot.frontier if p in {(m.x, m.y) for m in at.values()}
    }


def test_ticks_stand_where_they_say(results: dict[str, Any]) -> None:
    for given in (results, crowd(results, 3)):
        plot = pareto(given)
        assert plot is not None
        assert len(plot.x_ticks) >= 3 and len(plot.y_ticks) >= 3 and "1×" in [t for _, t in plot.x_ticks]
        assert {t: x for x, t in plot.x_ticks}["1×"] == pytest.approx(plot.one)
        ups = {text: y for y, text in plot.y_ticks}
        assert ups["0"] == pytest.approx(next(m.y for m in plot.marks if m.kind == "baseline"))
        assert ups["+1 %"] == pytest.approx(plot.limit)
        speeds = [float(t.removesuffix("×")) for _, t in sorted(plot.x_ticks)]
        assert speeds == sorted(speeds)


def test_decode_plot_uses_decode_figures(results: dict[str, Any]) -> None:
    chosen = results["candidates"][-1]
    chosen["decode_speedup"], chosen["decode_ppl_increase"] = 9.0, 0.5
    prefill, decode = pareto(results, "prefill"), pareto(results, "decode")
    assert prefill is not None and decode is not None
    assert decode.bent and not prefill.bent
    assert max(decode.marks, key=lambda m: m.x).name == min(decode.marks, key=lambda m: m.y).name == chosen["name"]


def test_png(results: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib.image import imread

    pareto_png(results, tmp_path / "plot.png")
    pixels = imread(tmp_path / "plot.png")
    assert pixels.shape[:2] == (940, 1920)
    assert 0.01 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.5  # neither blank nor a blot


# --- the heat maps -----------------------------------------------------------------------------------------------------


def test_ramp_reaches_both_ends() -> None:
    for stops in (LIGHT, DARK):
        colors = ramp(stops)
        assert len(colors) == LEVELS == len(set(colors)) and (colors[0], colors[-1]) == (stops[0], stops[-1])


def test_search_heats(results: dict[str, Any]) -> None:
    search = results["search"]
    error, kl = search_heats(search)
    for heat in (error, kl):
        assert [label for label, _ in heat.rows] == search["options"]
        for i, layer in enumerate(search["layers"]):
            assert [cells[i].picked for _, cells in heat.rows] == [
                o == layer["picked"] for o in range(len(search["options"]))
            ]
    for i, layer in enumerate(search["layers"]):
        tried = {t["option"]: t for t in layer["tried"]}
        for o, (_, cells) in enumerate(kl.rows):
            assert (cells[i].level is None) == (tried[o]["kl"] is None)
        known = sorted((t["error"], error.rows[o][1][i].level) for o, t in tried.items())
        assert [level for _, level in known] == sorted(level for _, level in known)
    levels = {c.level for _, cells in error.rows for c in cells}
    assert {0, LEVELS - 1} <= levels
    assert search_heats(None) == search_heats({"options": [], "layers": []}) == []


def test_profile_heats_of_a_measured_profile() -> None:
    g = torch.Generator().manual_seed(5)
    layers = []
    for index, heads in enumerate((4, 2, 4)):
        q, k = torch.randn(1, heads, 48, 8, generator=g), torch.randn(1, 2, 48, 8, generator=g)
        layers.append(profile_attention(q, k, rows=16, window=8, sinks=2, top=4, layer_index=index))
    profile = ModelProfile(layers, overlap(layers), tokens=48, rows=16, seed=0, top=4)
    data = json.loads(json.dumps(profile.to_json()))
    entropy, sinks, window, keys = profile_heats(data)
    assert "2 tokens" in sinks.note and "8 tokens" in window.note
    for heat, values in ((entropy, "entropy"), (keys, "keys90")):
        assert len(heat.rows) == 4 and all(len(cells) == 3 for _, cells in heat.rows)
        for head, (_, cells) in enumerate(heat.rows):
            for layer, cell in enumerate(cells):
                if head >= layers[layer].num_heads:
                    assert cell.level is None and "not measured" in cell.tip
                else:
                    assert cell.level is not None and f"layer {layer}, head {head}" in cell.tip
                    mean = float(getattr(layers[layer], values).mean[head])
                    assert figure(mean, ".2f" if values == "entropy" else ",.0f") in cell.tip
    assert profile_heats(None) == profile_heats({"layers": []}) == []


# --- the printed table -------------------------------------------------------------------------------------------------


def printed(results: dict[str, Any], width: int = 120) -> list[str]:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table(results))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_table_fits_and_is_complete(results: dict[str, Any]) -> None:
    results["candidates"][1] |= {
        "prefill_speedup": 12.34,
        "ppl_increase": 123.4,
        "decode_ppl_increase": 432.1,
        "decode_ppl_increase_interval": [430.0, 434.0],
        "name": "a [bold] name",
    }
    lines = printed(results)
    assert max(map(len, lines)) <= 120 and not any("…" in line for line in lines)
    rows = [next(i for i, line in enumerate(lines) if line.startswith(f" {c['name']} ")) for c in ordered(results)]
    baseline = next(i for i, line in enumerate(lines) if "sdpa (baseline)" in line)
    assert rows == sorted(rows) and baseline < rows[0]
    assert (
        "chosen" in lines[rows[0]]
        and "1.62" in lines[rows[0]]
        and "+0.68" in lines[rows[0]]
        and "2/3" in lines[rows[0]]
    )
    assert lines[rows[-1]].split()[-1] == "limit"
    assert "+12,340" in "".join(lines) and "+43,210†" in "".join(lines)
    assert any("slower" in lines[i] for i in rows)


def test_table_marks_the_decode_gap(results: dict[str, Any]) -> None:
    marked = {c["name"] for c in results["candidates"] if decode_gap(c)}
    assert marked == {"triangle 1024", "block top-k 25 %", "dhsa vsb 50 %"}
    lines = printed(results)
    for candidate in results["candidates"]:
        line = next(line for line in lines if line.startswith(f" {candidate['name']} "))
        assert ("†" in line) == (candidate["name"] in marked)
    assert lines[-1].startswith("†") and Reader(render(results)).text.count("†") == len(marked) + 1
    for candidate in results["candidates"]:
        candidate["decode_ppl_increase_interval"] = candidate["ppl_increase_interval"]
    assert "†" not in "".join(printed(results))


def test_table_of_an_uninformative_needle(results: dict[str, Any]) -> None:
    results["needle_informative"] = False
    for candidate in results["candidates"]:
        candidate["needle"] = "uninformative"
    text = "\n".join(printed(results))
    assert "uninformative" in text and text.count("2/3") == 2  # the baseline's row and the caption
    assert "It is uninformative here" in Reader(render(results)).text


def test_figures_as_text() -> None:
    assert [percent(v) for v in (0.004, -0.004, 0.0, 1e-9, 3.21, 200.0)] == [
        "+0.40 %",
        "−0.40 %",
        "0.00 %",
        "0.00 %",
        "+321 %",
        "+20,000 %",
    ]
    assert [figure(v) for v in (None, math.nan, math.inf, -math.inf, True, "x", -0.5)] == [
        "–",
        "NaN",
        "∞",
        "−∞",
        "–",
        "–",
        "−0.500",
    ]
    assert [small(v) for v in (0, 0.00612, 0.1, 8.31e-5, -8.31e-5, 1234.5, None)] == [
        "0",
        "0.00612",
        "0.1",
        "8.3e−5",
        "−8.3e−5",
        "1,234",
        "–",
    ]
    assert needle({"needle": 0.5}) == "50 %" and needle({"needle": None}) == "–"
    assert needle({"needle": 0.5, "needle_hits": [[0.1, True], [0.9, False]]}) == "1/2"


@pytest.mark.parametrize(
    ("forced", "decode", "gap"),
    [
        ([0.0, 0.01], [0.02, 0.03], True), ([0.02, 0.03], [0.0, 0.01], True), ([0.0, 0.02], [0.02, 0.03], False),
        ([0.0, 0.01], None, False), (None, [0.0, 0.01], False), ([0.0, math.nan], [0.02, 0.03], False),
    ],
)  # fmt: skip
def test_decode_gap(forced: Any, decode: Any, gap: bool) -> None:
    assert decode_gap({"ppl_increase_interval": forced, "decode_ppl_increase_interval": decode}) is gap
