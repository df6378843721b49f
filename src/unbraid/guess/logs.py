"""Tables that hold events of the rows' users, without labels: what they saw, put into a cart, searched.

Such a table is no join, for a user has many rows in it; it becomes a source of events, and a history that ends strictly before
each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from unbraid.data.text import stem
from unbraid.data.vocabulary import canonical_type
from unbraid.guess.columns import MANY, Column, columns_of, inside
from unbraid.guess.roles import item_of
from unbraid.guess.tables import Tables
from unbraid.guess.times import Read, epoch, read_time
from unbraid.guess.words import ACTIONS, DAYS, EVENTS, IDS, TIMES, safe, words_of

SAMPLE = 50_000  # events that are looked at
RATES = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
TAKEN = {"user", "time", "gap", "position"}  # names that no field has


@dataclass(frozen=True)
class Clock:
    """How the rows' time is read: its column, the unit of a number, and whether it is one."""

    name: str
    unit: str
    number: bool


@dataclass(frozen=True)
class Log:
    """A table of events.

    Args:
        table: its name; name: of its history; fields: (inline table of the field, column, why) for each field.
        time: column or SQL that is its time, in the unit of the rows' time; why: for the comment.
        unit: that the run file has to name for these times, "" for none.
    """

    table: str
    name: str
    fields: tuple[tuple[dict[str, Any], str, str], ...]
    time: str
    why: str
    unit: str = ""


def log_of(
    tables: Tables, table: str, user: str, users: pl.Series, clock: Clock, item: tuple[str, dict[str, Any], pl.Series] | None,
    taken: Sequence[str], alike: bool,
) -> Log | str:  # fmt: skip
    """A table as a source of events, or why it is none.

    Args:
        user, users: the rows' column of users and its values; clock: their time.
        item: the rows' item: its column, its feature, its values; taken: names of features and histories.
        alike: has the table the columns of the rows, so that it may hold rows to predict?
    """
    plan = tables.plan(table)
    have = plan.collect_schema()
    if user not in have:
        return f"it has no column `{user}`, so that its rows are nobody's"
    if canonical_type(have[user]) != canonical_type(users.dtype):
        return f"`{user}` is {have[user]} there and {users.dtype} in the rows"
    words = {word.rstrip("s") for word in words_of(stem(table))}
    if alike and not words & EVENTS:
        return "it has the columns of the rows: rows to predict, perhaps (`unbraid predict`), or events (`data.events`)"
    frame = plan.head(SAMPLE).collect(engine="streaming")
    if not frame[user].is_in(users.unique().implode()).any():
        return f"no value of its `{user}` is one of the rows"
    columns = columns_of(frame, list(have), {}, 1)
    time = _time_of(columns, clock.name)
    if time is None:
        return "it has no time, so that nobody knows which of its rows are before which event"
    source, unit = _in_unit(time[1], have, clock)
    fields = _fields(columns, {user, time[0]}, item, taken, stem(table))
    if not fields:
        return "it has users and times, and no id that an event could be of"
    name = safe(stem(table)).rstrip("*-_") or "events"
    while name in taken or name in TAKEN:
        name += "_before"
    return Log(table, name, fields, source, f"`{time[0]}`: {time[1][2]}", unit)


def _time_of(columns: dict[str, Column], like: str) -> tuple[str, Read] | None:
    """The column of the events' time, that of the rows' name first, and how it is read."""
    named = [c for c in columns.values() if c.named(TIMES | DAYS) or c.dtype.is_temporal() or c.form]
    best = sorted(named, key=lambda c: (c.name != like, -c.distinct))
    return next(((c.name, read) for c in best if (read := read_time(c, c.name == like))), None)


def _in_unit(read: Read, have: Any, clock: Clock) -> tuple[str, str]:
    """(column or SQL, unit to name) of the events' time, so that it is of the rows' unit."""
    sql, unit, _ = read
    number = sql in have and have[sql].is_integer() or sql.startswith("CAST(") and sql.endswith("AS BIGINT)")
    if number == clock.number and (not number or unit == clock.unit):
        return sql, ""
    rate = RATES[clock.unit] if clock.number else 10**6  # of dates
    seconds = epoch(sql, unit, number) if sql in have or not number else f"({sql} / {RATES[unit]:.1f})"
    return f"CAST({seconds} * {rate} AS BIGINT)", clock.unit if clock.number else "us"


def _fields(
    columns: dict[str, Column], roles: set[str], item: tuple[str, dict[str, Any], pl.Series] | None, taken: Sequence[str],
    table: str,
) -> tuple[tuple[dict[str, Any], str, str], ...]:  # fmt: skip
    """What an event was of, and what was done, if the table says so."""
    free = [
        c for n, c in columns.items() if n not in roles and not c.nested and c.exact and not c.form and c.distinct > 1
    ]
    free = [c for c in free if not c.dtype.is_temporal() and not c.names_rows]
    mine = item and next((c for c in free if c.name == item[0]), None)
    what = mine or item_of(free) or next((c for c in free if _is_id(c)), None)
    found: list[tuple[dict[str, Any], str, str]] = []
    for c in dict.fromkeys((what, next((c for c in free if c.named(ACTIONS) and c.distinct <= 50), None))):
        if c is None:
            continue
        least = {"min_count": 2} if c.distinct > MANY else {}
        if item and c is mine:
            found.append(
                ({"name": item[1]["name"], **{k: item[1][k] for k in ("min_count",) if k in item[1]}}, c.name, "")
            )
            continue
        name = safe(c.name)
        while name in taken or name in TAKEN:
            name = f"{safe(table)}_{name}"
        if item and c is what and (share := inside(c.values.implode(), item[2])) > 0.5:
            shared = {
                "name": name,
                "vocabulary": item[1]["name"],
                **{k: item[1][k] for k in ("min_count",) if k in item[1]},
            }
            found.append((shared, c.name, f"{share:.0%} of its values are values of `{item[0]}`"))
        else:
            found.append(({"name": name, **least}, c.name, f"{c.distinct:,} distinct values of `{c.name}`"))
    return tuple(found)


def _is_id(c: Column) -> bool:
    """Could its values name things: by its name, as texts, or as whole numbers that come again and again?"""
    return c.named(IDS) or c.dtype == pl.String or (c.dtype.is_integer() and c.distinct * 5 <= c.rows)
