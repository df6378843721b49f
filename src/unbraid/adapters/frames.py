"""Tables in memory of other libraries as Polars frames.

Whatever the package takes as a table in memory (``tables=`` of `unbraid.job.train`, rows to predict ...) goes through `lazy`:
Polars frames as they are, pandas DataFrames, Arrow tables, datasets of Hugging Face, columns in a dict, and whatever else
speaks Arrow's stream protocol.  None of these libraries is imported here unless its table comes.

Types stay: dates and times with their zone, categories, lists, decimals.  What changes is said at `lazy`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from unbraid.data.text import DataError

Table = Any  # what `lazy` takes; a union of types that need not be installed

PERMITTED = (
    "a Polars DataFrame or LazyFrame, a pandas DataFrame, a pyarrow Table, RecordBatchReader or Dataset, a Hugging Face Dataset "
    "or IterableDataset, columns in a dict, or anything with `__arrow_c_stream__`"
)


def in_polars(tables: Mapping[str, Table] | None) -> dict[str, pl.LazyFrame] | None:
    """Each table by `lazy`, once, so that later readers find Polars' own."""
    return None if tables is None else {name: lazy(table, f"Table `{name}`") for name, table in tables.items()}


def lazy(table: Table, what: str = "The table") -> pl.LazyFrame:
    """A plan over a table in memory.

    pandas: NaN, NaT and None are nulls; the index is left out.  Hugging Face: a picture becomes its bytes, or its path where no
    row has bytes; a class label stays a number; arrays of several dimensions become flat lists; an IterableDataset is read once,
    into memory.  Arrow: extension types become what they are stored as.

    Args:
        what: what to call it in messages.

    Raises:
        DataError: it is no table, a column's values are of several types, or columns share a name.
    """
    if isinstance(table, pl.LazyFrame | pl.DataFrame):
        return table.lazy()
    try:
        return _read(table, what).lazy()
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{what} needs pyarrow to be read: pip install pyarrow ({error}).") from error
    except Exception as error:
        raise DataError(f"{what} cannot be read: {error}") from error


def _read(table: Table, what: str) -> pl.DataFrame | pl.LazyFrame:
    if _is(table, "pandas", "DataFrame"):
        return _of_pandas(table, what)
    if _is(table, "pyarrow", "Table"):
        return _of_arrow(table)
    if _is(table, "pyarrow", "RecordBatchReader"):
        return _of_arrow(table.read_all())
    if _is(table, "pyarrow.dataset", "Dataset"):
        return _of_arrow(table.to_table())
    if _is(table, "datasets", "Dataset"):
        return _of_datasets(table, table.with_format("arrow")[:], what)
    if _is(table, "datasets", "IterableDataset"):
        return _of_stream(table, what)
    if _is(table, "datasets", "DatasetDict") or _is(table, "datasets", "IterableDatasetDict"):
        raise DataError(
            f"{what} is a dict of datasets, {', '.join(table)}. Hand over one of them, or join them with a column that says "
            "which (`datasets.concatenate_datasets`), for `data.split.kind` `column`."
        )
    if isinstance(table, Mapping) or hasattr(table, "__arrow_c_stream__"):
        return pl.DataFrame(table)
    raise DataError(f"{what} should be {PERMITTED}. Found {type(table).__module__}.{type(table).__qualname__}.")


def _is(table: Table, module: str, name: str) -> bool:
    """Is it of that class?  A module that nobody has imported can have made no table."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(table, cls)


def _of_pandas(table: Table, what: str) -> pl.DataFrame:
    names = [str(name) for name in table.columns]
    if table.columns.nlevels > 1 or len(set(names)) < len(names):
        raise DataError(f"{what}: columns should have one name each, all different. Found {names[:8]}.")
    try:
        return pl.from_pandas(table)
    except ImportError:
        raise
    except Exception as error:  # of Arrow, which does not say which column
        for name, (_, column) in zip(names, table.items(), strict=True):
            try:
                pl.from_pandas(column)
            except Exception as inner:
                raise DataError(
                    f"{what}: column `{name}` ({column.dtype}) cannot be read: {inner}. Give all its values one type, "
                    f'such as with `.astype("string")`.'
                ) from error
        raise


def _of_arrow(table: Any) -> pl.DataFrame:
    import pyarrow as pa

    for place, field in enumerate(table.schema):
        kind = field.type
        if isinstance(kind, pa.BaseExtensionType):
            stored = table.column(place).cast(kind.storage_type)
            table = table.set_column(place, pa.field(field.name, kind.storage_type), stored)
    if len(set(table.column_names)) < table.num_columns:
        raise DataError(f"Columns should have different names. Found {table.column_names[:8]}.")
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


# -------------------------------------------------------------------------------------------------------- Hugging Face
def _of_stream(table: Any, what: str) -> pl.DataFrame:
    import pyarrow as pa

    parts = list(table.with_format("arrow").iter(batch_size=10_000))
    if not parts:
        raise DataError(f"{what} has no rows.")
    return _of_datasets(table, pa.concat_tables(parts, promote_options="default"), what)


def _of_datasets(table: Any, arrow: Any, what: str) -> pl.DataFrame:
    """The rows of a dataset, which are those of ``arrow``."""
    import datasets
    from datasets.features.features import _ArrayXD

    frame, features = _of_arrow(arrow), table.features or {}
    changes = []
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            changes.append(_pictures(frame[name], f"{what}: column `{name}`"))
        elif isinstance(feature, _ArrayXD):
            flat = frame[name]
            for _ in feature.shape[1:]:  # rows of one length each, so that only their order is to keep
                flat = flat.list.eval(pl.element().explode())
            changes.append(flat)
    return frame.with_columns(changes)


def _pictures(column: pl.Series, what: str) -> pl.Series:
    """Bytes of pictures that are stored as bytes or paths; paths where no row has bytes."""
    if column.dtype == pl.Binary or column.dtype == pl.String:
        return column
    raw, path = column.struct.field("bytes"), column.struct.field("path")
    if raw.null_count() == len(raw):
        return path.alias(column.name)
    if raw.null_count() == column.null_count():
        return raw.alias(column.name)

    def read(place: str | None) -> bytes | None:
        try:
            return None if place is None else Path(place).read_bytes()
        except OSError as error:
            raise DataError(f"{what}: {place} cannot be read: {error.strerror}.") from error

    found = [data if data is not None else read(place) for data, place in zip(raw, path, strict=True)]
    return pl.Series(column.name, found, pl.Binary)
