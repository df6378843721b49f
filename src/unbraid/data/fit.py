"""The first pass: what the training split teaches (vocabularies, scales, domains, classes), and how columns are read.

Every expression that both passes read a column by is here, so that what is fitted is what is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from unbraid.data.counting import Counted, Learnt, Numbers, read_once, vocabulary_of
from unbraid.data.declaration import SPLITS, Data
from unbraid.data.fitted import Fitted
from unbraid.data.source import (
    SPLIT,
    DataError,
    Tables,
    _dtype,
    add_joins,
    event_plans,
    expression,
    instant,
    kept_rows,
    label_expression,
    reading,
    rows_plan,
    to_time,
    users_of_events,
    with_split,
)
from unbraid.data.spill import Room, add_up
from unbraid.data.vocabulary import Vocabulary, canonical, canonical_type
from unbraid.types import FIRST_VALUE, GAP, POSITION, Feature, Field, Schema, Task

GAP_BUCKETS = 34  # unknown, missing, then floor(log2(seconds + 1)): 2**32 seconds are 136 years
Progress = Callable[[str, int, int], None]  # (what, done, total): total 0 when unknown


def no_progress(what: str, done: int, total: int) -> None:
    """Say nothing."""


def fit(
    data: Data, base: Path, tables: Tables | None, grow: Fitted | None, progress: Progress, room: Room
) -> Fitted:  # fmt: skip
    """Vocabularies, scales, domains and classes of the training split."""
    plan = rows_plan(data, base, tables)
    schema = plan.collect_schema()
    _check_split(data, kept_rows(data, base, tables))
    train = plan.filter(pl.col(SPLIT) == 0)
    progress("fitting vocabularies", 0, 0)
    vocabularies, learnt = _read(data, base, tables, train, schema, grow, room)
    numbers = {name: found.scale for name, found in learnt.items()}
    if grow:  # weights to start from were learnt on numbers of their own scale, where the column was not empty
        same = [f.name for f in data.features if f.kind == "number" and f in grow.schema.features]
        numbers |= {name: grow.schema.numbers[name] for name in same if grow.schema.quantiles.get(name)}
    quantiles = {name: found.quantiles for name, found in learnt.items()}
    whole = {name: found.whole for name, found in learnt.items()}
    widths = {f.name: _fit_width(f, train, schema) for f in data.features if f.kind == "vector"}
    known = grow.schema.classes if grow else {}
    classes = {
        t.name: _fit_classes(data, t, train, schema, known.get(t.name, ()))
        for t in data.tasks
        if t.kind == "multiclass"
    }
    domains = tuple(vocabularies["domain "].names()) if data.domain else ("(unknown)", "(missing)", "all")
    sizes = {name: v.size for name, v in vocabularies.items() if name != "domain "}
    if data.histories:
        sizes[GAP] = GAP_BUCKETS
    if ranked := [history.length for history in data.histories if POSITION in history.fields]:
        sizes[POSITION] = FIRST_VALUE + max(ranked)
    declared = data.features, data.tasks, data.histories, data.fields
    return Fitted(Schema(*declared, domains, sizes, widths, numbers, classes, quantiles, whole), vocabularies)


def _check_split(data: Data, plan: pl.LazyFrame) -> None:
    counts = dict(with_split(plan, data).group_by(SPLIT).len().collect(engine="streaming").rows())
    if None in counts:
        what = {"column": data.split.column, "time": data.time, "user": data.user}.get(data.split.kind, "data.split")
        raise DataError(
            f"{counts[None]:,} rows belong to no split: check `{what}` for nulls or other words than {SPLITS}."
        )
    empty = [name for code, name in enumerate(SPLITS) if not counts.get(code)]
    if empty:
        have = ", ".join(f"{name} {counts.get(code, 0):,}" for code, name in enumerate(SPLITS))
        raise DataError(f"The {' and '.join(empty)} split is empty ({have} rows). Move the boundaries of `data.split`.")


def _read(
    data: Data, base: Path, tables: Tables | None, train: pl.LazyFrame, schema: Mapping[str, Any], grow: Fitted | None,
    room: Room,
) -> tuple[dict[str, Vocabulary], dict[str, Learnt]]:  # fmt: skip
    """Vocabularies and what numbers teach: one pass over the training rows, one over each source of events."""
    every: tuple[Feature | Field, ...] = (*data.features, *data.fields)
    hashed = {x.vocab for x in every if x.min_count == 0}
    found: dict[str, list[Counted]] = {}
    need: dict[str, tuple[int, int]] = {}

    def want(reads: list[tuple[str, pl.Expr, Any, int, int]], where: str) -> list[Counted]:
        counted = sum(name not in hashed for name, *_ in reads) + len(numbers)
        made = []
        for place, (name, expr, dtype, min_count, buckets) in enumerate(reads):
            sorter = room.sorter(f"{where}-{place}", "value", share=max(counted, 1), fold=add_up)
            made.append(Counted(expr, dtype, sorter, name in hashed))
            found.setdefault(name, []).append(made[-1])
            old = need.get(name, (1, 0))
            need[name] = (max(old[0], min_count), max(old[1], buckets))
        return made

    numbers = [f for f in data.features if f.kind == "number"]
    ids = [f for f in data.features if f.kind in ("id", "bag")]
    reads = [(f.vocab, *ids_of(f, schema), f.min_count, f.buckets) for f in ids]
    if data.domain:
        reads.append(("domain ", expression(data.domain, schema, "data.domain"), _dtype(data.domain, schema), 1, 0))
    counts = want(reads, "rows")
    columns = {
        f.name: Numbers(f, number_expression(f, schema), room.sorter(f"number-{i}", "value", share=max(len(reads), 1)))
        for i, f in enumerate(numbers)
    }
    read_once(train, [*counts, *columns.values()], "fit rows", room)
    numbers = []
    for place, (source, plan) in enumerate(event_plans(data, base, tables)):
        with reading(f"data.events `{source.table}`"):
            plan = training_events(data, source.table, source.time, plan, train)
            joined = add_joins(plan.drop(SPLIT, strict=False), data, base, tables)
            have = joined.collect_schema()
            fields = [f for f in data.fields if f.name in source.columns]
            read = {f.name: event_values(source.columns[f.name], have, source.table) for f in fields}
            events = joined.with_columns(expr.alias(name) for name, (expr, _) in read.items()).select(*read)
            if lists := [name for name, (_, dtype) in read.items() if isinstance(dtype, pl.List)]:
                events = events.explode(lists, empty_as_null=False, keep_nulls=False)
            have = events.collect_schema()
            reads = [(f.vocab, pl.col(f.name), have[f.name], f.min_count, f.buckets) for f in fields]
            read_once(events, want(reads, f"events-{place}"), f"fit events {place}", room)
    for field in data.fields:
        if field.vocab not in found:
            raise DataError(f"Event field `{field.name}` is in no `[[data.events]]` columns.")
    fitted = {
        name: vocabulary_of(name, counted, *need[name], grow.vocabularies.get(name) if grow else None, room)
        for name, counted in found.items()
    }
    return fitted, {name: column.learn() for name, column in columns.items()}


def training_events(data: Data, table: str, time: str, plan: pl.LazyFrame, train: pl.LazyFrame) -> pl.LazyFrame:
    """The events that vocabularies are fitted on: of training rows, before the training split ends, or of its users."""
    have, rows = plan.collect_schema(), train.collect_schema()
    if table == "rows":
        return plan.filter(pl.col(SPLIT) == 0)
    if data.split.kind == "time" and time != "none":
        expr, per_second = to_time(
            expression(time or data.time, have, f"data.events `{table}`"), _dtype(time or data.time, have),
            data.time_unit,
            f"Time of `{table}`",
        )  # fmt: skip
        return plan.filter(expr < instant(data.split.valid_from, per_second))
    kind = canonical_type(_dtype(data.user, rows))
    user = users_of_events(data, have, kind, f"data.events `{table}`")
    users = train.select(expression(data.user, rows, "data.user").cast(kind).alias(SPLIT)).unique()
    return plan.join(users, left_on=user, right_on=SPLIT, how="semi")


def id_values(feature: Feature, schema: Mapping[str, Any]) -> pl.Expr:
    """A feature's ids in canonical type, bags exploded."""
    expr, dtype = ids_of(feature, schema)
    return canonical(expr.explode(), dtype.inner) if isinstance(dtype, pl.List) else canonical(expr, dtype)


def ids_of(feature: Feature, schema: Mapping[str, Any]) -> tuple[pl.Expr, Any]:
    """Expression and type of a feature's ids, or of a bag's lists of them."""
    expr, dtype = expression(feature.source, schema, f"Feature `{feature.name}`"), _dtype(feature.source, schema)
    if feature.kind == "bag":
        return bag_lists(feature, expr, dtype)
    if isinstance(dtype, pl.List | pl.Array):
        raise DataError(
            f"Feature `{feature.name}`: `{feature.source}` holds lists. Use kind `bag`, or `vector` for numbers."
        )
    return expr, dtype


def bag_lists(feature: Feature, expr: pl.Expr, dtype: Any) -> tuple[pl.Expr, Any]:
    """A bag's column as lists."""
    if dtype == pl.String and feature.separator:
        members = expr.str.split(feature.separator)
        return members.list.eval(pl.element().filter(pl.element() != "")), pl.List(pl.String)  # no text, no members
    if not isinstance(dtype, pl.List | pl.Array):
        raise DataError(f"Feature `{feature.name}`: a bag needs lists, or text and `separator`. Found {dtype}.")
    return _as_lists(expr, dtype)


def event_values(source: str, schema: Mapping[str, Any], table: str) -> tuple[pl.Expr, Any]:
    """Expression and type of an event field, or of lists of them."""
    return _as_lists(expression(source, schema, f"data.events `{table}`"), _dtype(source, schema))


def _as_lists(expr: pl.Expr, dtype: Any) -> tuple[pl.Expr, Any]:
    return (expr.arr.to_list(), pl.List(dtype.inner)) if isinstance(dtype, pl.Array) else (expr, dtype)


def number_expression(feature: Feature, schema: Mapping[str, Any]) -> pl.Expr:
    """A number after its transform, null where missing."""
    expr, dtype = expression(feature.source, schema, f"Feature `{feature.name}`"), _dtype(feature.source, schema)
    if not (dtype.is_numeric() or dtype in (pl.Boolean, pl.Null)):
        raise DataError(f"Feature `{feature.name}`: kind `number` needs numbers. Found {dtype} in `{feature.source}`.")
    expr = expr.cast(pl.Float64)
    if feature.nan == "missing":
        expr = expr.fill_nan(None)
    return expr.sign() * expr.abs().log1p() if feature.transform == "log1p" else expr


def content_expression(feature: Feature, schema: Mapping[str, Any]) -> pl.Expr:
    """A picture's path or bytes, or a text.  Raises DataError for a column of another type."""
    where = f"Feature `{feature.name}`"
    expr, dtype = expression(feature.source, schema, where), _dtype(feature.source, schema)
    words = dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null) or dtype.is_integer()  # of files called 1, 2, ...
    if not words and (feature.kind == "text" or dtype != pl.Binary):
        what = "texts" if feature.kind == "text" else "paths of files, or their bytes (Parquet's binary)"
        raise DataError(f"{where}: kind `{feature.kind}` needs {what}. Found {dtype} in `{feature.source}`.")
    return expr if dtype == pl.Binary else expr.cast(pl.String)


def _fit_width(feature: Feature, train: pl.LazyFrame, schema: Mapping[str, Any]) -> int:
    expr, dtype = expression(feature.source, schema, f"Feature `{feature.name}`"), _dtype(feature.source, schema)
    if not isinstance(dtype, pl.List | pl.Array):
        raise DataError(
            f"Feature `{feature.name}`: a vector needs lists of numbers. Found {dtype} in `{feature.source}`."
        )
    expr = expr.cast(pl.List(pl.Float32))
    widths = train.select(expr.drop_nulls().list.len().unique().alias("n")).collect()["n"].to_list()
    if len(widths) != 1:
        raise DataError(f"Feature `{feature.name}`: vectors should have one length. Found {sorted(widths)}.")
    return widths[0]


def _fit_classes(
    data: Data, task: Task, train: pl.LazyFrame, schema: Mapping[str, Any], known: tuple[str, ...]
) -> tuple[str, ...]:  # fmt: skip
    """The classes of a task; those that an earlier model knows, where no other is there."""
    expr = canonical(label_expression(data, task, schema), _dtype(task.source, schema))
    values = train.select(expr.drop_nulls().unique().sort().cast(pl.String).alias("value")).collect()["value"]
    if set(values) <= set(known):
        return known
    if len(values) < 2:
        raise DataError(
            f"Task `{task.name}`: the training split has {len(values)} class(es) of `{task.source}`; two are needed."
        )
    return tuple(values)
