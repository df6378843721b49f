"""``unbraid init``, ``recipe``, ``recipes``, ``cite``: run files, and what they stand on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from unbraid.cli import complete
from unbraid.cli.common import AsJson, RunFile, Settings, fail, load_run


def init(
    data: Annotated[Path, typer.Argument(help="A Parquet or CSV file, or a folder of them, or of pictures.")],
    label: Annotated[
        list[str] | None, typer.Option(help="A label column (guessed if empty). Repeat it for several tasks.")
    ] = None,
    user: Annotated[str, typer.Option(help="User column (guessed if empty).")] = "",
    time: Annotated[str, typer.Option(help="Time column (guessed if empty).")] = "",
    domain: Annotated[
        str,
        typer.Option(
            help="Domain (scenario) column. Of pictures: `folder`, even if folders are called train and test."
        ),
    ] = "",
) -> None:
    """Look at the columns and print a commented run file; of a folder of pictures also write the table of its rows."""
    from unbraid.data.pictures import is_tree
    from unbraid.guess.beside import has_labels
    from unbraid.guess.infer import first_run

    try:
        if not label and is_tree(data) and not has_labels(data):
            if user or time or domain not in ("", "folder"):
                raise ValueError(
                    f"{data} holds pictures and no columns: no --user, no --time, --domain `folder` or none."
                )
            from unbraid.guess import pictures  # a run with a network needs more than a table's

            text, found = pictures.first_run(data, domain == "folder")
        else:
            text, found = first_run(data, label or [], user=user, time=time, domain=domain)
        print("\n".join(found), file=sys.stderr)
        print(text, end="")
    except (ValueError, OSError, ImportError) as error:
        fail(error)


def recipe(
    name: Annotated[
        str, typer.Argument(help="See `unbraid recipes`.", autocompletion=complete.among(complete.recipe_names))
    ],
    settings: Settings = None,
) -> None:
    """Print a recipe's run file."""
    from unbraid import config, recipes

    try:
        run = recipes.get(name)
        print(config.dumps(config.override(run, settings) if settings else run), end="")
    except ValueError as error:
        fail(error)


def recipes(as_json: AsJson = False) -> None:
    """List the recipes."""
    from unbraid import recipes as known

    found = {name: " ".join((make.__doc__ or "").split("\n\n")[0].split()) for name, make in known.RECIPES.items()}
    if as_json:
        print(json.dumps(found))
        return
    for name, line in found.items():
        print(f"{name:16} {line}")


def cite(run: RunFile = None, settings: Settings = None) -> None:
    """Print BibTeX of exactly the methods and data that a run uses."""
    from unbraid.citations import citations

    try:
        print(citations(load_run(run, settings)), end="")
    except ValueError as error:
        fail(error)
