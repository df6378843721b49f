"""The site as a reader opens it: files on a disk, in a real Chromium, without a network.

UNBRAID_SITE names a site that is built already; else one is built here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browserkit import opened

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("UNBRAID_SITE"):
        return Path(given)
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    return folder


def test_search_finds_a_page_from_a_disk(browser: Any, site: Path) -> None:
    with opened(browser, site / "methods" / "stem.html", of=site) as page:
        page.locator(".md-search__input").click()
        page.locator(".md-search__input").press_sequentially("adversary")
        page.locator('.md-search-result__link[href*="methods/domain_adversary.html"]').first.click()
        page.wait_for_url("**/domain_adversary.html*")
        assert "reversal" in page.locator("article").inner_text().lower()


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("index.html", 360, "light"), ("which-method.html", 1280, "light"), ("which-method.html", 360, "dark"),
        ("methods/tin.html", 1280, "dark"), ("methods/adatask.html", 360, "light"), ("commands/train.html", 360, "light"),
        ("tutorials/own-log.html", 360, "light"), ("evidence.html", 360, "light"), ("run-file.html", 360, "dark"),
        ("reference/unbraid.towers.html", 360, "light"),
    ],
)  # fmt: skip
def test_nothing_hangs_out_of_a_page(browser: Any, site: Path, name: str, width: int, scheme: str) -> None:
    with opened(browser, site / name, width, scheme, of=site) as page:
        wide = page.evaluate(
            """() => [...document.querySelectorAll("article *")].filter(one => {
                for (let box = one; box.tagName !== "ARTICLE"; box = box.parentElement)
                    if (getComputedStyle(box).overflowX !== "visible") return false;
                return one.getBoundingClientRect().right > innerWidth + 1;
            }).map(one => one.outerHTML.slice(0, 80))"""
        )
        assert wide == [], "cut off, and not in a box that scrolls"


def test_equations_are_drawn(browser: Any, site: Path) -> None:
    with opened(browser, site / "methods" / "fm.html", of=site) as page:
        box = page.locator(".equation mfrac").first.bounding_box()
        assert box["height"] > 20, "a fraction stands in two lines"
        half, rest = (page.locator(f".equation mfrac > :nth-child({n})").first.bounding_box() for n in (1, 2))
        assert half["y"] + half["height"] <= rest["y"] + 1
        assert page.locator("script[src*='://']").count() == 0 and "\\frac" not in page.locator("article").inner_text()
