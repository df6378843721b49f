"""Which rows train, validate and test, for a first run: by files or a column that say so, else by time, user or row."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from unbraid.data.source import expression, instant, stable_uniform
from unbraid.guess.times import calendar
from unbraid.guess.words import sql_name


@dataclass
class Split:
    """A split and what it means for the sample.

    Args:
        keys: of `data.split`; why: for the comment; train, test: (n,) bool rows of the sample.
        keep: a filter that the split needs.
    """

    keys: dict[str, Any]
    why: str
    train: pl.Series
    test: pl.Series
    keep: str = ""


def split_of(
    frame: pl.DataFrame, own: Sequence[str], files: Mapping[str, str] | None, user: str, time: str,
    moments: tuple[pl.Series, float] | None, number: bool,
) -> Split:  # fmt: skip
    """The split of a log.

    Args:
        frame: the sample; own: columns of its table; files: keys of a split by files.
        moments: the sample's times and how many make a second; number: are they numbers in the run file, too?
    """
    if files:
        every = pl.Series([True]).new_from_index(0, len(frame))
        why = (
            "the files say so; a tenth of the training rows validates"
            if "valid_files" not in files
            else "the files say so"
        )
        return Split({"kind": "file", **files}, why, every, ~every)
    if found := _by_column(frame, own):
        return found
    if moments is not None and (found := _by_time(moments, number, time)):
        return found
    return _by_user(frame, user, time)


def _by_column(frame: pl.DataFrame, own: Sequence[str]) -> Split | None:
    for name in own:
        values = frame[name]
        if values.dtype == pl.String and set(values.unique().to_list()) == {"train", "valid", "test"}:
            keys = {"kind": "column", "column": name}
            return Split(keys, f"`{name}` says train, valid or test", values == "train", values == "test")
    return None


def _by_time(moments: tuple[pl.Series, float], number: bool, time: str) -> Split | None:
    """The last tenth of the rows tests and the tenth before validates, if the times are that fine."""
    times, per_second = moments
    known = times.drop_nulls().sort()
    distinct = known.unique().sort()
    if len(distinct) < 3:
        return None
    first, second = (int(distinct.search_sorted(int(known[int(q * (len(known) - 1))]))) for q in (0.8, 0.9))
    low = min(max(first, 1), len(distinct) - 2)  # no split may be empty
    high = min(max(second, low + 1), len(distinct) - 1)
    cuts = [_moment(int(distinct[i]), per_second, number) for i in (low, high)]
    bounds = [instant(c, per_second) for c in cuts]
    return Split(
        {"kind": "time", "valid_from": cuts[0], "test_from": cuts[1]},
        "80 % of the rows train, the next 10 % validate, the last 10 % test",
        (times < bounds[0]).fill_null(False),
        (times >= bounds[1]).fill_null(False),
        f"{sql_name(time)} IS NOT NULL" if times.null_count() else "",
    )


def _moment(value: int, per_second: float, number: bool) -> str | int:
    """A time as the run file says it: a number in the column's unit, or ISO for dates."""
    if number:
        return value
    moment = calendar(value, per_second)
    return moment.isoformat() if moment.time() != dt.time() else moment.date().isoformat()


def _by_user(frame: pl.DataFrame, user: str, time: str) -> Split:
    """Whole users, or rows where there is no user."""
    why = f"`{time}` has too few different times" if time else "no time column was found"
    text = frame.select(u=pl.int_range(pl.len()).cast(pl.String))["u"]
    if user:
        text = frame.select(u=expression(user, frame.schema, "user").cast(pl.String))["u"]
    for seed in range(100):  # a small table may leave a split empty by chance
        draw = stable_uniform(text, seed)
        train, test = (draw >= 0.2).fill_null(False), (draw < 0.1).fill_null(False)
        if train.any() and test.any() and ((draw >= 0.1) & (draw < 0.2)).any():
            break
    why += f": whole users of `{user}` go to one split" if user else " and no user: rows are drawn"
    return Split({"kind": "user" if user else "row", "valid": 0.1, "test": 0.1, "seed": seed}, why, train, test)
