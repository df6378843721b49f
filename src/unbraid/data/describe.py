"""What is in the data that a run declares: the counts to read before the first training run.

It reads the same lazy plans as `unbraid.data.encode`, so what it counts is what a model would be trained on.  Unlike
the encoder, which stops at the first contradiction, it goes on: a part that cannot be read becomes a line of
``warnings``.  This is the command that people run to find out what is wrong.
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from unbraid.data.encode import encode
from unbraid.data.fit import bag_lists, id_values
from unbraid.data.source import (
    SPLIT,
    SPLITS,
    Data,
    DataError,
    Tables,
    _dtype,
    add_joins,
    check_joins,
    expression,
    kept_rows,
    scan,
    split_expression,
    to_time,
)  # fmt: skip
from unbraid.data.table import Encoded
from unbraid.data.vocabulary import canonical
from unbraid.types import Feature, Field, Task

FEW_POSITIVES = 100  # below this in the test split, an AUC's 95 % interval is about +-0.05 wide or more
FEW_ROWS = 1_000  # domains smaller than this are hard to learn and harder to measure
UNITS = {
    "s": "seconds since 1970 (UTC)", "ms": "milliseconds since 1970 (UTC)", "us": "microseconds since 1970 (UTC)",
    "ns": "nanoseconds since 1970 (UTC)",
}  # fmt: skip
Found = dict[str, Any]
T = TypeVar("T")


def describe(data: Data, base: Path = Path(), *, tables: Tables | None = None) -> Found:
    """Count what there is.

    Args:
        data: the declaration; base: the folder it is relative to; tables: in-memory tables by name.

    Returns:
        What `render` prints, as plain JSON values.  Shares and rates are in [0, 1], and None where nothing is counted.
        The key ``warnings`` holds sentences.

    Raises:
        DataError: the table of the rows itself is missing or cannot be read.
    """
    look = _Look(data, base, tables)
    found: Found = {"rows": look.rows(), "users": look.users(), "time": look.time(), "joins": look.joins}
    found["tasks"] = look.tasks()
    found["domains"] = look.domains()
    found["ids"] = look.ids()
    found["numbers"] = look.numbers()
    found["missing"] = look.missing()
    found["histories"] = look.histories()
    look.warn_about(found)
    found["warnings"] = look.warnings
    return found


class _Look:
    """One reading of a declaration: the plan of its rows, and the warnings so far.

    Attributes:
        plan: kept rows with their split (null: none) and the columns of every join that works.
        cells: one row per domain and split with the counts of every binary and real task.
    """

    def __init__(self, data: Data, base: Path, tables: Tables | None) -> None:
        self.base, self.tables, self.warnings = base, tables, list[str]()
        whole = scan(data.folder, data.rows, base, tables)
        try:
            self.read = _count(whole)
        except PolarsError as error:  # a CSV whose later lines are of another type
            raise DataError(f"Table `{data.rows}` cannot be read: {error}") from error
        self.data = data = self._checked_keep(data, whole)
        self.raw = kept_rows(replace(data, drop_duplicates=False), base, tables)
        self.plan = self._with_split(kept_rows(data, base, tables))
        if data.negatives is not None:
            self.plan = self._with_negatives(self.plan)
        self.joins: Found = {}
        for join in data.joins:
            self._join(join)
        self.schema: Mapping[str, Any] = self.plan.collect_schema()
        self.cells = pl.DataFrame()

    # ------------------------------------------------------------------------------------------------------- the plan
    def _try(self, what: Callable[[], T], default: T) -> T:
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

        return self._try(apply, replace(data, keep="")) if data.keep else data

    def _with_split(self, plan: pl.LazyFrame) -> pl.LazyFrame:
        def split() -> pl.LazyFrame:
            out = plan.with_columns(split_expression(self.data, plan.collect_schema()).alias(SPLIT))
            out.select(SPLIT).head(1).collect()  # a wrong type shows only when it runs
            return out

        return self._try(split, plan.with_columns(pl.lit(None, dtype=pl.Int8).alias(SPLIT)))

    def _with_negatives(self, plan: pl.LazyFrame) -> pl.LazyFrame:
        from unbraid.data.negatives import add_negatives

        negatives = self.data.negatives
        assert negatives is not None
        return self._try(lambda: add_negatives(plan, negatives), plan)

    def _join(self, join: Any) -> None:
        """Add one join to the plan and count the rows that find no partner."""
        alone, plan = replace(self.data, joins=(join,)), self.plan

        def unmatched() -> int:
            check_joins(alone, self.base, self.tables)
            have, right = plan.collect_schema(), scan(self.data.folder, join.table, self.base, self.tables)
            if join.on not in have:
                raise DataError(
                    f"Join of `{join.table}`: the rows have no column `{join.on}`. Columns: {', '.join(have)}."
                )
            self.plan = add_joins(plan, alone, self.base, self.tables)
            sides = [p.select(canonical(pl.col(join.on), p.collect_schema()[join.on])) for p in (plan, right)]
            return _count(sides[0].join(sides[1], on=join.on, how="anti"))

        self.joins[join.table] = {"on": join.on, "rows without a match": self._try(unmatched, None)}

    def _expression(self, source: str, where: str) -> pl.Expr | None:
        """A column or SQL expression of the plan, or None and a warning."""
        return self._try(lambda: expression(source, self.schema, where), None)

    def _one(self, exprs: Sequence[pl.Expr]) -> Found:
        """One row of aggregates.  If one of them cannot be computed, the others are."""
        if not exprs:
            return {}
        try:
            return self.plan.select(exprs).collect(engine="streaming").row(0, named=True)
        except PolarsError:
            empty = pl.DataFrame({"x": [None]})
            frames = [self._try(self.plan.select(e).collect, empty) for e in exprs]
            return {name: value for frame in frames for name, value in frame.row(0, named=True).items()}

    # ------------------------------------------------------------------------------------------- rows, users and times
    def rows(self) -> Found:
        """How many rows there are, at each step from the file to the splits."""
        kept = _count(self.raw)
        distinct = self._try(lambda: _count(self.raw.unique()), None)
        counts: dict[int | None, int] = self._try(
            lambda: dict(self.plan.group_by(SPLIT).len().collect(engine="streaming").rows()), {}
        )
        found = {
            "read": self.read, "kept": kept, "duplicates": None if distinct is None else kept - distinct,
            "duplicates dropped": self.data.drop_duplicates, "used": sum(counts.values()),
        }  # fmt: skip
        found |= {name: counts.get(code, 0) for code, name in enumerate(SPLITS)}
        return found | {"in no split": counts.get(None, 0)}

    def users(self) -> Found | None:
        """Distinct users, and the share of test rows whose user has no training row."""
        if not self.data.user:
            return None
        source = self.data.user
        counts = self._try(
            lambda: self._values(expression(source, self.schema, "data.user"), _dtype(source, self.schema)), None
        )
        if counts is None:
            return None
        about = _id_summary(counts, 1)
        return {
            "distinct": about["distinct"],
            "rows without a user": about["missing"],
            "test unseen": about["test unseen"],
        }

    def time(self) -> Found | None:
        """First and last time, in words."""
        source = self.data.time
        if not source:
            return None

        def look() -> Found:
            dtype = _dtype(source, self.schema)
            column = expression(source, self.schema, "data.time")
            time, per_second = to_time(column, dtype, self.data.time_unit, f"Column `{source}`")
            stats = self.plan.select(time.min().alias("a"), time.max().alias("b"), time.is_null().sum().alias("n"))
            first, last, missing = stats.collect(engine="streaming").row(0)
            unit = f"integers, {UNITS[self.data.time_unit]}" if dtype.is_integer() else "dates or date-times, in UTC"
            moments = [_iso(t, per_second) for t in (first, last)]
            return {
                "column": source,
                "from": moments[0],
                "to": moments[1],
                "unit": unit,
                "rows without a time": missing,
            }

        return self._try(look, None)

    # ---------------------------------------------------------------------------------------------- tasks and domains
    def tasks(self) -> Found:
        """Per task what is observed and how often it is positive: overall, by split and by domain."""
        ready = {t.name: e for t in self.data.tasks if (e := self._label(t)) is not None}
        observed = self._observed(ready)
        groups = [self._domain().alias("domain"), pl.col(SPLIT).alias("split")]
        exprs = [e for t in self.data.tasks if t.name in ready for e in self._cell(t, ready, observed)]
        plan = self.plan.group_by(groups).agg(pl.len().alias("rows"), *exprs)
        self.cells = self._try(lambda: plan.collect(engine="streaming"), pl.DataFrame())
        found: Found = {}
        for task in self.data.tasks:
            if task.name not in ready or not len(self.cells):
                found[task.name] = {"kind": task.kind}
            elif task.kind == "multiclass":
                found[task.name] = self._classes(task, ready[task.name], observed[task.name], groups)
            else:
                found[task.name] = self._rates(task)
        return found

    def _label(self, task: Task) -> pl.Expr | None:
        """A task's label as a number (binary, real; null where it is none) or as text (multiclass)."""
        expr = self._expression(task.source, f"Task `{task.name}`")
        if expr is None:
            return None
        dtype = self._try(lambda: _dtype(task.source, self.schema), None)
        if dtype is None or dtype.is_nested():
            self.warnings.append(
                f"Task `{task.name}`: labels should be numbers or words. Found {dtype} in `{task.source}`."
            )
            return None
        if task.kind == "multiclass":
            return canonical(expr, dtype).cast(pl.String)
        bad = expr.is_not_null() & expr.cast(pl.Float64, strict=False).is_null()
        number = expr.cast(pl.Float64, strict=False)
        bad = bad | number.is_nan().fill_null(False)
        if task.kind == "binary":
            bad = bad | ~number.is_in([0.0, 1.0]).fill_null(True)
        wrong = self._one([bad.sum().alias("n")])["n"] if dtype != pl.Boolean else 0
        if wrong:
            should = "0 or 1" if task.kind == "binary" else "numbers"
            self.warnings.append(
                f"Task `{task.name}`: labels of `{task.source}` should be {should} (null where not known). "
                f"Found others in {wrong:,} rows."
            )
        return pl.when(bad).then(None).otherwise(number)

    def _observed(self, labels: Mapping[str, pl.Expr]) -> dict[str, pl.Expr]:
        """Where each label counts: it is known, and so is a 1 of every task above it."""
        observed: dict[str, pl.Expr] = {}
        for task in self.data.tasks:  # parents stand before their children
            if task.name in labels:
                known = labels[task.name].is_not_null()
                if task.given in labels:
                    known = known & observed[task.given] & (labels[task.given] == 1).fill_null(False)
                observed[task.name] = known
        return observed

    def _cell(self, task: Task, labels: Mapping[str, pl.Expr], observed: Mapping[str, pl.Expr]) -> list[pl.Expr]:
        """The aggregates of one task in one group."""
        name, label, known = task.name, labels[task.name], observed[task.name]
        out = []
        if task.kind != "multiclass":
            seen = pl.when(known).then(label)
            out = [
                known.sum().alias(f"{name}.n"),
                seen.sum().alias(f"{name}.sum"),
                (seen**2).sum().alias(f"{name}.squares"),
            ]
        if task.given in labels:
            positive = (label == 1).fill_null(False) if task.kind == "binary" else label.is_not_null()
            alone = positive & ~(observed[task.given] & (labels[task.given] == 1).fill_null(False))
            out.append(alone.sum().alias(f"{name}.orphans"))
        return out

    def _domain(self) -> pl.Expr:
        """The domain in words."""
        source, everything = self.data.domain, pl.lit("all")
        if not source:
            return everything
        expr = self._try(
            lambda: canonical(expression(source, self.schema, "data.domain"), _dtype(source, self.schema)), None
        )
        return everything if expr is None else expr.cast(pl.String).fill_null("(missing)")

    def _slices(self) -> dict[str, tuple[str, pl.DataFrame]]:
        """The groups of ``cells`` by name of the slice: ("splits", frame) or ("domains", frame)."""
        out = {name: ("splits", self.cells.filter(pl.col("split") == code)) for code, name in enumerate(SPLITS)}
        for name in _in_order(self.cells["domain"]):
            out[f"\0{name}"] = ("domains", self.cells.filter(pl.col("domain") == name))
        return out

    def _rates(self, task: Task) -> Found:
        found: Found = {"kind": task.kind, "all": _rate(self.cells, task), "splits": {}, "domains": {}}
        for name, (what, frame) in self._slices().items():
            found[what][name.removeprefix("\0")] = _rate(frame, task)
        return found | self._orphans(task)

    def _orphans(self, task: Task) -> Found:
        """Children without a parent, for a task that has one."""
        if f"{task.name}.orphans" not in self.cells.columns:
            return {}
        return {"given": task.given, "children without parent": int(self.cells[f"{task.name}.orphans"].sum())}

    def _classes(self, task: Task, label: pl.Expr, known: pl.Expr, groups: Sequence[pl.Expr]) -> Found:
        """Rows of each class of a multiclass task."""
        plan = self.plan.filter(known).group_by(*groups, label.alias("label")).len("n")
        counts = self._try(lambda: plan.collect(engine="streaming"), None)
        if counts is None:
            return {"kind": task.kind}

        def summary(part: pl.DataFrame, rows: int) -> Found:
            each = part.group_by("label").agg(pl.col("n").sum())
            numbers = {name: int(each.filter(pl.col("label") == name)["n"].sum()) for name in _in_order(each["label"])}
            n = sum(numbers.values())
            return {"observed": n, "share": n / rows if rows else None, "classes": numbers}

        found: Found = {
            "kind": task.kind,
            "all": summary(counts, int(self.cells["rows"].sum())),
            "splits": {},
            "domains": {},
        }
        for name, (what, frame) in self._slices().items():
            part = counts.join(frame.select("domain", "split"), on=["domain", "split"], how="semi", nulls_equal=True)
            found[what][name.removeprefix("\0")] = summary(part, int(frame["rows"].sum()))
        return found | self._orphans(task)

    def domains(self) -> Found:
        """Rows of each domain, by split."""
        if not self.data.domain or not len(self.cells):
            return {}
        found: Found = {}
        for name in _in_order(self.cells["domain"]):
            mine = self.cells.filter(pl.col("domain") == name)
            counts = dict(zip(mine["split"], mine["rows"], strict=True))
            found[name] = {"rows": sum(counts.values())} | {s: counts.get(c, 0) for c, s in enumerate(SPLITS)}
        return found

    # --------------------------------------------------------------------------------------------------------- features
    def _values(self, expr: pl.Expr, dtype: Any, bag: Feature | None = None) -> pl.DataFrame:
        """(value, split, n) of an id column, or of a bag's members."""
        if bag is None:
            plan = self.plan.select(value=canonical(expr, dtype), split=SPLIT)
        else:
            lists, kind = bag_lists(bag, expr, dtype)
            plan = self.plan.select(value=lists, split=SPLIT).explode("value", empty_as_null=False, keep_nulls=False)
            plan = plan.with_columns(canonical(pl.col("value"), kind.inner))
        return plan.group_by("value", "split").len("n").collect(engine="streaming")

    def ids(self) -> Found:
        """Per id feature and bag its distinct values, the rare ones, and how new the test split is."""
        least: dict[str, int] = {}
        parts: list[Feature | Field] = [*self.data.features, *self.data.fields]
        for part in parts:  # one vocabulary has one threshold, the largest
            least[part.vocab] = max(least.get(part.vocab, 1), part.min_count)
        found: Found = {}
        for feature in self.data.features:
            if feature.kind in ("id", "bag"):
                counts = self._try(partial(self._id_counts, feature), None)
                if counts is not None:
                    found[feature.name] = _id_summary(counts, least[feature.vocab])
        return found

    def _id_counts(self, feature: Feature) -> pl.DataFrame:
        id_values(feature, self.schema)  # raises where the declared kind does not fit the column
        expr = expression(feature.source, self.schema, f"Feature `{feature.name}`")
        return self._values(expr, _dtype(feature.source, self.schema), feature if feature.kind == "bag" else None)

    def numbers(self) -> Found:
        """Mean, spread and range of the numbers as they are in the file, over all rows."""
        exprs: list[pl.Expr] = []
        names = []
        for feature in self.data.features:
            expr = self._number(feature) if feature.kind == "number" else None
            if expr is not None:
                names.append(feature.name)
                good = pl.when(expr.is_finite()).then(expr)
                stats = {"mean": good.mean(), "sd": good.std(ddof=0), "min": good.min(), "max": good.max()}
                stats["infinite"] = expr.is_infinite().sum()
                exprs.extend(e.alias(f"{feature.name}.{what}") for what, e in stats.items())
        values = self._one(exprs)
        return {n: {w: values.get(f"{n}.{w}") for w in ("mean", "sd", "min", "max", "infinite")} for n in names}

    def _number(self, feature: Feature) -> pl.Expr | None:
        expr = self._expression(feature.source, f"Feature `{feature.name}`")
        dtype = None if expr is None else self._try(lambda: _dtype(feature.source, self.schema), None)
        if expr is None or dtype is None:
            return None
        if not (dtype.is_numeric() or dtype == pl.Boolean):
            self.warnings.append(
                f"Feature `{feature.name}`: kind `number` needs numbers. Found {dtype} in `{feature.source}`."
            )
            return None
        return expr.cast(pl.Float64)

    def missing(self) -> Found:
        """Nulls, and NaNs of floating-point columns, per feature."""
        exprs, floats = [], set()
        for feature in self.data.features:
            expr = self._expression(feature.source, f"Feature `{feature.name}`")
            if expr is None:
                continue
            exprs.append(expr.is_null().sum().alias(f"{feature.name}.nulls"))
            dtype = self._try(partial(_dtype, feature.source, self.schema), None)
            if dtype is not None and dtype.is_float():
                floats.add(feature.name)
                exprs.append(expr.is_nan().sum().alias(f"{feature.name}.nans"))
        values, found = self._one(exprs), {}
        for feature in self.data.features:
            if f"{feature.name}.nulls" in values:
                found[feature.name] = {"nulls": values[f"{feature.name}.nulls"]}
                if feature.name in floats:
                    found[feature.name]["nans"] = values.get(f"{feature.name}.nans")
        return found

    def histories(self) -> Found:
        """Lengths of each history over all rows, from the encoded table (which a later training run finds ready)."""
        if not self.data.histories:
            return {}
        encoded = self._try(lambda: Encoded(encode(self.data, self.base, tables=self.tables)), None)
        if encoded is None:
            return {}
        found: Found = {}
        for history in self.data.histories:
            ends, starts = encoded.columns[f"end.{history.name}"], encoded.columns[f"start.{history.name}"]
            lengths = np.asarray(ends, dtype=np.int64) - np.asarray(starts)
            found[history.name] = {
                "mean": float(lengths.mean()), "median": float(np.median(lengths)),
                "p95": float(np.percentile(lengths, 95)),
                "max": int(lengths.max()), "empty": float((lengths == 0).mean()), "longest kept": history.length,
            }  # fmt: skip
        return found

    # --------------------------------------------------------------------------------------------------------- warnings
    def warn_about(self, found: Found) -> None:
        """Say in words what someone should look at before training."""
        say, rows = self.warnings.append, found["rows"]
        if rows["duplicates"] and not rows["duplicates dropped"]:
            say(
                f"{rows['duplicates']:,} rows equal an earlier row in every column and stay. "
                "data.drop_duplicates = true drops them."
            )
        if not rows["used"]:
            say("There are no rows" + (f" after keep = `{self.data.keep}`." if self.data.keep else "."))
        for name in SPLITS:
            if not rows[name]:
                say(f"The {name} split is empty. Move the boundaries of data.split.")
        if rows["in no split"]:
            say(f"{rows['in no split']:,} rows belong to no split (a null or another word in the column that splits).")
        self._warn_about_time(found["time"])
        self._warn_about_domains(found["domains"], found["tasks"])
        self._warn_about_features(found)
        for task, about in found["tasks"].items():
            test = about.get("splits", {}).get("test", {}).get("positives")
            if test is not None and test < FEW_POSITIVES:
                say(f"Task {task}: {test:,} positives in the test split. Its metrics will have wide intervals.")
            orphans = about.get("children without parent")
            if orphans:
                say(
                    f"Task {task}: {orphans:,} rows are positive although {about['given']} is 0 or unobserved. "
                    f"They are not observed for {task}, as `given` says."
                )

    def _warn_about_time(self, time: Found | None) -> None:
        if time is None:
            return
        if time["rows without a time"]:
            self.warnings.append(f"{time['rows without a time']:,} rows have no time. Filter them with data.keep.")
        odd = [t for t in (time["from"], time["to"]) if t is not None and not "1990" < t < "2100"]
        if odd and time["unit"].startswith("integers"):
            self.warnings.append(f"Times reach to {odd[0]}, read as {time['unit']}. Is data.time_unit right?")

    def _warn_about_domains(self, domains: Found, tasks: Found) -> None:
        for name, about in domains.items():
            if about["rows"] < FEW_ROWS:
                self.warnings.append(f"Domain {name}: {about['rows']:,} rows, too few to learn or measure much.")
        if not len(self.cells):
            return
        train = self.cells.filter(pl.col("split") == 0)
        for task in self.data.tasks:
            if task.kind != "binary" or f"{task.name}.n" not in train.columns:
                continue
            for name in domains or ["all"]:
                cell = _rate(train.filter(pl.col("domain") == name), task)
                if cell["positives"] in (0, cell["observed"]) and rows_of(domains, name):
                    what = "no labels" if not cell["observed"] else "only 1s" if cell["positives"] else "only 0s"
                    place = f", domain {name}" if domains else ""
                    self.warnings.append(f"Task {task.name}{place}: {what} in the training split.")

    def _warn_about_features(self, found: Found) -> None:
        kinds = {f.name: f for f in self.data.features}
        for name, about in found["missing"].items():
            feature = kinds[name]
            if about.get("nans") and not (feature.kind == "number" and feature.nan == "missing"):
                fix = (
                    'nan = "missing" reads them as missing'
                    if feature.kind == "number"
                    else "write nulls for missing ids"
                )
                self.warnings.append(f"Feature {name}: {about['nans']:,} rows hold NaN; {fix}.")
        for name, about in found["numbers"].items():
            if about["infinite"]:
                self.warnings.append(
                    f"Feature {name}: {about['infinite']:,} rows hold infinity. Filter or replace them."
                )
        for table, about in found["joins"].items():
            if about["rows without a match"] == found["rows"]["used"] > 0:
                self.warnings.append(f"Join of {table}: no row has a match on {about['on']}.")


# ------------------------------------------------------------------------------------------------------------- counting
def _count(plan: pl.LazyFrame) -> int:
    return plan.select(pl.len()).collect(engine="streaming").item()


def _in_order(names: pl.Series) -> list[str]:
    """Distinct words, numbers in numeric order."""
    distinct = names.drop_nulls().unique().to_list()
    try:
        return sorted(distinct, key=float)
    except ValueError:
        return sorted(distinct)


def rows_of(domains: Found, name: str) -> int:
    """Rows of a domain; 1 where there are no domains, so that ``all`` counts."""
    return domains[name]["rows"] if domains else 1


def _iso(value: int | None, per_second: float) -> str | None:
    """A time in words (UTC); the bare number when no calendar reaches so far."""
    if value is None:
        return None
    try:
        moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=value / per_second)
    except OverflowError:
        return str(value)
    return moment.isoformat(timespec="seconds")


def _rate(cells: pl.DataFrame, task: Task) -> Found:
    """Observed rows and the rate (binary) or the mean and spread (real) of a task over some cells."""
    rows, n = int(cells["rows"].sum()), int(cells[f"{task.name}.n"].sum())
    total, squares = float(cells[f"{task.name}.sum"].sum()), float(cells[f"{task.name}.squares"].sum())
    found: Found = {"observed": n, "share": n / rows if rows else None}
    mean = total / n if n else None
    if task.kind == "binary":
        return found | {"positives": int(total), "rate": mean}
    return found | {"mean": mean, "sd": max(squares / n - (total / n) ** 2, 0.0) ** 0.5 if n else None}


def _id_summary(counts: pl.DataFrame, least: int) -> Found:
    """Counts of an id column.

    Args:
        counts: (value, split, n), a null value for missing; least: ``min_count``.

    Returns:
        ``rare`` is the number of distinct training values below ``min_count``; ``test unseen`` the share of the test
        split's rows whose value never occurs in training (a missing value is not a new one).
    """
    known = counts.drop_nulls("value")
    train, test = known.filter(pl.col("split") == 0), counts.filter(pl.col("split") == 2)
    new = int(test.drop_nulls("value").join(train, on="value", how="anti")["n"].sum())
    total = int(test["n"].sum())
    return {
        "distinct": known["value"].n_unique(), "in training": len(train),
        "min_count": least, "rare": int((train["n"] < least).sum()),
        "missing": int(counts.filter(pl.col("value").is_null())["n"].sum()),
        "test unseen": new / total if total else None,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- printing
WIDTH = 100  # of piped output
TASKS_ABREAST = 5  # columns of a table by domain


def render(found: Found) -> None:
    """Print what `describe` found as tables."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for line in _headlines(found):
        console.print(line, markup=False)
    for table in (*_task_tables(found), *_domain_tables(found), *_feature_tables(found)):
        console.print()
        console.print(table)
    console.print()
    for warning in found["warnings"]:
        console.print(f"! {warning}", style="yellow", markup=False)
    if not found["warnings"]:
        console.print("Nothing to warn about.")


def _headlines(found: Found) -> Iterable[str]:
    rows = found["rows"]
    yield f"rows      {rows['read']:,} read, {rows['kept']:,} kept, {rows['used']:,} used"
    if rows["duplicates"] is not None:
        fate = "" if not rows["duplicates"] else ", dropped" if rows["duplicates dropped"] else ", not dropped"
        yield f"          {rows['duplicates']:,} exact duplicates{fate}"
    yield "splits    " + ", ".join(f"{name} {rows[name]:,}" for name in SPLITS)
    if found["users"]:
        users = found["users"]
        new = _share(users["test unseen"])
        yield f"users     {users['distinct']:,}; {new} of test rows are of users without training rows"
    if found["time"]:
        time = found["time"]
        yield f"time      {time['from']} to {time['to']}"
        yield f"          `{time['column']}`, {time['unit']}"
    for table, about in found["joins"].items():
        missing = about["rows without a match"]
        yield f"join      {table} on {about['on']}: " + (
            "not possible" if missing is None else f"{missing:,} rows without a match"
        )


def _table(title: str, first: str, columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _task_tables(found: Found) -> Iterable[Any]:
    table = _table("Tasks", "task", ("observed", "share", "positives", "all", *SPLITS))
    for name, about in found["tasks"].items():
        whole = about.get("all")
        if whole is None:
            table.add_row(name, *["?"] * 7)
            continue
        positives = f"{whole['positives']:,}" if "positives" in whole else about["kind"]
        rates = [_cell_text(about["splits"][s]) for s in SPLITS]
        table.add_row(name, f"{whole['observed']:,}", _share(whole["share"]), positives, _cell_text(whole), *rates)
    yield table
    for name, about in found["tasks"].items():
        if "classes" in about.get("all", {}):
            table = _table(f"Classes of {name}", "class", ("rows", *SPLITS))
            for label, n in about["all"]["classes"].items():
                table.add_row(label, f"{n:,}", *(f"{about['splits'][s]['classes'].get(label, 0):,}" for s in SPLITS))
            yield table


def _domain_tables(found: Found) -> Iterable[Any]:
    tasks = [name for name, about in found["tasks"].items() if "domains" in about]
    for at in range(0, len(tasks), TASKS_ABREAST) if found["domains"] else ():
        part = tasks[at : at + TASKS_ABREAST]
        table = _table("Label rates by domain", "domain", ("rows", "test", *part))
        for name, about in found["domains"].items():
            rates = [_cell_text(found["tasks"][t]["domains"].get(name, {})) for t in part]
            table.add_row(name, f"{about['rows']:,}", f"{about['test']:,}", *rates)
        yield table


def _feature_tables(found: Found) -> Iterable[Any]:
    missing = {n: about["nulls"] for n, about in found["missing"].items()}
    if found["ids"]:
        table = _table("Ids", "feature", ("distinct", "in training", "min_count", "below it", "missing", "test unseen"))
        for name, i in found["ids"].items():
            counts = (f"{i[k]:,}" for k in ("distinct", "in training", "min_count", "rare"))
            table.add_row(name, *counts, _whole(missing.get(name)), _share(i["test unseen"]))
        yield table
    if found["numbers"]:
        table = _table("Numbers", "feature", ("mean", "sd", "min", "max", "missing", "NaN"))
        for name, i in found["numbers"].items():
            stats = ("-" if i[k] is None else f"{i[k]:.4g}" for k in ("mean", "sd", "min", "max"))
            table.add_row(
                name, *stats, _whole(missing.get(name)), _whole(found["missing"].get(name, {}).get("nans", 0))
            )
        yield table
    if found["histories"]:
        table = _table("Histories (events per row)", "history", ("mean", "median", "p95", "max", "empty"))
        for name, i in found["histories"].items():
            table.add_row(
                name, f"{i['mean']:.1f}", f"{i['median']:g}", f"{i['p95']:g}", f"{i['max']:,}", _share(i["empty"])
            )
        yield table


def _cell_text(cell: Found) -> str:
    """A rate, a mean with its spread, or the number of classes."""
    if "classes" in cell:
        return f"{len(cell['classes'])} classes"
    if "mean" in cell:
        return "-" if cell["mean"] is None else f"{cell['mean']:.4g} sd {cell['sd']:.3g}"
    return _share(cell.get("rate"))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
