"""A run's own events into a store, so that a service starts with the histories that its model was trained on.

A table's row is one event, whatever number of the run's sources read it, with the columns that these read; or, where the store
keeps whole rows (`unbraid.serve.kept`), with all that training reads.  Its id is the table and the row's number, so that an
import that is repeated, or goes on after an interruption, adds what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from unbraid.data import source as src
from unbraid.data.encode import chunks
from unbraid.data.events import NO_TIME
from unbraid.data.vocabulary import canonical_type, stable_hash
from unbraid.serve.kept import choose, keeps_rows, note, trained_columns
from unbraid.serve.rows import as_json, kind_of
from unbraid.serve.store import USER_TYPE, Record, Store

PER_SECOND = "per_second"  # setting: units of a time in a second
BATCH = 5_000  # events of one append
Progress = Callable[[str, int, int], None]  # what, done, total


def import_events(
    data: src.Data, store: Store, *, base: Path = Path(), tables: src.Tables | None = None, keep: str = "",
    progress: Progress = lambda what, done, total: None,
) -> dict[str, int]:  # fmt: skip
    """Append all events of a run's sources, table by table in the order of the run.

    Args:
        data: of the run; base, tables: as `unbraid.data.encode.encode` takes them.
        keep: ``events`` (what histories read) or ``rows``, of a store that is empty; empty: as the store does.
        progress: told of every batch.

    Returns:
        ``read``, ``new`` and ``no_user`` (events without a user, which no history has).

    Raises:
        DataError: a table cannot be read, or holds values that JSON has not.
        ValueError: the store holds events of users of another type, times of another unit, or rows with fewer columns, or it
            keeps otherwise than ``keep``.
        StoreError: the store cannot be read or written.
    """
    if not data.events:
        raise src.DataError(
            "The run has no `[[data.events]]`: its model reads no histories, and there is nothing to import."
        )
    rows = src.kept_rows(data, base, tables).collect_schema()
    users = canonical_type(src._dtype(data.user, rows))
    choose(store, keep)
    whole = keeps_rows(store)
    claim(store, USER_TYPE, str(users), "user ids")
    found = {"read": 0, "new": 0, "no_user": 0}
    for table in dict.fromkeys(source.table for source in data.events):
        plan, rate, types = _plan(data, table, users, base, tables, whole)
        _claim_columns(store, table, list(types))
        if whole:
            note(store, table, data.rows if table == "rows" else table, types)
        if rate is not None:
            claim(store, PER_SECOND, f"{rate:g}", "units of time in a second")
        with src.reading(f"data.events `{table}`"):
            total = plan.select(pl.len()).collect(engine="streaming").item()
            for batch in _batches(plan, table):
                new = store.append([event for event in batch if event is not None])
                found["read"] += len(batch)
                found["new"] += sum(new)
                found["no_user"] += len(batch) - len(new)
                progress(f"importing {table}", found["read"], total)
    return found


def claim(store: Store, name: str, value: str, what: str) -> None:
    """Write a setting that all events of a store share; raises ValueError when it has another."""
    held = store.get(name)
    if held is None:
        store.set(name, value)
    elif held != value:
        raise ValueError(
            f"The store holds events whose {what} are {held}, and the run's are {value}. Use another store."
        )


def _claim_columns(store: Store, table: str, names: list[str]) -> None:
    """Note what an import keeps of a table's rows; raises ValueError when an earlier one kept less: known ids stay."""
    held = store.get(f"columns {table}")
    if held is None:
        store.set(f"columns {table}", json.dumps(names))
    elif lacking := [name for name in names if name not in json.loads(held)]:
        raise ValueError(
            f"The store holds events of `{table}` without {', '.join(lacking)}, which the run reads. Use another store, or "
            "delete this one and import again."
        )


def raw_columns(data: src.Data, table: str, have: Any, joined: Any) -> list[str]:
    """The columns of an event table that the run's sources read from it, in its order.

    Args:
        have: its schema; joined: the schema after the declared joins.
    """
    where, names = f"data.events `{table}`", {join.on for join in data.joins}
    for one in (one for one in data.events if one.table == table):
        texts = [(text, joined) for text in one.columns.values()] + [(one.where, have)] * bool(one.where)
        for text, schema in texts:
            names |= set(src.expression(text, schema, where).meta.root_names())
    return [name for name in have if name in names]


def _plan(
    data: src.Data, table: str, users: Any, base: Path, tables: src.Tables | None, whole: bool
) -> tuple[pl.LazyFrame, float | None, dict[str, Any]]:  # fmt: skip
    """Number, user's hash, time and raw columns of a table's rows; units of time in a second, if any; types of the columns.

    Args:
        whole: all rows with all that training reads, not only those, and that, which a source of events reads.
    """
    sources = [one for one in data.events if one.table == table]
    where = f"data.events `{table}`"
    plan = src.kept_rows(data, base, tables) if table == "rows" else src.scan_of(data, table, base, tables)
    plan = plan.with_row_index(src.ROW_KEY)
    plan = src._without_labels(data, plan) if table == "rows" else plan
    have = plan.collect_schema()
    times = {one.time or data.time for one in sources}
    if len(times) > 1:
        raise src.DataError(
            f"{where}: its sources read different times ({', '.join(sorted(times))}); an event has one."
        )
    if all(one.where for one in sources) and not (whole and table == "rows"):
        kept = [src.expression(one.where, have, where).fill_null(False) for one in sources]
        plan = plan.filter(pl.any_horizontal(kept))
    names = raw_columns(data, table, have, src.add_joins(plan, data, base, tables).collect_schema())
    if whole:
        names = [name for name in have if name in {*names, *trained_columns(data, table, have)}]
    dates = {n for n in times if have.get(n) in (pl.Date, pl.Datetime)}  # a time is a number everywhere
    if odd := {n: have[n] for n in names if not _has_json(have[n]) and n not in dates}:
        kinds = ", ".join(f"`{name}` is {kind}" for name, kind in odd.items())
        raise src.DataError(f"{where}: {kinds}, which JSON has not. Write it as integers or text in the table.")
    values = pl.struct([_plain(n, have[n]) for n in names]) if names else pl.lit({}, dtype=pl.Struct([]))
    exprs: dict[str, Any] = {"__user": src.users_of_events(data, have, users, where), "__time": pl.lit(NO_TIME)}
    (time,), rate = times, None
    if time != "none":
        expr, dtype = src.expression(time, have, where), src._dtype(time, have)
        exprs["__time"], rate = src.to_time(expr, dtype, data.time_unit, f"Time of {where}")
    types = {n: pl.String() if have[n] in (pl.Categorical, pl.Enum) else have[n] for n in names}
    return plan.select(src.ROW_KEY, values.alias("__values"), **exprs), rate, types


def _batches(plan: pl.LazyFrame, table: str) -> Iterator[list[tuple[int, Record] | None]]:
    """Events of a plan in order; None for one without a user."""
    for chunk in chunks(plan):
        for frame in chunk.iter_slices(BATCH):
            if nulls := frame["__time"].null_count():
                raise src.DataError(
                    f'data.events `{table}`: {nulls:,} events have no time. Filter them, or use time = "none".'
                )
            users = stable_hash(frame["__user"]).tolist()
            known = frame["__user"].is_not_null().to_list()
            rows = zip(users, known, frame[src.ROW_KEY], frame["__time"], frame["__values"], strict=True)
            yield [(u, Record(f"{table}:{n}", t, table, v)) if there else None for u, there, n, t, v in rows]


def _has_json(dtype: Any) -> bool:
    if isinstance(dtype, pl.List | pl.Array):
        return _has_json(dtype.inner)
    words = dtype in (pl.String, pl.Boolean, pl.Null, pl.Categorical, pl.Enum)
    return words or dtype.is_integer() or dtype.is_float()


def _plain(name: str, dtype: Any) -> pl.Expr:
    """A column as JSON has it: categories as text, a time as microseconds."""
    return as_json(name, dtype, "int" if dtype.is_temporal() else kind_of(dtype))
