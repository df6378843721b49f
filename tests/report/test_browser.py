"""The page in a real Chromium, driven by Playwright: what only a browser can say.

Screenshots are written to the test's folder, and to UNBRAID_SCREENSHOTS where that is set.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browserkit import opened
from reportkit import HOSTILE, comparison, gaps, hostile, make_report

from unbraid.report import compare_html, html

axe = pytest.importorskip("axe_playwright_python", reason="needs axe: pip install axe-playwright-python")
pytest.importorskip("altair")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    reports = {"toy": make_report(), "uw": make_report(diagnoses=make_report().diagnoses[1:], proofs=())}
    unknown = replace(make_report().diagnoses[0], remedies=(), evidence={"plots": gaps()})
    empty = make_report(diagnoses=(unknown,), metrics={}, baseline={}, curve=())
    pages = {
        "gaps": html(empty),
        "report": html(make_report()),
        "hostile": html(hostile()),
        "comparison": compare_html(comparison(), reports),
    }
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page)
    return {name: folder / f"{name}.html" for name in pages}


def show(one: Any) -> None:
    """Scroll to it at once: Playwright's own waits for frames in which it stands still."""
    one.evaluate("it => it.scrollIntoView({block: 'center', behavior: 'instant'})")


def draw_all(page: Any) -> int:
    """Scroll to every plot, so that it is drawn, about where its place was kept; how many there are."""
    page.evaluate("document.querySelectorAll('details.plots').forEach((each) => { each.open = true; })")
    plots = page.locator(".plot")
    for i in range(plots.count()):
        kept = plots.nth(i).bounding_box()["height"]
        show(plots.nth(i))
        page.wait_for_selector(f"#{plots.nth(i).get_attribute('id')}[data-drawn] svg")
        assert plots.nth(i).bounding_box()["height"] - kept < 100, "what is read would jump"
    page.evaluate("scrollTo(0, 0)")
    return int(plots.count())


def shot(page: Any, folder: Path, name: str) -> None:
    for place in {folder, Path(os.environ.get("UNBRAID_SCREENSHOTS", folder))}:
        place.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=place / f"{name}.png", full_page=True)
        assert (place / f"{name}.png").stat().st_size > 20_000


def violations(page: Any) -> list[str]:
    """What axe-core calls serious or critical, or anything less; run from the test, past the page's own policy."""
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{each['impact']} {each['id']}: {each['nodes'][0]['html'][:200]}" for each in found]


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("report", 1280, "light"), ("report", 1280, "dark"), ("report", 360, "light"), ("comparison", 1280, "light"),
        ("comparison", 360, "dark"), ("hostile", 1280, "light"), ("gaps", 360, "dark"),
    ],
)  # fmt: skip
def test_all_is_drawn_nothing_is_asked_for_and_axe_finds_nothing(
    browser: Any, files: dict[str, Path], tmp_path: Path, name: str, width: int, scheme: str
) -> None:
    with opened(browser, files[name], width, scheme) as page:
        assert draw_all(page) == {"report": 7, "comparison": 1, "hostile": 2, "gaps": 5}[name]
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        for details in page.locator("details:not(.plots) > summary").all():
            details.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert violations(page) == []
        for details in page.locator("details:not(.plots) > summary").all():
            details.click()
        page.evaluate("scrollTo(0, 0)")
        shot(page, tmp_path, f"{name}-{width}-{scheme}")


def test_hostile_names_are_texts(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["hostile"]) as page:
        draw_all(page)
        assert page.locator("h1").inner_text() == HOSTILE
        assert page.locator("#plot-1 svg text", has_text="<script>").count() > 0
        page.locator("#plot-1 .mark-rect path").first.hover()
        page.wait_for_selector("#vg-tooltip-element.visible")
        assert HOSTILE[:20] in page.locator("#vg-tooltip-element").inner_text()
        assert page.locator("#vg-tooltip-element script").count() == 0


def test_tables_sort_and_filter(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["report"]) as page:
        table = page.locator("table.sortable")

        def column(at: int) -> list[str]:
            return table.locator(f"tbody tr:visible > :nth-child({at})").all_inner_texts()

        head = table.locator("thead th").nth(2)
        head.locator("button").click()
        rows = [int(text) for text in column(3)]
        assert rows == sorted(rows) and head.get_attribute("aria-sort") == "ascending"
        head.locator("button").press("Enter")
        rows = [int(text) for text in column(3)]
        assert rows == sorted(rows, reverse=True) and head.get_attribute("aria-sort") == "descending"
        auc = table.locator("thead th").nth(4)
        auc.locator("button").click()
        values = [float(text.split()[0]) for text in column(5)]
        assert values == sorted(values) and head.get_attribute("aria-sort") == "none"
        difference = table.locator("thead th").nth(10)
        difference.locator("button").click()
        assert (found := [float(text) for text in column(11)]) == sorted(found)
        page.get_by_label("Filter").fill("LIKE mail")
        assert [column(1), column(2)] == [["like"], ["mail"]]
        assert page.locator("output").first.inner_text() == "1 of 15 lines"
        page.get_by_label("Filter").fill("")
        assert len(column(1)) == 15


def test_plots_answer_the_mouse(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["report"]) as page:
        draw_all(page)
        bars = page.locator("#plot-2 .mark-rect path")
        bars.first.hover(position={"x": 3, "y": 3})
        page.wait_for_selector("#vg-tooltip-element.visible")
        tip = page.locator("#vg-tooltip-element").inner_text()
        assert "click" in tip and "0.011" in tip and "difference in AUC" in tip
        losses = page.locator("#plot-6")
        show(losses)

        def faint() -> list[str]:
            return losses.locator(".mark-line path").evaluate_all(
                "all => all.map(line => line.getAttribute('opacity') ?? '1')"
            )

        assert faint() == ["1", "1", "1"]
        losses.locator(".role-legend-label text", has_text="like").click()
        page.wait_for_function("document.querySelectorAll('#plot-6 .mark-line path[opacity=\"0.12\"]').length === 2")
        assert faint() == ["0.12", "1", "0.12"]
        ticks = "[...document.querySelectorAll('#plot-6 .role-axis-label text')].map(one => one.textContent).join()"
        before = page.evaluate(ticks)
        at = page.evaluate("scrollY")
        box = losses.locator("svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
        page.mouse.wheel(0, -400)
        page.wait_for_function("at => scrollY < at", arg=at)
        assert page.evaluate(ticks) == before, "the wheel alone scrolls the page"
        show(losses)
        box = losses.locator("svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
        page.keyboard.down("Shift")
        page.mouse.wheel(0, -400)
        page.keyboard.up("Shift")
        page.wait_for_function(f"before => {ticks} !== before", arg=before)  # with Shift it zooms


def test_dark_follows_the_system_and_the_button(browser: Any, files: dict[str, Path]) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, files["report"], scheme="dark") as page:
        button = page.get_by_role("button", name="Dark colours")
        draw_all(page)
        dark = page.evaluate(back)
        assert (
            button.get_attribute("aria-pressed") == "true"
            and page.locator("#plot-1").get_attribute("data-drawn") == "dark"
        )
        button.click()
        page.wait_for_selector("#plot-1[data-drawn=light]")
        light = page.evaluate(back)
        assert button.get_attribute("aria-pressed") == "false" and light == "rgb(255, 255, 255)" != dark
        page.reload()
        assert page.evaluate(back) == light, "the choice is remembered"
    with opened(browser, files["report"]) as page:
        assert page.evaluate(back) == light
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(back) == dark, "without a choice it follows the system"


def test_keyboard_and_words(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["report"]) as page:
        draw_all(page)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.get_by_role("link", name="AUC: what it means", exact=True).last.click()
        page.wait_for_url("**#word-auc")
        assert page.locator("#word-auc").is_visible()
        with page.expect_download() as download:
            page.locator("#finding-1 details").first.locator("summary").click()
            page.get_by_role("link", name="Save as uw.toml").click()
        assert re.search(r'kind = "weighted"', Path(download.value.path()).read_text())


def test_without_scripts_all_numbers_are_there(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["report"], java_script_enabled=False) as page:
        assert page.locator("noscript p", has_text="Without JavaScript plots are not drawn").count() == 7
        assert not page.get_by_label("Filter").is_visible() and not page.locator("#theme").is_visible()
        page.locator("#finding-1 figure details summary").first.click()
        assert page.locator("#finding-1 figure table").first.is_visible()
