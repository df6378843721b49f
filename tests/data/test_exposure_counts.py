"""Exposure counts against a loop, in and across chunks, of rows in any order; nulls; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid.data import encode as encoding
from unbraid.data.declaration import Negatives, Split
from unbraid.data.encode import encode
from unbraid.data.exposure import earlier, keys_of
from unbraid.data.source import DataError
from unbraid.data.spill import Room
from unbraid.data.table import Encoded
from unbraid.job import train
from unbraid.predictor import Predictor


def counted(log: pl.DataFrame, columns: list[str]) -> list[int]:
    """A loop over rows in order of time, rows of one instant as they stand."""
    seen: dict[Any, int] = {}
    found = [0] * len(log)
    times = log["time"].to_list()
    for i in sorted(range(len(log)), key=lambda i: (times[i], i)):
        key = log.select(columns).row(i)
        if None in key:
            continue
        found[i] = seen.get(key, 0)
        seen[key] = found[i] + 1
    return found


def mixed() -> pl.DataFrame:
    """The toy log in a random order, with ties in time, texts and nulls in its keys."""
    rng = np.random.default_rng(0)
    log = make_log(users=8).with_columns(time=pl.col("time") // 50_000_000 * 50_000_000)
    log = log[rng.permutation(len(log))]
    return log.with_columns(item=pl.when(pl.Series(rng.random(len(log)) < 0.1)).then(None).otherwise("item"))


@pytest.mark.parametrize(
    "columns", [["user", "item"], ["user", "shop"], ["shop", "user"], ["shop"], ["user", "shop", "site"]]
)
@pytest.mark.parametrize("chunk", [37, 200_000])
def test_counts_are_those_of_a_loop(columns: list[str], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK", chunk)
    log = mixed()
    table = Encoded(encode(make_data(exposure=tuple(columns)), tables={"log": log}))
    want = counted(log, columns)
    rows = np.random.default_rng(1).permutation(len(log))
    got = table.batch(rows).meta["exposure"]
    assert got.dtype == torch.int64
    assert got.tolist() == [want[i] for i in rows] and max(want) >= 5
    assert len(set(log["time"].to_list())) < len(log) / 10, "there should be ties"


def test_expressions_and_counts_of_all_splits() -> None:
    log = make_log()
    table = Encoded(encode(make_data(exposure=("user", "shop % 2")), tables={"log": log}))
    want = counted(log.with_columns(half=pl.col("shop") % 2), ["user", "half"])
    assert table.batch(np.arange(len(log))).meta["exposure"].tolist() == want
    first = min(want[i] for i in table.split("test"))
    assert first > 0, "rows of the test split count what was shown before"


def test_keys_tell_columns_apart_and_nulls_are_nobody() -> None:
    a, b = pl.Series([1, 2, 1, None, 1]), pl.Series(["x", "x", "y", "x", None])
    keys = keys_of([a, b])
    assert keys[3] == keys[4] == 0 and len(set(keys[:3].tolist())) == 3
    numbers = pl.Series([1, 2])
    one, two = keys_of([numbers, numbers.reverse()])
    assert one != two, "(1, 2) is not (2, 1)"


@pytest.mark.parametrize("limit", [1, 1 << 20])
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_times_that_do_not_ascend(limit: int, piece: int, tmp_path: Path) -> None:
    keys = np.array([5, 7, 5, 5, 0, 0, 7], dtype=np.uint64)
    times = np.array([3, 1, 1, 3, 1, 2, -4])
    chunks = [(keys[at : at + piece], times[at : at + piece]) for at in range(0, len(keys), piece)]
    found = np.concatenate(list(earlier(chunks, Room(tmp_path, limit))))
    assert found.tolist() == [1, 1, 0, 2, 0, 0, 0] and found.dtype == np.int32
    assert not list(tmp_path.iterdir())


def test_without_it_there_are_no_counts() -> None:
    table = Encoded(encode(make_data(), tables={"log": make_log()}))
    assert "exposure" not in table.batch(np.arange(3)).meta


def test_rows_to_predict_need_no_counts_nor_their_columns() -> None:
    log = make_log()
    bundle = train(make_run(data=make_data(exposure=("user", "site"))), tables={"log": log}, baseline=False).bundle
    rows = log[:20]
    assert len(Predictor(bundle).predict(rows.drop("click"), tables={"log": log})) == 20
    assert "exposure" not in Predictor(bundle).scores(rows, tables={"log": log}).meta


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="`exposure` needs `data.time`"):
        make_data(exposure=("user",), time="", histories=(), split=Split())
    with pytest.raises(ValueError, match="and no sampled negatives"):
        make_data(exposure=("user",), negatives=Negatives("item", labels=("click", "buy")))
    with pytest.raises(DataError, match="data.exposure: there is no column `nothing`"):
        encode(make_data(exposure=("user", "nothing")), tables={"log": make_log()})
