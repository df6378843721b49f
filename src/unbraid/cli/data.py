"""``unbraid data``: what is in a log, and logs of others made ready."""

from __future__ import annotations

import json
from typing import Any

import typer

from unbraid.cli.common import AsJson, RunFile, Settings, fail, load_run
from unbraid.cli.prepare import prepare_app

data_app = typer.Typer(help="Look at data, and prepare public data sets.", no_args_is_help=True, rich_markup_mode=None)
data_app.add_typer(prepare_app, name="prepare")


@data_app.command()
def describe(run: RunFile = None, settings: Settings = None, as_json: AsJson = False) -> None:
    """What is there: rows, users, items, label rates per task and domain, histories, time span, missing values, duplicates."""
    from unbraid.data.describe import describe as look
    from unbraid.data.describe_table import render

    try:
        found: dict[str, Any] = look(load_run(run, settings).data)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    if as_json:
        print(json.dumps(found))
    else:
        render(found)
