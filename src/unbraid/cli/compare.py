"""``unbraid compare``: several runs and seeds in one table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from unbraid.cli import complete
from unbraid.cli.common import AsJson, Settings, load_run, refuse_unread, resumable


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Run files (TOML) or names of recipes.", metavar="RUN...", autocompletion=complete.runs),
    ],
    seeds: Annotated[int, typer.Option(help="Each run trains so many times: with its own seed, seed + 1, ...")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the comparison and of all bundles.")] = Path("runs/compare"),
    against: Annotated[str, typer.Option(help="The reference, or target_encoding. [default: the first run]")] = "",
    metric: Annotated[
        str,
        typer.Option(
            help="What differences are of. [default: auc, accuracy or rmse, by the task's kind]",
            autocompletion=complete.among(complete.metric_names),
        ),
    ] = "",
    settings: Settings = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of the runs' epochs.")] = None,
    any_budget: Annotated[bool, typer.Option("--any-budget", help="Let runs differ in their training budget.")] = False,
    domains: Annotated[bool, typer.Option("--domains", help="Print the table of domains, too.")] = False,
    resume: Annotated[bool, typer.Option(help="Keep what is finished in --out and continue.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Train all of it again, whatever is in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train several runs with several seeds and print which differences are more than chance.

    Runs are told apart by `name`; they need the same test rows and the same training budget.  Target encoding takes
    part wherever a run has an id feature, a user or a domain.
    """
    from unbraid import config, recipes
    from unbraid.compare import compare as job
    from unbraid.progress import Console

    with resumable():
        for name in runs:
            if name not in recipes.RECIPES and not Path(name).suffix and not Path(name).exists():
                raise config.RunError(
                    f"`{name}` is neither a run file nor a recipe. Recipes: {', '.join(recipes.RECIPES)}."
                )
        chosen = [load_run(None if r in recipes.RECIPES else Path(r), settings, None, steps, recipe=r) for r in runs]
        refuse_unread(chosen, settings, steps)
        with Console(quiet=as_json) as watcher:
            found = job(
                chosen, out, seeds=seeds, against=against, metric=metric, any_budget=any_budget, resume=resume,
                overwrite=overwrite, watcher=watcher,
            )  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    show_comparison(found, domains)
    print(f"report  {out / 'compare.md'}   numbers  {out / 'compare.json'}   bundles  {out}/NAME/seed-S")


def show_comparison(found: dict[str, Any], domains: bool) -> None:
    """Print the tables of a comparison as wide as the terminal (120 columns where there is none)."""
    from rich.console import Console

    from unbraid.render import budget, comparison_cells, remarks, table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    main, cost, parts = comparison_cells(found, console.width < 118)
    for cells in (main, *([parts] if domains and parts[1] else []), cost):
        console.print(table(*cells, left=2))
    for line in [*remarks(found, domains), budget(found).replace("**", "")]:
        console.print(line, soft_wrap=True, markup=False)
