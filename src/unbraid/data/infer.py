"""A first run file from a look at the columns: every guess is written with its reason, nothing is silently dropped.

A column that should not be a feature stays in the file as a commented-out line that says why; deleting the ``#`` takes
it in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from unbraid.data.guess import DOMAINS, Guess, Look, calendar, find_tables, of_column, safe, unit_of
from unbraid.data.source import _dtype

LENGTH = 50  # of the history
Lines = Sequence[tuple[bool, dict[str, Any], str]]  # (commented out?, inline table, comment)


def infer(path: Path, labels: Sequence[str], *, user: str = "", time: str = "", domain: str = "") -> str:
    """A commented run file.

    Args:
        path: a Parquet or CSV file, or a folder of them: the largest table that has the labels holds the rows, tables
            with a unique key that the rows have are joined, files of one schema are one table.
        labels: label columns, one task each.
        user, time, domain: columns with these roles; user and time are guessed if empty.

    Returns:
        TOML that `unbraid.config.load` reads.

    Raises:
        ValueError: there is no table, no such column (the message says what there is), or a label of one value.
    """
    if not labels:
        find_tables(Path(path))  # says first where there is nothing to have a label
        raise ValueError("At least one label column is needed (`--label is_click`). Found none.")
    try:
        look = Look(Path(path), list(dict.fromkeys(labels)), {"user": user, "time": time, "domain": domain})
        return "\n".join(_lines(look)) + "\n"
    except PolarsError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _lines(look: Look) -> Iterable[str]:
    """The run file."""
    name = re.sub(r"\W+", "_", look.path.resolve().stem).strip("_") or "run"
    seen = f"all {look.total:,} rows" if look.step == 1 else f"every {look.step}th of {look.total:,} rows"
    yield _comment(f"Written by `unbraid init` from a look at {seen} of {look.table}. Comments say why.")
    yield "# Check what was left out below, then: unbraid data describe THIS_FILE; unbraid train THIS_FILE"
    yield from (f"name = {inline(name)}", "", "[data]")
    yield from _data(look)
    yield from ("", *_array("tasks", _tasks(look)), "", *_array("features", _features(look)))
    yield from ("", *_histories(look), "", "[data.split]  " + _comment(look.split_why))
    yield from (f"{k} = {inline(v)}{_when(look, v)}" for k, v in look.split.items())
    yield from ("", *_model(look))


# ---------------------------------------------------------------------------------------------------------------- TOML
def inline(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)  # JSON's texts, numbers and booleans are TOML's
    return text.replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else inline(name)


def _comment(text: str) -> str:
    return "# " + " ".join(text.split())  # a name with a line break must not end the comment


def _array(key: str, members: Lines) -> list[str]:
    """An array of inline tables, one a line."""
    lines = (f"  {'# ' if out else ''}{inline(table)},  {_comment(why)}" for out, table, why in members)
    return [f"{key} = [", *lines, "]"]


# ------------------------------------------------------------------------------------------------------------ sections
def _data(look: Look) -> Iterable[str]:
    yield f"folder = {inline(str(look.folder))}"
    yield f"rows = {inline(look.table)}"
    if look.keep:
        yield f"keep = {inline(look.keep)}  # rows without a time cannot be split"
    if look.duplicates:
        yield f"drop_duplicates = true  # {look.duplicates:,} rows equal an earlier row in every column"
    yield _user(look)
    if look.time:
        yield f"time = {inline(look.time_sql)}  {_comment(look.time_why)}"
        if _dtype(look.time_sql, look.frame.schema).is_integer():
            yield f"time_unit = {inline(look.time_unit)}"
    else:
        yield '# time = ""  # no column looks like a time'
    yield from _domain(look)
    joins = [(False, {"table": t, "on": k}, f"`{k}` is unique there") for t, k in look.joins]
    joins += [(True, {"table": t, "on": ""}, f"not used: {why}") for t, why in look.unused]
    yield from _array("joins", joins) if joins else ()


def _user(look: Look) -> str:
    if not look.user_sql:
        return f'# user = ""  {_comment(look.no_user)}: intervals are then over rows, and there are no histories'
    why = f"what tells rows apart; {look.no_user}"
    if look.user:
        why = "given" if look.roles["user"] else f"named like a user, {look.columns[look.user].distinct:,} distinct"
    return f"user = {inline(look.user_sql)}  {_comment(why)}"


def _domain(look: Look) -> Iterable[str]:
    given = look.roles["domain"]
    if given:
        yield f"domain = {inline(given)}  # given: metrics are printed for each of its values"
        return
    for c in look.columns.values():
        free = c.name not in (*look.labels, look.user, look.time) and not c.nested
        if free and c.named(DOMAINS) and 2 <= c.distinct <= 50:
            text = f"{c.distinct} values: if these are scenarios, metrics are printed for each"
            yield f"# domain = {inline(c.name)}  # {text}"


def _tasks(look: Look) -> Lines:
    lines: list[tuple[bool, dict[str, Any], str]] = []
    earlier: dict[str, pl.Series] = {}
    for name, known, yes in look.positives():
        (kind, why), values = look.tasks[name], look.frame[name]
        train = values.filter(look.train & known)
        if kind != "real" and train.n_unique() < values.drop_nulls().n_unique():
            why += "; careful: some of its values never occur in the training split"
        if kind == "binary":
            parents = (p for p, theirs in earlier.items() if yes.any() and not (yes & ~theirs).any())
            if parent := next(parents, None):  # every positive is a positive of an earlier task
                why += f'; only where `{parent}` is 1: given = "{safe(parent)}" would predict it among those'
            earlier[name] = yes
        lines.append((False, of_column(name, kind), why))
    return lines


def _features(look: Look) -> Lines:
    if all(g.out for g in look.features):
        reasons = "; ".join(f"{g.column.name}: {g.out}" for g in look.features)
        raise ValueError(f"No column is left to be a feature. {reasons or 'There is none besides labels and time'}.")
    return [(bool(g.out), g.feature, f"left out: {g.out}" if g.out else g.why) for g in look.features]


def _histories(look: Look) -> Iterable[str]:
    """One history of the user's earlier rows with a positive first label."""
    if look.user and look.time and look.item:
        yield from _history(look, look.item)
    else:
        need = [what for what, have in (("user", look.user), ("time", look.time), ("item id", look.item)) if not have]
        yield f"# no histories: they need a user, a time and an item id; there is no {' and no '.join(need)}"


def _history(look: Look, item: Guess) -> Iterable[str]:
    first, name = look.labels[0], item.feature["name"]
    columns, where = {name: item.column.name}, {}
    if look.tasks[first][0] == "binary":
        columns["positive"] = first
        where = {"where": "positive" if look.frame.schema[first] == pl.Boolean else "positive = 1"}
    title = "earlier"
    while title in {g.feature["name"] for g in look.features}:
        title += "_rows"
    what = f" with `{first}` = 1" if where else ""
    about = (
        ("fields", {"name": name, **item.least}, f"same name as the feature: both read one table of `{name}`"),
        ("events", {"table": "rows", "columns": columns}, "the rows themselves are events for later rows"),
        (
            "histories",
            {"name": title, "fields": [name], **where, "length": LENGTH},
            f"the user's last {LENGTH} rows{what}, strictly before the row's time",
        ),
    )
    for key, table, why in about:
        yield from _array(key, [(False, table, why)])


def _when(look: Look, value: Any) -> str:
    """The date that a number means, as a comment."""
    if look.split["kind"] != "time" or not isinstance(value, int) or not unit_of(pl.Series([value])):
        return ""
    return f"  # {calendar(value, look.moments[1]).isoformat(sep=' ', timespec='seconds')} UTC"


def _model(look: Look) -> Iterable[str]:
    kinds = {kind for kind, _ in look.tasks.values()}
    metric = "auc" if "binary" in kinds else "accuracy" if "multiclass" in kinds else "rmse"
    tower = '"mmoe"  # several tasks: experts, mixed for each' if len(look.labels) > 1 else '"shared_bottom"'
    yield '[model.tower]  # shared_bottom, mmoe and stem are a good start; stem wants `model.tables.kind = "per_task"`'
    yield f"kind = {tower}"
    if look.item and look.user and look.time:
        yield from ("", "[model.history]", 'kind = "mean"  # target_attention weighs events by what is predicted')
    yield from ("", "[training]", f"batch_size = {1024 if look.total >= 20_000 else 256}", "epochs = 3")
    yield f"metric = {inline(metric)}  # on the validation split"
    yield "patience = 1  # stop after an evaluation without a better value, and keep the best weights"
