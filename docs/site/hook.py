"""What the site has beside the pages of this folder: methods by slot, a page per command, notebooks, a page per module.

MkDocs calls the functions ``on_*`` (mkdocs.yml).  The pages in the repository stay what they are; links are made to fit.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.arithmatex import arithmatex_fenced_format

log = logging.getLogger("mkdocs.hook")  # --strict counts its warnings
LOADS = re.compile(r'<(?:script|img|iframe)[^>]* src="https?:[^"]*|<link[^>]* rel="stylesheet"[^>]* href="https?:[^"]*')
sys.path.append(str(Path(__file__).parent))
import equations  # noqa: E402  beside this file, which is no package
import notebooks  # noqa: E402

ROOT = Path(__file__).parents[2]
DOCS, SOURCE = ROOT / "docs", ROOT / "src"
SLOTS = {  # first word of a method's slot -> section of the navigation
    "model.tower": "Towers",
    "model.interaction": "Interactions",
    "model.history": "Histories",
    "model.numbers": "Numbers",
    "model.vectors": "Given vectors",
    "model.images": "Pictures",
    "losses": "Losses",
    "model.extra_heads": "Losses",
    "exposure": "Losses",
    "augment": "Views of a row",
    "update": "Updates",
    "schedule": "Schedules",
    "average": "Averages",
    "selection": "Selection",
    "calibrator": "Calibration",
}
TUTORIALS = (
    "own-log",
    "long-histories",
    "new-scenario",
    "pictures",
    "sick-model",
    "serving",
)  # in the order to read them


# --------------------------------------------------------------------------------------------------------------- methods
def slot_of(page: Path) -> str:
    """Section of a method's page, by its line **Slot.**"""
    (line,) = re.findall(r"^\*\*Slots?\.\*\* (.*)", page.read_text(), re.M)
    word = (
        "calibrator" if line.startswith("A calibrator") else re.findall(r"`\[*([a-z_.]+?)\]*(?:\.kind.*?)?`", line)[0]
    )
    return SLOTS[word]


def methods() -> list[dict[str, Any]]:
    """Navigation of the methods."""
    found: dict[str, list[str]] = {title: [] for title in SLOTS.values()}
    for page in sorted((DOCS / "methods").glob("*.md")):
        found[slot_of(page)].append(f"methods/{page.name}")
    return [{title: pages} for title, pages in found.items() if pages]


# -------------------------------------------------------------------------------------------------------------- commands
def sections() -> dict[str, str]:
    """Command -> its text in commands.md, without the heading."""
    parts = re.split(r"^## `unbraid ([a-z ]+)`\n", (DOCS / "commands.md").read_text(), flags=re.M)[1:]
    return {name: re.split(r"^## ", text, flags=re.M)[0] for name, text in zip(parts[::2], parts[1::2], strict=True)}


def help_of(name: str) -> str:
    """What ``unbraid NAME --help`` prints."""
    import typer
    from typer.main import get_command

    from unbraid.cli.main import app

    command: Any = get_command(app)
    for word in name.split():
        command = command.commands[word]
    return command.get_help(typer.Context(command, info_name=f"unbraid {name}", terminal_width=100))


def command_page(name: str, text: str) -> str:
    """The section of commands.md as a page one folder deeper, with every option below."""
    text = re.sub(r"\]\((?![a-z]+:|#)", "](../", text)
    text = re.sub(r"\]\(#", "](../commands.md#", text)
    return f"# `unbraid {name}`\n\n{text}\n## Every option\n\n```text\n{help_of(name).strip()}\n```\n"


# ------------------------------------------------------------------------------------------------------------- reference
def modules() -> list[str]:
    """Names of the public modules and packages."""
    parts = [path.relative_to(SOURCE).with_suffix("").parts for path in SOURCE.glob("unbraid/**/*.py")]
    names = {".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts}
    return sorted(name for name in names if "._" not in name and not name.endswith("__main__"))


def reference() -> list[Any]:
    """Navigation of the reference: packages with their modules, then the modules beside them."""
    names = modules()
    packages = [name for name in names if name != "unbraid" and any(other.startswith(name + ".") for other in names)]
    found: list[Any] = ["reference/unbraid.md"]
    found += [f"reference/{name}.md" for name in names if name.count(".") == 1 and name not in packages]
    return found + [
        {name: [f"reference/{n}.md" for n in names if n == name or n.startswith(name + ".")]} for name in packages
    ]


# ----------------------------------------------------------------------------------------------------------------- hooks
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A fence `math` is an equation; a function, which plain YAML cannot name."""
    fence = {"name": "math", "class": "arithmatex", "format": arithmatex_fenced_format(mode="generic")}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages and put them into the navigation."""

    def add(uri: str, text: str | bytes) -> str:
        files.append(File.generated(config, uri, content=text))
        return uri

    for name in ("CONTRIBUTING", "CHANGELOG"):
        add(f"{name.lower()}.md", (ROOT / f"{name}.md").read_text())
    for example in sorted((ROOT / "examples").glob("*.py")):
        add(f"examples/{example.name}", example.read_text())
    for name in modules():
        add(f"reference/{name}.md", f"# {name}\n\n::: {name}\n")
    tutorials = []
    for name in TUTORIALS:
        text, figures = notebooks.markdown(DOCS / "tutorials" / f"{name}.ipynb")
        tutorials.append(add(f"tutorials/{name}.md", text))
        for figure, data in figures.items():
            add(f"tutorials/{figure}", data)
    commands = [add(f"commands/{n.replace(' ', '-')}.md", command_page(n, text)) for n, text in sections().items()]
    generated = {
        "Methods": methods(),
        "Tutorials": tutorials,
        "Commands": commands,
        "Reference": reference(),
    }
    for section in config.nav or []:
        for title in generated.keys() & section.keys():
            section[title] += generated[title]
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of the repository links of the site; names of modules lead to the reference."""
    uri = page.file.src_uri
    up = "../" * uri.count("/")
    if uri == "commands.md":
        markdown = re.sub(r"^## `unbraid .*?(?=^## (?!`unbraid ))", "", markdown, flags=re.M | re.S)
        markdown = re.sub(r"\]\(#unbraid-", "](commands.md#unbraid-", markdown)
    if uri == "gallery.md":  # the reports as Markdown would have the names of the pages
        markdown = re.sub(r" \(\[as Markdown\]\(.*?\)\)", "", markdown)
    if uri in ("contributing.md", "changelog.md"):
        markdown = markdown.replace("](docs/", "](")
    markdown = re.sub(r"(\]\([\w./-]+)\.ipynb\)", r"\1.md)", markdown)
    markdown = re.sub(r"commands\.md#unbraid-([a-z-]+)", r"commands/\1.md", markdown)
    markdown = re.sub(r"\]\((?:\.\./)*examples/", f"]({up}examples/", markdown)
    markdown = re.sub(r"\]\((?:\.\./)+CONTRIBUTING\.md", f"]({up}contributing.md", markdown)

    def link(match: re.Match[str]) -> str:
        there = files.get_file_from_path(f"reference/{match[1]}.md")
        return match[0] if there is None else f"[{match[0]}]({up}reference/{match[1]}.md)"

    return (
        markdown
        if uri.startswith("reference/")
        else re.sub(r"(?<!\[)`(unbraid(?:\.[a-z_0-9]+)+)`(?!\])", link, markdown)
    )


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """LaTeX becomes MathML; what cannot be converted is a warning."""
    return equations.typeset(html, lambda said: log.warning("%s: %s", page.file.src_uri, said))


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """A page that loads from another machine is a warning: the site opens without a network."""
    for found in LOADS.findall(output):
        log.warning("%s loads from another machine: %s", page, found)
    return output
