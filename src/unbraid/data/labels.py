"""Labels: what of them is allowed, how they are stored, and whether the training split can teach them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from unbraid.data.declaration import Data
from unbraid.data.source import DataError
from unbraid.types import Schema


class LabelChecks:
    """Labels as stored: binary int8 with -1 unobserved, multiclass int32 with -1, real float32 with NaN."""

    def __init__(self, data: Data, schema: Schema) -> None:
        self.data, self.schema = data, schema
        self.seen: dict[str, dict[float, int]] = {t.name: {} for t in data.tasks}

    def encode(self, task: Any, column: pl.Series) -> np.ndarray:
        """Stored form of a chunk's labels.  Raises DataError for values that the kind does not allow."""
        if column.dtype.is_float() and column.is_nan().any():  # a class, too, is not called NaN
            raise DataError(
                f"Task `{task.name}`: {int(column.is_nan().sum()):,} labels are NaN. Write nulls for labels "
                "that are not known."
            )
        if task.kind == "multiclass":
            classes = self.schema.classes[task.name]
            known = {c: i for i, c in enumerate(classes)}
            words = column.cast(pl.String)
            codes = words.replace_strict(list(known), list(known.values()), default=-2, return_dtype=pl.Int32)
            new = column.filter((codes == -2) & column.is_not_null()).unique().to_list()
            if new:
                raise DataError(
                    f"Task `{task.name}`: label(s) {new[:5]} never occur in the training split, whose classes are "
                    f"{classes}."
                )
            return (
                pl.select(pl.when(column.is_null()).then(-1).otherwise(codes)).to_series().to_numpy().astype(np.int32)
            )
        if task.kind == "real":
            if column.is_infinite().any():
                raise DataError(f"Task `{task.name}`: {int(column.is_infinite().sum()):,} labels are infinite.")
            return column.to_numpy().astype(np.float32)
        bad = column.drop_nulls().filter(~column.drop_nulls().is_in([0.0, 1.0]))
        if len(bad):
            raise DataError(
                f"Task `{task.name}`: labels of `{task.source}` should be 0 or 1 (null where not known). Found "
                f"{sorted(set(bad.to_list()))[:5]} in {len(bad):,} rows. Use kind `multiclass` or `real`, or an SQL "
                "expression."
            )
        return column.fill_null(-1.0).to_numpy().astype(np.int8)

    def rate(self, task: Any, column: pl.Series) -> np.ndarray:
        """A chunk's sampling rates.  Raises DataError outside (0, 1]."""
        bad = column.null_count() + int((~((column > 0) & (column <= 1))).sum())
        if bad:
            raise DataError(
                f"Sampling rate of task `{task.name}`: rates should be in (0, 1]. Found others in {bad:,} rows."
            )
        return column.to_numpy()

    def count(self, frame: pl.DataFrame) -> None:
        """Remember which labels the training split shows."""
        train = frame.filter(pl.col("split") == 0)
        positive: dict[str, pl.Series] = {}  # a child is observed where its parent is observed and 1
        for task in self.data.tasks:
            column = train[f"label.{task.name}"]
            known = column.is_not_null() & positive[task.given] if task.given else column.is_not_null()
            if task.kind == "binary":
                positive[task.name] = known & (column == 1.0).fill_null(False)
            column = column.filter(known)
            found = dict(column.value_counts().rows()) if task.kind == "binary" else {0.0: len(column)}
            for value, n in found.items():
                self.seen[task.name][value] = self.seen[task.name].get(value, 0) + n

    def state(self) -> list[tuple[str, list[tuple[float, int]]]]:
        """What is remembered, for `restore`."""
        return [(name, list(seen.items())) for name, seen in self.seen.items()]

    def restore(self, state: Sequence[tuple[str, Sequence[tuple[float, int]]]]) -> None:
        """Remember what an interrupted encode had seen."""
        self.seen |= {name: {value: n for value, n in seen} for name, seen in state}

    def finish(self) -> None:
        """Raises DataError for a task that the training split cannot teach."""
        for task in self.data.tasks:
            seen = {v: n for v, n in self.seen[task.name].items() if n}
            if not seen:
                raise DataError(f"Task `{task.name}`: no label is observed in the training split.")
            if task.kind == "binary" and len(seen) == 1:
                value, n = next(iter(seen.items()))
                raise DataError(
                    f"Task `{task.name}`: all {n:,} observed labels of the training split are {value:g}; both "
                    "classes are needed."
                )
