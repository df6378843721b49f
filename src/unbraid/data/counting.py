"""Values of the training split, counted or sorted in bounded memory: what vocabularies and the scales of numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from unbraid.data import vocabulary
from unbraid.data.ahead import ahead
from unbraid.data.source import DataError
from unbraid.data.spill import AHEAD, Room, Sorter
from unbraid.data.text import holds_whole_numbers
from unbraid.data.vocabulary import Vocabulary, canonical_type
from unbraid.types import Feature

QUANTILES = 256  # values of a number that are remembered
PIECE = 1 << 20  # numbers that are summed at once


class Counted:
    """How often each value of a column, or of a column of lists, occurs.

    Args:
        expr, dtype: of the column; sorter: by ``value``, that adds up; hashed: nothing is counted.
    """

    def __init__(self, expr: pl.Expr, dtype: Any, sorter: Sorter, hashed: bool) -> None:
        lists = isinstance(dtype, pl.List)
        self.kind = canonical_type(dtype.inner if lists else dtype)
        self.expr = expr.cast(pl.List(self.kind) if lists else self.kind)
        self.sorter, self.hashed, self.nan = sorter, hashed, False

    @staticmethod
    def look(column: pl.Series) -> tuple[pl.DataFrame, bool]:
        """(value, count) of some rows, and whether there was a NaN, which is refused once all columns are read."""
        if column.dtype == pl.List:
            column = column.explode(empty_as_null=False, keep_nulls=False)
        column = column.rename("value").drop_nulls()
        nan = column.dtype == pl.Float64 and bool(column.is_nan().any())
        column = column.drop_nans() if nan else column
        return column.value_counts(name="count").cast({"count": pl.Int64}), nan

    def add(self, found: tuple[pl.DataFrame, bool]) -> bool:
        """Count what `look` found.  True: as `Sorter.add`."""
        counts, nan = found
        self.nan = self.nan or nan
        return self.sorter.add(counts)

    def state(self) -> dict[str, Any]:
        """What is known, on disk."""
        self.sorter.spill()
        return {"runs": self.sorter.runs, "records": self.sorter.records, "nan": self.nan}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what was known."""
        self.sorter.runs, self.sorter.records, self.nan = state["runs"], state["records"], state["nan"]

    @property
    def any(self) -> bool:
        """Is there any value?"""
        return self.nan or self.sorter.records > 0


class Numbers:
    """The values of a number, in order.

    Args:
        feature: of kind ``number``; expr: what is read; sorter: by ``value``.
    """

    hashed = False

    def __init__(self, feature: Feature, expr: pl.Expr, sorter: Sorter) -> None:
        self.feature, self.expr, self.sorter = feature, expr, sorter
        self.nans = self.infinite = 0

    @staticmethod
    def look(column: pl.Series) -> tuple[pl.DataFrame, int, int]:
        """(value,) of some rows, and how many are NaN and infinite."""
        column = column.drop_nulls()
        return pl.DataFrame({"value": column}), int(column.is_nan().sum()), int(column.is_infinite().sum())

    def add(self, found: tuple[pl.DataFrame, int, int]) -> bool:
        """Remember what `look` found.  True: as `Sorter.add`."""
        values, nans, infinite = found
        self.nans, self.infinite = self.nans + nans, self.infinite + infinite
        return not (self.nans or self.infinite) and self.sorter.add(values)

    def state(self) -> dict[str, Any]:
        """What is known, on disk."""
        self.sorter.spill()
        return {"runs": self.sorter.runs, "nans": self.nans, "infinite": self.infinite}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what was known."""
        self.sorter.runs, self.nans, self.infinite = state["runs"], state["nans"], state["infinite"]

    def learn(self) -> Learnt:
        """What they teach.  Raises DataError when there are NaN or infinite ones."""
        refuse_bad_numbers(self.feature, self.nans, self.infinite)
        folder, n, lowest, highest, whole = self.sorter.folder, 0, 0.0, 0.0, True
        held, path = np.zeros(0), folder / "sorted.bin"
        path.unlink(missing_ok=True)  # of an interrupted encode
        for window in self.sorter.windows():
            values = window["value"].to_numpy()
            lowest, highest = values[0] if not n else lowest, values[-1]
            whole = whole and bool((values == np.trunc(values)).all())
            n += len(values)
            if not self.sorter.runs:
                held = values
                continue
            with path.open("ab") as file:
                file.write(np.ascontiguousarray(values).data)
        spilled = bool(self.sorter.runs)

        def read(start: int, end: int) -> np.ndarray:
            return np.fromfile(path, np.float64, end - start, offset=8 * start) if spilled else held[start:end]

        return learn(read, n, whole and bool(max(-lowest, highest) <= 2**53))


@dataclass(frozen=True)
class Learnt:
    """What the training values of a number teach.

    Args:
        scale: mean and deviation; quantiles: values at evenly spaced ranks, () of an empty column; whole: are all whole, and
            exact as they are?
    """

    scale: tuple[float, float] = (0.0, 1.0)
    quantiles: tuple[float, ...] = ()
    whole: bool = True


def learn(read: Callable[[int, int], np.ndarray], n: int, whole: bool) -> Learnt:
    """Of n sorted numbers: no order of threads or chunks changes what is learnt.

    Args:
        read: the numbers from one rank to before another; whole: are all whole?
    """
    if not n:
        return Learnt()
    ranks = np.arange(QUANTILES) * (n - 1) // (QUANTILES - 1)
    quantiles = tuple(float(read(rank, rank + 1)[0]) for rank in ranks.tolist())
    mean = float(pairwise(read, 0, n) / n)
    std = float(np.sqrt(pairwise(lambda start, end: (read(start, end) - mean) ** 2, 0, n) / n))
    if std <= 2.0**-23 * abs(mean):
        return Learnt((mean, 1.0), quantiles, whole)  # a (in single precision) constant column becomes 0
    # single precision, so that a sum in another order teaches the same numbers
    scale = float(np.float32(mean)) if abs(mean) > 1e-9 * std else 0.0, float(np.float32(std))
    return Learnt(scale, quantiles, whole)


def pairwise(read: Callable[[int, int], np.ndarray], start: int, end: int) -> Any:
    """The sum of numbers as NumPy's own of the whole array is, bit for bit: it halves in the same places."""
    if end - start <= PIECE:
        return np.add.reduce(np.ascontiguousarray(read(start, end)))
    half = (end - start) // 2
    middle = start + half - half % 8
    return pairwise(read, start, middle) + pairwise(read, middle, end)


def refuse_bad_numbers(feature: Feature, nans: int, infinite: int) -> None:
    """Raises DataError when there are any: so many rows."""
    where = f"Feature `{feature.name}`: `{feature.source}` holds"
    if nans:
        raise DataError(
            f'{where} NaN in {nans:,} rows. A null is missing; to read a NaN as missing too, set nan = "missing" on the '
            "feature."
        )
    if infinite:
        name = feature.source if feature.source.isidentifier() else f"({feature.source})"
        raise DataError(
            f"{where} infinity, or numbers beyond single precision, in {infinite:,} rows, which `nan` is not about. Read them as "
            f'missing, with column = "CASE WHEN ABS({name}) < 1e38 THEN {name} END", or as a number of your choice.'
        )


def read_once(plan: pl.LazyFrame, columns: Sequence[Any], name: str, room: Room) -> None:
    """Give all columns of a plan to what counts or sorts them, in one pass: plans can be costly.

    Args:
        columns: `Counted` and `Numbers`; name: of the pass, in the journal.
    """
    from unbraid.data.encode import chunks

    wanted = {f"__{i}": column for i, column in enumerate(columns) if not column.hashed}
    if not wanted:
        return
    # with_columns: a constant counts once a row
    read = plan.with_columns(**{name: column.expr for name, column in wanted.items()}).select(*wanted)
    done, journal = 0, room.journal
    if before := journal.noted.get(name):
        done = before["done"]
        for column, state in zip(wanted.values(), before["columns"], strict=True):
            column.restore(state)

    def look(frame: pl.DataFrame) -> tuple[int, list[Any]]:
        return len(frame), [column.look(frame[place]) for place, column in wanted.items()]

    for rows, found in ahead(look, chunks(read, done), room.limit // AHEAD):
        done += rows
        spilled = [column.add(one) for column, one in zip(wanted.values(), found, strict=True)]
        if any(spilled) or journal.due():
            journal.note(**{name: {"done": done, "columns": [column.state() for column in wanted.values()]}})


def vocabulary_of(
    name: str, counted: Sequence[Counted], min_count: int, buckets: int, old: Vocabulary | None, room: Room
) -> Vocabulary:
    """The vocabulary of several columns.

    Raises:
        DataError: their values, or those of an earlier model, are of different types, or hold NaN.
    """
    kinds = [c.kind for c in counted if c.any or c.hashed] + ([old.values.dtype] if old and len(old.values) else [])
    if old and set(kinds) == {pl.Int64, pl.String} and holds_whole_numbers(old.values):
        kinds = [pl.String()]  # the earlier log had numbers and words, as text
    if len(set(kinds)) > 1:
        found = ", ".join(sorted({str(kind) for kind in kinds}))
        words = " Read the numbers as text: `CAST(COLUMN AS VARCHAR)` in the place of the column."
        raise DataError(
            f"Vocabulary `{name}` is read from columns (or an earlier model) of different types: {found}."
            + words * (set(kinds) == {pl.Int64, pl.String})
        )
    if any(c.nan for c in counted):
        raise DataError(f"Vocabulary `{name}`: its columns hold NaN. Write nulls for missing ids.")
    kind = kinds[0] if kinds else counted[0].kind
    frames = [(window.cast({"value": kind}) for window in c.sorter.windows()) for c in counted if c.any]
    return vocabulary.fit(frames, kind, min_count, buckets, old, room)
