"""What commands share: options, the run that a command line names, one way to fail, tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from unbraid.config import Run

RunFile = Annotated[Path | None, typer.Argument(help="Run file (TOML). None: the bundled log with the default recipe.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value: `--set training.epochs=2`. Repeat it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Raw = Annotated[bool, typer.Option("--raw", help="Without the bundle's calibrators.")]
Passes = Annotated[int, typer.Option("--mc-dropout", help="Mean of so many passes with dropout. [default: 0, off]")]


def fail(error: Exception, process: int = 0) -> NoReturn:
    """Print one clear message, of a process other than the first with its number, and end with 2."""
    typer.secho(f"unbraid{f' (process {process})' if process else ''}: {error}", fg="red", err=True)
    raise typer.Exit(2)


@contextmanager
def resumable() -> Iterator[None]:
    """Around a command that ``--resume`` continues: mistakes and interruptions are one message each, and end with 2."""
    from unbraid.preflight import JobError

    try:
        yield
    except (ValueError, JobError, OSError, ImportError, FloatingPointError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted; continue with the same command and --resume"))


def load_run(
    path: Path | None, settings: list[str] | None, seed: int | None = None, steps: int | None = None, init: Path | None = None,
    recipe: str = "",
) -> Run:  # fmt: skip
    """The run of a file (or of a recipe, the default one if none is named) with the command line's changes."""
    import dataclasses

    from unbraid import config, recipes

    run = config.load(path) if path is not None else recipes.get(recipe) if recipe else recipes.DEFAULT()
    if settings:
        run = config.with_base(config.override(run, settings), Path.cwd())  # paths that were typed are of here
    if seed is not None:
        run = dataclasses.replace(run, seed=seed)
    if init is not None:
        run = dataclasses.replace(run, init=str(init.resolve()))
    if steps is not None:
        run = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=steps))
    return run


def refuse_unread(runs: Sequence[Run], settings: list[str] | None, steps: int | None) -> None:
    """Raises ValueError when the command line sets a budget that the schedule of no run reads."""
    given = {key: f"--set training.{key}" for key in ("epochs", "steps", "evaluate_every", "metric", "patience")
             if any(text.partition("=")[0].strip() == f"training.{key}" for text in settings or ())}  # fmt: skip
    given |= {"steps": "--steps"} if steps is not None else {}
    unread = [set(getattr(run.schedule, "unread", ())) for run in runs]
    if options := [option for key, option in given.items() if all(key in keys for keys in unread)]:
        kinds = ", ".join(sorted({run.schedule.kind for run in runs}))
        instead = dict.fromkeys(f"schedule.{key}" for run in runs for key in getattr(run.schedule, "budget", ()))
        hint = f" Set {' or '.join(instead)} instead." if instead else ""
        raise ValueError(f"{', '.join(options)}: schedule {kinds} does not read it.{hint}")


def show(metrics: dict[str, Any], baseline: dict[str, Any] | None = None) -> None:
    """Print a table of metrics as wide as the terminal (120 columns where there is none)."""
    from rich.console import Console

    from unbraid.render import render_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(render_table(metrics, baseline, width=console.width))
