"""A first run file from a look at the columns: every guess is written with its reason, nothing is silently dropped.

A column that should not be a feature stays in the file as a commented-out line that says why; deleting the ``#`` takes
it in.  The reasons that matter most are leaks: columns that are outcomes of the same event as the label, and columns
that tell test rows from training rows.
"""

from __future__ import annotations

import datetime as dt
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from unbraid.data.source import _dtype, expression, instant, scan, stable_uniform, to_time
from unbraid.data.vocabulary import canonical

SAMPLE = 200_000  # rows that are looked at; the number of rows, keys and boundaries of small tables are exact
LARGE = 5_000_000  # above this, exact duplicates are not counted
SURE = 0.95  # a single column that ranks a label so well is taken for an outcome
UNIQUE = 0.9  # distinct values per row from which a column identifies rows
MANY = 1_000  # ids with more distinct values get min_count 2
LENGTH = 50  # of the history

# Words of column names
USERS = set("user users uid member customer visitor client reviewer consumer buyer person account".split())
ITEMS = set(
    """
    item items iid video product movie song track goods article news sku ad doc content book poi business
    post photo listing game app recipe show asin
    """.split()
)
TIMES = set("time timestamp ts datetime date day created at dt unix".split())
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
)
DAY_FORMATS = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%Y%m%d")
UNITS = (("s", 3e8, 5e9), ("ms", 3e11, 5e12), ("us", 3e14, 5e15), ("ns", 3e17, 5e18))  # 1980 to 2128 in each unit
PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
SUFFIXES = (".parquet", ".csv")


def infer(path: Path, labels: Sequence[str], *, user: str = "", time: str = "", domain: str = "") -> str:
    """A commented run file.

    Args:
        path: a Parquet or CSV file, or a folder of them: the largest table that has the labels holds the rows, tables
            with a unique key that the rows have are joined, files of one schema are one table.
        labels: label columns, one task each.
        user, time, domain: columns with these roles; user and time are guessed if empty.

    Returns:
        TOML that `unbraid.config.load` reads.

    Raises:
        ValueError: there is no table, no such column (the message says what there is), or a label of one value.
    """
    if not labels:
        raise ValueError("At least one label column is needed (`--label is_click`). Found none.")
    try:
        look = _Look(Path(path), list(dict.fromkeys(labels)), {"user": user, "time": time, "domain": domain})
        return _write(look)
    except PolarsError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


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
        raise ValueError(f"{path} should be a Parquet or CSV file or a folder of them. Found neither.")
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


@dataclass
class _Column:
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
    words: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def flag(self) -> bool:
        """Are its values 0 and 1, or false and true?"""
        return self.distinct == 2 and (self.dtype == pl.Boolean or _is_zero_one(self.values))


def _is_zero_one(values: pl.Series) -> bool:
    return values.dtype.is_numeric() and bool(values.drop_nulls().cast(pl.Float64).is_in([0.0, 1.0]).all())


def _words(name: str) -> list[str]:
    """``userId2`` is user, id, 2."""
    return [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+", name)]


class _Look:
    """Everything that is read and guessed, in the order in which it is needed.

    Attributes:
        frame: a sample of the rows with joined columns; total: number of rows; columns: name -> `_Column`.
        joins: (table, key); unused: (table, why).
        user, time, domain: column names, "" for none; time_sql, time_unit: how the run file reads the time.
        train, test: (n,) bool, rows of the sample by the split.
    """

    def __init__(self, path: Path, labels: list[str], roles: Mapping[str, str]) -> None:
        self.path, self.labels, self.roles = path, labels, roles
        self.folder, self.tables = find_tables(path)
        self.plans = {t: scan(str(self.folder), t, Path()) for t in self.tables}
        self.table = self._rows_table()
        plan = self.plans[self.table]
        self.own = plan.collect_schema().names()
        self.total = plan.select(pl.len()).collect(engine="streaming").item()
        if not self.total:
            raise ValueError(f"{self.table} has no rows.")
        self.step = -(-self.total // SAMPLE)
        self.frame = (plan.gather_every(self.step) if self.step > 1 else plan).collect(engine="streaming")
        self.duplicates = self.total - plan.unique().select(pl.len()).collect().item() if self.total <= LARGE else 0
        self.joins: list[tuple[str, str]] = []
        self.unused: list[tuple[str, str]] = []
        self._join()
        for role, name in roles.items():
            if name:
                self._require(name, f"--{role}", self.frame.columns if role == "domain" else self.own)
        self.columns = self._columns()
        self.label_values = {name: self._label(name) for name in labels}
        self.user = roles["user"] or self._guess_user()
        self.domain = roles["domain"]
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
            self._require(label, "--label", [c for names in have.values() for c in names])
        whole = [t for t, names in have.items() if set(self.labels) <= set(names)]
        if not whole:
            where = "; ".join(
                f"{t}: {', '.join(x for x in self.labels if x in n)}"
                for t, n in have.items()
                if set(n) & set(self.labels)
            )
            raise ValueError(f"All labels should be columns of one table. Found {where}.")
        return max(whole, key=lambda t: self.plans[t].select(pl.len()).collect(engine="streaming").item())

    def _require(self, name: str, option: str, have: Sequence[str]) -> None:
        if name not in have:
            near = difflib.get_close_matches(name, have, n=1, cutoff=0.5)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"{option}: there is no column `{name}`.{hint} Columns: {', '.join(dict.fromkeys(have))}.")

    def _join(self) -> None:
        """Join what can be joined, again and again: a joined table may bring the key of another."""
        waiting = [t for t in self.tables if t != self.table]
        before = -1
        while len(waiting) != before:
            before = len(waiting)
            waiting = [t for t in waiting if not self._join_one(t)]
        for table in waiting:
            self.unused.append((table, self._why_not(table)))

    def _join_one(self, table: str) -> bool:
        right, have = self.plans[table], self.frame.schema
        schema = right.collect_schema()
        shared = [c for c in schema if c in have]
        if len(shared) != 1 or not self._unique(table, shared[0]):
            return False
        key = shared[0]
        sides = [
            p.with_columns(canonical(pl.col(key), s[key])) for p, s in ((self.frame.lazy(), have), (right, schema))
        ]
        if sides[0].collect_schema()[key] != sides[1].collect_schema()[key]:
            return False
        self.frame = sides[0].join(sides[1], on=key, how="left", maintain_order="left").collect()
        self.joins.append((table, key))
        return True

    def _unique(self, table: str, key: str) -> bool:
        rows, keys = self.plans[table].select(n=pl.len(), k=pl.col(key).n_unique()).collect().row(0)
        return rows == keys

    def _why_not(self, table: str) -> str:
        schema = self.plans[table].collect_schema()
        shared = [c for c in schema if c in self.frame.columns]
        keys = [c for c in shared if self._unique(table, c)]
        if not shared:
            return "it has no column of the rows"
        if not keys:
            return (
                f"none of the shared columns ({', '.join(shared)}) has one row per value: it may hold events (`events`)"
            )
        if len(shared) > 1:
            others = ", ".join(c for c in shared if c != keys[0])
            return f"it could be joined on {keys[0]}, but both sides also have {others}: rename them"
        return f"{keys[0]} has another type there"

    # --------------------------------------------------------------------------------------------------------- columns
    def _columns(self) -> dict[str, _Column]:
        many: dict[str, int] = {}
        if self.step > 1:  # a sample of a log would make every user look unique
            flat = [c for c in self.own if not self.frame.schema[c].is_nested()]
            many = (
                self.plans[self.table]
                .select(pl.col(flat).approx_n_unique())
                .collect(engine="streaming")
                .row(0, named=True)
            )
        out = {}
        for name in self.frame.columns:
            values = self.frame[name]
            known = values.drop_nulls()
            distinct = 0 if not len(known) else 2 if values.dtype.is_nested() else int(known.n_unique())
            rows = len(known) * (self.step if name in many else 1)
            out[name] = _Column(name, values, name in self.own, max(distinct, many.get(name, 0)), rows, _words(name))
        return out

    def _label(self, name: str) -> dict[str, Any]:
        """The task of a label column and why it is of that kind.  Raises ValueError for one that teaches nothing."""
        column = self.columns[name]
        values, n = column.values, column.distinct
        if values.dtype.is_float() and values.is_nan().any():
            raise ValueError(
                f"Label `{name}`: {values.is_nan().sum():,} values are NaN. Write nulls for labels that are not known."
            )
        if n < 2 or values.dtype.is_nested() or values.dtype.is_temporal():
            found = "lists" if values.dtype.is_nested() else str(values.dtype) if n > 1 else f"{n} distinct value(s)"
            raise ValueError(f"Label `{name}` should have two values or more, of numbers or words. Found {found}.")
        missing = values.null_count() / len(values)
        note = f"; {missing:.1%} are null, that is unobserved" if missing else ""
        if column.flag:
            return {"kind": "binary", "why": f"0 or 1, {_mean(values.cast(pl.Float64)):.2%} are 1{note}"}
        if not values.dtype.is_numeric() or (values.dtype.is_integer() and n <= 20):
            return {"kind": "multiclass", "why": f"{n} classes{note}"}
        return {"kind": "real", "why": f"numbers, {n:,} distinct{note}"}

    def _binary(self) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
        """(label, (n,) bool known, (n,) bool positive): labels as yes or no, for the search for leaks."""
        for name in self.labels:
            values, kind = self.frame[name], self.label_values[name]["kind"]
            if kind == "binary":
                yes = values.cast(pl.Float64) == 1
            elif kind == "real":
                yes = values > values.median()
            else:
                yes = values == values.drop_nulls().mode().sort()[0]
            yield name, values.is_not_null().to_numpy(), yes.fill_null(False).to_numpy()

    # --------------------------------------------------------------------------------------------------- user and time
    def _guess_user(self) -> str:
        """The column named like a user; among equals the one with the most values."""
        best: tuple[int, int, str] = (0, 0, "")
        for name in self.own:
            c = self.columns[name]
            named = bool(USERS & set(c.words)) or name.lower().startswith(("user", "uid"))
            if (
                named
                and name not in self.labels
                and c.distinct > 10
                and not c.dtype.is_float()
                and not c.dtype.is_nested()
            ):
                simple = "".join(c.words) in {"user", "userid", "uid", "member", "memberid", "customerid", "visitorid"}
                ends = name.lower().endswith(("id", "key", "hash"))
                best = max(best, (3 if simple else 2 if ends else 1, c.distinct, name))
        return best[2]

    def _time(self, given: str) -> None:
        """Choose the time column.  Raises ValueError when the given one cannot be read as a time."""
        self.time, self.time_sql, self.time_unit, self.time_why = "", "", "ms", ""
        best: tuple[int, str] = (1, "")
        read = {}
        for name in [given] if given else self.own:
            c = self.columns[name]
            named = bool((TIMES - {"at"}) & set(c.words)) or c.words[-1:] == ["at"] or c.dtype.is_temporal()
            if given or (named and name not in (*self.labels, self.user) and not DURING & set(c.words)):
                read[name] = _read_time(c, bool(given))
                if read[name] is not None and c.distinct > best[0]:
                    best = (c.distinct, name)
        if given and read.get(given) is None:
            raise ValueError(
                f"--time: `{given}` should hold integers, dates or ISO texts. Found {self.columns[given].dtype}."
            )
        if best[1] or given:
            self.time = best[1] or given
            self.time_sql, self.time_unit, self.time_why = read[self.time]  # type: ignore[misc]

    def moments(self) -> tuple[pl.Series, float]:
        """The sample's times as integers and how many make a second."""
        schema = self.frame.schema
        expr, per_second = to_time(
            expression(self.time_sql, schema, "time"),
            _dtype(self.time_sql, schema),
            self.time_unit,
            f"Column `{self.time}`",
        )
        return self.frame.select(t=expr)["t"], per_second

    def _split(self) -> None:
        """By a column that says so, else by time, else by user, else by whatever identifies rows."""
        n = len(self.frame)
        self.train, self.test, self.keep = np.ones(n, bool), np.zeros(n, bool), ""
        if self._split_by_column() or (self.time and self._split_by_time()):
            return
        unit = self.user
        self.split_why = f"no time column was found: whole users of `{unit}` go to one split"
        if self.time:
            self.split_why = f"`{self.time}` has too few different times: whole users of `{unit}` go to one split"
        if not unit:
            unit = self._identity()
            self.split_why = "neither time nor user was found: rows are split by what stands for the user above"
        self.user_sql = unit
        text = self.frame.select(u=expression(unit, self.frame.schema, "user").cast(pl.String))["u"]
        for seed in range(100):  # a small table may leave a split empty by chance
            draw = stable_uniform(text, seed).to_numpy()
            if min((draw < 0.1).sum(), ((draw >= 0.1) & (draw < 0.2)).sum(), (draw >= 0.2).sum()):
                break
        self.train, self.test = draw >= 0.2, draw < 0.1
        self.split = {"kind": "user", "valid": 0.1, "test": 0.1, "seed": seed}

    def _split_by_column(self) -> bool:
        self.user_sql = self.user
        for name in self.own:
            values = self.frame[name]
            if values.dtype == pl.String and set(values.unique().to_list()) == {"train", "valid", "test"}:
                self.split, self.split_why = {"kind": "column", "column": name}, f"`{name}` says train, valid or test"
                self.train, self.test = (values == "train").to_numpy(), (values == "test").to_numpy()
                return True
        return False

    def _split_by_time(self) -> bool:
        """The last tenth of the rows tests and the tenth before validates, if the times are that fine."""
        times, per_second = self.moments()
        known = times.drop_nulls().sort()
        distinct = known.unique().sort()
        if len(distinct) < 3:
            return False
        first, second = (int(known[int(q * (len(known) - 1))]) for q in (0.8, 0.9))
        at = [int(distinct.search_sorted(t)) for t in (first, second)]
        low = min(max(at[0], 1), len(distinct) - 2)  # no split may be empty
        high = min(max(at[1], low + 1), len(distinct) - 1)
        cuts = [self._moment(int(distinct[i]), per_second) for i in (low, high)]
        self.split = {"kind": "time", "valid_from": cuts[0], "test_from": cuts[1]}
        self.split_why = "80 % of the rows train, the next 10 % validate, the last 10 % test"
        if times.null_count():
            self.keep = f"{_sql(self.time)} IS NOT NULL"
        bounds = [instant(c, per_second) for c in cuts]
        self.train = (times < bounds[0]).fill_null(False).to_numpy()
        self.test = (times >= bounds[1]).fill_null(False).to_numpy()
        return True

    def _moment(self, value: int, per_second: float) -> str | int:
        """A time as the run file says it: a number in the column's unit, or ISO for dates."""
        if _dtype(self.time_sql, self.frame.schema).is_integer():
            return value
        moment = dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=value / per_second * 1e6)
        return moment.isoformat() if moment.time() != dt.time() else moment.date().isoformat()

    def _identity(self) -> str:
        """Something that tells rows apart, where there is no user: a column, else all columns as one text."""
        flat = [c for c in self.own if c not in self.labels and not self.frame.schema[c].is_nested()]
        best = max(flat, key=lambda c: self.columns[c].distinct, default="")
        if (
            best
            and self.columns[best].distinct >= min(UNIQUE * self.total, 1_000)
            and not self.columns[best].dtype.is_float()
        ):
            return best
        if not flat:
            raise ValueError("There is no column besides the labels.")
        return f"CONCAT_WS('|', {', '.join(_sql(c) for c in flat)})"

    # -------------------------------------------------------------------------------------------------------- features
    def _feature(self, column: _Column) -> _Guess:
        guess = _kind(column)
        why = self._why_out(column, guess)
        if why:
            guess.out = why
        return guess

    def _why_out(self, c: _Column, guess: _Guess) -> str:
        """The reason to leave a column out, or an empty string."""
        name, words, nested = c.name, set(c.words), c.dtype.is_nested()
        if c.distinct < 2:
            return "it has one value" if c.distinct else "it is empty"
        if self.split["kind"] == "column" and name == self.split["column"]:
            return "it says which split a row is in"
        if c.own and name != self.user and not nested:
            if c.flag and (words & FEEDBACK or words & FLAGS):
                return "binary and named like feedback; take it in only if it is known before the event"
            if words & DURING and c.dtype.is_numeric():
                return "named like something that is measured during or after the event"
        if guess.out:  # a type that no kind reads
            return guess.out
        if name == self.user and self.split["kind"] == "user":
            return "users of the validation and test splits are not in training"
        if not nested:
            leak = self._leak(c, guess)
            if leak:
                return leak
        day = self._tells_time(c)
        if day:
            return day
        if (
            guess.feature["kind"] != "number"
            and not nested
            and guess.feature["kind"] != "bag"
            and c.distinct > UNIQUE * c.rows
        ):
            return "almost every row has its own value"
        return ""

    def _leak(self, c: _Column, guess: _Guess) -> str:
        """Does this column alone, or whether it is filled, tell a label?"""
        for label, known, yes in self._binary():
            usable = known & self.train if self.train.any() else known
            if min(yes[usable].sum(), (~yes[usable]).sum()) < 20:
                continue
            score = single_auc(c.values.filter(pl.Series(usable)), yes[usable], guess.feature["kind"] == "number")
            if score > SURE:
                return f"alone it tells `{label}` (AUC {score:.3f} in the training rows): it looks like an outcome"
            filled = _auc(c.values.is_not_null().to_numpy()[usable].astype(float), yes[usable])
            filled = max(filled, 1 - filled)
            if filled > SURE:
                return f"whether it is filled tells `{label}` (AUC {filled:.3f}): it looks like an outcome"
        return ""

    def _tells_time(self, c: _Column) -> str:
        """Does the column tell when the row happened?  Then test values are new, or a clock that training never saw."""
        if c.dtype.is_temporal():
            return (
                'a point in time; an age in seconds would be a feature (column = "an SQL expression", kind = "number")'
            )
        if c.dtype.is_numeric() and set(c.words) & TIMES and _unit(c.values):
            return "a point in time as a number; an age would be a feature"
        if set(c.words) & DAYS and (c.dtype == pl.String or c.distinct > 2) and (_is_day(c.values)):
            return "a date: as an id, it would mean nothing for later dates, and tell test rows from training rows"
        if (
            self.split["kind"] != "time"
            or not c.own
            or c.dtype.is_nested()
            or not self.test.any()
            or c.name == self.user
        ):
            return ""
        train, test = (c.values.filter(pl.Series(m)).drop_nulls() for m in (self.train, self.test))
        new = 1.0 - _mean(test.is_in(train.unique().implode())) if len(test) else 0.0
        if new > SURE and c.dtype.is_integer() and abs(_rank_correlation(c.values, self.moments()[0])) > 0.99:
            return "it grows with time, so that test values never occur in training"
        return ""

    def _guess_item(self) -> str:
        """The id column of the rows that names what is recommended: named so, and with the most values."""
        found = [
            g
            for g in self.features
            if not g.out and g.feature["kind"] == "id" and g.column.own and g.column.name != self.user
        ]
        named = [g for g in found if ITEMS & set(g.column.words) and g.column.distinct > 20]
        ids = [g for g in named if g.column.name.lower().endswith(("id", "sku", "asin")) or len(g.column.words) == 1]
        return max(ids or named, key=lambda g: g.column.distinct).column.name if ids or named else ""

    def _share_vocabularies(self) -> None:
        """A bag whose members are items reads the item's table."""
        if not self.item:
            return
        item = next(g for g in self.features if g.column.name == self.item)
        known = item.column.values.unique().drop_nulls()
        for g in self.features:
            values = g.column.values
            if g.feature.get("kind") == "bag" and isinstance(values.dtype, pl.List):
                members = values.explode(empty_as_null=False, keep_nulls=False).drop_nulls().unique()
                if members.dtype.is_integer() == known.dtype.is_integer() and len(members):
                    inside = _mean(members.cast(known.dtype, strict=False).is_in(known.implode()))
                    if inside > 0.5:
                        g.feature.pop("min_count", None)
                        least = {"min_count": item.feature["min_count"]} if "min_count" in item.feature else {}
                        g.feature |= {"vocabulary": item.feature["name"], **least}
                        g.why += f"; {inside:.0%} of its values are values of `{self.item}`"


# ---------------------------------------------------------------------------------------------------- kinds of columns
@dataclass
class _Guess:
    """A feature line: the inline table, what it is, and why it is commented out (empty: it is not)."""

    column: _Column
    feature: dict[str, Any]
    why: str
    out: str = ""


def _kind(c: _Column) -> _Guess:
    """What kind of feature a column would be."""
    name = re.sub(r"[./]", "_", c.name) or "unnamed"
    base: dict[str, Any] = {"name": name} | ({"column": c.name} if name != c.name else {})
    if isinstance(c.dtype, pl.List | pl.Array):
        return _list_kind(c, base)
    if c.dtype == pl.String and (separator := _separator(c.values)):
        members = int(c.values.str.split(separator).explode().n_unique())
        return _Guess(
            c,
            base | {"kind": "bag", "separator": separator} | _least(members),
            f"bag: lists of {members:,} distinct words",
        )
    if c.dtype == pl.String and _mean(c.values.str.len_chars()) > 40 and c.distinct > MANY:
        return _Guess(c, base | {"kind": "id"}, "text", "long texts; embed them first and join a vector")
    if c.dtype in (pl.String, pl.Boolean, pl.Categorical, pl.Enum):
        return _Guess(c, base | {"kind": "id"} | _least(c.distinct), f"id: {c.distinct:,} distinct values")
    if c.dtype.is_numeric():
        return _number_kind(c, base)
    reason = "" if c.dtype.is_temporal() else f"no kind of feature reads {c.dtype}"
    return _Guess(c, base | {"kind": "id"}, str(c.dtype), reason)


def _list_kind(c: _Column, base: dict[str, Any]) -> _Guess:
    values = c.values.arr.to_list() if isinstance(c.dtype, pl.Array) else c.values
    inner, lengths = values.dtype.inner, values.drop_nulls().list.len()  # type: ignore[attr-defined]
    if inner.is_float():
        widths = lengths.unique().to_list()
        flat = values.drop_nulls().explode()
        clean = len(widths) == 1 and widths[0] and not flat.null_count() and bool(flat.is_finite().all())
        text = f"vector: lists of {widths[0]} numbers" if len(widths) == 1 else "lists of numbers"
        return _Guess(
            c,
            base | {"kind": "vector"},
            text,
            "" if clean else "its lists differ in length or hold nulls, NaN or infinity",
        )
    if inner.is_integer() or inner in (pl.String, pl.Boolean, pl.Categorical):
        members = int(values.explode().n_unique())
        text = f"bag: lists of {members:,} distinct values, {_mean(lengths):.1f} on average"
        own = " that ends before the row's event" if c.own else ""
        return _Guess(
            c, base | {"kind": "bag"} | _least(members), text + (f" (make sure that it is a list{own})" if own else "")
        )
    return _Guess(c, base | {"kind": "bag"}, str(c.dtype), f"no kind of feature reads {c.dtype}")


def _number_kind(c: _Column, base: dict[str, Any]) -> _Guess:
    """An id or a number: names and the number of distinct values decide."""
    values = c.values.drop_nulls()
    floats = c.dtype.is_float()
    nans = int(values.is_nan().sum()) if floats else 0
    if floats and int(values.is_infinite().sum()):
        return _Guess(c, base | {"kind": "number"}, "number", "it holds infinity; filter or replace it")
    clean = values.filter(values.is_finite()) if floats else values
    whole = not floats or (not nans and bool((clean == clean.round()).all()))
    named = bool(set(c.words[-1:]) & IDS) or c.name.lower().endswith("id") or bool({"id", "ids"} & set(c.words))
    few = c.distinct <= 100 and c.distinct * 5 <= c.rows
    if whole and (named or few):
        reason = ", named like an id" if named and not few else ""
        return _Guess(c, base | {"kind": "id"} | _least(c.distinct), f"id: {c.distinct:,} distinct values{reason}")
    if not floats and c.distinct > UNIQUE * c.rows and c.own:
        return _Guess(c, base | {"kind": "number"}, "number", "almost every row has its own value")
    skew = float(clean.cast(pl.Float64).skew() or 0.0)
    feature = base | {"kind": "number"} | ({"transform": "log1p"} if abs(skew) > 2 else {})
    feature |= {"nan": "missing"} if nans else {}
    why = f"number: {c.distinct:,} distinct values" + (f", skewed ({skew:.1f})" if abs(skew) > 2 else "")
    return _Guess(c, feature, why + (f"; {nans:,} NaN" if nans else ""))


def _mean(values: pl.Series) -> float:
    """The mean, 0 of nothing."""
    found = values.mean()
    return float(found) if isinstance(found, int | float) else 0.0


def _least(distinct: int) -> dict[str, int]:
    return {"min_count": 2} if distinct > MANY else {}


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
def _unit(values: pl.Series) -> str:
    """The unit in which numbers are times between 1980 and 2128, or an empty string."""
    known = values.drop_nulls()
    if not len(known) or not known.dtype.is_numeric():
        return ""
    low, high = float(known.min()), float(known.max())  # type: ignore[arg-type]
    return next((unit for unit, least, most in UNITS if least <= low and high <= most), "")


def _read_time(c: _Column, given: bool) -> tuple[str, str, str] | None:
    """(SQL, unit, explanation) of a column read as a time, or None."""
    if c.dtype in (pl.Datetime, pl.Date):
        return c.name, "us", "a date" if c.dtype == pl.Date else "a date-time"
    if c.dtype.is_numeric():
        unit = _unit(c.values)
        if not unit and not ((given or c.words in (["time"], ["timestamp"], ["ts"])) and c.dtype.is_integer()):
            return None
        text = f"integers of the size of {unit} since 1970" if unit else "integers of an unknown unit, read as seconds"
        return (c.name if c.dtype.is_integer() else f"CAST({_sql(c.name)} AS BIGINT)"), unit or "s", text
    if c.dtype != pl.String or not len(c.values.drop_nulls()):
        return None
    known = c.values.drop_nulls()
    for form in (*FORMATS, *DAY_FORMATS):
        if not known.head(100).str.to_datetime(form, strict=False).null_count():
            sql = f"STRPTIME({_sql(c.name)}, '{form}')"
            if not pl.select(known).select(pl.sql_expr(f"STRPTIME({_sql(c.name)}, '{form}')").is_null().any()).item():
                return sql, "us", f"text, read as {form}"
    return None


def _is_day(values: pl.Series) -> bool:
    """Are these calendar days, as texts or as 20220425?"""
    known = values.drop_nulls()
    if values.dtype.is_integer():
        return bool(((known >= 19800101) & (known <= 21281231)).all())
    if values.dtype != pl.String:
        return False
    head = known.head(100)
    return any(
        head.str.to_datetime(form, strict=False).null_count() < 0.1 * len(head) for form in (*DAY_FORMATS, *FORMATS)
    )


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


# ------------------------------------------------------------------------------------------------------------- writing
def _sql(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def _toml(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # JSON's texts, numbers and booleans are TOML's


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _comment(text: str) -> str:
    return "# " + " ".join(text.split())  # a name with a line break must not end the comment


def _write(look: _Look) -> str:
    """The run file."""
    name = re.sub(r"\W+", "_", look.path.resolve().stem).strip("_") or "run"
    seen = f"all {look.total:,} rows" if look.step == 1 else f"every {look.step}th of {look.total:,} rows"
    lines = [
        _comment(f"Written by `unbraid init` from a look at {seen} of {look.table}. Comments say why."),
        "# Check what was left out below, then: unbraid data describe THIS_FILE; unbraid train THIS_FILE",
        f"name = {_toml(name)}", "", "[data]", *_data_keys(look), "", *_array("tasks", _tasks(look)),
        "", *_array("features", _features(look)), *_histories(look), "", "[data.split]  " + _comment(look.split_why),
    ]  # fmt: skip
    lines += [f"{k} = {_toml(v)}{_when(look, v)}" for k, v in look.split.items()]
    return "\n".join([*lines, "", *_model(look)]) + "\n"


def _data_keys(look: _Look) -> Iterable[str]:
    yield f"folder = {_toml(str(look.folder))}"
    yield f"rows = {_toml(look.table)}"
    if look.keep:
        yield f"keep = {_toml(look.keep)}  # rows without a time cannot be split"
    if look.duplicates:
        yield f"drop_duplicates = true  # {look.duplicates:,} rows equal an earlier row in every column"
    if look.user_sql:
        named = (
            "given"
            if look.roles["user"]
            else f"named like a user, {look.columns[look.user].distinct:,} distinct"
            if look.user
            else "what tells rows apart"
        )
        yield f"user = {_toml(look.user_sql)}  {_comment(named)}"
    else:
        yield '# user = ""  # no column looks like a user: intervals are then over rows, and there are no histories'
    if look.time:
        yield f"time = {_toml(look.time_sql)}  {_comment(look.time_why)}"
        if _dtype(look.time_sql, look.frame.schema).is_integer():
            yield f"time_unit = {_toml(look.time_unit)}"
    else:
        yield '# time = ""  # no column looks like a time'
    yield from _domain_lines(look)
    if look.joins or look.unused:
        joins = [(False, {"table": t, "on": k}, f"`{k}` is unique there") for t, k in look.joins]
        yield from _array(
            "joins", [*joins, *((True, {"table": t, "on": ""}, f"not used: {why}") for t, why in look.unused)]
        )


def _domain_lines(look: _Look) -> Iterable[str]:
    if look.domain:
        yield f"domain = {_toml(look.domain)}  # given: metrics are printed for each of its values"
        return
    for c in look.columns.values():
        if (
            DOMAINS & set(c.words)
            and 2 <= c.distinct <= 50
            and c.name not in (*look.labels, look.user, look.time)
            and not c.dtype.is_nested()
        ):
            text = f"{c.distinct} values: if these are scenarios, metrics are printed for each"
            yield f"# domain = {_toml(c.name)}  # {text}"


Lines = Sequence[tuple[bool, dict[str, Any], str]]  # (commented out?, inline table, comment)


def _array(key: str, members: Lines) -> list[str]:
    """An array of inline tables, one a line."""
    return [
        f"{key} = [",
        *(f"  {'# ' if out else ''}{_toml(table)},  {_comment(why)}" for out, table, why in members),
        "]",
    ]


def _tasks(look: _Look) -> Lines:
    lines, classes = [], {}
    for name in look.labels:
        about = look.label_values[name]
        safe = re.sub(r"[./]", "_", name)
        task = {"name": safe} | ({"column": name} if safe != name else {}) | {"kind": about["kind"]}
        values = look.frame[name]
        classes[name] = (values.cast(pl.Float64) == 1).fill_null(False) if about["kind"] == "binary" else None
        note = ""
        train = values.filter(pl.Series(look.train))
        if about["kind"] != "real" and train.drop_nulls().n_unique() < values.drop_nulls().n_unique():
            note = "; careful: some of its values never occur in the training split"
        lines.append((False, task, about["why"] + note + _given(name, classes)))
    return lines


def _given(name: str, classes: Mapping[str, Any]) -> str:
    """A hint where every positive of a task is a positive of an earlier one."""
    mine = classes[name]
    for other, theirs in classes.items():
        if other != name and mine is not None and theirs is not None and mine.any() and not (mine & ~theirs).any():
            return f'; only where `{other}` is 1: given = "{re.sub(r"[./]", "_", other)}" would predict it among those'
    return ""


def _features(look: _Look) -> Lines:
    lines = [(bool(g.out), g.feature, f"left out: {g.out}" if g.out else g.why) for g in look.features]
    if all(out for out, _, _ in lines):
        reasons = "; ".join(f"{g.column.name}: {g.out}" for g in look.features)
        raise ValueError(f"No column is left to be a feature. {reasons or 'There is none besides labels and time'}.")
    return lines


def _histories(look: _Look) -> Iterable[str]:
    """One history of the user's earlier rows with a positive first label."""
    if not (look.user and look.time and look.item):
        need = [what for what, have in (("user", look.user), ("time", look.time), ("item id", look.item)) if not have]
        yield from ("", f"# no histories: they need a user, a time and an item id; there is no {' and no '.join(need)}")
        return
    item = next(g for g in look.features if g.column.name == look.item)
    least = {"min_count": item.feature["min_count"]} if "min_count" in item.feature else {}
    first, name = look.labels[0], item.feature["name"]
    columns, where = {name: look.item}, {}
    if look.label_values[first]["kind"] == "binary":
        columns["positive"] = first
        where = {"where": "positive" if look.frame.schema[first] == pl.Boolean else "positive = 1"}
    title = "earlier"
    while title in {g.feature["name"] for g in look.features}:
        title += "_rows"
    history = {"name": title, "fields": [name], **where, "length": LENGTH}
    what = f" with `{first}` = 1" if where else ""
    yield ""
    yield from _array(
        "fields", [(False, {"name": name, **least}, f"same name as the feature: both read one table of `{name}`")]
    )
    yield from _array(
        "events", [(False, {"table": "rows", "columns": columns}, "the rows themselves are events for later rows")]
    )
    yield from _array(
        "histories", [(False, history, f"the user's last {LENGTH} rows{what}, strictly before the row's time")]
    )


def _when(look: _Look, value: Any) -> str:
    """The date that a number means, as a comment."""
    if look.split["kind"] != "time" or not isinstance(value, int) or not _unit(pl.Series([value])):
        return ""
    moment = dt.datetime(1970, 1, 1) + dt.timedelta(seconds=value / PER_SECOND[look.time_unit])
    return f"  # {moment.isoformat(sep=' ', timespec='seconds')} UTC"


def _model(look: _Look) -> Iterable[str]:
    kinds = {about["kind"] for about in look.label_values.values()}
    metric = "auc" if "binary" in kinds else "accuracy" if "multiclass" in kinds else "rmse"
    several = len(look.labels) > 1
    yield '[model.tower]  # shared_bottom, mmoe and stem are a good start; stem wants `model.tables.kind = "per_task"`'
    yield f"kind = {_toml('mmoe' if several else 'shared_bottom')}" + (
        "  # several tasks: experts, mixed for each" if several else ""
    )
    if look.item and look.user and look.time:
        yield from ("", "[model.history]", 'kind = "mean"  # target_attention weighs events by what is predicted')
    yield from ("", "[training]", f"batch_size = {1024 if look.total >= 20_000 else 256}", "epochs = 3")
    yield f"metric = {_toml(metric)}  # on the validation split"
    yield "patience = 1  # stop after an evaluation without a better value, and keep the best weights"
