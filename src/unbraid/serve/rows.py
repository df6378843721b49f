"""Raw rows, as a client sends them, encoded in memory as the run's own rows are.

Everything that decides what a row means is `unbraid.data.encode`'s: its expressions, its codes, its checks.  What is new is only
that joined tables are read once and kept with the order of their keys, so that a few hundred rows find theirs by a search
instead of a join that hashes the whole table, and that nothing is written.

Pictures and texts are the exception: their backbones read them through a folder, which lasts as long as the request.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from unbraid.data import source as src
from unbraid.data.columns import InMemory
from unbraid.data.contents import Writer
from unbraid.data.encode import row_expressions, write_rows
from unbraid.data.fitted import Fitted
from unbraid.data.labels import LabelChecks
from unbraid.data.table import Encoded
from unbraid.data.vocabulary import Vocabulary, canonical, canonical_type

Types = dict[str, Any]  # column -> type


class RequestError(ValueError):
    """A request does not hold what the run reads.

    Attributes:
        field: where: ``candidates.3.video_id``, ``score``.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Column(NamedTuple):
    """A raw column that a client sends.

    Args:
        kind: ``int``, ``float``, ``str``, ``bool`` or ``list[KIND]``; required: the key must be there (its value may be null).
        example: a value that the run knows.
    """

    kind: str
    required: bool = True
    example: Any = None


# ------------------------------------------------------------------------------------------------------- types of columns
KINDS: Mapping[str, tuple[Any, tuple[type, ...], Any]] = {  # how JSON has it -> type, Python's types, an example
    "bool": (pl.Boolean, (bool,), True),
    "int": (pl.Int64, (int,), 0),
    "float": (pl.Float64, (float, int), 0.5),
    "str": (pl.String, (str,), "a"),
}


def kind_of(dtype: Any) -> str:
    """How JSON has a column of this type; dates are text (ISO)."""
    if isinstance(dtype, pl.List | pl.Array):
        return f"list[{kind_of(dtype.inner)}]"
    if dtype == pl.Boolean:
        return "bool"
    return "int" if dtype.is_integer() else "float" if dtype.is_float() or dtype.is_decimal() else "str"


def json_type(kind: str) -> Any:
    """The type that values of a kind are first read as."""
    return pl.List(json_type(kind[5:-1])) if kind.startswith("list") else KINDS[kind][0]


def here(field: str) -> Callable[[int], str]:
    """One field for whatever value."""
    return lambda _: field


def each(before: str, after: str) -> Callable[[int], str]:
    """The field of a value by its number."""
    return lambda i: f"{before}{i}{after}"


def series(name: str, values: Sequence[Any], dtype: Any, place: Callable[[int], str], kind: str = "") -> pl.Series:
    """Values of JSON as a column of a type; nulls stay.

    Args:
        place: the field of a value, by its number; kind: of the values, if it is not that of the type.

    Raises:
        RequestError: for the first value that is of another kind, or that the type cannot hold.
    """
    kind = kind or kind_of(dtype)
    for i in _odd(values, kind):
        raise RequestError(place(i), f"Column `{name}` should be of kind {kind} or null. Found {values[i]!r}.")
    try:
        return as_type(pl.Series(name, values, dtype=json_type(kind)), dtype)
    except UNREADABLE as error:
        for i, value in enumerate(values):  # the first that cannot be read alone
            try:
                as_type(pl.Series(name, [value], dtype=json_type(kind)), dtype)
            except UNREADABLE:
                raise RequestError(place(i), f"Column `{name}` should be {dtype}. Found {value!r}.") from error
        raise


def as_json(name: str, dtype: Any, kind: str) -> pl.Expr:
    """A column as JSON has it."""
    column = pl.col(name)
    if dtype in (pl.Date, pl.Datetime):
        return column.cast(pl.Datetime("us")).dt.epoch("us") if kind == "int" else column.dt.to_string("iso")
    return column.cast(pl.String) if kind == "str" else column.cast(pl.Float64) if dtype.is_decimal() else column


UNREADABLE = (TypeError, OverflowError, pl.exceptions.PolarsError)


def _odd(values: Sequence[Any], kind: str) -> Iterator[int]:
    """Places of values that are not of a kind, nor null."""
    if kind.startswith("list"):
        for i, value in enumerate(values):
            listed = value is None or isinstance(value, list | tuple)
            if not listed or (value and any(True for _ in _odd(value, kind[5:-1]))):
                yield i
        return
    allowed = KINDS[kind][1]
    if not {type(value) for value in values} <= {*allowed, type(None)}:
        yield from (i for i, value in enumerate(values) if value is not None and type(value) not in allowed)


def as_type(column: pl.Series, dtype: Any) -> pl.Series:
    """The column in another type; text becomes dates and date-times as ISO writes them, whole numbers as microseconds."""
    if column.dtype == dtype:
        return column
    zone = getattr(dtype, "time_zone", None)
    if column.dtype == pl.Int64 and dtype in (pl.Date, pl.Datetime):
        return column.cast(pl.Datetime("us", zone)).cast(dtype)
    if column.dtype == pl.String and dtype in (pl.Date, pl.Datetime):
        read = column.str.to_date() if dtype == pl.Date else column.str.to_datetime(time_zone=zone)
        return read.cast(dtype)
    return column.cast(dtype)


def roots(source: str, have: Mapping[str, Any]) -> set[str]:
    """The columns that an expression reads."""
    if not source or source in have or source.isidentifier():
        return {source} if source else set()
    return set(pl.sql_expr(source).meta.root_names())


def table_types(data: src.Data, table: str, tables: src.Tables | None) -> Types:
    """Types of a table's columns, whole numbers and categories as wide as values may come.  Raises DataError without it."""
    have = src.scan_of(data, table, Path(), tables).collect_schema()
    return {name: widest(kind) for name, kind in have.items()}


def widest(dtype: Any) -> Any:
    """The type that values of JSON are read as for a column of this one."""
    if isinstance(dtype, pl.List | pl.Array):
        return pl.List(widest(dtype.inner))
    if dtype in (pl.Categorical, pl.Enum):
        return pl.String
    return pl.Int64 if dtype.is_integer() and dtype != pl.UInt64 else dtype


def rows_types(data: src.Data, fitted: Fitted, tables: src.Tables | None) -> Types:
    """Types of the rows' columns: those of the run's table, or, where that is not here, of what is declared of plain columns."""
    with contextlib.suppress(src.DataError):
        return table_types(data, data.rows, tables)
    found: Types = {data.time: pl.Int64} if data.time else {}
    if data.domain:
        found[data.domain] = fitted.vocabularies["domain "].values.dtype
    for f in data.features:
        inner = fitted.vocabularies[f.vocab].values.dtype if f.kind in ("id", "bag") else pl.Float64
        kinds = {"id": inner, "bag": pl.String if f.separator else pl.List(inner), "vector": pl.List(pl.Float64)}
        found[f.source] = kinds.get(f.kind, pl.Float64 if f.kind == "number" else pl.String)
    return {name: kind for name, kind in found.items() if name.isidentifier()}


# ------------------------------------------------------------------------------------------------------------ joined tables
class Joined:
    """A table of joined columns in memory, with the order of its keys.

    Args:
        frame: the table; on: its key, unique.
    """

    def __init__(self, frame: pl.DataFrame, on: str) -> None:
        key = frame.select(canonical(pl.col(on), frame.schema[on])).to_series()
        order = key.arg_sort(nulls_last=True).head(len(key) - key.null_count())
        self.on, self.keys = on, Vocabulary(key.gather(order))
        rest = frame.drop(on)
        nothing = pl.DataFrame({name: [None, None] for name in rest.columns}, schema=rest.schema)
        self.columns = pl.concat([nothing, rest[order]])  # codes of unknown and missing keys come first

    def added(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows with the columns of their key, null where the table has it not."""
        key = frame.select(canonical(pl.col(self.on), frame.schema[self.on])).to_series()
        if not self.columns.width:
            return frame.with_columns(key)
        return frame.with_columns(key, *self.columns[self.keys.encode(key).astype(np.uint32)])


class Joins:
    """The run's joined tables, each read once.

    Args:
        data: of the run, with the folder where they are; tables: tables in memory instead.

    Attributes:
        adds: the columns that rows do not bring themselves.

    Raises:
        DataError: a table cannot be read, or its key is not unique.
    """

    def __init__(self, data: src.Data, tables: src.Tables | None) -> None:
        src.check_joins(data, Path(), tables)
        self.data = data
        self.frames = [src.scan_join(data, join, Path(), tables).collect() for join in data.joins]
        self.adds = {n for j, f in zip(data.joins, self.frames, strict=True) for n in f.columns} - {
            j.on for j in data.joins
        }

    def asked(self, read: set[str], have: Mapping[str, Any] | None = None) -> tuple[set[str], list[int]]:
        """The columns that rows must bring so that some can be read, and which tables add the others.

        Args:
            have: of rows whose own columns are known: a join whose key they have not adds nothing.
        """
        need, used = set(read), list[int]()
        for place in reversed(range(len(self.frames))):
            on, adds = self.data.joins[place].on, set(self.frames[place].columns)
            own = set() if have is None else set(have)
            if need & (adds - {on} - own):
                need = (need - (adds - {on} - own)) | {on}
                used.append(place)
        return need, used[::-1]

    def use(self, places: Sequence[int], read: set[str]) -> list[Joined]:
        """The tables of some joins, with the columns that are read (and keys of other joins)."""
        keys = {join.on for join in self.data.joins}
        return [
            Joined(self.frames[p].select(n for n in self.frames[p].columns if n in read | keys), self.data.joins[p].on)
            for p in places
        ]


def joined(frame: pl.DataFrame, tables: Sequence[Joined]) -> pl.DataFrame:
    """The rows with the columns of all tables."""
    for table in tables:
        frame = table.added(frame)
    return frame


# ----------------------------------------------------------------------------------------------------------------- the rows
class RowReader:
    """Encodes raw rows of a trained run.

    Args:
        data: of the run, with the folder of its tables; fitted: what it learnt; joins: its joined tables.
        tables: tables in memory, by name.

    Attributes:
        have: raw column -> type, of all that the run's rows have; types: of those that a row needs, user and time included.
        user, time: the raw columns of these roles; empty without.
        users: canonical type of user ids (None without a user); per_second: units of time in a second.

    Raises:
        DataError: a table is missing, or the types of columns that expressions read cannot be known without it.
    """

    def __init__(self, data: src.Data, fitted: Fitted, joins: Joins, tables: src.Tables | None = None) -> None:
        self.data, self.fitted = data, fitted
        have = {n: kind for n, kind in rows_types(data, fitted, tables).items() if n not in joins.adds}
        self.have = have
        reads = {name for f in data.features for name in roots(f.source, have)}
        reads |= roots(data.domain, have)
        self.user, self.time = (
            _only(role, source, have) for role, source in (("user", data.user), ("time", data.time))
        )
        reads |= {self.user, self.time} - {""} if data.histories else set()
        need, used = joins.asked(reads)
        self.types = {name: have[name] for name in sorted(need) if name in have}
        if unknown := sorted(need - set(have)):
            raise src.DataError(
                f"The type of column {', '.join(f'`{n}`' for n in unknown)} is not known: the table `{data.rows}` is not in "
                f"{src.root_of(data, Path())}. Give the folder that holds the run's tables."
            )
        self.joins = joins.use(used, reads)
        full = joined(pl.DataFrame(schema=self.types), self.joins).schema
        self.exprs = row_expressions(data, full, False)
        self.users = canonical_type(have[self.user]) if self.user in have else None
        self.per_second = 1.0
        if self.time in have:
            time = src.expression(data.time, have, "data.time")
            _, self.per_second = src.to_time(time, src._dtype(data.time, have), data.time_unit, "data.time")
        self.checks = LabelChecks(data, fitted.schema)

    @contextlib.contextmanager
    def encoded(self, columns: Mapping[str, pl.Series], attach: Callable[[Encoded], None]) -> Iterator[Encoded]:
        """The encoded rows, without events.

        Args:
            columns: those of ``types``; attach: what lets the table read pictures and texts for a model.

        Raises:
            DataError: the rows are not as declared.
        """
        sink, rows = InMemory(), len(next(iter(columns.values())))
        root = src.root_of(self.data, Path())
        about = {"rows": rows, "per_second": self.per_second, "root": str(root)}
        contents = [(place, f) for place, f in enumerate(self.data.features) if f.has_content]
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unbraid-"))) if contents else Path()
            writers = {f.name: Writer(folder, place, f, root) for place, f in contents}
            with src.reading("The rows"):
                frame = joined(pl.DataFrame(list(columns.values())), self.joins).select(**self.exprs)
            write_rows(frame, self.data, self.fitted, sink, self.checks, False, writers)
            for writer in writers.values():
                writer.finish(lambda what, done, total: None)
            encoded = Encoded.of(sink.arrays, self.fitted, about, folder)
            attach(encoded)
            yield encoded


def _only(role: str, source: str, have: Mapping[str, Any]) -> str:
    """The one column that a role reads; empty without the role."""
    names = sorted(roots(source, have)) if source else []
    if len(names) > 1:
        raise src.DataError(
            f"`data.{role}` should read one column, so that a request can give it. Found {', '.join(names)}."
        )
    return names[0] if names else ""


def example(name: str, dtype: Any, data: src.Data, fitted: Fitted) -> Any:
    """A value that the run knows of a column that features or event fields read as it is, else any of its kind."""
    kind = kind_of(dtype)
    named = [(f.kind, f.name, f.vocab) for f in data.features if f.source == name]
    named += [("id", f.name, f.vocab) for s in data.events for f in data.fields if s.columns.get(f.name) == name]
    for role, feature, vocabulary in named:
        if role in ("id", "bag") and len(values := fitted.vocabularies[vocabulary].values):
            value = values[0]
            return [value] if kind.startswith("list") else value if _fits(value, kind) else KINDS[kind][2]
        if role == "vector":
            return [0.5] * fitted.schema.widths[feature]
    return [KINDS[kind[5:-1]][2]] if kind.startswith("list") else KINDS[kind][2]


def _fits(value: Any, kind: str) -> bool:
    return not any(True for _ in _odd([value], kind))
