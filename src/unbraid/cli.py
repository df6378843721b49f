"""Commands.  torch and the rest are imported when a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from unbraid.cli_calibrate import calibrate
from unbraid.cli_data import prepare
from unbraid.cli_diagnose import diagnose
from unbraid.cli_export import export
from unbraid.cli_serve import serve
from unbraid.cli_store import store_app
from unbraid.cli_tune import tune

if TYPE_CHECKING:
    from unbraid.config import Run

app = typer.Typer(
    help="Train recommendation and transfer models whose tasks and domains share parameters without hurting each other.",
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False,
)  # fmt: skip
data_app = typer.Typer(help="Look at data, and prepare public data sets.", no_args_is_help=True, rich_markup_mode=None)
data_app.command()(prepare)
app.add_typer(data_app, name="data")
app.add_typer(store_app, name="store")

RunFile = Annotated[Path | None, typer.Argument(help="Run file (TOML). None: the bundled log with the default recipe.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value: `--set training.epochs=2`. Repeat it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Raw = Annotated[bool, typer.Option("--raw", help="Without the bundle's calibrators.")]
Passes = Annotated[int, typer.Option("--mc-dropout", help="Mean of so many passes with dropout. [default: 0, off]")]


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


def fail(error: Exception, process: int = 0) -> NoReturn:
    """Print one clear message, of a process other than the first with its number, and end with 2."""
    typer.secho(f"unbraid{f' (process {process})' if process else ''}: {error}", fg="red", err=True)
    raise typer.Exit(2)


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


@app.command()
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
    from unbraid.job import JobError
    from unbraid.job import train as job
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


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run files (TOML) or names of recipes.", metavar="RUN...")],
    seeds: Annotated[int, typer.Option(help="Each run trains so many times: with its own seed, seed + 1, ...")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the comparison and of all bundles.")] = Path("runs/compare"),
    against: Annotated[str, typer.Option(help="The reference, or target_encoding. [default: the first run]")] = "",
    metric: Annotated[
        str, typer.Option(help="What differences are of. [default: auc, accuracy or rmse, by the task's kind]")
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

    Runs are told apart by `name`; they need the same test rows and the same training budget.  Target encoding always
    takes part.
    """
    from unbraid import config, recipes
    from unbraid.compare import compare as job
    from unbraid.job import JobError
    from unbraid.progress import Console

    try:
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
    except (config.RunError, JobError, ValueError, OSError, FloatingPointError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted; continue with the same command and --resume"))
    if as_json:
        print(json.dumps(found))
        return
    show_comparison(found, domains)
    print(f"report  {out / 'compare.md'}   numbers  {out / 'compare.json'}   bundles  {out}/NAME/seed-S")


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle.")],
    rows: Annotated[
        Path | None, typer.Argument(help="Labelled rows (Parquet or CSV) instead of a split of the run's data.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables from this folder.")] = None,
    raw: Raw = False,
    mc_dropout: Passes = 0,
    as_json: AsJson = False,
) -> None:
    """Metrics of a bundle, per task and domain, with intervals."""
    from unbraid.bundle import Bundle, trained_splits
    from unbraid.data.source import SPLITS
    from unbraid.job import JobError, evaluate_bundle

    try:
        if split not in SPLITS:
            raise ValueError(f"--split should be one of {', '.join(SPLITS)}. Found {split}.")
        loaded = Bundle.load(bundle)
        metrics = evaluate_bundle(loaded, split=split, rows=rows, folder=folder, raw=raw, mc_dropout=mc_dropout)
    except (ValueError, OSError, JobError) as error:
        fail(error)
    if rows is None and split != "train" and split in trained_splits(loaded.run):
        note = f"! schedule {loaded.run.schedule.kind} trained on the {split} rows, too: these metrics are not of unseen rows"
        print(note, file=sys.stderr)
    if as_json:
        print(json.dumps({split if rows is None else "rows": metrics}))
        return
    show(metrics)


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle.")],
    rows: Annotated[Path, typer.Argument(help="Rows to predict (Parquet or CSV).")],
    out: Annotated[Path, typer.Option(help="Parquet file to write: the rows and one predicted_TASK column per task.")],
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables (joins, events) from this folder.")] = None,
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also predicted_TASK_sd, of the logit.")] = False,
    explore: Annotated[
        str, typer.Option(help="thompson or ucb: also predicted_TASK_explore, a score that explores.")
    ] = "",
    strength: Annotated[
        float | None, typer.Option(help="How many deviations ucb adds; factor of thompson's. [default: 2; 1]")
    ] = None,
    share: Annotated[
        str, typer.Option(help="What has one draw of thompson: request, row or call. [default: request]")
    ] = "",
    seed: Annotated[
        int | None, typer.Option(help="Of thompson's draws. [default: another every time, printed]")
    ] = None,
    others: Annotated[
        list[Path] | None, typer.Option("--with", help="Another bundle: an ensemble predicts. Repeat it.")
    ] = None,
    raw: Raw = False,
    mc_dropout: Passes = 0,
) -> None:
    """Predict rows: Parquet in, Parquet out.  Histories come from the run's event tables, strictly before each row."""
    from unbraid.bundle import Predictor
    from unbraid.job import JobError, write_predictions
    from unbraid.uncertainty.ensemble import Ensemble

    try:
        if out.suffix != ".parquet":
            raise ValueError(f"--out should be a .parquet file. Found {out}.")
        policy, note = exploration(explore, strength, share, seed)
        members = [Predictor(one, folder, raw=raw, mc_dropout=mc_dropout) for one in (bundle, *(others or ()))]
        predictor = Ensemble(members) if others else members[0]
        predictions = predictor.predict(rows, explore=policy, uncertainty=uncertainty)
        write_predictions(rows, predictions, out, predictor.data)
    except (ValueError, OSError, JobError) as error:
        fail(error)
    print(f"{out}: {len(predictions):,} rows, tasks {', '.join(t.name for t in predictor.schema.tasks)}{note}")


def exploration(name: str, strength: float | None, share: str, seed: int | None) -> tuple[Any, str]:
    """The policy of a name (none: None), and what to say about it."""
    from secrets import randbelow

    from unbraid.uncertainty.explore import UCB, Thompson

    if name not in ("", "thompson", "ucb"):
        raise ValueError(f"--explore should be thompson or ucb. Found {name}.")
    reads = {"": (), "ucb": ("strength",), "thompson": ("strength", "share", "seed")}[name]
    given = {"strength": strength is not None, "share": bool(share), "seed": seed is not None}
    if unread := [f"--{option}" for option, there in given.items() if there and option not in reads]:
        what = f"--explore {name} does not read it" if name else "it is for --explore, which is not given"
        raise ValueError(f"{', '.join(unread)}: {what}.")
    if strength is not None and not 0 <= strength < float("inf"):
        raise ValueError(f"--strength should be finite and not negative. Found {strength:g}.")
    if share and share not in (shares := ("request", "row", "call")):
        raise ValueError(f"--share should be one of {', '.join(shares)}. Found {share}.")
    if name == "ucb":
        return UCB(2.0 if strength is None else strength), ""
    seed = randbelow(2**32) if seed is None else seed
    policy = Thompson(seed, 1.0 if strength is None else strength, share or "request")  # type: ignore[arg-type]
    return (policy, f", seed {seed}") if name else (None, "")


@app.command()
def uncertainty(
    bundle: Annotated[Path, typer.Argument(help="A trained bundle.")],
    prior: Annotated[float, typer.Option(help="Precision of the last layer's weights before any row.")] = 1.0,
    folder: Annotated[Path | None, typer.Option(help="Read the run's tables from this folder.")] = None,
) -> None:
    """Learn how unsure the model is from its training rows, and add it to the bundle for `predict`."""
    from unbraid import store
    from unbraid.bundle import UNCERTAINTY, Bundle, with_uncertainty

    try:
        found = with_uncertainty(Bundle.load(bundle), folder, prior=prior).uncertainty
        assert found is not None
        store.save(bundle / UNCERTAINTY, found.state_dict())
    except (ValueError, OSError) as error:
        fail(error)
    rows = ", ".join(f"{name} {int(posterior.rows.sum()):,}" for name, posterior in found.tasks.items())
    print(f"{bundle / UNCERTAINTY}: observed rows {rows}")


app.command()(calibrate)
app.command()(diagnose)
app.command()(export)
app.command()(serve)
app.command()(tune)


@app.command()
def recipe(name: Annotated[str, typer.Argument(help="See `unbraid recipes`.")], settings: Settings = None) -> None:
    """Print a recipe's run file."""
    from unbraid import config, recipes

    try:
        run = recipes.get(name)
        print(config.dumps(config.override(run, settings) if settings else run), end="")
    except ValueError as error:
        fail(error)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes."""
    from unbraid import recipes as known

    found = {name: " ".join((make.__doc__ or "").split("\n\n")[0].split()) for name, make in known.RECIPES.items()}
    if as_json:
        print(json.dumps(found))
        return
    for name, line in found.items():
        print(f"{name:16} {line}")


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="A Parquet or CSV file, or a folder of them, or of pictures.")],
    label: Annotated[
        list[str] | None, typer.Option(help="A label column. Repeat it for several tasks. Pictures need none.")
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
    from unbraid.data.infer import infer
    from unbraid.data.pictures import first_run, is_tree

    try:
        if not label and is_tree(data):
            if user or time or domain not in ("", "folder"):
                raise ValueError(
                    f"{data} holds pictures and no columns: no --user, no --time, --domain `folder` or none."
                )
            text, found = first_run(data, domain == "folder")
            print("\n".join(found), file=sys.stderr)
        else:
            text = infer(data, label or [], user=user, time=time, domain=domain)
        print(text, end="")
    except (ValueError, OSError) as error:
        fail(error)


@app.command()
def cite(run: RunFile = None, settings: Settings = None) -> None:
    """Print BibTeX of exactly the methods and data that a run uses."""
    from unbraid.citations import citations

    try:
        print(citations(load_run(run, settings)), end="")
    except ValueError as error:
        fail(error)


@data_app.command()
def describe(run: RunFile = None, settings: Settings = None, as_json: AsJson = False) -> None:
    """What is there: rows, users, items, label rates per task and domain, histories, time span, missing values, duplicates."""
    from unbraid.data.describe import describe as look
    from unbraid.data.describe_table import render

    try:
        found: dict[str, Any] = look(load_run(run, settings).data)
    except (ValueError, OSError) as error:
        fail(error)
    if as_json:
        print(json.dumps(found))
    else:
        render(found)


def main() -> None:
    """Entry point of the command line."""
    app()
