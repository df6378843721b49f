"""Moments: which texts, numbers and columns are points in time, and how a run file reads them."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import polars as pl
from polars.exceptions import PolarsError

from unbraid.guess.words import sql_name

if TYPE_CHECKING:
    from unbraid.guess.columns import Column

_ISO = ("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d")
_OTHER = ("%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%d-%m-%Y", "%m-%d-%Y", "%b %d, %Y", "%B %d, %Y", "%d %b %Y", "%d-%b-%Y",
          "%d-%b-%y", "%m/%d/%y", "%d/%m/%y")  # fmt: skip
_CLOCK = (
    "%H:%M:%S",
    "%H:%M:%S%.f",
    "%H:%M",
    "%I:%M %p",
    "%I:%M:%S %p",
    "%H:%M:%SZ",
    "%H:%M:%S%.fZ",
    "%H:%M:%S%z",
    "%H:%M:%S%.f%z",
)
FORMATS = (
    *(f"{day}{gap}{clock}" for day in _ISO[:1] for clock in _CLOCK for gap in " T"),
    *(f"{day} {clock}" for day in (*_ISO[1:], *_OTHER) for clock in _CLOCK[:5]),
    *(*_ISO, *_OTHER, "%Y%m%d", "%a %b %d %H:%M:%S %z %Y"),
)
UNITS = (("s", 3e8, 5e9), ("ms", 3e11, 5e12), ("us", 3e14, 5e15), ("ns", 3e17, 5e18))  # 1980 to 2128 in each unit
PARTS = (("year",), ("month", "mon"), ("day", "mday", "dayofmonth"))
Read = tuple[str, str, str]  # SQL, unit, explanation


def calendar(value: int, per_second: float) -> dt.datetime:
    """The moment (UTC) that a time column's number stands for."""
    return dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=value / per_second * 1e6)


def unit_of(values: pl.Series) -> str:
    """The unit in which numbers are times between 1980 and 2128, or an empty string."""
    known = values.drop_nulls()
    if not len(known) or not known.dtype.is_numeric():
        return ""
    low, high = float(known.min()), float(known.max())  # type: ignore[arg-type]
    return next((unit for unit, least, most in UNITS if least <= low and high <= most), "")


def format_of(values: pl.Series, formats: tuple[str, ...] = FORMATS) -> str:
    """The first form in which all texts are moments, or an empty string."""
    known = values.drop_nulls()
    if known.dtype != pl.String or not len(known) or not known.head(20).str.contains(r"\d").all():
        return ""
    for form in formats:
        if not misread(known, form):
            try:
                years = known.unique().str.to_datetime(form).dt.year()
                if not years.null_count() and int(years.min()) >= 1800:  # type: ignore[arg-type]  # %Y reads 14 as a year, too
                    return form
            except PolarsError:  # a later text has another form
                continue
    return ""


def misread(texts: pl.Series, form: str) -> int:
    """How many of the first hundred texts are no times of that form."""
    return texts.head(100).str.to_datetime(form, strict=False, exact=True).null_count()


def read_time(c: Column, given: bool) -> Read | None:
    """How a column is read as a time, or None.  ``given``: the user says that it is one."""
    if c.dtype in (pl.Datetime, pl.Date):
        return c.name, "us", "a date" if c.dtype == pl.Date else "a date-time"
    if c.dtype.is_numeric():
        unit, whole = unit_of(c.values), c.dtype.is_integer()
        if whole and c.named({"hour"}) and _is_hour(c.values):
            return f"STRPTIME(CONCAT('20', {sql_name(c.name)}, '00'), '%Y%m%d%H%M')", "us", "hours written as YYMMDDHH"
        if not unit and whole and _is_number_day(c.values):
            return f"STRPTIME(CAST({sql_name(c.name)} AS VARCHAR), '%Y%m%d')", "us", "days written as YYYYMMDD"
        if not unit and not (whole and (given or c.words in (["time"], ["timestamp"], ["ts"]))):
            return None
        text = f"integers of the size of {unit} since 1970" if unit else "integers of an unknown unit, read as seconds"
        return (c.name if whole else f"CAST({sql_name(c.name)} AS BIGINT)"), unit or "s", text
    if c.form:
        return f"STRPTIME({sql_name(c.name)}, '{c.form}')", "us", f"text, read as {c.form}"
    return None


def from_parts(columns: dict[str, Column], own: list[str]) -> tuple[list[str], Read] | None:
    """The columns that make a time together, and how: year, month and day; or a day's text and a clock's."""
    parts = [
        next((c for n in own if (c := columns[n]).dtype.is_integer() and n.lower() in names), None) for names in PARTS
    ]
    if (year := parts[0]) is not None and parts[1] is not None and parts[2] is not None:
        if bool(year.values.drop_nulls().is_between(1980, 2128).all()):
            names = [c.name for c in parts if c is not None]
            joined = ", '-', ".join(map(sql_name, names))
            sql = f"STRPTIME(CONCAT({joined}), '%Y-%m-%d')"
            return names, (sql, "us", "year, month and day")
    some_day = pl.Series(["2000-01-01 "])
    clocks = [
        c for n in own if (c := columns[n]).dtype == pl.String and c.words[-1:] in (["time"], ["hour"], ["clock"])
    ]
    days = [c for n in own if (c := columns[n]).form and "%H" not in c.form and "%I" not in c.form]
    for clock in clocks:
        form = format_of(some_day + clock.values, tuple(f"%Y-%m-%d {each}" for each in _CLOCK[:5]))
        if form and days:
            sql = (
                f"STRPTIME(CONCAT({sql_name(days[0].name)}, ' ', {sql_name(clock.name)}), '{days[0].form} {form[9:]}')"
            )
            return [days[0].name, clock.name], (
                sql,
                "us",
                f"the day of `{days[0].name}` and the clock of `{clock.name}`",
            )
    return None


def _is_hour(values: pl.Series) -> bool:
    """Are these hours as 14102123, of 21 October 2014?"""
    known = values.drop_nulls()
    if not len(known) or is_day(values):
        return False
    text = ("20" + known.unique().cast(pl.String) + "00").str
    return not text.to_datetime("%Y%m%d%H%M", strict=False).null_count()


def _is_number_day(values: pl.Series) -> bool:
    known = values.drop_nulls()
    return bool(len(known)) and is_day(values) and not misread(known.unique().cast(pl.String), "%Y%m%d")


def is_day(values: pl.Series) -> bool:
    """Are these calendar days, as texts or as 20220425?"""
    known = values.drop_nulls()
    if values.dtype.is_integer():
        return bool(((known >= 19800101) & (known <= 21281231)).all())
    return values.dtype == pl.String and any(misread(known, form) < 0.1 * min(len(known), 100) for form in FORMATS)


def epoch(sql: str, unit: str, integer: bool) -> str:
    """SQL for the seconds since 1970 of a time."""
    if integer:
        return f"({sql_name(sql)} / { ({'s': 1, 'ms': 1e3, 'us': 1e6, 'ns': 1e9}[unit]):.1f})"
    return f"EXTRACT(EPOCH FROM CAST({sql if '(' in sql else sql_name(sql)} AS TIMESTAMP))"
