"""How often a row's user had been shown its item before: counted over the whole log, in order of time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import polars as pl

from unbraid.data.spill import Room, bins
from unbraid.data.vocabulary import stable_hash

NOBODY = np.uint64(0)  # key of a row that lacks one of its columns


def keys_of(columns: list[pl.Series]) -> np.ndarray:
    """(n,) uint64, equal where all columns are equal; 0 where one of them is null.

    Args:
        columns: of one chunk of rows, in canonical types.
    """
    key = np.zeros(len(columns[0]), dtype=np.uint64)
    for place, column in enumerate(columns):
        with np.errstate(over="ignore"):
            key = key * np.uint64(0x9E3779B97F4A7C15) + stable_hash(column, place)  # order of columns matters
    missing = np.any([column.is_null().to_numpy() for column in columns], axis=0)
    return np.where(missing, NOBODY, key)


def earlier(chunks: Iterable[tuple[np.ndarray, np.ndarray]], room: Room) -> Iterator[np.ndarray]:
    """(n,) int32 in pieces: for each row, how many rows of its key are before it; 0 for key 0.

    Args:
        chunks: (n,) uint64 keys and (n,) int64 times, piece by piece.  Rows of one instant are in the order in which they stand.
    """
    sorter, counted = room.sorter("exposure", "bin", "key", "time"), room.sorter("exposed", "row")
    rows = 0
    for keys, times in chunks:
        row = np.arange(rows, rows + len(keys))
        frame = pl.DataFrame({"bin": bins(keys), "key": keys, "time": times, "row": row})
        rows += len(keys)
        known = pl.Series(keys != NOBODY)
        sorter.add(frame.filter(known))
        counted.add(frame.filter(~known).select("row", count=pl.lit(0, pl.Int32)))
    for window in sorter.windows():
        keys, place = window["key"].to_numpy(), np.arange(len(window))
        starts = np.concatenate([[True], keys[1:] != keys[:-1]])
        counts = place - np.maximum.accumulate(np.where(starts, place, 0))
        counted.add(window.select("row", count=pl.Series(counts.astype(np.int32))))
    sorter.close()
    for window in counted.windows():
        yield window["count"].to_numpy()
    counted.close()
