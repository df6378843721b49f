"""``unbraid train``: a run to a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from unbraid.cli.common import AsJson, RunFile, Settings, fail, load_run, refuse_unread, show


def train(
    run: RunFile = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle. [default: runs/NAME]")] = None,
    settings: Settings = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the run's seed.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of the run's epochs.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the unfinished run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete what is in --out first.")] = False,
    init: Annotated[
        Path | None, typer.Option(help="Start from this bundle: its values keep their rows, new ones are added.")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Fit target encoding, too, and print it beside the model.")] = True,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard=FOLDER or mlflow=URI: log the run there, too. Repeat it.")
    ] = None,
    track_every: Annotated[int, typer.Option(help="Of --track: the losses of every so many steps.")] = 10,
    report: Annotated[bool, typer.Option(help="Run the checks that train nothing, and write report.html.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train a run, print the test metrics of every task and domain, and write a bundle."""
    from unbraid import config, parallel
    from unbraid.job import train as job
    from unbraid.preflight import JobError
    from unbraid.progress import Console

    try:
        if run is None and resume and out is not None and (out / "run.toml").exists():
            run = out / "run.toml"
        choice = load_run(run, settings, seed, steps, init)
        refuse_unread([choice], settings, steps)
        folder = out or Path("runs") / choice.name
        with Console(quiet=as_json or parallel.launched() > 0) as watcher:
            watcher.note(f"run `{choice.name}`, seed {choice.seed}")
            result = job(
                choice, folder, resume=resume, overwrite=overwrite, baseline=baseline, watcher=watcher, track=track or (),
                track_every=track_every, report=report,
            )  # fmt: skip
    except parallel.Elsewhere:  # the process that raised it says it
        raise typer.Exit(2) from None
    except (config.RunError, JobError, ValueError, OSError, FloatingPointError, ImportError, parallel.Lost) as error:
        fail(error, parallel.launched())
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted; continue with the same command and --resume"))
    if parallel.launched():  # the first process tells
        return
    if as_json:
        print(json.dumps(result.metrics))
        return
    show(result.metrics["test"], result.metrics.get("baseline", {}).get("target_encoding"))
    print(f"model   {folder}   (unbraid predict {folder} ROWS.parquet --out PREDICTIONS.parquet)")
    if result.report is not None:
        from unbraid.report.words import headline

        print(f"checks  {headline(result.report)} `unbraid diagnose {folder}` looks deeper.")
    print(f"report  {folder / 'report.md'}   metrics  {folder / 'metrics.json'}")
    if (page := folder / "report.html").exists():
        print(f"page    {page}   (opens in a browser, without a network)")
