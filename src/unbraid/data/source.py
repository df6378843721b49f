"""The lazy Polars plans that read what `unbraid.data.declaration` declares.

Nothing here looks at more data than a plan's schema: files larger than memory stream through the plans when
`unbraid.data.encode` runs them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fnmatch
import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from unbraid.adapters.frames import Table, lazy
from unbraid.data.declaration import SPLITS, Data, Events, Join, Split, Text
from unbraid.data.text import SEPARATORS, DataError, Reads, first_lines, plan_text, suffixes
from unbraid.data.vocabulary import canonical, canonical_type, stable_hash
from unbraid.types import Task

TABLES = {".parquet", *SEPARATORS}  # files that are tables by their names
SPLIT, ROW_KEY, WITHHELD, FILE = "__split", "__row", "__withheld", "__file"
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
        found = sorted(p for p in path.rglob("*") if suffixes(p)[0] in TABLES)
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
    kinds = {suffixes(p)[0] for p in files}
    if written := [one for one in text if one.table == table]:
        return _scan_text(written[0], files, reads, file=file)
    if len(kinds) > 1 or not kinds <= TABLES:
        raise DataError(
            f"Table `{table}` should be files of one kind: .parquet, .csv or .tsv, the last two also with .gz or .zst behind it. "
            f"Found {sorted({''.join(suffixes(p)) for p in files})}."
        )
    separator = SEPARATORS.get(next(iter(kinds)), "")
    plan: Callable[..., pl.LazyFrame] = partial(_header, separator=separator) if separator else pl.scan_parquet
    for path in files:  # a truncated file shows in its footer, before hours of work
        try:
            plan(path, glob=False).collect_schema()
        except Exception as error:
            raise DataError(
                f"{path} cannot be read ({path.stat().st_size:,} bytes): {error}. Write the file again."
            ) from error
    if separator and all(map(_header_alone, files)):
        raise DataError(f"Table `{table}` has a header and no rows. Found {', '.join(p.name for p in files[:5])}.")
    if not separator:
        return pl.scan_parquet(files, glob=False, include_file_paths=file or None)
    return plan_text(files, reads, separator=separator, file=file)


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
    like = [t for t in data.text if t.table == data.rows and suffixes(t.table)[0] == suffixes(path)[0]] if data else []
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
    return not any(line.strip() for line in first_lines(path, 2)[1:])


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
