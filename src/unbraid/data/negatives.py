"""Sampled negatives for logs of positives only."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from unbraid.data.declaration import Negatives
from unbraid.data.source import ROW_KEY, SPLIT, DataError, listed
from unbraid.data.vocabulary import stable_hash


def add_negatives(plan: pl.LazyFrame, negatives: Negatives) -> pl.LazyFrame:
    """Each row, followed by its copies with sampled items and labels 0.

    The draw is a hash of (row, copy, seed): the same for every run, however the data are cut into chunks.  Items come
    from the training split alone.  An item equal to the row's own is drawn again once (a collision with another
    positive of the user is kept: the log does not say that the user would not have liked it).

    Raises:
        DataError: no such item column, or fewer than two items.
    """
    schema = plan.collect_schema()
    if negatives.item not in schema:
        raise DataError(f"data.negatives: there is no column `{negatives.item}`. Columns: {listed(schema)}.")
    counts = plan.filter(pl.col(SPLIT) == 0).group_by(negatives.item).len().drop_nulls().sort(negatives.item).collect()
    if len(counts) < 2:
        raise DataError(
            f"data.negatives: `{negatives.item}` has {len(counts)} values in the training split; two are needed."
        )
    weight = counts["len"].to_numpy() if negatives.sampling == "popularity" else np.ones(len(counts))
    edges = np.cumsum(weight) / weight.sum()
    items = counts[negatives.item]

    def draw(keys: pl.Series, salt: int) -> np.ndarray:
        uniform = stable_hash(keys, negatives.seed * 7919 + salt).astype(np.float64) / 2.0**64
        return np.searchsorted(edges, uniform, side="right").clip(max=len(items) - 1)

    copies = negatives.per_positive + 1

    def expand(frame: pl.DataFrame) -> pl.DataFrame:
        at = np.repeat(np.arange(len(frame)), copies)
        copy = np.tile(np.arange(copies), len(frame))
        key = pl.Series(frame[ROW_KEY].to_numpy()[at].astype(np.int64) * copies + copy)
        first, second = draw(key, 1), draw(key, 2)
        out = frame[at]
        own = out[negatives.item]
        sampled = pl.Series(own.name, np.where((items.gather(first) == own).fill_null(False).to_numpy(), second, first))
        negative = pl.Series("negative", copy > 0)
        item = pl.select(pl.when(negative).then(items.gather(sampled)).otherwise(own).alias(own.name)).to_series()
        label = pl.Series((copy == 0).astype(np.int8))
        return out.drop(ROW_KEY).with_columns(item, *(label.alias(name) for name in negatives.labels))

    out_schema: dict[str, Any] = {**schema, **{name: pl.Int8 for name in negatives.labels}}
    return plan.with_row_index(ROW_KEY).map_batches(expand, schema=pl.Schema(out_schema), streamable=True)
