"""What one column seems to be: its type, its values, and the kind of feature that would read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from unbraid.guess.times import format_of
from unbraid.guess.words import ABSENT, IDS, safe, sql_name, words_of

UNIQUE = 0.9  # distinct values per row from which a column identifies rows
MANY = 1_000  # ids with more distinct values get min_count 2
NUMBERS = 0.9  # of the texts of a column from which those that are no numbers are taken for missing, if they say so
EACH = "almost every row has its own value"
PICTURES = r"(?i)\.(jpe?g|png|bmp|gif|webp|tiff?)$"
AMOUNT = (
    r"^\s*[-+(]?\s*(?:[$€£¥₹]|[A-Z]{3}\s)?\s*[-+]?(?:\d{1,3}(?:[,.' ]\d{3})+|\d+)(?:[.,]\d+)?"
    r"\s*(?:%|[$€£¥₹]|\s?[A-Z]{3})?\s*\)?$"
)  # $1,234.50, (3.20), 3,50 EUR, 12 %
COMMA = r",\d{1,2}\D*$|\d\.\d{3},"  # a decimal comma: 3,50 or 1.234,5
ANY_NUMBER = r"^\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*$"


class Column:
    """What is known of one column.

    Args:
        values: of the sample, as they are; own: does it come from the table of the rows?
        distinct: different values, and rows: out of so many rows with a value.

    Attributes:
        values: numbers where texts mean numbers; sql: how a run file reads these, empty for a column as it is.
        note: what ``sql`` does, for a comment.
        form: the form of texts that are moments, or an empty string.
    """

    def __init__(self, values: pl.Series, own: bool, distinct: int, rows: int) -> None:
        self.name, self.own, self.distinct, self.rows = values.name, own, distinct, rows
        self.sql, self.note, self.values = number_in(values)
        self.words = words_of(self.name)
        self.dtype: Any = self.values.dtype
        self.nested = self.dtype.is_nested()
        self.exact = not self.nested and not self.dtype.is_float()  # so that values can name things
        self.unique = self.distinct > UNIQUE * self.rows
        # it names rows, and nothing else; of a large table distinct values are counted to within a few per cent
        self.names_rows = self.distinct > (0.97 * self.rows if self.rows > len(self.values) else self.rows - 1)

    @cached_property
    def form(self) -> str:
        """The form of texts that are moments, or an empty string."""
        return format_of(self.values)

    @property
    def source(self) -> str:
        """The column, or the SQL, that a run file names."""
        return self.sql or self.name

    def named(self, words: set[str]) -> bool:
        """Is one of these words in its name?"""
        return bool(words & set(self.words))

    @property
    def flag(self) -> bool:
        """Are its values 0 and 1, or false and true?"""
        if self.distinct != 2 or not self.dtype.is_numeric():
            return self.distinct == 2 and self.dtype == pl.Boolean
        return bool(self.values.drop_nulls().cast(pl.Float64).is_in([0.0, 1.0]).all())


def columns_of(frame: pl.DataFrame, own: list[str], many: Mapping[str, int], step: int) -> dict[str, Column]:
    """Column -> what is known of it.

    Args:
        frame: every ``step``-th row; own: columns of the table of the rows; many: distinct values of whole columns, where
            counted, for a sample of a log would make every user look unique.
    """
    out = {}
    for values in frame:
        name, known = values.name, values.drop_nulls()
        distinct = 0 if not len(known) else 2 if values.dtype.is_nested() else int(known.n_unique())
        rows = len(known) * (step if name in many else 1)
        out[name] = Column(values, name in own, max(distinct, many.get(name, 0)), rows)
    return out


def number_in(values: pl.Series) -> tuple[str, str, pl.Series]:
    """(SQL, explanation, numbers) of texts that mean numbers; else ("", "", the values).

    Texts mean numbers where nearly all are, and the others are words for a missing value; or where all are amounts, with
    signs of a currency, of thousands or of per cent, and brackets for a minus.
    """
    known = values.drop_nulls() if values.dtype == pl.String else pl.Series([], dtype=pl.String)
    if not len(known):
        return "", "", values
    bare = known.str.strip_chars()
    absent = bare.str.to_lowercase().is_in(list(ABSENT))
    rest, name = bare.filter(~absent), sql_name(values.name)
    if len(rest) < NUMBERS * len(known) and not (len(rest) >= 0.2 * len(known) and rest.n_unique() > 20):
        return "", "", values
    words = ", ".join(repr(w) for w in bare.filter(absent).unique().sort().head(3))
    plain = rest.str.contains(ANY_NUMBER)
    if plain.all() and len(rest):
        if not absent.any():  # numbers too long for a number, or codes such as 007
            return "", "", values
        sql, note = f"TRY_CAST({name} AS DOUBLE)", f"numbers, and {words} for missing ones"
    elif len(rest) and rest.str.contains(AMOUNT).all() and rest.str.contains(r"[.,$€£¥₹%' ]|[A-Z]{3}").any():
        comma = bool(rest.str.contains(COMMA).any()) and not bool(rest.str.contains(r"\.\d{1,2}\D*$|,\d{3}\.").any())
        if rest.str.contains(r"\d[.-]\d+[.-]\d").any() and not comma:  # dates, versions, addresses
            return "", "", values
        kept, point = ("0-9,(-", ",") if comma else ("0-9.(-", ".")
        bare_sql = f"REPLACE(REGEXP_REPLACE({name}, '[^{kept}]', '', 'g'), '(', '-')"
        sql = f"TRY_CAST({bare_sql if point == '.' else _point(bare_sql)} AS DOUBLE)"
        example = rest.filter(~plain)[0]
        note = f"amounts as {example!r}" + (f", and {words} for missing ones" if words else "")
    else:
        return "", "", values
    found = values.to_frame().select(pl.sql_expr(sql).alias(values.name)).to_series()
    if found.null_count() > values.null_count() + int(absent.sum()):
        return "", "", values
    return sql, note, found


def _point(sql: str) -> str:
    return f"REPLACE({sql}, ',', '.')"


# ---------------------------------------------------------------------------------------------------- kinds of features
@dataclass
class Guess:
    """A feature line: the inline table, what it is, and why it is commented out (empty: it is not)."""

    column: Column
    feature: dict[str, Any]
    why: str
    out: str = ""

    @property
    def least(self) -> dict[str, int]:
        """Its ``min_count``, if it has one, else nothing."""
        return {k: v for k, v in self.feature.items() if k == "min_count"}


def of_column(name: str, kind: str, source: str = "", /, **keys: Any) -> dict[str, Any]:
    """The inline table of a task or feature that reads a column, or SQL (``source``)."""
    column = source or name
    return {"name": safe(name)} | ({"column": column} if safe(name) != column else {}) | {"kind": kind} | keys


def kind_of(c: Column) -> Guess:
    """What kind of feature a column would be."""
    if isinstance(c.dtype, pl.List | pl.Array):
        return _list_kind(c)
    if c.dtype.is_numeric():
        return _number_kind(c)
    if c.dtype == pl.String and (mark := _separator(c.values)):
        members = int(c.values.str.split(mark).explode().n_unique())
        feature = of_column(c.name, "bag", separator=mark, **_least(members))
        return Guess(c, feature, f"bag: lists of {members:,} distinct words")
    if c.dtype == pl.Binary or (c.dtype == pl.String and mean(c.values.str.contains(PICTURES)) > 0.95):
        return Guess(c, of_column(c.name, "image"), "pictures", "pictures: take it in and set `model.images`")
    if c.dtype == pl.String and mean(c.values.str.len_chars()) > 40 and c.distinct > MANY:
        return Guess(c, of_column(c.name, "text"), "text", "long texts: take it in and set `model.texts`")
    if c.dtype in (pl.String, pl.Boolean, pl.Categorical, pl.Enum):
        return _id(c)
    return Guess(c, of_column(c.name, "id"), str(c.dtype), "" if c.dtype.is_temporal() else _unread(c))


def _id(c: Column, reason: str = "") -> Guess:
    return Guess(c, of_column(c.name, "id", **_least(c.distinct)), f"id: {c.distinct:,} distinct values{reason}")


def _least(distinct: int) -> dict[str, int]:
    return {"min_count": 2} if distinct > MANY else {}


def _unread(c: Column) -> str:
    return f"no kind of feature reads {c.dtype}"


def _list_kind(c: Column) -> Guess:
    values = c.values.arr.to_list() if isinstance(c.dtype, pl.Array) else c.values
    inner, lengths = values.dtype.inner, values.drop_nulls().list.len()  # type: ignore[attr-defined]
    if inner.is_float():
        widths, flat = lengths.unique().to_list(), values.drop_nulls().explode()
        clean = len(widths) == 1 and widths[0] and not flat.null_count() and bool(flat.is_finite().all())
        text = f"vector: lists of {widths[0]} numbers" if len(widths) == 1 else "lists of numbers"
        out = "" if clean else "its lists differ in length or hold nulls, NaN or infinity"
        return Guess(c, of_column(c.name, "vector"), text, out)
    if inner.is_integer() or inner in (pl.String, pl.Boolean, pl.Categorical):
        members = int(values.explode().n_unique())
        text = f"bag: lists of {members:,} distinct values, {mean(lengths):.1f} on average"
        text += " (make sure that it is a list that ends before the row's event)" if c.own else ""
        return Guess(c, of_column(c.name, "bag", **_least(members)), text)
    return Guess(c, of_column(c.name, "bag"), str(c.dtype), _unread(c))


def _number_kind(c: Column) -> Guess:
    """An id or a number: names and the number of distinct values decide."""
    values, floats = c.values.drop_nulls(), c.dtype.is_float()
    nans = int(values.is_nan().sum()) if floats else 0
    if floats and values.is_infinite().any():
        return Guess(c, of_column(c.name, "number", c.sql), "number", "it holds infinity; filter or replace it")
    clean = values.filter(values.is_finite()) if floats else values
    whole = not floats or (not nans and bool((clean == clean.round()).all()))
    named = bool(set(c.words[-1:]) & IDS) or c.name.lower().endswith("id") or c.named({"id", "ids"})
    few = c.distinct <= 100 and c.distinct * 5 <= c.rows
    if whole and (named or few):
        return _id(c, "" if few else ", named like an id")
    if not floats and c.own and (c.unique if c.distinct > MANY else c.names_rows):
        return Guess(c, of_column(c.name, "number", c.sql), "number", EACH)
    skew = float(clean.cast(pl.Float64).skew() or 0.0)
    log = abs(skew) > 2
    keys = ({"transform": "log1p"} if log else {}) | ({"nan": "missing"} if nans else {})
    why = f"number: {c.distinct:,} distinct values" + (f", skewed ({skew:.1f})" if log else "")
    why += f"; {c.note}" if c.note else ""
    return Guess(c, of_column(c.name, "number", c.sql, **keys), why + (f"; {nans:,} NaN" if nans else ""))


def inside(bags: pl.Series, items: pl.Series) -> float:
    """The share of the bags' distinct members that are items."""
    members = bags.explode(empty_as_null=False, keep_nulls=False).drop_nulls().unique()
    known = items.unique().drop_nulls()
    if members.dtype.is_integer() != known.dtype.is_integer():
        return 0.0
    return mean(members.cast(known.dtype, strict=False).is_in(known.implode()))


def mean(values: pl.Series) -> float:
    """The mean, 0 of nothing."""
    found = values.mean()
    return float(found) if isinstance(found, int | float) else 0.0


def _separator(values: pl.Series) -> str:
    """The character that splits texts into lists, or an empty string: fewer pieces than texts, all of them short."""
    known = values.drop_nulls()
    for mark in (",", "|", ";"):
        share = mean(known.str.contains(mark, literal=True))
        if share >= 0.01:
            parts = known.str.split(mark).explode()
            fewer = parts.n_unique() < known.n_unique()
            if fewer and mean(parts.str.len_chars()) <= 24 and not parts.str.starts_with(" ").any():
                return mark
    return ""
