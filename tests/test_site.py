"""The site leads to every page: the navigation, what its hook adds, and public names that explain themselves."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hook() -> Any:
    spec = importlib.util.spec_from_file_location("hook", DOCS / "site" / "hook.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_stands_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    shown = {page for section in nav for pages in section.values() for page in pages}
    made = {"contributing.md", "changelog.md"} | {"commands.md"}  # by the hook
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    pages = {page for page in pages if not page.startswith(("methods/", "gallery/"))}
    assert pages - shown <= {"commands.md"}, "put the page into `nav` of mkdocs.yml"
    assert shown - pages <= made


def test_the_hook_finds_methods_commands_and_modules(hook: Any) -> None:
    methods = {page for section in hook.methods() for pages in section.values() for page in pages}
    assert methods == {f"methods/{page.name}" for page in (DOCS / "methods").glob("*.md")}
    assert "Towers" in str(hook.methods()) and hook.slot_of(DOCS / "methods" / "transcal.md") == "Calibration"
    sections = hook.sections()
    assert {"train", "data describe", "store import"} <= set(sections) and "## Resume" not in "".join(sections.values())
    page = hook.command_page("train", sections["train"])
    assert "--overwrite" in page.partition("## Every option")[2], "what --help says stands below"
    assert not re.findall(r"\]\((?!\.\./|[a-z]+:)", page), "links lead out of the folder of commands"
    assert {"unbraid", "unbraid.towers", "unbraid.towers.stem"} <= set(hook.modules())
    shown = re.findall(r"reference/([\w.]+)\.md", str(hook.reference()))
    assert sorted(shown) == hook.modules(), "each once"


def test_a_page_that_loads_from_another_machine_is_a_warning(hook: Any, caplog: pytest.LogCaptureFixture) -> None:
    hook.on_post_page(
        '<a href="https://arxiv.org">paper</a><script src="assets/a.js"></script>', page=None, config=None
    )
    assert not caplog.records
    hook.on_post_page('<script src="https://cdn.example/a.js"></script>', page=None, config=None)
    hook.on_post_page('<link rel="stylesheet" href="https://fonts.example/a.css">', page=None, config=None)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


# -------------------------------------------------------------------------------------------------------------- evidence
SECTIONS = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", (DOCS / "evidence.md").read_text(), re.M | re.S)
PAPERS = [(name, text) for name, text in SECTIONS if "| verdict |" in text and "| claim |" in text]


NUMBER = re.compile(r"[-+]?\d*\.\d+")


def test_evidence_covers_ten_papers() -> None:
    assert len(PAPERS) == 10
    verdicts = (
        "confirmed",
        "within chance",
        "not confirmed",
        "contrary",
        "not tried",
        "in direction",
        "in part",
        "level",
        "above",
    )
    for name, text in PAPERS:
        rows = [line.split("|")[1:-1] for line in re.findall(r"^\|.*\|$", text, re.M)[2:]]
        assert all(row[-1].strip().startswith(verdicts) for row in rows), name
        assert "```console" in text, "how to repeat it"


@pytest.mark.parametrize(("name", "text"), PAPERS, ids=[name for name, _ in PAPERS])
def test_figures_of_the_evidence_stand_on_the_pages_that_it_names(name: str, text: str) -> None:
    """What stands between two semicolons stands on one line of a page: a figure that changes there and not here is found."""
    pages = [DOCS / page for page in re.findall(r"\]\(([a-z_/-]+\.md)", text)]
    pages += [DOCS / f"{page}.md" for page in ("results", "which-method", "transfer", "tencent")]
    lines = [set(NUMBER.findall(line)) for page in set(pages) for line in page.read_text().splitlines()]
    looked = 0
    for row in re.findall(r"^\|.*\|$", text, re.M)[2:]:
        for part in ";".join(row.split("|")[2:4]).split(";"):
            figures = set(NUMBER.findall(re.sub(r"\]\([^)]*\)", "", part)))
            assert not figures or any(figures <= line for line in lines), f"no line has all of {part.strip()}"
            looked += len(figures)
    assert looked >= 8


@pytest.mark.parametrize(("name", "text"), PAPERS, ids=[name for name, _ in PAPERS])
def test_commands_of_the_evidence_exist(name: str, text: str) -> None:
    for file in re.findall(r"(?:benchmarks|tests)/[\w/]+\.py", text):
        assert (ROOT / file).exists()
