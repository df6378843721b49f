"""The pages say what the code does: run files load, commands parse, examples run, links resolve, members have pages."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toylog import config_classes, make_log, make_run
from typer.main import get_command

from unbraid import config
from unbraid.bundle import build
from unbraid.cli.main import app
from unbraid.data.declaration import Data
from unbraid.job import train
from unbraid.types import BUILT_IN, Schema

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
METHODS = DOCS / "methods"
PAGES = sorted(DOCS.rglob("*.md")) + [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if page.exists()]
LONG = {"online_loop"}  # run by tests/serve/test_loop.py
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem not in LONG)

BASE: dict[str, Any] = {
    "data": {
        "rows": "log",
        "user": "user",
        "time": "time",
        "features": [{"name": "item_id"}, {"name": "brand"}],
        "tasks": [{"name": "click"}, {"name": "buy"}],
        "split": {"kind": "user"},
    }
}  # what a snippet of a run file is put into


def test_the_concepts_name_every_member_of_a_slot_that_has_no_page() -> None:
    unions = {
        "model.history": config.HistoryChoice, "model.numbers": config.NumberChoice, "model.vectors": config.VectorChoice,
        "model.images": config.ImageChoice, "model.texts": config.TextChoice,
        "model.interaction": config.InteractionChoice, "model.tower": config.TowerChoice, "losses": config.TermChoice,
        "schedule": config.ScheduleChoice, "average": config.AverageChoice,
    }  # fmt: skip
    rows = dict(re.findall(r"^\| `([a-z.]+)` \| .*? \| (.*) \|$", (DOCS / "concepts.md").read_text(), re.M))
    for slot, union in unions.items():
        kinds = {member.kind for member in typing.get_args(typing.get_args(union)[0])}
        assert kinds <= set(re.findall(r"[a-z_0-9]+", rows[slot])) | {page.stem for page in METHODS.glob("*.md")}, slot


def text_of(page: Path) -> str:
    """A page without the whole files that it shows between four ticks: they are not its own words."""
    return re.sub(r"^````.*?^````$", "", page.read_text(), flags=re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.M | re.S)


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)


def all_blocks(language: str) -> list[Any]:
    found = [(page, n, text) for page in PAGES for n, text in enumerate(blocks(page, language))]
    return [pytest.param(page, text, id=f"{page.relative_to(ROOT)}-{n}") for page, n, text in found]


def merged(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        both = {key: merged(base[key], change[key]) for key in base.keys() & change.keys()}
        return {**base, **change, **both}
    return change


# --------------------------------------------------------------------------------------------------------------- blocks
@pytest.mark.parametrize(("page", "text"), all_blocks("toml"))
def test_run_files_load(page: Path, text: str, tmp_path: Path) -> None:
    plain = tomllib.loads(text)
    if {"rows", "features", "tasks"} <= set(plain.get("data", {})):
        (tmp_path / "run.toml").write_text(text)
        config.load(tmp_path / "run.toml")
        return
    split = plain.get("data", {}).get("split")  # kinds of splits have keys of their own
    base = copy.deepcopy(BASE)
    if split:
        base["data"].pop("split")
    config.from_dict(merged(base, plain), str(page))


def test_there_is_a_whole_run_on_the_page() -> None:
    found = [tomllib.loads(block).get("data", {}) for block in blocks(DOCS / "run-file.md", "toml")]
    assert any({"rows", "features", "tasks"} <= set(data) for data in found)


def small_schema(data: Data) -> Schema:
    """What encoding might have found, without reading anything."""
    vocabularies = [f.vocab for f in (*data.features, *data.fields)]
    sizes = dict.fromkeys([*vocabularies, *BUILT_IN], 3)
    widths = {f.name: 4 for f in data.features if f.kind == "vector"}
    declared = data.features, data.tasks, data.histories, data.fields
    classes = {task.name: ("a", "b") for task in data.tasks if task.kind == "multiclass"}
    return Schema(*declared, ("(unknown)", "(missing)", "a"), sizes, widths, classes=classes)


@pytest.mark.parametrize("page", sorted(METHODS.glob("*.md")), ids=lambda page: page.stem)
def test_python_of_a_method_makes_a_run(page: Path) -> None:
    (text,) = blocks(page, "python")
    names: dict[str, Any] = {}
    exec(compile(text, str(page), "exec"), names)
    for run in [value for value in names.values() if isinstance(value, config.Run)]:
        assert config.from_dict(tomllib.loads(config.dumps(run))) == run, "what is not valid shows here"
        build(run, small_schema(run.data))  # what does not fit together shows here
    assert isinstance(names["run"], config.Run)
    for card in ("**Paper", "**Slot", "**Module", "**For.**", "**Not for.**"):
        assert card in page.read_text().partition("\n## ")[0], f"the card lacks {card}"
    for heading in ("Idea", "Equations", "Shapes", "Usage", "Differences", "What is tested", "What reproduced"):
        assert f"\n## {heading}\n" in page.read_text()


# ------------------------------------------------------------------------------------------------------------- commands
def command_lines() -> list[str]:
    lines: set[str] = set()
    for page in PAGES:
        text = text_of(page).replace("\\\n", " ")
        for block in re.findall(r"^```(?:console|sh|bash|shell)\n(.*?)^```", text, re.M | re.S):
            found = re.findall(r"^(?:\$ )?(?:\.venv/bin/)?unbraid (.+)$", block, re.M)
            lines.update("! " + line for line in found)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines.update("~ " + line for line in re.findall(r"`unbraid ([a-z][^`]*)`", prose))
    return sorted(lines)


@pytest.mark.parametrize("line", command_lines())
def test_commands_parse(line: str) -> None:
    whole, words = line[0] == "!", shlex.split(line[2:], comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in (">", "|", "&&", ";", "2>")), len(words))]
    command: Any = get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= options | {"--help"}
    if whole and "--help" not in words:
        command.make_context("unbraid", list(words))  # raises for missing arguments and values of the wrong type


def test_every_command_has_a_section() -> None:
    command: Any = get_command(app)
    text = (DOCS / "commands.md").read_text()
    for name, sub in command.commands.items():
        for full in [f"{name} {inner}" for inner in getattr(sub, "commands", {})] or [name]:
            assert f"\n## `unbraid {full}`\n" in text


@pytest.mark.parametrize("name", ["train", "compare", "calibrate", "tune"])
def test_every_option_is_described(name: str) -> None:
    command: Any = get_command(app)
    text = (DOCS / "commands.md").read_text().partition(f"\n## `unbraid {name}`\n")[2].partition("\n## ")[0]
    for parameter in command.commands[name].params:
        names = [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--")]
        assert not names or any(f"`{name}" in text for name in names), names


# ------------------------------------------------------------------------------------------------------------- examples
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    ours = {"OMP_NUM_THREADS": "1", "UNBRAID_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT / "src")}
    environment = {**os.environ, **ours}
    assert len(path.read_text().splitlines()) <= 40
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "AUC" in done.stdout or "accurac" in done.stdout


# ---------------------------------------------------------------------------------------------------------------- links
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name} links to {target}"
        if anchor and other.suffix == ".md":
            assert anchor in anchors(other), f"{page.name} links to {target}"


def test_no_page_holds_a_placeholder() -> None:
    lone = {str(page.relative_to(ROOT)): re.findall(r"^[A-Z][A-Z_]+$", page.read_text(), re.M) for page in PAGES}
    assert not {page: words for page, words in lone.items() if words}


# -------------------------------------------------------------------------------------------------------------- members
def tables_of_keys(text: str) -> list[list[tuple[str, str]]]:
    """The page's tables of keys: (key, default) of each line."""
    tables = re.findall(r"^\| key \| type \| default \| meaning \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    return [re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", table, re.M) for table in tables]


ALL_TABLES = [
    table for page in (DOCS / "run-file.md", *METHODS.glob("*.md")) for table in tables_of_keys(page.read_text())
]


@pytest.mark.parametrize("cls", config_classes())
def test_every_key_of_a_run_file_is_on_the_page(cls: Any) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    tables = [table for table in ALL_TABLES if [n for n, _ in table] == names]
    assert tables, f"no table has the keys of {cls.__name__}: {names}"
    kind = getattr(cls, "kind", None) if any(f.name == "kind" and f.kw_only for f in dataclasses.fields(cls)) else None
    shown = {f.name: written_default(f) for f in dataclasses.fields(cls)}
    fitting = [table for table in tables if kind is None or dict(table)["kind"] == f'`"{kind}"`']
    right = [all(shown[name] in (None, default) for name, default in table) for table in fitting]
    assert any(right), f"{cls.__name__}: {shown}"


def written_default(f: dataclasses.Field) -> str | None:
    """A key's default as the page writes it, None where it is another dataclass."""
    if f.default is dataclasses.MISSING:
        return "**required**" if f.default_factory is dataclasses.MISSING else "its defaults"
    value = list(f.default) if isinstance(f.default, tuple) else f.default
    if dataclasses.is_dataclass(value) or isinstance(value, list) and any(dataclasses.is_dataclass(v) for v in value):
        return None
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def slot_members() -> list[type]:
    found = []
    for name in [n for n in vars(config) if n.endswith("Choice") and n != "ModelChoice"]:
        choice = getattr(config, name)
        inner = typing.get_args(choice)[0] if typing.get_origin(choice) is typing.Annotated else choice
        found += typing.get_args(inner) or [inner]
    return found


@pytest.mark.parametrize("member", slot_members())
def test_every_member_has_a_page(member: Any) -> None:
    kind = member().kind
    assert (METHODS / f"{kind}.md").exists() or f"`{kind}`" in (DOCS / "run-file.md").read_text()


# --------------------------------------------------------------------------------------------------- the worked example
def test_the_worked_example_trains_from_python(tmp_path: Path) -> None:
    """tests/test_add_a_method.py follows the whole page."""
    module = types.ModuleType("worked_example")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    (text,) = blocks(DOCS / "add-a-method.md", 'python title="src/unbraid/encoders/max_pooling.py"')
    exec(compile(text, "add-a-method.md", "exec"), module.__dict__)
    run = make_run(training=replace(make_run().training, steps=5, evaluate_every=5))
    run = replace(run, model=replace(run.model, history=module.Max()))
    result = train(run, tables={"log": make_log()}, baseline=False)
    del sys.modules[module.__name__]
    assert result.metrics["test"]["click"]["auc"]["value"] > 0
    assert "seen.item" in result.bundle.model.interactions["view/shared"].fields
