"""What the user declares about their files, and the lazy Polars plans that read them.

Nothing here looks at more data than a plan's schema: files larger than memory stream through the plans when
`unbraid.data.encode` runs them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fnmatch
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl

from unbraid.adapters.frames import Table, lazy
from unbraid.data.text import DataError, Reads, plan_text
from unbraid.data.vocabulary import canonical, canonical_type, stable_hash
from unbraid.types import BUILT_IN, FORBID, GAP, POSITION, Feature, Field, History, Task

SPLITS = ("train", "valid", "test")
SPLIT, ROW_KEY, WITHHELD, FILE = "__split", "__row", "__withheld", "__file"
LEAST_MB = 64  # of `Data.memory_mb`
Tables = Mapping[str, Table]  # tables handed over in memory, by the name that the run uses
OTHER_ROWS = re.compile(
    r"\b(?:avg|sum|count|min|max|median|first|last|std\w*|var\w*|quantile\w*|corr|covar\w*|over)\s*\(", re.I
)  # SQL that reads other rows than its own: of the test split too, and differently in each chunk


TIMES = "an integer, a date or a date-time"
UNIT_OF = {1.0: "s", 1e3: "ms", 1e6: "us", 1e9: "ns"}


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Polars' own errors (a value that is not of its column's type, files whose columns differ) as `DataError`."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{what} cannot be read as declared: {error}") from error


@dataclass(frozen=True)
class Text:
    """How a table of text is written that is not CSV with a header.

    Args:
        table: its name, as in ``data.rows``, a join or an event source; a file of any suffix, or a glob.
        names: of its columns, in order, where the first line is data; empty: the first line names them.
        separator: one character between columns.

    Raises:
        ValueError: a name is empty or there twice, or ``separator`` is not one character.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    table: str
    names: tuple[str, ...] = ()
    separator: str = ","

    def __post_init__(self) -> None:
        if bad := sorted({n for n in self.names if not n or self.names.count(n) > 1}):
            raise ValueError(f"Text `{self.table}`: `names` should differ and not be empty. Found {bad}.")
        if len(self.separator.encode()) != 1:
            raise ValueError(f"Text `{self.table}`: `separator` should be one character. Found {self.separator!r}.")


@dataclass(frozen=True)
class Join:
    """Columns of another table, joined to the rows (and to event tables that have the key) by its unique key.

    Args:
        table: file, folder or glob under ``data.folder``.
        on: the key column of the rows.
        key: its name in the table; empty means ``on``.
        prefix: put before the names of the table's other columns, so that a table can be joined twice, and its ``name`` stand
            beside that of the rows.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    table: str
    on: str
    key: str = ""
    prefix: str = ""

    def named(self, columns: Iterable[str]) -> dict[str, str]:
        """Column of the table -> its name beside the rows.  Raises DataError when there is no key."""
        key = self.key or self.on
        if key not in (columns := list(columns)):
            raise DataError(f"Join of `{self.table}`: there is no column `{key}`. Columns: {', '.join(columns)}.")
        names = {name: self.on if name == key else self.prefix + name for name in columns}
        if len(set(names.values())) < len(names):
            raise DataError(
                f"Join of `{self.table}`: it has `{self.on}` beside its key `{key}`. Give a `prefix`, so that they differ."
            )
        return names


@dataclass(frozen=True)
class Events:
    """One source of the event table that histories are cut from.

    Args:
        columns: event field (or a name that only ``where`` of a history reads) -> column or SQL expression.  List
            columns are exploded together, oldest first.
        table: a file under ``data.folder``, or ``rows``: the rows themselves are events for later rows.
        where: SQL filter on the table's own columns.
        time: time column, empty for ``data.time``, ``none`` when the events have no time: they then precede every row
            and have an unknown gap.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    columns: Mapping[str, str]
    table: str = "rows"
    where: str = ""
    time: str = ""


@dataclass(frozen=True)
class Split:
    """Which rows train, validate and test.

    Args:
        kind: ``time`` (before ``valid_from``, before ``test_from``, the rest), ``column`` (a column that says train,
            valid or test), ``user`` (whole users by a seeded hash of their id), ``order`` (the last rows test, those before
            them validate: for a log in order of time that has no time; files of a table in order of their names), ``row``
            (rows by a seeded hash of their number) or ``file`` (files that say so by their names).
        valid_from, test_from: ISO dates or date-times (UTC unless they carry an offset), or numbers in the column's
            unit.
        train_from: for kind ``time``: earlier rows are in no split; they are events of later rows, and no more.
        column: for kind ``column``.
        valid, test: shares of users, or of rows for kinds ``order`` and ``row``; seed: of the hash.
        valid_files, test_files: for kind ``file``: a name or glob under ``data.folder``; the other files train.  Without
            ``valid_files`` a share ``valid`` of the training rows validates: whole users where there are users, else rows, by
            the hash.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["time", "column", "user", "order", "row", "file"] = "user"
    valid_from: str | int = ""
    test_from: str | int = ""
    train_from: str | int = ""
    column: str = ""
    valid: float = 0.1
    test: float = 0.1
    seed: int = 0
    valid_files: str = ""
    test_files: str = ""

    def __post_init__(self) -> None:
        if self.kind == "time" and (self.valid_from == "" or self.test_from == ""):
            raise ValueError("A split by time needs `valid_from` and `test_from`.")
        if self.kind != "time" and self.train_from != "":
            raise ValueError(f"`train_from` is for a split by time. Found kind `{self.kind}`.")
        if self.kind == "column" and not self.column:
            raise ValueError("A split by column needs `column`.")
        if (self.kind == "file") != bool(self.test_files) or (self.valid_files and self.kind != "file"):
            raise ValueError(
                f"`test_files` and `valid_files` are of a split by `file`, which needs `test_files`. Found `{self.kind}`."
            )
        if self.kind in ("user", "order", "row", "file") and not (
            0 < self.valid and 0 < self.test and self.valid + self.test < 1
        ):
            raise ValueError(f"Shares should be positive and leave rows to train on. Found {self.valid}, {self.test}.")


@dataclass(frozen=True)
class Negatives:
    """Sampled negatives for a log that holds positives only.

    Every row is copied ``per_positive`` times with another item of the training split and all labels 0; columns that
    belong to the item should come from a join on it, so that they follow the new item.

    Args:
        item: the item column.
        per_positive: copies per row.
        sampling: ``uniform`` over the items or by ``popularity`` (their count in the training split).
        labels: columns set to 1 on the rows and 0 on the copies (created where missing).
        seed: of the draw.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    item: str
    per_positive: int = 4
    sampling: Literal["uniform", "popularity"] = "uniform"
    labels: tuple[str, ...] = ("label",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_positive < 1:
            raise ValueError(f"Parameter `per_positive` should be at least 1. Found {self.per_positive}.")


@dataclass(frozen=True)
class Data:
    """Everything that a run says about its data.

    Args:
        rows: the table whose rows are predicted: a file, a folder of files or a glob, Parquet or CSV.
        folder: where tables lie, relative to the run file; ``kuairand`` is the bundled log.
        keep: SQL filter on the rows.
        drop_duplicates: drop rows that equal an earlier row in every column.
        user, time, domain, weight, request: columns (or SQL expressions) with these roles; empty means there is none.
        exposure: columns (or SQL expressions) that say what was shown to whom (user and item): rows know how many rows before
            them, in order of time, agree in all of these.
        time_unit: of an integer time column.
        withhold: SQL over the rows' own columns (``site = 'new'``): where it holds, labels of the training and validation splits
            are not read, as if they were null, and none of any split is in a history; the test split still measures.
        text, joins, features, fields, events, histories, tasks, split, negatives: see their classes.
        cache: folder of encoded data; empty for the user's cache folder.
        memory_mb: how much encoding may hold beside the program itself; what is more is sorted on disk.  0:
            $UNBRAID_MEMORY_MB, else 2,048.
        appended: files will be added behind those of the rows and events: an encoded table keeps what the next goes on from.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    rows: str
    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]
    folder: str = ""
    keep: str = ""
    drop_duplicates: bool = False
    user: str = ""
    time: str = ""
    time_unit: Literal["s", "ms", "us", "ns"] = "ms"
    domain: str = ""
    weight: str = ""
    request: str = ""
    exposure: tuple[str, ...] = ()
    text: tuple[Text, ...] = ()
    joins: tuple[Join, ...] = ()
    fields: tuple[Field, ...] = ()
    events: tuple[Events, ...] = ()
    histories: tuple[History, ...] = ()
    split: Split = field(default_factory=Split)
    withhold: str = ""
    negatives: Negatives | None = None
    cache: str = ""
    memory_mb: int = 0
    appended: bool = False

    def __post_init__(self) -> None:
        names = [f.name for f in self.features] + [h.name for h in self.histories]
        for what, found in (("feature or history", names), ("task", [t.name for t in self.tasks])):
            twice = sorted({n for n in found if found.count(n) > 1})
            if twice:
                raise ValueError(f"Each {what} should have its own name. Found twice: {', '.join(twice)}.")
        spaces = [f.vocab for f in self.features] + [f.vocab for f in self.fields] + [f.name for f in self.fields]
        odd = sorted({n for n in [*names, *(t.name for t in self.tasks), *spaces] if set(n) & set("./") or not n})
        if odd:
            raise ValueError(f"Names should not be empty or hold dots or slashes. Found {odd}.")
        if not self.tasks:
            raise ValueError("There should be at least one task (`[[data.tasks]]`). Found none.")
        if not names:
            raise ValueError("There should be at least one feature (`[[data.features]]`). Found none.")
        fields = {f.name for f in self.fields} | set(BUILT_IN)
        taken = sorted({f.name for f in self.fields} & {"user", "time", *BUILT_IN}) + sorted({GAP} & set(spaces))
        if taken or len(fields) < len(self.fields) + len(BUILT_IN):
            found = [f.name for f in self.fields]
            raise ValueError(
                f"Event fields should have names of their own, not user, time, gap or position. Found {found}."
            )
        if POSITION in spaces and any(POSITION in h.fields for h in self.histories):
            raise ValueError(
                "A history reads `position`, an event's rank, and a feature has a vocabulary of that name. Rename the feature."
            )
        for events in self.events:
            if set(events.columns) & {"user", "time"}:
                found = list(events.columns)
                raise ValueError(
                    f"Events of `{events.table}`: columns should not be called user or time. Found {found}."
                )
        ids: tuple[Feature | Field, ...] = (*self.features, *self.fields)
        least = [(x.name, "min_count", x.min_count, 0) for x in ids] + [(x.name, "buckets", x.buckets, 0) for x in ids]
        for name, option, value, low in [*least, *((h.name, "length", h.length, 1) for h in self.histories)]:
            if value < low:
                raise ValueError(f"`{name}`: `{option}` should be at least {low}. Found {value}.")
        for x in ids:
            if x.min_count == 0 and not x.buckets:
                raise ValueError(f"`{x.name}`: with `min_count` 0 all values are hashed: set `buckets`. Found 0.")
        alone = {"exposure": self.exposure, "negatives": self.negatives, "drop_duplicates": self.drop_duplicates}
        alone |= {f"split.kind = {self.split.kind}": self.split.kind == "order"}
        alone |= {f"kind = {f.kind} (feature `{f.name}`)": True for f in self.features if f.has_content}
        if self.appended and (found := [name for name, there in alone.items() if there]):
            raise ValueError(
                f"With `appended` each row is encoded by itself, and {', '.join(found)} reads others. Set one."
            )
        if self.memory_mb and self.memory_mb < LEAST_MB:
            raise ValueError(
                f"`memory_mb` should be at least {LEAST_MB}, or 0 for the default. Found {self.memory_mb}."
            )
        for i, task in enumerate(self.tasks):
            if task.given and task.given not in {t.name for t in self.tasks[:i] if t.kind == "binary"}:
                raise ValueError(
                    f"Task `{task.name}`: `given` should name a binary task above it. Found `{task.given}`."
                )
            rate = task.sampling_rate
            if rate != 1.0 and task.kind != "binary" or not isinstance(rate, str) and not 0 < rate <= 1:
                raise ValueError(
                    f"Task `{task.name}`: `sampling_rate` should be in (0, 1], of a binary task. Found {rate}."
                )
            if self.negatives and not task.given and task.source not in self.negatives.labels:
                raise ValueError(
                    f"Task `{task.name}`: sampled negatives would keep its `{task.source}`. Name it in `labels` of "
                    f"`data.negatives` ({', '.join(self.negatives.labels)})."
                )
        for history in self.histories:
            unknown = set(history.fields) - fields
            if unknown or not history.fields:
                raise ValueError(
                    f"History `{history.name}`: `fields` should be among {sorted(fields)}. Found "
                    f"{list(history.fields)}."
                )
        if self.histories and not (self.user and self.time and self.events):
            raise ValueError("Histories need `data.user`, `data.time` and at least one `[[data.events]]`.")
        if self.exposure and (not self.time or self.negatives):
            raise ValueError("`exposure` needs `data.time`, and no sampled negatives: copies were shown to nobody.")
        if self.withhold and self.negatives:
            raise ValueError("`withhold` hides labels of the log, and sampled negatives make labels of their own.")
        if self.split.kind == "time" and not self.time:
            raise ValueError("A split by time needs `data.time`.")
        if self.split.kind == "user" and not self.user:
            raise ValueError("A split by user needs `data.user`. Use kind `column` for rows without users.")
        texts, named = [text.table for text in self.text], self.tables()
        if wrong := sorted({table for table in texts if table not in named or texts.count(table) > 1}):
            raise ValueError(f"`data.text` should describe tables among {named}, each once. Found {wrong}.")

    def tables(self) -> list[str]:
        """Names of the tables that it reads, sorted."""
        return sorted({self.rows, *(j.table for j in self.joins), *(e.table for e in self.events if e.table != "rows")})

    @property
    def reads(self) -> Reads:
        """How it reads columns of text, by name; columns inside SQL alone are what they seem to be."""
        bags = [f.source for f in self.features if f.kind == "bag"]
        ids = [f.source for f in self.features if f.kind == "id" or f.has_content]
        ids += [t.source for t in self.tasks if t.kind == "multiclass"]
        ids += [self.user, self.domain, self.request, *self.exposure, *(join.on for join in self.joins)]
        fields = {f.name for f in self.fields}
        ids += [source for e in self.events for name, source in e.columns.items() if name in fields]
        numbers = [f.source for f in self.features if f.kind == "number"] + [self.time, self.weight]
        numbers += [t.source for t in self.tasks if t.kind != "multiclass"] + [e.time for e in self.events]
        numbers += [t.sampling_rate for t in self.tasks if isinstance(t.sampling_rate, str)]
        return Reads(frozenset(ids) - {""}, frozenset(bags), frozenset(numbers) - {""})


# ------------------------------------------------------------------------------------------------------- reading tables
def bundled(name: str) -> Path | None:
    """Folder of a data set that ships with the package, or None."""
    folder = Path(__file__).parent / name
    return folder if name.isidentifier() and (folder / "README.md").exists() else None


def root_of(data: Data, base: Path) -> Path:
    """The folder that tables, and paths in their columns, are relative to."""
    return (bundled(data.folder) or base / data.folder).resolve()


def files_of(folder: str, table: str, base: Path) -> list[Path]:
    """The files of a table.  Raises DataError when there are none."""
    root = bundled(folder) or base / folder
    path = root / table
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in {".parquet", ".csv"})
    else:
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:12]) if root.is_dir() else "the folder does not exist"
        raise DataError(f"There is no table `{table}` (looked for {path}). In {root}: {there}.")
    return found


def scan(
    folder: str, table: str, base: Path, tables: Tables | None = None, text: Sequence[Text] = (), reads: Reads | None = None,
    file: str = "",
) -> pl.LazyFrame:  # fmt: skip
    """A lazy plan over a table; ``text`` says how some are written, ``reads`` how columns of text are read (a pass over the
    file finds their types).  ``file`` names a column to add with each row's file.

    Raises DataError for files that are missing, truncated, of an unknown type, CSV without rows, of
    other columns than named, or with words among numbers."""
    reads = reads or Reads()
    if tables and table in tables:
        return lazy(tables[table], f"Table `{table}`")
    files = files_of(folder, table, base)
    kinds = {p.suffix for p in files}
    if written := [one for one in text if one.table == table]:
        return _scan_text(written[0], files, reads, file=file)
    if len(kinds) > 1 or not kinds <= {".parquet", ".csv"}:
        raise DataError(f"Table `{table}` should be Parquet or CSV files of one kind. Found {sorted(kinds)}.")
    plan = partial(pl.scan_parquet if kinds == {".parquet"} else _header, glob=False)  # type: ignore[call-arg]
    for path in files:  # a truncated file shows in its footer, before hours of work
        try:
            plan(path).collect_schema()
        except Exception as error:
            raise DataError(
                f"{path} cannot be read ({path.stat().st_size:,} bytes): {error}. Write the file again."
            ) from error
    if kinds == {".csv"} and all(map(_header_alone, files)):
        raise DataError(f"Table `{table}` has a header and no rows. Found {', '.join(p.name for p in files[:5])}.")
    if kinds == {".parquet"}:
        return plan(files, include_file_paths=file or None)
    return plan_text(files, reads, file=file)


def _header(path: Path, **options: Any) -> pl.LazyFrame:
    """A lazy plan over one file of text, whose columns are named by its first line unless options say otherwise."""
    return pl.scan_csv(path, infer_schema=False, **options)


def _scan_text(text: Text, files: list[Path], reads: Reads, more: str = "", file: str = "") -> pl.LazyFrame:
    """A lazy plan over files of declared text.  ``more``: what else to say of another number of columns."""
    if any(p.suffix == ".parquet" for p in files):
        raise DataError(f"Table `{text.table}` is Parquet, which `data.text` does not describe. Take it out there.")
    plan = partial(_header, glob=False, separator=text.separator, has_header=not text.names)
    for path in files:
        try:
            found = plan(path).collect_schema().names()
        except Exception as error:
            raise DataError(f"{path} cannot be read as text ({path.stat().st_size:,} bytes): {error}.") from error
        if text.names and len(found) != len(text.names):
            raise DataError(
                f"{path} has {len(found)} columns between separators {text.separator!r}; `data.text` names "
                f"{len(text.names)}, {text.names[0]} to {text.names[-1]}.{more}"
            )
    if not text.names and all(map(_header_alone, files)):
        raise DataError(f"Table `{text.table}` has a header and no rows. Found {', '.join(p.name for p in files[:5])}.")
    return plan_text(files, reads, separator=text.separator, names=text.names, header=not text.names, file=file)


def scan_given(
    rows: str | Path, data: Data | None = None, known: Callable[[], Mapping[str, Any]] | None = None
) -> pl.LazyFrame:  # fmt: skip
    """A plan over a file or folder that stands in the place of the rows: text of their suffix is read as they are.

    Args:
        data: what reads them, from which follow the types of text; known: makes the types of ids that a model knows, for
            text.  Files without the declared labels are read, too.
    """
    path = Path(rows).resolve()
    like = [t for t in data.text if t.table == data.rows and Path(t.table).suffix == path.suffix] if data else []
    reads = data.reads if data else Reads()
    if known is not None and any(file.suffix != ".parquet" for file in files_of("", str(path), Path("/"))):
        reads = reads.given(known())
    if not like or data is None:
        return scan("", str(path), Path("/"), None, (), reads)
    text, files = like[0], files_of("", str(path), Path("/"))
    rest = tuple(name for name in text.names if name not in {task.source for task in data.tasks})
    with contextlib.suppress(pl.exceptions.PolarsError):  # `_scan_text` says what is wrong with it
        if len(rest) == len(_header(files[0], glob=False, separator=text.separator, has_header=False).collect_schema()):
            text = replace(text, names=rest)
    more = f" Rows to predict may come without the labels, with {len(rest)}." * (len(rest) < len(text.names))
    return _scan_text(replace(text, table=str(path)), files, reads, more)


def known_types(data: Data, values: Mapping[str, Any], base: Path, tables: Tables | None = None) -> dict[str, Any]:
    """Column of the rows -> type of ids in it, as a trained model's vocabularies, the joined tables and the events have them.

    Args:
        values: vocabulary -> type of its values; ``domain`` with a space behind it is that of the domains.
    """
    found = {join.on: scan_join(data, join, base, tables).collect_schema()[join.on] for join in data.joins}
    if data.histories:
        _, plan = event_plans(data, base, tables, split=False)[0]
        have = plan.collect_schema()
        found |= {data.user: _dtype(data.user, have)} if data.user in have else {}
    found = {column: canonical_type(kind) for column, kind in found.items()}
    found |= {data.domain: values["domain "]} if data.domain else {}
    return found | {f.source: values[f.vocab] for f in data.features if f.kind == "id"}


def scan_of(data: Data, table: str, base: Path, tables: Tables | None, file: str = "") -> pl.LazyFrame:
    """A lazy plan over one of the run's tables.  Raises DataError as `scan` does."""
    return scan(data.folder, table, base, tables, data.text, data.reads, file)


def scan_join(data: Data, join: Join, base: Path, tables: Tables | None) -> pl.LazyFrame:
    """A lazy plan over a joined table, its columns named as beside the rows.  Raises DataError as `scan` does."""
    reads, own = data.reads, {join.on: join.key or join.on}
    if join.prefix or join.key:  # the run reads `maker_name`, the table has `name`

        def here(names: frozenset[str]) -> frozenset[str]:
            return frozenset(
                own.get(n) or n.removeprefix(join.prefix) for n in names if n in own or n.startswith(join.prefix)
            )

        reads = replace(reads, ids=here(reads.ids), texts=here(reads.texts), numbers=here(reads.numbers))
    plan = scan(data.folder, join.table, base, tables, data.text, reads)
    return plan.rename(join.named(plan.collect_schema().names()))


def _header_alone(path: Path) -> bool:
    """Whether a CSV file has no second line: all its columns would be text."""
    with path.open("rb") as file:
        file.readline()
        return not file.readline().strip()


def expression(source: str, schema: Mapping[str, Any], where: str) -> pl.Expr:
    """A column of that name, else an SQL expression.  Raises DataError, naming what there is, for unknown columns."""
    if source in schema:
        return pl.col(source)
    if other := OTHER_ROWS.search(source):
        raise DataError(f"{where}: an expression should read its own row alone. Found `{other[0]}` in `{source}`.")
    try:
        expr = pl.lit(None) if source.isidentifier() else pl.sql_expr(source)  # a lone name is a column, not SQL's USER
        missing = [source] if source.isidentifier() else sorted(set(expr.meta.root_names()) - set(schema))
    except Exception as error:
        raise DataError(
            f"{where}: `{source}` is neither a column nor an SQL expression ({error}). Columns: {listed(schema)}."
        ) from error
    if missing:
        raise DataError(f"{where}: there is no column `{'`, `'.join(missing)}`. Columns: {listed(schema)}.")
    return expr


def listed(schema: Mapping[str, Any]) -> str:
    """The user's own columns, for a message."""
    return ", ".join(name for name in schema if not name.startswith("__"))


def add_joins(
    plan: pl.LazyFrame, data: Data, base: Path, tables: Tables | None, *, rows: bool = False
) -> pl.LazyFrame:  # fmt: skip
    """The plan with the columns of every declared join; order and number of rows stay.

    An event table need not have a join's key; the rows (``rows``) must.
    """
    for join in data.joins:
        have = plan.collect_schema()
        if join.on not in have:
            if rows:
                raise DataError(
                    f"Join of `{join.table}`: the rows have no column `{join.on}`. Columns: {listed(have)}."
                )
            continue
        right = scan_join(data, join, base, tables)
        columns = right.collect_schema()
        clash = sorted((set(columns) & set(have)) - {join.on})
        if clash:
            raise DataError(
                f"Join of `{join.table}`: both sides have {', '.join(clash)}. Give a `prefix`, or rename one side's columns."
            )
        sides = [p.with_columns(canonical(pl.col(join.on), s[join.on])) for p, s in ((plan, have), (right, columns))]
        if sides[0].collect_schema()[join.on] != sides[1].collect_schema()[join.on]:
            kinds = f"{have[join.on]} in the rows and {columns[join.on]} there"
            raise DataError(f"Join of `{join.table}`: `{join.on}` is {kinds}.")
        plan = sides[0].join(sides[1], on=join.on, how="left", maintain_order="left")
    return plan


def check_joins(data: Data, base: Path, tables: Tables | None) -> None:
    """Raises DataError when the key of a joined table is not unique: rows would multiply."""
    for join in data.joins:
        plan = scan_join(data, join, base, tables)
        rows, keys = plan.select(pl.len(), pl.col(join.on).n_unique().alias("keys")).collect().row(0)
        if rows != keys:
            raise DataError(
                f"Join of `{join.table}`: `{join.key or join.on}` should be unique. Found {rows:,} rows, {keys:,} keys."
            )


# ------------------------------------------------------------------------------------------------------------- the rows
def to_time(expr: pl.Expr, dtype: Any, unit: str, where: str) -> tuple[pl.Expr, float]:
    """The time as int64 and how many of its units make a second.  Raises DataError for other types."""
    if dtype.is_integer():
        return expr.cast(pl.Int64), {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[unit]
    if dtype in (pl.Datetime, pl.Date):
        return expr.cast(pl.Datetime("us")).dt.epoch("us"), 1e6
    if dtype.is_float():
        refuse_float_time(expr, dtype, where)
    names = expr.meta.root_names()
    name = names[0] if len(names) == 1 else "column"
    hint = f" Write it as SQL: `CAST({name} AS BIGINT)` of numbers, `TIMESTAMP({name})` of dates."
    raise DataError(f"{where} should be {TIMES}. Found {dtype}.{hint if dtype == pl.String else ''}")


def refuse_float_time(expr: pl.Expr, dtype: Any, where: str, nans: int = 0, key: str = "keep") -> None:
    """Raises DataError that says how to read a time of floating-point numbers, of which so many are NaN."""
    names = expr.meta.root_names()
    name = names[0] if len(names) == 1 else "column"
    missing = f" {nans:,} are NaN: leave them out with `{key}`, such as `{name} < 1e18`." if nans else ""
    raise DataError(f"{where} should be {TIMES}. Found {dtype}. Write it as SQL: `CAST({name} AS BIGINT)`.{missing}")


def iso(value: int, per_second: float) -> str:
    """A time in words (UTC); the bare number when no calendar reaches so far."""
    try:
        moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=value / per_second)
    except OverflowError:
        return str(value)
    return moment.isoformat(timespec="seconds")


def plausible(time: str) -> bool:
    """Whether a time in words is one of 1990 to 2100."""
    return len(time) > 19 and "1990" < time < "2100"


def is_empty(plan: pl.LazyFrame, where: str) -> bool:
    """Whether a plan has no row at all."""
    with reading(where):
        return not len(plan.head(1).collect(engine="streaming"))


def instant(value: str | int, per_second: float) -> int:
    """A point in time in the unit of the time column."""
    if isinstance(value, int):
        return value
    try:
        moment = dt.datetime.fromisoformat(value)
    except ValueError as error:
        raise DataError(f"`{value}` is not an ISO date or date-time (2022-05-05 or 2022-05-05T00:00+08:00).") from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    microseconds = (moment - dt.datetime.fromtimestamp(0, dt.UTC)) // dt.timedelta(microseconds=1)
    return microseconds * int(per_second) // 10**6  # exact for nanoseconds too


def with_split(plan: pl.LazyFrame, data: Data) -> pl.LazyFrame:
    """The kept rows with a column `SPLIT`: 0, 1 or 2 for train, valid and test; null where a split column says something else.

    A split by order counts the rows first: another pass over the file.  Rows before ``train_from`` are left out.
    """
    if data.split.kind == "file":
        return _with_split_by_file(plan, data)
    if data.split.kind == "row":
        rows = plan.with_row_index(ROW_KEY).with_columns(_drawn(pl.col(ROW_KEY), data.split).alias(SPLIT))
        return rows.drop(ROW_KEY)
    if data.split.kind != "order":
        have = plan.collect_schema()
        split = plan.with_columns(_split_expression(data, have).alias(SPLIT))
        return split if data.split.train_from == "" else split.filter(_from(data, have))
    rows = plan.select(pl.len()).collect(engine="streaming").item()
    test = rows - round(rows * data.split.test)
    valid = test - round(rows * data.split.valid)
    split = (pl.col(ROW_KEY) >= valid).cast(pl.Int8) + (pl.col(ROW_KEY) >= test).cast(pl.Int8)
    return plan.with_row_index(ROW_KEY).with_columns(split.alias(SPLIT)).drop(ROW_KEY)


def _with_split_by_file(plan: pl.LazyFrame, data: Data) -> pl.LazyFrame:
    """The rows, whose files say what they are for.  Without files that validate, training rows are drawn."""
    code, split = pl.col(FILE), data.split
    if not split.valid_files:
        plan = plan.with_row_index(ROW_KEY)
        have = plan.collect_schema()
        key = expression(data.user, have, "data.user") if data.user else pl.col(ROW_KEY)
        code = pl.when((code == 0) & (_uniform(key, split.seed) < split.valid)).then(1).otherwise(code)
    return plan.with_columns(code.cast(pl.Int8).alias(SPLIT)).drop(FILE, ROW_KEY, strict=False)


def _split_expression(data: Data, schema: Mapping[str, Any]) -> pl.Expr:
    split = data.split
    if split.kind == "time":
        time, per_second = _time_of_rows(data, schema)
        first, second = instant(split.valid_from, per_second), instant(split.test_from, per_second)
        if first >= second:
            raise DataError(f"`valid_from` should be before `test_from`. Found {split.valid_from}, {split.test_from}.")
        return (time >= first).cast(pl.Int8) + (time >= second).cast(pl.Int8)
    if split.kind == "column":
        words = expression(split.column, schema, "data.split.column").cast(pl.String)
        return words.replace_strict(list(SPLITS), [0, 1, 2], default=None, return_dtype=pl.Int8)
    return _drawn(expression(data.user, schema, "data.user"), split)


def _uniform(key: pl.Expr, seed: int) -> pl.Expr:
    """A number in [0, 1) for each value, null for null."""
    draw = key.cast(pl.String)
    return draw.map_batches(lambda s: stable_uniform(s, seed), return_dtype=pl.Float64, is_elementwise=True)


def _drawn(key: pl.Expr, split: Split) -> pl.Expr:
    draw = _uniform(key, split.seed)
    return (draw < split.test + split.valid).cast(pl.Int8) + (draw < split.test).cast(pl.Int8)


def _time_of_rows(data: Data, schema: Mapping[str, Any]) -> tuple[pl.Expr, float]:
    read, dtype = expression(data.time, schema, "data.time"), _dtype(data.time, schema)
    return to_time(read, dtype, data.time_unit, f"Column `{data.time}`")


def _from(data: Data, schema: Mapping[str, Any]) -> pl.Expr:
    """Whether a row is not before ``train_from``.  Raises DataError when that is not before ``valid_from``."""
    time, per_second = _time_of_rows(data, schema)
    first, second = (instant(at, per_second) for at in (data.split.train_from, data.split.valid_from))
    if first >= second:
        found = f"{data.split.train_from}, {data.split.valid_from}"
        raise DataError(f"`train_from` should be before `valid_from`. Found {found}.")
    return ~(time < first).fill_null(False)  # a row without a time is refused elsewhere


def stable_uniform(values: pl.Series, seed: int) -> pl.Series:
    """A number in [0, 1) for each text (null for null), the same on every machine and in every version."""
    draw = pl.Series(values.name, stable_hash(values, seed).astype("float64") / 2.0**64)
    return pl.select(pl.when(values.is_not_null()).then(draw)).to_series()


def users_of_events(data: Data, have: Mapping[str, Any], users: Any, where: str) -> pl.Expr:
    """The users of an event table.  Raises DataError when their type is not that of the rows (``users``)."""
    user, kind = expression(data.user, have, where), canonical_type(_dtype(data.user, have))
    if kind != users:
        raise DataError(f"{where}: `{data.user}` is {kind} there and {users} in the rows, so that no user would match.")
    return user.cast(kind)


def _dtype(source: str, schema: Mapping[str, Any]) -> Any:
    if source in schema:
        return schema[source]
    return pl.LazyFrame(schema=dict(schema)).select(pl.sql_expr(source)).collect_schema().dtypes()[0]


def kept_rows(data: Data, base: Path, tables: Tables | None) -> pl.LazyFrame:
    """The rows after ``keep`` and ``drop_duplicates``, in file order."""
    by_file = data.split.kind == "file"
    plan = _marked_rows(data, base, tables) if by_file else scan_of(data, data.rows, base, tables)
    if data.keep:
        plan = plan.filter(expression(data.keep, plan.collect_schema(), "data.keep"))
    if data.drop_duplicates:
        plan = plan.unique(pl.all().exclude(FILE) if by_file else None, maintain_order=True, keep="first")
    if data.withhold:
        where = expression(data.withhold, plan.collect_schema(), "data.withhold")
        plan = plan.with_columns(where.fill_null(False).alias(WITHHELD))
    return plan


def _marked_rows(data: Data, base: Path, tables: Tables | None) -> pl.LazyFrame:
    """All rows with a column `FILE`: 0, 1 or 2 for files that train, validate and test.  Raises DataError: a glob finds none."""
    if tables and data.rows in tables:
        raise DataError(f"A split by file reads files, and `{data.rows}` is in memory. Use kind `column`.")
    files, code = files_of(data.folder, data.rows, base), dict[str, int]()
    root = root_of(data, base)
    names = [
        file.resolve().relative_to(root).as_posix() if file.resolve().is_relative_to(root) else str(file)
        for file in files
    ]
    for key, part in (("valid_files", 1), ("test_files", 2)):
        pattern = getattr(data.split, key)
        found = [str(file) for file, name in zip(files, names, strict=True) if fnmatch.fnmatchcase(name, pattern)]
        if pattern and not found:
            raise DataError(f"`{key}`: no file of `{data.rows}` is called `{pattern}`. Found {', '.join(names[:8])}.")
        code |= dict.fromkeys(found, part)
    plan = scan_of(data, data.rows, base, tables, FILE)
    return plan.with_columns(pl.col(FILE).replace_strict(code, default=0, return_dtype=pl.Int8))


def label_expression(data: Data, task: Task, schema: Mapping[str, Any]) -> pl.Expr:
    """A task's labels; null where `Data.withhold` keeps them from training and validation."""
    expr = expression(task.source, schema, f"Task `{task.name}`")
    if WITHHELD not in schema:
        return expr
    return pl.when(~(pl.col(WITHHELD) & (pl.col(SPLIT) < SPLITS.index("test")))).then(expr)


def _without_labels(data: Data, plan: pl.LazyFrame) -> pl.LazyFrame:
    """Rows as events, null in every column that tells a label which is withheld."""
    have = plan.collect_schema()
    if WITHHELD not in have:
        return plan
    sources = [expression(task.source, have, f"Task `{task.name}`") for task in data.tasks]
    names = sorted({name for expr in sources for name in expr.meta.root_names()})
    shown = [pl.when(~pl.col(WITHHELD)).then(pl.col(name)).alias(name) for name in names]
    return plan.with_columns(shown).drop(WITHHELD)


def rows_plan(data: Data, base: Path, tables: Tables | None, query: pl.LazyFrame | None = None) -> pl.LazyFrame:
    """The rows with their joined columns: kept rows with split and sampled negatives, or those of a query as is."""
    if query is not None:
        return add_joins(query, data, base, tables, rows=True)
    plan = with_split(kept_rows(data, base, tables), data)
    if data.negatives is not None:
        from unbraid.data.negatives import add_negatives

        plan = add_negatives(plan, data.negatives)
    return add_joins(plan, data, base, tables, rows=True)


def event_plans(data: Data, base: Path, tables: Tables | None, split: bool = True) -> list[tuple[Events, pl.LazyFrame]]:
    """For each event source, its filtered table (with the split, on request, where the rows are the events)."""
    plans = []
    for source in data.events:
        if source.table == "rows":
            plan = kept_rows(data, base, tables)
            if split:
                plan = with_split(plan, data)
            plan = _without_labels(data, plan)
        else:
            plan = scan_of(data, source.table, base, tables)
        if source.where:
            plan = plan.filter(expression(source.where, plan.collect_schema(), f"data.events `{source.table}`"))
        plans.append((source, plan))
    return plans
