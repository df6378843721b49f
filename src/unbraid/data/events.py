"""The event table, stored once by user and time: a row's history is a slice that ends strictly before its time.

On disk, per event of a user who has rows: one small integer per field, and the time (int64) if a history reads the gap.
Per history with a filter: its events' positions.  Per row and history: where its slice starts and ends.  The table is
O(events + rows), whatever the lengths of histories; making it sorts on disk what `Room` does not hold.
Events without a time come first for their user, in file order; events of the same instant as a row are not its history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from unbraid.data import source as src
from unbraid.data.spill import Room, bins, pieces
from unbraid.data.vocabulary import canonical, stable_hash
from unbraid.types import FIRST_VALUE, GAP, MISSING, POSITION

if TYPE_CHECKING:
    from unbraid.data.columns import Columns
    from unbraid.data.fit import Progress
    from unbraid.data.fitted import Fitted

NO_TIME = np.iinfo(np.int64).min  # before every row


def write_events(
    data: src.Data, base: Path, tables: src.Tables | None, fitted: Fitted, columns: Columns, users: Any,
    per_second: float, progress: Progress, room: Room, note_rows: Callable[[], None],
) -> None:  # fmt: skip
    """Encode and sort all events, and cut each row's slices.  The rows must be written; ``users``: their ids' type.

    Rows are sorted among the events, before those of their instant, so that a slice is a count of events before it.  What was
    sorted stays on disk until the table is there: an interrupted merge begins anew.
    """
    progress("encoding events", 0, 0)
    kinds = {field.name: fitted.vocabularies[field.vocab].dtype for field in data.fields}
    kinds |= {f"where.{i}": "bool" for i, history in enumerate(data.histories) if history.where}
    rows = len(columns.read("user"))
    kept = data.appended and room.journal.path is not None
    number = np.int64 if kept else _index_type(rows)
    journal, seen = room.journal, _Seen(rows, room.limit, all=kept)
    before = journal.noted.get("events", {"rows": 0, "done": [0] * len(data.events), "runs": [], "records": 0})
    sorter = room.sorter("events", "bin", "user", "time", "source", runs=before["runs"])
    sorter.records = before["records"]

    def add(source: int, of: Mapping[str, np.ndarray], row: np.ndarray) -> bool:
        about = {"bin": bins(of["user"]), "source": np.full(len(row), source, np.uint8), "row": row.astype(number)}
        return sorter.add(pl.DataFrame({**of, **about}).select("bin", "user", "time", "source", "row", *kinds))

    def note() -> None:
        if journal.path and "rows" not in journal.noted:  # too quick to be noted; events are nothing without
            note_rows()
        sorter.spill()
        journal.note(events={"rows": rows, "done": at, "runs": sorter.runs, "records": sorter.records})

    done = 0
    for user, time in zip(pieces(columns.read("user")), pieces(columns.read("time")), strict=True):
        seen.add(user)
        there = min(max(before["rows"] - done, 0), len(user))  # they were added first
        none = {name: np.zeros(len(user) - there, kind) for name, kind in kinds.items()}
        add(0, {"user": user[there:], "time": time[there:], **none}, np.arange(done + there, done + len(user)))
        done += len(user)
    at = list(before["done"])
    for place, (source, plan) in enumerate(src.event_plans(data, base, tables, split=False)):
        joined = src.add_joins(plan, data, base, tables)
        with src.reading(f"data.events `{source.table}`"):
            for read, part in _event_chunks(data, source, joined, fitted, users, seen, per_second, at[place]):
                at[place] += read
                if add(place + 1, part, np.full(len(part["user"]), -1)) or journal.due():
                    note()
    if kept:
        note()
    progress("sorting events", 0, 0)
    slices, cut = room.sorter("slices", "bin", "row"), _Cut(data, columns, kinds, _index_type(sorter.records - rows))
    for window in sorter.windows():
        found = cut.window({name: window[name].to_numpy() for name in window.columns})
        slices.add(pl.DataFrame({"bin": bins(found["row"], rows), **found}))
    for window in slices.windows():
        for name in (f"{end}.{history.name}" for history in data.histories for end in ("start", "end")):
            columns.append(name, window[name].to_numpy())
    slices.close()


class _Seen:
    """Which users may have rows: nobody sees the events of others.  A hash of a hash, so that a few others pass.

    Args:
        all: everybody, for rows of another day.
    """

    def __init__(self, rows: int, limit: int, all: bool) -> None:
        size = 1 << max(10, min(8 * rows, limit).bit_length() - 1)
        self.places, self.mask = np.full(size, all), np.int64(size - 1)

    def add(self, users: np.ndarray) -> None:
        """(n,) int64 hashes."""
        self.places[users & self.mask] = True

    def of(self, users: np.ndarray) -> np.ndarray:
        """(n,) bool."""
        return self.places[users & self.mask] & (users != 0)


class _Cut:
    """Writes events in order, window by window, and says where each row's histories start and end."""

    def __init__(self, data: src.Data, columns: Columns, kinds: Mapping[str, str], index: type) -> None:
        self.data, self.columns, self.index = data, columns, index
        self.timed = any(GAP in history.fields for history in data.histories)
        self.done = 0  # events
        self.kept = {f"where.{i}": 0 for i, history in enumerate(data.histories) if history.where}
        types = {"user": "int64", "time": "int64", "source": "uint8", "row": "int64", **kinds}
        self.window({name: np.zeros(0, kind) for name, kind in types.items()})  # columns are there without events, too

    def window(self, window: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows and events of some users, sorted.  Returns ``row``, and ``start.NAME``, ``end.NAME`` of each history."""
        users, is_row = window["user"], window["source"] == 0
        first = np.concatenate([[True], users[1:] != users[:-1]])[: len(users)]  # of its user
        place = np.cumsum(first) - 1
        shown = np.zeros(int(first.sum()), dtype=bool)
        shown[place[is_row & (users != 0)]] = True  # a user of 0 is none
        event = ~is_row & shown[place]
        begins, at = np.flatnonzero(first)[place[is_row]], np.flatnonzero(is_row)
        nobody = users[at] == 0

        def slices(counted: np.ndarray, before: int) -> tuple[np.ndarray, np.ndarray]:
            """Of every row, the number of counted records before its user and before itself."""
            sums = np.concatenate([[0], np.cumsum(counted)]) + before
            return np.where(nobody, 0, sums[begins]), np.where(nobody, 0, sums[at])

        if self.timed:
            self.columns.append("event.time", window["time"][event])
        for field in self.data.fields:
            self.columns.append(f"event.{field.name}", window[field.name][event])
        out = {"row": window["row"][is_row]}
        starts, ends = slices(event, self.done)
        for i, history in enumerate(self.data.histories):
            start, end = starts, ends
            if history.where:
                keep = event & window[f"where.{i}"]
                start, end = slices(keep, self.kept[f"where.{i}"])
                places = np.flatnonzero(keep[event]) + self.done
                self.columns.append(f"view.{history.name}", places.astype(self.index))
                self.kept[f"where.{i}"] += len(places)
            out[f"start.{history.name}"] = np.maximum(start, end - history.length).astype(self.index)
            out[f"end.{history.name}"] = end.astype(self.index)
        self.done += int(event.sum())
        return out


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


def _source(number: int, users: np.ndarray) -> np.ndarray:
    return np.full(len(users), number, dtype=np.uint8)


def _event_chunks(
    data: src.Data, source: src.Events, plan: pl.LazyFrame, fitted: Fitted, users: Any, seen: _Seen,
    per_second: float, start: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:  # fmt: skip
    """Of one source, from row ``start`` of its plan on: how many rows were read, and the encoded events of users with rows
    (user, time, one column per field, one bool per filtered history)."""
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
    for frame in chunks(plan.select(**exprs, **values).filter(pl.col("user").is_not_null()), start):
        read, frame = len(frame), exploded(frame, lists)
        if source.time != "none" and frame["time"].null_count():
            nulls = frame["time"].null_count()
            raise src.DataError(f'{where}: {nulls:,} events have no time. Filter them, or use time = "none".')
        hashes = stable_hash(frame["user"]).view(np.int64)
        mine = seen.of(hashes)
        yield read, {"user": hashes[mine], **encode_events(data, source, frame.filter(pl.Series(mine)), fitted)}


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
