"""How often a row's user had been shown its item before: counted over the whole log, in order of time."""

from __future__ import annotations

import numpy as np
import polars as pl

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


def earlier(keys: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(n,) int32: for each row, how many rows of its key are before it; 0 for key 0.

    Args:
        keys: (n,) uint64; times: (n,) int64.  Rows of one instant are in the order in which they stand.
    """
    order = np.lexsort((times, keys))  # stable
    place, ordered = np.arange(len(keys)), keys[order]
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    counts = np.empty(len(keys), dtype=np.int32)
    counts[order] = place - np.maximum.accumulate(np.where(starts, place, 0))
    counts[keys == NOBODY] = 0
    return counts
