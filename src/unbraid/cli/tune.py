"""``unbraid tune``: search for hyper-parameters on the validation split."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbraid.cli import complete
from unbraid.cli.common import AsJson, RunFile, Settings, load_run, refuse_unread, resumable

if TYPE_CHECKING:
    from unbraid.config import Run
    from unbraid.tune.space import Space


def tune(
    run: RunFile = None,
    trials: Annotated[int, typer.Option(help="Trials in all, those of a resumed search included.")] = 20,
    space: Annotated[
        Path | None, typer.Option(help="TOML file of what varies. [default: the run file's table `tune`]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the search. [default: runs/NAME-tune]")] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="Objective on the validation split: a metric, or TASK.metric. [default: training.metric]",
            autocompletion=complete.among(complete.metric_names),
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(help="Trainings of each trial; the objective is their mean.")] = 1,
    pruner: Annotated[
        str,
        typer.Option(
            help="When to stop a trial early: median, hyperband or none.",
            autocompletion=complete.among(lambda: ("median", "hyperband", "none")),
        ),
    ] = "median",
    jobs: Annotated[int, typer.Option(help="Trials at once, each in a process with one thread.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Of the draws. [default: the run's]")] = None,
    test: Annotated[
        int,
        typer.Option(help="At the end compare the best with the run as it is on the test split, so many seeds each."),
    ] = 0,
    settings: Settings = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each trial, instead of the run's epochs.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue the search in --out.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete the search in --out first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search for hyper-parameters: train candidates, judge them on the validation split, write the best as a run file."""
    from unbraid.progress import Console
    from unbraid.tune.search import tune as search

    with resumable():
        choice = load_run(run, settings, None, steps)
        refuse_unread([choice], settings, steps)
        folder = out or Path("runs") / f"{choice.name}-tune"
        with Console(quiet=as_json) as watcher:
            found = search(
                choice, folder, trials=trials, space=_space(space or run, choice), metric=metric, seeds=seeds, pruner=pruner,
                jobs=jobs, seed=seed, test=test, resume=resume, overwrite=overwrite, watcher=watcher,
            )  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    show(found)
    print(f"best    {folder / 'best.toml'}   (unbraid train {folder / 'best.toml'})")
    print(f"report  {folder / 'report.md'}   numbers  {folder / 'tune.json'}")
    if (page := folder / "report.html").exists():
        print(f"page    {page}   (opens in a browser, without a network)")


def _space(path: Path | None, run: Run) -> Space | None:
    """The space of a file; None, with a word about what varies then, if there is no file or none in it."""
    from unbraid.tune import space as spaces

    found = None if path is None else spaces.load(path, run)
    if found is None:
        keys = ", ".join(dimension.key for dimension in spaces.default(run))
        print(f"no table `tune` and no --space: {keys} vary", file=sys.stderr)
    return found


def show(found: dict[str, Any]) -> None:
    """Print the best trials, what the best changes, and the differences on the test split."""
    from rich.console import Console

    from unbraid.render import comparison_cells, table
    from unbraid.report import tuning

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table(*tuning.trial_cells(found, tuning.SHOWN), left=2))
    console.print(table(*tuning.best_cells(found), left=1))
    said, differences = tuning.tested(found)
    if differences is not None:
        console.print(table(*comparison_cells(found["test"], console.width < 118)[0], left=2))
    for line in (tuning.headline(found), tuning.counts(found), *([said] if differences is None else [])):
        console.print(line, soft_wrap=True, markup=False)
