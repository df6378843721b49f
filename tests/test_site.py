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


# ------------------------------------------------------------------------------------------------------------- equations
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize(
    ("latex", "parts"),
    [
        (r"s = \sum_{i<j} r_{ij}", ["<munder><mo>∑</mo>", "<mo>&lt;</mo>", "<msub><mi>r</mi>"]),
        (r"\begin{aligned} a &= b && \text{x} \\ c &= d \end{aligned}", ['class="aligned"', '<mtd class="right">', "<mtext>x"]),
        (r"p_j \log p_j", ['<mspace width="0.167em" /><mi>log</mi><mspace width="0.167em" />']),
        (r"\mathrm{softmax}(-x)", ['<mi>softmax</mi><mo stretchy="false">(</mo><mo form="prefix">−</mo>']),
    ],
)  # fmt: skip
def test_an_equation_is_mathml(hook: Any, latex: str, parts: list[str]) -> None:
    found = hook.equations.mathml(latex, display=True)
    assert found.startswith('<div class="equation"><math display="block">') and found.endswith("</math></div>")
    assert all(part in found for part in parts), found


@pytest.mark.parametrize(
    ("latex", "says"),
    [
        (r"\frac{a}", "a part is missing (mfrac)"), (r"\frac{a}{b", "braces"), (r"\unheard{x}", r"unknown command \unheard"),
        (r"\begin{tikz} a \end{tikz}", "unknown environment tikz"), (r"\begin{aligned} a", "MissingEndError"),
        ("a & b", "ParseError"), (r"a \\ b", "outside of aligned"), ("x^2^3", "DoubleSuperscripts"),
        (r"\left( a", "MissingRight"), (r"\operatorname{mean} x", r"does not allow \operatorname: write \mathrm{name}"),
    ],
)  # fmt: skip
def test_what_is_no_equation_is_an_error(hook: Any, latex: str, says: str) -> None:
    with pytest.raises(hook.equations.EquationError, match=re.escape(says)):
        hook.equations.mathml(latex, display=True)
    if "\\\\" not in latex:
        with pytest.raises(hook.equations.EquationError):
            hook.equations.mathml(latex, display=False)


def test_inline_equations_keep_what_markdown_would_take(hook: Any) -> None:
    with pytest.raises(hook.equations.EquationError, match="backslash"):
        hook.equations.mathml(r"\{a\}", display=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_equations_of_the_pages_are_whole(hook: Any, page: Path) -> None:
    text = page.read_text()
    for latex in re.findall(r"^```math\n(.*?)^```$", text, re.M | re.S):
        hook.equations.mathml(latex, display=True)
    prose = re.sub(r"^( *)(```+).*?^\1\2$|`[^`\n]+`", "", text, flags=re.M | re.S)
    for latex in re.findall(r"\$([^$]+)\$", prose):
        assert "\n" not in latex, "a lone $"
        hook.equations.mathml(latex, display=False)
    equations = text.partition("\n## Equations\n")[2].partition("\n## ")[0]
    assert "methods" not in page.parts or "```text" not in equations, "an equation is a fence `math`"


def test_a_page_whose_equation_is_none_breaks_the_build(tmp_path: Path) -> None:
    """The hook's equations alone, in a site of one page."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "hook.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('whole', {str(DOCS / 'site' / 'hook.py')!r})\n"
        "whole = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(whole)\n"
        "on_config, on_page_content = whole.on_config, whole.on_page_content\n"
    )
    real = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config: dict[str, Any] = {"site_name": "one page", "hooks": ["hook.py"], "strict": True, "plugins": []}
    config["markdown_extensions"] = [one for one in real["markdown_extensions"] if "toc" not in one]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    page = tmp_path / "docs" / "index.md"
    page.write_text("Of $n_t$ rows, not `$n_t$`:\n\n```math\n\\frac{a}{b}\n```\n")
    build(load_config(str(tmp_path / "mkdocs.yml")))
    html = (tmp_path / "site" / "index.html").read_text()
    assert html.count("<math") == 2 and "<mfrac><mrow><mi>a</mi></mrow>" in html and "<code>$n_t$</code>" in html
    page.write_text("```math\n\\frac{a}\n```\n")
    with pytest.raises(Abort, match="1 warning"):
        build(load_config(str(tmp_path / "mkdocs.yml")))


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
