"""The tables of a folder: files of one schema, files that are training and test rows, text that is not CSV, and joins."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from unbraid.data.declaration import Join, Text
from unbraid.data.pictures import WORDS
from unbraid.data.source import TABLES, scan
from unbraid.data.text import SEPARATORS, first_lines, stem, suffixes
from unbraid.data.vocabulary import canonical
from unbraid.guess.words import USERS, words_of

MARKS = ",;\t|"
OVERLAP = 0.2  # of the rows' keys that a joined table should have
KEYS = ("id", "key", "code")  # of a table, called otherwise in the rows


class NoTables(ValueError):
    """A folder holds no table."""


@dataclass
class Tables:
    """What a folder holds.

    Args:
        folder: absolute; names: of tables, as `data.rows` has them; text: how some are written.
        splits: table -> key of `data.split` -> glob, of a table whose files are called train and test.
    """

    folder: Path
    names: list[str]
    text: list[Text]
    splits: dict[str, dict[str, str]] = field(default_factory=dict)

    def plan(self, table: str) -> pl.LazyFrame:
        """A lazy plan over one of them."""
        return scan(str(self.folder), table, Path(), text=self.text)


def find_tables(path: Path) -> Tables:
    """The folder and its tables: file names, folders of files, or globs over files of one schema.

    Raises ValueError when there are none.
    """
    if path.is_file() and suffixes(path)[0] in TABLES:
        return Tables(path.parent.resolve(), [path.name], _texts(path.parent, {path.name: [path]}))
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}.")
    files = [p for p in path.rglob("*") if suffixes(p)[0] in TABLES and not _hidden(p, path)] if path.is_dir() else []
    if not files:
        raise NoTables(
            f"{path} should be a Parquet or CSV file (.parquet, .csv, .tsv, .csv.gz, .csv.zst ...) or a folder of them, or a "
            f"folder of pictures, which is read without `--label`. Found {_what_is_there(path)}."
        )
    units: dict[str, list[Path]] = {}
    for file in sorted(files):  # a file, or a folder with files anywhere below
        units.setdefault(file.relative_to(path).parts[0], []).append(file)
    groups: dict[Any, list[str]] = {}
    for name, members in units.items():
        groups.setdefault(("".join(suffixes(members[0])), _schema(path, members[0])), []).append(name)
    found = Tables(path.resolve(), [], [])
    for (suffix, _), names in groups.items():
        _add(found, path, names, suffix, whole=len(groups) == 1 and len(files) > 1, units=units)
    return found


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(root).parts)


def _what_is_there(path: Path) -> str:
    if path.is_file():
        return f"a file of another kind, {path.name}"
    there = sorted({p.suffix or p.name for p in path.rglob("*") if p.is_file()})
    return f"files of other kinds: {', '.join(there[:8])}" if there else "an empty folder"


def _schema(root: Path, file: Path) -> tuple[Any, ...]:
    """Names and types of a file's columns; of text the names alone, whose types depend on the values."""
    table = str(file.relative_to(root))
    plan = scan(str(root.resolve()), table, Path(), text=_texts(root, {table: [file]}))
    schema = plan.collect_schema()
    return tuple(schema) if suffixes(file)[0] in SEPARATORS else tuple(schema.items())


def _add(
    found: Tables, path: Path, names: list[str], suffix: str, whole: bool, units: Mapping[str, list[Path]]
) -> None:
    """Note one table, or several files of one schema that no pattern matches."""
    files = [file for name in names for file in units[name]]
    patterns = names
    if whole:
        deep = any(len(f.relative_to(path).parts) > 1 for f in files)
        patterns = [("**/*" if deep else "*") + suffix]
    elif len(names) > 1:
        patterns = _one_pattern(path, names, suffix)
    found.names += patterns
    if len(patterns) == 1:
        if splits := _splits(path, files):
            found.splits[patterns[0]] = splits
        found.text += _texts(path, {patterns[0]: files})
    else:
        found.text += _texts(path, {name: units[name] for name in names})


def _one_pattern(folder: Path, names: list[str], suffix: str) -> list[str]:
    """One glob for several files of one schema if it matches them and nothing else; else their names."""
    start = names[0]
    while not all(n.startswith(start) for n in names):
        start = start[:-1]
    wanted = sorted(names)
    for pattern in (f"{start}*{suffix}", f"[{''.join(sorted({n[0] for n in names}))}]*{suffix}"):
        if sorted(p.name for p in folder.glob(pattern)) == wanted and (start or pattern[0] == "["):
            return [pattern]
    return names


def _splits(root: Path, files: Sequence[Path]) -> dict[str, str]:
    """Key of `data.split` -> glob, where files or their folders are called train and test."""
    parts: dict[str, list[Path]] = {}
    for file in files:
        told = {WORDS[w] for part in file.relative_to(root).with_suffix("").parts for w in words_of(part) if w in WORDS}
        parts.setdefault(told.pop() if len(told) == 1 else "", []).append(file)
    if "" in parts or "train" not in parts or len(parts) < 2:
        return {}
    if "test" not in parts:
        parts["test"] = parts.pop("valid")
    return {f"{part}_files": _glob_of(root, parts[part], files) for part in ("valid", "test") if part in parts}


def _glob_of(root: Path, mine: Sequence[Path], files: Sequence[Path]) -> str:
    names, others = (
        [p.relative_to(root).as_posix() for p in some] for some in (mine, [f for f in files if f not in mine])
    )
    if len(names) == 1:
        return names[0]
    start = names[0]
    while not all(n.startswith(start) for n in names):
        start = start[:-1]
    if not start or any(n.startswith(start) for n in others):
        raise ValueError(f"Files that test should begin alike, and others should not: {', '.join(names[:5])}.")
    return start + "*"


# ---------------------------------------------------------------------------------------------------------------- text
def _texts(root: Path, tables: Mapping[str, Sequence[Path]]) -> list[Text]:
    """How those tables of text are written whose files' names say something else."""
    found = []
    for table, files in tables.items():
        usual = SEPARATORS.get(suffixes(files[0])[0], "")
        if usual and (mark := separator_of(files[0], usual)) != usual:
            found.append(Text(table, separator=mark))
    return found


def separator_of(file: Path, usual: str = ",") -> str:
    """The character between a file's columns: the one that cuts the first lines into the most columns, alike in each."""
    lines = [line for line in first_lines(file, 50) if line.strip()]
    best, most = usual, 1
    for mark in MARKS:
        widths = [len(row) for row in csv.reader(lines, delimiter=mark)]
        if widths and widths[0] > most and widths.count(widths[0]) >= 0.9 * len(widths):
            best, most = mark, widths[0]
    return best


# --------------------------------------------------------------------------------------------------------------- joins
@dataclass
class Joiner:
    """Joins tables to a sample of rows, one after another: a joined table may bring the key of the next.

    Args:
        tables: of the folder; frame: the sample, which grows; own: its columns before any join; rows: the table that they are of.
    """

    tables: Tables
    frame: pl.DataFrame
    rows: str

    def __post_init__(self) -> None:
        self.own = self.frame.columns
        self.joins: list[tuple[Join, str]] = []
        self.known: dict[tuple[str, str], bool] = {}  # is a column of a table unique?
        self.plans = {t: self.tables.plan(t) for t in self.tables.names if t != self.rows}
        waiting, before = list(self.plans), -1
        while len(waiting) != before:
            before = len(waiting)
            waiting = [t for t in waiting if not self._join(t)]
        self.unused = [(table, self._why_not(table)) for table in waiting]

    def _join(self, table: str) -> bool:
        """Join by every key that fits: a table of airports to where a flight starts, and to where it ends."""
        plan, keys = self.plans[table], self._keys(table)
        shared = [(on, key) for on, key in keys if on == key]
        chosen = shared[:1] or [pair for pair in keys if pair[0] != pair[1]]
        for on, key in chosen:
            columns = [c for c in plan.collect_schema() if c != key]
            clash = set(columns) & set(self.frame.columns) or len(chosen) > 1
            name = words_of(on)[0] if len(chosen) > 1 else stem(table).rstrip("s*-_") or on
            join = Join(table, on, key if key != on else "", f"{name}_" if clash else "")
            right = plan.rename(join.named(plan.collect_schema().names()))
            if set(right.collect_schema()) & (set(self.frame.columns) - {on}):
                continue
            sides = (self.frame.lazy(), right)
            left, right = (p.with_columns(canonical(pl.col(on), p.collect_schema()[on])) for p in sides)
            self.frame = left.join(right, on=on, how="left", maintain_order="left").collect()
            why = f"`{key}` is unique there" + (f", and `{on}` holds its values" if key != on else "")
            self.joins.append((join, why))
        return bool(chosen)

    def _keys(self, table: str) -> list[tuple[str, str]]:
        """(column of the rows, unique column of the table) with values in common: of one name, or named after the table."""
        plan = self.plans[table]
        have = plan.collect_schema()
        names = words_of(stem(table))
        stems = {w.rstrip("s") for w in names} | {w for w in names}
        shared = [(c, c) for c in have if c in self.frame.columns and self._unique(table, c)]
        if fitting := [pair for pair in shared if self._fits(plan, *pair)]:
            return fitting
        if any(c in self.own and set(words_of(c)) & USERS for c in have):
            return []  # many rows for a user are events: their own number is nobody's key
        keys = [
            c
            for c in dict.fromkeys((*(c for c in have if c.lower() in KEYS), next(iter(have))))
            if self._unique(table, c)
        ]
        pairs = [(on, key) for key in keys[:2] for on in self.own if on != key and self._alike(on, key, stems)]
        named = [(on, key) for on, key in pairs if set(words_of(on)) & stems]  # `userId`, not `movieId`, of users
        return [pair for pair in named or pairs if self._fits(plan, *pair)]

    def _unique(self, table: str, key: str) -> bool:
        if (table, key) not in self.known:
            column = pl.col(key)
            plan = self.plans[table].select(rows=pl.len(), keys=column.n_unique())
            flat = not self.plans[table].collect_schema()[key].is_nested()
            rows, distinct = plan.collect(engine="streaming").row(0) if flat else (1, 0)
            self.known[table, key] = rows == distinct
        return self.known[table, key]

    def _alike(self, on: str, key: str, stems: set[str]) -> bool:
        """Could a column hold that key?  ``user_id`` and ``id`` of users; text codes of a short key whatever their name."""
        words = set(words_of(on))
        return (
            bool(words & stems) or "".join(words_of(key)) in "".join(words_of(on)) or self.frame.schema[on] == pl.String
        )

    def _fits(self, plan: pl.LazyFrame, on: str, key: str) -> bool:
        have = plan.collect_schema()
        kinds = have[key], self.frame.schema[on]
        if any(kind.is_nested() or kind.is_float() or kind.is_temporal() or kind == pl.Boolean for kind in kinds):
            return False
        values = self.frame.select(canonical(pl.col(on), kinds[1]))[on].drop_nulls().unique()
        keys = plan.select(canonical(pl.col(key), kinds[0]))
        if not len(values) or values.dtype != keys.collect_schema()[key]:
            return False
        rows, found = keys.select(pl.len(), f=pl.col(key).is_in(values.implode()).sum()).collect().row(0)
        return found >= max(OVERLAP * min(len(values), rows), 2)

    def alike(self, table: str) -> bool:
        """Has a table the columns of the rows, but for one or two, and no others?"""
        have = set(self.plans[table].collect_schema())
        return have <= set(self.own) and len(set(self.own) - have) <= 2 < len(have)

    def _why_not(self, table: str) -> str:
        have = self.plans[table].collect_schema()
        shared = [c for c in have if c in self.frame.columns]
        missing = [c for c in self.own if c not in have]
        if self.alike(table):
            lacks = f"it has no {' and no '.join(missing)}" if missing else "it has the same columns"
            return f"{lacks}: rows to predict, perhaps (`unbraid predict`)"
        if not shared:
            return "it has no column of the rows, and no key that a column of the rows holds"
        if any(self._unique(table, c) for c in shared):
            return (
                f"hardly any value of its {', '.join(c for c in shared if self._unique(table, c))} is one of the rows"
            )
        return f"none of the shared columns ({', '.join(shared)}) has one row per value: it may hold events (`events`)"
