"""The event table, stored once by user and time: a row's history is a slice that ends strictly before its time.

On disk, per event of a user who has rows: one small integer per field, and the time (int64) if a history reads the gap.
Per history with a filter: its events' positions.  Per row and history: where its slice starts and ends.  Memory is
O(events + rows), whatever the lengths of histories.
Events without a time come first for their user, in file order; events of the same instant as a row are not its history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from unbraid.data import source as src
from unbraid.data.vocabulary import Vocabulary, canonical, stable_hash
from unbraid.types import FIRST_VALUE, GAP, MISSING, POSITION

if TYPE_CHECKING:
    from unbraid.data.encode import Columns
    from unbraid.data.fit import Progress
    from unbraid.data.fitted import Fitted

NO_TIME = np.iinfo(np.int64).min  # before every row


def write_events(
    data: src.Data, base: Path, tables: src.Tables | None, fitted: Fitted, columns: Columns, users: Any,
    per_second: float, progress: Progress,
) -> None:  # fmt: skip
    """Encode and sort all events, then cut each row's slices.  The rows must be written; ``users``: their ids' type."""
    progress("encoding events", 0, 0)
    hashes = np.unique(columns.read("user"))
    known = Vocabulary(pl.Series(hashes[hashes != 0]))  # 0: no user.  Nobody sees the events of users without rows
    parts: list[dict[str, np.ndarray]] = [_no_events(data, fitted, known)]
    for source, plan in src.event_plans(data, base, tables, split=False):
        joined = src.add_joins(plan, data, base, tables)
        with src.reading(f"data.events `{source.table}`"):
            parts.extend(_event_chunks(data, source, joined, fitted, users, known, per_second))

    def whole(name: str) -> np.ndarray:
        return np.concatenate([part.pop(name) for part in parts])  # popped: one column at a time is there twice

    user, time = whole("user"), whole("time")
    index = _index_type(len(time))
    order: np.ndarray = np.lexsort((time, user)).astype(index)  # stable: ties keep file order
    bounds = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=known.size))])
    del user
    time = time[order]
    starts, ends = _slices(known.encode(pl.Series(columns.read("user"))), columns.read("time"), bounds, time)
    if any(GAP in history.fields for history in data.histories):
        columns.append("event.time", time)
    del time
    for field in data.fields:
        columns.append(f"event.{field.name}", whole(field.name)[order])
    for i, history in enumerate(data.histories):
        first, last = starts, ends
        if history.where:
            keep = whole(f"where.{i}")[order]
            before = np.concatenate([np.zeros(1, index), np.cumsum(keep, dtype=index)])  # kept events before each place
            columns.append(f"view.{history.name}", np.flatnonzero(keep).astype(index))
            first, last = before[starts], before[ends]
        first = np.maximum(first, last - history.length)
        columns.append(f"start.{history.name}", first.astype(index))
        columns.append(f"end.{history.name}", last.astype(index))


def warnings_of(data: src.Data, base: Path = Path(), tables: src.Tables | None = None) -> list[str]:
    """What looks wrong about the tables of events: none of them holds an event, or has a time that is not read.

    Raises DataError when a table cannot be read.
    """
    found = []
    for source, plan in src.event_plans(data, base, tables, split=False):
        if source.table == "rows":
            continue
        where = f"data.events `{source.table}`"
        if src.is_empty(plan, where):
            found.append(f"{where} has no events" + (f" after where = `{source.where}`." if source.where else "."))
        if source.time == "none" and data.time in plan.collect_schema():
            found.append(
                f'{where}: time = "none" although it has a column `{data.time}`: its events precede every row, later ones '
                "included. Leave `time` away to read the column."
            )
    return found


def _index_type(n: int) -> type:
    return np.int32 if n < 2**31 else np.int64


def _no_events(data: src.Data, fitted: Fitted, known: Vocabulary) -> dict[str, np.ndarray]:
    out = {"user": np.zeros(0, dtype=known.dtype), "time": np.zeros(0, dtype=np.int64)}
    out |= {field.name: np.zeros(0, dtype=fitted.vocabularies[field.vocab].dtype) for field in data.fields}
    return out | {f"where.{i}": np.zeros(0, dtype=bool) for i, history in enumerate(data.histories) if history.where}


def _event_chunks(
    data: src.Data, source: src.Events, plan: pl.LazyFrame, fitted: Fitted, users: Any, known: Vocabulary,
    per_second: float,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
    """Encoded events of known users of one source: user, time, one column per field, one bool per filtered history."""
    from unbraid.data.encode import chunks

    have, where = plan.collect_schema(), f"data.events `{source.table}`"
    exprs = {"user": src.users_of_events(data, have, users, where)}
    if source.time != "none":
        time = source.time or data.time
        expr, dtype = src.expression(time, have, where), src._dtype(time, have)
        exprs["time"], rate = src.to_time(expr, dtype, data.time_unit, f"Time of {where}")
        if rate != per_second:
            units = f"{rate:g} and {per_second:g} per second"
            raise src.DataError(f"{where}: its time and `data.time` are in different units ({units}).")
    values, lists = event_expressions(source, have)
    for frame in chunks(plan.select(**exprs, **values).filter(pl.col("user").is_not_null())):
        frame = exploded(frame, lists)
        if source.time != "none" and frame["time"].null_count():
            nulls = frame["time"].null_count()
            raise src.DataError(f'{where}: {nulls:,} events have no time. Filter them, or use time = "none".')
        codes = known.encode(pl.Series(stable_hash(frame["user"]).view(np.int64)))
        mine = codes >= FIRST_VALUE
        if mine.any():
            yield {"user": codes[mine], **encode_events(data, source, frame.filter(pl.Series(mine)), fitted)}


def event_expressions(source: src.Events, have: Mapping[str, Any]) -> tuple[dict[str, pl.Expr], list[str]]:
    """What is read of an event beside its user and time, from columns of types ``have``; and which of it are lists."""
    from unbraid.data.fit import event_values

    read = {name: event_values(column, have, source.table) for name, column in source.columns.items()}
    lists = [name for name, (_, dtype) in read.items() if isinstance(dtype, pl.List)]
    return {name: expr for name, (expr, _) in read.items()}, lists


def exploded(frame: pl.DataFrame, lists: list[str]) -> pl.DataFrame:
    """One row per event: the members of lists one after the other."""
    return frame.explode(lists, empty_as_null=False, keep_nulls=False) if lists else frame


def encode_events(data: src.Data, source: src.Events, frame: pl.DataFrame, fitted: Fitted) -> dict[str, np.ndarray]:
    """``time``, a column per field, and ``where.I`` per filtered history, of what `event_expressions` read of some events."""
    from unbraid.data.encode import codes_of

    out = {"time": np.full(len(frame), NO_TIME) if source.time == "none" else frame["time"].to_numpy()}
    read = {field.name for field in data.fields} & set(frame.columns)
    values = frame.select(canonical(pl.col(name), frame.schema[name]) for name in sorted(read))
    for field in data.fields:
        if field.name in read:
            where = f"Event field `{field.name}` of `{source.table}`"
            out[field.name] = codes_of(fitted, field.vocab, values[field.name], where)
        else:
            out[field.name] = np.full(len(frame), MISSING, dtype=fitted.vocabularies[field.vocab].dtype)
    names = {f.name for f in data.fields} | set(frame.columns) | {n for s in data.events for n in s.columns}
    full = frame.with_columns(pl.lit(None).alias(n) for n in sorted(names - set(frame.columns)))
    keeps = {}
    for i, history in enumerate(data.histories):
        if history.where:
            keep = src.expression(history.where, full.collect_schema(), f"History `{history.name}`")
            keeps[f"where.{i}"] = keep.fill_null(False).cast(pl.Boolean)
    kept = full.with_columns(**keeps)  # not select: a constant is one per event
    return out | {name: kept[name].to_numpy() for name in keeps}


def _slices(
    row_user: np.ndarray, row_time: np.ndarray, bounds: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For every row, the first event of its user and the end of those strictly before its time ((n,) int64 each).

    Args:
        row_user, row_time: (n,) codes and times; bounds: the events of user u are ``bounds[u]`` to ``bounds[u + 1]``,
            in order of their ``times``.
    """
    user = row_user.astype(np.int64)
    start, end = bounds[user], bounds[user + 1]
    low = start
    while (todo := low < end).any():  # binary search in all users' slices at once
        middle = (low + end) // 2
        earlier = times[middle.clip(max=len(times) - 1)] < row_time
        low = np.where(todo & earlier, middle + 1, low)
        end = np.where(todo & ~earlier, middle, end)
    return start, low


def gap_codes(event_time: np.ndarray, row_time: np.ndarray, per_second: float) -> np.ndarray:
    """(N,) bucket of the seconds between an event and its row: missing, or FIRST_VALUE + floor(log2(seconds + 1))."""
    known = event_time != NO_TIME
    seconds = np.where(known, row_time - np.where(known, event_time, row_time), 0) / per_second
    return np.where(known, FIRST_VALUE + np.floor(np.log2(seconds + 1.0)).astype(np.int64).clip(0, 31), MISSING)


def gather(
    store: Mapping[str, np.ndarray], name: str, fields: tuple[str, ...], rows: np.ndarray, per_second: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The packed histories of some rows.

    Args:
        store: the encoded columns; name, fields: of the history; rows: (n,) row numbers.

    Returns:
        field -> (N,) int64 codes, and (n + 1,) int64 offsets.
    """
    first = store[f"start.{name}"][rows].astype(np.int64)
    lengths = store[f"end.{name}"][rows].astype(np.int64) - first
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    at = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], lengths)
    if f"view.{name}" in store:
        at = store[f"view.{name}"][at]
    values = {}
    for field in fields:
        if field == GAP:
            row_time = np.repeat(store["time"][rows], lengths)
            values[field] = gap_codes(store["event.time"][at], row_time, per_second)
        elif field == POSITION:
            values[field] = np.repeat(offsets[1:], lengths) - np.arange(offsets[-1]) + (FIRST_VALUE - 1)
        else:
            values[field] = store[f"event.{field}"][at].astype(np.int64)
    return values, offsets
