"""What `unbraid.data.describe` found, as tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from unbraid.data.declaration import SPLITS
from unbraid.data.describe import Found

WIDTH = 100  # of piped output
TASKS_ABREAST = 5  # columns of a table by domain


def render(found: Found) -> None:
    """Print what `describe` found as tables."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for line in _headlines(found):
        console.print(line, markup=False)
    for table in (*_task_tables(found), *_domain_tables(found), *_feature_tables(found)):
        console.print()
        console.print(table)
    console.print()
    for warning in found["warnings"]:
        console.print(f"! {warning}", style="yellow", markup=False)
    if not found["warnings"]:
        console.print("Nothing to warn about.")


def _headlines(found: Found) -> Iterable[str]:
    rows = found["rows"]
    yield f"rows      {rows['read']:,} read, {rows['kept']:,} kept, {rows['used']:,} used"
    if rows["duplicates"] is not None:
        fate = "" if not rows["duplicates"] else ", dropped" if rows["duplicates dropped"] else ", not dropped"
        yield f"          {rows['duplicates']:,} exact duplicates{fate}"
    yield "splits    " + ", ".join(f"{name} {rows[name]:,}" for name in SPLITS)
    if found["users"]:
        users = found["users"]
        new = _share(users["test unseen"])
        yield f"users     {users['distinct']:,}; {new} of test rows are of users without training rows"
    if found["time"]:
        time = found["time"]
        yield f"time      {time['from']} to {time['to']}"
        yield f"          `{time['column']}`, {time['unit']}"
    for table, about in found["joins"].items():
        missing = about["rows without a match"]
        text = "not possible" if missing is None else f"{missing:,} rows without a match"
        yield f"join      {table} on {about['on']}: {text}"


def _table(title: str, first: str, columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _task_tables(found: Found) -> Iterable[Any]:
    table = _table("Tasks", "task", ("observed", "share", "positives", "all", *SPLITS))
    for name, about in found["tasks"].items():
        whole = about.get("all")
        if whole is None:
            table.add_row(name, *["?"] * 7)
            continue
        positives = f"{whole['positives']:,}" if "positives" in whole else about["kind"]
        rates = [_cell_text(about["splits"][s]) for s in SPLITS]
        table.add_row(name, f"{whole['observed']:,}", _share(whole["share"]), positives, _cell_text(whole), *rates)
    yield table
    for name, about in found["tasks"].items():
        if "classes" in about.get("all", {}):
            table = _table(f"Classes of {name}", "class", ("rows", *SPLITS))
            for label, n in about["all"]["classes"].items():
                table.add_row(label, f"{n:,}", *(f"{about['splits'][s]['classes'].get(label, 0):,}" for s in SPLITS))
            yield table


def _domain_tables(found: Found) -> Iterable[Any]:
    tasks = [name for name, about in found["tasks"].items() if "domains" in about]
    for at in range(0, len(tasks), TASKS_ABREAST) if found["domains"] else ():
        part = tasks[at : at + TASKS_ABREAST]
        table = _table("Label rates by domain", "domain", ("rows", "test", *part))
        for name, about in found["domains"].items():
            rates = [_cell_text(found["tasks"][t]["domains"].get(name, {})) for t in part]
            table.add_row(name, f"{about['rows']:,}", f"{about['test']:,}", *rates)
        yield table


def _feature_tables(found: Found) -> Iterable[Any]:
    missing = found["missing"]
    if found["ids"]:
        table = _table("Ids", "feature", ("distinct", "in training", "min_count", "below it", "missing", "test unseen"))
        for name, i in found["ids"].items():
            counts = (f"{i[k]:,}" for k in ("distinct", "in training", "min_count", "rare"))
            table.add_row(name, *counts, _whole(missing.get(name, {}).get("nulls")), _share(i["test unseen"]))
        yield table
    if found["numbers"]:
        table = _table("Numbers", "feature", ("mean", "sd", "min", "max", "missing", "NaN"))
        for name, i in found["numbers"].items():
            stats = ("-" if i[k] is None else f"{i[k]:.4g}" for k in ("mean", "sd", "min", "max"))
            holes = missing.get(name, {})
            table.add_row(name, *stats, _whole(holes.get("nulls")), _whole(holes.get("nans", 0)))
        yield table
    if found["contents"]:
        table = _table("Pictures and texts", "feature", ("different", "missing", "looks like"))
        for name, i in found["contents"].items():
            nulls = missing.get(name, {}).get("nulls")
            table.add_row(name, f"{i['distinct']:,}", _whole(nulls), _content_text(i))
        yield table
    if found["histories"]:
        table = _table("Histories (events per row)", "history", ("mean", "median", "p95", "max", "empty"))
        for name, i in found["histories"].items():
            middle = (f"{i['mean']:.1f}", f"{i['median']:g}", f"{i['p95']:g}", f"{i['max']:,}")
            table.add_row(name, *middle, _share(i["empty"]))
        yield table


def _cell_text(cell: Found) -> str:
    """A rate, a mean with its spread, or the number of classes."""
    if "classes" in cell:
        return f"{len(cell['classes'])} classes"
    if "mean" in cell:
        return "-" if cell["mean"] is None else f"{cell['mean']:.4g} sd {cell['sd']:.3g}"
    return _share(cell.get("rate"))


def _content_text(about: Found) -> str:
    """What pictures or texts look like."""
    if about["kind"] == "text":
        return "-" if about["median"] is None else f"{about['median']:.0f} characters, at most {about['longest']:,}"
    small, large = about["sides"]
    files = f", {about['missing files']:,} files missing" if about["missing files"] else ""
    return ("-" if small is None else f"{small} to {large} pixels, {', '.join(about['modes'])}") + files


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
