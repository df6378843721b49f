"""What the shell offers behind an argument that names something: recipes, checks, metrics, a bundle's tasks.

The modules that define these names load torch, and a shell waits no second for a word.  So the names are read from the source
of those modules; a test holds them to what is there when it is loaded.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import typer

PACKAGE = Path(__file__).parents[1]
Offer = Callable[[str], list[str]]


def _assigned(file: str, name: str) -> ast.expr:
    """The value that a module assigns to a name."""
    for node in ast.parse((PACKAGE / file).read_text("utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value
    raise LookupError(f"{file} assigns nothing to {name}")


def _named(folder: str, pattern: str) -> Iterator[str]:
    """What a pattern finds in the modules of a folder."""
    for file in sorted((PACKAGE / folder).glob("*.py")):
        yield from re.findall(pattern, file.read_text("utf-8"))


def recipe_names() -> list[str]:
    """All recipes: functions in a tuple of `unbraid.recipes`."""
    made = _assigned("recipes.py", "RECIPES")
    return [
        x.id for each in ast.walk(made) if isinstance(each, ast.Tuple) for x in each.elts if isinstance(x, ast.Name)
    ]


def metric_names() -> list[str]:
    """Metrics of all kinds of tasks."""
    return sorted({name for names in ast.literal_eval(_assigned("measures.py", "NAMES")).values() for name in names})


def check_names() -> list[str]:
    """What `unbraid diagnose` looks for."""
    return sorted(set(_named("diagnosis", r'(?m)^    name: ClassVar\[str\] = "(\w+)"')))


def method_names() -> list[str]:
    """How `unbraid calibrate` fits."""
    return sorted(set(_named("calibration", r'kind: Literal\["(\w+)"\]')))


def among(names: Callable[[], Iterable[str]]) -> Offer:
    """A completion from the names that a function finds when it is asked."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def tasks(ctx: typer.Context, incomplete: str) -> list[str]:
    """Tasks of the bundle that the line names before; nothing where there is none yet."""
    try:
        bundle = ctx.params.get("bundle") or ctx.args[0]  # an option without its value yet leaves arguments there
        schema = json.loads((Path(bundle) / "schema.json").read_text("utf-8"))["schema"]
        return [task["name"] for task in schema["tasks"] if task["name"].startswith(incomplete)]
    except (LookupError, TypeError, OSError, ValueError):
        return []


def runs(incomplete: str) -> list[str]:
    """Recipes, and run files (or folders of some) that begin so."""
    folder, slash, start = incomplete.rpartition("/")
    try:
        there = sorted(Path(folder + slash or ".").iterdir())
    except OSError:
        there = []
    found = [
        f"{folder}{slash}{p.name}{'/' * p.is_dir()}" for p in there if p.name.startswith(start) and p.name[0] != "."
    ]
    return [name for name in recipe_names() if name.startswith(incomplete)] + [
        f for f in found if f.endswith(("/", ".toml"))
    ]
