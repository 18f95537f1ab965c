"""The README shows what the committed result files say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_measured_blocks_and_picture_are_up_to_date():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert script["main"](check=True) == 0, "run python benchmarks/readme.py"


def test_every_relative_link_of_readme_and_docs_leads_somewhere():
    import re

    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"
