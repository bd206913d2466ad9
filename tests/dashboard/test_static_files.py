"""The dashboard's files as they lie there: what is not ours is what npm has, and nothing is fetched from elsewhere."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[2] / "gateway" / "dashboard" / "static"
VENDOR = STATIC / "vendor"
OURS = sorted(path for path in STATIC.rglob("*") if path.is_file() and VENDOR not in path.parents)
MAX_PAGE_BYTES = 400_000
"""All of a first visit, before compression."""


def test_what_is_not_ours_is_as_scripts_vendor_has_brought_it() -> None:
    listed = dict(
        reversed(line.split("  "))
        for line in re.findall(r"^[0-9a-f]{64}  .+$", (VENDOR / "README.md").read_text(), re.M)
    )
    there = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VENDOR.iterdir()
        if path.name != "README.md"
    }
    assert there == listed
    for package in ("preact", "htm", "uPlot"):
        assert (VENDOR / f"{package}.LICENSE").stat().st_size > 500


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(STATIC)))
def test_a_file_of_ours_draws_text_as_text_and_asks_nobody_else(path: Path) -> None:
    text = path.read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert way not in text, f"{way} makes markup or code of text"
    if path.suffix in (".js", ".html", ".css"):
        foreign = [
            found
            for found in re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"'`]*", text)
            if "w3.org" not in found
        ]
        assert foreign == []
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\son[a-z]+=", text), "inline script or style"


def test_a_visit_costs_little() -> None:
    assert (
        sum(path.stat().st_size for path in STATIC.rglob("*") if path.suffix in (".js", ".mjs", ".css", ".html"))
        < 2 * MAX_PAGE_BYTES
    )
    first = [
        STATIC / "index.html",
        *STATIC.glob("css/*.css"),
        *STATIC.glob("js/*.js"),
        *STATIC.glob("js/lib/*.js"),
        *VENDOR.glob("*.mjs"),
    ]
    assert sum(path.stat().st_size for path in first) < MAX_PAGE_BYTES
