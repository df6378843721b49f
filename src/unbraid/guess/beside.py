"""Pictures with a table of their labels beside them: which column names which file.

A value names a file by its path, or by the end of it; the suffix may lack, and folders before it that are of another machine.
Where a column holds the paths as a run reads them, it is the feature.  Else the table is written anew with a column ``picture``,
as `unbraid.data.pictures` writes the table of a tree of folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl

from unbraid.data.pictures import SCHEMA, WORDS, _pictures_in, backbone_for
from unbraid.data.source import FILE, scan, stable_uniform
from unbraid.data.text import DataError
from unbraid.guess.tables import NoTables, Tables, find_tables
from unbraid.guess.words import words_of

PICTURE, WRITTEN = "picture", "rows.parquet"
NAMED = 0.5  # of a column's values that should name a picture, and
COVERED = 0.2  # of the pictures that should be named
LARGEST = 5_000_000  # rows of a table that is looked at
SPLITS = {"split", "set", "fold", "subset", "partition", "usage", "phase"}  # names of columns that say one
VALID = 0.1  # of the training rows, where nothing says which validate


@dataclass(frozen=True)
class Pictures:
    """A table whose rows have pictures.

    Args:
        table: its name, and column: of the paths, as the run file has them; why: for the comment.
        rows: how many have a picture; notes: what else to say.
        backbone: what would read them.
    """

    table: str
    column: str
    why: str
    rows: int
    notes: tuple[str, ...]
    backbone: Any


@dataclass(frozen=True)
class Match:
    """A column of a table that names pictures: value -> path below the folder, out of so many pictures there."""

    table: str
    column: str
    paths: Mapping[Any, str]
    pictures: int


def find(folder: Path, tables: Tables) -> tuple[Tables, Match | None]:
    """The tables, without one that was written here before, and the column that names the most pictures, if one does."""
    files = [path.relative_to(folder).as_posix() for path in sorted(_pictures_in(folder))] if folder.is_dir() else []
    if not files:
        return tables, None
    tables, index = _without_ours(tables), _index(files)
    found = [
        Match(table, column, paths, len(files))
        for table in tables.names
        for column, paths in _columns(tables.plan(table), index, len(files))
    ]
    return tables, max(found, key=lambda each: len(each.paths), default=None)


def has_labels(folder: Path) -> bool:
    """Has a folder of pictures a table that names them?"""
    try:
        return find(folder, find_tables(folder))[1] is not None
    except NoTables:
        return False


def pictures_beside(folder: Path, tables: Tables) -> tuple[Tables, Pictures | None]:
    """The tables, and the one whose rows have pictures, which is written where paths or splits need it.

    Raises DataError: a ``rows.parquet`` of somebody else, or a column ``picture`` of something else, is in the way.
    """
    tables, match = find(folder, tables)
    if match is None:
        return tables, None
    table, column, found = match.table, match.column, match.paths
    frame = _read(tables, table)
    there = frame[column].is_in(list(found))
    backbone = backbone_for(pl.Series(list(found.values())), folder)
    spare = match.pictures - len(found)
    notes = [f"! {spare:,} pictures are in no row of {table}"] * bool(spare)
    split = _split(frame, table in tables.splits)
    if there.all() and all(value == path for value, path in found.items()) and split is None:
        return tables, Pictures(table, column, "paths of pictures", len(frame), tuple(notes), backbone)
    out = folder / WRITTEN
    if out.exists() and not _is_ours(list(pl.read_parquet_schema(out)), [_names(tables, t) for t in tables.names]):
        raise DataError(f"{out} is there, and is no table of pictures that `unbraid init` wrote. Move it.")
    if PICTURE in frame.columns and PICTURE != column:
        raise DataError(f"{table} has a column `{PICTURE}` beside `{column}`, which names the pictures. Rename it.")
    paths = pl.col(column).replace_strict(dict(found), default=None, return_dtype=pl.String)
    rows = frame.with_columns(paths.alias(PICTURE)).filter(pl.col(PICTURE).is_not_null())
    if split is not None:
        rows = rows.with_columns(_drawn(split.filter(there), rows[PICTURE]))
    rows.select(PICTURE, pl.exclude(PICTURE, FILE)).write_parquet(out)
    bare = len(frame) - len(rows)
    notes += [f"! {bare:,} rows of {table} have no picture: left out"] * bool(bare) + [f"wrote {out}"]
    why = f"the files that `{column}` of {table} names; {WRITTEN} is that table with their paths"
    others = replace(
        tables, names=[WRITTEN if name == table else name for name in tables.names],
        text=[one for one in tables.text if one.table != table],
        splits={name: keys for name, keys in tables.splits.items() if name != table},
    )  # fmt: skip
    return others, Pictures(WRITTEN, PICTURE, why, len(rows), tuple(notes), backbone)


def _names(tables: Tables, table: str) -> list[str]:
    return tables.plan(table).collect_schema().names()


def _without_ours(tables: Tables) -> Tables:
    """The tables without the one that an earlier look wrote."""
    if WRITTEN not in tables.names:
        return tables
    others = [name for name in tables.names if name != WRITTEN]
    ours = _is_ours(_names(tables, WRITTEN), [_names(tables, name) for name in others])
    return replace(tables, names=others) if ours else tables


def _is_ours(names: Iterable[str], others: Iterable[list[str]]) -> bool:
    """Has a table the columns of a tree's, or those of another table besides the paths?"""
    mine = set(names)
    return PICTURE in mine and (
        mine <= set(SCHEMA) or any(mine - {PICTURE, "split"} == set(o) - {PICTURE, "split"} for o in others)
    )


def _index(files: Iterable[str]) -> dict[str, str]:
    """Ends of the paths, in small letters, with and without suffix -> path; those of several files are not there."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    for file in files:
        parts = PurePosixPath(file.lower()).parts
        for i in range(len(parts)):
            end = "/".join(parts[i:])
            for key in {end, end.removesuffix(PurePosixPath(end).suffix)}:
                twice |= {key} if found.setdefault(key, file) != file else set()
    return {key: file for key, file in found.items() if key not in twice}


def _columns(plan: pl.LazyFrame, index: Mapping[str, str], files: int) -> Iterable[tuple[str, dict[Any, str]]]:
    """(column, value -> path) of the columns of a table that name pictures."""
    if plan.select(pl.len()).collect(engine="streaming").item() > LARGEST:
        return
    for name, dtype in plan.collect_schema().items():
        if not (dtype == pl.String or dtype.is_integer()):
            continue
        values = plan.select(pl.col(name).unique()).collect(engine="streaming")[name].drop_nulls().to_list()
        found = {value: path for value in values if (path := _file(str(value), index))}
        if len(found) >= max(NAMED * len(values), COVERED * files, 2) and len(set(found.values())) == len(found):
            yield name, found


def _file(value: str, index: Mapping[str, str]) -> str:
    """The picture that a value names, or an empty string."""
    parts = PurePosixPath(value.strip().replace("\\", "/").lower()).parts
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((index[end] for end in ends if end in index), "")


def _read(tables: Tables, table: str) -> pl.DataFrame:
    """The whole table, with each row's file if files say the split."""
    file = FILE if table in tables.splits else ""
    frame = scan(str(tables.folder), table, Path(), text=tables.text, file=file).collect(engine="streaming")
    if not file:
        return frame
    keys = {k.removesuffix("_files"): pattern for k, pattern in tables.splits[table].items()}
    where = [PurePosixPath(path).relative_to(tables.folder.as_posix()) for path in frame[FILE]]
    told = [next((part for part, glob in keys.items() if path.match(glob)), "train") for path in where]
    return frame.with_columns(pl.Series(FILE, told))


def _split(frame: pl.DataFrame, by_file: bool) -> pl.Series | None:
    """What files or a column say of the split, in the words of a run; None: nothing, or it can be read as it stands."""
    if by_file:
        return frame[FILE].alias("split")
    for name in frame.columns:
        values = frame[name]
        if values.dtype != pl.String or not set(words_of(name)) & SPLITS:
            continue
        words = {value: WORDS.get(value.strip().lower(), "") for value in values.drop_nulls().unique()}
        if "train" in words.values() and len(words) > 1 and all(words.values()) and not values.null_count():
            plain = set(words) == {"train", "valid", "test"}
            return None if plain else values.replace_strict(words, return_dtype=pl.String).alias(name)
    return None


def _drawn(split: pl.Series, pictures: pl.Series) -> pl.Series:
    """A split of three parts: where nothing tests, what validates does, and a tenth of the training rows validates."""
    if not (split == "test").any():
        split = split.replace({"valid": "test"})
    if (split == "valid").any():
        return split
    chosen = (split == "train") & (stable_uniform(pictures, 0) < VALID)
    return pl.select(pl.when(chosen).then(pl.lit("valid")).otherwise(split).alias(split.name)).to_series()
