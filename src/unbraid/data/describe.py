"""What is in the data that a run declares: the counts to read before the first training run.

It reads the same lazy plans as `unbraid.data.encode`, so what it counts is what a model would be trained on.  Unlike
the encoder, which stops at the first contradiction, it goes on: a part that cannot be read becomes a line of
``warnings``.  This is the command that people run to find out what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.data.contents import SHOWN, missing_files
from unbraid.data.declaration import SPLITS, Data, Events
from unbraid.data.encode import encode
from unbraid.data.events import warnings_of
from unbraid.data.fit import bag_lists, content_expression, id_values
from unbraid.data.images import looked_at, not_pictures
from unbraid.data.source import (
    SPLIT,
    Tables,
    add_joins,
    event_plans,
    expression,
    iso,
    plausible,
    refuse_float_time,
    root_of,
    to_time,
)
from unbraid.data.table import Encoded
from unbraid.data.tolerant import TolerantPlan, count_rows
from unbraid.data.vocabulary import canonical
from unbraid.types import Feature, Field, Task

FEW_POSITIVES = 100  # below this in the test split, an AUC's 95 % interval is about +-0.05 wide or more
FEW_ROWS = 1_000  # domains smaller than this are hard to learn and harder to measure
UNITS = {
    "s": "seconds since 1970 (UTC)", "ms": "milliseconds since 1970 (UTC)", "us": "microseconds since 1970 (UTC)",
    "ns": "nanoseconds since 1970 (UTC)",
}  # fmt: skip
Found = dict[str, Any]


def describe(data: Data, base: Path = Path(), *, tables: Tables | None = None) -> Found:
    """Count what there is.

    Args:
        data: the declaration; base: the folder it is relative to; tables: in-memory tables by name.

    Returns:
        Plain JSON values, which `unbraid.data.describe_table.render` prints.  Shares and rates are in [0, 1], and None
        where nothing is counted.  The key ``warnings`` holds sentences.

    Raises:
        DataError: the table of the rows itself is missing or cannot be read.
    """
    look = _Look(data, base, tables)
    found: Found = {
        "rows": look.rows(), "users": look.users(), "time": look.time(), "joins": look.joins, "tasks": look.tasks(),
        "domains": look.domains(), "ids": look.ids(), "numbers": look.numbers(), "contents": look.contents(),
        "missing": look.missing(),
        "histories": look.histories(),
    }  # fmt: skip
    look.warn_about(found)
    return found | {"warnings": look.warnings}


class _Look(TolerantPlan):
    """What is counted of one reading.

    Attributes:
        cells: one row per domain and split with the counts of every binary and real task.
    """

    cells = pl.DataFrame()

    # ------------------------------------------------------------------------------------------- rows, users and times
    def rows(self) -> Found:
        """How many rows there are, at each step from the file to the splits."""
        kept = count_rows(self.raw)
        distinct = self.attempt(lambda: count_rows(self.raw.unique()), None)
        counts: dict[int | None, int] = self.attempt(
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
        counts = self.attempt(lambda: self._values(*self.read_column(self.data.user, "data.user")), None)
        if counts is None:
            return None
        about = _id_summary(counts, 1)
        names = {"distinct": "distinct", "rows without a user": "missing", "test unseen": "test unseen"}
        return {name: about[key] for name, key in names.items()}

    def time(self) -> Found | None:
        """First and last time, in words."""
        source = self.data.time
        if not source:
            return None

        def look() -> Found:
            column, dtype = self.read_column(source, "data.time")
            if dtype.is_float():
                nans = self.plan.select(column.is_nan().sum()).collect(engine="streaming").item()
                refuse_float_time(column, dtype, f"Column `{source}`", nans)
            time, per_second = to_time(column, dtype, self.data.time_unit, f"Column `{source}`")
            stats = self.plan.select(time.min().alias("a"), time.max().alias("b"), time.is_null().sum().alias("n"))
            first, last, missing = stats.collect(engine="streaming").row(0)
            unit = f"integers, {UNITS[self.data.time_unit]}" if dtype.is_integer() else "dates or date-times, in UTC"
            return {
                "column": source, "from": None if first is None else iso(first, per_second),
                "to": None if last is None else iso(last, per_second), "unit": unit,
                "rows without a time": missing,
            }  # fmt: skip

        return self.attempt(look, None)

    # ---------------------------------------------------------------------------------------------- tasks and domains
    def tasks(self) -> Found:
        """Per task what is observed and how often it is positive: overall, by split and by domain."""
        ready = {t.name: e for t in self.data.tasks if (e := self._label(t)) is not None}
        observed = self._observed(ready)
        groups = [self._domain().alias("domain"), pl.col(SPLIT).alias("split")]
        exprs = [e for t in self.data.tasks if t.name in ready for e in self._cell(t, ready, observed)]
        plan = self.plan.group_by(groups).agg(pl.len().alias("rows"), *exprs)
        self.cells = self.attempt(lambda: plan.collect(engine="streaming"), pl.DataFrame())
        found: Found = {}
        for task in self.data.tasks:
            if task.name not in ready or not len(self.cells):
                found[task.name] = {"kind": task.kind}
            elif task.kind == "multiclass":
                found[task.name] = self._classes(task, ready[task.name], observed[task.name], groups)
            else:
                found[task.name] = self._sliced(task, partial(_rate, task))
        return found

    def _label(self, task: Task) -> pl.Expr | None:
        """A task's label as a number (binary, real; null where it is none) or as text (multiclass)."""
        read = self.read_part(task)
        if read is None:
            return None
        expr, dtype = read
        if dtype.is_nested():
            text = f"labels should be numbers or words. Found {dtype} in `{task.source}`."
            self.warnings.append(f"Task `{task.name}`: {text}")
            return None
        if task.kind == "multiclass":
            nan = expr.is_nan().fill_null(False) if dtype.is_float() else pl.lit(False)
            if count := self.aggregates([nan.sum().alias("n")])["n"] if dtype.is_float() else 0:
                self.warnings.append(
                    f"Task `{task.name}`: {count:,} labels are NaN. Write nulls where they are not known."
                )
            return pl.when(~nan).then(canonical(expr, dtype).cast(pl.String))
        number = expr.cast(pl.Float64, strict=False)
        bad = (expr.is_not_null() & number.is_null()) | number.is_nan().fill_null(False)
        if task.kind == "binary":
            bad = bad | ~number.is_in([0.0, 1.0]).fill_null(True)
        wrong = self.aggregates([bad.sum().alias("n")])["n"] if dtype != pl.Boolean else 0
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
            sums = {"n": known.sum(), "sum": seen.sum(), "squares": (seen**2).sum()}
            out = [e.alias(f"{name}.{what}") for what, e in sums.items()]
        if task.given in labels:
            positive = (label == 1).fill_null(False) if task.kind == "binary" else label.is_not_null()
            alone = positive & ~(observed[task.given] & (labels[task.given] == 1).fill_null(False))
            out.append(alone.sum().alias(f"{name}.orphans"))
        return out

    def _domain(self) -> pl.Expr:
        """The domain in words."""
        if not self.data.domain:
            return pl.lit("all")
        expr = self.attempt(lambda: canonical(*self.read_column(self.data.domain, "data.domain")), None)
        return pl.lit("all") if expr is None else expr.cast(pl.String).fill_null("(missing)")

    def _sliced(self, task: Task, summary: Callable[[pl.DataFrame], Found]) -> Found:
        """The summary of all ``cells``, of each split's and of each domain's; children without a parent."""
        found: Found = {"kind": task.kind, "all": summary(self.cells)}
        splits = {name: pl.col("split") == code for code, name in enumerate(SPLITS)}
        domains = {name: pl.col("domain") == name for name in _in_order(self.cells["domain"])}
        for what, slices in (("splits", splits), ("domains", domains)):
            found[what] = {name: summary(self.cells.filter(mine)) for name, mine in slices.items()}
        if f"{task.name}.orphans" in self.cells.columns:
            orphans = int(self.cells[f"{task.name}.orphans"].sum())
            found |= {"given": task.given, "children without parent": orphans}
        return found

    def _classes(self, task: Task, label: pl.Expr, known: pl.Expr, groups: Sequence[pl.Expr]) -> Found:
        """Rows of each class of a multiclass task."""
        plan = self.plan.filter(known).group_by(*groups, label.alias("label")).len("n")
        counts = self.attempt(lambda: plan.collect(engine="streaming"), None)
        if counts is None:
            return {"kind": task.kind}

        def summary(cells: pl.DataFrame) -> Found:
            part = counts.join(cells, on=["domain", "split"], how="semi", nulls_equal=True)
            each = dict(part.group_by("label").agg(pl.col("n").sum()).rows())
            n, rows = sum(each.values()), int(cells["rows"].sum())
            classes = {name: each[name] for name in _in_order(part["label"])}
            return {"observed": n, "share": n / rows if rows else None, "classes": classes}

        return self._sliced(task, summary)

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
                counts = self.attempt(partial(self._id_counts, feature), None)
                if counts is not None:
                    found[feature.name] = _id_summary(counts, least[feature.vocab])
        return found

    def _id_counts(self, feature: Feature) -> pl.DataFrame:
        id_values(feature, self.schema)  # raises where the declared kind does not fit the column
        read = self.read_column(feature.source, f"Feature `{feature.name}`")
        return self._values(*read, feature if feature.kind == "bag" else None)

    def numbers(self) -> Found:
        """Mean, spread and range of the numbers as they are in the file, over all rows."""
        exprs: dict[str, dict[str, pl.Expr]] = {}
        for feature in self.data.features:
            expr = self._number(feature) if feature.kind == "number" else None
            if expr is not None:
                good = pl.when(expr.is_finite()).then(expr)
                stats = {"mean": good.mean(), "sd": good.std(ddof=0), "min": good.min(), "max": good.max()}
                exprs[feature.name] = stats | {"infinite": expr.is_infinite().sum()}
        return self._of_each(exprs)

    def _of_each(self, exprs: Mapping[str, Mapping[str, pl.Expr]]) -> Found:
        """Aggregates by feature and what they are, in one pass; None for those that cannot be computed."""
        values = self.aggregates([e.alias(f"{n}.{what}") for n, mine in exprs.items() for what, e in mine.items()])
        return {n: {what: values.get(f"{n}.{what}") for what in mine} for n, mine in exprs.items()}

    def _number(self, feature: Feature) -> pl.Expr | None:
        read = self.read_part(feature)
        if read is None:
            return None
        expr, dtype = read
        if dtype.is_numeric() or dtype == pl.Boolean:
            return expr.cast(pl.Float64)
        text = f"kind `number` needs numbers. Found {dtype} in `{feature.source}`."
        self.warnings.append(f"Feature `{feature.name}`: {text}")
        return None

    def contents(self) -> Found:
        """Per picture or text feature how many different ones there are, and what they look like; files that are missing."""
        found: Found = {}
        for feature in self.data.features:
            about = self.attempt(partial(self._content, feature), None) if feature.has_content else None
            if about is not None:
                found[feature.name] = about
        return found

    def _content(self, feature: Feature) -> Found:
        plan = self.plan.select(value=content_expression(feature, self.schema)).drop_nulls()
        values = plan.group_by("value", maintain_order=True).len("rows").collect(engine="streaming")
        found: Found = {"kind": feature.kind, "distinct": len(values)}
        if feature.kind == "text":
            lengths = values["value"].str.len_chars()
            return found | {"median": lengths.median(), "longest": lengths.max()}
        if values["value"].dtype != pl.String:
            return found | {"missing files": 0, **looked_at(values["value"].to_list(), Path())}
        root = root_of(self.data, self.base)
        names, counts = values["value"].to_list(), values["rows"].to_list()
        missing = [place for place, name in enumerate(names) if not (root / name).is_file()]
        if missing:
            self.warnings.append(missing_files(feature.name, names, missing, counts, root))
        there = sorted(set(range(len(names))) - set(missing))
        if bad := [there[place] for place in not_pictures([root / names[place] for place in there])]:
            first = ", ".join(names[place] for place in bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
            text = f"{len(bad):,} of {len(names):,} files are no pictures: {first}. Replace them or leave them out (`data.keep`)."
            self.warnings.append(f"Feature `{feature.name}`: {text}")
            there = sorted(set(there) - set(bad))
        return found | {"missing files": len(missing), **looked_at([names[place] for place in there], root)}

    def missing(self) -> Found:
        """Nulls, and NaNs of floating-point columns, per feature."""
        exprs: dict[str, dict[str, pl.Expr]] = {}
        for feature in self.data.features:
            if read := self.read_part(feature):
                nans = {"nans": read[0].is_nan().sum()} if read[1].is_float() else {}
                exprs[feature.name] = {"nulls": read[0].is_null().sum(), **nans}
        return {n: about for n, about in self._of_each(exprs).items() if about["nulls"] is not None}

    def histories(self) -> Found:
        """Lengths of each history over all rows, from the encoded table (which a later training run finds ready)."""
        if not self.data.histories:
            return {}
        encoded = self.attempt(lambda: Encoded(encode(self.data, self.base, tables=self.tables)), None)
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
        self._warn_about_rows(found["rows"])
        self._warn_about_time(found["time"])
        self._warn_about_domains(found["domains"])
        self._warn_about_features(found)
        self._warn_about_ids(found)
        self._warn_about_events(found["histories"])
        for task, about in found["tasks"].items():
            test = about.get("splits", {}).get("test", {}).get("positives")
            if test is not None and test < FEW_POSITIVES:
                text = f"{test:,} positives in the test split. Its metrics will have wide intervals."
                self.warnings.append(f"Task {task}: {text}")
            if orphans := about.get("children without parent"):
                text = f"{orphans:,} rows are positive although {about['given']} is 0 or unobserved."
                self.warnings.append(f"Task {task}: {text} They are not observed for {task}, as `given` says.")

    def _warn_about_rows(self, rows: Found) -> None:
        say = self.warnings.append
        if rows["duplicates"] and not rows["duplicates dropped"]:
            fix = "data.drop_duplicates = true drops them."
            say(f"{rows['duplicates']:,} rows equal an earlier row in every column and stay. {fix}")
        if not rows["used"]:
            say("There are no rows" + (f" after keep = `{self.data.keep}`." if self.data.keep else "."))
        for name in SPLITS:
            if not rows[name]:
                say(f"The {name} split is empty. Move the boundaries of data.split.")
        if rows["in no split"]:
            say(f"{rows['in no split']:,} rows belong to no split (a null or another word in the column that splits).")

    def _warn_about_time(self, time: Found | None) -> None:
        if time is None:
            return
        if time["rows without a time"]:
            self.warnings.append(f"{time['rows without a time']:,} rows have no time. Filter them with data.keep.")
        odd = [t for t in (time["from"], time["to"]) if t is not None and not plausible(t)]
        if odd and time["unit"].startswith("integers"):
            self.warnings.append(f"Times reach to {odd[0]}, read as {time['unit']}. Is data.time_unit right?")

    def _warn_about_domains(self, domains: Found) -> None:
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
                cell = _rate(task, train.filter(pl.col("domain") == name))
                if cell["positives"] in (0, cell["observed"]):
                    what = "no labels" if not cell["observed"] else "only 1s" if cell["positives"] else "only 0s"
                    place = f", domain {name}" if domains else ""
                    self.warnings.append(f"Task {task.name}{place}: {what} in the training split.")

    def _warn_about_events(self, histories: Found) -> None:
        if self.data.histories:
            self.warnings.extend(self.attempt(lambda: warnings_of(self.data, self.base, self.tables), []))
        for source in [s for s in self.data.events if s.table != "rows" and self.data.histories]:
            double = self.attempt(partial(self._double_events, source), 0)
            if double:
                self.warnings.append(
                    f"data.events `{source.table}`: {double:,} events equal another one in user, time and all that is read "
                    "of them, and stay."
                )
        for name, about in histories.items():
            if about["empty"] == 1:
                self.warnings.append(
                    f"History {name} has no event in any row: look at its `where`, and at users and times of the events."
                )

    def _double_events(self, source: Events) -> int:
        """Events of a source that equal an earlier one, in what is read of them."""
        alone = replace(self.data, events=(source,))
        ((_, plan),) = event_plans(alone, self.base, self.tables, split=False)
        joined = add_joins(plan, alone, self.base, self.tables)
        have, where = joined.collect_schema(), f"data.events `{source.table}`"
        times = [] if source.time == "none" else [source.time or self.data.time]
        read = [expression(column, have, where) for column in (self.data.user, *times, *source.columns.values())]
        events = joined.select(part.alias(str(place)) for place, part in enumerate(read))
        return count_rows(events) - count_rows(events.unique())

    def _warn_about_ids(self, found: Found) -> None:
        nobody = (found["users"] or {}).get("rows without a user")
        if nobody:
            self.warnings.append(f"{nobody:,} rows have no user (`{self.data.user}` is null): they have no history.")
        for name, about in found["ids"].items():
            if (about["test unseen"] or 0) > 0.5:
                share = f"{about['test unseen']:.0%}"
                text = f"{share} of the test rows have a value that training never saw; it can teach them nothing."
                self.warnings.append(f"Feature {name}: {text}")

    def _warn_about_features(self, found: Found) -> None:
        for feature in self.data.features:
            nans, number = found["missing"].get(feature.name, {}).get("nans"), feature.kind == "number"
            if nans and not (number and feature.nan == "missing"):
                fix = 'nan = "missing" reads them as missing' if number else "write nulls for missing ids"
                self.warnings.append(f"Feature {feature.name}: {nans:,} rows hold NaN; {fix}.")
        for name, about in found["numbers"].items():
            if about["infinite"]:
                text = f"{about['infinite']:,} rows hold infinity. Filter or replace them."
                self.warnings.append(f"Feature {name}: {text}")
        for table, about in found["joins"].items():
            if about["rows without a match"] == found["rows"]["used"] > 0:
                self.warnings.append(f"Join of {table}: no row has a match on {about['on']}.")


# ------------------------------------------------------------------------------------------------------------- counting
def _in_order(names: pl.Series) -> list[str]:
    """Distinct words, numbers in numeric order."""
    distinct = names.drop_nulls().unique().to_list()
    try:
        return sorted(distinct, key=float)
    except ValueError:
        return sorted(distinct)


def _rate(task: Task, cells: pl.DataFrame) -> Found:
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
