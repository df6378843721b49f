"""Rows and predictions as streams of Apache Arrow (https://arrow.apache.org), checked as strictly as JSON.

What arrives is not trusted.  First its schema is compared with the columns that the bundle reads, so that only flat columns and
lists of them get further.  Then the messages are looked at: their kinds, how many rows they say that they have, and that none is
compressed, for a small body could become any size.  Then buffers, offsets and text are validated before anything follows them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from unbraid.serve.errors import ApiError
from unbraid.serve.shape import dtype_of

if TYPE_CHECKING:
    from unbraid.serve.shape import Columns

MEDIA = "application/vnd.apache.arrow.stream"
END = b"\xff\xff\xff\xff\0\0\0\0"
BIGGEST = 2**63 - 1
OLDEST = (
    "Text should be string or large_string, not a view or a dictionary (Polars: compat_level=CompatLevel.oldest())."
)


def library() -> Any:
    """pyarrow.  Raises ApiError where the service has none."""
    try:
        import pyarrow.compute
        import pyarrow.ipc
    except ImportError:
        raise ApiError(415, 'The service has no Arrow: it needs pip install "unbraid[serve]". Use JSON.') from None
    return pyarrow


# -------------------------------------------------------------------------------------------------------------- requests
def read(body: bytes, columns: Columns, most: int) -> pl.DataFrame:
    """Rows of a stream.

    Args:
        columns: that a client sends; most: rows.

    Returns:
        All these columns, as Int64, Float64, String, Boolean or lists of them; null where they were not sent and need not be.

    Raises:
        ApiError: 400 where it is no stream of Arrow; 415 without pyarrow; 422 where columns or values are not as they should be.
    """
    arrow = library()
    try:
        # by the reader that Arrow's own fuzzing knows: its parts alone take any message for the one that they expect
        with arrow.ipc.open_stream(
            arrow.py_buffer(body), options=arrow.ipc.IpcReadOptions(use_threads=False)
        ) as reader:
            _check_schema(reader.schema, columns)
            _check_messages(body, most)
            table = reader.read_all()
        table.validate(full=True)
        if not table.num_rows:
            raise ApiError(422, "There should be at least one row. Found none.", "rows")
        return pl.DataFrame([_column(name, one.kind, table) for name, one in columns.items()])
    except (arrow.ArrowException, OSError, StopIteration, UnicodeDecodeError, struct.error) as error:
        said = " ".join(str(error).split())[:300] or "it is empty"
        raise ApiError(400, f"The body should be a stream of Arrow ({MEDIA}): {said}.") from None


def _check_messages(body: bytes, most: int) -> None:
    """Raises ApiError unless the body is a schema and batches that are not compressed and have no more rows than that."""
    arrow, rows = library(), 0
    source = arrow.BufferReader(body)
    for place, message in enumerate(arrow.ipc.MessageReader.open_stream(source)):
        if message.type != ("record batch" if place else "schema"):
            raise ApiError(
                400, f"The stream should hold a schema and record batches. Found a {message.type} as message {place}."
            )
        if place:
            length, compressed = _about(message.metadata.to_pybytes())
            rows += length
            if compressed:
                raise ApiError(415, "The stream's batches should not be compressed.")
            if not 0 <= length <= rows <= most:
                raise ApiError(422, f"There should be at most {most:,} rows. Found more.", "rows")
    if source.tell() != len(body) or not body.endswith(END):
        raise ApiError(400, "The stream does not end where the body does: it was cut short, or more follows it.")


def _about(metadata: bytes) -> tuple[int, bool]:
    """Rows of a record batch, and whether it is compressed: pyarrow says neither before it has read it.

    These are fields 0 and 3 of the table ``RecordBatch``, which is field 2 of ``Message``, as flatbuffers lay them out: a table
    begins with how far before it its list of fields is; that has its own length in bytes, and each field's place in the table.
    """

    def place(table: int, field: int) -> int:
        fields = table - struct.unpack_from("<i", metadata, table)[0]
        (size,) = struct.unpack_from("<H", metadata, fields)
        at = struct.unpack_from("<H", metadata, fields + 4 + 2 * field)[0] if 4 + 2 * field < size else 0
        return table + at if at else 0

    header = place(struct.unpack_from("<I", metadata)[0], 2)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    length = place(batch, 0)
    return struct.unpack_from("<q", metadata, length)[0] if length else 0, bool(place(batch, 3))


def _check_schema(schema: Any, columns: Columns) -> None:
    """Raises ApiError for a column that is unknown, missing, twice there or of another type."""
    if len(set(schema.names)) < len(schema.names):
        raise ApiError(422, "A column stands more than once in the stream.", "rows")
    for name in schema.names:
        if name not in columns:
            raise ApiError(422, f"There is no such key. Allowed: {', '.join(columns)}.", f"rows.{name}")
        kind, found = columns[name].kind, schema.field(name).type
        if not _allowed(found, kind):
            hint = f" {OLDEST}" if kind.endswith(("str", "str]")) else ""
            raise ApiError(
                422, f"Column `{name}` should be of type {kind}. Found {str(found)[:100]}.{hint}", f"rows.{name}"
            )
    for name, column in columns.items():
        if column.required and name not in schema.names:
            raise ApiError(422, "Field required", f"rows.{name}")


def _allowed(found: Any, kind: str) -> bool:
    """Whether a column of this type may be sent for one of a kind; one of nulls has no other type in some libraries."""
    have, wanted = kind_of(found, library()), kind.partition("[")[0]
    if have == wanted == "list":
        return _allowed(found.value_type, kind[5:-1])
    return have in (wanted, "null") or (have, wanted) == ("int", "float")


def kind_of(found: Any, arrow: Any) -> str:
    """``int``, ``float``, ``str``, ``bool``, ``list`` or ``null``; empty for types that are not read."""
    types = arrow.types
    kinds = {
        "int": (types.is_integer,), "float": (types.is_floating,), "bool": (types.is_boolean,), "null": (types.is_null,),
        "str": (types.is_string, types.is_large_string), "list": (types.is_list, types.is_large_list),
    }  # fmt: skip
    return next((kind for kind, tests in kinds.items() if any(test(found) for test in tests)), "")


def _type(kind: str, arrow: Any) -> Any:
    """The type that columns of a kind become."""
    if kind.startswith("list["):
        return arrow.large_list(_type(kind[5:-1], arrow))
    return {"int": arrow.int64(), "float": arrow.float64(), "str": arrow.large_string(), "bool": arrow.bool_()}[kind]


def _column(name: str, kind: str, table: Any) -> pl.Series:
    """A column with the values that JSON may have: whole numbers of 64 bits, finite ones, no null within a list."""
    arrow = library()
    if name not in table.column_names or arrow.types.is_null(table.schema.field(name).type):
        return pl.Series(name, [None], dtype=dtype_of(kind)).new_from_index(0, table.num_rows)
    inner, rows = table[name].combine_chunks(), np.arange(table.num_rows)
    while kind_of(inner.type, arrow) == "list":  # values end to end, and which row each is of
        rows = np.repeat(rows, arrow.compute.fill_null(arrow.compute.list_value_length(inner), 0))
        inner = arrow.compute.list_flatten(inner)
        _refuse(name, arrow.compute.is_null(inner), rows, "a list should have no null")
    if inner.type == arrow.uint64():
        _refuse(
            name,
            arrow.compute.greater(inner, arrow.scalar(BIGGEST, arrow.uint64())),
            rows,
            f"a number should be at most {BIGGEST}",
        )
    if kind_of(inner.type, arrow) == "float":
        _refuse(name, arrow.compute.invert(arrow.compute.is_finite(inner)), rows, "a number should be finite")
    return pl.Series(name, pl.from_arrow(table[name].cast(_type(kind, arrow), safe=False)))


def _refuse(name: str, wrong: Any, rows: np.ndarray, message: str) -> None:
    """Raises ApiError where one is true, with its row."""
    places = np.flatnonzero(wrong.fill_null(False).to_numpy(zero_copy_only=False))
    if len(places):
        raise ApiError(422, f"In column `{name}` {message}.", f"rows.{rows[places[0]]}.{name}")


# --------------------------------------------------------------------------------------------------------------- answers
def asked(accept: str) -> bool:
    """Whether an ``Accept`` names Arrow."""
    parts = [part.split(";") for part in accept.lower().split(",")]
    return any(kind.strip() == MEDIA and "q=0" not in [p.replace(" ", "") for p in more] for kind, *more in parts)


def write(values: Mapping[str, np.ndarray]) -> bytes:
    """(N,) and (N, K) arrays as a stream of one batch; the latter as lists of K."""
    arrow = library()
    columns = [
        arrow.array(v) if v.ndim == 1 else arrow.FixedSizeListArray.from_arrays(arrow.array(v.ravel()), v.shape[1])
        for v in values.values()
    ]
    batch = arrow.record_batch(columns, names=list(values))
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue())
