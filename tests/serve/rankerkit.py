"""Bundles, a store in memory and the bundled log for tests of the ranker."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid import recipes
from unbraid.bundle import Bundle, build
from unbraid.config import Run
from unbraid.data.encode import encode
from unbraid.data.fitted import Fitted
from unbraid.data.source import Tables, bundled
from unbraid.serve.store import Page, Record


class Memory:
    """A store in memory, as plain as can be; ``fault`` is raised by reads."""

    def __init__(self) -> None:
        self.held: dict[int, list[tuple[int, Record]]] = {}  # user -> (arrival, record)
        self.settings: dict[str, str] = {}
        self.generation, self.fault, self.reads = 1, None, []  # type: ignore[var-annotated]

    def append(self, events: Sequence[tuple[int, Record]]) -> list[bool]:
        new = []
        for user, record in events:
            mine = self.held.setdefault(user, [])
            new.append(all(known.id != record.id for _, known in mine) if len(mine) < 5_000 else True)
            if new[-1]:
                mine.append((len(mine) + 1, record))
        return new

    def read(self, user: int, generation: int = 0, after: int = 0) -> Page:
        if self.fault is not None:
            raise self.fault
        mine = self.held.get(user, [])
        if not mine:
            return Page(0, 0, [], True)
        whole = generation != self.generation
        found = sorted((r.time, n) for n, r in mine if whole or n > after)
        records = dict(mine)
        self.reads.append(len(found))
        return Page(self.generation, len(mine), [records[n] for _, n in found], whole)

    def delete(self, user: int) -> int:
        return len(self.held.pop(user, []))

    def get(self, name: str) -> str | None:
        return self.settings.get(name)

    def set(self, name: str, text: str) -> None:
        self.settings[name] = text

    @property
    def users(self) -> Any:
        return sorted(self.held)


def untrained(run: Run, cache: Path, tables: Tables | None = None, std: float = 0.3) -> Bundle:
    """The run's bundle with random weights, tables too: training would not change what is tested, only take long."""
    data = dataclasses.replace(run.data, cache=str(cache))
    fitted = Fitted.load(encode(data, tables=tables))
    model = build(run, fitted.schema)
    for table in model.tables.values():
        table.weight.data.normal_(0.0, std)
    return Bundle(dataclasses.replace(run, data=data), fitted, model.eval(), {})


def kuairand_rows(count: int, seed: int = 0) -> pl.DataFrame:
    """Rows of the bundled log without labels, some of users, videos and categories that nobody knows."""
    folder = bundled("kuairand")
    assert folder is not None
    run = recipes.kuairand()
    rows = (
        pl.scan_parquet(folder / "impressions.parquet")
        .filter(pl.sql_expr(run.keep))
        .unique(maintain_order=True)
        .collect()
    )
    rows = rows.sample(count, seed=seed, shuffle=True).drop(*(task.source for task in run.tasks))
    draw = np.random.default_rng(seed).random(count)
    return rows.with_columns(
        pl.when(pl.Series(draw < 0.02)).then(987_654_321).otherwise(pl.col("video_id")).alias("video_id"),
        pl.when(pl.Series(draw > 0.98)).then(123_456_789).otherwise(pl.col("user_id")).alias("user_id"),
    )


def candidates(rows: pl.DataFrame, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows as a client sends them."""
    return rows.select(columns).to_dicts()
