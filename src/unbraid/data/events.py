"""The event table, stored once by user and time: a row's history is a slice that ends strictly before its time.

On disk, per event of a user who has rows: one small integer per field, and the time (int64) if a history reads the gap.
Per history with a filter: its events' positions.  Per row and history: where its slice starts and ends.  The table is
O(events + rows), whatever the lengths of histories; making it sorts on disk what `Room` does not hold.
Events without a time come first for their user, in file order; events of the same instant as a row are not its history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from unbraid.data import source as src
from unbraid.data.ahead import ahead
from unbraid.data.spill import AHEAD, Room, Sorter, bins, pieces
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
    from unbraid.data.encode import chunks

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

    def records(source: int, of: Mapping[str, np.ndarray], row: np.ndarray | int = -1) -> pl.DataFrame:
        about = {"bin": bins(of["user"]), "source": np.full(len(of["user"]), source, np.uint8)}
        about["row"] = np.broadcast_to(np.asarray(row, number), len(of["user"])).copy()
        return pl.DataFrame({**of, **about}).select("bin", "user", "time", "source", "row", *kinds)

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
        mine = {"user": user[there:], "time": time[there:], **none}
        sorter.add(records(0, mine, np.arange(done + there, done + len(user))))
        done += len(user)
    at = list(before["done"])
    for place, (source, plan) in enumerate(src.event_plans(data, base, tables, split=False)):
        with src.reading(f"data.events `{source.table}`"):
            asked, lists = _asked(data, source, src.add_joins(plan, data, base, tables), users, per_second)

            def encoded(
                frame: pl.DataFrame, place: int = place, source: src.Events = source, lists: list[str] = lists
            ) -> Any:
                return len(frame), records(place + 1, _encoded(data, source, frame, lists, fitted, seen))

            for read, part in ahead(encoded, chunks(asked, at[place]), room.limit // AHEAD):
                at[place] += read
                if sorter.add(part) or journal.due():
                    note()
    if kept:
        note()
    progress("sorting events", 0, 0)
    cut = _Cut(data, columns, kinds, _index_type(sorter.records - rows))
    _write_sorted(sorter, cut, room.sorter("slices", "bin", "row"), rows)


def _write_sorted(sorter: Sorter, cut: _Cut, slices: Sorter, rows: int) -> None:
    """Events in order of users, and each row's slices in order of rows."""
    for found in sorter.windows(lambda window: cut.window({name: window[name].to_numpy() for name in window.columns})):
        places = cut.write(found)
        slices.add(pl.DataFrame({"bin": bins(places["row"], rows), **places}))
    for window in slices.windows():
        for name in (f"{end}.{history.name}" for history in cut.data.histories for end in ("start", "end")):
            cut.columns.append(name, window[name].to_numpy())
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
        # events so far: all, and those of each history
        self.done = dict.fromkeys(["", *(history.name for history in data.histories)], 0)
        types = {"user": "int64", "time": "int64", "source": "uint8", "row": "int64", **kinds}
        # columns are there without events, too
        self.write(self.window({name: np.zeros(0, kind) for name, kind in types.items()}))

    def window(self, window: Mapping[str, np.ndarray]) -> _Window:
        """Rows and events of some users, sorted; places are counted from the start of the window."""
        users, is_row = window["user"], window["source"] == 0
        first = np.concatenate([[True], users[1:] != users[:-1]])[: len(users)]  # of its user
        place = np.cumsum(first) - 1
        shown = np.zeros(int(first.sum()), dtype=bool)
        shown[place[is_row & (users != 0)]] = True  # a user of 0 is none
        event = ~is_row & shown[place]
        begins, at = np.flatnonzero(first)[place[is_row]], np.flatnonzero(is_row)

        def slices(counted: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
            """Of every row, the number of counted records before its user, or the last ones, and before itself."""
            sums = np.concatenate([[0], np.cumsum(counted)])
            return np.maximum(sums[begins], sums[at] - length), sums[at]

        events = {"event.time": window["time"][event]} if self.timed else {}
        events |= {f"event.{field.name}": window[field.name][event] for field in self.data.fields}
        found, views = {}, {}
        for i, history in enumerate(self.data.histories):
            keep = event & window[f"where.{i}"] if history.where else event
            found[history.name] = slices(keep, history.length)
            if history.where:
                views[history.name] = np.flatnonzero(keep[event])
        return _Window(int(event.sum()), window["row"][is_row], events, found, views)

    def write(self, window: _Window) -> dict[str, np.ndarray]:
        """Append its events.  Returns ``row``, and ``start.NAME``, ``end.NAME`` of each history."""
        for name, values in window.events.items():
            self.columns.append(name, values)
        out = {"row": window.row}
        for name, slices in window.slices.items():
            before = self.done[name if name in window.views else ""]
            for end, places in zip(("start", "end"), slices, strict=True):
                out[f"{end}.{name}"] = (places + before).astype(self.index)
            if name in window.views:
                self.columns.append(f"view.{name}", (window.views[name] + self.done[""]).astype(self.index))
                self.done[name] += len(window.views[name])
        self.done[""] += window.count
        return out


@dataclass(frozen=True)
class _Window:
    """What `_Cut.window` finds.

    Args:
        count: of events; row: (n,) numbers of rows; events: columns.
        slices: of each history (n,) starts and (n,) ends; views: places of the events of a filtered history.
    """

    count: int
    row: np.ndarray
    events: dict[str, np.ndarray]
    slices: dict[str, tuple[np.ndarray, np.ndarray]]
    views: dict[str, np.ndarray]


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


def _asked(
    data: src.Data, source: src.Events, plan: pl.LazyFrame, users: Any, per_second: float
) -> tuple[pl.LazyFrame, list[str]]:
    """What is read of one source, and which of its columns are lists."""
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
    return plan.select(**exprs, **values).filter(pl.col("user").is_not_null()), lists


def _encoded(
    data: src.Data, source: src.Events, frame: pl.DataFrame, lists: list[str], fitted: Fitted, seen: _Seen
) -> dict[str, np.ndarray]:
    """Of the events of users with rows: user, time, one column per field, one bool per filtered history."""
    frame = exploded(frame, lists)
    if source.time != "none" and frame["time"].null_count():
        nulls = frame["time"].null_count()
        where = f"data.events `{source.table}`"
        raise src.DataError(f'{where}: {nulls:,} events have no time. Filter them, or use time = "none".')
    hashes = stable_hash(frame["user"]).view(np.int64)
    mine = seen.of(hashes)
    return {"user": hashes[mine], **encode_events(data, source, frame.filter(pl.Series(mine)), fitted)}


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
