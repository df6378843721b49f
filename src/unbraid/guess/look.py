"""The look at a user's files: rows, joins, labels, user, time, split and features, in the order in which they are needed.

`unbraid.guess.infer` writes it down.  The guesses that matter most are leaks: columns that are outcomes of the same
event as the label, and columns that tell test rows from training rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import polars as pl

from unbraid.data.source import _dtype as dtype_of
from unbraid.data.source import expression, to_time
from unbraid.guess.beside import pictures_beside
from unbraid.guess.columns import EACH, Column, Guess, columns_of, inside, kind_of, mean, of_column
from unbraid.guess.labels import Label, Labels, guess, label_of
from unbraid.guess.leaks import SURE, SUSPECT, follows_item, rank_correlation, tells, together
from unbraid.guess.logs import Clock, Log, log_of
from unbraid.guess.roles import item_of, user_of
from unbraid.guess.split import Split, split_of
from unbraid.guess.tables import Joiner, Tables, find_tables
from unbraid.guess.times import epoch, from_parts, is_day, read_time, unit_of
from unbraid.guess.words import DAYS, DURING, FEEDBACK, FLAGS, OTHER_TIMES, TIMES, safe

SAMPLE = 200_000  # rows that are looked at; the number of rows, keys and boundaries of small tables are exact
LARGE = 5_000_000  # above this, exact duplicates are not counted


class Rows:
    """A sample of one table.

    Attributes:
        own: its columns; total: its rows; frame: every ``step``-th of them; columns: name -> `Column`.
    """

    def __init__(self, tables: Tables, table: str) -> None:
        self.table, self.plan = table, tables.plan(table)
        self.own = self.plan.collect_schema().names()
        self.total = self.plan.select(pl.len()).collect(engine="streaming").item()
        self.step = max(-(-self.total // SAMPLE), 1)
        self.frame = (self.plan.gather_every(self.step) if self.step > 1 else self.plan).collect(engine="streaming")
        self.columns = self.seen(self.frame)

    def seen(self, frame: pl.DataFrame) -> dict[str, Column]:
        """The columns of the sample, or of the sample with joined columns."""
        return columns_of(frame, self.own, self._many, self.step)

    @cached_property
    def _many(self) -> Mapping[str, int]:
        """Distinct values of whole columns, where the frame is a sample."""
        if self.step == 1:
            return {}
        flat = [c for c in self.own if not self.frame.schema[c].is_nested()]
        return self.plan.select(pl.col(flat).approx_n_unique()).collect(engine="streaming").row(0, named=True)

    def guessed(self) -> Labels | None:
        """The labels that it seems to have."""
        user, _ = user_of(self.columns.values())
        item = item_of([c for c in self.columns.values() if c.name != user and not c.nested])
        return guess(self.columns, user, item.name if item else "") if self.total else None


class Look:
    """Everything that is read and guessed.

    Attributes:
        frame: a sample of the rows with joined columns, every ``step``-th; total: number of rows.
        columns: name -> `Column`; labels: the tasks and what they could be; features: a `Guess` for every other column.
        joins: (join, why); logs: tables of events; unused: (table, why).
        user, time: column names, "" for none; time_sql, time_unit: how the run file reads them.
        no_user: why there is no user.
        item: the feature that names what is recommended.
        split: which rows train and test.
        pictures: the table whose rows have pictures, if there is one.
    """

    def __init__(self, path: Path, labels: list[str], roles: Mapping[str, str]) -> None:
        self.path, self.given, self.roles = path, bool(labels), roles
        self.tables, self.pictures = pictures_beside(path, find_tables(path))
        rows, guessed = self._rows(labels)
        self.table, self.own, self.total, self.step = rows.table, rows.own, rows.total, rows.step
        if not self.total:
            raise ValueError(f"{self.table} has no rows.")
        self.duplicates = (
            self.total - rows.plan.unique().select(pl.len()).collect().item() if self.total <= LARGE else 0
        )
        joiner = Joiner(self.tables, rows.frame, self.table)
        self.frame, self.joins, self.unused = joiner.frame, joiner.joins, joiner.unused
        for role, name in roles.items():
            if name:
                require(name, f"--{role}", self.frame.columns if role == "domain" else self.own)
        self.columns = rows.seen(self.frame)
        self.labels = guessed or Labels(tuple(label_of(self.columns[name]) for name in labels))
        self.taken = {c for label in self.labels.tasks for c in label.columns}
        found, self.no_user = user_of(self._candidates())
        self.user = roles["user"] or found
        self._time(roles["time"])
        self._split()
        self.features = [self._feature(c) for c in self.columns.values() if c.name not in (*self.taken, self.time)]
        self.item = self._guess_item()
        self._share_vocabularies()
        if self.labels.negatives:
            self._leave_items_columns()
        self._logs(joiner)

    # ---------------------------------------------------------------------------------------------------------- labels
    def _rows(self, labels: list[str]) -> tuple[Rows, Labels | None]:
        """The table of the rows: the largest with all labels; without given ones, the largest of the surest guess.

        Raises ValueError when there is none.
        """
        names = [self.pictures.table] if self.pictures else self.tables.names
        have = {t: self.tables.plan(t).collect_schema().names() for t in names}
        for label in labels:
            require(label, "--label", [c for names in have.values() for c in names])
        if labels:
            found = {t: [x for x in labels if x in names] for t, names in have.items()}
            whole = [Rows(self.tables, t) for t, names in found.items() if names == labels]
            if not whole:
                where = "; ".join(f"{t}: {', '.join(names)}" for t, names in found.items() if names)
                raise ValueError(f"All labels should be columns of one table. Found {where}.")
            return max(whole, key=lambda rows: rows.total), None
        best: tuple[tuple[bool, int, int], Rows, Labels] | None = None
        for table in have:
            rows = Rows(self.tables, table)
            if guessed := rows.guessed():
                rank = min(guessed.rank, 6)  # weak guesses are all alike: the larger table is meant
                bare = len(rows.own) < 3  # an id and a label: answers to hand in
                if best is None or (not bare, -rank, rows.total) > best[0]:
                    best = (not bare, -rank, rows.total), rows, guessed
        if best is None:
            raise ValueError(
                "No column looks like a label, and no table like events of users and items. Name one with `--label`. Columns: "
                f"{'; '.join(f'{t}: {chr(44).join(names)}' for t, names in have.items())}."
            )
        return best[1], best[2]

    def _candidates(self) -> list[Column]:
        """Columns of the rows that are no labels."""
        return [self.columns[name] for name in self.own if name not in self.taken]

    def positives(self) -> Iterable[tuple[Label, pl.Series, pl.Series]]:
        """(label, (n,) bool known, (n,) bool positive): every label as yes or no, the larger classes of several one by one."""
        for label in self.labels.tasks:
            if not label.columns:  # sampled negatives
                continue
            values = label.values(self.frame)
            known = values.is_not_null()
            if label.kind == "binary":
                yes = [values.cast(pl.Float64) == 1]
            elif label.kind == "real":
                yes = [values > values.median()]
            else:
                yes = [values == each for each in values.drop_nulls().value_counts(sort=True)[values.name].head(3)]
            yield from ((label, known, each.fill_null(False)) for each in yes)

    # ------------------------------------------------------------------------------------------------------------ time
    def _time(self, given: str) -> None:
        """Choose the time column.  Raises ValueError when the given one cannot be read as a time."""
        self.time, self.time_sql, self.time_unit, self.time_why, self.time_parts = "", "", "ms", "", list[str]()
        if given:
            read = read_time(self.columns[given], True)
            if read is None:
                found = self.columns[given].dtype
                raise ValueError(f"--time: `{given}` should hold integers, dates or ISO texts. Found {found}.")
            self.time, (self.time_sql, self.time_unit, self.time_why) = given, read
            return
        best = (1, False)  # (different values, called a time)
        for c in self._candidates():
            named = c.named(TIMES - {"at"}) or c.words[-1:] == ["at"] or c.dtype.is_temporal() or bool(c.form)
            if (
                named
                and c.name != self.user
                and not c.named(DURING | OTHER_TIMES)
                and (c.distinct, c.named(TIMES)) > best
            ):
                read = read_time(c, False)
                if read is not None:
                    best, self.time = (c.distinct, c.named(TIMES)), c.name
                    self.time_sql, self.time_unit, self.time_why = read
        finer = from_parts(self.columns, [c.name for c in self._candidates()])
        if finer and (not self.time or self.time in finer[0]):
            self.time_parts, (self.time_sql, self.time_unit, self.time_why) = finer
            self.time = self.time_parts[0]

    @cached_property
    def moments(self) -> tuple[pl.Series, float]:
        """The sample's times as integers and how many make a second."""
        source, schema = self.time_sql, self.frame.schema
        column = expression(source, schema, "time")
        expr, per_second = to_time(column, dtype_of(source, schema), self.time_unit, f"Column `{self.time}`")
        return self.frame.select(t=expr)["t"], per_second

    @property
    def time_is_number(self) -> bool:
        """Does the run file read times as numbers of `time_unit`?"""
        return dtype_of(self.time_sql, self.frame.schema).is_integer()

    # ----------------------------------------------------------------------------------------------------------- split
    def _split(self) -> None:
        files = self.tables.splits.get(self.table)
        timed = (self.moments, self.time_is_number) if self.time else (None, False)
        self.split: Split = split_of(self.frame, self.own, files, self.user, self.time, *timed)

    # -------------------------------------------------------------------------------------------------------- features
    def _feature(self, column: Column) -> Guess:
        if self.pictures and column.name == self.pictures.column:
            return Guess(column, of_column(column.name, "image"), self.pictures.why)
        found = self._age(column) or kind_of(column)
        found.out = self._why_out(column, found)
        return found

    def _age(self, c: Column) -> Guess | None:
        """Days from a moment that lies before the row to the row's time; where rows have none, the moment as a number."""
        read = (
            read_time(c, False)
            if c.dtype.is_temporal() or c.form or (c.dtype.is_integer() and unit_of(c.values))
            else None
        )
        if read is None or c.name in self.time_parts:
            return None
        theirs = epoch(read[0], read[1], c.dtype.is_integer())
        name, sql, why = f"{safe(c.name)}_days", f"{theirs} / 86400.0", f"days since 1970 of `{c.name}` ({read[2]})"
        if self.time:
            sql = f"({epoch(self.time_sql, self.time_unit, self.time_is_number)} - {theirs}) / 86400.0"
            name, why = f"{safe(c.name)}_age", f"days from `{c.name}` ({read[2]}) to the row's time; it is never later"
        days = self.frame.select(pl.sql_expr(sql).alias("d"))["d"].drop_nulls()
        if not len(days) or (self.time and (float(days.min()) < 0 or float(days.max()) < 2)):  # type: ignore[arg-type]
            return None
        return Guess(c, {"name": name, "column": sql, "kind": "number"}, why)

    def _why_out(self, c: Column, found: Guess) -> str:
        """The reason to leave a column out, or an empty string."""
        if c.distinct < 2:
            return "it has one value" if c.distinct else "it is empty"
        if c.name == self.split.keys.get("column"):
            return "it says which split a row is in"
        if c.name in self.time_parts:
            return "a part of the time; the months and years of test rows are not in training"
        if c.own and c.name != self.user and not c.nested:
            log = bool(self.user and self.time)  # of a table of people or things, `has_car` is a feature
            if c.flag and c.named(FEEDBACK | FLAGS if log else FEEDBACK):
                return "binary and named like feedback; take it in only if it is known before the event"
            if log and c.named(DURING) and c.dtype.is_numeric():
                return "named like something that is measured during or after the event"
        if found.out:  # a type that no kind reads
            return found.out
        if c.name == self.user and self.split.keys["kind"] == "user":
            return "users of the validation and test splits are not in training"
        each = EACH if found.feature["kind"] == "id" and c.unique else ""
        age = found.feature["name"].startswith(safe(c.name) + "_") and "EPOCH" in found.feature.get("column", "")
        return self._leak(c, found) or ("" if age else self._tells_time(c)) or each

    def _leak(self, c: Column, found: Guess) -> str:
        """Does this column alone, or whether it is filled, tell a label?  A word of warning goes to the guess."""
        for label, known, yes in () if c.nested else self.positives():
            usable = known & self.split.train if self.split.train.any() else known
            number = found.feature["kind"] == "number" and not c.dtype.is_temporal() and c.dtype != pl.String
            if not c.dtype.is_nested() and together(c.values, known):
                return f"missing where `{label.name}` is missing: both seem to be recorded at once, after the event"
            score, filled = tells(c.values.filter(usable), yes.filter(usable), number)
            if score > SURE:
                return f"alone it tells `{label.name}` (AUC {score:.3f} in the training rows): it looks like an outcome"
            if filled > SURE:
                return f"whether it is filled tells `{label.name}` (AUC {filled:.3f}): it looks like an outcome"
            if max(score, filled) > SUSPECT and "careful" not in found.why:
                found.why += (
                    f"; careful: alone it has AUC {max(score, filled):.3f} for `{label.name}`. Is it known before?"
                )
        return ""

    def _tells_time(self, c: Column) -> str:
        """Does the column tell when the row happened?  Then test values are new, or a clock that training never saw."""
        if c.dtype.is_temporal() or c.form:
            age = '(column = "an SQL expression", kind = "number")'
            return f"a point in time or a date that is not before the row; an age in seconds would be a feature {age}"
        if c.dtype.is_numeric() and c.named(TIMES) and unit_of(c.values):
            return "a point in time as a number; an age would be a feature"
        if c.named(DAYS) and (c.dtype == pl.String or c.distinct > 2) and is_day(c.values):
            return "a date: as an id, it would mean nothing for later dates, and tell test rows from training rows"
        timed = self.split.keys["kind"] == "time" and self.split.test.any()
        if timed and c.own and c.dtype.is_integer() and c.name != self.user:
            train, test = (c.values.filter(part).drop_nulls() for part in (self.split.train, self.split.test))
            new = 1.0 - mean(test.is_in(train.unique().implode())) if len(test) else 0.0
            if new > SURE and abs(rank_correlation(c.values, self.moments[0])) > 0.99:
                return "it grows with time, so that test values never occur in training"
        return ""

    def _guess_item(self) -> Guess | None:
        """The id column of the rows that names what is recommended."""
        ids = {g.column.name: g for g in self.features if not g.out and g.feature["kind"] == "id"}
        found = item_of([g.column for g in ids.values() if g.column.own and g.column.name != self.user])
        return ids[found.name] if found else None

    def _share_vocabularies(self) -> None:
        """A bag whose members are items reads the item's table."""
        item = self.item
        if item is None:
            return
        bags = [g for g in self.features if g.feature["kind"] == "bag" and isinstance(g.column.dtype, pl.List)]
        for bag in bags:
            share = inside(bag.column.values, item.column.values)
            if share > 0.5:
                bag.feature.pop("min_count", None)
                bag.feature |= {"vocabulary": item.feature["name"], **item.least}
                bag.why += f"; {share:.0%} of its values are values of `{item.column.name}`"

    def _logs(self, joiner: Joiner) -> None:
        """Take tables of events of the rows' users as histories."""
        self.logs: list[Log] = []
        if not (self.user and self.time):
            return
        unused, self.unused = self.unused, []
        clock = Clock(self.time, self.time_unit if self.time_is_number else "us", self.time_is_number)
        item = (self.item.column.name, self.item.feature, self.item.column.values) if self.item else None
        for table, why in unused:
            taken = [*(g.feature["name"] for g in self.features), "earlier", *(log.name for log in self.logs)]
            alike = joiner.alike(table)
            found = log_of(self.tables, table, self.user, self.frame[self.user], clock, item, taken, alike)
            if isinstance(found, Log):
                self.logs.append(found)
            else:
                self.unused.append((table, why if self.user not in joiner.plans[table].collect_schema() else found))

    def _leave_items_columns(self) -> None:
        """Negatives get another item, and the columns of the rows' own table stay: those of the item would tell them apart."""
        if self.item is None:
            raise ValueError(
                "No column is a label, and none names items to draw negatives of. Name a label with `--label`."
            )
        for found in self.features:
            c = found.column
            mine = c.own and not found.out and c.name not in (self.user, self.item.column.name) and not c.nested
            if mine and follows_item(c.values, self.item.column.values):
                item = self.item.column.name
                found.out = f"it goes with `{item}`, and negatives get another; in a table of items it would be joined"


def require(name: str, option: str, have: Sequence[str]) -> None:
    """Raises ValueError, with what is near, for a column that is not there."""
    if name not in have:
        near = difflib.get_close_matches(name, have, n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"{option}: there is no column `{name}`.{hint} Columns: {', '.join(dict.fromkeys(have))}.")
