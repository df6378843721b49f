"""Raw events, as clients send them and stores keep them, and what they are to the run's histories.

An event table is one of the run's ``data.events``; several sources may read it, each with a filter and columns of its own.  A
record keeps the raw columns that they read, so that another model may read it in another way.  What decides its meaning is
`unbraid.data.events`'s: the same expressions, filters and codes that encode the events of training.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.data import source as src
from unbraid.data.events import NO_TIME, encode_events, event_expressions, exploded
from unbraid.data.fitted import Fitted
from unbraid.data.vocabulary import stable_hash
from unbraid.serve.kept import keeps_rows, noted, trained_columns
from unbraid.serve.rows import (
    Column,
    Joins,
    RequestError,
    RowReader,
    Types,
    as_json,
    each,
    example,
    here,
    joined,
    kind_of,
    roots,
    series,
    table_types,
    widest,
)
from unbraid.serve.store import Record, Store


class Table:
    """One of the run's event tables: what it asks of a client, and what its records mean.

    Args:
        name: of the table; data, fitted, joins: of the run; rows: its reader of rows; tables: tables in memory.
        store: that records go to, if any: whether it keeps whole rows.

    Attributes:
        types: raw column -> type, of all that an event brings; values: the columns that a record keeps; reads: of those, what
            histories read.
    """

    def __init__(
        self, name: str, data: src.Data, fitted: Fitted, joins: Joins, rows: RowReader, tables: src.Tables | None,
        store: Store | None = None,
    ) -> None:  # fmt: skip
        self.name, self.fitted, self.reader = name, fitted, rows
        self.sources = [(place, one) for place, one in enumerate(data.events) if one.table == name]
        # who sends an event again gives it the same id; a second one that is equal is another event
        self.data = dataclasses.replace(data, drop_duplicates=False, events=tuple(one for _, one in self.sources))
        whole = store is not None and keeps_rows(store)
        known = noted(store)[name].types if store is not None and whole and name in noted(store) else {}
        have = {n: widest(kind) for n, kind in known.items()} | event_types(name, data, fitted, rows, tables)
        times = {one.time or data.time for _, one in self.sources}
        if len(times) > 1:
            raise src.DataError(f"data.events `{name}`: its sources read different times ({', '.join(sorted(times))}).")
        self.time = "" if (time := times.pop()) == "none" else time
        reads = {n for _, one in self.sources for text in one.columns.values() for n in roots(text, have)}
        own, used = joins.asked(reads, have)
        self.joins = joins.use(used, reads)
        own |= {n for _, one in self.sources if one.where for n in roots(one.where, have)}
        self._know(own, have)
        self.reads = [n for n in have if n in own]
        if whole:
            own |= joins.asked(trained_columns(data, name, have), have)[0]
            self._know(own, have)
        self.values = [n for n in have if n in own]
        asked = own | roots(data.user, have) | roots(self.time, have)
        checked = [data.keep, data.withhold, *(t.source for t in data.tasks if data.withhold)] if name == "rows" else []
        asked |= {n for text in checked if text for n in roots(text, have)}
        self._know(asked, have)
        self.types: Types = {n: have[n] for n in have if n in asked}
        temporal = self.time in have and have[self.time] in (pl.Date, pl.Datetime)  # a time is a number everywhere
        self.kinds = {n: "int" if temporal and n == self.time else kind_of(kind) for n, kind in self.types.items()}
        self.checked = any(checked)
        self.plans = self._plans()

    def _know(self, names: set[str], have: Mapping[str, Any]) -> None:
        if unknown := sorted(names - set(have)):
            raise src.DataError(
                f"data.events `{self.name}`: the type of column {', '.join(f'`{n}`' for n in unknown)} is not known: the table "
                f"is not in {src.root_of(self.data, Path())}. Give the folder that holds the run's tables."
            )

    def _plans(self) -> list[tuple[dict[str, pl.Expr], list[str], pl.Expr | None]]:
        """Of each source: what it reads, which of it are lists, and its filter."""
        have = {name: self.types[name] for name in self.reads}
        full = joined(pl.DataFrame(schema=have), self.joins).schema
        where = f"data.events `{self.name}`"
        keep = [src.expression(one.where, have, where) if one.where else None for _, one in self.sources]
        return [(*event_expressions(one, full), kept) for (_, one), kept in zip(self.sources, keep, strict=True)]

    def encode(self, records: Sequence[Record]) -> list[dict[str, np.ndarray]]:
        """Of each source: what `unbraid.data.events.encode_events` gives, ``place`` of the source and ``record``, its number."""
        columns = {n: [r.values.get(n) for r in records] for n in self.reads}
        given = [series(n, c, self.types[n], each("", ""), self.kinds[n]) for n, c in columns.items()]
        time = np.array([r.time for r in records], dtype=np.int64)
        number = pl.int_range(len(records), eager=True).alias("__number")
        frame = joined(pl.DataFrame([*given, number]), self.joins)
        found = []
        for (place, one), (read, lists, keep) in zip(self.sources, self.plans, strict=True):
            mine = frame if keep is None else frame.filter(keep)
            events = exploded(mine.select("__number", **read), lists)
            record = events["__number"].to_numpy()
            events = events.drop("__number").with_columns(pl.Series("time", time[record]))
            arrays = encode_events(self.data, one, events, self.fitted)
            found.append({**arrays, "place": np.full(len(events), place, dtype=np.int16), "record": record})
        return found

    def records(self, rows: Sequence[Mapping[str, Any]], place: str = "") -> list[tuple[int, Record]]:
        """Raw events, checked, as (user, record without an id).

        Args:
            place: the field of the first row is ``{place}0``, where there are several; empty: names of columns alone.

        Raises:
            RequestError: a column is missing, unknown or of another type; there is no user or time; the run would not keep it.
        """

        def at(i: int) -> str:
            return f"{place}{i}." if place else ""

        for i, row in enumerate(rows):
            for name in (*(n for n in self.types if n not in row), *(n for n in row if n not in self.types)):
                what = "is missing" if name in self.types else "is not read"
                known = ", ".join(self.types)
                raise RequestError(f"{at(i)}{name}", f"Column `{name}` {what}. Events of `{self.name}` have {known}.")
        frame = pl.DataFrame([
            series(n, [row[n] for row in rows], kind, each(place, f".{n}") if place else here(n), self.kinds[n])
            for n, kind in self.types.items()
        ])  # fmt: skip
        if self.checked:
            frame = self._kept(frame, at)
        have, where = frame.schema, f"Events of `{self.name}`"
        exprs = {"user": src.users_of_events(self.data, have, self.reader.users, where), "time": pl.lit(NO_TIME)}
        if self.time:
            exprs["time"], _ = src.to_time(src.expression(self.time, have, where), src._dtype(self.time, have),
                                           self.data.time_unit, f"Time of {where}")  # fmt: skip
        found = frame.select(pl.int_range(pl.len()).alias("__n"), **exprs)
        for what, source in (("user", self.data.user), ("time", self.time)):
            if found[what].null_count():
                i = int(found[what].is_null().arg_max() or 0)
                name = source if source in have else ""
                raise RequestError(f"{at(i)}{name}".rstrip("."), f"An event needs a {what}. Found null.")
        users = stable_hash(found["user"]).tolist()
        values = frame.select(as_json(n, self.types[n], self.kinds[n]) for n in self.values).to_dicts()
        values = values or [{} for _ in rows]
        return [
            (u, Record("", t, self.name, v)) for u, t, v in zip(users, found["time"].to_list(), values, strict=True)
        ]

    def _kept(self, frame: pl.DataFrame, at: Callable[[int], str]) -> pl.DataFrame:
        """The rows as events: without labels that are withheld.  Raises RequestError for one that the run does not keep."""
        number = "__number"
        plan = src.kept_rows(self.data, Path(), {self.data.rows: frame.with_row_index(number)})
        found = src._without_labels(self.data, plan).collect()
        if gone := sorted(set(range(len(frame))) - set(found[number].to_list())):
            raise RequestError(
                at(gone[0]).rstrip("."), f"The run leaves such rows out, of events, too: keep = {self.data.keep!r}."
            )
        return found.drop(number)

    def columns(self) -> dict[str, Column]:
        """What a client sends, with examples."""
        return {n: Column(self.kinds[n], True, example(n, t, self.data, self.fitted)) for n, t in self.types.items()}


def event_types(name: str, data: src.Data, fitted: Fitted, rows: RowReader, tables: src.Tables | None) -> Types:
    """Types of an event table's columns: those of the table, or, where that is not here, of what is declared of plain columns."""
    with contextlib.suppress(src.DataError):
        return table_types(data, data.rows if name == "rows" else name, tables)
    found = dict(rows.have) if name == "rows" else {n: rows.have[n] for n in (rows.user, rows.time) if n in rows.have}
    for one in (one for one in data.events if one.table == name):
        found |= {one.time: pl.Int64} if one.time not in ("", "none") else {}
        for field in data.fields:
            if (text := one.columns.get(field.name, "")).isidentifier():
                found.setdefault(text, fitted.vocabularies[field.vocab].values.dtype)
    return found
