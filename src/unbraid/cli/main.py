"""The command line.  torch and the rest are imported when a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from unbraid.cli.calibrate import calibrate
from unbraid.cli.common import fail
from unbraid.cli.compare import compare
from unbraid.cli.data import data_app
from unbraid.cli.diagnose import diagnose
from unbraid.cli.export import export
from unbraid.cli.predict import evaluate, predict, uncertainty
from unbraid.cli.runs import cite, init, recipe, recipes
from unbraid.cli.serve import serve
from unbraid.cli.store import store_app
from unbraid.cli.train import train
from unbraid.cli.tune import tune

app = typer.Typer(
    help="Train recommendation and transfer models whose tasks and domains share parameters without hurting each other.",
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
COMMANDS = (
    train, compare, evaluate, predict, uncertainty, calibrate, diagnose, export, serve, tune, recipe, recipes, init, cite,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.add_typer(data_app, name="data")
app.add_typer(store_app, name="store")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"unbraid {version('unbraid')}")
        except PackageNotFoundError:
            print("unbraid, from a source tree that is not installed")
        raise typer.Exit


def _require_one_process(command: str | None) -> None:
    """End with a message if torchrun started several processes of a command that does not train together."""
    if command not in (None, "train") and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        fail(
            ValueError(
                f"torchrun started several processes of `unbraid {command}`, which would all do the same. Several processes are "
                "for `unbraid train`; start this one without torchrun."
            )
        )


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train recommendation and transfer models whose tasks and domains share parameters without hurting each other."""
    _require_one_process(context.invoked_subcommand)


def main() -> None:
    """Entry point of the command line."""
    app()
