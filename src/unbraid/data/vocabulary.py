"""From values to codes: vocabularies fitted on the training split, and hashes that never change."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from unbraid.data import dictionary
from unbraid.data.dictionary import Dictionary, pieces
from unbraid.data.spill import Room, highest
from unbraid.types import FIRST_VALUE, MISSING, UNKNOWN

FEW_ROWS = 4_096  # up to so many, values are found one by one: joins cost more to prepare
FEW_VALUES = 65_536  # up to so many, in a dictionary that is kept; among more by bisection


def canonical(expr: pl.Expr, dtype: Any) -> pl.Expr:
    """Ids in one of three types: Int64, Float64 or String, so that readers of one vocabulary agree."""
    return expr.cast(canonical_type(dtype))


def canonical_type(dtype: Any) -> Any:
    """The type that `canonical` gives."""
    return pl.Int64 if dtype.is_integer() or dtype == pl.Boolean else pl.Float64 if dtype.is_float() else pl.String


def stable_hash(values: pl.Series, seed: int = 0) -> np.ndarray:
    """(n,) uint64 hash of canonical ids, the same on every machine and in every version (Polars' own hash may change).

    A null hashes to 0.
    """
    nulls = values.null_count() > 0
    if values.dtype in (pl.Int64, pl.Float64):
        bits = (values.fill_null(0) if nulls else values).to_numpy().view(np.uint64)
    else:  # Python touches each distinct text once, not each row
        unique = values.drop_nulls().unique()
        digests = [int.from_bytes(hashlib.blake2b(v.encode(), digest_size=8).digest()) for v in unique]
        table = pl.DataFrame({"value": unique, "hash": pl.Series(digests, dtype=pl.UInt64)})
        joined = pl.DataFrame({"value": values}).join(table, on="value", how="left", maintain_order="left")
        bits = joined["hash"].fill_null(0).to_numpy()
    with np.errstate(over="ignore"):  # splitmix64
        x = bits + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) & 0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    if nulls:
        x[values.is_null().to_numpy()] = 0
    return x


@dataclass(frozen=True)
class Vocabulary:
    """Values of one id space in sorted order; value i has code ``FIRST_VALUE + i``.

    Args:
        values: the known values (Int64, Float64 or String, no nulls); many are a dictionary on disk.
        buckets: so many rows after the values, for unknown values by hash.
    """

    values: pl.Series | Dictionary
    buckets: int = 0

    @property
    def size(self) -> int:
        """Number of codes, unknown and missing included."""
        return FIRST_VALUE + len(self.values) + self.buckets

    @property
    def dtype(self) -> str:
        """Smallest NumPy integer type that holds every code."""
        return "uint8" if self.size <= 2**8 else "uint16" if self.size <= 2**16 else "int32"

    def names(self) -> list[str]:
        """Each code in words."""
        return [self.name(code) for code in range(self.size)]

    def name(self, code: int) -> str:
        """A code in words."""
        place = code - FIRST_VALUE
        if place < 0:
            return "(unknown)" if code == UNKNOWN else "(missing)"
        return str(self.values[place]) if place < len(self.values) else f"(bucket {place - len(self.values)})"

    def encode(self, column: pl.Series) -> np.ndarray:
        """(n,) codes of a column in the vocabulary's type."""
        codes = self._known(column)
        missing = column.is_null().to_numpy() if column.null_count() else np.zeros(len(column), dtype=bool)
        if self.buckets:
            strange = np.flatnonzero((codes == UNKNOWN) & ~missing)
            if len(strange):
                hashed = stable_hash(column.gather(strange)) % np.uint64(self.buckets)
                codes[strange] = hashed.astype(np.int64) + FIRST_VALUE + len(self.values)
        codes[missing] = MISSING
        return codes.astype(self.dtype)

    @cached_property
    def _codes(self) -> dict[Any, int]:
        every = itertools.chain.from_iterable(piece.to_list() for piece in pieces(self.values))
        return {value: FIRST_VALUE + i for i, value in enumerate(every)}

    def _known(self, column: pl.Series) -> np.ndarray:
        if isinstance(self.values, Dictionary):
            place = self.values.find(column)
            return np.where(place < 0, UNKNOWN, place + FIRST_VALUE)
        if column.dtype == pl.Int64 and len(self.values):
            known, asked = self.values.to_numpy(), (column.fill_null(0) if column.null_count() else column).to_numpy()
            # in order, the search of a large vocabulary stays in the processor's cache
            order = np.argsort(asked) if len(known) > 2**16 else slice(None)
            place = np.empty(len(asked), dtype=np.int64)
            place[order] = np.searchsorted(known, asked[order]).clip(max=len(known) - 1)
            return np.where(known[place] == asked, place + FIRST_VALUE, UNKNOWN)
        if len(column) <= FEW_ROWS and len(self.values) <= FEW_VALUES:
            return np.array([self._codes.get(value, UNKNOWN) for value in column.to_list()], dtype=np.int64)
        if len(column) <= FEW_ROWS:
            given = column.fill_null(self.values[0])
            at = self.values.search_sorted(given).to_numpy().astype(np.int64).clip(max=len(self.values) - 1)
            return np.where((self.values.gather(at) == given).to_numpy(), at + FIRST_VALUE, UNKNOWN)
        table = pl.DataFrame({"value": self.values, "code": np.arange(len(self.values)) + FIRST_VALUE})
        joined = pl.DataFrame({"value": column}).join(table, on="value", how="left", maintain_order="left")
        return joined["code"].fill_null(UNKNOWN).to_numpy().astype(np.int64)


def fit(
    readers: Sequence[Iterable[pl.DataFrame]],
    kind: Any,
    min_count: int,
    buckets: int,
    grow: Vocabulary | None,
    room: Room,
) -> Vocabulary:
    """The vocabulary of several readers.

    Args:
        readers: each a series of frames (value, count) of the training split, a value once, in order.
        kind: type of the values, Int64, Float64 or String.
        min_count: a value stays when one reader sees it so often (the largest count, not the sum: a row that is also an
            event would count twice).
        grow: an earlier model's vocabulary, whose values stay whatever their count.
        room: where it may spill; a dictionary of many values lies in its folder, too.
    """
    windows: Iterable[pl.DataFrame] = readers[0] if readers else ()
    merged = room.sorter("readers", "value", fold=highest)
    old = grow.values if grow is not None else pl.Series(dtype=kind)
    if len(readers) > 1 or len(old):
        for frame in (frame for reader in readers for frame in reader):
            merged.add(frame)
        for piece in pieces(old):
            merged.add(pl.DataFrame({"value": piece.cast(kind), "count": np.full(len(piece), 2**62)}))
        windows = merged.windows()
    values = _listed((frame.filter(pl.col("count") >= min_count)["value"] for frame in windows), kind, room)
    merged.close()
    return Vocabulary(values, buckets)


def _listed(parts: Iterator[pl.Series], kind: Any, room: Room) -> pl.Series | Dictionary:
    """Values that come in their order, in memory or, when they are many, on disk."""
    held, count = [pl.Series("value", dtype=kind)], 0
    for part in parts:
        held.append(part)
        count += len(part)
        if count > dictionary.LARGE:
            folder = room.folder / "dictionaries"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{len(list(folder.iterdir())):03d}.bin"  # those of other vocabularies are mapped
            return dictionary.write(path, kind, itertools.chain(held, parts))
    return pl.concat(held, rechunk=True)
