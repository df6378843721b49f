"""A reading of a declaration that goes on where a part of it cannot be read, and says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from polars.exceptions import PolarsError

from unbraid.data.declaration import Data
from unbraid.data.source import (
    SPLIT,
    DataError,
    Tables,
    _dtype,
    add_joins,
    check_joins,
    expression,
    kept_rows,
    scan_join,
    scan_of,
    with_split,
)
from unbraid.data.vocabulary import canonical
from unbraid.types import Feature, Task

T = TypeVar("T")


class TolerantPlan:
    """The plan of a declaration's rows, without what cannot be read of it: that becomes a warning.

    Args:
        data: the declaration; base: the folder it is relative to; tables: in-memory tables by name.

    Attributes:
        data: the declaration, without a filter that cannot be applied.
        read: rows of the table; raw: the kept rows, duplicates too.
        plan: kept rows with their split (null: none) and the columns of every join that works; schema: its columns.
        joins: joined table -> what it is joined on, and how many rows find no partner.
        warnings: sentences, so far.

    Raises:
        DataError: the table of the rows itself is missing or cannot be read.
    """

    def __init__(self, data: Data, base: Path, tables: Tables | None) -> None:
        self.base, self.tables, self.warnings = base, tables, list[str]()
        whole = scan_of(data, data.rows, base, tables)
        try:
            self.read = count_rows(whole)
        except PolarsError as error:  # a CSV whose later lines are of another type
            raise DataError(f"Table `{data.rows}` cannot be read: {error}") from error
        self.data = data = self._checked_keep(data, whole)
        self.raw = kept_rows(replace(data, drop_duplicates=False), base, tables)
        self.plan = self._with_split(kept_rows(data, base, tables))
        if data.negatives is not None:
            self.plan = self._with_negatives(self.plan)
        self.joins: dict[str, Any] = {}
        for join in data.joins:
            self._join(join)
        self.schema: Mapping[str, Any] = self.plan.collect_schema()

    # ------------------------------------------------------------------------------------------------------- the plan
    def attempt(self, what: Callable[[], T], default: T) -> T:
        """The value, or the default and a warning that says why not."""
        try:
            return what()
        except (DataError, PolarsError, ValueError, KeyError) as error:
            text = " ".join(str(error).split("\n\n")[0].split())  # Polars adds the plan below its message
            if text not in self.warnings:
                self.warnings.append(text)
            return default

    def _checked_keep(self, data: Data, whole: pl.LazyFrame) -> Data:
        """The declaration without a filter that cannot be applied."""

        def apply() -> Data:
            whole.filter(expression(data.keep, whole.collect_schema(), "data.keep")).collect_schema()
            return data

        return self.attempt(apply, replace(data, keep="")) if data.keep else data

    def _with_split(self, plan: pl.LazyFrame) -> pl.LazyFrame:
        def split() -> pl.LazyFrame:
            out = with_split(plan, self.data)
            out.select(SPLIT).head(1).collect()  # a wrong type shows only when it runs
            return out

        return self.attempt(split, plan.with_columns(pl.lit(None, dtype=pl.Int8).alias(SPLIT)))

    def _with_negatives(self, plan: pl.LazyFrame) -> pl.LazyFrame:
        from unbraid.data.negatives import add_negatives

        negatives = self.data.negatives
        assert negatives is not None
        return self.attempt(lambda: add_negatives(plan, negatives), plan)

    def _join(self, join: Any) -> None:
        """Add one join to the plan and count the rows that find no partner."""
        alone, plan = replace(self.data, joins=(join,)), self.plan

        def unmatched() -> int:
            check_joins(alone, self.base, self.tables)
            have = plan.collect_schema()
            right = scan_join(self.data, join, self.base, self.tables)
            if join.on not in have:
                names = ", ".join(have)
                raise DataError(f"Join of `{join.table}`: the rows have no column `{join.on}`. Columns: {names}.")
            self.plan = add_joins(plan, alone, self.base, self.tables)
            sides = [p.select(canonical(pl.col(join.on), p.collect_schema()[join.on])) for p in (plan, right)]
            return count_rows(sides[0].join(sides[1], on=join.on, how="anti"))

        name = (
            join.table if join.table not in self.joins else f"{join.table} ({join.prefix})"
        )  # a table that is joined twice
        self.joins[name] = {"on": join.on, "rows without a match": self.attempt(unmatched, None)}

    def read_column(self, source: str, where: str) -> tuple[pl.Expr, Any]:
        """A column or SQL expression of the plan, and its type."""
        return expression(source, self.schema, where), _dtype(source, self.schema)

    def read_part(self, part: Feature | Task) -> tuple[pl.Expr, Any] | None:
        """The same of a feature or task, or None and a warning."""
        where = f"{type(part).__name__} `{part.name}`"
        return self.attempt(lambda: self.read_column(part.source, where), None)

    def aggregates(self, exprs: Sequence[pl.Expr]) -> dict[str, Any]:
        """One row of aggregates.  If one of them cannot be computed, the others are."""
        if not exprs:
            return {}
        try:
            return self.plan.select(exprs).collect(engine="streaming").row(0, named=True)
        except PolarsError:
            empty = pl.DataFrame({"x": [None]})
            frames = [self.attempt(self.plan.select(e).collect, empty) for e in exprs]
            return {name: value for frame in frames for name, value in frame.row(0, named=True).items()}


def count_rows(plan: pl.LazyFrame) -> int:
    """How many rows a plan gives."""
    return plan.select(pl.len()).collect(engine="streaming").item()
