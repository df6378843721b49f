"""What a first run file needs to know: which tables and columns there are, and what each of them seems to be.

`unbraid.data.infer` writes it down.  The guesses that matter most are leaks: columns that are outcomes of the same
event as the label, and columns that tell test rows from training rows.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.data.source import _dtype, expression, instant, scan, stable_uniform, to_time
from unbraid.data.vocabulary import canonical

SAMPLE = 200_000  # rows that are looked at; the number of rows, keys and boundaries of small tables are exact
LARGE = 5_000_000  # above this, exact duplicates are not counted
SURE = 0.95  # a single column that ranks a label so well is taken for an outcome
UNIQUE = 0.9  # distinct values per row from which a column identifies rows
MANY = 1_000  # ids with more distinct values get min_count 2
EACH = "almost every row has its own value"

# Words of column names
USERS = set("user users uid member customer visitor client reviewer consumer buyer person account".split())
ITEMS = set(
    """
    item items iid video product movie song track goods article news sku ad doc content book poi business
    post photo listing game app recipe show asin
    """.split()
)
TIMES = set("time timestamp ts datetime date day hour created at dt unix".split())
DAYS = set("date day dt datetime month week year".split())
DOMAINS = set("domain scenario scene tab site country channel page surface market region source".split())
IDS = set("id ids type code category cat class brand city gender level zip key".split())
FLAGS = set("is has did".split())
FEEDBACK = set(
    """
    click clicked clicks like liked dislike disliked follow followed comment commented forward share shared
    hate buy bought purchase purchased order ordered cart favorite favourite fav collect collected convert
    converted conversion install installed view viewed watched finish finished complete completed subscribe
    subscribed enter entered skip skipped pay paid download downloaded reply replied label target
    """.split()
)
DURING = set(
    """
    play played stay stayed dwell watch watched listen listened revenue gmv spend spent progress rating stars
    """.split()
)
FORMATS = (
    *("%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f"),
    *("%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%d.%m.%Y %H:%M:%S"),
    *("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%Y%m%d"),
)
UNITS = (("s", 3e8, 5e9), ("ms", 3e11, 5e12), ("us", 3e14, 5e15), ("ns", 3e17, 5e18))  # 1980 to 2128 in each unit
SUFFIXES = (".parquet", ".csv")
PICTURES = r"(?i)\.(jpe?g|png|bmp|gif|webp|tiff?)$"


# ---------------------------------------------------------------------------------------------------------- the tables
def find_tables(path: Path) -> tuple[Path, list[str]]:
    """The folder and its tables: file names, folders of files, or globs over files of one schema.

    Raises ValueError when there are none.
    """
    if path.is_file() and path.suffix in SUFFIXES:
        return path.parent.resolve(), [path.name]
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}.")
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else []
    if not files:
        raise ValueError(
            f"{path} should be a Parquet or CSV file or a folder of them. Found neither. (A folder of pictures is read without "
            "`--label`.)"
        )
    units: dict[str, list[Path]] = {}
    for file in files:  # a file, or a folder with files anywhere below
        units.setdefault(file.relative_to(path).parts[0], []).append(file)
    groups: dict[Any, list[str]] = {}
    for name, members in units.items():
        schema = scan(str(path.resolve()), str(members[0].relative_to(path)), Path()).collect_schema()
        groups.setdefault((members[0].suffix, tuple(schema.items())), []).append(name)
    if len(groups) == 1 and len(files) > 1:
        deep = any(len(f.relative_to(path).parts) > 1 for f in files)
        return path.resolve(), [("**/*" if deep else "*") + files[0].suffix]
    return path.resolve(), [t for (suffix, _), names in groups.items() for t in _one_pattern(path, names, suffix)]


def _one_pattern(folder: Path, names: list[str], suffix: str) -> list[str]:
    """One glob for several files of one schema if it matches them and nothing else; else their names."""
    if len(names) == 1:
        return names
    start = names[0]
    while not all(n.startswith(start) for n in names):
        start = start[:-1]
    pattern = f"{start}*{suffix}"
    return [pattern] if sorted(p.name for p in folder.glob(pattern)) == sorted(names) and start else names


def _count(plan: pl.LazyFrame) -> int:
    return plan.select(pl.len()).collect(engine="streaming").item()


def _require(name: str, option: str, have: Sequence[str]) -> None:
    if name not in have:
        near = difflib.get_close_matches(name, have, n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"{option}: there is no column `{name}`.{hint} Columns: {', '.join(dict.fromkeys(have))}.")


@dataclass
class Column:
    """What is known of one column.

    Args:
        name, values: of the sample; own: does it come from the table of the rows?
        distinct: different values, and rows: out of so many rows with a value.
    """

    name: str
    values: pl.Series
    own: bool
    distinct: int
    rows: int

    def __post_init__(self) -> None:
        """``userId2`` is the words user, id, 2."""
        found = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+", self.name)
        self.words = [w.lower() for w in found]
        self.dtype: Any = self.values.dtype
        self.nested = self.dtype.is_nested()
        self.exact = not self.nested and not self.dtype.is_float()  # so that values can name things
        self.unique = self.distinct > UNIQUE * self.rows
        # it names rows, and nothing else; of a large table distinct values are counted to within a few per cent
        self.names_rows = self.distinct > (0.97 * self.rows if self.rows > len(self.values) else self.rows - 1)

    def named(self, words: set[str]) -> bool:
        """Is one of these words in its name?"""
        return bool(words & set(self.words))

    @property
    def flag(self) -> bool:
        """Are its values 0 and 1, or false and true?"""
        if self.distinct != 2 or not self.dtype.is_numeric():
            return self.distinct == 2 and self.dtype == pl.Boolean
        return bool(self.values.drop_nulls().cast(pl.Float64).is_in([0.0, 1.0]).all())


class Look:
    """Everything that is read and guessed, in the order in which it is needed.

    Attributes:
        frame: a sample of the rows with joined columns, every ``step``-th; total: number of rows.
        columns: name -> `Column`; tasks: label -> (kind, why); features: a `Guess` for every other column.
        joins: (table, key); unused: (table, why).
        user, time: column names, "" for none; user_sql, time_sql, time_unit: how the run file reads them.
        no_user: why there is no user.
        item: the feature that names what is recommended.
        train, test: (n,) bool, rows of the sample by the split.
    """

    def __init__(self, path: Path, labels: list[str], roles: Mapping[str, str]) -> None:
        self.path, self.labels, self.roles = path, labels, roles
        self.folder, tables = find_tables(path)
        self.plans = {t: scan(str(self.folder), t, Path()) for t in tables}
        self.table = self._rows_table()
        self._sample()
        self._join()
        for role, name in roles.items():
            if name:
                _require(name, f"--{role}", self.frame.columns if role == "domain" else self.own)
        self.columns = self._columns()
        self.tasks = {name: _task(self.columns[name]) for name in labels}
        self.no_user = "no column looks like a user"
        self.user = roles["user"] or self._guess_user()
        self._time(roles["time"])
        self._split()
        self.features = [self._feature(c) for c in self.columns.values() if c.name not in (*labels, self.time)]
        self.item = self._guess_item()
        self._share_vocabularies()

    # ---------------------------------------------------------------------------------------------------------- tables
    def _rows_table(self) -> str:
        """The largest table that has all labels.  Raises ValueError."""
        have = {t: p.collect_schema().names() for t, p in self.plans.items()}
        for label in self.labels:
            _require(label, "--label", [c for names in have.values() for c in names])
        found = {t: [x for x in self.labels if x in names] for t, names in have.items()}
        whole = [t for t, names in found.items() if names == self.labels]
        if not whole:
            where = "; ".join(f"{t}: {', '.join(names)}" for t, names in found.items() if names)
            raise ValueError(f"All labels should be columns of one table. Found {where}.")
        return max(whole, key=lambda t: _count(self.plans[t]))

    def _sample(self) -> None:
        plan = self.plans[self.table]
        self.own = plan.collect_schema().names()
        self.total = _count(plan)
        if not self.total:
            raise ValueError(f"{self.table} has no rows.")
        self.step = -(-self.total // SAMPLE)
        self.frame = (plan.gather_every(self.step) if self.step > 1 else plan).collect(engine="streaming")
        self.duplicates = self.total - plan.unique().select(pl.len()).collect().item() if self.total <= LARGE else 0

    def _join(self) -> None:
        """Join what can be joined, again and again: a joined table may bring the key of another."""
        self.joins: list[tuple[str, str]] = []
        waiting, before = [t for t in self.plans if t != self.table], -1
        while len(waiting) != before:
            before = len(waiting)
            waiting = [t for t in waiting if not self._join_one(t)]
        self.unused = [(table, self._why_not(table)) for table in waiting]

    def _shared(self, table: str) -> list[str]:
        return [c for c in self.plans[table].collect_schema() if c in self.frame.columns]

    def _unique(self, table: str, key: str) -> bool:
        rows, keys = self.plans[table].select(n=pl.len(), k=pl.col(key).n_unique()).collect().row(0)
        return rows == keys

    def _join_one(self, table: str) -> bool:
        shared = self._shared(table)
        if len(shared) != 1 or not self._unique(table, shared[0]):
            return False
        key, plans = shared[0], (self.frame.lazy(), self.plans[table])
        left, right = (p.with_columns(canonical(pl.col(key), p.collect_schema()[key])) for p in plans)
        if left.collect_schema()[key] != right.collect_schema()[key]:
            return False
        self.frame = left.join(right, on=key, how="left", maintain_order="left").collect()
        self.joins.append((table, key))
        return True

    def _why_not(self, table: str) -> str:
        shared = self._shared(table)
        keys = [c for c in shared if self._unique(table, c)]
        if not shared:
            return "it has no column of the rows"
        if not keys:
            names = ", ".join(shared)
            return f"none of the shared columns ({names}) has one row per value: it may hold events (`events`)"
        if len(shared) > 1:
            others = ", ".join(c for c in shared if c != keys[0])
            return f"it could be joined on {keys[0]}, but both sides also have {others}: rename them"
        return f"{keys[0]} has another type there"

    # --------------------------------------------------------------------------------------------------------- columns
    def _columns(self) -> dict[str, Column]:
        many: dict[str, int] = {}
        if self.step > 1:  # a sample of a log would make every user look unique
            flat = [c for c in self.own if not self.frame.schema[c].is_nested()]
            counts = self.plans[self.table].select(pl.col(flat).approx_n_unique())
            many = counts.collect(engine="streaming").row(0, named=True)
        out = {}
        for values in self.frame:
            name, known = values.name, values.drop_nulls()
            distinct = 0 if not len(known) else 2 if values.dtype.is_nested() else int(known.n_unique())
            rows = len(known) * (self.step if name in many else 1)
            out[name] = Column(name, values, name in self.own, max(distinct, many.get(name, 0)), rows)
        return out

    def _candidates(self) -> list[Column]:
        """Columns of the rows that are no labels."""
        return [self.columns[name] for name in self.own if name not in self.labels]

    def positives(self) -> Iterable[tuple[str, pl.Series, pl.Series]]:
        """(label, (n,) bool known, (n,) bool positive): every label as yes or no."""
        for name, (kind, _) in self.tasks.items():
            values = self.frame[name]
            if kind == "binary":
                yes = values.cast(pl.Float64) == 1
            elif kind == "real":
                yes = values > values.median()
            else:
                yes = values == values.drop_nulls().mode().sort()[0]
            yield name, values.is_not_null(), yes.fill_null(False)

    # --------------------------------------------------------------------------------------------------- user and time
    def _guess_user(self) -> str:
        """The column named like a user; among equals the one with the most values, but not one of its own in every row."""
        best: tuple[int, int, str] = (0, 0, "")
        for c in self._candidates():
            name = c.name.lower()
            if (c.named(USERS) or name.startswith(("user", "uid"))) and c.distinct > 10 and c.exact:
                if c.names_rows:
                    self.no_user = f"`{c.name}` has another value in every row, which names rows and no users"
                    continue
                simple = "".join(c.words) in {"user", "userid", "uid", "member", "memberid", "customerid", "visitorid"}
                ends = name.endswith(("id", "key", "hash"))
                best = max(best, (3 if simple else 2 if ends else 1, c.distinct, c.name))
        return best[2]

    def _time(self, given: str) -> None:
        """Choose the time column.  Raises ValueError when the given one cannot be read as a time."""
        self.time, self.time_sql, self.time_unit, self.time_why = "", "", "ms", ""
        if given:
            read = _read_time(self.columns[given], True)
            if read is None:
                found = self.columns[given].dtype
                raise ValueError(f"--time: `{given}` should hold integers, dates or ISO texts. Found {found}.")
            self.time, (self.time_sql, self.time_unit, self.time_why) = given, read
            return
        most = 1
        for c in self._candidates():
            named = c.named(TIMES - {"at"}) or c.words[-1:] == ["at"] or c.dtype.is_temporal()
            if named and c.name != self.user and not c.named(DURING) and c.distinct > most:
                read = _read_time(c, False)
                if read is not None:
                    most, self.time = c.distinct, c.name
                    self.time_sql, self.time_unit, self.time_why = read

    @cached_property
    def moments(self) -> tuple[pl.Series, float]:
        """The sample's times as integers and how many make a second."""
        source, schema = self.time_sql, self.frame.schema
        column = expression(source, schema, "time")
        expr, per_second = to_time(column, _dtype(source, schema), self.time_unit, f"Column `{self.time}`")
        return self.frame.select(t=expr)["t"], per_second

    # ----------------------------------------------------------------------------------------------------------- split
    def _split(self) -> None:
        """By a column that says so, else by time, else by user, else by whatever identifies rows."""
        self.keep, self.user_sql = "", self.user
        if not (self._split_by_column() or (self.time and self._split_by_time())):
            self._split_by_user()

    def _split_by_column(self) -> bool:
        for name in self.own:
            values = self.frame[name]
            if values.dtype == pl.String and set(values.unique().to_list()) == {"train", "valid", "test"}:
                self.split: dict[str, Any] = {"kind": "column", "column": name}
                self.split_why = f"`{name}` says train, valid or test"
                self.train, self.test = values == "train", values == "test"
                return True
        return False

    def _split_by_time(self) -> bool:
        """The last tenth of the rows tests and the tenth before validates, if the times are that fine."""
        times, per_second = self.moments
        known = times.drop_nulls().sort()
        distinct = known.unique().sort()
        if len(distinct) < 3:
            return False
        first, second = (int(distinct.search_sorted(int(known[int(q * (len(known) - 1))]))) for q in (0.8, 0.9))
        low = min(max(first, 1), len(distinct) - 2)  # no split may be empty
        high = min(max(second, low + 1), len(distinct) - 1)
        cuts = [self._moment(int(distinct[i])) for i in (low, high)]
        self.split = {"kind": "time", "valid_from": cuts[0], "test_from": cuts[1]}
        self.split_why = "80 % of the rows train, the next 10 % validate, the last 10 % test"
        if times.null_count():
            self.keep = f"{sql_name(self.time)} IS NOT NULL"
        bounds = [instant(c, per_second) for c in cuts]
        self.train, self.test = (times < bounds[0]).fill_null(False), (times >= bounds[1]).fill_null(False)
        return True

    def _split_by_user(self) -> None:
        why = f"`{self.time}` has too few different times" if self.time else "no time column was found"
        self.split_why = f"{why}: whole users of `{self.user}` go to one split"
        if not self.user:
            self.user_sql = self._identity()
            self.split_why = "neither time nor user was found: rows are split by what stands for the user above"
        user = expression(self.user_sql, self.frame.schema, "user").cast(pl.String)
        text = self.frame.select(u=user)["u"]
        for seed in range(100):  # a small table may leave a split empty by chance
            draw = stable_uniform(text, seed)
            self.train, self.test = (draw >= 0.2).fill_null(False), (draw < 0.1).fill_null(False)
            if self.train.any() and self.test.any() and ((draw >= 0.1) & (draw < 0.2)).any():
                break
        self.split = {"kind": "user", "valid": 0.1, "test": 0.1, "seed": seed}

    def _moment(self, value: int) -> str | int:
        """A time as the run file says it: a number in the column's unit, or ISO for dates."""
        if _dtype(self.time_sql, self.frame.schema).is_integer():
            return value
        moment = calendar(value, self.moments[1])
        return moment.isoformat() if moment.time() != dt.time() else moment.date().isoformat()

    def _identity(self) -> str:
        """Something that tells rows apart, where there is no user: a column, else all columns as one text."""
        flat = [c for c in self._candidates() if not c.nested]
        flat = [c for c in flat if not (c.names_rows and c.exact)] or flat  # such a column is no user
        if not flat:
            raise ValueError("There is no column besides the labels.")
        best = max(flat, key=lambda c: c.distinct)
        if best.distinct >= min(UNIQUE * self.total, 1_000) and best.exact:
            return best.name
        return f"CONCAT_WS('|', {', '.join(sql_name(c.name) for c in flat)})"

    # -------------------------------------------------------------------------------------------------------- features
    def _feature(self, column: Column) -> Guess:
        guess = _kind(column)
        guess.out = self._why_out(column, guess)
        return guess

    def _why_out(self, c: Column, guess: Guess) -> str:
        """The reason to leave a column out, or an empty string."""
        if c.distinct < 2:
            return "it has one value" if c.distinct else "it is empty"
        if c.name == self.split.get("column"):
            return "it says which split a row is in"
        if c.own and c.name != self.user and not c.nested:
            if c.flag and c.named(FEEDBACK | FLAGS):
                return "binary and named like feedback; take it in only if it is known before the event"
            if c.named(DURING) and c.dtype.is_numeric():
                return "named like something that is measured during or after the event"
        if guess.out:  # a type that no kind reads
            return guess.out
        if c.name == self.user and self.split["kind"] == "user":
            return "users of the validation and test splits are not in training"
        each = EACH if guess.feature["kind"] == "id" and c.unique else ""
        return self._leak(c, guess) or self._tells_time(c) or each

    def _leak(self, c: Column, guess: Guess) -> str:
        """Does this column alone, or whether it is filled, tell a label?"""
        for label, known, yes in () if c.nested else self.positives():
            usable = known & self.train if self.train.any() else known
            values, y = c.values.filter(usable), yes.filter(usable).to_numpy()
            if min(y.sum(), (~y).sum()) < 20:
                continue
            score = single_auc(values, y, guess.feature["kind"] == "number")
            if score > SURE:
                return f"alone it tells `{label}` (AUC {score:.3f} in the training rows): it looks like an outcome"
            filled = single_auc(values.is_not_null(), y, True)
            if filled > SURE:
                return f"whether it is filled tells `{label}` (AUC {filled:.3f}): it looks like an outcome"
        return ""

    def _tells_time(self, c: Column) -> str:
        """Does the column tell when the row happened?  Then test values are new, or a clock that training never saw."""
        if c.dtype.is_temporal():
            age = '(column = "an SQL expression", kind = "number")'
            return f"a point in time; an age in seconds would be a feature {age}"
        if c.dtype.is_numeric() and c.named(TIMES) and unit_of(c.values):
            return "a point in time as a number; an age would be a feature"
        if c.named(DAYS) and (c.dtype == pl.String or c.distinct > 2) and _is_day(c.values):
            return "a date: as an id, it would mean nothing for later dates, and tell test rows from training rows"
        if self.split["kind"] == "time" and c.own and c.dtype.is_integer() and self.test.any() and c.name != self.user:
            train, test = (c.values.filter(part).drop_nulls() for part in (self.train, self.test))
            new = 1.0 - _mean(test.is_in(train.unique().implode())) if len(test) else 0.0
            if new > SURE and abs(_rank_correlation(c.values, self.moments[0])) > 0.99:
                return "it grows with time, so that test values never occur in training"
        return ""

    def _guess_item(self) -> Guess | None:
        """The id column of the rows that names what is recommended: named so, and with the most values."""
        ids = [g for g in self.features if not g.out and g.feature["kind"] == "id"]
        mine = [g for g in ids if g.column.own and g.column.name != self.user]
        named = [g for g in mine if g.column.named(ITEMS) and g.column.distinct > 20]
        best = [g for g in named if g.column.name.lower().endswith(("id", "sku", "asin")) or len(g.column.words) == 1]
        return max(best or named, key=lambda g: g.column.distinct, default=None)

    def _share_vocabularies(self) -> None:
        """A bag whose members are items reads the item's table."""
        item = self.item
        if item is None:
            return
        bags = [g for g in self.features if g.feature["kind"] == "bag" and isinstance(g.column.dtype, pl.List)]
        for bag in bags:
            inside = _inside(bag.column.values, item.column.values)
            if inside > 0.5:
                bag.feature.pop("min_count", None)
                bag.feature |= {"vocabulary": item.feature["name"], **item.least}
                bag.why += f"; {inside:.0%} of its values are values of `{item.column.name}`"


# ---------------------------------------------------------------------------------------------------- kinds of columns
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


def safe(name: str) -> str:
    """A name that a run file allows."""
    return re.sub(r"[./]", "_", name) or "unnamed"


def sql_name(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def of_column(name: str, kind: str, **keys: Any) -> dict[str, Any]:
    """The inline table of a task or feature that reads a column."""
    return {"name": safe(name)} | ({"column": name} if safe(name) != name else {}) | {"kind": kind} | keys


def _task(c: Column) -> tuple[str, str]:
    """The kind of a label and why it is of that kind.  Raises ValueError for one that teaches nothing."""
    values, n = c.values, c.distinct
    nans = values.is_nan().sum() if c.dtype.is_float() else 0
    if nans:
        raise ValueError(f"Label `{c.name}`: {nans:,} values are NaN. Write nulls for labels that are not known.")
    if n < 2 or c.nested or c.dtype.is_temporal():
        found = "lists" if c.nested else str(c.dtype) if n > 1 else f"{n} distinct value(s)"
        raise ValueError(f"Label `{c.name}` should have two values or more, of numbers or words. Found {found}.")
    missing = values.null_count() / len(values)
    note = f"; {missing:.1%} are null, that is unobserved" if missing else ""
    if c.flag:
        return "binary", f"0 or 1, {_mean(values.cast(pl.Float64)):.2%} are 1{note}"
    if not c.dtype.is_numeric() or (c.dtype.is_integer() and n <= 20):
        return "multiclass", f"{n} classes{note}"
    return "real", f"numbers, {n:,} distinct{note}"


def _kind(c: Column) -> Guess:
    """What kind of feature a column would be."""
    if isinstance(c.dtype, pl.List | pl.Array):
        return _list_kind(c)
    if c.dtype.is_numeric():
        return _number_kind(c)
    if c.dtype == pl.String and (mark := _separator(c.values)):
        members = int(c.values.str.split(mark).explode().n_unique())
        feature = of_column(c.name, "bag", separator=mark, **_least(members))
        return Guess(c, feature, f"bag: lists of {members:,} distinct words")
    if c.dtype == pl.Binary or (c.dtype == pl.String and _mean(c.values.str.contains(PICTURES)) > SURE):
        return Guess(c, of_column(c.name, "image"), "pictures", "pictures: take it in and set `model.images`")
    if c.dtype == pl.String and _mean(c.values.str.len_chars()) > 40 and c.distinct > MANY:
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
        text = f"bag: lists of {members:,} distinct values, {_mean(lengths):.1f} on average"
        text += " (make sure that it is a list that ends before the row's event)" if c.own else ""
        return Guess(c, of_column(c.name, "bag", **_least(members)), text)
    return Guess(c, of_column(c.name, "bag"), str(c.dtype), _unread(c))


def _number_kind(c: Column) -> Guess:
    """An id or a number: names and the number of distinct values decide."""
    values, floats = c.values.drop_nulls(), c.dtype.is_float()
    nans = int(values.is_nan().sum()) if floats else 0
    if floats and values.is_infinite().any():
        return Guess(c, of_column(c.name, "number"), "number", "it holds infinity; filter or replace it")
    clean = values.filter(values.is_finite()) if floats else values
    whole = not floats or (not nans and bool((clean == clean.round()).all()))
    named = bool(set(c.words[-1:]) & IDS) or c.name.lower().endswith("id") or c.named({"id", "ids"})
    few = c.distinct <= 100 and c.distinct * 5 <= c.rows
    if whole and (named or few):
        return _id(c, "" if few else ", named like an id")
    if not floats and c.unique and c.own:
        return Guess(c, of_column(c.name, "number"), "number", EACH)
    skew = float(clean.cast(pl.Float64).skew() or 0.0)
    keys = ({"transform": "log1p"} if abs(skew) > 2 else {}) | ({"nan": "missing"} if nans else {})
    why = f"number: {c.distinct:,} distinct values" + (f", skewed ({skew:.1f})" if abs(skew) > 2 else "")
    return Guess(c, of_column(c.name, "number", **keys), why + (f"; {nans:,} NaN" if nans else ""))


def _inside(bags: pl.Series, items: pl.Series) -> float:
    """The share of the bags' distinct members that are items."""
    members = bags.explode(empty_as_null=False, keep_nulls=False).drop_nulls().unique()
    known = items.unique().drop_nulls()
    if members.dtype.is_integer() != known.dtype.is_integer():
        return 0.0
    return _mean(members.cast(known.dtype, strict=False).is_in(known.implode()))


def _mean(values: pl.Series) -> float:
    """The mean, 0 of nothing."""
    found = values.mean()
    return float(found) if isinstance(found, int | float) else 0.0


def _separator(values: pl.Series) -> str:
    """The character that splits texts into lists, or an empty string: fewer pieces than texts, all of them short."""
    known = values.drop_nulls()
    for mark in (",", "|", ";"):
        share = _mean(known.str.contains(mark, literal=True))
        if share >= 0.01:
            parts = known.str.split(mark).explode()
            fewer = parts.n_unique() < known.n_unique()
            if fewer and _mean(parts.str.len_chars()) <= 24 and not parts.str.starts_with(" ").any():
                return mark
    return ""


# ---------------------------------------------------------------------------------------------------------------- time
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


def _read_time(c: Column, given: bool) -> tuple[str, str, str] | None:
    """(SQL, unit, explanation) of a column read as a time, or None."""
    if c.dtype in (pl.Datetime, pl.Date):
        return c.name, "us", "a date" if c.dtype == pl.Date else "a date-time"
    if c.dtype.is_numeric():
        unit, whole = unit_of(c.values), c.dtype.is_integer()
        if whole and c.named({"hour"}) and _is_hour(c.values):
            return f"STRPTIME(CONCAT('20', {sql_name(c.name)}, '00'), '%Y%m%d%H%M')", "us", "hours written as YYMMDDHH"
        if not unit and not (whole and (given or c.words in (["time"], ["timestamp"], ["ts"]))):
            return None
        text = f"integers of the size of {unit} since 1970" if unit else "integers of an unknown unit, read as seconds"
        return (c.name if whole else f"CAST({sql_name(c.name)} AS BIGINT)"), unit or "s", text
    known = c.values.drop_nulls()
    for form in FORMATS if c.dtype == pl.String and len(known) else ():
        sql = f"STRPTIME({sql_name(c.name)}, '{form}')"
        if not _misread(known, form) and not pl.select(known).select(pl.sql_expr(sql).is_null().any()).item():
            return sql, "us", f"text, read as {form}"
    return None


def _misread(texts: pl.Series, form: str) -> int:
    """How many of the first hundred texts are no times of that form."""
    return texts.head(100).str.to_datetime(form, strict=False).null_count()


def _is_hour(values: pl.Series) -> bool:
    """Are these hours as 14102123, of 21 October 2014?"""
    known = values.drop_nulls()
    if not len(known) or _is_day(values):
        return False
    text = ("20" + known.unique().cast(pl.String) + "00").str
    return not text.to_datetime("%Y%m%d%H%M", strict=False).null_count()


def _is_day(values: pl.Series) -> bool:
    """Are these calendar days, as texts or as 20220425?"""
    known = values.drop_nulls()
    if values.dtype.is_integer():
        return bool(((known >= 19800101) & (known <= 21281231)).all())
    return values.dtype == pl.String and any(_misread(known, form) < 0.1 * min(len(known), 100) for form in FORMATS)


# --------------------------------------------------------------------------------------------------------------- leaks
def single_auc(values: pl.Series, yes: np.ndarray, number: bool) -> float:
    """How well one column ranks a label, from 0.5 to 1.

    Args:
        values: (n,) of any flat type; yes: (n,) bool.
        number: rank by the value (nulls below all); else by the label's mean per value, learnt on every other row and
            measured on the rest, so that rare values cannot tell their own label.
    """
    if number:
        score = values.cast(pl.Float64).fill_nan(None)
        low = float(score.min() or 0.0) - 1.0  # type: ignore[arg-type]
        found = _auc(score.fill_null(low).to_numpy(), yes)
        return max(found, 1.0 - found)
    frame = pl.DataFrame({"v": values, "y": yes.astype(float)})
    learn, measure = frame.gather_every(2), frame.gather_every(2, 1)
    means = learn.group_by("v").agg(m=(pl.col("y").sum() + yes.mean()) / (pl.len() + 1))
    scored = measure.join(means, on="v", how="left", nulls_equal=True, maintain_order="left")
    return _auc(scored["m"].fill_null(float(yes.mean())).to_numpy(), scored["y"].to_numpy() > 0)


def _auc(score: np.ndarray, yes: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half; 0.5 if there is only one class."""
    positives, negatives = int(yes.sum()), int((~yes).sum())
    if not positives or not negatives:
        return 0.5
    ranks = pl.Series(score).rank("average").to_numpy()
    return float((ranks[yes].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _rank_correlation(a: pl.Series, b: pl.Series) -> float:
    frame = pl.DataFrame({"a": a.cast(pl.Float64), "b": b.cast(pl.Float64)}).drop_nulls()
    return float(frame.select(pl.corr("a", "b", method="spearman")).item() or 0.0)
