"""The first pass: what the training split teaches (vocabularies, scales, domains, classes), and how columns are read.

Every expression that both passes read a column by is here, so that what is fitted is what is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.data import vocabulary
from unbraid.data.fitted import Fitted
from unbraid.data.source import (
    SPLIT,
    SPLITS,
    Data,
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
from unbraid.data.text import holds_whole_numbers
from unbraid.data.vocabulary import Vocabulary, canonical, canonical_type
from unbraid.types import FIRST_VALUE, GAP, POSITION, Feature, Schema, Task

QUANTILES = 256  # values of a number that are remembered
GAP_BUCKETS = 34  # unknown, missing, then floor(log2(seconds + 1)): 2**32 seconds are 136 years
Progress = Callable[[str, int, int], None]  # (what, done, total): total 0 when unknown


def no_progress(what: str, done: int, total: int) -> None:
    """Say nothing."""


def fit(data: Data, base: Path, tables: Tables | None, grow: Fitted | None, progress: Progress) -> Fitted:
    """Vocabularies, scales, domains and classes of the training split."""
    plan = rows_plan(data, base, tables)
    schema = plan.collect_schema()
    _check_split(data, kept_rows(data, base, tables))
    train = plan.filter(pl.col(SPLIT) == 0)
    progress("fitting vocabularies", 0, 0)
    vocabularies = _fit_vocabularies(data, base, tables, train, schema, grow)
    learnt = {f.name: _fit_number(f, train, schema) for f in data.features if f.kind == "number"}
    numbers = {name: found for name, (found, _, _) in learnt.items()}
    if grow:  # weights to start from were learnt on numbers of their own scale, where the column was not empty
        same = [f.name for f in data.features if f.kind == "number" and f in grow.schema.features]
        numbers |= {name: grow.schema.numbers[name] for name in same if grow.schema.quantiles.get(name)}
    quantiles = {name: found for name, (_, found, _) in learnt.items()}
    whole = {name: found for name, (_, _, found) in learnt.items()}
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


def _fit_vocabularies(
    data: Data, base: Path, tables: Tables | None, train: pl.LazyFrame, schema: Mapping[str, Any], grow: Fitted | None
) -> dict[str, Vocabulary]:
    counts: dict[str, list[pl.DataFrame]] = {}
    need: dict[str, tuple[int, int]] = {}

    def want(plan: pl.LazyFrame, reads: list[tuple[str, pl.Expr, Any, int, int]]) -> None:
        found = _count(plan, [(expr, dtype) for _, expr, dtype, _, _ in reads])
        for (name, _, _, min_count, buckets), frame in zip(reads, found, strict=True):
            counts.setdefault(name, []).append(frame)
            old = need.get(name, (1, 0))
            need[name] = (max(old[0], min_count), max(old[1], buckets))

    ids = [f for f in data.features if f.kind in ("id", "bag")]
    reads = [(f.vocab, *ids_of(f, schema), f.min_count, f.buckets) for f in ids]
    if data.domain:
        reads.append(("domain ", expression(data.domain, schema, "data.domain"), _dtype(data.domain, schema), 1, 0))
    want(train, reads)
    for source, plan in event_plans(data, base, tables):
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
            want(events, [(f.vocab, pl.col(f.name), have[f.name], f.min_count, f.buckets) for f in fields])
    for field in data.fields:
        if field.vocab not in counts:
            raise DataError(f"Event field `{field.name}` is in no `[[data.events]]` columns.")
    fitted = {}
    for name, frames in counts.items():
        old = grow.vocabularies.get(name) if grow else None
        kinds = [f.schema["value"] for f in frames if len(f)] + ([old.values.dtype] if old and len(old.values) else [])
        if old and set(kinds) == {pl.Int64, pl.String} and holds_whole_numbers(old.values):
            kinds = [pl.String()]  # the earlier log had numbers and words, as text
        if len(set(kinds)) > 1:
            found = ", ".join(sorted({str(kind) for kind in kinds}))
            words = " Read the numbers as text: `CAST(COLUMN AS VARCHAR)` in the place of the column."
            raise DataError(
                f"Vocabulary `{name}` is read from columns (or an earlier model) of different types: {found}."
                + words * (set(kinds) == {pl.Int64, pl.String})
            )
        for frame in frames:
            if frame.schema["value"] == pl.Float64 and frame["value"].is_nan().any():
                raise DataError(f"Vocabulary `{name}`: its columns hold NaN. Write nulls for missing ids.")
        kind = kinds[0] if kinds else frames[0].schema["value"]
        fitted[name] = vocabulary.fit([f.cast({"value": kind}) for f in frames], *need[name], old)
    return fitted


def _count(plan: pl.LazyFrame, reads: list[tuple[pl.Expr, Any]]) -> list[pl.DataFrame]:
    """Per column, or column of lists, a frame (value, count) in canonical type: one pass, as plans can be costly."""
    from unbraid.data.encode import CHUNK, chunks

    columns, kinds = {}, []
    for i, (expr, dtype) in enumerate(reads):
        kinds.append(canonical_type(dtype.inner if isinstance(dtype, pl.List) else dtype))
        columns[f"__{i}"] = expr.cast(pl.List(kinds[-1]) if isinstance(dtype, pl.List) else kinds[-1])
    parts = [[pl.DataFrame(schema={"value": kind, "count": pl.UInt32})] for kind in kinds]
    # with_columns: a constant counts once a row
    for frame in chunks(plan.with_columns(**columns).select(*columns)) if reads else ():
        for column, found in zip(frame.iter_columns(), parts, strict=True):
            if column.dtype == pl.List:
                column = column.explode(empty_as_null=False, keep_nulls=False)
            found.append(column.rename("value").drop_nulls().value_counts(name="count"))
            if sum(map(len, found[1:])) > max(4 * CHUNK, len(found[0])):
                found[:] = [_add_up(found)]
    return [_add_up(found) for found in parts]


def _add_up(parts: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(parts).group_by("value").agg(pl.col("count").sum())


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


def _fit_number(
    feature: Feature, train: pl.LazyFrame, schema: Mapping[str, Any]
) -> tuple[tuple[float, float], tuple[float, ...], bool]:
    """(mean, deviation), values at evenly spaced ranks, () of an empty column, and: are all whole, and exact as they are?

    One column is held in memory, sorted, so that no order of threads changes what is learnt.
    """
    found = train.select(number_expression(feature, schema).drop_nulls().sort().alias("x"))
    values = found.collect(engine="streaming")["x"].to_numpy()
    refuse_bad_numbers(feature, int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    if not len(values):
        return (0.0, 1.0), (), True
    quantiles = tuple(values[np.arange(QUANTILES) * (len(values) - 1) // (QUANTILES - 1)].tolist())
    whole = bool((values == np.trunc(values)).all() and max(-values[0], values[-1]) <= 2**53)
    mean, std = float(values.mean()), float(values.std())
    if std <= 2.0**-23 * abs(mean):
        return (mean, 1.0), quantiles, whole  # a (in single precision) constant column becomes 0
    # single precision, so that a sum in another order teaches the same numbers
    scale = float(np.float32(mean)) if abs(mean) > 1e-9 * std else 0.0, float(np.float32(std))
    return scale, quantiles, whole


def refuse_bad_numbers(feature: Feature, nans: int, infinite: int) -> None:
    """Raises DataError when there are any: so many rows."""
    where = f"Feature `{feature.name}`: `{feature.source}` holds"
    if nans:
        raise DataError(
            f'{where} NaN in {nans:,} rows. A null is missing; to read a NaN as missing too, set nan = "missing" on the '
            "feature."
        )
    if infinite:
        name = feature.source if feature.source.isidentifier() else f"({feature.source})"
        raise DataError(
            f"{where} infinity, or numbers beyond single precision, in {infinite:,} rows, which `nan` is not about. Read them as "
            f'missing, with column = "CASE WHEN ABS({name}) < 1e38 THEN {name} END", or as a number of your choice.'
        )


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
