"""A page in headless Chromium: what its own script finds, once for each width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

WIDTHS = (1280, 760, 360)
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1300,900",
)  # fmt: skip

WATCH = """<script>
window.complaints = [];
addEventListener("error", (e) => complaints.push(e.message || "failed to load " + (e.target.src || e.target.href)), true);
for (const name of ["error", "warn"]) { const old = console[name]; console[name] = (...a) => { complaints.push(a.join(" ")); old(...a); }; }
</script>"""
"""Goes first into the page's head."""


def look(page: str, folder: Path, dark: bool, measure: str, widths: tuple[int, ...] = WIDTHS) -> list[dict[str, Any]]:
    """What ``measure``, a script that defines ``measure(win)`` and fills ``#found``, says of the page, once for each width."""
    inner = html.escape(page.replace("<head>", "<head>" + WATCH, 1))
    frames = "".join(f'<iframe width="{w}" height="900" style="border:0" srcdoc="{inner}"></iframe>' for w in widths)
    holder = folder / "holder.html"
    holder.write_text(f'<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>{measure}{frames}', encoding="utf-8")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    command = [str(CHROMIUM), *SWITCHES, *theme, f"--user-data-dir={folder / 'profile'}", "--dump-dom", holder.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    found = re.search(r'<pre id="found">(.+?)</pre>', ran.stdout, re.DOTALL)
    assert found, f"Chromium left no findings (exit {ran.returncode}): {ran.stderr[-2000:]}"
    views: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    assert [v["width"] for v in views] == list(widths)
    return views
